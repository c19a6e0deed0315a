"""What KubeRay says of a run: a RayJob as it was read, and one state of ours for its two. Pure.

    seen_in(tree)      a RayJob of the API -> SeenRayJob
    state_of(seen)     SeenRayJob -> OperatorState: a State with its cause

`jobStatus` is what Ray said when the operator last asked it: whether the driver runs, and how its
process ended. `jobDeploymentStatus` is what the operator does: it makes a Ray cluster, submits, and
cleans up. They are written one after the other, so each combination of them can be met, also
SUCCEEDED beside Running (the submitter's pod has not ended yet) and RUNNING beside Failed (the
operator gave the run up while it went on). Read from `rayjob_controller.go` of KubeRay 1.4 to 1.7.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cluster.rayjob import past_of
from jobs.record import NOTHING_PAST, Past, State

RUN_ANNOTATION = "shoal/run"
"""Holds the URI of the run that a RayJob is for."""

_ENDED_JOBS = ("SUCCEEDED", "FAILED", "STOPPED")
"""Of `jobStatus`: the driver's process has ended, and Ray starts no other one for it."""
_EXIT_CODE = re.compile(r"exit code:? (-?\d+)")
_LONGEST_MESSAGE = 300


@dataclass(frozen=True)
class SeenRayJob:
    """A RayJob as the API told it; empty texts for what the operator has not written."""

    name: str
    namespace: str
    uid: str
    resource_version: str
    run_uri: str | None
    """The run that it is for; None: it is not ours."""
    past: Past
    """What its driver is not concerned with."""
    job_status: str
    deployment_status: str
    reason: str
    message: str
    failed: int
    """How often the operator has given it up, or started it again, so far."""
    backoff_limit: int
    is_suspended: bool
    """Whether somebody, such as a queue, wants it to have no cluster now."""
    queue: str | None
    is_being_deleted: bool
    ray_cluster: str
    ray_cluster_state: str
    ray_cluster_reason: str
    created_at: str
    """RFC 3339."""

    @property
    def driver_has_ended(self) -> bool:
        """Whether the driver's process has ended, and no other one has been started since."""
        return self.job_status in _ENDED_JOBS


def seen_in(tree: Mapping[str, Any]) -> SeenRayJob:
    """A RayJob of the API; what it lacks is empty."""
    metadata, spec = tree.get("metadata") or {}, tree.get("spec") or {}
    status = tree.get("status") or {}
    cluster = status.get("rayClusterStatus") or {}
    run_uri = (metadata.get("annotations") or {}).get(RUN_ANNOTATION)
    return SeenRayJob(
        name=str(metadata.get("name", "")),
        namespace=str(metadata.get("namespace", "")),
        uid=str(metadata.get("uid", "")),
        resource_version=str(metadata.get("resourceVersion", "")),
        run_uri=run_uri,
        past=past_of(tree) if run_uri is not None else NOTHING_PAST,
        job_status=str(status.get("jobStatus", "")),
        deployment_status=str(status.get("jobDeploymentStatus", "")),
        reason=str(status.get("reason", "")),
        message=str(status.get("message", "")),
        failed=int(status.get("failed") or 0),
        backoff_limit=int(spec.get("backoffLimit") or 0),
        is_suspended=bool(spec.get("suspend")),
        queue=(metadata.get("labels") or {}).get("kueue.x-k8s.io/queue-name"),
        is_being_deleted=metadata.get("deletionTimestamp") is not None,
        ray_cluster=str(status.get("rayClusterName", "")),
        ray_cluster_state=str(cluster.get("state", "")),
        ray_cluster_reason=str(cluster.get("reason", "")),
        created_at=str(metadata.get("creationTimestamp", "")),
    )


@dataclass(frozen=True)
class OperatorState:
    """The state of a run as its RayJob tells it."""

    state: State
    cause: str
    is_over: bool
    """Whether the operator is done with it: it starts no driver any more."""


