"""Why the workers are started again, from what Ray says of it; what ends a wait for nodes."""

from __future__ import annotations

import json
import pickle
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import pytest
import ray
from ray.train.v2._internal.exceptions import (
    WorkerGroupStartupFailedError,
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckFailedError,
)
from ray.train.v2._internal.execution.controller.state import ReschedulingState, SchedulingState
from ray.train.v2._internal.execution.failure_handling import FailureDecision
from ray.train.v2._internal.execution.worker_group import WorkerGroup
from ray.train.v2.api.config import FailureConfig, ScalingConfig
from ray.train.v2.api.exceptions import ControllerError, PreemptionError, WorkerGroupError
from ray.train.v2.api.preemption import PreemptionInfo

from cluster.folder import FolderStore
from jobs.errors import ClusterError
from jobs.record import Control, RunPaths, State
from jobs.spec import Workers
from tests.tiny import tiny_job
from trainers import ray_controller as module
from trainers.controls import ask_to_yield
from trainers.ray_controller import (
    EndedWhileWaiting,
    RunController,
    RunFailurePolicy,
    RunScalingPolicy,
    give_back_room,
    restart_notice,
)

PATHS = RunPaths("run")
GENERATION = 7


def lost(*, taken: bool) -> ray.exceptions.RayActorError:
    return ray.exceptions.RayActorError(preempted=taken)


def unhealthy(cause: Exception) -> WorkerHealthCheckFailedError:
    """As Ray's controller wraps the death of a worker that it polls."""
    return WorkerHealthCheckFailedError("A worker health check failed.", failure=cause)


ENDED_BY_SIGTERM = ray.exceptions.RayActorError(
    error_msg="The actor died because its node has died. Node Id: 5f\n"
    "\tthe actor's node was terminated expectedly: received SIGTERM"
)


def test_a_worker_that_died_is_a_failure() -> None:
    error = WorkerGroupError("rank 1 died", {1: lost(taken=False), 2: ValueError("later")})
    assert restart_notice(error) == (
        "failure",
        "rank 1 failed (RayActorError); the workers are started again from the last checkpoint",
    )


def test_the_notice_names_the_death_and_not_what_ray_wraps_it_in() -> None:
    _, message = restart_notice(WorkerGroupError("died", {1: unhealthy(lost(taken=False))}))
    assert message.startswith("rank 1 failed (RayActorError); ")


@pytest.mark.parametrize(
    "death", [lost(taken=True), ENDED_BY_SIGTERM], ids=["preempted", "ended by SIGTERM"]
)
def test_a_worker_whose_node_was_taken_is_no_failure(death: Exception) -> None:
    error = WorkerGroupError("gone", {0: lost(taken=False), 1: unhealthy(death)})
    kind, message = restart_notice(error)
    assert kind == "preemption"
    assert message.startswith("a node was taken; ")
    budgets = FailureConfig(max_failures=0, max_preemption_failures=1)
    policy = RunFailurePolicy(budgets)
    assert [policy.make_decision(error) for _ in range(2)] == [
        FailureDecision.RETRY,
        FailureDecision.RAISE,
    ]


def test_a_worker_that_died_by_itself_counts_for_the_budget_of_failures() -> None:
    error = WorkerGroupError("gone", {0: ValueError("a peer"), 1: unhealthy(lost(taken=False))})
    policy = RunFailurePolicy(FailureConfig(max_failures=1, max_preemption_failures=-1))
    assert [policy.make_decision(error) for _ in range(2)] == [
        FailureDecision.RETRY,
        FailureDecision.RAISE,
    ]


def test_a_grace_that_was_too_short_is_a_preemption() -> None:
    info = PreemptionInfo(deadline_ms=0, preempted_node_to_ranks={"n": [1]})
    error = PreemptionError(preemption_info=info, drain_timed_out=True)
    kind, message = restart_notice(error)
    assert kind == "preemption"
    assert message.startswith("a node was taken before the state was saved; ")


