"""Checkpoints as they are saved: parts first, manifest last.

    CheckpointWriter.save   copies the state into buffers, then a thread uploads them

Each (step, attempt) has a folder of its own. Parts of a checkpoint, below its folder:

    model/                   config, tokenizer and weights, as `from_pretrained` loads them
    optimizer.safetensors    `parameter name/state name` -> tensor
    progress.json            step, position, early stopping, evaluation of the untrained model

Of a model with an adapter, in place of the weights, which the best and the last of a run have too:

    adapter/adapter_model.safetensors   the adapter and the head, as peft names them
    adapter/adapter_config.json, adapter/shoal.json    what they are, and of which model
    model/adapter/                      the same in the best and the last, where it is not merged

Of a model that is cut over W ranks, in place of the weights and the optimizer's file:

    shards/model-R-of-W.safetensors, shards/optimizer-R-of-W.safetensors    the rows of rank R
    shards/layout.json                  which rows of which file make up each tensor
    shards/parts-R-of-W.json            what rank R has stored; no part itself
    model/model.safetensors             all weights, in the best and in the last of a run

Each rank stores its files by itself. The first one waits for what the others say in the store that
they have stored, and writes the manifest: no rank talks to another while training goes on, and
where one has died there is no manifest.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import tenacity
import torch.distributed as dist
import xxhash
from pydantic import ValidationError
from safetensors import SafetensorError
from torch import nn

from cluster.storage import ObjectExists, ObjectMissing, Store, StoreAway, read_whole
from jobs.errors import EnvironmentFault, Problem
from jobs.record import (
    ADAPTER_FOLDER,
    Attempt,
    CheckpointName,
    Manifest,
    Part,
    RunPaths,
    SealedRecord,
    StreamPosition,
)
from jobs.spec import JobSpec, format_bytes
from trainers import watchdog
from trainers.adapter_record import ADAPTER_RECORD, AdapterRecord
from trainers.adapters import CONFIG, adapter_config, is_merged
from trainers.consolidation import store_weights
from trainers.fence import Fence
from trainers.layout import SHARDS, WEIGHTS, parts_name
from trainers.local_copy import DamagedPart
from trainers.loop import Progress, Trainee
from trainers.parallel import is_sharded, plain
from trainers.retention import apply_retention
from trainers.snapshot import Snapshot
from trainers.state import EXPORTED_ADAPTER
from trainers.tasks.task import Evaluation, Task
from trainers.telemetry import Telemetry

PROGRESS = "progress.json"

_UPLOAD_THREADS = 4
_READS = 3
_FIRST_PAUSE_SECONDS = 0.1
_MAX_PAUSE_SECONDS = 2.0
"""Between two looks for what the other ranks have stored."""
_SECONDS_FOR_OTHERS_AT_END = 10.0
_LOWEST_PRIORITY = 19


@dataclass(frozen=True)
class Moment:
    """What the manifest says of the state that is saved, besides its files."""

    progress: Progress
    evaluation: Evaluation | None
    stream: StreamPosition
    before: dict[str, Any] | None
    """Evaluation of the untrained model, carried along for the report."""


class StoredParts(SealedRecord):
    """What one rank has stored of a checkpoint of several."""

    parts: tuple[Part, ...]


class PartsMissing(EnvironmentFault):
    """Other ranks have not stored their parts of a checkpoint, and are no longer waited for."""


class CheckpointWriter:
    """A rank's writer, whose buffers hold one state: one save at a time is under way.

    The first rank's writes the manifest. The others have work only where the model is cut.
    """

    def __init__(
        self,
        spec: JobSpec,
        store: Store,
        paths: RunPaths,
        telemetry: Telemetry,
        *,
        small_files: Mapping[str, bytes],
        attempt: Attempt,
        rank: int,
        scratch: Path,
        fence: Fence,
    ) -> None:
        """`small_files`, of the first rank, are those of the function of this name. `scratch` is a
        local folder with room for the weights of a model that is cut."""
        self._spec = spec
        self._store = store
        self._paths = paths
        self._telemetry = telemetry
        self._small_files = small_files
        self._attempt = attempt
        self._rank = rank
        self._scratch = scratch
        self._fence = fence
        self._snapshot = Snapshot()
        self._thread = ThreadPoolExecutor(
            1, thread_name_prefix="shoal-checkpoint", initializer=_give_way
        )
        self._under_way: Future[None] | None = None
        self._write_last: Callable[[], None] | None = None
        self._gives_up = threading.Event()
        self._ends_at: float | None = None

    def save(self, trainee: Trainee, moment: Moment) -> None:
        """Returns once the state is copied; no other save may be under way."""
        step = moment.progress.step
        whole = moment.progress.finished or moment.progress.best_step == step
        files = self._snapshot.take(trainee, whole=whole)
        if self._rank == 0:
            others = dist.get_world_size() - 1 if is_sharded(plain(trainee.model)) else 0
            self._write_last = partial(self._write, files, moment, num_others=others)
        else:
            self._write_last = partial(self._write_shard, files, step)
        self.save_again()

    def save_again(self) -> None:
        """Begins to store the state that was copied last, once more."""
        if self._under_way is not None or self._write_last is None:
            raise RuntimeError("a save is under way, or none was ever begun")
        self._gives_up.clear()
        self._under_way = self._thread.submit(self._write_last)

    def give_up(self) -> None:
        """What is under way no longer waits for other ranks: one of them has failed."""
        self._gives_up.set()

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
        """Ends the thread after what is under way; a failure then is not raised.

        Other ranks, of which some may be gone, are waited for some seconds only.
        """
        self._ends_at = time.monotonic() + _SECONDS_FOR_OTHERS_AT_END
        self._thread.shutdown(wait=True)

    def _write(
        self,
        files: Mapping[str, bytes | memoryview],
        moment: Moment,
        *,
        num_others: int,
    ) -> None:
        began = time.monotonic()
        step = moment.progress.step
        small = {
            name: data
            for name, data in self._small_files.items()
            if not name.startswith(f"model/{ADAPTER_FOLDER}") or EXPORTED_ADAPTER in files
        }
        parts = self._upload(
            {
                **files,
                **small,
                PROGRESS: progress_file(moment.progress, before=moment.before),
            },
            step,
        )
        if num_others:
            parts += self._parts_of_others(step, num_others)
            if moment.progress.finished or moment.progress.best_step == step:
                parts += self._gather_weights(step, parts)
        manifest = self._manifest(moment, parts)
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

    def _write_shard(self, files: Mapping[str, bytes | memoryview], step: int) -> None:
        """This rank's files, and then that they are stored."""
        stored = StoredParts(parts=self._upload(files, step))
        name = parts_name(rank=self._rank, world_size=dist.get_world_size())
        self._store.write(self._folder(step) + name, stored.to_bytes())

    def _parts_of_others(self, step: int, num_others: int) -> tuple[Part, ...]:
        """What the other ranks have stored, once all of them have; else PartsMissing."""
        folder = self._folder(step)
        missing = {
            folder + parts_name(rank=rank, world_size=num_others + 1)
            for rank in range(1, num_others + 1)
        }
        parts: list[Part] = []
        pause_seconds = _FIRST_PAUSE_SECONDS
        while True:
            for key in missing & {head.key for head in self._store.list(folder + SHARDS)}:
                parts += self._read_parts(key)
                missing.remove(key)
            if not missing:
                return tuple(parts)
            is_late = self._ends_at is not None and time.monotonic() > self._ends_at
            if is_late or self._gives_up.wait(pause_seconds):
                raise PartsMissing(f"{len(missing)} ranks have not stored their parts")
            pause_seconds = min(2 * pause_seconds, _MAX_PAUSE_SECONDS)

    @tenacity.retry(
        # The way here may have spoilt what is whole in the store.
        retry=tenacity.retry_if_exception_type(DamagedPart),
        stop=tenacity.stop_after_attempt(_READS),
        reraise=True,
    )
    def _read_parts(self, key: str) -> tuple[Part, ...]:
        try:
            return StoredParts.model_validate_json(self._store.read(key)).parts
        except ValidationError as error:
            raise DamagedPart(Problem(f"{key} is damaged")) from error

    def _gather_weights(self, step: int, parts: tuple[Part, ...]) -> tuple[Part, ...]:
        """Puts `model/model.safetensors` together from what is stored, and stores it.

        Nothing where that cannot be done here, as on a disk without room: the state is whole
        without it. A store that is away, and a part that is not what was stored, are raised.
        """
        stored = self._store.within(self._folder(step).rstrip("/"))
        try:
            return (store_weights(stored, parts, stored, WEIGHTS, scratch=self._scratch),)
        except (StoreAway, DamagedPart, ObjectMissing):
            raise
        except EnvironmentFault as error:
            self._telemetry.event(
                "warning",
                f"step {step} is saved in parts only: {error}; later its plain model folder can be "
                f"made with: shoal checkpoints {self._paths.run_id} --consolidate {step}",
                step=step,
            )
            return ()

    def _upload(self, files: Mapping[str, bytes | memoryview], step: int) -> tuple[Part, ...]:
        """Writes and hashes all files at the same time; large ones go in parallel parts."""
        folder = self._folder(step)
        with ThreadPoolExecutor(_UPLOAD_THREADS, thread_name_prefix="shoal-upload") as pool:
            written = [
                pool.submit(self._write_file, folder + name, data) for name, data in files.items()
            ]
            parts = tuple(part_of(name, data) for name, data in sorted(files.items()))
            for write in written:
                write.result()
        return parts

    def _folder(self, step: int) -> str:
        return self._paths.checkpoint(CheckpointName(step, self._attempt.attempt))

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
            parts=tuple(sorted(parts, key=lambda part: part.name)),
            digests=self._spec.digests(),
            stream=moment.stream,
            evaluation={f"validation/{name}": value for name, value in evaluation.items()},
            best_step=moment.progress.best_step,
            evaluation_pending=moment.progress.evaluation_pending,
            is_last_step=moment.progress.finished,
            max_tokens_per_microbatch=self._attempt.max_tokens_per_microbatch,
            launch_tokens=self._attempt.launch_tokens,
        )

    def _commit(self, manifest: Manifest) -> None:
        """Creates the manifest; its folder is this attempt's alone, so nobody else has.

        It may be there from a save whose answer was lost, and which is repeated.
        """
        key = self._paths.manifest(manifest.name)
        try:
            self._store.write_if_absent(key, manifest.to_bytes())
        except ObjectExists:
            found = read_whole(self._store, key, Manifest.model_validate_json, hint="")
            if found.model_copy(update={"created_at": manifest.created_at}) != manifest:
                raise


