"""Every trial to its end."""

from __future__ import annotations

from jobs.study.events import Decided, Event, Reported
from jobs.study.schedulers.scheduler import continued, finished


class Plain:
    """A Scheduler that stops nothing: a trial reports when it has had its full budget."""

    def __init__(self) -> None:
        self._fractions: dict[int, float] = {}

    def observe(self, event: Event) -> None:
        if isinstance(event, Reported):
            self._fractions[event.trial] = event.fraction
        elif isinstance(event, Decided):
            self._fractions.pop(event.trial, None)

    def bracket(self) -> int:
        return 0

    def first(self, bracket: int) -> float:
        return 1.0

    def decide(self, trial: int) -> Decided:
        if self._fractions[trial] >= 1.0:
            return finished(trial)
        return continued(trial, until=1.0, reason="every trial goes to its end")

    def next(self) -> None:
        return None

    def takes_new(self) -> bool:
        return True
