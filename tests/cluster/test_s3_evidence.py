"""Every byte read of an object is one that the store holds, however the object was written."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import boto3
import pytest
from boto3.s3.transfer import TransferConfig
from botocore.config import Config
from botocore.exceptions import FlexibleChecksumError

from cluster.embedded import EmbeddedStore
from cluster.s3_evidence import Evidence
from cluster.storage import StorageError, Store, StoreAway, Transfer, open_store
from jobs.spec import StoreAccess
from tests.faulty_proxy import FaultyProxy, proxy_to

MIB = 2**20
PARTS = Transfer(part_bytes=5 * MIB, num_threads=3, retry_seconds=20)
LARGE = 11 * MIB
MD5 = "0123456789abcdef0123456789abcdef"
Write = Callable[[Store, str, Path], None]


@pytest.fixture
def proxy(object_store: EmbeddedStore) -> Iterator[FaultyProxy]:
    with proxy_to(object_store.endpoint_url) as running:
        yield running


def shaky(proxy: FaultyProxy, store: Store, **transfer: Any) -> Store:
    settings = Transfer(**({"part_bytes": 5 * MIB, "num_threads": 3} | transfer))
    return open_store(store.uri, StoreAccess(endpoint_url=proxy.url), transfer=settings)


def by_shoal(store: Store, key: str, path: Path) -> None:
    open_store(store.uri, transfer=PARTS).upload(key, path)


def by_boto3(store: Store, key: str, path: Path) -> None:
    upload_with_boto3(store, key, path, "when_supported")


def without_checksum(store: Store, key: str, path: Path) -> None:
    upload_with_boto3(store, key, path, "when_required")


def upload_with_boto3(
    store: Store, key: str, path: Path, calculation: Literal["when_supported", "when_required"]
) -> None:
    bucket, _, prefix = store.filesystem_root.partition("/")
    config = Config(request_checksum_calculation=calculation)
    client = boto3.client("s3", region_name="us-east-1", config=config)
    parts = TransferConfig(multipart_threshold=8 * MIB, multipart_chunksize=6 * MIB)
    client.upload_file(str(path), bucket, f"{prefix}/{key}", Config=parts)
    client.close()


@pytest.mark.parametrize("num_bytes", [0, 1, 50_000, LARGE])
@pytest.mark.parametrize("write", [by_shoal, by_boto3, without_checksum])
def test_a_bit_that_flips_on_the_way_is_found(
    proxy: FaultyProxy, s3_store: Store, tmp_path: Path, write: Write, num_bytes: int
) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(os.urandom(num_bytes))
    write(s3_store, "k", source)
    store = shaky(proxy, s3_store)
    flips = 2 if num_bytes else 0

    proxy.fail("corrupt answer", "GET", times=2)
    assert store.read("k") == source.read_bytes()
    assert proxy.injected["corrupt answer"] == flips
    proxy.faults.clear()

    proxy.fail("corrupt answer", "GET", times=2)
    store.download("k", target)
    assert target.read_bytes() == source.read_bytes()
    assert proxy.injected["corrupt answer"] == 2 * flips


@pytest.mark.parametrize("write", [by_shoal, without_checksum])
def test_a_file_that_never_comes_whole_does_not_appear(
    proxy: FaultyProxy, s3_store: Store, tmp_path: Path, write: Write
) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(os.urandom(50_000))
    write(s3_store, "k", source)
    proxy.fail("corrupt answer", "GET", times=1_000)
    store = shaky(proxy, s3_store, retry_seconds=0.5)
    with pytest.raises(StorageError, match=r"cannot read .*/k: .* do not match") as caught:
        store.download("k", target)
    assert not isinstance(caught.value, StoreAway)
    assert not target.exists()


def test_an_object_is_read_once(proxy: FaultyProxy, s3_store: Store, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(os.urandom(LARGE))
    without_checksum(s3_store, "k", source)
    shaky(proxy, s3_store).download("k", tmp_path / "target")
    assert proxy.count("GET") == 3
    assert proxy.count("HEAD") == 2


# ------------------------------------------------------- stores that no server here can play


def weighed(evidence: Evidence, answer: dict[str, Any], data: bytes) -> bool:
    try:
        assert b"".join(evidence.weighed([data[:3], data[3:]], answer)) == data
    except FlexibleChecksumError:
        return False
    return True


@pytest.mark.parametrize(
    "answer",
    [
        {"ETag": f'"{MD5}"', "ServerSideEncryption": "aws:kms"},
        {"ETag": f'"{MD5}"', "SSECustomerAlgorithm": "AES256"},
        {"ETag": f'"{MD5}"', "ChecksumCRC64NVME": "AAAAAAAAAAA="},
        {"ETag": '"0123456789abcdef0123456789abcdef-7"'},
        {"ETag": '"a version"'},
        {"ETag": '"a version"', "ChecksumCRC64NVME": "AAAAAAAAAAA="},
        {"ETag": '"a version"', "ChecksumCRC32": "AAAAAA==-7"},
    ],
)
def test_an_object_without_a_checksum_is_right_where_it_comes_twice(answer: dict[str, Any]) -> None:
    answer |= {"ContentLength": 5}
    evidence = Evidence(lambda: None)
    assert [weighed(evidence, answer, data) for data in (b"hello", b"jello", b"hello")] == [
        False, False, False,
    ]  # fmt: skip
    assert weighed(evidence, answer, b"hello")


@pytest.mark.parametrize(
    "answer",
    [{"ETag": f'"{MD5}"'}, {"ETag": '"a version"', "ChecksumCRC32": "AAAAAA=="}],
)
def test_what_differs_from_a_checksum_is_wrong_each_time(answer: dict[str, Any]) -> None:
    evidence = Evidence(lambda: None)
    answer |= {"ContentLength": 5}
    assert not any(weighed(evidence, answer, b"hello") for _ in range(3))


@pytest.mark.parametrize(
    ("name", "checksum"),
    [
        ("ChecksumCRC32", "NhCmhg=="),
        ("ChecksumSHA1", "qvTGHdzF6KLavt4PO0gs2a6pQ00="),
        ("ChecksumSHA256", "LPJNul+wow4m6DsqxbninhsWHlwfp0JecwQzYpOLmCQ="),
    ],
)
def test_all_checksums_are_known(name: str, checksum: str) -> None:
    answer = {"ETag": '"a version"', name: checksum, "ContentLength": 5}
    assert weighed(Evidence(lambda: None), answer, b"hello")
    assert not weighed(Evidence(lambda: None), answer, b"jello")
