"""Which attempts are followed by another one, and what budget it has left."""

from __future__ import annotations

import errno
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from ray.exceptions import RayActorError, RayTaskError
from ray.train.v2._internal.exceptions import (
    UserExceptionWithTraceback,
    WorkerHealthCheckFailedError,
    WorkerHealthCheckTimeoutError,
)
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError
from ray.train.v2.api.preemption import PreemptionInfo

from cluster.storage import StoreAway
from jobs.errors import ClusterError, DataError, EnvironmentFault, Problem
from jobs.record import Failure, Outcome, State
from tests.ranks import assignment_of
from tests.tiny import tiny_job
from tests.trainers.test_notices import Told
from trainers import fit as module
from trainers.assignment import Assignment, TrialPlan
from trainers.fit import fit
from trainers.notices import NoticeReader, write_notice
from trainers.ray_controller import RunController, restart_notice
from trainers.ray_worker import preemption_notice


def assignment(tmp_path: Path, **parts: Any) -> Assignment:
    data = {"train": str(tmp_path / "train")}
    return assignment_of(tiny_job(tmp_path / "model", data, str(tmp_path / "runs"), **parts), "run")


class Starts:
    """Instead of Ray: each start gives way at the next step, or ends as `ends` says.

    In the start with a number of `taken` Ray has also restarted the workers itself.
    """

    def __init__(self, *, ends: dict[int, State], taken: tuple[int, ...] = ()) -> None:
        self.number = 0
        self._ends = ends
        self._taken = taken

    def __call__(
        self,
        _: Assignment,
        notices: NoticeReader,
        *,
        start: int,
        given_way: int,
        is_own_cluster: bool,
        python: str | None,
    ) -> Outcome:
        self.number = start
        assert given_way == start - 1
        if start in self._taken:
            write_notice(notices.path, "preemption", "a node was taken")
        return Outcome(attempt=start, state=self._ends.get(start, State.RECOVERING), step=start)


def run(
    assignment: Assignment, starts: Starts, patch: pytest.MonkeyPatch, **options: Any
) -> tuple[Outcome | Failure, Told]:
    told = Told()
    patch.setattr(module, "_fit_once", starts)
    return fit(assignment, told, **options), told  # type: ignore[arg-type]


def test_attempts_that_give_way_are_followed_by_others_to_the_end_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts = Starts(ends={4: State.SUCCEEDED})
    ended, told = run(assignment(tmp_path), starts, monkeypatch)
    assert (ended.state, starts.number) == (State.SUCCEEDED, 4)
    assert [kind for kind, _ in told.lines] == ["RECOVERING"] * 3
    assert told.lines[0][1].startswith("attempt 1 has saved step 1 and given way")


@pytest.mark.parametrize(
    ("limit", "taken", "last_start"),
    [(2, (), 3), (0, (), 1), (2, (1,), 2)],
    ids=["each counts", "none is allowed", "those that Ray answered count as well"],
)
def test_preemptions_have_a_budget_of_their_own(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    limit: int,
    taken: tuple[int, ...],
    last_start: int,
) -> None:
    job = assignment(tmp_path, retries={"preemptions": limit, "worker_failures": 0})
    starts = Starts(ends={}, taken=taken)
    ended, _ = run(job, starts, monkeypatch)
    assert isinstance(ended, Failure)
    assert starts.number == last_start
    assert (ended.state, ended.exit_code) == (State.FAILED_INFRA, 3)
    message, hint = ended.problems[0]
    assert f"retries.preemptions ({limit})" in message
    assert f"step {last_start} is saved" in message
    assert (hint or "").endswith("--set retries.preemptions=unlimited")


def test_a_trial_that_was_told_to_pause_is_not_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts = Starts(ends={})
    verdicts = iter([False, True])  # it gives way once without having been told so
    ended, told = run(assignment(tmp_path), starts, monkeypatch, is_left=lambda: next(verdicts))
    assert isinstance(ended, Outcome)
    assert (ended.state, starts.number) == (State.RECOVERING, 2)
    assert len(told.lines) == 1


# ------------------------------------------------------- workers that die while they are set up


RESET = RayTaskError(
    "ray::RayTrainWorker.execute", "Traceback ...\nConnectionError: reset", ConnectionError("reset")
).as_instanceof_cause()
"""What Ray raises where a worker's part of the set-up fails, as that of a peer of a dead one."""
DIED = RayActorError()
TAKEN = RayActorError(preempted=True)


