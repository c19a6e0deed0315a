"""What a run is doing, and how far it has got: all that `shoal status` and `watch` show.

read_status(reader)  ->  RunStatus
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cluster.rayjob_status import SeenRayJob
from jobs.account import Account, account_of
from jobs.lines import Line
from jobs.onlooker import Onlooker
from jobs.record import (
    Attempt,
    Crash,
    Lease,
    Manifest,
    Outcome,
    Result,
    best_manifest,
    live_manifests,
    merge_metrics,
)
from jobs.runs import RunReader
from jobs.situation import Situation, look
from jobs.study_status import StudyStatus, read_study


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
    study: StudyStatus | None = None
    """Of a job that searches, which has no steps, checkpoints or attempts of its own."""
    problems: tuple[str, ...] = field(default=())
    rayjob: SeenRayJob | None = None
    """What Kubernetes says of the run, where it was asked and has a RayJob of it."""

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
            "study": self.study and self.study.to_json(),
            "rayjob": self.rayjob
            and {
                "name": self.rayjob.name,
                "namespace": self.rayjob.namespace,
                "job_status": self.rayjob.job_status,
                "deployment_status": self.rayjob.deployment_status,
                "reason": self.rayjob.reason,
                "message": self.rayjob.message,
                "failed": self.rayjob.failed,
                "ray_cluster": self.rayjob.ray_cluster,
            },
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
    seen = look(reader, now=now, result=result, onlooker=onlooker)
    situation, lease, result, events = seen.situation, seen.lease, seen.result, seen.events
    lines = reader.metrics_lines()
    # Manifests first: an attempt that starts in between supersedes some, never adds any.
    manifests = reader.manifests()
    attempts, outcomes, crashes = reader.attempts_with_ends()
    live = live_manifests(manifests, attempts)
    metrics = merge_metrics(lines, attempts)
    now = time.time() if now is None else now
    current = result if result and result.generation == situation.generation else None
    over = situation.is_over
    training = [line for line in metrics if line["kind"] == "train"]
    train = training[-1] if training else None
    total_steps = attempts[-1].total_steps if attempts else 0
    if train and not total_steps:
        total_steps = int(train.get("total_steps") or 0)
    eta = None if over else _eta_seconds(train, attempts, now)
    study = read_study(reader, now=now, is_over=over) if spec.search is not None else None
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
        eta_seconds=study.eta_seconds if study else eta,
        train=train,
        losses=tuple(x for line in training if (x := _number(line, "loss")) is not None),
        evaluations=tuple(line for line in metrics if line["kind"] == "evaluation"),
        best_metric=spec.best[0],
        best=best_manifest(live),
        checkpoints=tuple(live),
        attempts=tuple(attempts),
        outcomes=outcomes,
        crashes=crashes,
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
        study=study,
        problems=tuple(reader.problems),
    )


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
