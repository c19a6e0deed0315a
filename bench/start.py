"""From the command to the first optimizer step, and from the last one to its end, beside Ray Train.

    python bench/start.py [--rounds N] [--small] [--json FILE]

`shoal run` and a bare TorchTrainer script (bench/plain_ray_train.py) fine-tune the same model on
the same rows, which lie in a real S3 server, with two workers on this machine, in turns. Both start
Ray themselves, make as many steps, and store a checkpoint at the end. Nothing is cached on the disk
but what the system keeps of files by itself; the server has the lowest share of the processors.

    first step      seconds from the command to the first optimizer step of any worker
    after the last  seconds from the last optimizer step to the end of the command

Of Shoal's end is told what it goes to, by the run's account, and what comes after the last object
that it stores, the run's result.

Exit code 1 where a side made another number of steps; nothing about speed is judged.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lab
import yaml
from rich.table import Table

from cluster.storage import join_uri, open_store
from examples import assets
from jobs.foreground import kill_tree
from jobs.runs import RunReader
from jobs.status import read_status
from tests.tiny import LABELS, MAX_TOKENS, tiny_model, tiny_reviews, tiny_tree
from trainers.data.prepare import prepare
from trainers.data.prepare_plan import PrepareOptions

HERE = Path(__file__).parent
WORKERS = 2
GLOBAL_BATCH = 16
STEPS = 10
WAIT_SECONDS = 300
LOOK_SECONDS = 0.02


@dataclass(frozen=True)
class Start:
    """One command."""

    first_step_seconds: float
    after_last_seconds: float
    after_result_seconds: float | None
    """What of that comes after the last durable object; None for the plain loop."""
    steps: int
    account: dict[str, float] | None
    """Seconds of the run by purpose; None for the plain loop."""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, help="5, or 1 with --small")
    arguments = lab.arguments_of(parser)
    rounds = arguments.rounds or (1 if arguments.small else 5)
    with lab.place() as place, lab.object_store(place, gives_way=True) as bucket:
        arena = Arena(place, bucket, is_small=arguments.small)
        measured = lab.interleaved(
            {"shoal": arena.shoal, "plain": arena.plain},
            rounds=rounds,
        )
    result = summary(measured)
    lab.tell("start", result, tables=tables(result), json_file=arguments.json)
    return 0 if result["is_right"] else 1


# ------------------------------------------------------------------------------------ both sides


class Arena:
    """A model and data, and a command for each side."""

    def __init__(self, place: Path, bucket: str, *, is_small: bool) -> None:
        self._place = place
        self._bucket = bucket
        self._numbers = itertools.count(1)
        rows = STEPS * GLOBAL_BATCH
        if is_small:
            self._model = tiny_model(place / "model")
            self._data = tiny_reviews(
                join_uri(bucket, "data"), rows=rows, rows_per_group=rows, held_out=16
            )["train"]
        else:
            self._model = assets.minilm()
            self._data = self._reviews(rows)

    def _reviews(self, rows: int) -> str:
        lines = assets.movie_sentences().read_text(encoding="utf-8").splitlines()[:rows]
        source = self._place / "reviews.jsonl"
        source.write_text("\n".join(lines) + "\n", encoding="utf-8")
        uri = join_uri(self._bucket, "data")
        prepare(PrepareOptions(source=str(source), to=uri))
        return uri

    def shoal(self) -> Start:
        run_id = f"run-{next(self._numbers)}"
        runs = join_uri(self._bucket, "runs")
        tree = tiny_tree(
            self._model,
            {"train": self._data, "seed": 3},
            runs,
            batching={"global_batch_size": GLOBAL_BATCH},
            optimizer={"learning_rate": 3e-5, "schedule": "constant"},
            train={"epochs": 1},
            checkpoint={"every_steps": 10_000},
            workers={"count": WORKERS},
        )
        job = self._place / f"{run_id}.yaml"
        job.write_text(yaml.safe_dump(tree))
        reader = RunReader(open_store(runs), run_id)
        began, ended, steps, stored = self._timed(
            [sys.executable, "-m", "jobs.cli", "run", str(job), "--run-id", run_id],
            run_id,
            is_stored=lambda: reader.result() is not None,
        )
        account = dict(read_status(reader).account.seconds)
        assert stored is not None
        step = reader.outcomes()[1].step
        return Start(steps[0] - began, ended - steps[-1], ended - stored, step, account)

    def plain(self) -> Start:
        run_id = f"plain-{next(self._numbers)}"
        config = {
            "model": str(self._model), "labels": LABELS, "max_tokens": MAX_TOKENS,
            "rows": join_uri(self._data, "shard-00000.parquet"),
            "global_batch_size": GLOBAL_BATCH, "workers": WORKERS,
            "learning_rate": 3e-5, "checkpoint_every": STEPS, "steps": STEPS, "name": run_id,
            "storage": join_uri(self._bucket, "plain"), "starts": str(self._place / "starts"),
        }  # fmt: skip
        began, ended, steps, _ = self._timed(
            [sys.executable, str(HERE / "plain_ray_train.py"), json.dumps(config)], run_id
        )
        return Start(steps[0] - began, ended - steps[-1], None, len(steps) // WORKERS, None)

    def _timed(
        self,
        command: list[str],
        name: str,
        *,
        is_stored: Callable[[], bool] | None = None,
    ) -> tuple[float, float, list[float], float | None]:
        """When a command began and ended, its steps, and when its last object was stored; Unix
        seconds."""
        clock, said = self._place / f"{name}-steps", self._place / f"{name}.log"
        clock.mkdir()
        paths = [str(HERE / "step_clock"), str(lab.ROOT), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(path for path in paths if path),
            "SHOAL_BENCH_STEPS": str(clock),
            "SHOAL_CACHE": str(self._place / f"{name}-cache"),
        }
        stored = None
        began = time.time()
        with said.open("wb") as log:
            process = subprocess.Popen(
                command, cwd=self._place, env=environment, stdout=log, stderr=subprocess.STDOUT
            )
            while process.poll() is None:
                if time.time() > began + WAIT_SECONDS:
                    kill_tree(process.pid)
                # Not before: each look costs both sides' processors something.
                if is_stored and stored is None and _is_over(clock) and is_stored():
                    stored = time.time()
                time.sleep(LOOK_SECONDS)
        ended = time.time()
        if process.returncode:
            sys.stderr.write(said.read_text(errors="replace")[-8000:])
            raise SystemExit(f"{name} failed")
        steps = sorted(itertools.chain(*map(_times_of, clock.iterdir())))
        return began, ended, steps, stored


def _is_over(clock: Path) -> bool:
    return any(len(_times_of(file)) >= STEPS for file in clock.iterdir())


def _times_of(file: Path) -> list[float]:
    return [float(line) for line in file.read_text().split("\n")[:-1]]


# --------------------------------------------------------------------------------- what it shows


def summary(measured: dict[str, list[Start]]) -> dict[str, Any]:
    found: dict[str, Any] = {"steps": STEPS, "workers": WORKERS, "runs": {}, "medians": {}}
    for name, starts in measured.items():
        found["runs"][name] = [asdict(start) for start in starts]
        found["medians"][name] = {
            key: statistics.median(getattr(start, key) for start in starts)
            for key in ("first_step_seconds", "after_last_seconds")
        }
    of_both = partial(zip, measured["shoal"], measured["plain"], strict=True)
    found["ratios"] = {
        key: round(statistics.median(getattr(a, key) / getattr(b, key) for a, b in of_both()), 3)
        for key in found["medians"]["shoal"]
    }
    found["after_result_seconds"] = statistics.median(
        start.after_result_seconds or 0.0 for start in measured["shoal"]
    )
    found["is_right"] = all(s.steps == STEPS for starts in measured.values() for s in starts)
    return found


def tables(result: dict[str, Any]) -> list[Table]:
    rounds = len(result["runs"]["shoal"])
    table = Table(title=f"{WORKERS} workers, {STEPS} steps; medians of {rounds} rounds, in seconds")
    for name, justify in (("", "left"), ("Shoal", "right"), ("plain", "right"), ("ratio", "right")):
        table.add_column(name, justify=justify)
    ours, plain = result["medians"]["shoal"], result["medians"]["plain"]
    for key, title in (
        ("first_step_seconds", "command to first step"),
        ("after_last_seconds", "last step to the command's end"),
    ):
        table.add_row(
            title, f"{ours[key]:.1f}", f"{plain[key]:.1f}", f"{result['ratios'][key]:.2f}"
        )
    accounts = [run["account"] for run in result["runs"]["shoal"]]
    for purpose, title in (
        ("evaluation", "evaluation"),
        ("checkpoint", "the last checkpoint, until it is durable"),
        ("finish", "end of the workers and of Ray, report, result"),
    ):
        seconds = statistics.median(account[purpose] for account in accounts)
        table.add_row(f"  of it {title}", f"{seconds:.1f}", "", "")
    table.add_row(
        "  of it after the last durable object", f"{result['after_result_seconds']:.1f}", "", ""
    )
    return [table]


if __name__ == "__main__":
    sys.exit(main())
