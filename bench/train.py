"""Rows and real tokens per second of the training loop, beside the usual ways to write it.

    python bench/train.py [--device cpu|cuda] [--compile] [--steps N] [--epochs N] [--rounds N]
                          [--small] [--json FILE]

MiniLM-L6 learns the sentiment of film reviews: texts of one to four sentences of one kind, cut at
128 tokens. All variants make the same number of optimizer steps with the
same global batch, from the same weights, and are judged on the same test rows:

    naive           every row padded to 128 tokens, the global batch in one pass
    Trainer         Hugging Face's, dynamic padding, or length grouping as well
    Shoal           one process, without Ray; also with batching.packing, and with --compile with
                    model.compile
    Shoal, bare     two processes: Shoal under torchrun, and a bare loop over the very same
                    micro-batches, which lie ready in memory

With --device cuda there is one process, which needs no Ray: in bfloat16 naive and Trainer (where
accelerate is installed), Shoal in float32, tf32 and bfloat16, and in that compiled, packed, or with
activation checkpointing.

A row's own time is that of the steps after the first two, on a GPU after the first epoch: no start,
no evaluation, no checkpoint. MFU is the share of what products of large matrices reach in the same
precision.

Exit code 1 where variants did not make the same number of steps; nothing about speed is judged.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import environments
import lab
import numpy as np
import safetensors
import torch
import yaml
from rich.table import Table

from cluster.storage import open_store
from examples import assets
from jobs.parse import parse_spec
from jobs.runs import RunReader
from jobs.spec import JobSpec, Model, format_bytes
from trainers.data.cache import NodeCache
from trainers.data.partition import fit_window
from trainers.data.prepare import prepare
from trainers.data.prepare_plan import PrepareOptions
from trainers.data.stream import RankStream
from trainers.microbatch import Cutting, cut_microbatches
from trainers.parallel import float32_products
from trainers.preparation import open_data
from trainers.tasks.task import build_task

LABELS = ("negative", "positive")
MOST_TOKENS = 128
MOST_SENTENCES = 4
GLOBAL_BATCH = 64
TRAINER_BATCH = 32
"""Rows of a pass of the Trainer, which accumulates two: quicker here than one of 64."""
WARM_STEPS = 2
CUDA_EPOCHS = 10
TEST_ROWS = 500
LEARNING_RATE = 2e-4

_TRAINERS_AND_MEMORY = """
import atexit, json, sys
import torch
from trainers.__main__ import main

atexit.register(lambda: print(json.dumps(torch.cuda.max_memory_allocated())))
sys.argv[0] = "trainers"
main()
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--compile", action="store_true", help="Shoal compiled too: minutes more on a CPU"
    )
    parser.add_argument("--steps", type=int, help="of an epoch; 24, or 4 with --small")
    parser.add_argument("--epochs", type=int, help=f"1; on a GPU {CUDA_EPOCHS}, or 2 with --small")
    parser.add_argument("--rounds", type=int, help="3, or 1 with --small")
    arguments = lab.arguments_of(parser)
    on_gpu = arguments.device == "cuda"
    steps = arguments.steps or (4 if arguments.small else 24)
    epochs = arguments.epochs or ((2 if arguments.small else CUDA_EPOCHS) if on_gpu else 1)
    rounds = arguments.rounds or (1 if arguments.small else 3)
    with lab.place() as place:
        model = str(assets.minilm())
        test_rows = 64 if arguments.small else TEST_ROWS
        data = _prepare(place, model, train_rows=steps * GLOBAL_BATCH, test_rows=test_rows)
        variants = _Variants(
            place, model, data, device=arguments.device, steps=steps * epochs, epochs=epochs
        )
        one_process = _on_gpu(variants) if on_gpu else _on_cpu(variants, arguments.compile)
        groups = {"one_process": lab.interleaved(one_process, rounds=rounds)}
        if not on_gpu:
            groups["two_processes"] = lab.interleaved(
                {"Shoal": partial(variants.shoal, 2), "bare": partial(variants.bare, 2)},
                rounds=rounds,
            )
        precisions = ("float32", "tf32", "bfloat16") if on_gpu else ("float32",)
        peaks = {name: _peak_flops(arguments.device, name) for name in precisions}
    result = {
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "steps": steps * epochs,
        "global_batch_size": GLOBAL_BATCH,
        "data": data,
        **groups,
        "flops_of_token": _flops_of_token(model),
        "peak_flops": peaks,
    }
    lab.tell("train", result, tables=_tables(result), json_file=arguments.json)
    made = {one["steps"] for group in groups.values() for own in group.values() for one in own}
    return 0 if made == {steps * epochs} else 1


