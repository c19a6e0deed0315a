"""What Ray Train's controller tells the driver: lines of a file on the machine that both are on.

Ray starts the controller as a process of its own, on the driver's node. The driver alone writes the
run's states, and needs the number of restarts for the next controller.
"""

from __future__ import annotations

import json
import logging
import tempfile
import threading
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol

from jobs.record import State

POLL_SECONDS = 0.5

_log = logging.getLogger(__name__)

Kind = Literal["running", "waiting", "failure", "preemption", "resize", "warning"]
"""running: workers have been started. waiting: for room in the cluster. failure, preemption: the
workers are started again after one. resize: their number changes. warning: something else that
people should know."""


class Told(Protocol):
    """Who is told what becomes of the workers: the run folder (`Telemetry`), or a trial's study."""

    def state(self, state: State, message: str, /, **fields: Any) -> None: ...
    def event(self, event: str, message: str, /, **fields: Any) -> None: ...


@dataclass(frozen=True)
class Notice:
    """One line of the controller's."""

    kind: Kind
    message: str


def write_notice(path: Path, kind: Kind, message: str) -> None:
    """Adds a line; one write, so that the reader sees all of it or nothing."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(Notice(kind, message))) + "\n")


class NoticeReader:
    """Passes notices on to the run folder as they come, and counts them. A context manager."""

    def __init__(self, told: Told) -> None:
        self._told = told
        self._folder = tempfile.TemporaryDirectory(prefix="shoal-notices-")
        self.path = Path(self._folder.name) / "notices.jsonl"
        self.counts: Counter[str] = Counter()
        """By kind; of all starts of the controller."""
        self._read_bytes = 0
        self._reading = threading.Lock()
        self._has_run = False
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="shoal-notices", daemon=True)

    def __enter__(self) -> NoticeReader:
        self.path.touch()
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
        self._folder.cleanup()

    def look(self) -> None:
        """Reads what has come; it is counted when this returns."""
        with self._reading:
            with self.path.open("rb") as file:
                file.seek(self._read_bytes)
                whole, newline, _ = file.read().rpartition(b"\n")
            self._read_bytes += len(whole) + len(newline)
            for line in whole.splitlines():
                try:
                    notice = Notice(**json.loads(line))
                except (ValueError, TypeError):
                    _log.warning("a notice of Ray's controller cannot be read: %r", line)
                else:
                    self._pass_on(notice)

    def _pass_on(self, notice: Notice) -> None:
        self.counts[notice.kind] += 1
        if notice.kind == "running":
            self._has_run = True
        elif notice.kind == "warning":
            self._told.event("warning", notice.message)
        else:
            state = State.RECOVERING if self._has_run else State.STARTING
            self._told.state(state, notice.message)

    def _run(self) -> None:
        while not self._closing.wait(POLL_SECONDS):
            try:
                self.look()
            except OSError as error:
                _log.warning("notices of Ray's controller cannot be read at present: %s", error)