@pytest.mark.parametrize(
    ("taken", "kind"), [(False, "failure"), (True, "preemption")], ids=["died", "taken"]
)
def test_workers_that_could_not_be_set_up_are_a_failure_unless_their_node_was_taken(
    taken: bool, kind: str
) -> None:
    found, message = restart_notice(ControllerError(lost(taken=taken)))
    assert found == kind
    assert message.startswith("the workers could not be set up (RayActorError); ")


# ------------------------------------------------------------------------ while workers are at work


@pytest.mark.parametrize(
    ("free", "counted", "wanted"),
    [
        (0, 2, None),  # the other node is being drained, or has died, or is held by somebody else
        (1, 2, 2),
        (1, 3, 3),
        (1, 1, None),
        (0, 1, None),
    ],
)
def test_workers_at_work_are_ended_for_more_of_them_only_where_those_have_room(
    monkeypatch: pytest.MonkeyPatch, free: int, counted: int, wanted: int | None
) -> None:
    """`counted` is how many workers Ray believes that there is room for."""
    monkeypatch.setattr(module, "free_on_nodes", lambda: [{}] + [{"CPU": 1.0}] * free)
    assert wanted_workers(monkeypatch, counted=counted) == wanted


def test_a_cluster_that_cannot_be_looked_at_ends_no_workers(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def look() -> list[dict[str, float]]:
        raise ConnectionError("the head is away")

    monkeypatch.setattr(module, "free_on_nodes", look)
    assert wanted_workers(monkeypatch, counted=2) is None
    assert "so no worker is added: the head is away" in caplog.text


def wanted_workers(monkeypatch: pytest.MonkeyPatch, *, counted: int) -> int | None:
    """To how many the one worker that is at work is changed; None: it goes on."""
    workers = Workers(count=4, min=1, resize_seconds=1.0)
    policy = RunScalingPolicy(ScalingConfig(num_workers=(1, 4)), workers)
    monkeypatch.setattr(policy, "_maybe_send_resource_request", lambda: None)
    reserved = {str(number): {"CPU": 1.0} for number in range(counted)}
    monkeypatch.setattr(policy, "_get_reserved_resources", lambda: reserved)
    at_work = SimpleNamespace(num_workers=1, start_time=float("-inf"))
    decision = policy.make_decision_for_running_worker_group(at_work, None)
    return getattr(decision, "num_workers", None)


# -------------------------------------------------------------------- while there are no workers


@pytest.mark.parametrize(
    ("kind", "attempt", "generation", "state"),
    [("stop", None, None, State.STOPPED), ("yield", 3, GENERATION, State.RECOVERING)],
    ids=["a stop", "the driver's machine is taken as well"],
)
def test_a_run_that_waits_for_nodes_ends_when_it_is_asked_to(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: Literal["stop", "yield"],
    attempt: int | None,
    generation: int | None,
    state: State,
) -> None:
    controller, store = waiting(tmp_path, monkeypatch)
    store.write(PATHS.attempt(2), b"{}")
    request = Control(kind=kind, requested_at=0.0, attempt=attempt, generation=generation)
    store.write(PATHS.control_request(1), request.to_bytes())
    with pytest.raises(EndedWhileWaiting) as ended:
        controller._await_room()
    # Ray hands it on from the process of its controller.
    assert pickle.loads(pickle.dumps(ended.value)).state is state


def test_a_run_whose_room_is_held_by_something_else_ends_when_it_is_asked_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    controller, store = waiting(tmp_path, monkeypatch)
    monkeypatch.setattr(module, "staying_nodes", lambda: [{"CPU": 8.0, "memory": 1e12}])
    store.write(PATHS.attempt(2), b"{}")
    request = Control(kind="stop", requested_at=0.0)
    store.write(PATHS.control_request(1), request.to_bytes())
    assert controller._await_room() == 2, "its workers will hear it"
    controller._failed_start = "2 workers were given no place in the time that Ray waits for it"
    with pytest.raises(EndedWhileWaiting):
        controller._await_room()


@pytest.mark.parametrize(
    ("attempt", "generation"),
    [(2, GENERATION), (3, GENERATION - 1)],
    ids=["to an attempt that has ended", "to the attempt that the driver before never began"],
)
def test_requests_that_are_old_do_not_end_a_wait_for_nodes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, attempt: int, generation: int
) -> None:
    controller, store = waiting(tmp_path, monkeypatch, minutes=0.002)
    store.write(PATHS.attempt(2), b"{}")
    ask_to_yield(store, PATHS, attempt=attempt, generation=generation, by="a test")
    with pytest.raises(ClusterError, match="no workers could be started"):
        controller._await_room()