def state_of(seen: SeenRayJob) -> OperatorState:
    """The state that both status fields mean together, with its cause.

    What the run's own folder says counts more, wherever it says something: a driver that has
    written its result knows better than an exit code.
    """
    if seen.is_being_deleted:
        return OperatorState(State.STOPPING, "its RayJob is being deleted", is_over=False)
    match seen.deployment_status:
        case "":
            return _going_on(seen, State.PENDING, _untouched(seen))
        case "Initializing":
            return _going_on(seen, State.PENDING, _initializing(seen))
        case "Waiting":
            cause = "the Ray cluster is there, and KubeRay waits for somebody to submit the driver"
            return OperatorState(State.PENDING, cause, is_over=False)
        case "Running":
            return _running(seen)
        case "Complete":
            return _complete(seen)
        case "Failed":
            return _failed(seen)
        case "ValidationFailed":
            cause = f"KubeRay refuses the RayJob: {_message(seen) or 'it does not say why'}"
            return OperatorState(State.FAILED_SPEC, cause, is_over=True)
        case "Retrying":
            cause = f"KubeRay starts it again on a new Ray cluster ({_retry(seen)}); "
            return OperatorState(State.RECOVERING, cause + _gave_up(seen), is_over=False)
        case "Suspending":
            cause = f"KubeRay takes its Ray cluster down, as {_who_suspends(seen)} wants"
            return OperatorState(State.RECOVERING, cause, is_over=False)
        case "Suspended":
            return OperatorState(State.PENDING, _held_back(seen), is_over=False)
        case "Scheduling" | "Scheduled":
            cause = "KubeRay waits for the time at which the RayJob is due"
            return OperatorState(State.PENDING, cause, is_over=False)
        case other:
            cause = f"KubeRay says {other}, which this version of Shoal does not know"
            return OperatorState(State.PENDING, cause, is_over=False)


def _going_on(seen: SeenRayJob, state: State, cause: str) -> OperatorState:
    """Before the driver runs; of a run that was started before, `state` is RECOVERING."""
    if seen.failed:
        return OperatorState(State.RECOVERING, f"{_retry(seen)}: {cause}", is_over=False)
    return OperatorState(state, cause, is_over=False)


def _untouched(seen: SeenRayJob) -> str:
    if seen.is_suspended:
        return _held_back(seen)
    return "KubeRay has not taken up the RayJob yet"


def _held_back(seen: SeenRayJob) -> str:
    if seen.queue is not None:
        return f"it waits until the queue {seen.queue} admits it"
    return "its RayJob is suspended (spec.suspend)"


def _who_suspends(seen: SeenRayJob) -> str:
    return f"the queue {seen.queue}" if seen.queue is not None else "spec.suspend"


def _initializing(seen: SeenRayJob) -> str:
    if not seen.ray_cluster:
        return "KubeRay makes its Ray cluster"
    if seen.ray_cluster_state == "ready":
        return f"its Ray cluster {seen.ray_cluster} is ready, and the driver is being submitted"
    if seen.ray_cluster_state or seen.ray_cluster_reason:
        why = " ".join(filter(None, (seen.ray_cluster_state, _short(seen.ray_cluster_reason))))
        return f"it waits for the pods of its Ray cluster {seen.ray_cluster} ({why})"
    return f"it waits for the pods of its Ray cluster {seen.ray_cluster}"


def _running(seen: SeenRayJob) -> OperatorState:
    match seen.job_status:
        case "SUCCEEDED":
            cause = "the driver has ended well, and KubeRay waits for its submitter to end"
            return OperatorState(State.SUCCEEDED, cause, is_over=False)
        case "STOPPED":
            cause = "the driver was stopped through Ray, and KubeRay waits for its submitter to end"
            return OperatorState(State.STOPPED, cause, is_over=False)
        case "FAILED":
            state, cause = _ended_driver(seen)
            return OperatorState(state, f"{cause}; KubeRay has not acted on it yet", is_over=False)
        case "RUNNING":
            return OperatorState(State.RUNNING, "the driver runs", is_over=False)
        case "PENDING":
            return _going_on(seen, State.STARTING, "Ray starts the driver")
        case _:
            cause = "the Ray cluster is ready, and the driver is being submitted"
            return _going_on(seen, State.STARTING, cause)


