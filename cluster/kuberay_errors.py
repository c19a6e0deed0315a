"""What the Kubernetes API refuses, as errors that say what to type. Pure.

    KubernetesError      what the API answered, or that it did not
    refusal              an answer of the API -> KubernetesError
    unreachable          a connection that failed -> KubernetesError

Texts come from the API's own Status objects; bodies of anything else between here and there, such
as a proxy's pages, are never shown.
"""

from __future__ import annotations

import json
import re
import socket
import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import urllib3

from jobs.errors import ClusterError, Problem

KUBERAY_VERSION = "1.7.0"
"""The version of KubeRay that the manifests are made for."""
_INSTALL = (
    "ask an administrator to install KubeRay: helm repo add kuberay "
    "https://ray-project.github.io/kuberay-helm/ && helm install kuberay-operator "
    f"kuberay/kuberay-operator --version {KUBERAY_VERSION}"
)
_NEWER_CRDS = (
    "ask an administrator to bring KubeRay's definitions up to date, which helm does not do by "
    "itself: kubectl apply --server-side -k "
    f"'github.com/ray-project/kuberay/ray-operator/config/crd?ref=v{KUBERAY_VERSION}'"
)
_UNDECLARED = re.compile(r"(\.[\w.\-\[\]\"=/]*): field not declared in schema")
_FORBIDDEN = re.compile(
    r'cannot (?P<verb>\w+) resource "(?P<resource>[^"]+)" in API group "(?P<group>[^"]*)"'
)
_TRANSIENT = (429, 500, 502, 503, 504)
_NEVER_REACHED = (ssl.SSLError, urllib3.exceptions.SSLError, socket.gaierror)


class KubernetesError(ClusterError):
    """The Kubernetes API refuses something, or cannot be asked."""

    def __init__(
        self,
        problem: Problem,
        *,
        code: int | None = None,
        reason: str = "",
        is_transient: bool = False,
        retry_after_seconds: float | None = None,
        exit_code: int = ClusterError.exit_code,
    ) -> None:
        super().__init__(problem)
        self.code = code
        """HTTP status; None: there was no answer."""
        self.reason = reason
        """As in the Status: NotFound, Forbidden, Expired, ...; KubeRayMissing for a cluster without
        the definition of RayJob, Refused for what a quota or a webhook does not let in."""
        self.is_transient = is_transient
        """Whether the same request may succeed a little later."""
        self.retry_after_seconds = retry_after_seconds
        self.exit_code = exit_code

    @property
    def is_missing(self) -> bool:
        """Whether the object that was asked for is not there, while its kind is."""
        return self.code == 404 and self.reason == "NotFound"

    @property
    def is_forbidden(self) -> bool:
        return self.code == 403

    @property
    def lacks_right(self) -> bool:
        """Whether a right is missing; else what refuses is a rule of the cluster."""
        return self.code == 403 and self.reason != "Refused"


@dataclass(frozen=True)
class Asked:
    """What was asked for, for messages."""

    verb: str
    """As in rules of RBAC: get, list, watch, create, patch, delete."""
    resource: str
    """As there: `rayjobs`, `pods/log`."""
    group: str
    """`ray.io`; empty for the core group."""
    namespace: str
    """Empty for what is in none, such as nodes."""
    name: str | None
    server: str
    """URL of the API, without credentials."""

    @property
    def what(self) -> str:
        """`rayjobs.ray.io sentiment-1 in the namespace default`."""
        kind = f"{self.resource}.{self.group}" if self.group else self.resource
        name = f" {self.name}" if self.name else ""
        where = f" in the namespace {self.namespace}" if self.namespace else ""
        return f"{kind}{name}{where}"


