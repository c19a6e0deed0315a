"""A run has one driver: races, take-overs, and holders that freeze."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest

from cluster.lease import Held, acquire, read_lease
from cluster.process import ProcessIdentity, identify
from cluster.storage import StorageError, Store
from jobs.errors import ClusterError
from jobs.record import Lease

KEY = "run-1/lease.json"
LONG = 600.0
SHORT = 0.6


@pytest.fixture
def another(store: Store) -> Lease:
    """A lease whose holder sits on another machine, so that nobody here can tell if it lives."""
    lease = Lease(
        generation=3,
        holder="elsewhere",
        host="another-host",
        boot="another-boot",
        pid=1,
        started="1",
        renewals=0,
        ttl_seconds=SHORT,
        renewed_at=1_790_000_000.0,
    )
    store.write(KEY, lease.to_bytes())
    return lease


def held_at(store: Store) -> Lease:
    found = read_lease(store, KEY)
    assert found is not None
    return found.lease


def test_the_first_driver_gets_the_first_generation(store: Store) -> None:
    with acquire(store, KEY, ttl_seconds=LONG) as held:
        assert held.generation == 1
        assert not held.lost.is_set()
        held.confirm()
        assert not held_at(store).released
    assert held_at(store).released


def test_a_released_lease_is_taken_at_once_with_the_next_generation(store: Store) -> None:
    for generation in (1, 2, 3):
        with acquire(store, KEY, ttl_seconds=LONG) as held:
            assert held.generation == generation


def test_a_held_lease_is_refused_with_its_holder(store: Store) -> None:
    with acquire(store, KEY, ttl_seconds=LONG):
        with pytest.raises(ClusterError) as caught:
            acquire(store, KEY, ttl_seconds=LONG)
        (problem,) = caught.value.problems
        clock = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC"
        assert re.fullmatch(
            rf"run-1 is driven by process {os.getpid()} on {socket.gethostname()} \(generation 1, "
            rf"since {clock}, last sign at {clock}, held until {clock} unless it is renewed\)",
            problem.message,
        )
        assert "shoal stop run-1 --wait" in str(problem.hint)
        assert f"kill -9 {os.getpid()}" in str(problem.hint)


def test_of_eight_that_ask_at_once_one_gets_it(store: Store) -> None:
    acquire(store, KEY, ttl_seconds=LONG).release()
    barrier = threading.Barrier(8)

    def ask(_: int) -> Held | None:
        barrier.wait()
        try:
            return acquire(store, KEY, ttl_seconds=LONG)
        except ClusterError:
            return None

    with ThreadPoolExecutor(8) as pool:
        winners = [held for held in pool.map(ask, range(8)) if held is not None]
    assert [held.generation for held in winners] == [2]
    winners[0].release()


def test_a_lease_of_another_machine_is_not_taken_unless_asked_to_wait(
    store: Store, another: Lease
) -> None:
    with pytest.raises(
        ClusterError, match=r"process 1 on another-host \(generation 3, last sign at"
    ):
        acquire(store, KEY, ttl_seconds=LONG)
    assert held_at(store) == another


def test_a_lease_that_nobody_renews_is_taken_after_its_time(store: Store, another: Lease) -> None:
    told: list[Lease] = []
    started = time.monotonic()
    with acquire(store, KEY, ttl_seconds=LONG, wait=told.append) as held:
        assert time.monotonic() - started >= SHORT
        assert held.generation == another.generation + 1
    assert told == [another]


def test_a_lease_that_is_renewed_while_watched_is_refused(store: Store, another: Lease) -> None:
    def renew(lease: Lease) -> None:
        store.write(KEY, lease.model_copy(update={"renewals": 1}).to_bytes())

    with pytest.raises(ClusterError, match="another-host"):
        acquire(store, KEY, ttl_seconds=LONG, wait=renew)


def test_a_lease_that_is_released_while_watched_is_taken(store: Store, another: Lease) -> None:
    def release(lease: Lease) -> None:
        store.write(KEY, lease.model_copy(update={"released": True}).to_bytes())

    with acquire(store, KEY, ttl_seconds=LONG, wait=release) as held:
        assert held.generation == another.generation + 1


def test_a_held_lease_is_renewed_past_its_time(local_store: Store) -> None:
    with acquire(local_store, KEY, ttl_seconds=2.0) as held:
        assert not held.lost.wait(2.2)
        held.confirm()
        assert held_at(local_store).renewals >= 2
        with pytest.raises(ClusterError):
            acquire(local_store, KEY, ttl_seconds=LONG, wait=True)


def test_a_holder_that_finds_another_one_has_lost(store: Store) -> None:
    with acquire(store, KEY, ttl_seconds=SHORT) as held:
        other = held_at(store).model_copy(
            update={"holder": "other", "generation": 2, "host": "far", "pid": 7}
        )
        store.write(KEY, other.to_bytes())
        assert held.lost.wait(10)
        with pytest.raises(ClusterError, match=r"was lost to process 7 on far \(generation 2, "):
            held.confirm()
    assert held_at(store) == other


def test_a_holder_whose_lease_was_deleted_has_lost(store: Store) -> None:
    with acquire(store, KEY, ttl_seconds=SHORT) as held:
        store.delete([KEY])
        assert held.lost.wait(10)
        with pytest.raises(ClusterError, match="was lost: it was deleted"):
            held.confirm()
    assert read_lease(store, KEY) is None


def test_a_holder_that_asks_knows_at_once_whether_it_has_lost(store: Store) -> None:
    with acquire(store, KEY, ttl_seconds=LONG) as held:
        held.confirm()
        assert held_at(store).renewals == 1
        other = held_at(store).model_copy(update={"holder": "other", "generation": 2})
        store.write(KEY, other.to_bytes())
        with pytest.raises(ClusterError, match="was lost to process"):
            held.confirm()
        assert held.lost.is_set()


class FaultyStore:
    """A store whose next renewals fail."""

    def __init__(self, store: Store, *, num_faults: int) -> None:
        self.store = store
        self.num_faults = num_faults
        self.has_renewed = threading.Event()

    def __getattr__(self, name: str) -> object:
        return getattr(self.store, name)

    def write_if_match(self, key: str, data: bytes, *, etag: str) -> str:
        if self.num_faults:
            self.num_faults -= 1
            raise StorageError("the store is gone")
        self.has_renewed.set()
        return self.store.write_if_match(key, data, etag=etag)


def test_a_holder_whose_store_is_away_past_its_time_renews_when_it_is_back(
    local_store: Store,
) -> None:
    store = FaultyStore(local_store, num_faults=5)  # three renewals fit into the time to live
    with acquire(store, KEY, ttl_seconds=SHORT) as held:  # type: ignore[arg-type]
        with pytest.raises(StorageError, match="the store is gone"):
            held.confirm()
        assert store.has_renewed.wait(10)
        assert not held.lost.is_set()
        held.confirm()
        assert held_at(local_store).generation == 1


def test_a_holder_in_doubt_that_was_succeeded_finds_out_when_the_store_is_back(
    local_store: Store,
) -> None:
    store = FaultyStore(local_store, num_faults=2)
    with acquire(store, KEY, ttl_seconds=SHORT) as held:  # type: ignore[arg-type]
        other = held_at(local_store).model_copy(update={"holder": "other", "generation": 2})
        local_store.write(KEY, other.to_bytes())
        assert held.lost.wait(10)
        assert store.num_faults == 0
    assert held_at(local_store) == other


def test_time_in_which_the_store_does_not_answer_is_not_the_holders(
    store: Store, another: Lease
) -> None:
    class AwayThenBack:
        """The second look takes longer than the lease lives; before the next the holder renews."""

        def __init__(self) -> None:
            self.looks = 0

        def __getattr__(self, name: str) -> object:
            return getattr(store, name)

        def head(self, key: str) -> object:
            self.looks += 1
            if self.looks == 2:
                time.sleep(2 * SHORT)
            if self.looks == 3:
                store.write(KEY, another.model_copy(update={"renewals": 1}).to_bytes())
            return store.head(key)

    with pytest.raises(ClusterError, match="another-host"):
        acquire(AwayThenBack(), KEY, ttl_seconds=LONG, wait=True)  # type: ignore[arg-type]


class AnswersLost:
    """A store that does the next conditional writes, and whose answers to them do not come."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.num_faults = 0
        self.renewals_seen: list[int] = []

    def __getattr__(self, name: str) -> object:
        return getattr(self.store, name)

    def write_if_match(self, key: str, data: bytes, *, etag: str) -> str:
        self.renewals_seen.append(Lease.model_validate_json(data).renewals)
        given = self.store.write_if_match(key, data, etag=etag)
        if self.num_faults:
            self.num_faults -= 1
            raise StorageError("the store is gone")
        return given


