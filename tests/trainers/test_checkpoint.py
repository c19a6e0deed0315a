"""Checkpoints: whole or absent, the newest true one is found, and the best one stays."""

from __future__ import annotations

import json
import os
import resource
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from safetensors.torch import load, load_file
from transformers import AutoModelForSequenceClassification, BartConfig, BartModel

from cluster.storage import ObjectExists, ObjectMissing, StorageError, Store, open_store
from jobs.errors import EnvironmentFault, Problem
from jobs.record import (
    Attempt,
    CheckpointName,
    Manifest,
    RunPaths,
    Source,
    StreamPosition,
    best_manifest,
)
from tests.scene import Scene
from tests.spoiling import SpoilingStore
from tests.tiny import VOCABULARY, tiny_tokenizer
from trainers import restore
from trainers.checkpoint import CheckpointWriter, Moment, small_files
from trainers.fence import Fence
from trainers.layout import OPTIMIZER, WEIGHTS
from trainers.loop import Progress, Trainee, judge
from trainers.optim import optimizer_tensors
from trainers.records import _parse_manifest, read_live_manifests, read_manifests
from trainers.restore import (
    checkpoint_copy,
    drop_checkpoint_copies,
    load_progress,
    newest_restorable,
)
from trainers.retention import superfluous
from trainers.snapshot import Snapshot, TensorFile
from trainers.state import load_optimizer, saved_weights
from trainers.tasks.task import Evaluation
from trainers.telemetry import Telemetry

PATHS = RunPaths("run")
STREAM = StreamPosition(
    order_version=1, index_digest="d", lanes=1, window=1, seed=0, global_batch_size=8, epoch=0,
    next_item=0,
)  # fmt: skip


class Writing:
    """A writer of one attempt, and the state that it saves."""

    def __init__(self, scene: Scene, trainee: Trainee, writer: CheckpointWriter) -> None:
        self.scene = scene
        self.trainee = trainee
        self.writer = writer

    def save(self, step: int, *, loss: float | None = None) -> None:
        """Saves, and returns when it is durable."""
        self.begin(step, loss=loss)
        self.writer.wait()

    def begin(self, step: int, *, loss: float | None = None) -> None:
        evaluation = None if loss is None else Evaluation(metrics={"loss": loss}, rows=1)
        moment = Moment(Progress(step=step), evaluation, stream=STREAM, before=None)
        self.writer.wait()
        self.writer.save(self.trainee, moment)


@contextmanager
def writing(
    scene: Scene,
    *,
    attempt: int = 1,
    restored_step: int | None = None,
    store: Store | None = None,
    trainee: Trainee | None = None,
    **parts: Any,
) -> Iterator[Writing]:
    """A writer of a recorded attempt into the scene's run."""
    store = store or scene.runs
    spec = scene.job(**parts)
    trainee = trainee or scene.trainee(spec)
    record = Attempt(
        attempt=attempt, generation=attempt, world_size=1, restored_step=restored_step,
        started_at=0.0,
    )  # fmt: skip
    scene.runs.write(PATHS.attempt(attempt), record.to_bytes())
    with Telemetry(scene.runs, PATHS, Source(attempt, 0)) as telemetry:
        writer = CheckpointWriter(
            spec, store, PATHS, telemetry, attempt=record, rank=0, scratch=scene.folder,
            small_files=small_files(trainee.model, trainee.task),
            fence=Fence(store, PATHS, generation=attempt),
        )  # fmt: skip
        try:
            yield Writing(scene, trainee, writer)
        finally:
            writer.close()


def step_once(trainee: Trainee) -> None:
    for parameter in trainee.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    trainee.optimizer.step()


def restorable(scene: Scene) -> tuple[int | None, tuple[str, ...]]:
    manifest, skipped = newest_restorable(scene.runs, PATHS, cache_folder=scene.folder / "cache")
    return (manifest.step if manifest else None), skipped


