"""Rules about Kueue: why a run is not admitted, or was taken out again.

Messages are those of Kueue 0.6 to 0.19 (`workload_controller.go`, `flavorassigner.go`); reasons of
`QuotaReserved` became finer in 0.19, so that the messages are looked at first.
"""

from __future__ import annotations

from jobs.why.facts import Source
from jobs.why.rule import Rule

_OF: frozenset[Source] = frozenset({"workload"})
_SEE = "see the queue with: kubectl describe localqueue {queue} --namespace {namespace}"

RULES = (
    Rule(
        name="queue-missing",
        of=_OF,
        message=r"LocalQueue (?P<name>\S*) doesn't exist",
        cause="there is no queue {name} in the namespace {namespace}, so nobody admits the run",
        remedy="see the queues there: kubectl get localqueues --namespace {namespace}; then: "
        "{again} --set cluster.queue=NAME",
    ),
    Rule(
        name="queue-broken",
        of=_OF,
        message=r"ClusterQueue (?P<name>\S*) doesn't exist",
        cause="the queue {queue} leads to a ClusterQueue {name} that does not exist",
        remedy="ask the administrator of the queues to make it, or use another queue: "
        "{again} --set cluster.queue=NAME",
    ),
    Rule(
        name="queue-stopped",
        of=_OF,
        message=r"(?P<kind>LocalQueue|ClusterQueue) (?P<name>\S+) is (?:inactive|stopped)"
        r"|The (?P<evicted>LocalQueue|ClusterQueue) is stopped",
        cause="the queue {queue} is stopped, or is not in order ({kind}{evicted} {name}), and "
        "admits nothing",
        remedy=_SEE + "; wait until its administrator opens it, or use another queue: {again} "
        "--set cluster.queue=NAME",
    ),
    Rule(
        name="queue-refuses",
        of=_OF,
        reason="Deactivated|DeactivatedDueTo.*|.*RequeuingLimitExceeded",
        cause="Kueue has set the run aside, and admits it no more: {said}",
        remedy="end it and start it again: {again}",
    ),
    Rule(
        name="queue-too-small",
        of=_OF,
        message=r"(?:insufficient quota for (?P<resource>\S+) in flavor (?P<flavor>\S+), )?"
        r"(?P<sum>(?:[\w ]*requests? )[^,;]*> maximum capacity \([^)]*\))",
        cause="the run never fits into the queue {queue}: of {resource} in the flavor {flavor}, "
        "{sum}",
        remedy="ask for less, as with: {again} --set workers.count=N; or ask for more quota; "
        + _SEE,
    ),
    Rule(
        name="queue-flavor",
        yields=True,
        of=_OF,
        message=r"(?P<flavors>flavor \S+ doesn't match node affinity|untolerated taint [^;,]*)"
        r"(?!.*insufficient)",
        cause="no flavor of the queue {queue} fits the run's pods: {said}",
        remedy="compare the flavors with cluster.nodes, cluster.gpu.type and cluster.spot of the "
        "job: kubectl get resourceflavors --output yaml; then: {again} --set cluster.KEY=VALUE",
    ),
    Rule(
        name="queue-full",
        of=_OF,
        message=r"insufficient unused quota(?: in cohort)? for (?P<resource>\S+) in flavor "
        r"(?P<flavor>\S+?),? (?P<missing>\d\S*) more needed",
        cause="the queue {queue} has too little {resource} left in the flavor {flavor}: {missing} "
        "more are needed, which other runs hold",
        remedy="wait for others to end, or ask for fewer workers: {again} --set workers.count=N; "
        + _SEE,
    ),
    Rule(
        name="queue-preempted",
        of=_OF,
        reason="Preempted",
        cause="Kueue has taken the run out to make room for another one, and starts it again when "
        "there is room: {said}",
        remedy="wait, it goes on from its last checkpoint; a higher priority is "
        "cluster.queue_priority",
    ),
    Rule(
        name="queue-pods-late",
        yields=True,
        of=_OF,
        reason="PodsReadyTimeout",
        cause="Kueue has taken the run out, as its pods were not ready in time: {said}",
        remedy="see why its pods do not start, below; or ask the administrator for a longer "
        "waitForPodsReady.timeout",
    ),
    Rule(
        name="queue-check",
        of=_OF,
        reason=r"AdmissionCheck(?P<state>Pending|Retry|Rejected)",
        cause="the queue {queue} has room, but a check of it says {state}: {said}",
        remedy="wait, or ask the queue's administrator about that admission check; " + _SEE,
    ),
    Rule(
        name="queue-waits",
        yields=True,
        of=_OF,
        reason="(?!New$).+",
        cause="the queue {queue} does not admit the run: {said}",
        remedy="wait for its turn; " + _SEE,
    ),
)
