"""The index of a data set: which shards, row groups and column chunks it has, and their checksums.

A data set is a folder of Parquet shards and, beside them:

    _shoal/index.json               the commit object, written last: `IndexRecord`
    _shoal/<digest>/shards.parquet  of each shard: name, bytes, footer_start, footer_xxh3, rows,
                                    groups
    _shoal/<digest>/groups.npy      rows of each row group; uint32 [G]
    _shoal/<digest>/chunks.npy      where each column chunk lies and its checksum; CHUNK [G, C]
    _shoal/<digest>/lengths.npy     tokens of each row, else UTF-8 bytes of its text; uint32 [N]
    _shoal/<digest>/labels.npy      position of each row's label in `labels`, -1 for null; int32 [N]

N rows lie in G row groups in S shards: in order of the shards, then inside them. The id of a row is
its number in this order. C counts Parquet's leaf columns: a list or a struct has one for each leaf.

`digest` is the sha256 of what shards, groups and chunks say, and as these hold a checksum of every
byte that is read, it identifies the rows. Only index.json, shards.parquet and groups.npy are read
to open an index; the other files are read by ranges. Memory: 4 bytes a row group, about 25 bytes a
shard.
"""

from __future__ import annotations

import io
import json
import math
import threading
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
from pydantic import ConfigDict, Field, ValidationError

from cluster.storage import ObjectMissing, Store
from jobs.errors import DataError, Problem
from jobs.record import Record
from trainers.data.items import numbers_of

INDEX_VERSION = 1
INDEX_FOLDER = "_shoal/"
INDEX_KEY = INDEX_FOLDER + "index.json"

CHUNK = np.dtype([("start", "<u8"), ("length", "<u8"), ("xxh3", "<u8")])
"""One column chunk: its first byte in the shard, its length in bytes, the xxh3-64 of its bytes."""

SHARDS, GROUPS, CHUNKS = "shards.parquet", "groups.npy", "chunks.npy"
LENGTHS, LABELS = "lengths.npy", "labels.npy"

SHARDS_SCHEMA = pa.schema(
    [
        ("name", pa.string()),
        ("bytes", pa.uint64()),
        ("footer_start", pa.uint64()),
        ("footer_xxh3", pa.uint64()),
        ("rows", pa.uint64()),
        ("groups", pa.uint32()),
    ]
)
SHARDS_PER_PAGE = 4096
_GROUPS_PER_STRIDE = 256

Array = npt.NDArray[Any]


class ColumnRecord(Record):
    """A top-level column of the data set."""

    name: str
    type: str
    """As Arrow writes it: `string`, `list<element: int32>`."""
    null_count: int
    leaves: tuple[int, ...]
    """Positions of its Parquet leaf columns among the chunks of a row group."""


class TokenizerRecord(Record):
    """With what a data set was tokenized."""

    digest: str
    """See `trainers.data.tokenizers.tokenizer_digest`."""
    source: str
    max_tokens: int
    column: str
    """The column of token ids."""


class SourceRecord(Record):
    """From what a data set was made."""

    uri: str
    kind: str
    fingerprint: str
    """sha256 of the source's files and of the options that decide the rows."""


class SplitRecord(Record):
    """Which part of its source a data set is."""

    name: str
    parts: dict[str, int]
    """Rows of each part."""
    seed: int
    stratify: str | None


class FileRecord(Record):
    """A file beside the index."""

    name: str
    bytes: int
    xxh3: str
    """Sixteen hexadecimal digits."""
    data_start: int = 0
    """Where the numbers of an .npy file begin."""


class IndexRecord(Record):
    """What index.json holds."""

    model_config = ConfigDict(populate_by_name=True, serialize_by_alias=True)

    version: int = INDEX_VERSION
    digest: str
    num_rows: int
    num_row_groups: int
    num_shards: int
    bytes: int
    """Of all shards."""
    max_row_group_bytes: int
    """Of the largest row group, in memory as Arrow, all columns."""
    columns: tuple[ColumnRecord, ...] = Field(alias="schema")
    text_column: str | None = None
    label_column: str | None = None
    labels: dict[str, int] | None = None
    """Rows of each label, in the order of their codes; a label of another part may have 0 rows."""
    tokenizer: TokenizerRecord | None = None
    split: SplitRecord | None = None
    source: SourceRecord
    made_by: str
    files: tuple[FileRecord, ...]


@dataclass(frozen=True)
class Shard:
    """One Parquet file of a data set."""

    name: str
    """Key below the data set's folder."""
    num_bytes: int
    footer_start: int
    """The footer, with its length and the magic bytes, lies in [footer_start, num_bytes)."""
    footer_xxh3: int
    num_rows: int
    num_groups: int


