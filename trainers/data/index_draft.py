"""The index of a data set that is being written: shards are added in order, then it is committed.

    draft = IndexDraft(folder, ...)
    draft.add(report)                    for each shard
    record = draft.upload(store, ...)    the files beside the index
    commit_index(store, record)          index.json: from here on the data set is there

Numbers of rows and chunks go to files in a local folder as they come, so that memory does not grow
with the number of rows.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from cluster.storage import ObjectExists, Store
from jobs.errors import DataError, Problem
from trainers.data.columns import LabelValue
from trainers.data.index import (
    CHUNK,
    CHUNKS,
    GROUPS,
    INDEX_KEY,
    LABELS,
    LENGTHS,
    SHARDS,
    SHARDS_PER_PAGE,
    SHARDS_SCHEMA,
    Array,
    ColumnRecord,
    FileRecord,
    IndexRecord,
    Shard,
    SourceRecord,
    SplitRecord,
    TokenizerRecord,
    side_file_key,
)

MAX_LABELS = 100_000
"""Distinct labels of a data set; more are no classes but a mistaken column."""

_NPY_HEADER_BYTES = 192
_BLOCK_ITEMS = 2**18


@dataclass(frozen=True, eq=False)
class ShardReport:
    """What is known of a shard once it is written, or read for an index in place."""

    shard: Shard
    group_rows: npt.NDArray[np.uint32]
    """Rows of its row groups; shape [g]."""
    chunks: Array
    """CHUNK [g, C]."""
    max_group_bytes: int
    """Of its largest row group, in memory."""
    null_counts: tuple[int, ...]
    """Of each top-level column."""
    lengths: npt.NDArray[np.uint32] | None
    """Tokens, or bytes of the text, of each row."""
    label_codes: npt.NDArray[np.int32] | None
    """Position of each row's label in `label_values`, -1 for null."""
    label_values: tuple[LabelValue, ...] = ()


@dataclass(frozen=True)
class DraftFacts:
    """What an index says besides its shards."""

    columns: tuple[tuple[str, str, tuple[int, ...]], ...]
    """Name, type and leaf columns of each top-level column."""
    text_column: str | None
    label_column: str | None
    tokenizer: TokenizerRecord | None
    source: SourceRecord
    made_by: str


