"""What a free slot does next, and what becomes of a trial that has reported: all from the log.

    Engine.work       a leg for a free slot
    Engine.reported   whether a trial goes on
    Engine.left, lost, failed
    Engine.extend     more trials, perhaps of another space

Each method makes durable what it decides before it answers. A new Engine that has observed the same
events answers alike, whatever the driver before it was doing when it died.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from jobs.record import Failure, State
from jobs.search_spec import Search
from jobs.study.budget import Budget, UsedUp
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
    Resumed,
    Started,
    Values,
)
from jobs.study.samplers import Sampler, make_sampler
from jobs.study.schedulers import Scheduler
from jobs.study.space import space_from
from jobs.study.trials import Trial, Trials

FULL = 1.0 - 1e-9
"""From this fraction on a trial has had its full budget."""
HOPELESS_AFTER = 3
"""Trials that fail alike before any has reported, after which a driver makes no more of them."""
_NUMBER = re.compile(r"\d[\w.+-]*")


@dataclass(frozen=True)
class Leg:
    """What a slot is to do: train a trial until it reports at or past a fraction."""

    trial: int
    number: int
    values: Values
    repeat: int
    until: float
    donor: Donor | None
    """What a clone begins with, if it does not have that yet."""


@dataclass(frozen=True)
class Report:
    """What a trial tells of an evaluation; as the event `Reported`."""

    step: int
    fraction: float
    epochs: float
    value: float | None
    best: float | None
    seconds: float


class Log(Protocol):
    """Where events become durable."""

    def append(self, events: Sequence[Event]) -> None: ...

    def read(self) -> Iterable[Event]:
        """All of them, in order."""


class Engine:
    """The study: its trials, and what comes next."""

    def __init__(
        self,
        search: Search,
        sampler: Sampler,
        scheduler: Scheduler,
        log: Log,
        events: Iterable[Event] = (),
        *,
        is_saved: Callable[[int, int], bool],
        gpus: float = 0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`events` is what the log holds. Legs that were under way then are lost, as their slots
        were the former driver's. Where the log tells of another space than the job's, its own
        sampler takes the place of `sampler`. `is_saved` looks whether a trial has a checkpoint of a
        step."""
        events = list(events)
        self._search = search
        spaces = [e.space for e in events if isinstance(e, Extended) and e.space is not None]
        self._sampler = self._sampler_of(spaces[-1]) if spaces else sampler
        self._scheduler = scheduler
        self._log = log
        self._is_saved = is_saved
        self._clock = clock
        self._budget = Budget(search, gpus=gpus)
        self._pending: list[Event] = []
        self._failures = Counter[str]()
        """Of this driver's trials, by their messages without numbers."""
        self.hopeless: Failure | None = None
        """Why no trial is begun any more, though the search is not closed: trials fail alike."""
        self.trials = Trials(search)
        for event in events:
            self._observe(event)
        if events:
            self._note(Resumed())
        for number in list(self.trials.running):
            self._lose(self.trials[number], "the study's driver ended", counts=False)
        if self._is_reopened():
            self._note(Extended(trials=self.trials.wanted))
        self._commit()

    # ------------------------------------------------------------------------------ what happens

    def work(self, slot: str) -> Leg | None:
        """The next leg for a free slot; None where there is nothing to do for it now, or, where
        nothing is running either, at all."""
        if self.hopeless is not None:
            return None
        before = None
        while (number := self._first_ready()) is None and (event := self._next()) is not None:
            if event == before:  # it would be for ever
                raise RuntimeError(f"the study decides the same thing again: {event!r}")
            self._note(event)
            before = event
        if number is None:
            self._commit()
            return None
        trial = self.trials[number]
        self._note(Started(trial=trial.number, leg=trial.legs + 1, slot=slot, until=trial.until))
        self._commit()
        return Leg(
            trial=trial.number,
            number=trial.legs,
            values=trial.values,
            repeat=trial.repeat,
            until=trial.until,
            donor=trial.donor if self.trials.is_uncloned(trial) else None,
        )

    def reported(self, number: int, report: Report) -> Decided:
        """Whether the trial goes on, and until where.

        A trial that began again from a checkpoint before its last report tells that once more, and
        is answered as before.
        """
        trial = self.trials[number]
        if report.step > trial.step:
            self._note(Reported(trial=number, **asdict(report)))
            if self.trials.closed is None and (reason := self._exhausted()) is not None:
                self._note(Closed(reason=reason))
            self._note(self._decide(trial))
        # It may have broken off before that was saved with which its clones begin.
        has_clones = trial.decision == "continue" and number in self.trials.uncloned
        if trial.status == "running" and (has_clones or trial.decision != "continue"):
            self._note(Recalled(trial=number))
        self._commit()
        if has_clones:
            return Decided(trial=number, decision="pause", reason="its clones begin")
        until = trial.until if trial.decision == "continue" else None
        return Decided(trial=number, decision=trial.decision, until=until, reason=trial.reason)

    def cloned(self, number: int) -> None:
        """The clone has its donor's checkpoint."""
        self._note(Cloned(trial=number))
        self._commit()

    def left(self, number: int) -> None:
        """The slot has left the trial as it was told to; what was to be saved of it is durable."""
        self._note(Left(trial=number))
        self._commit()

    def lost(self, number: int, cause: str, *, counts: bool = True) -> None:
        """The leg of the trial broke off. It begins again from its last checkpoint, unless its
        retries are used up, which pay for it if it `counts`."""
        trial = self.trials[number]
        self._lose(trial, cause, counts=counts)
        if trial.losses > self._search.retries and not trial.is_over:
            problem = (
                f"it broke off {trial.losses} times, the last time as {cause}",
                "raise search.retries, which are counted for each trial",
            )
            failure = Failure(state=State.FAILED_INFRA, problems=(problem,), exit_code=3)
            self._fail(number, failure)
        self._commit()

    def give_up(self, failure: Failure) -> None:
        """Begins no trial any more, with this driver; the study may be resumed."""
        self.hopeless = failure

    def failed(self, number: int, failure: Failure) -> None:
        """The trial failed as it would again; the study goes on without it, unless it is hopeless:
        see `HOPELESS_AFTER`."""
        self._fail(number, failure)
        self._commit()

    def measured(
        self, *, max_tokens_per_microbatch: int | None = None, launch_tokens: int | None = None
    ) -> None:
        """What a trial has measured, for those that begin later."""
        self._note(
            Measured(
                max_tokens_per_microbatch=max_tokens_per_microbatch, launch_tokens=launch_tokens
            )
        )
        self._commit()

    def extend(
        self, trials: int, space: dict[str, Any] | None = None, *, request: int | None = None
    ) -> None:
        """The search is to have that many trials, of another space where one is given; `request`
        is the number of who asks for it."""
        self._note(Extended(trials=trials, space=space, request=request))
        self._commit()
        if space is not None:
            self._sampler = self._sampler_of(space)
            for event in self._log.read():
                self._tell_sampler(event)

    def refuse(self, request: int, reason: str) -> None:
        """The search cannot have the trials that the request with that number asks for."""
        self._note(Refused(request=request, reason=reason))
        self._commit()

    @property
    def used_up(self) -> UsedUp | None:
        """The limit of the job's budget that keeps the search from more trials, if any."""
        return self._budget.used_up(now=self._clock())

    # --------------------------------------------------------------------------------- decisions

    def _first_ready(self) -> int | None:
        """Clones first. A donor does not go on, and save over what they begin with, before they
        have it; they wait until it is durable."""
        found = [
            (trial.donor is None, number)
            for number in self.trials.ready
            if not self._is_held(trial := self.trials[number])
        ]
        return min(found)[1] if found else None

    def _is_held(self, trial: Trial) -> bool:
        clones = self.trials.uncloned.get(trial.number, ())
        if any(self.trials[n].donor.step <= trial.saved_step for n in clones):  # type: ignore[union-attr]
            return True
        return (
            trial.donor is not None
            and self.trials.is_uncloned(trial)
            and self.trials[trial.donor.trial].saved_step < trial.donor.step
        )

    def _next(self) -> Event | None:
        """What has to happen for a slot to have work; None where nothing can now."""
        return self._next_of_search() if self.trials.closed is None else self._next_after_search()

    def _next_of_search(self) -> Event | None:
        trials, number = self.trials, len(self.trials)
        if (reason := self._exhausted()) is not None:
            return Closed(reason=reason)
        event = self._scheduler.next()
        if isinstance(event, Asked):
            until = self._scheduler.first(event.bracket)
            return event.model_copy(update={"trial": number, "until": until})
        if event is not None:
            return event
        if (asked := trials.unrepeated) is not None:
            of = asked.trial if asked.repeats is None else asked.repeats
            again = {"trial": number, "repeat": asked.repeat + 1, "repeats": of}
            return asked.model_copy(update=again)
        is_done = not trials.running and not trials.ready
        if trials.configurations >= trials.wanted:
            return Closed(reason=f"all {trials.wanted} trials have been made") if is_done else None
        if not self._scheduler.takes_new():
            return Closed(reason="all trials have had their budget") if is_done else None
        is_baseline = self._search.baseline and number == 0
        values = {} if is_baseline else self._sampler.ask(number)
        if values is None:  # all of the space is tried: there are no more trials to be had
            return Extended(trials=trials.configurations)
        bracket = self._scheduler.bracket()
        until = self._scheduler.first(bracket)
        return Asked(trial=number, values=values, bracket=bracket, until=until)

    def _next_after_search(self) -> Event | None:
        """The end of those that wait, then the finalists."""
        trials, finalists = self.trials, self._search.finalists
        for number in trials.paused:
            return Decided(trial=number, decision="stop", reason=trials.closed or "")
        if finalists is None or any(trials[n].purpose == "search" for n in trials.running):
            return None
        if not (chosen := trials.for_finalists()):
            return None
        # By turns, so that each has as many as the others; those of before an extension count.
        following = min(chosen, key=lambda trial: trials.finalists_of.get(trial.of, 0))
        seed = trials.finalists_of.get(following.of, 0)
        if seed >= finalists.seeds:
            return None
        return Asked(
            trial=len(trials),
            values=following.values,
            repeat=self._search.repeats + seed,
            repeats=following.of,
            purpose="finalist",
        )

    def _decide(self, trial: Trial) -> Decided:
        if trial.fraction >= FULL:
            return Decided(trial=trial.number, decision="finish", reason="its budget is used up")
        if trial.purpose == "finalist":
            return Decided(trial=trial.number, decision="continue", until=1.0)
        if self.trials.closed is not None:
            return Decided(trial=trial.number, decision="stop", reason=self.trials.closed)
        return self._scheduler.decide(trial.number)

    def _lose(self, trial: Trial, cause: str, *, counts: bool) -> None:
        """A leg broke off; unless all that was left of it was to say that the state is durable."""
        if trial.status == "leaving" and (
            trial.decision == "stop" or self._is_saved(trial.number, trial.step)
        ):
            self._note(Left(trial=trial.number))
        else:
            self._note(Lost(trial=trial.number, cause=cause, counts=counts))

    def _fail(self, number: int, failure: Failure) -> None:
        self._note(Failed(trial=number, failure=failure))
        for clone in sorted(self.trials.uncloned.get(number, ())):
            donor = self.trials[clone].donor
            if donor is not None and self.trials[number].saved_step < donor.step:
                problem = (f"trial {number}, its donor, failed before it was saved", None)
                gone = Failure(state=State.FAILED_INFRA, problems=(problem,), exit_code=3)
                self._note(Failed(trial=clone, failure=gone))
        message, hint = failure.problems[0]
        alike = _NUMBER.sub("0", message)
        self._failures[alike] += 1
        if not self.trials.has_reported and self._failures[alike] >= HOPELESS_AFTER:
            told = f"{HOPELESS_AFTER} trials failed alike, and none has reported: {message}"
            self.hopeless = failure.model_copy(update={"problems": ((told, hint),)})

    def _is_reopened(self) -> bool:
        """Whether the search was closed by a budget that this driver's job has more of. A
        population whose members have ended does not go on."""
        trials = self.trials
        return (
            trials.closed is not None
            and trials.configurations < trials.wanted
            and not self._search.clones
            and self._exhausted() is None
        )

    def _sampler_of(self, space: dict[str, Any]) -> Sampler:
        return make_sampler(self._search, space_from(space), self._search.seed)

    def _exhausted(self) -> str | None:
        return self._budget.exhausted(now=self._clock())

    # ------------------------------------------------------------------------------- bookkeeping

    def _note(self, event: Event) -> None:
        """An event has happened; it becomes durable with the next `_commit`."""
        stamped = event.model_copy(update={"at": round(self._clock(), 3)})
        self._pending.append(stamped)
        self._observe(stamped)

    def _commit(self) -> None:
        if self._pending:
            self._log.append(self._pending)
            self._pending = []

    def _observe(self, event: Event) -> None:
        self.trials.observe(event)
        self._tell_sampler(event)
        if self.trials.is_of_search(event):
            self._budget.observe(event)
            self._scheduler.observe(event)

    def _tell_sampler(self, event: Event) -> None:
        if self.trials.is_of_search(event):
            self._sampler.observe(event)
