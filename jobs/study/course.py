"""How a study has gone until now, for people: what `jobs.study.trials` need not keep."""

from __future__ import annotations

from collections.abc import Iterable

from jobs.study.events import Asked, Decided, Event, Extended, Failed, Lost, Reported


class Course:
    """Every report, when trials ended, and how long the study was worked on."""

    def __init__(self, events: Iterable[Event] = ()) -> None:
        self.reports: dict[int, list[Reported]] = {}
        """Of each trial, in order; of a clone, its own."""
        self.ended_at: dict[int, float] = {}
        """Unix seconds; of a trial that began again after its end, of that end."""
        self.seconds = 0.0
        """In which a driver worked on the study, up to the last event."""
        self.last_at: float | None = None
        """Time of the last event."""
        for event in events:
            self.observe(event)

    def observe(self, event: Event) -> None:
        """Takes note of the next event of the log."""
        if event.at:
            # The next driver says first which trials the one before it has left.
            no_driver = isinstance(event, Extended) or (
                isinstance(event, Lost) and not event.counts
            )
            if self.last_at is not None and not no_driver:
                self.seconds += max(0.0, event.at - self.last_at)
            self.last_at = event.at
        match event:
            case Asked():
                self.reports[event.trial] = []
            case Reported():
                self.reports[event.trial].append(event)
            case Decided(decision="stop" | "finish") | Failed():
                self.ended_at[event.trial] = event.at
