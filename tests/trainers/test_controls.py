"""Requests in the run folder: heard once, in their order, and not those of an earlier driver."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any, Literal

import pytest

from cluster.storage import Head, StorageError, Store
from jobs.record import Control, Lease, RunPaths
from trainers import controls as module
from trainers.controls import (
    ControlPoller,
    Requests,
    ask_to_yield,
    last_attempt,
    requests_to,
)
from trainers.fence import Fence

PATHS = RunPaths("run")


class Rounds:
    """A store that counts looks at its list, and refuses them while `down` is set."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._looked = threading.Semaphore(0)
        self.down = False
        self.broken = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def list(self, prefix: str, *, after: str) -> Iterator[Head]:
        try:
            if self.down:
                raise StorageError("the store is away")
            if self.broken:
                raise OSError("too many open files")
            yield from self._store.list(prefix, after=after)
        finally:
            self._looked.release()

    def wait(self) -> None:
        """Returns after a look that began after the call."""
        while self._looked.acquire(blocking=False):
            pass
        for _ in range(2):
            assert self._looked.acquire(timeout=30)


@pytest.fixture
def store(local_store: Store, monkeypatch: pytest.MonkeyPatch) -> Rounds:
    monkeypatch.setattr(module, "POLL_SECONDS", 0.005)
    return Rounds(local_store)


def ask(
    store: Rounds,
    number: int,
    kind: Literal["stop", "save", "yield"],
    *,
    attempt: int | None = None,
    generation: int | None = None,
) -> None:
    request = Control(kind=kind, requested_at=time.time(), attempt=attempt, generation=generation)
    store.write(PATHS.control_request(number), request.to_bytes())


def poller_of(store: Rounds, *, after: int, attempt: int) -> ControlPoller:
    fence = Fence(store, PATHS, generation=3)  # type: ignore[arg-type]
    return ControlPoller(store, PATHS, after=after, attempt=attempt, fence=fence)  # type: ignore[arg-type]


def test_nothing_is_asked_for_at_first(store: Rounds) -> None:
    with poller_of(store, after=0, attempt=1) as poller:
        store.wait()
        assert poller.take() == Requests()


def test_a_save_is_heard_once_and_a_stop_stays(store: Rounds) -> None:
    with poller_of(store, after=0, attempt=1) as poller:
        ask(store, 1, "save")
        store.wait()
        assert poller.take() == Requests(save=True)
        assert poller.take() == Requests()
        ask(store, 2, "stop")
        ask(store, 3, "save")
        store.wait()
        assert poller.take() == Requests(stop=True, save=True)
        assert poller.take() == Requests(stop=True)


def test_requests_to_an_earlier_driver_are_not_heard(store: Rounds) -> None:
    ask(store, 1, "stop")
    with poller_of(store, after=1, attempt=1) as poller:
        store.wait()
        assert poller.take() == Requests()
        ask(store, 2, "save")
        store.wait()
        assert poller.take() == Requests(save=True)


def test_a_request_that_is_not_known_is_passed_over(
    store: Rounds, capsys: pytest.CaptureFixture[str]
) -> None:
    store.write(PATHS.control_request(1), b'{"kind": "dance"}')
    ask(store, 2, "save")
    with poller_of(store, after=0, attempt=1) as poller:
        store.wait()
        assert poller.take() == Requests(save=True)
    assert capsys.readouterr().err.count("control/0001.json is no request that is known") == 1


def test_a_store_that_is_away_for_a_while_loses_no_request(
    store: Rounds, capsys: pytest.CaptureFixture[str]
) -> None:
    with poller_of(store, after=0, attempt=1) as poller:
        store.down = True
        ask(store, 1, "stop")
        store.wait()
        assert poller.take() == Requests()
        store.down = False
        store.wait()
        assert poller.take() == Requests(stop=True)
    assert "requests are not heard at present: the store is away" in capsys.readouterr().err


