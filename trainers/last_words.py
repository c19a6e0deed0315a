"""Why an attempt breaks off, as the rank that ends it can still tell: for the next attempt, and for
people."""

from __future__ import annotations

from cluster.storage import ObjectExists, StorageError, Store
from jobs.errors import ShoalError
from jobs.record import Crash, Failure, Microbatch, RunPaths, State
from jobs.spec import JobSpec
from trainers.memory import MicrobatchTooLarge, memory_fault, room_fault
from trainers.telemetry import Telemetry, log
from trainers.watchdog import Hang


class LastWords:
    """Records why an attempt breaks off, durably as far as the store answers.

    The others wait for this rank, so they cannot be told: whoever started the ranks starts them
    again, and the next attempt reads the record.
    """

    def __init__(
        self, store: Store, paths: RunPaths, telemetry: Telemetry, *, attempt: int, where: str
    ) -> None:
        self._store = store
        self._paths = paths
        self._telemetry = telemetry
        self._attempt = attempt
        self._where = where

    def out_of_memory(self, error: MicrobatchTooLarge, *, step: int, spec: JobSpec) -> ShoalError:
        """What to raise on this rank alone."""
        found = Microbatch(rows=error.rows, tokens=error.tokens)
        return self._broken_off(memory_fault(error, step=step, spec=spec), found)

    def without_room(self, error: Exception) -> ShoalError:
        """The same of memory that ran out apart from any micro-batch, such as for a checkpoint."""
        log.error("%s", error, exc_info=error)
        return self._broken_off(room_fault(error), None)

    def hang(self, hang: Hang, *, step: int, spec: JobSpec) -> None:
        """This rank's process ends, and where it stands."""
        message = f"no progress for {hang.seconds:.0f} s: {hang.doing}"
        log.error("%s\n%s", message, hang.stacks)
        self._telemetry.event("error", f"{self._where}: {message}", step=step)
        self._telemetry.last_words()
        failure = Failure(
            state=State.FAILED_INFRA,
            problems=(
                (
                    message,
                    "read where each rank stood with: shoal logs RUN; raise retries.hang_minutes, "
                    f"which is {spec.retries.hang_minutes:g}, if it was at work",
                ),
            ),
            where=self._where,
            exit_code=State.FAILED_INFRA.exit_code,
        )
        self._record(Crash(attempt=self._attempt, failure=failure))

    def _broken_off(self, told: ShoalError, found: Microbatch | None) -> ShoalError:
        failure = Failure.of(told, where=self._where)
        self._record(Crash(attempt=self._attempt, failure=failure, out_of_memory=found))
        return told

    def _record(self, crash: Crash) -> None:
        try:
            self._store.write_if_absent(self._paths.crash(crash.attempt), crash.to_bytes())
        except ObjectExists:
            pass  # another rank was first
        except StorageError as error:
            log.error("why the attempt broke off cannot be recorded: %s", error)
