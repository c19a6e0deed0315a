"""Requests to a Kubernetes cluster, repeated while its API is away, here and nowhere else.

    connect(context)            what a kubeconfig, or a pod, says of a cluster -> Connection
    Connection.request          one request -> what the API answered
    Connection.lines            an answer that goes on, line by line

TLS, proxies and credentials are the library's. Its typed API is not used: that takes a second and a
half to import.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

import tenacity
import urllib3

from cluster.kuberay_config import (
    CONTEXT_VARIABLE,
    configured,
    require_client,
    said_by_library,
    unusable,
)
from cluster.kuberay_errors import Asked, KubernetesError, Redact, refusal, unreachable
from jobs.errors import Problem

if TYPE_CHECKING:
    from kubernetes.client import ApiClient, Configuration

PATIENCE_SECONDS = 75.0
"""How long an API that does not answer is asked again: it may be away for a minute, as while a
control plane is upgraded."""
CONNECT_SECONDS = 5.0
ANSWER_SECONDS = 15.0
_FIRST_PAUSE_SECONDS = 0.25
_LONGEST_PAUSE_SECONDS = 5.0
T = TypeVar("T")
Tell = Callable[[str], object]
"""Takes a sentence for the user."""

log = logging.getLogger("shoal.kuberay")


def connect(
    context: str | None = None,
    *,
    patience_seconds: float = PATIENCE_SECONDS,
    answer_seconds: float = ANSWER_SECONDS,
    tell: Tell = log.warning,
) -> Connection:
    """The cluster of a context of the kubeconfig; without one that of $SHOAL_CONTEXT, or the
    current one; in a pod without a kubeconfig, the pod's own cluster. Nothing is asked of it yet.

    `patience_seconds` bounds how long a request is repeated while the API is away, and
    `answer_seconds` how long one waits; `tell` hears of the first wait. Raises SpecError for a
    context that is not there, EnvironmentFault where nothing says how to reach a cluster.
    """
    require_client()
    context = context or os.environ.get(CONTEXT_VARIABLE) or None
    return Connection(
        lambda: configured(context),
        patience_seconds=patience_seconds,
        answer_seconds=answer_seconds,
        tell=tell,
    )


class Connection:
    """Requests to one cluster. Credentials are read anew once they are refused."""

    def __init__(
        self,
        configure: Callable[[], Configuration],
        *,
        patience_seconds: float = PATIENCE_SECONDS,
        answer_seconds: float = ANSWER_SECONDS,
        tell: Tell = log.warning,
    ) -> None:
        self._configure = configure
        self._patience_seconds = patience_seconds
        self._answer_seconds = answer_seconds
        self.tell = tell
        """Hears of what the user is to know."""
        self._client = self._made()

    @property
    def server(self) -> str:
        """URL of the API, without credentials."""
        parts = urlsplit(self._client.configuration.host)
        port = f":{parts.port}" if parts.port else ""
        return f"{parts.scheme}://{parts.hostname}{port}{parts.path}"

    def request(
        self,
        method: str,
        path: str,
        asked: Asked,
        *,
        query: Mapping[str, str] | None = None,
        body: Mapping[str, Any] | None = None,
        content_type: str = "application/json",
        accept: str = "application/json",
    ) -> dict[str, Any]:
        """What the API answers. All requests may be repeated: applying and deleting too.

        Raises KubernetesError for what it refuses, and where it stays away.
        """

        def once() -> dict[str, Any]:
            response = self._send(
                method,
                path,
                asked,
                query=query,
                body=body,
                content_type=content_type,
                accept=accept,
                read_seconds=self._answer_seconds,
            )
            try:
                found: dict[str, Any] = json.loads(self._whole(response))
            except ValueError as error:
                raise KubernetesError(
                    Problem(f"the Kubernetes API at {self.server} did not answer with JSON")
                ) from error
            finally:
                response.release_conn()
            return found

        return self.patiently(once)

    def lines(
        self, path: str, asked: Asked, *, query: Mapping[str, str], read_seconds: float
    ) -> Iterator[bytes]:
        """Lines of an answer as they come; ends with it.

        Raises KubernetesError as `request` does, one that `is_transient` where the connection
        breaks, or says nothing for `read_seconds`.
        """
        response = self.patiently(
            lambda: self._send("GET", path, asked, query=query, read_seconds=read_seconds)
        )
        rest = b""
        try:
            with self._reached():
                for piece in response.stream(amt=None):
                    *whole, rest = (rest + piece).split(b"\n")
                    yield from whole
            if rest:
                yield rest
        finally:
            # It has not been read to its end: it cannot be used again.
            response.close()

    def patiently(self, once: Callable[[], T]) -> T:
        """What `once` gives; called again while the API is away, for as long as is borne: an error
        of it that is raised is not transient any more."""

        def pause(state: tenacity.RetryCallState) -> float:
            error = state.outcome.exception() if state.outcome else None
            given = error.retry_after_seconds if isinstance(error, KubernetesError) else None
            return backoff(state) if given is None else max(given, _FIRST_PAUSE_SECONDS)

        def say(state: tenacity.RetryCallState) -> None:
            error = state.outcome.exception() if state.outcome else None
            if state.attempt_number == 2 and isinstance(error, KubernetesError):
                self.tell(f"{error}; trying again for {self._patience_seconds:.0f} s")

        backoff = tenacity.wait_random_exponential(
            multiplier=_FIRST_PAUSE_SECONDS, max=_LONGEST_PAUSE_SECONDS
        )
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception(_is_transient),
            wait=pause,
            stop=tenacity.stop_before_delay(self._patience_seconds),
            before_sleep=say,
            reraise=True,
        )
        try:
            return retrying(once)
        except KubernetesError as error:
            error.is_transient = False
            raise

    def _send(
        self,
        method: str,
        path: str,
        asked: Asked,
        *,
        read_seconds: float,
        query: Mapping[str, str] | None = None,
        body: Mapping[str, Any] | None = None,
        content_type: str = "application/json",
        accept: str = "application/json",
    ) -> urllib3.BaseHTTPResponse:
        """An answer of 2xx, its body unread. Asks once more with fresh credentials after a 401."""
        forms = (content_type, accept)
        response = self._sent(method, path, query, body, forms, read_seconds)
        if response.status == 401:
            self._whole(response)
            self._client = self._made()
            response = self._sent(method, path, query, body, forms, read_seconds)
        if 200 <= response.status < 300:
            return response
        raise refusal(
            asked,
            code=response.status,
            body=self._whole(response),
            retry_after=response.headers.get("Retry-After"),
            redact=self._redact(),
        )

    def _sent(
        self,
        method: str,
        path: str,
        query: Mapping[str, str] | None,
        body: Mapping[str, Any] | None,
        forms: tuple[str, str],
        read_seconds: float,
    ) -> urllib3.BaseHTTPResponse:
        """`forms`: that of the body, and that of the answer."""
        content_type, accept = forms
        client = self._client
        with self._reached():
            with said_by_library():  # a token that has expired is made anew here
                request = client.param_serialize(
                    method,
                    path,
                    query_params=list((query or {}).items()),
                    header_params={"Accept": accept, "Content-Type": content_type},
                    body=body,
                    auth_settings=["BearerToken"],
                )
            connect_seconds = min(CONNECT_SECONDS, read_seconds)
            answered = client.call_api(*request, _request_timeout=(connect_seconds, read_seconds))
        response: urllib3.BaseHTTPResponse = answered.response
        return response

    def _whole(self, response: urllib3.BaseHTTPResponse) -> bytes:
        with self._reached():
            return response.data

    @contextmanager
    def _reached(self) -> Iterator[None]:
        """Turns what goes wrong between here and the API into KubernetesErrors."""
        from kubernetes.client.exceptions import ApiException
        from kubernetes.config import ConfigException

        try:
            yield
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise unreachable(error, server=self.server, redact=self._redact()) from None
        except ApiException as error:
            # The library's own, for TLS alone; its text is that of urllib3's error.
            cause = error.__context__ if isinstance(error.__context__, Exception) else error
            raise unreachable(cause, server=self.server, redact=self._redact()) from None
        except ConfigException:
            # Not with its text, which may quote what it could not use.
            raise unusable(
                "the credentials for Kubernetes have expired, and could not be renewed",
                "log in to the cluster again, as you do for kubectl; try: kubectl auth whoami",
            ) from None

    def _made(self) -> ApiClient:
        from kubernetes.client import ApiClient

        client = ApiClient(self._configure())
        client.user_agent = "shoal"
        return client

    def _redact(self) -> Redact:
        """Of all that authenticates, in whatever form it might come back."""
        configuration = self._client.configuration
        token = configuration.api_key.get("BearerToken") or ""
        proxy = urlsplit(configuration.proxy or "")
        host = urlsplit(configuration.host)
        return Redact(
            token,
            token.partition(" ")[2].strip(),
            configuration.password,
            proxy.password,
            host.password,
        )


def _is_transient(error: BaseException) -> bool:
    return isinstance(error, KubernetesError) and error.is_transient
