"""Ray Tune: the slots of a study.

    search          the study's outcome
      Desk          [driver] hears what slots say, asks the engine, and tells them what is next
      Slot          [its own process] trains trials, one after the other

A slot is what Tune calls a trial: a process with the resources that a trial of the study needs, as
many as the cluster has room for and the study has work for. Tune starts them, again where one has
died, and more of them where the cluster grows. It remembers nothing of the study: the engine
decides from the study's log alone.
"""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from ray import tune
from ray.tune.execution.placement_groups import PlacementGroupFactory
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.stopper import NoopStopper, Stopper

from cluster.ray_runtime import (
    is_alive,
    is_attached,
    own_node,
    own_node_watched,
    resources_of,
    use_settings,
)
from cluster.storage import open_store
from jobs.record import Failure, Outcome, RunPaths, State
from jobs.spec import JobSpec
from jobs.study.desk import Desk
from jobs.study.engine import Engine
from jobs.study.log import StudyLog
from jobs.study.retention import Holdings, Sweeper
from jobs.study.samplers import make_sampler
from jobs.study.schedulers import make_scheduler
from jobs.study.slot import Order, SlotWork
from jobs.study.space import space_of
from trainers.assignment import Assignment
from trainers.patience import Patience
from trainers.records import read_live_manifests
from trainers.telemetry import Telemetry
from trainers.tracking.feeds import start_feeds
from trainers.tracking.tracker import Parameters
from trainers.versions import versions


def search(
    assignment: Assignment,
    telemetry: Telemetry,
    *,
    python: str | None = None,
    is_taken: Callable[[], bool] = lambda: False,
) -> Outcome | Failure:
    """Makes the study's trials on the Ray cluster to which this process is attached, to its end.

    A request to the run, or `is_taken` (this process's own machine is to go), ends it with the
    states of its trials saved; requests for more trials are met, also those that came before.
    `python` is how the workers of trials with several are started, as in `trainers.fit`. Raises
    what keeps its log from being written.
    """
    spec, paths = assignment.spec, RunPaths(assignment.run_id)
    patience = Patience(limit_seconds=60 * spec.retries.wait_minutes)
    impatient = open_store(spec.store.uri, spec.store.access)
    store = patience.store(impatient)
    study_log = StudyLog(store, paths, generation=assignment.generation)

    def is_saved(trial: int, step: int) -> bool:
        live = read_live_manifests(store, paths.trial(trial))
        return bool(live) and live[-1].step >= step

    engine = make_engine(spec, study_log, is_saved=is_saved)
    telemetry.with_trackers(start_feeds(assignment, store, attempt=None, warn=telemetry.warn))
    job = spec.model_dump(mode="json")
    telemetry.track(Parameters(job | {"versions": dict(versions())}))
    desk = Desk(assignment, store, engine, telemetry)
    desk.hear_extensions()
    assert spec.search is not None
    sweeper = Sweeper(
        Holdings(spec.search, engine.trials), impatient, paths, telemetry, deciding=desk.deciding
    )
    with (
        tempfile.TemporaryDirectory(prefix="shoal-tune-") as notes,
        desk.listening(is_taken),
        sweeper,
    ):
        tune.Tuner(
            tune.with_resources(Slot, slot_resources(spec)),
            param_space={"python": python, "is_own_cluster": not is_attached()},
            tune_config=tune.TuneConfig(scheduler=_Slots(desk), num_samples=desk.count_slots()),
            run_config=tune.RunConfig(
                name="slots",
                storage_path=notes,
                stop=_EndOfStudy(desk),
                failure_config=tune.FailureConfig(max_failures=-1),
                # A slot has no state of its own.
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
                verbose=0,
            ),
        ).fit()
    ended = desk.ended()
    if ended.state is State.SUCCEEDED:
        sweeper.sweep()
    return ended


def make_engine(spec: JobSpec, log: StudyLog, *, is_saved: Callable[[int, int], bool]) -> Engine:
    """The study of a job, as far as its log tells it."""
    assert spec.search is not None
    events = log.open()
    space = space_of(spec)
    return Engine(
        spec.search,
        make_sampler(spec.search, space, spec.search.seed),
        make_scheduler(spec.search, space),
        log,
        events,
        is_saved=is_saved,
        gpus=spec.gpus_held,
    )


def slot_resources(spec: JobSpec) -> PlacementGroupFactory:
    """The room of one slot: its own for a trial in its process, else a bundle for each worker of
    the trial and none for the slot, so that the n-th worker is in the n-th bundle."""
    assert spec.search is not None
    each = resources_of(spec.workers, gpu_share=spec.search.gpu_share)
    if spec.workers.count == 1:
        return PlacementGroupFactory([each])
    return PlacementGroupFactory([{}, *[each] * spec.workers.count], strategy="PACK")


class _Slots(FIFOScheduler):
    """Tune's scheduler, whose trials are slots: none is ever paused, and all end with the study."""

    def __init__(self, desk: Desk) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._desk = desk
        self._nodes: dict[str, str] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        """In Tune's notes of itself, from which nobody restores: the study's log is what counts."""
        return FIFOScheduler, ()

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        self._nodes[trial.trial_id] = result["node"]
        order = self._desk.hear(trial.trial_id, result["said"])
        if order is None:
            return str(TrialScheduler.STOP)
        trial.temporary_state.ray_actor.hear.remote(order)
        return str(TrialScheduler.CONTINUE)

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        node = self._nodes.pop(trial.trial_id, None)
        has_node = node is None or is_alive(node)
        cause = _last_line(trial.get_error()) if has_node else "its node ended"
        self._desk.died(trial.trial_id, cause, counts=has_node)
        super().on_trial_error(tune_controller, trial)


class _EndOfStudy(Stopper):
    """Ends all slots once the study is over, those that wait for room included."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    def __reduce__(self) -> tuple[Any, ...]:
        """As the desk's."""
        return NoopStopper, ()

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self._desk.is_over


def _last_line(error: BaseException | str | None) -> str:
    lines = str(error or "its process died").strip().splitlines()
    return lines[-1] if lines else "its process died"


class Slot(tune.Trainable):
    """A slot's process, as Tune wants it."""

    def setup(self, config: dict[str, Any]) -> None:
        use_settings()
        taken = threading.Event()
        self._stack = ExitStack()
        self._stack.enter_context(own_node_watched(taken.set))
        self._node = own_node()
        self._work = SlotWork(**config, is_taken=taken.is_set)

    def hear(self, order: Order) -> None:
        """Called by the desk, before the next step."""
        self._work.hear(order)

    def step(self) -> dict[str, Any]:
        return {"said": self._work.say(), "node": self._node}

    def cleanup(self) -> None:
        self._stack.close()
