"""Evaluation: every row of a set once, over all ranks, however uneven their shares."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn

from trainers.agreement import Agreement
from trainers.data.stream import RankBatch
from trainers.microbatch import IntArray, cut_microbatches
from trainers.parallel import autocast
from trainers.tasks.task import Batch, Evaluation, Task

OnOutput = Callable[[IntArray, torch.Tensor, Batch], None]
"""Called with row ids [n], the model's output [n, ...] and the batch."""


def evaluate(
    model: nn.Module,
    task: Task,
    batches: Iterable[RankBatch],
    *,
    agreement: Agreement,
    device: torch.device,
    dtype: torch.dtype,
    max_tokens: int,
    on_output: OnOutput | None = None,
) -> Evaluation:
    """The evaluation of `model` (without its replication) on the rows of `batches`.

    `batches` are this rank's share. The ranks' states are added once at the end, so the result is
    the same on every rank and does not depend on how rows are shared out.
    """
    metrics = task.metrics()
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode(), autocast(device, dtype):
            for batch in batches:
                for cut in cut_microbatches(task.lengths(batch.items), max_tokens=max_tokens):
                    collated = move(task.collate(batch.items.take(cut)), device)
                    output = task.forward(model, collated)
                    metrics.update(output, collated)
                    if on_output is not None:
                        on_output(batch.rows[cut], output, collated)
    finally:
        model.train(was_training)
    return metrics.compute(agreement.sum(metrics.state()))


def move(batch: Batch, device: torch.device) -> Batch:
    """The batch on `device`, copied without waiting where it comes from pinned memory."""
    if device.type == "cpu":
        return batch
    return {key: value.pin_memory().to(device, non_blocking=True) for key, value in batch.items()}
