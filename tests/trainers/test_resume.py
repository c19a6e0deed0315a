"""Kill and resume, without Ray: exactly once, in the same order, to the same weights."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from cluster.storage import Store, open_store
from jobs.record import RunPaths, best_manifest
from jobs.spec import JobSpec
from tests import evidence
from tests.ranks import (
    Kill,
    Moment,
    assignment_of,
    break_group,
    lose_patience,
    run_ranks,
)
from tests.tiny import tiny_job, tiny_model, tiny_reviews
from trainers import worker
from trainers.records import read_attempts, read_manifests
from trainers.watchdog import HUNG_EXIT_CODE

ROWS = 90
BATCH = 8
STEPS_PER_EPOCH = 12


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A model and data sets in a folder; its `runs` folder is the store."""
    folder = tmp_path_factory.mktemp("resume")
    tiny_model(folder / "model", hidden=64)
    tiny_reviews(str(folder / "data"), rows=ROWS, rows_per_group=7, held_out=21)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SHOAL_CACHE", str(folder / "cache"))
        yield folder


def job(scene: Path, *, workers: int, **parts: dict[str, object]) -> JobSpec:
    data = {name: str(scene / "data" / name) for name in ("train", "validation", "test")}
    train = {"epochs": 2, "evaluate_every_steps": 4, "log_rows": True, "log_every_steps": 1}
    own: dict[str, dict[str, object]] = {
        "batching": {"global_batch_size": BATCH, "max_tokens_per_microbatch": 48},
        "workers": {"count": workers},
        "train": train,
        "checkpoint": {"every_steps": 5},
    }
    merged = {part: {**own.get(part, {}), **parts.get(part, {})} for part in {**own, **parts}}
    return tiny_job(
        scene / "model", {**data, "lanes": 12, "seed": 5}, str(scene / "runs"), **merged
    )


def runs(scene: Path) -> Store:
    return open_store(scene / "runs")


def final_parts(scene: Path, run_id: str) -> dict[str, bytes]:
    """Every tensor of the last checkpoint, as bytes."""
    last = read_manifests(runs(scene), RunPaths(run_id))[-1]
    assert last.is_last_step
    folder = scene / "runs" / RunPaths(run_id).checkpoint(last.name)
    return {
        f"{name}/{key}": value.tobytes()
        for name in ("model/model.safetensors", "optimizer.safetensors")
        for key, value in load_file(folder / name).items()
    }


def global_batches(scene: Path, run_id: str) -> dict[int, list[int]]:
    return evidence.global_batches(runs(scene), run_id)


@pytest.fixture(scope="module")
def calm(scene: Path) -> dict[int, str]:
    """Run ids of runs that were never killed, by worker count."""
    for workers in (1, 2, 3, 4):
        outcome = run_ranks(
            assignment_of(job(scene, workers=workers), f"calm-{workers}"), world_size=workers
        )
        assert outcome is not None
        assert outcome.state == "SUCCEEDED"
    return {workers: f"calm-{workers}" for workers in (1, 2, 3, 4)}


@pytest.mark.parametrize("workers", [1, 2, 3, 4])
def test_a_killed_and_resumed_run_ends_with_the_same_bits(
    scene: Path, calm: dict[int, str], workers: int
) -> None:
    run_id = f"killed-{workers}"
    spec = job(scene, workers=workers)
    run_ranks(assignment_of(spec, run_id), world_size=workers, kill=Kill("step", 13))
    outcome = run_ranks(assignment_of(spec, run_id, generation=2), world_size=workers)
    assert outcome is not None
    assert outcome.state == "SUCCEEDED"
    attempts = read_attempts(runs(scene), RunPaths(run_id))
    assert attempts[-1].restored_step in (8, 10, 12), "it was not killed in the middle"
    assert final_parts(scene, run_id) == final_parts(scene, calm[workers])
    assert global_batches(scene, run_id) == global_batches(scene, calm[workers])


def test_every_row_is_used_exactly_once_an_epoch(scene: Path, calm: dict[int, str]) -> None:
    batches = global_batches(scene, calm[3])
    assert sorted(batches) == list(range(1, 2 * STEPS_PER_EPOCH + 1))
    for epoch in (0, 1):
        steps = range(epoch * STEPS_PER_EPOCH + 1, (epoch + 1) * STEPS_PER_EPOCH + 1)
        assert sorted(row for step in steps for row in batches[step]) == list(range(ROWS))


def test_all_worker_counts_give_the_same_global_batches(scene: Path, calm: dict[int, str]) -> None:
    first, *others = (global_batches(scene, run_id) for run_id in calm.values())
    assert all(other == first for other in others)


