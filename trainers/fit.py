"""Ray Train: the job's workers as a TorchTrainer, and the Session over it. Only here is it built.

fit -> [Ray] _train_on_ray -> worker.train_worker
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ray.train
import torch
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.exceptions import ControllerError, TrainingFailedError, WorkerGroupError

from cluster.storage import is_s3, open_store
from jobs.errors import ShoalError
from jobs.record import Failure, Outcome, RunPaths, State
from jobs.spec import JobSpec
from trainers.attempt import Assignment
from trainers.session import COLLECTIVE_TIMEOUT
from trainers.worker import train_worker


def fit(assignment: Assignment) -> Outcome | Failure:
    """Trains on the Ray cluster to which this process is attached.

    Workers that die are started again, `retries.worker_failures` times; a Failure says what ended
    the last try. What the run's own decisions end is an Outcome, and is not tried again.
    """
    spec = assignment.spec
    trainer = TorchTrainer(
        _train_on_ray,  # type: ignore[arg-type]  # Ray types it as returning nothing
        train_loop_config={"assignment": assignment},
        scaling_config=_scaling(spec),
        run_config=_run_config(assignment),
        torch_config=TorchConfig(
            backend="nccl" if spec.workers.gpus else "gloo",
            timeout_s=int(COLLECTIVE_TIMEOUT.total_seconds()),
        ),
    )
    try:
        result = trainer.fit()
    except (TrainingFailedError, ray.exceptions.RayError) as error:
        return _failure(error)
    return Outcome.model_validate_json(getattr(result, "return_value"))  # noqa: B009 - untyped


def _scaling(spec: JobSpec) -> ScalingConfig:
    workers = spec.workers
    resources: dict[str, float] = {"CPU": workers.cpus}
    if workers.gpus:
        resources["GPU"] = workers.gpus
    if workers.memory_gib is not None:
        resources["memory"] = int(workers.memory_gib * 2**30)
    return ScalingConfig(
        num_workers=workers.count, use_gpu=bool(workers.gpus), resources_per_worker=resources
    )


def _run_config(assignment: Assignment) -> RunConfig:
    """Ray keeps its own notes in the run folder, apart for each driver: they are never read.

    A folder that Ray has seen before would make it resume what it holds.
    """
    spec = assignment.spec
    runs = open_store(spec.store.uri, spec.store.access)
    root = f"{runs.filesystem_root}/{RunPaths(assignment.run_id).ray}"
    return RunConfig(
        name=f"generation-{assignment.generation:04d}",
        storage_path=root,
        storage_filesystem=runs.filesystem() if is_s3(runs.uri) else None,
        failure_config=FailureConfig(max_failures=spec.retries.worker_failures),
    )


def _train_on_ray(config: dict[str, Any]) -> str:
    """The function of each worker; the outcome as JSON."""
    session = RaySession(use_gpu=bool(config["assignment"].spec.workers.gpus))
    return train_worker(session, config["assignment"]).model_dump_json()


class RaySession:
    """The Session of a worker of Ray Train; the process group is set up by Ray."""

    def __init__(self, *, use_gpu: bool) -> None:
        context = ray.train.get_context()
        self.rank: int = context.get_world_rank()
        self.world_size: int = context.get_world_size()
        self.local_rank: int = context.get_local_rank()
        self.local_world_size: int = context.get_local_world_size()
        self.device = ray.train.torch.get_device() if use_gpu else torch.device("cpu")

    def stop_requested(self) -> bool:
        """Ray gives workers no signal of their own; requests come through the run folder."""
        return False

    def report(self, metrics: Mapping[str, float]) -> None:
        ray.train.report(dict(metrics))


def _failure(error: Exception) -> Failure:
    """What ended the last try, from Ray's wrapping of it."""
    if isinstance(error, WorkerGroupError) and error.worker_failures:
        causes = {r: getattr(c, "_base_exc", c) for r, c in error.worker_failures.items()}
        # What a rank tells the user, before what it did to those that were waiting for it.
        rank = min(causes, key=lambda r: (not isinstance(causes[r], ShoalError), r))
        base, cause = causes[rank], error.worker_failures[rank]
        where = f"rank {rank}"
        if isinstance(base, ShoalError):
            return Failure.of(base, where=where)
        return Failure(
            state=_state_of_crash(base),
            problems=((_first_line(base), f"read the log with: shoal logs RUN --rank {rank}"),),
            where=where,
            exit_code=1 if _state_of_crash(base) is State.FAILED_USER else 3,
            traceback=str(cause),
        )
    cause = error.controller_failure if isinstance(error, ControllerError) else error
    return Failure(
        state=State.FAILED_INFRA,
        problems=((f"Ray Train gave up: {_first_line(cause)}", None),),
        where="driver",
        exit_code=3,
        traceback=str(error),
    )


def _state_of_crash(error: BaseException) -> State:
    """A worker process that vanished is the environment's fault, an exception is the code's."""
    is_rays = isinstance(error, ray.exceptions.RayError)
    return State.FAILED_INFRA if is_rays else State.FAILED_USER


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[-1] if lines else ''}".rstrip(": ")
