"""A rank's place in the group of workers, and what its platform tells it.

The worker is written over `Session`. Implementations: `ProcessSession` here (one process, or one
of those that torchrun started), the one over Ray Train in `trainers.ray_worker`, and that of a
study's trial in `trainers.trial`.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
from datetime import timedelta
from types import FrameType, TracebackType
from typing import Protocol

import torch
import torch.distributed as dist

from jobs.errors import ClusterError, Problem
from trainers.assignment import EvaluationReport, Verdict

JOIN_TIMEOUT = timedelta(minutes=30)
"""How long a rank waits for the others while the group is set up."""
COLLECTIVE_TIMEOUT = timedelta(days=7)
"""How long a collective may take; longer than any wait for a store (`retries.wait_minutes`). The
watchdog tells a rank that works or waits from one that hangs."""


class Session(Protocol):
    """Where this rank stands. The process group, where there are several ranks, is up."""

    @property
    def rank(self) -> int: ...
    @property
    def world_size(self) -> int: ...
    @property
    def local_rank(self) -> int: ...
    @property
    def local_world_size(self) -> int: ...
    @property
    def device(self) -> torch.device: ...

    def stop_requested(self) -> bool:
        """Whether the platform asked this rank to end soon, as by a signal."""
        ...

    def yield_requested(self) -> str | None:
        """Why this attempt is to save and give way to another one, such as a node that is taken;
        None where it may go on. Cheap: it is asked before every step."""
        ...

    def evaluated(self, report: EvaluationReport) -> Verdict:
        """Asks the study of which this is a trial whether it goes on; may wait for as long as the
        study takes. Called at the same points on every rank; the first one's answer counts."""
        ...


def join_group(
    backend: str, where: str | None = None, *, rank: int = -1, world_size: int = -1
) -> None:
    """Sets up the process group, which meets at the URL `where`; by default as torchrun says."""
    dist.init_process_group(backend, where, rank=rank, world_size=world_size, timeout=JOIN_TIMEOUT)


def leave_group() -> None:
    """Takes the process group down, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def own_device(
    *, use_gpu: bool, rank: int = 0, local_rank: int = 0, local_world_size: int = 1
) -> torch.device:
    """The device of a rank; ClusterError where the job wants a GPU and there is none for it."""
    if use_gpu and torch.cuda.device_count() <= local_rank:
        raise ClusterError(
            Problem(
                f"workers.gpus is 1, but rank {rank} on {socket.gethostname()} finds "
                f"{torch.cuda.device_count()} GPUs for {local_world_size} workers",
                "set workers.gpus to 0, or start fewer workers on this machine",
            )
        )
    return torch.device("cuda", local_rank) if use_gpu else torch.device("cpu")


class ProcessSession:
    """One process alone, or one of a group that torchrun started (RANK, WORLD_SIZE, ...).

    A context manager: sets up the process group and the handlers of SIGINT and SIGTERM, which ask
    for a stop with a checkpoint; a second signal ends the process at once.
    """

    def __init__(self, *, use_gpu: bool) -> None:
        self.rank = int(os.environ.get("RANK", "0"))
        self.world_size = int(os.environ.get("WORLD_SIZE", "1"))
        self.local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        self.local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        self.device = own_device(
            use_gpu=use_gpu,
            rank=self.rank,
            local_rank=self.local_rank,
            local_world_size=self.local_world_size,
        )
        self._stop = threading.Event()
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> ProcessSession:
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        if self.world_size > 1:
            join_group("nccl" if self.device.type == "cuda" else "gloo")
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        leave_group()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._stop.is_set():
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self._stop.set()

    def stop_requested(self) -> bool:
        return self._stop.is_set()

    def yield_requested(self) -> str | None:
        """torchrun tells of nothing but signals, which ask for a stop."""
        return None

    def evaluated(self, report: EvaluationReport) -> Verdict:
        """No study is there to decide."""
        return Verdict.GO_ON
