"""The state of a training at one moment, in buffers that are kept for the next moment.

    Snapshot.take         copies model and optimizer; training may go on when it returns
    TensorFile            one buffer: a whole safetensors file, whose tensors are copied into it

So the copy is the serialisation: what is uploaded are views of the buffers, and nothing is written
to a local disk. Buffers are pinned where the tensors come from a GPU.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from trainers.loop import Trainee
from trainers.optim import optimizer_tensors
from trainers.parallel import plain

WEIGHTS = "model/model.safetensors"
OPTIMIZER = "optimizer.safetensors"

_ALIGNMENT = 64
_LENGTH_BYTES = 8
_TYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class _Tensor:
    """What a file says of a tensor; where it lies follows."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)


class Snapshot:
    """Copies of a model's weights and an optimizer's state, as the files of a checkpoint."""

    def __init__(self) -> None:
        self._files: dict[str, TensorFile] = {}

    def take(self, trainee: Trainee) -> dict[str, memoryview]:
        """The files by their names in a checkpoint; valid until the next call.

        An optimizer without any state yet has no file.
        """
        model = plain(trainee.model)
        tensors = {
            WEIGHTS: saved_weights(model),
            OPTIMIZER: optimizer_tensors(trainee.optimizer),
        }
        held = {name: self._copied(name, own) for name, own in tensors.items() if own}
        if trainee.device.type == "cuda":
            torch.cuda.synchronize(trainee.device)
        return held

    def _copied(self, name: str, tensors: Mapping[str, torch.Tensor]) -> memoryview:
        file = self._files.get(name)
        if file is None or not file.fits(tensors):
            file = self._files[name] = TensorFile(tensors)
        file.copy(tensors)
        return file.data


class TensorFile:
    """A safetensors file in memory, laid out once for tensors of these names, types and shapes.

    The format: the header's length (8 bytes, little-endian), the header (JSON: type, shape and
    place of each tensor), then the tensors without gaps; https://github.com/huggingface/safetensors.
    Wider types come first, so that every tensor lies at a multiple of its item's size.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Raises ValueError for a type that the format, as far as it is known here, has not."""
        unknown = sorted({str(t.dtype) for t in tensors.values()} - set(map(str, _TYPE_NAMES)))
        if unknown:
            raise ValueError(f"tensors of {', '.join(unknown)} cannot be saved")
        self._layout = _layout_of(tensors)
        order = sorted(self._layout, key=lambda name: (-self._layout[name].dtype.itemsize, name))
        header, places = _header(self._layout, order)
        is_pinned = any(t.device.type == "cuda" for t in tensors.values())
        num_bytes = len(header) + sum(held.num_bytes for held in self._layout.values())
        self._buffer = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=is_pinned)
        self._buffer[: len(header)] = torch.frombuffer(bytearray(header), dtype=torch.uint8)
        self._views = {
            name: self._buffer[place : place + self._layout[name].num_bytes]
            .view(self._layout[name].dtype)
            .view(self._layout[name].shape)
            for name, place in places.items()
        }

    @property
    def data(self) -> memoryview:
        """The whole file; changes with the next copy."""
        whole: Any = self._buffer.numpy()
        return memoryview(whole)

    def fits(self, tensors: Mapping[str, torch.Tensor]) -> bool:
        """Whether these tensors are laid out as the file is."""
        return _layout_of(tensors) == self._layout

    @torch.no_grad()
    def copy(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Copies the tensors into the file; from a GPU without waiting for it."""
        for name, tensor in tensors.items():
            self._views[name].copy_(tensor, non_blocking=True)


def saved_weights(model: Any) -> dict[str, torch.Tensor]:
    """A Hugging Face model's tensors under the names that its `save_pretrained` writes, uncopied.

    As there (transformers/modeling_utils.py): without the keys that are not to be saved, one of
    each group of tied weights, and with the conversions undone that were made on loading.
    """
    state = model.state_dict()
    for key in getattr(model, "_keys_to_ignore_on_save", None) or ():
        state.pop(key, None)
    untied = remove_tied_weights_from_state_dict(state, model)
    reverted: dict[str, torch.Tensor] = revert_weight_conversion(model, untied)
    return reverted


def _layout_of(tensors: Mapping[str, torch.Tensor]) -> dict[str, _Tensor]:
    return {name: _Tensor(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


def _header(layout: Mapping[str, _Tensor], order: list[str]) -> tuple[bytes, dict[str, int]]:
    """The length and the header as bytes, and where each tensor begins in the file."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offsets, end = {}, 0
    for name in order:
        held = layout[name]
        offsets[name], end = end, end + held.num_bytes
        entries[name] = {
            "dtype": _TYPE_NAMES[held.dtype],
            "shape": list(held.shape),
            "data_offsets": [offsets[name], end],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(_LENGTH_BYTES + len(text)) % _ALIGNMENT)
    header = len(text).to_bytes(_LENGTH_BYTES, "little") + text
    return header, {name: len(header) + offset for name, offset in offsets.items()}
