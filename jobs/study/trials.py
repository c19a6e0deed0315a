"""The trials of a study, as its log tells them: for its driver and for readers alike."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from jobs.record import Failure
from jobs.search_spec import Search
from jobs.study.events import (
    Asked,
    Cloned,
    Closed,
    Decided,
    Donor,
    Event,
    Extended,
    Failed,
    Left,
    Lost,
    Measured,
    Reported,
    Started,
    Values,
)


@dataclass(slots=True)
class Trial:
    """A trial, as the log tells it."""

    number: int
    values: Values
    purpose: Literal["search", "finalist"]
    repeat: int
    of: int
    """The trial whose values it repeats; its own number where it repeats none."""
    donor: Donor | None
    until: float
    """Where it is to report next."""
    status: Literal["ready", "running", "leaving", "paused", "stopped", "finished", "failed"] = (
        "ready"
    )
    """ready: waits for a slot. leaving: decided; whether its state is durable is not known yet."""
    decision: Literal["continue", "pause", "stop", "finish"] = "continue"
    reason: str = ""
    legs: int = 0
    losses: int = 0
    """Those that its retries pay for."""
    slot: str = ""
    step: int = 0
    """Of its last report."""
    saved_step: int = 0
    """That it was left at, with its state durable."""
    fraction: float = 0.0
    epochs: float = 0.0
    value: float | None = None
    best: float | None = None
    seconds: float = 0.0
    failure: Failure | None = None
    is_given_measures: bool = False
    """Whether it began with what an earlier trial has measured; else it measures by itself."""

    @property
    def is_over(self) -> bool:
        """Whether it never goes on."""
        return self.status in ("stopped", "finished", "failed")


class Trials:
    """All trials by number, and what is told of the search as a whole."""

    def __init__(self, search: Search, events: Iterable[Event] = ()) -> None:
        self._search = search
        self.by_number: dict[int, Trial] = {}
        self.wanted = search.trials
        """Configurations that the search is to try."""
        self.configurations = 0
        """Those that were asked for, without repetitions and clones."""
        self.finalists = 0
        self.finalists_of: dict[int, int] = {}
        """How many each configuration has."""
        self.unrepeated: Asked | None = None
        """The newest trial of the search whose configuration lacks repetitions."""
        self.closed: str | None = None
        """Why the search asks for no more trials."""
        self.measured: Measured | None = None
        """What the first trial has measured for the others."""
        self.has_reported = False
        """Whether any trial has."""
        self.last_failed: Trial | None = None
        self.last_request = 0
        """Number of the newest request that the study has met."""
        self.began_at: float | None = None
        self.ready: set[int] = set()
        self.running: dict[int, None] = {}
        """Those on slots, in the order in which they came there."""
        self.paused: dict[int, None] = {}
        self.uncloned: dict[int, set[int]] = {}
        """Donors, each with its clones that do not have its checkpoint yet."""
        for event in events:
            self.observe(event)

    def __len__(self) -> int:
        return len(self.by_number)

    def __getitem__(self, number: int) -> Trial:
        return self.by_number[number]

    # ------------------------------------------------------------------------------- questions

    def score(self, trial: Trial) -> float | None:
        """What a trial is judged by so far."""
        return trial.best if self._search.score == "best" else trial.value

    def ranked(self, purpose: Literal["search", "finalist"] = "search") -> list[list[Trial]]:
        """The configurations that have a score, each with its repetitions, the one with the best
        mean first; of equals the earlier one."""
        runs: dict[int, list[Trial]] = {}
        for trial in self.by_number.values():
            if trial.purpose == purpose and self.score(trial) is not None:
                runs.setdefault(trial.of, []).append(trial)
        return sorted(runs.values(), key=lambda group: (self._mean_loss(group), group[0].of))

    def is_uncloned(self, trial: Trial) -> bool:
        """Whether it is a clone that does not have its donor's checkpoint yet."""
        return trial.donor is not None and trial.number in self.uncloned.get(trial.donor.trial, ())

    def winner(self) -> Trial | None:
        """The trial whose best checkpoint is the study's model; None where none has a score.

        Of the best configuration, among finalists where there are any, the best run.
        """
        for runs in [*self.ranked("finalist"), *self.ranked()]:
            return min(runs, key=lambda trial: (self._loss(trial), trial.number))
        return None

    def summary(self) -> str:
        """Where the study stands, in a sentence for people."""
        by_status: dict[str, int] = {}
        for trial in self.by_number.values():
            by_status[trial.status] = by_status.get(trial.status, 0) + 1
        counts = ", ".join(f"{number} {status}" for status, number in sorted(by_status.items()))
        told = f"{self.configurations} of {self.wanted} trials begun ({counts})"
        best, failed = self.winner(), self.last_failed
        if best is not None:
            metric = self._search.metric
            told += f"; best {metric} {self.score(best):.4f} (trial {best.number})"
        if failed is not None and failed.failure is not None:
            told += f"; trial {failed.number} failed: {failed.failure.problems[0][0]}"
        return told

    def _mean_loss(self, runs: list[Trial]) -> float:
        return statistics.fmean(map(self._loss, runs))

    def _loss(self, trial: Trial) -> float:
        """The score of a trial that has one, such that less is better."""
        score = self.score(trial)
        assert score is not None
        return score if self._search.mode == "min" else -score

    # ------------------------------------------------------------------------------- bookkeeping

    def observe(self, event: Event) -> None:
        """Takes note of the next event of the log."""
        if self.began_at is None and event.at:
            self.began_at = event.at
        match event:
            case Asked():
                self._add(event)
            case Started():
                trial = self.by_number[event.trial]
                self.ready.discard(trial.number)
                trial.status, trial.slot, trial.legs = "running", event.slot, event.leg
                trial.until = event.until
                if event.leg == 1:
                    trial.is_given_measures = self.measured is not None
                self.running[trial.number] = None
            case Cloned():
                self._forget_clone(self.by_number[event.trial])
            case Reported():
                trial = self.by_number[event.trial]
                trial.step, trial.fraction, trial.epochs = event.step, event.fraction, event.epochs
                trial.value, trial.best = event.value, event.best
                trial.seconds += event.seconds
                self.has_reported = True
            case Decided():
                self._heed(self.by_number[event.trial], event)
            case Left():
                trial = self.by_number[event.trial]
                self.running.pop(trial.number, None)
                trial.saved_step = trial.step
                self._settle(trial)
            case Lost():
                trial = self.by_number[event.trial]
                self.running.pop(trial.number, None)
                trial.losses += event.counts
                if trial.decision == "stop":
                    trial.status = "stopped"
                else:
                    # One that was to pause or to finish goes once more to where it was told so.
                    self._make_ready(trial)
            case Failed():
                trial = self.by_number[event.trial]
                self.running.pop(trial.number, None)
                self.ready.discard(trial.number)
                trial.status, trial.failure = "failed", event.failure
                self.last_failed = trial
                self._forget_clone(trial)
            case Closed():
                self.closed = event.reason
            case Extended():
                self.wanted, self.closed = event.trials, None
                self.last_request = max(self.last_request, event.request or 0)
            case Measured():
                self.measured = event

    def _add(self, asked: Asked) -> None:
        donor = None if asked.donor is None else self.by_number[asked.donor.trial]
        trial = Trial(
            number=asked.trial,
            values=asked.values,
            purpose=asked.purpose,
            repeat=asked.repeat,
            of=asked.trial if asked.repeats is None else asked.repeats,
            donor=asked.donor,
            until=asked.until,
        )
        if asked.donor is not None and donor is not None:
            trial.step, trial.fraction, trial.epochs = (
                asked.donor.step,
                donor.fraction,
                donor.epochs,
            )
            self.uncloned.setdefault(donor.number, set()).add(trial.number)
        self.by_number[trial.number] = trial
        if asked.purpose == "finalist":
            self.finalists += 1
            self.finalists_of[trial.of] = self.finalists_of.get(trial.of, 0) + 1
        else:
            if asked.repeats is None and asked.donor is None:
                self.configurations += 1
            is_last = asked.donor is not None or asked.repeat + 1 >= self._search.repeats
            self.unrepeated = None if is_last else asked
        self.ready.add(trial.number)

    def _heed(self, trial: Trial, decided: Decided) -> None:
        trial.decision, trial.reason = decided.decision, decided.reason
        if decided.until is not None:
            trial.until = decided.until
        if trial.status == "running":
            trial.status = "running" if decided.decision == "continue" else "leaving"
        elif trial.status != "leaving":  # else its slot leaves it before it goes on, or ends
            self._settle(trial)

    def _settle(self, trial: Trial) -> None:
        """What becomes of a trial that no slot has, by its last decision."""
        self.ready.discard(trial.number)
        self.paused.pop(trial.number, None)
        match trial.decision:
            case "continue":
                self._make_ready(trial)
            case "pause":
                trial.status = "paused"
                self.paused[trial.number] = None
            case "stop":
                trial.status = "stopped"
            case "finish":
                trial.status = "finished"

    def _forget_clone(self, trial: Trial) -> None:
        if trial.donor is not None and self.is_uncloned(trial):
            waiting = self.uncloned[trial.donor.trial]
            waiting.discard(trial.number)
            if not waiting:
                del self.uncloned[trial.donor.trial]

    def _make_ready(self, trial: Trial) -> None:
        trial.status = "ready"
        self.ready.add(trial.number)
