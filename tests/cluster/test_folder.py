"""What only a local folder has: half-written files, full disks and missing rights."""

from __future__ import annotations

import errno
import mmap
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path
from typing import IO

import pytest

from cluster import folder
from cluster.folder import FolderStore, write_whole
from cluster.storage import ObjectExists, StorageError, Store, StoreAway, Unfinished, open_store


def files(path: Path) -> list[str]:
    return sorted(str(p.relative_to(path)) for p in path.rglob("*") if p.is_file())


def test_opening_and_reading_make_no_folder(local_store: Store) -> None:
    assert local_store.head("k") is None
    assert list(local_store.list()) == []
    local_store.delete(["k"])
    assert not Path(local_store.uri).exists()


def test_a_list_sorts_whole_keys_as_s3_does(local_store: Store) -> None:
    written = ["a-b", "a.txt", "a/x", "a/y/z", "a0", "b", "é"]
    for key in reversed(written):
        local_store.write(key, b"")
    assert [head.key for head in local_store.list()] == written
    assert [head.key for head in local_store.list(after="a/x")] == written[3:]
    assert [head.key for head in local_store.list("a")] == written[:5]


def test_a_write_that_fails_half_way_leaves_the_older_object(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    store.write("k", b"older")

    def fill(file: IO[bytes]) -> None:
        file.write(b"new")
        raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError):
        write_whole(tmp_path / "k", fill)
    assert store.read("k") == b"older"
    assert files(tmp_path) == ["k"]


def test_what_a_killed_writer_left_is_no_object(tmp_path: Path) -> None:
    program = (
        "import os, sys, pathlib; from cluster.folder import write_whole\n"
        "write_whole(pathlib.Path(sys.argv[1]), lambda f: (f.write(b'half'), os._exit(9)))"
    )
    ended = subprocess.run([sys.executable, "-c", program, str(tmp_path / "k")], check=False)
    assert ended.returncode == 9
    store = open_store(tmp_path)
    assert len(files(tmp_path)) == 1
    assert list(store.list()) == []
    assert store.head("k") is None
    store.write_if_absent("k", b"whole")
    assert [head.key for head in store.list()] == ["k"]


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (errno.ENOSPC, "disk or the quota is full"),
        (errno.EDQUOT, "disk or the quota is full"),
        (errno.EACCES, "permission denied"),
        (errno.EROFS, "read-only"),
        (errno.EIO, "Input/output error"),
        (errno.ESTALE, "does not answer rightly"),
    ],
)
def test_a_fault_of_the_system_is_told_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, text: str
) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    for write in (
        lambda: open_store(tmp_path).write("a/k", b"1"),
        lambda: open_store(tmp_path).write_if_absent("a/k", b"1"),
    ):
        with pytest.raises(StorageError, match=text) as caught:
            write()
        assert str(tmp_path / "a/k") in str(caught.value)
        assert caught.value.exit_code == 3
    assert files(tmp_path) == []


def test_mapped_bytes_that_cannot_be_written_are_given_back(
    local_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fail)
    monkeypatch.setattr(folder, "_SYNC_BYTES", 2**20)
    (tmp_path / "file").write_bytes(bytes(3 * 2**20))
    with (
        pytest.raises(StorageError, match="disk or the quota is full"),
        (tmp_path / "file").open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as held,
        memoryview(held) as view,
    ):
        local_store.write("k", view)
    assert files(Path(local_store.uri)) == []


