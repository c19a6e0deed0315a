"""Commands over runs on Kubernetes, with a real object store and a Kubernetes API over a socket."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_cli import run_main

from cluster.rayjob_status import SeenRayJob, seen_in
from cluster.storage import Store
from jobs.parse import load_spec
from jobs.rayjob_changes import stop_step
from jobs.rayjobs import with_rayjob
from jobs.record import Lease, Past, Result, RunPaths, State
from jobs.runs import RunReader
from jobs.situation import Situation
from tests.kubernetes_api.manifests import IMAGE, rayjob
from tests.kubernetes_api.operator import Operator, Status
from tests.kubernetes_api.schemas import BUDGET, RAYJOB
from tests.kubernetes_api.server import KubernetesApi

NAME = "sentiment-1"


class Scene:
    """A job for Kubernetes, its run, and the commands over it."""

    def __init__(
        self,
        folder: Path,
        store: Store,
        api: KubernetesApi,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        self.folder = folder
        self.store = store
        self.api = api
        self.operator = Operator(api)
        self.uri = f"{store.uri}/{NAME}"
        self.reader = RunReader(store, NAME)
        self._capsys = capsys

    def job(self, **changes: Any) -> str:
        tree: dict[str, Any] = {
            "name": "sentiment",
            "task": {"labels": ["negative", "positive"]},
            "model": {"source": "s3://models/minilm"},
            "data": {"train": "s3://lake/reviews/train"},
            "workers": {"count": 2, "memory_gib": 8},
            "store": self.store.uri,
            "cluster": {"kind": "kuberay", "image": IMAGE},
        }
        path = self.folder / "job.yaml"
        path.write_text(yaml.safe_dump(tree | changes))
        return str(path)

    def run(self, *arguments: str, code: int = 0) -> str:
        """What the command printed to stdout; the rest is in `error`."""
        self._capsys.readouterr()
        ended = run_main(*arguments)
        shown = self._capsys.readouterr()
        self.error = shown.err
        assert ended == code, shown.err
        return shown.out

    def submit(self, *options: str, code: int = 0, **changes: Any) -> str:
        return self.run(
            "submit", self.job(**changes), "--skip-check", "--run-id", NAME, *options, code=code
        )

    def status(self, *options: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.run("status", self.uri, "--json", *options))
        return found

    @property
    def rayjobs(self) -> list[dict[str, Any]]:
        return self.api.objects.list(RAYJOB, "default")

    @property
    def seen(self) -> SeenRayJob:
        (tree,) = self.rayjobs
        return seen_in(tree)

    def drive(self, *, generation: int = 1, released: bool = False) -> None:
        """A driver on another machine has the run."""
        now = time.time()
        lease = Lease(
            generation=generation,
            holder="h",
            host="head-0",
            boot="another",
            pid=7,
            renewals=1,
            ttl_seconds=60,
            taken_at=now,
            renewed_at=now,
            released=released,
        )
        self.store.write(RunPaths(NAME).lease, lease.to_bytes())

    def end(self, state: State, *, generation: int = 1) -> None:
        """A driver has ended the run."""
        self.drive(generation=generation, released=True)
        result = Result(
            run_id=NAME, state=state, generation=generation, step=5, finished_at=time.time()
        )
        self.store.write(RunPaths(NAME).result, result.to_bytes())


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


# ------------------------------------------------------------------------------------------ submit


def test_submit_makes_the_rayjob_and_says_how_to_follow_it(scene: Scene) -> None:
    assert scene.submit() == f"{scene.uri}\n"
    assert scene.seen.run_uri == scene.uri
    assert f"submitted as the RayJob {NAME} in the namespace default" in scene.error
    for command in ("watch", "logs --follow", "stop"):
        assert f"shoal {command} {scene.uri}" in scene.error
    document = json.loads(scene.submit("--json"))
    assert document["rayjob"] == {"name": NAME, "namespace": "default"}
    assert document["start_command"] is None


def test_what_is_typed_next_names_store_and_context(scene: Scene) -> None:
    access = {"uri": scene.store.uri, "access": {"region": "us-east-1"}}
    scene.submit("--context", "here", store=access)
    assert f"shoal watch {scene.uri} --store {scene.folder}/job.yaml --context here" in scene.error


def test_submitted_twice_it_is_one_run_and_one_rayjob(scene: Scene) -> None:
    first = scene.submit()
    uid = scene.seen.uid
    scene.drive()  # its driver has begun meanwhile
    assert scene.submit() == first
    assert scene.seen.uid == uid
    scene.submit(workers={"count": 3}, code=2)
    assert "exists" in scene.error
    scene.end(State.SUCCEEDED)
    scene.submit(code=2)
    assert f"shoal resume {scene.uri}" in scene.error
    assert len(scene.rayjobs) == 1


def test_a_submit_that_was_cut_off_is_finished_by_the_same_command(scene: Scene) -> None:
    scene.api.forbidden.add(("create", "rayjobs"))
    assert scene.submit(code=3) == ""
    assert "you have no right to create rayjobs.ray.io" in scene.error
    assert f"shoal submit JOB.yaml --run-id {NAME}" in scene.error
    assert scene.reader.spec().name == "sentiment"
    scene.api.forbidden.clear()
    scene.submit()
    assert scene.seen.run_uri == scene.uri


def test_nothing_is_recorded_where_no_cluster_is_known(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KUBECONFIG", str(scene.folder / "missing"))
    scene.submit(code=3)
    assert "KUBECONFIG is" in scene.error
    assert scene.store.head(RunPaths(NAME).spec) is None
    scene.submit("--record-only")
    assert "kubectl apply -f -" in scene.error


def test_options_about_kubernetes_are_refused_elsewhere(scene: Scene) -> None:
    scene.submit("--context", "here", "--record-only", code=2, cluster={"kind": "local"})
    assert "cluster.kind is local, so --context has no effect" in scene.error
    assert "cluster.kind is local, so --record-only has no effect" in scene.error


# ------------------------------------------------------------------------------------------ status


def test_before_the_driver_status_says_what_the_operator_does(scene: Scene) -> None:
    scene.submit()
    assert scene.status()["cause"] == "KubeRay has not taken up the RayJob yet"
    scene.operator.write(NAME, Status("Initializing", cluster="sentiment-1-x"))
    found = scene.status()
    assert found["state"] == "PENDING"
    assert "pods of its Ray cluster sentiment-1-x" in found["cause"]
    assert found["rayjob"]["deployment_status"] == "Initializing"
    scene.operator.write(NAME, Status("Running", "PENDING"))
    assert scene.status()["state"] == "STARTING"
    scene.operator.write(
        NAME, Status("Failed", "FAILED", "AppFailed", "failed with exit code 1, last logs:\nboom")
    )
    found = scene.status()
    assert (found["state"], found["is_over"]) == ("FAILED_USER", True)
    assert f"shoal logs {scene.uri} --pods" in found["hint"]
    shown = scene.run("status", scene.uri)
    assert "sentiment-1 in the namespace default: Failed, FAILED" in shown


def test_what_a_driver_says_is_not_asked_of_the_operator(scene: Scene) -> None:
    scene.submit()
    scene.drive()
    scene.api.requests.clear()
    found = scene.status()  # STARTING, as the folder says
    assert (found["state"], found["generation"]) == ("STARTING", 1)
    # The operator's word comes later than the driver's.
    scene.operator.write(NAME, Status("Running", "RUNNING"))
    scene.end(State.SUCCEEDED)
    assert scene.status()["state"] == "SUCCEEDED"


def test_without_the_cluster_status_says_what_the_folder_says(scene: Scene) -> None:
    scene.submit()
    scene.api.go_away()
    found = scene.status()
    assert found["state"] == "PENDING"
    (problem,) = found["problems"]
    assert "KubeRay could not be asked" in problem
    assert "Connection refused" in problem
    scene.api.start()
    scene.api.forbidden.add(("get", "rayjobs"))
    assert "you have no right to get rayjobs.ray.io" in scene.status()["problems"][0]


def test_a_run_that_was_submitted_elsewhere_is_found_by_its_uri(scene: Scene) -> None:
    scene.submit("--record-only")
    manifest, *_ = json.loads(scene.run("render", scene.uri, "--json"))["items"]
    manifest["metadata"]["name"] = "by-hand"
    scene.api.objects.create(RAYJOB, "default", manifest, manager="kubectl-create")
    scene.operator.write("by-hand", Status("Initializing"))
    assert scene.status()["rayjob"]["name"] == "by-hand"
    scene.run("stop", scene.uri)
    assert scene.rayjobs == []


def test_another_context_is_another_cluster(scene: Scene) -> None:
    scene.submit()
    assert "does not answer" in scene.status("--context", "elsewhere")["problems"][0]


def test_the_list_asks_once_for_each_namespace(scene: Scene) -> None:
    scene.submit()
    scene.run("submit", "job.yaml", "--skip-check", "--run-id", "sentiment-2")
    scene.operator.write(NAME, Status("Retrying", failed=1))
    scene.operator.write("sentiment-2", Status("ValidationFailed", message="no"))
    scene.api.requests.clear()
    runs = json.loads(scene.run("list", "--store", scene.store.uri, "--json"))["runs"]
    states = {run["run_id"]: run["state"] for run in runs}
    assert states == {NAME: "RECOVERING", "sentiment-2": "FAILED_SPEC"}
    assert len(scene.api.requests) == 1
    scene.api.forbidden.add(("list", "rayjobs"))
    runs = json.loads(scene.run("list", "--store", scene.store.uri, "--json"))["runs"]
    assert [run["state"] for run in runs] == ["PENDING", "PENDING"]


def test_a_context_is_refused_for_a_run_of_this_machine(scene: Scene) -> None:
    scene.submit("--record-only")
    local = load_spec(Path(scene.job(cluster={"kind": "local"})))
    scene.store.write(RunPaths(NAME).spec, local.to_bytes())
    for command in ("status", "watch", "stop"):
        scene.run(command, scene.uri, "--context", "here", code=2)
        assert "--context here has no effect" in scene.error
    scene.run("logs", scene.uri, "--pods", code=2)
    assert "has no pods" in scene.error
    scene.run("logs", scene.uri, "--context", "here", code=2)
    assert "without --pods" in scene.error


# ----------------------------------------------------------------------------------- watch and logs


def test_watch_follows_the_operator_to_an_end_that_no_driver_tells(scene: Scene) -> None:
    scene.submit()
    scene.operator.write(NAME, Status("Initializing", cluster="sentiment-1-x"))

    def play() -> None:
        wait_until(lambda: any(a.query.get("watch") for a in list(scene.api.requests)))
        scene.operator.write(NAME, Status("Failed", reason="PreRunningDeadlineExceeded"))

    player = threading.Thread(target=play, daemon=True)
    player.start()
    scene.run("watch", scene.uri, code=3)
    player.join()
    assert "KubeRay: it waits for the pods of its Ray cluster" in scene.error
    assert "FAILED_RESOURCES" in scene.error
    assert "preRunningDeadlineSeconds" in scene.error


def test_logs_of_the_pods_while_they_are_there_and_of_the_folder_after(scene: Scene) -> None:
    scene.submit()
    scene.run("logs", scene.uri, "--pods")
    assert "no pod of it has printed anything" in scene.error
    cluster = scene.operator.make_cluster(NAME)
    scene.operator.write(NAME, Status("Running", "RUNNING", cluster=cluster))
    lines = [(f"{NAME}-abcde", "ray-job-submitter", "submitted", 1)]
    lines += [(f"{cluster}-head-0", "ray-head", "the head is up", 0)]
    for pod, container, text, second in lines:
        moment = f"2026-11-29T12:00:0{second}Z"
        scene.api.print_line(pod, container, text, moment=moment)
    shown = scene.run("logs", scene.uri, "--pods")
    assert [line.split("  ")[1] for line in shown.splitlines()] == ["the head is up", "submitted"]
    document = json.loads(scene.run("logs", scene.uri, "--pods", "--json"))
    assert [line["role"] for line in document["lines"]] == ["head", "submitter"]


def test_logs_follow_the_pods_to_the_end_of_the_run(scene: Scene) -> None:
    scene.submit()
    cluster = scene.operator.make_cluster(NAME)
    scene.operator.write(NAME, Status("Running", "RUNNING", cluster=cluster))
    pods = [(f"{NAME}-abcde", "ray-job-submitter"), (f"{cluster}-head-0", "ray-head")]
    pods += [(f"{cluster}-worker-{n}", "ray-worker") for n in (1, 2)]

    def play() -> None:
        for number, (pod, container) in enumerate(pods):
            wait_until(
                lambda pod=pod: any(
                    f"/{pod}/log" in a.path and a.query.get("follow")
                    for a in list(scene.api.requests)
                )
            )
            scene.api.print_line(pod, container, f"line {number}")
            scene.api.end_log(pod, container)
        scene.operator.write(NAME, Status("Complete", "SUCCEEDED", cluster=cluster))

    player = threading.Thread(target=play, daemon=True)
    player.start()
    shown = scene.run("logs", scene.uri, "--pods", "--follow")
    player.join()
    assert sorted(line.split("  ")[1] for line in shown.splitlines()) == [
        f"line {n}" for n in range(4)
    ]


@pytest.mark.parametrize("right", [("list", "pods"), ("get", "pods/log")], ids=lambda r: r[1])
def test_without_the_right_to_logs_the_folder_is_shown(
    scene: Scene, right: tuple[str, str]
) -> None:
    scene.submit()
    cluster = scene.operator.make_cluster(NAME)
    scene.operator.write(NAME, Status("Running", "RUNNING", cluster=cluster))
    scene.api.forbidden.add(right)
    for options in ([], ["--follow"]):
        if options:
            scene.end(State.SUCCEEDED)
        scene.run("logs", scene.uri, "--pods", *options)
        warning = f"warning: without the right to {right[0]} {right[1]} in the namespace default"
        assert scene.error.count(warning) == 1


# ------------------------------------------------------------------------------------ stop, delete


def test_stop_asks_the_driver_and_a_second_one_ends_it_at_once(scene: Scene) -> None:
    scene.submit()
    scene.drive()
    scene.operator.write(NAME, Status("Running", "RUNNING"))
    scene.run("stop", scene.uri)
    assert "asked to stop" in scene.error
    assert "ask again to end it at once" in scene.error
    (control,) = scene.reader.controls()
    assert control.kind == "stop"
    # KubeRay does not make a cluster to start again what was stopped.
    assert scene.seen.backoff_limit == 0
    scene.run("stop", scene.uri)
    assert f"deleted the RayJob of {scene.uri}" in scene.error
    assert scene.rayjobs == []


def test_a_run_that_waits_for_its_cluster_is_stopped_by_deleting_its_rayjob(scene: Scene) -> None:
    scene.submit()
    scene.operator.write(NAME, Status("Initializing"))
    scene.run("stop", scene.uri)
    assert scene.rayjobs == []
    assert "go on with: shoal resume" in scene.error


def test_a_request_of_an_earlier_start_is_not_the_first_of_two(scene: Scene) -> None:
    scene.submit()
    scene.drive()
    scene.run("stop", scene.uri)
    scene.end(State.STOPPED)
    scene.operator.write(NAME, Status("Failed", "FAILED"))
    scene.run("resume", scene.uri)
    assert scene.seen.past.controls == 1
    scene.drive(generation=2)
    scene.operator.write(NAME, Status("Running", "RUNNING"))
    scene.run("stop", scene.uri)
    assert "asked to stop" in scene.error
    assert len(scene.rayjobs) == 1


def test_stop_works_without_the_cluster(scene: Scene) -> None:
    scene.submit()
    scene.drive()
    scene.api.forbidden |= {("get", "rayjobs"), ("patch", "rayjobs")}
    scene.run("stop", scene.uri)
    assert "warning: you have no right to get rayjobs.ray.io" in scene.error
    assert scene.reader.last_stop() == 1


def test_stop_and_wait_deletes_the_rayjob_once_the_run_has_ended(scene: Scene) -> None:
    scene.submit()
    scene.drive()
    scene.operator.write(NAME, Status("Running", "RUNNING"))

    def play() -> None:
        wait_until(lambda: bool(scene.reader.controls()))
        assert len(scene.rayjobs) == 1
        scene.end(State.STOPPED)

    player = threading.Thread(target=play, daemon=True)
    player.start()
    scene.run("stop", scene.uri, "--wait", code=130)
    player.join()
    assert scene.rayjobs == []


def test_stop_of_what_has_ended(scene: Scene) -> None:
    scene.submit()
    scene.end(State.SUCCEEDED)
    scene.operator.write(NAME, Status("Complete", "SUCCEEDED"))
    scene.run("stop", scene.uri, code=2)
    assert "has ended already" in scene.error
    # KubeRay is about to start again what failed: that can be stopped.
    scene.end(State.FAILED_INFRA)
    scene.operator.write(NAME, Status("Retrying", "FAILED", failed=1))
    scene.run("stop", scene.uri)
    assert scene.rayjobs == []


def test_delete_removes_the_rayjob_before_the_run(scene: Scene) -> None:
    scene.submit()
    scene.end(State.SUCCEEDED)
    scene.run("delete", scene.uri, "--yes")
    assert scene.rayjobs == []
    assert scene.store.head(RunPaths(NAME).spec) is None


def test_delete_without_the_cluster_says_what_may_be_left(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene.submit()
    scene.end(State.SUCCEEDED)
    scene.api.forbidden.add(("delete", "rayjobs"))
    scene.run("delete", scene.uri, "--yes")
    assert f"kubectl delete rayjobs.ray.io {NAME} --namespace default" in scene.error
    assert scene.store.head(RunPaths(NAME).spec) is None


# ------------------------------------------------------------------------------------------ resume


def test_resume_replaces_the_rayjob_once_the_old_one_is_gone(scene: Scene) -> None:
    scene.submit()
    scene.end(State.STOPPED)
    scene.operator.write(NAME, Status("Failed", "FAILED", failed=1))
    scene.operator.hold(NAME)
    old = scene.seen.uid

    def play() -> None:
        wait_until(lambda: scene.seen.is_being_deleted)
        wait_until(lambda: [a.method for a in scene.api.requests[-2:]] == ["GET", "GET"])
        assert [j["metadata"]["uid"] for j in scene.rayjobs] == [old]
        scene.operator.release(NAME)

    player = threading.Thread(target=play, daemon=True)
    player.start()
    assert scene.run("resume", scene.uri, "--set", "workers.count=3") == f"{scene.uri}\n"
    player.join()
    assert scene.seen.uid != old
    assert scene.seen.past.generation == 1
    (tree,) = scene.rayjobs
    assert tree["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["replicas"] == 3
    assert "submitted as the RayJob" in scene.error


def test_a_run_has_budgets_that_go_with_its_rayjob(scene: Scene) -> None:
    scene.submit(workers={"count": 3})
    found = scene.api.objects.list(BUDGET, "default")
    assert {b["metadata"]["name"]: b["spec"]["minAvailable"] for b in found} == {
        f"{NAME}-head": 1,
        f"{NAME}-worker": 2,
    }
    owners = [b["metadata"]["ownerReferences"] for b in found]
    assert [[o["uid"] for o in own] for own in owners] == [[scene.seen.uid]] * 2


def test_a_run_starts_without_the_right_to_budgets(scene: Scene) -> None:
    scene.api.forbidden.add(("patch", "poddisruptionbudgets"))
    scene.submit()
    assert len(scene.rayjobs) == 1
    assert "nodes may be drained under the run's head" in scene.error


def test_who_submits_is_a_label_of_the_rayjob(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOGNAME", "Ada Lovelace")
    scene.submit()
    (tree,) = scene.rayjobs
    assert "Ada" in tree["metadata"]["labels"]["shoal/user"]


IN_HAND = {
    "it waits for its first driver": (Status("Initializing"), None),
    "it is started again": (Status("Retrying", failed=1), State.FAILED_INFRA),
    "its driver runs": (Status("Running", "RUNNING"), State.FAILED_INFRA),
    "it was resumed already": (Status(), State.STOPPED),
}


@pytest.mark.parametrize(("status", "state"), IN_HAND.values(), ids=IN_HAND)
def test_what_kuberay_has_in_hand_is_not_resumed(
    scene: Scene, status: Status, state: State | None
) -> None:
    scene.submit()
    if state is not None:
        scene.end(state)
    scene.operator.write(NAME, status)
    uid = scene.seen.uid
    scene.run("resume", scene.uri, "--set", "workers.count=3", code=2)
    assert "as KubeRay has it in hand" in scene.error
    assert scene.seen.uid == uid
    assert scene.reader.spec().workers.count == 2


def test_a_run_that_was_stopped_before_it_began_does_not_hear_of_it_when_resumed(
    scene: Scene,
) -> None:
    scene.submit("--record-only")
    scene.run("stop", scene.uri)
    assert scene.reader.last_stop() == 1
    scene.run("resume", scene.uri)
    assert scene.seen.past == Past(controls=1, generation=0)


def test_a_resume_that_is_refused_can_be_repeated(scene: Scene) -> None:
    scene.submit()
    scene.end(State.STOPPED)
    scene.operator.write(NAME, Status("Failed", "FAILED", failed=1))
    scene.api.forbidden.add(("create", "rayjobs"))
    scene.run("resume", scene.uri, code=3)
    assert f"since the run is recorded: shoal resume {scene.uri}" in scene.error
    assert scene.rayjobs == []
    scene.api.forbidden.clear()
    scene.run("resume", scene.uri)
    assert len(scene.rayjobs) == 1


# ------------------------------------------------------------- the folder and the RayJob, together


def situation(state: State, *, over: bool = False, generation: int = 1) -> Situation:
    code = state.exit_code if over else 0
    return Situation(state, "own", "hint", generation, is_over=over, exit_code=code)


def seen(status: Status, **spec: Any) -> SeenRayJob:
    manifest = rayjob()
    manifest["spec"].update(spec)
    return seen_in({**manifest, "status": status.as_tree()})


FRESH = situation(State.PENDING, generation=0)
STARTING, RUNNING = situation(State.STARTING), situation(State.RUNNING)
DONE, STOPPED = situation(State.SUCCEEDED, over=True), situation(State.STOPPED, over=True)
FAILED = situation(State.FAILED_INFRA, over=True)
LATE = Status("Failed", "RUNNING", "DeadlineExceeded")
NO_ROOM = Status("Failed", "", "PreRunningDeadlineExceeded")
BOTH: dict[str, tuple[Situation, Status, State, bool]] = {
    # the folder's, the RayJob's, both together, whether it is over
    "not begun": (FRESH, Status(), State.PENDING, False),
    "in the queue": (FRESH, Status("Suspended"), State.PENDING, False),
    "the driver is there, and has not written": (
        FRESH,
        Status("Running", "RUNNING"),
        State.STARTING,
        False,
    ),
    "it has ended before it wrote, says Ray alone": (
        FRESH,
        Status("Running", "FAILED"),
        State.STARTING,
        False,
    ),
    "it never began": (FRESH, Status("ValidationFailed"), State.FAILED_SPEC, True),
    "no room": (FRESH, NO_ROOM, State.FAILED_RESOURCES, True),
    "runs": (RUNNING, Status("Running", "RUNNING"), State.RUNNING, False),
    "runs, though KubeRay gave it up": (RUNNING, LATE, State.RUNNING, False),
    "starts, though KubeRay gave it up": (STARTING, LATE, State.STARTING, False),
    "ended without a result": (
        STARTING,
        Status("Failed", "FAILED", "AppFailed"),
        State.FAILED_INFRA,
        True,
    ),
    "ended well without a result": (
        situation(State.RECOVERING),
        Status("Complete", "SUCCEEDED"),
        State.FAILED_INFRA,
        True,
    ),
    "done": (DONE, Status("Running", "SUCCEEDED"), State.SUCCEEDED, True),
    "done, its submitter failed": (
        DONE,
        Status("Retrying", "SUCCEEDED", "SubmissionFailed", failed=1),
        State.SUCCEEDED,
        True,
    ),
    "stopped, KubeRay tries again": (STOPPED, Status("Retrying", failed=1), State.STOPPED, True),
    "failed, KubeRay tries again": (FAILED, Status("Retrying", failed=1), State.RECOVERING, False),
    "failed, KubeRay has not acted yet": (
        FAILED,
        Status("Running", "FAILED"),
        State.RECOVERING,
        False,
    ),
    "failed for the last time": (
        FAILED,
        Status("Running", "FAILED", failed=2),
        State.FAILED_INFRA,
        True,
    ),
    "failed, and given up": (
        FAILED,
        Status("Failed", "FAILED", failed=3),
        State.FAILED_INFRA,
        True,
    ),
    "its queue took its room": (FAILED, Status("Suspended"), State.PENDING, False),
    "resumed": (STOPPED, Status("Initializing"), State.PENDING, False),
    "resumed, starting": (DONE, Status("Running", "PENDING"), State.STARTING, False),
}


@pytest.mark.parametrize(("own", "status", "state", "over"), BOTH.values(), ids=BOTH)
def test_the_folder_and_the_rayjob_make_one_state(
    own: Situation, status: Status, state: State, over: bool
) -> None:
    both = with_rayjob(own, seen(status), run="RUN")
    assert (both.state, both.is_over) == (state, over)
    assert both.cause
    assert both.exit_code == (both.state.exit_code if over else 0)
    assert both.generation == own.generation


def test_without_a_rayjob_the_folder_counts() -> None:
    assert with_rayjob(FRESH, None, run="RUN") is FRESH


def test_a_rayjob_that_is_being_deleted_is_told_beside_the_state() -> None:
    manifest = rayjob()
    manifest["metadata"]["deletionTimestamp"] = "2026-11-29T12:00:00Z"
    both = with_rayjob(situation(State.STARTING), seen_in(manifest), run="RUN")
    assert both.cause == "own; its RayJob is being deleted"


STOPS: dict[str, tuple[Situation, Status | None, int, str]] = {
    "it runs": (RUNNING, Status("Running", "RUNNING"), 0, "ask"),
    "it was asked before": (situation(State.STOPPING), Status("Running", "RUNNING"), 1, "delete"),
    "it was asked, and has no RayJob": (situation(State.STOPPING), None, 1, "ask"),
    "no driver yet": (FRESH, Status("Initializing"), 0, "delete"),
    "nobody has started it": (FRESH, None, 0, "ask"),
    "over": (DONE, Status("Complete", "SUCCEEDED"), 0, "over"),
    "over, and gone": (STOPPED, None, 0, "over"),
    "over, but started again": (FAILED, Status("Retrying", failed=1), 0, "delete"),
}


@pytest.mark.parametrize(("own", "status", "stops", "step"), STOPS.values(), ids=STOPS)
def test_what_a_request_to_stop_comes_to(
    own: Situation, status: Status | None, stops: int, step: str
) -> None:
    there = None if status is None else seen(status)
    assert stop_step(own, there, stops=stops) == step


def test_old_requests_are_read_from_the_rayjob() -> None:
    from cluster.rayjob import build_rayjob
    from tests.kubernetes_api.manifests import kuberay_job

    access = {"uri": "s3://shoal/my runs", "access": {"endpoint_url": "https://s3.example.com"}}
    spec = kuberay_job(store=access)
    for past in (Past(), Past(controls=3), Past(controls=12, generation=2)):
        made = build_rayjob(spec, run_id=NAME, run_uri="s3://shoal/my runs/a", past=past)
        assert seen_in(made).past == past


def wait_until(condition: Any) -> None:
    tick = threading.Event()
    for _ in range(2000):
        if condition():
            return
        tick.wait(0.01)
    raise AssertionError("it did not come to that")
