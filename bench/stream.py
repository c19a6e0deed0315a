"""Rows per second from S3 into padded, shuffled batches, beside the alternatives and the limits.

    python bench/stream.py [--rows N] [--rounds N] [--readers NAME,...] [--small] [--json FILE]

400,000 tokenized rows of 65 tokens on average lie in a real S3 server: as `shoal prepare` writes
them, and in the formats of the peers that have their own. Each reader runs in a process of its own,
in turns, and makes batches of 64 rows, padded to the longest of them:

    cold     nothing on the local disk
    warm     the same again, with what the cold pass has left there
    resume   nothing on the local disk, 90 % of the epoch already used: seconds to the first batch

A pass ends after 15 seconds. Raw GETs of the same bytes, and pyarrow's own reader without
shuffling, are the limits. Then several ranks of one node read at once.

Exit code 1 where a reader lost rows or tokens; nothing about speed is judged.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import environments
import lab
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from rich.table import Table

from cluster.storage import join_uri, open_store
from tests.tiny import tiny_tokenizer
from trainers.data.index import open_index, row_lengths
from trainers.data.prepare import prepare
from trainers.data.prepare_plan import PrepareOptions

MOST_TOKENS = 128
MEAN_TOKENS = 65
WORDS = 20_000
LONGEST_PASS = 15.0
"""Seconds."""
RESUMED_AT = 0.9
RANKS = (1, 2, 4)


@dataclass(frozen=True)
class Reader:
    """A way to read the data set."""

    name: str
    module: str
    package: str | None = None
    """On PyPI, into an environment of its own; None: this Python has it."""
    own_format: bool = False
    resumes: bool = False
    is_limit: bool = False


SHOAL = Reader("Shoal", "shoal", resumes=True)
READERS = (
    SHOAL,
    Reader("Ray Data", "ray_data"),
    Reader("datasets, streaming", "hugging_face", "s3fs", resumes=True),
    Reader(
        "MosaicML Streaming",
        "mosaic_streaming",
        "mosaicml-streaming",
        own_format=True,
        resumes=True,
    ),
    Reader("LitData", "lit_data", "litdata", own_format=True, resumes=True),
    Reader("WebDataset", "web_dataset", "webdataset", own_format=True),
    Reader("raw GET", "raw_get", is_limit=True),
    Reader("pyarrow, unshuffled", "pyarrow_read", is_limit=True),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rows", type=int, help="400000, or 20000 with --small")
    parser.add_argument("--rounds", type=int, help="3, or 1 with --small")
    parser.add_argument(
        "--readers", default="", help="modules of bench/readers beside shoal; default: all"
    )
    arguments = lab.arguments_of(parser)
    rows = arguments.rows or (20_000 if arguments.small else 400_000)
    rounds = arguments.rounds or (1 if arguments.small else 3)
    wanted = arguments.readers.split(",") if arguments.readers else [r.module for r in READERS]
    readers = [r for r in READERS if r.module in {"shoal", *wanted}]
    with lab.place() as place, lab.object_store(place) as bucket:
        data = prepare_rows(place, bucket, readers, rows=rows)
        result = _measure(
            place, data, readers, rows=rows, rounds=rounds,
            ranks_at_once=RANKS[1:2] if arguments.small else RANKS,
        )  # fmt: skip
    lab.tell("stream", result, tables=_tables(result), json_file=arguments.json)
    return 0 if result["is_right"] else 1


# ------------------------------------------------------------------------------------- the data


def prepare_rows(
    place: Path, bucket: str, readers: Sequence[Reader], *, rows: int
) -> dict[str, str]:
    """URI of the data set of each reader."""
    source = place / "source"
    source.mkdir()
    words = [f"word{number}" for number in range(WORDS)]
    _write_texts(source, words, rows=rows)
    tokenizer = tiny_tokenizer(place / "tokenizer", words=[*_SPECIAL, *words])
    shoal = join_uri(bucket, "shoal")
    prepare(
        PrepareOptions(
            source=str(source), to=shoal, tokenizer=str(tokenizer), max_tokens=MOST_TOKENS
        )
    )
    shutil.rmtree(source)
    for reader in readers:
        if reader.own_format:
            to = join_uri(bucket, reader.module)
            _run(reader, "write", "--source", shoal, "--to", to)
    return {
        reader.module: join_uri(bucket, reader.module) if reader.own_format else shoal
        for reader in readers
    }


_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def _write_texts(folder: Path, words: Sequence[str], *, rows: int) -> None:
    """Parquet files of `text` and `label`; words as frequent as Zipf's law has it."""
    rng = np.random.default_rng(0)
    names = pa.array(words)
    for number, start in enumerate(range(0, rows, 50_000)):
        count = min(50_000, rows - start)
        lengths = np.clip(rng.gamma(4.0, MEAN_TOKENS / 4, count), 6, MOST_TOKENS).astype(int) - 2
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        drawn = (len(words) ** rng.random(offsets[-1])).astype(np.int64) - 1
        texts = pc.binary_join(
            pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), names.take(pa.array(drawn))),
            " ",
        )
        labels = pa.array(rng.integers(0, 2, count))
        pq.write_table(pa.table({"text": texts, "label": labels}), folder / f"{number:03d}.parquet")


