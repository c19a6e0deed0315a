"""A Kubernetes API on a port of this machine.

with running_api() as api:
    api.write_kubeconfig(path)
    ...                             # clients talk to it
    api.objects                     # what they made
    api.requests                    # what they asked
    api.fail(code=429, retry_after=1)  # what goes wrong from now on
"""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import yaml

from tests.kubernetes_api.objects import Objects, Refusal, is_selected, now
from tests.kubernetes_api.schemas import KINDS, NAMESPACE, POD, Kind

TOKEN = "token-of-jane-0123456789"
_ROUTE = re.compile(
    r"/(?:api/(?P<core>[^/]+)|apis/(?P<group>[^/]+)/(?P<version>[^/]+))"
    r"/namespaces/(?P<namespace>[^/]+)/(?P<plural>[^/]+)(?:/(?P<name>[^/]+))?(?:/(?P<sub>[^/]+))?"
)
_ROUTE_OF_CLUSTER = re.compile(
    r"/(?:api/(?P<core>[^/]+)|apis/(?P<group>[^/]+)/(?P<version>[^/]+))"
    r"/(?P<plural>[^/]+)(?:/(?P<name>[^/]+))?(?P<namespace>)(?P<sub>(?!))?"
)
"""Of kinds in no namespace, or in all of them."""
_REVIEWS = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews"
_GROUP = re.compile(r"/apis/(?P<group>[^/]+)(?:/(?P<version>[^/]+))?")
_METADATA = "as=PartialObjectMetadata"
_LOOK_SECONDS = 0.02


@dataclass(frozen=True)
class Asked:
    """One request, as it came."""

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    body: Any


@dataclass
class Fault:
    """What happens to the next requests that fit, instead of an answer."""

    times: int
    on: str
    code: int | None
    reason: str
    message: str
    retry_after: int | None
    body: bytes | None
    seconds: float

    def fits(self, request: str) -> bool:
        return self.times > 0 and re.search(self.on, request) is not None


@dataclass
class Log:
    """What a container has printed; guarded by the lock of the objects."""

    lines: list[tuple[str, str]] = field(default_factory=list)
    has_ended: bool = False


class KubernetesApi:
    """Its users are known by their tokens; what one may not is in `forbidden`."""

    def __init__(self) -> None:
        self.objects = Objects()
        self.users = {TOKEN: "jane"}
        self.forbidden: set[tuple[str, str]] = set()
        """(verb, resource), as in a role: ("get", "pods/log")."""
        self.kinds: list[Kind] = list(KINDS)
        """Those whose definitions are installed."""
        self.requests: list[Asked] = []
        self.logs: dict[tuple[str, str], Log] = {}
        """(pod, container) -> what it printed."""
        self.previous_logs: dict[tuple[str, str], Log] = {}
        """The same of containers that were started again since."""
        self.expires_by_status = False
        """Whether an expired watch is refused by 410 instead of an event, as some versions do."""
        self.echoes = False
        """Whether faults tell what they were sent, where their texts say {authorization}."""
        self.add_namespace("default")
        self._faults: list[Fault] = []
        self._server: ThreadingHTTPServer | None = None
        self._port = 0
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    # ---------------------------------------------------------------------- what goes wrong

    def fail(
        self,
        *,
        times: int = 1,
        on: str = "",
        code: int | None = None,
        reason: str = "",
        message: str = "",
        retry_after: int | None = None,
        body: bytes | None = None,
        seconds: float = 0.0,
    ) -> None:
        """The next requests whose `METHOD path` holds the pattern `on` are answered so; without a
        code, and with `body` None, the connection is cut. `seconds` pass before."""
        self._faults.append(Fault(times, on, code, reason, message, retry_after, body, seconds))

    def forget_faults(self) -> None:
        self._faults.clear()

    def cut_connections(self) -> None:
        """Ends all open connections in the middle of whatever they carry."""
        with self._lock:
            for connection in self._open:
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def go_away(self) -> None:
        """Nobody listens any more, and open connections end; until `start`."""
        assert self._server is not None
        self._server.shutdown()
        self._server.server_close()
        self._server = None
        self.cut_connections()

    def start(self) -> None:
        """Listens, on the same port as before."""
        handler = type("Handler", (_Handler,), {"api": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", self._port), handler)
        self._server.daemon_threads = True
        self._port = self._server.server_address[1]
        threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        ).start()

    def close(self) -> None:
        if self._server is not None:
            self.go_away()

    # ---------------------------------------------------------------------------- what it has

    def add_namespace(self, name: str) -> None:
        self.objects.namespaces.add(name)
        labels = {"kubernetes.io/metadata.name": name}
        tree = {"metadata": {"name": name, "labels": labels}, "status": {"phase": "Active"}}
        self.objects.create(NAMESPACE, "", tree)

    def write_kubeconfig(self, path: Path, *, token: str = TOKEN, **user: Any) -> Path:
        """A kubeconfig with two contexts: `here`, the current one, and `elsewhere`."""
        entries = {
            "here": self.url,
            "elsewhere": "http://127.0.0.1:9",  # nobody listens there
        }
        tree = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "here",
            "clusters": [{"name": n, "cluster": {"server": url}} for n, url in entries.items()],
            "users": [{"name": "jane", "user": user or {"token": token}}],
            "contexts": [
                {"name": name, "context": {"cluster": name, "user": "jane"}} for name in entries
            ],
        }
        path.write_text(yaml.safe_dump(tree), encoding="utf-8")
        return path

    def print_line(self, pod: str, container: str, text: str, *, moment: str | None = None) -> None:
        """A line of a container's log."""
        with self.objects.changed:
            log = self.logs.setdefault((pod, container), Log())
            log.lines.append((moment or now(), text))
            self.objects.changed.notify_all()

    def end_log(self, pod: str, container: str) -> None:
        with self.objects.changed:
            self.logs.setdefault((pod, container), Log()).has_ended = True
            self.objects.changed.notify_all()

    # ------------------------------------------------------------------------------- answering

    def fault_for(self, request: str) -> Fault | None:
        with self._lock:
            found = next((f for f in self._faults if f.fits(request)), None)
            if found is not None:
                found.times -= 1
            return found

    def kind_of(self, group: str, version: str, plural: str) -> Kind | None:
        wanted = (group, version, plural)
        return next((k for k in self.kinds if (k.group, k.version, k.plural) == wanted), None)

    def opened(self, connection: socket.socket) -> None:
        with self._lock:
            self._open.add(connection)

    def ended(self, connection: socket.socket) -> None:
        with self._lock:
            self._open.discard(connection)


