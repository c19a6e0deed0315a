"""How the values of the next trial are chosen.

A sampler's state comes from the events that it has observed, and from nothing else; what it draws
at random is keyed by the study's seed and the trial's number. So whoever observes the same events
asks for the same values, as after a driver was killed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Protocol

from jobs.search_spec import Search
from jobs.study.events import Asked, Event, Values
from jobs.study.keyed import keyed
from jobs.study.space import Choices, Key, Space


class Sampler(Protocol):
    """Chooses values. Of a study that has got another space, make a new one for the new space, and
    have it observe all events: it leaves out values that the space does not hold."""

    def observe(self, event: Event) -> None:
        """Takes in one event; each once, in the order of the log."""

    def ask(self, trial: int) -> Values | None:
        """Values for the trial of that number; None: there is nothing left to try.

        Changes nothing: asked again before the next event, the same trial gets the same values.
        """


def make_sampler(search: Search, space: Space, seed: int) -> Sampler:
    """The sampler of `search.algorithm`."""
    # Optuna and cmaes are not in every installation, and heavy.
    match search.algorithm.kind:
        case "random":
            return RandomSampler(space, seed)
        case "grid":
            return GridSampler(space)
        case "cmaes":
            from jobs.study.cmaes_sampler import CMAESSampler

            return CMAESSampler(search, search.algorithm, space, seed)
        case "tpe":
            from jobs.study.optuna_samplers import tpe_sampler

            return tpe_sampler(search, search.algorithm, space, seed)
        case "gp":
            from jobs.study.optuna_samplers import gp_sampler

            return gp_sampler(search, search.algorithm, space, seed)


def draw(key: Key, seed: int, trial: int) -> Any:
    """A value of a key at random, which depends on no other key and no other trial."""
    return key.over.at(keyed(seed, f"draw {key.path}", trial).random())


class RandomSampler:
    """Random search (Bergstra and Bengio, 2012)."""

    def __init__(self, space: Space, seed: int) -> None:
        self._space = space
        self._seed = seed

    def observe(self, event: Event) -> None:
        """Nothing is learned."""

    def ask(self, trial: int) -> Values | None:
        """A draw from each active key's distribution."""
        return self._space.fill(lambda key: draw(key, self._seed, trial))


class GridSampler:
    """All combinations of the values listed, once, the last key changing fastest.

    A key that is not active multiplies nothing.
    """

    def __init__(self, space: Space) -> None:
        self._combinations = _combinations(space.keys, {})
        self._next = next(self._combinations, None)
        self._tried: set[str] = set()

    def observe(self, event: Event) -> None:
        """Remembers the combinations that have become trials."""
        if isinstance(event, Asked):
            self._tried.add(json.dumps(event.values, sort_keys=True))

    def ask(self, trial: int) -> Values | None:
        """The first combination that has not become a trial; None after the last."""
        while self._next is not None and json.dumps(self._next, sort_keys=True) in self._tried:
            self._next = next(self._combinations, None)
        return self._next


def _combinations(keys: tuple[Key, ...], values: Values) -> Iterator[Values]:
    if not keys:
        yield values
        return
    key, *rest = keys
    if not key.is_active(values):
        yield from _combinations(tuple(rest), values)
        return
    assert isinstance(key.over, Choices)
    for value in key.over.values:
        yield from _combinations(tuple(rest), {**values, key.path: value})
