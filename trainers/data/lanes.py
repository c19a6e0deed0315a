"""Lanes of a rank as they are read: blocks load in threads, and their items are dealt in turn."""

from __future__ import annotations

import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import ParamSpec, TypeVar

import numpy as np
import pyarrow as pa

from trainers.data.index import Index
from trainers.data.items import Items
from trainers.data.partition import Block, EpochOrder, IntArray
from trainers.data.reader import VerifiedReader

Encode = Callable[[pa.Table, int], Items]
"""(rows, id of the first row) -> one item a row; raises DataError that names a wrong row."""

Unless = Callable[[float], bool]
"""Whether rows that have been waited for so many seconds are not needed any more."""

_LOOK_SECONDS = 0.25

Args = ParamSpec("Args")
Value = TypeVar("Value")


class NotNeeded(Exception):  # noqa: N818 - nothing is wrong
    """Rows that were waited for are not needed any more."""


@dataclass(frozen=True, eq=False)
class Plan:
    """What a rank is to take from a block, in the order in which it is served."""

    block: Block
    num_items: int
    offsets: Callable[[], IntArray]
    """Rows of the joined pieces, in order; shape [num_items]. Called once, in a thread."""
    rows_of: Callable[[int], IntArray] | None = None
    """With weighted sampling the pieces are made of items: the row of each item of a row group,
    ascending. None: each row is one item."""


@dataclass(frozen=True)
class Source:
    """Where rows come from and what is made of them."""

    reader: VerifiedReader
    index: Index
    encode: Encode


@dataclass
class Waits:
    """Time in which rows were asked for that were not there yet."""

    seconds: float = 0.0


