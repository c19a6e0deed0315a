"""How many pods of workers a job has on Kubernetes, and what each holds. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass

from jobs.search_spec import MAX_SLOTS
from jobs.spec import JobSpec

_ROUNDING = 1e-6


@dataclass(frozen=True)
class PodCount:
    """Pods of workers."""

    fewest: int
    """With which the run starts, and goes on."""
    most: int
    """To which it grows; equal to `fewest` where its size is fixed."""
    workers_each: int = 1
    """Workers in one pod: more than one only where trials share its GPU."""

    @property
    def is_elastic(self) -> bool:
        """Whether the number of pods changes while the run goes on."""
        return self.most > self.fewest


def count_pods(spec: JobSpec) -> PodCount:
    """One pod for each worker. A search has room for `max_concurrent` trials from the start; with
    `auto` it starts with room for one, and grows to that for as many as could be under way, as
    far as Kubernetes gives it pods."""
    workers, search = spec.workers, spec.search
    if search is None:
        return PodCount(workers.fewest, workers.count)
    trials = min(search.most_at_once(search.configurations), MAX_SLOTS)
    share = 1.0 if search.gpu_share is None else search.gpu_share
    each = min(math.floor(1 / share + _ROUNDING), trials)
    most = math.ceil(trials / each) * workers.count
    fewest = workers.count if search.max_concurrent == "auto" else most
    return PodCount(fewest, most, each)
