"""What a rank or a driver tells the run folder: lines of events, metrics and logs; trackers.

Lines are buffered and flushed every few seconds as numbered whole objects. Telemetry never stops
training: while the store does not answer, lines wait (up to a bound), and the process's stderr
says so.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any

from cluster.storage import StorageError, Store, Transfer
from jobs.record import LineKind, RunPaths, Source, State
from trainers.tracking.feeds import Feed, close_all
from trainers.tracking.tracker import Told, point_of

FLUSH_SECONDS = 2.0
IMPATIENT = Transfer(retry_seconds=4.0)
"""How telemetry moves its objects: its lines wait for the next turn rather than for the store."""
MAX_WAITING_LINES = 100_000
"""Lines kept in memory while the store does not answer; the oldest go first after that. Those of an
object whose write failed come on top."""

_OWN_LOGGERS = frozenset({"shoal", "cluster", "jobs", "trainers"})
"""Only these are heard below warnings: libraries tell much that nobody asked for."""

_SECRETS = (
    "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "HF_TOKEN", "RAY_AUTH_TOKEN",
    "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "WANDB_API_KEY",
)  # fmt: skip
"""Variables whose values never belong into a line."""
_LEAST_SECRET_CHARACTERS = 8
"""Shorter values are no secrets, and would mask what has nothing to do with them."""

log = logging.getLogger("shoal")


class LineWriter:
    """One stream of JSON lines; `write` returns at once, a thread flushes.

    Secrets of the environment, as it is when the stream is opened, are written as `***`.
    """

    def __init__(self, store: Store, paths: RunPaths, kind: LineKind, source: Source) -> None:
        self._store = store
        self._paths = paths
        self._kind: LineKind = kind
        self._source = source
        self._lock = threading.Lock()
        self._flush_lock = threading.Lock()
        self._lines: list[str] = []
        self._sending: list[str] = []
        """Lines of the object `_number`, fixed from its first write on: one whose answer was lost
        may have been read."""
        values = {os.environ.get(name, "") for name in _SECRETS}
        # The longest first, as one may be a part of another.
        self._secrets = sorted(
            (v for v in values if len(v) >= _LEAST_SECRET_CHARACTERS), key=len, reverse=True
        )
        self._num_lost = 0
        self._number = 1
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"shoal-{kind}-writer", daemon=True)
        self._thread.start()

    def write(self, line: dict[str, Any]) -> None:
        """Adds a line; `time` is set to now where it is absent."""
        line = {"time": round(time.time(), 3)} | line
        if self._secrets:
            line = self._masked(line)
        text = json.dumps(line, default=str)
        with self._lock:
            self._lines.append(text)
            self._drop_oldest()

    def flush(self) -> None:
        """Makes all lines so far durable, as one object; StorageError leaves them waiting.

        An object whose write failed before is written first, as it was.
        """
        with self._flush_lock:
            self._send()
            with self._lock:
                self._sending, self._lines = self._lines, []
            self._send()

    def close(self) -> None:
        """Flushes and ends the thread."""
        self._closing.set()
        self._thread.join()
        self._flush_or_say()

    def _run(self) -> None:
        while not self._closing.wait(FLUSH_SECONDS):
            self._flush_or_say()

    def _flush_or_say(self) -> None:
        try:
            self.flush()
        except StorageError as error:
            sys.stderr.write(f"shoal: {self._kind} are not written at present: {error}\n")
        with self._lock:
            num_lost, self._num_lost = self._num_lost, 0
        if num_lost:
            sys.stderr.write(f"shoal: {num_lost} lines of {self._kind} are lost: too many waited\n")

    def _send(self) -> None:
        if self._sending:
            key = self._paths.lines(self._kind, self._source, self._number)
            self._store.write(key, ("\n".join(self._sending) + "\n").encode())
            self._number += 1
            self._sending = []

    def _masked(self, value: Any) -> Any:
        """The value, with secrets masked in every text of it."""
        if value is None or isinstance(value, bool | int | float):
            return value
        if isinstance(value, Mapping):
            return {key: self._masked(inner) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return [self._masked(inner) for inner in value]
        text = str(value)
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return text

    def _drop_oldest(self) -> None:
        excess = len(self._lines) - MAX_WAITING_LINES
        if excess > 0:
            num_lost = max(excess, MAX_WAITING_LINES // 10)
            del self._lines[:num_lost]
            self._num_lost += num_lost


class LogHandler(logging.Handler):
    """Sends log records of this process to a stream of lines."""

    def __init__(self, writer: LineWriter, source: Source) -> None:
        super().__init__()
        self._writer = writer
        self._fields = {
            "rank": source.rank,
            "attempt": source.number if source.rank is not None else None,
            "generation": source.number if source.rank is None else None,
        }

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._emit(record)
        except Exception:  # as logging's own handlers: who logs must not fail by it
            self.handleError(record)

    def _emit(self, record: logging.LogRecord) -> None:
        if record.levelno < logging.WARNING and record.name.partition(".")[0] not in _OWN_LOGGERS:
            return
        line: dict[str, Any] = {
            "time": record.created,
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **self._fields,
        }
        if record.exc_info and record.exc_info[1] is not None:
            line["traceback"] = "".join(traceback.format_exception(record.exc_info[1]))
        self._writer.write(line)


class Telemetry:
    """The streams of one writer. A context manager: closing flushes everything."""

    def __init__(
        self, store: Store, paths: RunPaths, source: Source, *, rows: bool = False
    ) -> None:
        self.source = source
        self._events = LineWriter(store, paths, "events", source)
        self._metrics = LineWriter(store, paths, "metrics", source)
        self._logs = LineWriter(store, paths, "logs", source)
        self._rows = LineWriter(store, paths, "rows", source) if rows else None
        self._handler = LogHandler(self._logs, source)
        self._feeds: list[Feed] = []

    def __enter__(self) -> Telemetry:
        root = logging.getLogger()
        root.addHandler(self._handler)
        for name in _OWN_LOGGERS:
            logging.getLogger(name).setLevel(logging.INFO)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None:
            log.error("%s", error, exc_info=error)
        logging.getLogger().removeHandler(self._handler)
        with contextlib.ExitStack() as stack:  # all of them, though one should raise
            for stream in (self._events, self._logs, self._rows, self._metrics):
                if stream is not None:
                    stack.callback(stream.close)
            # First, as they may have warnings to tell.
            stack.callback(close_all, self._feeds)

    def with_trackers(self, feeds: Iterable[Feed]) -> None:
        """From now on metrics also go to these; they are closed with this."""
        self._feeds += feeds

    def track(self, told: Told) -> None:
        """Tells the trackers alone."""
        for feed in self._feeds:
            feed.put(told)

    def warn(self, message: str) -> None:
        """An event that is a warning."""
        self.event("warning", message)

    def event(self, event: str, message: str, **fields: Any) -> None:
        """An event: state, checkpoint, evaluation, attempt, retention, extended, skipped, warning
        or error."""
        span = "generation" if self.source.rank is None else "attempt"
        self._events.write({"event": event, "message": message, span: self.source.number, **fields})

    def state(self, state: State, message: str, **fields: Any) -> None:
        """A change of the run's state, made durable at once where the store answers."""
        self.event("state", message, state=state.value, **fields)
        self._events._flush_or_say()

    def metrics(self, line: dict[str, Any]) -> None:
        """A line of metrics; numbers also go to the trackers."""
        self._metrics.write({"attempt": self.source.number, **line})
        point = point_of(line, time=time.time())
        if point is not None:
            self.track(point)

    def rows(self, line: dict[str, Any]) -> None:
        """The ids of the rows of a step, where the job asks for them."""
        if self._rows is not None:
            self._rows.write({"attempt": self.source.number, **line})

    def require_durable(self) -> None:
        """Makes metrics and rows so far durable; StorageError where the store does not answer."""
        for stream in (self._metrics, self._rows):
            if stream is not None:
                stream.flush()

    def last_words(self) -> None:
        """Makes events and logs so far durable, as far as the store answers."""
        for stream in (self._events, self._logs):
            stream._flush_or_say()

    def flush(self) -> None:
        """Makes metrics and rows so far durable, as far as the store answers."""
        for stream in (self._metrics, self._rows):
            if stream is not None:
                stream._flush_or_say()
