"""Which rank keeps the others waiting, and when that is worth telling."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from rich.console import Console, RenderableType
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from jobs.runs import RunReader
from jobs.status import read_status
from jobs.status_view import status_renderable
from tests.ranks import assignment_of, on_ranks, run_ranks
from tests.scene import Scene
from trainers.data.stream import RankBatch, RankStream
from trainers.session import Session
from trainers.stragglers import Busy, Stopwatch, Straggler, Stragglers

NAP_SECONDS = 0.05
WALL_SECONDS = 10.0


class Slow(nn.Module):
    """Passes its input on, late on one rank: in the forward pass and again in the backward pass."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        time.sleep(self.seconds)
        values = values.clone()
        values.register_hook(self.nap)
        return values

    def nap(self, gradient: torch.Tensor) -> None:
        time.sleep(self.seconds)


def seconds_of_a_step(session: Session) -> float:
    """What a rank's own work takes, where that of rank 1 takes two naps longer."""
    slow = Slow(NAP_SECONDS if session.rank == 1 else 0.0)
    model = DistributedDataParallel(nn.Sequential(nn.Linear(4, 4), slow, nn.Linear(4, 1)))
    stopwatch = Stopwatch(model, torch.device("cpu"))
    for _ in range(2):  # the first step waits until the other rank has set up its model
        stopwatch.take()
        with stopwatch.running():
            loss = model(torch.ones(2, 4)).sum()
        with stopwatch.running_until_gradients():
            loss.backward()
    return stopwatch.take()


def test_a_rank_that_waits_for_a_slow_one_in_the_backward_pass_is_not_taken_for_slow() -> None:
    quick, slow = on_ranks(seconds_of_a_step, world_size=2)
    assert slow >= 2 * NAP_SECONDS
    assert quick < 2 * NAP_SECONDS


def test_one_rank_waits_for_nobody_and_measures_nothing() -> None:
    model = nn.Linear(4, 1)
    stopwatch = Stopwatch(model, torch.device("cpu"))
    with stopwatch.running():
        loss = model(torch.ones(2, 4)).sum()
    with stopwatch.running_until_gradients():
        loss.backward()
    assert stopwatch.take() == 0


# ------------------------------------------------------------------------------- what is told


def found(
    entries: list[tuple[int, float]], *, wall_seconds: float = WALL_SECONDS, reads: bool = False
) -> list[Straggler]:
    """The stragglers after each entry, of which each gives a slow rank and the seconds it loses."""
    watch = Stragglers()
    result = []
    for slow, lost in entries:
        ranks = [Busy(reading=2.0, computing=3.0)] * 3
        ranks[slow] = Busy(reading=2.0 + lost * reads, computing=3.0 + lost * (not reads))
        result.append(watch.look(ranks, wall_seconds=wall_seconds))
    return [straggler for straggler in result if straggler]


def test_a_rank_that_is_slow_again_and_again_is_found_with_what_it_costs() -> None:
    assert found([(2, 3.0)] * 7) == [Straggler(2, lost_share=0.3, by="computing")] * 3
    assert found([(1, 2.0)] * 5, reads=True) == [Straggler(1, lost_share=0.2, by="reading rows")]


@pytest.mark.parametrize(
    "entries",
    [
        [(2, 3.0)] * 4,
        [(0, 3.0), (1, 3.0)] * 10,
        [(2, 0.9)] * 20,
        ([(2, 3.0)] * 4 + [(2, 0.1)]) * 3,
    ],
    ids=["too few", "in turn", "a small share of the time", "with pauses"],
)
def test_what_evens_out_is_not_told(entries: list[tuple[int, float]]) -> None:
    assert found(entries) == []


def test_milliseconds_are_noise() -> None:
    assert found([(1, 0.1)] * 50, wall_seconds=0.2) == []


def test_one_rank_has_nobody_to_be_compared_with() -> None:
    watch = Stragglers()
    assert all(watch.look([Busy(9.0, 9.0)], wall_seconds=1.0) is None for _ in range(20))


# ------------------------------------------------------------------------------- in a whole run


def shown(renderable: RenderableType) -> str:
    console = Console(width=200)
    with console.capture() as captured:
        console.print(renderable)
    return captured.get()


def rank_one_reads_slowly() -> None:
    """Each batch of rank 1 comes a quarter of a second late."""
    if os.environ["RANK"] != "1":
        return
    batches = RankStream.batches

    def late(*args: Any, **kwargs: Any) -> Iterator[RankBatch]:
        for batch in batches(*args, **kwargs):
            time.sleep(0.25)
            yield batch

    RankStream.batches = late  # type: ignore[method-assign]


def test_a_slow_rank_is_named_in_the_metrics_in_a_warning_and_in_the_status(scene: Scene) -> None:
    spec = scene.job(workers={"count": 2})
    run_ranks(assignment_of(spec, "run"), world_size=2, before=rank_one_reads_slowly)
    reader = RunReader(scene.runs, "run")
    lines = [line for line in reader.metrics() if line["kind"] == "train"]
    # Its micro-batches cost no more than those of the other one, whatever it does besides.
    assert all(0 <= line["imbalance"] < 0.3 for line in lines)
    assert any(line["imbalance"] > 0 for line in lines), "two ranks never have as many tokens"
    told = [line["straggler"] for line in lines if "straggler" in line]
    assert told
    assert {(s["rank"], s["by"]) for s in told} == {(1, "reading rows")}
    assert all(0.1 < s["lost_share"] <= 1 for s in told)
    warnings = [e["message"] for e in reader.events() if e["event"] == "warning"]
    (warning,) = [w for w in warnings if "keeps the others waiting" in w]
    assert warning.startswith("rank 1 on ")
    assert warning.endswith(" of the time, by reading rows")

    status = read_status(reader)
    slowed = next(line for line in reversed(lines) if "straggler" in line)
    live = replace(status, train=slowed, situation=replace(status.situation, is_over=False))
    assert live.to_json()["straggler"] == told[-1]
    assert told[-1]["message"] in shown(status_renderable(live))
    over = replace(live, situation=replace(status.situation, is_over=True))
    assert "keeps the others waiting" not in shown(status_renderable(over))
