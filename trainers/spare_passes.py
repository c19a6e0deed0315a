"""Passes through a model in training that leave no trace: to measure it with, or to compile it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch

from trainers import watchdog
from trainers.buffers import KeptBuffers
from trainers.evaluation import move
from trainers.loop import Trainee, forward
from trainers.memory import passes_over
from trainers.microbatch import Cutting
from trainers.optim import clear_gradients
from trainers.parallel import plain, without_reduction
from trainers.tasks.task import Batch


@contextmanager
def spare_passes(
    trainee: Trainee, cutting: Cutting, *, rows: int, tokens: int
) -> Iterator[Callable[[Batch], None]]:
    """What runs a forward and a backward pass over a batch of at most `rows` of `tokens` each.

    No gradients are reduced; none are left, weights do not change, buffers are put back, and
    generators are seeded by each pass of training anyway. All ranks run the same passes, before
    the first step. Raises MicrobatchTooLarge, on this rank alone, where memory runs out.
    """
    trainee.model.train()
    buffers = KeptBuffers(plain(trainee.model))
    buffers.keep()

    def run(batch: Batch) -> None:
        with without_reduction(trainee.model):
            loss = forward(trainee, move(batch, trainee.device))
            loss.backward()  # type: ignore[no-untyped-call]
        watchdog.tick()

    try:
        with passes_over(np.full(rows, tokens), cutting):
            yield run
    finally:
        clear_gradients(trainee.model, trainee.optimizer)
        buffers.put_back(torch.ones((), device=trainee.device))
