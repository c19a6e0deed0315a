"""Stores for the checks: connections that are shared and give up soon, and the probe of a store."""

from __future__ import annotations

import contextlib
import secrets
import tempfile
import threading
from pathlib import Path
from typing import Literal

from cluster.storage import (
    ObjectExists,
    PreconditionFailed,
    StorageError,
    Store,
    Transfer,
    is_s3,
    join_uri,
    open_store,
    split_s3_uri,
)
from jobs.checks.finding import (
    ENVIRONMENT_EXIT_CODE,
    Finding,
    ok,
    problem,
    problems_of,
    warning,
)
from jobs.errors import ShoalError
from jobs.spec import StoreAccess

_HASTE = Transfer(retry_seconds=3.0, connect_timeout_seconds=2.0, read_timeout_seconds=10.0)
"""A run waits for a store that is away; a check says so."""
_PROBE_BYTES = 4096


class Stores:
    """Opens stores; those of one bucket share their connections, which are slow to make."""

    def __init__(self) -> None:
        self._buckets: dict[tuple[str, StoreAccess], Store] = {}
        self._lock = threading.Lock()

    def open(self, uri: str, access: StoreAccess) -> Store:
        """As `open_store`: nothing is sent; raises SpecError for what cannot be right."""
        if not is_s3(uri):
            return open_store(uri, access)
        bucket, prefix = split_s3_uri(uri)
        with self._lock:
            key = (bucket, access)
            if key not in self._buckets:
                self._buckets[key] = open_store(f"s3://{bucket}", access, transfer=_HASTE)
            return self._buckets[key].within(prefix)


def check_store(
    part: str, uri: str, access: StoreAccess, stores: Stores, *, lease: Literal["required", "none"]
) -> list[Finding]:
    """Whether runs can be kept at `uri`, with the lease that is asked for; leaves nothing there.

    In S3 an object of a random name is written, where a lease is required also conditionally, and
    as its conditions forbid, which must be refused; then it is deleted, whatever happened. In a
    local folder, which need not exist yet, a file without a name is written, which no crash can
    leave behind.
    """
    try:
        store = stores.open(uri, access)
        if not is_s3(store.uri):
            return _check_folder(part, Path(store.uri), lease=lease)
        return _check_bucket(part, store, lease=lease)
    except ShoalError as error:
        return problems_of(part, error)


def _check_bucket(part: str, store: Store, *, lease: Literal["required", "none"]) -> list[Finding]:
    key = f"shoal-check-{secrets.token_hex(8)}"
    try:
        if lease == "none":
            store.write(key, b"")
            findings = [_unguarded(part, store)]
        else:
            findings = [_try_conditions(part, store, key)]
    except StorageError as error:
        findings = problems_of(part, error)
        # The answer to a write may be lost where the write is not.
        with contextlib.suppress(StorageError):
            store.delete([key])
        return findings
    except BaseException:
        with contextlib.suppress(StorageError):
            store.delete([key])
        raise
    try:
        store.delete([key])
    except StorageError as error:
        return [
            problem(
                part,
                f"{p.message}, so {join_uri(store.uri, key)}, an empty object that tried whether "
                "objects can be written, is still there",
                p.hint or "allow s3:DeleteObject: old checkpoints are deleted while a run goes on",
                exit_code=ENVIRONMENT_EXIT_CODE,
            )
            for p in error.problems
        ]
    return findings


def _try_conditions(part: str, store: Store, key: str) -> Finding:
    """Whether exactly those conditional writes of an object are done that should be."""
    etag = store.write_if_absent(key, b"")
    done = None
    with contextlib.suppress(ObjectExists):
        store.write_if_absent(key, b"again")
        done = "creates an object that exists, though If-None-Match forbids it"
    if done is None:
        store.write_if_match(key, b"renewed", etag=etag)
        with contextlib.suppress(PreconditionFailed):
            store.write_if_match(key, b"late", etag=etag)
            done = "replaces an object that has changed, though If-Match forbids it"
    if done is None:
        return ok(
            part,
            f"{store.uri} can be written, also conditionally (tried with an object that was "
            "deleted again)",
        )
    return problem(
        part,
        f"{store.uri} {done}, so that two drivers could train one run",
        "use a store with conditional writes, such as AWS S3 or the embedded one (shoal up), or "
        "set store_lease: none and start one driver of a run at a time",
        exit_code=ENVIRONMENT_EXIT_CODE,
    )


def _unguarded(part: str, store: Store) -> Finding:
    return warning(
        part,
        f"{store.uri} can be written; store_lease is none, so two drivers of a run that are "
        "started at one moment may both work on it until one of them finds the other",
        "start one at a time, or use a store with conditional writes and remove store_lease",
    )


def _check_folder(part: str, folder: Path, *, lease: Literal["required", "none"]) -> list[Finding]:
    above = nearest_existing(folder)
    try:
        with tempfile.TemporaryFile(dir=above) as file:
            file.write(bytes(_PROBE_BYTES))
            file.flush()
    except OSError as error:
        below = "" if above == folder else f", in which {folder} would be made"
        return [
            problem(
                part,
                f"{above}{below}, cannot be written to: {error.strerror}",
                "name a folder that you may write to, on a disk with free space",
                exit_code=ENVIRONMENT_EXIT_CODE,
            )
        ]
    made = "" if above == folder else "; it will be made by the first run"
    findings = [ok(part, f"{folder} can be written{made} (tried with a file without a name)")]
    if lease == "none":
        findings.append(
            warning(
                part,
                "store_lease: none has no effect: a local folder has conditional writes",
                "remove store_lease",
            )
        )
    return findings


def nearest_existing(path: Path) -> Path:
    """The path, or the nearest one above it that exists."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return path
