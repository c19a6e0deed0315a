"""A store that knows no conditional writes: found out by `check`, refused, or borne on request."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from cluster.embedded import EmbeddedStore
from cluster.lease import acquire
from cluster.storage import (
    ObjectExists,
    PreconditionFailed,
    Store,
    Transfer,
    open_store,
)
from jobs.checks.finding import Finding, Verdict
from jobs.checks.stores import Stores, check_store
from jobs.errors import ClusterError, SpecError
from jobs.parse import parse_spec
from jobs.spec import StoreAccess
from tests.faulty_proxy import FaultyProxy, proxy_to
from tests.tiny import tiny_job, tiny_tree

CONDITIONS = ("if-none-match", "if-match")
HASTE = Transfer(retry_seconds=2.0)


@pytest.fixture
def proxy(object_store: EmbeddedStore) -> Iterator[FaultyProxy]:
    """In front of a real store; does not pass conditions on."""
    with proxy_to(object_store.endpoint_url) as running:
        running.ignored = CONDITIONS
        yield running


@pytest.fixture(params=["ignores", "refuses"])
def poor(request: pytest.FixtureRequest, proxy: FaultyProxy) -> FaultyProxy:
    """A store that ignores conditions, then one that refuses requests which have some."""
    if request.param == "refuses":
        proxy.ignored = ()
        for header in CONDITIONS:
            proxy.fail("not implemented", "PUT", times=10**9, header=header)
    return proxy


def at(proxy: FaultyProxy, store: Store, *, conditional_writes: bool) -> Store:
    access = StoreAccess(endpoint_url=proxy.url, conditional_writes=conditional_writes)
    return open_store(store.uri, access, transfer=HASTE)


def check(proxy: FaultyProxy, store: Store, *, lease: str) -> Finding:
    access = StoreAccess(endpoint_url=proxy.url, conditional_writes=lease == "required")
    (found,) = check_store("store", store.uri, access, Stores(), lease=lease)  # type: ignore[arg-type]
    assert not list(store.list())
    return found


def test_the_proxy_takes_conditions_away(proxy: FaultyProxy, s3_store: Store) -> None:
    store = at(proxy, s3_store, conditional_writes=True)
    etag = store.write_if_absent("k", b"1")
    store.write_if_absent("k", b"2")
    store.write_if_match("k", b"3", etag=etag)
    assert s3_store.read("k") == b"3"
    with pytest.raises(ObjectExists):
        s3_store.write_if_absent("k", b"4")


@pytest.mark.parametrize(
    ("ignored", "what"),
    [
        (CONDITIONS, "creates an object that exists, though If-None-Match forbids it"),
        (("if-match",), "replaces an object that has changed, though If-Match forbids it"),
    ],
)
def test_a_store_that_ignores_conditions_is_refused(
    proxy: FaultyProxy, s3_store: Store, ignored: tuple[str, ...], what: str
) -> None:
    proxy.ignored = ignored
    found = check(proxy, s3_store, lease="required")
    assert (found.verdict, found.exit_code) == (Verdict.PROBLEM, 3)
    assert what in found.message
    assert "set store_lease: none" in str(found.hint)


def test_a_store_that_refuses_conditions_is_refused(proxy: FaultyProxy, s3_store: Store) -> None:
    proxy.fail("not implemented", "PUT", header="If-None-Match", times=10**9)
    found = check(proxy, s3_store, lease="required")
    assert (found.verdict, found.exit_code) == (Verdict.PROBLEM, 3)
    assert "set store_lease: none" in str(found.hint)


def test_what_is_lost_without_a_lease_is_said(poor: FaultyProxy, s3_store: Store) -> None:
    found = check(poor, s3_store, lease="none")
    assert found.verdict is Verdict.WARNING
    assert "two drivers of a run" in found.message


def test_a_folder_needs_no_such_leave(local_store: Store) -> None:
    findings = check_store("store", local_store.uri, StoreAccess(), Stores(), lease="none")
    assert [f.verdict for f in findings] == [Verdict.OK, Verdict.WARNING]
    assert "has no effect" in findings[1].message


def test_the_key_decides_how_the_store_is_written_to() -> None:
    tree = tiny_tree(
        "s3://models/tiny", {"train": "s3://lake/train"}, "s3://shoal/runs", store_lease="none"
    )
    spec = parse_spec(tree, where="job")
    assert not spec.store.access.conditional_writes
    assert "store_lease is none" in str(spec.unguarded)
    assert parse_spec(spec.model_dump(mode="json"), where="again") == spec
    assert (
        tiny_job("s3://models/tiny", {"train": "s3://lake/train"}, "s3://shoal/runs").unguarded
        is None
    )
    tree["store"] = {"uri": "s3://shoal/runs", "access": {"conditional_writes": False}}
    del tree["store_lease"]
    with pytest.raises(SpecError) as caught:
        parse_spec(tree, where="job")
    assert "set store_lease: none" in str(caught.value.problems[0].hint)


def test_what_is_there_is_looked_at_instead(poor: FaultyProxy, s3_store: Store) -> None:
    store = at(poor, s3_store, conditional_writes=False)
    etag = store.write_if_absent("k", b"1")
    with pytest.raises(ObjectExists):
        store.write_if_absent("k", b"2")
    newer = store.write_if_match("k", b"3", etag=etag)
    for late in (etag, "other"):
        with pytest.raises(PreconditionFailed):
            store.write_if_match("k", b"4", etag=late)
    with pytest.raises(PreconditionFailed):
        store.write_if_match("absent", b"5", etag=newer)
    assert (s3_store.read("k"), s3_store.head("k").etag) == (b"3", newer)  # type: ignore[union-attr]


def test_of_two_drivers_at_one_moment_one_goes_on(proxy: FaultyProxy, s3_store: Store) -> None:
    store = at(proxy, s3_store, conditional_writes=False)
    both_have_looked = threading.Barrier(2)

    class Together:
        """Both find no lease before either has written one."""

        def __getattr__(self, name: str) -> object:
            return getattr(store, name)

        def write_if_absent(self, key: str, data: bytes) -> str:
            both_have_looked.wait(30)
            return store.write(key, data)

    def start(_: int):  # type: ignore[no-untyped-def]
        return acquire(Together(), "lease", ttl_seconds=1.5)  # type: ignore[arg-type]

    with ThreadPoolExecutor(2) as pool:
        drivers = list(pool.map(start, range(2)))
    assert any(driver.lost.wait(15) for driver in drivers[:1]) or drivers[1].lost.wait(15)
    going_on = [driver for driver in drivers if not driver.lost.is_set()]
    assert len(going_on) == 1
    going_on[0].confirm()
    with pytest.raises(ClusterError):
        acquire(store, "lease", ttl_seconds=1.5)
    for driver in drivers:
        driver.release()
