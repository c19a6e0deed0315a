"""LitData: its own chunks, not compressed, shuffled, in its StreamingDataLoader."""

from __future__ import annotations

import os
from collections.abc import Iterator

from litdata import StreamingDataLoader, StreamingDataset
from litdata.streaming import downloader
from litdata.streaming.cache import Cache
from readers.batching import BATCH_ROWS, Batch, Reading, collated_columns
from readers.formats import folder_for, rows_of


def write(source: str, to: str) -> None:
    with folder_for(to) as folder:
        cache = Cache(str(folder), chunk_bytes=2**24)
        for number, (tokens, label) in enumerate(rows_of(source)):
            cache[number] = {"input_ids": tokens, "label": label}
        cache.done()
        cache.merge()


def batches(reading: Reading) -> Iterator[Batch]:
    # No setting of its own lets it use an endpoint without TLS.
    downloader._OBSTORE_CLIENT_OPTIONS["allow_http"] = True
    stream = StreamingDataset(
        reading.data,
        cache_dir=str(reading.cache / "litdata"),
        shuffle=True,
        seed=7,
        storage_options={"endpoint_url": os.environ["AWS_ENDPOINT_URL_S3"]},
    )
    if reading.from_row:
        stream.load_state_dict(stream.state_dict(reading.from_row, 0, BATCH_ROWS))
    yield from StreamingDataLoader(stream, batch_size=BATCH_ROWS, collate_fn=collated_columns)
