"""The fold of a study's log: what it keeps up to date equals what a look at all trials gives."""

from __future__ import annotations

import random
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from jobs.record import Failure, State
from jobs.search_spec import Search
from jobs.study.events import (
    Asked,
    Closed,
    Decided,
    Donor,
    Event,
    Failed,
    Left,
    Lost,
    Reported,
    Started,
)
from jobs.study.trials import Trial, Trials

FAILURE = Failure(state=State.FAILED_USER, problems=(("out of memory", None),))
TAKEN = Failure(state=State.FAILED_INFRA, problems=(("its node is gone", None),))


def test_trials_that_are_yet_to_end_are_those_that_slots_are_wanted_for() -> None:
    search = Search(trials=3, repeats=2, scheduler=None, finalists=None)  # type: ignore[arg-type]
    trials = Trials(search)
    assert trials.unended == 6
    trials.observe(Asked(trial=0, values={}))
    assert trials.unended == 6  # its repetition is yet to be asked for
    trials.observe(Asked(trial=1, values={}, repeat=1, repeats=0))
    trials.observe(Started(trial=0, leg=1, slot="s", until=1.0))
    assert trials.unended == 6
    trials.observe(Failed(trial=0, failure=FAILURE))
    assert trials.unended == 5
    trials.observe(Closed(reason="the budget is used up"))
    assert trials.unended == 1


def random_events(seed: int, *, trials: int = 60, repeats: int = 1) -> Iterator[Event]:
    """Trials in any order: reports (some without a value), pauses, losses, failures, clones."""
    chance = random.Random(seed)
    fractions: dict[int, float] = {}
    alive: list[int] = []
    asked = 0
    while asked < trials or alive:
        if asked < trials and (not alive or chance.random() < 0.3):
            first = asked
            for repeat in range(repeats):
                of = first if repeat else None
                finalist = asked > trials // 2 and chance.random() < 0.2
                donor = None
                if alive and repeats == 1 and not finalist and chance.random() < 0.2:
                    donor = Donor(trial=chance.choice(alive), step=10)
                yield Asked(
                    trial=asked,
                    values={"model.dropout": chance.random()},
                    repeat=repeat,
                    repeats=chance.randrange(first) if finalist else of,
                    purpose="finalist" if finalist else "search",
                    donor=donor,
                )
                fractions[asked] = 0.0
                alive.append(asked)
                asked += 1
            continue
        number = chance.choice(alive)
        yield Started(trial=number, leg=1, slot="s", until=1.0)
        fate = chance.random()
        if fate < 0.08:
            yield Failed(trial=number, failure=chance.choice([FAILURE, TAKEN]))
            alive.remove(number)
            continue
        if fate < 0.2:
            yield Lost(trial=number, cause="killed", counts=True)
            continue
        fractions[number] += 0.25
        value = None if chance.random() < 0.15 else round(chance.random(), 2)
        yield Reported(
            trial=number,
            step=int(100 * fractions[number]),
            fraction=fractions[number],
            epochs=3 * fractions[number],
            value=value,
            best=value,
        )
        ends = fractions[number] >= 1
        decision: Any = "finish" if ends else chance.choice(["continue", "pause", "stop"])
        yield Decided(trial=number, decision=decision)
        if decision != "continue":
            yield Left(trial=number)
        if decision in ("finish", "stop"):
            alive.remove(number)


def slow_ranking(trials: Trials, search: Search, purpose: str) -> list[list[int]]:
    runs: dict[int, list[Trial]] = {}
    failed: set[int] = set()
    for trial in trials.by_number.values():
        if trial.purpose == purpose and trials.score(trial) is not None:
            runs.setdefault(trial.of, []).append(trial)
        if trial.purpose == purpose and trial.failure == FAILURE:
            failed.add(trial.of)
    for of, group in runs.items():
        runs[of] = [trial for trial in group if trial.failure is None] or group

    def loss(trial: Trial) -> float:
        score = trials.score(trial)
        assert score is not None
        return score if search.mode == "min" else -score

    ordered = sorted(
        runs.values(),
        key=lambda group: (
            group[0].of in failed,
            statistics.fmean(map(loss, group)),
            group[0].of,
        ),
    )
    return [[trial.number for trial in group] for group in ordered]


