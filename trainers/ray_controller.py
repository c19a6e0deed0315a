"""A run's part in Ray Train's controller: room for the workers, and a saved state before a resize.

Ray starts the workers again by itself after a failure, and with more or fewer of them where the
cluster has changed. RunController is called at these points, in the controller's own process;
RunFailurePolicy says there which budget a failure counts for, and RunScalingPolicy whether workers
at work are ended for more of them.
"""

from __future__ import annotations

import logging
import re
import time
import traceback
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from ray.exceptions import RayActorError, RayError
from ray.train.v2._internal.exceptions import (
    RayTrainError,
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckFailedError,
)
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback
from ray.train.v2._internal.execution.controller.state import (
    ErroredState,
    InitializingState,
    ReschedulingState,
    ResizingState,
    RestartingState,
    RunningState,
    ShuttingDownState,
    TrainControllerState,
)
from ray.train.v2._internal.execution.failure_handling import DefaultFailurePolicy, FailureDecision
from ray.train.v2._internal.execution.scaling_policy import (
    ElasticScalingPolicy,
    NoopDecision,
    ResizeDecision,
    ScalingDecision,
)
from ray.train.v2._internal.execution.worker_group import WorkerGroup
from ray.train.v2.api.config import ScalingConfig
from ray.train.v2.api.exceptions import (
    ControllerError,
    PreemptionError,
    TrainingFailedError,
    WorkerGroupError,
)
from ray.train.v2.api.preemption import PreemptionInfo

from cluster.ray_runtime import describe_shortage, free_on_nodes, room_for, staying_nodes
from cluster.storage import StorageError, Store, open_store
from jobs.errors import ClusterError, Problem, ShoalError
from jobs.record import RunPaths, State
from jobs.spec import JobSpec, Workers
from trainers.controls import ask_to_yield, last_attempt, requests_to
from trainers.notices import Kind, write_notice
from trainers.patience import Patience

_LOOK_SECONDS = 1.0
_POLL_SECONDS = 0.25
_RELEASE_SECONDS = 5.0
"""How long elastic workers wait before they start for what others hold of the cluster: Ray may be
about to take it back, as from a driver before this one."""
_LOST_PEER = re.compile(r"gloo/transport|Connection (closed|reset) by peer|\bNCCL\b|ncclUniqueId")
"""In what gloo and NCCL say to a rank whose collective another has left."""

_log = logging.getLogger(__name__)


class EndedWhileWaiting(Exception):  # noqa: N818 - not an error: it was asked for
    """That the run stops, or gives way, was asked for while there were no workers to hear it."""

    def __init__(self, state: State) -> None:
        super().__init__(state)
        self.state = state
        """STOPPED or RECOVERING."""


