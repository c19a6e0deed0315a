"""A rank's batches: the pure order, whatever the number of ranks, the restarts and the faults."""

from __future__ import annotations

import itertools
import logging
import os
import subprocess
import sys
import threading
import weakref
from collections import Counter

import numpy as np
import pytest

from cluster.storage import StorageError, open_store
from jobs.errors import DataError, Problem, SpecError
from trainers.data.cache import NodeCache
from trainers.data.items import Items, Ragged
from trainers.data.partition import EpochOrder, lanes_of_rank
from trainers.data.stream import RankStream

SEED = 5
SHARDS = [[17, 1, 40], [12, 50, 3, 9, 9], [20, 1], [33, 8]]
"""203 rows in 12 row groups."""
ONE_GROUP_SHARDS = [[10]] * 20


def encode(rows, first_row):
    ids = rows["row"].to_numpy()
    assert ids.tolist() == list(range(first_row, first_row + len(ids)))
    return Items({"tokens": Ragged.from_arrow(rows["tokens"]), "id": ids})


@pytest.fixture(autouse=True)
def _no_thread_is_left():
    before = threading.active_count()
    yield
    assert threading.active_count() == before


@pytest.fixture
def local(tmp_path, watched):
    return watched(open_store(tmp_path / "set"))


def stream_of(
    store, index, cache, *, rank=0, world_size=1, lanes=12, window=2, encode=encode, fetch_threads=4
):
    return RankStream(
        store=store,
        index=index,
        columns=["row", "tokens"],
        encode=encode,
        rank=rank,
        world_size=world_size,
        seed=SEED,
        lanes=lanes,
        window=window,
        cache=cache,
        fetch_threads=fetch_threads,
    )


def pure_order(index, *, epoch=0, lanes=12, window=2):
    """Row ids of the epoch, from the pure module alone."""
    order = EpochOrder(index.group_rows, seed=SEED, epoch=epoch, lanes=lanes, window=window)
    groups, rows = order.rows_at(np.arange(order.num_items))
    first_rows = np.array([index.first_row(group) for group in range(index.num_groups)])
    return first_rows[groups] + rows


def check_items(batch):
    """The items are those of the batch's rows."""
    assert batch.items.columns["id"].tolist() == batch.rows.tolist()
    tokens = batch.items.columns["tokens"]
    assert np.diff(tokens.offsets).tolist() == (batch.rows % 7).tolist()
    assert tokens.values.tolist() == np.repeat(batch.rows, batch.rows % 7).tolist()


def global_batches(store, index, cache, *, world_size, size, next_item=0, epoch=0, **shape):
    """[(first, next, row ids in the order of positions)] from the batches of all ranks."""
    positions_of_ranks = []
    spans = None
    for rank in range(world_size):
        with stream_of(store, index, cache, rank=rank, world_size=world_size, **shape) as stream:
            batches = list(stream.batches(epoch=epoch, next_item=next_item, global_batch_size=size))
        for batch in batches:
            check_items(batch)
            assert batch.epoch == epoch
        seen = [(batch.first_item, batch.next_item) for batch in batches]
        assert spans in (None, seen), "each rank has the same steps"
        spans = seen
        positions_of_ranks.append([batch.rows for batch in batches])
    joined = []
    for step, (first, stop) in enumerate(spans):
        rows = np.full(stop - first, -1)
        for rank in range(world_size):
            mine = np.arange(first, stop) % world_size == rank
            rows[mine] = positions_of_ranks[rank][step]
        joined.append((first, stop, rows.tolist()))
    return joined


def expected_batches(rows, *, size, next_item=0):
    starts = range(next_item, len(rows), size)
    stops = [min(start + size, len(rows)) for start in starts]
    return [(a, b, rows[a:b].tolist()) for a, b in zip(starts, stops, strict=True)]


# ---------------------------------------------------------------------------------------- the order


def test_all_worker_counts_give_the_same_global_batches(store, write_set, cache):
    index = write_set(store, SHARDS)
    for epoch in range(2):
        expected = expected_batches(pure_order(index, epoch=epoch), size=16)
        for world_size in (1, 2, 3, 4):
            assert expected == global_batches(
                store, index, cache, world_size=world_size, size=16, epoch=epoch
            )


