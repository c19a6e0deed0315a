"""A model's buffers (BatchNorm's running statistics), put back where a step is undone."""

from __future__ import annotations

import torch
from torch import nn


class KeptBuffers:
    """Copies of a model's buffers, on their device, as they were before a step.

    All of them, each time: torch's kernels of BatchNorm change theirs without counting up the
    tensor's version, so nothing tells which have changed.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._copies: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def keep(self) -> None:
        """What the buffers hold now is what `put_back` gives back."""
        for name, buffer in self._model.named_buffers():
            copy = self._copies.get(name)
            if copy is None or copy.shape != buffer.shape:
                self._copies[name] = buffer.clone()
            else:
                copy.copy_(buffer)

    @torch.no_grad()
    def put_back(self, skipped: torch.Tensor) -> None:
        """Undoes what has changed since `keep` where `skipped`, a scalar on the device, is 1.

        The host does not wait for the device. A buffer that the forward pass has replaced by one
        of another size, or that an evaluation has made, is a cache, which no batch makes wrong.
        """
        undo = skipped.bool()
        for name, buffer in self._model.named_buffers():
            copy = self._copies.get(name)
            if copy is not None and copy.shape == buffer.shape and not buffer.is_inference():
                buffer.copy_(torch.where(undo, copy, buffer))
