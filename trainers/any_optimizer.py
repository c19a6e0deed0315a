"""Optimizers by their import path: found, given their arguments, and tried before the first step.

What a checkpoint saves and restores bit by bit is a state of tensors and numbers for each
parameter; an optimizer that needs a closure, or that keeps something elsewhere, is refused.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from jobs.errors import Problem, SpecError
from jobs.spec import Optimizer

States = tuple[set[str], set[str]]
"""Names of what is kept for a vector and for a matrix."""


def optimizer_by_path(spec: Optimizer, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """The optimizer that `optimizer.kind` names by its import path, over groups of parameters.

    Raises SpecError where there is none, where it does not take `optimizer.options`, or where its
    state could not be saved.
    """
    made = _class_of(spec.kind)
    _check_options(made, spec)
    try:
        tried_states(made(_samples(groups), lr=spec.learning_rate, **spec.options))
        optimizer: torch.optim.Optimizer = made(groups, lr=spec.learning_rate, **spec.options)
    except (TypeError, ValueError, RuntimeError) as error:
        raise SpecError(
            Problem(
                f"optimizer.kind is {spec.kind}, which cannot be made with optimizer.options "
                f"{dict(spec.options)}: {error}",
                f"its arguments are {inspect.signature(made)}",
            )
        ) from error
    return optimizer


def tried_states(optimizer: torch.optim.Optimizer) -> States:
    """What an optimizer of this kind, with these arguments, keeps for a vector and a matrix: found
    by a step of another one like it, of two small parameters."""
    kind = type(optimizer)
    arguments = inspect.signature(kind).parameters
    options = {k: v for k, v in optimizer.defaults.items() if k in arguments}
    parameters = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2, 2))]
    tried = kind(parameters, **options)
    before = _numbers(tried)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    try:
        tried.step()
    except TypeError as error:
        raise SpecError(
            Problem(
                f"optimizer.kind is {kind.__name__}, whose step needs a closure that computes the "
                "loss again",
                "name an optimizer without one, such as torch.optim.NAdam",
            )
        ) from error
    states = [tried.state.get(parameter, {}) for parameter in parameters]
    kept = [v for state in states for v in state.values()]
    if _numbers(tried) != before or not all(
        isinstance(v, torch.Tensor | int | float) for v in kept
    ):
        raise SpecError(
            Problem(
                f"optimizer.kind is {kind.__name__}, which keeps more than tensors and numbers for "
                "each parameter, so that a resumed run would not go on as it was",
                "name another optimizer, such as torch.optim.NAdam",
            )
        )
    return set(states[0]), set(states[1])


def _numbers(optimizer: torch.optim.Optimizer) -> list[Mapping[str, Any]]:
    """What the groups say besides their parameters."""
    return [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]


def _samples(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The groups with one small parameter each."""
    return [{**group, "params": [nn.Parameter(torch.ones(2, 2))]} for group in groups]


def _class_of(path: str) -> Any:
    module_name, _, name = path.rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise SpecError(
            Problem(
                f"optimizer.kind is {path}, but {module_name} cannot be imported: {error}",
                "install it for the workers, or name an optimizer of torch.optim",
            )
        ) from error
    found = getattr(module, name, None)
    if not (isinstance(found, type) and issubclass(found, torch.optim.Optimizer)):
        known = [
            key
            for key, value in vars(module).items()
            if isinstance(value, type) and issubclass(value, torch.optim.Optimizer)
        ]
        near = difflib.get_close_matches(name, known, n=3)
        raise SpecError(
            Problem(
                f"optimizer.kind is {path}, but {module_name} has no optimizer {name}",
                f"did you mean {' or '.join(f'{module_name}.{key}' for key in near)}?"
                if near
                else "name one of torch.optim, such as torch.optim.NAdam",
            )
        )
    return found


def _check_options(made: Any, spec: Optimizer) -> None:
    arguments = inspect.signature(made).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in arguments.values())
    problems = []
    for needed in ("lr", *(("weight_decay",) if _wants_decay(spec) else ())):
        if needed not in arguments and not takes_any:
            key = "learning_rate" if needed == "lr" else needed
            problems.append(
                Problem(
                    f"optimizer.kind is {spec.kind}, which has no {needed}, so that "
                    f"optimizer.{key} would be without effect",
                    "name another optimizer" if needed == "lr" else "set optimizer.weight_decay: 0",
                )
            )
    for name in spec.options:
        if name in arguments or takes_any:
            continue
        known = [key for key in arguments if key not in ("params", "lr", "weight_decay")]
        near = difflib.get_close_matches(name, known, n=3) or known
        problems.append(
            Problem(
                f"optimizer.options holds {name}, which {spec.kind} does not take",
                f"did you mean {' or '.join(near[:6])}?" if near else "remove it",
            )
        )
    if problems:
        raise SpecError(*problems)


def _wants_decay(spec: Optimizer) -> bool:
    return spec.weight_decay not in (0.0, Optimizer.model_fields["weight_decay"].default)
