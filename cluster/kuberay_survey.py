"""What a Kubernetes cluster says before a run is submitted to it: many questions at once, none of
which changes anything.

    survey(connection, ...)    -> Survey: the answers, by name

Three rounds, as later questions follow from earlier answers: what the API knows, then the namespace
and all that the job names, then what stands behind its queue. Of secrets and config maps only the
metadata are asked for, so that no value is sent here.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

from cluster.kuberay import FIELD_MANAGER
from cluster.kuberay_access import Connection
from cluster.kuberay_config import MAX_CONNECTIONS
from cluster.kuberay_errors import Asked, KubernetesError
from cluster.placement import Manifest
from jobs.cluster_spec import Claim, EphemeralVolume, KubeRayCluster
from jobs.errors import EnvironmentFault, Problem

MOST_NODES = 100
"""Nodes that are looked at."""

RAY, KUEUE = "ray.io", "kueue.x-k8s.io"
_METADATA_ONLY = "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1"
_OPERATORS = {RAY: "kuberay-operator,kuberay", KUEUE: "kueue"}
"""Values of the label app.kubernetes.io/name of the Deployments of each, by helm or kustomize."""


@dataclass(frozen=True)
class Right:
    """A verb on a resource in the run's namespace."""

    verb: str
    resource: str
    """`rayjobs`, `pods/log`."""
    group: str
    lost: str | None = None
    """What is lost without it; None: without it no run is submitted or stopped from here."""

    @property
    def whole_resource(self) -> str:
        return f"{self.resource}.{self.group}" if self.group else self.resource


REQUIRED_RIGHTS = tuple(
    Right(verb, "rayjobs", RAY) for verb in ("get", "list", "watch", "create", "patch", "delete")
)
_OPTIONAL_RIGHTS = (
    Right("list", "pods", "", "shoal logs --pods finds no pod"),
    Right("get", "pods/log", "", "shoal logs --pods prints nothing"),
    Right("list", "events", "", "why a pod waits or has failed is not told"),
    Right("get", "rayclusters", RAY, "which pods are ready is not told"),
    Right("create", "poddisruptionbudgets", "policy", "nodes may be drained under the run"),
    Right("patch", "poddisruptionbudgets", "policy", "nodes may be drained under the run"),
)
_QUEUE_RIGHT = Right("list", "workloads", KUEUE, "why its queue does not admit a run is not told")


def rights_of(cluster: KubeRayCluster) -> tuple[Right, ...]:
    """Those that a run's commands need, then those that make them tell more."""
    of_queue = (_QUEUE_RIGHT,) if cluster.queue is not None else ()
    return (*REQUIRED_RIGHTS, *_OPTIONAL_RIGHTS, *of_queue)


@dataclass(frozen=True)
class Question:
    """One request."""

    verb: str
    resource: str
    """Plural; empty for a path of the API itself."""
    group: str = ""
    version: str = "v1"
    namespace: str = ""
    name: str | None = None
    query: Mapping[str, str] = field(default_factory=dict)
    body: Mapping[str, Any] | None = None
    own_path: str | None = None
    metadata_only: bool = False

    @property
    def path(self) -> str:
        if self.own_path is not None:
            return self.own_path
        root = f"/apis/{self.group}/{self.version}" if self.group else f"/api/{self.version}"
        namespace = f"/namespaces/{quote(self.namespace)}" if self.namespace else ""
        name = f"/{quote(self.name)}" if self.name else ""
        return f"{root}{namespace}/{self.resource}{name}"


@dataclass(frozen=True)
class Answer:
    """What came of a question: one of both."""

    tree: Mapping[str, Any] | None
    error: KubernetesError | None = None

    @property
    def is_missing(self) -> bool:
        return self.error is not None and self.error.code == 404

    @property
    def why(self) -> str:
        """Why there is no answer."""
        return "there was no time to ask" if self.error is None else str(self.error)

    @property
    def items(self) -> list[dict[str, Any]]:
        return list((self.tree or {}).get("items") or ())


@dataclass(frozen=True)
class Survey:
    """The answers of a cluster."""

    server: str
    answers: Mapping[str, Answer]

    def __getitem__(self, name: str) -> Answer:
        return self.answers.get(name, Answer(None))

    @property
    def unreachable(self) -> KubernetesError | None:
        """Why nothing can be asked at all."""
        error = self["version"].error
        return error if error is not None and error.code in (None, 401) else None

    @property
    def has_kueue(self) -> bool | None:
        """None: not known."""
        found = self[KUEUE]
        return False if found.is_missing else None if found.tree is None else True

    def is_allowed(self, right: Right) -> bool | None:
        """None: not known."""
        found = self[_name_of(right)].tree
        return None if found is None else bool((found.get("status") or {}).get("allowed"))

    def operators(self, group: str) -> list[Operator]:
        """Of KubeRay, or of Kueue; none where they are not seen."""
        return [_operator(tree) for tree in self[f"operator of {group}"].items]


