"""Shards: rows cut into shards and row groups, written as Parquet, and read for their checksums.

    ShardCutter      tables of any size -> tables of about `shard_bytes`, by rows alone
    encode_shard     a table -> the bytes of a Parquet file, and its report

The same rows give the same bytes, however they were batched before and whichever process works.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import xxhash

from jobs.errors import DataError
from trainers.data.columns import IntArray, label_codes, leaf_paths, row_bytes
from trainers.data.index import CHUNK, Array, Shard
from trainers.data.index_draft import ShardReport

FOOTER_TAIL_BYTES = 8


@dataclass(frozen=True)
class Sizes:
    """How large row groups and shards become; sizes are those of Arrow in memory."""

    rows_per_group: int = 2048
    group_bytes: int = 4 * 2**20
    shard_bytes: int = 64 * 2**20


@dataclass(frozen=True)
class Roles:
    """Which columns mean what."""

    text: str | None = None
    label: str | None = None
    tokens: str | None = None
    """The column of token ids; its lengths are then those of the rows."""


class ShardCutter:
    """Collects rows and hands them out as shards: each ends with the row that fills it."""

    def __init__(self, shard_bytes: int) -> None:
        self._shard_bytes = shard_bytes
        self._held: list[pa.Table] = []
        self.held_bytes = 0

    def add(self, table: pa.Table) -> Iterator[pa.Table]:
        """Take rows; yields the shards that they complete."""
        ends = np.cumsum(row_bytes(table))
        start, taken = 0, 0
        while start < table.num_rows:
            limit = taken + self._shard_bytes - self.held_bytes
            end = int(np.searchsorted(ends, limit, side="left")) + 1
            if end > table.num_rows:
                self._held.append(table.slice(start))
                self.held_bytes += int(ends[-1]) - taken
                return
            self._held.append(table.slice(start, end - start))
            yield self._release()
            start, taken = end, int(ends[end - 1])

    def finish(self) -> Iterator[pa.Table]:
        """Yields the last shard, if any rows are left."""
        if self._held:
            yield self._release()

    def _release(self) -> pa.Table:
        table = pa.concat_tables(self._held)
        self._held, self.held_bytes = [], 0
        return table


def shard_name(number: int) -> str:
    return f"shard-{number:05d}.parquet"


def encode_shard(
    name: str, table: pa.Table, *, sizes: Sizes, roles: Roles
) -> tuple[bytes, ShardReport]:
    """The rows as one Parquet file, and what the index is to say of it."""
    table = table.combine_chunks()
    sizes_of_rows = row_bytes(table)
    bounds = cut_groups(sizes_of_rows, sizes)
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(
        sink,
        table.schema,
        compression=_codecs(table.schema),
        # Texts and tokens hardly repeat as whole values; a dictionary of them is decoded in vain.
        use_dictionary=[roles.label] if roles.label else False,
        # The upper bytes of token ids are alike: beside each other they take next to nothing.
        use_byte_stream_split=leaf_paths(table.schema.field(roles.tokens))
        if roles.tokens
        else False,
        # Footers are read by every rank, and nothing asks for the smallest text.
        write_statistics=False,
    ) as writer:
        for start, end in bounds:
            writer.write_table(table.slice(start, end - start), row_group_size=end - start)
    data: bytes = sink.getvalue().to_pybytes()
    metadata = pq.read_metadata(pa.BufferReader(data))
    ranges = chunk_ranges(metadata, name)
    for record in ranges.reshape(-1):
        start, end = int(record["start"]), int(record["start"] + record["length"])
        record["xxh3"] = xxhash.xxh3_64_intdigest(memoryview(data)[start:end])
    footer = footer_start(data[-FOOTER_TAIL_BYTES:], len(data))
    report = ShardReport(
        shard=Shard(
            name=name,
            num_bytes=len(data),
            footer_start=footer,
            footer_xxh3=xxhash.xxh3_64_intdigest(memoryview(data)[footer:]),
            num_rows=table.num_rows,
            num_groups=len(bounds),
        ),
        group_rows=np.array([end - start for start, end in bounds], np.uint32),
        chunks=ranges,
        max_group_bytes=max(
            _decoded_bytes(sizes_of_rows[start:end], table.schema) for start, end in bounds
        ),
        null_counts=tuple(column.null_count for column in table.columns),
        lengths=row_lengths(table, roles),
        **label_parts(table, roles),
    )
    return data, report


def cut_groups(sizes_of_rows: IntArray, sizes: Sizes) -> list[tuple[int, int]]:
    """Row groups [start, end) within both limits; a row above `group_bytes` has its own."""
    ends = np.cumsum(sizes_of_rows)
    bounds = []
    start = 0
    while start < len(ends):
        before = int(ends[start - 1]) if start else 0
        fitting = int(np.searchsorted(ends, before + sizes.group_bytes, side="right"))
        end = min(max(fitting, start + 1), start + sizes.rows_per_group, len(ends))
        bounds.append((start, end))
        start = end
    return bounds


def _decoded_bytes(sizes_of_rows: IntArray, schema: pa.Schema) -> int:
    """Upper limit for a row group in memory, with a validity bitmap for each leaf.

    `Table.nbytes` is no number to write down: whether a column without nulls has a bitmap depends
    on where its rows come from.
    """
    content = int(sizes_of_rows.sum())
    bitmaps = sum(len(leaf_paths(field) or ()) for field in schema) * (len(sizes_of_rows) // 8 + 9)
    if any(pa.types.is_nested(field.type) for field in schema):
        # The elements of lists have bits too, and at least a byte of content each.
        bitmaps += content // 8
    return content + bitmaps


def chunk_ranges(metadata: pq.FileMetaData, name: str) -> Array:
    """Where the column chunks lie; CHUNK [g, C] with checksums still 0."""
    ranges = np.zeros((metadata.num_row_groups, metadata.num_columns), CHUNK)
    for g in range(metadata.num_row_groups):
        group = metadata.row_group(g)
        for c in range(metadata.num_columns):
            chunk = group.column(c)
            if chunk.file_path:
                raise DataError(f"{name}: its columns lie in other files")
            start = chunk.data_page_offset
            if chunk.has_dictionary_page and 0 < chunk.dictionary_page_offset < start:
                start = chunk.dictionary_page_offset
            ranges[g, c] = (start, chunk.total_compressed_size, 0)
    return ranges


def footer_start(tail: bytes, num_bytes: int) -> int:
    if tail[-4:] != b"PAR1":
        raise ValueError("it does not end as Parquet does")
    start = num_bytes - FOOTER_TAIL_BYTES - int.from_bytes(tail[-8:-4], "little")
    if start < 4:
        raise ValueError("its footer says it is longer than the file")
    return start


def _codecs(schema: pa.Schema) -> dict[str, str]:
    """zstd for all but the bytes of images and the like, which are compressed already."""
    return {
        path: "none" if path.endswith(".bytes") else "zstd"
        for field in schema
        for path in leaf_paths(field) or ()
    }


def row_lengths(table: pa.Table, roles: Roles) -> npt.NDArray[np.uint32] | None:
    if roles.text is None:
        return None
    column = table[roles.tokens or roles.text]
    length = pc.list_value_length(column) if roles.tokens else pc.binary_length(column)
    lengths: npt.NDArray[np.uint32] = length.to_numpy().astype(np.uint32)
    return lengths


def label_parts(table: pa.Table, roles: Roles) -> dict[str, Any]:
    if roles.label is None:
        return {"label_codes": None, "label_values": ()}
    codes, values = label_codes(table[roles.label])
    return {"label_codes": codes, "label_values": tuple(values)}
