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

from jobs.study.schedulers.asha import Asha, AshaSettings
from jobs.study.schedulers.hyperband import Hyperband, HyperbandSettings
from jobs.study.schedulers.median import Median, MedianSettings
from jobs.study.schedulers.pb2 import Pb2
from jobs.study.schedulers.pbt import Choices, Pbt, PbtSettings, Range
from jobs.study.schedulers.plain import Plain
from jobs.study.schedulers.scheduler import Objective, Scheduler

__all__ = [
    "Asha",
    "AshaSettings",
    "Choices",
    "Hyperband",
    "HyperbandSettings",
    "Median",
    "MedianSettings",
    "Objective",
    "Pb2",
    "Pbt",
    "PbtSettings",
    "Plain",
    "Range",
    "Scheduler",
]
