"""Why the workers are started again, from what Ray says of it."""

from __future__ import annotations

import ray
from ray.train.v2.api.exceptions import ControllerError, PreemptionError, WorkerGroupError
from ray.train.v2.api.preemption import PreemptionInfo

from trainers.ray_controller import restart_notice


def lost(*, taken: bool) -> ray.exceptions.RayActorError:
    return ray.exceptions.RayActorError(preempted=taken)


def test_a_worker_that_died_is_a_failure() -> None:
    error = WorkerGroupError("rank 1 died", {1: lost(taken=False), 2: ValueError("later")})
    assert restart_notice(error) == (
        "failure",
        "rank 1 failed (RayActorError); the workers are started again from the last checkpoint",
    )


def test_a_worker_whose_node_was_taken_is_no_failure() -> None:
    kind, message = restart_notice(
        WorkerGroupError("gone", {0: lost(taken=False), 1: lost(taken=True)})
    )
    assert kind == "preemption"
    assert message.startswith("a node was taken; ")


def test_a_grace_that_was_too_short_is_a_preemption() -> None:
    info = PreemptionInfo(deadline_ms=0, preempted_node_to_ranks={"n": [1]})
    error = PreemptionError(preemption_info=info, drain_timed_out=True)
    kind, message = restart_notice(error)
    assert kind == "preemption"
    assert message.startswith("a node was taken before the state was saved; ")


def test_workers_that_could_not_be_started_are_a_failure_with_its_name() -> None:
    kind, message = restart_notice(ControllerError(TimeoutError("no room")))
    assert kind == "failure"
    assert message.startswith("ControllerError; ")