class RunController(ControllerCallback, WorkerGroupCallback):
    """What a run does in the controller of one start of `TorchTrainer.fit`; pickles until then."""

    def __init__(
        self, spec: JobSpec, run_id: str, *, generation: int, controls_seen: int, notices: Path
    ) -> None:
        self._spec = spec
        self._paths = RunPaths(run_id)
        self._generation = generation
        self._controls_seen = controls_seen
        self._notices = notices
        self._said = ""
        self._failed_start = ""
        """Why the workers could not be started at the last try; empty once they are."""
        self._group: Any = None
        self._attempt_before = 0
        """The newest attempt when the present workers were started: theirs has a later number."""

    # ---- called by Ray

    def after_controller_start(self, train_run_context: Any) -> None:
        self._idle_since = time.monotonic()
        """Since when no workers are at work; monotonic seconds."""

    def after_worker_group_start(self, worker_group: Any) -> None:
        self._group = worker_group

    def before_worker_group_shutdown(self, worker_group: Any) -> None:
        self._group = None

    def after_controller_state_update(
        self, previous_state: TrainControllerState, current_state: TrainControllerState
    ) -> None:
        """Called after every round of the controller, also where the state stays the same."""
        if isinstance(current_state, RunningState):
            self._failed_start = ""
            if not isinstance(previous_state, RunningState):
                self._tell("running", "the workers are started")
        elif isinstance(current_state, ResizingState):
            self._idle_since = time.monotonic()
            self._save_before_resize(current_state.scaling_decision)
        elif type(current_state) is type(previous_state):
            if isinstance(current_state, InitializingState | RestartingState | ReschedulingState):
                # Ray counts too few for elastic workers, and would ask again without a pause.
                self._await_room()
                time.sleep(_POLL_SECONDS)
        elif isinstance(current_state, RestartingState):
            self._idle_since = time.monotonic()
            self._tell(*restart_notice(current_state.training_failed_error))
        elif isinstance(current_state, ReschedulingState):
            self._start_failed(current_state.training_failed_error)
        elif isinstance(current_state, ShuttingDownState) and isinstance(
            ended := current_state.next_state, ErroredState
        ):
            give_back_room(ended.training_failed_error)

    def before_controller_execute_resize_decision(self, resize_decision: Any) -> None:
        """Before workers are started, for the first time or again; takes their number down to what
        there is room for on nodes that stay."""
        resize_decision.num_workers = min(resize_decision.num_workers, self._await_room())
        patience = Patience(limit_seconds=60 * self._spec.retries.wait_minutes)
        self._attempt_before = last_attempt(patience.store(self._store), self._paths)

    # ---- room

    def _start_failed(self, error: TrainingFailedError) -> None:
        """Tells why Ray could not start the workers; it tries again.

        Where one of them died meanwhile, its error is raised, which ends this controller: Ray would
        try it without end, and `fit` counts it.
        """
        give_back_room(error)
        failure = error.controller_failure if isinstance(error, ControllerError) else error
        if isinstance(failure.__cause__, RayActorError):
            raise failure.__cause__
        self._failed_start = failed_start(failure)
        shortage = self._shortage(staying_nodes())
        self._tell("waiting", f"{self._failed_start}, and it is tried again: {shortage}")

    def _await_room(self) -> int:
        """How many workers there is room for: the fewest at least, after a wait.

        What others hold of the cluster's nodes is no room for elastic workers; a number that is
        fixed is asked for until it has its place. Raises ClusterError when `retries.wait_minutes`
        have passed without workers at work.
        """
        workers, began = self._spec.workers, time.monotonic()
        while True:
            nodes = staying_nodes()
            room = room_for(workers, nodes)
            idle_minutes = (time.monotonic() - self._idle_since) / 60
            if idle_minutes > self._spec.retries.wait_minutes:
                last = f" (the last try: {self._failed_start})" if self._failed_start else ""
                raise ClusterError(
                    Problem(
                        f"no workers could be started for {idle_minutes:.3g} minutes: "
                        f"{self._shortage(nodes)}{last}",
                        "add nodes, or lower workers.min (or workers.count, without it); "
                        "retries.wait_minutes is how long this is waited for",
                    )
                )
            has_room = room >= workers.fewest
            if not has_room:
                self._tell_once("waiting", f"waits for nodes: {self._shortage(nodes)}")
            if not has_room or self._failed_start:  # no worker hears them
                self._heed_requests()
            if has_room:
                room = min(room, workers.count)
                now = room if workers.min is None else room_for(workers, self._free())
                # What workers that are still there hold is counted: nothing is about to be free.
                is_waited = self._group is not None or time.monotonic() - began > _RELEASE_SECONDS
                if now >= room or is_waited:
                    return max(workers.fewest, min(now, room))
            time.sleep(_LOOK_SECONDS)

    def _free(self) -> list[dict[str, float]]:
        """What the next workers may have of the cluster: that of the present ones as well."""
        if self._group is None:
            return free_on_nodes()
        state = self._group.get_worker_group_state()
        return free_on_nodes(own=state.placement_group_handle.placement_group)

    def _shortage(self, nodes: list[dict[str, float]]) -> str:
        workers = self._spec.workers
        has_room = room_for(workers, nodes) >= workers.fewest
        return describe_shortage(workers, nodes, free=free_on_nodes() if has_room else None)

    def _heed_requests(self) -> None:
        try:
            attempt = last_attempt(self._store, self._paths) + 1
            asked = requests_to(
                self._store,
                self._paths,
                after=self._controls_seen,
                attempt=attempt,
                generation=self._generation,
            )
        except StorageError as error:
            self._tell_once("warning", f"requests are not heard at present: {error}")
            return
        if asked.stop or asked.yields:
            raise EndedWhileWaiting(State.STOPPED if asked.stop else State.RECOVERING)

    # ---- a resize

    def _save_before_resize(self, resize_decision: Any) -> None:
        """Asks the workers to save and give way, and waits for it: Ray ends them right after this.

        At most `retries.hang_minutes`, and not longer than they live; the next workers then go on
        from the last checkpoint.
        """
        self._tell("resize", f"the number of workers changes to {resize_decision.num_workers}")
        deadline = time.monotonic() + 60 * self._spec.retries.hang_minutes
        asked: int | None = None
        problem = "it was not durable in time"
        while time.monotonic() < deadline:
            try:
                if asked is None:
                    asked = last_attempt(self._store, self._paths)
                    if asked == self._attempt_before:
                        return  # These workers have not begun: there is nothing to save.
                    ask_to_yield(
                        self._store,
                        self._paths,
                        attempt=asked,
                        generation=self._generation,
                        by="elastic workers",
                    )
                if self._store.head(self._paths.outcome(asked)) is not None:
                    return
            except StorageError as error:
                problem = str(error)
            # Also takes the workers' reports, for which they would wait otherwise.
            status = self._group.poll_status(timeout=_POLL_SECONDS)
            if status.errors:
                problem = "a worker failed"
                break
            time.sleep(_POLL_SECONDS)
        self._tell(
            "warning",
            f"the state was not saved before the number of workers changed ({problem}); the next "
            "ones go on from the last checkpoint",
        )

    # ---- smaller parts

    @cached_property
    def _store(self) -> Store:
        return open_store(self._spec.store.uri, self._spec.store.access)

    def _tell(self, kind: Kind, message: str) -> None:
        self._said = message
        try:
            write_notice(self._notices, kind, message)
        except OSError as error:
            # Ray would end the run for it. One line less is told, and a restart less counted.
            _log.warning("%s (it cannot be told: %s)", message, error)

    def _tell_once(self, kind: Kind, message: str) -> None:
        if message != self._said:
            self._tell(kind, message)


