"""A run starts on a Ray cluster that is there: nodes come late, workers die while set up."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cluster.storage import open_store
from jobs.record import RunPaths, State
from jobs.runs import RunReader
from tests.raylets import raylets
from tests.tiny import tiny_job, tiny_model, tiny_reviews

# A driver whose workers break while Ray sets their group up: at the first start rank 1 dies, at
# the second the set-up of rank 0 fails, as that of a peer does.
DRIVER = """
import os, signal, sys
from pathlib import Path

from ray.train.torch.config import TorchConfig, _TorchBackend

import trainers.fit
from cluster.storage import open_store
from jobs.run import drive

RUNS, MARKS = sys.argv[1], Path(sys.argv[2])


class Breaking(_TorchBackend):
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


class BreakingConfig(TorchConfig):
    @property
    def backend_cls(self):
        return Breaking


trainers.fit.TorchConfig = BreakingConfig
sys.exit(drive(open_store(RUNS), "run"))
"""


@pytest.mark.timeout(900)
def test_a_run_waits_for_its_nodes_and_survives_workers_that_die_while_they_are_set_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHOAL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
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
            wait_for(reader, driver, "waits for nodes: 2 workers need 2 x 1 CPU")
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


def wait_for(reader: RunReader, driver: subprocess.Popen[bytes], message: str) -> None:
    deadline = time.monotonic() + 300
    while not any(message in told for told in messages(reader)):
        assert driver.poll() is None, "the driver has ended"
        assert time.monotonic() < deadline, messages(reader)
        time.sleep(0.2)


def messages(reader: RunReader) -> list[str]:
    return [str(event.get("message")) for event in reader.events()]
