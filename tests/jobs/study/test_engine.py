"""A study's engine: nothing is lost or made twice, whatever kills its driver, and when."""

from __future__ import annotations

import math
import random
from collections import Counter
from typing import Any

import pytest

from jobs.parse import parse_spec
from jobs.record import Failure, State
from jobs.search_spec import Search
from jobs.study.engine import Engine, Report
from jobs.study.events import Asked, Closed, Decided, Failed, Reported, Started, Values
from jobs.study.space import Space, space_of
from tests.jobs.study.simulated import KilledError, MemoryLog, Simulation, engine_of

SCHEDULERS: dict[str, Any] = {
    "none": None,
    "asha": {"kind": "asha", "reduction_factor": 3},
    "hyperband": {"kind": "hyperband", "reduction_factor": 3},
    "median": {"kind": "median", "startup_trials": 2},
    "pbt": {"kind": "pbt", "population": 6, "every": 1 / 3},
    "pb2": {"kind": "pb2", "population": 6, "every": 1 / 3},
}
SPACE = {
    "optimizer.learning_rate": {"loguniform": [1e-5, 1e-1]},
    "optimizer.weight_decay": {"uniform": [0.0, 0.3]},
}


def study(scheduler: str = "asha", **keys: Any) -> tuple[Search, Space]:
    tree = {
        "name": "study",
        "task": {"labels": ["a", "b"]},
        "model": {"source": "model"},
        "data": {"train": "train", "validation": "validation"},
        "store": "runs",
        "search": {
            "metric": "validation/accuracy",
            "mode": "max",
            "space": SPACE,
            "scheduler": SCHEDULERS[scheduler],
            "algorithm": "random",
            "trials": 6 if scheduler in ("pbt", "pb2") else 12,
            "finalists": None,
            "baseline": False,
            **keys,
        },
    }
    if tree["search"]["trials"] is None:  # as many as the job file has without it
        del tree["search"]["trials"]
    spec = parse_spec(tree, where="job")
    assert spec.search is not None
    return spec.search, space_of(spec)


def accuracy(values: Values, repeat: int, fraction: float) -> float:
    """Best at a learning rate of 1e-3, and rising with the budget; another seed is worth little."""
    off = abs(math.log10(values["optimizer.learning_rate"]) + 3) / 4
    decay = abs(values["optimizer.weight_decay"] - 0.1)
    return (0.9 - 0.3 * off - 0.1 * decay) * (1 - 0.5 * math.exp(-4 * fraction)) + repeat * 1e-4


def run(search: Search, space: Space, *, slots: int = 1, speed: Any = None) -> Engine:
    engine = engine_of(search, space, MemoryLog())
    simulation = Simulation(accuracy, slots=slots)
    if speed is not None:
        simulation.speed = speed
    simulation.run(engine)
    return engine


def triples(log: MemoryLog) -> set[tuple[str, float, float | None]]:
    """(values, fraction, metric) of all reports."""
    values = {e.trial: str(e.values) for e in log.events if isinstance(e, Asked)}
    return {
        (values[e.trial], round(e.fraction, 6), e.value)
        for e in log.events
        if isinstance(e, Reported)
    }


