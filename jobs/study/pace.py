"""How fast a study goes, and about how long it will take. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from jobs.search_spec import Search
from jobs.study.trials import ENDED, Purpose, Trial, Trials


@dataclass(frozen=True)
class Pace:
    """What a study has spent, how fast, and what is left of it."""

    search: Search
    trials: Trials
    seconds: float
    """In which the study was worked on."""
    epochs_of_trial: float
    """A trial's full budget."""
    gpus: float
    """Of a trial."""
    epochs_now: Mapping[int, float]
    """Of trials on slots, which have come further than their last report; by number."""

    @property
    def epochs(self) -> float:
        """Epochs of training in all trials; a clone has its donor's from there."""
        return self.search_epochs + sum(map(self._epochs, self._of("finalist")))

    @property
    def search_epochs(self) -> float:
        """Those of the search's trials, which its budget bounds."""
        return sum(map(self._epochs, self._of("search")))

    @property
    def gpu_hours(self) -> float:
        """Of trials up to their last reports."""
        return self.search_gpu_hours + self._gpu_hours("finalist")

    @property
    def search_gpu_hours(self) -> float:
        """Those of the search's trials, which its budget bounds."""
        return self._gpu_hours("search")

    @property
    def trials_per_hour(self) -> float | None:
        """Trials that ended or were paused; None before the first."""
        settled = sum(map(_is_settled, self.trials.by_number.values()))
        return settled * 3600 / self.seconds if settled and self.seconds else None

    @property
    def eta_seconds(self) -> float | None:
        """About how long the study still takes, if the rest of it goes as the part before.

        What is left is counted in epochs: what trials took on average until they ended or were
        paused, for each that does not exist yet, and the full budget of each finalist, those of the
        job's own values included. None until that average is known. With few trials left fewer run
        at a time, which is not reckoned.
        """
        rate = self.epochs / self.seconds if self.seconds else 0.0
        left = self._epochs_left()
        if left is None or not rate:
            return None
        return self._within_budget(left / rate) + self._finalists_left() / rate

    def _epochs_left(self) -> float | None:
        """Of the search."""
        if self.trials.closed is not None:
            return 0.0
        if self.search.clones:
            return max(0.0, self.trials.wanted * self.epochs_of_trial - self.search_epochs)
        searched = self._of("search")
        settled = [self._epochs(trial) for trial in searched if _is_settled(trial)]
        if not settled:
            return None
        mean = sum(settled) / len(settled)
        unborn = self.trials.wanted * self.search.repeats - len(searched)
        begun = sum(max(0.0, mean - self._epochs(t)) for t in searched if not _is_settled(t))
        return max(0, unborn) * mean + begun

    def _finalists_left(self) -> float:
        finalists = self.search.finalists
        if finalists is None:
            return 0.0
        chosen = self.trials.for_finalists()
        had = [self.trials.finalists_of.get(trial.of, 0) for trial in chosen]
        if self.trials.closed is None:  # more of them may get a score
            had += [0] * (self.search.most_finalists(self.trials.wanted) - len(chosen))
        coming = sum(max(0, finalists.seeds - number) for number in had)
        under_way = [t for t in self._of("finalist") if not t.is_over]
        begun = sum(max(0.0, self.epochs_of_trial - self._epochs(t)) for t in under_way)
        return coming * self.epochs_of_trial + begun

    def _within_budget(self, seconds: float) -> float:
        """So long, or until one of the search's budgets is used up."""
        budget = self.search.budget
        for limit, spent in (
            (budget.epochs, self.search_epochs),
            (budget.gpu_hours, self.search_gpu_hours),
            (budget.hours, self.seconds / 3600),
        ):
            if limit is not None and spent:
                seconds = min(seconds, max(0.0, limit - spent) / spent * self.seconds)
        return seconds if math.isfinite(seconds) else 0.0

    def _of(self, purpose: Purpose) -> list[Trial]:
        return [t for t in self.trials.by_number.values() if t.purpose == purpose]

    def _gpu_hours(self, purpose: Purpose) -> float:
        return sum(trial.seconds for trial in self._of(purpose)) * self.gpus / 3600

    def _epochs(self, trial: Trial) -> float:
        known = max(trial.epochs, self.epochs_now.get(trial.number, 0.0))
        return known - trial.inherited_epochs


def _is_settled(trial: Trial) -> bool:
    return trial.status in ENDED or trial.status == "paused"
