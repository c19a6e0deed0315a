"""In which turns and blocks the parts of an object are sent; how they arrive: test_s3.py."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
from botocore.auth import PAYLOAD_BUFFER

from cluster import s3_transfer
from cluster.s3_transfer import Line, Span, write_parts
from cluster.storage import Transfer

PARTS = 4
FOR_OTHERS_SECONDS = 0.1
TRANSFER = Transfer(part_bytes=1, num_threads=PARTS)


class Client:
    """Does with the body of a part what botocore does, and then `on_part`."""

    def __init__(self, on_part: Callable[[], object]) -> None:
        self._on_part = on_part

    def create_multipart_upload(self, **_: Any) -> dict[str, str]:
        return {"UploadId": "1"}

    def upload_part(self, *, Body: Any, **_: Any) -> dict[str, str]:  # noqa: N803 - S3's name
        Body.read(PAYLOAD_BUFFER)
        Body.seek(0)
        Body.read(PAYLOAD_BUFFER - 1)
        self._on_part()
        return {"ETag": "e"}

    def complete_multipart_upload(self, **_: Any) -> dict[str, str]:
        return {"ETag": "whole"}

    def abort_multipart_upload(self, **_: Any) -> None:
        pass


def write(client: Client, read_part: Callable[[Span], bytes]) -> str:
    return write_parts(
        lambda action: action(client),  # type: ignore[arg-type]
        arguments={"Bucket": "b", "Key": "k"},
        token="t",
        num_bytes=PARTS,
        read_part=read_part,
        transfer=TRANSFER,
        line=Line(TRANSFER),
    )


@pytest.mark.parametrize("at_once", [1, 2])
def test_few_parts_are_made_ready_at_once(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3_transfer._Turn, "_free", threading.Semaphore(at_once))
    never = threading.Event()
    now, counts = set[Span](), list[int]()

    def read_part(span: Span) -> bytes:
        now.add(span)
        never.wait(FOR_OTHERS_SECONDS)
        counts.append(len(now))
        now.remove(span)
        return b"x"

    write(Client(on_part=lambda: None), read_part)
    assert max(counts) == at_once
    assert len(counts) == PARTS


def test_all_of_them_are_sent_at_once() -> None:
    meet = threading.Barrier(PARTS)
    assert write(Client(on_part=lambda: meet.wait(timeout=30)), lambda _: b"x") == "whole"


def test_a_part_that_cannot_be_read_lets_the_next_take_its_turn() -> None:
    def broken(_: Span) -> bytes:
        raise OSError("gone")

    for _ in range(2):
        with pytest.raises(OSError, match="gone"):
            write(Client(on_part=lambda: None), broken)
    assert write(Client(on_part=lambda: None), lambda _: b"x") == "whole"


def test_a_part_that_cannot_be_sent_takes_no_turn_while_it_waits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All parts are tried once before any is tried again, though one alone may be made ready."""
    monkeypatch.setattr(s3_transfer._Turn, "_free", threading.Semaphore(1))
    meet = threading.Barrier(PARTS)

    class Away(Client):
        def upload_part(self, **_: Any) -> dict[str, str]:
            raise OSError("no connection")

    def attempt(action: Callable[[Any], Any]) -> Any:
        try:
            return action(Away(on_part=lambda: None))
        except OSError:
            meet.wait(timeout=30)
            return action(Client(on_part=lambda: None))

    assert (
        write_parts(
            attempt,
            arguments={"Bucket": "b", "Key": "k"},
            token="t",
            num_bytes=PARTS,
            read_part=lambda _: b"x",
            transfer=TRANSFER,
            line=Line(TRANSFER),
        )
        == "whole"
    )


SMALL, LARGE = 2**14, 2**18
MIB = 2**20


@pytest.mark.parametrize(
    ("bytes_per_second", "block_bytes"),
    [(10 * SMALL, SMALL), (8 * MIB, LARGE), (2 * MIB, 2 * MIB // 16), (100 * MIB, LARGE)],
)
def test_blocks_are_what_the_line_takes_in_a_share_of_the_timeout(
    bytes_per_second: int, block_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = Line(Transfer(connect_timeout_seconds=1.0))
    assert line.block_bytes == SMALL
    times = iter([0.0, 16 * MIB / bytes_per_second])
    monkeypatch.setattr(s3_transfer.time, "monotonic", lambda: next(times))
    with line.watched(16 * MIB):
        pass
    assert line.block_bytes == block_bytes


def test_blocks_are_small_after_a_failure_and_a_small_part_tells_nothing() -> None:
    line = Line(TRANSFER)
    with line.watched(16 * MIB):
        pass
    with line.watched(100):
        pass
    assert line.block_bytes == LARGE
    with pytest.raises(OSError, match="timed out"), line.watched(16 * MIB):
        raise OSError("timed out")
    assert line.block_bytes == SMALL
    with line.watched(100):
        pass
    assert line.block_bytes == SMALL