def copy_of(scene: Scene, step: int) -> Path:
    [manifest] = [m for m in read_manifests(scene.runs, PATHS) if m.step == step]
    return checkpoint_copy(scene.runs, PATHS, manifest, cache_folder=scene.folder / "cache")


# ------------------------------------------------------------------------------- save and load


def test_what_is_saved_comes_back_with_the_same_bits(scene: Scene) -> None:
    with writing(scene) as run:
        step_once(run.trainee)
        run.save(1, loss=0.5)
    folder = copy_of(scene, 1)
    other = scene.trainee(scene.job())
    loaded = other.task.build_model(folder / "model", dropout=None, seed=1)
    own = run.trainee.model.state_dict()
    assert all(torch.equal(value, own[name]) for name, value in loaded.state_dict().items())
    load_optimizer(folder, other.model, other.optimizer)
    saved, back = run.trainee.optimizer.state_dict(), other.optimizer.state_dict()
    for number, states in saved["state"].items():
        assert all(
            torch.equal(value, back["state"][number][name]) for name, value in states.items()
        )
    assert load_progress(folder) == (Progress(step=1), None)
    [manifest] = read_manifests(scene.runs, PATHS)
    assert manifest.evaluation == {"validation/loss": 0.5}
    assert {p.name.split("/")[0] for p in manifest.parts} == {
        "model", "optimizer.safetensors", "progress.json"
    }  # fmt: skip


def test_the_model_folder_is_a_plain_hugging_face_one(scene: Scene) -> None:
    with writing(scene) as run:
        run.save(1)
    model = AutoModelForSequenceClassification.from_pretrained(copy_of(scene, 1) / "model")
    assert model.config.id2label == {0: "negative", 1: "positive"}
    assert not list(scene.run_folder().rglob("*.bin"))


def tied_scene(scene: Scene) -> Scene:
    """A model some of whose weights are the same tensors."""
    folder = scene.folder / "tied"
    config = BartConfig(
        vocab_size=len(VOCABULARY), d_model=16, encoder_layers=1, decoder_layers=1,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=16,
        decoder_ffn_dim=16, max_position_embeddings=64, pad_token_id=0, bos_token_id=2,
        eos_token_id=3, decoder_start_token_id=3, forced_eos_token_id=3,
    )  # fmt: skip
    BartModel(config).save_pretrained(folder)
    tiny_tokenizer(folder)
    return Scene(folder, scene.data, scene.folder)


def test_a_model_with_tied_weights_comes_back(scene: Scene) -> None:
    tied = tied_scene(scene)
    with writing(tied) as run:
        step_once(run.trainee)
        run.save(1)
    other = tied.trainee(tied.job())
    back = other.task.build_model(copy_of(tied, 1) / "model", dropout=None, seed=1)
    own = run.trainee.model.state_dict()
    assert all(torch.equal(value, own[name]) for name, value in back.state_dict().items())
    load_optimizer(copy_of(tied, 1), other.model, other.optimizer)


