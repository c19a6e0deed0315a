"""A job as a tree of plain values, as YAML and JSON hold it, and the `JobSpec` that it means."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from jobs.errors import Problem
from jobs.problems import Sources, problems_of
from jobs.spec import JobSpec, no_validation_set


def job_of(tree: Mapping[str, Any], sources: Sources) -> tuple[JobSpec | None, list[Problem]]:
    """The job of a tree, or None and everything that is wrong with it.

    What the values of `search.space` mean for the job is not looked at; see `jobs.study.space`.
    """
    try:
        return JobSpec.model_validate(_lists_as_tuples(tree)), []
    except ValidationError as error:
        problems = problems_of(error, sources)
    for needed_by in _needs_validation(tree):
        # Pydantic looks at rules across parts only where every part is right.
        unfit = no_validation_set(needed_by)
        across = Problem(f"{sources.where}: {unfit}", unfit.hint)
        problems += [] if across in problems else [across]
    return None, problems


def with_value(tree: Mapping[str, Any], path: str, value: object) -> dict[str, Any]:
    """The tree with another value for the key with that dotted path; the given one stays.

    A group on the way that is absent or null begins empty; anything else that is no group is
    replaced, and refused by `job_of`.
    """
    first, _, rest = path.partition(".")
    if not rest:
        return {**tree, first: value}
    held = tree.get(first)
    inner = with_value(held if isinstance(held, Mapping) else {}, rest, value)
    return {**tree, first: inner}


def value_at(tree: Mapping[str, Any], path: str) -> Any:
    """The value of the key with that dotted path; None where it or a group on the way is absent."""
    held: Any = tree
    for part in path.split("."):
        held = held.get(part) if isinstance(held, Mapping) else None
    return held


def _lists_as_tuples(value: Any) -> Any:
    """YAML and JSON know lists only; the spec holds tuples, because it is frozen."""
    if isinstance(value, Mapping):
        # A key that YAML reads as a number or as nothing is an unknown key like another.
        return {str(key): _lists_as_tuples(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return tuple(_lists_as_tuples(inner) for inner in value)
    return value


def _needs_validation(tree: Mapping[str, Any]) -> list[str]:
    """Keys of the tree that compare evaluations, where it has no validation set."""
    train, data, optimizer = tree.get("train"), tree.get("data"), tree.get("optimizer")
    if not isinstance(data, Mapping) or data.get("validation") is not None:
        return []
    stops = isinstance(train, Mapping) and train.get("early_stopping") is not None
    searches = tree.get("search") is not None
    waits = isinstance(optimizer, Mapping) and optimizer.get("schedule") == "plateau"
    return (
        ["optimizer.schedule plateau"] * waits
        + ["train.early_stopping"] * stops
        + ["search"] * searches
    )