@pytest.mark.parametrize("slots", [1, 2, 5])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_a_study_ends_with_no_trial_left_over(scheduler: str, slots: int) -> None:
    search, space = study(scheduler)
    engine = run(search, space, slots=slots, speed=lambda trial: 1 + trial % 3)
    trials = engine.trials
    assert engine.trials.closed is not None
    assert not trials.running
    assert not trials.ready
    assert not trials.paused
    assert {t.status for t in trials.by_number.values()} <= {"stopped", "finished"}
    assert trials.configurations == search.trials
    best = trials.winner()
    assert best is not None
    assert trials.score(best) == max(t.best for t in trials.by_number.values())


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_a_driver_that_is_killed_at_any_moment_changes_nothing(scheduler: str) -> None:
    search, space = study(scheduler)
    calm = MemoryLog()
    engine = engine_of(search, space, calm)
    whole = Simulation(accuracy)
    whole.run(engine)
    winner = engine.trials.winner()
    for moment in range(0, calm.appends, max(1, calm.appends // 25)):
        log, simulation = MemoryLog(dies_after=moment), Simulation(accuracy)
        with pytest.raises(KilledError):
            simulation.run(engine_of(search, space, log, simulation))
        log.dies_after = None
        again = engine_of(search, space, log, simulation)
        simulation.run(again)
        assert triples(log) == triples(calm)
        assert again.trials.winner() == winner or again.trials.winner().number == winner.number
        asked = [e.trial for e in log.events if isinstance(e, Asked)]
        assert asked == list(range(len(asked)))
        finished = [
            e.trial for e in log.events if isinstance(e, Decided) and e.decision == "finish"
        ]
        assert len(finished) == len(set(finished))


@pytest.mark.parametrize("scheduler", ["hyperband", "pbt", "pb2"])
def test_a_synchronous_study_is_the_same_on_two_slots_with_kills(scheduler: str) -> None:
    search, space = study(scheduler)
    calm = MemoryLog()
    Simulation(accuracy, slots=2).run(engine_of(search, space, calm))
    for moment in range(1, calm.appends, max(1, calm.appends // 10)):
        log, simulation = MemoryLog(dies_after=moment), Simulation(accuracy, slots=2)
        with pytest.raises(KilledError):
            simulation.run(engine_of(search, space, log, simulation))
        log.dies_after = None
        simulation.run(engine_of(search, space, log, simulation))
        assert triples(log) == triples(calm)


def test_many_kills_in_one_study() -> None:
    search, space = study("asha")
    calm = MemoryLog()
    Simulation(accuracy).run(engine_of(search, space, calm))
    log, simulation = MemoryLog(), Simulation(accuracy)
    for _ in range(200):
        log.dies_after = log.appends + 3
        try:
            simulation.run(engine_of(search, space, log, simulation))
        except KilledError:
            continue
        break
    log.dies_after = None
    simulation.run(engine_of(search, space, log, simulation))
    assert triples(log) == triples(calm)


def test_a_lost_trial_goes_on_until_its_retries_are_used_up() -> None:
    search, space = study("none", retries=1, trials=2)
    log = MemoryLog()
    engine = engine_of(search, space, log)
    leg = engine.work("a")
    assert leg is not None
    engine.lost(leg.trial, "its process died")
    again = engine.work("a")
    assert again is not None
    assert (again.trial, again.number) == (leg.trial, 2)
    engine.lost(leg.trial, "its process died again")
    trial = engine.trials[leg.trial]
    assert trial.status == "failed"
    assert trial.failure is not None
    assert "broke off 2 times" in trial.failure.problems[0][0]
    following = engine.work("a")
    assert following is not None
    assert following.trial == 1


def test_a_failed_trial_does_not_end_the_study() -> None:
    search, space = study("asha", trials=4)
    engine = engine_of(search, space, MemoryLog())
    leg = engine.work("a")
    assert leg is not None
    failure = Failure(state=State.FAILED_USER, problems=(("not a number", None),))
    engine.failed(leg.trial, failure)
    Simulation(accuracy).run(engine)
    assert engine.trials[leg.trial].failure == failure
    assert engine.trials.configurations == 4
    assert engine.trials.winner() is not None


def test_a_report_that_comes_again_is_answered_as_before() -> None:
    search, space = study("asha")
    log = MemoryLog()
    engine = engine_of(search, space, log)
    leg = engine.work("a")
    assert leg is not None
    report = Report(step=1, fraction=1 / 9, epochs=1, value=0.5, best=0.5, seconds=1)
    first = engine.reported(leg.trial, report)
    count = len(log.events)
    again = engine.reported(leg.trial, report)
    assert (again.decision, again.until) == (first.decision, first.until)
    assert len(log.events) == count


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"budget": {"epochs": 20.0}}, "budget.epochs"),
        ({"patience": 3}, "3 trials in a row"),
    ],
)
def test_a_budget_ends_the_search(keys: dict[str, Any], reason: str) -> None:
    search, space = study("none", trials=100, **keys)
    engine = run(search, space)
    assert reason in (engine.trials.closed or "")
    assert len(engine.trials) < 50
    assert {t.status for t in engine.trials.by_number.values()} <= {"stopped", "finished"}


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_slots_that_die_at_any_moment_change_nothing(scheduler: str) -> None:
    search, space = study(scheduler)
    calm, moments = MemoryLog(), Counter[str]()
    Simulation(accuracy).run(engine_of(search, space, calm))
    dice = random.Random(0)

    def dies(moment: str) -> bool:
        is_dead = dice.random() < (0.2 if moment == "before it reports" else 0.5)
        moments[moment] += is_dead
        return is_dead

    for _ in range(5):
        log, simulation = MemoryLog(), Simulation(accuracy, dies=dies)
        engine = engine_of(search, space, log, simulation)
        simulation.run(engine)
        assert triples(log) == triples(calm)
        assert {t.status for t in engine.trials.by_number.values()} <= {"stopped", "finished"}
        told = [(e.trial, e.step) for e in log.events if isinstance(e, Reported)]
        assert len(told) == len(set(told))
    assert len(+moments) == 3


