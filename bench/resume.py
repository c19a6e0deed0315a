"""Does a resume cost the same anywhere in an epoch? Seconds from the start of ranks to their step.

    python bench/resume.py [--rows N] [--rounds N] [--small] [--json FILE]

A run is killed right after a checkpoint at 1 %, at 50 % or at 99 % of its first epoch; then it is
resumed from there, again and again, by two ranks on a node that has nothing in its cache. A resume
begins with the start of the ranks and ends with their first step; Python's imports are done by
then. Data and checkpoints are in a real S3 server.

Exit code 1 where it takes longer at 99 % than at 1 %, by more than medians differ from one run of
this to the next (1.1 times); in the small size nothing is judged.
"""

from __future__ import annotations

import argparse
import itertools
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lab
from rich.table import Table

from cluster import embedded
from cluster.storage import join_uri, open_store
from jobs.record import RunPaths
from jobs.spec import JobSpec
from tests.ranks import Kill, assignment_of, run_ranks
from tests.tiny import prepare_rows, review_rows, tiny_job, tiny_model
from trainers.records import read_attempts

PARTS = {"1 %": 0.01, "50 %": 0.5, "99 %": 0.99}
SMALL_PARTS = ("1 %", "99 %")
STEPS = 100
"""Of an epoch."""
GROUPS = 200
WORKERS = 2
MOST_RATIO = 1.1
"""One, and what medians differ by from one run of this to the next."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rows", type=int, help="of the epoch; 200000, or 4000 with --small")
    parser.add_argument("--rounds", type=int, help="9, or 1 with --small")
    arguments = lab.arguments_of(parser)
    rows = arguments.rows or (4_000 if arguments.small else 200_000)
    rounds = arguments.rounds or (1 if arguments.small else 9)
    with lab.place() as place, lab.object_store(place):
        os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"
        parts = SMALL_PARTS if arguments.small else tuple(PARTS)
        seconds = measure(place, parts, rows=rows, rounds=rounds)
    result = {
        "rows": rows,
        "steps": STEPS,
        "rounds": rounds,
        "seconds": seconds,
        "spread": {part: lab.spread(values) for part, values in seconds.items()},
    }
    result["ratio_99_to_1"] = round(
        result["spread"]["99 %"]["median"] / result["spread"]["1 %"]["median"], 3
    )
    result["is_right"] = arguments.small or result["ratio_99_to_1"] <= MOST_RATIO
    lab.tell("resume", result, tables=[table_of(result)], json_file=arguments.json)
    sys.exit(0 if result["is_right"] else 1)


def measure(place: Path, parts: Sequence[str], *, rows: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of each resume, by where it begins."""
    bucket = f"s3://{embedded.DEFAULT_BUCKET}"
    model = tiny_model(place / "model")
    data = prepare_rows(
        join_uri(bucket, "data"), review_rows(rows), rows_per_group=rows // GROUPS,
        rows_per_shard=rows // 10,
    )  # fmt: skip
    resumes: dict[str, Callable[[], float]] = {}
    for part in parts:
        step = round(PARTS[part] * STEPS)
        spec = tiny_job(
            model,
            {"train": data, "seed": 3, "window": 4},
            join_uri(bucket, f"runs-{step}"),
            batching={"global_batch_size": rows // STEPS, "max_tokens_per_microbatch": 16384},
            train={"epochs": 1},
            checkpoint={"every_steps": step},
            workers={"count": WORKERS},
        )
        run_ranks(assignment_of(spec, "run"), world_size=WORKERS, kill=Kill("manifest", 1))
        generations = itertools.count(2)
        resumes[part] = partial(resume, place, spec, generations)
    if rounds > 1:
        for each in resumes.values():
            each()  # What Python loads late, and the first pages of the store, are of no interest.
    return lab.interleaved(resumes, rounds=rounds)


def resume(place: Path, spec: JobSpec, generations: Any) -> float:
    """Seconds until the first step is done; the ranks are killed right then."""
    cache = Path(os.environ["SHOAL_CACHE"])
    shutil.rmtree(cache, ignore_errors=True)
    assignment = assignment_of(spec, "run", generation=next(generations))
    began = time.monotonic()
    run_ranks(assignment, world_size=WORKERS, kill=Kill("step", 1))
    seconds = time.monotonic() - began
    last = read_attempts(open_store(spec.store.uri), RunPaths("run"))[-1]
    if last.restored_step != spec.checkpoint.every_steps:
        raise SystemExit(f"a resume went on from step {last.restored_step}")
    return round(seconds, 4)


def table_of(result: dict[str, Any]) -> Table:
    table = Table(
        title=f"Resuming an epoch of {result['rows']:,} rows ({result['steps']} steps, "
        f"{WORKERS} ranks, nothing in the cache)",
        caption=f"99 % against 1 %: {result['ratio_99_to_1']:.2f}",
        title_justify="left",
    )
    for name in ("resumed at", "s to the first step", "fastest", "slowest"):
        table.add_column(name, justify="right")
    for part, spread in result["spread"].items():
        table.add_row(part, *(f"{spread[key]:.2f}" for key in ("median", "min", "max")))
    return table


if __name__ == "__main__":
    main()
