"""The scheduler that a job file asks for."""

from __future__ import annotations

from jobs import search_spec
from jobs.search_spec import Search
from jobs.study import space as spaces
from jobs.study.schedulers.asha import Asha, AshaSettings
from jobs.study.schedulers.hyperband import Hyperband, HyperbandSettings
from jobs.study.schedulers.median import Median, MedianSettings
from jobs.study.schedulers.pb2 import Pb2
from jobs.study.schedulers.pbt import Choices, Pbt, PbtSettings, Range
from jobs.study.schedulers.plain import Plain
from jobs.study.schedulers.scheduler import Objective, Scheduler
from jobs.study.space import Key, Space


def make_scheduler(search: Search, space: Space) -> Scheduler:
    """A scheduler that has seen nothing yet."""
    objective = Objective(mode=search.mode, score=search.score)
    trials, given = search.trials * search.repeats, search.scheduler
    match given:
        case search_spec.ASHA() | search_spec.Hyperband():
            eta = given.reduction_factor
            first = 1 / eta**2 if given.first is None else given.first
            if isinstance(given, search_spec.ASHA):
                settings = AshaSettings(reduction_factor=eta, first=first)
                return Asha(settings, objective=objective, trials=trials)
            return Hyperband(
                HyperbandSettings(reduction_factor=eta, first=first),
                objective=objective,
                trials=trials,
            )
        case search_spec.MedianStopping():
            return Median(
                MedianSettings(min_trials=given.startup_trials, grace=given.first),
                objective=objective,
            )
        case search_spec.PBT():
            return Pbt(
                PbtSettings(
                    population=given.population,
                    interval=given.every,
                    quantile=given.quantile,
                    factors=given.factors,
                    resample_probability=given.resample,
                ),
                objective=objective,
                keys=_changed(space),
                seed=search.seed,
                trials=trials,
            )
        case search_spec.PB2():
            return Pb2(
                PbtSettings(
                    population=given.population, interval=given.every, quantile=given.quantile
                ),
                objective=objective,
                keys=_changed(space),
                seed=search.seed,
                trials=trials,
            )
        case search_spec.NoScheduler():
            return Plain()


def _changed(space: Space) -> list[Range | Choices]:
    """What a clone may have another value of: not what decides which keys there are."""
    decide = {path for key in space.keys for path, _ in key.when}
    return [_key(key) for key in space.keys if key.path not in decide]


def _key(key: Key) -> Range | Choices:
    over = key.over
    if isinstance(over, spaces.Choices):
        return Choices(path=key.path, choices=over.values)
    is_whole = isinstance(over.low, int) and isinstance(over.step, int)
    return Range(
        path=key.path,
        low=over.low,
        high=over.high,
        log=over.log,
        step=over.step,
        integer=is_whole,
    )
