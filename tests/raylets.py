"""Ray nodes as processes of this machine, each with a loopback address of its own.

    with raylets(folder, cpus=2) as cluster:        a head
        node = cluster.add(cpus=2)                  another node; ready when this returns
        node.process.send_signal(signal.SIGTERM)    as a platform does that takes it: it drains
        cluster.remove(node)                        at once, without a word

RAY_ADDRESS and a token of its own name the cluster inside the block. Nodes end by their process
groups, never by `ray stop`, which would end every Ray process of the machine.
"""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

START_SECONDS = 60


@dataclass
class Node:
    """One `ray start --block`."""

    process: subprocess.Popen[bytes]
    log: Path
    """What it has said."""

    def end(self) -> None:
        """Kills the node with all that it has started."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(30)


@dataclass
class Raylets:
    """A cluster whose nodes come and go."""

    address: str
    folder: Path
    nodes: list[Node] = field(default_factory=list)

    @property
    def head(self) -> Node:
        return self.nodes[0]

    def add(self, *, cpus: int, drain_seconds: float = 30) -> Node:
        """A node that joins; `drain_seconds` is the grace that SIGTERM leaves it."""
        # The driver finds the head by this machine's own address: only the others have another.
        number = len(list(self.folder.glob("node-*.log"))) + 1
        options = ["--address", self.address, "--node-ip-address", f"127.0.0.{number}"]
        return self._start(options, cpus=cpus, drain_seconds=drain_seconds)

    def remove(self, node: Node) -> None:
        """Kills the node."""
        node.end()
        self.nodes.remove(node)

    def _start(self, options: list[str], *, cpus: int, drain_seconds: float = 30) -> Node:
        log_file = self.folder / f"node-{len(list(self.folder.glob('node-*.log'))) + 1}.log"
        with log_file.open("wb") as log:
            process = subprocess.Popen(
                [
                    sys.executable, "-m", "ray.scripts.scripts", "start", *options, "--block",
                    "--num-cpus", str(cpus), "--num-gpus", "0",
                    "--object-store-memory", str(100 * 2**20), "--include-log-monitor=false",
                ],
                env=os.environ | {"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": str(drain_seconds)},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip
        node = Node(process, log_file)
        self.nodes.append(node)
        self._wait_for(node)
        return node

    def _wait_for(self, node: Node) -> None:
        """Until the node has joined."""
        deadline = time.monotonic() + START_SECONDS
        while b"now block forever" not in (said := node.log.read_bytes()):
            if node.process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"the node does not start:\n{said.decode()}")
            time.sleep(0.1)


@contextmanager
def raylets(*, cpus: int) -> Iterator[Raylets]:
    """A cluster of a head with so many cores, to which nodes can be added."""
    with tempfile.TemporaryDirectory(prefix="rl-", ignore_cleanup_errors=True) as folder:
        port = _free_port()
        cluster = Raylets(f"127.0.0.1:{port}", Path(folder))
        before = dict(os.environ)
        # A token that Ray may have left in the home folder must not decide whether one is needed.
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        try:
            cluster._start(
                ["--head", "--port", str(port), "--include-dashboard=false", "--temp-dir", folder],
                cpus=cpus,
            )
            os.environ["RAY_ADDRESS"] = cluster.address
            yield cluster
        finally:
            for node in reversed(cluster.nodes):
                node.end()
            os.environ.clear()
            os.environ.update(before)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