@dataclass(frozen=True)
class Operator:
    """A Deployment of an operator."""

    name: str
    namespace: str
    version: str | None
    """`1.7.0`, from the tag of its image; None where that is no version."""
    is_available: bool
    watched: tuple[str, ...]
    """Namespaces that it is restricted to; none: it watches all."""


def _operator(tree: Mapping[str, Any]) -> Operator:
    containers = tree["spec"]["template"]["spec"]["containers"]
    words = " ".join(
        word
        for container in containers
        for word in (*(container.get("command") or ()), *(container.get("args") or ()))
    )
    watched = re.search(r"--?watch-namespace[= ]([-a-z0-9.,]+)", words)
    versions = [_version_in(str(container.get("image", ""))) for container in containers]
    return Operator(
        name=str(tree["metadata"]["name"]),
        namespace=str(tree["metadata"]["namespace"]),
        version=next((version for version in versions if version), None),
        is_available=bool((tree.get("status") or {}).get("availableReplicas")),
        watched=tuple(filter(None, watched[1].split(","))) if watched else (),
    )


def _version_in(image: str) -> str | None:
    tag = image.partition("@")[0].rpartition("/")[2].partition(":")[2].removeprefix("v")
    return tag if tag[:1].isdigit() else None


def survey(
    connection: Connection,
    cluster: KubeRayCluster,
    *,
    rayjob: Manifest,
    budgets: Sequence[Manifest],
    seconds: float,
) -> Survey:
    """Asks all that concerns a run. Never raises for what the cluster answers, or does not.

    `rayjob` is the run's manifest, with a name that no RayJob has: it is applied as by a submit,
    but as a dry run. What has not answered after `seconds` counts as not answered.
    """
    deadline = time.monotonic() + seconds
    pool = ThreadPoolExecutor(MAX_CONNECTIONS, thread_name_prefix="shoal-survey")
    answers: dict[str, Answer] = {}
    try:
        for questions in (_of_api, _of_namespace, _of_cluster_queue):
            so_far = Survey(connection.server, dict(answers))
            if so_far.unreachable is not None or time.monotonic() > deadline:
                break
            asked = questions(cluster, so_far, rayjob=rayjob, budgets=budgets)
            answers |= _ask(connection, asked, pool, deadline=deadline, seconds=seconds)
    finally:
        # What still waits ends by itself: a request gives up as soon as the survey does.
        pool.shutdown(wait=False, cancel_futures=True)
    return Survey(connection.server, answers)


def _of_api(
    cluster: KubeRayCluster, so_far: Survey, *, rayjob: Manifest, budgets: Sequence[Manifest]
) -> dict[str, Question]:
    """Whether there is an API, and which kinds it knows; everybody may ask that."""
    found = {
        "version": Question("get", "", own_path="/version"),
        RAY: Question("get", "rayjobs", RAY, own_path=f"/apis/{RAY}/v1"),
    }
    if cluster.queue is not None:
        found[KUEUE] = Question("get", "", KUEUE, own_path=f"/apis/{KUEUE}")
    return found


def _of_namespace(
    cluster: KubeRayCluster, so_far: Survey, *, rayjob: Manifest, budgets: Sequence[Manifest]
) -> dict[str, Question]:
    namespace = cluster.namespace
    found = {"namespace": Question("get", "namespaces", name=namespace)}
    found |= {_name_of(right): _review(right, namespace) for right in rights_of(cluster)}
    found |= {
        f"dry run of {m['metadata']['name']}": _dry_run(m, namespace) for m in (rayjob, *budgets)
    }
    found["quotas"] = Question("list", "resourcequotas", namespace=namespace)
    found["limit ranges"] = Question("list", "limitranges", namespace=namespace)
    found["nodes"] = Question("list", "nodes", query=_node_query(rayjob))
    found |= _named(cluster)
    groups = [RAY] if cluster.queue is None else [RAY, KUEUE]
    for group in groups:
        selector = f"app.kubernetes.io/name in ({_OPERATORS[group]})"
        found[f"operator of {group}"] = Question(
            "list", "deployments", "apps", query={"labelSelector": selector}
        )
    version = _kueue_version(so_far)
    if cluster.queue is not None and version is not None:
        found["queues"] = Question("list", "localqueues", KUEUE, version, namespace)
        if cluster.queue_priority is not None:
            found["queue priority"] = Question(
                "get", "workloadpriorityclasses", KUEUE, version, name=cluster.queue_priority
            )
    return found