@pytest.mark.parametrize(
    ("world_size", "lanes", "window", "size"),
    [(5, 12, 2, 16), (8, 12, 1, 7), (3, 4, 5, 300), (2, 3, 1, 1), (7, 1, 20, 10), (2, 250, 1, 32)],
)
def test_any_shape_gives_the_pure_order(local, write_set, cache, world_size, lanes, window, size):
    index = write_set(local, SHARDS)
    shape = {"lanes": lanes, "window": window}
    assert expected_batches(pure_order(index, **shape), size=size) == global_batches(
        local, index, cache, world_size=world_size, size=size, **shape
    )


def test_a_restart_anywhere_on_any_worker_count_gives_the_tail(local, write_set, cache):
    index = write_set(local, SHARDS)
    rows = pure_order(index)
    draw = np.random.default_rng(0)
    for _ in range(25):
        next_item = int(draw.integers(0, len(rows) + 1))
        world_size, size = int(draw.integers(1, 7)), int(draw.integers(1, 40))
        assert expected_batches(rows, size=size, next_item=next_item) == global_batches(
            local, index, cache, world_size=world_size, size=size, next_item=next_item
        )


def test_fewer_rows_than_ranks_and_no_rows_at_all(local, tmp_path, write_set, cache):
    index = write_set(local, [[1], [1]])
    batches = [
        list(
            stream_of(local, index, cache, rank=rank, world_size=4, lanes=4).batches(
                epoch=0, next_item=0, global_batch_size=8
            )
        )
        for rank in range(4)
    ]
    assert [len(of_rank) for of_rank in batches] == [1, 1, 1, 1]
    assert sorted(len(batch.items) for [batch] in batches) == [0, 0, 1, 1]
    for [batch] in batches:
        check_items(batch)  # an empty batch has its columns
    nothing = open_store(tmp_path / "nothing")
    empty = stream_of(nothing, write_set(nothing, [[]]), cache)
    assert list(empty.batches(epoch=0, next_item=0, global_batch_size=8)) == []
    assert list(empty.sequential(batch_rows=8)) == []


def test_a_batch_of_fewer_rows_than_ranks_is_empty_on_some(local, write_set, cache):
    index = write_set(local, SHARDS)
    assert expected_batches(pure_order(index), size=2) == global_batches(
        local, index, cache, world_size=4, size=2
    )


# ------------------------------------------------------------------------------------- what is read


def groups_of_lanes(index, lanes, *, shape):
    order = EpochOrder(index.group_rows, seed=SEED, epoch=0, **shape)
    return {
        int(group)
        for lane in lanes
        for number in range(order.num_blocks(lane))
        for group in order.block(lane, number).groups
    }


def groups_read(store):
    """Row groups of a set with one in each shard."""
    return {int(key[6:11]) for key, _, _ in store.shard_reads()}


def test_a_rank_reads_only_its_own_lanes(local, write_set, cache):
    index = write_set(local, ONE_GROUP_SHARDS)
    local.reads.clear()
    shape = {"lanes": 4, "window": 2}
    stream = stream_of(local, index, cache, rank=1, world_size=2, **shape)
    list(stream.batches(epoch=0, next_item=0, global_batch_size=16))
    assert groups_read(local) == groups_of_lanes(index, [1, 3], shape=shape)


