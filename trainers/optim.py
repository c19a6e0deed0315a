"""Optimizer, parameter groups and learning-rate schedules, from the job's `optimizer` part.

The learning rate is a pure function of the step, and with plateau of how often evaluations have
lowered it, so a resume needs no scheduler's state.
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
from trainers.any_optimizer import States, optimizer_by_path, tried_states
from trainers.parallel import blocks, is_sharded

_SCALE = "rate_scale"
"""Of a group of parameters: its part of the learning rate."""
_NUMBERS = {bool: torch.int64, int: torch.int64, float: torch.float64}
_RISING_SHARE = 0.3
_FIRST_RATE = 1 / 25
_LAST_RATE = 1 / 250_000


def build_optimizer(model: nn.Module, spec: Optimizer) -> torch.optim.Optimizer:
    """The optimizer over all parameters that require a gradient.

    Matrices and embeddings decay; biases and normalisation weights, which have one dimension, do
    not (as in BERT's own training, Devlin et al. 2019). Of a model that is cut over the ranks it
    changes this rank's rows: the arithmetic is that of single numbers, and the fused kernels
    (aten._fused_sgd_ for one) do not know DTensors.

    Raises SpecError where the job names an optimizer that there is not, or that cannot be used.
    """
    groups = _groups(model, spec)
    if spec.kind not in ("adamw", "sgd", "adafactor"):
        return optimizer_by_path(spec, groups)
    if spec.kind == "adafactor":
        optimizer: torch.optim.Optimizer = torch.optim.Adafactor(groups, lr=spec.learning_rate)
    elif spec.kind == "adamw":
        optimizer = torch.optim.AdamW(
            groups, lr=spec.learning_rate, betas=spec.betas, eps=spec.epsilon, fused=True
        )
    else:
        optimizer = torch.optim.SGD(
            groups, lr=spec.learning_rate, momentum=spec.momentum, fused=True
        )
    _complete_state(optimizer)
    return optimizer


def _groups(model: nn.Module, spec: Optimizer) -> list[dict[str, Any]]:
    """Parameters that share their weight decay and their part of the learning rate."""
    scales = layer_scales(model, spec.layer_decay)
    groups: dict[tuple[float, bool], dict[str, Any]] = {}
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    for decays in (True, False):
        for name, parameter in trained:
            if (parameter.ndim > 1) != decays:
                continue
            scale = scales.get(name, 1.0)
            empty = {
                "params": [],
                "weight_decay": spec.weight_decay if decays else 0.0,
                _SCALE: scale,
            }
            group = groups.setdefault((scale, decays), empty)
            group["params"].append((name, _held(parameter)))
    return list(groups.values())


def layer_scales(model: nn.Module, decay: float) -> dict[str, float]:
    """The part of the learning rate that each parameter gets by its depth, by name.

    A model of L repeated blocks has 1 for what comes after them, as the head, decay ** (L - i) for
    block i = 0..L-1 and decay ** (L + 1) for what comes before them, as the embeddings: Clark et
    al., "ELECTRA", 2020. Raises SpecError for a model without such blocks.
    """
    if decay == 1.0:
        return {}
    found = blocks(model)
    if not found:
        raise SpecError(
            Problem(
                f"optimizer.layer_decay is {decay:g}, but this model has no list of repeated "
                "blocks, by which its depth is known",
                "remove optimizer.layer_decay",
            )
        )
    depths = {id(p): depth for depth, block in enumerate(found) for p in block.parameters()}
    scales, is_before = {}, True
    for name, parameter in model.named_parameters():
        depth = depths.get(id(parameter))
        is_before = is_before and depth is None
        if depth is not None:
            scales[name] = decay ** (len(found) - depth)
        elif is_before:
            scales[name] = decay ** (len(found) + 1)
    return scales


def _complete_state(optimizer: torch.optim.Optimizer) -> None:
    """Gives each parameter without a state the one that it has before its first step: zeros.

    The optimizers of torch make theirs in the first step, where memory that does not suffice for it
    would look like that of a micro-batch. The numbers are theirs; from momentum buffers of zeros a
    first step gives the gradient, as it does without a buffer, and one that is skipped leaves them.
    Of other optimizers than AdamW and SGD nobody knows it; they begin in their first step.
    """
    if not is_fused(optimizer):
        return
    names = sorted(_kept_names(optimizer)[0])
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


def learning_rate(spec: Optimizer, *, step: int, total_steps: int, reductions: int = 0) -> float:
    """Learning rate of step `step` (the first is 0) of `total_steps`.

    Rises linearly over the warmup, of which the first step already trains. Then it keeps its height
    (constant), falls linearly, or as half a cosine, once or in equal cycles (Loshchilov and Hutter,
    "SGDR", 2017), so that it would be 0 at `total_steps`, falls as 1 / sqrt(step) (Vaswani et al.,
    2017), or was lowered `reductions` times (plateau). one-cycle has no warmup: it rises as half a
    cosine and falls as another (Smith and Topin, "Super-Convergence", 2018).
    """
    if spec.schedule == "one-cycle":
        return spec.learning_rate * _one_cycle(spec, step=step, total_steps=total_steps)
    if step < spec.warmup_steps:
        return spec.learning_rate * (step + 1) / (spec.warmup_steps + 1)
    rest = max(1, total_steps - spec.warmup_steps)
    done = min(1.0, (step - spec.warmup_steps) / rest)
    match spec.schedule:
        case "constant":
            return spec.learning_rate
        case "linear":
            return spec.learning_rate * (1.0 - done)
        case "cosine":
            return spec.learning_rate * _half_cosine(done)
        case "cosine-restarts":
            cycle = done * spec.cycles
            return spec.learning_rate * (_half_cosine(cycle % 1.0) if done < 1.0 else 0.0)
        case "inverse-sqrt":
            return spec.learning_rate * math.sqrt((spec.warmup_steps + 1) / (step + 1))
        case "plateau":
            return float(spec.learning_rate * spec.plateau.factor**reductions)


def _half_cosine(done: float) -> float:
    """From 1 to 0."""
    return 0.5 * (1.0 + math.cos(math.pi * done))


def _one_cycle(spec: Optimizer, *, step: int, total_steps: int) -> float:
    """The part of the peak; the shares are those of torch's OneCycleLR."""
    rising = spec.warmup_steps or math.ceil(_RISING_SHARE * total_steps)
    if step < rising:
        return 1.0 - (1.0 - _FIRST_RATE) * _half_cosine(step / rising)
    done = min(1.0, (step - rising) / max(1, total_steps - rising))
    return _LAST_RATE + (1.0 - _LAST_RATE) * _half_cosine(done)


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Sets the rate of all groups, of each its part."""
    for group in optimizer.param_groups:
        group["lr"] = value * group[_SCALE]


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


def is_fused(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the device itself can leave out a step."""
    return bool(optimizer.defaults.get("fused"))


def update(optimizer: torch.optim.Optimizer, *, skipped: torch.Tensor) -> None:
    """One step, or none where `skipped` is 1: weights and state stay as bits.

    `skipped` is a float32 scalar, 0 or 1, on the device of the weights. The kernels of a fused
    optimizer look at it, as they do for torch's GradScaler (torch/amp/grad_scaler.py), so the host
    waits for nothing; for another one it waits.
    """
    if not is_fused(optimizer):
        if not skipped.item():
            optimizer.step()
        return
    optimizer.found_inf = skipped  # type: ignore[attr-defined]
    optimizer.step()
    del optimizer.found_inf  # type: ignore[attr-defined]


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The optimizer's state as `parameter name/state name` -> tensor, without copies.

    Numbers that are no tensors become some, under `parameter name/state name:int` or `:float`. Of
    parameters that are cut over the ranks, this rank's rows; scalars are equal on all ranks.
    """
    return {
        f"{name}/{key}{_mark(value)}": torch.as_tensor(value, dtype=_NUMBERS.get(type(value)))
        if not isinstance(value, torch.Tensor)
        else value
        for name, parameter in _named(optimizer).items()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def _mark(value: object) -> str:
    return "" if isinstance(value, torch.Tensor) else f":{type(value).__name__}"


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
    own = _kept_names(optimizer)
    if any(
        name not in trained
        or {state.partition(":")[0] for state in states} != own[trained[name].ndim > 1]
        for name, states in held.items()
    ) or (any(own) and not held):
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
        optimizer.state[trained[name]] = {
            state.partition(":")[0]: _loaded(state, value, optimizer, trained[name])
            for state, value in states.items()
        }
    _complete_state(optimizer)


def _loaded(
    state: str, value: torch.Tensor, optimizer: torch.optim.Optimizer, parameter: torch.Tensor
) -> torch.Tensor | int | float:
    name, _, kind = state.partition(":")
    if kind:
        number: int | float = value.item()
        return number
    # The step's number, a scalar, lies beside the parameter where the optimizer is fused only, as
    # torch's own Optimizer.load_state_dict has it.
    is_counted_by_host = name == "step" and not is_fused(optimizer)
    return value.to("cpu" if is_counted_by_host else parameter.device, copy=True)


def _named(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """What the optimizer changes, by the names of the model's parameters, in its own order."""
    return {
        name: parameter
        for group in optimizer.param_groups
        for name, parameter in zip(group["param_names"], group["params"], strict=True)
    }


def _kept_names(optimizer: torch.optim.Optimizer) -> States:
    """What the optimizer keeps for a vector and for a matrix."""
    if is_fused(optimizer) and isinstance(optimizer, torch.optim.AdamW):
        return ({"step", "exp_avg", "exp_avg_sq"},) * 2
    if is_fused(optimizer) and isinstance(optimizer, torch.optim.SGD):
        return ({"momentum_buffer"} if optimizer.defaults["momentum"] else set(),) * 2
    return tried_states(optimizer)


def _parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]
