"""Optimizer, parameter groups and learning-rate schedules, from the job's `optimizer` part.

The learning rate is a pure function of the step, so a resume needs no scheduler state.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from jobs.errors import Problem, SpecError
from jobs.spec import Optimizer
from trainers.parallel import is_sharded


def build_optimizer(model: nn.Module, spec: Optimizer) -> torch.optim.Optimizer:
    """The optimizer over all parameters that require a gradient, in two groups.

    Matrices and embeddings decay; biases and normalisation weights, which have one dimension, do
    not (as in BERT's own training, Devlin et al. 2019). Of a model that is cut over the ranks it
    changes this rank's rows: the arithmetic is that of single numbers, and the fused kernels
    (aten._fused_sgd_ for one) do not know DTensors.
    """
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {
            "params": [(n, _held(p)) for n, p in trained if p.ndim > 1],
            "weight_decay": spec.weight_decay,
        },
        {"params": [(n, _held(p)) for n, p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    groups = [g for g in groups if g["params"]]
    optimizer: torch.optim.Optimizer
    if spec.kind == "adamw":
        optimizer = torch.optim.AdamW(
            groups, lr=spec.learning_rate, betas=spec.betas, eps=spec.epsilon, fused=True
        )
    else:
        optimizer = torch.optim.SGD(
            groups, lr=spec.learning_rate, momentum=spec.momentum, fused=True
        )
    _complete_state(optimizer)
    return optimizer


def _complete_state(optimizer: torch.optim.Optimizer) -> None:
    """Gives each parameter without a state the one that it has before its first step: zeros.

    The optimizers of torch make theirs in the first step, where memory that does not suffice for it
    would look like that of a micro-batch. The numbers are theirs; from momentum buffers of zeros a
    first step gives the gradient, as it does without a buffer, and one that is skipped leaves them.
    """
    names = sorted(_state_names(optimizer))
    for parameter in _parameters(optimizer):
        if names and not optimizer.state[parameter]:
            optimizer.state[parameter] = {
                name: torch.zeros((), device=parameter.device)
                if name == "step"
                else torch.zeros_like(parameter, memory_format=torch.preserve_format)
                for name in names
            }


def _held(parameter: nn.Parameter) -> nn.Parameter:
    """The parameter, or of one that is cut this rank's rows, in the same memory, which get each
    gradient as soon as it is reduced."""
    if not isinstance(parameter, DTensor):
        return parameter
    held = nn.Parameter(parameter.to_local().detach())

    def pass_on(whole: torch.Tensor) -> None:
        assert isinstance(whole.grad, DTensor)
        held.grad = whole.grad.to_local()

    parameter.register_post_accumulate_grad_hook(pass_on)  # type: ignore[no-untyped-call]
    return held


def clear_gradients(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Forgets all gradients: those of the model, and those that the optimizer was given."""
    optimizer.zero_grad(set_to_none=True)
    if is_sharded(model):  # the optimizer has its rows only
        model.zero_grad(set_to_none=True)


def learning_rate(spec: Optimizer, *, step: int, total_steps: int) -> float:
    """Learning rate of step `step` (the first is 0) of `total_steps`.

    Rises linearly over the warmup, of which the first step already trains, then keeps its height
    (constant), falls linearly, or falls as half a cosine (Loshchilov and Hutter, 2017) so that it
    would be 0 at `total_steps`.
    """
    if step < spec.warmup_steps:
        return spec.learning_rate * (step + 1) / (spec.warmup_steps + 1)
    if spec.schedule == "constant":
        return spec.learning_rate
    rest = max(1, total_steps - spec.warmup_steps)
    done = min(1.0, (step - spec.warmup_steps) / rest)
    if spec.schedule == "linear":
        return spec.learning_rate * (1.0 - done)
    return spec.learning_rate * 0.5 * (1.0 + math.cos(math.pi * done))


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Sets the rate of all groups."""
    for group in optimizer.param_groups:
        group["lr"] = value


def gradient_norm(parameters: Iterable[nn.Parameter], *, max_norm: float | None) -> torch.Tensor:
    """Global 2-norm of the gradients before they are clipped to `max_norm`; a scalar tensor.

    The same bits on all ranks: where the gradients are cut over them, the squares are all-reduced.
    """
    trained = [p for p in parameters if p.grad is not None]
    norm = nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    if max_norm is not None:
        nn.utils.clip_grads_with_norm_(trained, max_norm, norm)
    return norm


def update(optimizer: torch.optim.Optimizer, *, skipped: torch.Tensor) -> None:
    """One step of a fused optimizer, or none where `skipped` is 1: weights and state stay as bits.

    `skipped` is a float32 scalar, 0 or 1, on the device of the weights. The kernels look at it, as
    they do for torch's GradScaler (torch/amp/grad_scaler.py), so the host waits for nothing.
    """
    optimizer.found_inf = skipped  # type: ignore[attr-defined]
    optimizer.step()
    del optimizer.found_inf  # type: ignore[attr-defined]


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The optimizer's state as `parameter name/state name` -> tensor, without copies.

    Of parameters that are cut over the ranks, this rank's rows; scalars are equal on all ranks.
    """
    return {
        f"{name}/{key}": value
        for name, parameter in _named(optimizer).items()
        for key, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, torch.Tensor)
    }


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]
) -> None:
    """Puts back what `optimizer_tensors` gave.

    Raises SpecError where the tensors are another optimizer's, or those of parameters that are
    not trained now. A trained parameter without any begins anew.
    """
    trained = _named(optimizer)
    held: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        name, _, state = key.rpartition("/")
        held.setdefault(name, {})[state] = value
    own = _state_names(optimizer)
    if any(name not in trained or set(states) != own for name, states in held.items()) or (
        own and not held
    ):
        raise SpecError(
            Problem(
                "the checkpoint holds the state of another optimizer, or of parameters that are "
                "not trained now",
                "set optimizer.kind, optimizer.momentum and model.freeze as they were, or start a "
                "new run with model.source naming this run",
            )
        )
    optimizer.state.clear()
    for name, states in held.items():
        parameter = trained[name]
        # Also AdamW's `step`, a scalar, lies beside the parameter: that is so where it is fused.
        optimizer.state[parameter] = {
            state: value.to(parameter.device, copy=True) for state, value in states.items()
        }
    _complete_state(optimizer)


def _named(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """What the optimizer changes, by the names of the model's parameters, in its own order."""
    return {
        name: parameter
        for group in optimizer.param_groups
        for name, parameter in zip(group["param_names"], group["params"], strict=True)
    }


def _state_names(optimizer: torch.optim.Optimizer) -> set[str]:
    """What the optimizer keeps for each parameter."""
    if isinstance(optimizer, torch.optim.AdamW):
        return {"step", "exp_avg", "exp_avg_sq"}
    return {"momentum_buffer"} if optimizer.defaults["momentum"] else set()


def _parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]
