"""Data parallelism and arithmetic: how the model is replicated, seeded, and run on a device."""

from __future__ import annotations

import contextlib
import warnings
from contextlib import AbstractContextManager

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from jobs.spec import Model

_MIB = 2**20


def replicate(model: nn.Module, *, device: torch.device, world_size: int) -> nn.Module:
    """The model on its device; with several ranks, one whose gradients are averaged over them.

    The gradient buckets have one layout from the first step on: with `find_unused_parameters` DDP
    does not rebuild them after the first backward pass. A rebuild would sum in another order than
    the first step after a resume does, and weights would no longer be bit-identical. Small models
    get smaller buckets, about four or more, so that reduction overlaps with the backward pass.
    """
    model = model.to(device)
    if world_size == 1:
        return model
    warnings.filterwarnings("ignore", message="find_unused_parameters=True was specified")
    # Its successor is not known to all versions of torch that are allowed.
    warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")
    trained_mib = sum(p.numel() * p.element_size() for p in trained_parameters(model)) / _MIB
    return DistributedDataParallel(
        model,
        device_ids=[device] if device.type == "cuda" else None,
        broadcast_buffers=False,
        bucket_cap_mb=max(0.05, min(25.0, trained_mib / 5)),
        gradient_as_bucket_view=True,
        find_unused_parameters=True,
    )


def plain(model: nn.Module) -> nn.Module:
    """The model itself, without its replication."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def without_reduction(model: nn.Module) -> AbstractContextManager[None]:
    """A context in which backward passes add gradients up on this rank only."""
    if isinstance(model, DistributedDataParallel):
        return model.no_sync()
    return contextlib.nullcontext()


def trained_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Parameters that require a gradient, in the model's order."""
    return [p for p in model.parameters() if p.requires_grad]


def compute_type(spec: Model, device: torch.device) -> torch.dtype:
    """Type of the forward and backward pass: model.precision on this device."""
    if spec.precision == "float32":
        return torch.float32
    if spec.precision == "bfloat16":
        return torch.bfloat16
    has_bfloat16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
    return torch.bfloat16 if has_bfloat16 else torch.float32


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[None]:
    """A context that computes in `dtype`."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=dtype)


def seed_generators(*keys: int) -> None:
    """Sets torch's generators (dropout) from a tuple of non-negative integers.

    The state is a function of the keys alone, so a resumed run draws what an unbroken one would.
    """
    torch.manual_seed(int(np.random.SeedSequence(keys).generate_state(1, np.uint64)[0] >> 1))