def test_a_large_write_does_not_leave_all_of_its_bytes_to_the_end(
    local_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last flush would be silent for as long as the disk needs for all of them."""
    sync, sizes = os.fsync, list[int]()

    def look(descriptor: int) -> None:
        sizes.append(os.fstat(descriptor).st_size)
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", look)
    monkeypatch.setattr(folder, "_SYNC_BYTES", 2 * 2**20)
    local_store.write("k", bytes(5 * 2**20))
    assert sizes[:3] == [2 * 2**20, 4 * 2**20, 5 * 2**20]


def test_a_disk_that_is_full_during_a_download_leaves_no_file(
    s3_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    s3_store.write("k", b"0123456789")

    def fail(*arguments: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", fail)
    with pytest.raises(StorageError, match="disk or the quota is full"):
        s3_store.download("k", tmp_path / "target")
    assert files(tmp_path) == []


@pytest.mark.parametrize(
    ("number", "is_away"),
    [(errno.EIO, True), (errno.ESTALE, True), (errno.ETIMEDOUT, True), (errno.ENOSPC, False)],
)
def test_a_file_system_whose_server_is_gone_is_away(
    local_store: Store, monkeypatch: pytest.MonkeyPatch, number: int, is_away: bool
) -> None:
    local_store.write("k", b"1")

    def fail(*arguments: object, **options: object) -> IO[bytes]:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "open", fail)
    for use in (
        lambda: local_store.read("k"),
        lambda: local_store.head("k"),
        lambda: local_store.write("k", b"2"),
    ):
        with pytest.raises(StorageError) as caught:
            use()
        assert isinstance(caught.value, StoreAway) == is_away


def test_a_file_in_the_way_of_a_folder_is_told(local_store: Store) -> None:
    local_store.write("a", b"")
    with pytest.raises(StorageError, match="a file and a folder"):
        local_store.write("a/b", b"")
    local_store.write("c/d", b"")
    with pytest.raises(StorageError, match="a file and a folder"):
        local_store.write("c", b"")


def test_a_name_longer_than_the_system_allows_is_told(local_store: Store) -> None:
    with pytest.raises(StorageError, match="too long"):
        local_store.write("x" * 300, b"")


def test_a_file_name_that_is_no_key_is_told(tmp_path: Path) -> None:
    (tmp_path / "two\nlines").write_bytes(b"")
    with pytest.raises(StorageError, match="no store can hold"):
        list(open_store(tmp_path).list())


def test_no_object_is_dropped_as_a_write_that_has_not_ended(local_store: Store) -> None:
    local_store.write("a/k", b"1")
    with pytest.raises(ValueError, match="is an object"):
        local_store.drop_unfinished([Unfinished("a/k", "", 0.0)])
    assert local_store.read("a/k") == b"1"


def test_files_get_the_rights_that_the_user_gives_to_new_ones(local_store: Store) -> None:
    local_store.write("k", b"")
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE((Path(local_store.uri) / "k").stat().st_mode) == 0o666 & ~mask


def test_deleting_the_last_object_removes_its_folders(local_store: Store) -> None:
    etag = local_store.write("a/b/k", b"1")
    local_store.write_if_match("a/b/k", b"2", etag=etag)
    local_store.write("a/other", b"")
    local_store.delete(["a/b/k"])
    assert os.listdir(Path(local_store.uri) / "a") == ["other"]
    local_store.delete(["a/other"])
    assert os.listdir(local_store.uri) == []


def test_writing_and_deleting_in_one_folder_do_not_meet(local_store: Store) -> None:
    """The folder comes and goes while others write into it."""

    def write_and_delete(number: int) -> None:
        for turn in range(20):
            key = f"a/b/{number}-{turn}"
            etag = local_store.write_if_absent(key, b"1")
            local_store.write_if_match(key, b"2", etag=etag)
            local_store.delete([key])

    errors: list[BaseException] = []

    def run(number: int) -> None:
        try:
            write_and_delete(number)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert list(local_store.list()) == []


def test_equal_bytes_written_again_get_another_etag(local_store: Store) -> None:
    assert len({local_store.write("k", b"the same") for _ in range(50)}) == 50


def test_a_file_system_without_links_still_creates_once(
    local_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*paths: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", refuse)
    local_store.write_if_absent("k", b"1")
    with pytest.raises(ObjectExists):
        local_store.write_if_absent("k", b"2")
    assert local_store.read("k") == b"1"


def test_a_link_whose_answer_was_lost_has_still_won(
    local_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = os.link

    def link_twice(source: Path, target: Path) -> None:
        link(source, target)
        link(source, target)

    monkeypatch.setattr(os, "link", link_twice)
    local_store.write_if_absent("k", b"1")
    monkeypatch.undo()
    with pytest.raises(ObjectExists):
        local_store.write_if_absent("k", b"2")


def test_a_lock_that_is_never_released_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder, "_LOCK_SECONDS", 0.05)
    store = FolderStore(tmp_path)
    etag = store.write("k", b"1")
    with folder._lock(tmp_path), pytest.raises(StorageError, match="has held its lock"):
        store.write_if_match("k", b"2", etag=etag)


def test_a_copy_is_the_same_file_where_links_can_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(tmp_path)
    store.write("k", b"content")
    store.copy("k", "linked/k")
    assert (tmp_path / "k").samefile(tmp_path / "linked/k")

    def refuse(*_: object) -> None:
        raise OSError(errno.EMLINK, os.strerror(errno.EMLINK))

    monkeypatch.setattr(os, "link", refuse)
    store.copy("k", "copied/k")
    assert (tmp_path / "copied/k").read_bytes() == b"content"
    assert not (tmp_path / "k").samefile(tmp_path / "copied/k")
    assert files(tmp_path) == ["copied/k", "k", "linked/k"]
