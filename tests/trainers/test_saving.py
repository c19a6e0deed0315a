"""Saves that fail: borne for a while, then waited for; never a state that is half stored."""

from __future__ import annotations

import tempfile
from typing import Any

import pytest

from cluster.folder import FolderStore
from cluster.storage import StorageError, Store, StoreAway
from jobs.errors import Problem
from jobs.prometheus import exposition
from jobs.record import Outcome, State
from jobs.runs import RunReader
from jobs.status import read_status
from tests.evidence import final_weights, rows_by_epoch
from tests.ranks import assignment_of, run_group
from tests.scene import Scene
from trainers import saving
from trainers.records import read_manifests


class SavesFail:
    """On rank 0 writes below the folders of `steps` fail, the first `times` of each."""

    def __init__(self, kind: type[StorageError], *steps: int, times: int = 10**9) -> None:
        self.kind = kind
        self.folders = [f"/checkpoints/step-{step:08d}-" for step in steps]
        self.times = times

    def __call__(self) -> None:
        saving._PAUSE_SECONDS = 0.01
        whole, left = FolderStore.write, dict.fromkeys(self.folders, self.times)

        def write(store: Store, key: str, data: bytes | memoryview) -> str:
            for folder in self.folders if "/progress.json" in key else ():
                if folder in key and left[folder]:
                    left[folder] -= 1
                    raise self.kind(Problem(f"cannot write {key}: it is away"))
            return whole(store, key, data)

        FolderStore.write = write  # type: ignore[method-assign]


class AnswerIsLost:
    """On rank 0 the manifest of a step is written, but its writer hears that the store is away."""

    def __init__(self, step: int) -> None:
        self.folder = f"/checkpoints/step-{step:08d}-"

    def __call__(self) -> None:
        saving._PAUSE_SECONDS = 0.01
        whole, lost = FolderStore.write_if_absent, []

        def write(store: Store, key: str, data: bytes | memoryview) -> str:
            etag = whole(store, key, data)
            if self.folder in key and not lost:
                lost.append(key)
                raise StoreAway(Problem(f"cannot write {key}: no answer"))
            return etag

        FolderStore.write_if_absent = write  # type: ignore[method-assign]


def trained(scene: Scene, before: Any, run_id: str = "run", **parts: Any) -> Outcome:
    spec = scene.job(
        workers={"count": 2}, data={"lanes": 2}, train={"evaluate_every_steps": 100},
        **{"checkpoint": {"every_steps": 2, "keep_last": 9}, **parts},
    )  # fmt: skip
    first, second = run_group(assignment_of(spec, run_id), world_size=2, before=before)
    assert first == second.model_copy(update={"seconds": first.seconds})
    return first


def events(scene: Scene, kind: str) -> list[str]:
    return [e["message"] for e in RunReader(scene.runs, "run").events() if e["event"] == kind]


def saved_steps(scene: Scene) -> list[int]:
    return [m.step for m in read_manifests(scene.runs, scene.paths())]


def test_training_goes_on_past_saves_that_fail(scene: Scene) -> None:
    outcome = trained(scene, SavesFail(StorageError, 4, 6))
    assert outcome.state is State.SUCCEEDED
    assert saved_steps(scene) == [2, 8, 10]
    told = [text for text in events(scene, "warning") if "could not be stored" in text]
    assert [text.split(",")[0] for text in told] == [
        "a checkpoint could not be stored (1 in a row",
        "a checkpoint could not be stored (2 in a row",
    ]
    reader = RunReader(scene.runs, "run")
    counted = exposition(read_status(reader), reader.metrics_lines())
    assert 'shoal_failed_saves_total{run="run"} 2.0' in counted
    trained(scene, SavesFail(StorageError), "calm")
    assert final_weights(scene.runs, "run") == final_weights(scene.runs, "calm")


def test_after_too_many_failures_training_waits_for_the_store(scene: Scene) -> None:
    parts = {"checkpoint": {"every_steps": 2, "keep_last": 9, "max_failures_in_a_row": 1}}
    outcome = trained(scene, SavesFail(StoreAway, 2, 4, 6, times=3), **parts)
    assert outcome.state is State.SUCCEEDED
    # Two have failed when the state of step 6 is copied; it is repeated until it is stored.
    assert saved_steps(scene) == [6, 8, 10]
    [waits] = [text for text in events(scene, "state") if "waits for the store" in text]
    assert "it is away" in waits
    assert any("the store answers again" in text for text in events(scene, "state"))


def test_the_last_state_is_waited_for(scene: Scene) -> None:
    outcome = trained(scene, SavesFail(StoreAway, 10, times=3))
    assert outcome.state is State.SUCCEEDED
    assert saved_steps(scene)[-1] == 10


@pytest.mark.parametrize("kind", [StoreAway, StorageError])
def test_a_last_state_that_cannot_be_stored_fails_all_ranks(
    scene: Scene, kind: type[StorageError]
) -> None:
    """One that is away is waited for, up to the limit; one that refuses is not."""
    outcome = trained(scene, SavesFail(kind, 10), retries={"wait_minutes": 0.01})
    assert outcome.state is State.FAILED_INFRA
    assert outcome.failure is not None
    assert outcome.failure.where.startswith("rank 0 ")
    assert saved_steps(scene) == [2, 4, 6, 8]
    waited = any("waits for the store" in text for text in events(scene, "state"))
    assert waited == (kind is StoreAway)


def test_a_manifest_whose_answer_was_lost_counts_when_its_save_is_repeated(scene: Scene) -> None:
    outcome = trained(scene, AnswerIsLost(10))
    assert outcome.state is State.SUCCEEDED
    assert any("waits for the store" in text for text in events(scene, "state"))
    assert saved_steps(scene) == [2, 4, 6, 8, 10]


def test_a_run_without_a_folder_for_temporary_files_ends_before_its_first_step(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(scene.folder / "gone"))
    outcome = scene.train(scene.job(train={"log_rows": True}))
    assert outcome.state is State.FAILED_INFRA
    assert outcome.failure is not None
    [(message, hint)] = outcome.failure.problems
    assert str(scene.folder / "gone") in message
    assert "TMPDIR" in (hint or "")
    assert outcome.step == 0
    assert rows_by_epoch(scene.runs, "run") == {}
