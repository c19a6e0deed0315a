"""What a run is doing and why: derived from its folder, by pure functions.

derive_state(events, lease, result, now)  ->  Situation
read_status(reader)                       ->  RunStatus, all that `shoal status` and `watch` show
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jobs import runs
from jobs.account import Account, account_of
from jobs.lines import Line
from jobs.onlooker import Onlooker
from jobs.record import Attempt, Crash, Lease, Manifest, Outcome, Result, State
from jobs.runs import RunReader

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


@dataclass(frozen=True)
class RunStatus:
    """All that is shown of a run while it goes on; the numbers are the final weights' only."""

    run_id: str
    uri: str
    name: str
    situation: Situation
    now: float
    submitted_at: float
    finished_at: float | None
    step: int
    total_steps: int | None
    epoch: float | None
    epochs: int
    eta_seconds: float | None
    train: Line | None
    """The newest line of training: loss, learning_rate, rows_per_second, ..."""
    losses: tuple[float, ...]
    evaluations: tuple[Line, ...]
    best_metric: str
    best: Manifest | None
    checkpoints: tuple[Manifest, ...]
    attempts: tuple[Attempt, ...]
    outcomes: Mapping[int, Outcome]
    result: Result | None
    """The result of the driver that `situation` speaks of."""
    events: tuple[Line, ...]
    account: Account
    """Where the time went."""
    crashes: Mapping[int, Crash] = field(default_factory=dict)
    """Why attempts without an outcome broke off, where one of their ranks could tell."""
    skipped: tuple[Line, ...] = ()
    """Steps whose gradient was not finite, and which changed nothing: step, epoch, first_item,
    next_item, norm."""
    problems: tuple[str, ...] = field(default=())

    @property
    def progress(self) -> float | None:
        """Share of the steps that are done, 0 to 1."""
        return min(1.0, self.step / self.total_steps) if self.total_steps else None

    @property
    def seconds_since_submitted(self) -> float:
        return max(0.0, (self.finished_at or self.now) - self.submitted_at)

    def to_json(self) -> dict[str, Any]:
        """One JSON document with stable keys."""
        train = self.train or {}
        outcome = self.result.outcome if self.result else None
        best = self.best
        return {
            "run_id": self.run_id,
            "uri": self.uri,
            "name": self.name,
            "state": self.situation.state,
            "cause": self.situation.cause,
            "hint": self.situation.hint,
            "is_over": self.situation.is_over,
            "generation": self.situation.generation,
            "submitted_at": self.submitted_at,
            "finished_at": self.finished_at,
            "step": self.step,
            "total_steps": self.total_steps,
            "progress": self.progress,
            "epoch": self.epoch,
            "epochs": self.epochs,
            "eta_seconds": self.eta_seconds,
            **{key: train.get(key) for key in _TRAIN_KEYS},
            "last_evaluation": _without_tables(self.evaluations[-1]) if self.evaluations else None,
            "best": best
            and {
                "step": best.step,
                "metric": self.best_metric,
                "value": best.evaluation.get(self.best_metric),
                "checkpoint": f"checkpoints/{best.name.folder}",
            },
            "checkpoints": [m.step for m in self.checkpoints],
            "skipped_steps": [int(line["step"]) for line in self.skipped],
            "attempts": [
                {
                    "attempt": a.attempt,
                    "generation": a.generation,
                    "workers": a.world_size,
                    "restored_step": a.restored_step,
                    "started_at": a.started_at,
                    "state": o.state if (o := self.outcomes.get(a.attempt)) else None,
                    "last_step": o.step if o else None,
                    "broke_off": c.reason if (c := self.crashes.get(a.attempt)) else None,
                    "max_tokens_per_microbatch": a.max_tokens_per_microbatch,
                    "launch_tokens": a.launch_tokens,
                }
                for a in self.attempts
            ],
            "test": outcome and outcome.test and outcome.test.get("metrics"),
            "before": outcome and outcome.before and outcome.before.get("metrics"),
            "tested_on": outcome and outcome.tested_on,
            "seconds": dict(self.account.seconds),
            "lost_seconds": self.account.lost_seconds,
            "problems": list(self.problems),
        }


_TRAIN_KEYS = (
    "loss",
    "learning_rate",
    "grad_norm",
    "rows_per_second",
    "tokens_per_second",
    "padding_share",
    "data_wait_share",
    "imbalance",
    "straggler",
)


