"""Store in a local folder, or on a file system that several machines share.

A write goes to a hidden file beside its place, is flushed to the disk, and then takes the place in
one step, so that no reader and no crash ever sees half of an object.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING

import filelock
import tenacity
import xxhash

from cluster.storage import (
    OWN_FILE_PREFIX,
    Head,
    ObjectExists,
    ObjectMissing,
    PreconditionFailed,
    StorageError,
    StoreAway,
    Transfer,
    Unfinished,
    check_key,
    check_prefix,
)
from jobs.errors import Problem

if TYPE_CHECKING:
    import pyarrow.fs

_LOCK_NAME = OWN_FILE_PREFIX + "lock"
_PART_SUFFIX = ".part"
_LOCK_SECONDS = 45.0
"""A lock is held for one small write; whoever holds it longer is stuck."""
_COPY_BYTES = 2**20
_SYNC_BYTES = 2**30
"""Written bytes that wait for the disk at most: the system takes many gigabytes into its memory,
and the flush at the end would be silent until the disk has them."""
_OPEN_ATTEMPTS = 5
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV)
_AWAY = (
    errno.EIO,
    errno.ESTALE,
    errno.ETIMEDOUT,
    errno.ENOTCONN,
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
    errno.ENETDOWN,
    errno.ENETUNREACH,
)
"""What a file system over the network says while its server does not answer."""
_ABSENT = (FileNotFoundError, NotADirectoryError, IsADirectoryError)


class FolderStore:
    """Store below an absolute path; see cluster.storage.Store for the contract.

    The folder is made by the first write. One hidden lock file stays in each folder where objects
    were replaced conditionally.
    """

    def __init__(self, path: Path, *, transfer: Transfer | None = None) -> None:
        """Of `transfer`, only `on_part` and `part_bytes` have a meaning here."""
        self._path = path
        self._transfer = transfer or Transfer()

    def __repr__(self) -> str:
        return f"FolderStore({self.uri!r})"

    @property
    def uri(self) -> str:
        return str(self._path)

    @property
    def filesystem_root(self) -> str:
        return str(self._path)

    def within(self, prefix: str) -> FolderStore:
        folder = check_prefix(prefix).rstrip("/")
        path = self._path / folder if folder else self._path
        return FolderStore(path, transfer=self._transfer)

    def filesystem(self) -> pyarrow.fs.LocalFileSystem:
        import pyarrow.fs

        return pyarrow.fs.LocalFileSystem()

    # ------------------------------------------------------------------------------- reading

    def read(self, key: str) -> bytes:
        with self._reading(key), self._file(key).open("rb") as file:
            return file.read()

    def read_range(self, key: str, *, start: int, end: int) -> bytes:
        if not 0 <= start <= end:
            raise ValueError(f"[{start}, {end}) is no range of bytes")
        path = self._file(key)
        with self._reading(key), path.open("rb") as file:
            file.seek(start)
            data = file.read(end - start)
        if len(data) != end - start:
            raise StorageError(
                Problem(
                    f"{path} is shorter than it should be: bytes {start} to {end} were asked for",
                    "the file was changed or cut off: write it again, or prepare the data again",
                )
            )
        return data

    def head(self, key: str) -> Head | None:
        try:
            # Opened, as over NFS only that is sure to ask the server.
            with self._reading(key), self._file(key).open("rb") as file:
                stat = os.fstat(file.fileno())
        except ObjectMissing:
            return None
        return Head(
            key=key, num_bytes=stat.st_size, etag=_etag(stat), modified_at=stat.st_mtime_ns / 1e9
        )

    def list(self, prefix: str = "", *, after: str | None = None) -> Iterator[Head]:
        folder, _, name_prefix = check_prefix(prefix).rpartition("/")
        return self._walk(folder, name_prefix, after=check_key(after) if after else "")

    def _walk(self, folder: str, name_prefix: str, *, after: str) -> Iterator[Head]:
        """Objects below `folder` whose first name begins with `name_prefix`, in order of keys."""
        for name in self._names(folder):
            key = f"{folder}/{name}" if folder else name
            if not name.startswith(name_prefix):
                continue
            if name.endswith("/"):
                # The last possible key below a folder is above `after`, or all are not.
                if key + "\U0010ffff" > after:
                    yield from self._walk(key.removesuffix("/"), "", after=after)
            elif key > after:
                head = self.head(key)
                if head is not None:
                    yield head

    def _names(self, folder: str) -> Sequence[str]:
        """Names in a folder in the order of their keys; those of folders end in a slash."""
        path = self._path / folder
        try:
            with _described(path, doing="list", but=_ABSENT), os.scandir(path) as entries:
                names = [
                    f"{entry.name}/" if entry.is_dir() else entry.name
                    for entry in entries
                    if not entry.name.startswith(OWN_FILE_PREFIX)
                ]
        except _ABSENT:
            return []
        for name in names:
            try:
                check_prefix(name)
            except ValueError as error:
                raise StorageError(
                    Problem(f"{path} has a file name that no store can hold: {name!r}", "rename it")
                ) from error
        return sorted(names)

    def list_folders(self, prefix: str = "") -> Iterator[str]:
        folder = check_prefix(prefix).rstrip("/")
        names = self._names(folder)
        return iter(sorted(name.removesuffix("/") for name in names if name.endswith("/")))

    def download(self, key: str, path: Path, *, hashed: bool = False) -> str:
        digest = xxhash.xxh3_128() if hashed else None

        def fill(file: IO[bytes]) -> None:
            for block in self._told(_blocks_of_file(source)):
                file.write(block)
                if digest is not None:
                    digest.update(block)

        with self._reading(key), self._file(key).open("rb") as source:
            write_whole(path, fill, flush=False)
        return str(digest.hexdigest()) if digest is not None else ""

    def _told(self, blocks: Iterable[bytes]) -> Iterator[bytes]:
        """The blocks; calls `on_part` whenever those of a part have been dealt with."""
        num_bytes = 0
        for block in blocks:
            yield block
            num_bytes += len(block)
            if num_bytes >= self._transfer.part_bytes:
                num_bytes = 0
                if self._transfer.on_part is not None:
                    self._transfer.on_part()

    # ------------------------------------------------------------------------------- writing

    def write(self, key: str, data: bytes | memoryview) -> str:
        return self._write(key, _blocks_of(data))

    def upload(self, key: str, path: Path) -> str:
        with path.open("rb") as source:
            return self._write(key, _blocks_of_file(source))

    def copy(self, source: str, key: str) -> None:
        """Both names are one file, where the file system can: no write ever changes a file."""
        path = self._file(key)
        with self._reading(source):
            file = self._file(source).open("rb")
        with file:
            with _described(path, doing="write", but=()):
                try:
                    _link_over(self._file(source), path)
                    return
                except OSError as error:
                    if error.errno not in _NO_LINKS:
                        raise
            self._write(key, _blocks_of_file(file))

    def _write(self, key: str, blocks: Iterable[bytes], *, replace: bool = True) -> str:
        def fill(file: IO[bytes]) -> None:
            unsynced_bytes = 0
            for block in self._told(blocks):
                file.write(block)
                unsynced_bytes += len(block)
                if unsynced_bytes >= _SYNC_BYTES:
                    unsynced_bytes = 0
                    file.flush()
                    os.fsync(file.fileno())

        return write_whole(self._file(key), fill, replace=replace)

    def write_if_absent(self, key: str, data: bytes | memoryview) -> str:
        path = self._file(key)
        try:
            return self._write(key, _blocks_of(data), replace=False)
        except FileExistsError as error:
            raise ObjectExists(key, f"{path} exists already") from error

    def write_if_match(self, key: str, data: bytes | memoryview, *, etag: str) -> str:
        path = self._file(key)
        try:
            with _described(path, doing="write", but=_ABSENT), _lock(path.parent):
                found = self.head(key)
                if found is not None and found.etag == etag:
                    return self.write(key, data)
        except _ABSENT as error:
            raise PreconditionFailed(key, f"{path} is not there any more") from error
        raise PreconditionFailed(key, f"{path} was changed by another writer")

    def delete(self, keys: Iterable[str]) -> None:
        for key in keys:
            self._unlink(self._file(key))

    def list_unfinished(self, prefix: str = "") -> Iterator[Unfinished]:
        top = self._path / check_prefix(prefix)
        for folder, _, names in os.walk(top):
            for name in names:
                if name.startswith(OWN_FILE_PREFIX) and name.endswith(_PART_SUFFIX):
                    path = Path(folder, name)
                    with contextlib.suppress(*_ABSENT), _described(path, doing="read", but=_ABSENT):
                        changed_at = path.stat().st_mtime
                        yield Unfinished(path.relative_to(self._path).as_posix(), "", changed_at)

    def drop_unfinished(self, unfinished: Iterable[Unfinished]) -> None:
        for each in unfinished:
            path = self._path / each.key
            if not path.name.startswith(OWN_FILE_PREFIX):
                raise ValueError(f"{path} is an object")
            self._unlink(path)

    def _unlink(self, path: Path) -> None:
        with contextlib.suppress(*_ABSENT), _described(path, doing="delete", but=_ABSENT):
            path.unlink()
        self._remove_empty_folders(path.parent)

    def _remove_empty_folders(self, folder: Path) -> None:
        """Folders exist in S3 by what is in them: an empty one goes, up to the store's own."""
        with contextlib.suppress(OSError):  # it is not empty, or another process has removed it
            while folder != self._path:
                if os.listdir(folder) == [_LOCK_NAME]:
                    with _lock(folder):
                        # Who waits for the lock sees that its file is gone and makes a new one.
                        (folder / _LOCK_NAME).unlink()
                folder.rmdir()
                folder = folder.parent

    # ------------------------------------------------------------------------------- shared

    def _file(self, key: str) -> Path:
        return self._path / check_key(key)

    @contextlib.contextmanager
    def _reading(self, key: str) -> Iterator[None]:
        path = self._file(key)
        try:
            with _described(path, doing="read", but=_ABSENT):
                yield
        except _ABSENT as error:
            raise ObjectMissing(key, f"there is no {path}") from error