@contextmanager
def running_api() -> Iterator[KubernetesApi]:
    """An API that listens inside the block."""
    api = KubernetesApi()
    api.start()
    try:
        yield api
    finally:
        api.close()


class _Handler(BaseHTTPRequestHandler):
    api: KubernetesApi
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def setup(self) -> None:
        super().setup()
        self.api.opened(self.connection)

    def finish(self) -> None:
        self.api.ended(self.connection)
        with suppress(OSError):
            super().finish()

    def handle(self) -> None:
        with suppress(ConnectionError, ValueError):
            super().handle()

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - its name there
        return None

    def do_GET(self) -> None:
        self._answer()

    do_PATCH = do_POST = do_DELETE = do_GET  # noqa: N815 - their names there

    def _answer(self) -> None:
        parts = urlsplit(self.path)
        query = dict(parse_qsl(parts.query))
        length = int(self.headers.get("Content-Length") or 0)
        raw = self.rfile.read(length) if length else b""
        body = json.loads(raw) if raw else None
        asked = Asked(self.command, parts.path, query, dict(self.headers.items()), body)
        self.api.requests.append(asked)
        fault = self.api.fault_for(f"{self.command} {self.path}")
        try:
            if fault is not None and self._did_fail(fault):
                return
            self._do(asked)
        except Refusal as refusal:
            self._send(refusal.code, json.dumps(refusal.status).encode())

    def _did_fail(self, fault: Fault) -> bool:
        """Whether the fault stands in place of an answer."""
        time.sleep(fault.seconds)
        if fault.code is None and fault.body is None:
            if not fault.seconds:
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)
                return True
            return False  # only late
        code = fault.code or 200
        headers = {} if fault.retry_after is None else {"Retry-After": str(fault.retry_after)}
        sent = str(self.headers.get("Authorization")) if self.api.echoes else "{authorization}"
        message = fault.message.replace("{authorization}", sent)
        status = Refusal(code, fault.reason, message).status
        is_ours = fault.body is None
        body = (fault.body or b"").replace(b"{authorization}", sent.encode())
        self._send(
            code,
            json.dumps(status).encode() if is_ours else body,
            kind="application/json" if is_ours else "text/html",
            headers=headers,
        )
        return True

    def _do(self, asked: Asked) -> None:
        user = self._user()
        if self._did_discover(asked):
            return
        route = _ROUTE.fullmatch(asked.path) or _ROUTE_OF_CLUSTER.fullmatch(asked.path)
        if route is None:
            self._send(404, b"404 page not found\n", kind="text/plain; charset=utf-8")
            return
        kind = self.api.kind_of(
            route["group"] or "", route["core"] or route["version"], route["plural"]
        )
        if kind is None or (route["name"] and kind.is_namespaced and not route["namespace"]):
            self._send(404, b"404 page not found\n", kind="text/plain; charset=utf-8")
            return
        namespace, name, sub = route["namespace"], route["name"], route["sub"]
        is_watch = asked.query.get("watch") in ("true", "1")
        verb = {"PATCH": "patch", "POST": "create", "DELETE": "delete"}.get(
            self.command, "watch" if is_watch else "get" if name else "list"
        )
        self._allow(user, verb, kind, namespace, name, sub)
        if sub == "log" and kind == POD:
            self._log(asked, namespace, name)
        elif is_watch:
            self._watch(asked, kind, namespace)
        elif verb == "list":
            self._list(asked, kind, namespace)
        elif verb == "get":
            tree = self.api.objects.get(kind, namespace, name)
            self._json(200, self._of_form(asked, tree))
        elif verb == "delete":
            given = asked.body or {}
            gone = self.api.objects.delete(
                kind,
                namespace,
                name,
                uid=(given.get("preconditions") or {}).get("uid"),
                propagation=given.get("propagationPolicy", "Background"),
            )
            self._json(200, gone)
        elif verb == "patch":
            self._patch(asked, user, kind, namespace, name)
        else:
            self._json(201, self.api.objects.create(kind, namespace, asked.body))

    def _did_discover(self, asked: Asked) -> bool:
        """What everybody may ask: the version, which kinds there are, one's own rights."""
        if asked.path == "/version":
            self._json(200, {"major": "1", "minor": "33", "gitVersion": "v1.33.1"})
            return True
        if asked.path == _REVIEWS:
            self._json(201, self._review(asked.body))
            return True
        match = _GROUP.fullmatch(asked.path)
        if match is None:
            return False
        group, version = match["group"], match["version"]
        kinds = [k for k in self.api.kinds if k.group == group and version in (None, k.version)]
        if not kinds:
            return False
        if version is None:
            versions = [
                {"groupVersion": f"{group}/{v}", "version": v}
                for v in sorted({k.version for k in kinds}, reverse=True)
            ]
            tree = {"kind": "APIGroup", "apiVersion": "v1", "name": group, "versions": versions}
            self._json(200, tree | {"preferredVersion": versions[0]})
        else:
            resources = [{"name": k.plural, "kind": k.name} for k in kinds]
            self._json(200, {"kind": "APIResourceList", "resources": resources})
        return True

    def _review(self, review: Any) -> Any:
        attributes = review["spec"]["resourceAttributes"]
        sub = attributes.get("subresource")
        resource = attributes["resource"] + (f"/{sub}" if sub else "")
        is_allowed = (attributes["verb"], resource) not in self.api.forbidden
        return review | {"status": {"allowed": is_allowed}}

    @staticmethod
    def _of_form(asked: Asked, tree: Any) -> Any:
        """All of an object, or its metadata alone, as the request wants."""
        if _METADATA not in asked.headers.get("Accept", ""):
            return tree
        form = {"kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1"}
        return form | {"metadata": tree["metadata"]}

    def _user(self) -> str:
        scheme, _, token = self.headers.get("Authorization", "").partition(" ")
        user = self.api.users.get(token.strip())
        if scheme.lower() != "bearer" or user is None:
            raise Refusal(401, "Unauthorized", "Unauthorized")
        return user

    def _allow(
        self, user: str, verb: str, kind: Kind, namespace: str, name: str | None, sub: str | None
    ) -> None:
        resource = f"{kind.plural}/{sub}" if sub else kind.plural
        where = f'in the namespace "{namespace}"' if namespace else "at the cluster scope"
        if (verb, resource) in self.api.forbidden:
            whole = f"{resource}.{kind.group}" if kind.group else resource
            named = f' "{name}"' if name else ""
            raise Refusal(
                403,
                "Forbidden",
                f'{whole}{named} is forbidden: User "{user}" cannot {verb} resource "{resource}" '
                f'in API group "{kind.group}" {where}',
                details={"name": name, "group": kind.group, "kind": kind.plural},
            )

    def _list(self, asked: Asked, kind: Kind, namespace: str) -> None:
        objects = self.api.objects
        with objects.changed:
            items = objects.list(
                kind,
                namespace,
                labels=asked.query.get("labelSelector", ""),
                fields=asked.query.get("fieldSelector", ""),
            )
            version = objects.version
        self._json(
            200,
            {
                "kind": f"{kind.name}List",
                "apiVersion": kind.api_version,
                "metadata": {"resourceVersion": str(version)},
                "items": items,
            },
        )

    def _patch(self, asked: Asked, user: str, kind: Kind, namespace: str, name: str) -> None:
        manager = asked.query.get("fieldManager", "")
        content = self.headers.get("Content-Type", "").partition(";")[0]
        if content == "application/apply-patch+yaml":
            if not manager:
                raise Refusal(422, "Invalid", "fieldManager is required for apply patch requests")
            self._allow(user, "create", kind, namespace, name, None)
            tree, is_new = self.api.objects.apply(
                kind,
                namespace,
                name,
                asked.body,
                manager=manager,
                force=asked.query.get("force") == "true",
                is_dry=asked.query.get("dryRun") == "All",
            )
            self._json(201 if is_new else 200, tree)
        elif content == "application/merge-patch+json":
            tree = self.api.objects.merge_patch(
                kind, namespace, name, asked.body, manager=manager or "unknown"
            )
            self._json(200, tree)
        else:
            raise Refusal(415, "UnsupportedMediaType", f"{content} is not supported here")

    def _watch(self, asked: Asked, kind: Kind, namespace: str) -> None:
        api, objects = self.api, self.api.objects
        seen = int(asked.query.get("resourceVersion") or 0) or objects.version
        fields = asked.query.get("fieldSelector", "")
        labels = asked.query.get("labelSelector", "")
        wants_bookmarks = asked.query.get("allowWatchBookmarks") == "true"
        ends_at = time.monotonic() + float(asked.query.get("timeoutSeconds") or 300)
        if api.expires_by_status:
            list(objects.changes(kind, namespace, after=seen))
        self._begin_chunks("application/json")
        while time.monotonic() < ends_at:
            try:
                changes = list(objects.changes(kind, namespace, after=seen))
            except Refusal as refusal:
                self._event("ERROR", refusal.status)
                break
            for change in changes:
                seen = change.version
                if change.type == "BOOKMARK":
                    if wants_bookmarks:
                        self._event("BOOKMARK", change.tree)
                elif is_selected(change.tree, labels=labels, fields=fields):
                    self._event(change.type, change.tree)
            with objects.changed:
                if objects.version == seen or not changes:
                    objects.changed.wait(_LOOK_SECONDS)
            if self._is_cut():
                return
        self._end_chunks()

    def _log(self, asked: Asked, namespace: str, pod: str) -> None:
        api, objects = self.api, self.api.objects
        tree = objects.get(POD, namespace, pod)
        container = asked.query["container"]
        statuses = (tree.get("status") or {}).get("containerStatuses") or ()
        if not any(s["name"] == container and "waiting" not in s["state"] for s in statuses):
            raise Refusal(
                400,
                "BadRequest",
                f'container "{container}" in pod "{pod}" is waiting to start: ContainerCreating',
            )
        follows, since = asked.query.get("follow") == "true", asked.query.get("sinceTime", "")
        is_stamped = asked.query.get("timestamps") == "true"
        if asked.query.get("previous") == "true":
            log = api.previous_logs.get((pod, container))
            if log is None:
                raise Refusal(
                    400,
                    "BadRequest",
                    f'previous terminated container "{container}" in pod "{pod}" not found',
                )
        self._begin_chunks("text/plain")
        told = 0
        if (tail := asked.query.get("tailLines")) is not None:
            with objects.changed:
                told = max(0, len(self._lines_of(asked, pod, container).lines) - int(tail))
        while True:
            with objects.changed:
                log = self._lines_of(asked, pod, container)
                is_gone = not objects.list(POD, namespace, fields=f"metadata.name={pod}")
                new, has_ended = log.lines[told:], log.has_ended or is_gone
            told += len(new)
            for moment, text in new:
                if not since or moment[:19] >= since[:19]:
                    self._chunk(
                        f"{moment} {text}\n".encode() if is_stamped else f"{text}\n".encode()
                    )
            if has_ended or not follows:
                break
            with objects.changed:
                if len(log.lines) == told and not log.has_ended:
                    objects.changed.wait(_LOOK_SECONDS)
            if self._is_cut():
                return
        self._end_chunks()

    def _lines_of(self, asked: Asked, pod: str, container: str) -> Log:
        if asked.query.get("previous") == "true":
            return self.api.previous_logs[pod, container]
        return self.api.logs.setdefault((pod, container), Log())

    # -------------------------------------------------------------------------------- writing

    def _json(self, code: int, tree: Any) -> None:
        self._send(code, json.dumps(tree).encode())

    def _send(
        self,
        code: int,
        body: bytes,
        *,
        kind: str = "application/json",
        headers: dict[str, str] | None = None,
    ) -> None:
        self.send_response(code)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _begin_chunks(self, kind: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self.wfile.flush()

    def _event(self, type_: str, tree: Any) -> None:
        self._chunk(json.dumps({"type": type_, "object": tree}).encode() + b"\n")

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")

    def _end_chunks(self) -> None:
        self.wfile.write(b"0\r\n\r\n")

    def _is_cut(self) -> bool:
        """Whether the client has gone, or the connection was cut."""
        try:
            self.connection.setblocking(False)
            return self.connection.recv(1, socket.MSG_PEEK) == b""
        except BlockingIOError:
            return False
        except OSError:
            return True
        finally:
            with suppress(OSError):
                self.connection.setblocking(True)