class RunFailurePolicy(DefaultFailurePolicy):
    """Ray's own, in which every node that was taken counts as a pre-emption (`taken_ranks`)."""

    def make_decision(self, training_failed_error: TrainingFailedError) -> FailureDecision:
        if ranks := taken_ranks(training_failed_error):
            info = PreemptionInfo(deadline_ms=None, preempted_node_to_ranks={"unknown": ranks})
            training_failed_error = PreemptionError(preemption_info=info, drain_timed_out=True)
        return super().make_decision(training_failed_error)


class RunScalingPolicy(ElasticScalingPolicy):
    """Ray's own, which ends workers for more of them only where those have room.

    Ray also counts nodes that are being drained, minutes long on some platforms, for up to 20 s
    nodes that have died, and what actors and tasks of others hold: it would start as many workers
    anew as there were, or ask for more than get a place.
    """

    def __init__(self, scaling_config: ScalingConfig, workers: Workers) -> None:
        super().__init__(scaling_config)
        self._workers = workers

    def make_decision_for_running_worker_group(
        self, worker_group_state: Any, worker_group_status: Any
    ) -> ScalingDecision:
        decision = super().make_decision_for_running_worker_group(
            worker_group_state, worker_group_status
        )
        now = worker_group_state.num_workers
        if not isinstance(decision, ResizeDecision) or decision.num_workers <= now:
            return decision
        try:
            has_room = room_for(self._workers, free_on_nodes()) > 0
        except Exception as error:  # of whatever kind: Ray would end the run for it
            _log.warning("the cluster cannot be looked at, so no worker is added: %s", error)
            has_room = False
        return decision if has_room else NoopDecision()


