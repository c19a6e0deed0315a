"""A study whose trials are a formula: slots, losses and failures at random, any scheduler."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from jobs.record import Failure, State
from jobs.study.events import (
    EVENT,
    Asked,
    Decided,
    Event,
    Failed,
    Lost,
    Reported,
    Started,
    Values,
)
from jobs.study.keyed import keyed
from jobs.study.schedulers import Scheduler
from jobs.study.space import Choices, Key, Range

KEYS = (
    Key("optimizer.learning_rate", Range(1e-6, 1e-2, log=True)),
    Key("model.dropout", Range(0.0, 0.5, step=0.05)),
    Key("batching.global_batch_size", Range(4, 64, step=1)),
    Key("optimizer.kind", Choices(("adamw", "sgd", "lion"))),
)
FAILURE = Failure(state=State.FAILED_USER, problems=(("out of memory", None),))


@dataclass(kw_only=True)
class Study:
    """Runs a scheduler to the study's end, on `slots` trials at a time."""

    make: Callable[[], Scheduler]
    trials: int
    slots: int = 3
    seed: int = 0
    evaluations: tuple[int, ...] = (27,)
    """In a trial's full budget, by its number."""
    failures: float = 0.0
    losses: float = 0.0
    """Share of legs that end so."""
    no_value: float = 0.0
    """Share of evaluations that give no number."""
    restarts: float = 0.0
    """Share of legs after which the driver is killed, and another one reads the log."""
    log: list[Event] = field(default_factory=list)
    answers: list[Any] = field(default_factory=list)
    """Of the scheduler, after each event of the log."""

    def run(self) -> Study:
        self.scheduler = self.make()
        self.asked = 0
        self.underway: dict[int, float] = {}
        self.homeless: list[int] = []
        self.paused: set[int] = set()
        self.over: set[int] = set()
        self.values: dict[int, Values] = {}
        self.newest: dict[int, Reported] = {}
        self.undecided: set[int] = set()
        self.legs: dict[int, int] = {}
        self.go_on()
        return self

    def go_on(self) -> None:
        for turn in range(100_000):
            while len(self.underway) - len(self.homeless) < self.slots and self.fill():
                pass
            running = [trial for trial in self.underway if trial not in self.homeless]
            if not running:
                return
            rng = keyed(self.seed, "turn", turn, len(self.log))
            self.end_leg(running[int(rng.integers(len(running)))], fate=rng.random())
            if rng.random() < self.restarts:
                self.scheduler = replayed(self.make, self.log)
        raise AssertionError("the study does not end")

    def append(self, event: Event) -> None:
        self.log.append(event)
        self.scheduler.observe(event)
        self.answers.append(answers(self.scheduler, self.undecided))

    def fill(self) -> bool:
        """Give a free slot something to do; False if there is nothing."""
        if self.homeless:
            self.start(self.homeless.pop(0))
            return True
        answer = self.scheduler.next()
        if answer is None:
            if self.asked >= self.trials or not self.scheduler.takes_new():
                return False
            answer = Asked(
                trial=len(self.values),
                values=drawn(self.seed, len(self.values)),
                bracket=self.scheduler.bracket(),
            )
            self.asked += 1
        if isinstance(answer, Asked):
            assert answer.trial == len(self.values)
            self.values[answer.trial] = answer.values
            self.underway[answer.trial] = self.scheduler.first(answer.bracket)
            if answer.donor is not None:
                donor = self.newest[answer.donor.trial]
                assert answer.donor.step == donor.step
                assert answer.donor.trial in self.paused
                self.newest[answer.trial] = donor
            self.append(answer)
            self.start(answer.trial)
        else:
            assert answer.trial in self.paused
            assert answer.decision in ("continue", "stop")
            self.settle(answer)
            if answer.decision == "continue":
                self.start(answer.trial)
        return True

    def start(self, trial: int) -> None:
        self.legs[trial] = self.legs.get(trial, 0) + 1
        until = self.underway[trial]
        self.append(Started(trial=trial, leg=self.legs[trial], slot="slot", until=until))

    def end_leg(self, trial: int, *, fate: float) -> None:
        if fate < self.failures:
            del self.underway[trial]
            self.over.add(trial)
            self.append(Failed(trial=trial, failure=FAILURE))
        elif fate < self.failures + self.losses:
            self.homeless.append(trial)
            self.append(Lost(trial=trial, cause="killed", counts=True))
        else:
            self.undecided.add(trial)
            self.append(self.report(trial))
            self.settle(self.scheduler.decide(trial))

    def settle(self, decided: Decided) -> None:
        trial = decided.trial
        for where in (self.undecided, self.paused):
            where.discard(trial)
        self.underway.pop(trial, None)
        if decided.decision == "continue":
            assert decided.until is not None
            assert decided.until <= 1.0
            self.underway[trial] = decided.until
        elif decided.decision == "pause":
            self.paused.add(trial)
        else:
            self.over.add(trial)
        self.append(decided)

    def report(self, trial: int) -> Reported:
        """Of the trial's first evaluation at or past the fraction that it runs until."""
        before = self.newest.get(trial)
        evaluations = self.evaluations[trial % len(self.evaluations)]
        count = math.floor(before.fraction * evaluations + 1e-9) + 1 if before else 1
        while count / evaluations < self.underway[trial]:
            count += 1
        value: float | None = quality(self.values[trial], count / evaluations)
        rng = keyed(self.seed, "noise", trial, count)
        value += 0.02 * rng.standard_normal()
        if rng.random() < self.no_value:
            value = None
        values = [v for v in (value, before.best if before else None) if v is not None]
        report = Reported(
            trial=trial,
            step=count * 10,
            fraction=count / evaluations,
            epochs=3 * count / evaluations,
            value=value,
            best=max(values, default=None),
        )
        self.newest[trial] = report
        return report


def replayed(make: Callable[[], Scheduler], log: list[Event]) -> Scheduler:
    """A new scheduler that has observed what a file would give back."""
    scheduler = make()
    for event in log:
        scheduler.observe(EVENT.validate_json(event.model_dump_json()))
    return scheduler


def answers(scheduler: Scheduler, undecided: set[int]) -> Any:
    """All that a scheduler says now, asked twice: it must not change by being asked."""
    first, second = (
        (
            scheduler.next(),
            scheduler.takes_new(),
            scheduler.bracket(),
            [scheduler.decide(trial) for trial in sorted(undecided)],
        )
        for _ in range(2)
    )
    assert first == second
    return first


def drawn(seed: int, trial: int) -> Values:
    rng = keyed(seed, "values", trial)
    return {key.path: key.over.at(rng.random()) for key in KEYS}


def quality(values: Values, fraction: float) -> float:
    """An accuracy that rises with training, best at a learning rate of 1e-4."""
    distance = abs(math.log10(values["optimizer.learning_rate"]) + 4) / 4
    return (0.9 - 1.6 * distance) * (1 - math.exp(-3 * fraction))
