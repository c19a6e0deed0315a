"""PBT and PB2: who is cloned, from what, and with which values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from simulated_study import FAILURE, KEYS, Study, replayed

from jobs.search_spec import PB2, PBT, Search
from jobs.study.events import Asked, Decided, Donor, Extended, Failed, Reported, Values
from jobs.study.schedulers import Objective, Pb2, Pbt, Scheduler, make_scheduler
from jobs.study.schedulers.gaussian_process import TimeVaryingProcess, upper_confidence
from jobs.study.schedulers.pbt import Clone
from jobs.study.space import Choices, Key, Range, space_from

OBJECTIVE = Objective(mode="max")
PBT_OF_10 = PBT(population=10, every=0.2, quantile=0.2)
PB2_OF_10 = PB2(population=10, every=0.2, quantile=0.2)
RATE = Range(1e-5, 1e-1, log=True)


def pbt(given: PBT = PBT_OF_10, *, trials: int = 100, keys: Sequence[Key] = KEYS) -> Pbt:
    return Pbt(given, objective=OBJECTIVE, keys=keys, seed=7, trials=trials)


def pb2() -> Pb2:
    return Pb2(PB2_OF_10, objective=OBJECTIVE, keys=KEYS, seed=7, trials=100)


@pytest.mark.parametrize("make", [pbt, pb2])
@pytest.mark.parametrize("slots", [1, 10])
def test_in_each_round_clones_of_the_best_take_the_places_of_the_worst(
    make: Callable[[], Scheduler], slots: int
) -> None:
    study = Study(make=make, trials=100, slots=slots, evaluations=(20,)).run()
    reports = [e for e in study.log if isinstance(e, Reported)]
    clones = [e for e in study.log if isinstance(e, Asked) and e.donor is not None]
    stopped = {e.trial for e in study.log if isinstance(e, Decided) and e.decision == "stop"}
    assert study.asked == 10
    assert len(clones) == len(stopped) == 4 * 2
    for number in range(1, 5):
        of_round = {r.trial: r for r in reports if r.fraction == number / 5}
        assert len(of_round) == 10
        ranked = sorted(of_round, key=lambda trial: (-(of_round[trial].value or 0), trial))
        assert {t for t in stopped if study.newest[t].fraction == number / 5} == set(ranked[-2:])
        born = [c for c in clones if c.bracket == number]
        assert len(born) == 2
        for clone in born:
            assert clone.donor is not None
            assert clone.donor.trial in ranked[:2]
            assert clone.donor.step == of_round[clone.donor.trial].step
            assert clone.values != study.values[clone.donor.trial]
            assert study.scheduler.first(clone.bracket) == (number + 1) / 5
    finished = [e for e in study.log if isinstance(e, Decided) and e.decision == "finish"]
    assert len(finished) == 10


def test_the_trials_of_a_study_bound_the_population() -> None:
    study = Study(make=lambda: pbt(trials=4), trials=4).run()
    assert study.asked == 4
    finished = [e for e in study.log if isinstance(e, Decided) and e.decision == "finish"]
    assert len(finished) == 4


def test_the_population_stays_as_it_is_after_its_first_round() -> None:
    study = Study(make=lambda: pbt(trials=4), trials=4, evaluations=(20,)).run()
    log = study.log[: [isinstance(e, Asked) and e.trial == 4 for e in study.log].index(True)]
    scheduler = replayed(study.make, [*log, Extended(trials=9)])
    assert not scheduler.takes_new()


def test_a_round_goes_on_when_its_last_report_has_been_decided_on() -> None:
    scheduler = pbt(PBT(population=2, every=0.5))
    for trial in range(2):
        scheduler.observe(Asked(trial=trial, values={}))
    settle(scheduler, trial=0, fraction=0.5, value=0.1)
    scheduler.observe(Reported(trial=1, step=50, fraction=0.5, epochs=1, value=0.2, best=0.2))
    assert scheduler.next() is None
    scheduler.observe(scheduler.decide(1))
    stopped = scheduler.next()
    assert isinstance(stopped, Decided)
    assert (stopped.trial, stopped.decision) == (0, "stop")


def test_failed_members_are_replaced_by_clones_of_living_ones() -> None:
    scheduler = pbt(PBT(population=4, every=0.5))
    for trial in range(4):
        assert scheduler.takes_new()
        scheduler.observe(Asked(trial=trial, values={}))
    assert not scheduler.takes_new()
    for trial in (0, 2, 3):
        scheduler.observe(Failed(trial=trial, failure=FAILURE))
    assert scheduler.next() is None
    settle(scheduler, trial=1, fraction=0.5, value=0.3)
    for number in range(4, 7):
        clone = scheduler.next()
        assert isinstance(clone, Asked)
        assert (clone.trial, clone.donor) == (number, Donor(trial=1, step=50))
        scheduler.observe(clone)
    going = scheduler.next()
    assert isinstance(going, Decided)
    assert (going.trial, going.decision, going.until) == (1, "continue", 1.0)


def settle(scheduler: Scheduler, *, trial: int, fraction: float, value: float | None) -> Decided:
    scheduler.observe(
        Reported(
            trial=trial,
            step=round(fraction * 100),
            fraction=fraction,
            epochs=fraction,
            value=value,
            best=1.0,
        )
    )
    decided = scheduler.decide(trial)
    scheduler.observe(decided)
    return decided


def test_members_are_compared_by_their_newest_value_and_none_is_the_worst() -> None:
    scheduler = pbt(PBT(population=3, every=0.5))
    for trial in range(3):
        scheduler.observe(Asked(trial=trial, values={}))
    for trial, value in enumerate((None, 0.1, 0.9)):
        assert settle(scheduler, trial=trial, fraction=0.5, value=value).decision == "pause"
    stopped = scheduler.next()
    assert isinstance(stopped, Decided)
    assert (stopped.trial, stopped.decision) == (0, "stop")
    scheduler.observe(stopped)
    clone = scheduler.next()
    assert isinstance(clone, Asked)
    assert clone.donor == Donor(trial=2, step=50)


def test_a_member_that_ends_early_leaves_the_population() -> None:
    scheduler = pbt(PBT(population=3, every=0.5))
    for trial in range(3):
        scheduler.observe(Asked(trial=trial, values={}))
    settle(scheduler, trial=0, fraction=0.5, value=0.1)
    settle(scheduler, trial=1, fraction=0.5, value=0.2)
    assert settle(scheduler, trial=2, fraction=1.0, value=0.9).decision == "finish"
    stopped = scheduler.next()
    assert isinstance(stopped, Decided)
    assert (stopped.trial, stopped.decision) == (0, "stop")
    scheduler.observe(stopped)
    clone = scheduler.next()
    assert isinstance(clone, Asked)
    assert clone.donor == Donor(trial=1, step=50)
    scheduler.observe(clone)
    going = scheduler.next()
    assert going is not None
    scheduler.observe(going)
    assert scheduler.next() is None


@pytest.mark.parametrize(
    ("every", "fractions"),
    [
        (0.1, [k / 10 for k in range(1, 11)]),
        (1 / 3, [1 / 3, 2 / 3, 1.0]),
        (0.333, [0.333, 0.666, 1.0]),
        (0.45, [0.45, 1.0]),
        (0.9, [1.0]),
    ],
)
def test_rounds_begin_at_multiples_and_the_last_takes_a_small_rest(
    every: float, fractions: list[float]
) -> None:
    scheduler = pbt(PBT(every=every))
    assert [scheduler.first(number) for number in range(len(fractions))] == fractions


def test_a_round_that_rare_evaluations_went_past_is_left_out() -> None:
    study = Study(make=pbt, trials=10, evaluations=(2,)).run()
    reports = [e for e in study.log if isinstance(e, Reported)]
    assert {r.fraction for r in reports} == {0.5, 1.0}
    clones = [e for e in study.log if isinstance(e, Asked) and e.donor is not None]
    assert [clone.bracket for clone in clones] == [2, 2]


def perturbed(over: Range | Choices, value: object, *, count: int, resample: float) -> list[Any]:
    scheduler = pbt(PBT(resample=resample), keys=[Key("searched", over)])
    clones = [
        Clone(replaces=n, donor=Donor(trial=0, step=1), values={"searched": value, "a": 1}, round=1)
        for n in range(count)
    ]
    values = [scheduler.perturbed(clone) for clone in clones]
    assert all(v["a"] == 1 for v in values)
    assert [scheduler.perturbed(clone) for clone in clones] == values
    return [v["searched"] for v in values]


def test_a_number_is_multiplied_by_either_factor_within_its_bounds() -> None:
    found = perturbed(RATE, 1e-3, count=50, resample=0.0)
    assert {f"{value:.6g}" for value in found} == {"0.0008", "0.00125"}
    assert set(perturbed(RATE, 0.09, count=50, resample=0.0)) == {0.1, 0.09 * 0.8}


def test_a_whole_or_stepped_number_moves_by_at_least_one_step() -> None:
    whole = Range(1, 64, step=1)
    assert set(perturbed(whole, 2, count=50, resample=0.0)) == {1, 3}
    assert set(perturbed(whole, 50, count=50, resample=0.0)) == {40, 63}
    assert all(type(value) is int for value in perturbed(whole, 2, count=50, resample=0.5))
    stepped = Range(0.0, 0.5, step=0.1)
    assert set(perturbed(stepped, 0.2, count=50, resample=0.0)) == {0.1, 0.3}
    assert set(perturbed(stepped, 0.2, count=300, resample=1.0)) == {0.0, 0.1, 0.2, 0.3, 0.4, 0.5}


def test_values_are_drawn_anew_with_the_given_probability() -> None:
    found = perturbed(RATE, 1e-3, count=400, resample=0.25)
    anew = [value for value in found if f"{value:.6g}" not in ("0.0008", "0.00125")]
    assert 0.18 < len(anew) / 400 < 0.32
    assert min(anew) < 1e-4 < 1e-2 < max(anew)
    choice = Choices(("a", "b", "c", "d"))
    assert set(perturbed(choice, "a", count=50, resample=0.0)) == {"a"}
    assert set(perturbed(choice, "a", count=50, resample=1.0)) == {"a", "b", "c", "d"}


@pytest.mark.parametrize("given", [PBT(population=40, resample=1.0), PB2(population=40)])
def test_clones_keep_what_decides_which_keys_they_have(given: PBT | PB2) -> None:
    space = space_from(
        {
            "optimizer.kind": {"choice": ["adamw", "sgd"]},
            "optimizer.momentum": {"uniform": [0.5, 0.9], "when": {"optimizer.kind": "sgd"}},
        }
    )
    scheduler = make_scheduler(Search(metric="validation/accuracy", scheduler=given), space)
    for trial in range(40):
        values = {"optimizer.kind": "sgd", "optimizer.momentum": 0.7}
        scheduler.observe(Asked(trial=trial, values=values))
        settle(scheduler, trial=trial, fraction=0.1, value=0.1)
    clones = []
    while (answer := scheduler.next()) is not None:
        scheduler.observe(answer)
        clones += [answer] if isinstance(answer, Asked) else []
    assert len(clones) == 10
    assert {clone.values["optimizer.kind"] for clone in clones} == {"sgd"}
    assert all(clone.values["optimizer.momentum"] != 0.7 for clone in clones)


def test_the_first_clones_of_pb2_are_those_of_pbt() -> None:
    def first_clones(make: Callable[[], Scheduler]) -> list[Asked]:
        log = Study(make=make, trials=10, evaluations=(20,)).run().log
        return [e for e in log if isinstance(e, Asked) and e.bracket == 1]

    assert len(first_clones(pb2)) == 2
    assert first_clones(pb2) == first_clones(pbt)


def improvement_study(*, seed: int) -> list[float]:
    """Shares of the clones' rates, where 0.7 improves the metric fastest, of a study by hand."""
    scheduler = Pb2(
        PB2(population=8),
        objective=OBJECTIVE,
        keys=[Key("rate", RATE)],
        seed=seed,
        trials=8,
    )
    rng = np.random.default_rng(seed)
    values: dict[int, Values] = {}
    skill: dict[int, float] = {}
    shares: list[float] = []
    for trial in range(8):
        values[trial], skill[trial] = {"rate": RATE.at(rng.random())}, 0.0
        scheduler.observe(Asked(trial=trial, values=values[trial]))
    underway = [*range(8)]
    for number in range(1, 10):
        for trial in underway:
            skill[trial] += 0.1 - 0.3 * (RATE.unit(values[trial]["rate"]) - 0.7) ** 2
            settle(scheduler, trial=trial, fraction=number / 10, value=skill[trial])
        underway = []
        while (answer := scheduler.next()) is not None:
            scheduler.observe(answer)
            if isinstance(answer, Asked):
                assert answer.donor is not None
                values[answer.trial] = answer.values
                skill[answer.trial] = skill[answer.donor.trial]
                shares.append(RATE.unit(answer.values["rate"]))
                underway.append(answer.trial)
            elif answer.decision == "continue":
                underway.append(answer.trial)
    return shares


