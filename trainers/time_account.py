"""Where the wall clock of an attempt goes, as its first rank sees it.

`jobs/account.py` says what each purpose means, and how attempts make up the account of a run.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, get_args

Purpose = Literal[
    "start",
    "compute",
    "data_wait",
    "synchronisation",
    "checkpoint",
    "evaluation",
    "finish",
    "other",
]


class TimeAccount:
    """Adds up seconds by purpose; nested spans count for the inner purpose only.

    Of one thread. What no span covers is `other`.
    """

    def __init__(self) -> None:
        self.opened_at = time.time()
        """Unix seconds."""
        self._began = self._since = time.monotonic()
        self._purpose: Purpose = "other"
        self._seconds: dict[Purpose, float] = dict.fromkeys(get_args(Purpose), 0.0)

    @contextmanager
    def spent(self, purpose: Purpose) -> Iterator[None]:
        """Counts the time inside the block for `purpose`."""
        outer = self._turn_to(purpose)
        try:
            yield
        finally:
            self._turn_to(outer)

    @property
    def elapsed_seconds(self) -> float:
        """Since the account was opened."""
        return time.monotonic() - self._began

    def seconds(self) -> dict[str, float]:
        """Seconds by purpose so far, those of open spans included: all that have elapsed."""
        self._turn_to(self._purpose)
        return {purpose: round(value, 3) for purpose, value in self._seconds.items()}

    def _turn_to(self, purpose: Purpose) -> Purpose:
        """Counts the time since the last turn; the purpose before this one."""
        now, before = time.monotonic(), self._purpose
        self._seconds[before] += now - self._since
        self._purpose, self._since = purpose, now
        return before
