"""A deletion that is cut off at any point leaves nothing that looks whole."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable
from typing import Any

import pytest
from synthetic import START, SyntheticRun, running, succeeded

from cluster.storage import StorageError, Store
from jobs import situation
from jobs.errors import SpecError
from jobs.record import CheckpointName, RunPaths
from jobs.retention import Garbage, collect, delete_run, find_garbage
from jobs.runs import RunReader
from tests.killed_writer import kill_writer_of


class DyingStore:
    """A store that fails after so many deletions."""

    def __init__(self, store: Store, *, deletions: int) -> None:
        self._store = store
        self._left = deletions

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def delete(self, keys: Iterable[str]) -> None:
        for key in keys:
            if self._left == 0:
                raise StorageError("the store has gone away")
            self._left -= 1
            self._store.delete([key])


def garbage_of(store: Store, *, older_than_seconds: float, now: float) -> list[Garbage]:
    found = find_garbage(store, older_than_seconds=older_than_seconds, now=now, tell=pytest.fail)
    return list(found)


@pytest.mark.parametrize("deletions", [0, 1, 5, 9, 20])
def test_a_deletion_that_is_cut_off_never_looks_whole(local_store: Store, deletions: int) -> None:
    made = succeeded(local_store)
    with pytest.raises(StorageError):
        delete_run(DyingStore(local_store, deletions=deletions), made.run_id, tell=pytest.fail)  # type: ignore[arg-type]
    with pytest.raises(SpecError, match="is being deleted"):
        RunReader(local_store, made.run_id).spec()
    manifests = [h.key for h in local_store.list() if h.key.endswith("manifest.json")]
    parts = [h.key for h in local_store.list() if h.key.endswith("model.safetensors")]
    assert len(parts) == 6 or not manifests


def test_gc_finishes_a_deletion_that_was_cut_off(local_store: Store) -> None:
    made = succeeded(local_store)
    with pytest.raises(StorageError):
        delete_run(DyingStore(local_store, deletions=9), made.run_id, tell=pytest.fail)  # type: ignore[arg-type]
    mark = local_store.head(made.paths.deleting)
    assert mark is not None
    later = mark.modified_at + 60
    assert garbage_of(local_store, older_than_seconds=120, now=later) == []
    (garbage,) = garbage_of(local_store, older_than_seconds=30, now=later)
    collect(local_store, garbage, tell=pytest.fail)
    assert list(local_store.list()) == []


def test_a_deletion_that_is_cut_off_anywhere_is_found_and_finished(local_store: Store) -> None:
    num_objects = len(list(succeeded(local_store).store.list())) + 1  # and the mark
    for deletions in range(num_objects):
        made = succeeded(local_store, run_id=f"cut-{deletions:03d}")
        with pytest.raises(StorageError):
            delete_run(DyingStore(local_store, deletions=deletions), made.run_id, tell=pytest.fail)  # type: ignore[arg-type]
    found = garbage_of(local_store, older_than_seconds=0, now=time.time() + 60)
    assert [garbage.run_id for garbage in found] == [f"cut-{n:03d}" for n in range(num_objects)]
    for garbage in found:
        collect(local_store, garbage, tell=pytest.fail)
    assert {head.key.split("/")[0] for head in local_store.list()} == {"sentiment-a1b2c3"}


@pytest.mark.parametrize("key", ["archive/logs/mine.txt", "eval-notes/report/x.pdf"])
def test_a_folder_that_no_deletion_has_marked_is_never_garbage(
    local_store: Store, key: str
) -> None:
    local_store.write(key, b"mine")
    assert list(garbage_of(local_store, older_than_seconds=0, now=START + 10**9)) == []


def test_a_run_with_evaluations_and_notes_is_looked_through_too(local_store: Store) -> None:
    made = succeeded(local_store)
    local_store.write(made.paths.evaluation("d1") + "metrics.json", b"{}")
    local_store.write(f"{made.run_id}/notes.txt", b"mine")
    local_store.write(
        made.paths.checkpoint(CheckpointName(260, 2)) + "model.safetensors", b"cut off"
    )
    (garbage,) = garbage_of(local_store, older_than_seconds=0, now=START + 10**9)
    assert (garbage.what, garbage.why) == (
        "checkpoints/step-00000260-attempt-0002",
        "has no manifest",
    )


def test_the_best_checkpoint_of_a_result_is_never_garbage(local_store: Store) -> None:
    made = succeeded(local_store)
    local_store.delete(
        [made.paths.manifest(CheckpointName(200, 2))]
    )  # the result names it as the best
    assert list(garbage_of(local_store, older_than_seconds=0, now=START + 10**9)) == []


def test_a_run_whose_driver_is_silent_by_its_own_clock_alone_is_left_as_it_is(
    local_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(situation, "LOOK_SECONDS", 0.1)
    slow, gone = (
        running(local_store, now=START + 120, run_id=run_id) for run_id in ("slow", "gone")
    )
    for made in (slow, gone):
        made.lease(renewed_at=START, ttl_seconds=1.5)
        part = made.paths.checkpoint(CheckpointName(260, 1)) + "model.safetensors"
        local_store.write(part, b"cut off")
    told: list[str] = []
    renewals = itertools.count(10)

    def tell(sentence: str) -> None:
        told.append(sentence)
        # It is heard of, and its clock is years behind.
        slow.lease(renewed_at=START, ttl_seconds=1.5, renewals=next(renewals))

    found = find_garbage(local_store, older_than_seconds=0, now=time.time() + 60, tell=tell)
    assert [garbage.run_id for garbage in found] == ["gone"]
    assert len(told) == 2
    assert all("or the store was away: it is looked at for" in sentence for sentence in told)


def study_of_trials(store: Store) -> SyntheticRun:
    """A study that has ended, with two trials that are runs of their own."""
    study = succeeded(store, run_id="study")
    for number in range(2):
        succeeded(store, run_id=study.paths.trial(number).run_id)
    return study


def test_gc_looks_through_the_trials_of_a_study(local_store: Store) -> None:
    study = study_of_trials(local_store)
    first, second = study.paths.trial(0), study.paths.trial(1)
    half = CheckpointName(260, 2)
    for paths in (first, second):
        local_store.write(paths.checkpoint(half) + "model.safetensors", b"cut off")
    # The second trial's is the study's model, whatever its manifest is.
    result = RunReader(local_store, "study").result()
    assert result is not None
    best = f"trials/0001/checkpoints/{half.folder}"
    named = result.model_copy(update={"best_checkpoint": best})
    local_store.write(study.paths.result, named.to_bytes())
    (garbage,) = garbage_of(local_store, older_than_seconds=0, now=START + 10**9)
    assert (garbage.run_id, garbage.what, garbage.why) == (
        "study",
        f"trials/0000/checkpoints/{half.folder}",
        "has no manifest",
    )
    collect(local_store, garbage, tell=pytest.fail)
    assert list(local_store.list(first.checkpoint(half))) == []
    assert list(local_store.list(second.checkpoint(half)))
    assert len(list(local_store.list(first.checkpoints))) == 4 * 6
    assert garbage_of(local_store, older_than_seconds=0, now=START + 10**9) == []


def test_gc_leaves_the_trials_of_a_study_that_goes_on(local_store: Store) -> None:
    study = running(local_store, now=time.time(), run_id="study")
    trial = succeeded(local_store, run_id=study.paths.trial(0).run_id)
    local_store.write(trial.paths.checkpoint(CheckpointName(260, 2)) + "part", b"being written")
    assert garbage_of(local_store, older_than_seconds=0, now=time.time()) == []


def test_a_study_is_deleted_with_its_trials_what_commits_them_first(local_store: Store) -> None:
    study = study_of_trials(local_store)
    commits = [
        head.key
        for head in local_store.list("study/")
        if head.key.endswith(("/manifest.json", "/result.json"))
    ]
    assert len(commits) == 3 * 7
    dying = DyingStore(local_store, deletions=len(commits))
    with pytest.raises(StorageError):
        delete_run(dying, "study", tell=pytest.fail)  # type: ignore[arg-type]
    assert not any(local_store.head(key) for key in commits)
    assert local_store.head(study.paths.trial(1).spec)
    delete_run(local_store, "study", tell=pytest.fail)
    assert list(local_store.list()) == []


def test_an_upload_of_a_deleted_study_is_found_by_its_trial(store: Store) -> None:
    paths = RunPaths("deleted-000001").trial(7)
    kill_writer_of(store, paths.checkpoint(CheckpointName(260, 2)) + "model/model.safetensors")
    kill_writer_of(store, "foreign/trials/7/notes/backup.tar")
    (garbage,) = garbage_of(store, older_than_seconds=0, now=time.time() + 60)
    assert (garbage.run_id, garbage.what, len(garbage.unfinished)) == (
        "deleted-000001",
        "uploads",
        1,
    )
