"""Cutting a rank's rows into micro-batches that fit a device. Pure."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]


def cut_microbatches(lengths: IntArray, *, max_tokens: int) -> list[IntArray]:
    """Row numbers of each micro-batch: together every row once, longest rows first.

    Rows are sorted by length (ties keep their order), then taken greedily while rows times the
    longest, which is what padding makes of them, is at most `max_tokens`. A single row that is
    longer than that gets a micro-batch of its own. No rows give no micro-batches.
    """
    order = np.argsort(-lengths, kind="stable")
    cuts: list[IntArray] = []
    start = 0
    while start < len(order):
        longest = max(1, int(lengths[order[start]]))
        rows = max(1, max_tokens // longest)
        cuts.append(order[start : start + rows].astype(np.int64))
        start += rows
    return cuts
