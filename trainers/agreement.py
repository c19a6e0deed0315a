"""What all ranks decide together: one small all-gather on CPU, a batch ahead of its step.

Every decision that changes what a rank does (stop, save, give way, end with an error, how many
micro-batches) is taken from the same gathered votes, so all ranks take it at the same step.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import astuple, dataclass, fields
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _set_pg_timeout

from jobs.record import Failure
from trainers import watchdog
from trainers.session import COLLECTIVE_TIMEOUT


class AgreedFailure(Exception):  # noqa: N818 - it carries the failure that all ranks were told
    """Raised on all ranks at the same point: one of them cannot go on."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.problems[0][0])
        self.failure = failure


@dataclass(frozen=True)
class Vote:
    """What one rank knows about the coming step."""

    weight: float
    """Sum of the loss weights of this rank's rows."""
    num_microbatches: int
    stop: bool = False
    save: bool = False
    yields: bool = False
    """This attempt is to save and give way to another: a node is taken, or workers are added."""
    failed: bool = False
    """This rank cannot go on, for a reason that a restart would meet again."""
    cost: float = 0.0
    """Of this rank's micro-batches: tokens, padding included, and launches in tokens."""


@dataclass(frozen=True)
class Decision:
    """What the group does; equal on all ranks."""

    weight: float
    """Sum of the loss weights of the whole global batch."""
    num_microbatches: int
    """Micro-batches of every rank: the largest number that any rank needs."""
    stop: bool
    save: bool
    yields: bool
    failed: bool
    mean_cost: float = 0.0
    """Mean over the ranks of what their micro-batches cost."""
    most_cost: float = 0.0
    """Of the rank whose micro-batches cost most, for which the others wait."""


class PendingDecision:
    """An all-gather under way."""

    def __init__(self, votes: torch.Tensor, work: dist.Work | None) -> None:
        self._votes = votes
        self._work = work

    def wait(self) -> Decision:
        if self._work is not None:
            with _waiting():
                self._work.wait()
        weight, microbatches, stop, save, yields, failed, cost = self._votes.unbind(dim=1)
        return Decision(
            weight=float(weight.sum()),
            num_microbatches=int(microbatches.max()),
            stop=bool(stop.any()),
            save=bool(save.any()),
            yields=bool(yields.any()),
            failed=bool(failed.any()),
            mean_cost=float(cost.mean()),
            most_cost=float(cost.max()),
        )


class Agreement:
    """The group's collectives on CPU, apart from those of the gradients.

    With one rank nothing is sent. Every method is called by all ranks at the same point.
    """

    def __init__(self, *, rank: int, world_size: int) -> None:
        self.rank = rank
        self.world_size = world_size
        self._ahead: dist.ProcessGroup | None = None
        self._group: dist.ProcessGroup | None = None
        if world_size > 1:
            # Two: an all-gather under way must not meet another collective on its own group.
            self._ahead = dist.new_group(backend="gloo", timeout=COLLECTIVE_TIMEOUT)
            self._group = dist.new_group(backend="gloo", timeout=COLLECTIVE_TIMEOUT)
            _set_pg_timeout(COLLECTIVE_TIMEOUT)  # of the group of the gradients

    def start(self, vote: Vote) -> PendingDecision:
        """Begins to gather the votes on the coming step."""
        own = torch.tensor([float(value) for value in astuple(vote)], dtype=torch.float64)
        if self._ahead is None:
            return PendingDecision(own.reshape(1, len(fields(Vote))), None)
        votes = torch.empty(self.world_size, len(fields(Vote)), dtype=torch.float64)
        work = dist.all_gather(list(votes), own, group=self._ahead, async_op=True)
        return PendingDecision(votes, work)

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sum over the ranks of a float64 CPU tensor; exact for integers below 2**53."""
        if self._group is not None:
            with _waiting():
                dist.all_reduce(values, group=self._group)
        return values

    def gather(self, value: Any, *, gets_on: bool = True) -> list[Any]:
        """Every rank's JSON value, by rank. Without `gets_on` the watchdog takes it for a wait."""
        if self._group is None:
            return [value]
        text = json.dumps(value).encode()
        sizes = torch.zeros(self.world_size, dtype=torch.int64)
        sizes[self.rank] = len(text)
        with _waiting() if gets_on else contextlib.nullcontext():
            dist.all_reduce(sizes, group=self._group)
        width = int(sizes.max())
        own = torch.zeros(width, dtype=torch.uint8)
        own[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        rows = torch.empty(self.world_size, width, dtype=torch.uint8)
        dist.all_gather(list(rows), own, group=self._group)
        return [
            json.loads(bytes(row[: int(size)].tolist()))
            for row, size in zip(rows, sizes, strict=True)
        ]

    def first(self, value: Any, *, gets_on: bool = True) -> Any:
        """Rank 0's JSON value; what the others pass is not looked at. See `gather`."""
        return self.gather(value if self.rank == 0 else None, gets_on=gets_on)[0]

    def barrier(self) -> None:
        """Returns when all ranks have come here."""
        self.gather(None)


@contextlib.contextmanager
def _waiting() -> Iterator[None]:
    watchdog.tick("waits for the other ranks")
    yield
    watchdog.tick("goes on")
