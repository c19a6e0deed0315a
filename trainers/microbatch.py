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
    packing: bool = False
    """Whether padding goes through embeddings and head alone (`trainers.packing`)."""

    @classmethod
    def of(cls, batching: Batching) -> Cutting:
        """That of a job; DEFAULT_MAX_TOKENS and DEFAULT_LAUNCH_TOKENS where they are still to be
        found out."""
        most, launch = batching.max_tokens_per_microbatch, batching.launch_tokens
        return cls(
            max_tokens=DEFAULT_MAX_TOKENS if most == "auto" else most,
            launch_tokens=DEFAULT_LAUNCH_TOKENS if launch == "auto" else launch,
            packing=batching.packing,
        )


DEFAULT_MAX_TOKENS = 8192
"""Where nobody has tried, as in an evaluation apart from a run."""
DEFAULT_LAUNCH_TOKENS = 128
"""Where nobody has measured it: about what it is of a small encoder on a CPU."""
_PADDING_LIKE_ONE_PACKED = 32
"""So many tokens of padding cost, and need memory, like one of a packed row: embeddings are about
that small a part of an encoder."""


def cut_microbatches(lengths: IntArray, cutting: Cutting) -> list[IntArray]:
    """Row numbers of each micro-batch: together every row once, longest rows first.

    Rows are sorted by length (ties keep their order) and cut where the sum of what the
    micro-batches cost is least: each costs `cutting.launch_tokens`, and its rows times the longest
    of them, which is what padding makes of them. That is at most `cutting.max_tokens`; a single row
    that is longer has a micro-batch of its own. No rows give no micro-batches. With
    `cutting.packing` padding counts for little instead: a micro-batch costs the sum of its rows,
    and a small part of the padding.

    With sorted rows no micro-batch needs others than neighbours. The least cost of the first j rows
    is that of the first i, for the best i, and of a micro-batch from i to j: n steps, of as many
    numbers as a micro-batch may have rows.
    """
    order = np.argsort(-lengths, kind="stable").astype(np.int64)
    longest = np.maximum(1, lengths[order]).astype(np.int64)
    num_rows = len(order)
    before = np.concatenate([[0], np.cumsum(longest)])
    padding_like_one = _PADDING_LIKE_ONE_PACKED if cutting.packing else 1
    least = np.zeros(num_rows + 1, dtype=np.int64)
    begins = np.zeros(num_rows + 1, dtype=np.int64)
    numbers = np.arange(num_rows + 1)
    first = 0
    for end in range(1, num_rows + 1):
        begin = numbers[first:end]
        tokens = before[end] - before[begin]
        padding = (end - begin) * longest[begin] - tokens
        sizes = tokens + padding // padding_like_one  # falls with `begin`
        too_large = min(int(np.count_nonzero(sizes > cutting.max_tokens)), len(sizes) - 1)
        first += too_large
        costs = least[first:end] + sizes[too_large:]
        best = int(np.argmin(costs))
        least[end] = costs[best] + cutting.launch_tokens
        begins[end] = first + best
    cuts: list[IntArray] = []
    end = num_rows
    while end > 0:
        cuts.append(order[begins[end] : end])
        end = int(begins[end])
    return cuts[::-1]


def computed_tokens(lengths: IntArray, cutting: Cutting) -> int:
    """Tokens that go through the layers for a micro-batch of rows with these lengths: padding
    included, where it is not packed."""
    lengths = np.maximum(1, lengths)
    return int(lengths.sum() if cutting.packing else len(lengths) * lengths.max())
