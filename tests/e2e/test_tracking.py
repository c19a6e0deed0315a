"""A study through the commands, tracked by a real MLflow server and by W&B offline."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from cluster.storage import open_store
from jobs.record import RunPaths
from jobs.study.events import Reported
from jobs.study.log import read_events
from tests.mlflow_server import mlflow_server
from tests.tiny import tiny_model, tiny_reviews, tiny_tree
from tests.tracked import needs
from tests.wandb_files import offline_runs

pytestmark = [pytest.mark.timeout(900), needs("mlflow", "flask", "sqlalchemy", "wandb")]


@pytest.fixture
def scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """job.yaml of a study in a folder that holds everything, the server's and W&B's files too."""
    monkeypatch.setenv("SHOAL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    data = tiny_reviews(str(tmp_path / "data"), rows=160, rows_per_group=32, held_out=40)
    tree = tiny_tree(
        tiny_model(tmp_path / "model"),
        data,
        str(tmp_path / "runs"),
        train={"epochs": 4},
        tracking=["mlflow", "wandb"],
        search={
            "metric": "validation/loss",
            "space": {"optimizer.learning_rate": {"loguniform": [1e-4, 1e-1]}},
            "algorithm": "random",
            "scheduler": {"kind": "asha", "reduction_factor": 2, "first": 0.25},
            "trials": 2,
            "max_concurrent": 1,
            "baseline": False,
            "finalists": None,
        },
    )
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(tree))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
    with mlflow_server(tmp_path) as url:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", url)
        yield tmp_path


def test_a_study_is_a_parent_and_each_trial_one_run_below_it(scene: Path) -> None:
    from mlflow import MlflowClient

    done = subprocess.run(
        [sys.executable, "-m", "jobs.cli", "run", "job.yaml", "--run-id", "study"],
        cwd=scene,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=800,
    )
    assert done.returncode == 0, done.stdout

    client = MlflowClient()
    experiment = client.get_experiment_by_name("tiny")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    by_id = {run.data.tags["shoal.run_id"]: run for run in runs}
    names = [f"study/trials/{number:04d}" for number in range(2)]
    assert len(by_id) == len(runs)
    assert set(by_id) == {"study", *names}
    study = by_id["study"]
    assert (study.info.status, study.data.tags["shoal.state"]) == ("FINISHED", "SUCCEEDED")
    assert "study/best" in study.data.metrics
    assert 0 <= study.data.metrics["test/f1"] <= 1
    assert client.list_artifacts(study.info.run_id, "report")[0].path == "report/index.html"
    reports = read_events(open_store(scene / "runs"), RunPaths("study"))
    best = min(e.best for e in reports if isinstance(e, Reported) and e.best is not None)
    assert study.data.metrics["study/best"] == best

    rates = set()
    for name in names:
        trial = by_id[name]
        assert trial.data.tags["mlflow.parentRunId"] == study.info.run_id
        assert trial.data.tags["shoal.state"] in {"SUCCEEDED", "PAUSED", "PRUNED"}
        assert trial.info.status == "FINISHED"
        rates.add(trial.data.params["optimizer.learning_rate"])
        history = client.get_metric_history(trial.info.run_id, "train/loss")
        steps = [metric.step for metric in history]
        assert steps == [*range(1, len(steps) + 1)]  # however often it was paused
    assert len(rates) == 2

    offline = offline_runs(scene)
    assert {run.run_id for run in offline} == {"study", *(n.replace("/", "-") for n in names)}
    assert {run.group for run in offline} == {"study"}