class Gate:
    """A store whose writes wait until they are let through."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.open = threading.Event()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def write(self, key: str, data: bytes | memoryview) -> str:
        assert self.open.wait(30)
        return self._store.write(key, data)


def test_a_checkpoint_is_the_state_of_its_moment_though_training_goes_on(scene: Scene) -> None:
    gate = Gate(scene.runs)
    with writing(scene, store=gate) as run:
        step_once(run.trainee)
        before = {n: t.clone() for n, t in run.trainee.model.state_dict().items()}
        run.begin(1)
        for _ in range(3):
            step_once(run.trainee)
        gate.open.set()
        run.writer.wait()
    loaded = AutoModelForSequenceClassification.from_pretrained(copy_of(scene, 1) / "model")
    assert all(torch.equal(value, before[name]) for name, value in loaded.state_dict().items())


# ------------------------------------------------------------------------------------- faults


class Failing:
    """A store that refuses to write keys that end in `suffix`."""

    def __init__(self, store: Store, suffix: str) -> None:
        self._store = store
        self._suffix = suffix

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def write(self, key: str, data: bytes | memoryview) -> str:
        self._refuse(key)
        return self._store.write(key, data)

    def write_if_absent(self, key: str, data: bytes | memoryview) -> str:
        self._refuse(key)
        return self._store.write_if_absent(key, data)

    def _refuse(self, key: str) -> None:
        if key.endswith(self._suffix):
            raise StorageError(Problem(f"cannot write {key}"))


@pytest.mark.parametrize("suffix", ["model.safetensors", "progress.json", "manifest.json"])
def test_a_store_that_fails_leaves_nothing_that_looks_whole(scene: Scene, suffix: str) -> None:
    with writing(scene) as run:
        run.save(1)
    with (
        writing(scene, attempt=2, restored_step=1, store=Failing(scene.runs, suffix)) as run,
        pytest.raises(StorageError, match="cannot write"),
    ):
        run.save(2)
    assert restorable(scene) == (1, ())


@contextmanager
def largest_file(num_bytes: int) -> Iterator[None]:
    """A limit of the system, as a full disk is one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_of_a_local_store_is_the_environments_fault_and_says_where(
    scene: Scene,
) -> None:
    with writing(scene) as run:
        step_once(run.trainee)
        with largest_file(20_000), pytest.raises(EnvironmentFault) as raised:
            run.save(1)
    [problem] = raised.value.problems
    assert "cannot write" in problem.message
    assert restorable(scene) == (None, ())


def test_a_disk_without_room_for_small_files_is_told_with_its_folder(scene: Scene) -> None:
    trainee = scene.trainee(scene.job())
    with largest_file(300), pytest.raises(EnvironmentFault) as raised:
        small_files(trainee.model, trainee.task)
    [problem] = raised.value.problems
    assert "configuration cannot be written to" in problem.message
    assert "TMPDIR" in (problem.hint or "")