def test_pb2_finds_the_values_that_improve_the_metric_fastest() -> None:
    errors = [abs(share - 0.7) for seed in range(2) for share in improvement_study(seed=seed)[8:]]
    # Values drawn at random are 0.25 away in the middle.
    assert np.median(errors) < 0.03


def test_pb2_takes_a_stretch_that_failed_or_ended_without_a_value_for_the_worst() -> None:
    """Rates above the middle break; the others improve all alike."""
    scheduler = Pb2(
        PB2(population=8, quantile=0.5),
        objective=OBJECTIVE,
        keys=[Key("rate", RATE)],
        seed=1,
        trials=8,
    )
    shares: list[float] = []
    values: dict[int, Values] = {}
    for trial in range(8):
        values[trial] = {"rate": RATE.at(trial / 7)}
        scheduler.observe(Asked(trial=trial, values=values[trial]))
        settle(scheduler, trial=trial, fraction=0.1, value=0.1)
    for number in range(2, 7):
        underway = []
        while (answer := scheduler.next()) is not None:
            scheduler.observe(answer)
            if isinstance(answer, Asked):
                values[answer.trial] = answer.values
                shares.append(RATE.unit(answer.values["rate"]))
            if isinstance(answer, Asked) or answer.decision == "continue":
                underway.append(answer.trial)
        for trial in underway:
            share = RATE.unit(values[trial]["rate"])
            if share > 0.75:
                scheduler.observe(Failed(trial=trial, failure=FAILURE))
            else:
                value = None if share > 0.5 else number / 10 + 0.01 * share
                settle(scheduler, trial=trial, fraction=number / 10, value=value)
    assert sum(share > 0.5 for share in shares[-8:]) <= 2


