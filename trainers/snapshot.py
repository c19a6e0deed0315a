"""The state of a training at one moment, in buffers that are kept for the next moment.

    Snapshot.take         copies model and optimizer; training may go on when it returns
    TensorFile            one buffer: a whole safetensors file, whose tensors are copied into it

So the copy is the serialisation: what is uploaded are views of the buffers, and nothing is written
to a local disk. Buffers are pinned where the tensors come from a GPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from trainers.layout import LAYOUT_NAME, WEIGHTS
from trainers.loop import Trainee
from trainers.state import forms_of, saved_state
from trainers.tensor_file import header_of


class Snapshot:
    """Copies of a model's weights and an optimizer's state, as the files of a checkpoint."""

    def __init__(self) -> None:
        self._files: dict[str, TensorFile] = {}

    def take(self, trainee: Trainee, *, whole: bool = False) -> dict[str, bytes | memoryview]:
        """This rank's files by their names in a checkpoint; valid until the next call.

        An optimizer without any state yet has no file. `whole`: as in `saved_state`.
        """
        state = saved_state(trainee, whole=whole)
        held: dict[str, bytes | memoryview] = {
            name: self._copied(name, own) for name, own in state.files.items()
        }
        for name, tensor in state.merged:
            self._files[WEIGHTS].copy({name: tensor})
        if trainee.device.type == "cuda":
            torch.cuda.synchronize(trainee.device)
        if state.layout is not None:
            held[LAYOUT_NAME] = state.layout.to_text()
        return held

    def _copied(self, name: str, tensors: Mapping[str, torch.Tensor]) -> memoryview:
        file = self._files.get(name)
        if file is None or not file.fits(tensors):
            file = self._files[name] = TensorFile(tensors)
        file.copy(tensors)
        return file.data


class TensorFile:
    """A safetensors file in memory, laid out once for tensors of these names, types and shapes."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Raises ValueError for a type that the format, as far as it is known here, has not."""
        self._forms = forms_of(tensors)
        header, places = header_of(self._forms)
        is_pinned = any(t.device.type == "cuda" for t in tensors.values())
        num_bytes = len(header) + sum(form.num_bytes for form in self._forms.values())
        self._buffer = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=is_pinned)
        self._buffer[: len(header)] = torch.frombuffer(bytearray(header), dtype=torch.uint8)
        self._views = {
            name: self._buffer[place.start : place.stop]
            .view(tensors[name].dtype)
            .view(tensors[name].shape)
            for name, place in places.items()
        }

    @property
    def data(self) -> memoryview:
        """The whole file; changes with the next copy."""
        whole: Any = self._buffer.numpy()
        return memoryview(whole)

    def fits(self, tensors: Mapping[str, torch.Tensor]) -> bool:
        """Whether these tensors are laid out as the file is."""
        return forms_of(tensors) == self._forms

    @torch.no_grad()
    def copy(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Copies the tensors into the file; from a GPU without waiting for it."""
        for name, tensor in tensors.items():
            self._views[name].copy_(tensor, non_blocking=True)
