"""Studies as a real driver would leave them: events through the real log, runs for their trials."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from synthetic import SECONDS_PER_STEP, START, SyntheticRun, make_spec

from cluster.storage import Store
from jobs.record import Failure, Outcome, Result, RunPaths, State
from jobs.spec import JobSpec
from jobs.study.events import (
    Asked,
    Closed,
    Decided,
    Event,
    Failed,
    Left,
    Lost,
    Reported,
    Started,
    Values,
)
from jobs.study.log import StudyLog
from jobs.study.space import Key, job_with, space_of, trial_seed

SPACE: dict[str, Any] = {
    "optimizer.learning_rate": {"loguniform": [1e-6, 1e-3]},
    "optimizer.weight_decay": {"loguniform": [1e-4, 0.3]},
    "model.dropout": {"uniform": [0.0, 0.4]},
    "batching.global_batch_size": {"choice": [16, 32, 64]},
}
SEARCH: dict[str, Any] = {"metric": "validation/f1", "space": SPACE, "trials": 24}
FAILURE = Failure(
    state=State.FAILED_USER,
    problems=(("the loss of step 40 is not a number", "lower optimizer.learning_rate"),),
    where="slot on node-7",
)
RUNGS = (1 / 9, 1 / 3, 1.0)
SECONDS = 270.0
"""Of a trial's full budget."""


def make_study_spec(**search: Any) -> JobSpec:
    return make_spec(workers={"count": 1}, search={**SEARCH, **search})


def quality(values: Values, fraction: float, repeat: int = 0) -> float:
    """F1 that is best at a learning rate of 3e-5 and a dropout of 0.1."""
    off = (math.log10(values["optimizer.learning_rate"]) + 4.5) ** 2 / 6
    off += 2 * (values.get("model.dropout", 0.1) - 0.1) ** 2
    noise = random.Random(f"{values}{fraction}{repeat}").gauss(0, 0.004)
    return max(0.3, 0.9 - 0.3 * off) * (1 - 0.4 * math.exp(-6 * fraction)) + noise


