"""Store: one place for objects, on S3 or in a local folder, and the errors that it raises.

Keys are relative to the store's URI, separated by "/"; both kinds of store keep one contract:
writes are whole or absent, conditional writes have exactly one winner, lists are lazy, and every
failure that outlives the retries is a StorageError with a hint.

    EnvironmentFault
      StorageError            the store cannot do it: refused, full, damaged
        StoreAway             it does not answer, or not rightly: later it may
        ObjectMissing         there is no such object
        DamagedObject         the object's bytes are not those that were written
        PreconditionFailed    the object is not what a conditional write expected
          ObjectExists        it should have been absent
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, runtime_checkable

import tenacity

from jobs.errors import EnvironmentFault, Problem, SpecError
from jobs.spec import StoreAccess

if TYPE_CHECKING:
    import pyarrow.fs

Parsed = TypeVar("Parsed")

OWN_FILE_PREFIX = ".shoal-"
"""File names of a folder store's unfinished writes and locks; no part of a key begins so."""

_S3_URI = re.compile(
    r"s3://(?P<bucket>[A-Za-z0-9][A-Za-z0-9._-]{1,61}[A-Za-z0-9])(?:/(?P<key>.*))?"
)
_MOST_NUMBERS_TRIED = 100
_MOST_READS = 3
"""Reads of an object before it is taken for damaged in the store."""
_CONTROL_CHARACTER = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")


class StorageError(EnvironmentFault):
    """The store could not do what was asked; transient faults have been retried before."""

    is_of_place = True


class StoreAway(StorageError):  # noqa: N818 - named for what it says, as KeyError is not
    """The store did not answer, or only with errors that pass, for as long as these are retried."""

    after_seconds = 0.0
    """How long the store asked to be left alone."""


class ObjectMissing(StorageError):  # noqa: N818
    """There is no object `key`."""

    is_of_place = False

    def __init__(self, key: str, *problems: Problem | str) -> None:
        super().__init__(*(problems or (f"there is no {key}",)))
        self.key = key

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.key, *self.problems)


class DamagedObject(StorageError):  # noqa: N818
    """The object is there, but its content is not what was once written."""

    is_of_place = False


class PreconditionFailed(StorageError):  # noqa: N818
    """The object `key` is not, or no longer, the one that a conditional write was to replace."""

    is_of_place = False

    def __init__(self, key: str, *problems: Problem | str) -> None:
        super().__init__(*(problems or (f"{key} was changed by another writer",)))
        self.key = key

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.key, *self.problems)


class ObjectExists(PreconditionFailed):
    """The object `key` exists, and a conditional write was to create it."""

    def __init__(self, key: str, *problems: Problem | str) -> None:
        super().__init__(key, *(problems or (f"{key} exists already",)))


@dataclass(frozen=True)
class Head:
    """What a list or a head tells of an object."""

    key: str
    num_bytes: int
    etag: str
    """Changes with each change of the object; to be compared only."""
    modified_at: float
    """Unix seconds by the store's clock."""


@dataclass(frozen=True)
class Unfinished:
    """A write that goes on, or whose writer was killed: it takes room, and no list shows it."""

    key: str
    """Below which folder it was to come; on S3 the key of the object."""
    upload_id: str
    """What the store knows it by, besides the key."""
    last_sign_at: float
    """Unix seconds by the store's clock: when it began (S3), or when bytes last came (a folder)."""


@dataclass(frozen=True)
class Transfer:
    """How objects are moved: sizes, threads and the time that transient faults are borne."""

    part_bytes: int = 16 * 2**20
    """Larger objects are written in parts of this size; S3 takes no part below 5 MiB but the last.
    Downloads read ranges of the same size. In a folder it is how much moves between two calls of
    `on_part`."""
    num_threads: int = 8
    """Parts of one object that move at a time."""
    retry_seconds: float = 45.0
    """Time after which a transient fault is no longer retried; a second try there is in any case,
    unless the store asks for a longer pause. A request that hangs is given up after
    `read_timeout_seconds`, twice, so that a dead store shows after about a minute."""
    connect_timeout_seconds: float = 5.0
    read_timeout_seconds: float = 30.0
    """Longest silence of the server in the middle of an answer."""
    slow_window_seconds: float = 20.0
    """An object's bytes are judged by how many came in each stretch of this length."""
    slow_bytes_per_second: int = 2 * 2**10
    """A connection that brings less is given up, as one that is silent is. Not more: dozens of
    them may share a slow line."""
    max_connections: int = 32
    """Connections kept open by one store; more requests at a time wait for one."""
    on_part: Callable[[], None] | None = None
    """Called from the thread that moves an object: after each part of a large one, and after each
    stretch of `slow_window_seconds` in which enough bytes have moved."""


