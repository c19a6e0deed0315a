"""The cache of a node: one fetch for all its processes, never over its limit, never in the way."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import resource
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from filelock import FileLock

from jobs.errors import EnvironmentFault
from trainers.data.cache import NodeCache, _file_system_of, cache_folder

SPAWN = multiprocessing.get_context("spawn")


def blobs(folder):
    return [path for path in (folder / "blobs").glob("*/*") if path.is_file()]


def stored_bytes(folder):
    return sum(path.stat().st_size for path in blobs(folder))


def fail() -> bytes:
    raise AssertionError("fetched, but it was kept")


def fetch_and_log(folder: Path, log: Path, barrier) -> None:
    """In a process of its own: gets one key and notes each fetch as a line."""

    def fetch() -> bytes:
        with log.open("a") as lines:
            lines.write(f"{os.getpid()}\n")
        time.sleep(0.1)
        return b"row group"

    barrier.wait()
    assert NodeCache(folder, limit_bytes=100).get("group 1", fetch) == b"row group"


def hang_in_fetch(folder: Path, fetching) -> None:
    def fetch() -> bytes:
        fetching.set()
        time.sleep(60)
        return b""

    NodeCache(folder, limit_bytes=100).get("group 1", fetch)


def test_two_processes_fetch_once(tmp_path):
    barrier = SPAWN.Barrier(2)
    log = tmp_path / "fetches"
    processes = [
        SPAWN.Process(target=fetch_and_log, args=(tmp_path / "cache", log, barrier))
        for _ in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert len(log.read_text().splitlines()) == 1


def test_a_killed_process_leaves_neither_a_lock_nor_a_part(tmp_path):
    fetching = SPAWN.Event()
    process = SPAWN.Process(target=hang_in_fetch, args=(tmp_path, fetching))
    process.start()
    assert fetching.wait(30)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    cache = NodeCache(tmp_path, limit_bytes=100)
    assert cache.get("group 1", lambda: b"whole") == b"whole"
    assert cache.get("group 1", fail) == b"whole"


def test_threads_fetch_each_key_once_and_stay_within_the_limit(tmp_path):
    cache = NodeCache(tmp_path, limit_bytes=1000)
    sizes = []

    def get(number: int) -> None:
        key = number % 40
        assert cache.get(str(key), lambda: bytes([key]) * 100) == bytes([key]) * 100
        sizes.append(stored_bytes_now(tmp_path))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(get, range(200)))
    assert max(sizes) <= 1000
    assert not list((tmp_path / "new").iterdir())
    assert len(list((tmp_path / "locks").iterdir())) <= 256


def stored_bytes_now(folder):
    """Bytes of all files at one moment: files come and go under this lock only, and one that is
    renamed meanwhile, from `new` to `blobs`, is counted once at most."""
    total = 0
    with FileLock(folder / "usage.lock"):
        for path in [*(folder / "blobs").glob("*/*"), *(folder / "new").iterdir()]:
            with contextlib.suppress(FileNotFoundError):
                total += path.stat().st_size
    return total


def test_a_process_sets_aside_room_for_many_files_at_once(tmp_path):
    """So that each of them does not wait for the lock that all processes share."""
    cache, usage = NodeCache(tmp_path, limit_bytes=256_000), []
    cache.get("first", lambda: b"x" * 100)
    for key in range(20):
        cache.get(str(key), lambda: b"x" * 100)
        usage.append(int((tmp_path / "usage").read_bytes()))
        assert stored_bytes(tmp_path) <= usage[-1]
    assert usage == [1100] * 10 + [2100] * 10


def test_what_is_set_aside_takes_no_more_than_its_share_beyond_the_limit(tmp_path):
    processes = [NodeCache(tmp_path, limit_bytes=25_600) for _ in range(3)]
    for key in range(600):
        processes[key % 3].get(str(key), lambda: b"x" * 90)
        processes[key % 2].get(f"small {key}", lambda: b"x" * 20)
        assert stored_bytes(tmp_path) <= 25_600 + 3 * 100
    assert stored_bytes(tmp_path) > 20_000


def test_the_least_recently_used_goes_first(tmp_path):
    cache = NodeCache(tmp_path, limit_bytes=30)
    for key in "abc":
        cache.get(key, lambda: b"x" * 10)
        age(tmp_path)
    assert cache.get("a", fail) == b"x" * 10
    cache.get("d", lambda: b"x" * 10)
    assert cache.get("a", fail) == b"x" * 10
    assert cache.get("d", fail) == b"x" * 10
    fetched = []
    cache.get("b", lambda: fetched.append(1) or b"x" * 10)
    assert fetched == [1]
    assert stored_bytes(tmp_path) <= 30


def age(folder):
    """Makes every file a second older, so that the order of uses does not hang on the clock."""
    for path in blobs(folder):
        modified = path.stat().st_mtime_ns - 10**9
        os.utime(path, ns=(modified, modified))


def test_another_process_with_a_wrong_usage_is_corrected_by_counting(tmp_path):
    cache = NodeCache(tmp_path, limit_bytes=100)
    cache.get("a", lambda: b"x" * 60)
    (tmp_path / "usage").write_bytes(b"12")
    cache.get("b", lambda: b"x" * 60)
    assert stored_bytes(tmp_path) == 60
    (tmp_path / "usage").write_bytes(b"%020d" % 10**9)
    cache.get("c", lambda: b"x" * 30)
    assert stored_bytes(tmp_path) == 90
    assert int((tmp_path / "usage").read_bytes()) == 90


def test_unfinished_files_of_the_dead_are_removed(tmp_path):
    cache = NodeCache(tmp_path, limit_bytes=100)
    cache.get("a", lambda: b"x" * 60)
    dead, alive = tmp_path / "new" / "dead", tmp_path / "new" / "alive"
    dead.write_bytes(b"x" * 30)
    alive.write_bytes(b"x" * 5)
    os.utime(dead, (0, 0))
    cache.get("b", lambda: b"x" * 50)
    assert not dead.exists()
    assert alive.exists()
    assert stored_bytes(tmp_path) == 50


def test_what_is_larger_than_the_limit_is_passed_through(tmp_path):
    cache = NodeCache(tmp_path, limit_bytes=10)
    assert cache.get("a", lambda: b"x" * 11) == b"x" * 11
    assert not blobs(tmp_path)
    assert cache.get("a", lambda: b"y" * 11) == b"y" * 11


def test_a_dropped_key_is_fetched_again(tmp_path):
    cache = NodeCache(tmp_path, limit_bytes=100)
    assert cache.get("a", lambda: b"wrong") == b"wrong"
    cache.drop("a")
    cache.drop("a")
    assert cache.get("a", lambda: b"right") == b"right"
    assert cache.get("a", fail) == b"right"


def test_an_error_of_the_fetch_leaves_nothing(tmp_path):
    cache = NodeCache(tmp_path, limit_bytes=100)
    with pytest.raises(AssertionError, match="fetched"):
        cache.get("a", fail)
    assert cache.get("a", lambda: b"x") == b"x"


@contextmanager
def no_file_larger_than(num_bytes: int):
    """The kernel refuses to grow files, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_one_warning_and_no_error(tmp_path, caplog):
    cache = NodeCache(tmp_path, limit_bytes=10**6)
    cache.get("kept", lambda: b"x" * 10)
    caplog.set_level(logging.WARNING)
    with no_file_larger_than(1000):
        assert cache.get("a", lambda: b"x" * 5000) == b"x" * 5000
        assert cache.get("b", lambda: b"y" * 5000) == b"y" * 5000
    [record] = caplog.records
    assert str(tmp_path) in record.getMessage()
    assert "SHOAL_CACHE" in record.getMessage()
    assert not list((tmp_path / "new").iterdir())
    assert cache.get("kept", fail) == b"x" * 10


