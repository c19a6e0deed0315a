"""NodeCache: bytes that were fetched once for all processes of a node, on its local disk.

    FOLDER/blobs/ab/abcdef...   one file a key, named by a hash of it; its mtime is its last use
    FOLDER/new/                 files that are being written
    FOLDER/locks/00.lock ...    of a fixed number of stripes: a key's hash names its stripe
    FOLDER/usage                bytes of blobs and new files, and those that processes have set
                                aside for more of them; at most too large; under usage.lock

A file appears by a rename, whole or not at all. Eviction unlinks the least recently used files; a
reader that has one open reads on. A process that is killed leaves no lock behind (flock), and a
file in `new` at most, which a later eviction removes.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, BinaryIO

import psutil

from jobs.errors import EnvironmentFault, Problem

CACHE_VARIABLE = "SHOAL_CACHE"

_NUM_STRIPES = 256
_RESERVED_SHARE = 1 / 256
"""Of the limit: what a process sets aside at once, so that not every file asks for the lock of all.
An eviction by another process forgets what is left of it, so this may be written beyond the limit.
"""
_KEPT_SHARE = 0.9
"""Share of the limit that an eviction leaves, so that not every new file needs one."""
_ABANDONED_SECONDS = 600.0
"""Age of a file in `new` after which its writer is taken for dead: bytes are written at once."""
_USAGE_DIGITS = 20
_SHARED_FILE_SYSTEMS = frozenset(
    {
        "afs", "beegfs", "ceph", "cifs", "gfs2", "glusterfs", "gpfs", "juicefs", "lustre",
        "moosefs", "nfs", "nfs4", "ocfs2", "orangefs", "smb3", "sshfs", "weka", "wekafs",
    }
)  # fmt: skip
"""Names in /proc/mounts, without the `fuse.` that some have in front."""

_log = logging.getLogger(__name__)


def cache_folder(environment: Mapping[str, str] = os.environ) -> Path:
    """Where this node caches: $SHOAL_CACHE, else $XDG_CACHE_HOME/shoal, else ~/.cache/shoal.

    In a file system that several machines share, a folder of this machine's own in that: what its
    processes do under locks, and know by the start of the machine, others could spoil.
    """
    folder = _named_folder(environment)
    return folder / f"node-{socket.gethostname()}" if shared_by(folder) else folder


def shared_by(folder: Path) -> str | None:
    """Kind of the folder's file system where several machines may share that, as over a network."""
    kind = _file_system_of(folder)
    return kind if kind.removeprefix("fuse.") in _SHARED_FILE_SYSTEMS else None


@functools.cache
def _file_system_of(folder: Path) -> str:
    """Kind of the file system in which the folder is, or will be; empty where nobody says."""
    place = folder.resolve()
    kind, depth = "", -1
    # Of two on one mount point the later one counts.
    for mount in psutil.disk_partitions(all=True):
        point = Path(mount.mountpoint)
        if place.is_relative_to(point) and len(point.parts) >= depth:
            kind, depth = mount.fstype, len(point.parts)
    return kind


def _named_folder(environment: Mapping[str, str]) -> Path:
    if named := environment.get(CACHE_VARIABLE):
        return Path(named).expanduser().absolute()
    if caches := environment.get("XDG_CACHE_HOME"):
        return Path(caches) / "shoal"
    return Path.home() / ".cache" / "shoal"


