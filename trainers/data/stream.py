"""RankStream: one rank's share of every global batch, read in the background.

    batches -> Dealer.deal -> lane -> block -> [thread] VerifiedReader.read -> encode

The order is `partition.EpochOrder`'s. Each lane of the rank holds two blocks: the one that is
served and the next one, whose row groups are read, verified, decoded, encoded and shuffled by a few
threads meanwhile. Rows are copied out for several batches at a time; no Python object per row.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np

from cluster.storage import Store
from trainers.data.cache import NodeCache
from trainers.data.index import Index
from trainers.data.items import Items
from trainers.data.lanes import (
    Dealer,
    Encode,
    NotNeeded,
    Plan,
    Source,
    Unless,
    Waits,
    sequential_plans,
    shuffled_plans,
)
from trainers.data.partition import (
    EpochOrder,
    IntArray,
    item_step,
    lanes_of_rank,
    positions_before,
    rank_lanes,
    refuse_small_cache,
    rows_in_groups,
    sequential_share,
)
from trainers.data.reader import VerifiedReader
from trainers.data.weighting import Copies
from trainers.patience import Patience

_FETCH_THREADS = 4
_RUN_BYTES = 8 * 2**20
_MOST_RUN_ROWS = 16_384
"""Rows that are gathered at once and then cut into batches, at most, and what they may take in
memory, about."""

_log = logging.getLogger(__name__)


def run_rows(index: Index) -> int:
    """Rows that are gathered at once, from what the largest row group takes. Pure."""
    of_row = index.max_row_group_bytes / max(1, int(index.group_rows.max(initial=1)))
    return int(min(_MOST_RUN_ROWS, max(1, _RUN_BYTES // max(1.0, of_row))))


@dataclass(frozen=True, eq=False)
class RankBatch:
    """A rank's share of the global batch of positions [first_item, next_item), in their order."""

    epoch: int
    first_item: int
    next_item: int
    rows: IntArray
    """Id of each item's row: its number in the index; shape [n]."""
    items: Items
    """n items, all columns also where n is 0."""


