"""Row predictions as one Parquet file, in the order of the data set's rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from jobs.errors import EnvironmentFault, Problem

ROW_COLUMN = "row"
_ROWS_AT_A_TIME = 8192

OtherColumns = Callable[[int, int], Mapping[str, Any]]
"""Columns of the data set's rows [start, end)."""


class PredictionWriter:
    """Writes predictions that come in any order within a batch; batches come in order.

    The file appears at `path` when the block ends without an exception, whole or not at all.
    Memory is bounded by the rows that wait for an earlier one.
    """

    def __init__(self, path: Path, *, other_columns: OtherColumns) -> None:
        self._path = path
        self._unfinished = path.with_name(f".{path.name}.unfinished")
        self._other_columns = other_columns
        self._writer: pq.ParquetWriter | None = None
        self._waiting: list[pa.Table] = []
        self._num_waiting = 0
        self._next_row = 0

    def __enter__(self) -> PredictionWriter:
        return self

    def add(self, rows: npt.NDArray[np.int64], columns: Mapping[str, Any]) -> None:
        """Takes the predictions of some rows; raises EnvironmentFault where the disk is full."""
        self._waiting.append(pa.table({ROW_COLUMN: rows, **columns}))
        self._num_waiting += len(rows)
        if self._num_waiting >= _ROWS_AT_A_TIME:
            self._write_if_complete()

    def _write_if_complete(self) -> None:
        """Writes what waits, if no row is missing among it."""
        waiting = pa.concat_tables(self._waiting)
        end = self._next_row + waiting.num_rows
        if int(np.max(waiting[ROW_COLUMN].to_numpy())) >= end:
            return
        table = waiting.sort_by(ROW_COLUMN)
        for name, column in self._other_columns(self._next_row, end).items():
            if name not in table.column_names:
                table = table.append_column(name, column)
        try:
            if self._writer is None:
                self._writer = pq.ParquetWriter(self._unfinished, table.schema, compression="zstd")
            self._writer.write_table(table)
        except OSError as error:
            raise self._fault(error) from error
        self._next_row, self._waiting, self._num_waiting = end, [], 0

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if error is None and self._waiting:
                self._write_if_complete()
            if self._writer is not None:
                self._writer.close()
            if error is None:
                self._unfinished.replace(self._path)
        except OSError as caught:
            raise self._fault(caught) from caught
        finally:
            self._unfinished.unlink(missing_ok=True)

    def _fault(self, error: OSError) -> EnvironmentFault:
        return EnvironmentFault(
            Problem(
                f"{self._path} cannot be written: {error.strerror or error}",
                "name another place with --output FILE",
            )
        )
