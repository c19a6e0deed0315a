"""The live view, drawn for a terminal that is none."""

from __future__ import annotations

import io
import time
from typing import Any

import pytest
from rich.console import Console
from synthetic import START, SyntheticRun, running, succeeded

from cluster.storage import StorageError, Store
from jobs import watch
from jobs.record import State
from jobs.runs import RunReader
from jobs.status import RunStatus, read_status
from jobs.watch import LineView, NoView, live_renderable, sparkline, watch_run


def drawn(made: SyntheticRun, *, now: float = START) -> str:
    console = Console(file=io.StringIO(), force_terminal=True, width=110, color_system=None)
    with console.capture() as capture:
        console.print(live_renderable(read_status(RunReader(made.store, made.run_id), now=now)))
    return capture.get()


def test_the_live_view_shows_progress_numbers_evaluations_and_events(local_store: Store) -> None:
    screen = drawn(running(local_store, now=START))
    assert "sentiment-a1b2c3  RUNNING  training" in screen
    assert "40%  step 120 / 300  epoch 1.20 / 3  1m 30s left" in screen
    for name in ("loss", "learning rate", "rows/s", "tokens/s", "data wait", "gradient norm"):
        assert name in screen
    assert any(
        line.split()[:2] == ["validation", "100"] and "best" in line for line in screen.splitlines()
    )
    assert "attempt 1 goes on from the start" in screen


def test_the_live_view_of_a_run_that_has_not_started_is_short(local_store: Store) -> None:
    screen = drawn(SyntheticRun(local_store).submit())
    assert "PENDING  no driver has started yet" in screen
    assert "step 0" in screen


def test_plain_lines_are_printed_once(local_store: Store) -> None:
    made = succeeded(local_store)
    console = Console(file=io.StringIO(), width=200)
    reader = RunReader(local_store, made.run_id)
    with console.capture() as first, LineView(console) as view:
        view.show(read_status(reader))
    with console.capture() as second:
        view.show(read_status(reader))
    assert len(first.get().splitlines()) == 7 + 7 + 1 + 1  # events, evaluations, training, end
    assert second.get() == ""


class AbsentForAWhile:
    """A store that does not answer from its second to its fourth look at the lease."""

    def __init__(self, made: SyntheticRun) -> None:
        self._made = made
        self._looks = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._made.store, name)

    def read(self, key: str) -> bytes:
        if key == self._made.paths.lease:
            self._looks += 1
            if 2 <= self._looks <= 4:
                raise StorageError("no answer")
            if self._looks == 5:
                self._made.finish(State.STOPPED, attempt=1, step=120, time=START)
        return self._made.store.read(key)


def test_a_store_that_is_away_for_a_while_does_not_end_the_watching(
    local_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "POLL_SECONDS", 0.01)
    made = running(local_store, now=time.time())
    console = Console(file=io.StringIO(), width=200)
    reader = RunReader(AbsentForAWhile(made), made.run_id)  # type: ignore[arg-type]
    with console.capture() as capture:
        status = watch_run(reader, view=LineView(console))
    assert status.situation.state is State.STOPPED
    assert capture.get().count("cannot be read at present: no answer") == 3


def long_silent(store: Store, *, ttl_seconds: float) -> SyntheticRun:
    """A run whose driver, elsewhere, was last heard of ten minutes ago."""
    made = running(store, now=time.time())
    made.lease(renewed_at=time.time() - 600, ttl_seconds=ttl_seconds)
    return made


def test_the_watching_goes_on_where_the_driver_renews_after_the_store_was_away(
    local_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "POLL_SECONDS", 0.01)
    made = long_silent(local_store, ttl_seconds=60)
    seen: list[tuple[State, bool]] = []

    class Drives(NoView):
        """Renews the lease once it was seen to be doubtful, and ends the run then."""

        def show(self, status: RunStatus) -> None:
            seen.append((status.situation.state, status.situation.is_doubtful))
            if len(seen) == 2:
                made.lease(renewed_at=time.time(), ttl_seconds=60, renewals=10)
            if len(seen) == 3:
                made.finish(State.STOPPED, attempt=1, step=120, time=START)

    view = Drives(Console(file=io.StringIO()))
    status = watch_run(RunReader(local_store, made.run_id), view=view)
    assert status.situation.state is State.STOPPED
    assert seen[:3] == [(State.RECOVERING, True)] * 2 + [(State.RUNNING, False)]


def test_the_watching_ends_where_a_silent_driver_does_not_renew_while_it_is_looked_at(
    local_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "POLL_SECONDS", 0.05)
    made = long_silent(local_store, ttl_seconds=0.2)
    view = NoView(Console(file=io.StringIO()))
    status = watch_run(RunReader(local_store, made.run_id), view=view)
    assert (status.situation.state, status.situation.exit_code) == (State.FAILED_INFRA, 3)


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        ([], ""),
        ([float("nan")], ""),
        ([1.0, 1.0], "▁▁"),
        ([0.0, 1.0, 2.0, 3.0], "▁▃▆█"),
        ([float(i) for i in range(1000)], "▁▂▃▄▅▆▇█"),
    ],
)
def test_a_sparkline_goes_from_lowest_to_highest(values: list[float], shown: str) -> None:
    assert sparkline(values, width=8) == shown
