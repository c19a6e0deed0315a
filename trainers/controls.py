"""Requests to a run, heard by rank 0: objects that appear in the run folder's control folder."""

from __future__ import annotations

import re
import sys
import threading
import time
from dataclasses import dataclass, replace
from types import TracebackType

from pydantic import ValidationError

from cluster.storage import Store, write_numbered
from jobs.record import Control, RunPaths
from trainers.fence import Fence, Superseded

POLL_SECONDS = 1.0


@dataclass(frozen=True)
class Requests:
    """What a rank was asked for between two steps."""

    stop: bool = False
    """Save, and end the run."""
    save: bool = False
    """Save, and go on."""
    yields: bool = False
    """Save, and end the attempt: another one goes on."""
    superseded: Superseded | None = None
    """Why the attempt must end at once, without being asked."""

    @property
    def ends(self) -> bool:
        """Whether the attempt is to end, for any reason."""
        return self.stop or self.yields or self.superseded is not None

    def __or__(self, other: Requests) -> Requests:
        return Requests(
            stop=self.stop or other.stop,
            save=self.save or other.save,
            yields=self.yields or other.yields,
            superseded=self.superseded or other.superseded,
        )


def last_request(store: Store, paths: RunPaths) -> int:
    """Number of the newest request to the run; 0 without any."""
    names = (
        head.key.rpartition("/")[2].removesuffix(".json") for head in store.list(paths.control)
    )
    return max((int(name) for name in names if name.isdigit()), default=0)


def last_attempt(store: Store, paths: RunPaths) -> int:
    """Number of the newest attempt of the run; 0 without any."""
    names = (head.key.rpartition("/")[2] for head in store.list(paths.attempts))
    numbers = (re.match(r"(\d+)[-.]", name) for name in names)
    return max((int(number[1]) for number in numbers if number), default=0)


def ask_to_yield(store: Store, paths: RunPaths, *, attempt: int, generation: int, by: str) -> None:
    """Asks an attempt of a driver to save its state and give way to the next one."""
    control = Control(
        kind="yield", requested_at=time.time(), by=by, attempt=attempt, generation=generation
    )
    write_numbered(
        store, paths.control_request, control.to_bytes(), after=last_request(store, paths)
    )


def requests_to(
    store: Store, paths: RunPaths, *, after: int, attempt: int, generation: int
) -> Requests:
    """What requests later than number `after` ask of an attempt of a driver; for where no worker
    hears them."""
    asked = Requests()
    for head in store.list(paths.control, after=paths.control_request(after)):
        try:
            request = Control.model_validate_json(store.read(head.key))
        except ValidationError:
            continue  # no request that is known; the workers will say so
        if request.is_for(attempt=attempt, generation=generation):
            asked = _with(asked, request)
    return asked


def _with(asked: Requests, request: Control) -> Requests:
    return replace(
        asked,
        stop=asked.stop or request.kind == "stop",
        save=asked.save or request.kind == "save",
        yields=asked.yields or request.kind == "yield",
    )


class ControlPoller:
    """Looks for new requests, and over the fence, in a thread of its own. A context manager."""

    def __init__(
        self, store: Store, paths: RunPaths, *, after: int, attempt: int, fence: Fence
    ) -> None:
        self._attempt = attempt
        self._fence = fence
        self._store = store
        self._paths = paths
        self._last_key = paths.control_request(after)
        self._lock = threading.Lock()
        self._asked = Requests()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="shoal-controls", daemon=True)

    def __enter__(self) -> ControlPoller:
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

    def take(self) -> Requests:
        """What was asked for: a save since the last call, the others ever."""
        with self._lock:
            asked, self._asked = self._asked, replace(self._asked, save=False)
            return asked

    def look(self) -> Requests:
        """The same, which the next `take` gives again."""
        with self._lock:
            return self._asked

    def _run(self) -> None:
        while not self._closing.is_set():
            try:
                self._look()
            except Exception as error:  # a thread that ended would never hear a request again
                sys.stderr.write(f"shoal: requests are not heard at present: {error}\n")
            self._closing.wait(POLL_SECONDS)

    def _look(self) -> None:
        try:
            self._fence.check()
        except Superseded as superseded:
            with self._lock:
                self._asked = replace(self._asked, superseded=superseded)
        for head in self._store.list(self._paths.control, after=self._last_key):
            try:
                request = Control.model_validate_json(self._store.read(head.key))
            except ValidationError:
                sys.stderr.write(f"shoal: {head.key} is no request that is known\n")
            else:
                if request.is_for(attempt=self._attempt, generation=self._fence.generation):
                    self._take(request)
            self._last_key = head.key

    def _take(self, request: Control) -> None:
        with self._lock:
            self._asked = _with(self._asked, request)
