"""Small data sets of any shape, and a store that counts and fails as it is told."""

from __future__ import annotations

import io
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.storage import Head, StorageError, Store
from trainers.data.cache import NodeCache
from trainers.data.columns import column_facts
from trainers.data.index import Index, SourceRecord, open_index
from trainers.data.index_draft import DraftFacts, IndexDraft, commit_index
from trainers.data.inspection import inspect_shard, shard_schema
from trainers.data.shards import Roles

MakeRows = Callable[[range], pa.Table]
WriteSet = Callable[..., Index]


def rows_table(ids: range) -> pa.Table:
    """Rows whose content tells their id: `row` is it, `tokens` are id % 7 times the id."""
    numbers = np.array(ids, dtype=np.int64)
    lengths = numbers % 7
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    values = np.repeat(numbers, lengths).astype(np.int32)
    return pa.table(
        {
            "unused": pa.array([f"text {n}" * 20 for n in ids], pa.string()),
            "row": pa.array(numbers),
            "tokens": pa.ListArray.from_arrays(pa.array(offsets), pa.array(values)),
            "label": pa.array([("a", "b")[n % 2] for n in ids], pa.string()),
        }
    )


def parquet_bytes(make: MakeRows, first_row: int, groups: list[int], **options: object) -> bytes:
    """A Parquet file with row groups of these sizes."""
    sink = io.BytesIO()
    with pq.ParquetWriter(sink, make(range(0)).schema, **options) as writer:
        for rows in groups:
            table = make(range(first_row, first_row + rows))
            writer.write_table(table, row_group_size=max(1, rows))
            first_row += rows
    return sink.getvalue()


@pytest.fixture
def write_set(tmp_path_factory: pytest.TempPathFactory) -> WriteSet:
    """write_set(store, [[3, 1], [4]]): two shards, of two row groups and of one, and an index."""

    def write(
        store: Store, shards: list[list[int]], make: MakeRows = rows_table, **options: object
    ) -> Index:
        names = [f"shard-{number:05d}.parquet" for number in range(len(shards))]
        first_row = 0
        for name, groups in zip(names, shards, strict=True):
            store.write(name, parquet_bytes(make, first_row, groups, **options))
            first_row += sum(groups)
        schema = shard_schema(store, names[0])
        facts = DraftFacts(
            columns=column_facts(schema),
            text_column=None,
            label_column=None,
            tokenizer=None,
            source=SourceRecord(uri=store.uri, kind="parquet", fingerprint=""),
            made_by="a test",
        )
        with closing(IndexDraft(tmp_path_factory.mktemp("draft"), facts)) as draft:
            for name in names:
                draft.add(inspect_shard(store, name, schema=schema, roles=Roles()))
            commit_index(store, draft.upload(store, labels=(), split=None))
        return open_index(store)

    return write


class WatchedStore:
    """Passes on to a store, notes every ranged read, and fails where `fail_when` says so."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.reads: list[tuple[str, int, int]] = []
        self.fail_when: Callable[[str, int], bool] = lambda key, number: False
        """(key, number of this read) -> whether the store is down."""

    def read_range(self, key: str, *, start: int, end: int) -> bytes:
        if self.fail_when(key, len(self.reads)):
            raise StorageError("the store does not answer")
        self.reads.append((key, start, end))
        return self.store.read_range(key, start=start, end=end)

    def head(self, key: str) -> Head | None:
        if self.fail_when(key, len(self.reads)):
            raise StorageError("the store does not answer")
        return self.store.head(key)

    def __getattr__(self, name: str) -> object:
        return getattr(self.store, name)

    def shard_reads(self) -> list[tuple[str, int, int]]:
        return [read for read in self.reads if read[0].endswith(".parquet")]


@pytest.fixture
def watched() -> Callable[[Store], WatchedStore]:
    return WatchedStore


@pytest.fixture
def cache(tmp_path: Path) -> NodeCache:
    return NodeCache(tmp_path / "cache", limit_bytes=2**30)


@pytest.fixture
def table_of() -> Callable[[range], pa.Table]:
    return rows_table
