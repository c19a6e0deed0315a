"""What trackers are told of a run, and what a tracker is.

A *tracked run* is a run as TensorBoard, MLflow or W&B has it. Names of metrics are those of the
lines of metrics: `train/loss`, `validation/f1`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from cluster.storage import join_uri
from jobs.record import Failure, Outcome, Result, State
from trainers.assignment import Assignment

_NO_METRICS = frozenset({"time", "step", "attempt"})


@dataclass(frozen=True)
class TrackedRun:
    """Which run it is: the same after a resume, which therefore goes on in one tracked run."""

    run_id: str
    uri: str
    job: str
    """What its user calls it: the job's `name`."""
    kind: Literal["run", "study", "trial"] = "run"
    study: TrackedRun | None = None
    """Of a trial: the study that it belongs to."""
    donor: str | None = None
    """Of a clone: the trial, and its step, with whose checkpoint it begins."""

    @classmethod
    def of(cls, assignment: Assignment) -> TrackedRun:
        """The run of an assignment."""
        spec, trial, run_id = assignment.spec, assignment.trial, assignment.run_id
        uri = join_uri(spec.store.uri, run_id)
        if trial is None:
            return cls(run_id, uri, spec.name, "run" if spec.search is None else "study")
        study = cls(trial.study, join_uri(spec.store.uri, trial.study), spec.name, "study")
        donor = None
        if trial.donor is not None:
            donor = f"{trial.donor.run_id} at step {trial.donor.step}"
        return cls(run_id, uri, spec.name, "trial", study, donor)

    @property
    def labels(self) -> dict[str, str]:
        """What tells it from others, for people and for searches."""
        labels = {"run_id": self.run_id, "uri": self.uri, "job": self.job, "kind": self.kind}
        if self.study is not None:
            labels["study"] = self.study.run_id
        if self.donor is not None:
            labels["donor"] = self.donor
        return labels


@dataclass(frozen=True)
class Parameters:
    """The job, and what else a run's numbers depend on."""

    tree: Mapping[str, Any]
    """Plain values, in groups as in the job file."""


@dataclass(frozen=True)
class Point:
    """Metrics of one step."""

    step: int
    time: float
    """Unix seconds."""
    values: Mapping[str, float]


@dataclass(frozen=True)
class Ended:
    """How a run ended; a trial that is paused may go on after it."""

    state: str
    """One of `State`, or PAUSED."""
    exit_code: int
    step: int
    values: Mapping[str, float] = field(default_factory=dict)
    """Metrics of the model that is the run's result, such as test/f1."""
    cause: str | None = None
    """Of a failure."""
    report: str | None = None
    """HTML."""

    @classmethod
    def of_trial(cls, outcome: Outcome) -> Ended:
        """Of an attempt of a trial, which is over for now."""
        state = "PAUSED" if outcome.state is State.RECOVERING else outcome.state.value
        code = outcome.failure.exit_code if outcome.failure is not None else 0
        return cls(state, code, outcome.step, cause=_cause(outcome.failure))

    @classmethod
    def of_run(cls, result: Result, *, report: str | None) -> Ended:
        """Of a run, or of a study."""
        outcome = result.outcome
        values: Mapping[str, float] = {}
        if outcome is not None and outcome.test is not None and outcome.tested_on:
            values = _named(outcome.tested_on, outcome.test["metrics"])
        cause = _cause(result.failure)
        return cls(result.state.value, result.exit_code, result.step, values, cause, report)


Told = Parameters | Point | Ended


class Tracker(Protocol):
    """One tracked run, open. All calls come from one thread, may take long, and may raise whatever
    the library behind it does: what was told is told again then."""

    def describe(self, parameters: Parameters) -> None: ...

    def log(self, points: Sequence[Point]) -> None:
        """Metrics in the order in which they were measured. Steps that the tracked run has from an
        attempt before, whose work was lost, may come again."""
        ...

    def end(self, ended: Ended) -> None: ...

    def close(self) -> None:
        """What was told is durable after this, as far as it is reached."""
        ...


def point_of(line: Mapping[str, Any], *, time: float) -> Point | None:
    """The numbers of a line of metrics; None for a line that is of no use in a chart."""
    if line["kind"] == "skipped":
        return None
    values = line["metrics"] if line["kind"] == "evaluation" else line
    return Point(line["step"], time, _named(line.get("split", "train"), values))


def _named(group: str, values: Mapping[str, Any]) -> dict[str, float]:
    return {
        f"{group}/{name}": value
        for name, value in values.items()
        if name not in _NO_METRICS and isinstance(value, int | float)
    }


def _cause(failure: Failure | None) -> str | None:
    return None if failure is None else failure.problems[0][0]
