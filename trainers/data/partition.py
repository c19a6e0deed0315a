"""The order of rows: a pure function of (row groups, seed, epoch, lanes, window).

The row groups of the data set are permuted over the whole set and joined; the joined rows are cut
into `lanes` runs of equal length. Inside a lane, the pieces (row groups, or parts of one at a cut)
are taken `window` at a time into blocks, and the items of a block are permuted. Position p of the
epoch is item p // lanes of lane p % lanes, and rank r of W workers reads the positions p with
p % W == r. W is not an input of the order, so all worker counts share one.

How near to uniform the shuffle is: every order of the row groups is equally likely, and so is
every order of the items inside a block. The order of the rows over the whole set is not uniform:
rows of one row group stay within the block (the two blocks, at a lane's cut) that holds it. With
n = B / lanes rows a lane in a global batch of B, on data sorted by label, the variance of a label's
share of a global batch is about 1 + (n - 1) / window times that of a uniform shuffle, less once the
blocks hold a good part of the data set (tests/trainers/data/test_partition.py measures both).
The rank correlation of a row's place in the data set and its position in the epoch has mean 0 and
standard deviation 1 / sqrt(row groups - 1) over the epochs.

Random numbers are raw words of Philox4x64-10 (Salmon et al., SC 2011) keyed with integers: numpy
promises these for all versions and platforms, which it does not for `Generator.permutation`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import gcd

import numpy as np
from numpy.typing import ArrayLike, NDArray

from jobs.errors import Problem, SpecError
from jobs.spec import format_bytes

ORDER_VERSION = 1
"""Grows when the same inputs give another order; a checkpoint of another version is refused."""

_GROUPS_OF_EPOCH = 1
_ITEMS_OF_BLOCK = 2
_COPIES_OF_ROW = 3
_CHANGES_OF_ITEM = 4

_WORDS = 4
_GOLDEN_GAMMA = np.uint64(0x9E3779B97F4A7C15)

IntArray = NDArray[np.int64]


@dataclass(frozen=True)
class Block:
    """Pieces of row groups among whose rows the items of a lane are shuffled."""

    lane: int
    number: int
    first_item: int
    """In the lane."""
    groups: IntArray
    """Row group of each piece, in the joined order; shape [pieces]."""
    starts: IntArray
    """First row of each piece, in its row group."""
    stops: IntArray
    """Row after the last one of each piece, in its row group."""

    @property
    def piece_rows(self) -> IntArray:
        return self.stops - self.starts

    @property
    def num_items(self) -> int:
        return int(self.piece_rows.sum())


class EpochOrder:
    """The order of one epoch; holds 16 bytes a row group, and no state that changes."""

    def __init__(
        self, group_rows: ArrayLike, *, seed: int, epoch: int, lanes: int, window: int
    ) -> None:
        """`group_rows`: rows of each row group, in the order of the index; empty ones are allowed.

        ValueError where a number is out of its range: these are checked where users give them.
        """
        if min(lanes, window) < 1 or min(seed, epoch) < 0:
            raise ValueError(f"no order for {lanes=} {window=} {seed=} {epoch=}")
        self.lanes = lanes
        self.window = window
        self._seed = seed
        self._epoch = epoch
        rows = np.asarray(group_rows, dtype=np.int64)
        full = np.flatnonzero(rows)
        keyed = _key(_GROUPS_OF_EPOCH, seed=seed, epoch=epoch)
        self._groups: IntArray = full[_permutation(len(full), keyed)]
        self._starts: IntArray = np.concatenate([[0], np.cumsum(rows[self._groups])])
        self.num_items = int(self._starts[-1])
        share, longer = divmod(self.num_items, lanes)
        lane = np.arange(lanes + 1, dtype=np.int64)
        self._lane_starts: IntArray = lane * share + np.minimum(lane, longer)
        self._first_pieces = self._piece_of(self._lane_starts[:-1])

    # ------------------------------------------------------------------------------------ lanes

    def lane_items(self, lane: int) -> int:
        """Items of a lane: lengths differ by at most one, the longer lanes first."""
        return int(self._lane_starts[lane + 1] - self._lane_starts[lane])

    def num_blocks(self, lane: int) -> int:
        items = self.lane_items(lane)
        return self.block_of(lane, items - 1) + 1 if items else 0

    def block_of(self, lane: int, item: int) -> int:
        """Number of the block that holds an item of the lane."""
        if not 0 <= item < self.lane_items(lane):
            raise IndexError(f"lane {lane} has {self.lane_items(lane)} items, not item {item}")
        piece = self._piece_of(self._lane_starts[lane] + np.int64(item))
        return int(piece - self._first_pieces[lane]) // self.window

    def block(self, lane: int, number: int) -> Block:
        """What a block is made of; IndexError beyond the lane's last one."""
        if not 0 <= number < self.num_blocks(lane):
            raise IndexError(f"lane {lane} has {self.num_blocks(lane)} blocks, not block {number}")
        first = int(self._first_pieces[lane]) + number * self.window
        pieces = slice(first, min(first + self.window, len(self._groups)))
        begins, ends = self._starts[:-1][pieces], self._starts[1:][pieces]
        low, high = self._lane_starts[lane], self._lane_starts[lane + 1]
        inside = begins < high
        begins, ends, groups = begins[inside], ends[inside], self._groups[pieces][inside]
        return Block(
            lane=lane,
            number=number,
            first_item=int(max(begins[0], low) - low),
            groups=groups,
            starts=np.maximum(low - begins, 0),
            stops=np.minimum(ends, high) - begins,
        )

    def shuffled(self, block: Block) -> IntArray:
        """The block's rows in the order of its items: item `first_item + i` is row `[i]` of the
        joined pieces; shape [num_items]."""
        keyed = _key(
            _ITEMS_OF_BLOCK,
            seed=self._seed,
            epoch=self._epoch,
            lane=block.lane,
            block=block.number,
        )
        return _permutation(block.num_items, keyed)

    # -------------------------------------------------------------------------------- positions

    def rows_at(self, positions: ArrayLike) -> tuple[IntArray, IntArray]:
        """(row group, row in it) of each position, any positions in any order; shapes [n], [n].

        Costs the permutation of each block that is touched, one block in memory at a time.
        """
        at = np.asarray(positions, dtype=np.int64)
        if at.size and not 0 <= at.min() <= at.max() < self.num_items:
            raise IndexError(f"an epoch has the positions 0 to {self.num_items - 1}")
        lane = at % self.lanes
        joined = self._lane_starts[lane] + at // self.lanes
        number = (self._piece_of(joined) - self._first_pieces[lane]) // self.window
        rows = np.empty_like(at)
        groups = np.empty_like(at)
        for chosen in _equal_pairs(lane, number):
            block = self.block(int(lane[chosen[0]]), int(number[chosen[0]]))
            item = joined[chosen] - self._lane_starts[block.lane] - block.first_item
            offset = self.shuffled(block)[item]
            ends = np.cumsum(block.piece_rows)
            piece = np.searchsorted(ends, offset, side="right")
            groups[chosen] = block.groups[piece]
            rows[chosen] = offset - (ends[piece] - block.piece_rows[piece]) + block.starts[piece]
        return groups, rows

    def _piece_of(self, joined: NDArray[np.int64] | np.int64) -> NDArray[np.int64]:
        """Piece that holds each row of the joined order."""
        return np.searchsorted(self._starts, joined, side="right").astype(np.int64) - 1


