"""One reader of bench/stream.py, in a process and an environment of its own.

    python -m readers LIBRARY write --source URI --to URI
    python -m readers LIBRARY read --data URI --cache FOLDER --seconds N [--from-row N]
                                   [--rank N --world-size N]

`write` stores the rows of a folder of Parquet files in the library's own format. `read` prints one
line of JSON: the seconds from the call that opens the data set to its first batch, rows and tokens,
and rows a second after the first batch and from the opening on: what is read ahead of the first
batch flatters the former where the data set is small. Imports are done before the clock starts, and
of several ranks, which share a cache, all begin when the last one is ready.
"""

from __future__ import annotations

import argparse
import importlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from readers.batching import Batch, Reading

MOST_WAIT_SECONDS = 120.0


def main() -> None:
    parser = argparse.ArgumentParser(prog="readers")
    parser.add_argument("library")
    parser.add_argument("what", choices=("write", "read"))
    parser.add_argument("--source")
    parser.add_argument("--to")
    parser.add_argument("--data")
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--seconds", type=float, help="end so long after the first batch")
    parser.add_argument("--from-row", type=int, default=0)
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--world-size", type=int, default=1)
    arguments = parser.parse_args()
    library = importlib.import_module(f"readers.{arguments.library}")
    if arguments.what == "write":
        library.write(arguments.source, arguments.to)
        return
    reading = Reading(
        arguments.data,
        arguments.cache,
        from_row=arguments.from_row,
        rank=arguments.rank,
        world_size=arguments.world_size,
    )
    if reading.world_size > 1:
        _meet(reading)
    print(json.dumps(measured(library, reading, most_seconds=arguments.seconds)))


def measured(library: Any, reading: Reading, *, most_seconds: float) -> dict[str, float]:
    made_before = library.setup(reading.data) if hasattr(library, "setup") else {}
    started = time.perf_counter()
    batches: Iterator[Batch] = library.batches(reading, **made_before)
    rows, tokens = _size(next(batches))
    opened = time.perf_counter()
    rows_of_first = rows
    is_whole = True
    for batch in batches:
        more = _size(batch)
        rows, tokens = rows + more[0], tokens + more[1]
        if time.perf_counter() - opened > most_seconds:
            is_whole = False
            break
    ended = time.perf_counter()
    return {
        "first_batch_seconds": opened - started,
        "rows": rows,
        "tokens": tokens,
        "is_whole": is_whole,
        "rows_per_second": (rows - rows_of_first) / (ended - opened),
        "rows_per_second_from_open": rows / (ended - started),
    }


def _meet(reading: Reading) -> None:
    """Returns when all ranks have come here."""
    (reading.cache / f"ready-{reading.rank}").touch()
    deadline = time.monotonic() + MOST_WAIT_SECONDS
    while len(list(reading.cache.glob("ready-*"))) < reading.world_size:
        if time.monotonic() > deadline:
            raise SystemExit("the other ranks have not come")
        time.sleep(0.005)


def _size(batch: Batch) -> tuple[int, int]:
    """Rows and tokens of a batch."""
    return len(batch["label"]), int(batch["attention_mask"].sum())


if __name__ == "__main__":
    main()
