"""Micro-batches: every row once, within the token budget, at the least cost, longest rows first."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from trainers.microbatch import Cutting, computed_tokens, cut_microbatches


def cut(
    lengths: list[int], max_tokens: int, launch_tokens: int = 1000, *, packing: bool = False
) -> list[list[int]]:
    cuts = cut_microbatches(
        np.array(lengths, dtype=np.int64),
        Cutting(max_tokens=max_tokens, launch_tokens=launch_tokens, packing=packing),
    )
    return [rows.tolist() for rows in cuts]


@given(st.lists(st.integers(0, 40), max_size=60), st.integers(1, 100))
def test_every_row_comes_once_and_padding_fits(lengths: list[int], max_tokens: int) -> None:
    cuts = cut(lengths, max_tokens)
    assert sorted(row for rows in cuts for row in rows) == list(range(len(lengths)))
    for rows in cuts:
        padded = len(rows) * max(lengths[row] for row in rows)
        assert len(rows) == 1 or padded <= max_tokens


@given(st.lists(st.integers(0, 40), max_size=60), st.integers(1, 100), st.integers(0, 200))
def test_packed_every_row_comes_once_and_the_rows_fit(
    lengths: list[int], max_tokens: int, launch_tokens: int
) -> None:
    cuts = cut(lengths, max_tokens, launch_tokens, packing=True)
    assert sorted(row for rows in cuts for row in rows) == list(range(len(lengths)))
    for rows in cuts:
        assert len(rows) == 1 or size(lengths, rows, packing=True) <= max_tokens


@given(st.lists(st.integers(1, 40), min_size=1, max_size=60), st.integers(1, 100), st.booleans())
def test_longest_rows_come_first_and_equals_keep_their_order(
    lengths: list[int], max_tokens: int, packing: bool
) -> None:
    order = [row for rows in cut(lengths, max_tokens, packing=packing) for row in rows]
    assert order == sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))


def test_no_rows_give_no_microbatch() -> None:
    assert cut([], 10) == []


def test_a_row_longer_than_the_budget_goes_alone() -> None:
    assert cut([3, 50, 4], 8) == [[1], [2, 0]]


def size(lengths: Sequence[int], rows: Sequence[int], *, packing: bool) -> int:
    """Tokens for which a micro-batch counts; each row has one at least."""
    tokens = [max(1, lengths[row]) for row in rows]
    padding = len(rows) * max(tokens) - sum(tokens)
    return sum(tokens) + (padding // 32 if packing else padding)


def cost(
    lengths: Sequence[int], cuts: Sequence[Sequence[int]], launch_tokens: int, *, packing: bool
) -> int:
    return sum(launch_tokens + size(lengths, rows, packing=packing) for rows in cuts)


@given(
    st.lists(st.integers(1, 12) | st.integers(100, 200), min_size=1, max_size=8),
    st.integers(1, 400),
    st.integers(0, 30),
    st.booleans(),
)
def test_no_cut_of_the_sorted_rows_costs_less(
    lengths: list[int], max_tokens: int, launch_tokens: int, packing: bool
) -> None:
    """All ways to cut n rows in a line: each of the n - 1 gaps is a cut or is none."""
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    costs = []
    for gaps in itertools.product((False, True), repeat=len(order) - 1):
        bounds = [0, *(place + 1 for place, is_cut in enumerate(gaps) if is_cut), len(order)]
        cuts = [order[low:high] for low, high in itertools.pairwise(bounds)]
        if all(len(c) == 1 or size(lengths, c, packing=packing) <= max_tokens for c in cuts):
            costs.append(cost(lengths, cuts, launch_tokens, packing=packing))
    found = cut(lengths, max_tokens, launch_tokens, packing=packing)
    assert cost(lengths, found, launch_tokens, packing=packing) == min(costs)


def test_a_dear_launch_makes_few_microbatches_and_a_cheap_one_little_padding() -> None:
    lengths = [100, 100, 10, 10, 10]
    assert cut(lengths, 1000, launch_tokens=500) == [[0, 1, 2, 3, 4]]
    assert cut(lengths, 1000, launch_tokens=100) == [[0, 1], [2, 3, 4]]


def test_a_microbatch_has_at_most_so_many_rows_as_fit() -> None:
    assert [len(rows) for rows in cut([4, 4, 4, 4, 4], 12)] == [2, 3]
    assert [len(rows) for rows in cut([4, 4, 4, 4, 4], 15)] == [2, 3]


def test_packed_rows_of_all_lengths_go_together_until_their_padding_costs_a_launch() -> None:
    lengths = [100, 100, 10, 10, 10]
    assert cut(lengths, 1000, launch_tokens=100, packing=True) == [[0, 1, 2, 3, 4]]
    assert cut(lengths, 229, launch_tokens=100, packing=True) == [[0, 1], [2, 3, 4]]
    long_and_short = [512] + [8] * 100
    assert cut(long_and_short, 8192, launch_tokens=100, packing=True) == [
        [0], list(range(1, 101))
    ]  # fmt: skip


def test_layers_compute_padding_only_where_it_is_not_packed() -> None:
    lengths = np.array([9, 4, 0])
    assert computed_tokens(lengths, Cutting(100, 1)) == 27
    assert computed_tokens(lengths, Cutting(100, 1, packing=True)) == 14