def test_an_error_that_nobody_foresaw_does_not_make_it_deaf(
    store: Rounds, capsys: pytest.CaptureFixture[str]
) -> None:
    with poller_of(store, after=0, attempt=1) as poller:
        store.broken = True
        ask(store, 1, "stop")
        store.wait()
        assert poller.take() == Requests()
        store.broken = False
        store.wait()
        assert poller.take() == Requests(stop=True)
    assert "requests are not heard at present" in capsys.readouterr().err


def test_that_a_newer_driver_has_the_run_is_heard_unasked(store: Rounds) -> None:
    lease = Lease(generation=3, holder="h", host="node-7", pid=9, renewals=0, ttl_seconds=60.0)
    store.write(PATHS.lease, lease.to_bytes())
    with poller_of(store, after=0, attempt=1) as poller:
        store.wait()
        assert poller.take() == Requests()
        newer = lease.model_copy(update={"generation": 4})
        store.write(PATHS.lease, newer.to_bytes())
        ask(store, 1, "save")
        store.wait()
        asked = poller.take()
        assert "driven by process 9 on node-7 (generation 4)" in str(asked.superseded)
        assert asked.save
        assert poller.take().superseded is asked.superseded


def test_the_thread_ends_with_the_block(store: Rounds) -> None:
    with poller_of(store, after=0, attempt=1):
        store.wait()
    assert "shoal-controls" not in [thread.name for thread in threading.enumerate()]


def test_a_request_to_give_way_is_heard_by_its_attempt_alone(store: Rounds) -> None:
    ask(store, 1, "yield", attempt=1, generation=3)
    for attempt in (1, 2):
        with poller_of(store, after=0, attempt=attempt) as poller:
            store.wait()
            assert poller.take() == Requests(yields=attempt == 1)


def test_a_request_to_give_way_is_not_heard_by_the_next_drivers_attempt_of_that_number(
    store: Rounds,
) -> None:
    # As a driver asks whose machine is taken: its next attempt as well, which never began.
    ask(store, 1, "yield", attempt=5, generation=2)
    with poller_of(store, after=0, attempt=5) as poller:
        store.wait()
        assert poller.take() == Requests()
        ask(store, 2, "yield", attempt=5, generation=3)
        store.wait()
        assert poller.take() == Requests(yields=True)


def test_requests_are_found_where_no_worker_hears_them(local_store: Store) -> None:
    def ask_for(
        number: int,
        kind: Literal["stop", "save", "yield"],
        *,
        attempt: int | None = None,
        generation: int | None = None,
    ) -> None:
        request = Control(kind=kind, requested_at=0.0, attempt=attempt, generation=generation)
        local_store.write(PATHS.control_request(number), request.to_bytes())

    def found(*, after: int, attempt: int = 3, generation: int = 2) -> Requests:
        return requests_to(local_store, PATHS, after=after, attempt=attempt, generation=generation)

    ask_for(1, "stop")
    local_store.write(PATHS.control_request(2), b"no request")
    ask_for(3, "save")
    assert found(after=0) == Requests(stop=True, save=True)
    assert found(after=1) == Requests(save=True)
    ask_for(4, "yield", attempt=3, generation=2)
    assert found(after=3) == Requests(yields=True)
    assert found(after=3, attempt=4) == Requests()
    assert found(after=3, generation=3) == Requests()


def test_the_newest_attempt_is_asked_to_give_way_by_a_request_of_its_own(
    local_store: Store,
) -> None:
    assert last_attempt(local_store, PATHS) == 0
    for number in (1, 2):
        local_store.write(PATHS.attempt(number), b"{}")
    local_store.write(PATHS.outcome(1), b"{}")
    assert last_attempt(local_store, PATHS) == 2
    for foreign in (".nfs0001", "notes.json", "9 copy.json"):
        local_store.write(f"{PATHS.attempts}{foreign}", b"")
    assert last_attempt(local_store, PATHS) == 2
    for _ in range(2):
        ask_to_yield(local_store, PATHS, attempt=2, generation=4, by="a test")
    keys = [head.key for head in local_store.list(PATHS.control)]
    assert keys == [PATHS.control_request(1), PATHS.control_request(2)]
    found = Control.model_validate_json(local_store.read(keys[0]))
    assert (found.kind, found.attempt, found.by) == ("yield", 2, "a test")
    assert found.generation == 4
