"""A small HTTP proxy in front of a real store that fails when it is told to, or at random.

with proxy_to(endpoint_url) as proxy:       clients get proxy.url as their endpoint
    proxy.fail("drop", "GET", times=2)      the next two
    proxy.storm(0.1, KINDS, seed=7)         each with a chance of 10 %
    proxy.outage(20, method="PUT")          all of them, for 20 seconds from the next PUT on
    proxy.ignored = ("if-match",)           conditions of which the store hears nothing
proxy.injected                              how many of each kind were really done
"""

from __future__ import annotations

import contextlib
import http.client
import http.server
import os
import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Literal
from urllib.parse import urlsplit

from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

Kind = Literal[
    "slow down",  # answers 503 SlowDown, without asking the store
    "throttle",  # answers 429 with Retry-After: 1, without asking the store
    "html 500",  # answers 500 with a page of HTML, as a balancer does, without asking the store
    "fail after",  # the store does it, the answer is 500
    "error in 200",  # the store does it, the answer is 200 with an error for a body
    "expired",  # answers 400 ExpiredToken, without asking the store
    "denied",  # answers 403 AccessDenied, without asking the store
    "not implemented",  # answers 501, without asking the store
    "drop",  # closes the connection, without asking the store
    "away",  # the same, to every request of an outage
    "lose answer",  # the store does it, the connection closes
    "cut body",  # half of the answer's body, then the connection closes
    "reset",  # half of the answer's body, then the connection is reset
    "late",  # the answer comes after `late_seconds`
    "trickle",  # the answer's body comes byte by byte, four in a second
    "slow",  # the answer's body comes steadily, SLOW_BYTES each _SLOW_SECONDS
    "slow request",  # the request's body is taken so for some seconds, then the rest of it at once
    "stuck request",  # nothing of the request's body is taken before the proxy ends
    "corrupt answer",  # one bit of the answer's body differs
    "corrupt request",  # one bit of the request's body differs
    "hang",  # no answer before the proxy ends
]
SICK: tuple[Kind, ...] = (
    "slow down", "throttle", "html 500", "fail after", "drop", "lose answer", "cut body", "reset",
    "late",
)  # fmt: skip
"""What a store in trouble does, from which its clients can recover in a few seconds."""
_TRICKLE_SECONDS = 0.25
SLOW_BYTES = 2**14
_SLOW_SECONDS = 0.25
_SLOW_TURNS = 16
_RETRY_AFTER_SECONDS = "1"

_XML = [("Content-Type", "application/xml")]
_REFUSALS: dict[str, tuple[int, list[tuple[str, str]], bytes]] = {
    "slow down": (503, _XML, b"<Error><Code>SlowDown</Code><Message>slow</Message></Error>"),
    "throttle": (
        429,
        [*_XML, ("Retry-After", _RETRY_AFTER_SECONDS)],
        b"<Error><Code>TooManyRequests</Code><Message>too many</Message></Error>",
    ),
    "html 500": (500, [("Content-Type", "text/html")], b"<html><body>Oops<br></html>"),
    "expired": (400, _XML, b"<Error><Code>ExpiredToken</Code><Message>old</Message></Error>"),
    "denied": (403, _XML, b"<Error><Code>AccessDenied</Code><Message>no</Message></Error>"),
    "not implemented": (
        501,
        _XML,
        b"<Error><Code>NotImplemented</Code><Message>no</Message></Error>",
    ),
}
_INTERNAL_ERROR = b"<Error><Code>InternalError</Code><Message>try again</Message></Error>"
_BODY_KINDS = ("cut body", "reset", "corrupt answer", "trickle", "slow")
"""Kinds that do nothing to an answer without a body."""
_OWN_HEADERS = ("expect", "connection")
"""Headers of one connection alone."""


@dataclass
class Fault:
    """Fails `times` requests of `method` whose URL contains `part`, from the next one on."""

    kind: Kind
    method: str
    part: str = ""
    times: int = 1
    header: str = ""
    """Only requests that have this header."""
    after: int = 0
    """So many that fit are let through first."""

    def fits(self, method: str, path: str, headers: Sequence[str]) -> bool:
        """Whether it is for such a request."""
        return (
            self.method == method
            and self.part in path
            and (not self.header or self.header.lower() in headers)
        )