@dataclass(frozen=True, eq=False)
class Index:
    """An opened index. Safe to use from several threads."""

    record: IndexRecord
    group_rows: npt.NDArray[np.uint32]
    """Rows of each row group; shape [G]."""
    shard_groups: npt.NDArray[np.uint32]
    """First row group of each shard, and G at the end; shape [S + 1]."""
    _shards: _ShardPages
    _strides: npt.NDArray[np.uint64]

    @property
    def digest(self) -> str:
        return self.record.digest

    @property
    def num_rows(self) -> int:
        return self.record.num_rows

    @property
    def num_groups(self) -> int:
        return len(self.group_rows)

    @property
    def num_shards(self) -> int:
        return len(self.shard_groups) - 1

    @property
    def schema(self) -> tuple[ColumnRecord, ...]:
        return self.record.columns

    @property
    def labels(self) -> dict[str, int] | None:
        """Rows of each label, in the order of the codes; None without a label column."""
        return self.record.labels

    @property
    def text_column(self) -> str | None:
        return self.record.text_column

    @property
    def label_column(self) -> str | None:
        return self.record.label_column

    @property
    def tokenizer(self) -> TokenizerRecord | None:
        return self.record.tokenizer

    @property
    def max_row_group_bytes(self) -> int:
        return self.record.max_row_group_bytes

    @cached_property
    def num_leaves(self) -> int:
        """Column chunks of a row group."""
        return sum(len(column.leaves) for column in self.schema)

    def leaves(self, columns: Iterable[str]) -> list[int]:
        """Leaf columns of the named columns, ascending: where their chunks stand in a row group.

        Raises DataError for a name that the data set does not have.
        """
        known = {column.name: column.leaves for column in self.schema}
        wanted = list(columns)
        missing = [name for name in wanted if name not in known]
        if missing:
            raise DataError(
                Problem(
                    f"the data set has no column {missing[0]}",
                    f"its columns: {', '.join(known)}",
                )
            )
        return sorted(leaf for name in wanted for leaf in known[name])

    def shard_of(self, group: int) -> tuple[int, int]:
        """The shard that holds a row group, and the group's number inside that shard."""
        shard = int(np.searchsorted(self.shard_groups, group, side="right")) - 1
        return shard, group - int(self.shard_groups[shard])

    def shard(self, number: int) -> Shard:
        """Name, size and footer of a shard."""
        return self._shards.shard(number)

    def first_row(self, group: int) -> int:
        """Id of the first row of a row group; G gives the number of rows."""
        stride = group // _GROUPS_PER_STRIDE
        inside = self.group_rows[stride * _GROUPS_PER_STRIDE : group]
        return int(self._strides[stride]) + int(inside.sum(dtype=np.uint64))

    @property
    def nbytes(self) -> int:
        """Memory that the opened index holds for its shards and row groups."""
        arrays = (self.group_rows, self.shard_groups, self._strides)
        return sum(array.nbytes for array in arrays) + self._shards.nbytes


