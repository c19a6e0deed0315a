"""Questions for a verdict: answered to those who know the key, one at a time, and never late."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import asdict, replace
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client

import pytest

from trainers.assignment import Assignment, EvaluationReport, TrialPlan, Verdict
from trainers.verdicts import Verdicts, ask

HOST = "127.0.0.1"
REPORT = EvaluationReport(
    step=7, total_steps=21, epochs=1 / 3, value=0.1 + 0.2, best=0.25, is_last=False
)
SECONDS = 30.0


class Study:
    """Waits with each answer until it is let go, and remembers what it was told."""

    def __init__(self, *verdicts: Verdict) -> None:
        self.reports: list[EvaluationReport] = []
        self.may_answer = threading.Semaphore(0)
        self.is_asked = threading.Semaphore(0)
        self._verdicts = iter(verdicts)

    def __call__(self, report: EvaluationReport) -> Verdict:
        self.reports.append(report)
        self.is_asked.release()
        assert self.may_answer.acquire(timeout=SECONDS)
        return next(self._verdicts)

    def answers(self, number: int = 1) -> None:
        for _ in range(number):
            self.may_answer.release()

    def await_question(self) -> None:
        assert self.is_asked.acquire(timeout=SECONDS)


def test_a_report_arrives_as_it_was_and_so_does_the_verdict() -> None:
    study = Study(Verdict.GO_ON, Verdict.PAUSE, Verdict.END)
    study.answers(3)
    with Verdicts(study, host=HOST) as verdicts:
        assert not verdicts.is_paused()
        assert ask(verdicts.at, REPORT) is Verdict.GO_ON
        assert ask(verdicts.at, replace(REPORT, step=8)) is Verdict.PAUSE
        assert verdicts.is_paused()
        assert ask(verdicts.at, replace(REPORT, step=9, is_last=True)) is Verdict.END
        assert not verdicts.is_paused()
    assert study.reports[0] == REPORT
    assert [report.step for report in study.reports] == [7, 8, 9]


def test_who_does_not_know_the_key_learns_and_says_nothing() -> None:
    study = Study(Verdict.GO_ON)
    study.answers()
    with Verdicts(study, host=HOST) as verdicts:
        stranger = replace(verdicts.at, key=b"something else")
        with pytest.raises(ConnectionError, match="has not answered"):
            ask(stranger, REPORT)
        with pytest.raises(AuthenticationError):
            Client((HOST, verdicts.at.port), authkey=b"guessed")
        assert study.reports == []
        assert ask(verdicts.at, REPORT) is Verdict.GO_ON


def test_who_says_nothing_keeps_nobody_waiting() -> None:
    study = Study(Verdict.GO_ON)
    study.answers()
    with Verdicts(study, host=HOST) as verdicts:
        silent = socket.create_connection((HOST, verdicts.at.port))
        assert ask(verdicts.at, REPORT) is Verdict.GO_ON
        silent.close()


def test_a_rank_that_was_started_again_asks_after_the_one_before_was_answered() -> None:
    study = Study(Verdict.GO_ON, Verdict.PAUSE)
    with Verdicts(study, host=HOST) as verdicts, ThreadPoolExecutor(1) as threads:
        with Client((HOST, verdicts.at.port), authkey=verdicts.at.key) as dead:
            dead.send_bytes(json.dumps(asdict(replace(REPORT, value=1.0))).encode())
            study.await_question()
        again = threads.submit(ask, verdicts.at, REPORT)
        study.answers()
        study.await_question()
        study.answers()
        assert again.result(SECONDS) is Verdict.PAUSE
        assert verdicts.is_paused()
    assert [report.value for report in study.reports] == [1.0, REPORT.value]


def test_the_end_waits_for_the_answer_that_is_under_way() -> None:
    study = Study(Verdict.GO_ON)
    with ThreadPoolExecutor(2) as threads:
        verdicts = Verdicts(study, host=HOST)
        verdicts.__enter__()
        asked = threads.submit(ask, verdicts.at, REPORT)
        study.await_question()
        end = threads.submit(verdicts.__exit__, None, None, None)
        assert not wait([end], timeout=0.2).done
        study.answers()
        end.result(SECONDS)
        assert asked.result(SECONDS) is Verdict.GO_ON


def test_a_question_that_comes_after_the_end_does_not_reach_the_study() -> None:
    study = Study(Verdict.GO_ON)
    study.answers()
    with Verdicts(study, host=HOST) as verdicts:
        late = Client((HOST, verdicts.at.port), authkey=verdicts.at.key)
    with late:
        late.send_bytes(json.dumps(asdict(REPORT)).encode())
        with pytest.raises((EOFError, ConnectionError)):
            late.recv_bytes()
    assert study.reports == []


def test_a_study_that_is_gone_is_an_ordinary_failure() -> None:
    with Verdicts(Study(), host=HOST) as verdicts:
        at = verdicts.at
    with pytest.raises(ConnectionError, match=r"the study at 127\.0\.0\.1 has not answered"):
        ask(at, REPORT)


def test_the_key_is_not_shown() -> None:
    with Verdicts(Study(), host=HOST) as verdicts:
        plan = TrialPlan("study", "validation/loss", "min", study_at=verdicts.at)
        shown = repr(Assignment(None, "run", 1, 0, trial=plan))  # type: ignore[arg-type]
    assert str(verdicts.at.port) in shown
    assert "key" not in shown
    assert repr(verdicts.at.key) not in shown


def test_the_process_of_a_slot_loads_no_torch_to_drive_the_workers_of_a_trial() -> None:
    code = (
        "import sys, jobs.search, trainers.ray_trial, trainers.trial_folder\n"
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