def test_a_folder_that_cannot_be_made_is_an_error_with_a_hint(tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(EnvironmentFault, match=r"cannot create .*file/cache") as raised:
        NodeCache(tmp_path / "file" / "cache", limit_bytes=10).get("a", fail)
    assert "SHOAL_CACHE" in str(raised.value.problems[0].hint)


@pytest.fixture
def mounts(monkeypatch):
    """What is mounted where, as (mount point, kind), in the order in which it was."""

    def have(*mounted):
        partitions = [
            SimpleNamespace(mountpoint=str(point), fstype=kind) for point, kind in mounted
        ]
        monkeypatch.setattr(psutil, "disk_partitions", lambda *, all: partitions)  # noqa: A006
        _file_system_of.cache_clear()

    yield have
    monkeypatch.undo()
    _file_system_of.cache_clear()


@pytest.mark.parametrize("kind", ["nfs4", "lustre", "fuse.juicefs"])
def test_on_a_file_system_that_machines_share_each_has_a_folder_of_its_own(kind, mounts, tmp_path):
    shared, named = tmp_path / "home", {"SHOAL_CACHE": str(tmp_path / "home" / "cache")}
    mounts(("/", "ext4"), (shared, kind), (tmp_path / "home2", "ext4"))
    assert cache_folder(named) == shared / "cache" / f"node-{socket.gethostname()}"
    assert cache_folder({"SHOAL_CACHE": str(tmp_path / "home2")}) == tmp_path / "home2"
    mounts(("/", kind), (shared, kind), (shared, "xfs"))
    assert cache_folder(named) == shared / "cache"


def test_a_local_disk_is_shared_with_nobody(tmp_path):
    assert cache_folder({"SHOAL_CACHE": str(tmp_path)}) == tmp_path


def test_the_folder_comes_from_the_environment():
    assert cache_folder({"SHOAL_CACHE": "/fast", "XDG_CACHE_HOME": "/xdg"}) == Path("/fast")
    assert cache_folder({"XDG_CACHE_HOME": "/xdg"}) == Path("/xdg/shoal")
    assert cache_folder({}) == Path.home() / ".cache" / "shoal"
