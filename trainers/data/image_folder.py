"""Images in one folder for each class: SOURCE/cat/1.png has the label `cat`."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa

from cluster.storage import Head, Store, join_uri
from jobs.errors import DataError, Problem
from trainers.data.sources import SourceBatch, files_identity

IMAGE_TYPE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
"""As `datasets` stores images: the file's bytes and its name."""

_BATCH_BYTES = 16 * 2**20
_BATCH_IMAGES = 512
_READERS = 8


class ImageFolder:
    """Columns `image` (bytes and path) and `label` (the folder's name), in order of the paths."""

    kind = "images"
    schema = pa.schema([("image", IMAGE_TYPE), ("label", pa.string())])

    def __init__(self, *, uri: str, store: Store, heads: Sequence[Head]) -> None:
        for head in heads:
            depth = head.key.count("/")
            if depth != 1:
                raise _misplaced(uri, head.key)
        self.uri = uri
        self._store, self._heads = store, heads
        self.bytes_read = 0

    @property
    def identity(self) -> object:
        return files_identity(self._store, self._heads)

    @property
    def files(self) -> Iterator[str]:
        return (join_uri(self._store.uri, head.key) for head in self._heads)

    @property
    def num_bytes(self) -> int:
        return sum(head.num_bytes for head in self._heads)

    def batches(self, columns: Sequence[str]) -> Iterator[SourceBatch]:
        self.bytes_read = 0
        with ThreadPoolExecutor(_READERS) as readers:
            for heads in _batched(self._heads):
                labels = [head.key.split("/")[0] for head in heads]
                arrays = {"label": pa.array(labels, pa.string())}
                if "image" in columns:
                    # A pass that only counts labels reads no image.
                    images = [
                        {"bytes": data, "path": head.key}
                        for head, data in zip(
                            heads,
                            readers.map(self._store.read, [h.key for h in heads]),
                            strict=True,
                        )
                    ]
                    arrays["image"] = pa.array(images, IMAGE_TYPE)
                self.bytes_read += sum(head.num_bytes for head in heads)
                yield SourceBatch(
                    table=pa.table([arrays[name] for name in columns], names=list(columns)),
                    file=join_uri(self._store.uri, heads[0].key),
                    first_row=1,
                )


def check_images(column: pa.ChunkedArray) -> None:
    """Decode every image of a column; DataError names the first that cannot be."""
    from PIL import Image

    for chunk in column.chunks:
        paths, images = chunk.field("path").to_pylist(), chunk.field("bytes").to_pylist()
        for path, data in zip(paths, images, strict=True):
            try:
                with Image.open(io.BytesIO(data or b"")) as image:
                    image.load()
            except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
                # PIL raises SyntaxError for broken PNG chunks.
                reason = "it is empty" if not data else str(error).split("<_io")[0].strip()
                raise DataError(
                    Problem(f"{path} is no readable image: {reason}", "remove it, or replace it")
                ) from error


def _batched(heads: Sequence[Head]) -> Iterator[list[Head]]:
    batch: list[Head] = []
    size = 0
    for head in heads:
        if batch and (size + head.num_bytes > _BATCH_BYTES or len(batch) == _BATCH_IMAGES):
            yield batch
            batch, size = [], 0
        batch.append(head)
        size += head.num_bytes
    if batch:
        yield batch


def _misplaced(uri: str, key: str) -> DataError:
    place = uri.rstrip("/")
    if "/" not in key:
        return DataError(
            Problem(
                f"{uri}: the image {key} lies in no folder of a class",
                f"put each image into the folder of its class, such as {place}/cat/{key}",
            )
        )
    first = key.split("/")[0]
    return DataError(
        Problem(
            f"{uri}: the image {key} lies more than one folder deep",
            f"name the folder of the classes: shoal prepare {place}/{first} --to URI",
        )
    )
