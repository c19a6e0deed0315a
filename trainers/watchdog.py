"""The watchdog of a rank: it ends a process that hangs, so that whoever started it sees it end.

    with Watchdog(limit_seconds=600):               while the rank works
        tick("reads rows")                          wherever work gets on, from any thread
        with suspended("waits for the store"):      where somebody else bounds the wait and tells it

It ends the process where neither this rank nor any other has got on for the limit. So a rank may
wait as long as another one works (an upload, say) or is suspended; and where one is stuck, frozen
or cut off, all that wait for it end too. In a process without a watchdog `tick` and `suspended` do
nothing.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType

HUNG_EXIT_CODE = 79
_TELL_SECONDS = 20.0
"""How long the last words may take: they need the store, which may be what hangs."""
_LOOKS_A_LIMIT = 20
_MAX_LOOK_SECONDS = 5.0


@dataclass(frozen=True)
class Hang:
    """Where a rank stands that makes no progress."""

    doing: str
    seconds: float
    """Since the last progress."""
    stacks: str
    """Of all threads."""


class Watchdog:
    """Watches this process. A context manager; one at a time in a process."""

    def __init__(
        self,
        *,
        limit_seconds: float,
        end: Callable[[int], None] = os._exit,
    ) -> None:
        self.limit_seconds = limit_seconds
        self.tell: Callable[[Hang], None] = lambda _: None
        """Says durably where the rank stands; it is given 20 seconds, in a thread of its own."""
        self.others: Callable[[], object] = lambda: None
        """Gives another value when other ranks have got on. It must not block."""
        self._end = end
        self._doing = "starts"
        self._ticks = 0
        self._num_suspended = 0
        self._lock = threading.Lock()
        self.looks = 0
        """How often it has looked."""
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name="shoal-watchdog", daemon=True)

    @property
    def look_seconds(self) -> float:
        """Time between two looks."""
        return min(_MAX_LOOK_SECONDS, self.limit_seconds / _LOOKS_A_LIMIT)

    def progress(self) -> int:
        """A number that changes while this rank gets on, or is suspended."""
        if self._num_suspended:
            self._ticks += 1
        return self._ticks

    def tick(self, doing: str | None = None) -> None:
        """This rank gets on; `doing` says what it does now."""
        self._ticks += 1  # several threads may lose a tick of each other, but never all
        if doing is not None:
            self._doing = doing

    @contextmanager
    def suspended(self, doing: str) -> Iterator[None]:
        """Inside the block this rank is taken to get on."""
        before, self._doing = self._doing, doing
        with self._lock:
            self._num_suspended += 1
        try:
            yield
        finally:
            with self._lock:
                self._num_suspended -= 1
            self.tick(before)

    def __enter__(self) -> Watchdog:
        global _own  # work ticks in places that know nothing of who started it
        assert _own is None, "this process is watched already"
        _own = self
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        global _own
        _own = None
        self._ending.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()

    def _run(self) -> None:
        seen: tuple[int, object] | None = None
        since = time.monotonic()
        while not self._ending.wait(self.look_seconds):
            # Where some code keeps the interpreter's lock, no thread looks any more, but this one,
            # which needs no lock, ends the process (with code 1, and the stacks on stderr).
            faulthandler.dump_traceback_later(
                self.limit_seconds + self.look_seconds, exit=True, file=2
            )
            self.looks += 1
            now = self.progress(), self.others()
            if now != seen:
                seen, since = now, time.monotonic()
            quiet_seconds = time.monotonic() - since
            if quiet_seconds >= self.limit_seconds:
                self._say_and_end(Hang(self._doing, quiet_seconds, _stacks()))
                return

    def _say_and_end(self, hang: Hang) -> None:
        faulthandler.cancel_dump_traceback_later()

        def say() -> None:
            sys.stderr.write(
                f"shoal: no progress for {hang.seconds:.0f} s ({hang.doing}); this process ends\n"
                f"{hang.stacks}"
            )
            sys.stderr.flush()
            self.tell(hang)

        saying = threading.Thread(target=say, name="shoal-last-words", daemon=True)
        saying.start()
        saying.join(_TELL_SECONDS)
        self._end(HUNG_EXIT_CODE)


_own: Watchdog | None = None


def tick(doing: str | None = None) -> None:
    """This process gets on; `doing` says what its main thread does now, and is not given by
    others."""
    if _own is not None:
        _own.tick(doing)


@contextmanager
def suspended(doing: str) -> Iterator[None]:
    """Inside the block this process is taken to get on: somebody else bounds the wait and tells
    it."""
    if _own is None:
        yield
        return
    with _own.suspended(doing):
        yield


def _stacks() -> str:
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    return "".join(
        f"thread {names.get(ident, ident)}:\n{''.join(traceback.format_stack(frame))}"
        for ident, frame in sys._current_frames().items()
    )
