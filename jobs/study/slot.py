"""A slot's part of a study: what it is told, what it says, and how it trains a trial.

A slot says one thing at a time, and is told what to do before it says the next.
"""

from __future__ import annotations

import logging
import queue
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from cluster.storage import Store, open_store
from jobs.record import Failure, Outcome, State
from jobs.spec import StoreAt
from jobs.study.engine import Report
from trainers.assignment import Assignment, EvaluationReport, Verdict
from trainers.patience import Patience
from trainers.trial_folder import prepare_trial, record_end

_IDLE_SECONDS = 0.2
_CLOSE = 1e-9
"""Fractions that differ by less are the same."""
_VERDICTS = {
    "continue": Verdict.GO_ON,
    "finish": Verdict.GO_ON,
    "pause": Verdict.PAUSE,
    "stop": Verdict.END,
}

_log = logging.getLogger("shoal.search")


@dataclass(frozen=True)
class Train:
    """To a slot: begin a leg."""

    assignment: Assignment
    until: float


@dataclass(frozen=True)
class Answer:
    """To a slot that has reported."""

    decision: str
    until: float | None


@dataclass(frozen=True)
class Test:
    """To a slot: measure the best model of a trial on a data set."""

    store: StoreAt
    run_id: str
    data: str


@dataclass(frozen=True)
class Wait:
    """To a slot: there is nothing to do for it now."""


Order = Train | Answer | Test | Wait


@dataclass(frozen=True)
class Free:
    """From a slot: it has nothing to do."""

    is_taken: bool = False
    """As of `Gone`."""


@dataclass(frozen=True)
class Begun:
    """From a slot: its clone has the donor's checkpoint."""


@dataclass(frozen=True)
class Told:
    """From a slot: its trial has evaluated its model, and waits."""

    report: Report


@dataclass(frozen=True)
class Note:
    """From a slot: what has become of its trial's workers; it goes on."""

    message: str


@dataclass(frozen=True)
class Gone:
    """From a slot: its trial has ended or is left with its state durable, or it broke off."""

    outcome: Outcome | None
    crash: Failure | None = None
    """Where there is no outcome: what its workers, or the slot itself, broke off with."""
    is_taken: bool = False
    """Whether the slot's node is to go: the slot is given no other trial."""


@dataclass(frozen=True)
class Tested:
    """From a slot: what it has measured, or why it cannot."""

    evaluation: dict[str, Any] | None
    failure: Failure | None


Saying = Free | Begun | Told | Note | Gone | Tested


# ------------------------------------------------------------------------------------- the slot


class SlotWork:
    """What the process of a slot does; in a thread, so that the loop of a trial can stay where it
    is while it waits for an answer."""

    def __init__(
        self,
        *,
        python: str | None = None,
        is_own_cluster: bool = True,
        is_taken: Callable[[], bool] = lambda: False,
    ) -> None:
        """`is_taken`: whether the process's node is to go. The others are how workers are started,
        where a trial has several: as for `trainers.fit.fit`."""
        self._is_taken = is_taken
        self._python = python
        self._is_own_cluster = is_own_cluster
        self._answers: queue.SimpleQueue[Answer] = queue.SimpleQueue()
        self._sayings: queue.SimpleQueue[Saying] = queue.SimpleQueue()
        self._work: threading.Thread | None = None

    def hear(self, order: Order) -> None:
        """What is to be done after the last saying."""
        if isinstance(order, Answer):
            self._answers.put(order)
        elif not isinstance(order, Wait):
            work = partial(_test, order) if isinstance(order, Test) else self._stretch(order).run
            self._work = threading.Thread(
                target=lambda: self._sayings.put(work()), name="shoal-trial", daemon=True
            )
            self._work.start()

    def say(self) -> Saying:
        """What there is to be said, once there is something."""
        if self._work is None:
            time.sleep(_IDLE_SECONDS)
            return Free(is_taken=self._is_taken())
        said = self._sayings.get()
        if isinstance(said, Gone | Tested):
            self._work.join()
            self._work = None
        if isinstance(said, Gone):
            said = replace(said, is_taken=self._is_taken())
        return said

    def _stretch(self, order: Train) -> Stretch:
        return Stretch(
            order,
            self._ask,
            note=lambda message: self._sayings.put(Note(message)),
            python=self._python,
            is_own_cluster=self._is_own_cluster,
            is_taken=self._is_taken,
        )

    def _ask(self, said: Begun | Told) -> Answer:
        self._sayings.put(said)
        return self._answers.get()


