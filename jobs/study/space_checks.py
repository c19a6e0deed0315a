"""What is wrong with a job's `search.space`, found by building the jobs that its values make."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from itertools import combinations
from typing import Any

from jobs.errors import Problem
from jobs.problems import Sources
from jobs.schema import expected, field_schema, keys_of, known_paths
from jobs.search_spec import LISTS, RECOMMENDED, Distribution
from jobs.spec import JobSpec
from jobs.study.events import Values
from jobs.study.space import Choices, Key, Range, Space, conditions, parents_first, space_of
from jobs.tree import job_of, with_value

_SAME_TASK = "scores of trials that learn something else cannot be compared"
_SAME_ROWS = "scores on other rows cannot be compared"
_NO_EFFECT = "it does not change what is learned"

_FIXED = {
    "name": "it names the run",
    "task.kind": _SAME_TASK,
    "task.labels": _SAME_TASK,
    "task.text": _SAME_TASK,
    "task.label": _SAME_TASK,
    "data.train": _SAME_ROWS,
    "data.validation": _SAME_ROWS,
    "data.test": _SAME_ROWS,
    "data.access": _SAME_ROWS,
    "data.seed": "search.repeats and search.finalists train the same values with several seeds",
    "data.stream_memory": _NO_EFFECT,
    "data.cache_gib": _NO_EFFECT,
    "train.evaluate_every_steps": _NO_EFFECT,
    "train.early_stopping": "how long a trial goes on is for search.scheduler to say",
    "train.log_every_steps": _NO_EFFECT,
    "train.max_skipped_in_a_row": _NO_EFFECT,
    "train.log_rows": _NO_EFFECT,
    "checkpoint": "a trial keeps its last checkpoint and its best",
    "workers": "how many trials run at a time follows from the workers that each of them has",
    "retries": _NO_EFFECT,
    "store": "the trials of a study are kept in its folder",
    "store_lease": "the trials of a study are kept in its folder",
    "cluster": "all trials of a study run on one cluster",
    "tracking": _NO_EFFECT,
    "search": "it is what searches",
}
"""Keys, with all below them, that are the same for all trials, and why."""


def space_problems(spec: JobSpec, sources: Sources) -> list[Problem]:
    """Everything that is wrong with the space of a job; empty without a search.

    Each key is tried with the ends of its range and with all of its choices; then each two keys
    together of which one has choices, because rules of the job file bind such keys to each other.
    """
    if spec.search is None:
        return []
    given = spec.search.space
    if not given:
        return [
            Problem(
                f"{sources.of(('search', 'space'))}: search.space holds no key",
                f"write space: {RECOMMENDED}, or for example "
                "space: {optimizer.learning_rate: {loguniform: [1e-6, 1e-3]}}",
            )
        ]
    problems = [
        Problem(f"{_lead(path, sources)} {message}", hint)
        for path, over in given.items()
        for message, hint in [*_key_problems(path), *_condition_problems(path, over, given)]
    ]
    if not problems:
        problems = list(_circle(given, sources))
    if problems:
        return problems
    space = space_of(spec)
    trials = _Trials(spec.model_dump(mode="json", exclude={"search"}), space, sources)
    return list(trials.single_problems()) or list(trials.pair_problems())


def _lead(path: str, sources: Sources) -> str:
    return f"{sources.of(('search', 'space', path))}: search.space.{path}"


def _key_problems(path: str) -> Iterator[tuple[str, str]]:
    """(what follows the key's name, hint) of a key that cannot be searched whatever its values."""
    for fixed, why in _FIXED.items():
        if path == fixed or path.startswith(f"{fixed}."):
            yield f"cannot be searched: {why}", f"set {path} in the job itself"
            return
    keys = keys_of(field_schema(path.split(".")) or {})
    if keys:
        leaves = [leaf for leaf in known_paths() if leaf.startswith(f"{path}.")]
        yield "is a group of keys", f"search the keys in it, such as {leaves[0]}"


def _condition_problems(
    path: str, over: Distribution, given: Mapping[str, Distribution]
) -> Iterator[tuple[str, str]]:
    for other, wanted in (over.when or {}).items():
        if other not in given:
            yield (
                f"depends on {other}, which is not searched",
                f"add {other} to search.space, or remove it from when",
            )
        elif given[other].way not in LISTS:
            yield (
                f"depends on {other}, which is given by {given[other].way}",
                f"give {other} as choice: [...], or remove it from when",
            )
        else:
            choices = Choices(tuple(conditions(given[other].values).values))
            for value in conditions(wanted).values:
                if not choices.holds(value):
                    yield (
                        f"depends on {other} being {_shown(value)}, which it never is",
                        f"name one of {', '.join(map(_shown, choices.values))}",
                    )


def _circle(given: Mapping[str, Distribution], sources: Sources) -> Iterator[Problem]:
    _, circle = parents_first(given)
    if circle:
        yield Problem(
            f"{_lead(circle[0], sources)} depends on itself, by way of when of "
            f"{' and '.join(circle)}",
            f"remove when from {circle[0]}",
        )


class _Trials:
    """Jobs of a space, built to see whether they can be."""

    def __init__(self, tree: Mapping[str, Any], space: Space, sources: Sources) -> None:
        self._tree = tree
        self._keys = {key.path: key for key in space.keys}
        self._space = space
        self._sources = sources

    def single_problems(self) -> Iterator[Problem]:
        """The first problem of each key, among the jobs with each of its values."""
        for key in self._keys.values():
            if next(self._contexts({key.path: None}), None) is None:
                yield Problem(
                    f"{_lead(key.path, self._sources)} is never searched: its when never holds",
                    "remove one of the keys from when",
                )
                continue
            for value in key.over.values if isinstance(key.over, Choices) else key.over.ends:
                problem = self._problem({key.path: value}, _lead(key.path, self._sources))
                if problem is not None:
                    yield self._with_hint(problem, key)
                    break

    def pair_problems(self) -> Iterator[Problem]:
        """A problem for each two keys of which some values cannot go together."""
        for one, other in combinations(self._keys.values(), 2):
            if isinstance(one.over, Choices) or isinstance(other.over, Choices):
                yield from self._pair_problem(one, other)

    def _pair_problem(self, one: Key, other: Key) -> Iterator[Problem]:
        where = self._sources.of(("search", "space"))
        for value in _samples(one):
            for other_value in _samples(other):
                both = {one.path: value, other.path: other_value}
                problem = self._problem(both, where)
                if problem is None:
                    continue
                named = " and ".join(f"{path} {_shown(v)}" for path, v in both.items())
                reason = problem.message.removeprefix(f"{where}: ")
                yield Problem(
                    f"{where}: search.space allows {named}, which cannot go together: {reason}",
                    self._condition_hint(one, other),
                )
                return

    def _with_hint(self, problem: Problem, key: Key) -> Problem:
        """The problem of one value of a key, with what to type where it is of several."""
        if ", but must be " in problem.message:
            wanted = expected(field_schema(key.path.split(".")) or {})
            broken = isinstance(key.over, Range) and isinstance(key.over.ends[0], float)
            if broken and "whole number" in wanted:
                return Problem(problem.message, "write integer or log-integer: [low, high]")
            return Problem(problem.message, f"give it only values that are {wanted}")
        hints = (self._condition(other, key) for other in self._keys.values() if other != key)
        return Problem(problem.message, next(filter(None, hints), problem.hint))

    def _condition_hint(self, one: Key, other: Key) -> str:
        """What to type so that two keys never have values that cannot go together."""
        condition = self._condition(one, other) or self._condition(other, one)
        return condition or f"take {other.path} out of search.space"

    def _condition(self, parent: Key, child: Key) -> str | None:
        """The `when` that has the child searched only beside values that all of its own suit."""
        if not isinstance(parent.over, Choices):
            return None
        suited = [
            value
            for value in parent.over.values
            if not any(
                self._problem({parent.path: value, child.path: tried}, "")
                for tried in _samples(child)
            )
        ]
        shown = ", ".join(map(_shown, suited))
        wanted = shown if len(suited) == 1 else f"[{shown}]"
        return f"add to {child.path} when: {{{parent.path}: {wanted}}}" if suited else None

    def _problem(self, values: Values, where: str) -> Problem | None:
        """What is wrong with a job that has these values, and those that make them active."""
        whole = next(self._contexts(values), None)
        if whole is None:
            return None  # no trial has them together
        tree = self._tree
        for path, value in whole.items():
            tree = with_value(tree, path, value)
        _, problems = job_of(tree, Sources(where))
        return problems[0] if problems else None

    def _contexts(self, fixed: Mapping[str, Any]) -> Iterator[Values]:
        """Values of the keys in `fixed` and of all that they depend on, with all of them active.

        A value None in `fixed` stands for any.
        """
        needed = set(fixed)
        for key in reversed(self._space.keys):
            if key.path in needed:
                needed |= {path for path, _ in key.when}
        keys = [key for key in self._space.keys if key.path in needed]
        for values in _assignments(keys, {}, fixed):
            if fixed.keys() <= values.keys():
                yield values


def _assignments(keys: list[Key], values: Values, fixed: Mapping[str, Any]) -> Iterator[Values]:
    if not keys:
        yield values
        return
    key, *rest = keys
    if not key.is_active(values):
        yield from _assignments(rest, values, fixed)
        return
    given = fixed.get(key.path)
    for value in (given,) if key.path in fixed else _samples(key):
        yield from _assignments(rest, {**values, key.path: value}, fixed)


def _samples(key: Key) -> tuple[Any, ...]:
    """The values of a key by which it is tried beside others: of numbers, the ends."""
    if isinstance(key.over, Range):
        return key.over.ends
    numbers = [v for v in key.over.values if isinstance(v, int | float) and v not in (True, False)]
    ends = {min(numbers), max(numbers)} if numbers else set()
    return tuple(v for v in key.over.values if v not in numbers or v in ends)


def _shown(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)