class NodeCache:
    """Bytes by key, at most `limit_bytes` of them on disk, for all processes that name `folder`.

    Content is verified by the caller, who calls `drop` for what is wrong. Thread-safe. Nothing is
    created before the first `get`.
    """

    def __init__(self, folder: Path, *, limit_bytes: int) -> None:
        self.folder = folder
        self.limit_bytes = limit_bytes
        self._lock = threading.Lock()
        self._reserving = threading.Lock()
        self._reserved = 0
        """Bytes that this process has set aside, and not written yet."""
        self._is_prepared = False
        self._keeps = True

    def get(self, key: str, fetch: Callable[[], bytes]) -> bytes:
        """The bytes of `key`; of all processes and threads that miss it, one calls `fetch`.

        What is larger than the limit, or cannot be written (a full disk: one warning), is passed
        through. Errors of `fetch` pass through and leave nothing behind. Raises EnvironmentFault
        where the folder cannot be created or read.
        """
        self._prepare()
        name = hashlib.sha256(key.encode()).hexdigest()
        path = self.folder / "blobs" / name[:2] / name
        kept = self._read(path)
        if kept is not None:
            return kept
        try:
            stripe = _lock(self.folder / "locks" / f"{int(name[-4:], 16) % _NUM_STRIPES:02x}.lock")
        except OSError as error:
            self._stop_keeping(error)
            return fetch()
        with stripe:
            kept = self._read(path)
            if kept is not None:
                return kept
            fetched = fetch()
            self._keep(path, fetched)
            return fetched

    def drop(self, key: str) -> None:
        """Forget `key`, because its bytes are not what they should be."""
        name = hashlib.sha256(key.encode()).hexdigest()
        with contextlib.suppress(FileNotFoundError):
            (self.folder / "blobs" / name[:2] / name).unlink()

    def _read(self, path: Path) -> bytes | None:
        try:
            with path.open("rb") as file:
                os.utime(file.fileno())
                return file.read()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self._fault("read", error) from error

    def _keep(self, path: Path, data: bytes) -> None:
        if len(data) > self.limit_bytes or not self._keeps:
            return
        new = self.folder / "new" / uuid.uuid4().hex
        try:
            try:
                with self._reserve(new, len(data)) as file:
                    file.write(data)
                try:
                    new.replace(path)
                except FileNotFoundError:  # the first of its folder
                    path.parent.mkdir(exist_ok=True)
                    new.replace(path)
            finally:
                new.unlink(missing_ok=True)
        except OSError as error:
            self._stop_keeping(error)

    def _reserve(self, new: Path, num_bytes: int) -> BinaryIO:
        """Creates `new` with its final size, after evicting what would then be too much; open.

        A file has its size before it has its content, so that another process that counts sees it.
        """
        with self._reserving:
            if num_bytes > self._reserved:
                with _lock(self.folder / "usage.lock"):
                    more = max(num_bytes, int(self.limit_bytes * _RESERVED_SHARE))
                    used = self._recorded_usage()
                    if used is None or used + more > self.limit_bytes:
                        more = num_bytes
                    if used is None or used + more > self.limit_bytes:
                        used, self._reserved = self._evict(num_bytes), 0
                    self._record_usage(used + more)
                    self._reserved += more - num_bytes
                    return _created(new, num_bytes)
            self._reserved -= num_bytes
            return _created(new, num_bytes)

    def _evict(self, num_bytes: int) -> int:
        """Removes the least recently used files until `num_bytes` more fit; bytes that stay.

        `new` is listed first: a file that is renamed meanwhile is counted twice, never missed.
        """
        oldest_writer = time.time() - _ABANDONED_SECONDS
        used = 0
        for path, status in _files(self.folder / "new"):
            if status.st_mtime < oldest_writer:
                path.unlink(missing_ok=True)
            else:
                used += status.st_size
        blobs = [
            (status.st_mtime_ns, status.st_size, path)
            for fold in sorted((self.folder / "blobs").iterdir())
            for path, status in _files(fold)
        ]
        used += sum(size for _, size, _ in blobs)
        if used + num_bytes <= self.limit_bytes:
            return used
        allowed = min(int(self.limit_bytes * _KEPT_SHARE), self.limit_bytes - num_bytes)
        for _, size, path in sorted(blobs):
            if used <= allowed:
                break
            path.unlink(missing_ok=True)
            used -= size
        return used

    def _recorded_usage(self) -> int | None:
        """None where it was never written, or not wholly."""
        with contextlib.suppress(FileNotFoundError):
            text = (self.folder / "usage").read_bytes()
            if len(text) == _USAGE_DIGITS and text.isdigit():
                return int(text)
        return None

    def _record_usage(self, num_bytes: int) -> None:
        (self.folder / "usage").write_bytes(b"%0*d" % (_USAGE_DIGITS, num_bytes))

    def _prepare(self) -> None:
        if self._is_prepared:
            return
        try:
            for name in ("blobs", "new", "locks"):
                (self.folder / name).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._fault("create", error) from error
        self._is_prepared = True

    def _fault(self, verb: str, error: OSError) -> EnvironmentFault:
        return EnvironmentFault(
            Problem(
                f"cannot {verb} files of the cache folder {self.folder}: {error.strerror}",
                f"set {CACHE_VARIABLE} to a folder on a local disk that you may write to",
            )
        )

    def _stop_keeping(self, error: OSError) -> None:
        with self._lock:
            first, self._keeps = self._keeps, False
        if first:
            _log.warning(
                "the cache folder %s cannot be written (%s): what is fetched from now on is not "
                "kept; free space there, or set %s to another folder",
                self.folder,
                error.strerror or error,
                CACHE_VARIABLE,
            )


def _lock(path: Path) -> IO[bytes]:
    """A lock on a file of that path, which is made; given back as it is closed, or by a death."""
    file = path.open("ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
    except BaseException:
        file.close()
        raise
    return file


def _created(path: Path, num_bytes: int) -> BinaryIO:
    file = path.open("xb")
    try:
        file.truncate(num_bytes)
    except BaseException:
        file.close()
        raise
    return file


def _files(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """Files of a folder with their status; those that vanish meanwhile are left out."""
    with os.scandir(folder) as entries:
        for entry in entries:
            try:
                status = entry.stat()
            except FileNotFoundError:
                continue
            yield Path(entry.path), status
