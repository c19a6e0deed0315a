"""Ray Train's trainer with its controller in the driver's own process, and the workers as a group.

Ray runs the controller in a process of its own, and helpers in more of them, each of which imports
Ray Train anew: on a small machine that is half of what a start costs. Here the driver is the
controller: where it ends, its workers do, as they would with Ray's. torch is loaded in the workers
only.

Where this process itself was given room for workers, as the slot of a study is for the workers of a
trial, they are placed there, and the room stays when they end.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import ray
import ray.train
import ray.util
from ray.train._internal.utils import get_address_and_port
from ray.train.backend import Backend, BackendConfig
from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import (
    PlacementGroupCleanerCallback,
)
from ray.train.v2._internal.callbacks.preemption_callback import PreemptionCallback
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy, FixedScalingPolicy
from ray.train.v2._internal.execution.worker_group import WorkerGroup
from ray.train.v2._internal.execution.worker_group.placement_group_handle import (
    DefaultPlacementGroupHandle,
    PlacementGroupHandle,
)
from ray.train.v2.api.callback import RayTrainCallback
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from jobs.spec import Workers
from trainers.loading import without_collections
from trainers.ray_controller import RunFailurePolicy, RunScalingPolicy

_LOAD_SECONDS = 1800.0
"""How long workers may take to load what they need: nothing watches them yet."""
_LEAVE_SECONDS = 30.0
"""How long workers may take to leave their group, which ends with their processes anyway."""

_log = logging.getLogger(__name__)


class RunTrainer(DataParallelTrainer):
    """Ray's, but for where its controller runs, and for the helpers that nobody needs here."""

    def __init__(
        self,
        train_func: Callable[[dict[str, Any]], Any],
        *,
        workers: Workers,
        is_own_cluster: bool,
        **parts: Any,
    ) -> None:
        """`is_own_cluster`: this machine is all there is, for as long as the driver lives. No node
        comes, and none is taken without the driver."""
        super().__init__(train_func, **parts)
        self._workers = workers
        self._is_own_cluster = is_own_cluster

    def _initialize_and_run_controller(self, **parts: Any) -> ray.train.Result:
        parts["failure_policy"] = RunFailurePolicy(parts["failure_policy"].failure_config)
        asked = parts["scaling_policy"]
        is_room_held = ray.util.get_current_placement_group() is not None
        if (self._is_own_cluster or is_room_held) and isinstance(asked, FixedScalingPolicy):
            parts["scaling_policy"] = _UnannouncedPolicy(asked.scaling_config)
        elif isinstance(asked, ElasticScalingPolicy):
            parts["scaling_policy"] = RunScalingPolicy(asked.scaling_config, self._workers)
        controller = _Controller(**parts, watches_nodes=not self._is_own_cluster)
        try:
            asyncio.run(controller.run())  # type: ignore[no-untyped-call]
        finally:
            _WorkerGroup.give_back_all()
        return controller.get_result()

    def _create_default_callbacks(self) -> list[RayTrainCallback]:
        """Without the manager of Ray Data, which nobody uses, and without who would clean up after
        a controller that died apart from the driver."""
        needless = (DatasetsCallback, PlacementGroupCleanerCallback)
        return [c for c in super()._create_default_callbacks() if not isinstance(c, needless)]


class _UnannouncedPolicy(FixedScalingPolicy):
    """Asks no autoscaler for nodes."""

    def after_controller_start(self, train_run_context: Any) -> None:
        """Nothing: Ray's would start a process that passes the request on."""

    def _maybe_send_resource_request(self) -> None:
        """Nothing."""


class _WorkerGroup(WorkerGroup):
    """One whose workers are given no handle of a controller: it is no actor."""

    _placement_groups: ClassVar[list[PlacementGroupHandle]] = []

    def _create_placement_group(self, *parts: Any, **named: Any) -> PlacementGroupHandle:
        if (held := ray.util.get_current_placement_group()) is not None:
            return _HeldRoom(held)
        group = super()._create_placement_group(*parts, **named)
        self._placement_groups.append(group)
        return group

    @classmethod
    def give_back_all(cls) -> None:
        """Room that a start which broke off may have left: Ray drops it with a controller's actor,
        and here that is the driver."""
        while cls._placement_groups:
            cls._placement_groups.pop().shutdown()

    def _init_train_context_on_workers(
        self, workers: list[Any], sync_actor: Any, train_context_args: dict[str, list[Any]]
    ) -> None:
        ray.get(
            [
                worker.actor.init_train_context.remote(
                    train_run_context=self._train_run_context,
                    distributed_context=worker.distributed_context,
                    synchronization_actor=sync_actor,
                    storage_context=self._storage_context,
                    worker_callbacks=self._worker_callbacks_to_propagate,
                    controller_actor=None,
                    **{name: values[number] for name, values in train_context_args.items()},
                )
                for number, worker in enumerate(workers)
            ]
        )
        self._decorate_worker_log_file_paths(workers)


class _HeldRoom(DefaultPlacementGroupHandle):
    """The room of this process: a bundle for each worker, none for itself. Others will need it
    after these workers."""

    def shutdown(self) -> None:
        """Nothing: whoever gave the room takes it back."""


class _Controller(TrainController):
    """Ray's, as a plain object."""

    worker_group_cls = _WorkerGroup

    def __init__(self, *, watches_nodes: bool, **parts: Any) -> None:
        super().__init__(**parts)
        if not watches_nodes:
            self._worker_group_callbacks_to_propagate = [
                callback
                for callback in self._worker_group_callbacks_to_propagate
                if not isinstance(callback, PreemptionCallback)
            ]


# ------------------------------------------------------------------------------------ the group


@dataclass
class GroupConfig(BackendConfig):
    """The workers as a process group of torch, with `backend` (gloo or nccl)."""

    backend: str

    @property
    def backend_cls(self) -> type[Backend]:
        return Group


class Group(Backend):
    """Sets the process group up, and takes it down."""

    share_cuda_visible_devices = True  # NCCL connects the GPUs of a node by their numbers.

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        """Raises what a worker's part of it raises, or that worker's death, or GetTimeoutError."""
        ray.get(worker_group.execute_async(load), timeout=_LOAD_SECONDS)
        # Now, as the port is free only for the moment.
        address, port = worker_group.execute_single(0, get_address_and_port)
        where = f"tcp://[{address}]:{port}" if ":" in address else f"tcp://{address}:{port}"
        joining = [
            worker_group.execute_single_async(
                rank, join, backend_config.backend, where, rank, len(worker_group)
            )
            for rank in range(len(worker_group))
        ]
        ray.get(joining)  # which gives up by itself

    def on_shutdown(self, worker_group: Any, backend_config: Any) -> None:
        try:
            ray.get(worker_group.execute_async(leave), timeout=_LEAVE_SECONDS)
        except ray.exceptions.GetTimeoutError:
            _log.warning("the workers did not leave their group within %g s", _LEAVE_SECONDS)


def load() -> None:
    """In a worker: loads what training needs, and keeps where it was placed."""
    with without_collections():
        from trainers.ray_worker import remember_room
    remember_room()


def join(backend: str, where: str, rank: int, world_size: int) -> None:
    """In a worker: becomes a rank of the group that meets at the URL `where`."""
    from trainers.session import join_group

    join_group(backend, where, rank=rank, world_size=world_size)


def leave() -> None:
    """In a worker: leaves its group."""
    from trainers.session import leave_group

    leave_group()


def train(config: dict[str, Any]) -> str:
    """In a worker: what it trains; the outcome as JSON."""
    from trainers.ray_worker import train_on_ray

    return train_on_ray(config["assignment"])