def _named(cluster: KubeRayCluster) -> dict[str, Question]:
    """Objects that the job names, by `KIND NAME`."""
    namespace = cluster.namespace
    secrets = [*cluster.image_pull_secrets, *cluster.env_from_secrets]
    secrets += [held.secret for held in cluster.env_secrets.values()]
    found = {
        f"secret {name}": Question(
            "get", "secrets", namespace=namespace, name=name, metadata_only=True
        )
        for name in secrets
    }
    for name in cluster.env_from_config_maps:
        found[f"config map {name}"] = Question(
            "get", "configmaps", namespace=namespace, name=name, metadata_only=True
        )
    if (account := cluster.service_account) is not None:
        found["service account"] = Question(
            "get", "serviceaccounts", namespace=namespace, name=account
        )
    if (priority := cluster.priority_class) is not None:
        found["priority class"] = Question(
            "get", "priorityclasses", "scheduling.k8s.io", name=priority
        )
    cache = cluster.cache
    if isinstance(cache, Claim):
        found["claim"] = Question(
            "get", "persistentvolumeclaims", namespace=namespace, name=cache.name
        )
    elif isinstance(cache, EphemeralVolume) and cache.storage_class is not None:
        found["storage class"] = Question(
            "get", "storageclasses", "storage.k8s.io", name=cache.storage_class
        )
    return found


def _of_cluster_queue(
    cluster: KubeRayCluster, so_far: Survey, *, rayjob: Manifest, budgets: Sequence[Manifest]
) -> dict[str, Question]:
    version = _kueue_version(so_far)
    queue = local_queue(so_far, cluster)
    if version is None or queue is None:
        return {}
    name = str(queue["spec"]["clusterQueue"])
    return {"cluster queue": Question("get", "clusterqueues", KUEUE, version, name=name)}


def local_queue(found: Survey, cluster: KubeRayCluster) -> dict[str, Any] | None:
    """The job's queue, where it was found."""
    return next(
        (item for item in found["queues"].items if item["metadata"]["name"] == cluster.queue), None
    )


def _kueue_version(so_far: Survey) -> str | None:
    tree = so_far[KUEUE].tree or {}
    preferred = tree.get("preferredVersion") or {}
    return str(preferred["version"]) if "version" in preferred else None


def _name_of(right: Right) -> str:
    return f"{right.verb} {right.whole_resource}"


def _review(right: Right, namespace: str) -> Question:
    resource, _, subresource = right.resource.partition("/")
    attributes = {
        "namespace": namespace,
        "verb": right.verb,
        "group": right.group,
        "resource": resource,
        **({"subresource": subresource} if subresource else {}),
    }
    return Question(
        "create",
        "selfsubjectaccessreviews",
        "authorization.k8s.io",
        body={
            "apiVersion": "authorization.k8s.io/v1",
            "kind": "SelfSubjectAccessReview",
            "spec": {"resourceAttributes": attributes},
        },
    )


def _dry_run(manifest: Manifest, namespace: str) -> Question:
    """As `KubeRay.apply` would, without a trace."""
    group, _, version = manifest["apiVersion"].partition("/")
    return Question(
        "patch",
        f"{manifest['kind'].lower()}s",
        group,
        version,
        namespace,
        manifest["metadata"]["name"],
        query={"fieldManager": FIELD_MANAGER, "fieldValidation": "Strict", "dryRun": "All"},
        body=manifest,
    )


def _node_query(rayjob: Manifest) -> dict[str, str]:
    """Nodes with the labels that all workers' pods ask for by their selectors."""
    groups = rayjob["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    selectors = [g["template"]["spec"].get("nodeSelector") or {} for g in groups]
    common = set.intersection(*(set(selector.items()) for selector in selectors))
    labels = ",".join(f"{label}={value}" for label, value in sorted(common))
    return {"limit": str(MOST_NODES)} | ({"labelSelector": labels} if labels else {})


def _ask(
    connection: Connection,
    questions: Mapping[str, Question],
    pool: ThreadPoolExecutor,
    *,
    deadline: float,
    seconds: float,
) -> dict[str, Answer]:
    waiting: dict[str, Future[Answer]] = {
        name: pool.submit(_answer, connection, question) for name, question in questions.items()
    }
    wait(waiting.values(), timeout=max(0.0, deadline - time.monotonic()))
    late = KubernetesError(
        Problem(f"the Kubernetes API at {connection.server} did not answer within {seconds:g} s")
    )
    return {
        name: future.result() if future.done() else Answer(None, late)
        for name, future in waiting.items()
    }


def _answer(connection: Connection, question: Question) -> Answer:
    asked = Asked(
        question.verb,
        question.resource,
        question.group,
        question.namespace,
        question.name,
        connection.server,
    )
    method = {"create": "POST", "patch": "PATCH"}.get(question.verb, "GET")
    is_applied = method == "PATCH"
    try:
        tree = connection.request(
            method,
            question.path,
            asked,
            query=question.query,
            body=question.body,
            content_type="application/apply-patch+yaml" if is_applied else "application/json",
            accept=_METADATA_ONLY if question.metadata_only else "application/json",
        )
    except KubernetesError as error:
        return Answer(None, error)
    except EnvironmentFault as error:  # credentials that cannot be renewed
        return Answer(None, KubernetesError(*error.problems[:1]))
    return Answer(tree)
