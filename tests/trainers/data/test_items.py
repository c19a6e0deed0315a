"""Items: encoded rows as columns, checked against plain Python lists."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.errors import DataError
from trainers.data.items import Items, Ragged

UNTIMED = settings(deadline=None)
LISTS = st.lists(st.lists(st.integers(0, 99), max_size=5), max_size=12)


def ragged(lists):
    return Ragged.from_arrow(pa.array(lists, pa.list_(pa.int32())))


def items(lists):
    numbers = np.arange(len(lists)) * 10
    return Items({"tokens": ragged(lists), "label": numbers, "pair": np.stack([numbers] * 2, 1)})


def lists_of(column):
    ends = zip(column.offsets[:-1], column.offsets[1:], strict=True)
    return [column.values[start:stop].tolist() for start, stop in ends]


@UNTIMED
@given(lists=LISTS, data=st.data())
def test_take_and_slice_give_what_lists_give(lists, data):
    whole = items(lists)
    assert len(whole) == len(lists)
    indices = data.draw(st.lists(st.integers(0, max(0, len(lists) - 1)), max_size=9))
    indices = indices if lists else []
    taken = whole.take(np.array(indices, dtype=np.int64))
    assert lists_of(taken.columns["tokens"]) == [lists[i] for i in indices]
    assert taken.columns["label"].tolist() == [i * 10 for i in indices]
    assert taken.columns["pair"].shape == (len(indices), 2)
    start = data.draw(st.integers(0, len(lists)))
    stop = data.draw(st.integers(start, len(lists)))
    part = whole.slice(start, stop)
    assert lists_of(part.columns["tokens"]) == lists[start:stop]
    assert part.columns["label"].tolist() == [i * 10 for i in range(start, stop)]


@UNTIMED
@given(parts=st.lists(LISTS, min_size=1, max_size=4))
def test_concat_joins_the_parts_in_order(parts):
    joined = Items.concat([items(part) for part in parts])
    assert lists_of(joined.columns["tokens"]) == [row for part in parts for row in part]
    assert joined.columns["label"].tolist() == [i * 10 for part in parts for i in range(len(part))]
    assert joined.columns["tokens"].values.dtype == np.int32


@UNTIMED
@given(lists=LISTS, more=LISTS, start=st.integers(0, 5))
def test_every_kind_of_list_column_becomes_ragged(lists, more, start):
    for kind in (pa.list_(pa.int32()), pa.large_list(pa.int32())):
        chunks = pa.chunked_array([pa.array(lists, kind), pa.array(more, kind)])
        assert lists_of(Ragged.from_arrow(chunks)) == lists + more
        assert lists_of(Ragged.from_arrow(chunks.chunk(0)[start:])) == lists[start:]
    fixed = pa.array([row[:1] * 3 for row in lists if row], pa.list_(pa.int32(), 3))
    assert lists_of(Ragged.from_arrow(fixed[start:])) == fixed.to_pylist()[start:]
    assert lists_of(Ragged.from_arrow(pa.chunked_array([], pa.list_(pa.int32())))) == []


def test_one_chunk_is_not_copied():
    column = pa.chunked_array([pa.array([[1, 2], [3]], pa.list_(pa.int32()))])
    values = Ragged.from_arrow(column).values
    assert values.__array_interface__["data"][0] == column.chunk(0).values.buffers()[1].address


@pytest.mark.parametrize(("lists", "row"), [([[1], None, []], 101), ([[1], [], [2, None]], 102)])
def test_a_null_list_or_number_names_its_row(lists, row):
    with pytest.raises(DataError, match=f"row {row}: a list, or a number in it, is null"):
        Ragged.from_arrow(pa.array(lists, pa.list_(pa.int32())), first_row=100)


def test_columns_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="different lengths"):
        Items({"a": np.arange(2), "b": np.arange(3)})
    with pytest.raises(ValueError, match="do not span"):
        Ragged(np.arange(3), np.array([0, 2]))


def test_bytes_count_values_and_offsets():
    whole = items([[1, 2], [3]])
    assert whole.nbytes == 3 * 4 + 3 * 8 + 2 * 8 + 4 * 8
    assert len(Items({})) == 0
