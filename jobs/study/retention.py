"""The checkpoints of a study's trials that nobody can need any more, and their removal.

Holdings    which trials these are
Sweeper     removes them while the study goes on, in a thread of its own
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from types import TracebackType

from cluster.storage import StorageError, Store
from jobs.record import RunPaths
from jobs.search_spec import Search
from jobs.spec import format_bytes
from jobs.study.trials import Trials
from trainers.telemetry import Telemetry

KEPT_CONFIGURATIONS = 3
"""The best of a study, whose trials keep their checkpoints; more where it has more finalists."""
_SWEEP_SECONDS = 20.0
_MOST_NAMED = 10


class Holdings:
    """Trials that hold checkpoints which nobody can need any more, each told once.

    Those are trials that are over, neither among the best nor the donor of a clone that has not
    begun. The best are `KEPT_CONFIGURATIONS` configurations (or as many as there are finalists)
    among those whose trials are all over: their scores stay, so that what is not among them now
    never is. Configurations that are not over are kept besides, and so are the job's own values.
    """

    def __init__(self, search: Search, trials: Trials) -> None:
        self._trials = trials
        finalists = search.finalists
        self._count = max(KEPT_CONFIGURATIONS, finalists.count if finalists else 0)
        self._runs = {
            "search": search.repeats,
            "finalist": finalists.seeds if finalists else 0,
        }
        self._taken: set[int] = set()

    def take(self) -> list[int]:
        """The trials whose checkpoints may go now, and were not told before."""
        over = [
            trial
            for number, trial in self._trials.by_number.items()
            if trial.is_over and number not in self._taken and number not in self._trials.uncloned
        ]
        if not over:
            return []
        kept = self._kept()
        spare = [trial.number for trial in over if trial.of not in kept]
        self._taken.update(spare)
        return spare

    def put_back(self, number: int) -> None:
        """The trial still holds some: it is told again."""
        self._taken.discard(number)

    def _kept(self) -> set[int]:
        """Configurations, by the numbers of their first trials."""
        num_over = Counter[tuple[str, int]]()
        for trial in self._trials.by_number.values():
            num_over[trial.purpose, trial.of] += trial.is_over
        going = {of for (purpose, of), number in num_over.items() if number < self._runs[purpose]}
        kept = set(going)
        for ranked in (self._trials.ranked(), self._trials.ranked("finalist")):
            over = [runs[0].of for runs in ranked if runs[0].of not in going]
            kept.update(over[: self._count])
        if (own := self._trials.baseline()) is not None:
            kept.add(own.of)  # the winner is compared with it
        return kept


class Sweeper:
    """Removes them, now and then. A context manager."""

    def __init__(
        self,
        holdings: Holdings,
        store: Store,
        paths: RunPaths,
        telemetry: Telemetry,
        *,
        deciding: AbstractContextManager[object],
    ) -> None:
        """`deciding` is held by whoever changes the study's trials."""
        self._holdings = holdings
        self._store = store
        self._paths = paths
        self._telemetry = telemetry
        self._deciding = deciding
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="shoal-sweep", daemon=True)

    def __enter__(self) -> Sweeper:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._closing.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._closing.wait(_SWEEP_SECONDS):
            self.sweep(unless=self._closing.is_set)

    def sweep(self, *, unless: Callable[[], bool] = lambda: False) -> None:
        """Removes what may go now, unless it is told not to; what is left of it is tried again the
        next time."""
        with self._deciding:
            spare = self._holdings.take()
        removed: list[int] = []
        num_bytes = 0
        for number in spare:
            if unless():
                self._holdings.put_back(number)
                continue
            try:
                freed = drop_checkpoints(self._store, self._paths.trial(number))
            except StorageError as error:
                message = f"checkpoints of trial {number} could not be deleted: {error}"
                self._telemetry.event("warning", message)
                self._holdings.put_back(number)
                continue
            if freed:
                removed.append(number)
                num_bytes += freed
        if removed:
            told = f"deleted the checkpoints of {_named(removed)}, {format_bytes(num_bytes)}"
            self._telemetry.event("retention", told)


def drop_checkpoints(store: Store, paths: RunPaths) -> int:
    """Deletes all checkpoints of a run, manifests first, so that nothing half looks whole; how many
    bytes they had."""
    heads = list(store.list(paths.checkpoints))
    keys = [head.key for head in heads]
    store.delete(key for key in keys if key.endswith("/manifest.json"))
    store.delete(keys)
    return sum(head.num_bytes for head in heads)


def _named(numbers: Sequence[int]) -> str:
    if len(numbers) > _MOST_NAMED:
        return f"{len(numbers)} trials"
    return f"trial{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers))}"