@pytest.mark.parametrize("scheduler", ["pbt", "pb2"])
def test_clones_of_a_donor_that_fails_before_it_is_saved_fail_with_it(scheduler: str) -> None:
    search, space = study(scheduler)
    simulation = Simulation(accuracy)
    engine = engine_of(search, space, MemoryLog(), simulation)
    legs = [engine.work(f"slot-{number}") for number in range(search.trials)]
    for number, leg in enumerate(legs):
        assert leg is not None
        value = number / search.trials
        engine.reported(leg.trial, Report(3, leg.until, 3.0, value, value, 1.0))
    assert engine.work("another") is None  # the clones wait until their donors are saved
    clones = [t for t in engine.trials.by_number.values() if t.donor is not None]
    donors = {t.donor.trial for t in clones if t.donor is not None}
    fails = min(donors)
    failure = Failure(state=State.FAILED_USER, problems=(("it cannot be saved", None),))
    engine.failed(fails, failure)
    for clone in clones:
        assert clone.donor is not None
        assert clone.status == ("failed" if clone.donor.trial == fails else "ready")
    for leg in legs:
        assert leg is not None
        if leg.trial != fails:
            simulation.saved[leg.trial] = 3
            engine.left(leg.trial)
    simulation.run(engine)
    assert engine.trials.closed is not None
    ended = {t.status for t in engine.trials.by_number.values()}
    assert ended <= {"stopped", "finished", "failed"}


STALLING = ["none", "asha", "hyperband", "median"]


@pytest.mark.parametrize("slots", [1, 3])
@pytest.mark.parametrize("scheduler", STALLING)
def test_patience_does_not_hold_a_small_part_of_the_budget_against_a_trial(
    scheduler: str, slots: int
) -> None:
    """Up to the 30th every fifth trial is the best that there was with as much of its budget; with
    a part of it none comes near those that had it all, which are alike where trials are halved."""
    search, space = study(scheduler, trials=81, patience=10)
    log = MemoryLog()
    engine = engine_of(search, space, log)

    def found(values: Values, repeat: int, fraction: float) -> float:
        number = next(n for n, t in engine.trials.by_number.items() if t.values == values)
        if number % 5:
            return fraction * (0.3 - 0.003 * number)
        is_top = scheduler in ("asha", "hyperband") and fraction == 1
        return 0.9 if is_top else fraction * (0.5 + 0.01 * min(number, 30))

    Simulation(found, slots=slots).run(engine)
    assert "10 trials in a row" in (engine.trials.closed or "")
    assert 30 + 10 <= len(engine.trials) < 60
    if scheduler in ("asha", "hyperband"):
        assert sum(t.status == "finished" for t in engine.trials.by_number.values()) < 20


@pytest.mark.parametrize("scheduler", STALLING)
def test_a_trial_without_gain_counts_once_however_often_it_is_promoted(scheduler: str) -> None:
    search, space = study(scheduler, trials=81, patience=10)
    log = MemoryLog()
    engine = engine_of(search, space, log)
    Simulation(lambda values, repeat, fraction: 0.5).run(engine)
    assert "10 trials in a row" in (engine.trials.closed or "")
    assert len(engine.trials) == 11
    again = engine_of(search, space, log)  # as the log tells it
    assert len(again.trials) == 11
    assert again.work("a") is None


def test_hours_are_those_in_which_a_driver_works() -> None:
    search, space = study("none", trials=100, budget={"hours": 2.0})
    log, now = MemoryLog(), [1000.0]
    engine = engine_of(search, space, log, clock=lambda: now[0])
    assert engine.work("a") is not None
    now[0] += 1.5 * 3600
    assert engine.work("b") is not None
    now[0] += 50 * 3600  # the driver is dead
    later = engine_of(search, space, log, clock=lambda: now[0])
    first, second = later.work("a"), later.work("b")
    assert first is not None
    assert second is not None
    now[0] += 0.4 * 3600
    report = Report(step=9, fraction=0.5, epochs=1, value=0.5, best=0.5, seconds=1)
    assert later.reported(first.trial, report).decision == "continue"
    now[0] += 0.1 * 3600
    assert later.reported(second.trial, report).decision == "stop"
    later.left(second.trial)
    assert "budget.hours (2)" in (later.trials.closed or "")


def test_finalists_are_the_best_with_other_seeds_and_the_best_mean_wins() -> None:
    search, space = study("asha", finalists={"count": 2, "seeds": 3})
    engine = run(search, space, slots=2)
    finalists = [t for t in engine.trials.by_number.values() if t.purpose == "finalist"]
    assert len(finalists) == 6
    assert sorted(t.repeat for t in finalists) == [1, 1, 2, 2, 3, 3]
    chosen = [runs[0].number for runs in engine.trials.ranked()[:2]]
    assert {t.of for t in finalists} == set(chosen)
    assert all(t.status == "finished" for t in finalists)
    winner = engine.trials.winner()
    assert winner is not None
    assert winner.of == chosen[0]
    assert winner.repeat == 3


