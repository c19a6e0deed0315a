"""A run on Kubernetes from its submission to its end, where no kubelet runs: an API over a real
socket, whose operator starts the RayJob's entrypoint on this machine, with a real Ray and a real
object store.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from cluster.storage import Store, join_uri
from jobs.record import RunPaths, State
from jobs.runs import RunReader
from tests.e2e.commands import shoal, wait_for, wait_until_none_is_left
from tests.kubernetes_api.manifests import IMAGE
from tests.kubernetes_api.operator import LocalRuns
from tests.kubernetes_api.schemas import RAYJOB
from tests.kubernetes_api.server import TOKEN, KubernetesApi
from tests.tiny import tiny_model, tiny_reviews, tiny_tree
from trainers.records import read_manifests

pytestmark = pytest.mark.timeout(600)

RUN = "tiny-1"


@pytest.fixture
def scene(tmp_path: Path, s3_store: Store, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """job.yaml in a folder; data, model and runs in the object store, as pods need them."""
    monkeypatch.setenv("SHOAL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    for file in tiny_model(tmp_path / "model").iterdir():
        s3_store.write(f"model/{file.name}", file.read_bytes())
    tree = tiny_tree(
        join_uri(s3_store.uri, "model"),
        tiny_reviews(join_uri(s3_store.uri, "data"), rows=400, rows_per_group=64, held_out=32),
        join_uri(s3_store.uri, "runs"),
        train={"epochs": 200, "log_every_steps": 20},
        checkpoint={"every_steps": 20},
        cluster={"kind": "kuberay", "image": IMAGE},
    )
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(tree))
    yield tmp_path
    wait_until_none_is_left(tmp_path / "cache", but=[os.getpid()])


@pytest.fixture
def operator(api: KubernetesApi, scene: Path) -> Iterator[LocalRuns]:
    python = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    operator = LocalRuns(api, environment=python)
    with operator.at_work():
        yield operator


@pytest.fixture
def started(scene: Path) -> Iterator[list[subprocess.Popen[str]]]:
    """Commands that go on while others are given; none outlives the test."""
    found: list[subprocess.Popen[str]] = []
    yield found
    for process in found:
        if process.poll() is None:
            process.kill()
            process.communicate()


def test_a_run_is_submitted_followed_stopped_and_reported(
    scene: Path,
    s3_store: Store,
    api: KubernetesApi,
    operator: LocalRuns,
    started: list[subprocess.Popen[str]],
) -> None:
    runs = s3_store.within("runs")
    reader = RunReader(runs, RUN)
    said: dict[str, str] = {}

    def ended(name: str, *arguments: str) -> int:
        process = shoal(*arguments, folder=scene)
        said[name], _ = process.communicate(timeout=300)
        return process.returncode

    submit = ("submit", "job.yaml", "--skip-check", "--run-id", RUN)
    assert ended("submit", *submit) == 0, said["submit"]
    assert said["submit"].startswith(f"{reader.uri}\n"), said["submit"]

    watch = shoal("watch", reader.uri, folder=scene)
    logs = shoal("logs", reader.uri, "--pods", "--follow", folder=scene)
    started += [watch, logs]
    wait_for(lambda: any(m.step >= 20 for m in read_manifests(runs, RunPaths(RUN))), watch)
    assert ended("status", "status", reader.uri) == 0
    assert "RUNNING" in said["status"]

    assert ended("stop", "stop", reader.uri, "--wait") == 130, said["stop"]
    result = reader.result()
    assert result is not None
    assert result.state is State.STOPPED
    assert result.step > 0
    assert result.last_checkpoint is not None
    said["watch"], _ = watch.communicate(timeout=300)
    assert watch.returncode == 130, said["watch"]
    assert "KubeRay: " in said["watch"], said["watch"]
    assert "STOPPED" in said["watch"], said["watch"]
    said["logs"], _ = logs.communicate(timeout=300)
    assert logs.returncode == 0, said["logs"]
    assert f"{RUN}-abcde  " in said["logs"], said["logs"]

    # One run, one RayJob, one driver; nothing of it is left, and its folder tells all.
    assert operator.started == [RUN]
    assert api.objects.list(RAYJOB, "default") == []
    assert ended("report", "report", reader.uri) == 0, said["report"]
    assert runs.head(RunPaths(RUN).report_html) is not None
    assert TOKEN not in "".join(said.values())