def test_a_restart_reads_only_from_the_block_that_holds_the_position(local, write_set, cache):
    index = write_set(local, ONE_GROUP_SHARDS)
    order = EpochOrder(index.group_rows, seed=SEED, epoch=0, lanes=2, window=2)
    next_item = 131
    local.reads.clear()
    stream = stream_of(local, index, cache, lanes=2, window=2)
    batches = stream.batches(epoch=0, next_item=next_item, global_batch_size=4)
    next(batches)
    stream.close()
    held = set()
    for lane in range(2):
        number = order.block_of(lane, next_item // 2)
        last = order.num_blocks(lane) - 1
        for block in {number, min(number + 1, last)}:
            held.update(order.block(lane, block).groups.tolist())
    assert groups_read(local) <= held


def test_the_first_batch_needs_only_the_first_blocks_of_its_lanes(local, write_set, cache):
    index = write_set(local, ONE_GROUP_SHARDS)
    order = EpochOrder(index.group_rows, seed=SEED, epoch=0, lanes=2, window=3)
    first = {int(g) for lane in range(2) for g in order.block(lane, 0).groups}
    local.fail_when = lambda key, number: key.startswith("shard") and int(key[6:11]) not in first
    stream = stream_of(local, index, cache, lanes=2, window=3)
    batches = stream.batches(epoch=0, next_item=0, global_batch_size=4)
    assert next(batches).rows.tolist() == pure_order(index, lanes=2, window=3)[:4].tolist()
    stream.close()


def test_no_more_than_two_blocks_of_each_lane_are_alive(local, write_set, cache):
    index = write_set(local, ONE_GROUP_SHARDS * 3)
    alive, most = weakref.WeakSet(), []

    class Counted(np.ndarray):
        """An array that can be counted while it is alive."""

    def counted(rows, first_row):
        items = encode(rows, first_row)
        ids = items.columns["id"].copy().view(Counted)
        alive.add(Owner.of(ids))
        most.append(len(alive))
        return Items({**items.columns, "id": ids})

    class Owner:
        """Lives as long as its array: an array itself cannot be in a set."""

        @staticmethod
        def of(array):
            owner = Owner()
            array.owner = owner
            return owner

    for world_size, window in ((2, 2), (1, 3), (3, 1)):
        most.clear()
        stream = stream_of(
            local, index, cache, world_size=world_size, lanes=4, window=window, encode=counted
        )
        for _ in stream.batches(epoch=0, next_item=0, global_batch_size=8):
            most.append(len(alive))
        # A row group that a cut divides is held by both lanes.
        assert 0 < max(most) <= 2 * window * lanes_of_rank(4, world_size)
        assert not alive
        most.clear()
        for _ in stream.sequential(batch_rows=7):
            most.append(len(alive))
        assert 0 < max(most) <= 2 * window * lanes_of_rank(4, world_size)


def test_ranks_of_a_node_fetch_each_row_group_once(local, write_set, tmp_path):
    """Three workers do not divide four lanes, so each lane is read by all of them, at a time."""
    index = write_set(local, SHARDS)
    local.reads.clear()
    rows = [[], [], []]

    def read(rank):
        own = NodeCache(tmp_path / "cache", limit_bytes=2**30)
        stream = stream_of(local, index, own, rank=rank, world_size=3, lanes=4)
        for batch in stream.batches(epoch=0, next_item=0, global_batch_size=12):
            rows[rank].extend(batch.rows.tolist())

    ranks = [threading.Thread(target=read, args=(rank,)) for rank in range(3)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert sorted(row for of_rank in rows for row in of_rank) == list(range(203))
    assert set(Counter(local.reads).values()) == {1}
    assert len(local.shard_reads()) == index.num_groups + index.num_shards


def test_only_rows_of_the_rank_are_kept(local, write_set, cache):
    index = write_set(local, SHARDS)
    with stream_of(local, index, cache, rank=1, world_size=4, lanes=1, window=99) as stream:
        [batch] = stream.batches(epoch=0, next_item=0, global_batch_size=1000)
    assert len(batch.rows) == 51
    base = batch.items.columns["id"]
    while base.base is not None:
        base = base.base
    assert len(base) == 51


def test_bytes_and_waits_are_counted(local, write_set, cache):
    index = write_set(local, SHARDS)
    local.reads.clear()
    stream = stream_of(local, index, cache)
    list(stream.batches(epoch=0, next_item=0, global_batch_size=16))
    assert stream.bytes_fetched == sum(end - start for _, start, end in local.reads) > 0
    assert stream.wait_seconds > 0
    fetched = stream.bytes_fetched
    list(stream.batches(epoch=1, next_item=0, global_batch_size=16))
    assert stream.bytes_fetched == fetched, "the second epoch comes from the cache"


# ------------------------------------------------------------------------------------------- faults


def served_before(stream, expected_error):
    """Row ids that were served before the error, and the error."""
    served = []

    def read():
        for batch in stream.batches(epoch=0, next_item=0, global_batch_size=4):
            served.extend(batch.rows.tolist())

    with pytest.raises(expected_error) as raised:
        read()
    return served, raised.value


def rows_before_block(index, *, group, lanes, window):
    """Positions before the first global batch of 4 that needs a block with the row group."""
    order = EpochOrder(index.group_rows, seed=SEED, epoch=0, lanes=lanes, window=window)
    positions = [
        order.block(lane, number).first_item * lanes + lane
        for lane in range(lanes)
        for number in range(order.num_blocks(lane))
        if group in order.block(lane, number).groups
    ]
    return min(positions) // 4 * 4


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 4] ^= 1
    path.write_bytes(data)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-20])


