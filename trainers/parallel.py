"""Data parallelism and arithmetic: how the model is laid over the ranks, seeded, and computed.

shard        cuts the weights over the ranks (FSDP2), for models larger than one device
replicate    gives each rank all weights, and averages gradients (DDP)
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from jobs.errors import Problem, SpecError
from jobs.spec import Model

_MIB = 2**20


def shard(model: nn.Module, *, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The model, cut over all ranks: of each parameter a rank holds the rows of `layout.rows_of`.

    Weights stay float32. A block's weights are gathered in `dtype` for its forward and its backward
    pass and then freed, so that a device holds its shard, one or two blocks and what belongs to no
    block. Autocast would keep a copy of all blocks' weights from forward to backward; here the
    model casts by itself, and is not to be run under it. Gradients are summed in float32 and
    averaged over the ranks, as DDP does.

    Talks to no other rank; `model` lies on the CPU. Raises SpecError for a model that cannot be
    cut.
    """
    scalars = [name for name, parameter in model.named_parameters() if parameter.ndim == 0]
    if scalars:
        raise SpecError(
            Problem(
                f"workers.strategy is fsdp, but the parameter {scalars[0]} of this model is a "
                "single number, which FSDP2 does not cut",
                "set workers.strategy to ddp",
            )
        )
    mesh = DeviceMesh.from_group(dist.group.WORLD, device.type)  # type: ignore[arg-type]
    policy = (
        MixedPrecisionPolicy()
        if dtype == torch.float32
        else MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    )
    for block in blocks(model):
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    return model


def blocks(model: nn.Module) -> list[nn.Module]:
    """The repeated parts of a model, such as its transformer layers; outermost lists only."""
    found: list[nn.Module] = []

    def look(module: nn.Module) -> None:
        for child in module.children():
            with_weights = [c for c in child.children() if next(c.parameters(), None) is not None]
            if isinstance(child, nn.ModuleList) and len(with_weights) > 1:
                found.extend(with_weights)
            else:
                look(child)

    look(model)
    return found


def is_sharded(model: nn.Module) -> bool:
    """Whether the model is cut over the ranks: all of them must then run the same passes."""
    return isinstance(model, FSDPModule)


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank holds of a tensor, in the tensor's own memory: all of it, or its rows."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def replicate(
    model: nn.Module,
    *,
    device: torch.device,
    world_size: int,
    loss_of: Callable[[nn.Module], torch.Tensor],
) -> nn.Module:
    """The model on its device; with several ranks, one whose gradients are averaged over them.

    The gradient buckets have one layout from the first step on: DDP lays them out anew after its
    first backward pass, by the order in which gradients came, so that pass is made here, as in an
    evaluation, with `loss_of`, which gives the loss of rows that weigh nothing. Otherwise the first
    step after a resume would sum in another order than the steps of a run that goes on, and weights
    would no longer be bit-identical. A model of which some passes leave parameters unused keeps its
    first layout, and pays for looking for them in each step. Models of a few MiB and more get four
    buckets or more, so that reduction overlaps with the backward pass.

    With several ranks, called by all of them at the same point.
    """
    model = model.to(device)
    if world_size == 1:
        return model
    warnings.filterwarnings("ignore", message="find_unused_parameters=True was specified")
    # Its successor is not known to all versions of torch that are allowed.
    warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")
    trained = trained_parameters(model)
    was_training = model.training
    model.eval()  # draws nothing, counts nothing and compiles nothing
    loss_of(model).backward()  # type: ignore[no-untyped-call]
    leaves_some = _skips_layers(model) or any(p.grad is None for p in trained)
    model.zero_grad(set_to_none=True)
    replica = DistributedDataParallel(
        model,
        device_ids=[device] if device.type == "cuda" else None,
        broadcast_buffers=False,
        bucket_cap_mb=max(0.05, min(25.0, sum(p.nbytes for p in trained) / _MIB / 5)),
        gradient_as_bucket_view=True,
        find_unused_parameters=leaves_some,
    )
    replica.eval()
    if not leaves_some:
        loss_of(replica).backward()  # type: ignore[no-untyped-call]
        replica.zero_grad(set_to_none=True)
    replica.train(was_training)  # type: ignore[no-untyped-call]
    return replica


def _skips_layers(model: nn.Module) -> bool:
    """Whether training leaves out layers at random (LayerDrop, Fan et al. 2019)."""
    config = getattr(model, "config", None)
    held = vars(config) if config is not None else {}
    return any(name.endswith("layerdrop") and value for name, value in held.items())


def plain(model: nn.Module) -> nn.Module:
    """The model itself, without its replication."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def without_reduction(model: nn.Module) -> AbstractContextManager[None]:
    """A context in which backward passes add gradients up on this rank only.

    A sharded model reduces in every pass all the same: to add up unreduced gradients, each device
    would have to hold those of the whole model.
    """
    if isinstance(model, DistributedDataParallel):
        return model.no_sync()
    return contextlib.nullcontext()


def trained_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Parameters that require a gradient, in the model's order."""
    return [p for p in model.parameters() if p.requires_grad]


def compute_type(spec: Model, device: torch.device) -> torch.dtype:
    """Type of the forward and backward pass: model.precision on this device."""
    if spec.precision in ("float32", "tf32"):
        return torch.float32
    if spec.precision == "bfloat16":
        return torch.bfloat16
    has_bfloat16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
    return torch.bfloat16 if has_bfloat16 else torch.float32


@contextmanager
def float32_products(spec: Model, device: torch.device) -> Iterator[None]:
    """Inside the block this process multiplies and convolves float32 as model.precision says.

    With `tf32` on a GPU factors are rounded to TF32, which has 10 bits of mantissa for the 23 of
    float32; else they are not, as cuDNN would do by itself. Afterwards it is as before.
    """
    is_rounded = spec.precision == "tf32" and device.type == "cuda"
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if is_rounded else "highest")
    torch.backends.cudnn.allow_tf32 = is_rounded
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[None]:
    """A context that computes in `dtype`."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=dtype)


def seed_generators(*keys: int) -> None:
    """Sets torch's generators (dropout) from a tuple of non-negative integers.

    The state is a function of the keys alone, so a resumed run draws what an unbroken one would.
    """
    seed = int(np.random.SeedSequence(keys).generate_state(1, np.uint64)[0] >> 1)
    # What torch.manual_seed does for these devices; it takes a hundred times as long.
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.manual_seed_all(seed)