def test_the_process_is_that_of_scikit_learn_where_time_stands_still() -> None:
    pytest.importorskip("sklearn")
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import RBF, ConstantKernel

    rng = np.random.default_rng(0)
    known = np.column_stack([rng.random((20, 2)), np.full(20, 3.0)])
    values = np.sin(5 * known[:, 0]) + known[:, 1]
    at = np.column_stack([rng.random((50, 2)), np.full(50, 3.0)])
    process = TimeVaryingProcess.fit(known, values)
    theirs = GaussianProcessRegressor(
        ConstantKernel(process.variance) * RBF(process.length_scale),
        alpha=process.noise * process.variance,
        optimizer=None,
    ).fit(known[:, :2], values)
    mean, deviation = theirs.predict(at[:, :2], return_std=True)
    none = np.empty((0, 3))
    np.testing.assert_allclose(process.mean(at), mean, atol=1e-6)
    np.testing.assert_allclose(process.deviation(at, pending=none), deviation, atol=1e-6)
    # The fitted one is the likeliest of those that differ in one parameter.
    likelihood = theirs.log_marginal_likelihood_value_
    for scale in (0.1, 1.6):
        other = GaussianProcessRegressor(
            ConstantKernel(process.variance) * RBF(scale),
            alpha=process.noise * process.variance,
            optimizer=None,
        ).fit(known[:, :2], values)
        assert other.log_marginal_likelihood_value_ <= likelihood


def test_what_was_seen_long_ago_says_less() -> None:
    process = TimeVaryingProcess(
        points=np.array([[0.5, 0.0]]),
        values=np.array([1.0]),
        length_scale=0.2,
        forgetting=0.2,
        noise=0.01,
        variance=1.0,
    )
    at = np.array([[0.5, time] for time in (0.0, 2.0, 8.0)])
    none = np.empty((0, 2))
    np.testing.assert_allclose(process.mean(at), np.array([1.0, 0.8, 0.8**4]) / 1.01)
    assert np.all(np.diff(process.deviation(at, pending=none)) > 0)
    pending = np.array([[0.5, 8.0]])
    assert process.deviation(at, pending=pending)[2] < process.deviation(at, pending=none)[2]
    bound = upper_confidence(process, at, pending=pending)
    np.testing.assert_allclose(
        bound, process.mean(at) + np.sqrt(0.2) * process.deviation(at, pending=pending)
    )
