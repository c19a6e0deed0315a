"""What a safetensors file says of its tensors, and where they lie in it. Pure; needs no torch.

The format: the header's length (8 bytes, little-endian), the header (JSON: type, shape and place of
each tensor), then the tensors without gaps; https://github.com/huggingface/safetensors.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass

ITEM_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1,
    "BOOL": 1,
}  # fmt: skip
"""Bytes of one number of each type."""

_ALIGNMENT = 64
_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 100_000_000
"""As the safetensors library has it."""


@dataclass(frozen=True)
class Form:
    """What a file says of a tensor; where it lies follows."""

    dtype: str
    """As safetensors names it: F32."""
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return ITEM_BYTES[self.dtype] * math.prod(self.shape)


@dataclass(frozen=True)
class Place:
    """Bytes [start, stop) of a file."""

    start: int
    stop: int


def header_of(tensors: Mapping[str, Form]) -> tuple[bytes, dict[str, Place]]:
    """The length and the header as bytes, and where each tensor lies in the file, in its order.

    A function of names, types and shapes alone. Wider types come first, so that every tensor lies
    at a multiple of its item's size.
    """
    order = sorted(tensors, key=lambda name: (-ITEM_BYTES[tensors[name].dtype], name))
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offsets, end = dict[str, int](), 0
    for name in order:
        offsets[name], end = end, end + tensors[name].num_bytes
        entries[name] = {
            "dtype": tensors[name].dtype,
            "shape": list(tensors[name].shape),
            "data_offsets": [offsets[name], end],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(_LENGTH_BYTES + len(text)) % _ALIGNMENT)
    header = len(text).to_bytes(_LENGTH_BYTES, "little") + text
    begin = len(header)
    return header, {
        name: Place(begin + offset, begin + offset + tensors[name].num_bytes)
        for name, offset in offsets.items()
    }


def parse_header(begin: bytes | bytearray) -> dict[str, Place] | None:
    """Where each tensor lies in a file that begins so; None where more of it is needed to know.

    Raises ValueError where it is no safetensors file.
    """
    if len(begin) < _LENGTH_BYTES:
        return None
    length = int.from_bytes(begin[:_LENGTH_BYTES], "little")
    if length > _MAX_HEADER_BYTES:
        raise ValueError(f"a header of {length} bytes")
    data = _LENGTH_BYTES + length
    if len(begin) < data:
        return None
    try:
        entries = json.loads(begin[_LENGTH_BYTES:data])
        return {
            name: Place(*(data + int(offset) for offset in entry["data_offsets"]))
            for name, entry in entries.items()
            if name != "__metadata__"
        }
    except (KeyError, TypeError, AttributeError, UnicodeDecodeError) as error:
        raise ValueError("a header of another form") from error
