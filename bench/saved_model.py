"""A model in training whose state is saved: in every way that bench/checkpoint.py compares, and by
Shoal alone for bench/growth.py."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MIB = 2**20
THREADS = 8
RAW_PART_BYTES = 16 * MIB
MEMORY = Path("/dev/shm")


@dataclass(frozen=True)
class Shape:
    """Of a BERT."""

    hidden: int
    layers: int
    vocabulary: int


@dataclass(frozen=True)
class Sizes:
    """How much is done."""

    shape: Shape
    steps: int
    every: int
    rounds: int
    moves: int
    """How often a round copies, uploads and restores the state alone."""


class Subject:
    """A model in training, and the ways in which its state is saved."""

    def __init__(self, shape: Shape, bucket: str, place: Path) -> None:
        import torch
        from transformers import BertConfig, BertForSequenceClassification

        from cluster.storage import open_store
        from jobs.record import Attempt, RunPaths, Source
        from jobs.spec import Optimizer
        from tests.tiny import tiny_job, tiny_tokenizer
        from trainers.agreement import Agreement
        from trainers.checkpoint import CheckpointWriter, small_files
        from trainers.fence import Fence
        from trainers.loop import Trainee
        from trainers.optim import build_optimizer
        from trainers.saving import Saving
        from trainers.telemetry import Telemetry

        self.place = place
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=shape.vocabulary, hidden_size=shape.hidden, num_labels=2,
            num_hidden_layers=shape.layers, num_attention_heads=4,
            intermediate_size=4 * shape.hidden, max_position_embeddings=512,
        )  # fmt: skip
        model = BertForSequenceClassification(config)
        tokenizer = tiny_tokenizer(place / "tokenizer")
        task = _TaskFiles(tokenizer)
        optimizer = build_optimizer(model, Optimizer(learning_rate=1e-4))
        self.trainee = Trainee(task, model, optimizer, torch.device("cpu"), torch.float32)  # type: ignore[arg-type]
        self.batch = torch.randint(0, shape.vocabulary, (8, 16))
        self.labels = torch.randint(0, 2, (8,))
        self.runs, self.paths = open_store(f"{bucket}/runs"), RunPaths("bench")
        data = {"train": f"{bucket}/none"}
        spec = tiny_job(place / "none", data, self.runs.uri, checkpoint={"keep_last": 1})
        attempt = Attempt(attempt=1, generation=1, world_size=1, restored_step=None, started_at=0.0)
        self.runs.write(self.paths.attempt(1), attempt.to_bytes())
        self.telemetry = Telemetry(self.runs, self.paths, Source(1, 0))
        self.telemetry.__enter__()
        self.writer = CheckpointWriter(
            spec,
            self.runs,
            self.paths,
            self.telemetry,
            small_files=small_files(model, task),  # type: ignore[arg-type]
            attempt=attempt,
            rank=0,
            scratch=place,
            fence=Fence(self.runs, self.paths, generation=1),
        )
        self.saving = Saving(
            spec,
            self.writer,
            Agreement(rank=0, world_size=1),
            self.telemetry,
            raise_any=raise_it,
        )
        self.writer._commit = self._commit_and_note(self.writer._commit)  # type: ignore[method-assign]
        self.committed_at = 0.0
        """When the newest manifest was written, by the performance counter."""
        self.saved = 0
        self.copies: dict[str, Any] | None = None
        self.moves = 0

    @property
    def state_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors().values())

    def tensors(self) -> dict[str, Any]:
        from trainers.state import saved_state

        files = saved_state(self.trainee).files.values()
        return {name: tensor for tensors in files for name, tensor in tensors.items()}

    def steps(
        self, count: int, *, every: int, save: Callable[[int], None] | None
    ) -> tuple[list[float], list[float]]:
        """Seconds of each step, and of each call that saves."""
        taken, saving = [], []
        for number in range(1, count + 1):
            began = time.perf_counter()
            self.trainee.optimizer.zero_grad(set_to_none=True)
            output = self.trainee.model(input_ids=self.batch, labels=self.labels)
            output.loss.backward()
            self.trainee.optimizer.step()
            taken.append(time.perf_counter() - began)
            if save is not None and number % every == 1:
                began = time.perf_counter()
                save(number)
                saving.append(time.perf_counter() - began)
        return taken, saving

    def timed(self, name: str, save: Callable[[int], None] | None, *, steps: int) -> dict[str, Any]:
        """Wall clock of steps with one checkpoint, and of what is under way at their end."""
        began = time.perf_counter()
        taken, saving = self.steps(steps, every=steps, save=save)
        seconds = time.perf_counter() - began
        self.settle(name)
        left = time.perf_counter() - began - seconds
        return {"seconds": seconds, "left": left, "step_seconds": taken, "saving": saving}

    def settle(self, name: str) -> None:
        """Returns when what was saved is durable."""
        if name == "shoal":
            self.saving.make_durable()
        if name == "ray async":
            import ray.train

            # It returns when the upload that is under way is done.
            ray.train.get_all_reported_checkpoints()

    def save_with_shoal(self, step: int) -> None:
        from jobs.record import StreamPosition
        from trainers.checkpoint import Moment
        from trainers.loop import Progress

        self.saved += 1
        position = StreamPosition(
            order_version=1, index_digest="", lanes=1, window=1, seed=0, global_batch_size=8,
            epoch=0, next_item=0,
        )  # fmt: skip
        self.saving.save(
            self.trainee, Moment(Progress(step=self.saved), None, stream=position, before=None)
        )

    def _commit_and_note(self, commit: Callable[[Any], None]) -> Callable[[Any], None]:
        def commit_and_note(manifest: Any) -> None:
            commit(manifest)
            self.committed_at = time.perf_counter()

        return commit_and_note

    def save_with_ray_sync(self, step: int) -> None:
        self._report(sync=True)

    def save_with_ray_async(self, step: int) -> None:
        self._report(sync=False)

    def _report(self, *, sync: bool) -> None:
        import ray.train
        import torch
        from ray.train import Checkpoint, CheckpointUploadMode

        folder = tempfile.mkdtemp(dir=self.place)
        model, optimizer = self.trainee.model, self.trainee.optimizer
        torch.save(
            {"model": model.state_dict(), "optimizer": optimizer.state_dict()},
            Path(folder, "state.pt"),
        )
        ray.train.report(
            {"loss": 0.0},
            checkpoint=Checkpoint.from_directory(folder),
            checkpoint_upload_mode=CheckpointUploadMode.SYNC
            if sync
            else CheckpointUploadMode.ASYNC,
        )
        if sync:
            shutil.rmtree(folder, ignore_errors=True)

    def plain_copy(self) -> float:
        """Seconds of a copy of the state into memory that is there already."""
        tensors = self.tensors()
        if self.copies is None:
            self.copies = {name: tensor.clone() for name, tensor in tensors.items()}
        return timed(lambda: copy_all(tensors, self.copies))

    def measure_state(self) -> dict[str, float]:
        """Seconds of the copy, the upload and the restore, and of the plain alternatives."""
        from trainers.restore import newest_restorable

        seconds: dict[str, float] = {"plain copy": self.plain_copy()}
        seconds["shoal copy"] = timed(lambda: self.writer._snapshot.take(self.trainee))
        parts = raw_parts(self.writer._snapshot.take(self.trainee))
        places = {"on disk": self.place / "restored", "in memory": MEMORY / self.place.name}

        def put() -> None:
            seconds["raw put"] = timed(lambda: raw_put(self.runs, parts))

        def upload() -> None:
            began = time.perf_counter()
            self.save_with_shoal(0)
            self.saving.make_durable()
            # Then it can be restored; what comes after it, as to delete an older one, is no upload.
            seconds["shoal upload"] = self.committed_at - began - seconds["shoal copy"]

        def get(place: str) -> None:
            folder = places[place]
            folder.mkdir()
            seconds[f"raw get, {place}"] = timed(lambda: raw_get(self.runs, parts, folder))
            shutil.rmtree(folder)

        def hold() -> None:
            seconds["raw get, held"] = timed(lambda: raw_get(self.runs, parts, None))

        def restore(place: str) -> None:
            folder = places[place]
            seconds[f"shoal restore, {place}"] = timed(
                lambda: newest_restorable(self.runs, self.paths, cache_folder=folder)
            )
            shutil.rmtree(folder)

        self.moves += 1
        turns = slice(None, None, 1 if self.moves % 2 else -1)
        for action in (put, upload)[turns]:
            os.sync()  # what was written before is not paid for here
            action()
        for name in places:
            # The first to read new objects pays for memory of the server's and of the machine's,
            # which a virtual machine asks its host for, at ten times the cost of pages in use.
            for action in ((get, restore) * 2)[turns]:
                os.sync()
                action(name)
        hold()
        return seconds

    def close(self) -> None:
        self.writer.close()
        self.telemetry.__exit__(None, None, None)


class _TaskFiles:
    """What a writer asks of a task."""

    def __init__(self, tokenizer: Path) -> None:
        self._tokenizer = tokenizer

    def save_extras(self, folder: Path) -> None:
        for path in self._tokenizer.iterdir():
            shutil.copy(path, folder / path.name)


def raise_it(error: Exception | None) -> None:
    if error is not None:
        raise error


def timed(action: Callable[[], object]) -> float:
    began = time.perf_counter()
    held = action()
    seconds = time.perf_counter() - began
    del held
    return seconds


def copy_all(tensors: dict[str, Any], copies: dict[str, Any]) -> None:
    """What a copy into buffers that are there already takes at least."""
    for name, tensor in tensors.items():
        copies[name].copy_(tensor)


def raw_put(store: Any, parts: list[tuple[str, bytes]]) -> None:
    """The bytes as objects of one part, by as many threads as Shoal has: no hash, no manifest."""
    client, bucket, prefix = store._connection.client(), store._bucket, store._root
    with ThreadPoolExecutor(THREADS) as pool:
        list(
            pool.map(
                lambda part: client.put_object(Bucket=bucket, Key=prefix + part[0], Body=part[1]),
                parts,
            )
        )


def raw_get(store: Any, parts: list[tuple[str, bytes]], folder: Path | None) -> None:
    """The same bytes again, held in memory, or written to files of `folder`."""
    client, bucket, prefix = store._connection.client(), store._bucket, store._root

    def get(part: tuple[str, bytes]) -> bytes:
        data: bytes = client.get_object(Bucket=bucket, Key=prefix + part[0])["Body"].read()
        if folder is None:
            return data
        (folder / Path(part[0]).name).write_bytes(data)
        return b""

    with ThreadPoolExecutor(THREADS) as pool:
        held = list(pool.map(get, parts))
    expected = 0 if folder else sum(len(data) for _, data in parts)
    assert sum(map(len, held)) == expected


def raw_parts(files: dict[str, memoryview]) -> list[tuple[str, bytes]]:
    """The bytes as keys and parts, cut before the clock runs."""
    parts = []
    for name, data in files.items():
        digest = hashlib.sha256(name.encode()).hexdigest()[:8]
        for start in range(0, len(data), RAW_PART_BYTES):
            key = f"raw/{digest}-{start}"
            parts.append((key, bytes(data[start : start + RAW_PART_BYTES])))
    return parts