# ------------------------------------------------------------------------------------- the data


def _prepare(place: Path, model: str, *, train_rows: int, test_rows: int) -> dict[str, str]:
    """Tokenized train and test sets in local folders; the train set is one epoch."""
    source = place / "reviews.jsonl"
    rows = list(_reviews())
    if len(rows) < train_rows + test_rows:
        raise SystemExit(f"there are rows for {(len(rows) - test_rows) // GLOBAL_BATCH} steps only")
    order = np.random.default_rng(1).permutation(len(rows))
    rows = [rows[number] for number in order[: train_rows + test_rows]]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    prepare(
        PrepareOptions(
            source=str(source),
            to=str(place / "data"),
            split=f"train={train_rows},test={test_rows}",
            tokenizer=model,
            max_tokens=MOST_TOKENS,
        )
    )
    return {part: str(place / "data" / part) for part in ("train", "test")}


def _reviews() -> Iterator[dict[str, str]]:
    """Texts of one to four sentences that agree, each sentence once."""
    rng = np.random.default_rng(0)
    sentences: dict[str, list[str]] = {label: [] for label in LABELS}
    for line in assets.movie_sentences().read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        sentences[row["label"]].append(row["text"])
    for label, own in sentences.items():
        rng.shuffle(own)
        while own:
            count = int(rng.integers(1, MOST_SENTENCES + 1))
            yield {"text": " ".join(own[:count]), "label": label}
            del own[:count]


# --------------------------------------------------------------------------------- the variants


Variant = Callable[[], dict[str, Any]]


def _on_cpu(variants: _Variants, compiled: bool) -> dict[str, Variant]:
    also = {"Shoal, compile": partial(variants.shoal, 1, compile=True)}
    return {
        "naive": variants.naive,
        "Trainer, dynamic padding": partial(variants.trainer, "random"),
        "Trainer, length grouping": partial(variants.trainer, "group_by_length"),
        "Shoal": partial(variants.shoal, 1),
        "Shoal, packing": partial(variants.shoal, 1, packing=True),
        **(also if compiled else {}),
    }


def _on_gpu(variants: _Variants) -> dict[str, Variant]:
    half = "bfloat16"
    shoal = partial(variants.shoal, 1)
    trainers = {
        "Trainer, dynamic padding, bfloat16": partial(variants.trainer, "random", half),
        "Trainer, length grouping, bfloat16": partial(variants.trainer, "group_by_length", half),
    }
    if not _has_accelerate():
        sys.stderr.write("without accelerate there is no Trainer: pip install accelerate\n")
        trainers = {}
    return {
        "naive, bfloat16": partial(variants.naive, half),
        **trainers,
        "Shoal, bfloat16": partial(shoal, precision=half),
        "Shoal, float32": partial(shoal, precision="float32"),
        "Shoal, tf32": partial(shoal, precision="tf32"),
        "Shoal, bfloat16, compile": partial(shoal, precision=half, compile=True),
        "Shoal, bfloat16, packing": partial(shoal, precision=half, packing=True),
        "Shoal, bfloat16, activation checkpointing": partial(
            shoal, precision=half, activation_checkpointing=True
        ),
    }


def _has_accelerate() -> bool:
    return importlib.util.find_spec("accelerate") is not None


