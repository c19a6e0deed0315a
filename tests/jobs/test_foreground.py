"""Attending a run: its end, Ctrl-C once and twice, and the driver's sudden death.

The drivers are real processes that write a run folder and train nothing.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from synthetic import SyntheticRun, running, succeeded
from synthetic_study import ended_study

from cluster.local import driver_log
from cluster.storage import Store
from jobs import watch
from jobs.foreground import attend, summary
from jobs.record import Source
from jobs.runs import RunReader
from jobs.status import read_status
from jobs.submit import SubmittedRun

DRIVER = """
import os, sys, time
sys.path.insert(0, {tests!r})
from synthetic import SyntheticRun, State, Source
from cluster.storage import open_store
made = SyntheticRun(open_store({uri!r}))
now = time.time()
made.lines("logs", Source({generation}, None), {{"time": now, "message": "about to train"}})
made.state(State.RUNNING, "training", time=now, generation={generation})
made.start_attempt(9, time=now, generation={generation})
made.train(9, after=0, until=100, time=now)
made.lease(renewed_at=time.time(), generation={generation}, pid=os.getpid())
{then}
"""
FINISH = "made.finish(State.{state}, attempt=9, step=100, time=now, generation={generation})"
WAIT_FOR_STOP = """
while not list(made.store.list(made.paths.control)):
    time.sleep(0.02)
