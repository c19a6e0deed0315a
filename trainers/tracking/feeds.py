"""A run's trackers, each fed by a thread of its own: none can stop or slow the run.

    feeds = start_feeds(assignment, store, attempt=3, warn=...)
    feed.put(Point(...))        returns at once
    feed.close()                waits for what is left, within a bound

A tracker that fails, or is away, is told of once; what it did not take it is given again, and the
oldest of what waits goes first where that becomes too much.
"""

from __future__ import annotations

import itertools
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence

from cluster.storage import ObjectMissing, StorageError, Store
from jobs.record import Result, RunPaths
from trainers.assignment import Assignment
from trainers.tracking.tracker import Ended, Parameters, Point, Told, TrackedRun, Tracker

TURN_SECONDS = 2.0
TENSORBOARD_TURN_SECONDS = 30.0
"""Its file is uploaded as a whole each time."""
LONGEST_PAUSE_SECONDS = 60.0
END_SECONDS = 15.0
"""How long the end of a run, or of a trial, waits for a tracker."""
AWAY_SECONDS = 0.1
"""The same, for one that has not kept to that in this process before: trials of a study are many,
and would each wait in vain."""
MOST_WAITING = 10_000
MOST_POINTS = 100
"""Told to a tracker at once."""
MOST_TRIES = 5
"""How often something is told to a tracker that refuses it."""
MOST_REPORT_BYTES = 5 * 2**20
"""A larger report stays in the run folder alone."""

Warn = Callable[[str], None]

_away: set[str] = set()
"""Trackers that have not kept to END_SECONDS."""


def start_feeds(
    assignment: Assignment, store: Store, *, attempt: int | None, warn: Warn
) -> list[Feed]:
    """A feed for each tracker that the job asks for; `store` is that of the run folder.

    `attempt` is None in a driver, which has nothing to say that TensorBoard's files could hold.
    """
    run = TrackedRun.of(assignment)

    def tensorboard() -> Tracker:
        from trainers.tracking.tensorboard import TensorBoard

        paths = RunPaths(assignment.run_id)
        return TensorBoard(store, f"{paths.tensorboard}attempt-{attempt:04d}/")

    def mlflow() -> Tracker:
        from trainers.tracking.mlflow_run import MlflowRun

        return MlflowRun(run)

    def wandb() -> Tracker:
        from trainers.tracking.wandb_run import WandbRun

        return WandbRun(run)

    asked, feeds = assignment.spec.tracking, list[Feed]()
    if "tensorboard" in asked and attempt is not None:
        turn = TENSORBOARD_TURN_SECONDS
        feeds.append(Feed("TensorBoard", tensorboard, warn=warn, turn_seconds=turn))
    if "mlflow" in asked:
        feeds.append(Feed("MLflow", mlflow, warn=warn))
    if "wandb" in asked:
        feeds.append(Feed("W&B", wandb, warn=warn))
    return feeds


def tell_end(assignment: Assignment, store: Store, result: Result, *, warn: Warn) -> None:
    """Tells a run's trackers how it ended, with its report if it has one that is not large."""
    feeds = start_feeds(assignment, store, attempt=None, warn=warn)
    if not feeds:
        return
    report = None
    try:
        head = store.head(RunPaths(assignment.run_id).report_html)
        if head is not None and head.num_bytes <= MOST_REPORT_BYTES:
            report = store.read(head.key).decode()
    except (StorageError, ObjectMissing) as error:
        warn(f"the report cannot be read for the run's trackers: {error}")
    for feed in feeds:
        feed.put(Ended.of_run(result, report=report))
    close_all(feeds)


def close_all(feeds: Iterable[Feed]) -> None:
    """Closes feeds at one time, so that the bound holds for all of them together."""
    closing = [threading.Thread(target=feed.close, daemon=True) for feed in feeds]
    for thread in closing:
        thread.start()
    for thread in closing:
        thread.join()


class Feed:
    """What a tracker is told, in order, by a thread of its own that opens, feeds and closes it."""

    def __init__(
        self,
        name: str,
        open_tracker: Callable[[], Tracker],
        *,
        warn: Warn,
        turn_seconds: float = TURN_SECONDS,
    ) -> None:
        """`warn` is called from any thread, and must not raise."""
        self._name = name
        self._open = open_tracker
        self._warn = warn
        self._turn_seconds = turn_seconds
        self._lock = threading.Lock()
        self._waiting = deque[Told]()
        self._sending: list[Told] = []
        self._tries = 0
        self._num_lost = 0
        self._is_told = False
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"shoal-{name}", daemon=True)
        self._thread.start()

    def put(self, told: Told) -> None:
        """To be told when the tracker's turn comes."""
        with self._lock:
            if len(self._waiting) >= MOST_WAITING:
                self._waiting.popleft()
                self._num_lost += 1
            self._waiting.append(told)

    def close(self) -> None:
        """Tells what is left, and ends the thread; at most END_SECONDS are waited for it."""
        self._closing.set()
        self._thread.join(AWAY_SECONDS if self._name in _away else END_SECONDS)
        if self._thread.is_alive():
            _away.add(self._name)
            self._say(f"has not taken everything within {END_SECONDS:g} s; nobody waits for it")
            return
        _away.discard(self._name)
        if self._num_lost:
            self._warn(f"{self._name} lacks {self._num_lost} entries that it did not take")

    def _run(self) -> None:
        tracker: Tracker | None = None
        pause = 0.0
        is_last = False
        while not is_last:
            is_last = self._closing.wait(pause)
            try:
                tracker = tracker or self._open()
                self._tell(tracker)
                pause = self._turn_seconds
            except ImportError as error:
                self._say(f"is not told of this run: {error}")
                return
            except Exception as error:
                self._say(f"takes nothing at present: {type(error).__name__}: {error}")
                pause = min(2 * max(pause, self._turn_seconds), LONGEST_PAUSE_SECONDS)
        self._num_lost += len(self._sending) + len(self._waiting)
        if tracker is not None:
            try:
                tracker.close()
            except Exception as error:
                self._say(f"was not closed: {type(error).__name__}: {error}")

    def _tell(self, tracker: Tracker) -> None:
        """Tells all that waits; raises what the tracker does, and keeps what it did not take."""
        while True:
            with self._lock:
                if not self._sending:
                    self._sending = list(self._waiting)
                    self._waiting.clear()
            if not self._sending:
                return
            for batch in _batches(self._sending):
                self._tries += 1
                try:
                    _tell(tracker, batch)
                except Exception:
                    if self._tries < MOST_TRIES:
                        raise
                    self._num_lost += len(batch)
                    self._forget(batch)
                    raise
                self._forget(batch)

    def _forget(self, batch: Sequence[Told]) -> None:
        self._tries = 0
        self._sending = self._sending[len(batch) :]

    def _say(self, what: str) -> None:
        """A warning, once."""
        if not self._is_told:
            self._is_told = True
            self._warn(f"{self._name} {what}. The run goes on without it")


def _batches(told: Sequence[Told]) -> Iterator[list[Told]]:
    """What may be told at once: points that follow each other, anything else by itself."""
    for is_point, group in itertools.groupby(told, lambda each: isinstance(each, Point)):
        items = list(group)
        size = MOST_POINTS if is_point else 1
        yield from (items[start : start + size] for start in range(0, len(items), size))


def _tell(tracker: Tracker, batch: Sequence[Told]) -> None:
    match batch[0]:
        case Parameters() as parameters:
            tracker.describe(parameters)
        case Ended() as ended:
            tracker.end(ended)
        case Point():
            tracker.log([each for each in batch if isinstance(each, Point)])
