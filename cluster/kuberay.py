"""Runs as RayJobs of a Kubernetes cluster: applied, read, watched, deleted, and what pods print.

    KubeRay.apply         makes a run's RayJob; one that is there already stays as it is
    KubeRay.find          the RayJob of a run, wherever it was submitted
    KubeRay.watch         the RayJob at each change, through lost connections and expired versions
    KubeRay.delete, wait_until_gone
    KubeRay.pods, events, ray_cluster, workload       what explains why a run does not get on
    KubeRay.log_lines     what a container prints, as it does

Rights that a run does not need (pods, their logs, events, Kueue's workloads) may be missing: what
is lost is then told once in `KubeRay.missing`, and nothing is found.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import quote

from cluster.kuberay_access import ANSWER_SECONDS, PATIENCE_SECONDS, Connection, Tell, connect, log
from cluster.kuberay_errors import Asked, KubernetesError
from cluster.rayjob_status import SeenRayJob, seen_in
from jobs.errors import Problem, SpecError

FIELD_MANAGER = "shoal"
_RAY = ("ray.io", "v1")
_CORE = ("", "v1")
_POLICY = ("policy", "v1")
_KUEUE = ("kueue.x-k8s.io", "v1beta1")
_WATCH_SECONDS = 60
"""How long one watch lasts at the API, which ends it then; the next goes on from the same version.
Where nothing has come for somewhat longer, the connection is dead."""
_SILENT_SECONDS = 75.0
_LOG_SILENT_SECONDS = 3600.0
_FIRST_PAUSE_SECONDS = 0.1
_LONGEST_PAUSE_SECONDS = 2.0
_TELLING_REASONS = (
    "NotTriggerScaleUp",
    "TriggeredScaleUp",
    "Preempted",
    "TaintManagerEviction",
)
"""Of events that are no warnings, and tell what becomes of pods."""
_GONE_SECONDS = 300.0
"""More than the pods of a run have to end."""

T = TypeVar("T")


@dataclass(frozen=True)
class Applied:
    """What `apply` found, or made."""

    seen: SeenRayJob
    is_new: bool
    """Whether the RayJob was not there before."""


@dataclass(frozen=True)
class Pod:
    """A pod of a run."""

    name: str
    role: str
    """`submitter`, `head` or `worker`."""
    phase: str
    container: str
    """The one that Ray, or the submitter, runs in."""
    has_started: bool
    """Whether that container runs or has run, so that it has a log."""
    tree: Mapping[str, Any]
    """As the API told it."""


class KubeRay:
    """The RayJobs of one namespace of a cluster."""

    def __init__(self, connection: Connection, namespace: str) -> None:
        self._connection = connection
        self.namespace = namespace
        self.missing: list[str] = []
        """What could not be looked at for want of rights, with what is lost, each once."""

    @classmethod
    def of(
        cls,
        namespace: str,
        *,
        context: str | None,
        patience_seconds: float = PATIENCE_SECONDS,
        answer_seconds: float = ANSWER_SECONDS,
        tell: Tell = log.warning,
    ) -> KubeRay:
        """As `cluster.kuberay_access.connect`."""
        connection = connect(
            context, patience_seconds=patience_seconds, answer_seconds=answer_seconds, tell=tell
        )
        return cls(connection, namespace)

    @property
    def server(self) -> str:
        return self._connection.server

    # -------------------------------------------------------------------------------- RayJobs

    def apply(self, manifest: Mapping[str, Any]) -> Applied:
        """Makes the RayJob of a run, with strict validation; one that is there is left alone.

        So a run has one RayJob, however often this is called, by whomever. Raises SpecError where
        another run has its name, KubernetesError where the API refuses.
        """
        metadata = manifest["metadata"]
        name, run_uri = str(metadata["name"]), str(metadata["annotations"]["shoal/run"])
        found = self.get(name)
        if found is not None and found.run_uri == run_uri and found.is_being_deleted:
            self.wait_until_gone(found)
            found = None
        if found is None:
            # Whoever applies the same at this moment makes the same.
            made = self._ray(
                "PATCH",
                "patch",
                name,
                query={"fieldManager": FIELD_MANAGER, "fieldValidation": "Strict"},
                body=manifest,
                content_type="application/apply-patch+yaml",
            )
            return Applied(seen_in(made), is_new=True)
        if found.run_uri != run_uri:
            raise SpecError(
                Problem(
                    f"the namespace {self.namespace} has a RayJob {name} already, of "
                    f"{found.run_uri or 'somebody else'}, so {run_uri} cannot have this name there",
                    "submit it with another --run-id, or in another cluster.namespace",
                )
            )
        return Applied(found, is_new=False)

    def get(self, name: str) -> SeenRayJob | None:
        """The RayJob of that name; None if there is none."""
        try:
            return seen_in(self._ray("GET", "get", name))
        except KubernetesError as error:
            if error.is_missing:
                return None
            raise

    def find(self, run_id: str, run_uri: str) -> SeenRayJob | None:
        """The RayJob of a run: of its name, or one that was applied by another name and bears its
        URI. None if there is none."""
        named = self.get(run_id)
        if named is not None and named.run_uri == run_uri:
            return named
        selector = f"app.kubernetes.io/instance={run_id}"
        return next((j for j in self.rayjobs(selector) if j.run_uri == run_uri), None)

    def rayjobs(self, label_selector: str | None = None) -> list[SeenRayJob]:
        """All RayJobs of the namespace, or those with some labels."""
        query = {"labelSelector": label_selector} if label_selector else None
        listed = self._ray("GET", "list", None, query=query)
        return [seen_in(item) for item in listed.get("items") or ()]

    def watch(self, name: str) -> Iterator[SeenRayJob | None]:
        """The RayJob as it is, and at each change; None while there is none. Never ends by itself.

        Lost connections are resumed from the version that was seen last, which bookmarks move on;
        where that has expired, what is there now is read again. Raises KubernetesError for what a
        repetition would not mend, or where the API stays away.
        """
        version: str | None = None
        while True:
            if version is None:
                query = {"fieldSelector": f"metadata.name={name}"}
                listed = self._ray("GET", "list", None, query=query)
                version = str(listed["metadata"]["resourceVersion"])
                items = listed.get("items") or []
                yield seen_in(items[0]) if items else None
            began_at = time.monotonic()
            try:
                for kind, tree in self._changes(name, version):
                    if kind != "BOOKMARK":
                        yield None if kind == "DELETED" else seen_in(tree)
                    version = str(tree["metadata"]["resourceVersion"])
            except KubernetesError as error:
                if error.reason == "Expired":
                    version = None
                elif not error.is_transient:
                    raise
            if time.monotonic() - began_at < _LONGEST_PAUSE_SECONDS:
                # An API, or a proxy before it, that ends each watch at once must not be swamped.
                time.sleep(_FIRST_PAUSE_SECONDS)

    def _changes(self, name: str, version: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """(kind, object) of each event of one watch."""
        asked = self._asked("watch", "rayjobs", _RAY[0], name)
        lines = self._connection.lines(
            self._path(_RAY, "rayjobs"),
            asked,
            query={
                "watch": "true",
                "fieldSelector": f"metadata.name={name}",
                "resourceVersion": version,
                "allowWatchBookmarks": "true",
                "timeoutSeconds": str(_WATCH_SECONDS),
            },
            read_seconds=_SILENT_SECONDS,
        )
        for line in lines:
            event = json.loads(line)
            tree: dict[str, Any] = event["object"]
            if event["type"] == "ERROR":
                code = int(tree.get("code") or 500)
                raise KubernetesError(
                    Problem(f"the watch of {asked.what} has ended: {tree.get('message')}"),
                    code=code,
                    reason="Expired" if code == 410 else str(tree.get("reason") or ""),
                    is_transient=code == 429 or code >= 500,
                )
            yield event["type"], tree

    def apply_budget(self, manifest: Mapping[str, Any], *, owner: SeenRayJob) -> None:
        """Makes a PodDisruptionBudget that goes with a RayJob; not where that is not allowed."""
        owned = {
            "apiVersion": "ray.io/v1",
            "kind": "RayJob",
            "name": owner.name,
            "uid": owner.uid,
        }
        name = str(manifest["metadata"]["name"])
        body = {**manifest, "metadata": {**manifest["metadata"], "ownerReferences": [owned]}}
        try:
            self._connection.request(
                "PATCH",
                f"{self._path(_POLICY, 'poddisruptionbudgets')}/{quote(name)}",
                self._asked("patch", "poddisruptionbudgets", _POLICY[0], name),
                query={"fieldManager": FIELD_MANAGER, "fieldValidation": "Strict"},
                body=body,
                content_type="application/apply-patch+yaml",
            )
        except KubernetesError as error:
            if not error.is_forbidden:
                raise
            self._connection.tell(
                f"without the right to patch and create poddisruptionbudgets in the namespace "
                f"{self.namespace} nodes may be drained under the run's {name.rpartition('-')[2]}"
            )

    def end_retries(self, name: str) -> None:
        """Keeps the operator from starting the run again once its driver ends. Nothing where there
        is no such RayJob."""
        self._where_it_is(
            lambda: self._ray(
                "PATCH",
                "patch",
                name,
                query={"fieldManager": FIELD_MANAGER, "fieldValidation": "Strict"},
                body={"spec": {"backoffLimit": 0}},
                content_type="application/merge-patch+json",
            )
        )

    def delete(self, seen: SeenRayJob) -> None:
        """Deletes this RayJob, and all that it has made with it. Nothing where it is gone, or
        another one has its name now."""
        body = {
            "kind": "DeleteOptions",
            "apiVersion": "v1",
            # The RayJob is gone once its pods are.
            "propagationPolicy": "Foreground",
            "preconditions": {"uid": seen.uid},
        }
        try:
            self._where_it_is(lambda: self._ray("DELETE", "delete", seen.name, body=body))
        except KubernetesError as error:
            if error.code != 409:
                raise

    def wait_until_gone(self, seen: SeenRayJob, *, seconds: float = _GONE_SECONDS) -> None:
        """Returns once this RayJob is gone; KubernetesError where it is not after `seconds`."""
        deadline = time.monotonic() + seconds
        pause = _FIRST_PAUSE_SECONDS
        while (now := self.get(seen.name)) is not None and now.uid == seen.uid:
            if time.monotonic() > deadline:
                raise KubernetesError(
                    Problem(
                        f"the RayJob {seen.name} in the namespace {self.namespace} was deleted "
                        f"{seconds:.0f} s ago, and is still there",
                        f"see what holds it: kubectl get rayjobs.ray.io {seen.name} --namespace "
                        f"{self.namespace} --output yaml; whether KubeRay runs; then try again",
                    )
                )
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)

    # ------------------------------------------------------------- what explains a run, if allowed

    def pods(self, seen: SeenRayJob) -> list[Pod]:
        """The run's pods that are there: submitter, head, workers."""
        selectors = [f"job-name={seen.name}"]
        if seen.ray_cluster:
            selectors.append(f"ray.io/cluster={seen.ray_cluster}")
        found: list[Pod] = []
        for selector in selectors:
            query = {"labelSelector": selector}
            items = self._optional("pods", _CORE, query, "what its pods print and do")
            found += [_pod(item) for item in items]
        return sorted(found, key=lambda pod: (_ROLES.index(pod.role), pod.name))

    def events(self, seen: SeenRayJob) -> list[dict[str, Any]]:
        """Events about the run's RayJob, Ray cluster, submitter and pods, gone ones included, as
        the API has them, in no order: warnings, and what schedulers and autoscalers say."""
        own = re.compile(
            rf"{re.escape(seen.name)}(-[a-z0-9]{{5}})?"
            + (rf"|{re.escape(seen.ray_cluster)}(-.+)?" if seen.ray_cluster else "")
        )
        found: dict[str, dict[str, Any]] = {}
        # All of a namespace may be thousands: the API filters by one field at a time.
        for selector in ("type=Warning", *(f"reason={reason}" for reason in _TELLING_REASONS)):
            query = {"fieldSelector": selector}
            for event in self._optional("events", _CORE, query, "why its pods wait or fail"):
                about = event.get("involvedObject") or {}
                is_older = about.get("kind") == "RayJob" and about.get("uid") not in (
                    None,
                    seen.uid,
                )
                if own.fullmatch(str(about.get("name", ""))) and not is_older:
                    found[str((event.get("metadata") or {}).get("name"))] = event
        return list(found.values())

    def ray_cluster(self, seen: SeenRayJob) -> dict[str, Any] | None:
        """The Ray cluster that the operator has made for the run, as the API has it."""
        if not seen.ray_cluster:
            return None
        asked = self._asked("get", "rayclusters", _RAY[0], seen.ray_cluster)
        path = f"{self._path(_RAY, 'rayclusters')}/{quote(seen.ray_cluster)}"

        def read() -> dict[str, Any] | None:
            return self._where_it_is(lambda: self._connection.request("GET", path, asked))

        return self._allowed(read, asked, "which of its pods are ready")

    def workload(self, seen: SeenRayJob) -> dict[str, Any] | None:
        """What Kueue has made of the run, as the API has it; None without Kueue."""
        items = self._optional("workloads", _KUEUE, {}, "why its queue does not admit it")
        for item in items:
            owners = (item.get("metadata") or {}).get("ownerReferences") or ()
            if any(owner.get("uid") == seen.uid for owner in owners):
                return item
        return None

    def log_lines(
        self, pod: Pod, *, follow: bool, since: str | None = None
    ) -> Iterator[tuple[str, str]]:
        """(time, line) of what the pod's container prints, times in RFC 3339; with `follow` until
        it ends. `since` is such a time, from which on lines are read.

        Where the connection breaks, it goes on behind the last line. Ends at once where the log may
        not be read, or is gone.
        """
        asked = self._asked("get", "pods/log", "", pod.name)
        path = f"{self._path(_CORE, 'pods')}/{quote(pod.name)}/log"
        last, told_at_last = since, 0
        while True:
            query = {"container": pod.container, "timestamps": "true"}
            query |= {"follow": "true"} if follow else {}
            query |= {"sinceTime": _second(last)} if last else {}
            # The second of the last line is read again as a whole: what was told of it is skipped.
            skip = told_at_last
            try:
                for raw in self._connection.lines(
                    path, asked, query=query, read_seconds=_LOG_SILENT_SECONDS
                ):
                    moment, _, text = raw.decode("utf-8", errors="replace").partition(" ")
                    is_again = last is not None and _second(moment) == _second(last)
                    if is_again and skip:
                        skip -= 1
                        continue
                    told_at_last = told_at_last + 1 if is_again else 1
                    last = moment
                    yield moment, text
                return
            except KubernetesError as error:
                if error.is_forbidden:
                    self._miss(asked, "what its pods print")
                    return
                if error.code in (400, 404):  # the pod is gone, or its container has not begun
                    return
                if not error.is_transient or not follow:
                    raise

    def last_lines(self, pod: Pod, count: int, *, before_restart: bool = False) -> list[str]:
        """What the pod's container printed last; with `before_restart`, the one before it. Nothing
        where the log may not be read, or is gone."""
        asked = self._asked("get", "pods/log", "", pod.name)
        path = f"{self._path(_CORE, 'pods')}/{quote(pod.name)}/log"
        query = {"container": pod.container, "tailLines": str(count)}
        query |= {"previous": "true"} if before_restart else {}
        lines = self._connection.lines(path, asked, query=query, read_seconds=_SILENT_SECONDS)
        try:
            return [raw.decode("utf-8", errors="replace") for raw in lines]
        except KubernetesError as error:
            if error.is_forbidden:
                self._miss(asked, "what its pods print")
            elif error.code not in (400, 404):
                raise
            return []

    # ------------------------------------------------------------------------------- requests

    def _ray(
        self,
        method: str,
        verb: str,
        name: str | None,
        *,
        query: Mapping[str, str] | None = None,
        body: Mapping[str, Any] | None = None,
        content_type: str = "application/json",
    ) -> dict[str, Any]:
        path = self._path(_RAY, "rayjobs") + (f"/{quote(name)}" if name else "")
        asked = self._asked(verb, "rayjobs", _RAY[0], name)
        return self._connection.request(
            method, path, asked, query=query, body=body, content_type=content_type
        )

    def _optional(
        self, resource: str, kind: tuple[str, str], query: Mapping[str, str], lost: str
    ) -> list[dict[str, Any]]:
        """Items of a list; none where they may not be read, or there is no such kind."""
        asked = self._asked("list", resource, kind[0], None)

        def read() -> list[dict[str, Any]]:
            path = self._path(kind, resource)
            try:
                listed = self._connection.request("GET", path, asked, query=query)
            except KubernetesError as error:
                if error.code == 404:
                    return []
                raise
            return list(listed.get("items") or ())

        return self._allowed(read, asked, lost) or []

    def _allowed(self, read: Callable[[], T], asked: Asked, lost: str) -> T | None:
        try:
            return read()
        except KubernetesError as error:
            if not error.is_forbidden:
                raise
            self._miss(asked, lost)
            return None

    def _miss(self, asked: Asked, lost: str) -> None:
        sentence = (
            f"without the right to {asked.verb} {asked.resource} in the namespace "
            f"{self.namespace} it cannot be told {lost}"
        )
        if sentence not in self.missing:
            self.missing.append(sentence)

    @staticmethod
    def _where_it_is(request: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
        """What the API answers; None where the object is not there."""
        try:
            return request()
        except KubernetesError as error:
            if error.is_missing:
                return None
            raise

    def _asked(self, verb: str, resource: str, group: str, name: str | None) -> Asked:
        return Asked(verb, resource, group, self.namespace, name, self.server)

    def _path(self, kind: tuple[str, str], resource: str) -> str:
        group, version = kind
        root = f"/apis/{group}/{version}" if group else f"/api/{version}"
        return f"{root}/namespaces/{quote(self.namespace)}/{resource}"


def _second(moment: str) -> str:
    """A time of RFC 3339 without the part of a second, as the API takes it."""
    return re.sub(r"\.\d+", "", moment)


_ROLES = ("submitter", "head", "worker")


def _pod(tree: dict[str, Any]) -> Pod:
    metadata, status = tree.get("metadata") or {}, tree.get("status") or {}
    role = str((metadata.get("labels") or {}).get("ray.io/node-type", "submitter"))
    containers = (tree.get("spec") or {}).get("containers") or [{"name": ""}]
    container = str(containers[0]["name"])
    states = {s.get("name"): s.get("state") or {} for s in status.get("containerStatuses") or ()}
    return Pod(
        name=str(metadata.get("name", "")),
        role=role if role in _ROLES else "worker",
        phase=str(status.get("phase", "")),
        container=container,
        has_started=any(key in states.get(container, {}) for key in ("running", "terminated")),
        tree=tree,
    )
