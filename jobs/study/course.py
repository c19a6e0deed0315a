"""How a study has gone until now, for people: what `jobs.study.trials` need not keep."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from jobs.study.events import Asked, Decided, Event, Extended, Failed, Reported
from jobs.study.working_time import WorkingTime


class Course:
    """Every report, when trials ended, what was searched, and how long the study was worked on."""

    def __init__(self, events: Iterable[Event] = ()) -> None:
        self.reports: dict[int, list[Reported]] = {}
        """Of each trial, in order; of a clone, its own."""
        self.ended_at: dict[int, float] = {}
        """Unix seconds; of a trial that began again after its end, of that end."""
        self.spaces: list[dict[str, Any]] = []
        """Those that the study was given after its job's, as plain values; the newest is last."""
        self.worked = WorkingTime()
        for event in events:
            self.observe(event)

    def observe(self, event: Event) -> None:
        """Takes note of the next event of the log."""
        self.worked.observe(event)
        match event:
            case Asked():
                self.reports[event.trial] = []
            case Reported():
                self.reports[event.trial].append(event)
            case Decided(decision="stop" | "finish") | Failed():
                self.ended_at[event.trial] = event.at
            case Extended(space=dict(space)):
                self.spaces.append(space)