class Stretch:
    """A stretch of a trial in a slot."""

    def __init__(
        self,
        order: Train,
        ask: Callable[[Begun | Told], Answer],
        *,
        note: Callable[[str], None],
        python: str | None,
        is_own_cluster: bool,
        is_taken: Callable[[], bool],
    ) -> None:
        self._is_taken = is_taken
        self._note = note
        self._python = python
        self._is_own_cluster = is_own_cluster
        self._assignment = order.assignment
        self._until = order.until
        self._ask = ask
        self._since = time.monotonic()

    def run(self) -> Gone:
        """Trains until the study has another trial for the slot, or until the trial has ended."""
        try:
            store = self._store()
            assignment = self._assignment
            prepare_trial(store, assignment)
            if assignment.trial is not None and assignment.trial.donor is not None:
                self._ask(Begun())
            ended = self._train(assignment)
            if isinstance(ended, Failure):
                return Gone(None, ended)
            record_end(store, assignment, ended)
            return Gone(ended)
        except Exception as error:
            # A retry may go otherwise: the desk says who pays for it.
            _log.exception("the trial broke off")
            return Gone(None, Failure.of(error, where=f"slot on {socket.gethostname()}"))

    def _store(self) -> Store:
        spec = self._assignment.spec
        if spec.workers.count > 1:
            store = open_store(spec.store.uri, spec.store.access)
        else:
            from trainers.trial import kept_store

            store = kept_store(spec.store)
        return Patience(limit_seconds=60 * spec.retries.wait_minutes).store(store)

    def _train(self, assignment: Assignment) -> Outcome | Failure:
        """In this process, or as the driver of several workers; torch is loaded where they are."""
        if assignment.spec.workers.count == 1:
            from trainers.trial import run_trial

            return run_trial(assignment, self._decide, is_taken=self._is_taken)
        from trainers.ray_trial import fit_trial

        return fit_trial(
            assignment,
            self._decide,
            _Notes(self._note),
            python=self._python,
            is_own_cluster=self._is_own_cluster,
        )

    def _decide(self, told: EvaluationReport) -> Verdict:
        if told.fraction < self._until - _CLOSE:
            return Verdict.GO_ON
        now = time.monotonic()
        report = Report(
            step=told.step,
            fraction=told.fraction,
            epochs=told.epochs,
            value=told.value,
            best=told.best,
            seconds=round(now - self._since, 3),
        )
        answer = self._ask(Told(report))
        self._since = time.monotonic()
        if answer.until is not None:
            self._until = answer.until
        return _VERDICTS[answer.decision]


@dataclass(frozen=True)
class _Notes:
    """Tells the study what becomes of a trial's workers; a run folder would be told otherwise."""

    note: Callable[[str], None]

    def state(self, state: State, message: str, /, **fields: Any) -> None:
        self.note(message)

    def event(self, event: str, message: str, /, **fields: Any) -> None:
        self.note(message)


def _test(order: Test) -> Tested:
    """The best model of a trial on other data."""
    from trainers.evaluate import evaluate_run

    try:
        store = open_store(order.store.uri, order.store.access)
        return Tested(evaluate_run(store, order.run_id, order.data, None), None)
    except Exception as error:
        return Tested(None, Failure.of(error, where=f"slot on {socket.gethostname()}"))
