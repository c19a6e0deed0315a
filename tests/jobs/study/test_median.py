"""The median rule, beside a reading of it that looks through all trials each time."""

from __future__ import annotations

import math
from statistics import fmean, median

import pytest
from simulated_study import Study

from jobs.search_spec import MedianStopping
from jobs.study.events import Asked, Decided, Reported
from jobs.study.schedulers import Median, Objective


def report(trial: int, fraction: float, value: float | None, best: float | None) -> Reported:
    return Reported(trial=trial, step=1, fraction=fraction, epochs=fraction, value=value, best=best)


def is_stopped(reports: list[Reported], trial: int, given: MedianStopping) -> bool:
    """Whether the best of a trial is worse than the median of the others' running means."""
    newest = [r for r in reports if r.trial == trial][-1]
    if newest.fraction >= 1 or newest.fraction < given.first:
        return False
    hundredth = math.ceil(newest.fraction * 100 - 1e-9)
    means = []
    for other in {r.trial for r in reports} - {trial}:
        bins = [(math.ceil(r.fraction * 100 - 1e-9), r.value) for r in reports if r.trial == other]
        if max(b for b, _ in bins) >= hundredth:
            values = [-math.inf if v is None else v for b, v in bins if b <= hundredth]
            if values:
                means.append(fmean(values))
    if len(means) < given.startup_trials:
        return False
    return (-math.inf if newest.best is None else newest.best) < median(means)


@pytest.mark.parametrize("slots", [1, 6])
@pytest.mark.parametrize("evaluations", [(20,), (27, 4, 10, 300)])
def test_trials_stop_as_a_direct_reading_of_the_rule_says(
    slots: int, evaluations: tuple[int, ...]
) -> None:
    given = MedianStopping(startup_trials=4, first=0.2)
    objective = Objective(mode="max", score="best")
    study = Study(
        make=lambda: Median(given, objective=objective),
        trials=20,
        slots=slots,
        evaluations=evaluations,
        failures=0.005,
        losses=0.02,
        no_value=0.005,
    ).run()
    reports: list[Reported] = []
    stops = 0
    for event in study.log:
        if isinstance(event, Reported):
            reports.append(event)
        elif isinstance(event, Decided):
            expected = is_stopped(reports, event.trial, given)
            assert (event.decision == "stop") == expected
            stops += expected
    assert stops >= 3


def test_a_trial_reports_every_evaluation() -> None:
    study = Study(
        make=lambda: Median(MedianStopping(first=0.99), objective=Objective(mode="max")),
        trials=3,
        evaluations=(10, 3, 7),
    ).run()
    fractions = [
        [e.fraction for e in study.log if isinstance(e, Reported) and e.trial == trial]
        for trial in range(3)
    ]
    assert fractions == [[k / n for k in range(1, n + 1)] for n in (10, 3, 7)]


def test_the_trial_itself_is_not_among_the_others() -> None:
    scheduler = Median(
        MedianStopping(startup_trials=1, first=0.01), objective=Objective(mode="min")
    )
    for trial, value in enumerate((0.5, 0.4)):
        scheduler.observe(Asked(trial=trial, values={}))
        scheduler.observe(report(trial, 0.5, value, value))
    assert scheduler.decide(0).decision == "stop"
    assert scheduler.decide(1).decision == "continue"
    scheduler.observe(Asked(trial=2, values={}))
    scheduler.observe(report(2, 0.4, 0.9, 0.9))
    assert "0 others" in scheduler.decide(2).reason


def test_the_means_are_of_the_values_and_a_trial_is_judged_by_its_best() -> None:
    scheduler = Median(
        MedianStopping(startup_trials=1, first=0.01), objective=Objective(mode="min")
    )
    for trial in range(2):
        scheduler.observe(Asked(trial=trial, values={}))
    scheduler.observe(report(0, 0.25, 0.2, 0.2))
    scheduler.observe(report(0, 0.5, 0.8, 0.2))
    scheduler.observe(report(1, 0.25, 0.4, 0.4))
    scheduler.observe(report(1, 0.5, 0.9, 0.4))
    assert scheduler.decide(1).decision == "continue"
    assert scheduler.decide(0).decision == "continue"


def test_the_median_is_that_of_the_others_alone() -> None:
    scheduler = Median(
        MedianStopping(startup_trials=4, first=0.01), objective=Objective(mode="min")
    )
    for trial, value in enumerate((1.0, 2.0, 3.0, 4.0)):
        scheduler.observe(Asked(trial=trial, values={}))
        scheduler.observe(report(trial, 0.5, value, value))
    scheduler.observe(Asked(trial=4, values={}))
    scheduler.observe(report(4, 0.4, 2.6, 2.6))
    scheduler.observe(report(4, 0.5, 2.4, 2.4))
    assert scheduler.decide(4).decision == "continue"
    scheduler.observe(Asked(trial=5, values={}))
    scheduler.observe(report(5, 0.5, 2.6, 2.6))
    assert scheduler.decide(5).decision == "stop"


def test_a_trial_counts_at_all_fractions_that_it_has_gone_past() -> None:
    scheduler = Median(
        MedianStopping(startup_trials=1, first=0.01), objective=Objective(mode="min")
    )
    scheduler.observe(Asked(trial=0, values={}))
    scheduler.observe(report(0, 0.1, 0.5, 0.5))
    scheduler.observe(report(0, 0.5, 0.1, 0.1))
    for trial, (fraction, value, decision) in enumerate(
        [
            (0.05, 9.0, "continue"),
            (0.1, 0.6, "stop"),
            (0.49, 0.6, "stop"),
            (0.49, 0.4, "continue"),
            (0.5, 0.4, "stop"),
            (0.6, 9.0, "continue"),
        ],
        start=1,
    ):
        scheduler.observe(Asked(trial=trial, values={}))
        scheduler.observe(report(trial, fraction, value, value))
        assert scheduler.decide(trial).decision == decision
