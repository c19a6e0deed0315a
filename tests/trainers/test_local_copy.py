"""Folders of a store on this node: verified, fetched once, whole or absent."""

from __future__ import annotations

import errno
import hashlib
import os
import signal
from pathlib import Path

import pytest
import xxhash

from cluster.storage import ObjectMissing, Store, open_store
from jobs.errors import EnvironmentFault
from jobs.record import Part
from tests.ranks import PROCESSES
from trainers import local_copy as module
from trainers.local_copy import DamagedPart, drop_copy, local_copy

CONTENT = {"config.json": b"{}", "model/weights": b"w" * 5000, "empty": b""}


@pytest.fixture
def source(tmp_path: Path) -> Store:
    store = open_store(tmp_path / "source")
    for name, data in CONTENT.items():
        store.write(name, data)
    return store


@pytest.fixture
def parts() -> list[Part]:
    return [
        Part(
            name=name,
            bytes=len(data),
            sha256=hashlib.sha256(data).hexdigest(),
            xxh3=xxhash.xxh3_128_hexdigest(data),
        )
        for name, data in CONTENT.items()
    ]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "copy"


def held(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def test_all_parts_are_there(source: Store, parts: list[Part], folder: Path) -> None:
    assert local_copy(source, parts, folder) == folder
    assert held(folder) == CONTENT


class Counting:
    """A store that counts its downloads in a file, over processes."""

    def __init__(self, store: Store, log: Path) -> None:
        self._store = store
        self._log = log
        self.uri = store.uri

    def download(self, key: str, path: Path, *, hashed: bool = False) -> str:
        with self._log.open("a") as file:
            file.write(key + "\n")
        return self._store.download(key, path, hashed=hashed)


def test_two_processes_at_once_fetch_once(
    source: Store, parts: list[Part], folder: Path, tmp_path: Path
) -> None:
    counting = Counting(source, tmp_path / "log")
    processes = [
        PROCESSES.Process(target=local_copy, args=(counting, parts, folder)) for _ in range(3)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert sorted((tmp_path / "log").read_text().split()) == sorted(CONTENT)
    assert held(folder) == CONTENT


@pytest.mark.parametrize("change", ["flipped", "longer", "shorter"])
def test_a_damaged_part_is_refused_and_nothing_stays(
    source: Store, parts: list[Part], folder: Path, change: str
) -> None:
    data = CONTENT["model/weights"]
    source.write(
        "model/weights",
        {"flipped": b"W" + data[1:], "longer": data + b"w", "shorter": data[1:]}[change],
    )
    with pytest.raises(DamagedPart, match="model/weights is damaged"):
        local_copy(source, parts, folder)
    assert [path.name for path in folder.parent.iterdir()] == ["copy.lock"]
    source.write("model/weights", data)
    assert held(local_copy(source, parts, folder)) == CONTENT


class Spoiling(Counting):
    """A store on whose way one bit of the first downloads of the weights is flipped."""

    def __init__(self, store: Store, log: Path, *, times: int) -> None:
        super().__init__(store, log)
        self.times = times

    def download(self, key: str, path: Path, *, hashed: bool = False) -> str:
        if key != "model/weights" or not self.times:
            return super().download(key, path, hashed=hashed)
        super().download(key, path)
        self.times -= 1
        data = bytearray(path.read_bytes())
        data[17] ^= 4
        path.write_bytes(data)
        return xxhash.xxh3_128_hexdigest(data) if hashed else ""


@pytest.mark.parametrize("times", [1, 2])
def test_a_part_that_was_spoilt_on_its_way_is_fetched_anew(
    source: Store, parts: list[Part], folder: Path, tmp_path: Path, times: int
) -> None:
    spoiling = Spoiling(source, tmp_path / "log", times=times)
    assert held(local_copy(spoiling, parts, folder)) == CONTENT  # type: ignore[arg-type]
    fetched = (tmp_path / "log").read_text().split()
    assert fetched.count("model/weights") == times + 1
    assert len(fetched) == len(CONTENT) + times


def test_a_part_that_comes_spoilt_each_time_is_given_up(
    source: Store, parts: list[Part], folder: Path, tmp_path: Path
) -> None:
    spoiling = Spoiling(source, tmp_path / "log", times=1000)
    with pytest.raises(DamagedPart, match="model/weights is damaged"):
        local_copy(spoiling, parts, folder)  # type: ignore[arg-type]
    assert not folder.exists()


def test_a_part_without_a_digest_is_checked_by_its_bytes(source: Store, folder: Path) -> None:
    wrong = Part(name="config.json", bytes=3, sha256="", xxh3="")
    with pytest.raises(DamagedPart):
        local_copy(source, [wrong], folder)
    right = Part(name="config.json", bytes=2, sha256="", xxh3="")
    assert held(local_copy(source, [right], folder)) == {"config.json": b"{}"}


def test_a_missing_part_leaves_nothing(source: Store, parts: list[Part], folder: Path) -> None:
    source.delete(["model/weights"])
    with pytest.raises(ObjectMissing):
        local_copy(source, parts, folder)
    assert not folder.exists()


def test_a_full_disk_is_the_environments_fault(
    source: Store, parts: list[Part], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, *_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        with pytest.raises(EnvironmentFault) as raised:
            local_copy(source, parts, folder)
    [problem] = raised.value.problems
    assert f"{folder.parent} cannot hold 5002 bytes" in problem.message
    assert "No space left on device" in problem.message
    assert "SHOAL_CACHE" in str(problem.hint)
    assert not folder.exists()


@pytest.mark.parametrize("name", ["../outside", "/outside", "a/../../outside", "a//b", ""])
def test_a_part_that_would_lie_elsewhere_is_refused_before_anything_is_made(
    source: Store, parts: list[Part], folder: Path, name: str
) -> None:
    with pytest.raises(DamagedPart, match="no name of a file"):
        local_copy(source, [*parts, Part(name=name, bytes=1, sha256="", xxh3="")], folder)
    assert not folder.parent.exists()


@pytest.mark.parametrize("harm", ["shorter", "gone"])
def test_a_copy_that_was_harmed_is_fetched_anew(
    source: Store, parts: list[Part], folder: Path, harm: str
) -> None:
    weights = local_copy(source, parts, folder) / "model/weights"
    if harm == "gone":
        weights.unlink()
    else:
        weights.write_bytes(b"w")
    assert held(local_copy(source, parts, folder)) == CONTENT
    found = sorted(path.name for path in folder.parent.iterdir())
    assert found == ["copy", "copy.boot", "copy.lock"]


def test_a_copy_from_before_the_machines_last_start_is_fetched_anew(
    source: Store, parts: list[Part], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = local_copy(source, parts, folder) / "model/weights"
    weights.write_bytes(bytes(len(CONTENT["model/weights"])))  # as after a loss of power
    monkeypatch.setattr(module, "BOOT_ID", "the next start")
    assert held(local_copy(source, parts, folder)) == CONTENT


class Killing(Counting):
    """A store in whose second download the process is killed."""

    def download(self, key: str, path: Path, *, hashed: bool = False) -> str:
        digest = super().download(key, path, hashed=hashed)
        if len(self._log.read_text().split()) >= 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return digest


def test_a_kill_in_the_middle_leaves_nothing_that_looks_whole(
    source: Store, parts: list[Part], folder: Path, tmp_path: Path
) -> None:
    killed = PROCESSES.Process(
        target=local_copy, args=(Killing(source, tmp_path / "log"), parts, folder)
    )
    killed.start()
    killed.join(30)
    assert killed.exitcode == -signal.SIGKILL
    assert not folder.exists()
    assert held(local_copy(source, parts, folder)) == CONTENT
    found = sorted(path.name for path in folder.parent.iterdir())
    assert found == ["copy", "copy.boot", "copy.lock"]


def test_a_copy_that_is_dropped_is_fetched_anew(
    source: Store, parts: list[Part], folder: Path
) -> None:
    local_copy(source, parts, folder)
    drop_copy(folder)
    assert list(folder.parent.iterdir()) == []
    drop_copy(folder)
    assert held(local_copy(source, parts, folder)) == CONTENT


def drop_and_die(folder: Path) -> None:
    def die(path: Path, **_: object) -> None:
        if path.exists():
            (path / "model/weights").unlink()
            os.kill(os.getpid(), signal.SIGKILL)

    module.shutil.rmtree = die
    drop_copy(folder)


def test_a_kill_while_a_copy_is_dropped_leaves_nothing_that_looks_whole(
    source: Store, parts: list[Part], folder: Path
) -> None:
    local_copy(source, parts, folder)

    killed = PROCESSES.Process(target=drop_and_die, args=(folder,))
    killed.start()
    killed.join(30)
    assert killed.exitcode == -signal.SIGKILL
    assert held(local_copy(source, parts, folder)) == CONTENT
