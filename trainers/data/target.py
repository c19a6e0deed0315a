"""The place where a data set is written: what is there, when it is cleared, when it is whole.

While a data set is written, `_shoal/writing.json` says so. index.json comes last and makes it
whole. Only objects that this program names are ever deleted: `_shoal/*` and `shard-NNNNN.parquet`.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from cluster.storage import StorageError, Store
from jobs.errors import DataError, Problem
from trainers.data.index import INDEX_FOLDER, INDEX_KEY, IndexRecord, open_index, read_index_record
from trainers.data.index_draft import commit_index

IN_PLACE = "in place"
"""Kind of source of an index beside Parquet that was there before."""

_MARKER_KEY = INDEX_FOLDER + "writing.json"
_OWN_KEY = re.compile(re.escape(INDEX_FOLDER) + r".+|shard-\d{5,}\.parquet")

State = Literal["absent", "half-written", "complete", "other", "in place", "foreign"]


class Target:
    """The folder of one data set."""

    def __init__(self, store: Store, *, fingerprint: str, in_place: bool = False) -> None:
        """`fingerprint` tells the source and options; `in_place`: the shards are not ours."""
        self.store = store
        self._fingerprint = fingerprint
        self._in_place = in_place

    def state(self) -> State:
        """What is there.

        other     a data set from other rows or options, or a damaged index
        in place  an index beside Parquet that was there before it
        foreign   files with names of shards that nothing says were written by this program
        """
        try:
            record = read_index_record(self.store)
        except DataError:
            return "other"
        if record is not None:
            if record.source.kind == IN_PLACE and not self._in_place:
                return "in place"
            return "complete" if record.source.fingerprint == self._fingerprint else "other"
        if self.store.head(_MARKER_KEY) is not None or self._in_place:
            return "half-written"
        return "absent" if next(self._own_keys(), None) is None else "foreign"

    def verify(self) -> IndexRecord:
        """The index of a complete data set; DataError where a shard is gone or has another size."""
        index = open_index(self.store)
        found = {head.key: head.num_bytes for head in self.store.list() if "/" not in head.key}
        for number in range(index.num_shards):
            shard = index.shard(number)
            num_bytes = found.get(shard.name)
            if num_bytes is None and "/" in shard.name:
                head = self.store.head(shard.name)
                num_bytes = head.num_bytes if head else None
            if num_bytes != shard.num_bytes:
                what = "is missing" if num_bytes is None else "has another size"
                raise DataError(
                    Problem(
                        f"{self.store.uri} is damaged: {shard.name} {what}",
                        "write it anew with --overwrite",
                    )
                )
        return index.record

    def refuse(self, state: State, *, overwrite: bool) -> None:
        """DataError where what is there may not be replaced."""
        uri = self.store.uri
        if state == "in place":
            raise DataError(
                Problem(
                    f"{uri} is a data set that was indexed in place: its shards are not ours to "
                    "replace",
                    "choose another --to",
                )
            )
        if state == "other" and not overwrite:
            raise DataError(
                Problem(
                    f"{uri} holds a data set of other rows or made with other options",
                    "choose another --to, or write it anew with --overwrite",
                )
            )
        if state == "foreign" and not overwrite:
            raise DataError(
                Problem(
                    f"{uri} holds shards without an index, and nothing says who wrote them",
                    f"index them: shoal prepare {uri} --in-place, or replace them with --overwrite",
                )
            )

    def begin(self) -> None:
        """Delete what is left of an earlier data set, its index first, and mark the place."""
        self.store.delete([INDEX_KEY])
        self._clear()
        marker = {"fingerprint": self._fingerprint}
        self.store.write(_MARKER_KEY, json.dumps(marker).encode())

    def commit(self, record: IndexRecord) -> None:
        """Make the data set whole; raises DataError where another command has done so."""
        commit_index(self.store, record)
        self.store.delete([_MARKER_KEY])

    def abandon(self) -> None:
        """Delete what was written, unless it is whole."""
        # The store may be what has failed; then the next command finds the marker and clears.
        with contextlib.suppress(StorageError):
            if self.store.head(INDEX_KEY) is None:
                self._clear()

    def owns(self, uri: str) -> bool:
        """Whether a file would be deleted by `begin`."""
        prefix = self.store.uri.rstrip("/") + "/"
        return uri.startswith(prefix) and self._is_own(uri.removeprefix(prefix))

    def _clear(self) -> None:
        # The marker goes last: while anything is left, the next command knows whose it is.
        self.store.delete(key for key in self._own_keys() if key != _MARKER_KEY)
        self.store.delete([_MARKER_KEY])

    def _own_keys(self) -> Iterator[str]:
        prefixes = (INDEX_FOLDER,) if self._in_place else (INDEX_FOLDER, "shard-")
        for prefix in prefixes:
            for head in self.store.list(prefix):
                if self._is_own(head.key):
                    yield head.key

    def _is_own(self, key: str) -> bool:
        if self._in_place and not key.startswith(INDEX_FOLDER):
            return False
        return _OWN_KEY.fullmatch(key) is not None


@dataclass(frozen=True)
class Places:
    """The places of all parts that one command writes."""

    targets: Mapping[str | None, Target]
    """Part -> its place; the key None is a data set without parts."""
    stale: tuple[Target, ...]
    """Places of parts that this command does not have, and that may be left of another split."""

    def refuse_source(self, files: Iterable[str]) -> None:
        """DataError where a file of the source would be written over."""
        for uri in files:
            if any(target.owns(uri) for target in self.targets.values()):
                raise DataError(
                    Problem(
                        f"{uri} is a file of the source and would be written over",
                        "choose another --to, or index the files where they are with --in-place",
                    )
                )

    def are_complete(self, *, overwrite: bool) -> bool:
        """Whether all is there already, and nothing is to be written over.

        Raises DataError where something else is there, and may not or can not be replaced.
        """
        states = [target.state() for target in self.targets.values()]
        for target, state in zip(self.targets.values(), states, strict=True):
            target.refuse(state, overwrite=overwrite)
        for target in self.stale:
            state = target.state()
            # Rows that were split otherwise: even of the same source, they would leak.
            target.refuse("other" if state == "complete" else state, overwrite=overwrite)
        return not overwrite and all(state == "complete" for state in states)

    def begin(self) -> None:
        """Clear all places, and mark those that are to be written."""
        for target in self.stale:
            if target.state() != "absent":
                target.begin()
                target.abandon()
        for target in self.targets.values():
            target.begin()

    def abandon(self) -> None:
        """Delete what is not whole."""
        for target in self.targets.values():
            target.abandon()
