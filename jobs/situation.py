"""Whether a run goes on, has ended or was left by its driver, and why.

derive_state(events, lease, result, now)  ->  Situation    pure
read_situation(reader)                    ->  Situation    of the folder, at this moment
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from jobs import runs
from jobs.lines import Line
from jobs.onlooker import Onlooker
from jobs.record import Lease, Result, State
from jobs.runs import RunReader
from jobs.study.trials import ENDED, Trial

LOST_AFTER_TTLS = 3.0
"""A lease that was not renewed for so many of its times to live is taken for a dead driver's,
unless its process is known to exist. Only people are told so: whoever acts on it measures the
expiry itself, by its own clock."""
LOOK_SECONDS = 1.0


@dataclass(frozen=True)
class Situation:
    """The state of a run with its cause."""

    state: State
    cause: str | None
    """Why, as a sentence; None where the state says it all."""
    hint: str | None
    """What to type to go on."""
    generation: int
    """Number of drivers so far; 0: none has started."""
    is_over: bool
    """Whether no driver works on it any more."""
    exit_code: int = 0
    """For a command that waited for the end."""
    is_doubtful: bool = False
    """Whether the driver may be gone: an `Onlooker` knows after its lease's time to live."""


def derive_state(
    *,
    events: Iterable[Line],
    lease: Lease | None,
    result: Result | None,
    now: float,
    driver_has_ended: bool | None = None,
    unchanged_seconds: float | None = None,
    was_renewed: bool = False,
    run: str = "RUN",
) -> Situation:
    """The state of a run, from what its folder says at `now` (Unix seconds).

    `driver_has_ended`: whether the driver's process is gone, where this machine knows.
    `unchanged_seconds`: for how long the lease was seen to stay as it is, where somebody looks on;
    else a driver that has long been silent is taken for gone. `was_renewed`: whether it was seen to
    be renewed there before, so that the driver lives and only its clock is another. `run` is the
    name that hints use. A result counts only if no newer driver has taken the run since.
    """
    resume = f"shoal resume {run}"
    if result is not None and (lease is None or result.generation >= lease.generation):
        return _ended(result, events, resume)
    if lease is None:
        return Situation(State.PENDING, "no driver has started yet", None, 0, is_over=False)
    silence_seconds = now - lease.renewed_at
    given_back = lease.released and silence_seconds > lease.ttl_seconds
    is_watched = unchanged_seconds is not None and unchanged_seconds < lease.ttl_seconds
    is_silent = silence_seconds > LOST_AFTER_TTLS * lease.ttl_seconds
    if is_watched and was_renewed:
        is_silent = False
    heard = f"last heard of {format_seconds(silence_seconds)} ago"
    if is_silent and driver_has_ended is None and not lease.released and is_watched:
        return Situation(
            State.RECOVERING,
            f"its driver (process {lease.pid} on {lease.host}, {heard}) is gone, or the store was "
            f"away: it is looked at for {format_seconds(lease.ttl_seconds)}",
            None,
            lease.generation,
            is_over=False,
            is_doubtful=True,
        )
    if driver_has_ended or given_back or (is_silent and driver_has_ended is None):
        return Situation(
            State.FAILED_INFRA,
            f"its driver is gone (process {lease.pid} on {lease.host}, {heard})",
            resume,
            lease.generation,
            is_over=True,
            exit_code=State.FAILED_INFRA.exit_code,
        )
    if is_silent:
        return Situation(
            State.RECOVERING,
            f"its driver (process {lease.pid} on {lease.host}) is there, but was {heard}: "
            "the store was away, or it is frozen",
            f"if it does not go on: kill -9 {lease.pid}; then: {resume}",
            lease.generation,
            is_over=False,
        )
    state, message = _last_state(events, lease.generation)
    return Situation(state or State.STARTING, message, None, lease.generation, is_over=False)


def _ended(result: Result, events: Iterable[Line], resume: str) -> Situation:
    cause = hint = None
    failure = result.failure or (result.outcome.failure if result.outcome else None)
    if failure is not None and failure.problems:
        cause, hint = failure.problems[0]
        if failure.where:
            cause = f"{failure.where}: {cause}"
    else:
        state, message = _last_state(events, result.generation)
        cause = message if state == result.state else None
    if result.state in (State.STOPPED, State.FAILED_INFRA, State.FAILED_RESOURCES):
        hint = f"{hint}; then: {resume}" if hint else resume
    return Situation(
        result.state,
        cause,
        hint,
        result.generation,
        is_over=True,
        exit_code=result.exit_code,
    )


