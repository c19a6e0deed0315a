"""Population based bandits (Parker-Holder et al. 2020, "Provably Efficient Online Hyperparameter
Optimization with Population-Based Bandits")."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jobs.search_spec import PB2, PBT
from jobs.study.events import Asked, Decided, Event, Failed, Reported, Values
from jobs.study.keyed import keyed
from jobs.study.schedulers.gaussian_process import Array, TimeVaryingProcess, upper_confidence
from jobs.study.schedulers.pbt import Clone, Pbt
from jobs.study.schedulers.scheduler import Objective
from jobs.study.space import Key, Range

_NUM_LEGS = 200
"""The newest, that are learned from. Fitting takes the cube of it."""
_NUM_CANDIDATES = 1024


class Pb2:
    """A Scheduler: Pbt, but the numbers of a clone are those that promise most.

    A Gaussian process learns from each stretch between two rounds how fast the metric improved, by
    the stretch's numbers and its round. A clone's numbers maximise its upper confidence bound for
    the round that the clone begins in, over candidates drawn from all of the ranges.
    A stretch that failed, or ended without a value, counts as the worst. Keys with choices change
    as in Pbt, and so do all in the first round, before which no improvement is known.
    """

    def __init__(
        self,
        given: PB2,
        *,
        objective: Objective,
        keys: Sequence[Key],
        seed: int,
        trials: int,
    ) -> None:
        """As Pbt, whose default `factors` and `resample` are for the first round, and the latter
        for choices."""
        self._pbt = Pbt(
            PBT(population=given.population, every=given.every, quantile=given.quantile),
            objective=objective,
            keys=keys,
            seed=seed,
            trials=trials,
            explore=self._explored,
        )
        self._ranges = {key.path: key.over for key in keys if isinstance(key.over, Range)}
        self._objective = objective
        self._every = given.every
        self._seed = seed
        self._living: dict[int, _Living] = {}
        self._legs: deque[_Leg] = deque(maxlen=_NUM_LEGS)

    def observe(self, event: Event) -> None:
        self._learn(event)
        self._pbt.observe(event)

    def bracket(self) -> int:
        return self._pbt.bracket()

    def first(self, bracket: int) -> float:
        return self._pbt.first(bracket)

    def decide(self, trial: int) -> Decided:
        return self._pbt.decide(trial)

    def next(self) -> Decided | Asked | None:
        return self._pbt.next()

    def takes_new(self) -> bool:
        return self._pbt.takes_new()

    def _learn(self, event: Event) -> None:
        if isinstance(event, Asked) and event.purpose == "search":
            donor = None if event.donor is None else self._living.get(event.donor.trial)
            self._living[event.trial] = _Living(
                event.values,
                fraction=donor.fraction if donor else 0.0,
                cost=donor.cost if donor else math.inf,
            )
        elif isinstance(event, Reported) and event.trial in self._living:
            living = self._living[event.trial]
            cost = self._objective.cost_of(event.value)
            self._end_leg(living, cost=cost, fraction=event.fraction)
            living.fraction, living.cost = event.fraction, cost
        elif isinstance(event, Failed) and event.trial in self._living:
            self._end_leg(self._living.pop(event.trial), cost=math.inf, fraction=math.inf)
        elif isinstance(event, Decided) and event.decision in ("stop", "finish"):
            self._living.pop(event.trial, None)

    def _end_leg(self, living: _Living, *, cost: float, fraction: float) -> None:
        if math.isfinite(living.cost) and fraction > living.fraction:
            gain = (living.cost - cost) / (fraction - living.fraction) if cost < math.inf else None
            self._legs.append(_Leg(self._point(living.values, living), gain))

    def _point(self, values: Values, begin: _Living) -> list[float]:
        """[x..., t]: the numbers' places in their ranges, and the round in which it begins."""
        places = [
            over.unit(values[path]) if path in values else 0.5
            for path, over in self._ranges.items()
        ]
        return [*places, begin.fraction / self._every]

    def _explored(self, clone: Clone) -> Values:
        values = self._pbt.perturbed(clone)
        active = [index for index, path in enumerate(self._ranges) if path in values]
        donor = self._living.get(clone.donor.trial)
        gains = _standardised([leg.gain for leg in self._legs])
        if donor is None or not math.isfinite(donor.cost) or not active or gains is None:
            return values
        begin = np.array(self._point(clone.values, donor))
        at = np.tile(begin, (_NUM_CANDIDATES, 1))
        rng = keyed(self._seed, "candidates", clone.replaces, clone.round)
        at[:, active] = rng.random((_NUM_CANDIDATES, len(active)))
        pending = [
            self._point(living.values, living)
            for living in self._living.values()
            if math.isfinite(living.cost)
        ]
        process = TimeVaryingProcess.fit(np.array([leg.point for leg in self._legs]), gains)
        bounds = upper_confidence(process, at, pending=np.array(pending))
        chosen = at[int(np.argmax(bounds))]
        for place, (path, over) in zip(chosen[:-1], self._ranges.items(), strict=True):
            if path in values:
                values[path] = over.at(float(place))
        return values


def _standardised(gains: Sequence[float | None]) -> Array | None:
    """Gains with mean 0 and deviation 1, in [-2, 2]; shape [n]. None: fewer than two are known.

    A gain of None is taken for the worst of all, and for none at best.
    """
    known = [gain for gain in gains if gain is not None]
    if len(known) < 2:
        return None
    worst = min(0.0, *known)
    filled = np.array([worst if gain is None else gain for gain in gains])
    standardised: Array = np.clip((filled - filled.mean()) / (filled.std() + 1e-12), -2.0, 2.0)
    return standardised


@dataclass(slots=True)
class _Living:
    """A trial that is not over, at its newest report, or at its donor's."""

    values: Values
    fraction: float
    cost: float


@dataclass(frozen=True, slots=True)
class _Leg:
    """A stretch of training between two rounds."""

    point: list[float]
    gain: float | None
    """Fall of the cost for each full budget; None: it failed, or ended without a value."""
