"""The log of a study in its run folder: numbered objects that are written only if absent.

    study/00000001.jsonl               what one append wrote
    study/00000001-00000512.jsonl      many of them in one, so that a long log is read quickly

A driver that has taken the run over begins with an object of its own. One that was superseded then
finds its next number taken, and ends. What a driver that was killed has put into one object and not
removed any more is removed by the next.
"""

from __future__ import annotations

import json
import re
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from pydantic import TypeAdapter

from cluster.storage import ObjectExists, ObjectMissing, Store, read_whole
from jobs.errors import EnvironmentFault, Problem
from jobs.record import DAMAGED_RECORD_HINT, RunPaths
from jobs.seal import sealed, unsealed
from jobs.study.events import Event

OBJECTS_IN_ONE = 512
_MAX_PARALLEL_READS = 16
_EVENTS: TypeAdapter[list[Event]] = TypeAdapter(list[Event])
_NAME = re.compile(r"(\d{8,})(?:-(\d{8,}))?\.json")


class StudySuperseded(EnvironmentFault):
    """Another driver goes on with this study."""


@dataclass(frozen=True)
class _Object:
    key: str
    first: int
    last: int


class StudyLog:
    """Appends to a study's log, for the driver that holds the run's lease; `open` comes first."""

    def __init__(self, store: Store, paths: RunPaths, *, generation: int) -> None:
        self._store = store
        self._paths = paths
        self._generation = generation
        self._last = 0
        self._merged = 0
        """Number of the last object that a merged one holds."""
        self._unmerged: deque[Sequence[Event]] = deque()
        """What the objects after that hold, so that it is not read again to be merged."""

    def open(self) -> Iterator[Event]:
        """The log's events, while it is read, so that they need not be in memory together; at
        their end an object of this driver's is written. Nothing can be appended before that."""
        while True:
            for one, held in read_objects(self._store, self._paths, after=self._last):
                yield from held
                self._last = one.last
                if one.last > one.first:
                    self._merged = one.last
                else:
                    self._unmerged.append(held)
            try:
                self._write(())
            except ObjectExists:
                continue  # the driver before was still writing
            self._remove_merged()
            return

    def append(self, events: Sequence[Event]) -> None:
        """Makes events durable, all of them or none; StudySuperseded if another driver goes on."""
        try:
            self._write(events)
        except ObjectExists:
            raise StudySuperseded(
                Problem(f"another driver has gone on with the study {self._paths.run_id}")
            ) from None
        if self._last - self._merged > OBJECTS_IN_ONE:
            self._merge_up_to(self._merged + OBJECTS_IN_ONE)

    def read(self) -> list[Event]:
        """All events up to now."""
        return read_events(self._store, self._paths)

    def _write(self, events: Sequence[Event]) -> None:
        number = self._last + 1
        self._store.write_if_absent(
            self._paths.study_object(number), _payload(events, self._generation)
        )
        self._last = number
        self._unmerged.append(tuple(events))

    def _merge_up_to(self, last: int) -> None:
        """Puts the single objects up to that number into one, and removes them."""
        first = self._merged + 1
        keys = [self._paths.study_object(number) for number in range(first, last + 1)]
        events = [event for _ in keys for event in self._unmerged.popleft()]
        self._store.write(self._paths.study_object(first, last), _payload(events, self._generation))
        self._store.delete(keys)
        self._merged = last

    def _remove_merged(self) -> None:
        """Removes single objects that one which was read holds too."""
        found = (_parsed(head.key, self._paths) for head in self._store.list(self._paths.study))
        singles = (one for one in found if one is not None and one.first == one.last)
        self._store.delete([one.key for one in singles if one.last <= self._merged])


def read_events(store: Store, paths: RunPaths) -> list[Event]:
    """All events of a study, in order, for readers."""
    return LogReader(store, paths).events()


class LogReader:
    """Reads a study's log again and again; what it has read it does not fetch once more."""

    def __init__(self, store: Store, paths: RunPaths) -> None:
        self._store = store
        self._paths = paths
        self._known: dict[str, list[Event]] = {}
        """By key of the objects, none of which ever changes."""

    def events(self) -> list[Event]:
        """All events so far, in order. DamagedObject where one cannot be read."""
        try:
            return self._events()
        except ObjectMissing:  # the driver has just put several objects into one
            return self._events()

    def _events(self) -> list[Event]:
        objects = list(_contiguous(self._store, self._paths, after=0))
        missing = [one for one in objects if one.key not in self._known]
        known = self._known | {one.key: events for one, events in _read(self._store, missing)}
        self._known = {one.key: known[one.key] for one in objects}
        return [event for one in objects for event in self._known[one.key]]


def read_objects(
    store: Store, paths: RunPaths, *, after: int = 0
) -> Iterator[tuple[_Object, list[Event]]]:
    """The objects after that number with their events, in order, up to the first gap."""
    yield from _read(store, list(_contiguous(store, paths, after=after)))


def _read(store: Store, objects: Sequence[_Object]) -> Iterator[tuple[_Object, list[Event]]]:
    """Objects with their events, in order; some are read ahead."""
    with ThreadPoolExecutor(_MAX_PARALLEL_READS) as pool:
        for place in range(0, len(objects), _MAX_PARALLEL_READS):
            batch = objects[place : place + _MAX_PARALLEL_READS]
            held = pool.map(lambda one: _events(store, one.key), batch)
            yield from zip(batch, held, strict=True)


def _contiguous(store: Store, paths: RunPaths, *, after: int) -> Iterator[_Object]:
    found = [
        one
        for head in store.list(paths.study)
        if (one := _parsed(head.key, paths)) is not None and one.last > after
    ]
    # A merged object before the single ones in it, which may not be removed yet.
    found.sort(key=lambda one: (one.first, -one.last))
    last = after
    for one in found:
        if one.last <= last:
            continue
        if one.first > last + 1:
            return
        yield one
        last = one.last


def _parsed(key: str, paths: RunPaths) -> _Object | None:
    match = _NAME.fullmatch(key.removeprefix(paths.study))
    if match is None:
        return None
    first = int(match[1])
    return _Object(key, first, int(match[2] or first))


def _events(store: Store, key: str) -> list[Event]:
    return read_whole(store, key, _parse, hint=DAMAGED_RECORD_HINT)


def _parse(payload: bytes) -> list[Event]:
    """ValueError where it is no object of a log."""
    tree = unsealed(json.loads(payload))
    return _EVENTS.validate_python(tree.get("events"))


def _payload(events: Sequence[Event], generation: int) -> bytes:
    return sealed(
        {"generation": generation, "events": [event.model_dump(mode="json") for event in events]}
    )
