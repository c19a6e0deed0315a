"""How many tokens a micro-batch may have, found by trying: `max_tokens_per_microbatch: auto`.

Passes forward and backward over one row of the most tokens, over two, four and so on, until
memory or speed says that twice as many do not pay. What the optimizer needs is there already.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from trainers.agreement import Agreement
from trainers.free_memory import free_bytes
from trainers.loop import Trainee
from trainers.memory import MicrobatchTooLarge, give_back_memory
from trainers.microbatch import Cutting
from trainers.parallel import is_sharded, local_part
from trainers.spare_passes import spare_passes
from trainers.tasks.task import Batch

_REPEATS = 2
"""Passes of each size; the quicker counts, as the first of a size allocates its memory."""
_GAIN = 1.03
"""So many times the best rate is worth twice the memory; within as much, two rates are equal."""
_SLOW_SIZES = 2
"""Sizes in a row that gain nothing, after which no larger one is tried."""
_MEMORY_SHARE = 0.9
"""Of the memory that there is, which a pass may fill."""
_CPU_TEMPORARIES = 1.5
"""Peak of a pass on a CPU, in times of what it keeps for the backward pass."""


@dataclass(frozen=True)
class Trial:
    """Passes over `tokens` tokens."""

    tokens: int
    seconds: float
    """Of a pass, on the slowest rank."""

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds


def tried_max_tokens(
    trainee: Trainee,
    agreement: Agreement,
    *,
    most_row_tokens: int,
    most_tokens: int,
    local_world_size: int,
) -> int:
    """The most tokens of a micro-batch, padding included: the largest that is about as quick, by
    token, as the quickest; the same on all ranks.

    It holds one row of `most_row_tokens` at least, and is at most about `most_tokens`, beyond which
    no micro-batch of the run would be. On CPUs the `local_world_size` ranks of a node share its
    memory. Called by all ranks at the same point, before the first step: no weights change.

    Raises MicrobatchTooLarge, on this rank alone, where the memory does not suffice for one row,
    or runs out in a model that is cut over the ranks, which the others would wait for.
    """
    trials = list[Trial]()
    for rows in _doubling(-(-most_tokens // most_row_tokens)):
        seconds, fits_twice = _try(
            trainee, rows=rows, tokens=most_row_tokens, ranks_of_node=local_world_size
        )
        told = agreement.gather([seconds, fits_twice])
        if any(taken is None for taken, _ in told):
            break
        trials.append(Trial(rows * most_row_tokens, max(taken for taken, _ in told)))
        if not all(fits for _, fits in told) or gains_nothing(trials):
            break
    give_back_memory()
    return largest_of_the_quick(trials)


def _doubling(most: int) -> list[int]:
    """1, 2, 4 and so on, the last of them `most`."""
    smaller = itertools.takewhile(lambda rows: rows < most, (2**n for n in itertools.count()))
    return [*smaller, max(1, most)]


def gains_nothing(trials: Sequence[Trial]) -> bool:
    """Whether the last sizes were no quicker than smaller ones. Pure."""
    before, last = trials[:-_SLOW_SIZES], trials[-_SLOW_SIZES:]
    if not before:
        return False
    best = max(trial.rate for trial in before)
    return all(trial.rate < _GAIN * best for trial in last)


def largest_of_the_quick(trials: Sequence[Trial]) -> int:
    """Tokens of the largest trial whose rate is about the best. Pure."""
    best = max(trial.rate for trial in trials)
    return max(trial.tokens for trial in trials if trial.rate * _GAIN >= best)


def _try(
    trainee: Trainee, *, rows: int, tokens: int, ranks_of_node: int
) -> tuple[float | None, bool]:
    """Seconds of a pass over so many rows, None where they do not fit; and whether twice as many
    would."""
    cutting = Cutting(rows * tokens, launch_tokens=0)
    try:
        with spare_passes(trainee, cutting, rows=rows, tokens=tokens) as run:
            batch = trainee.task.empty_batch(rows=rows, tokens=tokens)
            peak, room = _peak_and_room(trainee, lambda: run(batch), ranks_of_node)
            taken = [_seconds(run, batch, trainee.device) for _ in range(_REPEATS)]
    except MicrobatchTooLarge:
        if rows == 1 or is_sharded(trainee.model):
            raise
        return None, False
    finally:
        if trainee.device.type == "cuda":
            torch.cuda.empty_cache()
    return min(taken), 2 * peak <= _MEMORY_SHARE * room


def _seconds(run: Callable[[Batch], None], batch: Batch, device: torch.device) -> float:
    """Of a pass forward and backward."""
    began = time.perf_counter()
    run(batch)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def _peak_and_room(
    trainee: Trainee, run: Callable[[], None], ranks_of_node: int
) -> tuple[float, float]:
    """Bytes that a pass needs on top of what is held, and that there are for it."""
    device = trainee.device
    if device.type != "cuda":
        give_back_memory()
        room = free_bytes() / ranks_of_node
        return _CPU_TEMPORARIES * _kept_bytes(trainee.model, run), room
    held = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    free, _ = torch.cuda.mem_get_info(device)
    own = torch.cuda.memory_reserved(device)
    return torch.cuda.max_memory_allocated(device) - held, free + own - held


def _kept_bytes(model: nn.Module, run: Callable[[], None]) -> int:
    """Bytes that autograd keeps for the backward pass besides the weights, each storage once."""
    storages = dict[int, int]()

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    weights = {local_part(p.detach()).untyped_storage().data_ptr() for p in model.parameters()}
    return sum(size for place, size in storages.items() if place not in weights)
