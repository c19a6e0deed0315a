"""Ray Train: the job's workers, started as often as they must be.

fit -> ray_trainer.RunTrainer -> [Ray] ray_worker.train_on_ray -> worker.train_worker

Who starts workers again: Ray's controller where one of them died, or where the cluster has room for
another number of them; `fit` where an attempt has saved its state and given way to the next, and
where the group was not set up yet when a worker died.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import ray.exceptions
from ray.train.v2._internal.exceptions import RayTrainError

# From where they are: for type checkers `ray.train` has their predecessors.
from ray.train.v2.api.config import FailureConfig, RunConfig, ScalingConfig
from ray.train.v2.api.exceptions import ControllerError, TrainingFailedError, WorkerGroupError

from cluster.ray_runtime import is_attached, resources_of
from cluster.storage import StorageError, Store, open_store
from jobs.errors import EnvironmentFault, Problem, ShoalError
from jobs.record import Failure, Outcome, RunPaths, State
from jobs.spec import JobSpec, Retries
from trainers.assignment import Assignment
from trainers.controls import last_attempt
from trainers.notices import Kind, NoticeReader, Told, write_notice
from trainers.patience import Patience
from trainers.ray_controller import (
    EndedWhileWaiting,
    RunController,
    blamed_rank,
    cause_of_failure,
    is_of_another_rank,
    restart_notice,
)
from trainers.ray_trainer import GroupConfig, RunTrainer, train
from trainers.records import last_crash, read_live_manifests


@dataclass(frozen=True)
class BrokenStart:
    """Workers that were not set up as a group: one died, or did not reach the others."""

    kind: Kind
    """failure, or preemption: which budget it counts for."""
    notice: str
    """For people, where the workers are started again."""
    failure: Failure
    """For people, where they are not."""


def fit(
    assignment: Assignment,
    told: Told,
    *,
    python: str | None = None,
    is_taken: Callable[[], bool] = lambda: False,
    is_own_cluster: bool | None = None,
    is_left: Callable[[], bool] = lambda: False,
) -> Outcome | Failure:
    """Trains on the Ray cluster to which this process is attached, to the end of the run.

    Workers that die are started again, `retries.worker_failures` times: by Ray, or here where they
    were not set up yet, which Ray takes for the end; a Failure says what ended the last try. Where
    an attempt has saved its state and given way, as its node is taken, the workers are started
    again here, `retries.preemptions` times; unless this process's own machine is taken
    (`is_taken`), or the trial which this is has been told to pause (`is_left`). `python` is the
    command by which workers are started, where it is not the interpreter. `is_own_cluster`: see
    `RunTrainer`; by default what this process's environment says. What the run's own decisions end
    is an Outcome, and is not tried again.
    """
    given_way = 0
    own = not is_attached() if is_own_cluster is None else is_own_cluster
    once = partial(_fit_once, assignment, is_own_cluster=own, python=python)
    with NoticeReader(told) as notices:
        for start in itertools.count(1):
            ended = once(notices, start=start, given_way=given_way)
            notices.look()
            left = partial(_has_left, assignment.spec.retries, notices.counts, given_way=given_way)
            if isinstance(ended, BrokenStart):
                if is_taken():
                    return _driver_taken(_ended(assignment, State.RECOVERING))
                if not left(ended.kind):
                    return ended.failure
                write_notice(notices.path, ended.kind, ended.notice)
                notices.look()
                continue
            if not isinstance(ended, Outcome) or ended.state is not State.RECOVERING or is_left():
                return ended
            if is_taken():
                return _driver_taken(ended)
            if not left("preemption"):
                return _too_often_taken(ended, assignment.spec.retries.preemptions)
            given_way += 1
            told.state(
                State.RECOVERING,
                f"attempt {ended.attempt} has saved step {ended.step} and given way; the workers "
                "are started again",
                step=ended.step,
            )
    raise AssertionError("unreachable")


def _has_left(retries: Retries, counts: Mapping[str, int], kind: Kind, *, given_way: int) -> bool:
    """Whether the workers may be started once more after a failure, or a preemption. Pure."""
    if kind == "failure":
        return counts["failure"] < retries.worker_failures
    limit = retries.preemptions
    return limit == "unlimited" or counts["preemption"] + given_way < limit


def _fit_once(
    assignment: Assignment,
    notices: NoticeReader,
    *,
    start: int,
    given_way: int,
    is_own_cluster: bool,
    python: str | None,
) -> Outcome | Failure | BrokenStart:
    """One start of Ray Train's controller; within it Ray starts the workers as often as it must."""
    spec = assignment.spec
    controller = RunController(
        spec,
        assignment.run_id,
        generation=assignment.generation,
        controls_seen=assignment.controls_seen,
        notices=notices.path,
    )
    notes = notices.path.parent
    run_config = _run_config(
        assignment, controller, notices.counts,
        notes=notes, start=start, given_way=given_way, python=python,
    )  # fmt: skip
    trainer = RunTrainer(
        train,
        workers=spec.workers,
        is_own_cluster=is_own_cluster,
        train_loop_config={"assignment": assignment},
        scaling_config=_scaling(spec),
        run_config=run_config,
        backend_config=GroupConfig("nccl" if spec.workers.gpus else "gloo"),
    )
    try:
        result = trainer.fit()
    except (TrainingFailedError, ray.exceptions.RayError) as error:
        cause = error.controller_failure if isinstance(error, ControllerError) else error
        if isinstance(cause, EndedWhileWaiting):
            return _ended(assignment, cause.state)
        if isinstance(error, ControllerError) and isinstance(cause, ray.exceptions.RayError):
            return BrokenStart(*restart_notice(error), _failure(error))
        told = _told_before(assignment) if isinstance(error, WorkerGroupError) else None
        return told or _failure(error)
    except OSError as error:  # after Ray's own, some of which are OSErrors as well
        raise EnvironmentFault(
            Problem(
                f"Ray's controller failed on this machine: {error}",
                f"look for free space in {notes.parent}, or set TMPDIR to another folder",
            )
        ) from error
    return Outcome.model_validate_json(getattr(result, "return_value"))  # noqa: B009 - untyped


