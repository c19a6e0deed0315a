"""Which searched keys matter: functional analysis of variance (Hutter et al., 2014, "An Efficient
Approach for Assessing Hyperparameter Importance"), by Optuna's evaluator.

Keys are told as places on their unit intervals, so that the shares are those of the variance that
the search's own distributions would give.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.importance import FanovaImportanceEvaluator
from optuna.trial import TrialState, create_trial

from jobs.study.events import Values
from jobs.study.space import Choices, Key, Space

MOST_TRIALS = 200
"""Trees over more of them take long, and tell no more."""


@dataclass(frozen=True)
class Scored:
    """Values and what they were worth."""

    values: Values
    score: float


def importances(space: Space, scored: Sequence[Scored]) -> tuple[dict[str, float], int]:
    """(the share of the scores' variance that each key explains by itself, the largest first; of
    how many trials). Values are such as the space holds.

    Of keys that all trials have: conditional ones are left out. Of more than `MOST_TRIALS`, so many
    that lie evenly among them. Without scores that differ, no shares.
    """
    held = scored[:: math.ceil(len(scored) / MOST_TRIALS) or 1]
    if len({one.score for one in held}) < 2:
        return {}, len(held)
    keys = [key for key in space.keys if not key.when]
    distributions = {key.path: _distribution(key) for key in keys}
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)  # it tells of each study that it makes
    try:
        study = optuna.create_study(direction="maximize")
    finally:
        optuna.logging.set_verbosity(verbosity)
    study.add_trials(
        [
            create_trial(
                state=TrialState.COMPLETE,
                value=one.score,
                params={key.path: _place(key, one.values[key.path]) for key in keys},
                distributions=distributions,
            )
            for one in held
        ]
    )
    # The same page each time that it is built.
    shares = FanovaImportanceEvaluator(seed=0).evaluate(study)
    return {path: float(share) for path, share in shares.items()}, len(held)


def _distribution(key: Key) -> BaseDistribution:
    if isinstance(key.over, Choices):
        return CategoricalDistribution(range(len(key.over.values)))
    return FloatDistribution(0.0, 1.0)


def _place(key: Key, value: Any) -> float:
    return key.over.index(value) if isinstance(key.over, Choices) else key.over.unit(value)
