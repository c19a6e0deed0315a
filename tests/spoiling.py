"""A store on whose way here bytes change, as where a server gives no checksum with an object."""

from __future__ import annotations

from typing import Any

from cluster.storage import Store


class SpoilingStore:
    """The store, but one bit differs in the next `times` reads of the object `key`."""

    def __init__(self, store: Store, key: str, *, times: int) -> None:
        self._store = store
        self._key = key
        self.times = times

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def read(self, key: str) -> bytes:
        data = self._store.read(key)
        if key != self._key or not self.times:
            return data
        self.times -= 1
        changed = bytearray(data)
        changed[len(changed) // 2] ^= 4
        return bytes(changed)
