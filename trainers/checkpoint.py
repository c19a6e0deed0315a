"""Checkpoints as they are saved: parts first, manifest last.

    CheckpointWriter.save   copies the state into buffers, then a thread uploads them

Each (step, attempt) has a folder of its own. Parts of a checkpoint, below its folder:

    model/                   config, tokenizer and weights, as `from_pretrained` loads them
    optimizer.safetensors    `parameter name/state name` -> tensor
    progress.json            step, position, early stopping, evaluation of the untrained model
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn

from cluster.storage import Store
from jobs.errors import EnvironmentFault, Problem
from jobs.record import Attempt, CheckpointName, Manifest, Part, RunPaths, StreamPosition
from jobs.spec import JobSpec, format_bytes
from trainers import watchdog
from trainers.fence import Fence
from trainers.loop import Progress, Trainee
from trainers.parallel import plain
from trainers.retention import apply_retention
from trainers.snapshot import Snapshot
from trainers.tasks.task import Evaluation, Task
from trainers.telemetry import Telemetry

PROGRESS = "progress.json"

_UPLOAD_THREADS = 4


@dataclass(frozen=True)
class Moment:
    """What the manifest says of the state that is saved, besides its files."""

    progress: Progress
    evaluation: Evaluation | None
    stream: StreamPosition
    before: dict[str, Any] | None
    """Evaluation of the untrained model, carried along for the report."""


class CheckpointWriter:
    """Rank 0's writer, whose buffers hold one state: one save at a time is under way."""

    def __init__(
        self,
        spec: JobSpec,
        store: Store,
        paths: RunPaths,
        telemetry: Telemetry,
        *,
        task: Task,
        attempt: Attempt,
        fence: Fence,
    ) -> None:
        self._spec = spec
        self._store = store
        self._paths = paths
        self._telemetry = telemetry
        self._task = task
        self._attempt = attempt
        self._fence = fence
        self._snapshot = Snapshot()
        self._small_files: dict[str, bytes] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="shoal-checkpoint")
        self._under_way: Future[None] | None = None
        self._write_last: Callable[[], None] | None = None

    def save(self, trainee: Trainee, moment: Moment) -> None:
        """Returns once the state is copied; no other save may be under way."""
        files = self._snapshot.take(trainee)
        self._write_last = partial(self._write, plain(trainee.model), files, moment)
        self.save_again()

    def save_again(self) -> None:
        """Begins to store the state that was copied last, once more."""
        if self._under_way is not None or self._write_last is None:
            raise RuntimeError("a save is under way, or none was ever begun")
        self._under_way = self._thread.submit(self._write_last)

    @property
    def is_busy(self) -> bool:
        """Whether a save was begun whose end nobody has waited for."""
        return self._under_way is not None

    def ends_in(self, seconds: float) -> bool:
        """Whether nothing is under way any more, after a wait of `seconds` at most."""
        return self._under_way is None or bool(wait([self._under_way], timeout=seconds).done)

    def wait(self) -> None:
        """Returns when nothing is under way; raises EnvironmentFault if it failed."""
        pending, self._under_way = self._under_way, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Ends the thread after what is under way; a failure then is not raised."""
        self._thread.shutdown(wait=True)

    def _write(self, model: nn.Module, files: Mapping[str, memoryview], moment: Moment) -> None:
        began = time.monotonic()
        if self._small_files is None:
            self._small_files = small_files(model, self._task)
        progress = {"progress": asdict(moment.progress), "before": moment.before}
        manifest = self._manifest(
            moment,
            self._upload(
                {
                    **files,
                    **self._small_files,
                    PROGRESS: json.dumps(progress, indent=1).encode(),
                },
                moment.progress.step,
            ),
        )
        # What a state leaves out of its rows must be known wherever the state is.
        self._telemetry.require_durable()
        self._fence.check()
        self._commit(manifest)
        self._telemetry.event(
            "checkpoint",
            f"saved step {manifest.step}: {format_bytes(manifest.total_bytes)} "
            f"in {time.monotonic() - began:.1f} s",
            step=manifest.step,
        )
        apply_retention(
            self._spec,
            self._store,
            self._paths,
            self._telemetry,
            attempt=self._attempt.attempt,
        )

    def _upload(self, files: Mapping[str, bytes | memoryview], step: int) -> tuple[Part, ...]:
        """Writes and hashes all files at the same time; large ones go in parallel parts."""
        folder = self._paths.checkpoint(CheckpointName(step, self._attempt.attempt))
        with ThreadPoolExecutor(_UPLOAD_THREADS, thread_name_prefix="shoal-upload") as pool:
            written = [
                pool.submit(self._write_file, folder + name, data) for name, data in files.items()
            ]
            parts = tuple(
                Part(name=name, bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
                for name, data in sorted(files.items())
            )
            for write in written:
                write.result()
        return parts

    def _write_file(self, key: str, data: bytes | memoryview) -> None:
        self._store.write(key, data)
        watchdog.tick()

    def _manifest(self, moment: Moment, parts: tuple[Part, ...]) -> Manifest:
        evaluation = moment.evaluation.metrics if moment.evaluation is not None else {}
        return Manifest(
            step=moment.progress.step,
            attempt=self._attempt.attempt,
            generation=self._attempt.generation,
            parent_step=self._attempt.restored_step,
            created_at=time.time(),
            parts=parts,
            digests=self._spec.digests(),
            stream=moment.stream,
            evaluation={f"validation/{name}": value for name, value in evaluation.items()},
            best_step=moment.progress.best_step,
            is_last_step=moment.progress.finished,
        )

    def _commit(self, manifest: Manifest) -> None:
        """Creates the manifest; its folder is this attempt's alone, so nobody else has."""
        self._store.write_if_absent(self._paths.manifest(manifest.name), manifest.to_bytes())


def small_files(model: nn.Module, task: Task) -> dict[str, bytes]:
    """Files of a checkpoint that stay the same: the model's configuration, the tokenizer.

    By their names in a checkpoint. Raises EnvironmentFault where they cannot be written locally.
    """
    try:
        with tempfile.TemporaryDirectory(prefix="shoal-model-") as folder:
            # Without tensors: those are copied and written by themselves.
            model.save_pretrained(folder, state_dict={})  # type: ignore[operator]
            task.save_extras(Path(folder))
            return {
                f"model/{path.relative_to(folder).as_posix()}": path.read_bytes()
                for path in sorted(Path(folder).rglob("*"))
                if path.is_file() and path.suffix != ".safetensors"
            }
    except (OSError, SafetensorError) as error:  # safetensors has its own error of a full disk
        raise EnvironmentFault(
            Problem(
                f"the model's configuration cannot be written to {tempfile.gettempdir()}: {error}",
                "free disk space there, or set TMPDIR to a folder on a larger disk",
            )
        ) from error