@dataclass
class SyntheticStudy:
    """Writes a study event by event into `store`, which holds the runs; the clock is its own."""

    store: Store
    run_id: str = "sentiment-5eed01"
    spec: JobSpec = field(default_factory=make_study_spec)
    now: float = START
    begun: dict[int, Asked] = field(default_factory=dict)
    fractions: dict[int, float] = field(default_factory=dict)
    legs: dict[int, int] = field(default_factory=dict)
    bests: dict[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.run = SyntheticRun(self.store, self.run_id, self.spec).submit()
        self.paths = RunPaths(self.run_id)
        self.log = StudyLog(self.store, self.paths, generation=1)
        list(self.log.open())
        self.space = space_of(self.spec)

    def append(self, *events: Event) -> None:
        self.log.append([event.model_copy(update={"at": self.now}) for event in events])

    def drawn(self, number: int) -> Values:
        chance = random.Random(number)

        def choose(key: Key) -> Any:
            return key.over.at(chance.random())

        return self.space.fill(choose)

    def ask(self, values: Values | None = None, **asked: Any) -> int:
        number = len(self.begun)
        event = Asked(trial=number, values=values or self.drawn(number), until=RUNGS[0], **asked)
        self.begun[number] = event
        donor = asked.get("donor")
        self.fractions[number] = 0.0 if donor is None else self.fractions[donor.trial]
        self.append(event)
        return number

    def start(self, number: int, until: float, slot: str = "a1") -> None:
        self.legs[number] = self.legs.get(number, 0) + 1
        self.append(Started(trial=number, leg=self.legs[number], slot=slot, until=until))

    def report(self, number: int, fraction: float, value: float | None = None) -> float:
        """Time goes on by what the part of the budget takes."""
        asked = self.begun[number]
        seconds = (fraction - self.fractions[number]) * SECONDS
        self.now += seconds
        value = quality(asked.values, fraction, asked.repeat) if value is None else value
        best = self.bests[number] = max(value, self.bests.get(number, 0.0))
        self.fractions[number] = fraction
        self.append(
            Reported(
                trial=number,
                step=round(300 * fraction),
                fraction=fraction,
                epochs=3 * fraction,
                value=value,
                best=best,
                seconds=seconds,
            )
        )
        return value

    def decide(self, number: int, decision: Any, reason: str = "", **more: Any) -> None:
        self.append(Decided(trial=number, decision=decision, reason=reason, **more))
        if decision != "continue":
            self.append(Left(trial=number))

    def train(self, number: int, until: float, decision: str, reason: str = "") -> float:
        """One leg of a trial, by which it gets as far as that."""
        self.start(number, until)
        value = self.report(number, until)
        self.decide(number, decision, reason)
        return value

    def fail(self, number: int, failure: Failure = FAILURE) -> None:
        self.append(Failed(trial=number, failure=failure))

    def lose(self, number: int, cause: str = "the slot's process died") -> None:
        self.append(Lost(trial=number, cause=cause, counts=True))

    def trial_run(self, number: int, *, steps: int, **run: Any) -> SyntheticRun:
        """The run folder of a trial, trained up to that step."""
        asked = self.begun[number]
        job = job_with(self.spec, asked.values, seed=trial_seed(self.spec, asked.repeat))
        made = SyntheticRun(self.store, self.paths.trial(number).run_id, job, **run).submit()
        began = self.now - steps * SECONDS_PER_STEP
        made.start_attempt(1, time=began)
        made.train(1, after=0, until=steps, time=began)
        return made

    # ---- whole studies

    def halve(self, trials: int, *, failing: Sequence[int] = ()) -> None:
        """Trials of successive halving: rung by rung, the best third goes on."""
        numbers = [self.ask() for _ in range(trials)]
        values: dict[int, float] = {}
        for number in numbers:
            if number in failing:
                self.start(number, RUNGS[0])
                self.now += 12
                self.fail(number)
            else:
                values[number] = self.train(number, RUNGS[0], "pause", "not among the best 1/3")
        for rung in RUNGS[1:]:
            ranked = sorted(values, key=lambda n: -values[n])
            best, rest = ranked[: len(ranked) // 3], ranked[len(ranked) // 3 :]
            for number in best:
                self.decide_waiting(number, "continue", "among the best 1/3", until=rung)
                last = rung == RUNGS[-1]
                values[number] = self.train(
                    number, rung, "finish" if last else "pause", "its budget is used up"
                )
            for number in rest:
                self.decide_waiting(number, "stop", f"not among the best 1/3 of rung {rung:.0%}")
                del values[number]

    def decide_waiting(self, number: int, decision: Any, reason: str, **more: Any) -> None:
        self.append(Decided(trial=number, decision=decision, reason=reason, **more))

    def close(self, reason: str = "all 24 trials have been made") -> None:
        self.append(Closed(reason=reason))

    def finalists(self, of: Sequence[int], *, seeds: int) -> list[int]:
        """Each of those trials again, with that many other seeds."""
        made = []
        for seed in range(seeds):
            for number in of:
                values = self.begun[number].values
                made.append(self.ask(values, repeat=1 + seed, repeats=number, purpose="finalist"))
                self.train(made[-1], 1.0, "finish", "its budget is used up")
        return made

    def ended(self, winner: int, state: State = State.SUCCEEDED, **outcome: Any) -> None:
        self.run.state(state, "the study is done", time=self.now)
        made = Outcome(attempt=0, state=state, step=300, trial=winner, **outcome)
        result = Result(
            run_id=self.run_id,
            state=state,
            generation=1,
            step=300,
            finished_at=self.now,
            best_checkpoint=f"trials/{winner:04d}/checkpoints/step-00000200-attempt-0001",
            outcome=made,
        )
        self.store.write(self.paths.result, result.to_bytes())
        self.run.lease(renewed_at=self.now, released=True)


def ended_study(store: Store, trials: int = 24, **study: Any) -> SyntheticStudy:
    """A study that has ended well: halving, two failures, finalists, a test of the winner."""
    made = SyntheticStudy(store, **study)
    made.run.state(State.RUNNING, "the trials run", time=made.now)
    made.halve(trials, failing=(3, 11))
    made.close(f"all {trials} trials have been made")
    ranked = sorted(made.bests, key=lambda n: -made.bests[n])
    finalists = made.finalists(ranked[:2], seeds=3)
    winner = max(finalists, key=lambda n: made.bests[n])
    made.trial_run(winner, steps=300)
    test = {"step": 200, "rows": 1000, "metrics": {"accuracy": 0.884, "f1": 0.882, "loss": 0.31}}
    made.ended(winner, test=test, tested_on="test")
    return made


def running_study(store: Store, *, now: float, **study: Any) -> SyntheticStudy:
    """A study whose driver renewed its lease at `now`: two on slots, some paused, ended, failed."""
    made = SyntheticStudy(store, **study)
    made.now = now - 1500
    made.run.state(State.RUNNING, "12 of 24 trials begun", time=made.now)
    made.halve(10, failing=(3,))
    for _ in range(3):
        number = made.ask()
        made.train(number, RUNGS[0], "pause", "not among the best 1/3")
    for slot in ("a1", "b2"):
        number = made.ask()
        made.start(number, RUNGS[0], slot)
        made.trial_run(number, steps=20)
    made.ask()
    made.run.lease(renewed_at=now)
    return made
