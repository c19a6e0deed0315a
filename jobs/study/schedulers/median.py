"""The median stopping rule (Golovin et al. 2017, "Google Vizier: A Service for Black-Box
Optimization", section 3.2.2)."""

from __future__ import annotations

import math
from array import array
from bisect import bisect_left, insort
from dataclasses import dataclass

from jobs.search_spec import MedianStopping
from jobs.study.events import Asked, Decided, Event, Failed, Reported
from jobs.study.schedulers.scheduler import Objective, continued, finished, stopped

NUM_BINS = 100
"""Trials are compared at hundredths of the budget."""
_MOMENT = 1e-6
"""Fraction of the budget by which an evaluation is surely later than the one before."""


class Median:
    """A Scheduler: stops a trial whose best value so far is worse than the median of the others'
    running means, at the same hundredth of the budget.

    A trial reports every evaluation. The running mean of a trial at a hundredth is that of all its
    evaluations up to the end of it, and exists once the trial has come there. It is infinitely bad
    from an evaluation on that is no number. The paper has neither `first` nor `startup_trials`.
    """

    def __init__(self, given: MedianStopping, *, objective: Objective) -> None:
        self._given = given
        self._objective = objective
        self._living: dict[int, _Curve] = {}
        self._means = [array("d") for _ in range(NUM_BINS + 1)]
        """Running means at each hundredth of all trials that have come there, sorted."""

    def observe(self, event: Event) -> None:
        if isinstance(event, Asked) and event.purpose == "search":
            self._living[event.trial] = _Curve()
        elif isinstance(event, Reported) and event.trial in self._living:
            self._report(self._living[event.trial], event)
        elif isinstance(event, Failed) or (
            isinstance(event, Decided) and event.decision in ("stop", "finish")
        ):
            self._living.pop(event.trial, None)

    def bracket(self) -> int:
        return 0

    def first(self, bracket: int) -> float:
        return _MOMENT

    def decide(self, trial: int) -> Decided:
        curve = self._living[trial]
        if curve.fraction >= 1.0:
            return finished(trial)
        until = min(1.0, round(curve.fraction + _MOMENT, 6))
        if curve.fraction < self._given.first:
            return continued(trial, until=until, reason="in its period of grace")
        means = self._means[curve.bin]
        num_others = len(means) - 1
        if num_others < self._given.startup_trials:
            return continued(trial, until=until, reason=f"{num_others} others have come as far")
        of_what = f"the median of {num_others} others at {curve.bin / NUM_BINS:.2f} of the budget"
        if curve.cost > _median_without(means, curve.mean):
            return stopped(trial, reason=f"worse than {of_what}")
        return continued(trial, until=until, reason=f"not worse than {of_what}")

    def next(self) -> None:
        return None

    def takes_new(self) -> bool:
        return True

    def _report(self, curve: _Curve, event: Reported) -> None:
        reached = min(NUM_BINS, math.ceil(event.fraction * NUM_BINS - 1e-9))
        if curve.num_values:
            if reached == curve.bin:
                means = self._means[reached]
                del means[bisect_left(means, curve.mean)]
            for means in self._means[curve.bin + 1 : reached]:
                insort(means, curve.mean)
        curve.total += self._objective.cost_of(event.value)
        curve.num_values += 1
        curve.bin, curve.fraction = reached, event.fraction
        curve.cost = self._objective.cost(event)
        insort(self._means[reached], curve.mean)


def _median_without(ordered: array[float], value: float) -> float:
    """The median of sorted numbers, at least two, of which one that equals `value` is left out."""
    left_out = bisect_left(ordered, value)
    num_others = len(ordered) - 1
    lower, upper = (
        ordered[index if index < left_out else index + 1]
        for index in ((num_others - 1) // 2, num_others // 2)
    )
    return lower if lower == upper else (lower + upper) / 2


@dataclass(slots=True)
class _Curve:
    """A trial that is not over."""

    bin: int = 0
    fraction: float = 0.0
    cost: float = math.inf
    total: float = 0.0
    """Of the costs of its evaluations."""
    num_values: int = 0

    @property
    def mean(self) -> float:
        return self.total / self.num_values
