"""On which nodes pods may be: selectors, tolerations, affinities and spreading. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jobs.cluster_spec import KubeRayCluster, NodeRule, Nodes, Spot, Toleration

Manifest = dict[str, Any]

_FIRST_WEIGHT = 64
"""Of the first preference; each next one has half of it, so that it outweighs all after it."""


def place_head(cluster: KubeRayCluster) -> Manifest:
    """Parts of the pod's spec for the head and for whoever is as dear: off spot nodes."""
    may_be_taken = cluster.spot is not None and cluster.spot.head
    spot = cluster.spot if may_be_taken else None
    return _placed(
        cluster.head.nodes, tolerations=_tolerations(spot), rules=_off_spot(cluster, spot)
    )


def place_workers(
    cluster: KubeRayCluster, *, has_gpus: bool, on_spot: bool, labels: Mapping[str, str]
) -> Manifest:
    """Parts of the pod's spec for workers, all of which have these labels."""
    spot = cluster.spot if on_spot else None
    selector = {}
    if spot is not None:
        selector[spot.label] = spot.value
    if has_gpus and cluster.gpu.type is not None:
        selector[cluster.gpu.type_label] = cluster.gpu.type
    tolerations = list(_tolerations(spot))
    if has_gpus:
        # Nodes with GPUs have this taint; some clusters add the toleration by themselves.
        tolerations.append({"key": cluster.gpu.resource, "operator": "Exists"})
    placed = _placed(
        cluster.nodes,
        selector=selector,
        tolerations=tolerations,
        rules=_off_spot(cluster, spot),
    )
    if cluster.pack is not None:
        term = {"labelSelector": {"matchLabels": dict(labels)}, "topologyKey": cluster.pack}
        affinity = placed.setdefault("affinity", {})
        affinity["podAffinity"] = {"requiredDuringSchedulingIgnoredDuringExecution": [term]}
    if cluster.spread is not None:
        placed["topologySpreadConstraints"] = [
            {
                "maxSkew": 1,
                "topologyKey": cluster.spread,
                "whenUnsatisfiable": "ScheduleAnyway",
                "labelSelector": {"matchLabels": dict(labels)},
            }
        ]
    return placed


def _off_spot(cluster: KubeRayCluster, spot: Spot | None) -> list[Manifest]:
    """What keeps a pod off spot nodes, unless it may be on them."""
    if cluster.spot is None or spot is not None:
        return []
    return [_expression(NodeRule(label=cluster.spot.label, none_of=(cluster.spot.value,)))]


def _tolerations(spot: Spot | None) -> list[Manifest]:
    return [{"key": spot.taint or spot.label, "operator": "Exists"}] if spot is not None else []


def _placed(
    nodes: Nodes,
    *,
    selector: Manifest | None = None,
    tolerations: Sequence[Manifest] = (),
    rules: Sequence[Manifest] = (),
) -> Manifest:
    placed: Manifest = {}
    if all_labels := {**nodes.selector, **(selector or {})}:
        placed["nodeSelector"] = all_labels
    if borne := [*(_toleration(t) for t in nodes.tolerations), *tolerations]:
        placed["tolerations"] = borne
    affinity: Manifest = {}
    if required := [*(_expression(rule) for rule in nodes.required), *rules]:
        term = {"matchExpressions": required}
        affinity["requiredDuringSchedulingIgnoredDuringExecution"] = {"nodeSelectorTerms": [term]}
    if nodes.preferred:
        affinity["preferredDuringSchedulingIgnoredDuringExecution"] = list(
            _preferences(nodes.preferred)
        )
    if affinity:
        placed["affinity"] = {"nodeAffinity": affinity}
    return placed


def _preferences(rules: Sequence[NodeRule]) -> Iterator[Manifest]:
    for place, rule in enumerate(rules):
        yield {
            "weight": _FIRST_WEIGHT >> place,
            "preference": {"matchExpressions": [_expression(rule)]},
        }


def _expression(rule: NodeRule) -> Manifest:
    if rule.any_of:
        return {"key": rule.label, "operator": "In", "values": list(rule.any_of)}
    if rule.none_of:
        return {"key": rule.label, "operator": "NotIn", "values": list(rule.none_of)}
    return {"key": rule.label, "operator": "Exists"}


def _toleration(toleration: Toleration) -> Manifest:
    how: Manifest = {"operator": "Exists"}
    if toleration.value is not None:
        how = {"operator": "Equal", "value": toleration.value}
    effect = {"effect": toleration.effect} if toleration.effect is not None else {}
    return {"key": toleration.key, **how, **effect}
