"""How long a study has been worked on, and about how long it still takes."""

from __future__ import annotations

from typing import Any

import pytest

from jobs.search_spec import Budget, Finalists, Search
from jobs.study.course import Course
from jobs.study.events import (
    Asked,
    Closed,
    Decided,
    Event,
    Extended,
    Left,
    Lost,
    Reported,
    Resumed,
    Started,
)
from jobs.study.pace import Pace
from jobs.study.trials import Trials

EPOCHS = 4.0


def whole_trial(number: int, *, at: float, value: float = 0.5, **asked: Any) -> list[Event]:
    """A trial that takes 100 seconds for its full budget."""
    return [
        Asked(trial=number, values={}, at=at, **asked),
        Started(trial=number, leg=1, slot="s", until=1.0, at=at),
        Reported(
            trial=number, step=100, fraction=1.0, epochs=EPOCHS, value=value, best=value,
            at=at + 100, seconds=100.0,
        ),
        Decided(trial=number, decision="finish", at=at + 100),
        Left(trial=number, at=at + 100),
    ]  # fmt: skip


def pace_of(
    events: list[Event], *, gpus: int = 0, now: dict[int, float] | None = None, **search: Any
) -> Pace:
    found = Search(**{"metric": "validation/f1", "trials": 10, "finalists": None} | search)
    return Pace(
        found,
        Trials(found, events),
        seconds=Course(events).worked.seconds,
        epochs_of_trial=EPOCHS,
        gpus=gpus,
        epochs_now=now or {},
    )


def test_the_rest_takes_as_long_as_the_part_before() -> None:
    pace = pace_of([*whole_trial(0, at=50.0), *whole_trial(1, at=150.0)], gpus=2)
    assert pace.seconds == 200
    assert pace.epochs == 2 * EPOCHS
    assert pace.trials_per_hour == 36
    assert pace.eta_seconds == pytest.approx(800)
    assert pace.gpu_hours == pytest.approx(2 * 200 / 3600)


def test_before_the_first_trial_is_done_nothing_is_said() -> None:
    assert pace_of([]).eta_seconds is None
    assert pace_of(whole_trial(0, at=0.0)[:2]).eta_seconds is None
    assert pace_of([]).trials_per_hour is None


def test_what_trials_on_slots_have_done_since_their_reports_counts() -> None:
    events = [*whole_trial(0, at=1.0), Asked(trial=1, values={}, at=101.0)]
    events.append(Started(trial=1, leg=1, slot="s", until=1.0, at=101.0))
    assert pace_of(events).eta_seconds == pytest.approx(900)
    # Half of trial 1 is done besides, in the same time.
    assert pace_of(events, now={1: EPOCHS / 2}).eta_seconds == pytest.approx(8.5 / 1.5 * 100)


def test_finalists_have_their_full_budget() -> None:
    finalists = Finalists(count=2, seeds=3)
    pace = pace_of(whole_trial(0, at=1.0), finalists=finalists, baseline=False)
    assert pace.eta_seconds == pytest.approx(900 + 600)
    ended = [*whole_trial(0, at=1.0), *whole_trial(1, at=101.0, value=0.6)]
    ended += [Closed(reason="all of the space has been tried", at=201.0)]
    assert pace_of(ended, finalists=finalists).eta_seconds == pytest.approx(600)
    ended += whole_trial(2, at=201.0, purpose="finalist", repeats=0, repeat=1)
    assert pace_of(ended, finalists=finalists).eta_seconds == pytest.approx(500)
    ended += whole_trial(3, at=301.0, purpose="finalist", repeats=1, repeat=1)[:2]
    half = pace_of(ended, finalists=finalists, now={3: EPOCHS / 2})
    assert half.epochs == pytest.approx(3.5 * EPOCHS)
    assert half.search_epochs == pytest.approx(2 * EPOCHS)
    # Half a run and four whole ones, at three and a half in 300 seconds.
    assert half.eta_seconds == pytest.approx(4.5 * 300 / 3.5)


def test_the_jobs_own_values_are_among_the_finalists() -> None:
    finalists = Finalists(count=1, seeds=3)
    pace = pace_of(whole_trial(0, at=1.0), finalists=finalists)
    assert pace.eta_seconds == pytest.approx(900 + 2 * 300)
    ended = [*whole_trial(0, at=1.0), *whole_trial(1, at=101.0, value=0.6)]
    ended += [Closed(reason="all of the space has been tried", at=201.0)]
    assert pace_of(ended, finalists=finalists).eta_seconds == pytest.approx(600)
    assert pace_of(ended, finalists=finalists, mode="min").eta_seconds == pytest.approx(300)


def test_finalists_use_up_nothing_of_the_searchs_budget() -> None:
    """As after an extension, where finalists of before have been trained."""
    events = [*whole_trial(0, at=1.0), Closed(reason="all trials have been made", at=101.0)]
    events += whole_trial(1, at=101.0, purpose="finalist", repeats=0, repeat=1)
    events += [Extended(trials=10, at=201.0)]
    finalists = Finalists(count=1, seeds=1)
    pace = pace_of(events, gpus=1, finalists=finalists, budget=Budget(gpu_hours=300 / 3600))
    assert pace.gpu_hours == pytest.approx(200 / 3600)
    assert pace.search_gpu_hours == pytest.approx(100 / 3600)
    # Of 300 seconds of a GPU 200 are left, at one half of the time; one finalist may come besides.
    assert pace.eta_seconds == pytest.approx(400 + 100)


@pytest.mark.parametrize(
    ("budget", "seconds"),
    [
        ({"epochs": 4.0 * 3}, 200.0),
        ({"hours": 250 / 3600}, 150.0),
        ({"gpu_hours": 2 * 130 / 3600}, 30.0),
        ({"epochs": 1000.0}, 900.0),
        ({"epochs": 2.0}, 0.0),
    ],
)
def test_a_budget_ends_it_before(budget: dict[str, float], seconds: float) -> None:
    pace = pace_of(whole_trial(0, at=1.0), gpus=2, budget=Budget(**budget))
    assert pace.eta_seconds == pytest.approx(seconds)


def test_time_without_a_driver_is_no_work() -> None:
    events = whole_trial(0, at=1.0)
    events += [
        Asked(trial=1, values={}, at=101.0),
        Started(trial=1, leg=1, slot="s", until=1.0, at=101.0),
        Resumed(at=9000.0),
        Lost(trial=1, cause="the study's driver ended", counts=False, at=9000.0),
        Started(trial=1, leg=2, slot="t", until=1.0, at=9010.0),
        Lost(trial=1, cause="killed", counts=True, at=9030.0),
    ]
    worked = Course(events).worked
    assert worked.seconds == pytest.approx(130)
    assert worked.until(9035.0) == pytest.approx(135)


def test_a_course_keeps_reports_and_ends() -> None:
    course = Course(whole_trial(0, at=1.0))
    assert course.ended_at == {0: 101.0}
    assert [report.step for report in course.reports[0]] == [100]


def test_clones_use_up_what_the_trials_of_a_population_have() -> None:
    pace = pace_of(whole_trial(0, at=1.0), trials=8, scheduler={"kind": "pbt"})
    assert pace.eta_seconds == pytest.approx(700)
