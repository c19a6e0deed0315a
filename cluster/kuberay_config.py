"""Which Kubernetes cluster is meant, and with which credentials, as kubectl finds it.

    configured(context)     a context of the kubeconfig, or a pod's own account -> Configuration

The library reads kubeconfigs, runs their plugins and renews tokens. Its errors quote what they
could not read, and its log what a plugin said: no secret of the kubeconfig is in what is told here.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from cluster.kuberay_errors import Redact
from jobs.errors import EnvironmentFault, Problem, SpecError

if TYPE_CHECKING:
    from kubernetes.client import Configuration

CONTEXT_VARIABLE = "SHOAL_CONTEXT"
MAX_CONNECTIONS = 16
"""That are kept: as many as may ask at a time."""
_SERVICE_HOST = "KUBERNETES_SERVICE_HOST"
"""In the environment of each pod."""
_WRONG_FORM = (OSError, LookupError, TypeError, ValueError, AttributeError)
"""What the library raises over a kubeconfig that is not as it should be."""


class NoAccess(EnvironmentFault):
    """There is no client of Kubernetes here, or nothing says how to reach a cluster."""


def require_client() -> None:
    """Raises NoAccess where the client of Kubernetes is not installed."""
    try:
        import kubernetes.client  # noqa: F401 - that it can be
    except ModuleNotFoundError as error:
        raise NoAccess(
            Problem(
                f"cluster.kind is kuberay, but the Kubernetes client ({error.name}) is not "
                "installed here",
                'run: pip install "shoal[kubernetes]"; or record the run with: shoal submit '
                "JOB.yaml --record-only, and start it with: shoal render RUN | kubectl apply -f -",
            )
        ) from None


def configured(context: str | None) -> Configuration:
    """As kubectl: what is said by option or variable, the user's file, the pod's own account."""
    from kubernetes import config
    from kubernetes.client import Configuration

    configuration = Configuration()
    given = os.environ.get("KUBECONFIG")
    files = given or str(Path("~/.kube/config").expanduser())
    is_there = any(Path(f).expanduser().is_file() for f in files.split(os.pathsep) if f)
    with said_by_library() as said:
        if is_there:
            _load_file(files, context, configuration, said)
        elif given or context or not os.environ.get(_SERVICE_HOST):
            where = (
                f"KUBECONFIG is {given}, but no such file is there"
                if given
                else (f"there is no {files}, and KUBECONFIG is not set")
            )
            raise NoAccess(
                Problem(
                    f"it is not known how to reach Kubernetes: {where}",
                    "get a kubeconfig of the cluster and name it, as in: export "
                    "KUBECONFIG=~/.kube/config; without access: shoal render RUN | kubectl apply "
                    "-f - does the same on a machine that has it",
                )
            )
        else:
            try:
                config.load_incluster_config(client_configuration=configuration)
            except config.ConfigException as error:
                raise unusable(
                    f"the account of this pod is not usable: {error}",
                    "mount the token of its service account (automountServiceAccountToken)",
                ) from None
    # Requests are repeated by Connection alone.
    configuration.retries = False
    configuration.connection_pool_maxsize = MAX_CONNECTIONS
    return configuration


def _load_file(
    files: str, context: str | None, configuration: Configuration, said: list[str]
) -> None:
    """Raises SpecError for a context that is not there, EnvironmentFault where the file is wrong
    or its plugin gives no credentials."""
    from kubernetes import config

    try:
        trees = [_tree(path) for path in files.split(os.pathsep) if path]
    except (yaml.YAMLError, OSError, UnicodeDecodeError):
        # Not with its text: it quotes the file.
        raise unusable(f"the kubeconfig {files} cannot be read, or is not YAML") from None
    known = [str(e.get("name")) for tree in trees for e in _entries(tree, "contexts")]
    if context is not None and context not in known:
        raise SpecError(
            Problem(
                f"the kubeconfig {files} has no context {context}; it has "
                f"{', '.join(known) or 'none'}",
                "name one of these with --context, or another file with KUBECONFIG",
            )
        )
    if context is None and not any(tree.get("current-context") for tree in trees):
        raise unusable(
            f"the kubeconfig {files} has no current-context",
            "name one with --context, or set one with: kubectl config use-context NAME",
        )
    redact = Redact(*(secret for tree in trees for secret in _secrets(tree)))
    try:
        config.load_kube_config(files, context=context, client_configuration=configuration)
    except (config.ConfigException, *_WRONG_FORM) as error:
        raise unusable(f"the kubeconfig {files} is not usable: {redact(str(error))}") from None
    if said and not configuration.api_key and not configuration.cert_file:
        raise unusable(
            f"what the kubeconfig {files} names gives no credentials: {redact(said[-1])}",
            "log in to the cluster again, as you do for kubectl; try: kubectl auth whoami",
        )


def _tree(path: str) -> dict[str, Any]:
    file = Path(path).expanduser()
    found = yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else None
    return found if isinstance(found, dict) else {}


def _entries(tree: Mapping[str, Any], kind: str) -> list[dict[str, Any]]:
    """Of `contexts`, `users` or `clusters`, what is of the right form."""
    return [entry for entry in tree.get(kind) or () if isinstance(entry, dict)]


_NO_SECRETS = ("command", "args", "apiVersion", "interactiveMode", "installHint", "name")


def _secrets(tree: Mapping[str, Any]) -> Iterator[str]:
    """All texts of a kubeconfig's users that may be secrets: the library's errors quote users."""
    waiting: list[Any] = [entry.get("user") for entry in _entries(tree, "users")]
    while waiting:
        found = waiting.pop()
        if isinstance(found, dict):
            waiting += [value for key, value in found.items() if key not in _NO_SECRETS]
        elif isinstance(found, list):
            waiting += found
        elif found is not None:
            yield str(found)


def unusable(message: str, hint: str | None = None) -> EnvironmentFault:
    return EnvironmentFault(Problem(message, hint or "see if kubectl works: kubectl version"))


@contextmanager
def said_by_library() -> Iterator[list[str]]:
    """What the library says on the root logger where it gets no credentials, instead of raising:
    a plugin's last words. They are not printed."""
    said: list[str] = []

    def keep(record: logging.LogRecord) -> bool:
        if record.module != "kube_config":
            return True
        said.append(" ".join(record.getMessage().split()))
        return False

    # Filters of a logger see what is said on itself only. Without a handler `logging.error` would
    # make one, which stays.
    root, handler = logging.getLogger(), logging.NullHandler()
    root.addFilter(keep)
    root.addHandler(handler)
    try:
        yield said
    finally:
        root.removeFilter(keep)
        root.removeHandler(handler)