def test_the_jobs_own_values_are_the_first_trial_and_a_finalist() -> None:
    search, space = study("none", baseline=True, trials=5, finalists={"count": 1, "seeds": 2})
    engine = engine_of(search, space, MemoryLog())

    def found(values: Values, repeat: int, fraction: float) -> float:
        return accuracy(values, repeat, fraction) if values else 0.1 + repeat * 1e-3

    Simulation(found).run(engine)
    trials = engine.trials
    assert trials[0].values == {}
    assert all(trials[n].values for n in range(1, 5))
    finalists = [t for t in trials.by_number.values() if t.purpose == "finalist"]
    assert sum(t.of == 0 for t in finalists) == 2
    assert len(finalists) == 4
    own, winner = trials.baseline_model(), trials.winner()
    assert own is not None
    assert winner is not None
    assert (own.of, own.repeat, own.purpose) == (0, 2, "finalist")
    assert winner.of != 0


def test_repetitions_have_the_same_values_and_count_as_one() -> None:
    search, space = study("none", trials=3, repeats=2)
    engine = run(search, space)
    assert [t.of for t in engine.trials.by_number.values()] == [0, 0, 2, 2, 4, 4]
    assert [t.repeat for t in engine.trials.by_number.values()] == [0, 1] * 3
    assert engine.trials[0].values == engine.trials[1].values
    assert len(engine.trials.ranked()) == 3


def test_a_grid_is_tried_whole_and_ends_the_search() -> None:
    grid = {
        "optimizer.learning_rate": {"grid": [1e-4, 1e-3]},
        "model.dropout": {"grid": [0.0, 0.1]},
    }
    search, space = study("hyperband", algorithm="grid", space=grid, trials=100)
    log = MemoryLog()
    engine = engine_of(search, space, log)
    Simulation(lambda values, repeat, fraction: fraction).run(engine)
    assert len(engine.trials) == 4
    assert not engine.trials.paused
    assert any(isinstance(event, Closed) for event in log.events)


@pytest.mark.parametrize("given", [{}, {"trials": 6}])
def test_the_jobs_own_values_take_the_place_of_no_combination(given: dict[str, Any]) -> None:
    grid = {
        "optimizer.learning_rate": {"grid": [1e-4, 1e-3, 1e-2]},
        "model.dropout": {"grid": [0.0, 0.1]},
    }
    keys = {"algorithm": "grid", "space": grid, "baseline": True, "trials": None} | given
    search, space = study("none", **keys)
    engine = engine_of(search, space, MemoryLog())
    Simulation(lambda values, repeat, fraction: fraction).run(engine)
    tried = [trial.values for trial in engine.trials.by_number.values()]
    assert tried[0] == {}
    assert len(tried) == 7
    assert {tuple(values.values()) for values in tried[1:]} == {
        (rate, dropout) for rate in (1e-4, 1e-3, 1e-2) for dropout in (0.0, 0.1)
    }
    assert engine.trials.closed == "all 7 trials have been made"


def test_a_grid_of_more_than_the_usual_number_of_trials_is_tried_whole() -> None:
    grid = {"model.dropout": {"grid": [n / 200 for n in range(100)]}}
    search, space = study("none", algorithm="grid", space=grid, trials=None)
    engine = engine_of(search, space, MemoryLog())
    Simulation(lambda values, repeat, fraction: fraction).run(engine)
    assert len({trial.values["model.dropout"] for trial in engine.trials.by_number.values()}) == 100


def test_a_study_is_extended_by_more_trials() -> None:
    search, space = study("asha", trials=6)
    log, simulation = MemoryLog(), Simulation(accuracy)
    engine = engine_of(search, space, log)
    simulation.run(engine)
    engine.extend(10)
    simulation.run(engine)
    assert engine.trials.configurations == 10
    again = engine_of(search, space, log)
    assert again.trials.wanted == 10
    assert again.work("a") is None


def test_clones_begin_with_what_their_donors_have_saved() -> None:
    search, space = study("pbt")
    engine = run(search, space, slots=3)  # the simulation asserts it at each clone's start
    clones = [t for t in engine.trials.by_number.values() if t.donor is not None]
    assert clones
    assert all(t.step > t.donor.step for t in clones if t.donor is not None)
    assert not engine.trials.uncloned


def test_nothing_is_answered_before_it_is_durable() -> None:
    search, space = study("asha")
    log = MemoryLog()
    engine = engine_of(search, space, log)
    leg = engine.work("a")
    assert leg is not None
    assert isinstance(log.events[-1], Started)
    engine.reported(leg.trial, Report(1, 1 / 9, 1.0, 0.5, 0.5, 1.0))
    assert isinstance(log.events[-1], Decided)
    engine.failed(leg.trial, Failure(state=State.FAILED_USER, problems=(("x", None),)))
    assert isinstance(log.events[-1], Failed)
