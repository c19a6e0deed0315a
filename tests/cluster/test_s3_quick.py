"""Ranged reads through obstore: the same bytes, and botocore's word wherever that does not do."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Iterator
from typing import Any

import pytest

from cluster.embedded import EmbeddedStore
from cluster.s3 import S3Store
from cluster.storage import ObjectMissing, StorageError, Store, Transfer, open_store
from jobs.spec import StoreAccess
from tests.faulty_proxy import FaultyProxy, Kind, proxy_to

PATIENT = Transfer(retry_seconds=20, read_timeout_seconds=1.5)


@pytest.fixture
def proxy(object_store: EmbeddedStore) -> Iterator[FaultyProxy]:
    with proxy_to(object_store.endpoint_url) as running:
        yield running


@pytest.fixture
def shaky(proxy: FaultyProxy, s3_store: Store) -> Store:
    """The same objects as `s3_store`, through the proxy."""
    return open_store(s3_store.uri, StoreAccess(endpoint_url=proxy.url), transfer=PATIENT)


@pytest.fixture
def botocores(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Keys that were read through botocore, in order."""
    read: list[str] = []
    own = S3Store._get

    def get(self: S3Store, key: str, *arguments: Any, **named: Any) -> Any:
        read.append(key)
        return own(self, key, *arguments, **named)

    monkeypatch.setattr(S3Store, "_get", get)
    return read


def test_a_range_is_read_without_botocore(s3_store: Store, botocores: list[str]) -> None:
    data = os.urandom(300_000)
    s3_store.write("part-00001.parquet", data)
    for start, end in ((0, 1), (0, 300_000), (299_999, 300_000), (1_000, 201_000)):
        assert s3_store.read_range("part-00001.parquet", start=start, end=end) == data[start:end]
    assert botocores == []


def test_one_request_reads_a_range(proxy: FaultyProxy, shaky: Store) -> None:
    shaky.write("a", b"0123456789")
    assert shaky.read_range("a", start=2, end=5) == b"234"
    assert (proxy.count("GET"), proxy.count("HEAD")) == (1, 0)


@pytest.mark.parametrize("key", ["with space", "percent%20", "a=b/ü", "plus+"])
def test_a_key_with_other_characters_is_that_of_botocore(
    s3_store: Store, botocores: list[str], key: str
) -> None:
    s3_store.write(key, b"0123456789")
    assert s3_store.read_range(key, start=2, end=5) == b"234"
    assert botocores == [key]


def test_a_large_range_is_watched_as_it_arrives(s3_store: Store, botocores: list[str]) -> None:
    data = bytes(9 * 2**20)
    s3_store.write("large", data)
    assert s3_store.read_range("large", start=0, end=len(data)) == data
    assert botocores == ["large"]


@pytest.mark.parametrize(
    "kind", ["slow down", "html 500", "drop", "cut body", "reset", "denied", "trickle", "hang"]
)
def test_what_fails_is_read_again(
    proxy: FaultyProxy, shaky: Store, botocores: list[str], kind: Kind
) -> None:
    data = os.urandom(50_000)
    shaky.write("a", data)
    proxy.fail(kind, "GET", times=1)
    assert shaky.read_range("a", start=10, end=40_000) == data[10:40_000]
    assert proxy.injected[kind] == 1
    assert botocores == ["a"]


def test_after_a_try_that_took_long_there_is_none_for_a_while(
    proxy: FaultyProxy, shaky: Store, botocores: list[str]
) -> None:
    shaky.write("a", b"0123456789")
    proxy.fail("hang", "GET", times=1)
    for _ in range(3):
        assert shaky.read_range("a", start=2, end=5) == b"234"
    assert botocores == ["a"] * 3
    deadline = time.monotonic() + 30
    while botocores and time.monotonic() < deadline:
        time.sleep(0.2)
        botocores.clear()
        assert shaky.read_range("a", start=2, end=5) == b"234"
    assert botocores == []


def test_an_object_that_is_missing_or_short_is_told_as_ever(s3_store: Store) -> None:
    with pytest.raises(ObjectMissing, match="there is no s3://"):
        s3_store.read_range("absent", start=0, end=4)
    s3_store.write("short", b"0123")
    with pytest.raises(StorageError, match="short"):
        s3_store.read_range("short", start=2, end=9)


def test_credentials_are_those_of_the_moment(s3_store: Store, botocores: list[str]) -> None:
    """As where a session renews its own."""
    s3_store.write("a", b"0123456789")
    assert isinstance(s3_store, S3Store)
    session, _ = s3_store._connection._parts()
    valid = session.get_credentials()
    assert valid is not None
    session._session.set_credentials(valid.access_key, "wrong")
    # botocore's client goes on with those that it was made with.
    assert s3_store.read_range("a", start=2, end=5) == b"234"
    assert botocores == ["a"]
    session._session.set_credentials(valid.access_key, valid.secret_key)
    deadline = time.monotonic() + 30
    while botocores and time.monotonic() < deadline:
        time.sleep(0.2)  # it rests for a while after what has failed
        botocores.clear()
        assert s3_store.read_range("a", start=2, end=5) == b"234"
    assert botocores == []


def test_variables_that_obstore_reads_by_itself_have_no_say(
    object_store: EmbeddedStore,
    s3_store: Store,
    botocores: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    s3_store.write("a", b"0123456789")
    store = open_store(
        s3_store.uri, StoreAccess(endpoint_url=object_store.endpoint_url, region="eu-west-1")
    )
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_SKIP_SIGNATURE", "true")
    monkeypatch.setenv("AWS_REGION", "nowhere")
    assert store.read_range("a", start=2, end=5) == b"234"
    assert botocores == []


def test_where_a_proxy_is_set_botocore_reads(
    object_store: EmbeddedStore,
    s3_store: Store,
    botocores: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    s3_store.write("a", b"0123456789")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    store = open_store(s3_store.uri, StoreAccess(endpoint_url=object_store.endpoint_url))
    assert store.read_range("a", start=2, end=5) == b"234"
    assert botocores == ["a"]


def test_a_fork_does_not_wait_for_the_threads_of_its_parent(s3_store: Store) -> None:
    s3_store.write("a", b"0123456789")
    assert s3_store.read_range("a", start=2, end=5) == b"234"
    context = multiprocessing.get_context("fork")
    receiving, sending = context.Pipe(duplex=False)
    child = context.Process(
        target=lambda: sending.send(s3_store.read_range("a", start=5, end=8)), daemon=True
    )
    child.start()
    assert receiving.poll(30), "the child hangs"
    assert receiving.recv() == b"567"
    child.join(10)
    assert child.exitcode == 0
