"""CMA-ES: a normal distribution over the numbers of a space, moved to where trials are good."""

from __future__ import annotations

import math
from typing import Any

import cmaes
import numpy as np

from jobs.search_spec import CMAESSearch, Search
from jobs.study.events import Asked, Event, Values
from jobs.study.keyed import keyed, keyed_seed
from jobs.study.samplers import draw
from jobs.study.score import WORST
from jobs.study.space import Key, Range, Space
from jobs.study.tried import History, Tried

_SIGMA = 1 / 6
"""Standard deviation at the start, on the unit interval of each key, as Optuna has it."""


class CMAESSampler:
    """CMA-ES (Hansen, 2016) on the unit cube of the numbers that every trial has; choices and
    conditional keys are drawn at random.

    A generation ends when as many of its trials as the population has are decided; what is decided
    later, of a generation that has ended, is not learned from. A trial counts once, with its score
    when it is stopped, finished, or waits for the first time. When the distribution has settled, it
    starts anew at a random place with twice the population (Auger and Hansen, 2005).
    """

    def __init__(self, search: Search, algorithm: CMAESSearch, space: Space, seed: int) -> None:
        self._space = space
        self._seed = seed
        self._history = History(search, space)
        self._repeats = search.repeats
        self._numbers = [k for k in space.keys if isinstance(k.over, Range) and not k.when]
        self._population = algorithm.population
        self._restarts = 0
        self._generation = 0
        self._asked_in: dict[int, int] = {}
        """Generation of the trials that have not counted yet."""
        self._told: list[tuple[np.ndarray[Any, Any], float]] = []
        """Place and score of the trials of this generation that have counted."""
        self._optimizer = self._start(np.full(len(self._numbers), 0.5))

    def observe(self, event: Event) -> None:
        """Moves the distribution when a generation is complete."""
        tried = self._history.observe(event)
        if tried is None:
            return
        if isinstance(event, Asked) and event.trial == tried.trial:
            self._asked_in[tried.trial] = self._generation
        if self._is_decided(tried) and tried.trial in self._asked_in:
            generation = self._asked_in.pop(tried.trial)
            if generation == self._generation and tried.score is not None:
                places = [k.over.unit(tried.values[k.path]) for k in self._numbers]
                self._told.append((np.array(places), tried.score))
        if len(self._told) == self._optimizer.population_size:
            self._end_generation()

    def ask(self, trial: int) -> Values | None:
        """A draw from the distribution."""
        self._optimizer.reseed_rng(keyed_seed(self._seed, "cmaes", trial))
        places = dict(zip([k.path for k in self._numbers], self._optimizer.ask(), strict=True))

        def choose(key: Key) -> Any:
            if key.path in places:
                return key.over.at(float(places[key.path]))
            return draw(key, self._seed, trial)

        return self._space.fill(choose)

    def _is_decided(self, tried: Tried) -> bool:
        known = tried.progress.values()
        return len(known) == self._repeats and all(p.is_decided for p in known)

    def _end_generation(self) -> None:
        worst = min((score for _, score in self._told if score != WORST), default=0.0)
        self._optimizer.tell([(place, -max(score, worst)) for place, score in self._told])
        self._told = []
        self._generation += 1
        if self._optimizer.should_stop():
            self._restarts += 1
            generator = keyed(self._seed, "cmaes restart", self._restarts)
            self._optimizer = self._start(generator.random(len(self._numbers)))

    def _start(self, mean: np.ndarray[Any, Any]) -> cmaes.CMA:
        dimensions = len(self._numbers)
        population = self._population or 4 + math.floor(3 * math.log(dimensions))
        return cmaes.CMA(
            mean=mean,
            sigma=_SIGMA,
            bounds=np.tile([0.0, 1.0], (dimensions, 1)),
            population_size=population * 2**self._restarts,
            seed=0,
        )
