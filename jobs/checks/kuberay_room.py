"""Whether the namespace and the nodes have room for the run: limit ranges, quotas, the nodes that
there are. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from decimal import Decimal
from typing import Any

from cluster.kuberay_survey import MOST_NODES, Survey
from cluster.label_rules import may_be_on
from cluster.pod_needs import Container, PodGroup
from cluster.quantities import (
    Amounts,
    parse_amounts,
    scaled,
    show_amount,
    show_amounts,
    sum_amounts,
)
from jobs.checks.finding import (
    ENVIRONMENT_EXIT_CODE,
    Finding,
    not_checked,
    ok,
    problem,
    warning,
)
from jobs.spec import JobSpec, KubeRayCluster

PART = "workers"
Tree = Mapping[str, Any]
_NONE = Decimal(0)
_LOWER = "lower workers.count (or set workers.min), or what a worker asks for"
_MUST_BE_SAID = ("cpu", "memory")
"""Resources of which a container must say what it needs, or has at most, if a quota counts it."""
_PODS, _CLAIMS = ("pods", "count/pods"), ("persistentvolumeclaims", "count/persistentvolumeclaims")
_OF_CLASS = ".storageclass.storage.k8s.io/"


def check_room(
    spec: JobSpec, cluster: KubeRayCluster, found: Survey, groups: Sequence[PodGroup]
) -> Iterator[Finding]:
    ranges, quotas, nodes = found["limit ranges"], found["quotas"], found["nodes"]
    items = [item for tree in ranges.items for item in tree["spec"]["limits"]]
    pods = [_with_defaults(group, items) for group in groups]
    if ranges.tree is None:
        yield not_checked(PART, f"whether pods are within the namespace's limits: {ranges.why}")
    yield from _check_ranges(cluster, pods, items)
    if quotas.tree is None:
        yield not_checked(PART, f"whether a quota has room for the pods: {quotas.why}")
    else:
        lacking = [f for quota in quotas.items for f in _check_quota(cluster, quota, pods)]
        yield from lacking
        if quotas.items and not lacking:
            names = ", ".join(quota["metadata"]["name"] for quota in quotas.items)
            yield ok(PART, f"the quota {names} has room for the pods")
    if nodes.tree is None:
        part = "cluster.gpu" if spec.workers.gpus else PART
        yield not_checked(part, f"whether there are nodes for the workers' pods: {nodes.why}")
    else:
        yield from _check_nodes(spec, cluster, nodes.tree, groups)


# ----------------------------------------------------------------------------------- limit ranges


def _with_defaults(group: PodGroup, items: Sequence[Tree]) -> PodGroup:
    """The group as the namespace's limit ranges fill it in."""
    filled = []
    for container in group.containers:
        requests, limits = dict(container.requests), dict(container.limits)
        for item in items:
            if item["type"] == "Container":
                limits = parse_amounts(item.get("default")) | limits
                requests = parse_amounts(item.get("defaultRequest")) | requests
        filled.append(replace(container, requests=requests, limits=limits))
    return replace(group, containers=tuple(filled))


def _check_ranges(
    cluster: KubeRayCluster, groups: Sequence[PodGroup], items: Sequence[Tree]
) -> Iterator[Finding]:
    for item in items:
        for group in groups:
            for what, container in _limited(group, item["type"]):
                for why in _beyond(container, item):
                    yield problem(
                        PART,
                        f"a limit range of the namespace {cluster.namespace} refuses {what}: {why}",
                        "change what it asks for (workers, cluster.head, data.cache_gib), or name "
                        "another namespace",
                        exit_code=ENVIRONMENT_EXIT_CODE,
                    )


def _limited(group: PodGroup, kind: str) -> Iterator[tuple[str, Container]]:
    """What a limit range of a kind looks at, as something with requests and limits."""
    if kind == "Container":
        for container in group.containers:
            yield f"the container {container.name} of {group.name}", container
    elif kind == "Pod":
        yield f"the pod of {group.name}", Container(group.name, group.requests(), group.limits)
    elif kind == "PersistentVolumeClaim":
        for claim in group.claims:
            amounts = {"storage": claim.bytes}
            yield f"the volume of {group.name}", Container(group.name, amounts, amounts)


