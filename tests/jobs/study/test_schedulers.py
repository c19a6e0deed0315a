"""Every scheduler: what it says follows from the log alone, and every study comes to its end."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from simulated_study import KEYS, Study, answers, replayed

from jobs import search_spec
from jobs.search_spec import ASHA, PB2, PBT, MedianStopping
from jobs.study.events import Asked, Decided, Extended, Failed, Reported, Started
from jobs.study.schedulers import (
    Asha,
    Hyperband,
    Median,
    Objective,
    Pb2,
    Pbt,
    Plain,
    Scheduler,
)

OBJECTIVE = Objective(mode="max", score="best")
PBT_OF_6 = PBT(population=6, every=0.25)
PB2_OF_6 = PB2(population=6, every=0.25)
Make = Callable[[int], Scheduler]
KINDS: dict[str, Make] = {
    "none": lambda trials: Plain(),
    "asha": lambda trials: Asha(ASHA(reduction_factor=3), objective=OBJECTIVE, trials=trials),
    "hyperband": lambda trials: Hyperband(
        search_spec.Hyperband(), objective=OBJECTIVE, trials=trials
    ),
    "median": lambda trials: Median(MedianStopping(startup_trials=3), objective=OBJECTIVE),
    "pbt": lambda trials: Pbt(PBT_OF_6, objective=OBJECTIVE, keys=KEYS, seed=7, trials=trials),
    "pb2": lambda trials: Pb2(PB2_OF_6, objective=OBJECTIVE, keys=KEYS, seed=7, trials=trials),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def troubled(
    kind: str,
    *,
    slots: int,
    seed: int,
    restarts: float = 0.0,
    evaluations: tuple[int, ...] = (27, 4, 10, 2),
) -> Study:
    """A study that meets everything that may happen to one."""
    return Study(
        make=lambda: KINDS[kind](17),
        trials=17,
        slots=slots,
        seed=seed,
        evaluations=evaluations,
        failures=0.08,
        losses=0.1,
        no_value=0.1,
        restarts=restarts,
    ).run()


@every_kind
@pytest.mark.parametrize(("slots", "seed"), [(1, 0), (4, 1)])
def test_a_new_scheduler_answers_after_any_part_of_the_log_as_the_one_that_lived_through_it(
    kind: str, slots: int, seed: int
) -> None:
    study = troubled(kind, slots=slots, seed=seed)
    undecided: set[int] = set()
    for length, event in enumerate(study.log, start=1):
        if isinstance(event, Reported):
            undecided.add(event.trial)
        elif isinstance(event, Decided):
            undecided.discard(event.trial)
        fresh = replayed(study.make, study.log[:length])
        assert answers(fresh, undecided) == study.answers[length - 1]


@every_kind
@pytest.mark.parametrize("slots", [1, 3])
def test_a_study_goes_the_same_way_however_often_its_driver_is_replaced(
    kind: str, slots: int
) -> None:
    calm = troubled(kind, slots=slots, seed=3)
    assert troubled(kind, slots=slots, seed=3, restarts=0.2).log == calm.log


@every_kind
@pytest.mark.parametrize("slots", [1, 2, 20])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_every_study_ends_and_leaves_no_trial_undecided(kind: str, slots: int, seed: int) -> None:
    study = troubled(kind, slots=slots, seed=seed)
    assert study.asked == (6 if kind in ("pbt", "pb2") else 17)
    assert study.over == set(study.values)
    assert not study.paused
    finished = {e.trial for e in study.log if isinstance(e, Decided) and e.decision == "finish"}
    assert finished == {trial for trial, report in study.newest.items() if report.fraction >= 1} - {
        e.trial for e in study.log if isinstance(e, Failed)
    }


@every_kind
def test_a_study_whose_trials_all_fail_ends(kind: str) -> None:
    study = Study(make=lambda: KINDS[kind](17), trials=17, failures=1.0).run()
    assert study.over == set(study.values)
    assert not any(isinstance(event, Reported) for event in study.log)


@every_kind
def test_a_study_whose_evaluations_give_no_number_ends(kind: str) -> None:
    study = Study(make=lambda: KINDS[kind](17), trials=17, no_value=1.0).run()
    assert study.over == set(study.values)


@every_kind
def test_a_study_that_asks_for_no_more_trials_than_it_has_ends(kind: str) -> None:
    """As one whose grid is at its end, or that is out of patience."""
    study = Study(make=lambda: KINDS[kind](1000), trials=4, slots=2).run()
    study.append(Extended(trials=study.asked))
    study.go_on()
    assert study.over == set(study.values)
    assert not study.paused


@pytest.mark.parametrize("kind", ["asha", "hyperband", "pbt", "pb2"])
@pytest.mark.parametrize("slots", [1, 4])
def test_no_leg_leads_past_the_next_rung(kind: str, slots: int) -> None:
    study = troubled(kind, slots=slots, seed=5, evaluations=(27, 4, 10))
    rungs = [0.25, 0.5, 0.75, 1.0] if kind in ("pbt", "pb2") else [1 / 9, 1 / 3, 1.0]
    fraction: dict[int, float] = {}
    for event in study.log:
        if isinstance(event, Asked) and event.donor is not None:
            fraction[event.trial] = fraction[event.donor.trial]
        elif isinstance(event, Started):
            first = 0.0 if kind != "hyperband" else study.scheduler.first(bracket(study, event))
            begun = fraction.get(event.trial, 0.0)
            assert event.until == min(rung for rung in rungs if rung >= first and rung > begun)
        elif isinstance(event, Reported):
            fraction[event.trial] = event.fraction


def bracket(study: Study, event: Started) -> int:
    asked = {e.trial: e.bracket for e in study.log if isinstance(e, Asked)}
    return asked[event.trial]


@every_kind
def test_finalists_are_not_the_schedulers(kind: str) -> None:
    study = Study(make=lambda: KINDS[kind](6), trials=6).run()
    study.append(Asked(trial=len(study.values), values={}, purpose="finalist"))
    study.append(Started(trial=len(study.values), leg=1, slot="slot", until=1.0))
    before, after = study.answers[-3], study.answers[-1]
    assert before[0] is after[0] is None
    assert before[1:] == after[1:]
