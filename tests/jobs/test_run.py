"""A driver: what it records before it trains, and what it does when its own machine is taken."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import psutil
import pytest

from cluster.folder import FolderStore
from cluster.lease import acquire
from cluster.storage import Store, StoreAway
from jobs import run
from jobs.errors import ClusterError, Problem
from jobs.exporter import metrics_served
from jobs.record import Control, Failure, Outcome, Past, Result, RunPaths, State
from jobs.runs import RunReader
from tests.ranks import assignment_of
from tests.tiny import tiny_job
from trainers.assignment import Assignment

PATHS = RunPaths("run")


class HeldLease:
    """A lease that is not lost."""

    lost = threading.Event()


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "_WATCH_SECONDS", 0.02)


def assignment(store: Store, **parts: Any) -> Assignment:
    data = {"train": "s3://lake/train"}
    return assignment_of(tiny_job("s3://models/tiny", data, store.uri, **parts), "run")


NOT_TAKEN = run._Taken(lambda: None)
KUBERAY = {"kind": "kuberay", "image": "registry.example.com/shoal:1"}


def controls(store: Store) -> list[Control]:
    return [Control.model_validate_json(store.read(head.key)) for head in store.list(PATHS.control)]


def requests(store: Store) -> list[tuple[str, int | None]]:
    return [(control.kind, control.attempt) for control in controls(store)]


def wait_until(store: Store, wanted: list[tuple[str, int | None]]) -> None:
    deadline = time.monotonic() + 20
    while requests(store) != wanted:
        assert time.monotonic() < deadline, requests(store)
        time.sleep(0.02)


@pytest.mark.usefixtures("looks")
def test_on_kubernetes_a_sigterm_makes_every_attempt_give_way(local_store: Store) -> None:
    local_store.write(PATHS.attempt(3), b"{}")
    job = replace(assignment(local_store, cluster=KUBERAY), generation=6)
    with run._watched(job, local_store, HeldLease(), attended_by=None) as taken:  # type: ignore[arg-type]
        assert not taken.is_announced()
        os.kill(os.getpid(), signal.SIGTERM)
        assert taken.is_announced()
        # A group that is just being started begins its attempt afterwards.
        wait_until(local_store, [("yield", 3), ("yield", 4)])
        local_store.write(PATHS.attempt(4), b"{}")
        wait_until(local_store, [("yield", 3), ("yield", 4), ("yield", 5)])
        os.kill(os.getpid(), signal.SIGTERM)
    assert requests(local_store) == [("yield", 3), ("yield", 4), ("yield", 5)]
    # The driver after this one numbers on from its attempts, and must not obey.
    assert {control.generation for control in controls(local_store)} == {6}


@pytest.mark.usefixtures("looks")
def test_elsewhere_a_sigterm_is_a_request_to_stop(local_store: Store) -> None:
    job = assignment(local_store)
    with run._watched(job, local_store, HeldLease(), attended_by=None) as taken:  # type: ignore[arg-type]
        os.kill(os.getpid(), signal.SIGTERM)
        wait_until(local_store, [("stop", None)])
        assert not taken.is_announced()


@pytest.mark.usefixtures("looks")
def test_a_stop_that_comes_while_the_store_is_away_is_asked_for_once_it_is_back(
    local_store: Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    job = assignment(local_store)
    tries, write = itertools.count(1), FolderStore.write_if_absent

    def write_when_back(store: FolderStore, key: str, data: bytes) -> str:
        if next(tries) <= 3:
            raise StoreAway(Problem("the store is away"))
        return write(store, key, data)

    monkeypatch.setattr(FolderStore, "write_if_absent", write_when_back)
    with run._watched(job, local_store, HeldLease(), attended_by=None):  # type: ignore[arg-type]
        os.kill(os.getpid(), signal.SIGINT)
        wait_until(local_store, [("stop", None)])
    assert capsys.readouterr().err.count("cannot be written yet: the store is away") == 1


@pytest.mark.usefixtures("looks")
def test_a_node_that_ray_drains_is_taken_wherever_it_is(local_store: Store) -> None:
    local_store.write(PATHS.attempt(1), b"{}")
    job = assignment(local_store)
    with run._watched(job, local_store, HeldLease(), attended_by=None) as taken:  # type: ignore[arg-type]
        for _ in range(2):
            taken.announce()
        wait_until(local_store, [("yield", 1), ("yield", 2)])


@pytest.mark.usefixtures("looks")
def test_workers_of_a_taken_machine_are_not_waited_for_longer_than_there_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S", "20.1")
    taken, hangs = run._Taken(lambda: None), threading.Event()
    taken.announce()
    try:
        ended = run._in_thread(lambda: hangs.wait() and never(), taken=taken)  # type: ignore[arg-type, return-value]
    finally:
        hangs.set()
    assert ended.state is State.FAILED_INFRA
    assert not ended.state.ends_retries
    assert "have not saved their state in 0 s" in ended.problems[0][0]  # type: ignore[union-attr]


FROZEN_DRIVER = """
import subprocess, sys, time
from cluster.lease import acquire
from cluster.storage import open_store
from jobs import run
from tests.ranks import assignment_of
from tests.tiny import tiny_job

