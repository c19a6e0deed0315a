"""Ranged reads of S3 at little cost: a first try by obstore, whose client is written in Rust.

Of a request for 200 KB botocore takes some two milliseconds of the processor, most of it with the
interpreter's lock; obstore takes a fraction of one, without it. It has one try only: whoever it
fails reads again through botocore, which knows retries, deadlines and what to tell the user.
"""

from __future__ import annotations

import os
import re
import threading
import time
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import botocore.utils

from cluster.s3_access import S3Settings

if TYPE_CHECKING:
    import boto3.session
    import obstore.store
    from botocore.credentials import ReadOnlyCredentials

_MOST_BYTES = 2**23
"""Larger ranges are watched as they arrive, and the request costs little beside them."""
_RESTS = 2
"""After a try that has failed there is none for so many times as long as it took."""
_PLAIN_KEY = re.compile(r"[\w.=-]+(/[\w.=-]+)*", re.ASCII)
"""Keys that mean the same to every client. Others are left to botocore."""
_PLAIN_BUCKET = re.compile(r"[a-z0-9.-]+")

_process: int | None = None
"""The one that obstore has threads in: they do not outlive a fork, and it would wait for them."""


@dataclass(frozen=True)
class _Made:
    """A store of obstore's and what it was made of."""

    process: int
    credentials: ReadOnlyCredentials | None
    store: obstore.store.S3Store | None
    """None where the bucket is reached in a way that obstore does not know."""


class QuickReads:
    """Reads ranges of the objects of one endpoint. Thread-safe."""

    def __init__(self, settings: S3Settings) -> None:
        self._settings = settings
        self._lock = threading.Lock()
        self._made: dict[str, _Made] = {}
        self._rests_until = 0.0

    def read(
        self,
        session: boto3.session.Session,
        *,
        endpoint_url: str,
        region: str,
        bucket: str,
        key: str,
        span: tuple[int, int],
    ) -> bytes | None:
        """Bytes [start, end) of an object, or None where they are not to be had so.

        A request that hangs is given up after `Transfer.read_timeout_seconds` in all.
        """
        start, end = span
        began = time.monotonic()
        if (
            end - start > _MOST_BYTES
            or began < self._rests_until
            or not _PLAIN_KEY.fullmatch(key)
            or not _PLAIN_BUCKET.fullmatch(bucket)
        ):
            return None
        import obstore
        import obstore.exceptions

        try:
            store = self._store(session, endpoint_url, region, bucket)
            if store is None:
                return None
            found = obstore.get_range(store, key, start=start, end=end)
            data = found.to_bytes() if len(found) == end - start else None
        except (obstore.exceptions.BaseError, OSError, ValueError):
            data = None
        if data is None:
            now = time.monotonic()
            self._rests_until = now + _RESTS * (now - began)
        return data

    def _store(
        self, session: boto3.session.Session, endpoint_url: str, region: str, bucket: str
    ) -> obstore.store.S3Store | None:
        """The bucket for obstore with the session's credentials of this moment; None where it is
        reached in a way that obstore does not know."""
        global _process
        credentials = None
        if not self._settings.anonymous:
            found = session.get_credentials()
            if found is None:
                return None
            credentials = found.get_frozen_credentials()
        process = os.getpid()
        if _process not in (None, process):
            return None  # before the lock, which a fork may have taken with it
        made = self._made.get(bucket)
        if made is not None and (made.process, made.credentials) == (process, credentials):
            return made.store
        with self._lock:
            store = None
            if _is_plain(self._settings, endpoint_url):
                _process = process
                store = _make_store(self._settings, credentials, endpoint_url, region, bucket)
            self._made[bucket] = _Made(process, credentials, store)
            return store


def _is_plain(settings: S3Settings, endpoint_url: str) -> bool:
    """Whether the endpoint is reached by paths, without a proxy and with the system's authorities.

    obstore looks for proxies in the variables alone, and knows nothing of loopback.
    """
    url = urlsplit(endpoint_url)
    if settings.ca_bundle and url.scheme == "https":
        return False
    if settings.endpoint_url and settings.addressing_style == "virtual":
        return False
    if settings.is_loopback and _named(urllib.request.getproxies(), url.scheme):
        return bool(urllib.request.proxy_bypass(url.netloc))
    return not _named(botocore.utils.get_environ_proxies(endpoint_url), url.scheme)


def _named(proxies: Mapping[str, str], scheme: str) -> bool:
    """Whether a proxy is named for URLs of a scheme."""
    return scheme in proxies or "all" in proxies


def _make_store(
    settings: S3Settings,
    credentials: ReadOnlyCredentials | None,
    endpoint_url: str,
    region: str,
    bucket: str,
) -> obstore.store.S3Store:
    import obstore.store

    transfer = settings.transfer

    def provide() -> obstore.store.S3Credential:
        assert credentials is not None
        return {
            "access_key_id": credentials.access_key or "",
            "secret_access_key": credentials.secret_key or "",
            "token": credentials.token,
            "expires_at": None,
        }

    return obstore.store.S3Store(
        bucket,
        # Whole, so that no variable that obstore reads by itself has a say.
        config={
            "endpoint": endpoint_url,
            "aws_endpoint_url_s3": endpoint_url,
            "region": region,
            "virtual_hosted_style_request": False,
            "skip_signature": credentials is None,
            "request_payer": False,
            "s3_express": False,
        },
        client_options={
            "allow_http": True,
            "connect_timeout": timedelta(seconds=transfer.connect_timeout_seconds),
            "timeout": timedelta(seconds=transfer.read_timeout_seconds),
        },
        retry_config={"max_retries": 0, "retry_timeout": timedelta(0)},
        credential_provider=None if credentials is None else provide,
    )
