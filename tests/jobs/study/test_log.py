"""A study's log: whole objects in order, one writer, and as quick to read when it is long."""

from __future__ import annotations

import pytest

from cluster.storage import DamagedObject, Store
from jobs.record import RunPaths
from jobs.study import log as study_log
from jobs.study.events import Asked, Event, Started
from jobs.study.log import LogReader, StudyLog, StudySuperseded, read_events

PATHS = RunPaths("study")


def asked(trial: int) -> Event:
    return Asked(trial=trial, values={"optimizer.learning_rate": 1e-4 * (trial + 1)})


def test_events_are_read_as_they_were_appended(store: Store) -> None:
    log = StudyLog(store, PATHS, generation=1)
    assert list(log.open()) == []
    log.append([asked(0), Started(trial=0, leg=1, slot="a", until=0.5)])
    log.append([asked(1)])
    events = [asked(0), Started(trial=0, leg=1, slot="a", until=0.5), asked(1)]
    assert read_events(store, PATHS) == events
    assert list(StudyLog(store, PATHS, generation=2).open()) == events


def test_a_driver_that_was_superseded_appends_no_more(store: Store) -> None:
    first = StudyLog(store, PATHS, generation=1)
    list(first.open())
    first.append([asked(0)])
    second = StudyLog(store, PATHS, generation=2)
    assert list(second.open()) == [asked(0)]
    with pytest.raises(StudySuperseded, match="another driver"):
        first.append([asked(1)])
    second.append([asked(2)])
    assert read_events(store, PATHS) == [asked(0), asked(2)]


def test_what_was_appended_while_a_driver_took_over_is_not_lost(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (StudyLog(store, PATHS, generation=n) for n in (1, 2))
    list(first.open())
    read = study_log.read_objects

    def and_then_one_more(*args: object, **named: object) -> object:
        found = list(read(*args, **named))  # type: ignore[arg-type]
        monkeypatch.setattr(study_log, "read_objects", read)
        first.append([asked(0)])
        return found

    monkeypatch.setattr(study_log, "read_objects", and_then_one_more)
    assert list(second.open()) == [asked(0)]
    with pytest.raises(StudySuperseded):
        first.append([asked(1)])


def test_many_objects_become_one(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study_log, "OBJECTS_IN_ONE", 4)
    log = StudyLog(store, PATHS, generation=1)
    list(log.open())
    for trial in range(10):
        log.append([asked(trial)])
    names = [head.key.removeprefix(PATHS.study) for head in store.list(PATHS.study)]
    assert names == [
        "00000001-00000004.json", "00000005-00000008.json",
        "00000009.json", "00000010.json", "00000011.json",
    ]  # fmt: skip
    assert read_events(store, PATHS) == [asked(trial) for trial in range(10)]
    again = StudyLog(store, PATHS, generation=2)
    assert list(again.open()) == [asked(trial) for trial in range(10)]
    again.append([asked(10)])
    assert read_events(store, PATHS)[-1] == asked(10)


def test_objects_that_are_in_a_merged_one_count_once(store: Store) -> None:
    """As where a driver is killed after it has written it, before it has removed them."""
    log = StudyLog(store, PATHS, generation=1)
    list(log.open())
    log.append([asked(0)])
    log.append([asked(1)])
    singles = {head.key: store.read(head.key) for head in store.list(PATHS.study)}
    log._merge_up_to(2)
    for key, content in singles.items():
        if store.head(key) is None:
            store.write(key, content)
    log.append([asked(2)])
    assert read_events(store, PATHS) == [asked(0), asked(1), asked(2)]
    assert list(StudyLog(store, PATHS, generation=2).open()) == [asked(0), asked(1), asked(2)]
    # The next driver has removed them, and nothing else.
    names = [head.key.removeprefix(PATHS.study) for head in store.list(PATHS.study)]
    assert names == [
        "00000001-00000002.json", "00000003.json", "00000004.json", "00000005.json",
    ]  # fmt: skip
    assert read_events(store, PATHS) == [asked(0), asked(1), asked(2)]


def test_a_reader_that_meets_the_merge_reads_again(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = StudyLog(store, PATHS, generation=1)
    list(log.open())
    log.append([asked(0)])
    read = study_log._events

    def while_merged(at: Store, key: str) -> list[Event]:
        monkeypatch.setattr(study_log, "_events", read)
        log._merge_up_to(2)
        return read(at, key)

    monkeypatch.setattr(study_log, "_events", while_merged)
    monkeypatch.setattr(study_log, "_MAX_PARALLEL_READS", 1)
    assert read_events(store, PATHS) == [asked(0)]


def test_a_damaged_object_is_named(store: Store) -> None:
    log = StudyLog(store, PATHS, generation=1)
    list(log.open())
    log.append([asked(0)])
    key = PATHS.study_object(2)
    store.write(key, store.read(key).replace(b"0.0001", b"0.0002"))
    with pytest.raises(DamagedObject, match=r"study/00000002\.json is damaged"):
        read_events(store, PATHS)


def test_a_reader_fetches_each_object_once_and_bears_their_being_merged(
    local_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study_log, "OBJECTS_IN_ONE", 4)
    log = StudyLog(local_store, PATHS, generation=1)
    list(log.open())
    fetched: list[str] = []

    class Watched:
        def __getattr__(self, name: str) -> object:
            return getattr(local_store, name)

        def read(self, key: str) -> bytes:
            fetched.append(key)
            return local_store.read(key)

    reader = LogReader(Watched(), PATHS)  # type: ignore[arg-type]
    for trial in range(11):
        log.append([asked(trial)])
        events = reader.events()
        assert [e.trial for e in events if isinstance(e, Asked)] == list(range(trial + 1))
    assert reader.events() == events
    assert len(fetched) == len(set(fetched))