store = open_store(sys.argv[1])
job = assignment_of(tiny_job("s3://models/tiny", {"train": "s3://lake/train"}, store.uri), "run")
with acquire(store, "run/lease.json", ttl_seconds=float(sys.argv[2])) as lease:
    with run._watched(job, store, lease, attended_by=None):
        # A worker, as far as the driver knows it.
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        print(child.pid, flush=True)
        time.sleep(600)
"""


def test_a_driver_that_was_frozen_and_succeeded_ends_with_its_workers(s3_store: Store) -> None:
    driver = subprocess.Popen(
        [sys.executable, "-c", FROZEN_DRIVER, s3_store.uri, "2"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert driver.stdout is not None
        worker = psutil.Process(int(driver.stdout.readline()))
        driver.send_signal(signal.SIGSTOP)
        with acquire(s3_store, "run/lease.json", ttl_seconds=60, wait=True) as held:
            driver.send_signal(signal.SIGCONT)
            _, said = driver.communicate(timeout=60)
            held.confirm()
    finally:
        driver.kill()
        driver.communicate()
    assert driver.returncode == 3
    assert "shoal: the lease " in said
    assert said.endswith("; ending at once\n")
    assert psutil.wait_procs([worker], timeout=10)[1] == []


@pytest.mark.usefixtures("looks")
def test_what_the_workers_give_or_raise_comes_out_of_their_thread() -> None:
    outcome = Outcome(attempt=1, state=State.SUCCEEDED, step=5)
    assert run._in_thread(lambda: outcome, taken=NOT_TAKEN) is outcome
    with pytest.raises(ZeroDivisionError):
        run._in_thread(lambda: 1 // 0, taken=NOT_TAKEN)  # type: ignore[arg-type, return-value]


def never() -> Outcome:
    raise AssertionError


@pytest.mark.parametrize("named", [{}, {"attempt": 1}, {"generation": 1}])
def test_a_request_to_yield_names_its_attempt_and_its_driver(named: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="names its attempt and its generation"):
        Control(kind="yield", requested_at=0.0, **named)


@pytest.fixture
def fitted(monkeypatch: pytest.MonkeyPatch) -> list[Assignment]:
    """What would have been trained."""
    assignments: list[Assignment] = []

    def fit(assignment: Assignment, *_: Any, **__: Any) -> Failure:
        assignments.append(assignment)
        return Failure(state=State.FAILED_INFRA, problems=(("a test", None),))

    monkeypatch.setattr(run, "_fit", fit)
    return assignments


def test_the_first_event_of_a_driver_tells_when_it_began(
    local_store: Store, fitted: list[Assignment]
) -> None:
    assignment(local_store)
    before = time.time()
    run.drive(local_store, "run")
    first = RunReader(local_store, "run").events()[0]
    assert first["state"] == State.STARTING
    assert before - 0.001 <= first["began_at"] <= first["time"]


@pytest.mark.parametrize("cluster", [KUBERAY, {"kind": "local"}], ids=["pod", "laptop"])
def test_on_kubernetes_alone_the_driver_serves_the_runs_metrics(
    local_store: Store, monkeypatch: pytest.MonkeyPatch, cluster: dict[str, str]
) -> None:
    ports: list[int | None] = []
    told: list[str] = []

    @contextmanager
    def served(*arguments: Any, **options: Any) -> Iterator[int | None]:
        with metrics_served(*arguments, **options, port=0) as port:
            ports.append(port)
            yield port

    def fit(*_: Any, **__: Any) -> Failure:
        for port in ports:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=20) as answer:
                told.append(answer.read().decode())
        return Failure(state=State.FAILED_INFRA, problems=(("a test", None),))

    monkeypatch.setattr(run, "metrics_served", served)
    monkeypatch.setattr(run, "_fit", fit)
    assignment(local_store, cluster=cluster)
    run.drive(local_store, "run")
    assert ['shoal_state{run="run",state="STARTING"} 1.0' in text for text in told] == (
        [True] if cluster is KUBERAY else []
    )


def end(store: Store, state: State) -> None:
    """A driver before has ended the run like that."""
    ended = Result(run_id="run", state=state, generation=1, step=5, finished_at=time.time())
    store.write(PATHS.result, ended.to_bytes())


@pytest.mark.parametrize(
    ("state", "code"),
    [
        (State.SUCCEEDED, 0),
        (State.STOPPED, 130),
        (State.FAILED_USER, 1),
        (State.FAILED_SPEC, 2),
        (State.FAILED_INFRA, None),
        (State.FAILED_RESOURCES, None),
    ],
)
def test_a_run_that_has_ended_for_its_users_sake_is_not_started_again_by_a_platform(
    local_store: Store, fitted: list[Assignment], state: State, code: int | None
) -> None:
    assignment(local_store)
    end(local_store, state)
    ended = run.drive(local_store, "run")
    if code is None:
        assert len(fitted) == 1
    else:
        assert (ended, fitted) == (code, [])
    # Its user may start it again.
    fitted.clear()
    run.drive(local_store, "run", past=Past(controls=0, generation=1))
    assert len(fitted) == 1


LOADED_BY_A_RESTART = """
import sys
from jobs import run

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name in ("ray", "torch", "transformers", "datasets", "pandas", "matplotlib"):
            sys.exit(f"a run that has ended loads {name}")

