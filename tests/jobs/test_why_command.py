"""`shoal why` over a Kubernetes API on a socket, without the rights that it can do without, and of
runs of this machine."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_kubernetes import NAME, Scene

from cluster.local import driver_log
from cluster.storage import Store
from jobs.parse import load_spec
from jobs.record import RunPaths, State
from tests.kubernetes_api.operator import Status
from tests.kubernetes_api.schemas import EVENT, POD, WORKLOAD
from tests.kubernetes_api.server import TOKEN, KubernetesApi, Log

DATA = Path(__file__).parent.parent / "data" / "why"
CANARY = "canary0123456789abcdef"
Why = Callable[..., dict[str, Any]]


@pytest.fixture
def scene(
    tmp_path: Path,
    s3_store: Store,
    api: KubernetesApi,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Scene:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SHOAL_STORE", raising=False)
    return Scene(tmp_path, s3_store, api, capsys)


def why(scene: Scene, *options: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(scene.run("why", scene.uri, "--json", *options))
    return found


def recorded(name: str) -> dict[str, Any]:
    tree: dict[str, Any] = yaml.safe_load((DATA / f"{name}.yaml").read_text(encoding="utf-8"))
    return tree


def happen(scene: Scene, event: dict[str, Any], *, about: str) -> None:
    """The recorded event, about an object of the run."""
    told = {**event["involvedObject"], "name": about}
    number = len(scene.api.objects.list(EVENT, "default"))
    tree = {**event, "metadata": {"name": f"event-{number}"}, "involvedObject": told}
    scene.api.objects.create(EVENT, "default", tree)


def test_pods_that_nobody_schedules_and_the_autoscaler_that_adds_no_node(scene: Scene) -> None:
    scene.submit()
    cluster = scene.operator.make_cluster(NAME)
    scene.operator.write(NAME, Status("Initializing", cluster=cluster))
    (pod,) = recorded("gpu-used-up")["pods"]
    scene.api.objects.set_status(POD, "default", f"{cluster}-worker-1", pod["status"])
    (event,) = recorded("autoscaler-at-its-end")["events"]
    happen(scene, event, about=f"{cluster}-worker-1")
    found = why(scene)
    assert [e["rule"] for e in found["explanations"]] == ["autoscaler", "unschedulable", "run"]
    assert (found["state"], found["is_over"]) == ("PENDING", False)
    assert "3 max node group size reached" in found["cause"]
    assert f"shoal resume {scene.uri}" in found["remedy"]
    shown = scene.run("why", scene.uri)
    assert f"{NAME}  PENDING" in shown
    assert "1 has too little nvidia.com/gpu free" in shown
    assert "hint: " in shown


def test_a_run_that_its_queue_does_not_admit(scene: Scene) -> None:
    cluster = {"kind": "kuberay", "image": "registry.example.com/shoal:0.1.0", "queue": "team-a"}
    scene.submit(cluster=cluster)
    scene.operator.write(NAME, Status("Suspended"))
    owner = {"apiVersion": "ray.io/v1", "kind": "RayJob", "name": NAME, "uid": scene.seen.uid}
    api_version = "kueue.x-k8s.io/v1beta1"
    tree = {"apiVersion": api_version, "kind": "Workload"}
    metadata = {"name": "rayjob-run", "ownerReferences": [owner]}
    scene.api.objects.create(WORKLOAD, "default", {**tree, "metadata": metadata})
    status = recorded("queue-never-large-enough")["workload"]["status"]
    scene.api.objects.set_status(WORKLOAD, "default", "rayjob-run", status)
    found = why(scene)
    assert found["explanations"][0]["rule"] == "queue-too-small"
    assert "the queue team-a" in found["cause"]


def test_a_worker_that_ran_out_of_memory_with_what_it_printed(scene: Scene) -> None:
    scene.submit()
    cluster = scene.operator.make_cluster(NAME)
    scene.operator.write(
        NAME, Status("Failed", "FAILED", "AppFailed", "failed with exit code 3", cluster=cluster)
    )
    name = f"{cluster}-worker-1"
    killed = {"exitCode": 137, "reason": "OOMKilled", "finishedAt": "2026-11-29T12:00:00Z"}
    container = {"name": "ray-worker", "restartCount": 1, "state": {"running": {}}}
    container["lastState"] = {"terminated": killed}
    status = {"phase": "Running", "containerStatuses": [container]}
    scene.api.objects.set_status(POD, "default", name, status)
    lines = [("2026-11-29T12:00:00Z", f"step {n}") for n in range(60)]
    scene.api.previous_logs[name, "ray-worker"] = Log(lines=lines, has_ended=True)
    found = why(scene)
    assert found["explanations"][0]["rule"] == "out-of-memory"
    assert "--set workers.memory_gib=16" in found["remedy"]
    assert found["lines"][-1] == f"{name}: step 59"
    assert len(found["lines"]) <= 10


def test_rights_that_are_missing_are_named_once_and_the_rest_is_told(scene: Scene) -> None:
    scene.submit()
    cluster = scene.operator.make_cluster(NAME)
    scene.operator.write(NAME, Status("Initializing", cluster=cluster))
    event = recorded("taint-not-tolerated")["events"][0]
    happen(scene, event, about=f"{cluster}-worker-1")
    scene.api.forbidden |= {("list", "pods"), ("get", "rayclusters")}
    found = why(scene)
    assert found["explanations"][0]["rule"] == "unschedulable"
    assert len(found["missing"]) == 2
    assert "list pods in the namespace default" in found["missing"][0]
    scene.api.forbidden.add(("list", "events"))
    found = why(scene)
    assert [e["rule"] for e in found["explanations"]] == ["run"]
    assert f"pods of its Ray cluster {cluster}" in found["cause"]
    assert len(found["missing"]) == 3
    scene.run("why", scene.uri)
    assert scene.error.count("without the right to list events") == 1


def test_a_run_that_is_recorded_alone_has_no_rayjob(scene: Scene) -> None:
    scene.submit("--record-only")
    found = why(scene)
    assert found["explanations"][0]["rule"] == "no-rayjob"
    assert f"shoal render {scene.uri} | kubectl apply -f -" in found["remedy"]


def test_where_nothing_can_be_told_it_is_the_clusters_error(scene: Scene) -> None:
    scene.submit()
    scene.api.go_away()
    scene.run("why", scene.uri, code=3)
    assert "does not answer" in scene.error
    # What the folder says is told without it.
    scene.end(State.FAILED_INFRA)
    found = why(scene)
    assert found["state"] == "FAILED_INFRA"
    assert "Kubernetes could not be asked" in found["problems"][0]
    scene.run("why", f"{scene.uri}-not", code=2)


def test_a_part_of_kubernetes_that_fails_is_a_problem_and_the_rest_is_told(scene: Scene) -> None:
    scene.submit()
    cluster = scene.operator.make_cluster(NAME)
    scene.operator.write(NAME, Status("Initializing", cluster=cluster))
    scene.api.fail(on="/pods", code=500, times=9)
    (event,) = recorded("taint-not-tolerated")["events"]
    happen(scene, event, about=f"{cluster}-worker-1")
    found = why(scene)
    assert found["explanations"][0]["rule"] == "unschedulable"
    assert "cannot list pods" in found["problems"][0]


def test_no_secret_is_in_what_is_told(scene: Scene) -> None:
    scene.submit()
    cluster = scene.operator.make_cluster(NAME)
    message = f"failed with exit code 1\nAWS_SECRET_ACCESS_KEY={CANARY}"
    scene.operator.write(NAME, Status("Failed", "FAILED", "AppFailed", message, cluster=cluster))
    for event in recorded("image-unauthorized")["events"]:
        event["message"] += f" (https://robot:{CANARY}@registry.example.com)"
        happen(scene, event, about=f"{cluster}-head-0")
    for pod in (f"{cluster}-head-0", f"{NAME}-abcde"):
        container = "ray-head" if "head" in pod else "ray-job-submitter"
        scene.api.print_line(pod, container, f"error: token={CANARY}")
    told = scene.run("why", scene.uri, "--json") + scene.run("why", scene.uri) + scene.error
    assert CANARY not in told
    assert TOKEN not in told
    assert "***" in told


# ----------------------------------------------------------------------------- runs of this machine


def test_a_driver_of_this_machine_that_never_began_is_explained_by_what_it_printed(
    scene: Scene,
) -> None:
    spec = load_spec(Path(scene.job(cluster={"kind": "local"})))
    scene.store.write(RunPaths(NAME).spec, spec.to_bytes())
    assert why(scene)["cause"] == "no driver has started yet"
    log = driver_log(scene.uri)
    try:
        log.write_text("error: the port is taken\n\nhint: set another one\n", encoding="utf-8")
        found = why(scene)
    finally:
        log.unlink()
    assert found["cause"] == "the port is taken"
    assert found["remedy"].startswith("set another one; then: ")
    scene.run("why", scene.uri, "--context", "here", code=2)
    assert "--context here has no effect" in scene.error