@dataclass
class FaultyProxy:
    """Forwards to `target` (host:port); a context manager."""

    target: str
    faults: list[Fault] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    """`METHOD path` of each request, in order of arrival."""
    injected: Counter[Kind] = field(default_factory=Counter)
    """Faults by kind that were done; one that an answer without a body could not have is not."""
    spoilt: list[str] = field(default_factory=list)
    """The path of each request to which one was done."""
    ignored: Sequence[str] = ()
    """Headers of writing requests, in small letters, that are left out, as by a store that does not
    know them; the requests are signed anew, with the keys of the environment."""
    late_seconds: float = 0.5

    def __enter__(self) -> FaultyProxy:
        proxy = self
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._random: random.Random | None = None
        self._share = 0.0
        self._kinds: Sequence[Kind] = ()
        self._outage: tuple[Fault, float, threading.Event] | None = None
        self._away_until = 0.0

        class Handler(_Handler):
            owner = proxy

        class Server(http.server.ThreadingHTTPServer):
            daemon_threads = True
            block_on_close = False
            request_queue_size = 128

            def server_bind(self) -> None:
                # Small segments, as a network has: with those of loopback a slow reader's window
                # opens in jumps.
                self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 1400)
                super().server_bind()

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

    def fail(
        self,
        kind: Kind,
        method: str,
        part: str = "",
        *,
        times: int = 1,
        header: str = "",
        after: int = 0,
    ) -> None:
        """Fail the next requests that fit, but for the first `after` of them."""
        self.faults.append(Fault(kind, method, part, times, header, after))

    def storm(self, share: float, kinds: Sequence[Kind], *, seed: int) -> None:
        """From now on fail this share of all requests, drawn one by one; 0 ends it.

        Kinds that corrupt are for the contents of objects alone: lists have no checksum by which
        anybody could find out.
        """
        with self._lock:
            self._random, self._share, self._kinds = random.Random(seed), share, tuple(kinds)

    def outage(self, seconds: float, *, method: str, part: str = "") -> threading.Event:
        """Drop every request for so long, from the next one that fits on; set once it began."""
        with self._lock:
            self._outage = Fault("away", method, part), seconds, threading.Event()
            return self._outage[2]

    def count(self, method: str) -> int:
        return sum(request.startswith(f"{method} ") for request in self.requests)

    def take_fault(self, method: str, path: str, headers: Sequence[str] = ()) -> Kind | None:
        """The fault that this request meets."""
        with self._lock:
            self.requests.append(f"{method} {path}")
            if self._outage is not None and self._outage[0].fits(method, path, headers):
                _, seconds, began = self._outage
                self._outage, self._away_until = None, time.monotonic() + seconds
                began.set()
            if time.monotonic() < self._away_until:
                return "away"
            for fault in self.faults:
                if fault.times and fault.fits(method, path, headers):
                    if fault.after:
                        fault.after -= 1
                        continue
                    fault.times -= 1
                    return fault.kind
            if self._random is None or self._random.random() >= self._share:
                return None
            return self._random.choice([k for k in self._kinds if _fits(k, method, path)])

    def done(self, kind: Kind, path: str) -> None:
        with self._lock:
            self.injected[kind] += 1
            self.spoilt.append(path)

    def flip(self, data: bytes) -> bytes:
        """The bytes with one bit changed: of the first one, or drawn in a storm."""
        with self._lock:
            bit = self._random.randrange(8 * len(data)) if self._random is not None else 0
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        return bytes(changed)

    def wait(self, seconds: float | None = None) -> bool:
        """Until the proxy ends, or for so long; whether it has ended."""
        return self._closing.wait(seconds)


def _fits(kind: Kind, method: str, path: str) -> bool:
    """Whether a request of a storm can meet this fault, and somebody could find it out."""
    if kind == "corrupt request":
        return method == "PUT"
    if kind == "corrupt answer" and "list-type" in path:
        return False
    return kind not in _BODY_KINDS or method == "GET"


