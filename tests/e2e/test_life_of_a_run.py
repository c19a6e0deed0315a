"""One run through all that happens to runs: Ray Train, S3, Ctrl-C, a dead worker, a dead driver.

Its peer is the same job under torchrun, with Ray out of reach and nothing going wrong: the final
weights must be the same bits, and the losses the same numbers.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from cluster.storage import Store, join_uri
from jobs.record import RunPaths, State
from jobs.runs import RunReader
from jobs.status import read_status
from tests.e2e.commands import is_actor, shoal, tree_of, wait_for, wait_until_none_is_left
from tests.evidence import final_weights, losses, rows_by_epoch
from tests.tiny import tiny_model, tiny_reviews, tiny_tree
from trainers.records import read_attempts, read_manifests

pytestmark = pytest.mark.timeout(900)

ROWS = 1000
EPOCHS = 3
TOTAL_STEPS = 375
NO_RAY = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "ray":
            raise ModuleNotFoundError("No module named 'ray'", name="ray")

sys.meta_path.insert(0, Absent())
"""


@pytest.fixture
def scene(tmp_path: Path, s3_store: Store, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """job.yaml in a folder; data and runs in the object store."""
    monkeypatch.setenv("SHOAL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    data = tiny_reviews(join_uri(s3_store.uri, "data"), rows=ROWS, rows_per_group=64, held_out=90)
    tree = tiny_tree(
        tiny_model(tmp_path / "model", hidden=64),
        {**data, "lanes": 4, "seed": 3},
        join_uri(s3_store.uri, "runs"),
        workers={"count": 2},
        train={"epochs": EPOCHS, "log_rows": True, "evaluate_every_steps": 90},
        checkpoint={"every_steps": 20},
    )
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(tree))
    yield tmp_path
    wait_until_none_is_left(tmp_path / "cache")


def test_a_run_survives_ctrl_c_a_dead_worker_and_a_dead_driver(
    scene: Path, s3_store: Store
) -> None:
    runs = s3_store.within("runs")
    peer = under_torchrun(scene)
    reader = RunReader(runs, "lively")
    took = []

    began = time.monotonic()
    run = shoal("run", "job.yaml", "--run-id", "lively", folder=scene)
    wait_for(lambda: newest_step(runs) >= 40, run)
    run.send_signal(signal.SIGINT)
    output, _ = run.communicate(timeout=300)
    took.append(time.monotonic() - began)
    assert run.returncode == 130, output
    assert f"shoal resume {reader.uri}" in output
    result = reader.result()
    assert result is not None
    assert result.state is State.STOPPED
    stopped_at = result.step

    began = time.monotonic()
    run = shoal("resume", reader.uri, folder=scene)
    wait_for(lambda: newest_step(runs) >= stopped_at + 40, run)
    worker = next(p for p in tree_of(run) if is_actor(p, "RayTrainWorker"))
    # No rows come through Ray Data: a recovery does not wait for a process of it.
    assert not any(is_actor(process, "DatasetManager") for process in tree_of(run))
    worker.kill()
    wait_for(lambda: len(read_attempts(runs, RunPaths("lively"))) == 3, run)
    after_worker = newest_step(runs)
    wait_for(lambda: newest_step(runs) >= after_worker + 40, run)
    for process in tree_of(run):
        process.kill()
    output, _ = run.communicate(timeout=300)
    took.append(time.monotonic() - began)
    assert run.returncode == 3, output
    assert "was killed by SIGKILL" in output, output

    began = time.monotonic()
    run = shoal("resume", reader.uri, folder=scene)
    output, _ = run.communicate(timeout=600)
    took.append(time.monotonic() - began)
    assert run.returncode == 0, output
    result = reader.result()
    assert result is not None
    assert (result.state, result.step) == (State.SUCCEEDED, TOTAL_STEPS)
    peer.communicate(timeout=600)
    assert peer.returncode == 0

    assert final_weights(runs, "lively") == final_weights(runs, "peer")
    assert losses(runs, "lively") == losses(runs, "peer")
    rows = rows_by_epoch(runs, "lively")
    assert rows == {epoch: Counter(range(ROWS)) for epoch in range(EPOCHS)}
    assert runs.head(RunPaths("lively").report_html) is not None

    # Where the time went: all of it, but for what lies between two drivers.
    spent = read_status(reader).account
    assert sum(spent.seconds.values()) < sum(took)
    assert spent.seconds["other"] < 0.02 * sum(spent.seconds.values())
    assert min(spent.seconds[p] for p in ("start", "recovery", "compute", "finish")) > 0
    assert 0 <= spent.lost_seconds < spent.seconds["compute"]
    calm = RunReader(runs, "peer")
    spent, lease = read_status(calm).account, calm.lease()
    assert lease is not None
    wall_seconds = lease.renewed_at - lease.taken_at
    assert sum(spent.seconds.values()) == pytest.approx(wall_seconds, rel=0.01)
    assert spent.seconds["other"] < 0.02 * wall_seconds
    assert spent.seconds["recovery"] == spent.lost_seconds == 0


def under_torchrun(scene: Path) -> subprocess.Popen[str]:
    """The same job by torchrun, in an environment in which Ray cannot be imported."""
    hook = scene / "no-ray"
    hook.mkdir()
    (hook / "sitecustomize.py").write_text(NO_RAY)
    return subprocess.Popen(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
            "-m", "trainers", "job.yaml", "--run-id", "peer",
        ],
        cwd=scene,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(hook), *sys.path])},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        text=True,
    )  # fmt: skip


def newest_step(runs: Store) -> int:
    return max((m.step for m in read_manifests(runs, RunPaths("lively"))), default=0)
