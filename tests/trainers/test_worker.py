"""One rank's trouble: all ranks end with one outcome, none waits for another for ever."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.folder import FolderStore
from cluster.storage import StorageError, Store, open_store
from jobs.errors import Problem
from jobs.record import Outcome, State
from tests.ranks import assignment_of, run_group
from tests.scene import Scene
from trainers import preparation, worker
from trainers.data.stream import RankBatch, RankStream
from trainers.records import read_attempts, read_manifests
from trainers.restore import newest_restorable
from trainers.session import ProcessSession


def same_on_all(outcomes: list[Outcome]) -> Outcome:
    """Rank 0's outcome, which must be that of all ranks but for where their time went."""
    first, *others = (o.model_copy(update={"seconds": {}}) for o in outcomes)
    assert all(other == first for other in others)
    return first


class PreparationFails:
    """Before training: on rank 1 the model cannot be fetched."""

    def __call__(self) -> None:
        if os.environ["RANK"] == "1":
            preparation.pretrained_folder = refuse


class UploadsFail:
    """From the second checkpoint on rank 0 cannot upload."""

    def __call__(self) -> None:
        whole = FolderStore.write

        def write(store: Store, key: str, data: bytes | memoryview) -> str:
            is_later = "/checkpoints/" in key and "step-00000002" not in key
            return refuse() if is_later else whole(store, key, data)

        FolderStore.write = write  # type: ignore[method-assign]


class StoreVanishes:
    """After rank 0's third step a file is where the folder of all runs was."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self) -> None:
        whole = worker._Rank.stepped

        def stepped(rank: Any, batch: Any, progress: Any) -> None:
            whole(rank, batch, progress)
            if os.environ["RANK"] == "0" and progress.step == 3:
                shutil.rmtree(self.folder)
                self.folder.touch()

        worker._Rank.stepped = stepped  # type: ignore[method-assign]


class NodeIsTaken:
    """On rank 1 alone the platform says so, once two steps are done."""

    def __call__(self) -> None:
        if os.environ["RANK"] == "1":
            whole = worker._Rank.stepped

            def stepped(rank: Any, batch: Any, progress: Any) -> None:
                whole(rank, batch, progress)
                if progress.step == 2:
                    notice = "the node of rank 1 is taken in 28 s"
                    ProcessSession.yield_requested = lambda _: notice  # type: ignore[method-assign]

            worker._Rank.stepped = stepped  # type: ignore[method-assign]


class Evaluates:
    """Rank 1 cannot read its share of the validation set."""

    def __call__(self) -> None:
        if os.environ["RANK"] == "1":
            RankStream.sequential = refuse_rows  # type: ignore[method-assign]


def refuse(*_: object, **__: object) -> Any:
    raise StorageError(Problem("the store is away"))


def refuse_rows(*_: object, **__: object) -> Iterator[RankBatch]:
    yield refuse()


def failed(scene: Scene, before: Any, **parts: Any) -> Outcome:
    spec = scene.job(workers={"count": 2}, **parts)
    outcome = same_on_all(run_group(assignment_of(spec, "run"), world_size=2, before=before))
    assert outcome.state is State.FAILED_INFRA
    assert outcome.failure is not None
    assert outcome.failure.exit_code == 3
    return outcome


def test_a_rank_that_cannot_prepare_ends_all_ranks(scene: Scene) -> None:
    outcome = failed(scene, PreparationFails())
    assert outcome.failure is not None
    assert outcome.failure.where.startswith("rank 1 ")


def test_a_rank_that_cannot_evaluate_ends_all_ranks(scene: Scene) -> None:
    outcome = failed(scene, Evaluates())
    assert outcome.step == 0


def test_a_checkpoint_that_cannot_be_stored_ends_all_ranks_and_leaves_the_one_before(
    scene: Scene,
) -> None:
    outcome = failed(scene, UploadsFail(), checkpoint={"every_steps": 2})
    assert outcome.failure is not None
    assert outcome.failure.where.startswith("rank 0 ")
    assert [m.step for m in read_manifests(scene.runs, scene.paths())] == [2]
    restored, skipped = newest_restorable(
        scene.runs, scene.paths(), cache_folder=scene.folder / "cache"
    )
    assert restored is not None
    assert (restored.step, skipped) == (2, ())


def test_a_store_that_vanishes_ends_all_ranks(scene: Scene) -> None:
    outcome = failed(scene, StoreVanishes(scene.runs_folder), checkpoint={"every_steps": 4})
    assert outcome.step >= 4


def test_a_notice_to_one_rank_makes_all_ranks_save_and_give_way(scene: Scene) -> None:
    spec = scene.job(workers={"count": 2}, checkpoint={"every_steps": 100})
    outcome = same_on_all(run_group(assignment_of(spec, "run"), world_size=2, before=NodeIsTaken()))
    assert outcome.state is State.RECOVERING
    # The votes on a step are gathered a step ahead.
    assert outcome.step == 3
    assert [m.step for m in read_manifests(scene.runs, scene.paths())] == [3]


def test_an_attempt_that_follows_the_end_of_the_run_gives_that_end(scene: Scene) -> None:
    ended = scene.train(scene.job(), generation=2)
    assert ended.state is State.SUCCEEDED
    assert scene.train(scene.job(), generation=2).model_dump() == ended.model_dump()
    assert len(read_attempts(scene.runs, scene.paths())) == 1
    # Another driver was asked for: it looks by itself whether anything is left to do.
    assert scene.train(scene.job(), generation=3).attempt == 2


def test_a_store_that_is_not_there_at_the_start_is_heard_of_by_all_ranks(scene: Scene) -> None:
    assignment = assignment_of(scene.job(workers={"count": 2}), "run")
    shutil.rmtree(scene.runs_folder)
    scene.runs_folder.touch()
    outcome = same_on_all(run_group(assignment, world_size=2))
    assert outcome.state is State.FAILED_INFRA
    assert outcome.failure is not None
    assert str(scene.runs_folder) in outcome.failure.problems[0][0]


def test_no_thread_of_a_failed_run_stays(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "measure", refuse)
    before = set(threading.enumerate())
    assert scene.train(scene.job()).state is State.FAILED_INFRA
    assert {t.name for t in threading.enumerate() if t not in before} == set()
    assert open_store(scene.runs_folder).head(scene.paths().outcome(1)) is not None