def replace(path):
    path.write_bytes(b"PAR1" * 400)


def remove(path):
    path.unlink()


FAULTS = {
    flip: "its checksum is another",
    truncate: "bytes, the index",
    replace: "changed after it was indexed",
    remove: "it is missing",
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_damaged_shard_ends_the_stream_where_it_is_needed(
    tmp_path, local, write_set, cache, fault
):
    index = write_set(local, ONE_GROUP_SHARDS)
    shape = {"lanes": 2, "window": 2}
    rows = pure_order(index, **shape)
    group = int(rows[130] // 10)
    fault(tmp_path / "set" / f"shard-{group:05d}.parquet")
    served, error = served_before(stream_of(local, index, cache, **shape), DataError)
    assert FAULTS[fault] in str(error)
    assert f"shard-{group:05d}.parquet" in str(error)
    assert "shoal prepare" in error.problems[0].hint
    assert len(served) == rows_before_block(index, group=group, **shape) > 0
    assert served == rows[: len(served)].tolist()


def test_a_store_that_dies_in_the_middle_is_a_storage_error(local, write_set, cache):
    index = write_set(local, ONE_GROUP_SHARDS)
    local.reads.clear()
    local.fail_when = lambda key, number: number > 20
    served, error = served_before(stream_of(local, index, cache, lanes=2), StorageError)
    assert "does not answer" in str(error)
    assert served == pure_order(index, lanes=2)[: len(served)].tolist()
    assert served
    local.fail_when = lambda key, number: False
    rest = stream_of(local, index, cache, lanes=2).batches(
        epoch=0, next_item=len(served), global_batch_size=4
    )
    tail = [row for batch in rest for row in batch.rows.tolist()]
    assert served + tail == pure_order(index, lanes=2).tolist()


def test_a_wrong_row_is_named_by_its_task_and_served_up_to(local, write_set, cache):
    index = write_set(local, ONE_GROUP_SHARDS)

    def refuse(rows, first_row):
        if first_row == 70:
            raise DataError(Problem(f"row {first_row + 3}: the text is null"))
        return encode(rows, first_row)

    stream = stream_of(local, index, cache, lanes=1, window=1, encode=refuse)
    served, error = served_before(stream, DataError)
    assert str(error) == "row 73: the text is null"
    assert len(served) == rows_before_block(index, group=7, lanes=1, window=1)


def test_an_encoder_that_loses_rows_is_noticed(local, write_set, cache):
    index = write_set(local, SHARDS)
    stream = stream_of(
        local, index, cache, encode=lambda rows, first: encode(rows, first).slice(0, 0)
    )
    with pytest.raises(ValueError, match="0 items for"):
        next(stream.batches(epoch=0, next_item=0, global_batch_size=4))


# -------------------------------------------------------------------------------------------- close


@pytest.mark.parametrize("is_shuffled", [True, False])
def test_an_abandoned_iterator_waits_for_nothing_and_close_joins_its_threads(
    local, write_set, cache, is_shuffled
):
    index = write_set(local, ONE_GROUP_SHARDS)
    encoding, go_on = threading.Event(), threading.Event()
    encoded = itertools.count()

    def slow(rows, first_row):
        if next(encoded):  # what is served first is encoded first
            encoding.set()
            assert go_on.wait(30)
        return encode(rows, first_row)

    stream = stream_of(local, index, cache, lanes=1, window=1, encode=slow, fetch_threads=1)
    if is_shuffled:
        batches = stream.batches(epoch=0, next_item=0, global_batch_size=4)
    else:
        batches = stream.sequential(batch_rows=4)
    next(batches)
    assert encoding.wait(30)
    del batches
    assert [t for t in threading.enumerate() if t.name.startswith("shoal-stream")]
    go_on.set()
    stream.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("shoal-stream")]


def test_close_ends_iterators_that_are_still_held(local, write_set, cache):
    index = write_set(local, SHARDS)
    stream = stream_of(local, index, cache, lanes=1, window=1)
    batches = stream.batches(epoch=0, next_item=0, global_batch_size=4)
    next(batches)
    stream.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("shoal-stream")]
    with pytest.raises(RuntimeError, match="closed"):
        list(batches)
    with pytest.raises(RuntimeError, match="closed"):
        next(stream.sequential(batch_rows=4))
    stream.close()