@runtime_checkable
class Store(Protocol):
    """Objects below one URI. Thread-safe; pickles without connections and without secrets."""

    @property
    def uri(self) -> str:
        """`s3://bucket/prefix`, or the absolute path of a folder; no slash at the end."""
        ...

    @property
    def filesystem_root(self) -> str:
        """Path of this store within `filesystem()`: `bucket/prefix` or the absolute path."""
        ...

    def read(self, key: str) -> bytes:
        """The whole object; raises ObjectMissing."""
        ...

    def read_range(self, key: str, *, start: int, end: int) -> bytes:
        """Bytes [start, end) of the object: exactly end - start of them, or StorageError."""
        ...

    def head(self, key: str) -> Head | None:
        """What the store tells of the object; None where it is absent."""
        ...

    def list(self, prefix: str = "", *, after: str | None = None) -> Iterator[Head]:
        """All objects whose key begins with `prefix`, fetched page by page.

        Objects of one folder come sorted by name, and `after` leaves out those up to that key.
        Where a folder stands among its siblings is the server's choice: AWS and local folders sort
        whole keys (`a-b` before `a/x`), SeaweedFS walks the tree (`a/x` before `a-b`). Whoever
        needs one order over folders sorts. Keys that end in "/" are folders, not objects.
        """
        ...

    def list_folders(self, prefix: str = "") -> Iterator[str]:
        """Names of the folders right below the folder `prefix`, sorted, without slashes.

        Some servers (SeaweedFS) still name a folder some time after its last object was deleted.
        """
        ...

    def write(self, key: str, data: bytes | memoryview) -> str:
        """Create or replace the object, with a checksum; the new ETag."""
        ...

    def write_if_absent(self, key: str, data: bytes | memoryview) -> str:
        """Create the object; of several writers one wins, the others get ObjectExists."""
        ...

    def write_if_match(self, key: str, data: bytes | memoryview, *, etag: str) -> str:
        """Replace the object that has `etag`; PreconditionFailed where it has not, or is absent."""
        ...

    def upload(self, key: str, path: Path) -> str:
        """Create or replace the object from a file, in parallel parts; the new ETag."""
        ...

    def copy(self, source: str, key: str) -> None:
        """Create or replace the object from another one of this store, whose bytes do not pass
        through here where the store can help it; raises ObjectMissing."""
        ...

    def download(self, key: str, path: Path, *, hashed: bool = False) -> str:
        """The object as a file, by parallel ranges; `path` appears whole or not at all.

        Gives the XXH3 of its bytes (128 bits, in hexadecimal), taken while they arrive, if they are
        to be hashed, else "". The file is not flushed to the disk: a machine that goes down may
        lose its bytes.
        """
        ...

    def delete(self, keys: Iterable[str]) -> None:
        """Remove the objects, in batches; absent ones are no error."""
        ...

    def list_unfinished(self, prefix: str = "") -> Iterator[Unfinished]:
        """Large writes below the folder `prefix` that have not ended, in any order.

        Not every store lists them: some refuse (StorageError), some name none.
        """
        ...

    def drop_unfinished(self, unfinished: Iterable[Unfinished]) -> None:
        """Give back their room; a writer that still goes on fails. Absent ones are no error."""
        ...

    def within(self, prefix: str) -> Store:
        """The same store with keys relative to the folder `prefix`, over the same connections."""
        ...

    def filesystem(self) -> pyarrow.fs.FileSystem:
        """The store for pyarrow's readers, by the same endpoint and credentials.

        Short-lived credentials are those of this moment: ask again, do not keep it for hours.
        """
        ...


