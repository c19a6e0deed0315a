"""RayJobs through a Kubernetes API over a real socket: applied, watched, deleted; their logs."""

from __future__ import annotations

import queue
import threading
from typing import Any

import pytest

from cluster.kuberay import KubeRay
from cluster.kuberay_errors import KubernetesError
from cluster.rayjob_status import SeenRayJob, state_of
from jobs.errors import SpecError
from jobs.record import State
from tests.kubernetes_api.manifests import RUN_URI, rayjob
from tests.kubernetes_api.operator import Operator, Status, walks
from tests.kubernetes_api.schemas import EVENT, POD, RAYJOB, WORKLOAD
from tests.kubernetes_api.server import KubernetesApi, Log

NAME = "sentiment-1"
PATCH = "PATCH .*rayjobs"
WATCH = "GET .*watch=true"


@pytest.fixture
def kuberay(api: KubernetesApi) -> KubeRay:
    return KubeRay.of("default", context=None, patience_seconds=4.0)


@pytest.fixture
def operator(api: KubernetesApi) -> Operator:
    return Operator(api)


class Watched:
    """A watch in a thread, whose words are taken one by one."""

    def __init__(self, kuberay: KubeRay) -> None:
        self._told: queue.Queue[SeenRayJob | Exception | None] = queue.Queue()
        threading.Thread(target=self._watch, args=(kuberay,), daemon=True).start()

    def _watch(self, kuberay: KubeRay) -> None:
        try:
            for seen in kuberay.watch(NAME):
                self._told.put(seen)
        except Exception as error:
            self._told.put(error)

    def next(self) -> SeenRayJob | None:
        told = self._told.get(timeout=20)
        if isinstance(told, Exception):
            raise told
        return told

    def next_deployment(self) -> str | None:
        seen = self.next()
        return None if seen is None else seen.deployment_status

    def is_silent(self) -> bool:
        return self._told.empty()


# ------------------------------------------------------------------------------------------- apply


def test_a_rayjob_is_applied_with_strict_validation_by_a_field_manager(
    api: KubernetesApi, kuberay: KubeRay
) -> None:
    applied = kuberay.apply(rayjob())
    assert applied.is_new
    assert applied.seen.run_uri == RUN_URI
    (asked,) = (a for a in api.requests if a.method == "PATCH")
    assert asked.headers["Content-Type"] == "application/apply-patch+yaml"
    assert asked.query == {"fieldManager": "shoal", "fieldValidation": "Strict"}
    stored = api.objects.get(RAYJOB, "default", NAME)
    assert {entry["manager"] for entry in stored["metadata"]["managedFields"]} == {"shoal"}
    assert stored["spec"]["entrypoint"] == rayjob()["spec"]["entrypoint"]


def test_a_run_has_one_rayjob_however_often_it_is_applied(
    api: KubernetesApi, kuberay: KubeRay, operator: Operator
) -> None:
    first = kuberay.apply(rayjob()).seen
    operator.write(NAME, Status("Running", "RUNNING"))
    # Of a later version of Shoal, or after somebody else has changed it: what runs stays.
    again = kuberay.apply(rayjob(cluster={**_cluster(), "backoff_limit": 7}))
    assert not again.is_new
    assert (again.seen.uid, again.seen.backoff_limit) == (first.uid, 2)
    assert again.seen.deployment_status == "Running"
    assert len(api.objects.list(RAYJOB, "default")) == 1


