"""What the headers of safetensors files say: names and shapes of tensors, and whether any is cut.

The format: https://github.com/huggingface/safetensors#format (eight bytes, little-endian: the
length of the header; a JSON header; the tensors' bytes).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass

from cluster.storage import Store
from jobs.errors import DataError, Problem
from jobs.spec import format_bytes

_LENGTH_BYTES = 8
_MOST_HEADER_BYTES = 100_000_000
"""As the format limits it."""


@dataclass(frozen=True)
class Weights:
    """The tensors of a model."""

    shapes: dict[str, tuple[int, ...]]
    num_bytes: int
    """Of the files."""

    @property
    def num_parameters(self) -> int:
        return sum(map(self.size, self.shapes))

    def size(self, name: str) -> int:
        """Numbers of one tensor."""
        return math.prod(self.shapes[name])


def weight_files(names: Mapping[str, int]) -> list[str]:
    """The safetensors files among a folder's files."""
    return sorted(name for name in names if name.endswith(".safetensors"))


def read_weights(store: Store, files: Mapping[str, int]) -> Weights:
    """The tensors of all safetensors files of the folder `store`; reads their headers only.

    Raises DataError for a file that is none, or that is cut off.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for name in weight_files(files):
        shapes |= _read_header(store, name, num_bytes=files[name])
    return Weights(shapes, sum(files[name] for name in weight_files(files)))


def _read_header(store: Store, name: str, *, num_bytes: int) -> dict[str, tuple[int, ...]]:
    where = f"{store.uri}/{name}"
    if num_bytes < _LENGTH_BYTES:
        raise _broken(where, f"it has only {num_bytes} bytes")
    length = int.from_bytes(store.read_range(name, start=0, end=_LENGTH_BYTES), "little")
    if length > min(_MOST_HEADER_BYTES, num_bytes - _LENGTH_BYTES):
        raise _broken(where, "it does not begin as such a file does")
    header = store.read_range(name, start=_LENGTH_BYTES, end=_LENGTH_BYTES + length)
    try:
        tensors = {k: v for k, v in json.loads(header).items() if k != "__metadata__"}
        end = max((int(tensor["data_offsets"][1]) for tensor in tensors.values()), default=0)
        shapes = {key: tuple(map(int, tensor["shape"])) for key, tensor in tensors.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _broken(where, "its header cannot be read") from error
    whole = _LENGTH_BYTES + length + end
    if whole != num_bytes:
        raise _broken(
            where, f"it has {format_bytes(num_bytes)}, its header speaks of {format_bytes(whole)}"
        )
    return shapes


def _broken(where: str, why: str) -> DataError:
    return DataError(
        Problem(f"{where} is no whole safetensors file: {why}", "copy the model's folder again")
    )