# ------------------------------------------------------------------------------------------ ranks


def rank_positions(*, rank: int, world_size: int, start: int, stop: int) -> IntArray:
    """Positions in [start, stop) that `rank` reads, in order; shape [n].

    Interleaving the results of all ranks gives back start..stop for every world size, so a run may
    resume on more or fewer workers. Lengths differ by at most one.
    """
    return np.arange(start + (rank - start) % world_size, stop, world_size, dtype=np.int64)


def positions_before(stops: ArrayLike, *, rank: int, world_size: int) -> IntArray:
    """How many positions below each of `stops` are the rank's; shape of `stops`."""
    return (np.asarray(stops, dtype=np.int64) + (world_size - 1 - rank)) // world_size


def rank_lanes(*, lanes: int, rank: int, world_size: int, start: int) -> tuple[IntArray, IntArray]:
    """Lanes that `rank` reads, in the order in which its positions from `start` on meet them, and
    the item at which it begins in each; shapes [n], [n].

    The rank's k-th position from `start` on lies in the lane [k % n]. Where the world size divides
    the lanes, no lane has two ranks.
    """
    first = start + (rank - start) % world_size
    met = first + world_size * np.arange(lanes_of_rank(lanes, world_size), dtype=np.int64)
    return met % lanes, met // lanes