class _Handler(http.server.BaseHTTPRequestHandler):
    owner: FaultyProxy
    protocol_version = "HTTP/1.1"

    def setup(self) -> None:
        super().setup()
        if any(fault.kind == "slow request" and fault.times for fault in self.owner.faults):
            # Before any byte has come: later it would not become smaller.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SLOW_BYTES)

    def handle(self) -> None:
        with contextlib.suppress(OSError):  # a client that was failed, or killed, has gone away
            super().handle()

    def handle_one(self) -> None:
        owner = self.owner
        names = [name.lower() for name in self.headers]
        fault = owner.take_fault(self.command, self.path, names)
        num_bytes = int(self.headers.get("Content-Length", 0))
        body = self._take(num_bytes, fault)
        if fault == "corrupt request" and not body:
            fault = None
        if fault is not None and fault not in _BODY_KINDS:
            owner.done(fault, self.path)
        if len(body) < num_bytes and fault != "stuck request":
            raise ConnectionResetError("the client has gone away")
        if fault == "hang":
            owner.wait()
        if fault == "late":
            owner.wait(owner.late_seconds)
        if fault in ("drop", "away", "hang", "stuck request"):
            self._close()
        elif fault in _REFUSALS:
            self._answer(*_REFUSALS[fault])
        else:
            self._forward(owner.flip(body) if fault == "corrupt request" else body, fault)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = handle_one  # noqa: N815

    def _take(self, num_bytes: int, fault: Kind | None) -> bytes:
        """The body of the request."""
        if fault == "stuck request":
            self.owner.wait()
            return b""
        taken = b""
        if fault == "slow request":
            for _ in range(_SLOW_TURNS):
                taken += self.rfile.read(min(SLOW_BYTES, num_bytes - len(taken)))
                self.owner.wait(_SLOW_SECONDS)
        return taken + self.rfile.read(num_bytes - len(taken))

    def _forward(self, body: bytes, fault: Kind | None) -> None:
        headers_in = [(k, v) for k, v in self.headers.items() if k.lower() not in _OWN_HEADERS]
        if self.command == "PUT" and any(k.lower() in self.owner.ignored for k, _ in headers_in):
            headers_in = self._without_conditions(headers_in)
        connection = http.client.HTTPConnection(self.owner.target, timeout=30)
        with contextlib.closing(connection):
            connection.putrequest(
                self.command, self.path, skip_host=True, skip_accept_encoding=True
            )
            for name, value in headers_in:
                connection.putheader(name, value)
            connection.endheaders(body)
            answer = connection.getresponse()
            data = answer.read()
        headers = [(k, v) for k, v in answer.getheaders() if k.lower() != "transfer-encoding"]
        if fault == "lose answer":
            self._close()
        elif fault == "fail after":
            self._answer(500, [], b"")
        elif fault == "error in 200":
            self._answer(200, _XML, _INTERNAL_ERROR)
        elif fault in _BODY_KINDS and data and answer.status < 300:
            self.owner.done(fault, self.path)
            if fault == "corrupt answer":
                self._answer(answer.status, headers, self.owner.flip(data))
            else:
                self._answer(answer.status, headers, data, spoilt=fault)
        else:
            self._answer(answer.status, headers, data)

    def _without_conditions(self, headers: list[tuple[str, str]]) -> list[tuple[str, str]]:
        """The headers of this request without those that are ignored, signed anew."""
        unknown = {*self.owner.ignored, "authorization", "x-amz-date"}
        request = AWSRequest(
            method=self.command,
            url=f"http://{self.headers['Host']}{self.path}",
            headers={k: v for k, v in headers if k.lower() not in unknown},
        )
        keys = Credentials(os.environ["AWS_ACCESS_KEY_ID"], os.environ["AWS_SECRET_ACCESS_KEY"])
        S3SigV4Auth(keys, "s3", "us-east-1").add_auth(request)
        return list(request.headers.items())

    def _answer(
        self,
        status: int,
        headers: list[tuple[str, str]],
        data: bytes,
        *,
        spoilt: Kind | None = None,
    ) -> None:
        self.send_response_only(status)
        for name, value in headers:
            self.send_header(name, value)
        if not any(name.lower() == "content-length" for name, _ in headers):
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if spoilt in ("trickle", "slow"):
            size, pause = (
                (1, _TRICKLE_SECONDS) if spoilt == "trickle" else (SLOW_BYTES, _SLOW_SECONDS)
            )
            for place in range(0, len(data), size):
                self.wfile.write(data[place : place + size])
                if self.owner.wait(pause):
                    break
            return
        self.wfile.write(data[: len(data) // 2] if spoilt else data)
        if spoilt == "reset":
            # Closed with bytes on their way, a connection without linger is reset.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            self.close_connection = True
        elif spoilt:
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