def part_of(name: str, data: bytes | memoryview) -> Part:
    """What a manifest says of a file of a checkpoint."""
    return Part(
        name=name,
        bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        xxh3=xxhash.xxh3_128_hexdigest(data),
    )


def progress_file(progress: Progress, *, before: dict[str, Any] | None) -> bytes:
    """What `restore.parse_progress` reads."""
    return json.dumps({"progress": asdict(progress), "before": before}, indent=1).encode()


def _give_way() -> None:
    """Lets training go first where processors are short: before this thread and those it starts.

    On Linux a niceness is a thread's own, and inherited: setpriority(2), clone(2).
    """
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LOWEST_PRIORITY)


def small_files(
    model: nn.Module, task: Task, *, record: AdapterRecord | None = None
) -> dict[str, bytes]:
    """Files of a checkpoint that stay the same: the model's configuration, the tokenizer, and of an
    adapter its `record` and what peft reads.

    By their names in a checkpoint. Raises EnvironmentFault where they cannot be written locally.
    """
    files = _model_files(model, task)
    if record is not None:
        files |= {
            CONFIG: adapter_config(model, source=record.source, revision=record.revision),
            ADAPTER_RECORD: record.model_dump_json(indent=1).encode(),
        }
        if not is_merged(model):
            files[f"model/{CONFIG}"] = adapter_config(model, source="..", revision=None)
    return files


def _model_files(model: nn.Module, task: Task) -> dict[str, bytes]:
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
