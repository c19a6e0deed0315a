"""The live view, drawn for a terminal that is none."""

from __future__ import annotations

import io

import pytest
from rich.console import Console
from synthetic import START, SyntheticRun, running, succeeded

from cluster.storage import Store
from jobs.runs import RunReader
from jobs.status import read_status
from jobs.watch import LineView, live_renderable, sparkline


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
