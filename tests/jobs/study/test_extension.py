"""More trials for a study: after its end or on the way, once for each request, of another space."""

from __future__ import annotations

import pytest

from jobs.record import Failure, State
from jobs.study.engine import HOPELESS_AFTER, Report
from jobs.study.events import Asked, Closed, Decided, Event, Extended, Measured, Started
from tests.jobs.study.simulated import KilledError, MemoryLog, Simulation, engine_of
from tests.jobs.study.test_engine import SCHEDULERS, accuracy, study, triples

GROWING = [name for name in SCHEDULERS if name not in ("pbt", "pb2")]
NARROW = {
    "optimizer.learning_rate": {"loguniform": [1e-3, 1e-2]},
    "optimizer.weight_decay": {"uniform": [0.0, 0.3]},
}


def after(log: MemoryLog, event: type[Event]) -> list[Event]:
    """What follows the last event of a kind."""
    last = max(n for n, e in enumerate(log.events) if isinstance(e, event))
    return log.events[last + 1 :]


@pytest.mark.parametrize("scheduler", GROWING)
def test_a_study_that_has_ended_goes_on_with_more_trials(scheduler: str) -> None:
    search, space = study(scheduler, trials=9)
    log, simulation = MemoryLog(), Simulation(accuracy, slots=2)
    simulation.run(engine_of(search, space, log))
    engine = engine_of(search, space, log, simulation)
    engine.extend(27, request=1)
    simulation.run(engine)
    trials = engine.trials
    assert (trials.configurations, trials.wanted) == (27, 27)
    assert trials.closed is not None
    assert {t.status for t in trials.by_number.values()} <= {"stopped", "finished"}
    new = [e for e in after(log, Extended) if isinstance(e, Decided) and e.trial >= 9]
    if scheduler in ("asha", "hyperband"):
        promoted = {e.trial for e in new if e.decision == "continue"}
        assert promoted, "nothing goes beyond its first rung"
        assert promoted < {e.trial for e in new}
    # What had ended stays as it was.
    assert all(e.trial >= 9 for e in after(log, Extended) if isinstance(e, Started))


@pytest.mark.parametrize("scheduler", GROWING)
def test_a_study_that_is_extended_on_the_way_survives_any_kill(scheduler: str) -> None:
    search, space = study(scheduler, trials=6)

    def extended(log: MemoryLog, simulation: Simulation) -> None:
        """What a driver does: the request of before this driver is met unless it was."""
        engine = engine_of(search, space, log, simulation)
        if engine.trials.last_request < 4:
            engine.extend(12, NARROW, request=4)
        simulation.run(engine)

    calm = MemoryLog()
    extended(calm, Simulation(accuracy))
    for moment in range(1, calm.appends, 5):
        log, simulation = MemoryLog(dies_after=moment), Simulation(accuracy)
        with pytest.raises(KilledError):
            extended(log, simulation)
        log.dies_after = None
        extended(log, simulation)
        assert triples(log) == triples(calm)
        assert sum(isinstance(e, Extended) for e in log.events) == 1


@pytest.mark.parametrize("algorithm", ["random", "tpe", "cmaes"])
def test_new_trials_are_of_the_new_space_in_later_drivers_too(algorithm: str) -> None:
    search, space = study("none", trials=12, algorithm=algorithm)

    def extended(dies_after: int | None) -> MemoryLog:
        log, simulation = MemoryLog(), Simulation(accuracy)
        engine = engine_of(search, space, log)
        simulation.run(engine)
        engine.extend(24, NARROW)
        if dies_after is not None:
            log.dies_after = log.appends + dies_after
            with pytest.raises(KilledError):
                simulation.run(engine)
            log.dies_after = None
            engine = engine_of(search, space, log, simulation)
        simulation.run(engine)
        return log

    calm, killed = extended(None), extended(13)
    for log in (calm, killed):
        new = [e.values for e in log.events if isinstance(e, Asked)][12:]
        assert len(new) == 12
        assert all(1e-3 <= values["optimizer.learning_rate"] <= 1e-2 for values in new)
    assert triples(killed) == triples(calm)


def test_the_best_of_an_extension_becomes_a_finalist_and_may_win() -> None:
    search, space = study("none", trials=4, finalists={"count": 2, "seeds": 2})
    log, simulation = MemoryLog(), Simulation(accuracy)
    engine = engine_of(search, space, log)
    simulation.run(engine)
    first = engine.trials.winner()
    assert first is not None
    best = {"optimizer.learning_rate": {"choice": [1e-3]}} | {
        "optimizer.weight_decay": {"choice": [0.1]}
    }
    engine.extend(5, best)
    simulation.run(engine)
    finalists = [t for t in engine.trials.by_number.values() if t.purpose == "finalist"]
    new = [t for t in finalists if t.of == 8]  # after 4 of the search and 4 finalists
    assert sorted(t.repeat for t in new) == [1, 2]
    assert len(finalists) == 6
    winner = engine.trials.winner()
    assert winner is not None
    assert winner.of == 8
    assert engine_of(search, space, log).work("a") is None


