"""Rows and real tokens per second of the training loop, beside the usual ways to write it.

    python bench/train.py [--steps N] [--rounds N] [--small] [--json FILE]

MiniLM-L6 learns the sentiment of film reviews: texts of one to four sentences of one kind, cut at
128 tokens. All variants make the same number of optimizer steps with the
same global batch, from the same weights, and are judged on the same test rows:

    naive           every row padded to 128 tokens, the global batch in one pass
    Trainer         Hugging Face's, dynamic padding, or length grouping as well
    Shoal           one process, without Ray
    Shoal, bare     two processes: Shoal under torchrun, and a bare loop over the very same
                    micro-batches, which lie ready in memory

A row's own time is that of the steps after the first two: no start, no evaluation, no checkpoint.

Exit code 1 where variants did not make the same number of steps; nothing about speed is judged.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
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
from jobs.spec import JobSpec
from trainers.data.cache import NodeCache
from trainers.data.partition import fit_window
from trainers.data.prepare import prepare
from trainers.data.prepare_plan import PrepareOptions
from trainers.data.stream import RankStream
from trainers.microbatch import Cutting, cut_microbatches
from trainers.preparation import open_data
from trainers.tasks.task import build_task

LABELS = ("negative", "positive")
MOST_TOKENS = 128
MOST_SENTENCES = 4
GLOBAL_BATCH = 64
TRAINER_BATCH = 32
"""Rows of a pass of the Trainer, which accumulates two: quicker here than one of 64."""
WARM_STEPS = 2
TEST_ROWS = 500
LEARNING_RATE = 2e-4


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, help="optimizer steps; 24, or 4 with --small")
    parser.add_argument("--rounds", type=int, help="3, or 1 with --small")
    arguments = lab.arguments_of(parser)
    steps = arguments.steps or (4 if arguments.small else 24)
    rounds = arguments.rounds or (1 if arguments.small else 3)
    with lab.place() as place:
        model = str(assets.minilm())
        test_rows = 64 if arguments.small else TEST_ROWS
        data = _prepare(place, model, train_rows=steps * GLOBAL_BATCH, test_rows=test_rows)
        variants = _Variants(place, model, data, steps=steps)
        peers = lab.interleaved(
            {
                "naive": variants.naive,
                "Trainer, dynamic padding": partial(variants.trainer, "random"),
                "Trainer, length grouping": partial(variants.trainer, "group_by_length"),
                "Shoal": partial(variants.shoal, 1),
            },
            rounds=rounds,
        )
        pair = lab.interleaved(
            {"Shoal": partial(variants.shoal, 2), "bare": partial(variants.bare, 2)},
            rounds=rounds,
        )
        peak = _peak_flops()
    result = {
        "steps": steps,
        "global_batch_size": GLOBAL_BATCH,
        "data": data,
        "one_process": peers,
        "two_processes": pair,
        "flops_of_token": _flops_of_token(model),
        "peak_flops": peak,
    }
    lab.tell("train", result, tables=_tables(result), json_file=arguments.json)
    made = {one["steps"] for rounds in (*peers.values(), *pair.values()) for one in rounds}
    return 0 if made == {steps} else 1


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


class _Variants:
    """Each method trains once and tells rows per second, tokens and the accuracy."""

    def __init__(self, place: Path, model: str, data: dict[str, str], *, steps: int) -> None:
        self._place, self._model, self._data, self._steps = place, model, data, steps
        self._runs = 0
        self._launch_tokens: int | None = None

    def naive(self) -> dict[str, Any]:
        return self._loop("naive")

    def trainer(self, sampling: str) -> dict[str, Any]:
        python = environments.python_of("accelerate")
        return self._loop("trainer", python=python, sampling=sampling)

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

    def shoal(self, workers: int) -> dict[str, Any]:
        spec = self._job(workers)
        self._runs += 1
        run_id = f"run-{self._runs}"
        file = self._place / f"{run_id}.yaml"
        file.write_text(yaml.safe_dump(spec.model_dump(mode="json", exclude_defaults=True)))
        _run(
            [*_starter(workers), "-m", "trainers", str(file), "--run-id", run_id],
            where=self._place,
        )
        reader = RunReader(open_store(spec.store.uri), run_id)
        lines = [line for line in reader.metrics() if line["kind"] == "train"]
        [attempt] = reader.attempts()
        if workers == 2:
            self._launch_tokens = attempt.launch_tokens
        timed = lines[WARM_STEPS:]
        seconds = timed[-1]["time"] - lines[WARM_STEPS - 1]["time"]
        outcome = reader.outcomes()[attempt.attempt]
        assert outcome.test is not None
        return {
            "rows_per_second": len(timed) * GLOBAL_BATCH / seconds,
            "steps": lines[-1]["step"],
            "real_tokens": sum(line["tokens"] for line in lines),
            "computed_tokens": round(
                sum(line["tokens"] / (1 - line["padding_share"]) for line in lines)
            ),
            "accuracy": outcome.test["metrics"]["accuracy"],
            "launch_tokens": attempt.launch_tokens,
            "seconds": outcome.seconds,
        }

    def _job(self, workers: int) -> JobSpec:
        return parse_spec(
            {
                "name": "bench",
                "task": {"labels": list(LABELS), "max_tokens": MOST_TOKENS},
                "model": {"source": self._model},
                "data": {**self._data, "seed": 7},
                "batching": {"global_batch_size": GLOBAL_BATCH},
                "optimizer": {"learning_rate": LEARNING_RATE},
                "train": {"epochs": 1, "log_every_steps": 1},
                "checkpoint": {"every_steps": 10_000},
                "workers": {"count": workers, "cpus": max(1, (os.cpu_count() or 1) // workers)},
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
            "model": self._model,
            **self._data,
            "place": str(self._place / "trainer"),
            "steps": self._steps,
            "warm_steps": WARM_STEPS,
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
        return json.loads(said.splitlines()[-1])


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
        batches = stream.batches(epoch=0, next_item=0, global_batch_size=GLOBAL_BATCH)
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


def _peak_flops() -> float:
    """Floating-point operations a second of a product of large matrices, on all cores."""
    matrix = torch.rand(2048, 2048)
    _ = matrix @ matrix
    taken = []
    for _ in range(5):
        began = time.perf_counter()
        _ = matrix @ matrix
        taken.append(time.perf_counter() - began)
    return 2 * 2048**3 / min(taken)


# --------------------------------------------------------------------------------- what it shows


def _tables(result: dict[str, Any]) -> list[Table]:
    return [
        _table(
            result["one_process"],
            title=f"One process, {result['steps']} steps of {result['global_batch_size']} rows",
            flops_of_token=result["flops_of_token"],
            peak=result["peak_flops"],
        ),
        _table(
            result["two_processes"],
            title="Two processes, the same micro-batches",
            flops_of_token=result["flops_of_token"],
            peak=result["peak_flops"],
        ),
    ]


def _table(
    variants: dict[str, list[dict[str, Any]]], *, title: str, flops_of_token: float, peak: float
) -> Table:
    table = Table(title=title)
    table.add_column("loop")
    for name in ("rows/s", "Shoal is", "real tokens/s", "padding", "MFU", "accuracy"):
        table.add_column(name, justify="right")
    for name, rounds in variants.items():
        ratios = [
            ours["rows_per_second"] / theirs["rows_per_second"]
            for ours, theirs in zip(variants["Shoal"], rounds, strict=True)
        ]
        rows = statistics.median(one["rows_per_second"] for one in rounds)
        last = rounds[-1]
        tokens = rows * last["real_tokens"] / (last["steps"] * GLOBAL_BATCH)
        accuracy = statistics.median(one["accuracy"] for one in rounds)
        table.add_row(
            name,
            f"{rows:.1f}",
            "" if name == "Shoal" else f"{statistics.median(ratios):.2f} x",
            f"{tokens:,.0f}",
            f"{100 * (1 - last['real_tokens'] / last['computed_tokens']):.1f} %",
            f"{100 * tokens * flops_of_token / peak:.0f} %",
            f"{accuracy:.3f}",
        )
    return table


if __name__ == "__main__":
    sys.exit(main())
