"""A small HTTP proxy in front of a real store that fails when it is told to."""

from __future__ import annotations

import http.client
import http.server
import socket
import threading
from dataclasses import dataclass, field
from types import TracebackType
from typing import Literal
from urllib.parse import urlsplit

Kind = Literal[
    "slow down",  # answers 503 SlowDown, without asking the store
    "fail after",  # the store does it, the answer is 500
    "drop",  # closes the connection, without asking the store
    "lose answer",  # the store does it, the connection closes
    "cut body",  # half of the answer's body, then the connection closes
    "corrupt answer",  # one byte of the answer's body differs
    "corrupt request",  # one byte of the request's body differs
    "hang",  # no answer before the proxy ends
]
_SLOW_DOWN = b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>slow</Message></Error>"


@dataclass
class Fault:
    """Fails the next `times` requests of `method` whose URL contains `part`."""

    kind: Kind
    method: str
    part: str = ""
    times: int = 1


@dataclass
class FaultyProxy:
    """Forwards to `target` (host:port); a context manager."""

    target: str
    faults: list[Fault] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    """`METHOD path` of each request, in order of arrival."""

    def __enter__(self) -> FaultyProxy:
        proxy = self
        self._lock = threading.Lock()
        self._closing = threading.Event()

        class Handler(_Handler):
            owner = proxy

        class Server(http.server.ThreadingHTTPServer):
            daemon_threads = True
            block_on_close = False

        self._server = Server(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._closing.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def fail(self, kind: Kind, method: str, part: str = "", *, times: int = 1) -> None:
        self.faults.append(Fault(kind, method, part, times))

    def count(self, method: str) -> int:
        return sum(request.startswith(f"{method} ") for request in self.requests)

    def take_fault(self, method: str, path: str) -> Kind | None:
        with self._lock:
            self.requests.append(f"{method} {path}")
            for fault in self.faults:
                if fault.times and fault.method == method and fault.part in path:
                    fault.times -= 1
                    return fault.kind
        return None

    def wait_for_end(self) -> None:
        self._closing.wait()


class _Handler(http.server.BaseHTTPRequestHandler):
    owner: FaultyProxy
    protocol_version = "HTTP/1.1"

    def handle_one(self) -> None:
        fault = self.owner.take_fault(self.command, self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if fault == "hang":
            self.owner.wait_for_end()
        if fault in ("drop", "hang"):
            self._close()
        elif fault == "slow down":
            self._answer(503, [("Content-Type", "application/xml")], _SLOW_DOWN)
        else:
            if fault == "corrupt request":
                body = bytes([body[0] ^ 1]) + body[1:]
            self._forward(body, fault)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = handle_one  # noqa: N815

    def _forward(self, body: bytes, fault: Kind | None) -> None:
        connection = http.client.HTTPConnection(self.owner.target, timeout=30)
        connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            if name.lower() not in ("expect", "connection"):
                connection.putheader(name, value)
        connection.endheaders(body)
        answer = connection.getresponse()
        data = answer.read()
        connection.close()
        headers = [(k, v) for k, v in answer.getheaders() if k.lower() != "transfer-encoding"]
        if fault == "lose answer":
            self._close()
        elif fault == "fail after":
            self._answer(500, [], b"")
        else:
            if fault == "corrupt answer":
                data = bytes([data[0] ^ 1]) + data[1:]
            self._answer(answer.status, headers, data, cut=fault == "cut body")

    def _answer(
        self, status: int, headers: list[tuple[str, str]], data: bytes, *, cut: bool = False
    ) -> None:
        self.send_response_only(status)
        for name, value in headers:
            self.send_header(name, value)
        if not any(name.lower() == "content-length" for name, _ in headers):
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[: len(data) // 2] if cut else data)
        if cut:
            self._close()

    def _close(self) -> None:
        self.wfile.flush()
        self.connection.shutdown(socket.SHUT_RDWR)
        self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Nothing: the tests' output is for their own findings."""


def proxy_to(endpoint_url: str) -> FaultyProxy:
    """A proxy in front of the store at `endpoint_url`."""
    return FaultyProxy(target=urlsplit(endpoint_url).netloc)