def open_store(
    uri: str | os.PathLike[str],
    access: StoreAccess | None = None,
    *,
    transfer: Transfer | None = None,
) -> Store:
    """The store at `s3://bucket/prefix` or in a local folder, which need not exist yet.

    Nothing is sent or created before the first operation. Raises SpecError for a URI, an
    endpoint or a file of authorities that cannot be right.
    """
    text = os.fspath(uri)
    if is_s3(text):
        from cluster.s3 import S3Store
        from cluster.s3_access import resolve

        bucket, prefix = split_s3_uri(text)
        settings = resolve(access or StoreAccess(), transfer=transfer or Transfer())
        return S3Store.open(bucket=bucket, prefix=prefix, settings=settings)
    from cluster.folder import FolderStore

    return FolderStore(local_path(text), transfer=transfer or Transfer())


def is_s3(uri: str) -> bool:
    """Whether the URI names an S3 store rather than a local folder."""
    return uri.startswith("s3:")


def split_s3_uri(uri: str) -> tuple[str, str]:
    """(bucket, prefix without slashes at its ends) of an S3 URI; raises SpecError."""
    match = _S3_URI.fullmatch(uri)
    if match is None:
        raise SpecError(Problem(f"{uri} is no S3 URI", "write s3://bucket/prefix"))
    prefix = (match["key"] or "").strip("/")
    if prefix:
        check_key(prefix)
    return match["bucket"], prefix


def local_path(uri: str) -> Path:
    """The absolute path of a local URI: a path, `~/path` or `file:///path`; raises SpecError."""
    scheme, separator, rest = uri.partition("://")
    if separator and scheme != "file":
        raise SpecError(
            Problem(
                f"{uri} names no kind of store that is known",
                "write s3://bucket/prefix or the path of a local folder",
            )
        )
    path = rest if separator else uri
    if not path:
        raise SpecError(Problem("a store's URI is empty", "write s3://bucket/prefix or a path"))
    return Path(os.path.abspath(os.path.expanduser(path)))


def write_numbered(store: Store, key_of: Callable[[int], str], data: bytes, *, after: int) -> int:
    """Writes the object with the next free number, which it gives; several writers get several."""
    for candidate in range(after + 1, after + 1 + _MOST_NUMBERS_TRIED):
        try:
            store.write_if_absent(key_of(candidate), data)
        except ObjectExists:
            continue
        return candidate
    folder = key_of(after + 1).rpartition("/")[0]
    raise EnvironmentFault(f"{folder} is being written to by too many others at once")


def read_whole(store: Store, key: str, parse: Callable[[bytes], Parsed], *, hint: str) -> Parsed:
    """What `parse` makes of the object; read anew where it raises ValueError, as for damage.

    The way here may have spoilt what is whole in the store. Raises DamagedObject with `hint` where
    it stays damaged, and ObjectMissing.
    """
    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_exception_type(ValueError),
        stop=tenacity.stop_after_attempt(_MOST_READS),
        reraise=True,
    )
    try:
        return retrying(lambda: parse(store.read(key)))
    except ValueError as error:
        raise DamagedObject(Problem(f"{join_uri(store.uri, key)} is damaged", hint)) from error


def split_uri(uri: str) -> tuple[str, str]:
    """(URI of the parent folder, last name) of an object's or folder's URI; raises SpecError."""
    if is_s3(uri):
        bucket, key = split_s3_uri(uri)
        parent, _, name = key.rpartition("/")
        if not name:
            raise SpecError(Problem(f"{uri} is a whole bucket", "write s3://bucket/key"))
        return f"s3://{bucket}/{parent}".rstrip("/"), name
    path = local_path(uri)
    return str(path.parent), path.name


def join_uri(uri: str, key: str) -> str:
    """The URI of `key` below a store's URI."""
    return f"{uri.rstrip('/')}/{key}"


def check_key(key: str) -> str:
    """The key, unless it could mean another object on another kind of store (ValueError)."""
    parts = key.split("/")
    if (
        any(part in ("", ".", "..") or part.startswith(OWN_FILE_PREFIX) for part in parts)
        or _CONTROL_CHARACTER.search(key) is not None
    ):
        raise ValueError(f"{key!r} is no key of a store")
    return key


def check_prefix(prefix: str) -> str:
    """The prefix of keys (may be empty or end in "/"), checked as `check_key` does."""
    if prefix.rstrip("/"):
        check_key(prefix.removesuffix("/"))
    elif prefix:
        raise ValueError(f"{prefix!r} is no prefix of keys")
    return prefix
