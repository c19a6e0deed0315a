"""What the readers share: what is to be read, and batches of 64 rows padded to their longest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

BATCH_ROWS = 64
SHUFFLE_ROWS = 32_768
"""Rows of a buffer from which rows are drawn, for the libraries that have one: as many as a block
of Shoal's default window holds."""

Batch = dict[str, torch.Tensor]
IntArray = npt.NDArray[Any]


@dataclass(frozen=True)
class Reading:
    """One pass over the data set of a library's own format."""

    data: str
    """S3 URI."""
    cache: Path
    """Folder for what a library keeps on the local disk."""
    from_row: int = 0
    """Rows of the epoch that were used before."""
    rank: int = 0
    world_size: int = 1


def padded(values: IntArray, lengths: IntArray, labels: IntArray) -> Batch:
    """A batch from joined tokens: `input_ids` and `attention_mask` [n, longest], `label` [n]."""
    mask = np.arange(lengths.max(initial=1))[None, :] < lengths[:, None]
    ids = np.zeros(mask.shape, dtype=np.int64)
    ids[mask] = values
    return {
        "input_ids": torch.from_numpy(ids),
        "attention_mask": torch.from_numpy(mask.astype(np.int64)),
        "label": torch.from_numpy(np.array(labels, dtype=np.int64)),
    }


def collated(rows: Sequence[tuple[Any, int]]) -> Batch:
    """A batch from rows of (tokens, label)."""
    tokens = [np.asarray(ids) for ids, _ in rows]
    lengths = np.fromiter(map(len, tokens), np.int64, len(tokens))
    labels = np.fromiter((label for _, label in rows), np.int64, len(rows))
    return padded(np.concatenate(tokens), lengths, labels)


def collated_columns(rows: Sequence[dict[str, Any]]) -> Batch:
    """A batch from rows with `input_ids` and `label`."""
    return collated([(row["input_ids"], row["label"]) for row in rows])


def from_arrow(rows: Any) -> Batch:
    """A batch from an Arrow table or record batch with a list column `input_ids` and `label`."""
    import pyarrow as pa

    table = rows if isinstance(rows, pa.Table) else pa.Table.from_batches([rows])
    table = table.combine_chunks()
    tokens = table.column("input_ids").chunk(0)
    return padded(
        tokens.flatten().to_numpy(),
        np.diff(tokens.offsets.to_numpy()),
        table.column("label").to_numpy(),
    )
