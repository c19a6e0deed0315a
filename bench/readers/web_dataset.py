"""WebDataset: tar shards, shuffled by its buffer, batched by itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import boto3
import webdataset
from readers.batching import BATCH_ROWS, SHUFFLE_ROWS, Batch, Reading, collated
from readers.formats import folder_for, rows_of, split
from webdataset.gopen import gopen_schemes

_ROWS_OF_SHARD = 50_000


def write(source: str, to: str) -> None:
    with (
        folder_for(to) as folder,
        webdataset.ShardWriter(f"{folder}/%05d.tar", maxcount=_ROWS_OF_SHARD, verbose=0) as writer,
    ):
        for number, (tokens, label) in enumerate(rows_of(source)):
            writer.write({"__key__": f"{number:08d}", "input_ids.npy": tokens, "label.cls": label})


def batches(reading: Reading) -> Iterator[Batch]:
    bucket, prefix = split(reading.data)
    pages = boto3.client("s3").get_paginator("list_objects_v2")
    keys = [
        held["Key"]
        for page in pages.paginate(Bucket=bucket, Prefix=prefix)
        for held in page["Contents"]
    ]
    gopen_schemes["s3"] = _open
    yield from (
        webdataset.WebDataset(
            [f"s3://{bucket}/{key}" for key in keys], shardshuffle=len(keys), seed=7
        )
        .shuffle(SHUFFLE_ROWS)
        .decode()
        .to_tuple("input_ids.npy", "label.cls")
        .batched(BATCH_ROWS, collation_fn=collated)
    )


def _open(url: str, *_: Any, **__: Any) -> Any:
    bucket, key = split(url)
    return boto3.client("s3").get_object(Bucket=bucket, Key=key)["Body"]
