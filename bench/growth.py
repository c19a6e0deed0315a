"""What grows with a data set, without its rows: opening an index, and the order of an epoch."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from rich.table import Table

from cluster.storage import join_uri, open_store
from trainers.data.index import CHUNK, Shard, SourceRecord, open_index
from trainers.data.index_draft import DraftFacts, IndexDraft, ShardReport, commit_index
from trainers.data.partition import EpochOrder
from trainers.data.shards import shard_name

GROUPS_OF_SHARD = 8
ROWS_OF_GROUP = 2048
COLUMNS = (("input_ids", "list<element: int32>", (0,)), ("label", "int64", (1,)))


def index_growth(bucket: str, *, shards: int) -> dict[str, Any]:
    """Seconds to open the index of so many shards, and bytes that it holds a row group."""
    uri = join_uri(bucket, f"index-{shards}")
    store = open_store(uri)
    with tempfile.TemporaryDirectory() as scratch:
        draft = IndexDraft(
            Path(scratch),
            DraftFacts(
                COLUMNS,
                None,
                None,
                None,
                SourceRecord(uri=uri, kind="bench", fingerprint=""),
                "bench",
            ),
        )
        for number in range(shards):
            draft.add(_report(number))
        commit_index(store, draft.upload(store, labels=(), split=None))
    started = time.perf_counter()
    index = open_index(open_store(uri))
    seconds = time.perf_counter() - started
    return {
        "shards": shards,
        "row_groups": index.num_groups,
        "open_seconds": seconds,
        "bytes_of_row_group": index.nbytes / index.num_groups,
    }


def _report(number: int) -> ShardReport:
    """A shard that is nowhere: its numbers are as large as those of a real one."""
    chunks = np.zeros((GROUPS_OF_SHARD, len(COLUMNS)), CHUNK)
    return ShardReport(
        shard=Shard(
            name=shard_name(number),
            num_bytes=2**26 + number,
            footer_start=2**26 - 4096,
            footer_xxh3=(number * 0x9E3779B97F4A7C15) % 2**64,
            num_rows=GROUPS_OF_SHARD * ROWS_OF_GROUP,
            num_groups=GROUPS_OF_SHARD,
        ),
        group_rows=np.full(GROUPS_OF_SHARD, ROWS_OF_GROUP, np.uint32),
        chunks=chunks,
        max_group_bytes=2**22,
        null_counts=(0,) * len(COLUMNS),
        lengths=None,
        label_codes=None,
    )


def order_growth(*, rows: int, lanes: int) -> dict[str, Any]:
    """Of one epoch of so many rows: seconds to the order, to any position in it, and memory."""
    group_rows = np.full(-(-rows // ROWS_OF_GROUP), ROWS_OF_GROUP, np.uint32)
    process = psutil.Process()
    before = process.memory_info().rss
    started = time.perf_counter()
    order = EpochOrder(group_rows, seed=7, epoch=3, lanes=lanes, window=16)
    made = time.perf_counter() - started
    held = process.memory_info().rss - before
    slowest = 0.0
    for position in np.linspace(0, order.num_items - 1, 101).astype(np.int64):
        started = time.perf_counter()
        order.rows_at([position])
        slowest = max(slowest, time.perf_counter() - started)
    return {
        "rows": rows,
        "row_groups": len(group_rows),
        "order_seconds": made,
        "slowest_position_seconds": slowest,
        "mib": held / 2**20,
    }


def tables(indexes: list[dict[str, Any]], orders: list[dict[str, Any]]) -> list[Table]:
    index_table = Table(title="Opening an index in S3")
    for name in ("shards", "row groups", "seconds", "bytes a row group"):
        index_table.add_column(name, justify="right")
    for one in indexes:
        index_table.add_row(
            f"{one['shards']:,}",
            f"{one['row_groups']:,}",
            f"{one['open_seconds']:.3f}",
            f"{one['bytes_of_row_group']:.1f}",
        )
    order_table = Table(title="The order of an epoch, one rank")
    for name in ("rows", "seconds to make it", "slowest of 101 positions, s", "MiB"):
        order_table.add_column(name, justify="right")
    for one in orders:
        order_table.add_row(
            f"{one['rows']:,}",
            f"{one['order_seconds']:.3f}",
            f"{one['slowest_position_seconds']:.4f}",
            f"{one['mib']:.1f}",
        )
    return [index_table, order_table]
