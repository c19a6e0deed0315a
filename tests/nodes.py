"""Ray nodes with addresses of their own, that can be killed, cut off, frozen and brought back.

    with nodes(cpus=0) as cluster:                  a head, which trains nothing here
        one, two = cluster.add(cpus=1), cluster.add(cpus=1)
        cluster.popen([sys.executable, ...])        on the head, attached to the cluster
        one.kill(), one.start()                     SIGKILL to all that it runs; the same node anew
        one.terminate()                             as a platform does that takes it: it drains
        two.cut_off(), two.join_up()                its link is down, and up again
        two.freeze(), two.thaw()                    SIGSTOP and SIGCONT to all that it runs

Each node is a network namespace, and a bridge joins them; a store on this machine's loopback is
reached through a forwarder on the bridge, so that a node that is cut off has no store either. Where
namespaces cannot be made (`cluster.shared` says why), nodes are raylets of this host, each with a
loopback address of its own, and one that is cut off is frozen: others hear as little of it.

Nodes end by their processes, which carry a mark, never by `ray stop`, which would end every Ray
process of the machine. Everything has a name after the cluster's folder, and is removed by a
process of its own, which misses the one that made the cluster however that ends. Should both be
killed, the next cluster removes what they left.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil

from tests.networks import Network, forwarder, host_name, make_network, remove_network

START_SECONDS = 90
_END_SECONDS = 30
_MARK = "SHOAL_TEST_NODE"
_FOLDER = "shoal-nodes-"
_STORE = "AWS_ENDPOINT_URL_S3"
_NOTICING = {
    # One that says nothing is missed after a dozen seconds. Less would miss those that live, on a
    # machine that is loaded.
    "RAY_health_check_initial_delay_ms": "5000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "3000",
    "RAY_health_check_failure_threshold": "3",
}
"""How soon Ray misses a node; it takes half a minute by default."""


@dataclass
class Node:
    """One `ray start --block`, and what it has started."""

    cluster: Nodes
    number: int
    """From 1 on; that of the head."""
    address: str
    cpus: int
    drain_seconds: float
    process: subprocess.Popen[bytes] = field(init=False)
    starts: int = 0

    @property
    def host(self) -> str:
        """Its host name, where it has one of its own."""
        return host_name(self.number)

    @property
    def log(self) -> Path:
        """What its last start has said."""
        return self.cluster.folder / f"node-{self.number}-{self.starts}.log"

    @property
    def environment(self) -> dict[str, str]:
        """Of all processes on the node."""
        own = {
            _MARK: f"{_name_of(self.cluster.folder)}-{self.number}",
            "SHOAL_CACHE": str(self.cluster.folder / f"cache-{self.number}"),
            "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": str(self.drain_seconds),
        }
        return os.environ | self.cluster.environment | own

    def start(self) -> None:
        """Starts the node, or starts it anew once it is gone; it has joined when this returns."""
        self.begin()
        self.await_joined()

    def begin(self) -> None:
        """`start` without waiting."""
        self.kill()  # Where it was thought dead it has ended by itself, or is about to.
        self.starts += 1
        is_head = self is self.cluster.head
        port = self.cluster.address.rpartition(":")[2]
        place = (
            ["--head", "--port", port, "--include-dashboard=false"]
            if is_head
            else ["--address", self.cluster.address]
        )
        # Nodes that start at the same time would take the same names for their sockets.
        place += ["--temp-dir", str(self.cluster.folder / f"n{self.number}")]
        with self.log.open("wb") as log:
            self.process = self.cluster.popen(
                [
                    sys.executable, "-m", "ray.scripts.scripts", "start", *place, "--block",
                    *([] if is_head and self.cluster.network is None
                      else ["--node-ip-address", self.address]),
                    "--num-cpus", str(self.cpus), "--num-gpus", "0",
                    "--object-store-memory", str(100 * 2**20), "--disable-usage-stats",
                    "--include-log-monitor=false",
                ],
                node=self,
                stdout=log,
                stderr=subprocess.STDOUT,
            )  # fmt: skip

    def await_joined(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while b"now block forever" not in (said := self.log.read_bytes()):
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"the node does not start:\n{said.decode()}")
            time.sleep(0.05)

    def processes(self) -> list[psutil.Process]:
        """All that runs on the node, whoever has started it there."""
        return _marked(self._is_here)

    def kill(self) -> None:
        """The node is gone, without a word."""
        _kill(self._is_here)
        if self.starts:
            self.process.wait(_END_SECONDS)

    def _is_here(self, mark: str) -> bool:
        return mark == self.environment[_MARK]

    def terminate(self) -> None:
        """SIGTERM to `ray start`: it drains the node for `drain_seconds`, then ends it."""
        self.process.send_signal(signal.SIGTERM)

    def freeze(self) -> None:
        """Stops all that runs on it; connections stay."""
        while running := [p for p in self.processes() if not _is_stopped(p)]:
            for process in running:
                with suppress(psutil.NoSuchProcess):
                    process.suspend()

    def thaw(self) -> None:
        for process in self.processes():
            with suppress(psutil.NoSuchProcess):
                process.resume()

    def cut_off(self) -> None:
        """Nothing comes to it any more, and nothing from it."""
        if self.cluster.network is None:
            self.freeze()
        else:
            self.cluster.network.set_link(self.number, "down")

    def join_up(self) -> None:
        if self.cluster.network is None:
            self.thaw()
        else:
            self.cluster.network.set_link(self.number, "up")


@dataclass
class Nodes:
    """A cluster whose nodes come and go."""

    folder: Path
    network: Network | None = None
    """None: the nodes share this machine's network."""
    shared: str | None = None
    """Why they do."""
    address: str = ""
    """Of the head, as in RAY_ADDRESS."""
    environment: dict[str, str] = field(default_factory=dict)
    """Of all nodes, beside that of this process."""
    all: list[Node] = field(default_factory=list)
    _started: list[subprocess.Popen[Any]] = field(default_factory=list)

    @property
    def head(self) -> Node:
        return self.all[0]

    def add(self, *, cpus: int, drain_seconds: float = 30) -> Node:
        """A node that has joined; `drain_seconds` is the grace that SIGTERM leaves it."""
        return self.add_several(1, cpus=cpus, drain_seconds=drain_seconds)[0]

    def add_several(self, count: int, *, cpus: int, drain_seconds: float = 30) -> list[Node]:
        """Nodes that start at the same time, and have all joined."""
        added = [self._place(cpus=cpus, drain_seconds=drain_seconds) for _ in range(count)]
        for node in added:
            node.begin()
        for node in added:
            node.await_joined()
        return added

    def remove(self, node: Node) -> None:
        """Kills the node for good."""
        node.kill()
        self.all.remove(node)

    def popen(
        self,
        command: Sequence[str],
        *,
        node: Node | None = None,
        env: Mapping[str, str] | None = None,
        **options: Any,
    ) -> subprocess.Popen[Any]:
        """A process on a node, the head without one, in a session of its own; `env` is added."""
        node = node or self.head
        enter = self.network.enter(node.number) if self.network is not None else []
        process = subprocess.Popen(
            [*enter, *command],
            env=node.environment | dict(env or {}),
            start_new_session=True,
            **options,
        )
        self._started.append(process)
        return process

    def _place(self, *, cpus: int, drain_seconds: float) -> Node:
        number = max((node.number for node in self.all), default=0) + 1
        address = self.network.join(number) if self.network else f"127.0.0.{number}"
        node = Node(self, number, address, cpus=cpus, drain_seconds=drain_seconds)
        self.all.append(node)
        return node

    def wait(self) -> None:
        """Returns when everything that was started here has ended."""
        for process in self._started:
            process.wait(_END_SECONDS)

    def start_head(self, *, cpus: int) -> None:
        self._place(cpus=cpus, drain_seconds=30)
        self._start_head()

    def replace_head(self) -> None:
        """A new cluster in the place of a head that is gone. It has another port: nodes that lived
        on do not belong to it before they are started anew."""
        self.head.kill()
        self._start_head()

    def _start_head(self) -> None:
        port = _free_port()
        # Drivers of the same host find the head by the machine's own address.
        self.address = f"{self.head.address if self.network else '127.0.0.1'}:{port}"
        self.environment["RAY_ADDRESS"] = self.address
        self.head.start()


