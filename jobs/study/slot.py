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
from dataclasses import dataclass
from functools import partial
from typing import Any

from cluster.storage import open_store
from jobs.record import Failure, Outcome
from jobs.spec import StoreAt
from jobs.study.engine import Report
from trainers.assignment import Assignment, EvaluationReport, Verdict

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


@dataclass(frozen=True)
class Begun:
    """From a slot: its clone has the donor's checkpoint."""


@dataclass(frozen=True)
class Told:
    """From a slot: its trial has evaluated its model, and waits."""

    report: Report


@dataclass(frozen=True)
class Gone:
    """From a slot: its trial has ended or is left with its state durable, or it broke off."""

    outcome: Outcome | None
    crash: Failure | None = None


@dataclass(frozen=True)
class Tested:
    """From a slot: what it has measured, or why it cannot."""

    evaluation: dict[str, Any] | None
    failure: Failure | None


Saying = Free | Begun | Told | Gone | Tested


# ------------------------------------------------------------------------------------- the slot


class SlotWork:
    """What the process of a slot does; in a thread, so that the loop of a trial can stay where it
    is while it waits for an answer."""

    def __init__(self) -> None:
        self._answers: queue.SimpleQueue[Answer] = queue.SimpleQueue()
        self._sayings: queue.SimpleQueue[Saying] = queue.SimpleQueue()
        self._work: threading.Thread | None = None

    def hear(self, order: Order) -> None:
        """What is to be done after the last saying."""
        if isinstance(order, Answer):
            self._answers.put(order)
        elif not isinstance(order, Wait):
            work = (
                Stretch(order, self._ask).run if isinstance(order, Train) else partial(_test, order)
            )
            self._work = threading.Thread(
                target=lambda: self._sayings.put(work()), name="shoal-trial", daemon=True
            )
            self._work.start()

    def say(self) -> Saying:
        """What there is to be said, once there is something."""
        if self._work is None:
            time.sleep(_IDLE_SECONDS)
            return Free()
        said = self._sayings.get()
        if isinstance(said, Gone | Tested):
            self._work.join()
            self._work = None
        return said

    def _ask(self, said: Begun | Told) -> Answer:
        self._sayings.put(said)
        return self._answers.get()


class Stretch:
    """A stretch of a trial in a slot."""

    def __init__(self, order: Train, ask: Callable[[Begun | Told], Answer]) -> None:
        self._assignment = order.assignment
        self._until = order.until
        self._ask = ask
        self._since = time.monotonic()

    def run(self) -> Gone:
        """Trains until the study has another trial for the slot, or until the trial has ended."""
        from trainers.trial import prepare_trial, record_end, run_trial

        try:
            assignment = prepare_trial(self._assignment)
            if assignment.trial is not None and assignment.trial.donor is not None:
                self._ask(Begun())
            outcome = run_trial(assignment, self._decide)
            record_end(assignment, outcome)
            return Gone(outcome)
        except Exception as error:
            # As a retry may go otherwise: the desk counts it.
            _log.exception("the trial broke off")
            return Gone(None, Failure.of(error, where=f"slot on {socket.gethostname()}"))

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


def _test(order: Test) -> Tested:
    """The best model of a trial on other data."""
    from trainers.evaluate import evaluate_run

    try:
        store = open_store(order.store.uri, order.store.access)
        return Tested(evaluate_run(store, order.run_id, order.data, None), None)
    except Exception as error:
        return Tested(None, Failure.of(error, where=f"slot on {socket.gethostname()}"))
