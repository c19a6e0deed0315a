"""Lines of a run folder (events, metrics, logs), read incrementally: only what is new."""

from __future__ import annotations

import json
import posixpath
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from cluster.storage import Store
from jobs.record import LineKind, RunPaths, Source

Line = dict[str, Any]
"""One line: at least `time` (Unix seconds); `rank` and `attempt` are None for the driver's."""

_MAX_PARALLEL_READS = 16


class LineReader:
    """Reads one kind of lines of a run; each call of `new` gives what has come since the last."""

    def __init__(
        self,
        store: Store,
        paths: RunPaths,
        kind: LineKind,
        *,
        wanted: Callable[[Source], bool] = lambda _: True,
    ) -> None:
        self._store = store
        self._folder = paths.lines_folder(kind)
        self._wanted = wanted
        self._last_key: dict[Source, str] = {}
        self._ended: set[str] = set()
        """Folders of drivers and attempts that write no more, all of whose lines were read."""
        self.problems: list[str] = []
        """What could not be read, in the order in which it was met."""

    def new(self) -> list[Line]:
        """Lines that were written since the last call, by time."""
        sources = list(self._sources())
        keys: list[tuple[Source, str]] = []
        for source in sources:
            known = self._last_key.get(source)
            heads = self._store.list(self._folder_of(source), after=known)
            keys.extend((source, head.key) for head in heads if head.key.endswith(".jsonl"))
        lines = self._read(keys)
        # Only now: had a read failed, the next call would have to ask for the same objects.
        self._last_key.update(keys)
        self._ended.update(_superseded(sources))
        return lines

    def newest(self) -> list[Line]:
        """Lines of the newest object of the newest driver and of its newest attempt's first rank.

        For overviews of many runs: at most two objects are read.
        """
        newest: dict[bool, Source] = {}
        for source in sorted(self._sources(), key=lambda s: (s.number, -(s.rank or 0))):
            newest[source.rank is None] = source
        keys = []
        for source in newest.values():
            *_, last = [None, *self._store.list(self._folder_of(source))]
            if last is not None and last.key.endswith(".jsonl"):
                keys.append((source, last.key))
        return self._read(keys)

    def _folder_of(self, source: Source) -> str:
        return posixpath.join(self._folder, source.folder) + "/"

    def _sources(self) -> Iterator[Source]:
        """Of drivers and attempts that may still write."""
        for span in self._store.list_folders(self._folder):
            if span in self._ended:
                continue
            for writer in self._store.list_folders(f"{self._folder}{span}/"):
                try:
                    source = Source.parse(f"{span}/{writer}")
                except ValueError:
                    self._complain(f"{self._folder}{span}/{writer} is no folder of lines")
                    continue
                if self._wanted(source):
                    yield source

    def _read(self, keys: list[tuple[Source, str]]) -> list[Line]:
        if not keys:
            return []
        with ThreadPoolExecutor(min(_MAX_PARALLEL_READS, len(keys))) as pool:
            objects = list(pool.map(lambda pair: self._store.read(pair[1]), keys))
        lines: list[Line] = []
        for (source, key), data in zip(keys, objects, strict=True):
            lines.extend(self._parse(source, key, data))
        return sorted(lines, key=lambda line: float(line["time"]))

    def _parse(self, source: Source, key: str, data: bytes) -> Iterator[Line]:
        for number, text in enumerate(data.splitlines(), start=1):
            try:
                line = json.loads(text)
                float(line["time"])
            except (ValueError, TypeError, KeyError):
                self._complain(f"line {number} of {key} is not readable")
                continue
            line.setdefault("rank", source.rank)
            span = "generation" if source.rank is None else "attempt"
            line.setdefault("attempt", None)
            if line.get(span) is None:
                line[span] = source.number
            yield line

    def _complain(self, problem: str) -> None:
        if problem not in self.problems:
            self.problems.append(problem)


def _superseded(sources: Iterable[Source]) -> set[str]:
    """Folders of drivers or attempts that a newer driver, or a newer attempt, has succeeded."""
    newest: dict[bool, int] = {}
    sources = list(sources)
    for source in sources:
        driver = source.rank is None
        newest[driver] = max(newest.get(driver, 0), source.number)
    return {s.span for s in sources if s.number < newest[s.rank is None]}
