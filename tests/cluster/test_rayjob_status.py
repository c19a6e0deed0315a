"""Both status fields of a RayJob as one state: every combination, and every order of real ones."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from cluster.rayjob_status import OperatorState, SeenRayJob, seen_in, state_of
from jobs.record import State
from tests.kubernetes_api.operator import ENDED, Status, steps_of, successors

JOBS = ("", "PENDING", "RUNNING", "SUCCEEDED", "FAILED", "STOPPED")
REASONS = (
    "",
    "AppFailed",
    "DeadlineExceeded",
    "PreRunningDeadlineExceeded",
    "SubmissionFailed",
    "JobDeploymentStatusTransitionGracePeriodExceeded",
    "SomethingNew",
)
P, S, R, V = State.PENDING, State.STARTING, State.RUNNING, State.RECOVERING
OK, STOP, SPEC = State.SUCCEEDED, State.STOPPED, State.FAILED_SPEC
INFRA, ROOM = State.FAILED_INFRA, State.FAILED_RESOURCES

STATES: dict[str, tuple[State, ...]] = {
    # deployment: the state for each of JOBS, in their order
    "": (P, P, P, P, P, P),
    "Initializing": (P, P, P, P, P, P),
    "Waiting": (P, P, P, P, P, P),
    "Running": (S, S, R, OK, INFRA, STOP),
    "Complete": (OK, OK, OK, OK, INFRA, STOP),
    "ValidationFailed": (SPEC, SPEC, SPEC, SPEC, SPEC, SPEC),
    "Retrying": (V, V, V, V, V, V),
    "Suspending": (V, V, V, V, V, V),
    "Suspended": (P, P, P, P, P, P),
    "Scheduling": (P, P, P, P, P, P),
    "Scheduled": (P, P, P, P, P, P),
    "SomethingNew": (P, P, P, P, P, P),
}
FAILED: dict[str, tuple[State, ...]] = {
    # the same for each reason of deployment Failed
    "": (INFRA, INFRA, INFRA, OK, INFRA, STOP),
    "AppFailed": (INFRA, INFRA, INFRA, OK, INFRA, STOP),
    "DeadlineExceeded": (ROOM, ROOM, INFRA, OK, INFRA, STOP),
    "PreRunningDeadlineExceeded": (ROOM, ROOM, INFRA, OK, INFRA, STOP),
    "SubmissionFailed": (INFRA, INFRA, INFRA, OK, INFRA, STOP),
    "JobDeploymentStatusTransitionGracePeriodExceeded": (INFRA, INFRA, INFRA, OK, INFRA, STOP),
    "SomethingNew": (INFRA, INFRA, INFRA, OK, INFRA, STOP),
}
OVER = ("Complete", "Failed", "ValidationFailed")


def rayjob(status: dict[str, Any] | None = None, **spec: Any) -> SeenRayJob:
    metadata = {
        "name": "a-1",
        "namespace": "default",
        "uid": "u",
        "annotations": {"shoal/run": "s3://b/a-1"},
    }
    return seen_in({"metadata": metadata, "spec": spec, "status": status or {}})


def told(deployment: str, job: str, **more: Any) -> OperatorState:
    return state_of(rayjob({"jobDeploymentStatus": deployment, "jobStatus": job, **more}))


@pytest.mark.parametrize("deployment", [*STATES, "Failed"])
def test_every_combination_has_one_state_with_a_cause(deployment: str) -> None:
    for (number, job), reason in itertools.product(enumerate(JOBS), REASONS):
        found = told(deployment, job, reason=reason, message="why")
        wanted = FAILED[reason][number] if deployment == "Failed" else STATES[deployment][number]
        assert found.state is wanted, (deployment, job, reason)
        assert found.is_over is (deployment in OVER)
        assert found.cause


def test_what_is_over_is_over_in_our_words_too() -> None:
    for deployment, job, reason in itertools.product(OVER, JOBS, REASONS):
        assert told(deployment, job, reason=reason).state.is_final


def test_an_empty_object_is_one_that_nobody_has_taken_up() -> None:
    assert state_of(seen_in({})).state is State.PENDING
    assert "has not taken up" in state_of(rayjob()).cause


EXIT_CODES = {1: State.FAILED_USER, 2: State.FAILED_SPEC, 3: State.FAILED_INFRA, 130: State.STOPPED}


@pytest.mark.parametrize(("code", "state"), EXIT_CODES.items())
def test_a_driver_that_failed_is_judged_by_its_exit_code(code: int, state: State) -> None:
    message = (
        f"Job entrypoint command failed with exit code {code}, last available logs (truncated to "
        "20,000 chars):\nTraceback\n  File x\nModuleNotFoundError: No module named 'jobs'"
    )
    for deployment in ("Running", "Failed"):
        found = told(deployment, "FAILED", reason="AppFailed", message=message)
        assert found.state is state
        assert "No module named 'jobs'" in found.cause
        assert "\n" not in found.cause
    assert told("Failed", "FAILED", message="exit code 77").state is State.FAILED_INFRA


def test_the_cause_says_what_is_waited_for() -> None:
    cluster = {"state": "", "reason": ""}
    waiting = rayjob(
        {
            "jobDeploymentStatus": "Initializing",
            "rayClusterName": "a-1-xyz",
            "rayClusterStatus": cluster | {"reason": "pods quota exceeded"},
        }
    )
    assert "a-1-xyz (pods quota exceeded)" in state_of(waiting).cause
    ready = rayjob(
        {
            "jobDeploymentStatus": "Initializing",
            "rayClusterName": "a-1-xyz",
            "rayClusterStatus": cluster | {"state": "ready"},
        }
    )
    assert "is ready" in state_of(ready).cause
    queued = seen_in(
        {
            "metadata": {"labels": {"kueue.x-k8s.io/queue-name": "team-a"}},
            "spec": {"suspend": True},
            "status": {"jobDeploymentStatus": "Suspended"},
        }
    )
    assert state_of(queued).cause == "it waits until the queue team-a admits it"


def test_a_retry_tells_its_number_and_what_it_is_for() -> None:
    found = state_of(
        rayjob(
            {
                "jobDeploymentStatus": "Retrying",
                "jobStatus": "FAILED",
                "reason": "AppFailed",
                "failed": 1,
            },
            backoffLimit=2,
        )
    )
    assert "retry 1 of 2" in found.cause
    again = state_of(rayjob({"jobDeploymentStatus": "Initializing", "failed": 1}, backoffLimit=2))
    assert again.state is State.RECOVERING


def test_one_that_is_being_deleted_is_neither_over_nor_running() -> None:
    tree = {
        "metadata": {"deletionTimestamp": "2026-11-29T12:00:00Z"},
        "status": {"jobDeploymentStatus": "Running", "jobStatus": "RUNNING"},
    }
    found = state_of(seen_in(tree))
    assert (found.state, found.is_over) == (State.STOPPING, False)


def test_a_long_message_is_cut() -> None:
    assert len(told("Failed", "", reason="SubmissionFailed", message="x" * 5000).cause) < 500


# ------------------------------------------------------------------- every order of the real ones


@pytest.mark.parametrize("suspends", [False, True], ids=["plain", "in a queue"])
@pytest.mark.parametrize("backoff_limit", [0, 2])
def test_no_step_of_the_operator_contradicts_the_one_before(
    backoff_limit: int, suspends: bool
) -> None:
    steps = list(steps_of(backoff_limit=backoff_limit, suspends=suspends))
    met = {(after.deployment, after.job) for _, after in steps}
    assert {("Running", "SUCCEEDED"), ("Failed", "RUNNING"), ("Failed", "SUCCEEDED")} <= met
    for now, after in steps:
        before, then = state(now, backoff_limit), state(after, backoff_limit)
        assert not before.is_over, "something comes after what was told to be over"
        is_last = not list(successors(after, backoff_limit=backoff_limit, suspends=suspends))
        assert then.is_over is is_last, after
        if then.is_over:
            assert then.state.is_final
        elif then.state.is_final:
            assert after.job in ENDED
        if then.state is State.RUNNING:
            assert (after.deployment, after.job) == ("Running", "RUNNING")
        if after.job == "SUCCEEDED" and after.deployment != "Retrying":
            assert then.state in (State.SUCCEEDED, State.RECOVERING)
        if after.failed > backoff_limit:
            assert then.is_over


def state(status: Status, backoff_limit: int) -> OperatorState:
    return state_of(rayjob(status.as_tree(), backoffLimit=backoff_limit))
