"""Ray Data: read_parquet, files shuffled, a local shuffle buffer, batches collated from Arrow."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.fs
import ray
import ray.data
from ray.data.collate_fn import ArrowBatchCollateFn
from readers.batching import BATCH_ROWS, SHUFFLE_ROWS, Batch, Reading, from_arrow


def setup(_: str) -> dict[str, object]:
    """Ray is started before the clock: only Ray Data itself is measured."""
    ray.init(address="local", num_cpus=os.cpu_count(), include_dashboard=False, log_to_driver=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    return {}


class _Collate(ArrowBatchCollateFn):  # type: ignore[misc]
    def __call__(self, batch: pa.Table) -> Batch:
        return from_arrow(batch)


def batches(reading: Reading) -> Iterator[Batch]:
    filesystem, path = pyarrow.fs.FileSystem.from_uri(reading.data)
    rows = ray.data.read_parquet(
        path, filesystem=filesystem, columns=["input_ids", "label"], shuffle="files"
    )
    yield from rows.iter_torch_batches(
        batch_size=BATCH_ROWS,
        local_shuffle_buffer_size=SHUFFLE_ROWS,
        collate_fn=_Collate(),
        prefetch_batches=4,
    )