def _beyond(container: Container, item: Tree) -> Iterator[str]:
    requests, limits = container.requests, container.limits
    for resource, least in parse_amounts(item.get("min")).items():
        has = requests.get(resource)
        if has is None or has < least:
            shown = "nothing is asked for" if has is None else show_amount(resource, has)
            yield f"at least {show_amount(resource, least)}, but {shown}"
    for resource, most in parse_amounts(item.get("max")).items():
        has = limits.get(resource)
        if has is None or has > most:
            shown = f"{resource} has no limit" if has is None else show_amount(resource, has)
            yield f"at most {show_amount(resource, most)}, but {shown}"
    for resource, most in parse_amounts(item.get("maxLimitRequestRatio")).items():
        asked, limit = requests.get(resource, _NONE), limits.get(resource)
        if limit is None or not asked or limit / asked > most:
            yield f"the limit of {resource} may be {most} times what is asked for"


# ----------------------------------------------------------------------------------------- quotas


def _check_quota(
    cluster: KubeRayCluster, quota: Tree, groups: Sequence[PodGroup]
) -> Iterator[Finding]:
    """What the run's start, or its most, needs beyond a quota, or beyond what is left of it."""
    name, status = quota["metadata"]["name"], quota.get("status") or {}
    counted = [group for group in groups if _is_in_scope(quota, group)]
    hard = parse_amounts(status.get("hard") or quota["spec"].get("hard"))
    used = parse_amounts(status.get("used"))
    is_scoped = len(counted) < len(groups)
    for resource, limit in hard.items():
        yield from _unsaid(name, resource, counted)
        fewest = _counted(resource, counted, is_scoped=is_scoped, at_most=False)
        most = _counted(resource, counted, is_scoped=is_scoped, at_most=True)
        if fewest is None or most is None:
            continue
        has = f"the quota {name} of the namespace {cluster.namespace} has"
        left = max(_NONE, limit - used.get(resource, _NONE))
        of_all = f"{_shown(resource, limit)} in all"
        if fewest > limit:
            yield problem(
                PART,
                f"the run's pods need {_shown(resource, fewest)}, but {has} {of_all}",
                f"{_LOWER}, or ask an administrator for more",
                exit_code=ENVIRONMENT_EXIT_CODE,
            )
        elif fewest > left:
            yield warning(
                PART,
                f"the run's pods need {_shown(resource, fewest)}, but {has} "
                f"{_shown(resource, left)} left of {of_all}, so the run waits for others to end",
                f"{_LOWER}, or wait",
            )
        elif most > limit:
            yield warning(
                PART,
                f"with all its workers the run needs {_shown(resource, most)}, but {has} {of_all}, "
                "so it never has all",
                f"{_LOWER}, or ask an administrator for more",
            )


def _shown(resource: str, amount: Decimal) -> str:
    if resource.startswith("limits."):
        return f"{show_amount(resource, amount)} as limits"
    return show_amount(resource, amount)


def _unsaid(name: str, resource: str, groups: Sequence[PodGroup]) -> Iterator[Finding]:
    """Containers that a quota refuses since they do not say what they need."""
    kind, _, bare = resource.rpartition(".")
    if bare not in _MUST_BE_SAID or kind not in ("", "requests", "limits"):
        return
    for group in groups:
        for container in group.containers:
            said = container.limits if kind == "limits" else container.requests
            if bare not in said:
                what = "limit" if kind == "limits" else "request"
                is_worker = group.name not in ("submitter", "head")
                needs_memory = is_worker and bare == "memory"
                yield problem(
                    PART,
                    f"the quota {name} refuses the pods of {group.name}: their container "
                    f"{container.name} has no {what} of {bare}",
                    "set workers.memory_gib"
                    if needs_memory
                    else "ask an administrator for a LimitRange with defaults",
                    exit_code=2 if needs_memory else ENVIRONMENT_EXIT_CODE,
                )


def _counted(
    resource: str, groups: Sequence[PodGroup], *, is_scoped: bool, at_most: bool
) -> Decimal | None:
    """How much of a quota's resource the groups take; None for what runs do not take.

    How many RayJobs there may be, the dry run tells.
    """
    numbers = {group.name: group.most if at_most else group.fewest for group in groups}
    if resource in _PODS:
        return Decimal(sum(numbers.values()))
    kind, dot, bare = resource.partition(".")
    if dot and kind in ("requests", "limits") and bare != "storage" and _OF_CLASS not in resource:
        amounts = [g.limits if kind == "limits" else g.requests() for g in groups]
    elif resource in ("cpu", "memory", "ephemeral-storage"):
        amounts, bare = [g.requests() for g in groups], resource
    else:
        return None if is_scoped else _counted_claims(resource, groups, numbers)
    each = zip(groups, amounts, strict=True)
    total = sum_amounts(scaled(amount, numbers[group.name]) for group, amount in each)
    return total.get(bare, _NONE)


