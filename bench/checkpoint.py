"""What a checkpoint costs: how long training stands still, and how fast it is stored and restored.

    python bench/checkpoint.py [--small] [--rounds N] [--json FILE]

One process trains a BERT with AdamW, as a worker of Ray Train, on an S3 server of this machine. The
same steps are made without checkpoints, with Shoal's, and with `ray.train.report` and its default
upload, SYNC and ASYNC; the order takes turns. A checkpoint is saved in the middle of each part of
the steps, so that its upload goes on beside the rest of them: training stands still for (seconds of
the steps with checkpoints - seconds without) / checkpoints. What is still under way at the end of
the steps is waited for and told apart. Then the state alone: copied, uploaded and restored by
Shoal, and the same bytes copied, and moved by parallel PUTs and GETs that verify nothing. A restore
goes through files in the cache's folder; it is measured on the disk and in memory (/dev/shm), each
against GETs that end there too.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lab
from rich.table import Table

MIB = 2**20
THREADS = 8
RAW_PART_BYTES = 16 * MIB
MEMORY = Path("/dev/shm")
VARIANTS = ("none", "shoal", "ray sync", "ray async")


@dataclass(frozen=True)
class Sizes:
    """How much is done."""

    hidden: int
    layers: int
    vocabulary: int
    steps: int
    every: int
    rounds: int


SMALL = Sizes(hidden=64, layers=2, vocabulary=2000, steps=12, every=4, rounds=1)
FULL = Sizes(hidden=384, layers=6, vocabulary=30522, steps=200, every=50, rounds=3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, help="how often all of it is measured")
    arguments = lab.arguments_of(parser)
    sizes = SMALL if arguments.small else FULL
    rounds = arguments.rounds or sizes.rounds
    with lab.place() as place, lab.object_store(place) as bucket:
        found = measure_on_ray(sizes, rounds, bucket, place)
    result = summarize(found, sizes)
    lab.tell("checkpoint", result, tables=tables(result), json_file=arguments.json)


def measure_on_ray(sizes: Sizes, rounds: int, bucket: str, place: Path) -> dict[str, Any]:
    """All measurements, made by the one worker of a TorchTrainer."""
    import logging

    import ray
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from cluster.storage import open_store

    ray.init(
        address="local", num_cpus=2, num_gpus=0, object_store_memory=200 * MIB,
        logging_level=logging.ERROR, log_to_driver=False,
    )  # fmt: skip
    answer = place / "measured.json"
    store = open_store(f"{bucket}/ray")
    try:
        TorchTrainer(
            worker,
            train_loop_config={
                "sizes": sizes, "rounds": rounds, "bucket": bucket, "place": str(place),
                "answer": str(answer), "path": sys.path,
            },
            scaling_config=ScalingConfig(num_workers=1),
            run_config=RunConfig(
                name="bench",
                storage_path=store.filesystem_root,
                storage_filesystem=store.filesystem(),
            ),
        ).fit()  # fmt: skip
    finally:
        ray.shutdown()
    return json.loads(answer.read_text())


# --------------------------------------------------------------------------------- in the worker


def worker(config: dict[str, Any]) -> None:
    """Measures, and writes what it found to a file of this machine."""
    sys.path[:] = config["path"]
    import torch

    torch.set_num_threads(1)
    sizes, place = config["sizes"], Path(config["place"])
    subject = Subject(sizes, config["bucket"], place)
    subject.steps(max(3, sizes.steps // 20), every=0, save=None)  # optimizer state, warm caches
    found: dict[str, Any] = {"bytes": subject.state_bytes, "steps": [], "state": []}
    savers: dict[str, Callable[[int], None] | None] = {
        "none": None,
        "shoal": subject.save_with_shoal,
        "ray sync": subject.save_with_ray_sync,
        "ray async": subject.save_with_ray_async,
    }
    for name, save in savers.items():  # each once before it counts: buffers, connections, threads
        if save is not None:
            save(1)
            subject.settle(name)
    for number in range(config["rounds"]):
        turn = number % len(VARIANTS)
        for name in VARIANTS[turn:] + VARIANTS[:turn]:
            found["steps"].append({"variant": name, **subject.timed(name, savers[name])})
        found["state"].append(subject.measure_state())
    subject.close()
    Path(config["answer"]).write_text(json.dumps(found))


class Subject:
    """A model in training, and the ways in which its state is saved."""

    def __init__(self, sizes: Sizes, bucket: str, place: Path) -> None:
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

        self.sizes, self.place = sizes, place
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=sizes.vocabulary, hidden_size=sizes.hidden, num_labels=2,
            num_hidden_layers=sizes.layers, num_attention_heads=4,
            intermediate_size=4 * sizes.hidden, max_position_embeddings=512,
        )  # fmt: skip
        model = BertForSequenceClassification(config)
        tokenizer = tiny_tokenizer(place / "tokenizer")
        task = _TaskFiles(tokenizer)
        optimizer = build_optimizer(model, Optimizer(learning_rate=1e-4))
        self.trainee = Trainee(task, model, optimizer, torch.device("cpu"), torch.float32)  # type: ignore[arg-type]
        self.batch = torch.randint(0, sizes.vocabulary, (8, 16))
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
        self.saved = 0
        self.copies: dict[str, Any] | None = None

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
            if save is not None and number % every == every // 2:
                began = time.perf_counter()
                save(number)
                saving.append(time.perf_counter() - began)
        return taken, saving

    def timed(self, name: str, save: Callable[[int], None] | None) -> dict[str, Any]:
        """Wall clock of the steps, and of what is still under way at their end."""
        began = time.perf_counter()
        taken, saving = self.steps(self.sizes.steps, every=self.sizes.every, save=save)
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

    def measure_state(self) -> dict[str, float]:
        """Seconds of the copy, the upload and the restore, and of the plain alternatives."""
        from trainers.restore import newest_restorable

        seconds: dict[str, float] = {}
        tensors = self.tensors()
        if self.copies is None:
            self.copies = {name: tensor.clone() for name, tensor in tensors.items()}
        seconds["plain copy"] = timed(lambda: copy_all(tensors, self.copies))
        seconds["shoal copy"] = timed(lambda: self.writer._snapshot.take(self.trainee))
        parts = raw_parts(self.writer._snapshot.take(self.trainee))
        places = {"on disk": self.place / "restored", "in memory": MEMORY / self.place.name}

        def put() -> None:
            seconds["raw put"] = timed(lambda: raw_put(self.runs, parts))

        def upload() -> None:
            began = time.perf_counter()
            self.save_with_shoal(0)
            self.saving.make_durable()
            seconds["shoal upload"] = time.perf_counter() - began - seconds["shoal copy"]

        def get(place: str) -> None:
            folder = places[place]
            folder.mkdir()
            to = None if place == "in memory" else folder
            seconds[f"raw get, {place}"] = timed(lambda: raw_get(self.runs, parts, to))
            shutil.rmtree(folder)

        def restore(place: str) -> None:
            folder = places[place]
            seconds[f"shoal restore, {place}"] = timed(
                lambda: newest_restorable(self.runs, self.paths, cache_folder=folder)
            )
            shutil.rmtree(folder)

        pairs = [(put, upload), *((partial(get, p), partial(restore, p)) for p in places)]
        for pair in pairs:
            for action in pair if self.saved % 2 else reversed(pair):
                os.sync()  # what was written before is not paid for here
                action()
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


# --------------------------------------------------------------------------------------- results


def summarize(found: dict[str, Any], sizes: Sizes) -> dict[str, Any]:
    """The figures: medians over the rounds, each against what was measured beside it."""
    per_round = [found["steps"][k : k + len(VARIANTS)] for k in range(0, len(found["steps"]), 4)]
    checkpoints = sizes.steps // sizes.every
    still: dict[str, list[float]] = {name: [] for name in VARIANTS[1:]}
    slower: dict[str, list[float]] = {name: [] for name in VARIANTS[1:]}
    for entries in per_round:
        by_name = {entry["variant"]: entry for entry in entries}
        calm = by_name["none"]
        calm_step = sorted(calm["step_seconds"])[len(calm["step_seconds"]) // 2]
        for name in still:
            own = by_name[name]
            still[name].append((own["seconds"] - calm["seconds"]) / checkpoints)
            after = [
                seconds
                for place, seconds in enumerate(own["step_seconds"])
                if 0 <= place % sizes.every - sizes.every // 2 < max(1, sizes.every // 5)
            ]
            slower[name].append(sorted(after)[len(after) // 2] / calm_step)
    mib = found["bytes"] / MIB
    state = {name: [entry[name] for entry in found["state"]] for name in found["state"][0]}
    speeds = {
        name: lab.spread([mib / max(1e-9, seconds) for seconds in values])
        for name, values in state.items()
    }
    median = {name: lab.spread(values)["median"] for name, values in still.items()}
    return {
        "state_mib": mib,
        "rounds": len(per_round),
        "checkpoints_per_round": checkpoints,
        "calm_seconds": lab.spread(
            [e["seconds"] for entries in per_round for e in entries if e["variant"] == "none"]
        ),
        "still_seconds": {name: lab.spread(values) for name, values in still.items()},
        "still_share_of_ray_sync": median["shoal"] / median["ray sync"],
        "left_seconds": {
            name: lab.spread(
                [e["left"] for entries in per_round for e in entries if e["variant"] == name]
            )
            for name in still
        },
        "step_during_upload": {name: lab.spread(values) for name, values in slower.items()},
        "mib_per_second": speeds,
        "copy_ratio": ratio(state["shoal copy"], state["plain copy"]),
        "upload_ratio": ratio(state["raw put"], state["shoal upload"]),
        "restore_ratio": {
            place: ratio(state[f"raw get, {place}"], state[f"shoal restore, {place}"])
            for place in ("on disk", "in memory")
        },
    }


def ratio(over: list[float], under: list[float]) -> float:
    """Median of the rounds' ratios."""
    return lab.spread([a / b for a, b in zip(over, under, strict=True)])["median"]