def test_close_wakes_a_thread_that_waits_for_rows(local, write_set, cache):
    index = write_set(local, ONE_GROUP_SHARDS)
    encoding, go_on, raised = threading.Event(), threading.Event(), []

    def slow(rows, first_row):
        encoding.set()
        assert go_on.wait(30)
        return encode(rows, first_row)

    stream = stream_of(local, index, cache, lanes=1, window=20, encode=slow)

    def read():
        try:
            next(stream.batches(epoch=0, next_item=0, global_batch_size=4))
        except RuntimeError as error:
            raised.append(error)

    reading = threading.Thread(target=read)
    reading.start()
    assert encoding.wait(30)
    closing = threading.Thread(target=stream.close)
    closing.start()
    go_on.set()
    closing.join()
    reading.join()
    assert "closed" in str(raised[0])


READ = """
import sys
from pathlib import Path

from cluster.storage import open_store
from trainers.data.cache import NodeCache
from trainers.data.index import open_index
from trainers.data.items import Items, Ragged, numbers_of
from trainers.data.stream import RankStream

store, cache = open_store(sys.argv[1]), NodeCache(Path(sys.argv[2]), limit_bytes=10**9)


def encode(rows, first_row):
    return Items({"row": numbers_of(rows["row"]), "tokens": Ragged.from_arrow(rows["tokens"])})


with RankStream(
    store=store, index=open_index(store), columns=["row", "tokens"], encode=encode, cache=cache,
    rank=0, world_size=1, seed=1, lanes=1, window=4,
) as stream:
    rows = sum(len(b.rows) for b in stream.batches(epoch=0, next_item=0, global_batch_size=8))
print(rows, [name for name in ("pandas", "pyarrow.dataset") if name in sys.modules])
"""


def test_rows_are_read_without_loading_what_is_not_needed(local, write_set, tmp_path):
    """pyarrow loads pandas, a third of a second, in `to_numpy`, `array` and `read_table`."""
    write_set(local, SHARDS)
    done = subprocess.run(
        [sys.executable, "-c", READ, local.uri, str(tmp_path / "cache")],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == "203 []\n"


# --------------------------------------------------------------------------------------- evaluation


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_evaluation_reads_every_row_once_in_order(local, write_set, cache, world_size):
    index = write_set(local, SHARDS)
    rows = []
    for rank in range(world_size):
        stream = stream_of(local, index, cache, rank=rank, world_size=world_size)
        batches = list(stream.sequential(batch_rows=13))
        assert all(len(batch.rows) == 13 for batch in batches[:-1])
        for batch in batches:
            check_items(batch)
            assert batch.rows.tolist() == list(range(batch.first_item, batch.next_item))
            rows.extend(batch.rows.tolist())
    assert rows == list(range(203))


def test_an_evaluating_rank_reads_no_row_group_of_another(local, write_set, cache):
    index = write_set(local, ONE_GROUP_SHARDS)
    local.reads.clear()
    list(stream_of(local, index, cache, rank=1, world_size=4).sequential(batch_rows=8))
    assert groups_read(local) == {5, 6, 7, 8, 9}


# ----------------------------------------------------------------------------------------- refusals


def test_workers_that_do_not_divide_the_lanes_are_warned_of_once(local, write_set, cache, caplog):
    index = write_set(local, SHARDS)
    caplog.set_level(logging.WARNING)
    for rank in range(3):
        stream_of(local, index, cache, rank=rank, world_size=3, lanes=4)
        stream_of(local, index, cache, rank=rank, world_size=3, lanes=3)
    [record] = caplog.records
    assert "3 workers do not divide the 4 lanes" in record.getMessage()


def test_a_cache_too_small_to_share_is_refused_at_the_start(local, write_set, tmp_path):
    index = write_set(local, SHARDS)
    small = NodeCache(tmp_path / "cache", limit_bytes=100)
    stream_of(local, index, small, world_size=2, lanes=4)
    with pytest.raises(SpecError, match=r"data.cache_gib is .* \(100 B\)") as refused:
        stream_of(local, index, small, world_size=3, lanes=4)
    assert "set data.cache_gib to" in refused.value.problems[0].hint


def test_a_missing_column_is_refused_at_the_start(local, write_set, cache):
    index = write_set(local, SHARDS)
    with pytest.raises(DataError, match="no column texts"):
        RankStream(
            store=local,
            index=index,
            columns=["texts"],
            encode=encode,
            rank=0,
            world_size=1,
            seed=0,
            lanes=1,
            window=1,
            cache=cache,
        )
