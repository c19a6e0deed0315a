"""The trials of a study, as its log tells them: for its driver and for readers alike."""

from __future__ import annotations

import heapq
import statistics
from collections import Counter
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
    Recalled,
    Refused,
    Reported,
    Started,
    Values,
)

Purpose = Literal["search", "finalist"]
Status = Literal["ready", "running", "leaving", "paused", "stopped", "finished", "failed"]
ENDED: frozenset[Status] = frozenset({"stopped", "finished", "failed"})
"""Statuses that a trial keeps."""

_SPARE = 64
"""Entries of a heap that hold no more and are borne, besides as many as there are others."""


@dataclass(slots=True)
class Trial:
    """A trial, as the log tells it."""

    number: int
    values: Values
    purpose: Purpose
    repeat: int
    of: int
    """The trial whose values it repeats; its own number where it repeats none."""
    donor: Donor | None
    until: float
    """Where it is to report next."""
    status: Status = "ready"
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
    inherited_epochs: float = 0.0
    """Those that its donor had had."""
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

    @property
    def own_epochs(self) -> float:
        """Those that it was trained for itself."""
        return self.epochs - self.inherited_epochs


class Trials:
    """All trials by number, and what is told of the search as a whole."""

    def __init__(self, search: Search, events: Iterable[Event] = ()) -> None:
        self._search = search
        self.by_number: dict[int, Trial] = {}
        self.wanted = search.configurations
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
        """Number of the newest request that the study has answered."""
        self.reports = 0
        """Evaluations that trials have reported."""
        self.ready: set[int] = set()
        self.running: dict[int, None] = {}
        """Those on slots, in the order in which they came there."""
        self.paused: dict[int, None] = {}
        self.uncloned: dict[int, set[int]] = {}
        """Donors, each with its clones that do not have its checkpoint yet."""
        self.counts: Counter[Status] = Counter()
        """Trials by status; those that there are none of may be in it as 0."""
        self._rankings: dict[Purpose, _Ranking] = {"search": _Ranking(), "finalist": _Ranking()}
        for event in events:
            self.observe(event)

    def __len__(self) -> int:
        return len(self.by_number)

    def __getitem__(self, number: int) -> Trial:
        return self.by_number[number]

    # ------------------------------------------------------------------------------- questions

    @property
    def unended(self) -> int:
        """Trials that are yet to end: those of the search as far as it goes, or the finalists."""
        begun = len(self) - sum(self.counts[status] for status in ENDED)
        if self.closed is not None:
            return begun
        coming = self._search.repeats * max(0, self.wanted - self.configurations)
        return begun + coming + (self.unrepeated is not None)

    def score(self, trial: Trial) -> float | None:
        """What a trial is judged by so far."""
        return trial.best if self._search.score == "best" else trial.value

    def ranked(self, purpose: Purpose = "search") -> list[list[Trial]]:
        """The configurations that have a score, each with the repetitions that count, the one with
        the best mean first; of equals the earlier one.

        Those of which a run has failed come after those without: values with which training
        diverges for one seed may do so for the next. Runs that have failed count where all have,
        as their scores are of less than a full budget; one that was lost to the platform says
        nothing of its values.
        """
        return self._rankings[purpose].ranked()

    def for_finalists(self) -> list[Trial]:
        """The first trial of each configuration that is trained again once the search has ended:
        the best, and the job's own values."""
        finalists = self._search.finalists
        if finalists is None:
            return []
        chosen = [self.by_number[runs[0].of] for runs in self.ranked()[: finalists.count]]
        own = self.baseline()
        return chosen if own is None or own in chosen else [*chosen, own]

    def is_uncloned(self, trial: Trial) -> bool:
        """Whether it is a clone that does not have its donor's checkpoint yet."""
        return trial.donor is not None and trial.number in self.uncloned.get(trial.donor.trial, ())

    def is_of_search(self, event: Event) -> bool:
        """Whether an event that was observed is none of a finalist."""
        number = getattr(event, "trial", None)
        return number is None or self.by_number[number].purpose == "search"

    def winner(self) -> Trial | None:
        """The trial whose best checkpoint is the study's model; None where none has a score.

        Of the best configuration, among finalists where there are any, the best run.
        """
        runs = self._rankings["finalist"].best() or self._rankings["search"].best()
        if runs is None:
            return None
        return min(runs, key=lambda trial: (self._loss(trial), trial.number))

    def baseline(self) -> Trial | None:
        """The first trial, if it has the job's own values and a score."""
        trial = self.by_number.get(0)
        is_there = self._search.baseline and trial is not None and self.score(trial) is not None
        return trial if is_there else None

    def baseline_model(self) -> Trial | None:
        """The run of the job's own values whose model the winner's is compared with: the best among
        its finalists, else the first trial."""
        own = self.baseline()
        if own is None:
            return None
        finals = [runs for runs in self.ranked("finalist") if runs[0].of == own.of]
        return min(finals[0] if finals else [own], key=lambda t: (self._loss(t), t.number))

    def summary(self) -> str:
        """Where the study stands, in a sentence for people."""
        shown = sorted(self.counts.items())
        counts = ", ".join(f"{number} {status}" for status, number in shown if number)
        told = f"{self.configurations} of {self.wanted} trials begun ({counts})"
        best, failed = self.winner(), self.last_failed
        if best is not None:
            metric = self._search.metric
            told += f"; best {metric} {self.score(best):.4f} (trial {best.number})"
        if failed is not None and failed.failure is not None:
            told += f"; trial {failed.number} failed: {failed.failure.problems[0][0]}"
        return told

    def _loss(self, trial: Trial) -> float:
        """The score of a trial that has one, such that less is better."""
        score = self.score(trial)
        assert score is not None
        return score if self._search.mode == "min" else -score

    # ------------------------------------------------------------------------------- bookkeeping

    def observe(self, event: Event) -> None:
        """Takes note of the next event of the log."""
        match event:
            case Asked():
                self._add(event)
            case Started():
                trial = self.by_number[event.trial]
                self.ready.discard(trial.number)
                self._become(trial, "running")
                trial.slot, trial.legs = event.slot, event.leg
                trial.until = event.until
                if event.leg == 1:
                    trial.is_given_measures = self.measured is not None
                self.running[trial.number] = None
            case Cloned():
                self._forget_clone(self.by_number[event.trial])
            case Reported():
                self.reports += 1
                trial = self.by_number[event.trial]
                trial.step, trial.fraction, trial.epochs = event.step, event.fraction, event.epochs
                trial.value, trial.best = event.value, event.best
                trial.seconds += event.seconds
                self._rank(trial)
                self.has_reported = True
            case Decided():
                self._heed(self.by_number[event.trial], event)
            case Recalled():
                self._become(self.by_number[event.trial], "leaving")
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
                    self._become(trial, "stopped")
                else:
                    # One that was to pause or to finish goes once more to where it was told so.
                    self._make_ready(trial)
            case Failed():
                trial = self.by_number[event.trial]
                self.running.pop(trial.number, None)
                self.ready.discard(trial.number)
                self._become(trial, "failed")
                trial.failure = event.failure
                self._rank(trial)
                self.last_failed = trial
                self._forget_clone(trial)
            case Closed():
                self.closed = event.reason
            case Extended():
                self.wanted, self.closed = event.trials, None
                self.last_request = max(self.last_request, event.request or 0)
            case Refused():
                self.last_request = max(self.last_request, event.request)
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
            trial.inherited_epochs = donor.epochs
            self.uncloned.setdefault(donor.number, set()).add(trial.number)
        self.by_number[trial.number] = trial
        self.counts[trial.status] += 1
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
            if decided.decision != "continue":
                self._become(trial, "leaving")
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
                self._become(trial, "paused")
                self.paused[trial.number] = None
            case "stop":
                self._become(trial, "stopped")
            case "finish":
                self._become(trial, "finished")

    def _rank(self, trial: Trial) -> None:
        loss = None if self.score(trial) is None else self._loss(trial)
        self._rankings[trial.purpose].place(trial, loss)

    def _forget_clone(self, trial: Trial) -> None:
        if trial.donor is not None and self.is_uncloned(trial):
            waiting = self.uncloned[trial.donor.trial]
            waiting.discard(trial.number)
            if not waiting:
                del self.uncloned[trial.donor.trial]

    def _become(self, trial: Trial, status: Status) -> None:
        self.counts[trial.status] -= 1
        self.counts[status] += 1
        trial.status = status

    def _make_ready(self, trial: Trial) -> None:
        self._become(trial, "ready")
        self.ready.add(trial.number)


