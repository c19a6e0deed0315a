"""When a state is made durable, and what a save that fails means; the same calls on every rank.

    Saving.save            the save before this one has ended; copies the state and goes on
    Saving.make_durable    returns when the newest state is stored

A save that fails is told, and training goes on with the checkpoint before it. Once more than
`checkpoint.max_failures_in_a_row` have failed, the next save is waited for, and so is the last one
of an attempt: while the store is away it is repeated, for `retries.wait_minutes` at most.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from cluster.storage import StoreAway
from jobs.errors import EnvironmentFault
from jobs.record import State
from jobs.spec import JobSpec
from trainers import watchdog
from trainers.agreement import Agreement
from trainers.checkpoint import CheckpointWriter, Moment, PartsMissing
from trainers.loop import Trainee
from trainers.parallel import is_sharded, plain
from trainers.telemetry import Telemetry, log

_LOOK_SECONDS = 1.0
"""How long a rank waits for its writer before all meet again: none is silent for longer."""
_PAUSE_SECONDS = 2.0
"""Before a save is repeated, besides the pauses of the store's own retries."""


class Saving:
    """Saves the state of a group of ranks; of a whole model, rank 0's writer does."""

    def __init__(
        self,
        spec: JobSpec,
        writer: CheckpointWriter,
        agreement: Agreement,
        telemetry: Telemetry,
        *,
        raise_any: Callable[[Exception | None], None],
    ) -> None:
        """`raise_any` raises on all ranks where one of them, all calling, comes with an error."""
        self._max_failures = spec.checkpoint.max_failures_in_a_row
        self._wait_seconds = 60 * spec.retries.wait_minutes
        self._writer = writer
        self._agreement = agreement
        self._telemetry = telemetry
        self._raise_any = raise_any
        self._failures_in_a_row = 0
        self._error: EnvironmentFault | None = None
        """Why this rank's part of the last save could not be stored."""
        self._has_part = False
        """Whether this rank stores a part of the state."""

    def save(self, trainee: Trainee, moment: Moment) -> None:
        """Returns once the state is copied, or stored where too many saves have failed."""
        self._settle()
        self._has_part = self._agreement.rank == 0 or is_sharded(plain(trainee.model))
        if self._has_part:
            self._writer.save(trainee, moment)
        if self._failures_in_a_row > self._max_failures:
            self.make_durable()

    def make_durable(self) -> None:
        """Returns when the newest state is stored; raises on all ranks where it cannot be."""
        began = time.monotonic()
        is_told = False
        while failures := self._settle():
            watchdog.tick("waits for the store")
            is_hopeless = not all(failure.is_away for failure in failures)
            is_late = time.monotonic() - began > self._wait_seconds
            if self._agreement.first(is_late) or is_hopeless:
                self._raise_any(self._error)
            if self._agreement.rank == 0:
                if not is_told:
                    self._telemetry.state(
                        State.RECOVERING, f"training waits for the store: {failures[0].message}"
                    )
                    is_told = True
                time.sleep(_PAUSE_SECONDS)
            if self._has_part:
                self._writer.save_again()
        if is_told:
            seconds = time.monotonic() - began
            self._telemetry.state(
                State.RUNNING, f"the store answers again; training waited {seconds:.0f} s for it"
            )

    def _settle(self) -> list[_Failure]:
        """Why the save under way has failed; empty where it has not, or none is under way.

        The ranks meet while it goes on, so that one that is gone is noticed. That they do is no
        progress: the writer's thread ticks for each part that is stored.
        """
        watchdog.tick("waits for the checkpoint under way")
        self._error = None
        failures: list[_Failure] = []
        is_busy, is_stored, has_ended = True, False, False
        while is_busy:
            looks = [_Look(**look) for look in self._agreement.gather(self._look(), gets_on=False)]
            is_busy = any(look.is_busy for look in looks)
            failures += [_Failure(*look.failure) for look in looks if look.failure]
            # The first rank's save is that of all: it ends with the manifest.
            has_ended |= looks[0].has_ended
            is_stored |= looks[0].has_ended and looks[0].is_stored
            if failures:
                self._writer.give_up()
        if not has_ended:
            return []
        self._failures_in_a_row = 0 if is_stored else self._failures_in_a_row + 1
        if is_stored:
            return []
        if self._agreement.rank == 0:
            self._telemetry.event(
                "warning",
                f"a checkpoint could not be stored ({self._failures_in_a_row} in a row, "
                f"{self._max_failures} are borne): {failures[0].message}",
                failures_in_a_row=self._failures_in_a_row,
            )
        return failures

    def _look(self) -> dict[str, Any]:
        """How this rank's writer stands, as a `_Look`."""
        was_busy = self._writer.is_busy
        if not self._writer.ends_in(_LOOK_SECONDS):
            return {"is_busy": True}
        try:
            self._writer.wait()
        except PartsMissing:
            return {"has_ended": True}  # the ranks that have failed say why
        except EnvironmentFault as error:
            self._error = error
            log.warning("%s", error)
            return {"has_ended": True, "failure": (str(error), isinstance(error, StoreAway))}
        return {"has_ended": was_busy, "is_stored": True}


@dataclass(frozen=True)
class _Look:
    """How the writer of a rank stands."""

    is_busy: bool = False
    has_ended: bool = False
    """A save has, since the look before."""
    is_stored: bool = False
    failure: tuple[str, bool] | None = None
    """What a `_Failure` says."""


class _Failure(NamedTuple):
    """Why a rank could not store its part of a state."""

    message: str
    is_away: bool
    """Whether the store may be back later."""