def _complete(seen: SeenRayJob) -> OperatorState:
    match seen.job_status:
        case "STOPPED":
            state, cause = State.STOPPED, "the driver was stopped through Ray"
        case "FAILED":
            state, cause = _ended_driver(seen)
        case "SUCCEEDED":
            state, cause = State.SUCCEEDED, "the driver has ended well"
        case _:
            # The submitter's exit code was 0, which it is only where the driver's was.
            state = State.SUCCEEDED
            cause = "the driver has ended well, as its submitter says"
    return OperatorState(state, cause, is_over=True)


def _failed(seen: SeenRayJob) -> OperatorState:
    if seen.job_status == "SUCCEEDED":
        cause = f"the driver has ended well, but {_gave_up(seen)}"
        return OperatorState(State.SUCCEEDED, cause, is_over=True)
    if seen.job_status == "STOPPED":
        cause = f"the driver was stopped through Ray, and {_gave_up(seen)}"
        return OperatorState(State.STOPPED, cause, is_over=True)
    if seen.job_status == "FAILED" or seen.reason == "AppFailed":
        return OperatorState(*_ended_driver(seen), is_over=True)
    has_begun = seen.job_status == "RUNNING"
    is_out_of_time = seen.reason in ("DeadlineExceeded", "PreRunningDeadlineExceeded")
    state = State.FAILED_RESOURCES if is_out_of_time and not has_begun else State.FAILED_INFRA
    return OperatorState(state, _gave_up(seen), is_over=True)


def _ended_driver(seen: SeenRayJob) -> tuple[State, str]:
    """Of a driver that Ray says has failed: by its exit code, where Ray tells it."""
    found = _EXIT_CODE.search(seen.message)
    code = int(found[1]) if found else None
    state = _STATES.get(code, State.FAILED_INFRA)
    how = "failed" if code is None else f"ended with exit code {code}"
    told = _message(seen)
    return state, f"the driver {how}" + (f": {told}" if told else "")


_STATES: dict[int | None, State] = {
    state.exit_code: state
    for state in (State.STOPPED, State.FAILED_USER, State.FAILED_SPEC, State.FAILED_INFRA)
}
"""What the driver's exit codes mean, see `jobs.record`."""


def _gave_up(seen: SeenRayJob) -> str:
    """`KubeRay gave it up after activeDeadlineSeconds: message`."""
    known = {
        "AppFailed": "the driver failed",
        "DeadlineExceeded": "KubeRay gave it up after activeDeadlineSeconds",
        "PreRunningDeadlineExceeded": "its Ray cluster was not ready after "
        "preRunningDeadlineSeconds, and KubeRay gave it up",
        "SubmissionFailed": "the driver could not be submitted",
        "JobDeploymentStatusTransitionGracePeriodExceeded": "its submitter did not end in time",
    }
    how = known.get(seen.reason)
    if how is None:
        how = "KubeRay gave it up" + (f" ({seen.reason})" if seen.reason else "")
    told = _message(seen)
    return f"{how}: {told}" if told else how


def _retry(seen: SeenRayJob) -> str:
    return f"retry {seen.failed} of {seen.backoff_limit}"


def _message(seen: SeenRayJob) -> str:
    """The operator's message on one line: of a failed driver, how it ended and its last line."""
    lines = [line.strip() for line in seen.message.splitlines() if line.strip()]
    if len(lines) <= 2:
        return _short(" ".join(lines))
    return f"{_short(lines[0])} ... {_short(lines[-1])}"


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _LONGEST_MESSAGE else text[: _LONGEST_MESSAGE - 3] + "..."
