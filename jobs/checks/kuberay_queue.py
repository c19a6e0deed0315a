"""Whether Kueue would ever admit the run: its queue, and the quota behind it. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from typing import Any

from cluster.kuberay_survey import KUEUE, Survey, local_queue
from cluster.label_rules import matches_selector
from cluster.pod_needs import PodGroup
from cluster.quantities import Amounts, parse_quantity, scaled, show_amount, sum_amounts
from jobs.checks.finding import (
    ENVIRONMENT_EXIT_CODE,
    Finding,
    not_checked,
    ok,
    problem,
    warning,
)
from jobs.spec import KubeRayCluster

PART = "cluster.queue"
_HELD = ("Hold", "HoldAndDrain")
Tree = Mapping[str, Any]


def check_queue(
    cluster: KubeRayCluster, found: Survey, groups: Sequence[PodGroup]
) -> Iterator[Finding]:
    """Nothing for a job without a queue."""
    if cluster.queue is None:
        return
    if found.has_kueue is not True:
        yield _without_kueue(cluster, found)
        return
    yield from _check_priority(cluster, found)
    queue = local_queue(found, cluster)
    if queue is None:
        yield _without_queue(cluster, found)
        return
    name = str(queue["spec"]["clusterQueue"])
    troubles = list(_troubles(queue, f"the queue {cluster.queue}"))
    answer = found["cluster queue"]
    if answer.tree is not None:
        troubles += _troubles(answer.tree, f"the cluster queue {name} behind {cluster.queue}")
        troubles += _refused_namespace(cluster, found, answer.tree, name)
    yield from troubles
    if answer.is_missing:
        yield problem(
            PART,
            f"the queue {cluster.queue} is one of the cluster queue {name}, which is not there",
            "name another queue, or ask an administrator for it",
            exit_code=ENVIRONMENT_EXIT_CODE,
        )
        return
    if answer.tree is None:
        if not troubles:
            yield ok(PART, f"Kueue{_version(found)} has {cluster.queue}, of {name}")
        yield not_checked(PART, f"whether the cluster queue {name} has the room: {answer.why}")
        return
    lacking = list(_check_quota(answer.tree, name, groups))
    yield from lacking
    if not troubles and not lacking:
        yield ok(PART, f"Kueue{_version(found)} has {cluster.queue}; {name} has quota for the run")


def _version(found: Survey) -> str:
    version = next((o.version for o in found.operators(KUEUE)), None)
    return f" {version}" if version else ""


def _without_kueue(cluster: KubeRayCluster, found: Survey) -> Finding:
    if found.has_kueue is None:
        return not_checked(PART, f"whether Kueue is there: {found[KUEUE].why}")
    return problem(
        PART,
        f"cluster.queue is {cluster.queue}, but Kueue is not installed in the cluster at "
        f"{found.server}, so nothing would hold the run back",
        "ask an administrator for Kueue, as k8s/README.md has it, or remove cluster.queue",
        exit_code=ENVIRONMENT_EXIT_CODE,
    )


def _without_queue(cluster: KubeRayCluster, found: Survey) -> Finding:
    answer = found["queues"]
    if answer.tree is None:
        return not_checked(PART, f"whether the queue {cluster.queue} is there: {answer.why}")
    others = ", ".join(item["metadata"]["name"] for item in answer.items)
    return problem(
        PART,
        f"there is no queue {cluster.queue} in the namespace {cluster.namespace}; it has "
        f"{others or 'none'}",
        "set cluster.queue to one that is there"
        if others
        else "ask an administrator for a LocalQueue, or remove cluster.queue",
    )


def _check_priority(cluster: KubeRayCluster, found: Survey) -> Iterator[Finding]:
    part, name = "cluster.queue_priority", cluster.queue_priority
    if name is None:
        return
    answer = found["queue priority"]
    if answer.is_missing:
        yield problem(
            part,
            f"there is no WorkloadPriorityClass {name} in the cluster",
            "see those that are there: kubectl get workloadpriorityclasses",
        )
    elif answer.tree is None:
        yield not_checked(part, f"whether the priority {name} is there: {answer.why}")
    else:
        yield ok(part, f"the priority {name} is there")


def _troubles(queue: Tree, what: str) -> Iterator[Finding]:
    """Why a queue, or a cluster queue, admits nothing now."""
    policy = queue["spec"].get("stopPolicy")
    if policy in _HELD:
        yield problem(
            PART,
            f"{what} is stopped (stopPolicy {policy}), and admits no run",
            "name another queue, or ask an administrator when it goes on",
            exit_code=ENVIRONMENT_EXIT_CODE,
        )
        return
    for condition in (queue.get("status") or {}).get("conditions") or ():
        if condition.get("type") == "Active" and condition.get("status") == "False":
            yield problem(
                PART,
                f"{what} admits no run ({condition.get('reason')}): {condition.get('message')}",
                "name another queue, or ask an administrator to mend this one",
                exit_code=ENVIRONMENT_EXIT_CODE,
            )


def _refused_namespace(
    cluster: KubeRayCluster, found: Survey, cluster_queue: Tree, name: str
) -> Iterator[Finding]:
    namespace = found["namespace"].tree
    selector = cluster_queue["spec"].get("namespaceSelector")
    if namespace is None:
        return
    labels = {
        "kubernetes.io/metadata.name": cluster.namespace,
        **((namespace.get("metadata") or {}).get("labels") or {}),
    }
    # Kueue: no selector at all selects nothing, an empty one everything.
    if selector is None or not matches_selector(selector, labels):
        yield problem(
            PART,
            f"the cluster queue {name} takes no runs of the namespace {cluster.namespace}, which "
            "its namespaceSelector does not select",
            "set cluster.namespace or cluster.queue to others, or ask an administrator to change "
            "the selector",
            exit_code=ENVIRONMENT_EXIT_CODE,
        )


def _check_quota(cluster_queue: Tree, name: str, groups: Sequence[PodGroup]) -> Iterator[Finding]:
    """Whether the pods with which the run starts could be admitted if nothing else were.

    Each group of pods gets one flavour of each group of resources. Kueue does not count what
    KubeRay adds to pods.
    """
    spec = cluster_queue["spec"]
    needs = {g.name: scaled(g.requests(with_kuberay=False), g.fewest) for g in groups if g.fewest}
    for group in groups:
        if group.fewest:
            needs[group.name]["pods"] = Decimal(group.fewest)
    covered: set[str] = set()
    for group in spec.get("resourceGroups") or ():
        resources = list(group.get("coveredResources") or ())
        covered.update(resources)
        has_cohort = bool(spec.get("cohort") or spec.get("cohortName"))
        flavors = [_flavor(flavor, has_cohort=has_cohort) for flavor in group["flavors"]]
        yield from _too_large(needs, resources, flavors, name)
    wanted = {r for need in needs.values() for r, amount in need.items() if amount}
    # Pods are counted where they are covered.
    if uncovered := sorted(wanted - covered - {"pods"}):
        yield warning(
            PART,
            f"the cluster queue {name} has no quota of {', '.join(uncovered)}, which the pods ask "
            "for: the run is never admitted, unless Kueue is configured to leave that out",
            "ask an administrator to add it to a resource group",
        )


def _flavor(flavor: Tree, *, has_cohort: bool) -> dict[str, Decimal | None]:
    """Resource -> the most that is lent and had; None: no limit is known."""
    most: dict[str, Decimal | None] = {}
    for resource in flavor.get("resources") or ():
        nominal = parse_quantity(resource["nominalQuota"])
        limit = resource.get("borrowingLimit")
        if not has_cohort:
            most[resource["name"]] = nominal
        else:
            most[resource["name"]] = None if limit is None else nominal + parse_quantity(limit)
    return most


def _too_large(
    needs: Mapping[str, Amounts],
    resources: Sequence[str],
    flavors: Sequence[Mapping[str, Decimal | None]],
    name: str,
) -> Iterator[Finding]:
    total = sum_amounts(needs.values())
    for resource in resources:
        limits = [flavor.get(resource, Decimal(0)) for flavor in flavors]
        known = [limit for limit in limits if limit is not None]
        if len(known) < len(limits):
            continue
        largest, whole = max(known, default=Decimal(0)), sum(known, Decimal(0))
        group = max(needs, key=lambda n: needs[n].get(resource, Decimal(0)))
        most = needs[group].get(resource, Decimal(0))
        if most > largest:
            yield _exceeded(
                f"the pods of {group}", most, resource, largest, name, " in one flavour"
            )
        elif total.get(resource, Decimal(0)) > whole:
            yield _exceeded("the pods", total[resource], resource, whole, name, "")


def _exceeded(
    who: str, need: Decimal, resource: str, limit: Decimal, name: str, where: str
) -> Finding:
    return problem(
        PART,
        f"{who} ask for {show_amount(resource, need)}, but the cluster queue {name} has at most "
        f"{show_amount(resource, limit)}{where}, so the run is never admitted",
        "lower workers.count (or set workers.min) or what a worker asks for, or name another queue",
        exit_code=ENVIRONMENT_EXIT_CODE,
    )
