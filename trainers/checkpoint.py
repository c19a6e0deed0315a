"""Checkpoints: parts first, manifest last; verified on load; last and best kept.

    CheckpointWriter.save   copies the state off the device, then a thread writes and uploads it
    newest_restorable       the newest checkpoint of the lineage whose every byte is what it was
    load_checkpoint         weights, optimizer state and progress from its local copy

Parts of a checkpoint, below its folder:

    model/                   config, tokenizer and weights, as `from_pretrained` loads them
    optimizer.safetensors    `parameter name/state name` -> tensor
    progress.json            step, position, early stopping, evaluation of the untrained model
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from cluster.storage import ObjectExists, ObjectMissing, StorageError, Store
from jobs.errors import EnvironmentFault, Problem
from jobs.record import (
    MANIFEST_VERSION,
    Attempt,
    Manifest,
    Part,
    RunPaths,
    StreamPosition,
    by_merit,
    live_manifests,
)
from jobs.spec import JobSpec, format_bytes
from trainers.local_copy import DamagedPart, drop_copy, local_copy, sha256_of
from trainers.loop import Progress, Trainee
from trainers.optim import load_optimizer_tensors, optimizer_tensors
from trainers.parallel import plain
from trainers.tasks.task import Evaluation, Task
from trainers.telemetry import Telemetry

_UPLOAD_THREADS = 4


@dataclass(frozen=True)
class Snapshot:
    """The whole state at a step, copied to the CPU, and what the manifest says of it."""

    progress: Progress
    evaluation: Evaluation | None
    stream: StreamPosition
    before: dict[str, Any] | None
    """Evaluation of the untrained model, carried along for the report."""
    model: dict[str, torch.Tensor]
    optimizer: dict[str, torch.Tensor]


class CheckpointWriter:
    """Rank 0's writer; at most one checkpoint is under way, and a second one waits for it."""

    def __init__(
        self,
        spec: JobSpec,
        store: Store,
        paths: RunPaths,
        telemetry: Telemetry,
        *,
        task: Task,
        attempt: Attempt,
        scratch: Path,
    ) -> None:
        self._spec = spec
        self._store = store
        self._paths = paths
        self._telemetry = telemetry
        self._task = task
        self._attempt = attempt
        self._scratch = scratch
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="shoal-checkpoint")
        self._under_way: Future[None] | None = None

    def save(
        self,
        trainee: Trainee,
        progress: Progress,
        *,
        evaluation: Evaluation | None,
        stream: StreamPosition,
        before: dict[str, Any] | None,
    ) -> None:
        """Returns once the state is copied; first waits for the checkpoint under way."""
        self.wait()
        model = plain(trainee.model)
        snapshot = Snapshot(
            progress=progress,
            evaluation=evaluation,
            stream=stream,
            before=before,
            model=_copied(model.state_dict().items()),
            optimizer=_copied(optimizer_tensors(model, trainee.optimizer).items()),
        )
        self._under_way = self._thread.submit(self._write, model, snapshot)

    def wait(self) -> None:
        """Returns when nothing is under way; raises EnvironmentFault if it failed."""
        pending, self._under_way = self._under_way, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Ends the thread after what is under way; a failure then is not raised."""
        self._thread.shutdown(wait=True)

    def _write(self, model: nn.Module, snapshot: Snapshot) -> None:
        began = time.monotonic()
        step = snapshot.progress.step
        try:
            self._scratch.mkdir(parents=True, exist_ok=True)
            folder = Path(tempfile.mkdtemp(prefix=f"step-{step:08d}-", dir=self._scratch))
            try:
                write_parts(folder, model, snapshot, self._task)
                parts = self._upload(folder, step)
            finally:
                shutil.rmtree(folder, ignore_errors=True)
        except (OSError, SafetensorError) as error:  # safetensors has its own error of a full disk
            raise EnvironmentFault(
                Problem(
                    f"the checkpoint of step {step} cannot be written to {self._scratch}: {error}",
                    "free disk space there, or set SHOAL_CACHE to a folder on a larger disk",
                )
            ) from error
        manifest = self._manifest(snapshot, parts)
        # What a state leaves out of its rows must be known wherever the state is.
        self._telemetry.require_durable()
        self._commit(manifest)
        self._telemetry.event(
            "checkpoint",
            f"saved step {step}: {format_bytes(manifest.total_bytes)} "
            f"in {time.monotonic() - began:.1f} s",
            step=step,
        )
        apply_retention(self._spec, self._store, self._paths, self._telemetry)

    def _upload(self, folder: Path, step: int) -> tuple[Part, ...]:
        prefix = self._paths.checkpoint(step)
        files = sorted(path for path in folder.rglob("*") if path.is_file())

        def upload(path: Path) -> Part:
            name = path.relative_to(folder).as_posix()
            part = Part(name=name, bytes=path.stat().st_size, sha256=sha256_of(path))
            self._store.upload(prefix + name, path)
            return part

        with ThreadPoolExecutor(_UPLOAD_THREADS) as pool:
            return tuple(pool.map(upload, files))

    def _manifest(self, snapshot: Snapshot, parts: tuple[Part, ...]) -> Manifest:
        evaluation = snapshot.evaluation.metrics if snapshot.evaluation is not None else {}
        return Manifest(
            step=snapshot.progress.step,
            attempt=self._attempt.attempt,
            generation=self._attempt.generation,
            parent_step=self._attempt.restored_step,
            created_at=time.time(),
            parts=parts,
            digests=self._spec.digests(),
            stream=snapshot.stream,
            evaluation={f"validation/{name}": value for name, value in evaluation.items()},
            best_step=snapshot.progress.best_step,
            is_last_step=snapshot.progress.finished,
        )

    def _commit(self, manifest: Manifest) -> None:
        """Writes the manifest; replaces one only if it belongs to an attempt before this one."""
        key = self._paths.manifest(manifest.step)
        try:
            self._store.write_if_absent(key, manifest.to_bytes())
        except ObjectExists:
            self._replace(key, manifest)

    def _replace(self, key: str, manifest: Manifest) -> None:
        """Replaces an older or damaged manifest; StorageError where it is a newer one."""
        head = self._store.head(key)
        if head is None:  # a retention that was killed before has gone on meanwhile
            self._store.write_if_absent(key, manifest.to_bytes())
            return
        held = _parse_manifest(key, self._store.read(key))
        if isinstance(held, Manifest) and (held.generation, held.attempt) >= (
            manifest.generation,
            manifest.attempt,
        ):
            raise StorageError(
                Problem(
                    f"step {manifest.step} was saved by attempt {held.attempt} of generation "
                    f"{held.generation}, which is newer than this one: another driver took over"
                )
            )
        self._store.write_if_match(key, manifest.to_bytes(), etag=head.etag)


def write_parts(folder: Path, model: nn.Module, snapshot: Snapshot, task: Task) -> None:
    """Writes a checkpoint's parts below `folder`; `model` gives the configuration only."""
    model.save_pretrained(folder / "model", state_dict=snapshot.model)  # type: ignore[operator]
    task.save_extras(folder / "model")
    if snapshot.optimizer:
        save_file(snapshot.optimizer, folder / "optimizer.safetensors")
    progress = {"progress": asdict(snapshot.progress), "before": snapshot.before}
    (folder / "progress.json").write_text(json.dumps(progress, indent=1))


