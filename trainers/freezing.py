"""Which parameters are not trained."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from jobs.errors import Problem, SpecError
from trainers.module_paths import is_under, nearest


def freeze(model: nn.Module, patterns: Sequence[str]) -> None:
    """Switches off the gradient of every parameter whose path holds one of `patterns`.

    A pattern is as in `trainers.module_paths`: `embeddings` and `bert.emb*` match
    `bert.embeddings.word_embeddings.weight`. Raises SpecError where a pattern matches nothing, or
    nothing is left to train.
    """
    problems = []
    for pattern in patterns:
        held = [p for name, p in model.named_parameters() if is_under(name, pattern)]
        if not held:
            problems.append(_matches_nothing(model, pattern))
        for parameter in held:
            parameter.requires_grad_(False)
    if problems:
        raise SpecError(*problems)
    if not any(p.requires_grad for p in model.parameters()):
        raise SpecError(
            Problem(
                f"model.freeze is [{', '.join(patterns)}], which leaves no parameter to train",
                "leave the head out of model.freeze",
            )
        )


def _matches_nothing(model: nn.Module, pattern: str) -> Problem:
    near = nearest(pattern, [name for name, _ in model.named_modules() if name])
    known = ", ".join(name for name, _ in model.named_children())
    return Problem(
        f"model.freeze holds {pattern}, which no parameter of this model is under",
        f"did you mean {' or '.join(near)}?" if near else f"the model's parts are {known}",
    )