def _scaling(spec: JobSpec) -> ScalingConfig:
    workers = spec.workers
    return ScalingConfig(
        num_workers=workers.count if workers.min is None else (workers.min, workers.count),
        elastic_resize_monitor_interval_s=workers.resize_seconds,
        use_gpu=bool(workers.gpus),
        resources_per_worker=resources_of(workers),
    )


def _run_config(
    assignment: Assignment,
    controller: RunController,
    counts: Mapping[str, int],
    *,
    notes: Path,
    start: int,
    given_way: int,
    python: str | None = None,
) -> RunConfig:
    """Ray keeps its own notes in the folder `notes` of this machine, apart for each start (and each
    leg of a trial): they are never read, and a start waits for no store because of them.

    A folder that Ray has seen before would make it resume what it holds. `counts` and `given_way`
    are the restarts for which earlier controllers have used up the budgets.
    """
    retries = assignment.spec.retries
    unlimited = retries.preemptions == "unlimited"
    taken = counts["preemption"] + given_way
    leg = "" if assignment.trial is None else f"leg-{assignment.trial.leg:04d}-"
    return RunConfig(
        name=f"generation-{assignment.generation:04d}-{leg}start-{start:04d}",
        storage_path=str(notes),
        failure_config=FailureConfig(
            max_failures=max(0, retries.worker_failures - counts["failure"]),
            max_preemption_failures=-1 if unlimited else max(0, int(retries.preemptions) - taken),
            # No limit: RunController ends a wait for workers by its time.
            controller_failure_limit=-1,
        ),
        worker_runtime_env={"py_executable": python} if python else None,
        callbacks=[controller],  # type: ignore[list-item]  # internal ones are taken as well
    )


def _ended(assignment: Assignment, state: State) -> Outcome:
    """The outcome of a run that was ended while it had no workers."""
    store = _patient_store(assignment.spec)
    paths = RunPaths(assignment.run_id)
    live = read_live_manifests(store, paths)
    return Outcome(
        attempt=last_attempt(store, paths), state=state, step=live[-1].step if live else 0
    )


def _driver_taken(ended: Outcome) -> Failure:
    """Not STOPPED: the platform is to start the driver again elsewhere."""
    return Failure(
        state=State.FAILED_INFRA,
        problems=((f"the driver's machine is taken; step {ended.step} is saved", None),),
        where="driver",
        exit_code=3,
    )


def _too_often_taken(ended: Outcome, limit: int | str) -> Failure:
    return Failure(
        state=State.FAILED_INFRA,
        problems=(
            (
                f"nodes were taken more often than retries.preemptions ({limit}) allows; step "
                f"{ended.step} is saved",
                "raise retries.preemptions: --set retries.preemptions=unlimited",
            ),
        ),
        where="driver",
        exit_code=3,
    )


def _told_before(assignment: Assignment) -> Failure | None:
    """What a rank of the last attempt could still tell, before its process ended."""
    store, paths = _patient_store(assignment.spec), RunPaths(assignment.run_id)
    try:
        crash = last_crash(store, paths, generation=assignment.generation)
    except StorageError:
        return None  # then what Ray says of it is told
    return None if crash is None else crash.failure


def _patient_store(spec: JobSpec) -> Store:
    patience = Patience(limit_seconds=60 * spec.retries.wait_minutes)
    return patience.store(open_store(spec.store.uri, spec.store.access))


def _failure(error: Exception) -> Failure:
    """What ended the last try, from Ray's wrapping of it."""
    if isinstance(error, WorkerGroupError) and error.worker_failures:
        rank = blamed_rank(error.worker_failures)
        cause = error.worker_failures[rank]
        base = cause_of_failure(cause)
        where = f"rank {rank}"
        if isinstance(base, ShoalError):
            return Failure.of(base, where=where)
        return Failure(
            state=_state_of_crash(base),
            problems=((_last_line(base), f"read the log with: shoal logs RUN --rank {rank}"),),
            where=where,
            exit_code=1 if _state_of_crash(base) is State.FAILED_USER else 3,
            traceback=str(cause),
        )
    cause = error.controller_failure if isinstance(error, ControllerError) else error
    if isinstance(cause, ShoalError):
        return Failure.of(cause, where="driver")
    is_start = isinstance(error, ControllerError) and isinstance(cause, ray.exceptions.RayError)
    what = "the workers could not be set up" if is_start else "Ray Train gave up"
    return Failure(
        state=State.FAILED_INFRA,
        problems=((f"{what}: {_last_line(cause)}", None),),
        where="driver",
        exit_code=3,
        traceback=str(error),
    )


def _state_of_crash(error: BaseException) -> State:
    """A worker process that vanished is the environment's fault, and so is one that others lost in
    the midst of a collective; any other exception is the code's."""
    is_rays = isinstance(error, ray.exceptions.RayError | RayTrainError)
    return State.FAILED_INFRA if is_rays or is_of_another_rank(error) else State.FAILED_USER


def _last_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[-1] if lines else ''}".rstrip(": ")
