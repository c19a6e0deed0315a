"""Which attempts are followed by another one, and what budget it has left."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from ray.train.v2.api.preemption import PreemptionInfo

from jobs.record import Failure, Outcome, State
from tests.ranks import assignment_of
from tests.tiny import tiny_job
from tests.trainers.test_notices import Told
from trainers import fit as module
from trainers.attempt import Assignment
from trainers.fit import fit, preemption_notice
from trainers.notices import NoticeReader, write_notice
from trainers.ray_controller import RunController


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

    def __call__(self, _: Assignment, notices: NoticeReader, *, start: int) -> Outcome:
        self.number = start
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

    def failures(counts: Counter[str], *, start: int) -> tuple[int, int]:
        config = module._run_config(job, controller, counts, start=start).failure_config
        assert config is not None
        return config.max_failures, config.max_preemption_failures

    assert failures(Counter(), start=1) == (3, 5)
    # Two starts came after attempts that gave way, and Ray has answered one pre-emption.
    assert failures(Counter(failure=1, preemption=1), start=3) == (2, 2)
    assert failures(Counter(failure=9, preemption=9), start=3) == (0, 0)


def test_each_start_has_a_name_of_its_own_since_ray_resumes_names_that_it_knows(
    tmp_path: Path,
) -> None:
    job = assignment(tmp_path)
    controller = RunController(
        job.spec, "run", generation=1, controls_seen=0, notices=tmp_path / "notices"
    )
    names = [
        module._run_config(job, controller, Counter(), start=start).name for start in range(1, 4)
    ]
    assert names == [f"generation-0001-start-000{n}" for n in range(1, 4)]


def test_the_notice_of_a_node_that_is_taken_says_when() -> None:
    info = PreemptionInfo(deadline_ms=1_030_000, preempted_node_to_ranks={"n": [1]})
    assert preemption_notice(info, now=1000.0) == "the node of rank 1 is taken in 30 s"
    info = PreemptionInfo(deadline_ms=None, preempted_node_to_ranks={"n": [0], "m": [2]})
    assert preemption_notice(info, now=1000.0) == "the node of ranks 0, 2 is taken"