def test_a_renewal_whose_answer_was_lost_is_the_holders_own(store: Store) -> None:
    losing = AnswersLost(store)
    with acquire(losing, KEY, ttl_seconds=1.5) as held:  # type: ignore[arg-type]
        losing.num_faults = 1
        assert not held.lost.wait(1.8)
        found = held_at(store)
        assert found.generation == 1
        assert found.renewals >= 2
        assert not losing.num_faults
    assert held_at(store).released


def test_a_release_whose_answer_was_lost_is_a_release(store: Store) -> None:
    losing = AnswersLost(store)
    held = acquire(losing, KEY, ttl_seconds=LONG)  # type: ignore[arg-type]
    losing.num_faults = 1
    held.release()
    assert held_at(store).released
    assert not held.lost.is_set()


def test_a_lease_that_cannot_be_given_back_does_not_fail_the_run(local_store: Store) -> None:
    store = FaultyStore(local_store, num_faults=1)
    acquire(store, KEY, ttl_seconds=LONG).release()  # type: ignore[arg-type]
    assert not held_at(local_store).released


HOLDER = """
import sys
from cluster.lease import acquire
from cluster.storage import open_store
held = acquire(open_store(sys.argv[1]), sys.argv[2], ttl_seconds=float(sys.argv[3]))
print("held", flush=True)
held.lost.wait()
print("lost", flush=True)
"""


