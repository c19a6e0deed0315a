"""Trials of a study, one after another in one process: what a slot runs.

    prepare_trial(assignment)           its run folder, and what a clone begins with
    run_trial(assignment, exchange)     -> Outcome
    record_end(assignment, outcome)

Nothing of a trial stays behind but what the next one would make again: see `trainers/kept.py`. Any
thread of the process will do, one trial at a time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace

import torch

from cluster.storage import ObjectExists, Store
from jobs.record import Outcome, RunPaths, State
from trainers.assignment import Assignment, EvaluationReport, Verdict
from trainers.clone import begin_clone
from trainers.controls import last_request
from trainers.finish import build_result, write_result
from trainers.kept import Kept
from trainers.patience import Patience
from trainers.session import own_device
from trainers.worker import train_worker

Exchange = Callable[[EvaluationReport], Verdict]
"""Tells the study of an evaluation, and gives its verdict. It may take as long as it needs; whoever
gives it ends the wait where nobody is left to answer."""

_kept = Kept()


def prepare_trial(assignment: Assignment) -> Assignment:
    """Begins the trial's run folder, with its job and, for a clone, its donor's checkpoint; what is
    there already is left as it is. The assignment, for which requests up to now are old.

    The donor of a clone may go on after that. Raises as `begin_clone`.
    """
    trial, store, paths = assignment.trial, _store_of(assignment), RunPaths(assignment.run_id)
    assert trial is not None
    with contextlib.suppress(ObjectExists):
        store.write_if_absent(paths.spec, assignment.spec.to_bytes())
    if trial.donor is not None:
        begin_clone(store, paths, assignment, trial, trial.donor)
    return replace(assignment, controls_seen=last_request(store, paths))


def record_end(assignment: Assignment, outcome: Outcome) -> None:
    """Writes the trial's result, where it has ended for good."""
    if outcome.state.is_final and outcome.state is not State.STOPPED:
        store, paths = _store_of(assignment), RunPaths(assignment.run_id)
        result = build_result(store, paths, generation=assignment.generation, ended=outcome)
        write_result(store, paths, result)


def _store_of(assignment: Assignment) -> Store:
    spec = assignment.spec
    patience = Patience(limit_seconds=60 * spec.retries.wait_minutes)
    return patience.store(_kept.store(spec.store.uri, spec.store.access))


def run_trial(assignment: Assignment, exchange: Exchange) -> Outcome:
    """Trains a trial to its end, or until its study has it pause or end.

    The outcome says which: SUCCEEDED, RECOVERING (it may be run again and goes on), PRUNED, or a
    failure. `assignment.trial` is set, and the job's worker count is 1. What a rank raises where it
    is to be started again is raised here too.
    """
    session = TrialSession(exchange, use_gpu=bool(assignment.spec.workers.gpus))
    return train_worker(session, assignment, kept=_kept)


class TrialSession:
    """The Session of a trial: one rank, in a process that has other trials before and after."""

    rank = 0
    world_size = 1
    local_rank = 0
    local_world_size = 1

    def __init__(self, exchange: Exchange, *, use_gpu: bool) -> None:
        self.device = own_device(use_gpu=use_gpu)
        if use_gpu:
            torch.cuda.set_device(self.device)
        self._exchange = exchange

    def stop_requested(self) -> bool:
        """Signals are for the slot; what it makes of them comes with the next verdict, or as a
        request in the trial's folder."""
        return False

    def yield_requested(self) -> str | None:
        return None

    def evaluated(self, report: EvaluationReport) -> Verdict:
        return self._exchange(report)
