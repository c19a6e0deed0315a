"""Checkpoints of models that are cut over ranks: whole or absent, and for any number of them."""

from __future__ import annotations

import os
import resource
import signal
import tempfile
from collections.abc import Mapping
from typing import Any

import pytest
from pydantic import ValidationError
from safetensors.numpy import load, load_file
from transformers import AutoModelForSequenceClassification

from cluster.folder import FolderStore
from cluster.storage import Store, StoreAway
from jobs.checkpoints import consolidate
from jobs.errors import Problem
from jobs.record import Attempt, Manifest, Part, Source, State
from jobs.runs import RunReader
from jobs.spec import JobSpec
from tests.evidence import final_weights, global_batches
from tests.ranks import Kill, assignment_of, break_group, on_ranks, run_group, run_ranks
from tests.scene import Scene
from trainers import consolidation, saving
from trainers.checkpoint import CheckpointWriter, Moment, StoredParts, small_files
from trainers.consolidation import make_whole, read_layout
from trainers.fence import Fence
from trainers.finish import build_result
from trainers.layout import OPTIMIZER, WEIGHTS
from trainers.local_copy import DamagedPart
from trainers.patience import Patience
from trainers.preparation import prepare
from trainers.pretrained import model_of_checkpoint
from trainers.records import read_attempts, read_manifests
from trainers.restore import newest_restorable
from trainers.session import ProcessSession, Session
from trainers.telemetry import Telemetry

PATIENCE = Patience(limit_seconds=60, tell=lambda *_: None)


def job(scene: Scene, workers: int, strategy: str = "fsdp", **parts: Any) -> JobSpec:
    """Of 40 rows: on three ranks uneven shares, in several passes, and at the end of an epoch one
    row for all of them."""
    own: dict[str, Any] = {
        "workers": {"count": workers, "strategy": strategy},
        "batching": {"global_batch_size": 13, "max_tokens_per_microbatch": 48},
        "train": {"log_rows": True, "evaluate_every_steps": 3},
        "checkpoint": {"every_steps": 2, "keep_last": 9},
        "data": {"lanes": 6},
    }
    return scene.job(**(own | parts))


def manifests(scene: Scene, run_id: str) -> list[Manifest]:
    return read_manifests(scene.runs, scene.paths(run_id))


def whole_files(store: Store, manifest: Manifest, folder: str) -> dict[str, bytes]:
    """Weights and optimizer of a checkpoint as files that are not cut."""
    checkpoint = store.within(folder.rstrip("/"))
    layout = read_layout(checkpoint, manifest.parts)
    if layout is None:
        return {name: checkpoint.read(name) for name in (WEIGHTS, OPTIMIZER)}
    files = {}
    for name in (WEIGHTS, OPTIMIZER):
        with tempfile.TemporaryFile() as file:
            make_whole(checkpoint, layout, name, manifest.parts, file)
            file.seek(0)
            files[name] = file.read()
    return files


# --------------------------------------------------------------------- any number of workers


class HandsOn:
    """Restores a run's last checkpoint as a run does, and saves what it then has for another."""

    def __init__(self, scene: Scene, spec: JobSpec, run_id: str, to: str) -> None:
        self.scene, self.spec, self.run_id, self.to = scene, spec, run_id, to

    def __call__(self, session: Session) -> None:
        store, spec = self.scene.runs, self.spec
        last = manifests(self.scene, self.run_id)[-1]
        paths, to = self.scene.paths(self.run_id), self.scene.paths(self.to)
        prepared = prepare(session, spec, store, paths, last, patience=PATIENCE)
        attempt = Attempt(
            attempt=1, generation=1, world_size=session.world_size, restored_step=None,
            started_at=0.0,
        )  # fmt: skip
        if session.rank == 0:
            store.write(to.attempt(1), attempt.to_bytes())
        with Telemetry(store, to, Source(1, session.rank)) as telemetry:
            writer = CheckpointWriter(
                spec, store, to, telemetry, attempt=attempt, rank=session.rank,
                small_files=small_files(prepared.trainee.model, prepared.task),
                scratch=self.scene.folder,
                fence=Fence(store, to, generation=1),
            )  # fmt: skip
            writer.save(
                prepared.trainee, Moment(prepared.progress, None, last.stream, prepared.before)
            )
            writer.wait()
            writer.close()


def test_a_state_goes_over_any_number_of_workers_and_comes_back_with_the_same_bytes(
    scene: Scene,
) -> None:
    scene.train(job(scene, 1, "ddp"), "r1")
    for workers, run_id, to in ((2, "r1", "r2"), (3, "r2", "r3")):
        on_ranks(HandsOn(scene, job(scene, workers), run_id, to), world_size=workers)
    HandsOn(scene, job(scene, 1, "ddp"), "r3", "back")(ProcessSession(use_gpu=False))
    files = {}
    for run_id in ("r1", "r2", "r3", "back"):
        last = manifests(scene, run_id)[-1]
        folder = scene.paths(run_id).checkpoint(last.name)
        files[run_id] = whole_files(scene.runs, last, folder)
        gathered = scene.runs.read(folder + WEIGHTS)  # the last one of a run
        assert gathered == files[run_id][WEIGHTS]
    assert all(held == files["r1"] for held in files.values())
    names = {part.name for part in manifests(scene, "r3")[-1].parts}
    assert {f"shards/model-000{rank}-of-0003.safetensors" for rank in range(3)} < names
    assert OPTIMIZER not in names


