"""The order of rows: exactly once, the same for all worker counts, and how well it shuffles."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.errors import SpecError
from trainers.data.partition import (
    ORDER_VERSION,
    EpochOrder,
    fit_window,
    item_step,
    lanes_of_rank,
    positions_before,
    rank_lanes,
    rank_positions,
    refuse_small_memory,
    rows_in_groups,
    sequential_share,
    stream_bytes,
)

UNTIMED = settings(deadline=None)
GROUPS = st.lists(st.sampled_from([0, 1, 1, 2, 3, 7, 20]), min_size=0, max_size=25)
LANES = st.integers(1, 13)
WINDOWS = st.integers(1, 6)
WORLDS = st.integers(1, 6)


def order_of(groups, *, seed=3, epoch=0, lanes=4, window=2):
    return EpochOrder(groups, seed=seed, epoch=epoch, lanes=lanes, window=window)


def whole(order):
    """Row ids of a whole epoch, through first rows of the original groups."""
    return row_ids(order, np.arange(order.num_items))


def row_ids(order, positions):
    groups, rows = order.rows_at(positions)
    return (groups << 32) | rows


def every_row(groups):
    return sorted((group << 32) | row for group, rows in enumerate(groups) for row in range(rows))


@UNTIMED
@given(groups=GROUPS, lanes=LANES, window=WINDOWS, seed=st.integers(0, 2**70), epoch=WORLDS)
def test_each_row_comes_exactly_once_an_epoch(groups, lanes, window, seed, epoch):
    order = order_of(groups, seed=seed, epoch=epoch, lanes=lanes, window=window)
    assert sorted(whole(order).tolist()) == every_row(groups)


@UNTIMED
@given(groups=GROUPS, lanes=LANES, window=WINDOWS, world_size=WORLDS, start=st.integers(0, 300))
def test_interleaved_ranks_give_the_tail_of_one_sequence(groups, lanes, window, world_size, start):
    order = order_of(groups, lanes=lanes, window=window)
    start = min(start, order.num_items)
    shares = [
        rank_positions(rank=rank, world_size=world_size, start=start, stop=order.num_items)
        for rank in range(world_size)
    ]
    assert sorted(np.concatenate(shares).tolist()) == list(range(start, order.num_items))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    read = np.empty(order.num_items, dtype=np.int64)
    for rank, share in enumerate(shares):
        assert (share % world_size == rank).all()
        read[share] = row_ids(order, share)
        at = np.array([start, order.num_items])
        low, high = positions_before(at, rank=rank, world_size=world_size)
        assert high - low == len(share)
    assert read[start:].tolist() == whole(order)[start:].tolist()


@UNTIMED
@given(lanes=LANES, world_size=WORLDS, start=st.integers(0, 100), rank=st.integers(0, 5))
def test_a_rank_meets_its_lanes_in_turn(lanes, world_size, start, rank):
    rank %= world_size
    positions = rank_positions(rank=rank, world_size=world_size, start=start, stop=start + 400)
    touched, items = rank_lanes(lanes=lanes, rank=rank, world_size=world_size, start=start)
    count = lanes_of_rank(lanes, world_size)
    assert len(touched) == count == len(set(touched.tolist()))
    k = np.arange(len(positions))
    step = item_step(lanes, world_size)
    assert (positions % lanes == touched[k % count]).all()
    assert (positions // lanes == items[k % count] + k // count * step).all()
    if lanes % world_size == 0:
        assert step == 1
        assert (touched % world_size == rank).all()


@UNTIMED
@given(groups=GROUPS, lanes=LANES, window=WINDOWS)
def test_blocks_tile_each_lane_and_agree_with_positions(groups, lanes, window):
    order = order_of(groups, lanes=lanes, window=window)
    assert sum(order.lane_items(lane) for lane in range(lanes)) == sum(groups)
    for lane in range(lanes):
        item = 0
        for number in range(order.num_blocks(lane)):
            block = order.block(lane, number)
            assert block.first_item == item
            assert 1 <= len(block.groups) <= window
            assert (block.piece_rows > 0).all()
            assert order.block_of(lane, item) == number
            assert order.block_of(lane, item + block.num_items - 1) == number
            pieces = [
                (int(group) << 32) | row
                for group, start, stop in zip(block.groups, block.starts, block.stops, strict=True)
                for row in range(start, stop)
            ]
            positions = (item + np.arange(block.num_items)) * lanes + lane
            expected = np.array(pieces)[order.shuffled(block)]
            assert row_ids(order, positions).tolist() == expected.tolist()
            item += block.num_items
        assert item == order.lane_items(lane)
        with pytest.raises(IndexError, match="blocks"):
            order.block(lane, order.num_blocks(lane))
        with pytest.raises(IndexError, match="items"):
            order.block_of(lane, item)


def test_the_order_is_a_pure_function_of_its_inputs():
    groups = [5, 1, 40, 0, 17, 23, 9] * 3
    first = whole(order_of(groups))
    assert (whole(order_of(groups)) == first).all()
    assert (row_ids(order_of(groups), [77, 3, 77]) == first[[77, 3, 77]]).all()
    others = [
        order_of(groups, epoch=1),
        order_of(groups, seed=4),
        order_of(groups, seed=3 + 2**64),
        order_of(groups, window=3),
        order_of(groups, lanes=5),
    ]
    for other in others:
        assert (whole(other) != first).mean() > 0.5


def test_the_order_of_version_1_is_this_one():
    assert ORDER_VERSION == 1
    order = EpochOrder([3, 0, 4, 1, 5], seed=7, epoch=2, lanes=2, window=2)
    groups, rows = order.rows_at(np.arange(13))
    assert groups.tolist() == [2, 3, 0, 4, 2, 4, 0, 4, 2, 4, 2, 4, 0]
    assert rows.tolist() == [2, 0, 0, 3, 1, 4, 2, 1, 3, 2, 0, 0, 1]


def test_lanes_beyond_the_rows_are_empty():
    order = order_of([1, 2], lanes=8)
    assert [order.lane_items(lane) for lane in range(8)] == [1, 1, 1, 0, 0, 0, 0, 0]
    assert [order.num_blocks(lane) for lane in range(8)] == [1, 1, 1, 0, 0, 0, 0, 0]
    assert order_of([], lanes=2).num_items == 0


def test_numbers_out_of_range_are_refused():
    for wrong in ({"lanes": 0}, {"window": 0}, {"seed": -1}, {"epoch": -1}):
        with pytest.raises(ValueError, match="no order"):
            order_of([1], **wrong)
    with pytest.raises(IndexError, match="positions 0 to 2"):
        order_of([3]).rows_at([3])


def test_a_million_row_groups_need_no_walk():
    rows = np.full(1_000_000, 1_000)
    order = EpochOrder(rows, seed=1, epoch=0, lanes=12, window=4)
    groups, _ = order.rows_at([0, 500_000_000, 999_999_999])
    assert len(set(groups.tolist())) == 3
    assert order.num_blocks(0) >= 1_000_000 // 12 // 4


# --------------------------------------------------------------------------------- how well mixed


def positions_of_rows(num_groups, rows_per_group, *, seed, lanes, window):
    order = EpochOrder(
        np.full(num_groups, rows_per_group), seed=seed, epoch=0, lanes=lanes, window=window
    )
    groups, rows = order.rows_at(np.arange(order.num_items))
    return groups * rows_per_group + rows


def test_source_and_shuffled_place_are_not_correlated():
    num_groups, seeds = 101, 60
    measured = np.array(
        [
            np.corrcoef(
                np.arange(num_groups * 20),
                positions_of_rows(num_groups, 20, seed=seed, lanes=4, window=4),
            )[0, 1]
            for seed in range(seeds)
        ]
    )
    deviation = 1 / np.sqrt(num_groups - 1)
    assert abs(measured.mean()) < 3 * deviation / np.sqrt(seeds)
    # 60 draws: the sample's deviation has a standard error of 9 %.
    assert 0.7 * deviation < measured.std() < 1.3 * deviation


def label_shares(seed, *, num_groups, lanes, window, batch, rows_per_group=100):
    """Share of label 1 in each global batch; the set is sorted by label, half of it label 1."""
    rows = positions_of_rows(num_groups, rows_per_group, seed=seed, lanes=lanes, window=window)
    labels = rows >= num_groups * rows_per_group // 2
    return labels[: len(labels) // batch * batch].reshape(-1, batch).mean(axis=1)


@pytest.mark.parametrize(
    ("lanes", "window", "batch"), [(4, 4, 32), (8, 16, 64), (12, 2, 48), (16, 8, 16)]
)
def test_batches_of_label_sorted_data_vary_as_the_docstring_says(lanes, window, batch):
    shares = np.concatenate(
        [
            label_shares(seed, num_groups=800, lanes=lanes, window=window, batch=batch)
            for seed in range(8)
        ]
    )
    uniform = 0.25 / batch
    expected = 1 + (batch / lanes - 1) / window
    assert shares.mean() == pytest.approx(0.5, abs=0.01)
    assert 0.8 * expected < shares.var() / uniform < 1.2 * expected


def test_blocks_that_hold_the_whole_set_shuffle_as_a_uniform_draw():
    shares = np.concatenate(
        [
            label_shares(seed, num_groups=40, lanes=1, window=40, batch=32, rows_per_group=50)
            for seed in range(20)
        ]
    )
    hypergeometric = 0.25 / 32 * (2000 - 32) / (2000 - 1)
    assert 0.85 < shares.var() / hypergeometric < 1.15


def test_every_order_of_groups_and_of_items_in_a_block_is_equally_likely():
    draws = 3000
    of_groups, of_items = np.zeros(9), np.zeros(9)
    for epoch in range(draws):
        groups = order_of([1, 1, 1], epoch=epoch, lanes=1, window=1).rows_at([0, 1])[0]
        items = order_of([3], epoch=epoch, lanes=1, window=1).rows_at([0, 1])[1]
        of_groups[groups @ [3, 1]] += 1
        of_items[items @ [3, 1]] += 1
    for counts in (of_groups[of_groups > 0], of_items[of_items > 0]):
        assert len(counts) == 6
        chi_square = ((counts - draws / 6) ** 2 / (draws / 6)).sum()
        assert chi_square < 20.5, counts  # 5 degrees of freedom, p = 0.001


# ------------------------------------------------------------------------------------- evaluation


@UNTIMED
@given(groups=GROUPS, world_size=WORLDS)
def test_sequential_shares_cover_every_row_once_and_are_balanced(groups, world_size):
    seen = []
    for rank in range(world_size):
        first, stop = sequential_share(groups, rank=rank, world_size=world_size)
        assert abs((stop - first) - sum(groups) / world_size) <= sum(groups) / world_size / 8 + 1
        item = 0
        for block in rows_in_groups(groups, first=first, stop=stop):
            assert block.first_item == item
            item += block.num_items
            [group], [low], [high] = block.groups, block.starts, block.stops
            seen.extend((int(group) << 32) | row for row in range(low, high))
        assert item == stop - first
    assert seen == every_row(groups)


def test_an_evaluation_cuts_between_row_groups_where_it_can():
    assert sequential_share([100, 104, 100, 96], rank=0, world_size=2) == (0, 204)
    assert sequential_share([100, 104, 100, 96], rank=1, world_size=2) == (204, 400)
    assert sequential_share([400], rank=1, world_size=4) == (100, 200)


# ----------------------------------------------------------------------------------------- memory


@UNTIMED
@given(
    window=st.integers(1, 64),
    lanes=LANES,
    group=st.integers(1, 2**30),
    memory=st.integers(1, 2**34),
)
def test_the_window_fits_one_worker_or_is_one(window, lanes, group, memory):
    fitted = fit_window(window=window, lanes=lanes, max_row_group_bytes=group, stream_memory=memory)

    def need(window):
        return stream_bytes(lanes=lanes, window=window, world_size=1, max_row_group_bytes=group)

    assert 1 <= fitted <= window
    assert fitted == 1 or need(fitted) <= memory
    assert fitted == window or need(fitted + 1) > memory


def test_too_little_memory_says_what_to_type():
    uri, mib = "s3://lake/reviews/train", 2**20
    given_numbers = {"lanes": 4, "window": 1, "max_row_group_bytes": 300 * mib}
    refuse_small_memory(uri=uri, world_size=4, stream_memory=900 * mib, **given_numbers)
    with pytest.raises(SpecError) as refused:
        refuse_small_memory(uri=uri, world_size=2, stream_memory=600 * mib, **given_numbers)
    [problem] = refused.value.problems
    assert problem.message == (
        "data.stream_memory is 600 MiB, but the windows of s3://lake/reviews/train in 2 lanes of "
        "a worker need 1.46 GiB (5 row groups of 300 MiB)"
    )
    assert problem.hint is not None
    assert "set data.lanes to 2" in problem.hint
    assert "data.stream_memory to 1500 MiB" in problem.hint
