"""A worker of Ray Train: the Session over it. Only the workers load this."""

from __future__ import annotations

import time

import ray.train
import ray.train.torch
import ray.util
import torch
from ray.train.v2._internal.execution.context import get_train_context as get_internal_train_context
from ray.train.v2.api.preemption import PreemptionInfo
from ray.util.placement_group import PlacementGroup

from cluster.storage import StorageError, open_store
from jobs.record import RunPaths
from trainers.assignment import Assignment, EvaluationReport, StudyAt, Verdict
from trainers.fence import Fence, Superseded
from trainers.telemetry import IMPATIENT, log
from trainers.verdicts import ask
from trainers.worker import train_worker


def train_on_ray(assignment: Assignment) -> str:
    """Trains as the rank that Ray Train has made of this process; the outcome as JSON."""
    study_at = None if assignment.trial is None else assignment.trial.study_at
    session = RaySession(use_gpu=bool(assignment.spec.workers.gpus), study_at=study_at)
    has_failed = True
    try:
        outcome = train_worker(session, assignment)
        has_failed = outcome.failure is not None
        return outcome.model_dump_json()
    finally:
        if has_failed:
            _give_room_to_successor(assignment)


def _give_room_to_successor(assignment: Assignment) -> None:
    """Removes the workers' placement group, and this process with it, once another driver has the
    run: theirs may be frozen, and Ray keeps for it what the other needs. A trial's room is its
    study's."""
    if _room is None or assignment.trial is not None:
        return
    place = assignment.spec.store
    store = open_store(place.uri, place.access, transfer=IMPATIENT)
    try:
        Fence(store, RunPaths(assignment.run_id), generation=assignment.generation).check()
    except Superseded:
        ray.util.remove_placement_group(_room)
    except StorageError as error:
        log.warning("who drives the run cannot be told: %s", error)


_room: PlacementGroup | None = None


def remember_room() -> None:
    """Keeps where this process was placed. Ray tells it in the thread of an actor's calls alone,
    not in that of training."""
    global _room
    _room = ray.util.get_current_placement_group()


class RaySession:
    """The Session of a worker of Ray Train; the process group is set up (`ray_trainer.Group`)."""

    def __init__(self, *, use_gpu: bool, study_at: StudyAt | None = None) -> None:
        """`study_at`: where the first rank of a trial asks its study."""
        context = ray.train.get_context()
        self.rank: int = context.get_world_rank()
        self.world_size: int = context.get_world_size()
        self.local_rank: int = context.get_local_rank()
        self.local_world_size: int = context.get_local_world_size()
        self.device = ray.train.torch.get_device() if use_gpu else torch.device("cpu")
        if use_gpu:
            torch.cuda.set_device(self.device)
        self._study_at = study_at
        self._preemption = get_internal_train_context().preemption_context

    def stop_requested(self) -> bool:
        """Ray gives workers no signal of their own; requests come through the run folder."""
        return False

    def yield_requested(self) -> str | None:
        """The notice that Ray has put into this process, of a node of the group that is taken.

        `ray.train.get_preemption_info` tells the same, with a barrier of all ranks; here the ranks
        agree on it with the votes on the next step.
        """
        info = self._preemption.preemption_info
        return None if info is None else preemption_notice(info, now=time.time())

    def evaluated(self, report: EvaluationReport) -> Verdict:
        if self._study_at is None or self.rank:
            return Verdict.GO_ON
        return ask(self._study_at, report)


def preemption_notice(info: PreemptionInfo, *, now: float) -> str:
    """`the node of rank 1 is taken in 28 s`; `now` in Unix seconds."""
    ranks = info.preempted_ranks
    shown = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"
    when = (
        "" if info.deadline_ms is None else f" in {max(0.0, info.deadline_ms / 1000 - now):.0f} s"
    )
    return f"the node of {shown} is taken{when}"
