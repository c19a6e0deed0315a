"""Checkpoints as they are saved: parts first, manifest last.

    CheckpointWriter.save   copies the state off the device, then a thread writes and uploads it

Each (step, attempt) has a folder of its own. Parts of a checkpoint, below its folder:

    model/                   config, tokenizer and weights, as `from_pretrained` loads them
    optimizer.safetensors    `parameter name/state name` -> tensor
    progress.json            step, position, early stopping, evaluation of the untrained model
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from cluster.storage import Store
from jobs.errors import EnvironmentFault, Problem
from jobs.record import (
    Attempt,
    CheckpointName,
    Manifest,
    Part,
    RunPaths,
    StreamPosition,
)
from jobs.spec import JobSpec, format_bytes
from trainers.local_copy import sha256_of
from trainers.loop import Progress, Trainee
from trainers.optim import optimizer_tensors
from trainers.parallel import plain
from trainers.retention import apply_retention
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
        apply_retention(
            self._spec,
            self._store,
            self._paths,
            self._telemetry,
            attempt=self._attempt.attempt,
        )

    def _upload(self, folder: Path, step: int) -> tuple[Part, ...]:
        prefix = self._paths.checkpoint(CheckpointName(step, self._attempt.attempt))
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
        """Creates the manifest; its folder is this attempt's alone, so nobody else has."""
        self._store.write_if_absent(self._paths.manifest(manifest.name), manifest.to_bytes())


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
