"""VerifiedReader: the wanted columns of one row group, by ranged reads that are checked first.

A row group's column chunks are fetched through the node's cache, those that touch (or nearly) in
one request; the checksum of each chunk and that of the shard's footer are compared with the index
before a byte is decoded.
"""

from __future__ import annotations

import io
import threading
from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise
from typing import Generic, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tenacity
import xxhash

from cluster.storage import StorageError, Store
from jobs.errors import DataError, Problem
from trainers import watchdog
from trainers.data.cache import NodeCache
from trainers.data.index import CHUNK, Array, Index, Shard, chunk_table

_GAP_BYTES = 2**16
"""Chunks that are less than this apart are read in one request: a request costs more."""
_GROUPS_OF_PAGE = 256
"""Row groups whose chunk records are fetched at once."""
_MAX_FOOTER_BYTES = 32 * 2**20
"""Footers that are kept parsed, by their stored size."""
_MAX_PAGES = 64
_FETCHES = 5
"""Fetches of a row group before its shard is taken for damaged in the store."""

Value = TypeVar("Value")


class _Unverified(Exception):  # noqa: N818 - it never leaves this module
    """Bytes are not those of the index; `column` is None for a footer."""

    def __init__(self, column: str | None) -> None:
        super().__init__(column)
        self.column = column


