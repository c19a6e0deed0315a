"""A driver on a Ray cluster is frozen past its lease's end, and woken while its successor runs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.storage import open_store
from jobs.record import RunPaths, State
from jobs.runs import RunReader
from jobs.submit import request_stop
from tests.e2e.commands import wait_for
from tests.evidence import rows_by_epoch
from tests.raylets import raylets
from tests.tiny import tiny_job, tiny_model, tiny_reviews

DRIVER = """
import sys

from cluster.storage import open_store
from jobs import run

run.LEASE_SECONDS = 6.0
sys.exit(run.drive(open_store(sys.argv[1]), "run"))
"""


@pytest.mark.timeout(600)
def test_the_successor_of_a_frozen_driver_is_given_the_room_of_its_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHOAL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    data = tiny_reviews(str(tmp_path / "data"), rows=400, rows_per_group=100, held_out=8)
    spec = tiny_job(
        tiny_model(tmp_path / "model"),
        {"train": data["train"]},
        str(tmp_path / "runs"),
        train={"epochs": 10_000, "log_rows": True},
        checkpoint={"every_steps": 100},
    )
    runs = open_store(tmp_path / "runs")
    runs.write(RunPaths("run").spec, spec.to_bytes())
    reader = RunReader(runs, "run")

    def saved(attempt: int) -> bool:
        return any(manifest.attempt == attempt for manifest in reader.manifests())

    with raylets(cpus=1):
        command = [sys.executable, "-c", DRIVER, runs.uri]
        frozen = subprocess.Popen(command, start_new_session=True)
        successor = None
        try:
            wait_for(lambda: saved(1), frozen)
            frozen.send_signal(signal.SIGSTOP)
            successor = subprocess.Popen(command, start_new_session=True)
            # The cluster has room for one worker, which is the frozen driver's.
            wait_for(lambda: saved(2), successor)
            frozen.send_signal(signal.SIGCONT)
            assert frozen.wait(100) == 3
            request_stop(runs, "run", by="the test")
            assert successor.wait(100) == 130
        finally:
            for driver in filter(None, (frozen, successor)):
                driver.kill()
                driver.wait()
    assert [attempt.generation for attempt in reader.attempts()] == [1, 2]
    result = reader.result()
    assert result is not None
    assert (result.state, result.generation) == (State.STOPPED, 2)
    *whole, _ = rows_by_epoch(runs, "run").values()
    assert whole
    assert all(set(rows.values()) == {1} and len(rows) == 400 for rows in whole)
