"""Hyperband (Li et al. 2017, "Hyperband: A Novel Bandit-Based Approach to Hyperparameter
Optimization", Algorithm 1), with trials that go on instead of beginning anew at each rung."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

from jobs import search_spec
from jobs.study.events import Asked, Decided, Event, Extended, Failed, Reported
from jobs.study.schedulers.rungs import rung_fractions
from jobs.study.schedulers.scheduler import Objective, continued, finished, paused, stopped


@dataclass(frozen=True, kw_only=True)
class BracketPlan:
    """One run of successive halving."""

    num_trials: int
    fractions: tuple[float, ...]
    """Of its rungs, the last 1.0."""


def bracket_plans(given: search_spec.Hyperband) -> list[BracketPlan]:
    """The paper's brackets s_max..0; after the last, a study begins with the first again.

    n = ceil(B / R * eta**s / (s + 1)) with B = (s_max + 1) * R, and r = R * eta**-s. The
    first rung of the first bracket is the paper's 1/R; it recommends an eta of 3 or 4.
    """
    eta = given.reduction_factor
    fractions = rung_fractions(given)
    num_brackets = len(fractions)
    return [
        BracketPlan(
            num_trials=-(-num_brackets * eta**s // (s + 1)),
            fractions=fractions[num_brackets - 1 - s :],
        )
        for s in reversed(range(num_brackets))
    ]


class Hyperband:
    """A Scheduler: brackets are filled one after another in the order of the trials, and each rung
    is decided once all of its bracket's trials have reached it or failed.

    Brackets overlap: a slot that is free while a rung is incomplete begins trials of the next. The
    last bracket may get fewer trials than planned. Its rungs are decided with those it has, and at
    least one goes on. It stays as it is if the study is given more trials afterwards.
    """

    def __init__(self, given: search_spec.Hyperband, *, objective: Objective, trials: int) -> None:
        """`trials`: how many the study is to have."""
        self._reduction_factor = given.reduction_factor
        self._plans = bracket_plans(given)
        self._objective = objective
        self._trials = trials
        self._num_asked = 0
        self._filling = 0
        self._brackets: dict[int, _Bracket] = {}
        self._bracket_of: dict[int, int] = {}
        self._undecided: dict[int, float] = {}
        """Fraction of each trial that has reported and was not yet decided on."""
        self._settled: OrderedDict[int, Decided] = OrderedDict()
        """What became of the trials of complete rungs, until the log has it."""

    def observe(self, event: Event) -> None:
        if isinstance(event, Asked) and event.purpose == "search":
            self._ask(event)
        elif isinstance(event, Extended):
            self._trials = event.trials
            self._settle(self._filling)
        elif isinstance(event, Reported | Decided | Failed) and event.trial in self._bracket_of:
            if isinstance(event, Reported):
                self._report(event)
            elif isinstance(event, Failed) or event.decision == "stop":
                self._stop(event.trial)
            else:
                self._undecided.pop(event.trial, None)
                if event.decision != "pause":
                    self._settled.pop(event.trial, None)
                if event.decision == "finish":
                    del self._bracket_of[event.trial]

    def bracket(self) -> int:
        return self._filling

    def first(self, bracket: int) -> float:
        return self._plan(bracket).fractions[0]

    def decide(self, trial: int) -> Decided:
        if self._undecided[trial] >= 1.0:
            return finished(trial)
        if trial in self._settled:
            return self._settled[trial]
        bracket = self._brackets[self._bracket_of[trial]]
        return paused(trial, reason=f"{bracket.rung_name} is not complete")

    def next(self) -> Decided | None:
        return next((d for t, d in self._settled.items() if t not in self._undecided), None)

    def takes_new(self) -> bool:
        return True

    def _plan(self, bracket: int) -> BracketPlan:
        return self._plans[bracket % len(self._plans)]

    def _ask(self, event: Asked) -> None:
        self._num_asked += 1
        self._bracket_of[event.trial] = event.bracket
        bracket = self._brackets.setdefault(
            event.bracket, _Bracket(event.bracket, self._plan(event.bracket))
        )
        bracket.size += 1
        if bracket.size == bracket.plan.num_trials:
            self._filling = event.bracket + 1

    def _report(self, event: Reported) -> None:
        self._undecided[event.trial] = event.fraction
        number = self._bracket_of[event.trial]
        self._brackets[number].reports.append(
            (self._objective.cost(event), event.trial, event.fraction)
        )
        self._settle(number)

    def _stop(self, trial: int) -> None:
        """One that failed, or that others stopped, counts as the worst of the rung it was to reach;
        those that their rung drops are in none any more."""
        self._undecided.pop(trial, None)
        number = self._bracket_of.pop(trial)
        settled = self._settled.pop(trial, None)
        if settled is not None and settled.decision == "stop":
            return
        bracket = self._brackets.get(number)
        if bracket is None:
            return
        bracket.reports = [report for report in bracket.reports if report[1] != trial]
        bracket.num_failed += 1
        self._settle(number)

    def _settle(self, number: int) -> None:
        """Decide the rung that a bracket is at, if it is complete, and the next ones, which may be
        complete at once: by trials that ended early or have gone beyond them."""
        bracket = self._brackets.get(number)
        while bracket is not None and self._is_complete(bracket):
            self._filling = max(self._filling, number + 1)
            if bracket.rung == len(bracket.plan.fractions) - 1:
                del self._brackets[number]
                return
            self._halve(bracket)

    def _is_complete(self, bracket: _Bracket) -> bool:
        is_full = bracket.number < self._filling or self._num_asked >= self._trials
        return is_full and len(bracket.reports) + bracket.num_failed == bracket.size

    def _halve(self, bracket: _Bracket) -> None:
        num_kept = max(1, bracket.size // self._reduction_factor)
        ranked = sorted(bracket.reports)
        kept, dropped = ranked[:num_kept], ranked[num_kept:]
        what = f"the best {len(kept)} of {bracket.size} of {bracket.rung_name}"
        bracket.rung += 1
        bracket.size, bracket.num_failed = len(kept), 0
        until = bracket.fraction
        bracket.reports = [report for report in kept if report[2] >= until]
        for _, trial, fraction in kept:
            if fraction < until:
                self._settled[trial] = continued(trial, until=until, reason=f"among {what}")
        for _, trial, fraction in dropped:
            if fraction < 1.0:
                self._settled[trial] = stopped(trial, reason=f"not among {what}")


@dataclass(slots=True)
class _Bracket:
    number: int
    plan: BracketPlan
    size: int = 0
    """Trials that are to reach the rung, those that failed on the way to it included."""
    rung: int = 0
    reports: list[tuple[float, int, float]] = field(default_factory=list)
    """(cost, trial, fraction) of those that have reached it."""
    num_failed: int = 0

    @property
    def fraction(self) -> float:
        return self.plan.fractions[self.rung]

    @property
    def rung_name(self) -> str:
        return f"bracket {self.number} at {self.fraction:.3g} of the budget"
