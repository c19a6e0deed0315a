"""`python -m trainers`: the ranks as processes of their own, without Ray."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from click.testing import CliRunner

from jobs.record import Amendment, Attempt, Control, Lease, State
from jobs.runs import RunReader
from tests.evidence import final_weights, global_batches
from tests.scene import Scene
from tests.tiny import tiny_tree
from trainers import __main__ as module

SHORT_LEASE = """
import sys
from trainers import __main__ as module

module._LEASE_SECONDS = 6.0
sys.argv[0] = "trainers"
module.main()
"""


def job_file(scene: Scene, **parts: Any) -> str:
    path = scene.folder / "job.yaml"
    path.write_text(
        yaml.safe_dump(tiny_tree(scene.model, scene.data, str(scene.runs_folder), **parts))
    )
    return str(path)


def started(*command: str, **variables: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *command], env=os.environ | variables, stderr=subprocess.PIPE, text=True
    )


def wait_for(condition: Callable[[], object], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            raise AssertionError(f"it ended or hung: {process.communicate()[1]}")
        time.sleep(0.05)


def invoke(job: str, run_id: str = "run", *overrides: str) -> tuple[int, str]:
    """Exit code and output of the command in this process."""
    options = [argument for override in overrides for argument in ("--set", override)]
    done = CliRunner().invoke(module.main, [job, "--run-id", run_id, *options])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.output


def test_the_loss_of_the_lease_ends_the_process(scene: Scene) -> None:
    job = job_file(scene, train={"epochs": 100_000}, tracking=[])
    process = started("-c", SHORT_LEASE, job, "--run-id", "run")
    manifest = scene.run_folder() / "checkpoints/step-00000005-attempt-0001/manifest.json"
    wait_for(manifest.exists, process)
    key = scene.paths().lease
    lease = Lease.model_validate_json(scene.runs.read(key))
    newer = lease.model_copy(update={"generation": lease.generation + 1, "holder": "another"})
    scene.runs.write(key, newer.to_bytes())
    _, said = process.communicate(timeout=240)
    assert process.returncode == 3
    assert "was lost to process" in said
    assert "(generation 2, since " in said
    assert Lease.model_validate_json(scene.runs.read(key)) == newer
    assert not (scene.run_folder() / "result.json").exists()


def test_what_only_another_rank_meets_is_said(scene: Scene) -> None:
    job = job_file(scene, workers={"count": 2, "gpus": 1})
    process = started(
        "-m", "trainers", job, "--run-id", "run",
        RANK="1", LOCAL_RANK="1", WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", CUDA_VISIBLE_DEVICES="",
    )  # fmt: skip
    _, said = process.communicate(timeout=240)
    assert process.returncode == 3
    assert "workers.gpus is 1, but rank 1" in said


@pytest.mark.parametrize("run_id", ["../escape", "Upper", "a" * 48, "x-"])
def test_a_run_id_that_may_not_name_a_run_is_refused(scene: Scene, run_id: str) -> None:
    code, output = invoke(job_file(scene), run_id)
    assert code == 2
    assert f"--run-id {run_id} is not allowed" in output
    assert not scene.runs_folder.exists()
    assert not (scene.folder / "escape").exists()


def held(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def test_a_run_goes_on_only_with_its_own_job_and_changes_are_recorded(scene: Scene) -> None:
    job = job_file(scene, train={"epochs": 1})
    assert invoke(job)[0] == 0
    before = held(scene.run_folder())

    code, output = invoke(
        job, "run", "optimizer.learning_rate=0.5", "train.log_every_steps=7", "train.epochs=2"
    )
    assert code == 2
    assert "optimizer.learning_rate is 0.5, but 0.003 in the run" in output
    assert "train.log_every_steps is 7, but 1 in the run" in output
    assert "train.epochs is" not in output
    assert held(scene.run_folder()) == before

    assert invoke(job, "run", "train.epochs=2", "retries.worker_failures=5")[0] == 0
    amendment = Amendment.model_validate_json(scene.runs.read(scene.paths().amendment(1)))
    assert set(amendment.overrides) == {"train.epochs=2", "retries.worker_failures=5"}
    spec = RunReader(scene.runs, "run").spec()
    assert (spec.train.epochs, spec.retries.worker_failures) == (2, 5)
    assert json.loads(scene.runs.read(scene.paths().result))["step"] == 10

    # The run is compared as it is now: the same again changes nothing.
    assert invoke(job, "run", "train.epochs=2", "retries.worker_failures=5")[0] == 0
    assert len(list(scene.runs.list(scene.paths().amendments))) == 1


def test_a_place_of_another_kind_is_recorded_whole(scene: Scene) -> None:
    kuberay = {"kind": "kuberay", "image": "shoal:1"}
    assert invoke(job_file(scene, train={"epochs": 1}, cluster=kuberay))[0] == 0
    assert invoke(job_file(scene, train={"epochs": 1}, cluster={"kind": "local"}))[0] == 0
    assert RunReader(scene.runs, "run").spec().cluster.kind == "local"


FREEZES_BEFORE_A_MANIFEST = """
import os, signal, sys, threading
from cluster.folder import FolderStore
from trainers import __main__ as module

