"""TPE and Gaussian processes, by Optuna's samplers.

Optuna remembers nothing from one ask to the next: for each it gets a study in memory that holds
what the log tells, and a sampler seeded for this trial. The study is made without the copies that
adding trials to one takes, and of a bounded number of trials, so that the time of an ask stays
flat. What grows with the number of trials is to find the best of them, a few milliseconds at
10,000.
"""

from __future__ import annotations

import heapq
import warnings
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from datetime import datetime
from itertools import islice
from types import MappingProxyType
from typing import Any, NamedTuple

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseSampler
from optuna.storages import InMemoryStorage
from optuna.trial import FrozenTrial, Trial, TrialState

from jobs.search_spec import GPSearch, Search, TPESearch
from jobs.study.events import Event, Values
from jobs.study.keyed import keyed_seed
from jobs.study.score import WORST
from jobs.study.space import Choices, Key, Range, Space
from jobs.study.tried import History, Tried

_FRACTIONS = 10**6
"""Steps of Optuna's to a trial's full budget; Optuna counts progress in whole steps."""


class _Outcome(NamedTuple):
    """What one of Optuna's samplers reads of a trial."""

    state: TrialState
    value: float | None = None
    intermediate: Mapping[int, float] = MappingProxyType({})


@dataclass(frozen=True)
class _Model:
    """One of Optuna's samplers, and what it is told of."""

    name: str
    make: Callable[[int], BaseSampler]
    """From a seed."""
    outcome: Callable[[Tried, float], _Outcome]
    """Of a trial that has a score; besides the trial, from the worst score of those that have not
    failed."""
    most_best: int
    """Trials with a score that it is told of, the best of all, and"""
    most_new: int
    """the newest besides, with or without a score."""


def tpe_sampler(search: Search, algorithm: TPESearch, space: Space, seed: int) -> OptunaSampler:
    """Optuna's TPE over all keys at once, those of a condition among themselves.

    Trials that did not have their full budget are what Optuna calls pruned: they count after those
    that had, the further they came the better; trials that failed count last. With more than 240
    trials the best 25 make the one density, so that the bounds change the other alone.
    """

    def make(seed: int) -> BaseSampler:
        with warnings.catch_warnings():
            # `group`, by which conditional keys are modelled, is called experimental.
            warnings.simplefilter("ignore", ExperimentalWarning)
            return optuna.samplers.TPESampler(
                n_startup_trials=algorithm.startup_trials,
                n_ei_candidates=algorithm.candidates,
                group=any(key.when for key in space.keys),
                seed=seed,
            )

    def outcome(tried: Tried, worst: float) -> _Outcome:
        if tried.score is None or tried.score == WORST:
            return _Outcome(TrialState.PRUNED)
        if tried.is_finished:
            return _Outcome(TrialState.COMPLETE, tried.score)
        step = round(tried.fraction * _FRACTIONS)
        return _Outcome(TrialState.PRUNED, intermediate={step: tried.score})

    return OptunaSampler(_Model("tpe", make, outcome, 100, 900), search, space, seed)


def gp_sampler(search: Search, algorithm: GPSearch, space: Space, seed: int) -> OptunaSampler:
    """Optuna's Gaussian process, which loads torch.

    It knows no pruned trials, so each counts with the score that it has, and one that failed with
    the worst of the others. Fitting takes the cube of the number of trials, hence the bounds.
    """

    def make(seed: int) -> BaseSampler:
        return optuna.samplers.GPSampler(
            n_startup_trials=algorithm.startup_trials, warn_independent_sampling=False, seed=seed
        )

    def outcome(tried: Tried, worst: float) -> _Outcome:
        return _Outcome(TrialState.COMPLETE, worst if tried.score == WORST else tried.score)

    return OptunaSampler(_Model("gp", make, outcome, 50, 150), search, space, seed)