@contextmanager
def nodes(
    *, cpus: int, apart: bool = True, env: Mapping[str, str] | None = None
) -> Iterator[Nodes]:
    """A cluster of a head with so many cores, to which nodes can be added.

    `env` is added to the environment of all nodes. Without `apart` they share this machine's
    network, as where no namespaces can be made.
    """
    with ExitStack() as stack:
        _sweep_abandoned()
        folder = Path(tempfile.mkdtemp(prefix=_FOLDER))
        (folder / "owner").touch()
        cluster = Nodes(folder)
        stack.callback(cluster.wait)
        stack.enter_context(_swept(folder))
        network = make_network(_name_of(folder), folder) if apart else "it was asked for"
        if isinstance(network, Network):
            cluster.network = network
        else:
            cluster.shared = network
        # A token that Ray may have left in the home folder must not decide whether one is needed.
        cluster.environment |= _NOTICING | {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
        }
        store = urlsplit(os.environ.get(_STORE, "")).netloc
        if cluster.network is not None and store:
            port = stack.enter_context(forwarder(cluster.network.gateway, to=store))
            cluster.environment[_STORE] = f"http://{cluster.network.gateway}:{port}"
        cluster.environment |= env or {}
        cluster.start_head(cpus=cpus)
        yield cluster


# ------------------------------------------------------------------------- what is left behind


