"""Evaluations that a request breaks off: the state is saved at once, and they are made up for."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from typing import Any

import pytest

from jobs.record import Attempt, State, lineage
from jobs.runs import RunReader
from tests.evidence import final_weights, rows_by_epoch
from tests.ranks import assignment_of, run_group
from tests.scene import Scene
from trainers import evaluation, worker
from trainers.controls import ask_to_yield
from trainers.evaluation import _next_number
from trainers.records import read_attempts, read_manifests


@dataclass(frozen=True)
class BreaksOff:
    """On one rank, in the evaluation after a step, a request comes after its first pass."""

    rank: int
    step: int
    kind: str = "stop"

    def __call__(self) -> None:
        evaluate, move = worker._Rank.evaluate, evaluation.move
        now: list[worker._Rank] = []

        def evaluate_and_ask(rank: worker._Rank, progress: Any) -> Any:
            if rank._session.rank == self.rank and progress.step == self.step:
                now.append(rank)
            return evaluate(rank, progress)

        def ask(*args: Any) -> Any:
            if now:
                self._ask(now.pop())
            return move(*args)

        worker._Rank.evaluate = evaluate_and_ask  # type: ignore[method-assign]
        evaluation.move = ask

    def _ask(self, rank: worker._Rank) -> None:
        if self.kind == "stop":
            os.kill(os.getpid(), signal.SIGTERM)
            return
        assert rank._poller is not None
        ask_to_yield(rank._store, rank._paths, attempt=1, generation=1, by="a test")
        while not rank._poller.look().yields:
            time.sleep(0.05)


def job(scene: Scene, **parts: Any) -> Any:
    """Ten steps, an evaluation of several passes after each second one."""
    return scene.job(
        workers={"count": 2, **parts.pop("workers", {})},
        data={"lanes": 2},
        batching={"global_batch_size": 8, "max_tokens_per_microbatch": 16},
        train={"evaluate_every_steps": 2, "log_rows": True},
        checkpoint={"every_steps": 4, "keep_last": 9, "keep_best": 9},
        **parts,
    )


def evaluations(scene: Scene, run_id: str) -> dict[int, dict[str, float]]:
    return {
        line["step"]: line["metrics"]
        for line in RunReader(scene.runs, run_id).metrics()
        if line["kind"] == "evaluation"
    }


@pytest.mark.parametrize(
    ("kind", "rank", "workers", "step"),
    [("stop", 1, {}, 4), ("yield", 0, {}, 10), ("stop", 1, {"strategy": "fsdp"}, 6)],
)
def test_the_next_attempt_begins_with_the_evaluation_that_was_broken_off(
    scene: Scene, kind: str, rank: int, workers: dict[str, str], step: int
) -> None:
    spec = job(scene, workers=workers)
    run_group(assignment_of(spec, "calm"), world_size=2)
    first = run_group(assignment_of(spec, "run"), world_size=2, before=BreaksOff(rank, step, kind))[
        0
    ]
    assert first.state is (State.STOPPED if kind == "stop" else State.RECOVERING)
    assert first.step == step
    assert step not in evaluations(scene, "run")
    assert read_manifests(scene.runs, scene.paths())[-1].evaluation_pending

    outcomes = run_group(assignment_of(spec, "run", generation=2), world_size=2)
    assert {outcome.state for outcome in outcomes} == {State.SUCCEEDED}
    _, second = read_attempts(scene.runs, scene.paths())
    assert (second.restored_step, second.evaluates_first) == (step, True)
    assert evaluations(scene, "run") == evaluations(scene, "calm")
    assert rows_by_epoch(scene.runs, "run") == rows_by_epoch(scene.runs, "calm")
    assert final_weights(scene.runs, "run") == final_weights(scene.runs, "calm")
    own, calm = (RunReader(scene.runs, run_id) for run_id in ("run", "calm"))
    assert own.live_manifests()[-1].best_step == calm.live_manifests()[-1].best_step
    # Of two checkpoints of that step the one that is evaluated lives.
    [live] = [m for m in own.live_manifests() if m.step == step]
    saves_again = step in (4, 10)
    assert live.attempt == 1 + saves_again
    assert bool(live.evaluation) == saves_again


def test_an_evaluation_that_is_broken_off_twice_is_made_up_for_once(scene: Scene) -> None:
    spec = job(scene)
    run_group(assignment_of(spec, "calm"), world_size=2)
    for generation in (1, 2):
        assignment = assignment_of(spec, "run", generation=generation)
        outcome = run_group(assignment, world_size=2, before=BreaksOff(1, 6))[0]
        assert (outcome.state, outcome.step) == (State.STOPPED, 6)
    run_group(assignment_of(spec, "run", generation=3), world_size=2)
    assert evaluations(scene, "run") == evaluations(scene, "calm")
    assert final_weights(scene.runs, "run") == final_weights(scene.runs, "calm")


# ----------------------------------------------------------------------------------- the lineage


def attempt(number: int, restored_step: int | None, *, evaluates_first: bool = False) -> Attempt:
    return Attempt(
        attempt=number, generation=number, world_size=1, restored_step=restored_step,
        evaluates_first=evaluates_first, started_at=0.0,
    )  # fmt: skip


def test_the_step_of_a_broken_off_evaluation_belongs_to_both_attempts() -> None:
    first, second = attempt(1, None), attempt(2, 6, evaluates_first=True)
    assert lineage([first, second]) == [(1, 0, 6), (2, 5, None)]
    # Neither a third attempt from the same state nor one from a later one takes that away.
    again = [first, second, attempt(3, 6, evaluates_first=True)]
    assert lineage(again) == [(1, 0, 6), (2, 5, 6), (3, 5, None)]
    assert lineage([first, second, attempt(3, 6)]) == [(1, 0, 6), (2, 5, 6), (3, 6, None)]
    assert lineage([first, second, attempt(3, 8)]) == [(1, 0, 6), (2, 5, 8), (3, 8, None)]
    # One from an earlier state does.
    assert lineage([first, second, attempt(3, 4)]) == [(1, 0, 4), (3, 4, None)]


@pytest.mark.parametrize(
    ("at_once", "seconds", "following"), [(1, 0.1, 2), (64, 0.1, 64), (8, 3.0, 4), (1, 9.0, 1)]
)
def test_votes_come_about_once_a_second(at_once: int, seconds: float, following: int) -> None:
    assert _next_number(at_once, seconds=seconds) == following