class _Ranking:
    """Configurations by the mean loss of their runs, those of which one has failed by itself last.
    The best is known at once, however many."""

    def __init__(self) -> None:
        self._losses: dict[int, dict[int, float]] = {}
        """Of each run that has a loss, by configuration."""
        self._trials: dict[int, Trial] = {}
        self._failed: set[int] = set()
        """Configurations of which a run has failed, and not for the platform's sake."""
        self._ranks: dict[int, tuple[bool, float]] = {}
        """(whether it is one of these, mean) of each configuration."""
        self._heap: list[tuple[tuple[bool, float], int]] = []
        """(rank, configuration), also as they were before; `_ranks` tells which hold."""

    def place(self, trial: Trial, loss: float | None) -> None:
        """A run of a configuration has this loss from now on, or none, and may have failed."""
        losses = self._losses.setdefault(trial.of, {})
        if loss is None:
            losses.pop(trial.number, None)
        else:
            self._trials[trial.number] = trial
            losses[trial.number] = loss
        if trial.failure is not None and trial.failure.state.ends_retries:
            self._failed.add(trial.of)
        if not losses:
            self._ranks.pop(trial.of, None)
            return
        mean = statistics.fmean(losses[run.number] for run in self._runs(trial.of))
        rank = self._ranks[trial.of] = trial.of in self._failed, mean
        heapq.heappush(self._heap, (rank, trial.of))
        if len(self._heap) > 2 * len(self._ranks) + _SPARE:
            self._heap = [(rank, of) for of, rank in self._ranks.items()]
            heapq.heapify(self._heap)

    def best(self) -> list[Trial] | None:
        """The runs of the best configuration, of equals the earlier; None where there is none."""
        while self._heap and self._heap[0][0] != self._ranks.get(self._heap[0][1]):
            heapq.heappop(self._heap)
        return self._runs(self._heap[0][1]) if self._heap else None

    def ranked(self) -> list[list[Trial]]:
        """The runs of each configuration, as `best` orders them."""
        order = sorted((rank, of) for of, rank in self._ranks.items())
        return [self._runs(of) for _, of in order]

    def _runs(self, of: int) -> list[Trial]:
        """Those that count."""
        runs = [self._trials[number] for number in sorted(self._losses[of])]
        return [run for run in runs if run.failure is None] or runs
