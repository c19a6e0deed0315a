"""What the pods of a run ask Kubernetes for, from its manifest alone. Pure.

pod_groups(rayjob)       submitter, head and groups of workers, each with its containers
needs_of(groups)         the sums, at the start of the run and at most
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from cluster.placement import Manifest
from cluster.quantities import Amounts, parse_amounts, parse_quantity, scaled, sum_amounts

_AUTOSCALER = {"cpu": Decimal("0.5"), "memory": Decimal(512 * 2**20)}
"""What KubeRay gives the container of the autoscaler that it adds to a head."""


@dataclass(frozen=True)
class Container:
    """One container of a pod."""

    name: str
    requests: Amounts
    limits: Amounts
    is_of_kuberay: bool = False
    """Whether KubeRay adds it to what the manifest has."""


@dataclass(frozen=True)
class VolumeClaim:
    """A volume that is made for each pod of a group."""

    storage_class: str | None
    bytes: Decimal


@dataclass(frozen=True)
class PodGroup:
    """Pods that are alike."""

    name: str
    """`submitter`, `head`, or that of a group of workers."""
    fewest: int
    """With which the run starts."""
    most: int
    containers: tuple[Container, ...]
    claims: tuple[VolumeClaim, ...]
    spec: Mapping[str, Any]
    """The pod's, as the manifest has it."""

    def requests(self, *, with_kuberay: bool = True) -> Amounts:
        """Of one pod; `with_kuberay`: with what KubeRay adds."""
        return sum_amounts(
            c.requests for c in self.containers if with_kuberay or not c.is_of_kuberay
        )

    @property
    def limits(self) -> Amounts:
        return sum_amounts(c.limits for c in self.containers)


def pod_groups(rayjob: Manifest) -> list[PodGroup]:
    """Of a RayJob that `cluster.rayjob` made. Init containers of KubeRay ask for less than the
    containers after them, and do not count."""
    spec = rayjob["spec"]
    cluster = spec["rayClusterSpec"]
    has_autoscaler = bool(cluster.get("enableInTreeAutoscaling"))
    head = cluster["headGroupSpec"]["template"]["spec"]
    added = (_autoscaler(cluster),) if has_autoscaler else ()
    return [
        _group("submitter", spec["submitterPodTemplate"]["spec"], 1, 1),
        _group("head", head, 1, 1, added=added),
        *(
            _group(
                group["groupName"],
                group["template"]["spec"],
                group["replicas"],
                max(group["replicas"], group["maxReplicas"]),
            )
            for group in cluster["workerGroupSpecs"]
        ),
    ]


def needs_of(groups: Sequence[PodGroup]) -> tuple[Amounts, Amounts]:
    """Requests of all pods, at the start of the run and at most."""
    return (
        sum_amounts(scaled(group.requests(), group.fewest) for group in groups),
        sum_amounts(scaled(group.requests(), group.most) for group in groups),
    )


def _group(
    name: str,
    spec: Mapping[str, Any],
    fewest: int,
    most: int,
    *,
    added: tuple[Container, ...] = (),
) -> PodGroup:
    containers = tuple(_container(tree) for tree in spec["containers"])
    return PodGroup(name, fewest, most, (*containers, *added), tuple(_claims(spec)), spec)


def _container(tree: Mapping[str, Any]) -> Container:
    resources = tree.get("resources") or {}
    limits = parse_amounts(resources.get("limits"))
    # What is limited is asked for, unless less is.
    return Container(tree["name"], limits | parse_amounts(resources.get("requests")), limits)


def _autoscaler(cluster: Mapping[str, Any]) -> Container:
    given = (cluster.get("autoscalerOptions") or {}).get("resources")
    if given:
        return _container({"name": "autoscaler", "resources": given})
    return Container("autoscaler", dict(_AUTOSCALER), dict(_AUTOSCALER), is_of_kuberay=True)


def _claims(spec: Mapping[str, Any]) -> Iterator[VolumeClaim]:
    for volume in spec.get("volumes") or ():
        if "ephemeral" in volume:
            claim = volume["ephemeral"]["volumeClaimTemplate"]["spec"]
            size = parse_quantity(claim["resources"]["requests"]["storage"])
            yield VolumeClaim(claim.get("storageClassName"), size)