whole, renew = FolderStore.write_if_absent, FolderStore.write_if_match
# Frozen with the lock of a folder's lease it would keep everybody from that. Once it wakes, the
# manifest is written before the loss of the lease ends the process.
is_renewing = threading.Lock()

def freezing(self, key, data):
    if key.endswith("step-00000010-attempt-0001/manifest.json"):
        with is_renewing:
            os.kill(os.getpid(), signal.SIGSTOP)
            return whole(self, key, data)
    return whole(self, key, data)

def renewing(self, key, data, *, etag):
    with is_renewing:
        return renew(self, key, data, etag=etag)

FolderStore.write_if_absent, FolderStore.write_if_match = freezing, renewing
module._LEASE_SECONDS = 3.0
sys.argv[0] = "trainers"
module.main()
"""
SUCCEEDS_AND_WAITS = """
import pathlib, sys, time
from trainers import __main__ as module, worker

late_manifest = pathlib.Path(sys.argv.pop(1))
stepped = worker._Rank.stepped

def waiting(self, batch, progress):
    stepped(self, batch, progress)
    if progress.step == 7:
        print("runs", flush=True)
        while not late_manifest.exists():
            time.sleep(0.05)

worker._Rank.stepped = waiting
sys.argv[0] = "trainers"
module.main()
"""


def test_what_a_driver_commits_that_was_frozen_and_succeeded_is_ignored(scene: Scene) -> None:
    job = job_file(scene, train={"log_rows": True})
    checkpoints = scene.run_folder() / "checkpoints"
    late_manifest = checkpoints / "step-00000010-attempt-0001/manifest.json"
    frozen = started("-c", FREEZES_BEFORE_A_MANIFEST, job, "--run-id", "run")
    processes = [frozen]
    try:
        wait_for(lambda: psutil.Process(frozen.pid).status() == psutil.STATUS_STOPPED, frozen)
        successor = subprocess.Popen(
            [sys.executable, "-c", SUCCEEDS_AND_WAITS, late_manifest, job, "--run-id", "run"],
            stdout=subprocess.PIPE,
            text=True,
        )
        processes.append(successor)
        assert successor.stdout is not None
        assert successor.stdout.readline() == "runs\n"
        assert not late_manifest.exists()
        frozen.send_signal(signal.SIGCONT)
        _, said = frozen.communicate(timeout=240)
        assert frozen.returncode == 3
        assert f"was lost to process {successor.pid} on" in said
        assert successor.wait(timeout=240) == 0
    finally:
        for process in processes:
            process.kill()
            process.communicate()

    result = RunReader(scene.runs, "run").result()
    assert result is not None
    assert (result.generation, result.state) == (2, State.SUCCEEDED)
    assert result.last_checkpoint == "checkpoints/step-00000010-attempt-0002"
    assert invoke(job, "calm")[0] == 0
    assert final_weights(scene.runs, "run") == final_weights(scene.runs, "calm")
    assert global_batches(scene.runs, "run") == global_batches(scene.runs, "calm")


@pytest.mark.parametrize(("restarts", "seen"), [("0", 4), ("1", 2)], ids=["by hand", "by torchrun"])
def test_requests_that_came_before_torchrun_started_the_ranks_again_still_count(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, restarts: str, seen: int
) -> None:
    """One was for a start before; two came while the ranks were at work that have died."""
    paths = scene.paths()
    died = Attempt(
        attempt=1, generation=2, world_size=1, restored_step=None, started_at=0.0, controls_seen=2
    )
    scene.runs.write(paths.attempt(1), died.to_bytes())
    for number in (1, 2, 3, 4):
        request = Control(kind="stop", requested_at=0.0)
        scene.runs.write(paths.control_request(number), request.to_bytes())
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", restarts)
    assert module._controls_seen(scene.runs, paths, generation=3) == seen
    # The last one has no attempt of its own: nobody knows what it was started for.
    assert module._controls_seen(scene.runs, paths, generation=4) == 4
    assert module._controls_seen(scene.runs, paths, generation=1) == 0
