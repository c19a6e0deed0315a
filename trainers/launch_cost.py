"""What a micro-batch costs besides its tokens, measured with the model in training.

A forward and a backward pass of one short row is nearly all launch: Python, kernels, the walk over
the gradients. One of many rows tells what a token costs. Their ratio decides how finely rows are
cut (`microbatch.cut_microbatches`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch

from trainers.agreement import Agreement
from trainers.loop import Trainee
from trainers.microbatch import Cutting
from trainers.spare_passes import spare_passes
from trainers.tasks.task import Batch

_ROW_TOKENS = 32
_CPU_ROWS = 16
"""Of the larger pass on a CPU, where a token's cost hardly depends on how many there are."""
_REPEATS = 4
"""Passes of each size; the first warms up, and of the others the quickest counts."""


def measured_launch_tokens(
    trainee: Trainee, cutting: Cutting, agreement: Agreement, *, most_row_tokens: int
) -> int:
    """Tokens that cost as much as the launch of a micro-batch: a power of two, or where that is
    less, `cutting.max_tokens`. A row may have `most_row_tokens`.

    Of rank 0, told to the others. A power of two: more exact it is not, and two runs on like
    machines often cut alike. Called by all ranks at the same point, before the first step.

    On a GPU the larger pass has half of `cutting.max_tokens`: with fewer its processors may not be
    busy. Raises MicrobatchTooLarge, on this rank alone, where memory runs out.
    """
    row_tokens = max(1, min(_ROW_TOKENS, most_row_tokens, cutting.max_tokens // 2))
    rows = cutting.max_tokens // row_tokens
    rows = max(2, rows // 2 if trainee.device.type == "cuda" else min(rows, _CPU_ROWS))
    task, device = trainee.task, trainee.device
    with spare_passes(trainee, cutting, rows=rows, tokens=row_tokens) as run:
        short = _seconds(run, task.empty_batch(), device)
        long = _seconds(run, task.empty_batch(rows=rows, tokens=row_tokens), device)
    found: int = agreement.first(
        launch_in_tokens(short, long, tokens=rows * row_tokens, most=cutting.max_tokens)
    )
    return found


def launch_in_tokens(short: float, long: float, *, tokens: int, most: int) -> int:
    """The launch, from the seconds of a pass that is nearly all launch and of one of so many
    tokens; `most` where it is more, or tokens cost nothing that can be measured. Pure."""
    of_token = (long - short) / tokens
    if of_token <= 0 or short >= most * of_token:
        return most
    return min(most, 1 << max(0, round(math.log2(short / of_token))))


def _seconds(run: Callable[[Batch], None], batch: Batch, device: torch.device) -> float:
    """Of a forward and a backward pass."""
    taken = []
    for _ in range(_REPEATS):
        _wait_for(device)
        began = time.perf_counter()
        run(batch)
        _wait_for(device)
        taken.append(time.perf_counter() - began)
    return min(taken[1:])


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
