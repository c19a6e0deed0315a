"""Asynchronous successive halving, which promotes (Li et al. 2018, "A System for Massively Parallel
Hyperparameter Tuning", Algorithm 2)."""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from dataclasses import dataclass, field
from typing import Literal

from jobs.search_spec import ASHA
from jobs.study.events import Asked, Decided, Event, Extended, Failed, Reported
from jobs.study.schedulers.rungs import rung_fractions
from jobs.study.schedulers.scheduler import Objective, continued, finished, paused, stopped

Entry = tuple[float, int]
"""(cost, trial), in the order of a rung: the best first, of equal ones the earlier trial."""


class Asha:
    """A Scheduler: a trial waits at a rung until it is among the best 1/reduction_factor of those
    that have reached it; free slots go to the topmost rung that has such a trial.

    A trial that is among them when it reports goes on at once. A failed trial counts as the worst
    of the rung that it did not reach. Trials that are over keep their places in the rungs. The
    default reduction factor is the paper's.
    """

    def __init__(self, given: ASHA, *, objective: Objective, trials: int) -> None:
        """`trials`: how many the study is to have."""
        self._fractions = rung_fractions(given)
        self._rungs = [_Rung(given.reduction_factor) for _ in self._fractions]
        self._objective = objective
        self._trials = trials
        self._num_asked = 0
        self._living: dict[int, _Living] = {}

    def observe(self, event: Event) -> None:
        if isinstance(event, Asked) and event.purpose == "search":
            self._num_asked += 1
            self._living[event.trial] = _Living()
            self._rungs[0].num_underway += 1
        elif isinstance(event, Extended):
            self._trials = event.trials
        elif isinstance(event, Reported | Decided | Failed) and event.trial in self._living:
            living = self._living[event.trial]
            if isinstance(event, Reported):
                self._report(living, event)
            else:
                self._leave(living, event.trial)
                self._arrive(living, event)

    def bracket(self) -> int:
        return 0

    def first(self, bracket: int) -> float:
        return self._fractions[0]

    def decide(self, trial: int) -> Decided:
        living = self._living[trial]
        if living.fraction >= 1.0:
            return finished(trial)
        if self._rungs[living.rung].promotes((living.cost, trial)):
            return self._promotion(trial, living.rung)
        return paused(trial, reason=f"not among {self._best_of(living.rung)}")

    def next(self) -> Decided | None:
        """The best trial that may be promoted, of the topmost rung that has one. Where there is
        none, the worst of a rung that no other trial can come to any more is told to stop."""
        for index in reversed(range(len(self._rungs) - 1)):
            rung = self._rungs[index]
            if rung.waiting and rung.promotes(rung.waiting[0]):
                return self._promotion(rung.waiting[0][1], index)
        if self._num_asked >= self._trials:
            for index, rung in enumerate(self._rungs):
                if rung.num_underway:
                    break
                if rung.waiting:
                    reason = f"not among {self._best_of(index)}, and no other trial comes to it"
                    return stopped(rung.waiting[-1][1], reason=reason)
        return None

    def takes_new(self) -> bool:
        return True

    def _report(self, living: _Living, event: Reported) -> None:
        """A report counts in all rungs that the trial has reached since the one before."""
        reached = max(living.rung, bisect_right(self._fractions, event.fraction) - 1)
        living.fraction, living.cost = event.fraction, self._objective.cost(event)
        for rung in self._rungs[living.rung : reached + 1]:
            insort(rung.entries, (living.cost, event.trial))
        self._rungs[living.rung].num_underway -= 1
        self._rungs[reached].num_underway += 1
        living.rung, living.state = reached, "reported"

    def _leave(self, living: _Living, trial: int) -> None:
        rung = self._rungs[living.rung]
        if living.state == "paused":
            del rung.waiting[bisect_left(rung.waiting, (living.cost, trial))]
        else:
            rung.num_underway -= 1

    def _arrive(self, living: _Living, event: Decided | Failed) -> None:
        if isinstance(event, Failed):
            if living.state == "underway":
                self._rungs[living.rung].num_failed += 1
            del self._living[event.trial]
        elif event.decision == "pause":
            living.state = "paused"
            insort(self._rungs[living.rung].waiting, (living.cost, event.trial))
        elif event.decision == "continue":
            living.state = "underway"
            living.rung += 1
            self._rungs[living.rung].num_underway += 1
        else:
            del self._living[event.trial]

    def _promotion(self, trial: int, rung: int) -> Decided:
        return continued(
            trial, until=self._fractions[rung + 1], reason=f"among {self._best_of(rung)}"
        )

    def _best_of(self, index: int) -> str:
        rung = self._rungs[index]
        return (
            f"the best {rung.num_promotable} of {rung.size} at {self._fractions[index]:.3g} of "
            "the budget"
        )


@dataclass(slots=True)
class _Living:
    """A trial that is not over."""

    rung: int = 0
    """That it is on its way to, or has reached."""
    state: Literal["underway", "reported", "paused"] = "underway"
    fraction: float = 0.0
    cost: float = 0.0


@dataclass(slots=True)
class _Rung:
    reduction_factor: int
    entries: list[Entry] = field(default_factory=list)
    """Of all trials that have reached the rung, sorted."""
    waiting: list[Entry] = field(default_factory=list)
    """Of those that are paused here, sorted."""
    num_failed: int = 0
    """On their way to the rung."""
    num_underway: int = 0
    """On their way to the rung, or not yet decided on since they have reached it."""

    @property
    def size(self) -> int:
        return len(self.entries) + self.num_failed

    @property
    def num_promotable(self) -> int:
        return self.size // self.reduction_factor

    def promotes(self, entry: Entry) -> bool:
        return bisect_left(self.entries, entry) < self.num_promotable