def _last_state(events: Iterable[Line], generation: int) -> tuple[State | None, str | None]:
    found: tuple[State | None, str | None] = None, None
    for event in events:
        if event.get("event") == "state" and event.get("generation") in (None, generation):
            try:
                found = State(str(event.get("state"))), event.get("message") or None
            except ValueError:
                continue  # A state of a later version: the one before it is the best we know.
    return found


def read_situation(
    reader: RunReader, *, now: float | None = None, onlooker: Onlooker | None = None
) -> Situation:
    """The state of a run at this moment, without its metrics; cheap to ask again."""
    return look(reader, now=now, onlooker=onlooker).situation


def await_certainty(
    readers: Sequence[RunReader], *, wait: Callable[[str], object]
) -> list[Situation]:
    """The state of each run once it is certain whether its driver, if silent, is gone.

    `wait` is told of each run that is waited for, all of them for about as long as one lease lives.
    """
    onlookers = [Onlooker() for _ in readers]
    found: list[Situation | None] = [None] * len(readers)
    while True:
        for number, (reader, onlooker) in enumerate(zip(readers, onlookers, strict=True)):
            before = found[number]
            if before is None or before.is_doubtful:
                found[number] = now = read_situation(reader, onlooker=onlooker)
                if before is None and now.is_doubtful:
                    wait(str(now.cause))
        situations = [situation for situation in found if situation is not None]
        if not any(situation.is_doubtful for situation in situations):
            return situations
        time.sleep(LOOK_SECONDS)


@dataclass(frozen=True)
class Look:
    """The state of a run at one moment, and what it was taken from."""

    situation: Situation
    lease: Lease | None
    """Of a trial, none: its study's driver has it."""
    result: Result | None
    events: list[Line]
    """All of the run so far."""


def look(
    reader: RunReader,
    *,
    now: float | None = None,
    result: Result | None = None,
    onlooker: Onlooker | None = None,
) -> Look:
    """Looks at a run; `result` and `onlooker` as for `jobs.status.read_status`."""
    study = reader.study
    if study is not None:
        situation = _trial_situation(reader, study, now=now, onlooker=onlooker)
        return Look(situation, None, None, reader.events())
    # In this order: a driver writes its result before it gives the lease back, and ends after that.
    lease = reader.lease() if onlooker is None else onlooker.lease_of(reader)
    has_ended = None if lease is None else runs.driver_has_ended(lease)
    result = result or reader.result()
    events = reader.events()
    situation = derive_state(
        events=events,
        lease=lease,
        result=result,
        now=time.time() if now is None else now,
        driver_has_ended=has_ended,
        unchanged_seconds=None if onlooker is None else onlooker.unchanged_seconds,
        was_renewed=onlooker is not None and onlooker.was_renewed,
        run=reader.uri,
    )
    return Look(situation, lease, result, events)


def _trial_situation(
    reader: RunReader, study: RunReader, *, now: float | None, onlooker: Onlooker | None
) -> Situation:
    """The state of a trial, as its study tells it."""
    whole = look(study, now=now, onlooker=onlooker).situation
    trial = reader.as_trial()
    return whole if trial is None else situation_of_trial(trial, whole)


def situation_of_trial(trial: Trial, study: Situation) -> Situation:
    """The state of a trial whose study is in that one. Pure."""
    share = f"{trial.fraction:.0%} of its budget"
    match trial.status:
        case "finished":
            state, cause = State.SUCCEEDED, trial.reason
        case "stopped":
            state, cause = State.PRUNED, f"its study ended it at {share}: {trial.reason}"
        case "failed" if trial.failure is not None:
            state, cause = trial.failure.state, trial.failure.problems[0][0]
        case _ if study.is_over:
            return replace(study, cause=f"its study is {study.state}", exit_code=0)
        case "paused":
            state, cause = State.PENDING, f"paused at {share}: {trial.reason}"
        case "ready":
            state, cause = State.PENDING, "it waits for a slot"
        case _:
            state, cause = State.RUNNING, f"on slot {trial.slot}, until {trial.until:.0%}"
    is_over = trial.status in ENDED
    return Situation(
        state, cause, None, study.generation, is_over, exit_code=state.exit_code if is_over else 0
    )


def format_seconds(seconds: float) -> str:
    """`42s`, `3m 20s`, `2h 05m`, `4d 3h`: the two largest units."""
    whole = max(0, round(seconds))
    minutes, rest = divmod(whole, 60)
    hours, minutes_left = divmod(minutes, 60)
    days, hours_left = divmod(hours, 24)
    if days:
        return f"{days}d {hours_left}h"
    if hours:
        return f"{hours}h {minutes_left:02d}m"
    if minutes:
        return f"{minutes}m {rest:02d}s"
    return f"{whole}s"
