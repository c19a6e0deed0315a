"""Evaluation: every row of a set once, over all ranks, however uneven their shares."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn

from trainers import watchdog
from trainers.data.stream import RankBatch
from trainers.memory import passes_over
from trainers.microbatch import IntArray, cut_microbatches
from trainers.parallel import autocast
from trainers.tasks.task import Batch, Metrics, Task

OnOutput = Callable[[IntArray, torch.Tensor, Batch], None]
"""Called with row ids [n], the model's output [n, ...] and the batch."""


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
) -> None:
    """Updates `metrics` with what `model` (without its replication) says of the rows of `batches`.

    Talks to no other rank: add the states of all ranks afterwards, so that the result does not
    depend on how rows are shared out. Raises MicrobatchTooLarge where memory runs out.
    """
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode(), autocast(device, dtype):
            for batch in batches:
                lengths = task.lengths(batch.items)
                with passes_over(lengths, max_tokens=max_tokens):
                    for cut in cut_microbatches(lengths, max_tokens=max_tokens):
                        watchdog.tick("evaluates")
                        collated = move(task.collate(batch.items.take(cut)), device)
                        output = task.forward(model, collated)
                        metrics.update(output, collated)
                        if on_output is not None:
                            on_output(batch.rows[cut], output, collated)
    finally:
        model.train(was_training)


def move(batch: Batch, device: torch.device) -> Batch:
    """The batch on `device`, copied without waiting where it comes from pinned memory."""
    if device.type == "cpu":
        return batch
    return {key: value.pin_memory().to(device, non_blocking=True) for key, value in batch.items()}