class _Variants:
    """Each method trains once and tells rows per second, tokens, memory and the accuracy."""

    def __init__(
        self,
        place: Path,
        model: str,
        data: dict[str, str],
        *,
        device: str,
        steps: int,
        epochs: int,
    ) -> None:
        self._place, self._model, self._data = place, model, data
        self._device, self._steps, self._epochs = device, steps, epochs
        # Each entry of the metrics waits for a GPU: there is one in an epoch.
        self._log_every = 1 if device == "cpu" else steps // epochs
        self._warm_steps = WARM_STEPS if device == "cpu" else self._log_every
        self._runs = 0
        self._launch_tokens: int | None = None

    def naive(self, precision: str = "float32") -> dict[str, Any]:
        return self._loop("naive", precision=precision)

    def trainer(self, sampling: str, precision: str = "float32") -> dict[str, Any]:
        python = sys.executable if _has_accelerate() else environments.python_of("accelerate")
        return self._loop("trainer", python=python, sampling=sampling, precision=precision)

    def bare(self, workers: int) -> dict[str, Any]:
        """Over the micro-batches of Shoal's run with as many workers."""
        folder = self._place / f"batches-{workers}"
        if not folder.exists():
            folder.mkdir()
            spec = self._job(workers)
            assert self._launch_tokens is not None, "Shoal comes first"
            for rank in range(workers):
                steps = _microbatches(spec, rank, steps=self._steps, launch=self._launch_tokens)
                torch.save(steps, folder / f"{rank}.pt")
        return self._loop("bare", workers=workers, batches=str(folder))

    def shoal(self, workers: int, *, packing: bool = False, **model: Any) -> dict[str, Any]:
        """`model`: keys of the job's model."""
        spec = self._job(workers, packing=packing, **model)
        self._runs += 1
        run_id = f"run-{self._runs}"
        file = self._place / f"{run_id}.yaml"
        file.write_text(yaml.safe_dump(spec.model_dump(mode="json", exclude_defaults=True)))
        program = ["-m", "trainers"] if self._device == "cpu" else ["-c", _TRAINERS_AND_MEMORY]
        said = _run(
            [*_starter(workers), *program, str(file), "--run-id", run_id], where=self._place
        )
        reader = RunReader(open_store(spec.store.uri), run_id)
        lines = [line for line in reader.metrics() if line["kind"] == "train"]
        [attempt] = reader.attempts()
        if workers == 2 and self._launch_tokens is None:
            self._launch_tokens = attempt.launch_tokens
        warm = [line for line in lines if line["step"] <= self._warm_steps]
        timed = lines[len(warm) :]
        seconds = timed[-1]["time"] - warm[-1]["time"]
        outcome = reader.outcomes()[attempt.attempt]
        assert outcome.test is not None
        return {
            "rows_per_second": sum(line["rows"] for line in timed) / seconds,
            "precision": spec.model.precision,
            "steps": lines[-1]["step"],
            "real_tokens": sum(line["tokens"] for line in lines),
            "computed_tokens": round(
                sum(line["tokens"] / (1 - line["padding_share"]) for line in lines)
            ),
            "accuracy": outcome.test["metrics"]["accuracy"],
            "peak_memory_bytes": None if self._device == "cpu" else json.loads(said.split()[-1]),
            "launch_tokens": attempt.launch_tokens,
            "seconds": outcome.seconds,
        }

    def _job(self, workers: int, *, packing: bool = False, **model: Any) -> JobSpec:
        # The bare loop has the micro-batches of the first run with as many workers.
        known = self._launch_tokens if workers == 2 else None
        return parse_spec(
            {
                "name": "bench",
                "task": {"labels": list(LABELS), "max_tokens": MOST_TOKENS},
                "model": {"source": self._model, "precision": "float32", **model},
                "data": {**self._data, "seed": 7},
                "batching": {
                    "global_batch_size": GLOBAL_BATCH,
                    "packing": packing,
                    "launch_tokens": "auto" if known is None else known,
                },
                "optimizer": {"learning_rate": LEARNING_RATE},
                "train": {"epochs": self._epochs, "log_every_steps": self._log_every},
                "checkpoint": {"every_steps": 10_000},
                "workers": {
                    "count": workers,
                    "cpus": max(1, (os.cpu_count() or 1) // workers),
                    "gpus": int(self._device == "cuda"),
                },
                "store": str(self._place / "runs"),
                "tracking": [],
            },
            where="bench",
        )

    def _loop(
        self, loop: str, *, python: str = sys.executable, workers: int = 1, **own: Any
    ) -> Any:
        """One of bench/plain_loops.py, in processes of its own."""
        asked = {
            "loop": loop,
            "device": self._device,
            "precision": "float32",
            "model": self._model,
            **self._data,
            "place": str(self._place / "trainer"),
            "steps": self._steps,
            "warm_steps": self._warm_steps,
            "global_batch_size": GLOBAL_BATCH,
            "trainer_batch": TRAINER_BATCH,
            "max_tokens": MOST_TOKENS,
            "learning_rate": LEARNING_RATE,
            "threads": max(1, (os.cpu_count() or 1) // workers),
            "seed": 7,
            **own,
        }
        script = str(lab.ROOT / "bench" / "plain_loops.py")
        said = _run([*_starter(workers, python), script, json.dumps(asked)], where=self._place)
        return {**json.loads(said.splitlines()[-1]), "precision": asked["precision"]}


def _microbatches(spec: JobSpec, rank: int, *, steps: int, launch: int) -> list[list[Any]]:
    """What Shoal's rank computes in each step, collated."""
    data = open_data(spec, spec.data.train)
    task = build_task(spec, model_folder=Path(spec.model.source), index=data.index)
    cutting = Cutting(spec.batching.max_tokens_per_microbatch, launch)
    window = fit_window(
        window=spec.data.window,
        lanes=spec.lanes,
        max_row_group_bytes=data.index.max_row_group_bytes,
        stream_memory=spec.data.stream_memory,
    )
    with (
        tempfile.TemporaryDirectory() as cache,
        RankStream(
            store=data.store,
            index=data.index,
            columns=task.columns,
            encode=task.encode,
            rank=rank,
            world_size=spec.workers.count,
            seed=spec.data.seed,
            lanes=spec.lanes,
            window=window,
            cache=NodeCache(Path(cache), limit_bytes=2**30),
        ) as stream,
    ):
        batches = itertools.chain.from_iterable(
            stream.batches(epoch=epoch, next_item=0, global_batch_size=GLOBAL_BATCH)
            for epoch in range(spec.train.epochs)
        )
        return [
            [
                task.collate(batch.items.take(cut))
                for cut in cut_microbatches(task.lengths(batch.items), cutting)
            ]
            for batch in itertools.islice(batches, steps)
        ]


def _starter(workers: int, python: str = sys.executable) -> list[str]:
    if workers == 1:
        return [python]
    return [
        python, "-m", "torch.distributed.run", "--standalone",
        "--nproc-per-node", str(workers),
    ]  # fmt: skip


def _run(command: Sequence[str], *, where: Path) -> str:
    run = subprocess.run(
        command,
        cwd=where,
        env=os.environ | {"PYTHONPATH": str(lab.ROOT), "TOKENIZERS_PARALLELISM": "false"},
        capture_output=True,
        text=True,
        check=False,
    )
    if run.returncode:
        sys.stderr.write(run.stderr[-8000:])
        raise SystemExit(f"failed: {' '.join(command)[:200]}")
    return run.stdout


def _flops_of_token(model: str) -> float:
    """Of a forward and a backward pass: six for each weight that is multiplied with every token
    (Kaplan et al. 2020, section 2.1; embeddings are looked up, and attention is left out)."""
    with safetensors.safe_open(Path(model) / "model.safetensors", "numpy") as tensors:
        weights = sum(
            math.prod(tensors.get_slice(name).get_shape())
            for name in tensors.keys()  # noqa: SIM118 - it is no mapping
            if "embeddings" not in name and "pooler" not in name
        )
    return 6.0 * weights


def _peak_flops(device: str, precision: str) -> float:
    """Floating-point operations a second of a product of large matrices, on all of the device."""
    size = 2048 if device == "cpu" else 8192
    kind = torch.bfloat16 if precision == "bfloat16" else torch.float32
    matrix = torch.rand(size, size, device=device, dtype=kind)
    taken = []
    with float32_products(Model(source="bench", precision=precision), matrix.device):
        for _ in range(6):
            began = time.perf_counter()
            _ = matrix @ matrix
            if device == "cuda":
                torch.cuda.synchronize()
            taken.append(time.perf_counter() - began)
    return 2 * size**3 / min(taken[1:])


# --------------------------------------------------------------------------------- what it shows


def _tables(result: dict[str, Any]) -> list[Table]:
    titles = {
        "one_process": f"One process, {result['device']}, {result['steps']} steps of "
        f"{result['global_batch_size']} rows",
        "two_processes": "Two processes, the same micro-batches",
    }
    return [
        _table(
            result[group],
            title=title,
            flops_of_token=result["flops_of_token"],
            peaks=result["peak_flops"],
        )
        for group, title in titles.items()
        if group in result
    ]


def _table(
    variants: dict[str, list[dict[str, Any]]],
    *,
    title: str,
    flops_of_token: float,
    peaks: Mapping[str, float],
) -> Table:
    table = Table(title=title)
    table.add_column("loop")
    first = next(name for name in variants if name.startswith("Shoal"))
    columns = ("rows/s", f"{first} is", "real tokens/s", "padding", "MFU", "memory", "accuracy")
    for name in columns:
        table.add_column(name, justify="right")
    for name, rounds in variants.items():
        ratios = [
            ours["rows_per_second"] / theirs["rows_per_second"]
            for ours, theirs in zip(variants[first], rounds, strict=True)
        ]
        rows = statistics.median(one["rows_per_second"] for one in rounds)
        last = rounds[-1]
        tokens = rows * last["real_tokens"] / (last["steps"] * GLOBAL_BATCH)
        accuracy = statistics.median(one["accuracy"] for one in rounds)
        memory = last["peak_memory_bytes"]
        table.add_row(
            name,
            f"{rows:.1f}",
            "" if name == first else f"{statistics.median(ratios):.2f} x",
            f"{tokens:,.0f}",
            f"{100 * (1 - last['real_tokens'] / last['computed_tokens']):.1f} %",
            f"{100 * tokens * flops_of_token / peaks[last['precision']]:.0f} %",
            "" if memory is None else format_bytes(memory),
            f"{accuracy:.3f}",
        )
    return table


if __name__ == "__main__":
    sys.exit(main())