def _blocks_of(data: bytes | memoryview) -> Iterator[bytes]:
    for start in range(0, len(data), _COPY_BYTES):
        # A view of it would outlive an error, in its traceback, and a map of memory that has views
        # cannot be closed.
        yield bytes(data[start : start + _COPY_BYTES])


def _blocks_of_file(file: IO[bytes]) -> Iterator[bytes]:
    return iter(lambda: file.read(_COPY_BYTES), b"")


def write_whole(
    path: Path, fill: Callable[[IO[bytes]], object], *, replace: bool = True, flush: bool = True
) -> str:
    """Write a file that appears whole or not at all, its bytes on the disk before; its ETag.

    Without `flush` the bytes may still be on their way to the disk. With `replace=False` raises
    FileExistsError where there is one already; of several writers one wins. A full disk, missing
    rights and the like raise StorageError.
    """
    with _described(path, doing="write", but=(FileExistsError,)):
        part, file = _open_part(path.parent)
        try:
            with file:
                fill(file)
                file.flush()
                # The clock of the file system may be coarser than two writes are apart.
                os.utime(file.fileno(), ns=(time.time_ns(), time.time_ns()))
                if flush:
                    os.fsync(file.fileno())
                etag = _etag(os.fstat(file.fileno()))
            if replace:
                os.replace(part, path)
            else:
                _link_new(part, path)
            if flush:
                _sync_folder(path.parent)
        finally:
            part.unlink(missing_ok=True)
    return etag


