"""What the controller tells the driver: passed on once, whole, and counted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from jobs.record import State
from trainers import notices as module
from trainers.notices import NoticeReader, write_notice


@dataclass
class Told:
    """A telemetry that remembers."""

    lines: list[tuple[str, str]] = field(default_factory=list)

    def state(self, state: State, message: str, **_: Any) -> None:
        self.lines.append((state, message))

    def event(self, kind: str, message: str, **_: Any) -> None:
        self.lines.append((kind, message))


@pytest.fixture
def told() -> Told:
    return Told()


@pytest.fixture
def reader(told: Told, monkeypatch: pytest.MonkeyPatch) -> Iterator[NoticeReader]:
    monkeypatch.setattr(module, "POLL_SECONDS", 3600.0)  # only when the test looks
    with NoticeReader(told) as reader:  # type: ignore[arg-type]
        yield reader


def test_a_run_that_has_run_recovers_and_one_that_has_not_is_still_starting(
    reader: NoticeReader, told: Told
) -> None:
    write_notice(reader.path, "waiting", "waits for nodes")
    write_notice(reader.path, "running", "the workers are started")
    write_notice(reader.path, "failure", "rank 1 failed")
    write_notice(reader.path, "waiting", "waits for nodes")
    write_notice(reader.path, "warning", "requests are not heard")
    reader.look()
    assert told.lines == [
        ("STARTING", "waits for nodes"),
        ("RECOVERING", "rank 1 failed"),
        ("RECOVERING", "waits for nodes"),
        ("warning", "requests are not heard"),
    ]


def test_notices_are_counted_over_all_starts_and_passed_on_once(
    reader: NoticeReader, told: Told
) -> None:
    for _ in range(2):
        write_notice(reader.path, "preemption", "a node was taken")
        reader.look()
        reader.look()
    assert reader.counts == {"preemption": 2}
    assert len(told.lines) == 2


def test_a_line_that_nobody_understands_does_not_hide_the_others(
    reader: NoticeReader, told: Told
) -> None:
    write_notice(reader.path, "failure", "rank 1 failed")
    with reader.path.open("ab") as file:
        file.write(b'{"kind": \n')
    write_notice(reader.path, "preemption", "a node was taken")
    reader.look()
    assert reader.counts == {"failure": 1, "preemption": 1}
    assert len(told.lines) == 2


def test_a_line_that_is_not_whole_yet_is_read_once_it_is(reader: NoticeReader, told: Told) -> None:
    write_notice(reader.path, "failure", "rank 0 failed")
    line = reader.path.read_bytes()
    reader.path.write_bytes(line + line[:10])
    reader.look()
    assert len(told.lines) == 1
    reader.path.write_bytes(line + line)
    reader.look()
    assert len(told.lines) == 2


def test_the_thread_passes_them_on_by_itself(told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "POLL_SECONDS", 0.01)
    with NoticeReader(told) as reader:  # type: ignore[arg-type]
        write_notice(reader.path, "running", "the workers are started")
        while not reader.counts["running"]:
            pass
