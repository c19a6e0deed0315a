"""Why the workers are started again, from what Ray says of it; what ends a wait for nodes."""

from __future__ import annotations

import pickle
import time
from pathlib import Path
from typing import Literal

import pytest
import ray
from ray.train.v2.api.exceptions import ControllerError, PreemptionError, WorkerGroupError
from ray.train.v2.api.preemption import PreemptionInfo

from cluster.folder import FolderStore
from jobs.errors import ClusterError
from jobs.record import Control, RunPaths, State
from tests.tiny import tiny_job
from trainers import ray_controller as module
from trainers.controls import ask_to_yield
from trainers.ray_controller import EndedWhileWaiting, RunController, restart_notice

PATHS = RunPaths("run")
GENERATION = 7


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


def waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, minutes: float = 5
) -> tuple[RunController, FolderStore]:
    """The controller of a cluster without nodes, for which it waits so long."""
    data = {"train": str(tmp_path / "train")}
    spec = tiny_job(
        tmp_path / "model", data, str(tmp_path / "runs"), retries={"wait_minutes": minutes}
    )
    controller = RunController(
        spec, "run", generation=GENERATION, controls_seen=0, notices=tmp_path / "notices"
    )
    controller._idle_since = time.monotonic()
    monkeypatch.setattr(module, "staying_nodes", list)
    monkeypatch.setattr(module, "_LOOK_SECONDS", 0.01)
    return controller, FolderStore(tmp_path / "runs")