@tenacity.retry(
    # Another process may remove the empty folder between the two steps.
    retry=tenacity.retry_if_exception_type(FileNotFoundError),
    stop=tenacity.stop_after_attempt(_OPEN_ATTEMPTS),
    reraise=True,
)
def _open_part(folder: Path) -> tuple[Path, IO[bytes]]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder)) from error
    part = folder / f"{OWN_FILE_PREFIX}{uuid.uuid4().hex}{_PART_SUFFIX}"
    return part, part.open("x+b")


def _link_over(source: Path, path: Path) -> None:
    """Give a file another name, in place of the file that may have it."""
    part, file = _open_part(path.parent)  # while it is there nobody removes the folder
    file.close()
    link = part.with_suffix(f".link{_PART_SUFFIX}")
    try:
        os.link(source, link)
        os.replace(link, path)
        _sync_folder(path.parent)
    finally:
        link.unlink(missing_ok=True)  # it stays where both were one file already
        part.unlink(missing_ok=True)


def _link_new(part: Path, path: Path) -> None:
    """Give the file its name unless the name is taken (FileExistsError)."""
    try:
        os.link(part, path)
    except FileExistsError:
        # Over NFS the answer to a link that succeeded may be lost, and the link repeated.
        if part.stat().st_nlink != 2:
            raise
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        with _lock(path.parent):
            if path.exists():
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from error
            os.replace(part, path)


def _sync_folder(folder: Path) -> None:
    """Bring the folder's new entry to the disk, where the file system can."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise
    finally:
        os.close(descriptor)


def _lock(folder: Path) -> filelock.BaseFileLock:
    """The lock of all conditional writes in a folder, over processes and machines."""
    return filelock.FileLock(folder / _LOCK_NAME, timeout=_LOCK_SECONDS, poll_interval=0.005)


def _etag(stat: os.stat_result) -> str:
    return f"{stat.st_mtime_ns:x}-{stat.st_size:x}-{stat.st_ino:x}"


@contextlib.contextmanager
def _described(path: Path, *, doing: str, but: tuple[type[OSError], ...]) -> Iterator[None]:
    """Errors of the system, except those in `but`, as StorageError with a hint."""
    try:
        yield
    except OSError as error:
        if isinstance(error, but):
            raise
        reason, hint = _explain(error, path)
        kind = StoreAway if error.errno in _AWAY else StorageError
        raise kind(Problem(f"cannot {doing} {path}: {reason}", hint)) from error


def _explain(error: OSError, path: Path) -> tuple[str, str | None]:
    """(what is wrong, what to do)."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "the disk or the quota is full", "free space there, or name another folder"
    if error.errno in (errno.EACCES, errno.EPERM):
        return "permission denied", f"give this user the right to it: ls -ld {path.parent}"
    if error.errno == errno.EROFS:
        return "the file system is read-only", "name another folder"
    if error.errno == errno.ENAMETOOLONG:
        return "the name is too long for this file system", "take a shorter one"
    if error.errno in (errno.ENOTDIR, errno.EISDIR):
        return (
            "a file and a folder would have the same name",
            "a local folder cannot hold both the keys a and a/b: rename one",
        )
    if error.errno == errno.EMFILE:
        return "this process has too many open files", "raise the limit: ulimit -n 4096"
    if error.errno in _AWAY:
        return (
            f"the file system does not answer rightly ({error.strerror})",
            f"check that its server runs, and the disk: df {path.parent}",
        )
    if isinstance(error, filelock.Timeout):
        return f"another process has held its lock for {_LOCK_SECONDS:.0f} s", "end that process"
    return str(error.strerror or error), None