def test_patience_begins_anew_with_an_extension() -> None:
    search, space = study("none", trials=40, patience=3)
    log, simulation = MemoryLog(), Simulation(accuracy)
    engine = engine_of(search, space, log)
    simulation.run(engine)
    made = engine.trials.configurations
    assert made < 40
    engine.extend(40)
    simulation.run(engine)
    assert engine.trials.configurations >= made + 3


@pytest.mark.parametrize("scheduler", GROWING)
def test_a_larger_budget_opens_the_search_again_and_the_same_one_does_not(scheduler: str) -> None:
    for epochs in range(10, 100, 6):
        search, space = study(scheduler, trials=30, budget={"epochs": float(epochs)})
        log, simulation = MemoryLog(), Simulation(accuracy, slots=3)
        simulation.run(engine_of(search, space, log))
        before = len(log.events)
        assert engine_of(search, space, log).work("a") is None
        assert [event.kind for event in log.events[before:]] == ["resumed"]
        ended = {t for t in range(30) if any(_is_end(e, t) for e in log.events)}
        budget = search.budget.model_copy(update={"epochs": None})
        larger = search.model_copy(update={"budget": budget})
        engine = engine_of(larger, space, log, simulation)
        simulation.run(engine)
        assert engine.trials.configurations == 30
        assert {t.status for t in engine.trials.by_number.values()} <= {"stopped", "finished"}
        later = log.events[before:]
        assert ended.isdisjoint(e.trial for e in later if isinstance(e, Started | Decided))


def _is_end(event: Event, trial: int) -> bool:
    return (
        isinstance(event, Decided) and event.trial == trial and event.decision in ("stop", "finish")
    )


def test_what_improves_after_the_end_does_not_open_the_search() -> None:
    search, space = study("none", trials=40, patience=2)
    log = MemoryLog()
    engine = engine_of(search, space, log)
    legs = [engine.work(f"slot-{n}") for n in range(4)]
    for value, leg in zip((0.5, 0.4, 0.3, 0.9), legs, strict=True):
        assert leg is not None
        engine.reported(leg.trial, Report(9, 1.0, 9.0, value, value, 1.0))
        engine.left(leg.trial)
        engine.work("slot-0") if value == 0.3 else None
    assert any(isinstance(event, Closed) for event in log.events)
    before = len(log.events)
    engine_of(search, space, log)
    assert [event.kind for event in log.events[before:]] == ["resumed"]


# -------------------------------------------------------------------------- failures, measurements


def failure(message: str) -> Failure:
    return Failure(state=State.FAILED_USER, problems=((message, "lower it"),))


def test_trials_that_fail_alike_before_any_has_reported_end_the_study() -> None:
    search, space = study("asha")
    log = MemoryLog()
    engine = engine_of(search, space, log)
    for number in range(HOPELESS_AFTER):
        assert engine.hopeless is None
        leg = engine.work("a")
        assert leg is not None
        engine.failed(leg.trial, failure(f"step {number * 7}: loss is nan at rate {number}.5e-3"))
    assert engine.work("a") is None
    assert engine.hopeless is not None
    alike = "step 14: loss is nan at rate 2.5e-3"
    assert engine.hopeless.problems == (
        (f"3 trials failed alike, and none has reported: {alike}", "lower it"),
    )
    assert engine.trials.closed is None
    # Whoever has mended it resumes the study, which tries again.
    again = engine_of(search, space, log)
    assert again.hopeless is None
    Simulation(accuracy).run(again)
    assert again.trials.configurations == search.trials
    assert "trial 2 failed: step 14" in again.trials.summary()


def test_other_failures_or_one_report_keep_the_study_going() -> None:
    search, space = study("asha")
    engine = engine_of(search, space, MemoryLog())
    for message in ("out of memory", "no such module", "out of memory", "no such module"):
        leg = engine.work("a")
        assert leg is not None
        engine.failed(leg.trial, failure(message))
    leg = engine.work("a")
    assert leg is not None
    engine.reported(leg.trial, Report(1, 1 / 9, 1.0, None, None, 1.0))
    for _ in range(3):
        other = engine.work("b")
        assert other is not None
        engine.failed(other.trial, failure("out of memory"))
    assert engine.hopeless is None


def test_what_the_first_trial_measures_is_for_those_that_begin_later() -> None:
    search, space = study("asha")
    log = MemoryLog()
    engine = engine_of(search, space, log)
    first, second = engine.work("a"), engine.work("b")
    assert first is not None
    assert second is not None
    engine.measured(launch_tokens=256)
    engine.lost(second.trial, "killed")
    for study_engine in (engine, engine_of(search, space, log)):
        trials = study_engine.trials
        assert trials.measured is not None
        assert trials.measured.launch_tokens == 256
        for slot in "abc":
            study_engine.work(slot)
        given = {t.number: t.is_given_measures for t in trials.by_number.values() if t.legs}
        assert not given[first.trial]
        assert not given[second.trial]  # it measures by itself, whenever it goes on
        assert given[2]
    assert sum(isinstance(event, Measured) for event in log.events) == 1