class OptunaSampler:
    """Asks one of Optuna's samplers, with the trials of the log as its study."""

    def __init__(self, model: _Model, search: Search, space: Space, seed: int) -> None:
        self._model = model
        self._space = space
        self._seed = seed
        self._history = History(search, space)
        self._distributions = {key.path: _distribution(key) for key in space.keys}
        self._frozen: dict[int, FrozenTrial] = {}
        """What Optuna was last told of trials that have not changed since."""
        self._ranks: dict[int, tuple[bool, float, float]] = {}
        """Of the trials that have a score."""
        self._running: set[int] = set()
        """Those that have none."""
        # It tells of each study that it makes, and of a package that would make it quicker.
        optuna.logging.set_verbosity(optuna.logging.ERROR)

    def observe(self, event: Event) -> None:
        """Takes in what was tried, and how it went."""
        tried = self._history.observe(event)
        if tried is None:
            return
        self._frozen.pop(tried.trial, None)
        if tried.score is None:
            self._running.add(tried.trial)
        else:
            self._running.discard(tried.trial)
            self._ranks[tried.trial] = _rank(tried)

    def ask(self, trial: int) -> Values | None:
        """What Optuna suggests after what is known; running trials are known to run."""
        sampler = self._model.make(keyed_seed(self._seed, self._model.name, trial))
        storage = _KnownTrials(self._known())
        study = optuna.create_study(storage=storage, sampler=sampler, direction="maximize")
        asked = study.ask()
        return self._space.fill(lambda key: _suggest(asked, key, self._distributions[key.path]))

    def _known(self) -> list[FrozenTrial]:
        """The trials that Optuna is told of, in their order."""
        tried = self._history.tried
        best = heapq.nsmallest(self._model.most_best, self._ranks, key=self._ranks.__getitem__)
        newest = islice(reversed(tried), self._model.most_new)
        # Trials that the platform has taken are in no history any more.
        chosen = sorted(tried.keys() & {*best, *self._running, *newest})
        scores = [score for number in chosen if (score := tried[number].score) is not None]
        worst = min((score for score in scores if score != WORST), default=0.0)
        self._frozen = {
            number: self._frozen.get(number) or self._freeze(tried[number], worst)
            for number in chosen
        }
        known = list(self._frozen.values())
        for number in chosen:
            if tried[number].score == WORST:  # and what the worst is may change
                del self._frozen[number]
        return known

    def _freeze(self, tried: Tried, worst: float) -> FrozenTrial:
        """A trial as Optuna has it."""
        running = _Outcome(TrialState.RUNNING)
        outcome = running if tried.score is None else self._model.outcome(tried, worst)
        now = datetime.now().astimezone()
        keys = [key for key in self._space.keys if key.path in tried.values]
        return FrozenTrial(
            # 0 is the trial that is asked for.
            number=tried.trial + 1,
            trial_id=tried.trial + 1,
            state=outcome.state,
            value=outcome.value,
            params={key.path: _to_optuna(key, tried.values[key.path]) for key in keys},
            distributions={key.path: self._distributions[key.path] for key in keys},
            user_attrs={},
            system_attrs={},
            intermediate_values=dict(outcome.intermediate),
            datetime_start=now,
            datetime_complete=None if tried.score is None else now,
        )


class _KnownTrials(InMemoryStorage):
    """A study whose earlier trials are given; what reads them changes none of them."""

    def __init__(self, known: list[FrozenTrial]) -> None:
        super().__init__()
        self._known = known

    def get_all_trials(
        self,
        study_id: int,
        deepcopy: bool = True,
        states: Container[TrialState] | None = None,
    ) -> list[FrozenTrial]:
        own = super().get_all_trials(study_id, deepcopy=False)
        return [t for t in (*own, *self._known) if states is None or t.state in states]


def _rank(tried: Tried) -> tuple[bool, float, float]:
    """Best first: finished ones by score, then the others by progress, then by score."""
    assert tried.score is not None
    if tried.score == WORST:
        return True, 0.0, 0.0
    return not tried.is_finished, 0.0 if tried.is_finished else -tried.fraction, -tried.score


def _distribution(key: Key) -> BaseDistribution:
    """Optuna's counterpart: choices and steps by their places, which are exact."""
    over = key.over
    if isinstance(over, Choices):
        return CategoricalDistribution(range(len(over.values)))
    if over.step is None:
        return FloatDistribution(over.low, over.high, log=over.log)
    if not over.log:
        return IntDistribution(0, over.count - 1)
    low, high = over.ends
    if over.step == 1 and isinstance(low, int):
        return IntDistribution(low, int(high), log=True)
    return FloatDistribution(low, high, log=True)


def _to_optuna(key: Key, value: Any) -> Any:
    over = key.over
    continuous = isinstance(over, Range) and (over.step is None or over.log)
    return value if continuous else over.index(value)


def _suggest(asked: Trial, key: Key, distribution: BaseDistribution) -> Any:
    over = key.over
    place: Any = None
    match distribution:
        case CategoricalDistribution(choices=choices):
            place = asked.suggest_categorical(key.path, choices)
        case IntDistribution(low=low, high=high, log=log):
            place = asked.suggest_int(key.path, low, high, log=log)
        case FloatDistribution(low=low, high=high, log=log):
            place = asked.suggest_float(key.path, low, high, log=log)
    if isinstance(over, Choices):
        return over.values[place]
    return over.nearest(place) if over.step is None or over.log else over.nth(place)