sys.meta_path.insert(0, Absent())
run.main([sys.argv[1]])
"""


def test_such_a_run_ends_before_ray_and_all_that_takes_time_to_load(local_store: Store) -> None:
    assignment(local_store)
    end(local_store, State.FAILED_USER)
    ended = subprocess.run(
        [sys.executable, "-c", LOADED_BY_A_RESTART, f"{local_store.uri}/run"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr == "shoal: the run has ended: FAILED_USER\n"
    # Nobody has asked for the lease, for which a driver on another machine is waited for.
    assert local_store.head(PATHS.lease) is None


CHANGE = ("train.epochs=7",)


def test_changes_are_recorded_by_the_driver_that_makes_them_hold(
    local_store: Store, fitted: list[Assignment]
) -> None:
    assignment(local_store)
    run.drive(local_store, "run", overrides=CHANGE)
    run.drive(local_store, "run")
    assert [a.spec.train.epochs for a in fitted] == [7, 7]
    assert len(list(local_store.list(PATHS.amendments))) == 1


def test_a_driver_that_is_refused_changes_nothing(
    local_store: Store, fitted: list[Assignment]
) -> None:
    assignment(local_store)
    with (
        acquire(local_store, PATHS.lease, ttl_seconds=3),
        pytest.raises(ClusterError, match="is driven by"),
    ):
        run.drive(local_store, "run", overrides=CHANGE)
    assert not fitted
    assert not list(local_store.list(PATHS.amendments))