class VerifiedReader:
    """Reads row groups of one data set. Thread-safe; several processes may share the cache."""

    def __init__(
        self, *, store: Store, index: Index, columns: Sequence[str], cache: NodeCache
    ) -> None:
        """Raises DataError where the data set lacks one of `columns`. Reads nothing."""
        self._store = store
        self._index = index
        self._columns = list(columns)
        self._leaves = index.leaves(columns)
        self._cache = cache
        self._footers = _Recent[pq.FileMetaData](_MAX_FOOTER_BYTES)
        self._pages = _Recent[Array](_MAX_PAGES)
        self._lock = threading.Lock()
        self._bytes_fetched = 0

    @property
    def bytes_fetched(self) -> int:
        """Bytes that came from the store, not from the cache."""
        return self._bytes_fetched

    def read(self, group: int) -> pa.Table:
        """The wanted columns of a row group of the index, in the order in which they were named.

        Raises DataError, naming shard, row group and column, where the shard is not the one that
        was indexed or cannot be decoded; failures of the store pass through as StorageError.
        """
        number, place = self._index.shard_of(group)
        shard = self._index.shard(number)
        where = f"{self._store.uri}/{shard.name}, row group {place}"
        try:
            metadata, chunks = self._verified(group, shard, number)
        except _Unverified as unverified:
            column = "" if unverified.column is None else f", column {unverified.column}"
            raise self._changed(shard, where + column, "its checksum is another") from None
        try:
            file = pq.ParquetFile(
                pa.PythonFile(chunks, mode="r"), metadata=metadata, pre_buffer=False
            )
            table = file.read_row_group(place, columns=self._paths(metadata), use_threads=False)
            table = table.select(self._columns)
            for column in table.columns:
                column.validate()
        except (pa.ArrowException, OSError, KeyError, _OutsideChunks) as error:
            raise self._damaged(where, error) from error
        if table.num_rows != self._index.group_rows[group]:
            raise self._changed(shard, where, f"it holds {table.num_rows} rows")
        watchdog.tick()
        return table

    def _verified(
        self, group: int, shard: Shard, number: int
    ) -> tuple[pq.FileMetaData, _VerifiedChunks]:
        """Footer and chunks whose checksums are right. What the cache or the way here has spoilt
        is fetched anew; _Unverified if it stays wrong."""

        def read() -> tuple[pq.FileMetaData, _VerifiedChunks]:
            try:
                return self._footer(shard, number), self._chunks(group, shard)
            except _Unverified:
                self._forget(group, number)
                raise

        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(_Unverified),
            stop=tenacity.stop_after_attempt(_FETCHES),
            reraise=True,
        )
        return retrying(read)

    # ------------------------------------------------------------------------------------ parts

    def _footer(self, shard: Shard, number: int) -> pq.FileMetaData:
        known = self._footers.get(number)
        if known is not None:
            return known
        data = self._cache.get(
            self._footer_key(number),
            lambda: self._fetch(shard, shard.footer_start, shard.num_bytes),
        )
        if xxhash.xxh3_64_intdigest(data) != shard.footer_xxh3:
            raise _Unverified(None)
        try:
            # A footer is found from the end, so its own bytes do for a whole file.
            metadata = pq.read_metadata(pa.BufferReader(data))
        except (pa.ArrowException, OSError) as error:
            raise self._damaged(f"{self._store.uri}/{shard.name}, footer", error) from error
        self._footers.put(number, metadata, size=len(data))
        return metadata

    def _chunks(self, group: int, shard: Shard) -> _VerifiedChunks:
        """The wanted chunks of a row group, in the order in which they lie in the shard."""
        records = self._records(group)[self._leaves]
        order = np.argsort(records["start"], kind="stable")
        starts = records["start"][order].astype(np.int64)
        ends = starts + records["length"][order].astype(np.int64)
        if ((starts < 0) | (ends < starts) | (ends > shard.footer_start)).any():
            raise _Unverified(None)
        data = self._cache.get(
            self._chunks_key(group), lambda: self._fetch_chunks(shard, starts, ends)
        )
        bounds = np.concatenate([[0], np.cumsum(ends - starts)])
        if len(data) != bounds[-1]:
            raise _Unverified(None)
        view = memoryview(data)
        pieces = [view[low:high] for low, high in pairwise(bounds)]
        for piece, chunk in zip(pieces, order, strict=True):
            if xxhash.xxh3_64_intdigest(piece) != int(records["xxh3"][chunk]):
                raise _Unverified(self._column_of(self._leaves[chunk]))
        return _VerifiedChunks(starts=starts, pieces=pieces, num_bytes=shard.num_bytes)

    def _records(self, group: int) -> Array:
        """Chunk records of a row group: CHUNK [C]."""
        page_number, place = divmod(group, _GROUPS_OF_PAGE)
        page = self._pages.get(page_number)
        if page is None:
            first = page_number * _GROUPS_OF_PAGE
            last = min(first + _GROUPS_OF_PAGE, self._index.num_groups)

            def fetch() -> bytes:
                table = chunk_table(self._store, self._index, start=first, end=last)
                self._count(table.nbytes)
                return table.tobytes()

            data = self._cache.get(self._page_key(page_number), fetch)
            if len(data) != (last - first) * self._index.num_leaves * CHUNK.itemsize:
                raise _Unverified(None)
            page = np.frombuffer(data, CHUNK).reshape(last - first, self._index.num_leaves)
            self._pages.put(page_number, page, size=1)
        records: Array = page[place]
        return records

    def _forget(self, group: int, shard_number: int) -> None:
        page = group // _GROUPS_OF_PAGE
        self._pages.drop(page)
        self._cache.drop(self._page_key(page))
        self._cache.drop(self._chunks_key(group))
        self._cache.drop(self._footer_key(shard_number))

    def _footer_key(self, shard_number: int) -> str:
        return f"{self._index.digest}/footer/{shard_number}"

    def _page_key(self, page: int) -> str:
        return f"{self._index.digest}/records/{page}"

    def _chunks_key(self, group: int) -> str:
        return f"{self._index.digest}/chunks/{group}/{','.join(map(str, self._leaves))}"

    # ------------------------------------------------------------------------------------- store

    def _fetch_chunks(self, shard: Shard, starts: Array, ends: Array) -> bytes:
        """The bytes of the chunks, joined; near ones in one request."""
        parts: list[memoryview | bytes] = []
        apart = np.flatnonzero(starts[1:] - ends[:-1] > _GAP_BYTES) + 1
        for run in np.split(np.arange(len(starts)), apart):
            first, last = int(starts[run[0]]), int(ends[run].max())
            data = memoryview(self._fetch(shard, first, last))
            parts.extend(data[starts[k] - first : ends[k] - first] for k in run)
        return bytes(parts[0]) if len(parts) == 1 else b"".join(parts)

    def _fetch(self, shard: Shard, start: int, end: int) -> bytes:
        if start == end:
            return b""
        try:
            data = self._store.read_range(shard.name, start=start, end=end)
        except StorageError as failure:
            # A shard that is gone or shorter answers with an error, as a store that is down does.
            raise self._missing_or(failure, shard) from failure
        self._count(len(data))
        return data

    def _count(self, num_bytes: int) -> None:
        with self._lock:
            self._bytes_fetched += num_bytes

    def _missing_or(self, failure: StorageError, shard: Shard) -> StorageError | DataError:
        """The shard's own fault if there is one, else the store's failure."""
        try:
            head = self._store.head(shard.name)
        except StorageError:
            return failure
        where = f"{self._store.uri}/{shard.name}"
        if head is None:
            return self._differs(where, "it is missing")
        if head.num_bytes != shard.num_bytes:
            return self._differs(where, _sizes(head.num_bytes, shard))
        return failure

    def _changed(self, shard: Shard, where: str, how: str) -> DataError:
        try:
            head = self._store.head(shard.name)
        except StorageError:
            head = None
        if head is not None and head.num_bytes != shard.num_bytes:
            how = _sizes(head.num_bytes, shard)
        return self._differs(where, how)

    def _differs(self, where: str, how: str) -> DataError:
        return DataError(
            Problem(
                f"{where}: the shard was changed after it was indexed, or damaged: {how}",
                f"restore the shard, or, if it is as you want it, run: {self._prepare_again}",
            )
        )

    def _damaged(self, where: str, error: Exception) -> DataError:
        return DataError(
            Problem(
                f"{where}: the Parquet data is damaged, and was so when it was indexed: "
                f"{_first_line(error)}",
                f"write the shard again, then run: {self._prepare_again}",
            )
        )

    @property
    def _prepare_again(self) -> str:
        return f"shoal prepare {self._store.uri} --in-place --overwrite"

    # ------------------------------------------------------------------------------------ columns

    def _paths(self, metadata: pq.FileMetaData) -> list[str]:
        """Parquet's own paths of the wanted leaves: a name with a dot in it is ambiguous."""
        return [metadata.schema.column(leaf).path for leaf in self._leaves]

    def _column_of(self, leaf: int) -> str:
        return next(c.name for c in self._index.schema if leaf in c.leaves)


