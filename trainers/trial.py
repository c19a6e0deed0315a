"""Trials of a study with one worker, one after another in one process: what a slot runs.

    run_trial(assignment, exchange)     -> Outcome

Nothing of a trial stays behind but what the next one would make again: see `trainers/kept.py`. Any
thread of the process will do, one trial at a time.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from cluster.storage import Store
from jobs.record import Outcome
from jobs.spec import StoreAt
from trainers.assignment import Assignment, EvaluationReport, Verdict
from trainers.kept import Kept
from trainers.session import own_device
from trainers.worker import train_worker

Exchange = Callable[[EvaluationReport], Verdict]
"""Tells the study of an evaluation, and gives its verdict. It may take as long as it needs; whoever
gives it ends the wait where nobody is left to answer."""

_kept = Kept()


def kept_store(at: StoreAt) -> Store:
    """The store of runs, with the connections that this process has to it."""
    return _kept.store(at.uri, at.access)


def run_trial(
    assignment: Assignment, exchange: Exchange, *, is_taken: Callable[[], bool] = lambda: False
) -> Outcome:
    """Trains a trial to its end, until its study has it pause or end, or until `is_taken`: this
    process's node is to go, and the state is saved.

    The outcome says which: SUCCEEDED, RECOVERING (it may be run again and goes on), PRUNED, or a
    failure. `assignment.trial` is set, and the job's worker count is 1. What a rank raises where it
    is to be started again is raised here too.
    """
    assert assignment.trial is not None
    share = assignment.trial.gpu_share
    use_gpu = bool(assignment.spec.workers.gpus)
    session = TrialSession(exchange, use_gpu=use_gpu, gpu_share=share, is_taken=is_taken)
    return train_worker(session, assignment, kept=_kept)


class TrialSession:
    """The Session of a trial: one rank, in a process that has other trials before and after."""

    rank = 0
    world_size = 1
    local_rank = 0
    local_world_size = 1

    def __init__(
        self,
        exchange: Exchange,
        *,
        use_gpu: bool,
        gpu_share: float | None = None,
        is_taken: Callable[[], bool] = lambda: False,
    ) -> None:
        """Of the GPU that Ray has made visible here, no more than a share of the memory is taken:
        the rest is for other trials."""
        self.device = own_device(use_gpu=use_gpu)
        if use_gpu:
            torch.cuda.set_device(self.device)
            if gpu_share is not None:
                torch.cuda.set_per_process_memory_fraction(gpu_share, self.device)
        self._exchange = exchange
        self._is_taken = is_taken

    def stop_requested(self) -> bool:
        """Signals are for the slot; what it makes of them comes with the next verdict, or as a
        request in the trial's folder."""
        return False

    def yield_requested(self) -> str | None:
        return "the trial's node is to go" if self._is_taken() else None

    def evaluated(self, report: EvaluationReport) -> Verdict:
        return self._exchange(report)
