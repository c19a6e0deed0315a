"""Evaluation: every row of a set once, over all ranks, however uneven their shares."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from trainers import watchdog
from trainers.agreement import Agreement
from trainers.data.stream import RankBatch
from trainers.memory import passes_over
from trainers.microbatch import IntArray, cut_microbatches
from trainers.parallel import autocast
from trainers.tasks.task import Batch, Metrics, Task

OnOutput = Callable[[IntArray, torch.Tensor, Batch], None]
"""Called with row ids [n], the model's output [n, ...] and the batch."""

_PASSES_BETWEEN_VOTES = 8
"""Micro-batches that are collated at once before the ranks of a model that is cut agree on them."""


def measure(
    model: nn.Module,
    task: Task,
    batches: Iterable[RankBatch],
    metrics: Metrics,
    *,
    device: torch.device,
    dtype: torch.dtype,
    max_tokens: int,
    on_output: OnOutput | None = None,
    agreement: Agreement | None = None,
) -> None:
    """Updates `metrics` with what `model` (without its replication) says of the rows of `batches`.

    Add the states of all ranks afterwards, so that the result does not depend on how rows are
    shared out. A whole model talks to no other rank. Each pass of a model that is cut over the
    ranks gathers its weights from all of them: it needs `agreement`, and is measured by all ranks
    at the same time. Where one of them cannot go on, it raises its error, and the others return.

    Raises MicrobatchTooLarge where memory runs out in a pass, on this rank alone.
    """
    passes = _passes(task, batches, max_tokens=max_tokens)
    if isinstance(model, FSDPModule):
        assert agreement is not None, "the ranks of a model that is cut run the same passes"
        passes = _evened(passes, agreement)
    was_training = model.training
    model.eval()
    try:
        with _no_gradient(model), autocast(device, dtype):
            for own in passes:
                watchdog.tick("evaluates")
                batch = own.batch if own.batch is not None else task.empty_batch()
                with passes_over(own.lengths, max_tokens=max_tokens):
                    on_device = move(batch, device)
                    output = task.forward(model, on_device)
                    if own.batch is not None:
                        metrics.update(output, on_device)
                        if on_output is not None:
                            on_output(own.rows, output, on_device)
    finally:
        model.train(was_training)
        if isinstance(model, FSDPModule):
            model.reshard()  # without a backward pass, its root would stay gathered


@dataclass(frozen=True, eq=False)
class _Pass:
    """A micro-batch, or a place for one: another rank has a batch, and this one has none left."""

    rows: IntArray
    """Row ids; shape [n]."""
    batch: Batch | None
    lengths: IntArray
    """Tokens of all rows of the batch from which it was cut, not of its own alone."""


_PLACE = _Pass(np.empty(0, dtype=np.int64), None, np.empty(0, dtype=np.int64))


def _passes(task: Task, batches: Iterable[RankBatch], *, max_tokens: int) -> Iterator[_Pass]:
    for batch in batches:
        lengths = task.lengths(batch.items)
        for cut in cut_microbatches(lengths, max_tokens=max_tokens):
            with passes_over(lengths, max_tokens=max_tokens):
                collated = task.collate(batch.items.take(cut))
            yield _Pass(batch.rows[cut], collated, lengths)


def _evened(passes: Iterator[_Pass], agreement: Agreement) -> Iterator[_Pass]:
    """The passes of this rank, as many on all ranks.

    Before each some are made, the ranks tell whether they can go on: an error of one, such as rows
    that cannot be read, ends the passes of all.
    """
    is_done = False
    while not is_done:
        own, error = list[_Pass](), None
        try:
            own = list(itertools.islice(passes, _PASSES_BETWEEN_VOTES))
        except Exception as caught:
            error = caught
        votes = agreement.gather([len(own), error is not None])
        if error is not None:
            raise error
        if any(failed for _, failed in votes):
            return
        most = max(number for number, _ in votes)
        is_done = most < _PASSES_BETWEEN_VOTES
        yield from own
        yield from (_PLACE for _ in range(most - len(own)))


def _no_gradient(model: nn.Module) -> AbstractContextManager[None]:
    """Inference mode; for a model that is cut, no_grad: its gathered weights are used again in
    training, and tensors made in inference mode are not allowed there."""
    return torch.no_grad() if isinstance(model, FSDPModule) else torch.inference_mode()


def move(batch: Batch, device: torch.device) -> Batch:
    """The batch on `device`, copied without waiting where it comes from pinned memory."""
    if device.type == "cpu":
        return batch
    return {key: value.pin_memory().to(device, non_blocking=True) for key, value in batch.items()}
