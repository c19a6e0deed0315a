"""The limit: the same files through pyarrow's own S3 client and Parquet reader, in the order of the
files, into padded batches."""

from __future__ import annotations

from collections.abc import Iterator

from readers.batching import BATCH_ROWS, Batch, Reading, from_arrow
from readers.formats import parquet


def batches(reading: Reading) -> Iterator[Batch]:
    for rows in parquet(reading.data).to_batches(columns=["input_ids", "label"]):
        for start in range(0, rows.num_rows, BATCH_ROWS):
            yield from_arrow(rows.slice(start, BATCH_ROWS))
