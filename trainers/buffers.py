"""A model's buffers: put back where a step is undone; BatchNorm's the same on all ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


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


class SharedStatistics:
    """BatchNorm's running statistics, which a rank learns from its own rows, averaged over ranks.

    After each step, so that all ranks hold the same at any time: what is evaluated, saved and
    resumed is the average, and a save more or less changes nothing. (A running mean is linear in
    what it has seen: averaged only once, it would be the same but for rounding.)
    """

    def __init__(self, model: nn.Module, *, world_size: int) -> None:
        self._world_size = world_size
        self._modules = [
            module
            for module in model.modules()
            if isinstance(module, _BatchNorm) and module.track_running_stats
        ]

    @torch.no_grad()
    def average(self) -> None:
        """One all-reduce, of which the host does not wait for the device; called by all ranks.

        Nothing with one rank, or in a model without such statistics. Values that are equal on all
        ranks keep their bits: sums are float64. Batches are counted as the mean, rounded up, since
        a rank may have none in a step.
        """
        if self._world_size == 1 or not self._modules:
            return
        buffers = [buffer for m in self._modules for buffer in m.buffers(recurse=False)]
        mean = torch.cat([buffer.reshape(-1).double() for buffer in buffers])
        dist.all_reduce(mean)
        mean /= self._world_size
        sizes = [buffer.numel() for buffer in buffers]
        for buffer, part in zip(buffers, torch.split(mean, sizes), strict=True):
            values = part.ceil() if not buffer.is_floating_point() else part
            buffer.copy_(values.view_as(buffer))
