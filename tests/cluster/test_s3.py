"""What only S3 has: pages, parts, wrong keys, and a network that fails."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import pickle
import random
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import boto3
import pytest
import xxhash

from cluster.embedded import EmbeddedStore
from cluster.s3 import S3Store
from cluster.s3_transfer import Follower, Span, part_spans
from cluster.storage import (
    ObjectExists,
    ObjectMissing,
    PreconditionFailed,
    StorageError,
    Store,
    StoreAway,
    Transfer,
    open_store,
)
from jobs.errors import render_error
from jobs.spec import StoreAccess
from tests.faulty_proxy import SICK, SLOW_BYTES, FaultyProxy, Kind, proxy_to

MIB = 2**20
PARTS = Transfer(part_bytes=5 * MIB, num_threads=3, retry_seconds=20)
IMPATIENT = Transfer(retry_seconds=0.3, connect_timeout_seconds=1, read_timeout_seconds=0.5)


@pytest.fixture
def proxy(object_store: EmbeddedStore) -> Iterator[FaultyProxy]:
    with proxy_to(object_store.endpoint_url) as running:
        yield running


@pytest.fixture
def shaky(proxy: FaultyProxy, s3_store: Store) -> Store:
    """The same objects as `s3_store`, through the proxy."""
    return through(proxy, s3_store, PARTS)


def through(proxy: FaultyProxy, store: Store, transfer: Transfer) -> Store:
    return open_store(store.uri, StoreAccess(endpoint_url=proxy.url), transfer=transfer)


def unfinished_uploads(store: Store) -> int:
    bucket, _, prefix = store.filesystem_root.partition("/")
    client = boto3.client("s3", region_name="us-east-1")
    uploads = client.list_multipart_uploads(Bucket=bucket).get("Uploads", [])
    client.close()
    return sum(upload["Key"].startswith(prefix) for upload in uploads)


# ----------------------------------------------------------------------------- many and large


def test_a_list_has_as_many_pages_as_it_needs(s3_store: Store) -> None:
    written = [f"page/{n:05d}" for n in range(1_005)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda key: s3_store.write(key, b""), written))
    assert [head.key for head in s3_store.list("page/")] == written
    assert [h.key for h in s3_store.list("page/", after=written[1_001])] == written[1_002:]
    s3_store.delete(written)
    assert list(s3_store.list()) == []


def test_a_list_asks_for_the_next_page_only_when_it_is_needed(
    proxy: FaultyProxy, shaky: Store
) -> None:
    shaky.write("a", b"")
    listed = shaky.list()
    assert proxy.count("GET") == 0
    next(listed)
    assert proxy.count("GET") == 1


def test_large_objects_move_in_parts(proxy: FaultyProxy, shaky: Store, tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(os.urandom(11 * MIB))
    etag = shaky.upload("large", source)
    assert sum("partNumber" in r for r in proxy.requests) == 3
    head = shaky.head("large")
    assert head is not None
    assert (head.etag, head.num_bytes) == (etag, 11 * MIB)
    before = proxy.count("GET")
    digest = shaky.download("large", target, hashed=True)
    assert proxy.count("GET") - before == 3
    assert digest == xxhash.xxh3_128_hexdigest(source.read_bytes())
    assert target.read_bytes() == source.read_bytes()
    assert unfinished_uploads(shaky) == 0


def test_a_large_object_is_copied_in_parts_by_the_store(
    proxy: FaultyProxy, shaky: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(S3Store, "part_copy_bytes", 5 * MIB)
    data = os.urandom(11 * MIB)
    shaky.write("large", data)
    proxy.requests.clear()
    shaky.copy("large", "copy")
    assert sum("partNumber" in r for r in proxy.requests) == 3
    assert proxy.count("GET") == 0
    digest = shaky.download("copy", tmp_path / "copy", hashed=True)
    assert digest == xxhash.xxh3_128_hexdigest(data)
    assert shaky.read("copy") == data
    assert unfinished_uploads(shaky) == 0


def test_the_digest_follows_spans_that_are_written_in_any_order(tmp_path: Path) -> None:
    data = os.urandom(3 * MIB + 17)
    spans = part_spans(len(data), part_bytes=100_000)
    for seed in range(5):
        order = random.Random(seed).sample(spans, len(spans))
        with (tmp_path / f"{seed}").open("wb+") as file:
            digest = hashlib.sha256()
            follower = Follower(file.fileno(), spans, digest)

            def write(span: Span, file: IO[bytes] = file, follower: Follower = follower) -> None:
                os.pwrite(file.fileno(), data[span[0] : span[1]], span[0])
                follower.written(span)

            with ThreadPoolExecutor(6) as pool:
                list(pool.map(write, order))
            follower.follow()
        assert digest.digest() == hashlib.sha256(data).digest()


def test_large_bytes_move_in_parts(proxy: FaultyProxy, shaky: Store) -> None:
    data = os.urandom(6 * MIB)
    shaky.write("large", memoryview(data))
    assert sum("partNumber" in r for r in proxy.requests) == 2
    assert shaky.read("large") == data


def test_parts_are_signed_by_their_checksums_and_one_that_arrives_damaged_is_sent_again(
    proxy: FaultyProxy, shaky: Store
) -> None:
    """Their bytes are not hashed a second time for the signature; those of small objects are."""
    signed: dict[str, set[str]] = {}

    def note(request: Any, event_name: str, **_: object) -> None:
        operation = event_name.rpartition(".")[2]
        signed.setdefault(operation, set()).add(request.headers["X-Amz-Content-SHA256"].decode())

    assert isinstance(shaky, S3Store)
    shaky._connection.client().meta.events.register("before-send.s3", note)
    data = os.urandom(6 * MIB)
    proxy.fail("corrupt request", "PUT", "partNumber")
    shaky.write("large", data)
    shaky.write("small", b"x")
    assert proxy.injected["corrupt request"] == 1
    assert shaky.read("large") == data
    assert signed["UploadPart"] == {"UNSIGNED-PAYLOAD"}
    assert signed["PutObject"] == {hashlib.sha256(b"x").hexdigest()}


def test_an_upload_that_fails_leaves_nothing_behind(
    proxy: FaultyProxy, s3_store: Store, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    source.write_bytes(bytes(11 * MIB))
    proxy.fail("drop", "PUT", "partNumber=2", times=1_000)
    transfer = Transfer(part_bytes=5 * MIB, retry_seconds=0.3)
    with pytest.raises(StorageError, match="cannot write"):
        through(proxy, s3_store, transfer).upload("large", source)
    assert s3_store.head("large") is None
    assert unfinished_uploads(s3_store) == 0


def test_unfinished_uploads_have_as_many_pages_as_they_need(
    s3_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket, _, prefix = s3_store.filesystem_root.partition("/")
    client = boto3.client("s3", region_name="us-east-1")
    begun = [
        client.create_multipart_upload(Bucket=bucket, Key=f"{prefix}/{key}")["UploadId"]
        for key in ("a", "b", "b", "c", "d")
    ]
    client.close()
    monkeypatch.setattr("cluster.s3_transfer._PAGE_UPLOADS", 2)
    found = list(s3_store.list_unfinished())
    assert sorted(upload.key for upload in found) == ["a", "b", "b", "c", "d"]
    assert sorted(upload.upload_id for upload in found) == sorted(begun)
    s3_store.drop_unfinished(found)
    assert unfinished_uploads(s3_store) == 0


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("not implemented", "does not support ListMultipartUploads"),
        ("denied", "access denied"),
    ],
)
def test_a_store_that_does_not_list_uploads_says_so(
    proxy: FaultyProxy, shaky: Store, kind: Kind, text: str
) -> None:
    proxy.fail(kind, "GET", "uploads")
    with pytest.raises(StorageError, match=text) as caught:
        list(shaky.list_unfinished())
    assert "conditional" not in render_error(caught.value)
    assert kind != "denied" or "s3:ListBucketMultipartUploads" in render_error(caught.value)


def test_an_object_replaced_during_a_download_is_not_mixed(
    proxy: FaultyProxy, shaky: Store, s3_store: Store, tmp_path: Path
) -> None:
    s3_store.write("large", bytes(11 * MIB))
    replaced = iter([True])
    original = proxy.take_fault

    def take_fault(method: str, path: str, headers: Sequence[str] = ()) -> Kind | None:
        if method == "GET" and next(replaced, False):
            s3_store.write("large", b"\x01" * 11 * MIB)
        return original(method, path, headers)

    proxy.take_fault = take_fault  # type: ignore[method-assign]
    with pytest.raises(PreconditionFailed, match="replaced while it was read"):
        shaky.download("large", tmp_path / "target")
    assert os.listdir(tmp_path) == []


# ----------------------------------------------------------------------------- transient faults


@pytest.mark.parametrize("kind", sorted(set(SICK) - {"throttle", "late"}))
def test_reads_outlive_a_fault(proxy: FaultyProxy, shaky: Store, kind: Kind) -> None:
    data = os.urandom(50_000)
    shaky.write("k", data)
    proxy.fail(kind, "GET", times=2)
    assert shaky.read("k") == data
    proxy.fail(kind, "GET")
    assert shaky.read_range("k", start=10, end=40_000) == data[10:40_000]
    proxy.fail(kind, "GET")
    assert [head.key for head in shaky.list()] == ["k"]


def test_a_read_whose_bytes_were_changed_is_read_again(proxy: FaultyProxy, shaky: Store) -> None:
    shaky.write("k", b"hello")
    proxy.fail("corrupt answer", "GET")
    assert shaky.read("k") == b"hello"
    assert proxy.count("GET") == 2


@pytest.mark.parametrize("kind", ["fail after", "drop", "lose answer", "html 500"])
def test_writes_outlive_a_fault(
    proxy: FaultyProxy, shaky: Store, kind: Kind, tmp_path: Path
) -> None:
    proxy.fail(kind, "PUT")
    shaky.write("k", b"1")
    assert shaky.read("k") == b"1"
    (tmp_path / "large").write_bytes(os.urandom(6 * MIB))
    proxy.fail(kind, "PUT", "partNumber")
    proxy.fail(kind, "POST", times=3)
    shaky.upload("large", tmp_path / "large")
    assert shaky.read("large") == (tmp_path / "large").read_bytes()
    proxy.fail(kind, "POST", "delete")
    shaky.delete(["k", "large"])
    proxy.fail(kind, "HEAD")
    assert shaky.head("k") is None


@pytest.mark.parametrize(
    ("kind", "times"), [("lose answer", 1), ("lose answer", 3), ("fail after", 3), ("slow down", 1)]
)
def test_a_conditional_write_whose_answer_was_lost_has_still_won(
    proxy: FaultyProxy, shaky: Store, kind: Kind, times: int
) -> None:
    proxy.fail(kind, "PUT", times=times)
    etag = shaky.write_if_absent("k", b"1")
    proxy.fail(kind, "PUT", times=times)
    etag = shaky.write_if_match("k", b"2", etag=etag)
    assert shaky.read("k") == b"2"
    assert shaky.head("k").etag == etag  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", ["denied", "not implemented"])
def test_an_object_whose_head_is_refused_is_not_taken_for_absent(
    proxy: FaultyProxy, shaky: Store, kind: Kind
) -> None:
    etag = shaky.write("k", b"1")
    proxy.fail(kind, "HEAD")
    assert shaky.head("k").etag == etag  # type: ignore[union-attr]
    proxy.fail(kind, "HEAD", times=2)
    with pytest.raises(StorageError) as caught:
        shaky.head("k")
    assert not isinstance(caught.value, ObjectMissing)


def test_a_pause_that_the_store_asks_for_is_kept(proxy: FaultyProxy, shaky: Store) -> None:
    shaky.write("k", b"1")
    proxy.fail("throttle", "GET", times=2)
    began = time.monotonic()
    assert shaky.read("k") == b"1"
    assert time.monotonic() - began >= 2.0  # Retry-After: 1, twice
    assert proxy.count("GET") == 3


def test_a_pause_that_is_too_long_is_told_to_who_can_wait(
    proxy: FaultyProxy, s3_store: Store
) -> None:
    proxy.fail("throttle", "GET", times=1_000)
    with pytest.raises(StoreAway) as caught:
        through(proxy, s3_store, IMPATIENT).read("k")
    assert caught.value.after_seconds == 1.0
    assert pickle.loads(pickle.dumps(caught.value)).after_seconds == 1.0
    assert proxy.count("GET") == 1


WINDOWS = Transfer(slow_window_seconds=0.5, slow_bytes_per_second=2**14, retry_seconds=0.3)
"""Stretches, and what is to come in them, as long to each other as they are by default. A try that
trickles lasts longer than transient faults are retried."""


@pytest.mark.timeout(300)  # it waits a lot: its file is not to be the last (tests/conftest.py)
@pytest.mark.parametrize("num_bytes", [5_000, 20 * MIB])
def test_a_body_that_trickles_is_given_up_and_read_again(
    proxy: FaultyProxy, s3_store: Store, num_bytes: int
) -> None:
    data = os.urandom(num_bytes)
    s3_store.write("k", data)
    store = through(proxy, s3_store, WINDOWS)
    proxy.fail("trickle", "GET")  # a byte comes each 0.25 s: the socket never times out
    assert store.read("k") == data
    proxy.fail("trickle", "GET")
    assert store.read_range("k", start=7, end=num_bytes - 5) == data[7:-5]
    assert proxy.injected["trickle"] == 2
    assert proxy.count("GET") == 4


def test_a_body_that_comes_slowly_but_steadily_is_no_trickle(
    proxy: FaultyProxy, s3_store: Store
) -> None:
    data = os.urandom(8 * SLOW_BYTES)  # for two seconds
    s3_store.write("k", data)
    gets_on: list[None] = []
    transfer = dataclasses.replace(WINDOWS, on_part=lambda: gets_on.append(None))
    proxy.fail("slow", "GET")
    assert through(proxy, s3_store, transfer).read("k") == data
    assert (proxy.injected["slow"], proxy.count("GET")) == (1, 1)
    assert len(gets_on) >= 2


def test_a_store_that_always_trickles_is_away(proxy: FaultyProxy, s3_store: Store) -> None:
    s3_store.write("k", bytes(5_000))
    proxy.fail("trickle", "GET", times=1_000)
    with pytest.raises(StoreAway, match=r"does not answer \(ReadTimeoutError\)"):
        through(proxy, s3_store, WINDOWS).read("k")
    assert proxy.injected["trickle"] == 2


def test_a_slow_line_takes_what_is_written(proxy: FaultyProxy, s3_store: Store) -> None:
    data = os.urandom(4 * MIB)  # more than the system's buffers take at once
    gets_on: list[None] = []
    transfer = Transfer(
        connect_timeout_seconds=1.0, slow_window_seconds=0.5, on_part=lambda: gets_on.append(None)
    )
    proxy.fail("slow request", "PUT")
    through(proxy, s3_store, transfer).write_if_absent("k", data)
    assert s3_store.read("k") == data
    assert (proxy.injected["slow request"], proxy.count("PUT")) == (1, 1)
    assert gets_on


def test_a_line_that_becomes_slow_takes_the_part_at_the_second_try(
    proxy: FaultyProxy, s3_store: Store, tmp_path: Path
) -> None:
    """The first part goes fast, so that the blocks of the second are too large for its line."""
    (tmp_path / "large").write_bytes(os.urandom(16 * MIB))
    transfer = Transfer(part_bytes=8 * MIB, num_threads=1, connect_timeout_seconds=1.0)
    proxy.fail("slow request", "PUT", "partNumber=2", times=3)
    through(proxy, s3_store, transfer).upload("large", tmp_path / "large")
    assert s3_store.read("large") == (tmp_path / "large").read_bytes()
    assert proxy.injected["slow request"] == 2


def test_a_write_that_nobody_takes_is_given_up_and_sent_again(
    proxy: FaultyProxy, s3_store: Store, tmp_path: Path
) -> None:
    (tmp_path / "large").write_bytes(os.urandom(11 * MIB))
    transfer = Transfer(part_bytes=5 * MIB, connect_timeout_seconds=0.5, retry_seconds=0.3)
    proxy.fail("stuck request", "PUT", "partNumber=2")
    through(proxy, s3_store, transfer).upload("large", tmp_path / "large")
    assert s3_store.read("large") == (tmp_path / "large").read_bytes()
    assert sum("partNumber=2" in request for request in proxy.requests) == 2


@pytest.mark.parametrize("times", [1, 2])
def test_an_upload_that_ends_in_200_with_an_error_is_completed(
    proxy: FaultyProxy, shaky: Store, tmp_path: Path, times: int
) -> None:
    (tmp_path / "large").write_bytes(os.urandom(6 * MIB))
    proxy.fail("error in 200", "POST", "uploadId", times=times)
    shaky.upload("large", tmp_path / "large")
    assert shaky.read("large") == (tmp_path / "large").read_bytes()
    assert proxy.injected["error in 200"] == times
    assert unfinished_uploads(shaky) == 0


def test_an_error_in_200_that_stays_is_no_success(
    proxy: FaultyProxy, s3_store: Store, tmp_path: Path
) -> None:
    (tmp_path / "large").write_bytes(bytes(6 * MIB))
    proxy.fail("error in 200", "POST", "uploadId", times=1_000)
    transfer = Transfer(part_bytes=5 * MIB, retry_seconds=0.3)
    with pytest.raises(StorageError, match="cannot write"):
        through(proxy, s3_store, transfer).upload("large", tmp_path / "large")


def test_credentials_that_have_expired_are_looked_up_once_more(
    proxy: FaultyProxy, s3_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    s3_store.write("k", b"1")
    file = tmp_path / "credentials"

    def hold(key: str, secret: str) -> None:
        file.write_text(f"[default]\naws_access_key_id={key}\naws_secret_access_key={secret}\n")

    key, secret = (os.environ[f"AWS_{name}"] for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY"))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    hold("old", "and gone")
    store = through(proxy, s3_store, PARTS)
    with pytest.raises(StorageError, match="InvalidAccessKeyId"):
        store.read("k")
    hold(key, secret)  # as a service beside the program does before the old ones expire
    proxy.fail("expired", "GET")
    assert store.read("k") == b"1"
    proxy.fail("expired", "GET", times=2)
    with pytest.raises(StorageError, match="have expired") as caught:
        store.read("k")
    assert not isinstance(caught.value, StoreAway)


def test_a_lost_answer_does_not_take_what_another_wrote_for_its_own(
    proxy: FaultyProxy, shaky: Store, s3_store: Store
) -> None:
    s3_store.write_if_absent("k", b"the same bytes")
    proxy.fail("drop", "PUT", times=3)
    with pytest.raises(ObjectExists):
        shaky.write_if_absent("k", b"the same bytes")


def test_bytes_changed_on_their_way_up_are_never_stored(
    proxy: FaultyProxy, s3_store: Store
) -> None:
    proxy.fail("corrupt request", "PUT", times=1_000)
    store = through(proxy, s3_store, IMPATIENT)
    with pytest.raises(StorageError, match="cannot write"):
        store.write("k", b"hello")
    assert s3_store.head("k") is None


def test_a_wrong_checksum_surfaces(s3_store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.s3.checksum", lambda data: "AAAAAA==")
    store = open_store(s3_store.uri, transfer=IMPATIENT)
    with pytest.raises(StorageError, match="BadDigest") as caught:
        store.write("k", b"hello")
    assert not isinstance(caught.value, StoreAway)
    assert s3_store.head("k") is None


# ----------------------------------------------------------------------------- what users see


def hint_of(error: StorageError) -> str:
    return error.problems[0].hint or ""


def test_a_store_that_hangs_surfaces(proxy: FaultyProxy, s3_store: Store) -> None:
    s3_store.write("k", b"1")
    proxy.fail("hang", "GET", times=1_000)
    with pytest.raises(StoreAway, match=r"does not answer \(ReadTimeoutError\)") as caught:
        through(proxy, s3_store, IMPATIENT).read("k")
    assert "shoal up" in hint_of(caught.value)


def test_a_body_that_is_always_cut_surfaces(proxy: FaultyProxy, s3_store: Store) -> None:
    s3_store.write("k", b"12345678")
    proxy.fail("cut body", "GET", times=1_000)
    with pytest.raises(StoreAway, match="does not answer"):
        through(proxy, s3_store, IMPATIENT).read("k")


def test_a_dead_endpoint_surfaces(object_store: EmbeddedStore) -> None:
    store = open_store(
        "s3://shoal/x", StoreAccess(endpoint_url="http://127.0.0.1:9"), transfer=IMPATIENT
    )
    started = time.monotonic()
    with pytest.raises(StoreAway, match=r"http://127\.0\.0\.1:9 does not answer") as caught:
        store.read("k")
    assert time.monotonic() - started < 10
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("kind", ["slow down", "html 500", "drop", "reset"])
def test_a_store_in_trouble_is_away_and_one_that_refuses_is_not(
    proxy: FaultyProxy, s3_store: Store, kind: Kind
) -> None:
    s3_store.write("k", b"12345678")
    store = through(proxy, s3_store, IMPATIENT)
    proxy.fail(kind, "GET", times=1_000)
    with pytest.raises(StoreAway):
        store.read("k")
    proxy.fail("not implemented", "PUT", times=1_000)
    with pytest.raises(StorageError, match="does not support") as caught:
        store.write_if_absent("new", b"")
    assert not isinstance(caught.value, StoreAway)
    assert proxy.count("PUT") == 1, "what will never work is not tried again"


def test_a_missing_bucket_is_named(s3_store: Store, tmp_path: Path) -> None:
    store = open_store("s3://no-such-bucket/x")
    for use in (
        lambda: store.read("k"),
        lambda: store.head("k"),
        lambda: store.write("k", b""),
        lambda: store.write_if_match("k", b"", etag='"x"'),
        lambda: list(store.list()),
        lambda: list(store.list_folders()),
        lambda: store.download("k", tmp_path / "k"),
    ):
        with pytest.raises(StorageError, match="no bucket no-such-bucket") as caught:
            use()
        assert not isinstance(caught.value, ObjectMissing | PreconditionFailed | StoreAway)
        assert "s3 mb s3://no-such-bucket" in hint_of(caught.value)


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("AWS_SECRET_ACCESS_KEY", "SignatureDoesNotMatch"),
        ("AWS_ACCESS_KEY_ID", "InvalidAccessKeyId"),
    ],
)
def test_wrong_keys_are_told_without_showing_them(
    s3_store: Store, monkeypatch: pytest.MonkeyPatch, name: str, code: str
) -> None:
    monkeypatch.setenv(name, "wrong-and-private")
    store = open_store(s3_store.uri)
    for use in (lambda: store.read("k"), lambda: store.head("k"), lambda: store.write("k", b"")):
        with pytest.raises(StorageError, match=code) as caught:
            use()
        text = render_error(caught.value) + repr(caught.value)
        assert "the credentials in AWS_ACCESS_KEY_ID" in text
        assert "wrong-and-private" not in text
        assert os.environ["AWS_SECRET_ACCESS_KEY"] not in text


def test_no_credentials_at_all_are_told(
    object_store: EmbeddedStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(StorageError, match="no credentials were found") as caught:
        open_store("s3://shoal/x").read("k")
    assert "AWS_PROFILE" in hint_of(caught.value)


def test_an_anonymous_request_that_is_refused_is_told(object_store: EmbeddedStore) -> None:
    with pytest.raises(StorageError, match="access denied for an anonymous request") as caught:
        open_store("s3://shoal/x", StoreAccess(anonymous=True)).read("k")
    assert "s3:GetObject" in hint_of(caught.value)


def test_a_certificate_of_an_unknown_authority_is_told_at_once(object_store: EmbeddedStore) -> None:
    # The embedded store speaks plain HTTP: what it answers is no TLS at all.
    url = object_store.endpoint_url.replace("http:", "https:")
    with pytest.raises(StorageError) as caught:
        open_store("s3://shoal/x", StoreAccess(endpoint_url=url), transfer=IMPATIENT).read("k")
    assert "AWS_CA_BUNDLE" in hint_of(caught.value)


def test_encryption_is_asked_for_on_every_write(s3_store: Store, tmp_path: Path) -> None:
    access = StoreAccess(server_side_encryption="AES256")
    store = open_store(s3_store.uri, access, transfer=PARTS)
    (tmp_path / "large").write_bytes(bytes(6 * MIB))
    store.write("small", b"1")
    store.write_if_absent("new", b"1")
    store.upload("large", tmp_path / "large")
    bucket, _, prefix = store.filesystem_root.partition("/")
    client = boto3.client("s3", region_name="us-east-1")
    for key in ("small", "new", "large"):
        head = client.head_object(Bucket=bucket, Key=f"{prefix}/{key}")
        assert head["ServerSideEncryption"] == "AES256"
    client.close()


def test_a_store_on_this_machine_is_not_looked_for_behind_a_proxy(
    s3_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "http_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    store = open_store(s3_store.uri, transfer=IMPATIENT)
    store.write("k", b"1")
    path = f"{store.filesystem_root}/k"
    assert store.filesystem().get_file_info(path).size == 1


def test_a_store_goes_on_in_a_forked_process(s3_store: Store) -> None:
    s3_store.write("k", b"1")
    child = os.fork()
    if child == 0:
        try:
            os._exit(0 if s3_store.read("k") == b"1" else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert pickle.loads(pickle.dumps(s3_store)).read("k") == b"1"
