"""Whether a run's lease is renewed, by the clock of whoever looks on."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from jobs.record import Lease
from jobs.runs import RunReader

LONGEST_LOOK_SECONDS = 5.0
"""No more of the time between two looks is counted: in the rest the store may have been away."""


@dataclass
class Onlooker:
    """Who looks at a run's lease again and again, and sees whether it is renewed.

    When it was renewed last, a lease says by its holder's clock, and the holder of a healthy run
    cannot renew while the store is away. That it stays as it is while the store answers is seen
    here, by this process's clock.
    """

    clock: Callable[[], float] = time.monotonic
    unchanged_seconds: float = 0.0
    """For how long the lease was seen to stay as it is."""
    was_renewed: bool = False
    """Whether the driver that has it now was seen to renew it, whatever its clock says."""
    _seen: tuple[int, int] | None = None
    _answered_at: float = 0.0

    def lease_of(self, reader: RunReader) -> Lease | None:
        """The lease as it is now."""
        asked_at = self.clock()
        lease = reader.lease()
        seen = None if lease is None else (lease.generation, lease.renewals)
        if seen != self._seen:
            self.was_renewed = bool(seen and self._seen and seen[0] == self._seen[0])
            self._seen, self.unchanged_seconds = seen, 0.0
        else:
            self.unchanged_seconds += min(asked_at - self._answered_at, LONGEST_LOOK_SECONDS)
        self._answered_at = self.clock()
        return lease