def taken_ranks(error: TrainingFailedError) -> list[int]:
    """The ranks of a group that failed whose nodes were taken.

    `ray start --block` that gets SIGTERM announces a pre-emption, and ends its raylet by SIGTERM
    where the grace is over. Which of the two Ray's head hears of last is chance: it takes the end
    for a pre-emption, or for one that was `expected`, in which no flag says that the node was
    taken, only the text. (ray._private.node, `_drain_node_before_shutdown`.)
    """
    if not isinstance(error, WorkerGroupError):
        return []
    return [rank for rank, e in error.worker_failures.items() if _is_taken(cause_of_failure(e))]


def _is_taken(cause: BaseException) -> bool:
    return isinstance(cause, RayActorError) and (
        cause.preempted or "the actor's node was terminated expectedly" in str(cause)
    )


def cause_of_failure(failure: BaseException) -> BaseException:
    """What ended a worker: the user's exception, or the death, without what Ray Train adds."""
    if isinstance(failure, WorkerHealthCheckFailedError):
        return failure.health_check_failure
    return getattr(failure, "_base_exc", failure)


def blamed_rank(failures: Mapping[int, BaseException]) -> int:
    """The rank, of those that failed at one time, that the others most likely failed for: one that
    tells the user something, one that died, one with an error of its own, and at last one that was
    only left alone; of equal ones the first."""

    def place(rank: int) -> tuple[int, int]:
        cause = cause_of_failure(failures[rank])
        if isinstance(cause, ShoalError):
            return 0, rank
        if isinstance(cause, RayError | RayTrainError):
            return 1, rank
        return (3 if is_of_another_rank(cause) else 2), rank

    return min(failures, key=place)


def is_of_another_rank(cause: BaseException) -> bool:
    """Whether it is what a collective raises because another rank has ended, or cannot be reached.

    gloo raises plain RuntimeErrors; torch's own are told by their name, as the driver loads no
    torch.
    """
    names = {"DistError", "DistBackendError", "DistNetworkError", "DistStoreError"}
    own = {kind.__name__ for kind in type(cause).__mro__}
    is_lost = isinstance(cause, RuntimeError) and _LOST_PEER.search(str(cause)) is not None
    return bool(names & own) or is_lost


def restart_notice(error: TrainingFailedError) -> tuple[Kind, str]:
    """Whether the workers are started again for a pre-emption or a failure, and the sentence."""
    again = "the workers are started again from the last checkpoint"
    if isinstance(error, PreemptionError):
        return "preemption", f"a node was taken before the state was saved; {again}"
    if taken_ranks(error):
        return "preemption", f"a node was taken; {again}"
    if isinstance(error, ControllerError):
        cause = error.controller_failure
        kind: Kind = "preemption" if _is_taken(cause) else "failure"
        return kind, f"the workers could not be set up ({type(cause).__name__}); {again}"
    failures = error.worker_failures if isinstance(error, WorkerGroupError) else {}
    if not failures:
        return "failure", f"{type(error).__name__}; {again}"
    rank = blamed_rank(failures)
    name = type(cause_of_failure(failures[rank])).__name__
    return "failure", f"rank {rank} failed ({name}); {again}"


def give_back_room(error: TrainingFailedError) -> None:
    """Ends the group of workers whose start broke off in `error`, if there is one.

    Ray drops such a group without ending it. Its placement group, whose room no other workers get,
    would stay as long as this process's driver; only the frames of the error still know of it.
    """
    failure = error.controller_failure if isinstance(error, ControllerError) else error
    for frame, _ in traceback.walk_tb(failure.__traceback__):  # WorkerGroup.create is one of them
        group = frame.f_locals.get("worker_group")
        if isinstance(group, WorkerGroup) and group.has_started():
            group.get_worker_group_state().shutdown()  # type: ignore[no-untyped-call]
            return


def failed_start(error: Exception) -> str:
    """Why workers could not be started, as a part of a sentence."""
    if isinstance(error, WorkerGroupStartupTimeoutError):
        return f"{error.num_workers} workers were given no place in the time that Ray waits for it"
    first_line = (str(error).splitlines() or [""])[0]
    return f"the workers could not be started ({type(error).__name__}: {first_line})"
