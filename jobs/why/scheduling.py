"""Rules about pods that no node takes, by the scheduler's own words.

    why_unschedulable(message) -> each reason with the number of its nodes, the nearest first. Pure

The scheduler looks at taints, then at labels, volumes and resources, and stops at the first that a
node fails (`Filter` of its plugins): a node that has too little of a resource fits otherwise. So
what is nearest to a fit is what is worth changing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jobs.why.evidence import Tree
from jobs.why.facts import Fact, Source
from jobs.why.rule import Context, Rule, short

_OF: frozenset[Source] = frozenset({"event", "pod"})
_COUNT = re.compile(r"(?:^|(?<=, ))(?P<nodes>\d+) (?P<text>\D.*?)(?=, \d+ |\.?$)")
_AFTER = re.compile(r"[.,]? (?:preemption:|no new claims|still not schedulable).*")
_OF_NODES = re.compile(r"^\d+/(?P<total>\d+) nodes are available: ?")
_SYSTEM_TAINT = re.compile(r"node\.(?:kubernetes\.io|cloudprovider\.kubernetes\.io)/|node-role\.")


@dataclass(frozen=True)
class _Kind:
    """A reason of the scheduler's; the first that fits counts."""

    pattern: re.Pattern[str]
    told: str
    """`{nodes} of them ...`."""
    remedy: str
    nearness: int
    """The higher, the less keeps such a node from taking the pod."""


def _kind(pattern: str, told: str, remedy: str, nearness: int) -> _Kind:
    return _Kind(re.compile(pattern), told, remedy, nearness)


_NODES = "see what nodes offer: kubectl get nodes --output wide"
KINDS = (
    _kind(
        r"Insufficient (?P<resource>\S+)",
        "{nodes} {have} too little {resource} free{asked}",
        "wait for others to end, have nodes added, or ask for less: {again} --set {smaller}",
        9,
    ),
    _kind(
        r"Too many pods",
        "{nodes} {have} as many pods as they may",
        "wait for others to end, or have nodes added; " + _NODES,
        8,
    ),
    _kind(
        r"free ports|host ports",
        "{nodes} {have} no port free that the pod asks for",
        "have nodes added; " + _NODES,
        8,
    ),
    _kind(
        r"volume node affinity conflict",
        "{nodes} {are} not where the volume of the pod is (another zone)",
        "use a volume of the nodes' zone, or one for each pod: {again} --set "
        "cluster.cache.kind=ephemeral",
        7,
    ),
    _kind(
        r"max volume count",
        "{nodes} {have} as many volumes attached as they may",
        "have nodes added, or use the node's disk: {again} --set 'cluster.cache={{kind: node}}'",
        7,
    ),
    _kind(
        r"enough free storage|available persistent volumes to bind|unbound immediate|"
        r"bound to non-existent",
        "no volume can be bound to the claim of the pod",
        "see the claims: kubectl get persistentvolumeclaims --namespace {namespace}; or use the "
        "node's disk: {again} --set 'cluster.cache={{kind: node}}'",
        7,
    ),
    _kind(
        r"pod affinity",
        "{nodes} {are} not where the other workers are (cluster.pack)",
        "have room made there, or do without: {again} --set cluster.pack=null",
        5,
    ),
    _kind(
        r"anti-affinity|topology spread",
        "{nodes} {have} pods from which these must keep apart",
        "have nodes added; " + _NODES,
        5,
    ),
    _kind(
        r"didn't match (?:Pod's )?node (?:affinity|selector)|node affinity/selector|node selector",
        "{nodes} {have} not the labels that the pod asks for{labels}",
        "see which nodes have them: kubectl get nodes --show-labels; then correct cluster.nodes, "
        "cluster.gpu.type or cluster.spot: {again} --set cluster.KEY=VALUE",
        4,
    ),
    _kind(
        r"taint \{(?P<key>[^:}]+):? ?(?P<value>[^}]*)\}",
        "{nodes} {have} the taint {key}",
        "allow it, if these nodes are meant: {again} --set "
        "'cluster.nodes.tolerations=[{{key: {key}}}]'",
        3,
    ),
    _kind(r"were unschedulable|unschedulable", "{nodes} {take} no pods now (cordoned)", _NODES, 1),
)
_SYSTEM = _kind(
    r"taint \{(?P<key>[^:}]+)",
    "{nodes} {take} no pods of users, or {are} not in order ({key})",
    "have nodes added, or repaired; " + _NODES,
    0,
)
_OTHER = _kind(r"(?P<text>.+)", "{nodes}: {text}", _NODES, 2)


_ONE = {"have": "has", "are": "is", "take": "takes"}
_MANY = {"have": "have", "are": "are", "take": "take"}


@dataclass(frozen=True)
class Shortage:
    """One reason for which nodes do not take a pod."""

    nodes: int | None
    """How many nodes; None: the scheduler does not say, it is about all."""
    text: str
    kind: _Kind
    groups: Mapping[str, str]


def why_unschedulable(message: str) -> tuple[int | None, list[Shortage]]:
    """(number of nodes, reasons) of a message such as `0/3 nodes are available: 1 Insufficient cpu,
    2 node(s) had untolerated taint {gpu: true}. preemption: ...`; the nearest reason first."""
    head = _OF_NODES.match(message)
    total = int(head["total"]) if head else None
    rest = _AFTER.sub("", message[head.end() :] if head else message).strip().rstrip(".")
    counted = [(int(m["nodes"]), m["text"]) for m in _COUNT.finditer(rest)]
    found = [_shortage(nodes, text.strip(" .")) for nodes, text in counted]
    if not found and rest:
        found = [_shortage(None, rest)]
    return total, sorted(found, key=lambda s: -s.kind.nearness)


