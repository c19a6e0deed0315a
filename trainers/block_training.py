"""How a model's repeated blocks run in training: compiled, or with activations computed twice.

    adapt_blocks        lays both around the blocks' own forward, as the job says
    compiler_settings   what the compiler needs to know, while a run lasts
    compile_ahead       compiles before the first step, always for the same shapes

What is laid around a block lies inside of what DDP and FSDP2 add to it: hooks see the block as it
was, parameters keep their names, and so do checkpoints. In evaluations blocks run as they are: what
is measured is the model that a checkpoint holds.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from jobs.errors import EnvironmentFault, Problem, SpecError
from jobs.spec import Model
from trainers.cpp_compiler import lacks_compiler
from trainers.loop import Trainee
from trainers.microbatch import Cutting
from trainers.parallel import blocks
from trainers.spare_passes import spare_passes
from trainers.tasks.task import Batch

_MOST_VARIANTS = 64
"""Of a block's compiled code, by what is no size: whether there is a mask, is one row, is frozen...
Further ones run uncompiled."""
_AHEAD_ROWS, _AHEAD_TOKENS = 11, 29
"""A small micro-batch whose sizes are none of a model's own, which the compiler would take them
for."""


def adapt_blocks(model: nn.Module, spec: Model) -> None:
    """Has the repeated blocks (`parallel.blocks`) run in training as the job says.

    `compile`: all blocks of a kind share what is compiled, for sizes that vary.
    `activation_checkpointing`: of a block its inputs alone are kept for the backward pass, which
    computes the rest again, with the same dropout: Chen et al., "Training Deep Nets with Sublinear
    Memory Cost", 2016.

    Called before the model is replicated or cut. Raises SpecError for a model with which it cannot
    work, EnvironmentFault where this machine has no compiler.
    """
    asked = [key for key in ("compile", "activation_checkpointing") if getattr(spec, key)]
    found = blocks(model) if asked else []
    if asked and not found:
        raise SpecError(
            *(
                Problem(
                    f"model.{key} is true, but this model has no list of repeated blocks, on which "
                    "it works",
                    f"remove model.{key}",
                )
                for key in asked
            )
        )
    if spec.activation_checkpointing and any(
        isinstance(module, _BatchNorm) for block in found for module in block.modules()
    ):
        raise SpecError(
            Problem(
                "model.activation_checkpointing is true, but the blocks of this model have "
                "BatchNorm, whose statistics would count each batch twice",
                "remove model.activation_checkpointing",
            )
        )
    if spec.compile and (lacking := lacks_compiler()) is not None:
        raise EnvironmentFault(lacking)
    for block in found:
        _adapt(block, spec)


def _adapt(block: nn.Module, spec: Model) -> None:
    whole = block.forward
    computed = torch.compile(whole, dynamic=True) if spec.compile else whole

    def forward(*inputs: Any, **keys: Any) -> Any:
        if not block.training:
            return whole(*inputs, **keys)
        if spec.activation_checkpointing:
            return checkpoint(computed, *inputs, use_reentrant=False, **keys)
        return computed(*inputs, **keys)

    block.forward = forward


@contextmanager
def compiler_settings(spec: Model) -> Iterator[None]:
    """Inside the block this thread compiles for a model that `adapt_blocks` has made.

    Afterwards what was compiled is forgotten: by what sizes a process meets first the next model
    would be compiled otherwise, and the number of variants is that of all models.
    """
    if not spec.compile:
        yield
        return
    import torch._dynamo  # takes seconds to load

    with torch._dynamo.config.patch(
        recompile_limit=_MOST_VARIANTS,
        # A block's gradients come together anyway: cut at the borders of DDP's buckets, blocks
        # would no longer be alike.
        optimize_ddp=False,
    ):
        try:
            yield
        finally:
            torch._dynamo.reset()


def compile_ahead(trainee: Trainee, cutting: Cutting, *, most_row_tokens: int) -> None:
    """Compiles by passes over several rows, over rows of which one is padded, and over one row.

    How a sum is shared out to threads is decided by the sizes that the compiler meets first. They
    are the same at each start, whatever a micro-batch may hold by then, so that a resumed run adds
    up as the one before. Called by all ranks
    at the same point; raises MicrobatchTooLarge, on this rank alone, where memory runs out.
    """
    rows, tokens = _AHEAD_ROWS, max(2, min(_AHEAD_TOKENS, most_row_tokens))
    if rows == tokens:  # would be taken for one size
        tokens -= 1
    task = trainee.task
    with spare_passes(trainee, cutting, rows=rows, tokens=tokens) as run:
        run(task.empty_batch(rows=rows, tokens=tokens))
        run(_with_padding(task.empty_batch(rows=rows, tokens=tokens)))
        run(task.empty_batch(rows=1, tokens=tokens))


def _with_padding(batch: Batch) -> Batch:
    """The batch with a last row of one token, where it has a mask."""
    if "attention_mask" in batch:
        batch["attention_mask"][-1, 1:] = 0
    return batch