def _sweep(folder: Path) -> None:
    """Removes a cluster: its processes, namespaces and bridge, and at last its folder."""
    name = _name_of(folder)
    _kill(lambda mark: mark.startswith(f"{name}-"))
    remove_network(name)
    shutil.rmtree(folder, ignore_errors=True)


def _sweep_abandoned() -> None:
    """Removes all clusters of which neither the maker nor the sweeper lives any more."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_FOLDER}*"):
        with suppress(BlockingIOError, FileNotFoundError), _held(folder):
            _sweep(folder)


@contextmanager
def _held(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """Inside the block nobody else owns the folder. BlockingIOError where somebody does."""
    with (folder / "owner").open("r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield


@contextmanager
def _swept(folder: Path) -> Iterator[None]:
    """After the block, or once this process is gone, the cluster is removed."""
    with subprocess.Popen(
        [sys.executable, "-m", "tests.nodes", str(folder)],
        cwd=Path(__file__).parent.parent,
        stdin=subprocess.PIPE,
        start_new_session=True,
    ) as sweeper:
        assert sweeper.stdin is not None
        try:
            with _held(folder):
                yield
        finally:
            sweeper.stdin.close()
            assert sweeper.wait() == 0, "the cluster was not removed"


def _sweep_when_abandoned(folder: Path) -> None:
    """What the sweeper does; its maker holds the other end of its standard input."""
    sys.stdin.read()
    with _held(folder, wait=True):
        _sweep(folder)


def _name_of(folder: Path) -> str:
    return folder.name.removeprefix(_FOLDER)


def _kill(is_meant: Callable[[str], bool]) -> None:
    """SIGKILL to all processes whose mark is meant; they are gone when this returns."""
    # Those that are started meanwhile are found in the next round.
    while found := _marked(is_meant):
        for process in found:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(found, timeout=_END_SECONDS)


def _marked(is_meant: Callable[[str], bool]) -> list[psutil.Process]:
    return [
        process
        for process in psutil.process_iter(["environ", "status"])
        if (mark := (process.info["environ"] or {}).get(_MARK)) is not None
        and is_meant(mark)
        and process.info["status"] != psutil.STATUS_ZOMBIE
    ]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _is_stopped(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return bool(process.status() in (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE))
    return True


if __name__ == "__main__":
    _sweep_when_abandoned(Path(sys.argv[1]))
