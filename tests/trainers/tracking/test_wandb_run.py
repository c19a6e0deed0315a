"""Runs that W&B writes offline: killed and resumed under one id, steps once, trials in a group."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.scene import Scene
from tests.tiny import tiny_tree
from tests.tracked import KILLED_AT_STEP_8, needs
from tests.wandb_files import offline_runs

pytestmark = [pytest.mark.timeout(600), needs("wandb")]


@pytest.fixture(autouse=True)
def _offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_PROJECT", "tests")


def test_a_run_that_is_killed_and_resumed_has_one_id(scene: Scene) -> None:
    tree = tiny_tree(scene.model, scene.data, str(scene.runs_folder), tracking=["wandb"])
    job = scene.folder / "job.yaml"
    job.write_text(yaml.safe_dump(tree))
    for command, code in ((("-c", KILLED_AT_STEP_8), -9), (("-m", "trainers"), 0)):
        done = subprocess.run(
            [sys.executable, *command, str(job), "--run-id", "run"], check=False, timeout=300
        )
        assert done.returncode == code
    killed, resumed, end = offline_runs(scene.folder)
    assert {run.run_id for run in (killed, resumed, end)} == {"run"}
    assert (killed.project, killed.job_type, killed.group) == ("tests", "run", "")
    assert sorted(killed.history) == [0, 1, 2, 3, 4, 5, 6, 7]
    assert sorted(resumed.history) == [6, 7, 8, 9, 10]
    assert killed.history[7]["train/loss"] == resumed.history[7]["train/loss"]
    assert {"train/loss", "validation/f1"} <= resumed.history[10].keys()
    assert resumed.config["optimizer"]["learning_rate"] == 3e-3
    assert resumed.config["shoal"]["uri"] == f"{scene.runs_folder}/run"
    assert resumed.config["versions"]["torch"]
    assert end.summary["state"] == "SUCCEEDED"
    assert 0 <= end.summary["test/f1"] <= 1
    assert end.exit_code == 0


IN_ONE_PROCESS = """
import sys
from trainers.tracking.tracker import Ended, Parameters, Point, TrackedRun
from trainers.tracking.wandb_run import WandbRun

study = TrackedRun("study", "/study", "tiny", "study")
of_study = WandbRun(study)
for number in range(2):
    name = f"study/trials/{number:04d}"
    donor = "study/trials/0000 at step 2" if number else None
    trial = WandbRun(TrackedRun(name, f"/{name}", "tiny", "trial", study, donor))
    trial.describe(Parameters({"optimizer": {"learning_rate": 0.5}}))
    trial.log([Point(2, 1.0, {"train/loss": 0.5}), Point(4, 1.0, {"train/loss": 0.25})])
    trial.log([Point(2, 1.0, {"train/loss": 0.75})])
    trial.end(Ended("FAILED_USER", 1, 4, cause="x") if number else Ended("PAUSED", 0, 4))
    trial.close()
of_study.log([Point(1, 1.0, {"study/best": 0.25})])
of_study.end(Ended("SUCCEEDED", 0, 4, report="<p>told</p>"))
of_study.close()
"""


def test_trials_of_a_process_are_in_the_group_of_their_study(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", IN_ONE_PROCESS], check=True, timeout=300)
    runs = {run.run_id: run for run in offline_runs(tmp_path)}
    assert set(runs) == {"study", "study-trials-0000", "study-trials-0001"}
    assert {run.group for run in runs.values()} == {"study"}
    assert [runs[f"study-trials-000{n}"].job_type for n in range(2)] == ["trial"] * 2
    first, clone, study = (runs[f"study{n}"] for n in ("-trials-0000", "-trials-0001", ""))
    # W&B leaves out a step that it has already.
    assert {step: line["train/loss"] for step, line in first.history.items()} == {2: 0.5, 4: 0.25}
    assert (first.summary["state"], first.exit_code) == ("PAUSED", 0)
    assert clone.config["shoal"]["donor"] == "study/trials/0000 at step 2"
    assert (clone.summary["cause"], clone.exit_code) == ("x", 1)
    assert study.history[1]["study/best"] == 0.25
    assert [p.read_text() for p in tmp_path.rglob("media/html/*.html")] == ["<p>told</p>"]
