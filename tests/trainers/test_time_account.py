"""Where the wall clock of an attempt goes: each moment counts for one purpose."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from trainers import time_account
from trainers.time_account import TimeAccount


class Clock:
    """Goes on only when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def passes(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    fake = SimpleNamespace(monotonic=lambda: clock.now, time=lambda: 5.0)
    monkeypatch.setattr(time_account, "time", fake)
    return clock


def told(account: TimeAccount) -> dict[str, float]:
    return {purpose: seconds for purpose, seconds in account.seconds().items() if seconds}


def test_what_no_span_covers_is_other(clock: Clock) -> None:
    account = TimeAccount()
    assert account.opened_at == 5.0
    clock.passes(1)
    with account.spent("compute"):
        clock.passes(2)
    clock.passes(4)
    assert told(account) == {"compute": 2, "other": 5}
    assert account.elapsed_seconds == 7


def test_an_inner_span_counts_for_its_own_purpose_only(clock: Clock) -> None:
    account = TimeAccount()
    with account.spent("evaluation"):
        clock.passes(1)
        with account.spent("data_wait"):
            clock.passes(2)
        clock.passes(4)
    assert told(account) == {"evaluation": 5, "data_wait": 2}


def test_a_span_that_is_open_counts_already(clock: Clock) -> None:
    account = TimeAccount()
    with account.spent("synchronisation"):
        clock.passes(3)
        assert told(account) == {"synchronisation": 3}
        clock.passes(1)
    assert told(account) == {"synchronisation": 4}


def test_a_span_ends_with_an_error(clock: Clock) -> None:
    account = TimeAccount()

    def fails() -> None:
        with account.spent("data_wait"):
            clock.passes(1)
            raise ValueError("no rows")

    with pytest.raises(ValueError, match="no rows"):
        fails()
    clock.passes(2)
    assert told(account) == {"data_wait": 1, "other": 2}
