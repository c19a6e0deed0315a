"""Shoal: verified ranged reads through the node's cache, the exact order, padded batches."""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa
from readers.batching import BATCH_ROWS, Batch, Reading

from cluster.storage import open_store
from trainers.data.cache import NodeCache
from trainers.data.index import open_index
from trainers.data.items import Items, Ragged, numbers_of
from trainers.data.partition import fit_window
from trainers.data.stream import RankStream
from trainers.tasks.padding import padded

SEED = 7
WINDOW = 16
"""Row groups, where they fit into memory."""


def batches(reading: Reading) -> Iterator[Batch]:
    """As a job does it: `lanes: auto` is the number of workers here."""
    store = open_store(reading.data)
    index = open_index(store)
    window = fit_window(
        window=WINDOW,
        lanes=reading.world_size,
        max_row_group_bytes=index.max_row_group_bytes,
        stream_memory=2**30,
    )
    with RankStream(
        store=store,
        index=index,
        columns=("input_ids", "label"),
        encode=_encode,
        rank=reading.rank,
        world_size=reading.world_size,
        seed=SEED,
        lanes=reading.world_size,
        window=window,
        cache=NodeCache(reading.cache / "rows", limit_bytes=20 * 2**30),
    ) as stream:
        for batch in stream.batches(
            epoch=0,
            next_item=reading.from_row,
            global_batch_size=BATCH_ROWS * reading.world_size,
        ):
            yield padded(batch.items, pad_id=0)


def _encode(rows: pa.Table, first_row: int) -> Items:
    return Items(
        {
            "input_ids": Ragged.from_arrow(rows.column("input_ids"), first_row=first_row),
            "label": numbers_of(rows.column("label")),
        }
    )
