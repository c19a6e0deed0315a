"""Folders of a store as folders of this node: fetched once a node, verified, whole or absent."""

from __future__ import annotations

import contextlib
import shutil
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import tenacity
from filelock import FileLock

from cluster.storage import StorageError, Store, Transfer, check_key
from jobs.errors import EnvironmentFault, Problem
from jobs.record import Part
from trainers import watchdog

_THREADS = 4
TICKING = Transfer(on_part=watchdog.tick)
"""How stores move large files where a watchdog may look on."""
_READS = 3
"""Of a file, before it is taken for damaged in the store."""


class DamagedPart(StorageError):  # noqa: N818 - named for what it says
    """A stored file is not what its record, or its own digest, says."""

    is_of_place = False


reads_again = tenacity.retry(
    # The way here may have spoilt what is whole in the store.
    retry=tenacity.retry_if_exception_type(DamagedPart),
    stop=tenacity.stop_after_attempt(_READS),
    reraise=True,
)
"""Decorates what reads a stored file and raises DamagedPart: the last of three times counts."""


def local_copy(store: Store, parts: Sequence[Part], folder: Path) -> Path:
    """`folder`, holding all `parts` of the store (names relative to it).

    A part without an xxh3 is checked by its number of bytes only. Processes of a node that ask at
    the same time fetch once. A folder that is there is taken if its files have the bytes of the
    parts and the machine has been up since, else it is fetched anew. Raises DamagedPart,
    ObjectMissing, StorageError, or EnvironmentFault where the disk has no room.
    """
    for part in parts:
        _check_name(store, part)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if _boot_of(folder) == BOOT_ID and _has_sizes(folder, parts):
                return folder
            _stamp(folder).unlink(missing_ok=True)
            unfinished = folder.with_name(folder.name + ".unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)
            if folder.exists():
                folder.rename(unfinished)
                shutil.rmtree(unfinished)
            try:
                # The largest first: the small ones then come beside them.
                by_size = sorted(parts, key=lambda part: part.bytes, reverse=True)
                with ThreadPoolExecutor(_THREADS) as pool:
                    list(pool.map(lambda part: _fetch(store, part, unfinished), by_size))
                _stamp(folder).write_text(BOOT_ID)
                unfinished.rename(folder)
            except BaseException:
                shutil.rmtree(unfinished, ignore_errors=True)
                raise
    except OSError as error:
        raise EnvironmentFault(
            Problem(
                f"{folder.parent} cannot hold {sum(p.bytes for p in parts)} bytes: {error}",
                "free disk space there, or set SHOAL_CACHE to a folder on a larger disk",
            )
        ) from error
    return folder


def drop_copy(folder: Path) -> None:
    """Removes a copy; killed at any moment, it leaves nothing that looks whole."""
    # What stays behind on a file system that refuses takes room and does no harm.
    with contextlib.suppress(OSError), FileLock(f"{folder}.lock"):
        unfinished = folder.with_name(folder.name + ".unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        if folder.exists():
            folder.rename(unfinished)
            shutil.rmtree(unfinished)
        _stamp(folder).unlink(missing_ok=True)
        Path(f"{folder}.lock").unlink()


def _stamp(folder: Path) -> Path:
    """Beside a copy: since which start of the machine it is there.

    Files are not flushed to the disk, which would take longer than to fetch them. So after a crash
    of the machine a file may have its size and not its bytes.
    """
    return folder.with_name(folder.name + ".boot")


def _boot_of(folder: Path) -> str | None:
    try:
        return _stamp(folder).read_text()
    except FileNotFoundError:
        return None


def _boot_id() -> str:
    """Another text after each start of the machine (proc(5)); elsewhere of this process alone."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return uuid.uuid4().hex


BOOT_ID = _boot_id()


def _check_name(store: Store, part: Part) -> None:
    """DamagedPart for a name that could lie outside the folder: records come from the store too."""
    try:
        check_key(part.name)
    except ValueError as error:
        raise DamagedPart(
            Problem(f"{store.uri} names a part {part.name!r}, which is no name of a file in it")
        ) from error


def _has_sizes(folder: Path, parts: Sequence[Part]) -> bool:
    """Whether all parts lie in the folder with their bytes; content is not read again."""
    files = [(folder / part.name, part.bytes) for part in parts]
    return folder.is_dir() and all(f.is_file() and f.stat().st_size == size for f, size in files)


@reads_again
def _fetch(store: Store, part: Part, folder: Path) -> None:
    """Fetches a part and verifies it; one whose bytes are wrong is fetched anew."""
    path = folder / part.name
    path.parent.mkdir(parents=True, exist_ok=True)
    digest = store.download(part.name, path, hashed=bool(part.xxh3))
    if path.stat().st_size != part.bytes or digest != part.xxh3:
        raise DamagedPart(
            Problem(f"{store.uri}/{part.name} is damaged: its bytes are not those of its record")
        )
    watchdog.tick()
