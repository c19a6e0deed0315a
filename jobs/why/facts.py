"""Evidence as single facts of one form, for rules to match. Pure.

facts_of(evidence) -> facts, the newest last; what is over already is left out: a pod that has a
node by now is not explained by its old events.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from cluster.rayjob_status import SeenRayJob
from jobs.why.evidence import ClusterEvidence, Evidence, Tree
from jobs.why.redaction import redacted

Source = Literal[
    "event", "pod", "container", "ray cluster", "rayjob", "workload", "printed", "folder"
]
Role = Literal["head", "worker", "submitter", ""]

IN_TIME = ("ContainerCreating", "PodInitializing")
"""Why containers wait that are about to start."""
_SUBMITTER_LABEL = "job-name"


@dataclass(frozen=True)
class Fact:
    """One thing that somebody says."""

    source: Source
    subject: str
    """Name of the pod or object that it is about."""
    role: Role
    """Of a pod, else empty."""
    reason: str
    """As Kubernetes has it: `FailedScheduling`, `OOMKilled`; empty for printed lines."""
    message: str
    time: str = ""
    """RFC 3339; empty where it is not told."""
    count: int = 1
    pod: Tree | None = None
    """The pod, where it is there."""
    is_warning: bool = False
    """Of an event: whether it is one."""

    @property
    def text(self) -> str:
        """As evidence: `event FailedScheduling of POD (12 times): ...`."""
        if self.source == "printed":
            return f"{self.subject} printed: {self.message}"
        if self.source == "folder":
            return f"the run's folder: {self.message}"
        times = f" ({self.count} times)" if self.count > 1 else ""
        said = ": ".join(filter(None, (f"{self.reason} of {self.subject}{times}", self.message)))
        return f"{self.source} {said}"


def facts_of(evidence: Evidence) -> list[Fact]:
    """All facts, those of one source by time, without what looks like a secret."""
    return [replace(fact, message=redacted(fact.message)) for fact in _all_facts(evidence)]


def _all_facts(evidence: Evidence) -> list[Fact]:
    cluster = evidence.cluster
    return [
        *_folder_facts(evidence),
        *_workload_facts(cluster.workload),
        *_rayjob_facts(evidence.status.rayjob),
        *_ray_cluster_facts(cluster.ray_cluster),
        *(fact for pod in cluster.pods for fact in _pod_facts(pod)),
        *_event_facts(cluster),
        *_printed_facts(evidence),
    ]


# ------------------------------------------------------------------------------------- the folder


def _folder_facts(evidence: Evidence) -> Iterator[Fact]:
    status = evidence.status
    for crash in status.crashes.values():
        yield Fact("folder", status.run_id, "", "", crash.reason)
    result = status.result
    failure = result and (result.failure or (result.outcome and result.outcome.failure))
    for message, _ in failure.problems if failure else ():
        yield Fact("folder", status.run_id, "", "", message)


def _printed_facts(evidence: Evidence) -> Iterator[Fact]:
    pods = {_name(pod): pod for pod in evidence.cluster.pods}
    for line in evidence.lines:
        yield Fact("printed", "the run", "", "", line)
    rayjob = evidence.status.rayjob
    for line in rayjob.message.splitlines() if rayjob else ():
        # Of a driver that failed, Ray passes on what it printed last.
        yield Fact("printed", "the driver", "", "", line)
    for printed in evidence.cluster.printed:
        pod = pods.get(printed.pod)
        role = role_of(pod) if pod else ""
        for line in printed.lines:
            yield Fact("printed", printed.pod, role, "", line, pod=pod)


# ------------------------------------------------------------------------------------ Kubernetes


def _workload_facts(workload: Tree | None) -> Iterator[Fact]:
    if workload is None:
        return
    name, status = _name(workload), workload.get("status") or {}
    conditions = {c.get("type"): c for c in status.get("conditions") or ()}
    if (workload.get("spec") or {}).get("active") is False:
        told = (conditions.get("Evicted") or {}).get("message", "")
        yield Fact("workload", name, "", "Deactivated", str(told))
    if _is(conditions.get("Finished"), "True"):
        return
    for kind, bad in (("QuotaReserved", "False"), ("Admitted", "False"), ("Evicted", "True")):
        found = conditions.get(kind)
        is_moot = kind == "Admitted" and not _is(conditions.get("QuotaReserved"), "True")
        if found is not None and _is(found, bad) and not is_moot:
            yield _condition("workload", name, found)
    for check in status.get("admissionChecks") or ():
        if check.get("state") != "Ready":
            reason, told = f"AdmissionCheck{check.get('state')}", check.get("message") or ""
            yield Fact("workload", name, "", reason, f"{check.get('name')}: {told}".rstrip(": "))
    if not conditions:
        yield Fact("workload", name, "", "New", "")


def _rayjob_facts(rayjob: SeenRayJob | None) -> Iterator[Fact]:
    if rayjob is not None and rayjob.deployment_status:
        reason = rayjob.reason or rayjob.deployment_status
        yield Fact("rayjob", rayjob.name, "", reason, rayjob.message)


def _ray_cluster_facts(ray_cluster: Tree | None) -> Iterator[Fact]:
    if ray_cluster is None:
        return
    name, status = _name(ray_cluster), ray_cluster.get("status") or {}
    if status.get("reason"):  # KubeRay before 1.3
        yield Fact("ray cluster", name, "", "Failed", str(status["reason"]))
    for condition in status.get("conditions") or ():
        kind = condition.get("type")
        if kind == "ReplicaFailure" and _is(condition, "True"):
            yield _condition("ray cluster", name, condition)
        if kind == "HeadPodReady" and _is(condition, "False"):
            yield _condition("ray cluster", name, condition, role="head")


def _pod_facts(pod: Tree) -> Iterator[Fact]:
    name, role, status = _name(pod), role_of(pod), pod.get("status") or {}
    if status.get("phase") in ("Failed", "Unknown") and status.get("reason"):
        told = str(status.get("message") or "")
        yield Fact("pod", name, role, str(status["reason"]), told, pod=pod)
    conditions = {c.get("type"): c for c in status.get("conditions") or ()}
    if _is(conditions.get("PodScheduled"), "False"):
        yield _condition("pod", name, conditions["PodScheduled"], role=role, pod=pod)
    if _is(conditions.get("DisruptionTarget"), "True"):
        yield _condition("pod", name, conditions["DisruptionTarget"], role=role, pod=pod)
    is_running = status.get("phase") == "Running"
    containers = [
        *(status.get("initContainerStatuses") or ()),
        *(status.get("containerStatuses") or ()),
    ]
    facts = [fact for c in containers for fact in _container_facts(c, name, role, pod)]
    yield from facts
    if is_running and not facts and _is(conditions.get("Ready"), "False"):
        yield _condition("pod", name, conditions["Ready"], role=role, pod=pod)


def _container_facts(container: Tree, pod_name: str, role: Role, pod: Tree) -> Iterator[Fact]:
    state, last = container.get("state") or {}, container.get("lastState") or {}
    restarts = int(container.get("restartCount") or 0)
    waiting = state.get("waiting") or {}
    for ended, count in ((state.get("terminated"), 1), (last.get("terminated"), restarts)):
        if ended and (ended.get("exitCode") != 0 or ended.get("reason") == "OOMKilled"):
            told = f"container {container.get('name')}, exit code {ended.get('exitCode')}"
            if ended.get("message"):
                told += f": {' '.join(str(ended['message']).split())}"
            yield Fact(
                "container",
                pod_name,
                role,
                str(ended.get("reason") or "Error"),
                told,
                str(ended.get("finishedAt") or ""),
                max(1, count),
                pod,
            )
    if waiting.get("reason") and waiting["reason"] not in IN_TIME:
        told = str(waiting.get("message") or "")
        yield Fact("container", pod_name, role, str(waiting["reason"]), told, pod=pod)


def _event_facts(cluster: ClusterEvidence) -> Iterator[Fact]:
    pods = {_name(pod): pod for pod in cluster.pods}
    for event in sorted(cluster.events, key=time_of):
        about = event.get("involvedObject") or {}
        kind, name = str(about.get("kind", "")), str(about.get("name", ""))
        pod = pods.get(name) if kind == "Pod" else None
        reason, told = str(event.get("reason", "")), " ".join(str(event.get("message", "")).split())
        if _is_over(reason, pod) or (kind != "Pod" and _is_made(cluster, reason)):
            continue
        series = event.get("series") or {}
        yield Fact(
            "event",
            name,
            role_of(pod) if pod else _role_by_name(name, kind),
            reason,
            told,
            time_of(event),
            int(series.get("count") or event.get("count") or 1),
            pod,
            event.get("type") == "Warning",
        )


def _is_over(reason: str, pod: Tree | None) -> bool:
    """Whether the pod has got beyond what an event of it tells."""
    if pod is None:
        return False
    status = pod.get("status") or {}
    states = [c.get("state") or {} for c in status.get("containerStatuses") or ()]
    conditions = {c.get("type"): c for c in status.get("conditions") or ()}
    has_node = bool((pod.get("spec") or {}).get("nodeName"))
    has_begun = any("running" in s or "terminated" in s for s in states)
    if reason in ("FailedScheduling", "NotTriggerScaleUp", "TriggeredScaleUp"):
        return has_node or has_begun or _is(conditions.get("PodScheduled"), "True")
    if reason in ("Unhealthy", "ProbeWarning"):
        return _is(conditions.get("Ready"), "True")
    if reason in ("Failed", "BackOff", "ErrImagePull", "FailedMount", "FailedAttachVolume"):
        is_up = bool(states) and all("running" in s for s in states)
        return is_up or (has_begun and reason.startswith("Failed"))
    return False


def _is_made(cluster: ClusterEvidence, reason: str) -> bool:
    """Whether a pod whose making had failed is there now."""
    roles = {role_of(pod) for pod in cluster.pods}
    if reason == "FailedToCreateHeadPod":
        return "head" in roles
    if reason in ("FailedToCreateWorkerPod", "FailedCreate"):
        role: Role = "worker" if reason == "FailedToCreateWorkerPod" else "submitter"
        status = (cluster.ray_cluster or {}).get("status") or {}
        wanted = int(status.get("desiredWorkerReplicas") or 0) if role == "worker" else 1
        return role in roles and sum(role_of(p) == role for p in cluster.pods) >= wanted
    return False


def role_of(pod: Tree) -> Role:
    labels = (pod.get("metadata") or {}).get("labels") or {}
    kind = labels.get("ray.io/node-type")
    if kind in ("head", "worker"):
        return "head" if kind == "head" else "worker"
    return "submitter" if _SUBMITTER_LABEL in labels else ""


def _role_by_name(name: str, kind: str) -> Role:
    """Of a pod that is gone, by how KubeRay names them."""
    if kind != "Pod":
        return ""
    return "head" if "-head-" in name else "worker" if "-worker-" in name else "submitter"


def time_of(event: Tree) -> str:
    """When an event was last seen, RFC 3339."""
    series = event.get("series") or {}
    metadata = event.get("metadata") or {}
    found = (
        series.get("lastObservedTime")
        or event.get("lastTimestamp")
        or event.get("eventTime")
        or event.get("firstTimestamp")
        or metadata.get("creationTimestamp")
    )
    return str(found or "")


def _condition(source: Source, name: str, condition: Mapping[str, Any], **more: Any) -> Fact:
    told = " ".join(str(condition.get("message") or "").split())
    moment = str(condition.get("lastTransitionTime") or "")
    reason = str(condition.get("reason") or condition.get("type"))
    return Fact(source, name, more.get("role", ""), reason, told, moment, 1, more.get("pod"))


def _is(condition: Mapping[str, Any] | None, status: str) -> bool:
    return condition is not None and condition.get("status") == status


def _name(tree: Tree) -> str:
    return str((tree.get("metadata") or {}).get("name", ""))
