"""Trials that break off by no fault of their own, and the slots on which they do."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Collection

_GENERAL = 3
"""Setbacks on all slots, and at least so many, are no trial's fault."""
_LONGEST_HOLD_SECONDS = 60.0


class Setbacks:
    """Slots on which trials broke off by no fault of their own since any trial has reported."""

    def __init__(self) -> None:
        self._counts = Counter[str]()
        self._until: dict[str, float] = {}

    def note(self, slot: str) -> None:
        """A trial has broken off there."""
        self._counts[slot] += 1
        seconds = min(_LONGEST_HOLD_SECONDS, 2.0 ** self._counts[slot])
        self._until[slot] = time.monotonic() + seconds

    def holds(self, slot: str) -> bool:
        """Whether the slot is to wait: twice as long after each setback. Others may do better."""
        return time.monotonic() < self._until.get(slot, 0.0)

    def are_general(self, slots: Collection[str]) -> bool:
        """Whether it is all slots that cannot go on."""
        return self._counts.keys() >= set(slots) and self._counts.total() >= _GENERAL

    def forget(self, slot: str) -> None:
        """Its process has died, and perhaps what was wrong with it."""
        self._counts.pop(slot, None)
        self._until.pop(slot, None)

    def clear(self) -> None:
        """A trial has reported."""
        self._counts.clear()