class IndexDraft:
    """Collects the reports of shards, in order."""

    def __init__(self, folder: Path, facts: DraftFacts) -> None:
        """`folder` exists, is empty and is used by nothing else."""
        self.facts = facts
        self._folder = folder
        self._shards: list[Shard] = []
        self._max_group_bytes = 0
        self._null_counts = np.zeros(len(facts.columns), np.int64)
        self._label_codes: dict[LabelValue, int] = {}
        self._files = ExitStack()
        num_leaves = sum(len(leaves) for _, _, leaves in facts.columns)
        self._groups = self._array_file(GROUPS, np.dtype("<u4"))
        self._chunks = self._array_file(CHUNKS, CHUNK, row_items=num_leaves)
        self._lengths = self._array_file(LENGTHS, np.dtype("<u4")) if facts.text_column else None
        self._labels = self._array_file(LABELS, np.dtype("<i4")) if facts.label_column else None

    def add(self, report: ShardReport) -> None:
        """Append a shard; DataError for more than 100,000 distinct labels."""
        self._shards.append(report.shard)
        self._max_group_bytes = max(self._max_group_bytes, report.max_group_bytes)
        self._null_counts += np.array(report.null_counts, np.int64)
        self._groups.append(report.group_rows)
        self._chunks.append(report.chunks.reshape(-1))
        if self._lengths is not None and report.lengths is not None:
            self._lengths.append(report.lengths)
        if self._labels is not None and report.label_codes is not None:
            known = [
                self._label_codes.setdefault(v, len(self._label_codes)) for v in report.label_values
            ]
            check_label_count(len(self._label_codes), self.facts.label_column)
            self._labels.append(np.array([*known, -1], np.int32)[report.label_codes])

    @property
    def num_rows(self) -> int:
        return sum(shard.num_rows for shard in self._shards)

    @property
    def num_bytes(self) -> int:
        """Of the shards that were added."""
        return sum(shard.num_bytes for shard in self._shards)

    @property
    def label_values(self) -> set[LabelValue]:
        """Labels that its rows have."""
        return set(self._label_codes)

    def upload(
        self, store: Store, *, labels: Iterable[LabelValue], split: SplitRecord | None
    ) -> IndexRecord:
        """Write the files beside the index and return what index.json is to hold.

        `labels` are all labels, of the other parts of a split too. The draft takes no more shards.
        """
        counts = self._sort_labels(sorted(labels)) if self._labels is not None else None
        files = [f for f in (self._groups, self._chunks, self._lengths, self._labels) if f]
        records = [file.finish() for file in files]
        group_rows = np.load(self._groups.path, mmap_mode="r", allow_pickle=False)
        digest = content_digest(self._shards, group_rows, self._chunks.blocks())
        shards = encode_shards(self._shards)
        store.write(side_file_key(digest, SHARDS), shards)
        records.append(
            FileRecord(name=SHARDS, bytes=len(shards), xxh3=xxhash.xxh3_64_hexdigest(shards))
        )
        for file in files:
            store.upload(side_file_key(digest, file.path.name), file.path)
        self._files.close()
        return IndexRecord(
            digest=digest,
            num_rows=self.num_rows,
            num_row_groups=len(group_rows),
            num_shards=len(self._shards),
            bytes=self.num_bytes,
            max_row_group_bytes=self._max_group_bytes,
            columns=tuple(
                ColumnRecord(name=name, type=kind, null_count=int(nulls), leaves=leaves)
                for (name, kind, leaves), nulls in zip(
                    self.facts.columns, self._null_counts, strict=True
                )
            ),
            text_column=self.facts.text_column,
            label_column=self.facts.label_column,
            labels=counts,
            tokenizer=self.facts.tokenizer,
            split=split,
            source=self.facts.source,
            made_by=self.facts.made_by,
            files=tuple(sorted(records, key=lambda r: r.name)),
        )

    def close(self) -> None:
        """Close the local files; for a draft that is given up."""
        self._files.close()

    def _array_file(
        self, name: str, dtype: np.dtype[Any], row_items: int | None = None
    ) -> _NpyFile:
        return self._files.enter_context(_NpyFile(self._folder / name, dtype, row_items))

    def _sort_labels(self, ordered: Sequence[LabelValue]) -> dict[str, int]:
        """Give codes in the order of the values instead of that of their appearance; the counts."""
        assert self._labels is not None
        position = {value: code for code, value in enumerate(ordered)}
        codes = np.full(len(self._label_codes) + 1, -1, np.int32)
        for value, code in self._label_codes.items():
            codes[code] = position[value]
        counts = np.zeros(len(ordered) + 1, np.int64)
        for block in self._labels.rewrite():
            block[:] = codes[block]
            counts += np.bincount(np.where(block < 0, len(ordered), block), minlength=len(counts))
        return {label_text(v): int(n) for v, n in zip(ordered, counts[:-1], strict=True)}


def check_label_count(num_labels: int, column: str | None) -> None:
    """DataError where a column has too many values to be one of classes."""
    if num_labels > MAX_LABELS:
        raise DataError(
            Problem(
                f"{column} has more than {MAX_LABELS} distinct values, too many for classes",
                "name the column of classes with --label (or --stratify none)",
            )
        )


