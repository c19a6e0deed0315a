"""A network inside this machine: namespaces joined by a bridge, each a host to what runs in it.

    network = make_network("x7", folder)            or a text that says why there can be none
    address = network.join(1)                       of a new namespace
    subprocess.run([*network.enter(1), "true"])     in it
    network.set_link(1, "down")                     nothing comes to it any more, nor from it
    remove_network("x7")                            all of it, whoever has made it

`forwarder` lets namespaces reach a server on this machine's loopback.
"""

from __future__ import annotations

import contextlib
import os
import random
import secrets
import shutil
import socket
import socketserver
import subprocess
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil

_MOST = 253
_INTERFACE = "eth0"
"""Of each namespace, towards the bridge."""


def make_network(name: str, folder: Path) -> Network | str:
    """A network, or why none can be made.

    `name` has at most 8 characters; files for its hosts are written into `folder`.
    """
    if shutil.which("ip") is None:
        return "iproute2 is not installed"
    if os.geteuid() != 0:
        return "only root can make network namespaces"
    network = Network(name, folder)
    try:
        network.open()
        # More than the nodes will be: whether all of it works is seen before anything starts.
        network.join(_MOST)
        _run([*network.enter(_MOST), "true"])
    except subprocess.CalledProcessError as error:
        return f"{error.cmd[0]}: {str(error.stderr).strip()}"
    return network


def remove_network(name: str) -> None:
    """Its namespaces and its bridge, where there are any; nothing runs in them any more."""
    for namespace in Path("/run/netns").glob(f"{_bridge(name)}-*"):
        _ip("netns", "delete", namespace.name)
    if Path("/sys/class/net", _bridge(name)).exists():
        _ip("link", "delete", _bridge(name))


class Network:
    """A bridge in a free subnet, and namespaces joined by it."""

    def __init__(self, name: str, folder: Path) -> None:
        self._name = name
        self._folder = folder
        self.bridge = _bridge(name)
        self.subnet = _free_subnet()

    @property
    def gateway(self) -> str:
        """This machine's address on the bridge."""
        return f"{self.subnet}.1"

    def open(self) -> None:
        hosts = [f"{self._address(number)} {host_name(number)}\n" for number in range(1, _MOST)]
        (self._folder / "hosts").write_text("127.0.0.1 localhost\n" + "".join(hosts))
        # A name server that could not be reached would be waited for, ten seconds for each name.
        (self._folder / "resolv.conf").write_text("nameserver 127.0.0.1\n")
        # An address of its own: else it takes that of one of its ports, and another as ports come.
        octets = [0x02, *secrets.token_bytes(5)]
        mac = ":".join(f"{octet:02x}" for octet in octets)
        _ip("link", "add", self.bridge, "address", mac, "type", "bridge")
        _ip("addr", "add", f"{self.gateway}/24", "dev", self.bridge)
        _ip("link", "set", self.bridge, "up")

    def join(self, number: int) -> str:
        """The address of a new namespace."""
        name = self._namespace(number)
        address = self._address(number)
        _ip("netns", "add", name)
        _ip(
            "link", "add", self._link(number), "type", "veth",
            "peer", "name", _INTERFACE, "netns", name,
        )  # fmt: skip
        _ip("link", "set", self._link(number), "master", self.bridge)
        _ip("-n", name, "addr", "add", f"{address}/24", "dev", _INTERFACE)
        for link in ("lo", _INTERFACE):
            _ip("-n", name, "link", "set", link, "up")
        self.set_link(number, "up")
        # Ray takes as a node's own address the one from which the internet would be reached.
        _ip("-n", name, "route", "add", "default", "via", self.gateway)
        return address

    def set_link(self, number: int, to: str) -> None:
        _ip("link", "set", self._link(number), to)

    def enter(self, number: int) -> list[str]:
        """What goes before a command for it to run in the namespace, with names of its own."""
        inner = (
            f"hostname {host_name(number)}"
            f" && mount --bind '{self._folder}/hosts' /etc/hosts"
            f" && mount --bind '{self._folder}/resolv.conf' /etc/resolv.conf"
            ' && exec "$@"'
        )
        return [
            "ip", "netns", "exec", self._namespace(number),
            "unshare", "--uts", "--mount", "sh", "-c", inner, "sh",
        ]  # fmt: skip

    def _address(self, number: int) -> str:
        return f"{self.subnet}.{number + 1}"

    def _namespace(self, number: int) -> str:
        return f"{self.bridge}-{number}"

    def _link(self, number: int) -> str:
        return f"sh{self._name}n{number}"


def host_name(number: int) -> str:
    """Of what runs in a namespace."""
    return f"node-{number}"


def _bridge(name: str) -> str:
    return f"shoal{name}"


def _ip(*arguments: str) -> None:
    _run(["ip", *arguments])


def _run(command: Sequence[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


def _free_subnet() -> str:
    """Three parts of an address, as in `10.77.3`, that no interface of this machine has."""
    taken = {
        address.address.rpartition(".")[0]
        for addresses in psutil.net_if_addrs().values()
        for address in addresses
        if address.family == socket.AF_INET
    }
    draw = random.SystemRandom()
    while (subnet := f"10.{draw.randint(64, 254)}.{draw.randint(0, 254)}") in taken:
        continue
    return subnet


# -------------------------------------------------------------------------------- a forwarder


class _Forwarder(socketserver.ThreadingTCPServer):
    daemon_threads = True
    request_queue_size = 256
    to: tuple[str, int]


class _Connection(socketserver.BaseRequestHandler):
    """Passes bytes on, both ways, until one side ends."""

    server: _Forwarder

    def handle(self) -> None:
        with contextlib.suppress(OSError), socket.create_connection(self.server.to) as store:
            for end in (self.request, store):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=_pass, args=(store, self.request), daemon=True).start()
            _pass(self.request, store)


def _pass(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(2**18):
            target.sendall(data)
    for end in (source, target):
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)


@contextmanager
def forwarder(host: str, *, to: str) -> Iterator[int]:
    """Its port on `host`, from which `to` (host:port) is reached."""
    name, _, port = to.rpartition(":")
    with _Forwarder((host, 0), _Connection) as server:
        server.to = (name, int(port))
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield int(server.server_address[1])
        finally:
            server.shutdown()
            thread.join()
