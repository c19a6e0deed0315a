"""What the log tells of the values that were tried: where the samplers that learn look."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from jobs.search_spec import Search
from jobs.study.events import Asked, Decided, Event, Failed, Reported, Values
from jobs.study.score import WORST, score_of
from jobs.study.space import Space


@dataclass
class Progress:
    """How far one trial has come."""

    fraction: float = 0.0
    score: float | None = None
    """Its newest; None before the first report."""
    is_decided: bool = False
    """Whether it has been stopped, finished, failed, or left waiting at least once."""
    is_finished: bool = False


@dataclass
class Tried:
    """Values that were tried, by one trial or by one for each seed."""

    trial: int
    """The first trial that had them."""
    values: Values
    progress: dict[int, Progress] = field(default_factory=dict)
    """Of each trial that has them."""

    @property
    def score(self) -> float | None:
        """The mean of the trials' newest scores; None where none of them has one."""
        scores = [p.score for p in self.progress.values() if p.score is not None]
        return math.fsum(scores) / len(scores) if scores else None

    @property
    def fraction(self) -> float:
        """How far the score reaches: the fraction of the trial that has come least far."""
        return min(p.fraction for p in self.progress.values() if p.score is not None)

    @property
    def is_finished(self) -> bool:
        """Whether each trial has had its full budget."""
        return all(p.is_finished for p in self.progress.values())


class History:
    """The values that a space holds and that were tried, by the number of their first trial.

    Clones are left out, because their scores are their donors' as well, and so are finalists, and
    trials that were lost to the platform, of which no values are to blame.
    """

    def __init__(self, search: Search, space: Space) -> None:
        self.tried: dict[int, Tried] = {}
        self._search = search
        self._space = space
        self._of: dict[int, Tried] = {}

    def observe(self, event: Event) -> Tried | None:
        """Takes in one event of the log; the values that it tells of, if it tells of any."""
        if isinstance(event, Asked):
            return self._asked(event)
        if not isinstance(event, Reported | Decided | Failed) or event.trial not in self._of:
            return None
        tried = self._of[event.trial]
        progress = tried.progress[event.trial]
        match event:
            case Reported():
                progress.fraction = event.fraction
                progress.score = score_of(event, self._search)
            case Decided():
                progress.is_decided |= event.decision != "continue"
                progress.is_finished |= event.decision == "finish"
            case Failed() if not event.failure.state.ends_retries:
                del tried.progress[event.trial], self._of[event.trial]
                if not tried.progress:
                    del self.tried[tried.trial]
                    return None
            case Failed():
                progress.score = WORST
                progress.is_decided = progress.is_finished = True
        return tried

    def _asked(self, event: Asked) -> Tried | None:
        if event.donor is not None or event.purpose != "search":
            return None
        first = event.trial if event.repeats is None else event.repeats
        if event.repeats is None and self._space.holds(event.values):
            self.tried[first] = Tried(first, event.values)
        tried = self.tried.get(first)
        if tried is not None:
            tried.progress[event.trial] = Progress()
            self._of[event.trial] = tried
        return tried
