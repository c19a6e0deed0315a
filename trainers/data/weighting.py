"""Weighted sampling: how often each row of a data set is used in an epoch.

A row that is to be used e times in the mean is used floor(e + u) times, where u, evenly spread
over [0, 1), is a pure function of (seed, epoch, row). The copies of a row lie side by side in its
row group; the order of the epoch is then that of `partition.EpochOrder` over row groups of so many
items. So it is the same for all worker counts, and a resume finds it again.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict

import numpy as np
import numpy.typing as npt

from cluster.storage import Store
from trainers.data.index import Index, row_labels
from trainers.data.partition import IntArray, evenly, row_words

_ROWS_AT_ONCE = 2**22
_MOST_EPOCHS = 4
_VERSION = 1


class Copies:
    """How often rows are used; holds the code of each row's label, in a byte where that does."""

    def __init__(
        self, store: Store, index: Index, *, mean_copies: npt.NDArray[np.float64], seed: int
    ) -> None:
        """`mean_copies`: how often a row of each code is used in the mean; shape [codes].

        Reads the labels of all rows, but nothing where all codes are used equally often.
        """
        self._index = index
        self._seed = seed
        # Code -1, a row without a label, takes the last.
        self._mean_copies = np.append(mean_copies, 1.0)
        codes = row_labels(store, index, start=0, end=index.num_rows)
        assert codes is not None
        kind = np.int8 if len(mean_copies) < 2**7 else np.int32
        self._codes = codes.astype(kind)
        self._group_items: OrderedDict[int, IntArray] = OrderedDict()

    @property
    def digest(self) -> str:
        """What tells these copies from others of the same data set and seed."""
        given = f"{_VERSION} {self._mean_copies.tolist()}"
        return hashlib.sha256(given.encode()).hexdigest()[:16]

    @property
    def most(self) -> int:
        """Copies of a row at most."""
        return max(1, int(np.ceil(self._mean_copies.max())))

    def group_items(self, epoch: int) -> IntArray:
        """Items of each row group in an epoch; shape [G]."""
        if epoch not in self._group_items:
            self._group_items[epoch] = self._counted(epoch)
            if len(self._group_items) > _MOST_EPOCHS:
                self._group_items.popitem(last=False)
        return self._group_items[epoch]

    def num_items(self, epoch: int) -> int:
        return int(self.group_items(epoch).sum())

    def rows_of(self, epoch: int, group: int) -> IntArray:
        """The row of each item of a row group, counted in the group, ascending; shape [items]."""
        rows = int(self._index.group_rows[group])
        copies = self._copies(epoch, self._index.first_row(group), rows)
        return np.repeat(np.arange(rows, dtype=np.int64), copies)

    def _counted(self, epoch: int) -> IntArray:
        rows = self._index.group_rows.astype(np.int64)
        ends = np.cumsum(rows)
        items = np.zeros(len(rows), dtype=np.int64)
        group = 0
        while group < len(rows):
            begin = int(ends[group] - rows[group])
            stop = max(group + 1, int(np.searchsorted(ends, begin + _ROWS_AT_ONCE, side="right")))
            copies = self._copies(epoch, begin, int(ends[stop - 1]) - begin)
            sums = np.concatenate([[0], np.cumsum(copies)])
            inside = ends[group:stop] - begin
            items[group:stop] = sums[inside] - sums[inside - rows[group:stop]]
            group = stop
        return items

    def _copies(self, epoch: int, first_row: int, count: int) -> IntArray:
        words = row_words(seed=self._seed, epoch=epoch, first_row=first_row, count=count)
        mean = self._mean_copies[self._codes[first_row : first_row + count]]
        copies: IntArray = np.floor(mean + evenly(words)).astype(np.int64)
        return copies
