"""A run starts on a Ray cluster that is there: nodes come late, workers die while set up."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from cluster.storage import open_store
from jobs.record import RunPaths, State
from jobs.runs import RunReader
from jobs.status import read_status
from tests.e2e.commands import wait_for
from tests.raylets import raylets
from tests.tiny import tiny_job, tiny_model, tiny_reviews

# A driver whose workers break while Ray sets their group up: at the first start rank 1 dies, at
# the second the set-up of rank 0 fails, as that of a peer does.
DRIVER = """
import os, signal, sys
from pathlib import Path

import trainers.fit
from cluster.storage import open_store
from jobs.run import drive
from trainers.ray_trainer import Group, GroupConfig

RUNS, MARKS = sys.argv[1], Path(sys.argv[2])


class Breaking(Group):
    def on_start(self, worker_group, backend_config):
        start = len(list(MARKS.iterdir())) + 1
        (MARKS / str(start)).touch()
        if start == 1:
            worker_group.execute_single_async(1, die)
        if start == 2:
            worker_group.execute_single(0, refuse)
        super().on_start(worker_group, backend_config)


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def refuse():
    raise ConnectionResetError("reset by a peer")


class BreakingConfig(GroupConfig):
    @property
    def backend_cls(self):
        return Breaking


trainers.fit.GroupConfig = BreakingConfig
sys.exit(drive(open_store(RUNS), "run"))
"""


# A driver on a machine of its own, which says what it has loaded.
ALONE = """
import sys

from cluster.storage import open_store
from jobs.run import drive

code = drive(open_store(sys.argv[1]), "run")
loaded = [name for name in ("torch", "transformers") if name in sys.modules]
print("LOADED", loaded)
sys.exit(code)
"""


@pytest.fixture(autouse=True)
def _of_this_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOAL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))


@pytest.mark.timeout(300)
def test_a_start_on_this_machine_has_no_processes_of_ray_train_but_workers_and_where_they_meet(
    tmp_path: Path,
) -> None:
    data = tiny_reviews(str(tmp_path / "data"), rows=40, rows_per_group=8, held_out=8)
    spec = tiny_job(
        tiny_model(tmp_path / "model"), data, str(tmp_path / "runs"), workers={"count": 2}
    )
    runs = open_store(tmp_path / "runs")
    runs.write(RunPaths("run").spec, spec.to_bytes())
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    seen, parents = Counter[str](), set[str]()
    with subprocess.Popen(
        [sys.executable, "-c", ALONE, runs.uri],
        env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True,
    ) as driver:  # fmt: skip
        assert driver.stdout is not None
        try:
            while driver.poll() is None:
                found = actors_of(driver.pid)
                seen |= Counter(name for name, _ in found)
                parents |= {parent for name, parent in found if name == "RayTrainWorker"}
                time.sleep(0.1)
            said = driver.stdout.read()
        finally:
            driver.kill()
    assert driver.returncode == 0
    # All of the driver's time is accounted for, Ray's start and end and the report included.
    reader = RunReader(runs, "run")
    spent, lease = read_status(reader).account.seconds, reader.lease()
    assert lease is not None
    wall_seconds = lease.renewed_at - reader.events()[0]["began_at"]
    assert sum(spent.values()) == pytest.approx(wall_seconds, rel=0.01)
    assert spent["other"] < 0.02 * wall_seconds
    assert seen == {"RayTrainWorker": 2, "SynchronizationActor": 1}
    # They are forks of a process that has loaded what they need.
    [parent] = parents
    assert "trainers.fork_server" in parent
    # Its workers need them, the driver would load them in vain.
    assert said.splitlines()[-1] == "LOADED []"


def actors_of(pid: int) -> list[tuple[str, str]]:
    """(class, command of the parent) of each process of an actor below a driver, by the titles of
    processes: `ray::Class` and `ray::Class.method`."""
    found = []
    with suppress(psutil.NoSuchProcess):
        for process in psutil.Process(pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess, IndexError):
                title, parent = process.cmdline()[0], process.parent()
                name = title.removeprefix("ray::").partition(".")[0]
                others = ("IDLE", "DashboardAgent", "RuntimeEnvAgent")
                if "::" in title and name[:1].isupper() and name not in others and parent:
                    found.append((name, " ".join(parent.cmdline())))
    return found


@pytest.mark.timeout(900)
def test_a_run_waits_for_its_nodes_and_survives_workers_that_die_while_they_are_set_up(
    tmp_path: Path,
) -> None:
    data = tiny_reviews(str(tmp_path / "data"), rows=40, rows_per_group=8, held_out=8)
    spec = tiny_job(
        tiny_model(tmp_path / "model"),
        data,
        str(tmp_path / "runs"),
        workers={"count": 2},
        retries={"worker_failures": 2, "wait_minutes": 2},
    )
    runs, marks = open_store(tmp_path / "runs"), tmp_path / "marks"
    marks.mkdir()
    runs.write(RunPaths("run").spec, spec.to_bytes())
    reader = RunReader(runs, "run")
    with raylets(cpus=1) as cluster:
        driver = subprocess.Popen(
            [sys.executable, "-c", DRIVER, runs.uri, str(marks)], start_new_session=True
        )
        try:
            waits = "waits for nodes: 2 workers need 2 x 1 CPU"
            wait_for(lambda: any(waits in told for told in messages(reader)), driver)
            cluster.add(cpus=1)
            assert driver.wait(300) == 0
        finally:
            driver.kill()
            driver.wait()
    result = reader.result()
    assert result is not None
    assert result.state is State.SUCCEEDED
    # What a start that broke held is given back: the next one finds room at once.
    broken = [m for m in messages(reader) if m.startswith("the workers could not be set up (")]
    assert ["RayTaskError(ConnectionResetError)" in message for message in broken] == [False, True]
    assert len(list(marks.iterdir())) == 3
    assert [attempt.attempt for attempt in reader.attempts()] == [1]


def messages(reader: RunReader) -> list[str]:
    return [str(event.get("message")) for event in reader.events()]