def _shortage(nodes: int | None, text: str) -> Shortage:
    for kind in KINDS:
        match = kind.pattern.search(text)
        if match is not None:
            groups = {k: v or "" for k, v in match.groupdict().items()}
            is_system = "key" in groups and _SYSTEM_TAINT.match(groups["key"])
            return Shortage(nodes, text, _SYSTEM if is_system else kind, groups)
    return Shortage(nodes, text, _OTHER, {"text": text})


def _told(fact: Fact, context: Context) -> dict[str, str]:
    """Fields `shortage` and `remedy` of the rule below."""
    total, shortages = why_unschedulable(fact.message)
    if not shortages:
        return {"shortage": short(fact.message), "what": _NODES}
    parts = []
    remedies = []
    for shortage in shortages:
        resource = shortage.groups.get("resource", "")
        asked = _asked(fact.pod, resource)
        nodes = "all nodes" if shortage.nodes is None else str(shortage.nodes)
        fields = {
            **context.fields,
            **shortage.groups,
            "nodes": nodes,
            **(_ONE if shortage.nodes == 1 else _MANY),
            "asked": f" (the pod asks for {asked})" if asked else "",
            "labels": _labels(fact.pod),
            "smaller": _smaller(fact, resource),
        }
        parts.append(shortage.kind.told.format_map(fields))
        remedies.append(shortage.kind.remedy.format_map(fields))
    are_counted = total is not None and shortages[0].nodes is not None
    whole = f"of {total} node{'s' * (total != 1)} " if are_counted else ""
    return {"shortage": whole + ", ".join(dict.fromkeys(parts)), "what": remedies[0]}


def _asked(pod: Tree | None, resource: str) -> str:
    """How much of a resource a pod asks for, as its manifest says; empty where nobody knows."""
    containers: Sequence[Tree] = ((pod or {}).get("spec") or {}).get("containers") or ()
    amounts = [((c.get("resources") or {}).get("requests") or {}).get(resource) for c in containers]
    return " + ".join(str(amount) for amount in amounts if amount)


def _labels(pod: Tree | None) -> str:
    spec = (pod or {}).get("spec") or {}
    wanted = [f"{k}={v}" for k, v in (spec.get("nodeSelector") or {}).items()]
    affinity = (spec.get("affinity") or {}).get("nodeAffinity") or {}
    required = affinity.get("requiredDuringSchedulingIgnoredDuringExecution") or {}
    for term in required.get("nodeSelectorTerms") or ():
        for rule in term.get("matchExpressions") or ():
            values = ", ".join(map(str, rule.get("values") or ()))
            wanted.append(f"{rule.get('key')} {rule.get('operator')} {values}".strip())
    return f" ({'; '.join(wanted)})" if wanted else ""


def _smaller(fact: Fact, resource: str) -> str:
    """The key of the job that asks for the resource."""
    if fact.role == "head":
        return "cluster.head.memory_gib=N" if resource == "memory" else "cluster.head.cpus=N"
    if resource == "ephemeral-storage":
        return "'cluster.cache={kind: ephemeral}'"
    return {"cpu": "workers.cpus=N", "memory": "workers.memory_gib=N"}.get(
        resource, "workers.count=N"
    )


RULES = (
    Rule(
        name="claim-missing",
        of=_OF,
        reason="FailedScheduling|Unschedulable|FailedMount",
        message=r'persistentvolumeclaim "(?P<claim>[^"]+)" (?:not found|is being deleted)',
        cause="{who} cannot start, as there is no claim {claim} in the namespace {namespace}",
        remedy="make the PersistentVolumeClaim {claim}, or use the node's disk: {again} --set "
        "'cluster.cache={{kind: node}}'",
    ),
    Rule(
        name="autoscaler",
        of=frozenset({"event"}),
        reason="NotTriggerScaleUp|FailedScaleUp|NoMatchingNodePool",
        message=r"(?:pod didn't trigger scale-up(?: \([^)]*\))?: ?)?(?P<why>.+)",
        cause="the cluster's autoscaler adds no node for {who}: {why}",
        remedy="have the node pool's largest size raised, or ask for what it has: {again} --set "
        "workers.count=N; nodes by their labels: kubectl get nodes --show-labels",
    ),
    Rule(
        name="unschedulable",
        of=_OF,
        reason="FailedScheduling|Unschedulable",
        cause="no node takes the pods of {who}: {shortage}",
        remedy="{what}",
        more=_told,
    ),
    Rule(
        name="scheduling-gated",
        of=_OF,
        reason="SchedulingGated",
        cause="the pods of {who} are held back by a scheduling gate: {said}",
        remedy="see who has set it (a queue, a quota): kubectl get pod {pod} --namespace "
        "{namespace} --output jsonpath='{{.spec.schedulingGates}}'",
    ),
    Rule(
        name="nodes-coming",
        of=frozenset({"event"}),
        reason="TriggeredScaleUp|Nominated",
        cause="the cluster is adding nodes for {who}: {said}",
        remedy="wait: new nodes take some minutes; follow it with: shoal watch {run}",
    ),
)