def _copied(tensors: Iterable[tuple[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors}


# ------------------------------------------------------------------------------------- restore


def read_manifests(store: Store, paths: RunPaths) -> list[Manifest]:
    """All manifests of a run that can be read, by step.

    Raises EnvironmentFault where one is of a later version: going on would destroy its checkpoint.
    """
    return _read_manifests(store, paths)[0]


def _read_manifests(store: Store, paths: RunPaths) -> tuple[list[Manifest], list[str]]:
    """(manifests by step, what is wrong with each damaged one)."""
    manifests, damaged = [], []
    for folder in store.list_folders(paths.checkpoints):
        key = f"{paths.checkpoints}{folder}/manifest.json"
        try:
            found = _parse_manifest(key, store.read(key))
        except ObjectMissing:
            continue  # parts without a manifest are no checkpoint
        if isinstance(found, Manifest):
            manifests.append(found)
        else:
            damaged.append(found)
    return sorted(manifests, key=lambda m: m.step), damaged


def _parse_manifest(key: str, text: bytes) -> Manifest | str:
    """The manifest, or why it is none; EnvironmentFault where it is of a later version."""
    try:
        version = json.loads(text)["version"]
        if version > MANIFEST_VERSION:
            raise EnvironmentFault(
                Problem(
                    f"{key} has version {version}, this Shoal reads {MANIFEST_VERSION}",
                    "install the Shoal that wrote it",
                )
            )
        return Manifest.model_validate_json(text)
    except (ValueError, KeyError, TypeError):
        return f"{key} is damaged"


def read_attempts(store: Store, paths: RunPaths) -> list[Attempt]:
    """All attempts of a run, by number."""
    return [
        Attempt.model_validate_json(store.read(head.key))
        for head in store.list(paths.attempts)
        if not head.key.endswith("-outcome.json")
    ]


def read_live_manifests(store: Store, paths: RunPaths) -> list[Manifest]:
    """Manifests of a run that no later attempt has superseded, by step."""
    return live_manifests(read_manifests(store, paths), read_attempts(store, paths))


def newest_restorable(
    store: Store, paths: RunPaths, *, cache_folder: Path
) -> tuple[Manifest | None, tuple[str, ...]]:
    """The newest checkpoint of the lineage whose every part is what its manifest says.

    Also says of each newer one, damaged or incomplete, why it is skipped. The local copy is left
    in `cache_folder` for `checkpoint_copy`.
    """
    manifests, damaged = _read_manifests(store, paths)
    skipped = [f"a checkpoint is skipped: {reason}" for reason in damaged]
    live = live_manifests(manifests, read_attempts(store, paths))
    for manifest in reversed(live):
        try:
            checkpoint_copy(store, paths, manifest, cache_folder=cache_folder)
        except (DamagedPart, ObjectMissing) as error:
            skipped.append(f"the checkpoint of step {manifest.step} is skipped: {error}")
            continue
        return manifest, tuple(skipped)
    return None, tuple(skipped)


def checkpoint_copy(
    store: Store, paths: RunPaths, manifest: Manifest, *, cache_folder: Path
) -> Path:
    """The checkpoint as a verified folder of this node.

    Named after its content: a run of the same name may have been here, from another store.
    """
    content = repr([(part.name, part.sha256) for part in manifest.parts])
    digest = hashlib.sha256(content.encode()).hexdigest()[:24]
    folder = cache_folder / "checkpoints" / f"{paths.run_id}-{manifest.step:08d}-{digest}"
    return local_copy(
        store.within(paths.checkpoint(manifest.step).rstrip("/")), manifest.parts, folder
    )


def drop_checkpoint_copies(run_id: str, *, cache_folder: Path) -> None:
    """Removes this node's copies of a run's checkpoints; no process may be using them."""
    name = re.compile(rf"{re.escape(run_id)}-\d{{8}}-[0-9a-f]{{24}}")
    for path in (cache_folder / "checkpoints").glob(f"{run_id}-*"):
        copy = path.name.removesuffix(".lock").removesuffix(".unfinished")
        if name.fullmatch(copy):
            drop_copy(path.with_name(copy))


def load_progress(folder: Path) -> tuple[Progress, dict[str, Any] | None]:
    """Progress and the evaluation of the untrained model from a checkpoint's local copy."""
    held = json.loads((folder / "progress.json").read_text())
    return Progress(**held["progress"]), held["before"]


def load_optimizer(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Puts the optimizer's state back; raises SpecError where it is another optimizer's."""
    path = folder / "optimizer.safetensors"
    load_optimizer_tensors(model, optimizer, load_file(path) if path.exists() else {})


# ----------------------------------------------------------------------------------- retention


def superfluous(
    manifests: list[Manifest],
    attempts: list[Attempt],
    *,
    keep_last: int,
    keep_best: int,
    metric: str,
    mode: Literal["min", "max"],
) -> list[Manifest]:
    """Manifests that retention removes: neither among the last nor among the best. Pure."""
    live = live_manifests(manifests, attempts)
    best = by_merit(live, metric=metric, mode=mode)[:keep_best]
    kept = {m.step for m in [*live[-keep_last:], *best]}
    return [m for m in live if m.step not in kept]


def apply_retention(spec: JobSpec, store: Store, paths: RunPaths, telemetry: Telemetry) -> None:
    """Deletes what retention gives up: the manifest first, so that nothing half looks whole.

    What cannot be deleted now is named again after the next checkpoint.
    """
    metric, mode, _ = spec.best
    try:
        removed = superfluous(
            read_manifests(store, paths),
            read_attempts(store, paths),
            keep_last=spec.checkpoint.keep_last,
            keep_best=spec.checkpoint.keep_best,
            metric=metric,
            mode=mode,
        )
        for manifest in removed:
            folder = paths.checkpoint(manifest.step)
            store.delete([paths.manifest(manifest.step)])
            store.delete([head.key for head in store.list(folder)])
            telemetry.event("retention", f"deleted step {manifest.step}", step=manifest.step)
    except StorageError as error:
        telemetry.event("warning", f"old checkpoints could not be deleted: {error}")
