"""Where the time of a run goes: its wall clock by purpose, over all its drivers and attempts. Pure.

The wall clock of a run is the time in which it had a driver: of each one, from its start to its
last sign of life. What lies between two drivers, as between a stop and `shoal resume`, or a death
that nobody has answered yet, is not part of it; nor is what a driver did after its last event, as
its report, once a successor has its lease and its result. Within an attempt the first rank keeps
the account (`trainers/time_account.py`); what lies between attempts follows from when things were
written down.

start            up to the run's first step, but for the evaluation of the untrained model: the
                 driver (and its wait for the lease), Ray, the workers, data, model and optimizer
recovery         from the end of an attempt to the first step of the next, also that of another
                 driver: until it is missed, Ray, the workers, the state restored. What a killed
                 attempt did after its last line of metrics is in here, as nobody has told of it
compute          steps: forward and backward passes, updates, and what the loop does between them.
                 The first rank's waits for slower ones are in here where gradients are averaged,
                 which goes on during the backward pass
data_wait        the first rank waits for its rows, and cuts them into micro-batches
synchronisation  the ranks agree on the step that comes, add up what they have done, and tell of it;
                 a trial waits for its study's verdict
checkpoint       training stands still for a save: for the end of the one before, for the copy of
                 the state, and for an attempt's last
evaluation       on the validation set, and of the untrained model
finish           after the last step of an attempt that ended by itself: the test of the best model,
                 the end of workers, Ray and driver, the report
other            what of an attempt is in none of these
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from jobs.lines import Line
from jobs.record import Attempt, Lease, Outcome, Result, State, lineage, rightful

PURPOSES = (
    "compute",
    "data_wait",
    "synchronisation",
    "checkpoint",
    "evaluation",
    "start",
    "recovery",
    "finish",
    "other",
)


@dataclass(frozen=True)
class Account:
    """Where the time of a run went, as far as it has told."""

    seconds: Mapping[str, float]
    """By purpose, all of PURPOSES in their order; together the run's wall clock. Empty where no
    driver has started."""
    lost_seconds: float
    """Of `compute`: steps that came after a state that was restored, and were done again. Between
    two lines of metrics steps are taken for equally long."""


def account_of(
    *,
    events: Iterable[Line],
    lines: Iterable[Line],
    attempts: Iterable[Attempt],
    outcomes: Mapping[int, Outcome],
    lease: Lease | None,
    result: Result | None,
    is_over: bool,
) -> Account:
    """The account of a run, from what its folder holds.

    `events` have their generation, `lines` are those of metrics, by time and of all attempts. While
    an attempt goes on, the account ends with its last line, or with the lease's last renewal before
    there is one. Clocks of different machines may differ: where one is behind, nothing is counted
    until it has caught up.
    """
    events, attempts = list(events), rightful(attempts)
    told = _told(lines)
    spent = {a.attempt: _spent(a, told, outcomes.get(a.attempt)) for a in attempts}
    drivers = _drivers(events, attempts, lease, result)
    ledger = _Ledger()
    has_stepped = False
    for driver in drivers:
        ledger.begin(driver.began_at)
        own = [attempt for attempt in attempts if attempt.generation == driver.generation]
        for attempt in own:
            pause = "recovery" if has_stepped else "start"
            ledger.count_until(attempt.started_at, pause)
            for name, value in spent[attempt.attempt].items():
                ledger.count(value, pause if name == "start" else name)
            has_stepped = has_stepped or spent[attempt.attempt].get("compute", 0.0) > 0
        outcome = outcomes.get(own[-1].attempt) if own else None
        has_told = bool(own and spent[own[-1].attempt])
        may_go_on = has_told and outcome is None and driver is drivers[-1] and not is_over
        if may_go_on and not _is_missed(events, driver.generation, since=ledger.now):
            break  # its next line tells what it does now
        if outcome is not None and outcome.state.is_final:
            ledger.count_until(driver.ended_at, "finish")
        else:
            ledger.count_until(driver.ended_at, "recovery" if has_stepped else "start")
    return Account(
        seconds={purpose: round(value, 3) for purpose, value in ledger.seconds.items()},
        lost_seconds=round(_lost_seconds(attempts, told, spent, outcomes), 3),
    )


class _Ledger:
    """Seconds by purpose, one after the other along the clock."""

    def __init__(self) -> None:
        self.now = 0.0
        """Unix seconds up to which the time is accounted for."""
        self.seconds: dict[str, float] = {}

    def begin(self, moment: float) -> None:
        """Leaves out what lies before a moment."""
        self.seconds = dict.fromkeys(PURPOSES, 0.0) | self.seconds
        self.now = max(self.now, moment)

    def count(self, seconds: float, purpose: str) -> None:
        self.seconds[purpose] = self.seconds.get(purpose, 0.0) + seconds
        self.now += seconds

    def count_until(self, moment: float, purpose: str) -> None:
        """Counts the time up to a moment; nothing where that is past."""
        self.count(max(0.0, moment - self.now), purpose)


@dataclass(frozen=True)
class _Driver:
    generation: int
    began_at: float
    ended_at: float
    """Unix seconds of its last sign of life, or when its successor began."""


def _drivers(
    events: Iterable[Line],
    attempts: Iterable[Attempt],
    lease: Lease | None,
    result: Result | None,
) -> list[_Driver]:
    """The drivers that a run has had, in order, from all that bears their number and a time."""
    signs: dict[int, list[float]] = {}
    for event in events:
        if isinstance(event.get("generation"), int):
            own = signs.setdefault(event["generation"], [])
            own += [float(event.get(key) or event["time"]) for key in ("began_at", "time")]
    for attempt in attempts:
        signs.setdefault(attempt.generation, []).append(attempt.started_at)
    if lease is not None:
        own = signs.setdefault(lease.generation, [])
        own += [at for at in (lease.taken_at, lease.renewed_at) if at]
    if result is not None:
        signs.setdefault(result.generation, []).append(result.finished_at)
    drivers: list[_Driver] = []
    successor_began_at = float("inf")
    for generation, times in sorted(signs.items(), reverse=True):
        if times:
            began_at = min(times)
            drivers.append(_Driver(generation, began_at, min(max(times), successor_began_at)))
            successor_began_at = began_at
    return drivers[::-1]


@dataclass(frozen=True)
class _Told:
    """What a line of training says of the time, from the start of its attempt."""

    step: int
    seconds: Mapping[str, float]


def _told(lines: Iterable[Line]) -> dict[int, list[_Told]]:
    """By attempt; in order of the lines."""
    told: dict[int, list[_Told]] = {}
    for line in lines:
        if isinstance(line.get("seconds"), Mapping):
            seconds = {str(name): float(value) for name, value in line["seconds"].items()}
            told.setdefault(int(line["attempt"]), []).append(_Told(int(line["step"]), seconds))
    return told


def _spent(
    attempt: Attempt, told: Mapping[int, Sequence[_Told]], outcome: Outcome | None
) -> Mapping[str, float]:
    """Seconds of an attempt by purpose: all of it, or as far as one that has no outcome told.

    Empty where it has not told anything: it was killed in its start, or is still at it.
    """
    if outcome is not None and outcome.seconds:
        return outcome.seconds
    if attempt.attempt in told:
        return told[attempt.attempt][-1].seconds
    return {"start": attempt.start_seconds} if attempt.start_seconds else {}


def _is_missed(events: Iterable[Line], generation: int, *, since: float) -> bool:
    """Whether a driver has said that it starts the workers again."""
    return any(
        event.get("state") == State.RECOVERING
        and event.get("rank") is None
        and event.get("generation") == generation
        and float(event["time"]) > since
        for event in events
    )


def _lost_seconds(
    attempts: Sequence[Attempt],
    told: Mapping[int, Sequence[_Told]],
    spent: Mapping[int, Mapping[str, float]],
    outcomes: Mapping[int, Outcome],
) -> float:
    """Seconds of `compute` in steps that are not part of the final weights."""
    kept_until = {attempt: until for attempt, _, until in lineage(attempts)}
    lost = 0.0
    for attempt in attempts:
        restored = attempt.restored_step or 0
        until = kept_until.get(attempt.attempt, restored)
        computed = spent[attempt.attempt].get("compute", 0.0)
        if until is None or not computed:
            continue
        done = [(restored, 0.0)]
        done += [(t.step, t.seconds.get("compute", 0.0)) for t in told.get(attempt.attempt, ())]
        if attempt.attempt in outcomes:
            done.append((outcomes[attempt.attempt].step, computed))
        lost += computed - _seconds_until(until, done)
    return lost


def _seconds_until(step: int, done: Sequence[tuple[int, float]]) -> float:
    """Seconds so far at `step`, which is not before the first of `done`: (step, seconds so far), in
    order."""
    first, least = [point for point in done if point[0] <= step][-1]
    after = [point for point in done if point[0] > step]
    if not after:
        return least
    last, most = after[0]
    return least + (most - least) * (step - first) / (last - first)
