"""MosaicML Streaming: MDS shards, shuffled by its default algorithm, in its DataLoader."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from types import ModuleType

import transformers.feature_extraction_utils  # noqa: F401 - finds out that torchvision is absent
from readers.batching import BATCH_ROWS, Batch, Reading, collated_columns
from readers.formats import folder_for, rows_of

# Its vision data sets import torchvision, of which nothing is used here.
for _name in ("", ".transforms", ".transforms.functional", ".datasets"):
    sys.modules[f"torchvision{_name}"] = ModuleType(f"torchvision{_name}")
sys.modules["torchvision.transforms.functional"].to_tensor = None  # type: ignore[attr-defined]
sys.modules["torchvision.datasets"].VisionDataset = object  # type: ignore[attr-defined]

from streaming import MDSWriter, StreamingDataLoader, StreamingDataset  # noqa: E402


def write(source: str, to: str) -> None:
    columns = {"input_ids": "ndarray:int32", "label": "int"}
    with (
        folder_for(to) as folder,
        MDSWriter(out=str(folder), columns=columns, compression="zstd", size_limit=2**24) as writer,
    ):
        for tokens, label in rows_of(source):
            writer.write({"input_ids": tokens, "label": label})


def batches(reading: Reading) -> Iterator[Batch]:
    os.environ["S3_ENDPOINT_URL"] = os.environ["AWS_ENDPOINT_URL_S3"]
    stream = StreamingDataset(
        remote=reading.data, local=str(reading.cache / "mds"), shuffle=True, batch_size=BATCH_ROWS
    )
    if reading.from_row:
        stream.load_state_dict(stream.state_dict(reading.from_row, from_beginning=True))
    yield from StreamingDataLoader(stream, batch_size=BATCH_ROWS, collate_fn=collated_columns)
