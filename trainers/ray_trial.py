"""A trial with several workers: the process of its slot is their driver.

    fit_trial(assignment, exchange, told)   in a slot -> Outcome | Failure

The workers get the room that the slot holds (`trainers.ray_trainer`), so that none waits for room
that another slot has, and their first rank asks the study through the slot (`trainers.verdicts`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import ray.util

from jobs.record import Failure, Outcome
from trainers.assignment import Assignment, EvaluationReport, Verdict
from trainers.fit import fit
from trainers.notices import Told
from trainers.verdicts import Verdicts


def fit_trial(
    assignment: Assignment,
    exchange: Callable[[EvaluationReport], Verdict],
    told: Told,
    *,
    python: str | None,
    is_own_cluster: bool,
) -> Outcome | Failure:
    """Trains a trial to its end, or until its study has it pause or end; as `fit`, and as
    `trainers.trial.run_trial` for what the study decides.

    Workers that die are started again within it, and ask again where they have asked before.
    """
    assert assignment.trial is not None
    host = str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]
    with Verdicts(exchange, host=host) as verdicts:
        trial = replace(assignment.trial, study_at=verdicts.at)
        return fit(
            replace(assignment, trial=trial),
            told,
            python=python,
            is_own_cluster=is_own_cluster,
            is_left=verdicts.is_paused,
        )
