"""The fence of a generation: once another driver has the run's lease, nothing more may be written.

    Fence(store, paths, generation=3).check()     raises Superseded from then on

A driver that was frozen, or cut off from the store, cannot end its workers: they find out by
themselves. What they write between their last look and the take-over is in their own attempt's
objects, and the lineage leaves it out.
"""

from __future__ import annotations

from cluster.storage import ObjectMissing, Store, read_whole
from jobs.errors import EnvironmentFault, Problem
from jobs.record import DAMAGED_RECORD_HINT, Lease, RunPaths


class Superseded(EnvironmentFault):
    """Another driver has taken the run over."""


class Fence:
    """What a generation may do, by the lease as the store holds it."""

    def __init__(self, store: Store, paths: RunPaths, *, generation: int) -> None:
        self._store = store
        self._paths = paths
        self.generation = generation

    def check(self) -> None:
        """Raises Superseded once a newer generation has the lease; StorageError as reads do."""
        try:
            lease = read_whole(
                self._store,
                self._paths.lease,
                Lease.model_validate_json,
                hint=DAMAGED_RECORD_HINT,
            )
        except ObjectMissing:
            return  # ranks that were started without a driver, or a run that holds no lease
        if lease.generation > self.generation:
            raise Superseded(
                Problem(
                    f"generation {self.generation} of the run was superseded: it is driven by "
                    f"{lease.driver}",
                    f"look at it with: shoal status {self._paths.run_id}",
                )
            )