# ---------------------------------------------------------------------------------- the reading


def _measure(
    place: Path,
    data: dict[str, str],
    readers: Sequence[Reader],
    *,
    rows: int,
    rounds: int,
    ranks_at_once: Sequence[int],
) -> dict[str, Any]:
    index = open_index(open_store(data["shoal"]))
    passes = lab.interleaved(
        {r.module: partial(_passes, place, r, data[r.module], rows=rows) for r in readers},
        rounds=rounds,
    )
    ranks = lab.interleaved(
        {str(n): partial(read_by_ranks, place, data["shoal"], n) for n in ranks_at_once},
        rounds=rounds,
    )
    lengths = row_lengths(open_store(data["shoal"]), index, start=0, end=rows)
    assert lengths is not None
    tokens = int(lengths.sum())
    result = {
        "rows": rows,
        "tokens": tokens,
        "shards": index.num_shards,
        "row_groups": index.num_groups,
        "stored_bytes": index.record.bytes,
        "peers": {
            r.package: environments.installed_version(r.package) for r in readers if r.package
        },
        "passes": passes,
        "ranks": ranks,
    }
    return result | {"is_right": is_right(result)}


def is_right(result: dict[str, Any]) -> bool:
    """Whether passes to the end gave all rows and tokens, but for that which makes no batches."""
    whole = [
        one
        for module, rounds in result["passes"].items()
        if module != "raw_get"
        for passes in rounds
        for what, one in passes.items()
        if what != "resume" and one["is_whole"]
    ]
    shared = [one for rounds in result["ranks"].values() for one in rounds]
    return bool(whole) and all(
        (one["rows"], one["tokens"]) == (result["rows"], result["tokens"])
        for one in [*whole, *shared]
    )


def _passes(place: Path, reader: Reader, data: str, *, rows: int) -> dict[str, Any]:
    """One round of a reader: a cold pass, a warm one where it keeps something, and a resume."""
    with empty_cache(place) as cache:
        passes = {"cold": read(reader, data, cache)}
        if any(cache.iterdir()):
            passes["warm"] = read(reader, data, cache)
    if reader.resumes:
        with empty_cache(place) as cache:
            passes["resume"] = read(
                reader, data, cache, "--from-row", str(int(rows * RESUMED_AT)), seconds=0.0
            )
    return passes


