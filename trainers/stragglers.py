"""Ranks that keep the others waiting: the time that each needs for its own work, compared.

The times travel with the sums that are made for each entry of the metrics anyway.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from trainers.parallel import plain, trained_parameters

_PATIENCE = 5
"""Entries of the metrics in a row in which the same rank must cost the others time."""
_LEAST_SHARE = 0.1
"""Share of the wall clock that it must cost them in each."""
_LEAST_SECONDS = 1.0
"""What it must cost them in all of these together: shorter times are noise."""


class Stopwatch:
    """Time in which a rank computes, without what it waits for other ranks meanwhile.

    Under DDP ranks wait for each other in the last backward pass of a step alone, where gradients
    are averaged: of that pass the time counts until this rank has its own gradient of the first
    parameter, which comes last. Where no other rank is waited for nothing is measured; nor where
    the model is cut over the ranks, whose passes wait for each other everywhere.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self._is_on = isinstance(model, DistributedDataParallel)
        self._is_cuda = device.type == "cuda"
        self._spans: list[tuple[Any, Any]] = []
        self._has_gradients: Any = None
        if self._is_on:
            first = trained_parameters(plain(model))[0]
            first.register_hook(self._gradients_are_there)  # type: ignore[no-untyped-call]

    @contextmanager
    def running(self) -> Iterator[None]:
        """Counts what is done, or on a GPU enqueued, inside the block."""
        if not self._is_on:
            yield
            return
        began = self._now()
        yield
        self._spans.append((began, self._now()))

    @contextmanager
    def running_until_gradients(self) -> Iterator[None]:
        """Counts the block, a backward pass, for as long as this rank's own gradients take."""
        if not self._is_on:
            yield
            return
        self._has_gradients = None
        began = self._now()
        yield
        if self._has_gradients is not None:
            self._spans.append((began, self._has_gradients))

    def take(self) -> float:
        """Seconds since the last call; waits for the device."""
        spans, self._spans = self._spans, []
        if not self._is_cuda:
            return float(sum(end - began for began, end in spans))
        if spans:
            spans[-1][1].synchronize()
        return sum(float(began.elapsed_time(end)) for began, end in spans) / 1000

    def _gradients_are_there(self, gradient: torch.Tensor) -> None:
        self._has_gradients = self._now()

    def _now(self) -> Any:
        """A moment: seconds, or an event on the device's stream."""
        if not self._is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event


@dataclass(frozen=True)
class Busy:
    """Seconds that a rank needed for its own work since the last entry of the metrics."""

    reading: float
    """For its rows."""
    computing: float

    @property
    def seconds(self) -> float:
        return self.reading + self.computing


@dataclass(frozen=True)
class Straggler:
    """A rank that is slower than the others again and again."""

    rank: int
    lost_share: float
    """Share of the wall clock that it needed more than the median of the others, in the last
    entries of the metrics."""
    by: Literal["reading rows", "computing"]
    """With which of the two it was slower."""


class Stragglers:
    """Finds the rank, if any, that costs the others much time in several entries in a row."""

    def __init__(self) -> None:
        self._rank: int | None = None
        self._entries: deque[tuple[Busy, float]] = deque(maxlen=_PATIENCE)
        """What `_rank` needed more than the others, and seconds of wall clock; of each entry."""

    def look(self, busy: Sequence[Busy], *, wall_seconds: float) -> Straggler | None:
        """The straggler after another entry, from what each rank was busy with, by rank."""
        if len(busy) < 2:
            return None
        rank, lost = _slowest(busy)
        is_slow = lost.seconds >= _LEAST_SHARE * wall_seconds
        if not is_slow or rank != self._rank:
            self._entries.clear()
        self._rank = rank
        if is_slow:
            self._entries.append((lost, wall_seconds))
        reading = sum(lost.reading for lost, _ in self._entries)
        computing = sum(lost.computing for lost, _ in self._entries)
        if len(self._entries) < _PATIENCE or reading + computing < _LEAST_SECONDS:
            return None
        return Straggler(
            rank,
            lost_share=min(1.0, (reading + computing) / sum(wall for _, wall in self._entries)),
            by="reading rows" if reading > computing else "computing",
        )


def _slowest(busy: Sequence[Busy]) -> tuple[int, Busy]:
    """The slowest of several ranks, and what it needed more than the median of the others."""
    rank = max(range(len(busy)), key=lambda r: busy[r].seconds)
    others = [b for r, b in enumerate(busy) if r != rank]
    return rank, Busy(
        reading=busy[rank].reading - statistics.median(b.reading for b in others),
        computing=busy[rank].computing - statistics.median(b.computing for b in others),
    )
