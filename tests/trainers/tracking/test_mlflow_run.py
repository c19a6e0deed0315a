"""Runs on a real MLflow server: killed and resumed in one tracked run, trials below their study."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs.record import RunPaths
from tests.mlflow_server import mlflow_server
from tests.scene import Scene
from tests.tiny import tiny_tree
from tests.tracked import KILLED_AT_STEP_8, needs
from trainers.tracking.tracker import Ended, Parameters, Point, TrackedRun

pytestmark = [pytest.mark.timeout(600), needs("mlflow", "flask", "sqlalchemy")]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with mlflow_server(tmp_path_factory.mktemp("mlflow")) as url:
        yield url


@pytest.fixture
def client(server: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Any:
    """Of the server, to which all goes that a test tracks, in an experiment of its own."""
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", request.node.name)
    return MlflowClient()


def tracked(client: Any, request: pytest.FixtureRequest) -> dict[str, Any]:
    """All tracked runs of a test, by the id of the run; each has but one."""
    experiment = client.get_experiment_by_name(request.node.name)
    runs = client.search_runs([experiment.experiment_id])
    by_id = {run.data.tags["shoal.run_id"]: run for run in runs}
    assert len(by_id) == len(runs)
    return by_id


def steps(client: Any, run: Any, name: str) -> list[int]:
    return [metric.step for metric in client.get_metric_history(run.info.run_id, name)]


def trainers(*command: str) -> int:
    return subprocess.run([sys.executable, *command], check=False, timeout=300).returncode


def test_a_run_that_is_killed_and_resumed_is_one_tracked_run(
    scene: Scene, client: Any, request: pytest.FixtureRequest
) -> None:
    tree = tiny_tree(scene.model, scene.data, str(scene.runs_folder), tracking=["mlflow"])
    job = scene.folder / "job.yaml"
    job.write_text(yaml.safe_dump(tree))
    assert trainers("-c", KILLED_AT_STEP_8, str(job), "--run-id", "run") == -9
    [run] = tracked(client, request).values()
    assert run.info.status == "RUNNING"
    assert steps(client, run, "train/loss") == [1, 2, 3, 4, 5, 6, 7]

    changed = ("--set", "checkpoint.keep_last=3")
    assert trainers("-m", "trainers", str(job), "--run-id", "run", *changed) == 0
    [run] = tracked(client, request).values()
    assert run.info.status == "FINISHED"
    # Steps 6 and 7 were lost, and were made again: they are there once.
    assert steps(client, run, "train/loss") == [*range(1, 11)]
    assert steps(client, run, "validation/f1") == [5, 10]
    history = client.get_metric_history(run.info.run_id, "test/f1")
    assert sorted(metric.step for metric in history) == [0, 10]
    params, tags = run.data.params, run.data.tags
    assert params["optimizer.learning_rate"] == "0.003"
    assert params["task.labels"] == '["negative", "positive"]'
    assert params["versions.torch"]
    assert len(params["data_digest"]) > 8
    assert (params["checkpoint.keep_last"], tags["shoal.changed.checkpoint.keep_last"]) == (
        "2", "3",
    )  # fmt: skip
    assert (tags["shoal.job"], tags["shoal.state"]) == ("tiny", "SUCCEEDED")
    assert tags["shoal.uri"] == f"{scene.runs_folder}/run"


def opened(run: TrackedRun) -> Any:
    from trainers.tracking.mlflow_run import MlflowRun

    return MlflowRun(run)


def test_trials_are_nested_below_their_study_and_go_on_in_their_own_runs(
    client: Any, request: pytest.FixtureRequest
) -> None:
    study = TrackedRun("study", "s3://b/study", "tiny", "study")
    trials = [
        TrackedRun(f"study/trials/{n:04d}", f"s3://b/study/trials/{n:04d}", "tiny", "trial", study)
        for n in range(2)
    ]
    of_study = opened(study)
    of_study.log([Point(1, 1.0, {"study/best": 0.5})])
    for number, trial in enumerate(trials):
        first = opened(trial)
        first.describe(Parameters({"optimizer": {"learning_rate": 10.0**-number}}))
        first.log([Point(4, 1.0, {"train/loss": 0.5})])
        first.end(Ended("PAUSED", 0, 4))
    again = opened(trials[1])
    again.log([Point(4, 2.0, {"train/loss": 0.5}), Point(8, 2.0, {"train/loss": 0.25})])
    assert tracked(client, request)[trials[1].run_id].info.status == "RUNNING"
    again.end(Ended("PRUNED", 0, 8))

    found = tracked(client, request)
    parent = found["study"].info.run_id
    for number, trial in enumerate(trials):
        assert found[trial.run_id].data.tags["mlflow.parentRunId"] == parent
        assert found[trial.run_id].data.params == {"optimizer.learning_rate": str(10.0**-number)}
    assert steps(client, found[trials[1].run_id], "train/loss") == [4, 8]
    states = {key: run.data.tags.get("shoal.state") for key, run in found.items()}
    assert states == {"study": None, trials[0].run_id: "PAUSED", trials[1].run_id: "PRUNED"}


def test_the_end_brings_state_cause_metrics_and_report(
    client: Any, request: pytest.FixtureRequest
) -> None:
    run = opened(TrackedRun("run", "/it's/a run", "tiny"))
    run.end(Ended("FAILED_USER", 1, 3, {"test/f1": 0.5}, "a bad row", "<p>told</p>"))
    same = opened(TrackedRun("run", "/it's/a run", "tiny"))
    assert same._id == run._id
    same.end(Ended("STOPPED", 130, 3))
    [found] = tracked(client, request).values()
    assert found.info.status == "KILLED"
    assert found.data.tags["shoal.cause"] == "a bad row"
    assert found.data.metrics["test/f1"] == 0.5
    [report] = client.list_artifacts(run._id, "report")
    assert report.path == "report/index.html"


def test_without_an_address_nothing_is_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="MLFLOW_TRACKING_URI is not set on "):
        opened(TrackedRun("run", "/run", "tiny"))
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_is_away_costs_a_run_a_warning(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    assert scene.train(scene.job(tracking=["mlflow"])).state.value == "SUCCEEDED"
    events = scene.run_folder() / RunPaths("").lines_folder("events").lstrip("/")
    told = "".join(path.read_text() for path in events.rglob("*.jsonl"))
    assert told.count("MLflow takes nothing at present") == 1
