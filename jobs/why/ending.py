"""Rules about pods that were lost, and about how KubeRay ended a run."""

from __future__ import annotations

from jobs.why.facts import Fact, Source
from jobs.why.rule import Context, Rule

_PODS: frozenset[Source] = frozenset({"pod", "container", "event"})
_LOGS = "see what it printed: shoal logs {run} --pods"


def _memory(fact: Fact, context: Context) -> dict[str, str]:
    """What a container that ran out of memory needs, by whose it is."""
    more = context.fields
    if fact.role == "head":
        key = f"--set cluster.head.memory_gib={more['more_head_memory']}"
        return {"room": f"give the head more: {context.again} {key}"}
    if fact.role == "worker":
        key = f"--set workers.memory_gib={more['more_memory']}"
        return {
            "room": f"give workers more: {context.again} {key}; a new run may hold less at a time "
            "(batching.max_tokens_per_microbatch)"
        }
    return {"room": f"it is started again by itself; if it stays so: shoal logs {context.run}"}


def _shell_word(fact: Fact, context: Context) -> dict[str, str]:
    code = fact.message.partition("exit code ")[2].partition(":")[0]
    known = {
        "126": "its command may not be executed",
        "127": "its command is not in the image",
        "137": "it was killed (SIGKILL): by the node, or for memory",
        "139": "it crashed in native code (SIGSEGV)",
        "143": "it was told to end (SIGTERM)",
    }
    return {"code": code, "how": f": {known[code]}" if code in known else ""}


LOST_RULES = (
    Rule(
        name="out-of-memory",
        of=_PODS,
        reason="OOMKilled|OOMKilling",
        cause="{who} ran out of memory: a container used more than its limit, and was killed "
        "({said})",
        remedy="{room}",
        more=_memory,
    ),
    Rule(
        name="evicted-for-disk",
        of=_PODS,
        reason="Evicted",
        message=r"(?i)ephemeral[- ](?:local )?storage|EmptyDir volume|DiskPressure|disk",
        cause="{who} had to leave the node, as too much was written to its disk: {said}",
        remedy="put the cache on a volume of its own: {again} --set "
        "'cluster.cache={{kind: ephemeral}}'; a new run may ask for more disk (data.cache_gib, "
        "{cache} now)",
    ),
    Rule(
        name="evicted-for-memory",
        of=_PODS,
        reason="Evicted",
        message=r"(?i)memory",
        cause="{who} had to leave the node, which had too little memory left: {said}",
        remedy="say how much memory is needed, so that it is reserved: {again} --set "
        "workers.memory_gib={more_memory}",
    ),
    Rule(
        name="evicted",
        yields=True,
        of=_PODS,
        reason="Evicted",
        cause="{who} had to leave the node: {said}",
        remedy="go on from the last checkpoint: {again}; see the node: kubectl describe node NODE",
    ),
    Rule(
        name="preempted",
        of=_PODS,
        reason="PreemptionBy(?:Kube)?Scheduler|Preempted|Preempting",
        cause="{who} had to make room for pods of a higher priority: {said}",
        remedy="go on from the last checkpoint: {again}; to be kept, ask for a class that ranks "
        "higher: {again} --set cluster.priority_class=NAME",
    ),
    Rule(
        name="node-lost",
        of=_PODS,
        reason="NodeLost|DeletionByTaintManager|TaintManagerEviction|DeletionByPodGC|"
        "NodeNotReady|Shutdown|NodeShutdown|TerminationByKubelet|Terminated",
        cause="{who} lost the node, which was taken back, was shut down or does not answer: {said}",
        remedy="go on from the last checkpoint: {again}; if nodes are taken often (spot), keep "
        "the least number of workers off them: {again} --set cluster.spot.over_min=true --set "
        "workers.min=N",
    ),
    Rule(
        name="node-drained",
        of=_PODS,
        reason="EvictionByEvictionAPI",
        cause="{who} had to leave the node, which somebody drains: {said}",
        remedy="go on from the last checkpoint: {again}",
    ),
    Rule(
        name="node-refused",
        of=_PODS,
        reason="UnexpectedAdmissionError|NodeAffinity|OutOf.*|NodePorts|AppArmor|SysctlForbidden",
        cause="{who} got a node that refused the pod ({reason}): {said}",
        remedy="go on, another node is chosen: {again}; if it repeats, tell the administrator of "
        "the cluster",
    ),
)