def refusal(
    asked: Asked, *, code: int, body: bytes, retry_after: str | None, redact: Redact
) -> KubernetesError:
    """The error that an answer other than 2xx means."""
    status = _status_in(body)
    details = status.get("details") or {}
    reason = str(status.get("reason") or "")
    told = redact(str(status.get("message") or "")) if status else ""
    seconds = _seconds(retry_after, details.get("retryAfterSeconds"))
    is_transient = code in _TRANSIENT
    exit_code = ClusterError.exit_code
    match code:
        case 401:
            problem = _unauthorized(asked)
        case 403:
            problem = _forbidden(asked, told)
            reason = reason if _FORBIDDEN.search(told) else "Refused"
        case 404:
            problem, reason = _not_found(asked, status, details, told)
        case 409:
            problem = _conflict(asked, details, told)
        case 410:
            problem, reason = Problem(f"{asked.what}: {told or 'expired'}"), "Expired"
        case 400 | 422:
            problem = _invalid(asked, details, told, redact)
            exit_code = 2
        case 429:
            problem = Problem(
                f"the Kubernetes API at {asked.server} has too much to do to {asked.verb} "
                f"{asked.what}",
                "try again later",
            )
        case 500 if _UNDECLARED.search(told):
            fields = ", ".join(f"{m[1]}" for m in _UNDECLARED.finditer(told))
            problem = Problem(
                f"this cluster's KubeRay is too old for the run: its definition of RayJob has no "
                f"{fields}",
                f"set cluster.auth to null, or {_NEWER_CRDS}"
                if "authOptions" in fields
                else _NEWER_CRDS,
            )
            reason, is_transient = "UndeclaredField", False
        case _:
            problem = Problem(
                f"the Kubernetes API at {asked.server} cannot {asked.verb} {asked.what}: it "
                f"answered {code}" + (f", {told}" if told else ""),
                "try again later; see if it is well with: kubectl get --raw /readyz",
            )
    return KubernetesError(
        problem,
        code=code,
        reason=reason,
        is_transient=is_transient,
        retry_after_seconds=seconds,
        exit_code=exit_code,
    )


def unreachable(error: Exception, *, server: str, redact: Redact) -> KubernetesError:
    """The error that a connection which failed means."""
    causes = list(_causes(error))
    cannot_help = any(isinstance(cause, _NEVER_REACHED) for cause in causes)
    told = redact(" ".join(str(_most_telling(causes)).split()))
    if any(isinstance(c, ssl.SSLError | urllib3.exceptions.SSLError) for c in causes):
        hint = "see certificate-authority of the context in your kubeconfig, or whether a proxy "
        hint += "on the way has a certificate of its own"
    elif any(isinstance(c, urllib3.exceptions.ProxyError) for c in causes):
        hint = "see proxy-url of the context in your kubeconfig, and HTTPS_PROXY and NO_PROXY"
    else:
        hint = "see that you reach it, as with a VPN: kubectl version; the runs themselves are in "
        hint += "the store: shoal status RUN"
    return KubernetesError(
        Problem(f"the Kubernetes API at {server} does not answer: {told}", hint),
        is_transient=not cannot_help,
    )


class Redact:
    """Takes secrets out of texts that others have written."""

    def __init__(self, *secrets: str | None) -> None:
        # The longest first: one may hold another.
        self._secrets = sorted({s for s in secrets if s and len(s) > 3}, key=len, reverse=True)

    def __call__(self, text: str) -> str:
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return text


def _status_in(body: bytes) -> dict[str, Any]:
    """The Status of an answer; empty where the answer is something else."""
    try:
        found = json.loads(body)
    except ValueError:
        return {}
    is_status = isinstance(found, dict) and found.get("kind") == "Status"
    return found if is_status else {}


def _seconds(header: str | None, in_status: object) -> float | None:
    for given in (header, in_status):
        text = str(given or "").strip()
        if text.isdecimal():
            return float(text)
    return None


def _unauthorized(asked: Asked) -> Problem:
    return Problem(
        f"the Kubernetes API at {asked.server} does not accept the credentials: they are wrong or "
        "have expired",
        "log in to the cluster again, as you do for kubectl; try: kubectl auth whoami",
    )