class _OutsideChunks(Exception):  # noqa: N818
    """The decoder asked for bytes that no checksum covers."""


class _VerifiedChunks(io.RawIOBase):
    """A file of which only some chunks are there; pyarrow decodes from it."""

    def __init__(self, *, starts: Array, pieces: list[memoryview], num_bytes: int) -> None:
        super().__init__()
        self._starts = starts
        self._pieces = pieces
        self._num_bytes = num_bytes
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._num_bytes}[whence]
        self._position = base + offset
        return self._position

    def read(self, size: int = -1) -> memoryview:
        """Bytes of one chunk, without a copy; _OutsideChunks for all others."""
        start = self._position
        stop = self._num_bytes if size < 0 else min(start + size, self._num_bytes)
        if start >= stop:
            return memoryview(b"")
        chunk = int(np.searchsorted(self._starts, start, side="right")) - 1
        first = int(self._starts[chunk])
        if chunk < 0 or stop - first > len(self._pieces[chunk]):
            raise _OutsideChunks(f"bytes {start} to {stop} are in no column chunk")
        self._position = stop
        return self._pieces[chunk][start - first : stop - first]


class _Recent(Generic[Value]):
    """The most recently used values up to a total size, the newest in any case. Thread-safe."""

    def __init__(self, max_size: int) -> None:
        self._max_size = max_size
        self._size = 0
        self._values: OrderedDict[int, tuple[Value, int]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: int) -> Value | None:
        with self._lock:
            if key not in self._values:
                return None
            self._values.move_to_end(key)
            return self._values[key][0]

    def put(self, key: int, value: Value, *, size: int) -> None:
        with self._lock:
            self._size -= self._values.pop(key, (value, 0))[1]
            self._values[key] = (value, size)
            self._size += size
            while self._size > self._max_size and len(self._values) > 1:
                self._size -= self._values.popitem(last=False)[1][1]

    def drop(self, key: int) -> None:
        with self._lock:
            _, size = self._values.pop(key, (None, 0))
            self._size -= size


def _sizes(num_bytes: int, shard: Shard) -> str:
    return f"it has {num_bytes} bytes, the index says {shard.num_bytes}"


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