class _ShardPages:
    """shards.parquet as it is stored, decoded 4,096 shards at a time: names would fill memory."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._metadata = pq.read_metadata(pa.BufferReader(data))
        self._pages: OrderedDict[int, pa.Table] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def nbytes(self) -> int:
        return len(self._data)

    def groups(self) -> npt.NDArray[np.uint32]:
        """Row groups of each shard."""
        # Not by `pq.read_table`, which loads pyarrow.dataset and pandas for it.
        file = pq.ParquetFile(pa.BufferReader(self._data), metadata=self._metadata)
        table = file.read(columns=["groups"], use_threads=False)
        return numbers_of(table["groups"])

    def shard(self, number: int) -> Shard:
        page_number, row = divmod(number, SHARDS_PER_PAGE)
        with self._lock:
            page = self._pages.pop(page_number, None)
            if page is None:
                file = pq.ParquetFile(pa.BufferReader(self._data), metadata=self._metadata)
                page = file.read_row_group(page_number, use_threads=False)
            self._pages[page_number] = page
            if len(self._pages) > 2:
                self._pages.popitem(last=False)
        return Shard(*(page.column(name)[row].as_py() for name in SHARDS_SCHEMA.names))


def open_index(store: Store) -> Index:
    """The index of the data set whose folder is `store`.

    Reads three objects and verifies them. Raises DataError where there is no index, where it is
    damaged, or where it is of a later version; errors of the store pass through.
    """
    record = read_index_record(store)
    if record is None:
        raise DataError(
            Problem(
                f"{store.uri} has no index ({INDEX_KEY} is missing)",
                f"run: shoal prepare SOURCE --to {store.uri}, or, where Parquet files are there "
                f"already: shoal prepare {store.uri} --in-place",
            )
        )
    shards = _ShardPages(_read_verified(store, record, SHARDS))
    group_rows: npt.NDArray[np.uint32] = np.load(
        io.BytesIO(_read_verified(store, record, GROUPS)), allow_pickle=False
    )
    shard_groups = np.zeros(record.num_shards + 1, np.uint32)
    groups = shards.groups()
    if (
        len(groups) != record.num_shards
        or len(group_rows) != record.num_row_groups
        or int(groups.sum(dtype=np.uint64)) != record.num_row_groups
        or int(group_rows.sum(dtype=np.uint64)) != record.num_rows
    ):
        raise _damaged(store, "its parts do not agree on the number of shards, groups and rows")
    np.cumsum(groups, out=shard_groups[1:], dtype=np.uint32)
    return Index(
        record=record,
        group_rows=group_rows,
        shard_groups=shard_groups,
        _shards=shards,
        _strides=_stride_starts(group_rows),
    )


def read_index_record(store: Store) -> IndexRecord | None:
    """What index.json of a data set says; None where there is none.

    Raises DataError where it is damaged or of a later version.
    """
    try:
        text = store.read(INDEX_KEY)
    except ObjectMissing:
        return None
    try:
        version = json.loads(text)["version"]
        if version != INDEX_VERSION:
            raise DataError(
                Problem(
                    f"the index of {store.uri} has version {version}, this Shoal reads "
                    f"{INDEX_VERSION}",
                    "install the Shoal that wrote it, or write it again: shoal prepare --overwrite",
                )
            )
        return IndexRecord.model_validate_json(text)
    except (ValidationError, ValueError, KeyError, TypeError) as error:
        raise _damaged(store, f"{INDEX_KEY} cannot be read") from error


def chunk_records(store: Store, index: Index, group: int) -> Array:
    """Where the column chunks of a row group lie, and their checksums; CHUNK [C]."""
    records: Array = chunk_table(store, index, start=group, end=group + 1)[0]
    return records


def chunk_table(store: Store, index: Index, *, start: int, end: int) -> Array:
    """Chunk records of the row groups [start, end), read as one range; CHUNK [end - start, C]."""
    flat: Array = _read_items(
        store,
        index,
        CHUNKS,
        dtype=CHUNK,
        start=start * index.num_leaves,
        end=end * index.num_leaves,
    )
    table: Array = flat.reshape(end - start, index.num_leaves)
    return table


def row_lengths(
    store: Store, index: Index, *, start: int, end: int
) -> npt.NDArray[np.uint32] | None:
    """Lengths of the rows [start, end): tokens if the set is tokenized, else bytes of the text.

    None where the set has no text column.
    """
    if index.text_column is None:
        return None
    return _read_items(store, index, LENGTHS, dtype=np.dtype("<u4"), start=start, end=end)


def row_labels(store: Store, index: Index, *, start: int, end: int) -> npt.NDArray[np.int32] | None:
    """Codes of the labels of the rows [start, end): positions in `index.labels`, -1 for null.

    None where the set has no label column.
    """
    if index.label_column is None:
        return None
    return _read_items(store, index, LABELS, dtype=np.dtype("<i4"), start=start, end=end)


def side_file_key(digest: str, name: str) -> str:
    """Key of a file beside the index."""
    return f"{INDEX_FOLDER}{digest}/{name}"


def _read_verified(store: Store, record: IndexRecord, name: str) -> bytes:
    described = _file(store, record, name)
    try:
        data = store.read(side_file_key(record.digest, name))
    except ObjectMissing as error:
        raise _damaged(store, f"{name} is missing") from error
    if len(data) != described.bytes or xxhash.xxh3_64_hexdigest(data) != described.xxh3:
        raise _damaged(store, f"{name} is not what index.json says")
    return data


def _read_items(
    store: Store, index: Index, name: str, *, dtype: np.dtype[Any], start: int, end: int
) -> Array:
    described = _file(store, index.record, name)
    first = described.data_start + start * dtype.itemsize
    last = described.data_start + end * dtype.itemsize
    if not 0 <= start <= end or last > described.bytes:
        raise IndexError(f"items {start} to {end} of {name} are not all there")
    if start == end:
        return np.empty(0, dtype)
    try:
        data = store.read_range(side_file_key(index.digest, name), start=first, end=last)
    except ObjectMissing as error:
        raise _damaged(store, f"{name} is missing") from error
    return np.frombuffer(data, dtype)


def _file(store: Store, record: IndexRecord, name: str) -> FileRecord:
    for described in record.files:
        if described.name == name:
            return described
    raise _damaged(store, f"index.json does not name {name}")


def _stride_starts(group_rows: Array) -> npt.NDArray[np.uint64]:
    """First row of every 256th row group; one for each of them would take twice their memory."""
    num_strides = math.ceil((len(group_rows) + 1) / _GROUPS_PER_STRIDE)
    starts = np.zeros(num_strides, np.uint64)
    if num_strides > 1:
        edges = np.arange(0, len(group_rows), _GROUPS_PER_STRIDE)
        sums = np.add.reduceat(group_rows, edges, dtype=np.uint64)
        np.cumsum(sums[: num_strides - 1], out=starts[1:])
    return starts


def _damaged(store: Store, what: str) -> DataError:
    return DataError(
        Problem(
            f"the index of {store.uri} is damaged: {what}",
            f"write it again: shoal prepare {store.uri} --in-place --overwrite",
        )
    )