def test_a_notice_that_cannot_be_written_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    controller, _ = waiting(tmp_path, monkeypatch)
    controller._notices = tmp_path / "gone" / "notices"
    controller._tell("waiting", "for a node")
    assert "for a node (it cannot be told: " in caplog.text


# -------------------------------------------------------------------- before another number of them


def resizing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, errors: dict[int, Exception]
) -> tuple[RunController, FolderStore]:
    """A controller whose workers, of attempt 3, give nothing but `errors`."""
    controller, store = waiting(tmp_path, monkeypatch, hang_minutes=0.005)
    monkeypatch.setattr(module, "_POLL_SECONDS", 0.01)
    controller._attempt_before = 2
    store.write(PATHS.attempt(3), b"{}")
    controller._group = SimpleNamespace(poll_status=lambda timeout: SimpleNamespace(errors=errors))
    return controller, store


@pytest.mark.parametrize(
    ("errors", "problem"),
    [({}, "it was not durable in time"), ({1: lost(taken=False)}, "a worker failed")],
    ids=["workers that do not answer", "a worker that dies"],
)
def test_a_save_before_a_resize_is_waited_for_within_a_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, errors: dict[int, Exception], problem: str
) -> None:
    controller, store = resizing(tmp_path, monkeypatch, errors=errors)
    controller._save_before_resize(SimpleNamespace(num_workers=1))
    assert json.loads(store.read(PATHS.control_request(1)))["attempt"] == 3
    told = [json.loads(line) for line in (tmp_path / "notices").read_text().splitlines()]
    assert [notice["kind"] for notice in told] == ["resize", "warning"]
    assert f"was not saved before the number of workers changed ({problem})" in told[1]["message"]


def test_a_resize_goes_on_once_the_attempt_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    controller, store = resizing(tmp_path, monkeypatch, errors={})
    store.write(PATHS.outcome(3), b"{}")
    controller._save_before_resize(SimpleNamespace(num_workers=1))
    assert "warning" not in (tmp_path / "notices").read_text()


def test_workers_that_have_not_begun_have_nothing_to_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    controller, store = resizing(tmp_path, monkeypatch, errors={})
    controller._attempt_before = 3
    controller._save_before_resize(SimpleNamespace(num_workers=1))
    assert not list(store.list(PATHS.control))


# -------------------------------------------------------------- workers that are not started


def scheduling() -> SchedulingState:
    return SchedulingState(scaling_decision=None)  # type: ignore[arg-type]


def test_a_start_that_found_no_place_is_told_and_is_in_the_error_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    controller, _ = waiting(tmp_path, monkeypatch, minutes=0.002)
    monkeypatch.setattr(module, "staying_nodes", lambda: [{"CPU": 1.0}, {"CPU": 1.0}])
    monkeypatch.setattr(module, "free_on_nodes", lambda: [{}, {"CPU": 1.0}])
    timeout = ControllerError(WorkerGroupStartupTimeoutError(num_workers=2))
    controller.after_controller_state_update(scheduling(), ReschedulingState(timeout))
    why = "2 workers were given no place in the time that Ray waits for it"
    shortage = (
        "2 workers need 2 x 1 CPU, and the cluster's 2 nodes have room for 2 (2 CPUs), but "
        "something else holds part of it: there is room for 1 now"
    )
    (line,) = (tmp_path / "notices").read_text().splitlines()
    assert json.loads(line) == {
        "kind": "waiting",
        "message": f"{why}, and it is tried again: {shortage}",
    }
    time.sleep(0.15)
    with pytest.raises(ClusterError) as ended:
        controller._await_room()
    message = ended.value.problems[0].message
    assert message.startswith("no workers could be started for ")
    assert message.endswith(f" minutes: {shortage} (the last try: {why})")


