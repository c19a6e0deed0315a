"""Items: encoded rows as columns of numpy arrays, one entry an item; no Python object per item."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from jobs.errors import DataError, Problem

Array = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class Ragged:
    """n sequences of different lengths: sequence i is `values[offsets[i]:offsets[i + 1]]`."""

    values: Array
    """All sequences, joined; shape [total]."""
    offsets: npt.NDArray[np.int64]
    """From 0 to total; shape [n + 1]."""

    def __post_init__(self) -> None:
        if self.offsets[0] != 0 or self.offsets[-1] != len(self.values):
            raise ValueError(
                f"offsets {self.offsets[0]} to {self.offsets[-1]} do not span "
                f"{len(self.values)} values"
            )

    @classmethod
    def from_arrow(cls, column: pa.ChunkedArray | pa.Array, *, first_row: int = 0) -> Ragged:
        """The sequences of a list column (list, large list or fixed-size list of numbers).

        Shares the column's memory where it is one chunk. Raises DataError, naming the row counted
        from `first_row`, where a list or a number in it is null.
        """
        column = _one_chunk(column)
        if column.null_count:
            raise _null(first_row + int(np.argmin(column.is_valid().to_numpy(False))))
        if pa.types.is_fixed_size_list(column.type):
            offsets = np.arange(len(column) + 1, dtype=np.int64) * column.type.list_size
            values = column.flatten()
        else:
            offsets = numbers_of(column.offsets).astype(np.int64)
            values = column.values.slice(offsets[0], offsets[-1] - offsets[0])
            offsets -= offsets[0]
        if values.null_count:
            wrong = int(np.argmin(values.is_valid().to_numpy(False)))
            raise _null(first_row + int(np.searchsorted(offsets, wrong, side="right")) - 1)
        return cls(numbers_of(values), offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.offsets.nbytes

    def take(self, indices: npt.NDArray[np.integer[Any]]) -> Ragged:
        """The sequences at `indices`, copied; they are read-only."""
        # As bytes, which Arrow copies sequence by sequence; numpy would number by number.
        size = self.values.itemsize
        values = pa.py_buffer(np.ascontiguousarray(self.values))
        sequences = pa.Array.from_buffers(
            pa.large_binary(), len(self), [None, pa.py_buffer(self.offsets * size), values]
        )
        chosen = pa.py_buffer(np.ascontiguousarray(indices, np.int64))
        order = pa.Array.from_buffers(pa.int64(), len(indices), [None, chosen])
        _, ends, taken = sequences.take(order).buffers()
        offsets = np.frombuffer(ends, np.int64, len(indices) + 1) // size
        return Ragged(np.frombuffer(taken or b"", self.values.dtype, offsets[-1]), offsets)

    def slice(self, start: int, stop: int) -> Ragged:
        """The sequences [start, stop); shares memory."""
        offsets = self.offsets[start : stop + 1]
        return Ragged(self.values[offsets[0] : offsets[-1]], offsets - offsets[0])


Column = Array | Ragged


def numbers_of(column: pa.ChunkedArray | pa.Array) -> Array:
    """The values of a column of numbers without nulls; shape [n].

    Shares the column's memory where it is one chunk. By DLPack: `to_numpy`, like `pyarrow.array`,
    loads pandas where it is installed, which takes a third of a second.
    """
    return np.from_dlpack(_one_chunk(column))


@dataclass(frozen=True, eq=False)
class Items:
    """Encoded rows, by column; every column has one entry (first dimension) an item."""

    columns: Mapping[str, Column]

    def __post_init__(self) -> None:
        if len({len(column) for column in self.columns.values()}) > 1:
            lengths = {name: len(column) for name, column in self.columns.items()}
            raise ValueError(f"columns of different lengths: {lengths}")

    def __len__(self) -> int:
        return next((len(column) for column in self.columns.values()), 0)

    @property
    def nbytes(self) -> int:
        return sum(column.nbytes for column in self.columns.values())

    def take(self, indices: npt.NDArray[np.integer[Any]]) -> Items:
        """The items at `indices`, in that order, copied."""
        return Items(
            {
                name: column.take(indices) if isinstance(column, Ragged) else column[indices]
                for name, column in self.columns.items()
            }
        )

    def slice(self, start: int, stop: int) -> Items:
        """The items [start, stop); shares memory."""
        return Items(
            {
                name: column.slice(start, stop)
                if isinstance(column, Ragged)
                else column[start:stop]
                for name, column in self.columns.items()
            }
        )

    @staticmethod
    def concat(parts: Sequence[Items]) -> Items:
        """All items of the parts, in order, copied; the parts (at least one) have the same
        columns."""
        return Items(
            {name: _concat([part.columns[name] for part in parts]) for name in parts[0].columns}
        )


def _concat(parts: Sequence[Column]) -> Column:
    ragged = [part for part in parts if isinstance(part, Ragged)]
    if not ragged:
        return np.concatenate([np.asarray(part) for part in parts])
    lengths = np.concatenate([np.diff(part.offsets) for part in ragged])
    return Ragged(np.concatenate([part.values for part in ragged]), _offsets(lengths))


def _offsets(lengths: Array) -> npt.NDArray[np.int64]:
    offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


def _one_chunk(column: pa.ChunkedArray | pa.Array) -> pa.Array:
    if not isinstance(column, pa.ChunkedArray):
        return column
    if column.num_chunks == 1:
        return column.chunk(0)
    return pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)


def _null(row: int) -> DataError:
    return DataError(
        Problem(
            f"row {row}: a list, or a number in it, is null",
            "leave such rows out when you prepare the data",
        )
    )