def label_text(value: LabelValue) -> str:
    """A label as the job file writes it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def commit_index(store: Store, record: IndexRecord) -> None:
    """Write index.json, the last object of a data set; the files beside it must be there.

    Raises DataError where another index is there.
    """
    try:
        store.write_if_absent(INDEX_KEY, record.to_bytes())
    except ObjectExists as error:
        raise DataError(
            Problem(
                f"{store.uri} was given an index by another command meanwhile",
                "choose another --to, or write it anew with --overwrite",
            )
        ) from error


def encode_shards(shards: Sequence[Shard]) -> bytes:
    """shards.parquet."""
    rows = [
        (s.name, s.num_bytes, s.footer_start, s.footer_xxh3, s.num_rows, s.num_groups)
        for s in shards
    ]
    columns = list(zip(*rows, strict=True)) or [()] * len(SHARDS_SCHEMA)
    arrays = [
        pa.array(values, field.type) for values, field in zip(columns, SHARDS_SCHEMA, strict=True)
    ]
    sink = pa.BufferOutputStream()
    # Names differ by a digit or two from one to the next: coded as differences they take a byte.
    pq.write_table(
        pa.table(arrays, schema=SHARDS_SCHEMA),
        sink,
        row_group_size=SHARDS_PER_PAGE,
        compression="zstd",
        use_dictionary=False,
        column_encoding={"name": "DELTA_BYTE_ARRAY"},
        write_statistics=False,
    )
    data: bytes = sink.getvalue().to_pybytes()
    return data


def content_digest(
    shards: Sequence[Shard], group_rows: Array, chunk_blocks: Iterable[bytes]
) -> str:
    """sha256 over shards, row groups and chunk records: 64 hexadecimal digits.

    Taken over the values, not over files, so that it does not depend on how they are stored.
    """
    digest = hashlib.sha256(b"shoal data set 1\n")
    for s in shards:
        name = s.name.encode()
        numbers = (len(name), s.num_bytes, s.footer_start, s.footer_xxh3, s.num_rows, s.num_groups)
        digest.update(np.array(numbers, "<u8").tobytes() + name)
    digest.update(np.ascontiguousarray(group_rows, "<u4").tobytes())
    for block in chunk_blocks:
        digest.update(block)
    return digest.hexdigest()


class _NpyFile:
    """An .npy file that grows; its header has one size whatever the shape, and is written last."""

    def __init__(self, path: Path, dtype: np.dtype[Any], row_items: int | None) -> None:
        self.path = path
        self._dtype = dtype
        self._row_items = row_items
        self._num_items = 0
        self._file = path.open("w+b")
        self._file.write(bytes(_NPY_HEADER_BYTES))

    def __enter__(self) -> _NpyFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def append(self, items: Array) -> None:
        self._file.write(np.ascontiguousarray(items, self._dtype).tobytes())
        self._num_items += items.size

    def blocks(self) -> Iterator[bytes]:
        """What was appended, as bytes, piece by piece."""
        self._file.seek(_NPY_HEADER_BYTES)
        while block := self._file.read(_BLOCK_ITEMS * self._dtype.itemsize):
            yield block

    def rewrite(self) -> Iterator[Array]:
        """What was appended, piece by piece; what the caller writes into a piece is kept."""
        step = _BLOCK_ITEMS * self._dtype.itemsize
        for start in range(0, self._num_items * self._dtype.itemsize, step):
            self._file.seek(_NPY_HEADER_BYTES + start)
            block = np.frombuffer(self._file.read(step), self._dtype).copy()
            yield block
            self._file.seek(_NPY_HEADER_BYTES + start)
            self._file.write(block.tobytes())

    def finish(self) -> FileRecord:
        """Write the header and return the file's checksum."""
        shape = (
            (self._num_items,)
            if self._row_items is None
            else (self._num_items // self._row_items, self._row_items)
        )
        header = npy_header(self._dtype, shape)
        self._file.seek(0)
        self._file.write(header)
        self._file.flush()
        checksum = xxhash.xxh3_64(header)
        for block in self.blocks():
            checksum.update(block)
        return FileRecord(
            name=self.path.name,
            bytes=len(header) + self._num_items * self._dtype.itemsize,
            xxh3=checksum.hexdigest(),
            data_start=len(header),
        )


def npy_header(dtype: np.dtype[Any], shape: tuple[int, ...]) -> bytes:
    """The header of an .npy file of version 1.0, padded to 192 bytes whatever the shape."""
    sink = io.BytesIO()
    described = {
        "descr": np.lib.format.dtype_to_descr(dtype),
        "fortran_order": False,
        "shape": shape,
    }
    np.lib.format.write_array_header_1_0(sink, described)  # type: ignore[arg-type, unused-ignore]
    magic, body = sink.getvalue()[:8], sink.getvalue()[10:].rstrip(b"\n ")
    padded = body.ljust(_NPY_HEADER_BYTES - 11) + b"\n"
    if len(padded) != _NPY_HEADER_BYTES - 10:
        raise ValueError(f"the header of {dtype} {shape} does not fit")
    return magic + len(padded).to_bytes(2, "little") + padded