def test_checkpoints_need_no_folder_for_temporary_files(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    with writing(scene) as run:
        monkeypatch.setattr(tempfile, "tempdir", str(scene.folder / "gone"))
        run.save(1)
    assert restorable(scene) == (1, ())


def test_buffers_are_made_once_and_hold_what_the_safetensors_library_reads(scene: Scene) -> None:
    trainee = scene.trainee(scene.job())
    step_once(trainee)
    snapshot = Snapshot()
    first = snapshot.take(trainee)
    step_once(trainee)
    again = snapshot.take(trainee)
    for name, file in again.items():
        own, other = np.frombuffer(file, np.uint8), np.frombuffer(first[name], np.uint8)
        assert own.ctypes.data == other.ctypes.data, f"{name} has another buffer"
    held = load(bytes(again[WEIGHTS]))
    assert held.keys() == trainee.model.state_dict().keys()
    assert all(torch.equal(held[n], t) for n, t in trainee.model.state_dict().items())
    states = optimizer_tensors(trainee.optimizer)
    held = load(bytes(again[OPTIMIZER]))
    assert held.keys() == states.keys()
    assert all(torch.equal(held[name], value) for name, value in states.items())


def test_a_file_of_all_types_and_shapes_is_read_by_the_safetensors_library() -> None:
    tensors = {
        f"{dtype}/{place}": torch.ones(shape, dtype=dtype)
        for dtype in (
            torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64,
            torch.float16, torch.bfloat16, torch.float32, torch.float64,
        )
        for place, shape in enumerate([(), (0,), (3,), (5, 7)])
    }  # fmt: skip
    file = TensorFile(tensors)
    file.copy(tensors)
    held = load(bytes(file.data))
    assert held.keys() == tensors.keys()
    assert all(torch.equal(held[name], value) for name, value in tensors.items())
    assert not file.fits({**tensors, "more": torch.ones(1)})
    with pytest.raises(ValueError, match="complex64"):
        TensorFile({"wrong": torch.ones(1, dtype=torch.complex64)})


@pytest.mark.parametrize("kind", ["bert", "tied"])
def test_weights_have_the_names_and_bits_that_save_pretrained_writes(
    scene: Scene, kind: str
) -> None:
    place = scene if kind == "bert" else tied_scene(scene)
    model = place.trainee(place.job()).model
    model.save_pretrained(scene.folder / "saved")
    written = load_file(scene.folder / "saved" / "model.safetensors")
    own = saved_weights(model)
    assert own.keys() == written.keys()
    assert all(torch.equal(own[name], value) for name, value in written.items())


def test_the_files_of_a_checkpoint_are_those_of_save_pretrained(scene: Scene) -> None:
    with writing(scene) as run:
        run.save(1)
    run.trainee.model.save_pretrained(scene.folder / "saved")
    run.trainee.task.save_extras(scene.folder / "saved")
    expected = {path.name for path in (scene.folder / "saved").iterdir()}
    model = copy_of(scene, 1) / "model"
    assert {path.name for path in model.iterdir()} == expected
    for name in expected - {"model.safetensors"}:
        assert (model / name).read_bytes() == (scene.folder / "saved" / name).read_bytes()


# ---------------------------------------------------------------------- which one is restored


def test_a_damaged_part_or_a_missing_one_is_skipped_and_said(scene: Scene) -> None:
    with writing(scene, checkpoint={"keep_last": 3}) as run:
        for step in (1, 2, 3):
            run.save(step)
    scene.runs.delete([PATHS.checkpoint(CheckpointName(3, 1)) + "progress.json"])
    part = scene.runs.read(PATHS.checkpoint(CheckpointName(2, 1)) + "progress.json")
    scene.runs.write(
        PATHS.checkpoint(CheckpointName(2, 1)) + "progress.json", part.replace(b"2", b"7", 1)
    )
    step, (missing, damaged) = restorable(scene)
    assert step == 1
    assert "step 3 is skipped: there is no" in missing
    assert "step 2 is skipped" in damaged
    assert "progress.json is damaged" in damaged


def test_a_damaged_manifest_is_skipped_and_said_and_removed_later(
    scene: Scene,
) -> None:
    with writing(scene) as run:
        run.save(1)
        run.save(2)
    scene.runs.write(PATHS.manifest(CheckpointName(2, 1)), b'{"version": 2, "step":')
    step, [skipped] = restorable(scene)
    assert step == 1
    assert "step-00000002-attempt-0001/manifest.json is damaged" in skipped
    with writing(scene, attempt=2, restored_step=1) as run:
        run.save(2)
    assert restorable(scene) == (2, ())


@pytest.mark.parametrize("times", [1, 2])
def test_a_manifest_that_was_spoilt_on_its_way_is_read_anew(scene: Scene, times: int) -> None:
    with writing(scene) as run:
        run.save(1)
        run.save(2)
    spoiling = SpoilingStore(scene.runs, PATHS.manifest(CheckpointName(2, 1)), times=times)
    found, skipped = newest_restorable(spoiling, PATHS, cache_folder=scene.folder / "cache")  # type: ignore[arg-type]
    assert found is not None
    assert (found.step, skipped, spoiling.times) == (2, (), 0)


def test_a_checkpoint_that_retention_takes_away_meanwhile_is_looked_for_anew(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The attempt before is not dead: it saves its next state while this one is restored."""
    asked: list[int] = []
    with writing(scene, checkpoint={"keep_last": 1}) as run:
        run.save(1)

        def copy(store: Store, paths: RunPaths, manifest: Manifest, **options: Any) -> Path:
            if not asked:
                run.save(2)
            asked.append(manifest.step)
            return checkpoint_copy(store, paths, manifest, **options)

        monkeypatch.setattr(restore, "checkpoint_copy", copy)
        assert restorable(scene) == (2, ())
    assert asked == [1, 2]


def test_a_damaged_record_of_an_attempt_is_told_with_its_place(scene: Scene) -> None:
    with writing(scene) as run:
        run.save(1)
    scene.runs.write(PATHS.attempt(1), b"{")
    with pytest.raises(EnvironmentFault, match=r"run/attempts/0001\.json is damaged"):
        restorable(scene)


def test_a_manifest_of_somebody_else_is_not_taken_for_ones_own(scene: Scene) -> None:
    with writing(scene) as run:
        run.save(1)
        step_once(run.trainee)
        with pytest.raises(ObjectExists):
            run.save(1)


def test_no_flipped_bit_of_a_manifest_is_believed(scene: Scene) -> None:
    with writing(scene) as run:
        run.save(1)
    key = PATHS.manifest(CheckpointName(1, 1))
    held = scene.runs.read(key)
    whole = _parse_manifest(key, held)
    num_found = 0
    for bit in range(8 * len(held)):
        flipped = bytearray(held)
        flipped[bit // 8] ^= 1 << bit % 8
        try:
            # Harmless: JSON's layout, the last digit of a long number, the name of the digest.
            assert _parse_manifest(key, bytes(flipped)) == whole
        except ValueError:
            num_found += 1
    assert num_found > 7.6 * len(held)


@pytest.mark.parametrize("version", [1, 3])
def test_a_manifest_of_another_version_is_not_passed_over(scene: Scene, version: int) -> None:
    with writing(scene) as run:
        run.save(1)
    held = json.loads(scene.runs.read(PATHS.manifest(CheckpointName(1, 1))))
    del held["digest"]
    scene.runs.write(
        PATHS.manifest(CheckpointName(1, 1)), json.dumps(held | {"version": version}).encode()
    )
    with pytest.raises(EnvironmentFault, match=f"has version {version}, this Shoal reads 2"):
        restorable(scene)


def test_a_superseded_checkpoint_goes_when_its_step_is_passed(scene: Scene) -> None:
    with writing(scene) as run:
        run.save(1)
        run.save(3)
    with writing(scene, attempt=2) as run:
        assert restorable(scene) == (None, ()), "attempt 2 began anew"
        run.save(2)
        assert [m.name for m in read_manifests(scene.runs, PATHS)] == [
            CheckpointName(2, 2), CheckpointName(3, 1)
        ]  # fmt: skip
        run.save(3)
    assert restorable(scene) == (3, ())
    assert [m.attempt for m in read_manifests(scene.runs, PATHS)] == [2, 2]


def test_what_a_superseded_writer_still_saves_harms_nothing(scene: Scene) -> None:
    """As a driver that was frozen does when it wakes: its late manifest is ignored, and it deletes
    nothing of its successor's."""
    with writing(scene, checkpoint={"keep_last": 1}) as old:
        old.save(1)
        with writing(scene, attempt=2, restored_step=1, checkpoint={"keep_last": 1}) as new:
            old.save(2)
            old.save(3)
            assert restorable(scene) == (1, ())
            new.save(2)
            before = {head.key: head.etag for head in scene.runs.list(PATHS.checkpoints)}
            old.save(4)
            after = {head.key: head.etag for head in scene.runs.list(PATHS.checkpoints)}
    assert before.items() <= after.items()
    assert restorable(scene) == (2, ())
    assert read_live_manifests(scene.runs, PATHS)[-1].name == CheckpointName(2, 2)


# ----------------------------------------------------------------------------- local copies


def test_a_copy_of_another_runs_checkpoint_is_not_taken_for_this_one(scene: Scene) -> None:
    with writing(scene) as run:
        run.save(1)
    elsewhere = Scene(scene.model, scene.data, scene.folder / "elsewhere")
    with writing(elsewhere) as run:
        step_once(run.trainee)
        run.save(1)
    cache = scene.folder / "cache"
    folders = {
        checkpoint_copy(s.runs, PATHS, read_manifests(s.runs, PATHS)[0], cache_folder=cache)
        for s in (scene, elsewhere)
    }
    assert len(folders) == 2


def test_copies_are_dropped_of_this_run_only(scene: Scene) -> None:
    with writing(scene) as run:
        run.save(1)
    [manifest] = read_manifests(scene.runs, PATHS)
    cache = scene.folder / "cache"
    own = copy_of(scene, 1)
    other = open_store(scene.folder / "runs")
    for head in list(other.list("run/checkpoints")):
        other.write(head.key.replace("run/", "run-2/", 1), other.read(head.key))
    others = checkpoint_copy(other, RunPaths("run-2"), manifest, cache_folder=cache)
    drop_checkpoint_copies("run", cache_folder=cache)
    assert not own.exists()
    assert others.is_dir()
    drop_checkpoint_copies("run", cache_folder=cache)
    assert copy_of(scene, 1) == own


# ----------------------------------------------------------------------------------- retention


def manifest(step: int, loss: float | None = None, *, attempt: int = 1) -> Manifest:
    return Manifest(
        step=step, attempt=attempt, generation=attempt, parent_step=None, created_at=0.0, parts=(),
        digests={}, stream=STREAM, evaluation={} if loss is None else {"loss": loss},
    )  # fmt: skip


def attempts(*restored: int | None) -> list[Attempt]:
    return [
        Attempt(attempt=number, generation=number, world_size=1, restored_step=step, started_at=0.0)
        for number, step in enumerate(restored, start=1)
    ]


def removed(
    manifests: list[Manifest], *, keep_last: int = 1, keep_best: int = 1, **keys: Any
) -> list[int]:
    options = {"metric": "loss", "mode": "min", "attempts": attempts(None)} | keys
    found = [m.name for m in manifests]
    gone = superfluous(found, manifests, keep_last=keep_last, keep_best=keep_best, **options)
    return [name.step for name in gone]


def judged(*manifests: Manifest, mode: Literal["min", "max"] = "min") -> list[Manifest]:
    """The manifests, each knowing the best step so far, as a run without min_delta writes them."""
    sign, best, told = (1 if mode == "min" else -1), None, []
    for m in manifests:
        if m.evaluation and (best is None or sign * (m.evaluation["loss"] - best[1]) < 0):
            best = (m.step, m.evaluation["loss"])
        told.append(m.model_copy(update={"best_step": best and best[0]}))
    return told


def test_the_last_and_the_best_are_kept() -> None:
    held = [manifest(1, 3.0), manifest(2, 1.0), manifest(3, 2.0), manifest(4), manifest(5, 4.0)]
    assert removed(judged(*held)) == [1, 3, 4]
    assert removed(judged(*held), keep_last=3) == [1]
    assert removed(judged(*held), keep_best=2) == [1, 4]
    assert removed(judged(*held, mode="max"), mode="max") == [1, 2, 3, 4]
    assert removed(judged(*held), keep_best=9) == [4]


def test_of_equals_the_earlier_is_the_best() -> None:
    assert removed(judged(manifest(1, 1.0), manifest(2, 1.0), manifest(3))) == [2]


@pytest.mark.parametrize("seed", range(20))
def test_retention_never_removes_what_training_takes_for_the_best(scene: Scene, seed: int) -> None:
    rng = np.random.default_rng(seed)
    stop = {"metric": "validation/f1", "mode": "max", "min_delta": 0.05, "patience": 99}
    spec = scene.job(train={"early_stopping": stop})
    progress, held = Progress(), list[Manifest]()
    for step in range(1, 25):
        value = float(rng.uniform(0.4, 0.9))
        progress = judge(
            spec, replace(progress, step=step), Evaluation(metrics={"f1": value}, rows=1)
        )
        told = manifest(step).model_copy(
            update={"evaluation": {"validation/f1": value}, "best_step": progress.best_step}
        )
        held.append(told)
        for gone in removed(held, keep_last=2, metric="validation/f1", mode="max"):
            held = [m for m in held if m.step != gone]
        assert progress.best_step in {m.step for m in held}
        best = best_manifest(held)
        assert best is not None
        assert best.step == progress.best_step


def test_without_evaluations_the_last_are_kept() -> None:
    assert removed([manifest(step) for step in range(1, 6)], keep_last=2) == [1, 2, 3]
    assert removed([]) == []


def test_superseded_checkpoints_are_neither_counted_nor_the_best() -> None:
    held = [manifest(1, 2.0), manifest(2, 0.1), manifest(3, 3.0, attempt=2), manifest(4, attempt=2)]
    assert removed(held, attempts=attempts(None, 1)) == [2, 3]
    ahead = [manifest(1, 2.0), manifest(2, attempt=2), manifest(3, attempt=1)]
    assert removed(ahead, attempts=attempts(None, 1)) == [], "what lies ahead stays for a while"


def test_retention_keeps_a_checkpoint_whose_manifest_came_spoilt(scene: Scene) -> None:
    key = PATHS.manifest(CheckpointName(1, 1))
    store = SpoilingStore(scene.runs, key, times=0)
    with writing(scene, store=store, checkpoint={"keep_last": 2}) as run:  # type: ignore[arg-type]
        run.save(1, loss=1.0)
        store.times = 2
        run.save(2, loss=2.0)
    assert store.times == 0
    assert [m.step for m in read_manifests(scene.runs, PATHS)] == [1, 2]


@pytest.mark.parametrize("record", ["attempt", "manifest"])
def test_nothing_is_deleted_while_a_record_says_nothing(scene: Scene, record: str) -> None:
    """The attempt's record is damaged, or a manifest is of a version that nobody here knows: the
    state is stored all the same."""
    with writing(scene, checkpoint={"keep_last": 1}) as run:
        run.save(1)
        if record == "attempt":
            scene.runs.write(PATHS.attempt(1), b"{")
        else:
            key = PATHS.manifest(CheckpointName(1, 1))
            held = json.loads(scene.runs.read(key))
            del held["digest"]
            scene.runs.write(key, json.dumps(held | {"version": 9}).encode())
        run.save(2)
    for step in (1, 2):
        assert scene.runs.head(PATHS.manifest(CheckpointName(step, 1))) is not None
    events = b"".join(scene.runs.read(h.key) for h in scene.runs.list("run/events/"))
    assert b"old checkpoints could not be deleted" in events


def test_retention_removes_parts_and_manifest(scene: Scene) -> None:
    with writing(scene, checkpoint={"keep_last": 1}) as run:
        for step, loss in ((1, 1.0), (2, 2.0), (3, 3.0)):
            run.save(step, loss=loss)
    assert [m.step for m in read_manifests(scene.runs, PATHS)] == [1, 3]
    assert not (scene.run_folder() / "checkpoints" / "step-00000002-attempt-0001").exists()
    with pytest.raises(ObjectMissing):
        scene.runs.read(PATHS.manifest(CheckpointName(2, 1)))


class Counting:
    """A store that counts what is asked of it."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.calls = 0

    def __getattr__(self, name: str) -> Any:
        self.calls += 1
        return getattr(self._store, name)


def test_what_a_save_asks_of_the_store_does_not_grow_with_what_was_deleted(
    scene: Scene, s3_store: Store
) -> None:
    """The store still names the folders of checkpoints that were deleted."""
    counting = Counting(s3_store)
    asked = []
    with writing(scene, store=counting, checkpoint={"keep_last": 1}) as run:  # type: ignore[arg-type]
        s3_store.write(PATHS.attempt(1), scene.runs.read(PATHS.attempt(1)))
        for step in range(1, 9):
            before = counting.calls
            run.save(step)
            asked.append(counting.calls - before)
    assert len(set(asked[1:])) == 1, asked
    assert [m.step for m in read_manifests(s3_store, PATHS)] == [8]


@pytest.mark.skipif(sys.platform != "linux", reason="threads have no niceness of their own")
def test_the_threads_that_store_give_way_to_those_that_train(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    def niceness() -> int:
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    before, storing = niceness(), list[int]()
    whole = CheckpointWriter._write_file

    def write_file(writer: CheckpointWriter, key: str, data: bytes | memoryview) -> None:
        storing.append(niceness())
        whole(writer, key, data)

    monkeypatch.setattr(CheckpointWriter, "_write_file", write_file)
    with writing(scene) as own:
        own.save(1)
    assert set(storing) == {19}
    assert niceness() == before
