"""Patience with a store that is away: its user waits, says so, and goes on when it is back.

    patience = Patience(limit_seconds=1800, tell=...)
    store = patience.store(open_store(uri))     a Store whose every operation waits
    patience.call(lambda: fetch(...))           any other action that may be repeated

The store itself retries for less than a minute; what it raises then, as StoreAway, is met here.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import tenacity

from cluster.storage import Head, PreconditionFailed, Store, StoreAway, Unfinished
from jobs.errors import Problem
from trainers import watchdog

_FIRST_PAUSE_SECONDS = 1.0
_LONGEST_PAUSE_SECONDS = 15.0
_SAY_AGAIN_SECONDS = 60.0
_LOOK_SECONDS = 0.25

Given = TypeVar("Given")
Tell = Callable[[str, bool], None]
"""(sentence, whether the wait is over). Called from the thread that waits; must not raise."""


class Patience:
    """Repeats what a store that is away has refused. Thread-safe: waits at one time are told as
    one, when the first begins, each minute, and when the last one has ended well."""

    def __init__(self, *, limit_seconds: float, tell: Tell | None = None) -> None:
        """`limit_seconds` is the longest wait for one action, from its first failure on."""
        self.tell = tell
        self._limit_seconds = limit_seconds
        self._lock = threading.Lock()
        self._num_waiting = 0
        self._began_at = 0.0
        self._said_at = 0.0

    def store(self, store: Store, *, unless: Callable[[], None] | None = None) -> PatientStore:
        """The store with this patience in every operation; `unless` as in `call`."""
        return PatientStore(store, self, unless=unless)

    def call(
        self, action: Callable[[], Given], *, unless: Callable[[], None] | None = None
    ) -> Given:
        """What `action` gives, repeated after growing pauses while it raises StoreAway.

        Once the limit is reached that error is raised. `unless` is asked all the time during a
        wait, and raises where nobody needs the result any more.
        """
        since: float | None = None

        def wait(state: tenacity.RetryCallState) -> None:
            nonlocal since
            away = state.outcome.exception() if state.outcome is not None else None
            if since is None:
                since = time.monotonic()
                waiting.enter_context(watchdog.suspended("waits for the store"))
                self._begin(str(away))
            else:
                self._say_again(str(away))

        def left() -> float:
            return self._limit_seconds - (time.monotonic() - since if since is not None else 0.0)

        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(StoreAway),
            # Also where the store asks for a longer pause, it is tried when the time is over.
            wait=lambda state: max(0.0, min(_pause(state), left())),
            stop=lambda _: left() <= 0,
            before_sleep=wait,
            sleep=lambda seconds: _sleep(seconds, unless),
            reraise=True,
        )
        is_back = False
        with contextlib.ExitStack() as waiting:
            try:
                given = retrying(action)
                is_back = True
            except StoreAway as away:
                raise self._given_up(away, seconds=self._limit_seconds - left()) from away
            finally:
                if since is not None:
                    self._end(is_back=is_back)
        return given

    def _begin(self, reason: str) -> None:
        with self._lock:
            self._num_waiting += 1
            is_first = self._num_waiting == 1
            if is_first:
                self._began_at = self._said_at = time.time()
        if is_first:
            self._say(self._waiting(reason), is_over=False)

    def _say_again(self, reason: str) -> None:
        with self._lock:
            is_due = time.time() - self._said_at >= _SAY_AGAIN_SECONDS
            if is_due:
                self._said_at = time.time()
        if is_due:
            self._say(self._waiting(reason), is_over=False)

    def _end(self, *, is_back: bool) -> None:
        with self._lock:
            self._num_waiting -= 1
            is_last = self._num_waiting == 0
        if is_last and is_back:
            seconds = time.time() - self._began_at
            self._say(f"the store is back after {seconds:.1f} s", is_over=True)

    def _waiting(self, reason: str) -> str:
        since = datetime.fromtimestamp(self._began_at, UTC)
        return f"waits for the store since {since:%H:%M:%S} UTC: {reason}"

    def _say(self, sentence: str, *, is_over: bool) -> None:
        sys.stderr.write(f"shoal: {sentence}\n")
        if self.tell is not None:
            self.tell(sentence, is_over)

    def _given_up(self, away: StoreAway, *, seconds: float) -> StoreAway:
        return StoreAway(
            *(
                Problem(
                    f"{problem.message}, for {seconds / 60:.3g} minutes now (retries.wait_minutes)",
                    "see that the store answers, then go on: shoal resume RUN",
                )
                for problem in away.problems
            )
        )


_pause_at_random = tenacity.wait_random_exponential(
    multiplier=_FIRST_PAUSE_SECONDS, max=_LONGEST_PAUSE_SECONDS
)


def _pause(state: tenacity.RetryCallState) -> float:
    """Seconds before the next try: as the store has asked for, else longer each time."""
    away = state.outcome.exception() if state.outcome is not None else None
    asked = away.after_seconds if isinstance(away, StoreAway) else 0.0
    return max(asked, _pause_at_random(state))


def _sleep(seconds: float, unless: Callable[[], None] | None) -> None:
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0:
        if unless is not None:
            unless()
        time.sleep(min(left, _LOOK_SECONDS))


class PatientStore:
    """A Store that is waited for; see cluster.storage.Store for the contract.

    Lists are whole before the first of their items is given.
    """

    def __init__(
        self, store: Store, patience: Patience, *, unless: Callable[[], None] | None = None
    ) -> None:
        self._store = store
        self._patience = patience
        self._unless = unless

    def __repr__(self) -> str:
        return f"PatientStore({self._store!r})"

    def _wait(self, action: Callable[[], Given]) -> Given:
        return self._patience.call(action, unless=self._unless)

    @property
    def uri(self) -> str:
        return self._store.uri

    @property
    def filesystem_root(self) -> str:
        return self._store.filesystem_root

    def within(self, prefix: str) -> PatientStore:
        return PatientStore(self._store.within(prefix), self._patience, unless=self._unless)

    def filesystem(self) -> Any:
        return self._wait(self._store.filesystem)

    def read(self, key: str) -> bytes:
        return self._wait(lambda: self._store.read(key))

    def read_range(self, key: str, *, start: int, end: int) -> bytes:
        return self._wait(lambda: self._store.read_range(key, start=start, end=end))

    def head(self, key: str) -> Head | None:
        return self._wait(lambda: self._store.head(key))

    def list(self, prefix: str = "", *, after: str | None = None) -> Iterator[Head]:
        return iter(self._wait(lambda: [*self._store.list(prefix, after=after)]))

    def list_folders(self, prefix: str = "") -> Iterator[str]:
        return iter(self._wait(lambda: [*self._store.list_folders(prefix)]))

    def download(self, key: str, path: Path, *, hashed: bool = False) -> str:
        return self._wait(lambda: self._store.download(key, path, hashed=hashed))

    def copy(self, source: str, key: str) -> None:
        self._wait(lambda: self._store.copy(source, key))

    def upload(self, key: str, path: Path) -> str:
        return self._wait(lambda: self._store.upload(key, path))

    def write(self, key: str, data: bytes | memoryview) -> str:
        return self._wait(lambda: self._store.write(key, data))

    def write_if_absent(self, key: str, data: bytes | memoryview) -> str:
        return self._write_once(key, data, lambda: self._store.write_if_absent(key, data))

    def write_if_match(self, key: str, data: bytes | memoryview, *, etag: str) -> str:
        return self._write_once(key, data, lambda: self._store.write_if_match(key, data, etag=etag))

    def _write_once(self, key: str, data: bytes | memoryview, write: Callable[[], str]) -> str:
        """The ETag of a conditional write that won, be it by a try whose answer was lost."""
        was_tried = False

        def attempt() -> str:
            nonlocal was_tried
            again, was_tried = was_tried, True
            try:
                return write()
            except PreconditionFailed:
                head = self._store.head(key) if again else None
                if head is None or self._store.read(key) != bytes(data):
                    raise
                return head.etag

        return self._wait(attempt)

    def list_unfinished(self, prefix: str = "") -> Iterator[Unfinished]:
        return iter(self._wait(lambda: [*self._store.list_unfinished(prefix)]))

    def drop_unfinished(self, unfinished: Iterable[Unfinished]) -> None:
        doomed = [*unfinished]
        self._wait(lambda: self._store.drop_unfinished(doomed))

    def delete(self, keys: Iterable[str]) -> None:
        doomed = [*keys]
        self._wait(lambda: self._store.delete(doomed))