def test_a_worker_that_dies_while_it_is_set_up_ends_the_controller_so_that_it_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    controller, _ = waiting(tmp_path, monkeypatch)
    failed = WorkerGroupStartupFailedError("At least one of the worker actors failed")
    failed.__cause__ = death = lost(taken=False)
    with pytest.raises(ray.exceptions.RayActorError) as raised:
        controller.after_controller_state_update(
            scheduling(), ReschedulingState(ControllerError(failed))
        )
    assert raised.value is death


@pytest.mark.parametrize(
    ("free", "workers"), [([1, 1, 1], 3), ([1, 1, 0], 2), ([1, 0, 0], 2), ([0, 0, 0], 2)]
)
def test_elastic_workers_leave_to_others_what_those_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: list[float], workers: int
) -> None:
    """As many as have room now, and the fewest where there is less: somebody may let go of it."""
    controller, _ = waiting(tmp_path, monkeypatch, workers={"count": 3, "min": 2})
    monkeypatch.setattr(module, "staying_nodes", lambda: [{"CPU": 1.0}] * 3)
    monkeypatch.setattr(module, "free_on_nodes", lambda: [{"CPU": each} for each in free])
    monkeypatch.setattr(module, "_RELEASE_SECONDS", 0.05)
    assert controller._await_room() == workers


def test_what_an_ended_driver_held_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    controller, _ = waiting(tmp_path, monkeypatch, workers={"count": 3, "min": 2})
    monkeypatch.setattr(module, "staying_nodes", lambda: [{"CPU": 3.0}])
    looks = iter([0.0, 1.0, 3.0])
    monkeypatch.setattr(module, "free_on_nodes", lambda: [{"CPU": next(looks)}])
    assert controller._await_room() == 3


class HalfSetUp(WorkerGroup):
    """A group of workers that counts how often it is ended."""

    def __init__(self) -> None:
        self.ends = 0
        self._worker_group_state = SimpleNamespace(shutdown=self._end)  # type: ignore[assignment]

    def _end(self) -> None:
        self.ends += 1


def test_what_ray_drops_of_a_group_whose_start_broke_off_is_ended_once() -> None:
    def create(worker_group: WorkerGroup) -> None:
        set_up(worker_group)

    def set_up(worker_group: WorkerGroup) -> None:
        raise ConnectionError("reset")

    group = HalfSetUp()
    with pytest.raises(ConnectionError) as raised:
        create(group)
    give_back_room(ControllerError(raised.value))
    assert group.ends == 1


def waiting(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    minutes: float = 5,
    hang_minutes: float = 10,
    workers: dict[str, int] | None = None,
) -> tuple[RunController, FolderStore]:
    """The controller of a cluster without nodes, for which it waits so long."""
    data = {"train": str(tmp_path / "train")}
    spec = tiny_job(
        tmp_path / "model",
        data,
        str(tmp_path / "runs"),
        retries={"wait_minutes": minutes, "hang_minutes": hang_minutes},
        workers=workers or {"count": 2},
    )
    controller = RunController(
        spec, "run", generation=GENERATION, controls_seen=0, notices=tmp_path / "notices"
    )
    controller._idle_since = time.monotonic()
    monkeypatch.setattr(module, "staying_nodes", list)
    monkeypatch.setattr(module, "_LOOK_SECONDS", 0.01)
    return controller, FolderStore(tmp_path / "runs")
