"""Rows without nulls where none may be: counted, then refused or left out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
import pyarrow as pa

from jobs.errors import DataError, Problem
from trainers.data.columns import first_null
from trainers.data.sources import Source

OnNull = Literal["error", "drop"]


class CleanRows:
    """The rows of a source that have no null where none may be."""

    def __init__(
        self,
        source: Source,
        columns: Sequence[str],
        required: Sequence[str],
        on_null: OnNull,
    ) -> None:
        self.source, self._columns, self._required = source, columns, required
        self._on_null = on_null
        self._nulls = dict.fromkeys(required, 0)
        self._first: dict[str, str] = {}
        self.kept = 0
        self.dropped = 0

    def tables(self) -> Iterator[pa.Table]:
        """One pass. A null is an error only once all are counted; from the first on no rows come.

        Raises DataError for nulls that may not be dropped, and for a source without rows.
        """
        for batch in self.source.batches(self._columns):
            table = batch.table
            keep = np.ones(table.num_rows, bool)
            for name in self._required:
                column = table[name]
                if column.null_count:
                    self._nulls[name] += column.null_count
                    row = batch.first_row + first_null(column)
                    self._first.setdefault(name, f"row {row} of {batch.file}")
                    keep &= column.is_valid().to_numpy(zero_copy_only=False)
            self.dropped += int((~keep).sum())
            if self._first and self._on_null == "error":
                continue
            table = table if keep.all() else table.filter(pa.array(keep))
            self.kept += table.num_rows
            if table.num_rows:
                yield table
        if self._first and self._on_null == "error":
            raise DataError(
                *(
                    Problem(
                        f"{name} is null in {self._nulls[name]:,} row"
                        f"{'s' if self._nulls[name] > 1 else ''}, the first is {first}",
                        "correct the rows, or leave them out with --on-null drop",
                    )
                    for name, first in self._first.items()
                )
            )
        if not self.kept:
            what = "no row without a null" if self.dropped else "no rows"
            raise DataError(Problem(f"{self.source.uri} holds {what}", "name a source with rows"))