class Freezes:
    """After the 13th step of a start, one rank is frozen."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def __call__(self) -> None:
        whole, steps = worker._Rank.stepped, 0

        def stepped(rank: Any, batch: Any, progress: Any) -> None:
            nonlocal steps
            whole(rank, batch, progress)
            steps += 1
            if steps == 13:
                lose_patience()
                if os.environ["RANK"] == str(self.rank):
                    os.kill(os.getpid(), signal.SIGSTOP)

        worker._Rank.stepped = stepped  # type: ignore[method-assign]


@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_that_wait_for_a_frozen_one_end_and_a_resume_ends_with_the_same_bits(
    scene: Path, calm: dict[int, str], rank: int
) -> None:
    """Rank 0 is the one that serves what ranks tell each other."""
    run_id, spec = f"frozen-{rank}", job(scene, workers=3)
    codes = break_group(assignment_of(spec, run_id), world_size=3, before=Freezes(rank), until=2)
    assert HUNG_EXIT_CODE in codes.values()
    assert rank not in codes
    outcome = run_ranks(assignment_of(spec, run_id, generation=2), world_size=3)
    assert outcome is not None
    assert outcome.state == "SUCCEEDED"
    assert read_attempts(runs(scene), RunPaths(run_id))[-1].restored_step in (8, 10, 12)
    assert final_parts(scene, run_id) == final_parts(scene, calm[3])
    assert global_batches(scene, run_id) == global_batches(scene, calm[3])


@pytest.mark.parametrize(
    ("moment", "count"),
    [("evaluation", 2), ("parts", 2), ("manifest", 2), ("retention", 3)],
)
def test_a_kill_between_evaluation_and_commit_changes_nothing(
    scene: Path, calm: dict[int, str], moment: Moment, count: int
) -> None:
    run_id = f"at-{moment}"
    spec = job(scene, workers=2)
    run_ranks(assignment_of(spec, run_id), world_size=2, kill=Kill(moment, count))
    outcome = run_ranks(assignment_of(spec, run_id, generation=2), world_size=2)
    calm_outcome = (scene / "runs" / RunPaths(calm[2]).outcome(1)).read_text()
    assert outcome is not None
    assert outcome.best_step == json.loads(calm_outcome)["best_step"]
    assert outcome.test == json.loads(calm_outcome)["test"]
    assert final_parts(scene, run_id) == final_parts(scene, calm[2])
    assert global_batches(scene, run_id) == global_batches(scene, calm[2])


def test_a_run_goes_on_with_another_number_of_workers(scene: Path, calm: dict[int, str]) -> None:
    run_ranks(assignment_of(job(scene, workers=4), "fewer"), world_size=4, kill=Kill("step", 13))
    run_ranks(
        assignment_of(job(scene, workers=3), "fewer", generation=2),
        world_size=3,
        kill=Kill("step", 5),
    )
    outcome = run_ranks(assignment_of(job(scene, workers=1), "fewer", generation=3), world_size=1)
    assert outcome is not None
    assert outcome.state == "SUCCEEDED"
    assert global_batches(scene, "fewer") == global_batches(scene, calm[1])


def test_a_damaged_checkpoint_is_skipped_for_the_one_before(
    scene: Path, calm: dict[int, str]
) -> None:
    spec = job(scene, workers=1)
    run_ranks(assignment_of(spec, "damaged"), world_size=1, kill=Kill("step", 13))
    newest = read_manifests(runs(scene), RunPaths("damaged"))[-1]
    weights = scene / "runs" / RunPaths("damaged").checkpoint(newest.name) / "optimizer.safetensors"
    damaged = bytearray(weights.read_bytes())
    damaged[-1] ^= 1
    weights.write_bytes(damaged)
    run_ranks(assignment_of(spec, "damaged", generation=2), world_size=1)
    attempts = read_attempts(runs(scene), RunPaths("damaged"))
    restored = attempts[-1].restored_step
    assert restored is not None
    assert restored < newest.step
    assert final_parts(scene, "damaged") == final_parts(scene, calm[1])


def test_dropout_is_on_in_training(scene: Path) -> None:
    runs_of = {}
    for name, dropout in (("with-dropout", 0.5), ("without-dropout", 0.0)):
        spec = job(scene, workers=1, model={"dropout": dropout})
        run_ranks(assignment_of(spec, name), world_size=1)
        runs_of[name] = final_parts(scene, name)
    assert runs_of["with-dropout"] != runs_of["without-dropout"]


def test_a_damaged_best_checkpoint_costs_the_next_best_only(
    scene: Path, calm: dict[int, str]
) -> None:
    """The best lies before the last, and one of its bits flips before the run is trained on."""
    run_id = "best-is-damaged"
    # The lowest accuracy is the best here: that of the first evaluation, so it never changes.
    stop = {"metric": "validation/accuracy", "mode": "min", "patience": 99}
    spec = job(scene, workers=1, checkpoint={"keep_best": 3}, train={"early_stopping": stop})
    run_ranks(assignment_of(spec, run_id), world_size=1, kill=Kill("step", 22))
    manifests = read_manifests(runs(scene), RunPaths(run_id))
    best = best_manifest(manifests)
    assert best is not None
    model = scene / "runs" / RunPaths(run_id).checkpoint(best.name) / "model/model.safetensors"
    damaged = bytearray(model.read_bytes())
    damaged[-1] ^= 1
    model.write_bytes(damaged)
    outcome = run_ranks(assignment_of(spec, run_id, generation=2), world_size=1)
    assert outcome is not None
    assert outcome.state == "SUCCEEDED"
    assert outcome.test is not None
    assert outcome.best_step == best.step, "it is not about the best checkpoint"
    assert outcome.test["step"] != best.step