class RankStream:
    """The batches of one rank, from one data set. One thread iterates; `close` may be called by
    any, and at any time. Iterations that are left before their end wait for nothing: `close` does.
    """

    def __init__(
        self,
        *,
        store: Store,
        index: Index,
        columns: Sequence[str],
        encode: Encode,
        rank: int,
        world_size: int,
        seed: int,
        lanes: int,
        window: int,
        cache: NodeCache,
        copies: Copies | None = None,
        patience: Patience | None = None,
        fetch_threads: int = _FETCH_THREADS,
    ) -> None:
        """`store` is the data set's folder, `window` comes from `fit_window`, `copies` say how
        often rows are used in `batches`: None, once. Reads nothing.

        With `patience` a store that is away is waited for, unless the stream is closed meanwhile.

        Raises DataError where a column is missing, and SpecError where ranks would share row groups
        through a cache that is too small for them.
        """
        self._index = index
        self._copies = copies
        self._is_closed = False
        if patience is not None:
            store = patience.store(store, unless=self._refuse_if_closed)
        self._source = Source(
            reader=VerifiedReader(store=store, index=index, columns=columns, cache=cache),
            index=index,
            encode=encode,
        )
        self._rank = rank
        self._world_size = world_size
        self._seed = seed
        self._lanes = lanes
        self._window = window
        self._fetch_threads = fetch_threads
        self._run_rows = run_rows(index)
        self._dealers: set[Dealer] = set()
        self._waits = Waits()
        self._no_items: Items | None = None
        if item_step(lanes, world_size) > 1:
            refuse_small_cache(
                uri=store.uri,
                lanes=lanes,
                window=window,
                num_groups=index.num_groups,
                stored_bytes=index.record.bytes,
                cache_bytes=cache.limit_bytes,
            )
            if rank == 0:
                _log.warning(
                    "%d workers do not divide the %d lanes of %s: the order of rows is the same, "
                    "but %d workers read each row group; set data.lanes to a multiple of the "
                    "worker count for a new run",
                    world_size,
                    lanes,
                    store.uri,
                    item_step(lanes, world_size),
                )

    @property
    def bytes_fetched(self) -> int:
        """Bytes that came from the store; what the node's cache held is not counted."""
        return self._source.reader.bytes_fetched

    @property
    def wait_seconds(self) -> float:
        """Time in which a batch was asked for and its rows were not there yet."""
        return self._waits.seconds

    def batches(
        self,
        *,
        epoch: int,
        next_item: int,
        global_batch_size: int,
        unless: Unless | None = None,
    ) -> Iterator[RankBatch]:
        """The rank's batches from position `next_item` to the end of the epoch, one a step.

        Every rank gets the same number of batches, some of them empty where rows run out; the
        last step has what is left. Errors of the background (DataError, StorageError) are raised
        at the first batch that needs the block in which they happened. `unless` is asked while a
        batch is waited for: NotNeeded is raised where it says so, and the stream is of no use then.
        """
        copies = self._copies
        order = EpochOrder(
            self._index.group_rows if copies is None else copies.group_items(epoch),
            seed=self._seed,
            epoch=epoch,
            lanes=self._lanes,
            window=self._window,
        )
        touched, items = rank_lanes(
            lanes=self._lanes, rank=self._rank, world_size=self._world_size, start=next_item
        )
        step = item_step(self._lanes, self._world_size)
        plans = [
            shuffled_plans(
                order,
                lane=int(lane),
                item=int(item),
                step=step,
                rows_of=None if copies is None else partial(copies.rows_of, epoch),
            )
            for lane, item in zip(touched, items, strict=True)
        ]
        steps_of_run = max(1, self._run_rows * self._world_size // global_batch_size)
        with self._dealer(plans, num_ahead=1, unless=unless) as dealer:
            first = next_item
            while first < order.num_items:
                stops = np.arange(1, steps_of_run + 1) * global_batch_size + first
                stops = stops[: int(np.searchsorted(stops, order.num_items)) + 1]
                stops[-1] = min(int(stops[-1]), order.num_items)
                ends = positions_before(
                    stops, rank=self._rank, world_size=self._world_size
                ) - positions_before(first, rank=self._rank, world_size=self._world_size)
                num_steps = max(1, int(np.searchsorted(ends, dealer.num_ready, side="right")))
                yield from self._run(
                    dealer, epoch=epoch, first=first, stops=stops[:num_steps], ends=ends[:num_steps]
                )
                first = int(stops[num_steps - 1])

    def sequential(self, *, batch_rows: int, unless: Unless | None = None) -> Iterator[RankBatch]:
        """Every row of the data set once over all ranks, unshuffled, for evaluation.

        A rank has one run of rows, cut between row groups where that is near enough to even; its
        batches have `batch_rows` rows, the last one fewer. Numbers of batches differ by rank, and
        a rank without rows has none. `first_item` and `next_item` count rows of the index. `unless`
        as in `batches`.
        """
        first, stop = sequential_share(
            self._index.group_rows, rank=self._rank, world_size=self._world_size
        )
        blocks = rows_in_groups(self._index.group_rows, first=first, stop=stop)
        held = 2 * self._window * lanes_of_rank(self._lanes, self._world_size)
        num_ahead = min(self._fetch_threads, held - 1)
        plans = [sequential_plans(blocks)]
        with self._dealer(plans, num_ahead=num_ahead, unless=unless) as dealer:
            while first < stop:
                steps = max(1, min(dealer.num_ready, self._run_rows) // batch_rows)
                stops = np.minimum(np.arange(1, steps + 1) * batch_rows + first, stop)
                stops = stops[: int(np.searchsorted(stops, stop)) + 1]
                yield from self._run(dealer, epoch=0, first=first, stops=stops, ends=stops - first)
                first = int(stops[-1])

    def close(self) -> None:
        """Ends all iterations and joins their threads; an iterator in use raises when it needs
        more rows."""
        self._is_closed = True
        for dealer in tuple(self._dealers):
            dealer.close()

    def __enter__(self) -> RankStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---------------------------------------------------------------------------------- one run

    def _run(
        self, dealer: Dealer, *, epoch: int, first: int, stops: IntArray, ends: IntArray
    ) -> Iterator[RankBatch]:
        """Batches up to each of `stops`; the rank has `ends` rows before them, from `first` on."""
        self._refuse_if_closed()
        rows, items = dealer.deal(int(ends[-1]))
        begin = 0
        for stop, end in zip(stops.tolist(), ends.tolist(), strict=True):
            yield RankBatch(
                epoch=epoch,
                first_item=first,
                next_item=stop,
                rows=rows[begin:end],
                items=items.slice(begin, end) if items is not None else self._none(),
            )
            first, begin = stop, end
        if items is not None and self._no_items is None:
            self._no_items = items.take(np.empty(0, dtype=np.int64))

    def _refuse_if_closed(self) -> None:
        if self._is_closed:
            raise RuntimeError("the stream was closed while it was read")

    def _none(self) -> Items:
        """No items, with the columns that items have: their names and types are the task's."""
        if self._no_items is None:
            rows = self._index.group_rows
            group = int(np.argmin(np.where(rows == 0, np.iinfo(rows.dtype).max, rows)))
            row = self._source.reader.read(group).slice(0, 1)
            one = self._source.encode(row, self._index.first_row(group))
            self._no_items = one.take(np.empty(0, dtype=np.int64))
        return self._no_items

    @contextmanager
    def _dealer(
        self, plans: Sequence[Iterator[Plan]], *, num_ahead: int, unless: Unless | None = None
    ) -> Iterator[Dealer]:
        if self._is_closed:
            raise RuntimeError("the stream is closed")
        dealer = Dealer(
            plans,
            self._source,
            num_ahead=num_ahead,
            num_threads=self._fetch_threads,
            waits=self._waits,
            unless=unless,
        )
        self._dealers.add(dealer)
        try:
            yield dealer
        except (NotNeeded, GeneratorExit) as ended:
            # Its threads may hang in a request: `close` waits for them, when there is time.
            self._is_closed |= isinstance(ended, NotNeeded)
            dealer.cancel()
            raise
        except BaseException:
            self._end(dealer)
            raise
        self._end(dealer)

    def _end(self, dealer: Dealer) -> None:
        dealer.close()
        self._dealers.discard(dealer)