def read_by_ranks(place: Path, data: str, world_size: int) -> dict[str, float]:
    """Rows per second of all ranks together, on one node with one cache, from a cold start.

    They begin at the same time, and the last one to end counts. From the opening on: with more
    ranks a larger share of the rows is there at the first batch.
    """
    with empty_cache(place) as cache, ThreadPoolExecutor(world_size) as pool:
        parts = list(
            pool.map(
                lambda rank: read(
                    SHOAL, data, cache, "--rank", str(rank), "--world-size", str(world_size),
                    seconds=600.0,
                ),
                range(world_size),
            )
        )  # fmt: skip
    rows = sum(part["rows"] for part in parts)
    return {
        "rows": rows,
        "tokens": sum(part["tokens"] for part in parts),
        "rows_per_second": rows
        / max(part["rows"] / part["rows_per_second_from_open"] for part in parts),
        "first_batch_seconds": max(part["first_batch_seconds"] for part in parts),
    }


@contextmanager
def empty_cache(place: Path) -> Iterator[Path]:
    """A folder for what a reader keeps on the local disk."""
    folder = place / "read-cache"
    folder.mkdir()
    yield folder
    shutil.rmtree(folder)


def read(
    reader: Reader, data: str, cache: Path, *options: str, seconds: float = LONGEST_PASS
) -> dict[str, Any]:
    """What one pass has measured, which ends so long after its first batch."""
    said = _run(
        reader, "read", "--data", data, "--cache", str(cache), "--seconds", str(seconds), *options
    )
    measured: dict[str, Any] = json.loads(said.splitlines()[-1])
    return measured


def _run(reader: Reader, *arguments: str) -> str:
    """What a reader's process says; it runs in the environment of its package."""
    python = environments.python_of(reader.package) if reader.package else sys.executable
    paths = os.pathsep.join([str(lab.ROOT / "bench"), str(lab.ROOT)])
    run = subprocess.run(
        [python, "-m", "readers", reader.module, *arguments],
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )
    if run.returncode:
        sys.stderr.write(run.stderr[-8000:])
        raise SystemExit(f"{reader.name} failed")
    return run.stdout


# --------------------------------------------------------------------------------- what it shows


def _tables(result: dict[str, Any]) -> list[Table]:
    passes = result["passes"]
    table = Table(
        title=f"{result['rows']:,} rows of {result['tokens'] / result['rows']:.0f} tokens, padded "
        f"batches of 64, one rank; {result['row_groups']} row groups in {result['shards']} shards",
        caption=", ".join(f"{name} {version}" for name, version in result["peers"].items()),
    )
    table.add_column("reader")
    for name in (
        "rows/s, cold", "Shoal is", "from the open", "rows/s, warm", "first batch, s",
        "resumed at 90 %, s",
    ):  # fmt: skip
        table.add_column(name, justify="right")
    for reader in READERS:
        if reader.module not in passes:
            continue
        rounds = passes[reader.module]
        ratios = [
            ours["cold"]["rows_per_second"] / theirs["cold"]["rows_per_second"]
            for ours, theirs in zip(passes["shoal"], rounds, strict=True)
        ]
        table.add_row(
            reader.name,
            _median(rounds, "cold", "rows_per_second", "{:,.0f}"),
            "" if reader.module == "shoal" else f"{statistics.median(ratios):.2f} x",
            _median(rounds, "cold", "rows_per_second_from_open", "{:,.0f}"),
            _median(rounds, "warm", "rows_per_second", "{:,.0f}"),
            _median(rounds, "cold", "first_batch_seconds", "{:.2f}"),
            _median(rounds, "resume", "first_batch_seconds", "{:.2f}"),
            style="dim" if reader.is_limit else None,
        )
    shared = Table(title="Shoal, several ranks of one node, cold")
    for name in ("ranks", "rows/s together, from the open", "first batch, s"):
        shared.add_column(name, justify="right")
    for number, rounds in result["ranks"].items():
        shared.add_row(
            number,
            f"{statistics.median(one['rows_per_second'] for one in rounds):,.0f}",
            f"{statistics.median(one['first_batch_seconds'] for one in rounds):.2f}",
        )
    return [table, shared]


def _median(rounds: Sequence[dict[str, Any]], what: str, key: str, form: str) -> str:
    values = [passes[what][key] for passes in rounds if what in passes]
    return form.format(statistics.median(values)) if values else ""


if __name__ == "__main__":
    sys.exit(main())
