"""Hugging Face `datasets`, streamed, shuffled by its buffer, in a DataLoader."""

from __future__ import annotations

import os
from collections.abc import Iterator

import datasets
from readers.batching import BATCH_ROWS, SHUFFLE_ROWS, Batch, Reading, collated_columns
from torch.utils.data import DataLoader


def batches(reading: Reading) -> Iterator[Batch]:
    stream = datasets.load_dataset(
        "parquet",
        data_files=f"{reading.data}/*.parquet",
        split="train",
        streaming=True,
        columns=["input_ids", "label"],
        storage_options={"client_kwargs": {"endpoint_url": os.environ["AWS_ENDPOINT_URL_S3"]}},
    ).shuffle(seed=7, buffer_size=SHUFFLE_ROWS)
    if reading.from_row:
        stream = stream.skip(reading.from_row)
    yield from DataLoader(stream, batch_size=BATCH_ROWS, collate_fn=collated_columns)