@pytest.mark.parametrize("repeats", [1, 3])
@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize("score", ["best", "last"])
def test_counts_and_the_best_equal_a_look_at_all_trials(
    mode: str, score: str, repeats: int
) -> None:
    search = Search(metric="validation/f1", mode=mode, score=score, scheduler=None, repeats=repeats)  # type: ignore[arg-type]
    for seed in range(4):
        trials = Trials(search)
        for event in random_events(seed, repeats=repeats):
            trials.observe(event)
            counted = Counter(trial.status for trial in trials.by_number.values())
            assert +trials.counts == counted
            expected = {p: slow_ranking(trials, search, p) for p in ("search", "finalist")}
            for purpose in ("search", "finalist"):
                found = trials.ranked(purpose)  # type: ignore[arg-type]
                assert [[trial.number for trial in group] for group in found] == expected[purpose]
            best = (expected["finalist"] or expected["search"] or [[]])[0]
            winner = trials.winner()
            assert (winner is None) == (not best)
            if winner is not None:
                assert winner.number in best
                sign = 1 if mode == "min" else -1
                losses = [sign * (trials.score(trials[n]) or 0.0) for n in best]
                assert sign * (trials.score(winner) or 0.0) == min(losses)


def finalists(*scores: Sequence[float | Failure]) -> list[Event]:
    """Configurations that were trained again with several seeds: each run with its score, or with
    its failure after a tenth of its budget and a score of 0.99."""
    events: list[Event] = [Asked(trial=of, values={}) for of in range(len(scores))]
    number = len(scores)
    for of, runs in enumerate(scores):
        for seed, score in enumerate(runs):
            failure = score if isinstance(score, Failure) else None
            value = 0.99 if isinstance(score, Failure) else score
            part = 1.0 if failure is None else 0.1
            asked = Asked(trial=number, values={}, repeat=1 + seed, repeats=of, purpose="finalist")
            told = Reported(
                trial=number, step=9, fraction=part, epochs=part, value=value, best=value
            )
            events += [asked, told]
            if failure is not None:
                events.append(Failed(trial=number, failure=failure))
            number += 1
    return events


def test_values_that_diverge_for_one_seed_come_after_those_that_never_do() -> None:
    search = Search(metric="validation/f1")
    trials = Trials(search, finalists([0.95, FAILURE, FAILURE], [0.8, 0.81, 0.79]))
    winner = trials.winner()
    assert winner is not None
    assert (winner.of, winner.best) == (1, 0.81)
    assert [runs[0].of for runs in trials.ranked("finalist")] == [1, 0]
    # Of what has diverged only the run that did not is shown; its mean is of full budgets.
    assert [run.best for run in trials.ranked("finalist")[1]] == [0.95]


def test_what_the_platform_has_taken_says_nothing_of_the_values() -> None:
    search = Search(metric="validation/f1")
    trials = Trials(search, finalists([0.9, TAKEN, 0.88], [0.8, 0.81, 0.79]))
    assert [[run.best for run in runs] for runs in trials.ranked("finalist")] == [
        [0.9, 0.88],
        [0.8, 0.81, 0.79],
    ]


def test_where_each_has_failed_once_the_best_of_them_wins() -> None:
    scores = [FAILURE, 0.7], [FAILURE, 0.8], [FAILURE]
    trials = Trials(Search(metric="validation/f1", mode="max"), finalists(*scores))
    assert [runs[0].of for runs in trials.ranked("finalist")] == [2, 1, 0]
    trials.observe(Asked(trial=8, values={}, repeats=0, purpose="finalist"))
    trials.observe(Failed(trial=8, failure=FAILURE))  # before it had a score
    assert [runs[0].of for runs in trials.ranked("finalist")] == [2, 1, 0]


class Untouchable(dict[int, Trial]):
    """Trials that may be looked up, but not gone through."""

    def _refuse(self) -> Any:
        raise AssertionError("all trials are gone through")

    __iter__ = values = items = keys = _refuse  # type: ignore[assignment]


def test_a_summary_looks_at_no_trial_but_the_best() -> None:
    search = Search(metric="validation/f1")
    trials = Trials(search, random_events(1, trials=400))
    told = trials.summary()
    trials.by_number = Untouchable(trials.by_number)
    assert trials.summary() == told
    assert f"{trials.counts['failed']} failed" in told
    winner = trials.winner()
    assert winner is not None
    assert f"(trial {winner.number})" in told


def test_what_no_longer_holds_is_forgotten() -> None:
    search = Search(metric="validation/f1")
    trials = Trials(search, [Asked(trial=0, values={})])
    for step in range(1, 5000):
        value = 1 / step
        trials.observe(
            Reported(trial=0, step=step, fraction=0.1, epochs=0.1, value=value, best=value)
        )
    assert len(trials._rankings["search"]._heap) < 100


def test_epochs_of_a_clone_are_those_after_its_donor() -> None:
    trials = Trials(
        Search(metric="validation/f1"),
        [
            Asked(trial=0, values={}),
            Reported(trial=0, step=30, fraction=0.3, epochs=0.9, value=0.5, best=0.5),
            Asked(trial=1, values={}, donor=Donor(trial=0, step=30)),
            Reported(trial=1, step=60, fraction=0.6, epochs=1.8, value=0.6, best=0.6),
        ],
    )
    assert trials[1].own_epochs == pytest.approx(0.9)
    assert trials[0].own_epochs == pytest.approx(0.9)