def lanes_of_rank(lanes: int, world_size: int) -> int:
    """Number of lanes that each rank touches."""
    return lanes // gcd(lanes, world_size)


def item_step(lanes: int, world_size: int) -> int:
    """A rank uses each `item_step`-th item of a lane that it touches: 1 where the world size
    divides the lanes."""
    return world_size // gcd(lanes, world_size)


def sequential_share(group_rows: ArrayLike, *, rank: int, world_size: int) -> tuple[int, int]:
    """Rows [first, stop) of the unshuffled data set that `rank` evaluates.

    The shares of all ranks are joined without a gap. A cut falls between two row groups where one
    ends within a sixteenth of a share from the even cut; else inside a row group, which two ranks
    then read.
    """
    ends = np.cumsum(np.asarray(group_rows, dtype=np.int64))
    num_rows = int(ends[-1]) if ends.size else 0

    def cut(worker: int) -> int:
        even = num_rows * worker // world_size
        if worker in (0, world_size) or not num_rows:
            return even
        after = int(np.searchsorted(ends, even))
        near = [int(end) for end in ends[max(after - 1, 0) : after + 1]]
        best = min(near, key=lambda end: abs(end - even))
        return best if abs(best - even) * 16 * world_size <= num_rows else even

    return cut(rank), cut(rank + 1)


def rows_in_groups(group_rows: ArrayLike, *, first: int, stop: int) -> Iterator[Block]:
    """The rows [first, stop) of the unshuffled data set as blocks of one row group each."""
    rows = np.asarray(group_rows, dtype=np.int64)
    ends = np.cumsum(rows)
    for group in range(
        int(np.searchsorted(ends, first, side="right")),
        int(np.searchsorted(ends, stop, side="left")) + 1 if stop > first else 0,
    ):
        begin = int(ends[group] - rows[group])
        low, high = max(first - begin, 0), min(stop - begin, int(rows[group]))
        if low < high:
            yield Block(
                lane=0,
                number=group,
                first_item=max(begin, first) - first,
                groups=np.array([group], dtype=np.int64),
                starts=np.array([low], dtype=np.int64),
                stops=np.array([high], dtype=np.int64),
            )


# ----------------------------------------------------------------------------------------- memory


