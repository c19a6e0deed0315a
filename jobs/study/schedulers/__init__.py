"""How long each trial of a study goes on, and with PBT and PB2 how it goes on with other values.

    scheduler    what the engine asks of each kind, and what of two scores is the better
    plain        every trial to its end
    asha         promotes while others still run; no trial waits for another
    hyperband    brackets of successive halving, rung by rung; with the sampler tpe it is BOHB
    median       stops what is worse than the median of the others at the same fraction
    pbt          a population whose worst members become altered clones of the best
    pb2          the same, with the clones' values from a bandit over a Gaussian process

A scheduler's whole state comes from the events that it has observed. One that is made anew and
observes a log answers as the one that lived through it.
"""

from jobs import search_spec
from jobs.search_spec import Search
from jobs.study.schedulers.asha import Asha
from jobs.study.schedulers.hyperband import Hyperband
from jobs.study.schedulers.median import Median
from jobs.study.schedulers.pb2 import Pb2
from jobs.study.schedulers.pbt import Pbt
from jobs.study.schedulers.plain import Plain
from jobs.study.schedulers.scheduler import Objective, Scheduler
from jobs.study.space import Key, Space

__all__ = [
    "Asha",
    "Hyperband",
    "Median",
    "Objective",
    "Pb2",
    "Pbt",
    "Plain",
    "Scheduler",
    "make_scheduler",
]


def make_scheduler(search: Search, space: Space) -> Scheduler:
    """The scheduler of `search.scheduler`, which has seen nothing yet."""
    objective = Objective(mode=search.mode, score=search.score)
    trials, given = search.configurations, search.scheduler
    match given:
        case search_spec.ASHA():
            return Asha(given, objective=objective, trials=trials)
        case search_spec.Hyperband():
            return Hyperband(given, objective=objective, trials=trials)
        case search_spec.MedianStopping():
            return Median(given, objective=objective)
        case search_spec.PBT():
            keys = _changed(space)
            return Pbt(given, objective=objective, keys=keys, seed=search.seed, trials=trials)
        case search_spec.PB2():
            keys = _changed(space)
            return Pb2(given, objective=objective, keys=keys, seed=search.seed, trials=trials)
        case search_spec.NoScheduler():
            return Plain()


def _changed(space: Space) -> list[Key]:
    """What a clone may have another value of: not what decides which keys there are."""
    decide = {path for key in space.keys for path, _ in key.when}
    return [key for key in space.keys if key.path not in decide]
