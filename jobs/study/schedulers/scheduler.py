"""What a study's engine asks of every scheduler, and what of two scores is the better."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Protocol

from jobs.study.events import Asked, Decided, Event, Reported


class Scheduler(Protocol):
    """Decides how long trials go on. Only `observe` changes state; all else may be asked at will.

    Trials are told apart by number. Finalists are not a scheduler's: their events are passed over,
    and `decide` is not asked about them.
    """

    def observe(self, event: Event) -> None:
        """Each event of the log once, in its order, live and replayed alike."""

    def bracket(self) -> int:
        """Of the trial that is asked for next."""

    def first(self, bracket: int) -> float:
        """Fraction of the budget at which a new trial of `bracket`, or a clone, first reports."""

    def decide(self, trial: int) -> Decided:
        """For a trial whose newest report has been observed, and was not yet decided on."""

    def next(self) -> Decided | Asked | None:
        """What comes before new trials where a slot is free.

        A paused trial that goes on ("continue") or that is not to ("stop"), or a clone to be made,
        whose values are final. None: no trial waits for a decision. The caller observes what it
        gets, and asks again.
        """

    def takes_new(self) -> bool:
        """Whether a new trial may begin now."""


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What is wanted of the study's metric."""

    mode: Literal["min", "max"]
    score: Literal["best", "last"] = "best"
    """Which of a trial's evaluations up to now counts."""

    def cost(self, report: Reported) -> float:
        """The trial's score as a number of which the smaller is better; infinite for none."""
        return self.cost_of(report.best if self.score == "best" else report.value)

    def cost_of(self, value: float | None) -> float:
        """A value of the metric as such a number; infinite for None and for what is not finite."""
        if value is None or not math.isfinite(value):
            return math.inf
        return value if self.mode == "min" else -value


def continued(trial: int, *, until: float, reason: str) -> Decided:
    return Decided(trial=trial, decision="continue", until=until, reason=reason)


def paused(trial: int, *, reason: str) -> Decided:
    return Decided(trial=trial, decision="pause", reason=reason)


def stopped(trial: int, *, reason: str) -> Decided:
    return Decided(trial=trial, decision="stop", reason=reason)


def finished(trial: int) -> Decided:
    return Decided(trial=trial, decision="finish", reason="it has had its full budget")