def test_two_who_apply_at_once_make_one(api: KubernetesApi, kuberay: KubeRay) -> None:
    others = [KubeRay.of("default", context=None) for _ in range(4)]
    found: list[str] = []
    threads = [
        threading.Thread(target=lambda k=k: found.append(k.apply(rayjob()).seen.uid))
        for k in others
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert len(set(found)) == 1


def test_the_name_of_another_run_is_refused(kuberay: KubeRay) -> None:
    kuberay.apply(rayjob())
    with pytest.raises(SpecError) as error:
        kuberay.apply(rayjob(run_uri="s3://other/runs/sentiment-1"))
    assert RUN_URI in str(error.value)
    assert "--run-id" in str(error.value.problems[0].hint)


def test_one_that_is_being_deleted_is_waited_for(
    api: KubernetesApi, kuberay: KubeRay, operator: Operator
) -> None:
    first = kuberay.apply(rayjob()).seen
    operator.hold(NAME)
    kuberay.delete(first)
    timer = threading.Timer(0.3, operator.release, [NAME])
    timer.start()
    again = kuberay.apply(rayjob())
    assert again.is_new
    assert again.seen.uid != first.uid
    timer.join()


def test_a_run_is_found_by_its_uri_whoever_applied_it_under_whatever_name(
    api: KubernetesApi, kuberay: KubeRay
) -> None:
    assert kuberay.find(NAME, RUN_URI) is None
    elsewhere = rayjob()
    elsewhere["metadata"]["name"] = "another-name"
    api.objects.create(RAYJOB, "default", elsewhere, manager="kubectl-create")
    found = kuberay.find(NAME, RUN_URI)
    assert found is not None
    assert found.name == "another-name"
    # One of the run's name that is somebody else's is not taken for it.
    api.objects.create(RAYJOB, "default", rayjob(run_uri="s3://b/other"))
    found = kuberay.find(NAME, RUN_URI)
    assert found is not None
    assert found.name == "another-name"


def test_retries_are_ended_without_touching_the_rest(api: KubernetesApi, kuberay: KubeRay) -> None:
    kuberay.apply(rayjob())
    before = api.objects.get(RAYJOB, "default", NAME)["spec"]
    kuberay.end_retries(NAME)
    assert api.objects.get(RAYJOB, "default", NAME)["spec"] == before | {"backoffLimit": 0}
    kuberay.end_retries("gone")  # nothing to do


# ------------------------------------------------------------------------------------------- watch


def test_a_watch_tells_what_is_there_and_each_change(
    api: KubernetesApi, kuberay: KubeRay, operator: Operator
) -> None:
    watched = Watched(kuberay)
    assert watched.next() is None
    kuberay.apply(rayjob())
    api.objects.create(RAYJOB, "default", rayjob("other-1"))  # not ours
    assert watched.next_deployment() == ""
    operator.write(NAME, Status("Initializing"))
    assert watched.next_deployment() == "Initializing"
    api.objects.delete(RAYJOB, "default", NAME)
    while (seen := watched.next()) is not None:
        assert seen.is_being_deleted


def test_a_watch_that_is_cut_goes_on_from_the_version_it_has_seen(
    api: KubernetesApi, kuberay: KubeRay, operator: Operator
) -> None:
    kuberay.apply(rayjob())
    watched = Watched(kuberay)
    assert watched.next_deployment() == ""
    wait_for_request(api, WATCH, 1)
    api.cut_connections()
    operator.write(NAME, Status("Initializing"))
    assert watched.next_deployment() == "Initializing"
    lists = [a for a in api.requests if a.method == "GET" and a.query.keys() == {"fieldSelector"}]
    assert len(lists) == 1, "it has read everything again"


def test_a_watch_outlives_an_api_that_goes_away(
    api: KubernetesApi, kuberay: KubeRay, operator: Operator
) -> None:
    kuberay.apply(rayjob())
    watched = Watched(kuberay)
    assert watched.next_deployment() == ""
    wait_for_request(api, WATCH, 1)
    api.go_away()
    operator.write(NAME, Status("Running", "RUNNING"))
    timer = threading.Timer(0.5, api.start)
    timer.start()
    assert watched.next_deployment() == "Running"
    timer.join()


def test_a_watch_gives_up_on_an_api_that_stays_away(api: KubernetesApi) -> None:
    kuberay = KubeRay.of("default", context=None, patience_seconds=0.5)
    watched = Watched(kuberay)
    assert watched.next() is None
    api.go_away()
    with pytest.raises(KubernetesError) as error:
        watched.next()
    assert "does not answer" in str(error.value)


@pytest.mark.parametrize("by_status", [False, True], ids=["as an event", "as a status"])
def test_an_expired_version_is_read_anew(
    api: KubernetesApi, kuberay: KubeRay, operator: Operator, by_status: bool
) -> None:
    api.expires_by_status = by_status
    kuberay.apply(rayjob())
    watched = Watched(kuberay)
    assert watched.next_deployment() == ""
    wait_for_request(api, WATCH, 1)
    api.fail(on=WATCH, times=0)
    with api.objects.changed:
        operator.write(NAME, Status("Initializing"))
        api.objects.expire()  # before the watch could tell it
        api.cut_connections()
    assert watched.next_deployment() == "Initializing"
    operator.write(NAME, Status("Running", "PENDING"))
    assert watched.next_deployment() == "Running"


def test_bookmarks_move_the_version_and_tell_nothing(
    api: KubernetesApi, kuberay: KubeRay, operator: Operator
) -> None:
    kuberay.apply(rayjob())
    watched = Watched(kuberay)
    assert watched.next_deployment() == ""
    wait_for_request(api, WATCH, 1)
    with api.objects.changed:
        api.objects.bookmark(RAYJOB)
        newest = api.objects.version
    operator.write(NAME, Status("Initializing"))
    assert watched.next_deployment() == "Initializing"
    assert watched.is_silent()
    # With the bookmark's version a watch can go on from where without it would be too old.
    api.objects.oldest_version = newest
    api.cut_connections()
    operator.write(NAME, Status("Running"))
    assert watched.next_deployment() == "Running"


def test_a_watch_without_the_right_says_so(api: KubernetesApi, kuberay: KubeRay) -> None:
    api.forbidden.add(("watch", "rayjobs"))
    watched = Watched(kuberay)
    assert watched.next() is None
    with pytest.raises(KubernetesError) as error:
        watched.next()
    assert "you have no right to watch rayjobs.ray.io in the namespace default" in str(error.value)


def test_every_order_of_the_operator_is_told_as_it_comes(
    api: KubernetesApi, kuberay: KubeRay, operator: Operator
) -> None:
    """Each step that the operator can take is taken once, in walks from a new RayJob to its end."""
    kuberay.apply(rayjob())
    watched = Watched(kuberay)
    assert watched.next_deployment() == ""
    for walk in walks(backoff_limit=1, suspends=True):
        operator.write(NAME, {"message": "reset"})  # tells the walks apart
        assert watched.next_deployment() == ""
        for status in walk:
            operator.write(NAME, status)
            seen = watched.next()
            assert seen is not None
            assert (seen.deployment_status, seen.job_status) == (status.deployment, status.job)
            assert seen.failed == status.failed
        assert state_of(seen).is_over


# ------------------------------------------------------------------------------------------ delete


def test_a_rayjob_is_gone_once_its_pods_are(
    api: KubernetesApi, kuberay: KubeRay, operator: Operator
) -> None:
    seen = kuberay.apply(rayjob()).seen
    operator.make_cluster(NAME)
    (pod, *_) = api.objects.list(POD, "default")
    api.objects.set_finalizers(POD, "default", pod["metadata"]["name"], ["it/ends"])
    kuberay.delete(seen)
    assert kuberay.get(NAME) is not None
    threading.Timer(
        0.3, api.objects.set_finalizers, [POD, "default", pod["metadata"]["name"], []]
    ).start()
    kuberay.wait_until_gone(seen)
    assert api.objects.list(POD, "default") == []


def test_waiting_for_the_end_of_one_is_bounded(
    api: KubernetesApi, kuberay: KubeRay, operator: Operator
) -> None:
    seen = kuberay.apply(rayjob()).seen
    operator.hold(NAME)
    kuberay.delete(seen)
    with pytest.raises(KubernetesError) as error:
        kuberay.wait_until_gone(seen, seconds=0.2)
    assert "is still there" in str(error.value)


def test_another_one_of_the_same_name_is_not_deleted(api: KubernetesApi, kuberay: KubeRay) -> None:
    old = kuberay.apply(rayjob()).seen
    kuberay.delete(old)
    kuberay.wait_until_gone(old)
    new = kuberay.apply(rayjob()).seen
    kuberay.delete(old)
    kuberay.wait_until_gone(old)
    found = kuberay.get(NAME)
    assert found is not None
    assert (found.uid, found.is_being_deleted) == (new.uid, False)


# ------------------------------------------------------------------------- pods, logs, explanations


def test_pods_are_told_by_their_roles(
    api: KubernetesApi, kuberay: KubeRay, operator: Operator
) -> None:
    seen = start(kuberay, operator)
    pods = kuberay.pods(seen)
    assert [pod.role for pod in pods] == ["submitter", "head", "worker", "worker"]
    assert [pod.container for pod in pods][:3] == ["ray-job-submitter", "ray-head", "ray-worker"]
    assert all(pod.has_started for pod in pods)
    operator.make_pod("late", "worker", _tree(api), {"job-name": NAME}, state="waiting")
    late = next(pod for pod in kuberay.pods(seen) if pod.name == "late")
    assert not late.has_started
    assert list(kuberay.log_lines(late, follow=True)) == []


def test_a_log_is_followed_to_its_end_through_lost_connections(
    api: KubernetesApi, kuberay: KubeRay, operator: Operator
) -> None:
    seen = start(kuberay, operator)
    (pod, *_) = kuberay.pods(seen)
    told: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        for _, text in kuberay.log_lines(pod, follow=True):
            told.put(text)
        told.put(None)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    # Several lines of one second, between which the connection is lost.
    for number in range(3):
        moment = f"2026-11-29T12:00:00.{number}00000000Z"
        api.print_line(pod.name, pod.container, f"line {number}", moment=moment)
        assert told.get(timeout=20) == f"line {number}"
        api.cut_connections()
    api.print_line(pod.name, pod.container, "line 3", moment="2026-11-29T12:00:01.5Z")
    api.end_log(pod.name, pod.container)
    assert told.get(timeout=20) == "line 3"
    assert told.get(timeout=20) is None


def test_lines_of_a_time_on_are_read(
    api: KubernetesApi, kuberay: KubeRay, operator: Operator
) -> None:
    seen = start(kuberay, operator)
    (pod, *_) = kuberay.pods(seen)
    api.print_line(pod.name, pod.container, "old", moment="2026-11-29T12:00:00.1Z")
    api.print_line(pod.name, pod.container, "new", moment="2026-11-29T12:00:05.1Z")
    found = list(kuberay.log_lines(pod, follow=False, since="2026-11-29T12:00:03Z"))
    assert found == [("2026-11-29T12:00:05.1Z", "new")]


def test_the_last_lines_of_a_container_and_of_the_one_before(
    api: KubernetesApi, kuberay: KubeRay, operator: Operator
) -> None:
    seen = start(kuberay, operator)
    pod = next(p for p in kuberay.pods(seen) if p.role == "head")
    for number in range(4):
        api.print_line(pod.name, pod.container, f"line {number}")
    assert kuberay.last_lines(pod, 2) == ["line 2", "line 3"]
    assert kuberay.last_lines(pod, 2, before_restart=True) == []
    before = Log(lines=[("2026-11-29T12:00:00Z", "Killed")], has_ended=True)
    api.previous_logs[pod.name, pod.container] = before
    assert kuberay.last_lines(pod, 2, before_restart=True) == ["Killed"]


def test_what_explains_a_run_is_read(
    api: KubernetesApi, kuberay: KubeRay, operator: Operator
) -> None:
    seen = start(kuberay, operator)
    cluster = kuberay.ray_cluster(seen)
    assert cluster is not None
    assert cluster["metadata"]["name"] == seen.ray_cluster
    abouts = {
        "job": ("RayJob", NAME, "FailedToCreateRayJobSubmitter", "Warning"),
        "pod": ("Pod", f"{seen.ray_cluster}-worker-gone", "FailedScheduling", "Warning"),
        "nodes": ("Pod", f"{seen.ray_cluster}-worker-1", "NotTriggerScaleUp", "Normal"),
        "submitter": ("Pod", f"{NAME}-abcde", "BackOff", "Warning"),
        "good": ("Pod", f"{seen.ray_cluster}-worker-1", "Scheduled", "Normal"),
        "another": ("Pod", f"{NAME}0-abcde", "BackOff", "Warning"),
        "before": ("RayJob", NAME, "InvalidRayJobSpec", "Warning"),
    }
    for name, (kind, about, reason, type_) in abouts.items():
        told = {"kind": kind, "name": about, "uid": "of before" if name == "before" else seen.uid}
        event = {"metadata": {"name": name}, "involvedObject": told, "type": type_}
        api.objects.create(EVENT, "default", {**event, "reason": reason})
    told = {event["metadata"]["name"] for event in kuberay.events(seen)}
    assert told == {"job", "pod", "nodes", "submitter"}
    assert kuberay.workload(seen) is None
    owner = {"apiVersion": "ray.io/v1", "kind": "RayJob", "name": NAME, "uid": seen.uid}
    api.objects.create(
        WORKLOAD,
        "default",
        {
            "apiVersion": "kueue.x-k8s.io/v1beta1",
            "kind": "Workload",
            "metadata": {"name": "w", "ownerReferences": [owner]},
        },
    )
    found = kuberay.workload(seen)
    assert found is not None
    assert found["metadata"]["name"] == "w"
    assert kuberay.missing == []


def test_a_cluster_without_kueue_has_no_workload(api: KubernetesApi, kuberay: KubeRay) -> None:
    seen = kuberay.apply(rayjob()).seen
    api.kinds.remove(WORKLOAD)
    assert kuberay.workload(seen) is None
    assert kuberay.missing == []


OPTIONAL = {
    ("list", "pods"): "what its pods print and do",
    ("get", "pods/log"): "what its pods print",
    ("list", "events"): "why its pods wait or fail",
    ("get", "rayclusters"): "which of its pods are ready",
    ("list", "workloads"): "why its queue does not admit it",
}


@pytest.mark.parametrize(("right", "lost"), OPTIONAL.items(), ids=lambda v: str(v[1])[:12])
def test_a_right_that_is_not_needed_is_named_once_with_what_is_lost(
    api: KubernetesApi,
    kuberay: KubeRay,
    operator: Operator,
    right: tuple[str, str],
    lost: str,
) -> None:
    seen = start(kuberay, operator)
    api.forbidden.add(right)
    for _ in range(2):
        for pod in kuberay.pods(seen):
            list(kuberay.log_lines(pod, follow=True)) if right[1] == "pods/log" else None
            kuberay.last_lines(pod, 3)
        kuberay.events(seen)
        kuberay.ray_cluster(seen)
        kuberay.workload(seen)
    (sentence,) = kuberay.missing
    verb, resource = right
    assert sentence.startswith(f"without the right to {verb} {resource} in the namespace default")
    assert sentence.endswith(lost)


# ------------------------------------------------------------------------------------------- tools


def start(kuberay: KubeRay, operator: Operator) -> SeenRayJob:
    """A RayJob whose driver runs."""
    kuberay.apply(rayjob())
    cluster = operator.make_cluster(NAME)
    operator.write(NAME, Status("Running", "RUNNING", cluster=cluster))
    seen = kuberay.get(NAME)
    assert seen is not None
    assert state_of(seen).state is State.RUNNING
    return seen


def wait_for_request(api: KubernetesApi, pattern: str, count: int) -> None:
    """Until so many requests of a watch have come."""
    tick = threading.Event()
    for _ in range(1000):
        if sum(a.query.get("watch") == "true" for a in list(api.requests)) >= count:
            return
        tick.wait(0.01)
    raise AssertionError(f"no {pattern}")


def _tree(api: KubernetesApi) -> dict[str, Any]:
    return api.objects.get(RAYJOB, "default", NAME)


def _cluster() -> dict[str, Any]:
    return {"kind": "kuberay", "image": "registry.example.com/shoal:0.1.0"}