def _forbidden(asked: Asked, told: str) -> Problem:
    denied = _FORBIDDEN.search(told)
    if denied is None:  # an admission webhook, or a quota
        return Problem(
            f"Kubernetes does not let you {asked.verb} {asked.what}"
            + (f": {told}" if told else ""),
            "what refuses is a rule of the cluster, not a missing right: ask its administrator",
        )
    verb, resource, group = denied["verb"], denied["resource"], denied["group"]
    missing = Asked(verb, resource, group, asked.namespace, None, asked.server)
    what = f"{resource}.{group}" if group else resource
    return Problem(
        f"you have no right to {verb} {missing.what}",
        f"ask an administrator of the cluster for a role in {asked.namespace} with: "
        f'apiGroups: ["{group}"], resources: ["{resource}"], verbs: ["{verb}"]; see if you have it '
        f"with: kubectl auth can-i {verb} {what} --namespace {asked.namespace}",
    )


def _not_found(
    asked: Asked, status: dict[str, Any], details: dict[str, Any], told: str
) -> tuple[Problem, str]:
    if not status and asked.group == "ray.io":
        # For a kind that it does not have, the API answers `404 page not found`, in plain text.
        problem = Problem(
            f"the Kubernetes API at {asked.server} knows no {asked.resource}.{asked.group}/v1: "
            "KubeRay is not installed there, or this is another cluster than you mean",
            f"{_INSTALL}; or name another cluster with --context",
        )
        return problem, "KubeRayMissing"
    if not status:
        problem = Problem(f"the Kubernetes API at {asked.server} knows no {asked.resource}")
        return problem, "KindMissing"
    if details.get("kind") == "namespaces":
        problem = Problem(
            f"there is no namespace {asked.namespace} in the cluster at {asked.server}",
            "set cluster.namespace to one that is there, or name another cluster with --context; "
            "see them with: kubectl get namespaces",
        )
        return problem, "NamespaceMissing"
    return Problem(f"there is no {asked.what}" + (f" ({told})" if told else "")), "NotFound"


def _conflict(asked: Asked, details: dict[str, Any], told: str) -> Problem:
    owned = [
        f"{cause.get('field')} ({cause.get('message')})"
        for cause in details.get("causes") or ()
        if cause.get("reason") == "FieldManagerConflict"
    ]
    if owned:
        return Problem(
            f"{asked.what} was changed by somebody else, who has: {', '.join(owned)}",
            f"see it with: kubectl get {asked.resource}.{asked.group} {asked.name} --namespace "
            f"{asked.namespace} --output yaml --show-managed-fields",
        )
    return Problem(f"{asked.what} is in the way: {told}", "try again")


def _invalid(asked: Asked, details: dict[str, Any], told: str, redact: Redact) -> Problem:
    causes = [
        f"{cause.get('field')}: {redact(str(cause.get('message')))}"
        for cause in details.get("causes") or ()
    ]
    why = "; ".join(causes) or told or "it does not say why"
    return Problem(
        f"Kubernetes refuses {asked.what} as it is: {why}",
        "see the manifest with: shoal render JOB.yaml, and change what it comes from in the job "
        "file; if the job file is right, KubeRay may be too old or too new",
    )


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An error and what it comes from, urllib3's wrappers included."""
    seen: list[BaseException] = []
    waiting: list[object] = [error]
    while waiting:
        found = waiting.pop()
        if isinstance(found, BaseException) and found not in seen:
            seen.append(found)
            waiting += [found.__cause__, getattr(found, "reason", None), *found.args]
    yield from seen


def _most_telling(causes: list[BaseException]) -> BaseException:
    """The innermost: `[Errno 111] Connection refused`, not how often it was tried."""
    return next((c for c in reversed(causes) if str(c)), causes[0])
