"""Where the time of a run went: all of its wall clock, over drivers and attempts."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_args

import pytest
from synthetic import START, SyntheticRun, running, succeeded

import jobs
from cluster.storage import Store
from jobs import account
from jobs.account import PURPOSES, Account
from jobs.record import Outcome, Source, State
from jobs.runs import RunReader
from jobs.status import read_status
from jobs.status_view import TIME_NAMES
from trainers.time_account import Purpose

HOUR = 3600.0


def account_of(made: SyntheticRun, *, now: float) -> Account:
    return read_status(RunReader(made.store, made.run_id), now=now).account


def wall_clock(found: Account) -> float:
    return sum(found.seconds.values())


def started(store: Store, **event: Any) -> SyntheticRun:
    """A run whose first attempt has just begun, 4 s after its driver."""
    made = SyntheticRun(store).submit()
    line = {"time": START, "event": "state", "state": "STARTING", "message": "up"}
    made.lines("events", Source(1, None), line | event)
    made.start_attempt(1, time=START + 4)
    return made


def test_a_run_without_a_driver_has_spent_nothing(local_store: Store) -> None:
    found = account_of(SyntheticRun(local_store).submit(), now=START)
    assert found == Account({}, 0.0)


def test_the_account_of_a_run_is_its_wall_clock_from_the_drivers_start_to_its_end(
    local_store: Store,
) -> None:
    found = account_of(succeeded(local_store), now=START + HOUR)
    assert list(found.seconds) == list(PURPOSES)
    assert wall_clock(found) == pytest.approx(205)
    # The driver, then the attempt's own start.
    assert found.seconds["start"] == pytest.approx(4 + 6.4)
    # From the dead attempt's last line at 75 s to the next attempt at 87 s, and its start.
    assert found.seconds["recovery"] == pytest.approx(87 - 75 + 6.4)
    assert found.seconds["compute"] == pytest.approx((130 + 200) * 0.5 * 0.78)
    assert found.seconds["evaluation"] == pytest.approx((2 + 4) * 2.1)
    assert found.seconds["other"] == 0.5
    # What the attempt says of its end, and from there to the end of the driver.
    attempt_ended = 87 + 6.4 + 100 * 0.92 + 4 * (2.1 + 0.3) + 1.2 + 0.5
    assert found.seconds["finish"] == pytest.approx(1.2 + 205 - attempt_ended)


def test_steps_that_were_done_again_are_lost(local_store: Store) -> None:
    # Step 100 was restored, the last line tells of step 130.
    found = account_of(succeeded(local_store), now=START + HOUR)
    assert found.lost_seconds == pytest.approx(30 * 0.5 * 0.78)


def test_between_two_lines_lost_steps_count_by_their_number(local_store: Store) -> None:
    made = started(local_store)
    made.train(1, after=0, until=130, time=START + 10)
    made.start_attempt(2, restored_step=105, time=START + 90)
    made.lease(renewed_at=START + 99)
    assert account_of(made, now=START + 99).lost_seconds == pytest.approx(25 * 0.5 * 0.78)


def test_without_a_checkpoint_all_steps_are_lost(local_store: Store) -> None:
    made = started(local_store)
    made.train(1, after=0, until=30, time=START + 10)
    made.start_attempt(2, time=START + 90)
    made.lease(renewed_at=START + 99)
    assert account_of(made, now=START + 99).lost_seconds == pytest.approx(30 * 0.5 * 0.78)


def test_an_attempt_that_gives_way_loses_nothing(local_store: Store) -> None:
    made = started(local_store)
    made.train(1, after=0, until=45, time=START + 10)
    spent = {"start": 6.0, "compute": 20.0, "checkpoint": 2.0}
    outcome = Outcome(attempt=1, state=State.RECOVERING, step=45, seconds=spent)
    local_store.write(made.paths.outcome(1), outcome.to_bytes())
    made.start_attempt(2, restored_step=45, time=START + 40)
    made.lease(renewed_at=START + 47)
    found = account_of(made, now=START + 50)
    assert found.lost_seconds == 0
    # From the end of the first at 32 s, its account; the second is at its start for 6.4 s.
    assert found.seconds["recovery"] == pytest.approx(40 - 32 + 6.4)


def test_a_run_that_goes_on_is_accounted_for_up_to_its_last_line(local_store: Store) -> None:
    made = running(local_store, now=START)  # its last line was told just now
    made.lease(renewed_at=START + 20)
    event = {"time": START + 21, "event": "checkpoint", "message": "saved"}
    made.lines("events", Source(1, 0), event)
    found = account_of(made, now=START + 25)
    assert found.seconds["recovery"] == found.seconds["finish"] == 0
    assert wall_clock(found) == pytest.approx(4 + 6.4 + 60 * 0.92 + 2 * (2.1 + 0.3))


def test_a_run_that_has_not_told_anything_yet_is_starting_for_as_long_as_its_driver_lives(
    local_store: Store,
) -> None:
    made = SyntheticRun(local_store).submit()
    made.state(State.STARTING, "the driver is up", time=START)
    made.lease(renewed_at=START + 40)
    found = account_of(made, now=START + 45)
    assert (found.seconds["start"], wall_clock(found)) == (40, 40)


def test_once_the_driver_misses_an_attempt_it_is_recovering(local_store: Store) -> None:
    made = started(local_store)
    made.train(1, after=0, until=40, time=START + 10)
    told = account_of(made, now=START + 40)
    made.state(State.RECOVERING, "a worker died", time=START + 60)
    made.lease(renewed_at=START + 70)
    found = account_of(made, now=START + 75)
    assert told.seconds["recovery"] == 0
    assert wall_clock(found) == pytest.approx(70)
    assert found.seconds["recovery"] == pytest.approx(70 - wall_clock(told))


def test_a_run_that_was_killed_is_accounted_for_up_to_its_last_sign_of_life(
    local_store: Store,
) -> None:
    made = started(local_store)
    made.train(1, after=0, until=40, time=START + 10)
    made.lease(renewed_at=START + 35)
    found = account_of(made, now=START + HOUR)
    assert wall_clock(found) == pytest.approx(35)
    assert found.seconds["recovery"] == pytest.approx(35 - (4 + 6.4 + 20 * 0.92))
    assert found.seconds["finish"] == 0


def test_an_attempt_that_was_killed_in_its_start_was_starting(local_store: Store) -> None:
    made = SyntheticRun(local_store).submit()
    made.state(State.STARTING, "the driver is up", time=START)
    for attempt, at in ((1, START + 4), (2, START + 30)):
        made.start_attempt(attempt, time=at)
    made.train(2, after=0, until=40, time=START + 36)
    made.lease(renewed_at=START + 60)
    found = account_of(made, now=START + 60)
    assert found.seconds["start"] == pytest.approx(30 + 6.4)
    assert found.seconds["recovery"] == 0


def test_time_without_a_driver_is_not_the_runs(local_store: Store) -> None:
    made = started(local_store)
    made.train(1, after=0, until=40, time=START + 10)
    made.state(State.STOPPED, "a stop was asked for", time=START + 38)
    made.finish(State.STOPPED, attempt=1, step=40, time=START + 40)
    stopped = account_of(made, now=START + 41)
    assert wall_clock(stopped) == pytest.approx(40)

    # Result and lease are the next driver's now: the last that is known of this one is an event.
    made.state(State.STARTING, "the driver is up", time=START + HOUR, generation=2)
    made.start_attempt(2, restored_step=40, generation=2, time=START + HOUR + 5)
    made.train(2, after=40, until=60, time=START + HOUR + 11)
    made.finish(State.STOPPED, attempt=2, step=60, time=START + HOUR + 30, generation=2)
    found = account_of(made, now=START + 2 * HOUR)
    assert wall_clock(found) == pytest.approx(38 + 30)
    assert found.seconds["start"] == stopped.seconds["start"]
    assert found.seconds["recovery"] == pytest.approx(5 + 6.4)
    assert found.seconds["finish"] > stopped.seconds["finish"] > 0
    assert found.lost_seconds == 0


def test_a_driver_that_wakes_after_its_successor_began_adds_nothing(local_store: Store) -> None:
    made = started(local_store)
    made.train(1, after=0, until=40, time=START + 10)
    made.state(State.STARTING, "the driver is up", time=START + 100, generation=2)
    made.state(State.RUNNING, "frozen until now", time=START + 500)
    made.lease(renewed_at=START + 120, generation=2)
    assert wall_clock(account_of(made, now=START + 120)) == pytest.approx(120)


def test_a_driver_that_waited_for_the_lease_began_before(local_store: Store) -> None:
    made = started(local_store, began_at=START - 60)
    made.train(1, after=0, until=40, time=START + 10)
    made.lease(renewed_at=START + 30)
    assert account_of(made, now=START + 30).seconds["start"] == pytest.approx(60 + 4 + 6.4)


def test_a_clock_that_is_behind_counts_nothing_twice(local_store: Store) -> None:
    made = started(local_store)
    made.train(1, after=0, until=40, time=START + 10)  # accounted for until 28.8 s
    made.start_attempt(2, restored_step=0, time=START + 20)
    made.lease(renewed_at=START + 50)
    found = account_of(made, now=START + 50)
    assert found.seconds["recovery"] == pytest.approx(6.4)


def test_what_a_later_version_calls_a_purpose_is_kept(local_store: Store) -> None:
    made = started(local_store)
    outcome = Outcome(
        attempt=1, state=State.SUCCEEDED, step=9, seconds={"compute": 7.0, "new": 2.0}
    )
    local_store.write(made.paths.outcome(1), outcome.to_bytes())
    made.lease(renewed_at=START + 30)
    assert account_of(made, now=START + 30).seconds["new"] == 2.0


def test_a_run_under_torchrun_has_no_driver_that_tells_anything(local_store: Store) -> None:
    made = SyntheticRun(local_store).submit()
    made.start_attempt(1, time=START + 1)
    made.train(1, after=0, until=40, time=START + 7)
    made.finish(State.SUCCEEDED, attempt=1, step=40, time=START + 40)
    made.lease(taken_at=START, renewed_at=START + 42, released=True)
    found = account_of(made, now=START + 50)
    assert wall_clock(found) == pytest.approx(42)
    assert found.seconds["start"] == pytest.approx(1 + 6.4)


def test_each_purpose_has_a_meaning_a_name_and_a_color() -> None:
    told = re.findall(r"^([a-z_]+)  +\S", str(account.__doc__), flags=re.M)
    assert sorted(told) == sorted(PURPOSES)
    assert sorted(TIME_NAMES) == sorted(PURPOSES)
    assert {*get_args(Purpose), "recovery"} == set(PURPOSES)
    page = (Path(jobs.__file__).parent / "report_base.html.j2").read_text()
    assert all(page.count(f"--t-{purpose}: #") == 2 for purpose in PURPOSES)
