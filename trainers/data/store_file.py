"""An object of a store as a file that pyarrow's readers take.

Reads go through `Store.read_range`, so that retries, credentials and errors are the store's.
"""

from __future__ import annotations

import io

from cluster.storage import Head, Store

_READ_AHEAD_BYTES = 4 * 2**20


class StoreFile(io.RawIOBase):
    """Reads at least 4 MiB at a time, from where it stands."""

    def __init__(self, store: Store, head: Head) -> None:
        self._store, self._head = store, head
        self._position = 0
        self._buffer = b""
        self._buffer_start = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._head.num_bytes}
        self._position = base[whence] + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def read(self, size: int | None = -1) -> bytes:
        left = max(0, self._head.num_bytes - self._position)
        size = left if size is None or size < 0 else min(size, left)
        if not size:
            return b""
        inside = self._position - self._buffer_start
        if not (inside >= 0 and inside + size <= len(self._buffer)):
            end = self._position + min(left, max(size, _READ_AHEAD_BYTES))
            self._buffer = self._store.read_range(self._head.key, start=self._position, end=end)
            self._buffer_start, inside = self._position, 0
        self._position += size
        return self._buffer[inside : inside + size]

    def readall(self) -> bytes:
        return self.read()