"""
HANG = "time.sleep(120)"


@pytest.fixture(autouse=True)
def look_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "POLL_SECONDS", 0.1)


@pytest.fixture
def start(local_store: Store) -> Iterator[Callable[..., SubmittedRun]]:
    """Starts a driver that writes a run folder up to step 100 and then does as it is told."""
    started: list[subprocess.Popen[bytes]] = []

    def start_one(then: str, *, generation: int = 1) -> SubmittedRun:
        made = SyntheticRun(local_store)
        if generation == 1:
            made.submit()
        program = DRIVER.format(
            tests=str(Path(__file__).parent),
            uri=local_store.uri,
            generation=generation,
            then=then.format(generation=generation) if "{" in then else then,
        )
        process = subprocess.Popen([sys.executable, "-c", program], start_new_session=True)
        started.append(process)
        return SubmittedRun(made.run_id, f"{local_store.uri}/{made.run_id}", process)

    yield start_one
    for process in started:
        if process.poll() is None:
            process.kill()
        process.wait()


def reader_of(store: Store, run: SubmittedRun) -> RunReader:
    return RunReader(store, run.run_id)


def interrupt_when(*conditions: Callable[[], bool]) -> threading.Thread:
    """Sends this process a Ctrl-C each time the next condition has become true."""

    def work() -> None:
        for condition in conditions:
            while not condition():
                time.sleep(0.02)
            os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=work)
    thread.start()
    return thread


def test_a_run_that_ends_well_is_summed_up(
    local_store: Store, start: Callable[..., SubmittedRun], capfd: pytest.CaptureFixture[str]
) -> None:
    run = start(FINISH.replace("{state}", "SUCCEEDED"))
    assert attend(run, reader_of(local_store, run), show_progress=True) == 0
    shown = capfd.readouterr()
    assert f"{run.run_id}  SUCCEEDED" in shown.out
    assert "accuracy 0.6" in shown.out
    assert f"last checkpoint  {run.uri}/checkpoints/step-00000100-attempt-" in shown.out
    assert f"{run.uri}/report/index.html" in shown.out
    assert f"shoal evaluate {run.uri} --data URI" in shown.out
    assert "validation at step 50" in shown.err


def test_without_progress_only_the_summary_is_printed(
    local_store: Store, start: Callable[..., SubmittedRun], capfd: pytest.CaptureFixture[str]
) -> None:
    run = start(FINISH.replace("{state}", "FAILED_USER"))
    assert attend(run, reader_of(local_store, run), show_progress=False) == 1
    shown = capfd.readouterr()
    assert f"shoal logs {run.uri}" in shown.out
    assert shown.err == ""


def test_one_interrupt_asks_the_run_to_stop_and_waits(
    local_store: Store, start: Callable[..., SubmittedRun], capfd: pytest.CaptureFixture[str]
) -> None:
    run = start(WAIT_FOR_STOP + FINISH.replace("{state}", "STOPPED"))
    reader = reader_of(local_store, run)
    thread = interrupt_when(lambda: reader.lease() is not None)
    assert attend(run, reader_of(local_store, run), show_progress=True) == 130
    thread.join()
    shown = capfd.readouterr()
    assert "asked to stop; the run saves what it has trained and ends" in shown.err.replace(
        "\n", " "
    )
    assert f"shoal resume {run.uri}" in shown.out
    (control,) = reader.controls()
    assert (control.kind, "@" in control.by) == ("stop", True)


# Ctrl-C may come between the opening of a folder and the block that closes it.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_two_interrupts_kill_the_driver_and_say_what_is_durable(
    local_store: Store, start: Callable[..., SubmittedRun], capfd: pytest.CaptureFixture[str]
) -> None:
    run = start(
        "import subprocess; subprocess.Popen(['sleep', '120'], start_new_session=True)\n" + HANG
    )
    process = run.process
    assert process is not None
    reader = reader_of(local_store, run)
    children: list[psutil.Process] = []

    def has_child() -> bool:
        children.extend(psutil.Process(process.pid).children())
        return bool(children)

    thread = interrupt_when(has_child, lambda: bool(reader.controls()))
    assert attend(run, reader_of(local_store, run), show_progress=True) == 130
    thread.join()
    assert process.wait(timeout=10) == -signal.SIGKILL
    psutil.wait_procs(children, timeout=10)
    assert not any(child.is_running() for child in children)
    shown = capfd.readouterr().err
    assert "killed; the checkpoint of step 100 is durable" in shown
    assert f"go on with: shoal resume {run.uri}" in shown


def test_a_driver_that_dies_without_a_result_is_told_with_its_last_lines(
    local_store: Store, start: Callable[..., SubmittedRun], capfd: pytest.CaptureFixture[str]
) -> None:
    run = start("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    assert attend(run, reader_of(local_store, run), show_progress=True) == 3
    shown = capfd.readouterr().err
    assert "about to train" in shown
    assert "was killed by SIGKILL without a result" in shown
    assert f"shoal resume {run.uri}" in shown


def test_a_driver_that_is_refused_is_told_with_what_it_printed_not_with_the_holders_lines(
    local_store: Store, capfd: pytest.CaptureFixture[str]
) -> None:
    now = time.time()
    made = running(local_store, now=now)
    made.lease(renewed_at=now, generation=2, pid=4242)
    run = SubmittedRun(made.run_id, f"{local_store.uri}/{made.run_id}", refused(made))
    # The holder goes on meanwhile, and writes its log.
    made.lines("logs", Source(2, None), {"time": now + 60, "message": "the holder trains"})
    code = attend(run, reader_of(local_store, run), show_progress=True, after_generation=2)
    assert code == 3
    shown = " ".join(capfd.readouterr().err.split())
    assert "is driven by process 4242 on node-7" in shown
    assert "ended with exit code 3 and did not drive the run" in shown
    assert f"once what they say is settled: shoal resume {run.uri}" in shown
    assert "the holder trains" not in shown


def refused(made: SyntheticRun) -> subprocess.Popen[bytes]:
    """A real driver that may not wait for the lease."""
    program = (
        "import sys; from jobs import run; from cluster.lease import acquire; "
        "run.acquire = lambda store, key, **_: acquire(store, key, ttl_seconds=60); "
        "run.main([sys.argv[1]])"
    )
    uri = f"{made.store.uri}/{made.run_id}"
    with driver_log(uri).open("ab") as log:
        return subprocess.Popen([sys.executable, "-c", program, uri], stdout=log, stderr=log)


def test_the_end_of_an_older_driver_is_not_taken_for_this_ones(
    local_store: Store, start: Callable[..., SubmittedRun], capfd: pytest.CaptureFixture[str]
) -> None:
    succeeded(local_store)
    run = start(FINISH.replace("{state}", "STOPPED"), generation=2)
    code = attend(run, reader_of(local_store, run), show_progress=True, after_generation=1)
    assert code == 130
    assert "SUCCEEDED" not in capfd.readouterr().out


def test_the_summary_of_a_study_names_its_winner_and_the_winners_job(local_store: Store) -> None:
    made = ended_study(local_store)
    text = summary(read_status(RunReader(local_store, made.run_id))).plain
    told = {line.split("  ")[1].strip(): line for line in text.splitlines() if line[:2] == "  "}
    assert "validation/f1 0.9051 (mean of 3 seeds 0.9007), trial 28 (" in told["best"]
    assert told["test"].endswith("accuracy 0.884, f1 0.882, loss 0.31")
    assert told["its job"].endswith(f"{made.run_id}/report/winner.yaml")
    assert told["next"].endswith(f"{made.run_id} --trial 28 --data URI")
