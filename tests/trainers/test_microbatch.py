"""Micro-batches: every row once, within the token budget, longest rows first."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainers.microbatch import cut_microbatches


def cut(lengths: list[int], max_tokens: int) -> list[list[int]]:
    cuts = cut_microbatches(np.array(lengths, dtype=np.int64), max_tokens=max_tokens)
    return [rows.tolist() for rows in cuts]


@given(st.lists(st.integers(0, 40), max_size=60), st.integers(1, 100))
def test_every_row_comes_once_and_padding_fits(lengths: list[int], max_tokens: int) -> None:
    cuts = cut(lengths, max_tokens)
    assert sorted(row for rows in cuts for row in rows) == list(range(len(lengths)))
    for rows in cuts:
        padded = len(rows) * max(lengths[row] for row in rows)
        assert len(rows) == 1 or padded <= max_tokens


@given(st.lists(st.integers(1, 40), min_size=1, max_size=60), st.integers(1, 100))
def test_longest_rows_come_first_and_equals_keep_their_order(
    lengths: list[int], max_tokens: int
) -> None:
    order = [row for rows in cut(lengths, max_tokens) for row in rows]
    assert order == sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))


def test_no_rows_give_no_microbatch() -> None:
    assert cut([], 10) == []


def test_a_row_longer_than_the_budget_goes_alone() -> None:
    assert cut([3, 50, 4], 8) == [[1], [2, 0]]


@pytest.mark.parametrize("max_tokens", [12, 15])
def test_a_microbatch_takes_as_many_rows_as_fit(max_tokens: int) -> None:
    assert cut([4, 4, 4, 4, 4], max_tokens) == [[0, 1, 2], [3, 4]]
