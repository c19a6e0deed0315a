"""When a search asks for no more trials before it has made all of them."""

from __future__ import annotations

from dataclasses import dataclass

from jobs.search_spec import Search
from jobs.study.events import Asked, Closed, Decided, Event, Extended, Failed, Reported
from jobs.study.score import WORST, score_of
from jobs.study.working_time import WorkingTime


@dataclass(frozen=True)
class UsedUp:
    """A limit of `search.budget` that is reached."""

    path: str
    """Of its key in the job file."""
    limit: float

    @property
    def message(self) -> str:
        return f"{self.path} ({self.limit:g}) is used up"


class Budget:
    """What a search has spent, from its events."""

    def __init__(self, search: Search, *, gpus: float) -> None:
        """`gpus` is how many a trial holds, which may be a part of one."""
        self._search = search
        self._gpus = gpus
        self._worked = WorkingTime()
        self._epochs: dict[int, float] = {}
        self.epochs = 0.0
        """Of all trials; what a clone has of its donor is not counted again."""
        self.seconds = 0.0
        """Of trials on slots."""
        self._is_closed = False
        """Whether the search has ended; what comes then does not make it go on."""
        self._frontier: list[tuple[float, float]] = []
        """(fraction, score) of reports when none had as good a score with as much of its budget, or
        with less."""
        self._counted: set[int] = set()
        """Trials that have improved on it, or were left without."""
        self._without_gain = 0
        """Trials that were left one after the other without improving on it, since the study was
        extended last."""

    def observe(self, event: Event) -> None:
        self._worked.observe(event)
        if isinstance(event, Asked) and event.donor is not None:
            self._epochs[event.trial] = self._epochs.get(event.donor.trial, 0.0)
        elif isinstance(event, Reported):
            self.epochs += event.epochs - self._epochs.get(event.trial, 0.0)
            self.seconds += event.seconds
            self._epochs[event.trial] = event.epochs
            self._judge(event)
        elif isinstance(event, Failed) or (
            isinstance(event, Decided) and event.decision != "continue"
        ):
            self._leave(event.trial)
        elif isinstance(event, Closed):
            self._is_closed = True
        elif isinstance(event, Extended):
            self._is_closed, self._without_gain = False, 0

    def exhausted(self, *, now: float) -> str | None:
        """Why the search is to end, as a sentence; `now` in Unix seconds."""
        patience = self._search.patience
        if (used_up := self.used_up(now=now)) is not None:
            return used_up.message
        if patience is not None and self._without_gain >= patience:
            return f"{self._without_gain} trials in a row have not improved the best"
        return None

    def used_up(self, *, now: float) -> UsedUp | None:
        """Which limit of `search.budget` is reached, if any; of hours, at least by the last event.
        An extension does not lift it, as it does that of patience."""
        budget = self._search.budget
        hours = self._worked.until(now) / 3600
        gpu_hours = self.seconds * self._gpus / 3600
        for key, limit, spent in (
            ("epochs", budget.epochs, self.epochs),
            ("gpu_hours", budget.gpu_hours, gpu_hours),
            ("hours", budget.hours, hours),
        ):
            if limit is not None and spent >= limit:
                return UsedUp(f"search.budget.{key}", limit)
        return None

    def _judge(self, reported: Reported) -> None:
        """Whether a trial has improved the best: what has had a part of its budget is not held
        against those that had all of theirs."""
        fraction, score = reported.fraction, score_of(reported, self._search)
        if score > max((s for f, s in self._frontier if f <= fraction), default=WORST):
            others = [(f, s) for f, s in self._frontier if f < fraction or s > score]
            self._frontier = [*others, (fraction, score)]
            self._counted.add(reported.trial)
            self._without_gain = self._without_gain if self._is_closed else 0

    def _leave(self, trial: int) -> None:
        """One that is promoted may improve the best later, but counts once where it does not."""
        if trial not in self._counted:
            self._counted.add(trial)
            self._without_gain += 1