def fit_window(*, window: int, lanes: int, max_row_group_bytes: int, stream_memory: int) -> int:
    """Row groups of a block: at most `window`, and so few that one worker alone could hold the
    blocks of every lane in `stream_memory` bytes; at least 1.

    The worker count is no input, so that all worker counts share one order.
    """
    return max(1, min(window, stream_memory // (_blocks(lanes) * max(1, max_row_group_bytes))))


def _blocks(lanes: int) -> int:
    """Blocks that are held at a time: two of each lane, and one while rows are shuffled."""
    return 2 * lanes + 1


def stream_bytes(*, lanes: int, window: int, world_size: int, max_row_group_bytes: int) -> int:
    """Bytes of row groups that one worker holds at most: two blocks of each lane it touches, and
    another one while the rows of a block are shuffled."""
    return _blocks(lanes_of_rank(lanes, world_size)) * window * max_row_group_bytes


def refuse_small_memory(
    *,
    uri: str,
    lanes: int,
    window: int,
    world_size: int,
    max_row_group_bytes: int,
    stream_memory: int,
) -> None:
    """SpecError if the blocks of one worker do not fit `data.stream_memory`; `window` is that of
    `fit_window`."""
    touched = lanes_of_rank(lanes, world_size)
    need = stream_bytes(
        lanes=lanes,
        window=window,
        world_size=world_size,
        max_row_group_bytes=max_row_group_bytes,
    )
    if need <= stream_memory:
        return
    blocks = _blocks(touched)
    fewer_lanes = f"set data.lanes to {world_size}, " if touched > 1 else ""
    raise SpecError(
        Problem(
            f"data.stream_memory is {format_bytes(stream_memory)}, but the windows of {uri} in "
            f"{touched} {'lane' if touched == 1 else 'lanes'} of a worker need "
            f"{format_bytes(need)} ({blocks * window} row groups of "
            f"{format_bytes(max_row_group_bytes)})",
            f"{fewer_lanes}set data.stream_memory to {-(-need // 2**20)} MiB, "
            f"or run: shoal prepare {uri} --to {uri.rstrip('/')}-small",
        )
    )


def refuse_small_cache(
    *,
    uri: str,
    lanes: int,
    window: int,
    num_groups: int,
    stored_bytes: int,
    cache_bytes: int,
) -> None:
    """SpecError if the node's cache cannot hold the blocks that are read at a time, all lanes
    together. For worker counts that do not divide the lanes: their row groups would be evicted
    before the other workers of the node have read them.

    `stored_bytes` are those of all shards; a row group is taken to have the mean of them.
    """
    in_use = min(num_groups, lanes * 2 * window)
    need = -(-stored_bytes * in_use // max(1, num_groups))
    if need > cache_bytes:
        raise SpecError(
            Problem(
                f"data.cache_gib is {cache_bytes / 2**30:.3g} ({format_bytes(cache_bytes)}), but "
                f"the windows of {uri} in {lanes} lanes need {format_bytes(need)} of it",
                f"set data.cache_gib to {need / 2**30 * 1.01:.3g}, or data.lanes to a multiple of "
                "the worker count",
            )
        )


# ----------------------------------------------------------------------------------------- random


def row_words(*, seed: int, epoch: int, first_row: int, count: int) -> NDArray[np.uint64]:
    """A random word of each row [first_row, first_row + count) in an epoch, whatever rows are asked
    for together; shape [count]."""
    first = first_row // _WORDS
    keyed = _key(_COPIES_OF_ROW, seed=seed, epoch=epoch, draws=first)
    skipped = first_row - first * _WORDS
    words: NDArray[np.uint64] = keyed.random_raw(skipped + count)[skipped:]
    return words


@dataclass(frozen=True, eq=False)
class ItemKeys:
    """What random changes of some items are drawn from."""

    seed: int
    epoch: int
    positions: IntArray
    """Of each item in the epoch; shape [n]."""


def item_words(
    keys: ItemKeys, *, item: IntArray, place: IntArray, purpose: int
) -> NDArray[np.uint64]:
    """A random word for each place in an item; `item` (which of the keys) and `place` have the
    shape [k], as the words have.

    A function of seed, epoch, position, place and purpose alone. Philox makes a key for each epoch
    and purpose, and the finalizer of SplitMix64 (Steele et al., 2014) the words from it: many keys
    at a time, which Philox in numpy cannot.
    """
    keyed = _key(_CHANGES_OF_ITEM, seed=keys.seed, epoch=keys.epoch, lane=purpose)
    first, second = keyed.random_raw(2)
    positions = keys.positions.astype(np.uint64)[item]
    mixed = _mixed(positions ^ first)
    return _mixed(mixed + place.astype(np.uint64) * _GOLDEN_GAMMA + second)


def _mixed(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: NDArray[np.uint64] = words ^ (words >> np.uint64(31))
    return mixed


def evenly(words: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Random words as numbers evenly spread over [0, 1)."""
    numbers: NDArray[np.float64] = (words >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return numbers


def _key(
    purpose: int, *, seed: int, epoch: int, lane: int = 0, block: int = 0, draws: int = 0
) -> np.random.Philox:
    """A generator of its own for each tuple of integers.

    (purpose, seed) are hashed into Philox's key; the rest are words of its counter, whose lowest
    word counts the draws, of `_WORDS` words each.
    """
    hashed = np.random.SeedSequence(entropy=seed, spawn_key=(ORDER_VERSION, purpose))
    return np.random.Philox(
        key=hashed.generate_state(2, np.uint64),
        counter=np.array([draws, epoch, lane, block], dtype=np.uint64),
    )


def _permutation(size: int, keyed: np.random.Philox) -> IntArray:
    """A permutation of range(size): indices sorted by random words.

    The index stands in the low bits of the word, so the words are distinct and every sorting
    algorithm gives the same result; at least 32 random bits are left for 2**32 items.
    """
    bits = np.uint64(max(1, (size - 1).bit_length()))
    words = keyed.random_raw(size)
    words >>= bits
    words <<= bits
    words |= np.arange(size, dtype=np.uint64)
    words.sort()
    words &= (np.uint64(1) << bits) - np.uint64(1)
    return words.astype(np.int64)


def _equal_pairs(lane: IntArray, number: IntArray) -> Iterator[IntArray]:
    """Indices of the entries that share (lane, number), one array for each pair."""
    if not lane.size:
        return
    by_pair = np.lexsort((number, lane))
    changes = (np.diff(lane[by_pair]) != 0) | (np.diff(number[by_pair]) != 0)
    yield from np.split(by_pair, np.flatnonzero(changes) + 1)
