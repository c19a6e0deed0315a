"""Whether the other ranks of the group get on: a number of each, in the group's key-value store.

Collectives cannot tell it: a rank that waits in one hears of the others when it ends.
"""

from __future__ import annotations

import threading
from types import TracebackType

from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

from trainers.watchdog import Watchdog


class Pulse:
    """Tells the others of this rank's progress, and the watchdog of theirs. A context manager.

    A thread of its own asks the store, as the store itself may hang: its server is rank 0's
    process, or an agent on that rank's node. Without news of the others the watchdog's limit holds.
    """

    def __init__(self, watchdog: Watchdog, *, rank: int, world_size: int) -> None:
        self._watchdog = watchdog
        self._own = f"progress of rank {rank}"
        self._others = [f"progress of rank {r}" for r in range(world_size) if r != rank]
        self._news: object = None
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name="shoal-pulse", daemon=True)

    def __enter__(self) -> Pulse:
        if self._others:
            # A connection of its own: a request that hangs would hold up those of other threads.
            store = _get_default_store().clone()  # type: ignore[attr-defined]  # not in its stubs
            self._store = PrefixStore("shoal", store)
            self._watchdog.others = lambda: self._news
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ending.set()
        if self._others:
            self._thread.join(self._watchdog.look_seconds)  # no longer: the store may hang

    def _run(self) -> None:
        told: int | None = None
        while not self._ending.is_set():
            try:
                progress = self._watchdog.progress()
                if progress != told:
                    self._store.set(self._own, str(progress))
                # Keys that are not there yet would be waited for.
                elif self._store.check(self._others):
                    self._news = tuple(self._store.multi_get(self._others))
                told = progress
            except RuntimeError:
                pass  # rank 0 has ended, or is about to: no news
            self._ending.wait(self._watchdog.look_seconds)
