"""Parquet files that are there already: what an index is to say of them, from one reading.

shard_schema     the schema of a file, from its footer
inspect_shard    its report: every byte of its columns is read once, a row group at a time
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from cluster.storage import Store
from jobs.errors import DataError, Problem
from trainers.data.columns import LabelValue, check_same_schema, first_null
from trainers.data.index import Array, Shard
from trainers.data.index_draft import ShardReport
from trainers.data.shards import (
    FOOTER_TAIL_BYTES,
    Roles,
    chunk_ranges,
    footer_start,
    label_parts,
    row_lengths,
)

_FIRST_READ_BYTES = 2**16


def shard_schema(store: Store, name: str) -> pa.Schema:
    """Schema of a Parquet file, without metadata; DataError where its footer is broken."""
    return _PartialFile.open(store, name).metadata.schema.to_arrow_schema().remove_metadata()


def inspect_shard(store: Store, name: str, *, schema: pa.Schema, roles: Roles) -> ShardReport:
    """The report of a Parquet file that is there: reads each byte once, a row group at a time.

    Raises DataError where the file is broken, has another schema, or has a null text or label.
    """
    file = _PartialFile.open(store, name)
    metadata = file.metadata
    found = metadata.schema.to_arrow_schema().remove_metadata()
    check_same_schema(found, schema, f"{store.uri}/{name}")
    ranges = chunk_ranges(metadata, name)
    lengths, codes = [], []
    values: dict[LabelValue, int] = {}
    null_counts = np.zeros(len(schema), np.int64)
    max_group_bytes = 0
    first_row = 0
    for group in range(metadata.num_row_groups):
        for record, data in zip(ranges[group], file.fetch(ranges[group]), strict=True):
            record["xxh3"] = xxhash.xxh3_64_intdigest(data)
        table = file.read_row_group(group)
        max_group_bytes = max(max_group_bytes, table.nbytes)
        for role, column in (("text", roles.text), ("label", roles.label)):
            if column is not None and table[column].null_count:
                row = first_row + first_null(table[column]) + 1
                raise DataError(
                    Problem(
                        f"{store.uri}/{name}: {column} ({role}) is null in "
                        f"{table[column].null_count} rows of row group {group}, the first of them "
                        f"row {row} of the file",
                        "rows can only be left out of a copy: shoal prepare "
                        f"{store.uri} --to URI --on-null drop",
                    )
                )
        null_counts += [column.null_count for column in table.columns]
        lengths.append(row_lengths(table, roles))
        labels = label_parts(table, roles)
        if labels["label_codes"] is not None:
            known = [values.setdefault(v, len(values)) for v in labels["label_values"]]
            codes.append(np.array([*known, -1], np.int32)[labels["label_codes"]])
        first_row += table.num_rows
    group_rows = [metadata.row_group(g).num_rows for g in range(metadata.num_row_groups)]
    return ShardReport(
        shard=Shard(
            name=name,
            num_bytes=file.num_bytes,
            footer_start=file.footer_start,
            footer_xxh3=xxhash.xxh3_64_intdigest(file.footer),
            num_rows=metadata.num_rows,
            num_groups=metadata.num_row_groups,
        ),
        group_rows=np.array(group_rows, np.uint32),
        chunks=ranges,
        max_group_bytes=max_group_bytes,
        null_counts=tuple(null_counts.tolist()),
        lengths=_joined(lengths, np.uint32) if roles.text else None,
        label_codes=_joined(codes, np.int32) if roles.label else None,
        label_values=tuple(values),
    )


class _PartialFile(io.RawIOBase):
    """A Parquet file of which only the footer and the last fetched chunks are held."""

    def __init__(self, store: Store, name: str, num_bytes: int) -> None:
        self._store, self._name = store, name
        self.num_bytes = num_bytes
        self.footer_start = num_bytes
        self.footer = b""
        self._position = 0
        self._pieces: list[tuple[int, bytes]] = []

    @classmethod
    def open(cls, store: Store, name: str) -> _PartialFile:
        """Read the footer; DataError where there is none."""
        head = store.head(name)
        file = cls(store, name, head.num_bytes if head else 0)
        if file.num_bytes < FOOTER_TAIL_BYTES + 4:
            raise file._broken("it is too short to be Parquet")
        tail_start = max(0, file.num_bytes - _FIRST_READ_BYTES)
        tail = store.read_range(name, start=tail_start, end=file.num_bytes)
        try:
            file.footer_start = footer_start(tail[-FOOTER_TAIL_BYTES:], file.num_bytes)
        except ValueError as error:
            raise file._broken(str(error)) from error
        if file.footer_start < tail_start:
            tail = store.read_range(name, start=file.footer_start, end=file.num_bytes)
            tail_start = file.footer_start
        file.footer = tail[file.footer_start - tail_start :]
        return file

    @cached_property
    def metadata(self) -> pq.FileMetaData:
        try:
            return pq.read_metadata(pa.PythonFile(self, mode="r"))
        except (pa.ArrowException, OSError) as error:
            raise self._broken(str(error)) from error

    def fetch(self, chunks: Array) -> Iterator[memoryview]:
        """Read the chunks of a row group, at one go, and hold them for `read_row_group`.

        Writers lay them one after the other, but for page indexes and the like in between.
        """
        start = int(chunks["start"].min())
        end = int((chunks["start"] + chunks["length"]).max())
        if end > self.footer_start:
            raise self._broken("a column chunk reaches into its footer")
        data = self._store.read_range(self._name, start=start, end=end)
        self._pieces = [(start, data)]
        view = memoryview(data)
        for first, length in zip(chunks["start"].tolist(), chunks["length"].tolist(), strict=True):
            yield view[first - start : first - start + length]

    def read_row_group(self, group: int) -> pa.Table:
        """Decode a row group whose chunks have been fetched; they are dropped."""
        try:
            file = pq.ParquetFile(pa.PythonFile(self, mode="r"), metadata=self.metadata)
            table = file.read_row_group(group, use_threads=False)
            table.validate(full=True)
        except (pa.ArrowException, OSError) as error:
            raise self._broken(f"row group {group}: {error}") from error
        self._pieces.clear()
        return table

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.num_bytes}[whence]
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def read(self, size: int = -1) -> bytes:
        start = self._position
        end = self.num_bytes if size < 0 else min(start + size, self.num_bytes)
        for first, data in [(self.footer_start, self.footer), *self._pieces]:
            if first <= start and end <= first + len(data):
                self._position = end
                return data[start - first : end - first]
        # Bytes between the chunks, such as page indexes, are of no use to a training run.
        data = self._store.read_range(self._name, start=start, end=end) if start < end else b""
        self._position = end
        return data

    def _broken(self, reason: str) -> DataError:
        return DataError(
            Problem(
                f"{self._store.uri}/{self._name} is no whole Parquet file: {reason}",
                "write the file again, or leave it out",
            )
        )


def _joined(parts: list[Array | None], dtype: type) -> Array:
    present = [part for part in parts if part is not None]
    return np.concatenate(present) if present else np.empty(0, dtype)