def read_status(
    reader: RunReader,
    *,
    now: float | None = None,
    result: Result | None = None,
    onlooker: Onlooker | None = None,
) -> RunStatus:
    """The status of a run at this moment. Raises SpecError if there is no such run.

    `result` is what the driver is about to write; None: what the folder holds. Without an
    `onlooker` a driver that has long been silent is taken for gone.
    """
    spec = reader.spec()
    submitted_at = reader.spec_head().modified_at
    situation, lease, result = _situation(reader, now=now, result=result, onlooker=onlooker)
    events = reader.events()
    metrics = reader.metrics()
    lines = reader.metrics_lines()
    attempts = reader.attempts()
    outcomes = reader.outcomes()
    now = time.time() if now is None else now
    current = result if result and result.generation == situation.generation else None
    over = situation.is_over
    training = [line for line in metrics if line["kind"] == "train"]
    train = training[-1] if training else None
    total_steps = attempts[-1].total_steps if attempts else 0
    if train and not total_steps:
        total_steps = int(train.get("total_steps") or 0)
    return RunStatus(
        run_id=reader.run_id,
        uri=reader.uri,
        name=spec.name,
        situation=situation,
        now=now,
        submitted_at=submitted_at,
        finished_at=_finished_at(current, lease, lines) if over else None,
        step=_step(train, attempts, current),
        total_steps=total_steps or None,
        epoch=_number(train, "epoch"),
        epochs=spec.train.epochs,
        eta_seconds=None if over else _eta_seconds(train, attempts, now),
        train=train,
        losses=tuple(x for line in training if (x := _number(line, "loss")) is not None),
        evaluations=tuple(line for line in metrics if line["kind"] == "evaluation"),
        best_metric=spec.best[0],
        best=reader.best_manifest(),
        checkpoints=tuple(reader.live_manifests()),
        attempts=tuple(attempts),
        outcomes=outcomes,
        crashes=reader.crashes(),
        result=current,
        events=tuple(events),
        skipped=tuple(line for line in metrics if line["kind"] == "skipped"),
        account=account_of(
            events=events,
            lines=lines,
            attempts=attempts,
            outcomes=outcomes,
            lease=lease,
            result=result,
            is_over=over,
        ),
        problems=tuple(reader.problems),
    )


def read_situation(
    reader: RunReader, *, now: float | None = None, onlooker: Onlooker | None = None
) -> Situation:
    """The state of a run at this moment, without its metrics; cheap to ask again."""
    return _situation(reader, now=now, result=None, onlooker=onlooker)[0]


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


def _situation(
    reader: RunReader, *, now: float | None, result: Result | None, onlooker: Onlooker | None
) -> tuple[Situation, Lease | None, Result | None]:
    # In this order: a driver writes its result before it gives the lease back.
    lease = reader.lease() if onlooker is None else onlooker.lease_of(reader)
    result = result or reader.result()
    situation = derive_state(
        events=reader.events(),
        lease=lease,
        result=result,
        now=time.time() if now is None else now,
        driver_has_ended=None if lease is None else runs.driver_has_ended(lease),
        unchanged_seconds=None if onlooker is None else onlooker.unchanged_seconds,
        was_renewed=onlooker is not None and onlooker.was_renewed,
        run=reader.uri,
    )
    return situation, lease, result


def _step(train: Line | None, attempts: Sequence[Attempt], result: Result | None) -> int:
    restored = (attempts[-1].restored_step or 0) if attempts else 0
    return max(int(train["step"]) if train else 0, restored, result.step if result else 0)


def _eta_seconds(train: Line | None, attempts: Sequence[Attempt], now: float) -> float | None:
    """Seconds until the end, as the newest attempt estimates them; None before its first line."""
    eta = _number(train, "eta_seconds")
    if train is None or eta is None or not attempts or train["attempt"] != attempts[-1].attempt:
        return None
    return max(0.0, eta - (now - float(train["time"])))


def _finished_at(result: Result | None, lease: Lease | None, lines: Sequence[Line]) -> float | None:
    if result is not None:
        return result.finished_at
    if lease is not None and lease.renewed_at:
        return lease.renewed_at
    return float(lines[-1]["time"]) if lines else None


def _number(line: Line | None, key: str) -> float | None:
    value = (line or {}).get(key)
    return float(value) if isinstance(value, int | float) else None


def _without_tables(line: Line) -> Line:
    return {key: value for key, value in line.items() if key not in ("per_class", "confusion")}


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