def shuffled_plans(
    order: EpochOrder,
    *,
    lane: int,
    item: int,
    step: int,
    rows_of: Callable[[int], IntArray] | None = None,
) -> Iterator[Plan]:
    """Plans for each `step`-th item of a lane, from `item` on; one at a time, at little cost.

    `rows_of` as in Plan.
    """
    while item < order.lane_items(lane):
        block = order.block(lane, order.block_of(lane, item))
        start = item - block.first_item
        num_items = -(-(block.num_items - start) // step)
        yield Plan(block, num_items, partial(_shuffled_from, order, block, start, step), rows_of)
        item += num_items * step


def sequential_plans(blocks: Iterator[Block]) -> Iterator[Plan]:
    """Plans for all rows of the blocks, unshuffled."""
    for block in blocks:
        yield Plan(block, block.num_items, partial(np.arange, block.num_items))


def _shuffled_from(order: EpochOrder, block: Block, start: int, step: int) -> IntArray:
    return order.shuffled(block)[start::step]


class Dealer:
    """Items of a rank in the order of its positions: one of each lane in turn.

    A lane holds the block that is served and `num_ahead` later ones. Close it in any case.
    """

    def __init__(
        self,
        plans: Sequence[Iterator[Plan]],
        source: Source,
        *,
        num_ahead: int,
        num_threads: int,
        waits: Waits,
        unless: Unless | None = None,
    ) -> None:
        """`plans` of each lane, in the order in which the rank's positions meet the lanes."""
        self._loader = _Loader(num_threads, waits, unless)
        self._lanes = [_Lane(lane, source, self._loader) for lane in plans]
        self._turn = 0
        # What is served first is asked for first, of all lanes.
        for num_blocks in range(1, num_ahead + 2):
            for lane in self._lanes:
                lane.hold(num_blocks)

    @property
    def num_ready(self) -> int:
        """Items that can be dealt before a lane must go on to its next block."""
        num_lanes = len(self._lanes)
        return min(
            (
                (number - self._turn) % num_lanes + lane.num_left * num_lanes
                for number, lane in enumerate(self._lanes)
                if lane.has_next
            ),
            default=sys.maxsize,
        )

    def deal(self, count: int) -> tuple[IntArray, Items | None]:
        """Row ids and items of the next `count` positions of the rank; None for no items.

        There are as many. Raises what went wrong in the blocks that they need, or NotNeeded; there
        is nothing more to deal then.
        """
        places: list[IntArray] = []
        rows: list[IntArray] = []
        parts: list[Items] = []
        num_lanes = len(self._lanes)
        for first in range(min(count, num_lanes)):
            lane = self._lanes[(self._turn + first) % num_lanes]
            places.append(np.arange(first, count, num_lanes))
            for ids, items in lane.take(len(places[-1])):
                rows.append(ids)
                parts.append(items)
        self._turn = (self._turn + count) % num_lanes
        if not parts:
            return np.empty(0, dtype=np.int64), None
        joined = np.concatenate(rows), Items.concat(parts)
        if num_lanes == 1:
            return joined
        position = np.empty(count, dtype=np.int64)
        position[np.concatenate(places)] = np.arange(count)
        return joined[0][position], joined[1].take(position)

    def cancel(self) -> None:
        """Cancels what has not begun, and waits for nothing."""
        self._loader.close(joins=False)

    def close(self) -> None:
        """Cancels what has not begun and joins the threads. May be called from any thread."""
        self._loader.close(joins=True)


class _Lane:
    """The items of one lane in their order."""

    def __init__(self, plans: Iterator[Plan], source: Source, loader: _Loader) -> None:
        self._plans = plans
        self._source = source
        self._loader = loader
        self._num_blocks = 0
        self._blocks: deque[_LoadingBlock] = deque()
        self._served = 0

    def hold(self, num_blocks: int) -> None:
        """Begin to load until there are `num_blocks`, now and after each one that is served."""
        self._num_blocks = num_blocks
        for plan in islice(self._plans, num_blocks - len(self._blocks)):
            self._blocks.append(_LoadingBlock(plan, self._source, self._loader))

    @property
    def has_next(self) -> bool:
        """Whether the current block is not the last one."""
        return len(self._blocks) > 1

    @property
    def num_left(self) -> int:
        """Items of the current block that have not been taken."""
        return self._blocks[0].num_items - self._served if self._blocks else 0

    def take(self, count: int) -> Iterator[tuple[IntArray, Items]]:
        """Row ids and items of the next `count` items, in one part of each block; they share its
        memory.

        A block is let go of with its last item, and the one after the next begins to load.
        """
        first = 0
        while first < count:
            stop = min(count, first + self.num_left)
            block, start = self._blocks[0], self._served
            yield block.take(start, start + stop - first)
            self._served += stop - first
            first = stop
            if not self.num_left:
                del block
                self._blocks.popleft()
                self._served = 0
                self.hold(self._num_blocks)


@dataclass(frozen=True, eq=False)
class _Arrangement:
    """Which rows of a block are kept, and where they are found."""

    offsets: IntArray
    """In the joined pieces, as they are served; shape [num_items]."""
    piece_starts: IntArray
    """Where each piece begins in the joined ones; shape [pieces]."""
    piece_rows: IntArray
    """Id of the first row of each piece, or of its row group, by which `copied` counts; shape
    [pieces]."""
    copied: list[IntArray] | None
    """With weighted sampling: the row of each item of each piece, counted in its row group."""
    kept: IntArray | None
    """`offsets` in ascending order, as they are held; None where all rows are kept."""

    @classmethod
    def of(cls, plan: Plan, index: Index) -> _Arrangement:
        block = plan.block
        offsets = plan.offsets()
        first_rows = np.array([index.first_row(int(g)) for g in block.groups], dtype=np.int64)
        copied = None
        if plan.rows_of is not None:
            parts = zip(block.groups, block.starts, block.stops, strict=True)
            copied = [plan.rows_of(int(group))[start:stop] for group, start, stop in parts]
        return cls(
            offsets=offsets,
            piece_starts=np.cumsum(block.piece_rows) - block.piece_rows,
            piece_rows=first_rows if copied is not None else first_rows + block.starts,
            copied=copied,
            kept=None if len(offsets) == block.num_items else np.sort(offsets),
        )

    def kept_of(self, piece: int, num_rows: int) -> IntArray | None:
        """Rows of a piece that are kept, ascending, counted in the piece; None for all."""
        if self.kept is None:
            return None
        start = self.piece_starts[piece]
        low, high = np.searchsorted(self.kept, [start, start + num_rows])
        rows: IntArray = self.kept[low:high] - start
        return rows

    @property
    def order(self) -> IntArray:
        """Where each item is among all that are kept, as they are served; shape [num_items]."""
        return self.offsets if self.kept is None else np.searchsorted(self.kept, self.offsets)

    @property
    def rows(self) -> IntArray:
        """Id of each item's row, as they are served; shape [num_items]."""
        piece = np.searchsorted(self.piece_starts, self.offsets, side="right") - 1
        if self.copied is not None:
            return np.concatenate(self.copied)[self.offsets] + self.piece_rows[piece]
        rows: IntArray = self.offsets + (self.piece_rows - self.piece_starts)[piece]
        return rows


class _LoadingBlock:
    """A block whose pieces are read, verified, decoded, encoded and shuffled in threads."""

    def __init__(self, plan: Plan, source: Source, loader: _Loader) -> None:
        self.num_items = plan.num_items
        self._plan = plan
        self._source = source
        self._loader = loader
        # What waits for another is in the queue behind it, so it never waits in vain.
        self._arrangement = loader.submit(_Arrangement.of, plan, source.index)
        self._parts = [loader.submit(self._load, k) for k in range(len(plan.block.groups))]
        self._whole = loader.submit(self._join)

    def take(self, start: int, stop: int) -> tuple[IntArray, Items]:
        """Row ids and items [start, stop) as they are served, which share the block's memory.

        Waits for the whole block: its items are shuffled over all pieces.
        """
        rows, items = self._loader.wait(self._whole)
        return rows[start:stop], items.slice(start, stop)

    def _join(self) -> tuple[IntArray, Items]:
        """All that is kept of the pieces, as it is served; one block at a time, as it needs the
        memory of another one."""
        arrangement = self._arrangement.result()
        parts = [items for part in self._parts if (items := part.result()) is not None]
        self._parts.clear()
        del self._arrangement
        self._loader.go_on()
        with self._loader.joining:
            joined = Items.concat(parts)
            parts.clear()
            return arrangement.rows, joined.take(arrangement.order)

    def _load(self, number: int) -> Items | None:
        """The kept items of a piece, in the order of rows; None where none is kept."""
        block = self._plan.block
        arrangement = self._arrangement.result()
        num_rows = int(block.piece_rows[number])
        kept = arrangement.kept_of(number, num_rows)
        if kept is not None and not len(kept):
            return None
        table = self._source.reader.read(int(block.groups[number]))
        self._loader.go_on()
        first_row = int(arrangement.piece_rows[number])
        if arrangement.copied is not None:
            copied = arrangement.copied[number]
            return self._encoded_copies(table, first_row, copied if kept is None else copied[kept])
        items = self._encoded(table.slice(int(block.starts[number]), num_rows), first_row)
        return items if kept is None or len(kept) == num_rows else items.take(kept)

    def _encoded_copies(self, table: pa.Table, first_row: int, rows: IntArray) -> Items:
        """The items of some rows of a row group, ascending, each as often as it is given."""
        low, high = int(rows[0]), int(rows[-1])
        items = self._encoded(table.slice(low, high + 1 - low), first_row + low)
        return items.take(rows - low)

    def _encoded(self, table: pa.Table, first_row: int) -> Items:
        items = self._source.encode(table, first_row)
        if len(items) != table.num_rows:
            raise ValueError(f"encode gave {len(items)} items for {table.num_rows} rows")
        return items


class _Loader:
    """A few threads that work in the order in which they were asked."""

    def __init__(self, num_threads: int, waits: Waits, unless: Unless | None) -> None:
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="shoal-stream")
        self._waits = waits
        self._unless = unless
        self._is_closed = False
        self.joining = threading.Lock()

    def submit(
        self, function: Callable[Args, Value], *args: Args.args, **kwargs: Args.kwargs
    ) -> Future[Value]:
        return self._pool.submit(function, *args, **kwargs)

    def wait(self, future: Future[Value]) -> Value:
        """The result; RuntimeError where `close` came first, NotNeeded where nobody needs it."""
        began = time.perf_counter()
        try:
            # `done` is asked as well: nobody wakes who waits for a future that is cancelled.
            while not (wait_for([future], timeout=_LOOK_SECONDS).done or future.done()):
                if self._unless is not None and self._unless(time.perf_counter() - began):
                    raise NotNeeded
            return future.result()
        except CancelledError:
            raise RuntimeError("the stream was closed while it was read") from None
        finally:
            self._waits.seconds += time.perf_counter() - began

    def go_on(self) -> None:
        """In a thread, between two long parts of its work: end it where `close` was called."""
        if self._is_closed:
            raise CancelledError

    def close(self, *, joins: bool) -> None:
        self._is_closed = True
        self._pool.shutdown(wait=joins, cancel_futures=True)
