"""Where the wall clock of an attempt goes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, get_args

Purpose = Literal[
    "start", "compute", "data_wait", "synchronisation", "checkpoint", "evaluation", "finish"
]


class TimeAccount:
    """Adds up seconds by purpose; nested spans count for the inner purpose only."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._seconds: dict[str, float] = dict.fromkeys(get_args(Purpose), 0.0)
        self._inner = 0.0

    @contextmanager
    def spent(self, purpose: Purpose) -> Iterator[None]:
        """Counts the time inside the block for `purpose`."""
        outer_inner, self._inner = self._inner, 0.0
        began = time.monotonic()
        try:
            yield
        finally:
            whole = time.monotonic() - began
            self._seconds[purpose] += whole - self._inner
            self._inner = outer_inner + whole

    @property
    def elapsed_seconds(self) -> float:
        """Since the account was opened."""
        return time.monotonic() - self._began

    def seconds(self) -> dict[str, float]:
        """Seconds by purpose; `other` is what no block covered."""
        rounded = {purpose: round(value, 3) for purpose, value in self._seconds.items()}
        rest = self.elapsed_seconds - sum(self._seconds.values())
        return rounded | {"other": round(max(0.0, rest), 3)}