def start_holder(store: Store, *, ttl_seconds: float) -> subprocess.Popen[str]:
    """Another process that holds the lease."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, store.uri, KEY, str(ttl_seconds)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


@pytest.fixture
def holders() -> Iterator[list[subprocess.Popen[str]]]:
    """Processes that are ended after the test."""
    started: list[subprocess.Popen[str]] = []
    yield started
    for process in started:
        process.kill()
        process.communicate()


def test_the_lease_of_a_killed_process_of_this_machine_is_taken_at_once(
    store: Store, holders: list[subprocess.Popen[str]]
) -> None:
    holders.append(start_holder(store, ttl_seconds=LONG))
    with pytest.raises(ClusterError, match=f"process {holders[0].pid} on "):
        acquire(store, KEY, ttl_seconds=LONG)
    holders[0].kill()
    holders[0].wait()
    with acquire(store, KEY, ttl_seconds=LONG) as held:
        assert held.generation == 2


def test_a_frozen_holder_loses_the_lease_and_finds_out_when_it_wakes(
    local_store: Store, holders: list[subprocess.Popen[str]]
) -> None:
    frozen = start_holder(local_store, ttl_seconds=SHORT)
    holders.append(frozen)
    frozen.send_signal(signal.SIGSTOP)
    with acquire(local_store, KEY, ttl_seconds=LONG, wait=True) as held:
        assert held.generation == 2
        frozen.send_signal(signal.SIGCONT)
        assert frozen.stdout is not None
        assert frozen.stdout.readline() == "lost\n"
        assert held_at(local_store).generation == 2


def test_a_process_is_known_by_more_than_its_number() -> None:
    me = identify()
    assert me.is_alive
    assert not me.has_ended
    later = ProcessIdentity(host=me.host, boot=me.boot, pid=me.pid, started="12")
    assert later.has_ended
    assert not later.is_alive
    for unknown in (
        ProcessIdentity(host="another", boot=me.boot, pid=me.pid, started="12"),
        ProcessIdentity(host=me.host, boot="another", pid=me.pid, started="12"),
        ProcessIdentity(host=me.host, boot="", pid=me.pid, started="12"),
    ):
        assert not unknown.has_ended


def test_a_zombie_has_ended() -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    identity = identify(child.pid)
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert identity.has_ended
    child.wait()
    assert identity.has_ended


LEADER_ENDS = """
import ctypes, threading, time
threading.Thread(target=lambda: time.sleep(600)).start()
print("ready", flush=True)
ctypes.CDLL(None).pthread_exit(None)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="threads end with their process")
def test_a_process_whose_other_threads_go_on_has_not_ended() -> None:
    with subprocess.Popen([sys.executable, "-c", LEADER_ENDS], stdout=subprocess.PIPE) as child:
        identity = identify(child.pid)
        try:
            assert child.stdout is not None
            assert child.stdout.readline() == b"ready\n"
            process, deadline = psutil.Process(child.pid), time.monotonic() + 30
            while process.status() != psutil.STATUS_ZOMBIE:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            assert child.poll() is None
            assert not identity.has_ended
        finally:
            child.kill()
    assert identity.has_ended
