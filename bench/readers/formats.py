"""What the libraries with a format of their own share: the rows to write, and where they go."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import numpy.typing as npt
import pyarrow.dataset as ds


def rows_of(source: str) -> Iterator[tuple[npt.NDArray[np.int32], int]]:
    """(tokens, label) of each row of a folder of Parquet files, in their order."""
    for batch in parquet(source).to_batches(columns=["input_ids", "label"]):
        labels = batch.column("label").to_pylist()
        for tokens, label in zip(batch.column("input_ids"), labels, strict=True):
            yield np.asarray(tokens.values), label


def parquet(uri: str) -> Any:
    """The Parquet files of a data set; pyarrow finds the endpoint by itself."""
    return ds.dataset(uri, format="parquet")


@contextmanager
def folder_for(uri: str) -> Iterator[Path]:
    """An empty local folder whose files are then uploaded below the S3 URI."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        yield folder
        bucket, prefix = split(uri)
        client = boto3.client("s3")
        with ThreadPoolExecutor(8) as pool:
            files = [file for file in folder.rglob("*") if file.is_file()]
            keys = [f"{prefix}/{file.relative_to(folder)}" for file in files]
            list(pool.map(client.upload_file, map(str, files), [bucket] * len(files), keys))


def split(uri: str) -> tuple[str, str]:
    """Bucket and prefix."""
    bucket, _, prefix = uri.removeprefix("s3://").partition("/")
    return bucket, prefix