class TrainerStub:
    """Instead of Ray's trainer: each start breaks as the next of `errors` says, the last trains."""

    errors: ClassVar[list[Exception]] = []
    budgets: ClassVar[list[tuple[int, int]]] = []

    def __init__(self, _: Any, *, run_config: Any, **__: Any) -> None:
        failure = run_config.failure_config
        self.budgets.append((failure.max_failures, failure.max_preemption_failures))

    def fit(self) -> Any:
        if self.errors:
            error = self.errors.pop(0)
            if not isinstance(error, WorkerGroupError):
                error = ControllerError(error)
            raise error
        outcome = Outcome(attempt=1, state=State.SUCCEEDED, step=5)
        return SimpleNamespace(return_value=outcome.model_dump_json())


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> type[TrainerStub]:
    monkeypatch.setattr(module, "RunTrainer", TrainerStub)
    TrainerStub.errors, TrainerStub.budgets = [], []
    return TrainerStub


@pytest.mark.parametrize("error", [RESET, DIED], ids=["a peer's error", "the death itself"])
def test_a_worker_that_dies_while_the_group_is_set_up_is_a_failure_with_a_budget(
    tmp_path: Path, broken: type[TrainerStub], error: Exception
) -> None:
    job, told = assignment(tmp_path, retries={"worker_failures": 2}), Told()
    broken.errors = [error, error]
    ended = fit(job, told)  # type: ignore[arg-type]
    assert ended.state is State.SUCCEEDED
    assert [failures for failures, _ in broken.budgets] == [2, 1, 0]
    name = type(error).__name__
    again = "the workers are started again from the last checkpoint"
    assert told.lines == [("STARTING", f"the workers could not be set up ({name}); {again}")] * 2


def test_a_group_that_is_never_set_up_ends_the_run_with_the_reason(
    tmp_path: Path, broken: type[TrainerStub]
) -> None:
    job = assignment(tmp_path, retries={"worker_failures": 1})
    broken.errors = [RESET, RESET]
    ended = fit(job, Told())  # type: ignore[arg-type]
    assert isinstance(ended, Failure)
    assert len(broken.budgets) == 2
    assert (ended.state, ended.exit_code) == (State.FAILED_INFRA, 3)
    assert not ended.is_of_place
    assert ended.problems[0][0] == (
        "the workers could not be set up: RayTaskError(ConnectionError): ConnectionError: reset"
    )


def test_a_node_that_is_taken_while_the_group_is_set_up_is_no_failure(
    tmp_path: Path, broken: type[TrainerStub]
) -> None:
    job = assignment(tmp_path, retries={"worker_failures": 0, "preemptions": 1})
    broken.errors = [TAKEN, TAKEN]
    ended = fit(job, Told())  # type: ignore[arg-type]
    assert isinstance(ended, Failure)
    assert broken.budgets == [(0, 1), (0, 0)]


@pytest.mark.parametrize(
    "death",
    [
        WorkerHealthCheckFailedError("A worker health check failed.", failure=DIED),
        WorkerHealthCheckTimeoutError("A worker health check has been hanging for 600 seconds."),
    ],
    ids=["it died", "it hangs"],
)
def test_a_worker_that_died_once_too_often_is_no_fault_of_the_user(
    tmp_path: Path, broken: type[TrainerStub], death: Exception
) -> None:
    broken.errors = [WorkerGroupError("died", {1: death})]
    ended = fit(assignment(tmp_path), Told())  # type: ignore[arg-type]
    assert isinstance(ended, Failure)
    assert (ended.state, ended.exit_code, ended.where) == (State.FAILED_INFRA, 3, "rank 1")
    assert "WorkerHealthCheckFailedError" not in ended.problems[0][0]
    assert not ended.is_of_place


ALONE = RuntimeError(
    "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer "
    "[127.0.0.1]:3433"
)
"""What gloo says on a rank that another has left."""


@pytest.mark.parametrize(
    ("errors", "state", "rank"),
    [
        ({0: ALONE, 2: WorkerHealthCheckFailedError("died", failure=DIED)}, "FAILED_INFRA", 2),
        ({0: ALONE, 1: ALONE}, "FAILED_INFRA", 0),
        ({0: ALONE, 1: ValueError("no such label")}, "FAILED_USER", 1),
        ({0: ValueError("broken off"), 1: DataError(Problem("row 7"))}, "FAILED_USER", 1),
    ],
    ids=["one died", "nobody knows why", "one has an error", "one tells the user"],
)
def test_of_ranks_that_fail_together_the_one_that_the_others_failed_for_is_told(
    tmp_path: Path,
    broken: type[TrainerStub],
    errors: dict[int, Exception],
    state: str,
    rank: int,
) -> None:
    broken.errors = [WorkerGroupError("failed", errors)]
    ended = fit(assignment(tmp_path), Told())  # type: ignore[arg-type]
    assert isinstance(ended, Failure)
    assert (ended.state, ended.where) == (state, f"rank {rank}")
    assert ended.state.ends_retries == (state == "FAILED_USER")
    kind, notice = restart_notice(WorkerGroupError("failed", errors))
    assert kind == "failure"
    assert notice.startswith(f"rank {rank} failed (")