def tables(result: dict[str, Any]) -> list[Table]:
    still = Table(
        title=f"Training stands still, for each checkpoint of {result['state_mib']:.0f} MiB "
        f"(median of {result['rounds']} rounds)",
        title_justify="left",
    )
    columns = ("", "seconds", "smallest", "largest", "a step during the upload", "s after the end")
    for column in columns:
        still.add_column(column, justify="left" if not column else "right")
    for name, spread in result["still_seconds"].items():
        slower = result["step_during_upload"][name]["median"]
        still.add_row(
            name,
            *(f"{spread[key]:.3f}" for key in ("median", "min", "max")),
            f"{slower:.2f} x",
            f"{result['left_seconds'][name]['median']:.2f}",
        )
    state = Table(title="The state alone", title_justify="left")
    for column in ("", "shoal", "plain", "ratio"):
        state.add_column(column, justify="left" if not column else "right")
    speeds = result["mib_per_second"]
    for title, own, plain, value in (
        ("copy, MiB/s (ratio of seconds)", "shoal copy", "plain copy", result["copy_ratio"]),
        ("upload, hashed, MiB/s", "shoal upload", "raw put", result["upload_ratio"]),
        *(
            (
                f"restore, verified, {place}, MiB/s",
                f"shoal restore, {place}",
                f"raw get, {place}",
                value,
            )
            for place, value in result["restore_ratio"].items()
        ),
    ):
        state.add_row(
            title, f"{speeds[own]['median']:.0f}", f"{speeds[plain]['median']:.0f}", f"{value:.2f}"
        )
    share = Table(show_header=False)
    share.add_row("Shoal's standstill, of Ray's SYNC", f"{result['still_share_of_ray_sync']:.1%}")
    return [still, share, state]


if __name__ == "__main__":
    main()
