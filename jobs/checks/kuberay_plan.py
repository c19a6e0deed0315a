"""What a submit would create on Kubernetes: pods, their sums, what an hour of them costs. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal

from cluster.pod_needs import PodGroup, needs_of
from cluster.pods import ROLE
from cluster.quantities import Amounts, show_amounts
from jobs.checks.kuberay import Look
from jobs.spec import JobSpec, KubeRayCluster


@dataclass(frozen=True)
class ClusterPlan:
    """What a run is on Kubernetes."""

    cluster: KubeRayCluster
    budgets: tuple[tuple[str, int], ...]
    """Of each disruption budget: for which pods, and how many of them stay."""
    groups: tuple[PodGroup, ...]
    fewest: Amounts
    """What all pods ask for at the start."""
    most: Amounts
    hourly: tuple[float, float] | None
    """What an hour costs at the start, and at most; None without `cluster.prices`."""
    most_cost: float | None
    """What the run costs at most, where prices and a deadline say it."""

    def to_json(self) -> dict[str, object]:
        return {
            "namespace": self.cluster.namespace,
            "image": self.cluster.image,
            "queue": self.cluster.queue,
            "pods": [
                {
                    "group": group.name,
                    "fewest": group.fewest,
                    "most": group.most,
                    "requests": _floats(group.requests()),
                    "limits": _floats(group.limits),
                }
                for group in self.groups
            ],
            "disruption_budgets": [
                {"pods": role, "min_available": number} for role, number in self.budgets
            ],
            "requests": {"fewest": _floats(self.fewest), "most": _floats(self.most)},
            "cost_an_hour": self.hourly and {"fewest": self.hourly[0], "most": self.hourly[1]},
            "most_cost": self.most_cost,
        }


def plan_cluster(spec: JobSpec, look: Look | None) -> ClusterPlan | None:
    """None for jobs on other clusters."""
    cluster = spec.cluster
    if not isinstance(cluster, KubeRayCluster) or look is None:
        return None
    fewest, most = needs_of(look.groups)
    hourly = _cost(cluster, fewest), _cost(cluster, most)
    deadline = cluster.deadline_minutes
    return ClusterPlan(
        cluster=cluster,
        budgets=tuple(
            (budget["spec"]["selector"]["matchLabels"][ROLE], budget["spec"]["minAvailable"])
            for budget in look.budgets
        ),
        groups=look.groups,
        fewest=fewest,
        most=most,
        hourly=hourly if cluster.prices is not None else None,
        most_cost=hourly[1] * deadline / 60 if cluster.prices and deadline else None,
    )


def _cost(cluster: KubeRayCluster, amounts: Amounts) -> float:
    """Of an hour, for what is asked for."""
    prices = cluster.prices
    if prices is None:
        return 0.0
    gib = Decimal(2**30)
    return float(
        Decimal(str(prices.gpu_hour)) * amounts.get(cluster.gpu.resource, Decimal(0))
        + Decimal(str(prices.cpu_hour)) * amounts.get("cpu", Decimal(0))
        + Decimal(str(prices.memory_gib_hour)) * amounts.get("memory", Decimal(0)) / gib
    )


def plan_lines(plan: ClusterPlan) -> Iterator[str]:
    """For people: what is created, the sums, the cost."""
    cluster = plan.cluster
    held = f", in the queue {cluster.queue}" if cluster.queue else ""
    yield ""
    yield f"creates in the namespace {cluster.namespace}{held}: a RayJob, whose pods are"
    for group in plan.groups:
        added = " (with the autoscaler)" if any(c.is_of_kuberay for c in group.containers) else ""
        yield (
            f"  {_range(group.fewest, group.most)} {group.name}{', each' * (group.most > 1)} with "
            f"{show_amounts(group.requests())}{added}"
        )
        for claim in group.claims:
            size = show_amounts({"storage": claim.bytes})
            yield f"    and a volume of {size} ({claim.storage_class or 'the default class'})"
    if plan.budgets:
        kept = " and ".join(f"{n} {role}{'s' * (n > 1)}" for role, n in plan.budgets)
        yield f"  with disruption budgets, by which drained nodes leave {kept}"
    yield f"together they ask for {show_amounts(plan.fewest)}"
    if plan.most != plan.fewest:
        yield f"and at most for {show_amounts(plan.most)}"
    if plan.hourly is not None:
        fewest, most = plan.hourly
        shown = f"{fewest:.2f}" if fewest == most else f"{fewest:.2f} to {most:.2f}"
        most_cost = plan.most_cost
        limit = "" if most_cost is None else f"; {most_cost:.2f} until cluster.deadline_minutes"
        yield f"an hour costs {shown} at cluster.prices{limit}"


def _range(fewest: int, most: int) -> str:
    return str(most) if fewest == most else f"{fewest} to {most}"


def _floats(amounts: Amounts) -> dict[str, float]:
    """Cores, bytes and devices as numbers."""
    return {name: float(amount) for name, amount in amounts.items()}