def test_a_machine_that_has_no_room_for_rays_notes_is_no_fault_of_the_user(
    tmp_path: Path, broken: type[TrainerStub], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: TrainerStub) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(broken, "fit", full)
    with pytest.raises(EnvironmentFault, match=r"on this machine: .*No space left"):
        fit(assignment(tmp_path), Told())  # type: ignore[arg-type]


def test_an_error_of_ray_is_told_as_such_though_it_is_one_of_the_system_too(
    tmp_path: Path, broken: type[TrainerStub], monkeypatch: pytest.MonkeyPatch
) -> None:
    def reset(_: TrainerStub) -> None:
        raise RESET

    assert isinstance(RESET, OSError)
    monkeypatch.setattr(broken, "fit", reset)
    ended = fit(assignment(tmp_path), Told())  # type: ignore[arg-type]
    assert isinstance(ended, Failure)
    assert ended.state is State.FAILED_INFRA
    assert ended.problems[0][0].startswith("Ray Train gave up: RayTaskError(ConnectionError)")


def test_what_our_own_part_of_the_controller_says_is_not_tried_again(
    tmp_path: Path, broken: type[TrainerStub]
) -> None:
    broken.errors = [ClusterError(Problem("no workers could be started for 30 minutes"))]
    ended = fit(assignment(tmp_path), Told())  # type: ignore[arg-type]
    assert isinstance(ended, Failure)
    assert len(broken.budgets) == 1
    assert ended.problems[0][0] == "no workers could be started for 30 minutes"
    assert ended.is_of_place


def test_a_store_that_stays_away_from_a_worker_is_the_places_fault(
    tmp_path: Path, broken: type[TrainerStub]
) -> None:
    away = StoreAway("the store has not answered")
    broken.errors = [WorkerGroupError("died", {0: DIED, 1: UserExceptionWithTraceback(away, "")})]
    ended = fit(assignment(tmp_path), Told())  # type: ignore[arg-type]
    assert isinstance(ended, Failure)
    assert (ended.where, ended.is_of_place) == ("rank 1", True)


def test_nothing_is_started_again_on_a_machine_that_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts = Starts(ends={})
    ended, _ = run(assignment(tmp_path), starts, monkeypatch, is_taken=lambda: True)
    assert isinstance(ended, Failure)
    assert starts.number == 1
    assert ended.state is State.FAILED_INFRA
    assert not ended.state.ends_retries
    assert ended.problems[0][0] == "the driver's machine is taken; step 1 is saved"


def test_what_earlier_controllers_have_used_up_is_not_given_to_the_next(tmp_path: Path) -> None:
    job = assignment(tmp_path, retries={"worker_failures": 3, "preemptions": 5})
    controller = RunController(
        job.spec, "run", generation=1, controls_seen=0, notices=tmp_path / "notices"
    )

    def failures(counts: Counter[str], *, given_way: int) -> tuple[int, int]:
        config = module._run_config(
            job, controller, counts, notes=tmp_path, start=9, given_way=given_way
        ).failure_config
        assert config is not None
        return config.max_failures, config.max_preemption_failures

    assert failures(Counter(), given_way=0) == (3, 5)
    # Two attempts gave way, and Ray has answered one pre-emption.
    assert failures(Counter(failure=1, preemption=1), given_way=2) == (2, 2)
    assert failures(Counter(failure=9, preemption=9), given_way=2) == (0, 0)


def test_each_start_has_a_name_of_its_own_since_ray_resumes_names_that_it_knows(
    tmp_path: Path,
) -> None:
    job = assignment(tmp_path)
    controller = RunController(
        job.spec, "run", generation=1, controls_seen=0, notices=tmp_path / "notices"
    )

    def name_of(job: Assignment, start: int) -> str | None:
        notes = tmp_path / "notes"
        config = module._run_config(
            job, controller, Counter(), notes=notes, start=start, given_way=0
        )
        assert config.storage_path == str(notes)
        return config.name

    names = [name_of(job, start) for start in range(1, 4)]
    assert names == [f"generation-0001-start-000{n}" for n in range(1, 4)]
    trial = replace(job, trial=TrialPlan("study", "validation/loss", "min", leg=3))
    assert name_of(trial, 1) == "generation-0001-leg-0003-start-0001"


def test_the_notice_of_a_node_that_is_taken_says_when() -> None:
    info = PreemptionInfo(deadline_ms=1_030_000, preempted_node_to_ranks={"n": [1]})
    assert preemption_notice(info, now=1000.0) == "the node of rank 1 is taken in 30 s"
    info = PreemptionInfo(deadline_ms=None, preempted_node_to_ranks={"n": [0], "m": [2]})
    assert preemption_notice(info, now=1000.0) == "the node of ranks 0, 2 is taken"
