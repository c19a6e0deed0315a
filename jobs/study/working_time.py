"""How long a study was worked on."""

from __future__ import annotations

from jobs.study.events import Event, Resumed


class WorkingTime:
    """Wall seconds in which a driver worked on the study, from its events."""

    def __init__(self) -> None:
        self.seconds = 0.0
        """Up to the last event."""
        self.last_at: float | None = None
        """Unix seconds of the last event; None before the first."""

    def observe(self, event: Event) -> None:
        """Takes note of the next event of the log."""
        if not event.at:
            return
        if not isinstance(event, Resumed):
            self.seconds = self.until(event.at)
        self.last_at = event.at

    def until(self, now: float) -> float:
        """Seconds if the driver of the last event has worked on up to `now`, in Unix seconds."""
        if self.last_at is None:
            return self.seconds
        return self.seconds + max(0.0, now - self.last_at)