class SpoilsOnTheWay:
    """Rank 0 first reads what another has stored with one bit changed."""

    def __init__(self, place: int) -> None:
        self.place, self.seen = place, set[str]()

    def __call__(self) -> None:
        whole = FolderStore.read

        def read(store: Store, key: str) -> bytes:
            data = whole(store, key)
            if "/parts-0001-of" in key and key not in self.seen:
                self.seen.add(key)
                spoilt = bytearray(data)
                spoilt[self.place % len(data)] ^= 1
                return bytes(spoilt)
            return data

        FolderStore.read = read  # type: ignore[method-assign]


def test_a_bit_that_changes_in_what_a_rank_has_told_is_found_or_changes_nothing() -> None:
    parts = (Part(name="shards/model-0001-of-0002", bytes=12, sha256="0" * 64, xxh3="1" * 32),)
    told = StoredParts(parts=parts).to_bytes()
    found = 0
    for bit in range(8 * len(told)):
        spoilt = bytearray(told)
        spoilt[bit // 8] ^= 1 << bit % 8
        try:
            assert StoredParts.model_validate_json(bytes(spoilt)).parts == parts
        except ValidationError:
            found += 1
    assert found > 4 * len(told)


class DiesStoring:
    """Rank 1 is killed when it has stored its files of `step`, and has not said so yet."""

    def __init__(self, step: int) -> None:
        self.step = step

    def __call__(self) -> None:
        whole, step = CheckpointWriter._upload, self.step

        def upload(writer: CheckpointWriter, files: Mapping[str, Any], at: int) -> Any:
            parts = whole(writer, files, at)
            if at == step and os.environ["RANK"] == "1":
                os.kill(os.getpid(), signal.SIGKILL)
            return parts

        CheckpointWriter._upload = upload  # type: ignore[method-assign]


def test_ranks_that_die_while_they_save_leave_no_checkpoint_and_the_same_bits(
    scene: Scene,
) -> None:
    spec = job(scene, 2)
    run_ranks(assignment_of(spec, "calm"), world_size=2)
    break_group(assignment_of(spec, "run"), world_size=2, before=DiesStoring(4))
    assert manifests(scene, "run")[-1].step == 3
    run_ranks(
        assignment_of(spec, "run", generation=2), world_size=2, kill=Kill("parts", 1)
    )  # all parts of step 4 may be there, and no manifest
    assert manifests(scene, "run")[-1].step == 3
    outcome = run_ranks(assignment_of(spec, "run", generation=3), world_size=2)
    assert outcome is not None
    assert outcome.state is State.SUCCEEDED
    assert [a.restored_step for a in read_attempts(scene.runs, scene.paths())] == [None, 3, 3]
    assert final_weights(scene.runs, "run") == final_weights(scene.runs, "calm")
    assert global_batches(scene.runs, "run") == global_batches(scene.runs, "calm")


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_uneven_rows_an_empty_rank_and_accumulation_train_what_one_process_trains(
    scene: Scene, strategy: str
) -> None:
    """Under fsdp the run goes on with three workers after two, and ends with one, under ddp."""
    parts = {
        "model": {"dropout": 0.0},
        "optimizer": {"kind": "sgd", "learning_rate": 0.1, "momentum": 0.9},
    }
    scene.train(job(scene, 1, "ddp", **parts), "alone")
    if strategy == "ddp":
        run_ranks(assignment_of(job(scene, 3, "ddp", **parts), "run"), world_size=3)
    else:
        kills = (1, 2, Kill("manifest", 1)), (2, 3, Kill("step", 4))
        for generation, workers, kill in kills:
            spec = job(scene, workers, **parts)
            run_ranks(
                assignment_of(spec, "run", generation=generation), world_size=workers,
                kill=kill,
            )  # fmt: skip
        restored = read_attempts(scene.runs, scene.paths())[-1].restored_step
        assert restored == 2, "the second attempt went on from what two ranks had saved"
        scene.train(job(scene, 1, "ddp", **parts), generation=3)
        assert read_attempts(scene.runs, scene.paths())[-1].restored_step > restored
    assert global_batches(scene.runs, "run") == global_batches(scene.runs, "alone")
    own, alone = (
        load_file(scene.run_folder(run_id) / "checkpoints" / last.name.folder / WEIGHTS)
        for run_id in ("run", "alone")
        for last in manifests(scene, run_id)[-1:]
    )
    for name, weight in alone.items():
        assert own[name] == pytest.approx(weight, abs=1e-5), name


class SavesFailOnRankOne:
    """Rank 1 cannot store its weights of step 4, and the first time those of step 8."""

    def __call__(self) -> None:
        saving._PAUSE_SECONDS = 0.01
        whole, left = FolderStore.write, {"step-00000004-": 9, "step-00000008-": 1}

        def write(store: Store, key: str, data: bytes | memoryview) -> str:
            for folder, times in left.items():
                if folder in key and "model-0001-of" in key and times:
                    left[folder] -= 1
                    raise StoreAway(Problem(f"cannot write {key}: it is away"))
            return whole(store, key, data)

        FolderStore.write = write  # type: ignore[method-assign]


def test_a_part_that_cannot_be_stored_is_a_save_that_failed_and_is_repeated_at_the_end(
    scene: Scene,
) -> None:
    outcomes = run_group(
        assignment_of(job(scene, 2), "run"), world_size=2, before=SavesFailOnRankOne()
    )
    assert [outcome.state for outcome in outcomes] == [State.SUCCEEDED] * 2
    assert [m.step for m in manifests(scene, "run")] == [2, 3, 6, 8]
    told = [e["message"] for e in RunReader(scene.runs, "run").events() if e["event"] == "warning"]
    [failed, *_] = [text for text in told if "could not be stored" in text]
    assert "model-0001-of-0002.safetensors: it is away" in failed


class GathersOnAFullDisk:
    """No file that is gathered may be longer than 1,000 bytes: a limit of the system, as a full
    disk is one."""

    def __call__(self) -> None:
        whole = consolidation._weights_file

        def weights_file(*arguments: Any) -> Any:
            soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
            try:
                return whole(*arguments)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

        consolidation._weights_file = weights_file


def test_a_run_whose_disk_has_no_room_for_the_gathered_weights_ends_well(scene: Scene) -> None:
    spec = job(scene, 2)
    outcomes = run_group(assignment_of(spec, "run"), world_size=2, before=GathersOnAFullDisk())
    assert [outcome.state for outcome in outcomes] == [State.SUCCEEDED] * 2
    last = manifests(scene, "run")[-1]
    assert last.is_last_step
    assert not any(manifest.has_model for manifest in manifests(scene, "run"))
    told = [e["message"] for e in RunReader(scene.runs, "run").events() if e["event"] == "warning"]
    [said] = [text for text in told if f"step {last.step} is saved in parts only" in text]
    assert "cannot hold the weights of the model" in said
    result = build_result(scene.runs, scene.paths(), generation=1, ended=outcomes[0])
    assert result.last_checkpoint == f"checkpoints/{last.name.folder}"
    made = consolidate(RunReader(scene.runs, "run"), last.step, to=None)
    AutoModelForSequenceClassification.from_pretrained(made["uri"])


# --------------------------------------------------------------------------------- from any


def test_a_damaged_shard_is_found_and_costs_its_checkpoint_only(scene: Scene) -> None:
    """The plain folder is made of any of the others, and loads."""
    run_ranks(assignment_of(job(scene, 2), "run"), world_size=2, before=SpoilsOnTheWay(150))
    last, before = manifests(scene, "run")[-1], manifests(scene, "run")[-2]
    checkpoint = scene.runs.within(scene.paths().checkpoint(last.name).rstrip("/"))
    whole = whole_files(scene.runs, last, scene.paths().checkpoint(last.name))
    layout = read_layout(checkpoint, last.parts)
    assert layout is not None
    name = "shards/model-0001-of-0002.safetensors"
    data = bytearray(checkpoint.read(name))
    for place in (3, len(data) // 2, len(data) - 1):
        spoilt = bytearray(data)
        spoilt[place] ^= 1
        checkpoint.write(name, bytes(spoilt))
        with tempfile.TemporaryFile() as file, pytest.raises(DamagedPart, match="model-0001"):
            make_whole(checkpoint, layout, WEIGHTS, last.parts, file)
    found, [skipped] = newest_restorable(
        scene.runs, scene.paths(), cache_folder=scene.folder / "cache"
    )
    assert found == before
    assert "model-0001-of-0002.safetensors is damaged" in skipped
    checkpoint.write(name, bytes(data))
    assert whole_files(scene.runs, last, scene.paths().checkpoint(last.name)) == whole
    model = model_of_checkpoint(
        scene.runs.within(scene.paths().checkpoint(before.name).rstrip("/")),
        before,
        None,
        scene.folder / "cache",
    )
    made = consolidate(RunReader(scene.runs, "run"), before.step, to=None)
    loaded = AutoModelForSequenceClassification.from_pretrained(made["uri"])
    data = whole_files(scene.runs, before, scene.paths().checkpoint(before.name))[WEIGHTS]
    assert (model / "model.safetensors").read_bytes() == data
    held = load(data)
    assert {n: t.numpy().tobytes() for n, t in loaded.state_dict().items()} == {
        n: t.tobytes() for n, t in held.items()
    }
