"""What a driver tells the ranks of its run, and a trial and its study each other. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal

from jobs.spec import JobSpec


@dataclass(frozen=True)
class Assignment:
    """What a rank is to do; pickles, and holds no secret but `trial.study_at`, which is no secret
    any more once the stretch of that trial is over.

    The generation and the requests seen of rank 0 count: `claim_attempt` tells them to the others.
    """

    spec: JobSpec
    run_id: str
    generation: int
    controls_seen: int
    """Number of the last control request that does not concern this generation."""
    trial: TrialPlan | None = None
    """None: the run is no trial."""

    @property
    def leaseholder(self) -> str:
        """Id of the run under whose lease the ranks work: that of a trial's study."""
        return self.run_id if self.trial is None else self.trial.study


@dataclass(frozen=True)
class TrialPlan:
    """What makes a run a trial of a study.

    It asks its study after each evaluation whether it goes on. It measures neither the untrained
    model nor, at its end, the best one: the study does so for its winner.
    """

    study: str
    """Run id of the study."""
    metric: str
    """By which the study compares its trials, such as validation/f1."""
    mode: Literal["min", "max"]
    donor: DonorCheckpoint | None = None
    """What a clone begins with; None: with the pretrained model."""
    leg: int = 1
    """Which of the trial's stretches on slots this is, from 1."""
    gpu_share: float | None = None
    """How much of its GPU the trial may fill; None: all of it."""
    study_at: StudyAt | None = None
    """Where the first rank asks whether the trial goes on; None: in its own process."""


@dataclass(frozen=True)
class StudyAt:
    """Where a process of a trial's slot answers for the study; see `trainers.verdicts`."""

    host: str
    port: int
    key: bytes = field(repr=False)
    """By which both ends know each other."""


@dataclass(frozen=True)
class DonorCheckpoint:
    """A checkpoint of another trial of the study."""

    run_id: str
    step: int


@dataclass(frozen=True)
class EvaluationReport:
    """What a trial tells its study after an evaluation."""

    step: int
    total_steps: int
    """Of the full budget."""
    epochs: float
    value: float
    """Of the study's metric, at this step."""
    best: float
    """The best of the trial's evaluations up to this step; of a clone, from its donor's step on."""
    is_last: bool
    """Whether the training ends here whatever the verdict: the full budget is used up, or early
    stopping ends it."""

    @property
    def fraction(self) -> float:
        """Share of the full budget that the trial has had; 1 where it needs no more."""
        return 1.0 if self.is_last else self.step / self.total_steps


class Verdict(StrEnum):
    """What a study makes of a report."""

    GO_ON = "go on"
    PAUSE = "pause"
    """The state is saved at this step, and the attempt ends: another one may go on from it."""
    END = "end"
    """The trial ends, and is not to go on."""
