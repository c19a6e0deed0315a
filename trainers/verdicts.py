"""How a trial with several workers asks its study whether it goes on: a connection to its slot.

    with Verdicts(exchange, host="10.0.0.1") as verdicts:   in the slot
        ... verdicts.at ...                                 goes to the workers
    ask(at, report)                                         in the first rank -> Verdict

Each question has a connection of its own, on which both ends prove that they know the key before a
word is said (the challenges of multiprocessing.connection). What is said is JSON. No torch.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
from collections.abc import Callable
from dataclasses import asdict
from multiprocessing import AuthenticationError
from multiprocessing.connection import (
    Client,
    Connection,
    Listener,
    answer_challenge,
    deliver_challenge,
)
from types import TracebackType

from trainers.assignment import EvaluationReport, StudyAt, Verdict

_KEY_BYTES = 32
_MOST_BYTES = 2**16
"""Of a report or a verdict."""
_WAITING = 16
"""Connections that may wait to be taken."""

_log = logging.getLogger("shoal.trial")


class Verdicts:
    """Answers the first rank of one trial, for as long as the block lasts. A context manager."""

    def __init__(self, exchange: Callable[[EvaluationReport], Verdict], *, host: str) -> None:
        """`exchange` asks the study; it is called in one thread at a time. `host` is an address of
        this machine at which the workers reach it."""
        self._exchange = exchange
        self._host = host
        self._asking = threading.Lock()
        self._is_over = False
        self._last: Verdict | None = None

    def __enter__(self) -> Verdicts:
        key = os.urandom(_KEY_BYTES)
        self._listener = Listener((self._host, 0), _family(self._host), backlog=_WAITING)
        port = self._listener.address[1]
        self.at = StudyAt(self._host, int(port), key)
        self._thread = threading.Thread(target=self._listen, name="shoal-verdicts", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Returns when the study is asked nothing more for this trial."""
        with self._asking:
            self._is_over = True
        # Closing it would not wake the thread that waits in it.
        socket.create_connection((self.at.host, self.at.port)).close()
        self._thread.join()
        self._listener.close()

    def is_paused(self) -> bool:
        """Whether the last verdict was that the trial is to pause."""
        return self._last is Verdict.PAUSE

    def _listen(self) -> None:
        while True:
            try:
                connection = self._listener.accept()
            except OSError as error:  # of the one that was to be taken
                _log.warning("a connection for a verdict broke off: %s", error)
                continue
            if self._is_over:
                connection.close()
                return
            # Somebody who says nothing keeps nobody else waiting.
            threading.Thread(
                target=self._answer, args=(connection,), name="shoal-verdict", daemon=True
            ).start()

    def _answer(self, connection: Connection) -> None:
        try:
            with connection:
                deliver_challenge(connection, self.at.key)
                answer_challenge(connection, self.at.key)
                report = EvaluationReport(**json.loads(connection.recv_bytes(_MOST_BYTES)))
                with self._asking:
                    # A rank that was started again may ask while nobody waits any more for the
                    # answer to the one before.
                    if self._is_over:
                        return
                    verdict = self._last = self._exchange(report)
                connection.send_bytes(verdict.encode())
        except (AuthenticationError, EOFError, OSError, TypeError, ValueError) as error:
            _log.warning("a question for a verdict broke off: %s: %s", type(error).__name__, error)


def ask(at: StudyAt, report: EvaluationReport) -> Verdict:
    """The study's verdict on a report; waits for as long as the study takes.

    Raises ConnectionError where nobody answers there, or no longer.
    """
    try:
        with Client((at.host, at.port), _family(at.host), authkey=at.key) as connection:
            connection.send_bytes(json.dumps(asdict(report)).encode())
            return Verdict(connection.recv_bytes(_MOST_BYTES).decode())
    except (AuthenticationError, EOFError, OSError) as error:
        raise ConnectionError(
            f"the study at {at.host} has not answered: {type(error).__name__}: {error}"
        ) from error


def _family(host: str) -> str:
    return "AF_INET6" if ":" in host else "AF_INET"