def _counted_claims(
    resource: str, groups: Sequence[PodGroup], numbers: Mapping[str, int]
) -> Decimal | None:
    of_class, _, rest = resource.rpartition(_OF_CLASS)
    claims = [
        (claim, numbers[group.name])
        for group in groups
        for claim in group.claims
        if not of_class or claim.storage_class == of_class
    ]
    if rest in _CLAIMS:
        return Decimal(sum(number for _, number in claims))
    if rest == "requests.storage":
        return sum((claim.bytes * number for claim, number in claims), _NONE)
    return None


def _is_in_scope(quota: Tree, group: PodGroup) -> bool:
    """Whether a quota counts pods like these, which ask for something and have no deadline."""
    spec = quota["spec"]
    rules = [{"scopeName": scope, "operator": "Exists"} for scope in spec.get("scopes") or ()]
    rules += (spec.get("scopeSelector") or {}).get("matchExpressions") or ()
    return all(_is_of_scope(rule, group) for rule in rules)


def _is_of_scope(rule: Tree, group: PodGroup) -> bool:
    match rule["scopeName"]:
        case "NotTerminating" | "NotBestEffort":
            return True
        case "PriorityClass":
            name = group.spec.get("priorityClassName")
            return {
                "In": name in (rule.get("values") or ()),
                "NotIn": name not in (rule.get("values") or ()),
                "Exists": name is not None,
                "DoesNotExist": name is None,
            }[rule["operator"]]
        case _:  # Terminating, BestEffort, CrossNamespacePodAffinity, of volumes
            return False


# ------------------------------------------------------------------------------------------ nodes


def _check_nodes(
    spec: JobSpec, cluster: KubeRayCluster, listed: Tree, groups: Sequence[PodGroup]
) -> Iterator[Finding]:
    """Whether a pod of workers would fit on a node that is there, if it were empty. Where nodes
    are made on demand there may be none yet, so this is no problem."""
    nodes = list(listed.get("items") or ())
    if (listed.get("metadata") or {}).get("continue"):
        known = f"of the first {MOST_NODES} nodes"
    else:
        known = "of the nodes that are there now"
    part = "cluster.gpu" if spec.workers.gpus else PART
    for group in groups[2:]:  # after submitter and head
        need = group.requests() | {"pods": Decimal(1)}
        allowed = [n for n in nodes if may_be_on(group.spec, n["metadata"].get("labels") or {})]
        fitting = [n for n in allowed if not _lacking(need, n)]
        if fitting:
            yield ok(part, f"a pod of {group.name} fits on {len(fitting)} {known}, if empty")
            continue
        if allowed:
            lacking = min((_lacking(need, node) for node in allowed), key=len)
            why = f"none has {show_amounts(lacking)}"
        else:
            why = f"none has the labels {_rules(group.spec)}"
        yield warning(
            part,
            f"{known} {why}, which a pod of {group.name} asks for, so it waits for ever unless "
            "such nodes are added on demand",
            "see what there is: kubectl get nodes --show-labels; kubectl describe nodes; then "
            "change workers, cluster.gpu or cluster.nodes",
        )


def _lacking(need: Amounts, node: Tree) -> Amounts:
    """What a pod needs that the node would not have even if it were empty."""
    has = parse_amounts((node.get("status") or {}).get("allocatable"))
    return {name: amount for name, amount in need.items() if amount > has.get(name, _NONE)}


def _rules(pod_spec: Tree) -> str:
    selector = pod_spec.get("nodeSelector") or {}
    shown = [f"{label}={value}" for label, value in selector.items()]
    affinity = (pod_spec.get("affinity") or {}).get("nodeAffinity") or {}
    required = affinity.get("requiredDuringSchedulingIgnoredDuringExecution") or {}
    for term in required.get("nodeSelectorTerms") or ():
        for rule in term.get("matchExpressions") or ():
            values = " ".join(rule.get("values") or ())
            shown.append(" ".join(filter(None, [rule["key"], rule["operator"], values])))
    return ", ".join(shown) or "that are asked for"
