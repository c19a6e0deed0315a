"""The state of a run, derived from what its folder says."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
from synthetic import SyntheticRun, running

from cluster.storage import Store
from jobs.onlooker import LONGEST_LOOK_SECONDS, Onlooker
from jobs.overview import read_overview
from jobs.record import Failure, Lease, Result, State
from jobs.runs import RunReader
from jobs.situation import derive_state, format_seconds, read_situation

NOW = 1_790_000_000.0


def lease(**changes: Any) -> Lease:
    values: dict[str, Any] = {
        "generation": 2,
        "holder": "x",
        "host": "node-7",
        "pid": 42,
        "renewals": 1,
        "ttl_seconds": 10.0,
        "renewed_at": NOW - 3,
    }
    return Lease(**values | changes)


def result(state: State, *, generation: int = 2, failure: Failure | None = None) -> Result:
    return Result(
        run_id="r", state=state, generation=generation, step=9, finished_at=NOW, failure=failure
    )


def event(state: str, *, generation: int | None = 2, message: str = "") -> dict[str, Any]:
    return {
        "time": NOW,
        "event": "state",
        "state": state,
        "generation": generation,
        "message": message,
    }


def test_a_run_without_a_driver_is_pending() -> None:
    found = derive_state(events=[], lease=None, result=None, now=NOW)
    assert (found.state, found.is_over, found.generation) == (State.PENDING, False, 0)


def test_a_driver_that_has_said_nothing_is_starting() -> None:
    assert derive_state(events=[], lease=lease(), result=None, now=NOW).state is State.STARTING


def test_the_last_state_that_the_driver_told_counts() -> None:
    events = [event("STARTING"), event("RUNNING"), event("RECOVERING", message="rank 1 died")]
    found = derive_state(events=events, lease=lease(), result=None, now=NOW)
    assert (found.state, found.cause) == (State.RECOVERING, "rank 1 died")


def test_what_an_older_driver_told_does_not_count() -> None:
    events = [event("RUNNING", generation=1)]
    assert derive_state(events=events, lease=lease(), result=None, now=NOW).state is State.STARTING


def test_a_state_of_a_later_version_is_passed_over() -> None:
    events = [event("RUNNING"), event("HIBERNATING")]
    assert derive_state(events=events, lease=lease(), result=None, now=NOW).state is State.RUNNING


@pytest.mark.parametrize("silence_seconds", [0, 10, 29])
def test_a_driver_that_renews_late_is_not_given_up(silence_seconds: float) -> None:
    held = lease(renewed_at=NOW - silence_seconds)
    assert not derive_state(events=[], lease=held, result=None, now=NOW).is_over


def test_a_driver_silent_for_several_ttl_is_gone() -> None:
    found = derive_state(
        events=[event("RUNNING")],
        lease=lease(renewed_at=NOW - 31),
        result=None,
        now=NOW,
        run="sentiment-1",
    )
    assert (found.state, found.is_over, found.exit_code) == (State.FAILED_INFRA, True, 3)
    assert found.cause == "its driver is gone (process 42 on node-7, last heard of 31s ago)"
    assert found.hint == "shoal resume sentiment-1"


@pytest.mark.parametrize(("unchanged_seconds", "is_over"), [(0.0, False), (9.9, False), (10, True)])
def test_who_looks_on_gives_a_silent_driver_the_time_of_its_lease(
    unchanged_seconds: float, is_over: bool
) -> None:
    held = lease(renewed_at=NOW - 600)
    found = derive_state(
        events=[], lease=held, result=None, now=NOW, unchanged_seconds=unchanged_seconds
    )
    assert (found.is_over, found.is_doubtful) == (is_over, not is_over)
    assert found.state is (State.FAILED_INFRA if is_over else State.RECOVERING)


def test_who_looks_on_knows_at_once_what_this_machine_knows() -> None:
    held = lease(renewed_at=NOW - 600)
    found = derive_state(
        events=[], lease=held, result=None, now=NOW, driver_has_ended=True, unchanged_seconds=0.0
    )
    assert (found.is_over, found.is_doubtful) == (True, False)


def test_time_in_which_the_store_may_have_been_away_is_not_that_of_a_silent_driver(
    local_store: Store,
) -> None:
    made = SyntheticRun(local_store).submit()
    reader, times = RunReader(local_store, made.run_id), iter([0, 0, 1, 31, 32, 32, 99, 99, 100])
    onlooker = Onlooker(clock=lambda: float(next(times)))
    made.lease(renewed_at=NOW)
    seen = []
    for _ in range(4):  # The second look takes 30 s to be answered, the fourth comes 67 s later.
        onlooker.lease_of(reader)
        seen.append(onlooker.unchanged_seconds)
    assert seen == [0, 1, 2, 2 + LONGEST_LOOK_SECONDS]
    made.lease(renewed_at=NOW, renewals=10)
    onlooker.clock = lambda: 101.0
    onlooker.lease_of(reader)
    assert onlooker.unchanged_seconds == 0


def test_a_silent_driver_whose_process_exists_is_not_given_up() -> None:
    held = lease(renewed_at=NOW - 600)
    events = [event("RUNNING")]
    found = derive_state(
        events=events, lease=held, result=None, now=NOW, driver_has_ended=False, run="RUN"
    )
    assert (found.state, found.is_over) == (State.RECOVERING, False)
    assert "process 42 on node-7) is there, but was last heard of 10m 00s ago" in str(found.cause)
    assert found.hint == "if it does not go on: kill -9 42; then: shoal resume RUN"


def test_a_driver_whose_process_has_ended_is_gone_at_once() -> None:
    found = derive_state(events=[], lease=lease(), result=None, now=NOW, driver_has_ended=True)
    assert found.state is State.FAILED_INFRA


@pytest.mark.parametrize(
    "read",
    [lambda reader: read_situation(reader).state, lambda reader: read_overview(reader).state],
    ids=["one", "all"],
)
def test_a_driver_that_writes_its_result_and_ends_during_a_look_is_not_gone(
    read: Callable[[RunReader], State | None], local_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = running(local_store, now=time.time())

    def ends_now(lease: Lease) -> bool:
        run.finish(State.SUCCEEDED, attempt=1, step=120, time=time.time())
        return True

    monkeypatch.setattr("jobs.runs.driver_has_ended", ends_now)
    monkeypatch.setattr("jobs.overview.driver_has_ended", ends_now)
    assert read(RunReader(local_store, run.run_id)) is State.SUCCEEDED


def test_a_lease_given_back_without_a_result_is_a_driver_that_is_gone() -> None:
    held = lease(released=True, renewed_at=NOW - 11)
    found = derive_state(events=[event("RUNNING")], lease=held, result=None, now=NOW)
    assert (found.state, found.is_over) == (State.FAILED_INFRA, True)


def test_a_result_tells_state_cause_and_exit_code() -> None:
    events = [event("SUCCEEDED", message="all epochs are done")]
    found = derive_state(
        events=events, lease=lease(released=True), result=result(State.SUCCEEDED), now=NOW + 999
    )
    assert (found.state, found.cause) == (State.SUCCEEDED, "all epochs are done")
    assert (found.is_over, found.exit_code, found.hint) == (True, 0, None)


def test_a_failure_gives_its_own_cause_and_hint() -> None:
    failure = Failure(
        state=State.FAILED_INFRA,
        problems=(("disk full", "free some"),),
        where="rank 3",
        exit_code=3,
    )
    found = derive_state(
        events=[], lease=lease(), result=result(State.FAILED_INFRA, failure=failure), now=NOW
    )
    assert found.cause == "rank 3: disk full"
    assert found.hint == "free some; then: shoal resume RUN"
    assert found.exit_code == 3


def test_a_stopped_run_says_how_to_go_on() -> None:
    found = derive_state(events=[], lease=lease(), result=result(State.STOPPED), now=NOW)
    assert (found.hint, found.exit_code) == ("shoal resume RUN", 130)


def test_a_result_of_an_older_driver_does_not_count() -> None:
    found = derive_state(
        events=[event("RUNNING")],
        lease=lease(),
        result=result(State.STOPPED, generation=1),
        now=NOW,
    )
    assert (found.state, found.is_over) == (State.RUNNING, False)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "0s"), (59, "59s"), (200, "3m 20s"), (7500, "2h 05m"), (360_000, "4d 4h")],
)
def test_durations_show_their_two_largest_units(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text