CRASH_RULES = (
    Rule(
        name="crash",
        yields=True,
        of=frozenset({"container"}),
        reason="Error|ContainerCannotRun|DeadlineExceeded|StartError",
        cause="{who} crashed: a container ended with exit code {code}{how}",
        remedy=_LOGS + "; then: {again}",
        more=_shell_word,
    ),
    Rule(
        name="restarts",
        yields=True,
        of=_PODS,
        reason="CrashLoopBackOff",
        cause="{who} crashed again and again, and is started less and less often: {said}",
        remedy=_LOGS + "; then: {again}",
    ),
    Rule(
        name="backs-off",
        yields=True,
        of=frozenset({"event"}),
        reason="BackOff",
        message=r"(?i)back-off restarting failed container",
        cause="{who} crashed again and again: {said}",
        remedy=_LOGS + "; then: {again}",
    ),
)

OPERATOR_RULES = (
    Rule(
        name="rayjob-invalid",
        of=frozenset({"rayjob", "event"}),
        reason="ValidationFailed|InvalidRayJob.*|InvalidRayCluster.*",
        cause="KubeRay refuses the run's RayJob: {said}",
        remedy="see it: shoal render {run}; KubeRay may be too old for a key of the job "
        "(cluster.auth, cluster.start_deadline_minutes): {again} --set cluster.KEY=null",
    ),
    Rule(
        name="start-deadline",
        of=frozenset({"rayjob"}),
        reason="PreRunningDeadlineExceeded",
        cause="the Ray cluster was not ready within cluster.start_deadline_minutes, so KubeRay "
        "gave the run up: {said}",
        remedy="if nothing else explains it, wait longer: {again} --set "
        "cluster.start_deadline_minutes={more_start}; or: {again} --set "
        "cluster.start_deadline_minutes=null",
    ),
    Rule(
        name="deadline",
        of=frozenset({"rayjob"}),
        reason="DeadlineExceeded",
        cause="the run took longer than cluster.deadline_minutes, so KubeRay ended it: {said}",
        remedy="go on from the last checkpoint with more time: {again} --set "
        "cluster.deadline_minutes={more_deadline}; or: {again} --set cluster.deadline_minutes=null",
    ),
    Rule(
        name="submission-failed",
        yields=True,
        of=frozenset({"rayjob"}),
        reason="SubmissionFailed",
        cause="KubeRay could not submit the driver to the Ray cluster: {said}",
        remedy="see what submitter and head print: shoal logs {run} --pods; start it again: "
        "{again}",
    ),
    Rule(
        name="driver-failed",
        yields=True,
        of=frozenset({"rayjob"}),
        reason="AppFailed",
        cause="the driver failed: {said}",
        remedy="see what it printed: shoal logs {run} --pods; then: {again}",
    ),
    Rule(
        name="cluster-not-made",
        yields=True,
        of=frozenset({"event"}),
        reason="FailedToCreate.*|FailedCreate",
        cause="KubeRay could not make what the run needs ({reason}): {said}",
        remedy="see what it was given: shoal render {run}; ask the administrator of the cluster; "
        "then: {again}",
    ),
    Rule(
        name="head-not-ready",
        yields=True,
        of=frozenset({"ray cluster"}),
        reason="ContainersNotReady|HeadPodNotReady|PodsNotReady|HeadPodNotFound",
        cause="the head of the Ray cluster is not ready: {said}",
        remedy="see what it prints: shoal logs {run} --pods; wait, or: {again}",
    ),
)
