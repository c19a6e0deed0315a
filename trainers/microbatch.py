"""Cutting a rank's rows into micro-batches: as cheap as padding and launches allow. Pure."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from jobs.spec import Batching

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Cutting:
    """What rows are cut by."""

    max_tokens: int
    """Of a micro-batch, padding included."""
    launch_tokens: int
    """What a micro-batch costs besides its tokens, in tokens."""

    @classmethod
    def of(cls, batching: Batching) -> Cutting:
        """That of a job; DEFAULT_MAX_TOKENS and DEFAULT_LAUNCH_TOKENS where they are still to be
        found out."""
        most, launch = batching.max_tokens_per_microbatch, batching.launch_tokens
        return cls(
            max_tokens=DEFAULT_MAX_TOKENS if most == "auto" else most,
            launch_tokens=DEFAULT_LAUNCH_TOKENS if launch == "auto" else launch,
        )


DEFAULT_MAX_TOKENS = 8192
"""Where nobody has tried, as in an evaluation apart from a run."""
DEFAULT_LAUNCH_TOKENS = 128
"""Where nobody has measured it: about what it is of a small encoder on a CPU."""


def cut_microbatches(lengths: IntArray, cutting: Cutting) -> list[IntArray]:
    """Row numbers of each micro-batch: together every row once, longest rows first.

    Rows are sorted by length (ties keep their order) and cut where the sum of what the
    micro-batches cost is least: each costs `cutting.launch_tokens`, and its rows times the longest
    of them, which is what padding makes of them. That is at most `cutting.max_tokens`; a single row
    that is longer has a micro-batch of its own. No rows give no micro-batches.

    With sorted rows no micro-batch needs others than neighbours. The least cost of the first j rows
    is that of the first i, for the best i, and of a micro-batch from i to j: n steps, of as many
    numbers as a micro-batch may have rows.
    """
    order = np.argsort(-lengths, kind="stable").astype(np.int64)
    longest = np.maximum(1, lengths[order]).astype(np.int64)
    num_rows = len(order)
    # The first row of the largest micro-batch that ends before j; rises with j.
    reach = np.arange(num_rows) + np.maximum(1, cutting.max_tokens // longest)
    first_of = np.searchsorted(reach, np.arange(1, num_rows + 1), side="left")
    least = np.zeros(num_rows + 1, dtype=np.int64)
    begins = np.zeros(num_rows + 1, dtype=np.int64)
    numbers = np.arange(num_rows + 1)
    for end in range(1, num_rows + 1):
        first = first_of[end - 1]
        costs = least[first:end] + (end - numbers[first:end]) * longest[first:end]
        best = int(np.argmin(costs))
        least[end] = costs[best] + cutting.launch_tokens
        begins[end] = first + best
    cuts: list[IntArray] = []
    end = num_rows
    while end > 0:
        cuts.append(order[begins[end] : end])
        end = int(begins[end])
    return cuts[::-1]


def padded_tokens(lengths: IntArray) -> int:
    """Tokens of a micro-batch of rows with these lengths, padding included."""
    return len(lengths) * max(1, int(lengths.max()))
