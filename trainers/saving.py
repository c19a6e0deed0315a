"""When a state is made durable, and what a save that fails means; the same calls on every rank.

    Saving.save            the save before this one has ended; copies the state and goes on
    Saving.make_durable    returns when the newest state is stored

A save that fails is told, and training goes on with the checkpoint before it. After
`checkpoint.max_failures_in_a_row` of them the next save is waited for, and so is the last one of an
attempt: while the store is away it is repeated, for `retries.wait_minutes` at most.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from cluster.storage import StoreAway
from jobs.errors import EnvironmentFault
from jobs.record import State
from jobs.spec import JobSpec
from trainers import watchdog
from trainers.agreement import Agreement
from trainers.checkpoint import CheckpointWriter, Moment
from trainers.loop import Trainee
from trainers.telemetry import Telemetry, log

_LOOK_SECONDS = 1.0
"""How long rank 0 waits for its writer before the ranks meet again: none is silent for longer."""
_PAUSE_SECONDS = 2.0
"""Before a save is repeated, besides the pauses of the store's own retries."""


class Saving:
    """Saves the state of a group of ranks; rank 0 has the writer."""

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
        """Why the last save failed; on rank 0."""

    def save(self, trainee: Trainee, moment: Moment) -> None:
        """Returns once the state is copied, or stored where too many saves have failed."""
        self._settle()
        if self._agreement.rank == 0:
            self._writer.save(trainee, moment)
        if self._failures_in_a_row > self._max_failures:
            self.make_durable()

    def make_durable(self) -> None:
        """Returns when the newest state is stored; raises on all ranks where it cannot be."""
        began = time.monotonic()
        is_told = False
        while not self._settle():
            watchdog.tick("waits for the store")
            is_hopeless = not isinstance(self._error, StoreAway)
            is_late = time.monotonic() - began > self._wait_seconds
            if self._agreement.first(is_hopeless or is_late):
                self._raise_any(self._error)
            if self._agreement.rank == 0:
                if not is_told:
                    self._telemetry.state(
                        State.RECOVERING, f"training waits for the store: {self._error}"
                    )
                    is_told = True
                time.sleep(_PAUSE_SECONDS)
                self._writer.save_again()
        if is_told:
            seconds = time.monotonic() - began
            self._telemetry.state(
                State.RUNNING, f"the store answers again; training waited {seconds:.0f} s for it"
            )

    def _settle(self) -> bool:
        """Whether the save under way, if there is one, has succeeded; counts those that have not.

        The ranks meet while it goes on, so that one that is gone is noticed. That they do is no
        progress: the writer's thread ticks for each part that is stored.
        """
        watchdog.tick("waits for the checkpoint under way")
        outcome: dict[str, Any] = {"is_busy": True}
        while outcome["is_busy"]:
            outcome = self._agreement.first(
                self._look() if self._agreement.rank == 0 else None, gets_on=False
            )
        if outcome["has_failed"]:
            self._failures_in_a_row += 1
        elif outcome["was_busy"]:
            self._failures_in_a_row = 0
        return not outcome["has_failed"]

    def _look(self) -> dict[str, Any]:
        was_busy = self._writer.is_busy
        if not self._writer.ends_in(_LOOK_SECONDS):
            return {"is_busy": True}
        try:
            self._writer.wait()
        except EnvironmentFault as error:
            self._error = error
            log.warning("%s", error)
            self._telemetry.event(
                "warning",
                f"a checkpoint could not be stored ({self._failures_in_a_row + 1} in a row, "
                f"{self._max_failures} are borne): {error}",
            )
            return {"is_busy": False, "was_busy": True, "has_failed": True}
        return {"is_busy": False, "was_busy": was_busy, "has_failed": False}
