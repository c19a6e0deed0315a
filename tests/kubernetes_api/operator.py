"""KubeRay's operator, as `rayjob_controller.go` of 1.4 to 1.7 has it for submission by a Job.

successors(status)      every status that may come next. Pure
Operator                plays a part: writes statuses, pods and logs into a cluster
LocalRuns               an Operator that starts each RayJob's entrypoint on this machine
"""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import threading
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from cluster.rayjob import driver_environment
from tests.kubernetes_api.objects import Refusal, Tree, now
from tests.kubernetes_api.schemas import POD, RAYCLUSTER, RAYJOB
from tests.kubernetes_api.server import KubernetesApi

FINALIZER = "ray.io/rayjob-finalizer"
CONTAINERS = {"submitter": "ray-job-submitter", "head": "ray-head", "worker": "ray-worker"}
ENDED = ("SUCCEEDED", "FAILED", "STOPPED")


@dataclass(frozen=True)
class Status:
    """What of a RayJob's status the operator's decisions rest upon."""

    deployment: str = ""
    job: str = ""
    reason: str = ""
    message: str = ""
    failed: int = 0
    cluster: str = ""

    def as_tree(self) -> Tree:
        found = {
            "jobDeploymentStatus": self.deployment,
            "jobStatus": self.job,
            "reason": self.reason,
            "message": self.message,
            "rayClusterName": self.cluster,
        }
        return {key: value for key, value in found.items() if value} | {"failed": self.failed}


def successors(now_: Status, *, backoff_limit: int, suspends: bool) -> Iterator[Status]:
    """Every status that one reconciliation may write next; none after which nothing comes.

    `suspends`: whether somebody, such as Kueue, sets and takes back `spec.suspend`.
    """
    match now_.deployment:
        case "":
            yield replace(now_, deployment="Initializing", cluster="c")
            if now_.failed == 0:
                yield replace(
                    now_, deployment="ValidationFailed", reason="ValidationFailed", message="why"
                )
        case "Initializing":
            yield replace(now_, deployment="Running")
            for reason in ("DeadlineExceeded", "PreRunningDeadlineExceeded"):
                yield from _failing(now_, reason, backoff_limit)
            if suspends:
                yield replace(now_, deployment="Suspending")
        case "Running":
            if suspends:
                yield replace(now_, deployment="Suspending")
            yield from _failing(now_, "DeadlineExceeded", backoff_limit)
            # The submitter's Job has failed: whether the driver did, Ray's last word says.
            reason = "AppFailed" if now_.job == "FAILED" else "SubmissionFailed"
            yield from _failing(now_, reason, backoff_limit)
            # It has ended, and Ray does not know the driver, or never tells its end.
            yield from _failing(now_, "AppFailed", backoff_limit)
            late = "JobDeploymentStatusTransitionGracePeriodExceeded"
            yield from _failing(replace(now_, job="FAILED"), late, backoff_limit)
            if now_.job in ENDED and now_.job != "FAILED":
                yield replace(now_, deployment="Complete", reason=late)
            for job in _LATER[now_.job]:
                # Ray's word is written first; the end follows once the submitter has ended too.
                told = replace(now_, job=job, message="why" if job == "FAILED" else "")
                yield told
                if job == "FAILED":
                    yield from _failing(told, "AppFailed", backoff_limit)
                elif job in ENDED:
                    yield replace(told, deployment="Complete")
        case "Retrying":
            yield Status(failed=now_.failed)
        case "Suspending":
            yield Status(deployment="Suspended", failed=now_.failed)
        case "Suspended":
            yield Status(failed=now_.failed)


_LATER = {
    "": ("PENDING", "RUNNING", *ENDED),
    "PENDING": ("RUNNING", *ENDED),
    "RUNNING": ENDED,
    "SUCCEEDED": ("SUCCEEDED",),
    "STOPPED": ("STOPPED",),
    "FAILED": ("FAILED",),
}


def _failing(now_: Status, reason: str, backoff_limit: int) -> Iterator[Status]:
    """Failed, or Retrying where the limit has room; a deadline of the whole is never retried."""
    failed = replace(
        now_, deployment="Failed", reason=reason, message="why", failed=now_.failed + 1
    )
    if failed.failed <= backoff_limit and reason != "DeadlineExceeded":
        yield replace(failed, deployment="Retrying")
    else:
        yield failed


def steps_of(*, backoff_limit: int, suspends: bool) -> Iterator[tuple[Status, Status]]:
    """Every step that can be taken, from a new RayJob on."""
    waiting, known = [Status()], {Status()}
    while waiting:
        now_ = waiting.pop(0)
        for after in successors(now_, backoff_limit=backoff_limit, suspends=suspends):
            yield now_, after
            if after not in known:
                known.add(after)
                waiting.append(after)


def walks(*, backoff_limit: int, suspends: bool) -> Iterator[list[Status]]:
    """Walks from a new RayJob to its end, which take each step at least once."""
    steps = [s for s in steps_of(backoff_limit=backoff_limit, suspends=suspends) if s[0] != s[1]]
    came_from = {after: now_ for now_, after in reversed(steps)}
    came_from.pop(Status(), None)
    on = dict[Status, Status]()  # the next on the shortest way to an end
    ends = {after for _, after in steps} - {now_ for now_, _ in steps}
    while len(on) < len({now_ for now_, _ in steps}):
        for now_, after in steps:
            if now_ not in on and (after in ends or after in on):
                on[now_] = after
    left = set(steps)
    for step in reversed(steps):
        if step not in left:
            continue
        before = [step[0]]
        while before[0] in came_from:
            before.insert(0, came_from[before[0]])
        walk = [*before, step[1]]
        while walk[-1] in on:
            walk.append(on[walk[-1]])
        left -= set(itertools.pairwise(walk))
        yield walk[1:]


class Operator:
    """Writes what KubeRay writes, when it is told to."""

    def __init__(self, api: KubernetesApi, *, namespace: str = "default") -> None:
        self.api = api
        self.namespace = namespace

    def write(self, name: str, status: Status | Mapping[str, Any]) -> None:
        tree = status.as_tree() if isinstance(status, Status) else dict(status)
        self.api.objects.set_status(RAYJOB, self.namespace, name, tree)

    def hold(self, name: str) -> None:
        """The finalizer with which it keeps a RayJob until the driver is stopped."""
        self.api.objects.set_finalizers(RAYJOB, self.namespace, name, [FINALIZER])

    def release(self, name: str) -> None:
        tree = self.api.objects.get(RAYJOB, self.namespace, name)
        left = [f for f in tree["metadata"].get("finalizers", ()) if f != FINALIZER]
        self.api.objects.set_finalizers(RAYJOB, self.namespace, name, left)

    def make_cluster(self, name: str) -> str:
        """The Ray cluster of a RayJob with its pods, and the submitter's pod; its name."""
        rayjob = self.api.objects.get(RAYJOB, self.namespace, name)
        cluster = f"{name}-{uuid.uuid4().hex[:5]}"
        made = self.api.objects.create(
            RAYCLUSTER,
            self.namespace,
            {
                "apiVersion": "ray.io/v1",
                "kind": "RayCluster",
                "metadata": {"name": cluster, "ownerReferences": [_owner(rayjob)]},
                "spec": rayjob["spec"]["rayClusterSpec"],
            },
        )
        self.make_pod(f"{name}-abcde", "submitter", rayjob, {"job-name": name})
        (group, *_) = rayjob["spec"]["rayClusterSpec"]["workerGroupSpecs"]
        for number in range(int(group["replicas"]) + 1):
            role = "worker" if number else "head"
            labels = {"ray.io/cluster": cluster, "ray.io/node-type": role}
            self.make_pod(f"{cluster}-{role}-{number}", role, made, labels)
        return cluster

    def make_pod(
        self,
        name: str,
        role: str,
        owner: Tree,
        labels: dict[str, str],
        *,
        state: str = "running",
    ) -> Tree:
        container = CONTAINERS[role]
        return self.api.objects.create(
            POD,
            self.namespace,
            {
                "apiVersion": "v1",
                "kind": "Pod",
                "metadata": {"name": name, "labels": labels, "ownerReferences": [_owner(owner)]},
                "spec": {"containers": [{"name": container}]},
                "status": {
                    "phase": "Running" if state == "running" else "Pending",
                    "containerStatuses": [{"name": container, "state": {state: {}}}],
                },
            },
        )


def _owner(tree: Tree) -> Tree:
    return {
        "apiVersion": tree["apiVersion"],
        "kind": tree["kind"],
        "name": tree["metadata"]["name"],
        "uid": tree["metadata"]["uid"],
        "controller": True,
        "blockOwnerDeletion": True,
    }


class LocalRuns(Operator):
    """Takes up each RayJob, and starts its entrypoint as a process of this machine, in a shell as
    the submitter does; what it prints is the log of submitter and head."""

    def __init__(self, api: KubernetesApi, *, environment: Mapping[str, str]) -> None:
        super().__init__(api)
        self.environment = dict(environment)
        self.started: list[str] = []
        """Names of the RayJobs, once for each start."""
        self._ends = threading.Event()
        self._threads: dict[str, threading.Thread] = {}

    @contextmanager
    def at_work(self) -> Iterator[None]:
        thread = threading.Thread(target=self._look, daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._ends.set()
            with self.api.objects.changed:
                self.api.objects.changed.notify_all()
            for each in (thread, *self._threads.values()):
                each.join(timeout=120)
                assert not each.is_alive()

    def _look(self) -> None:
        """Starts a thread for each RayJob that is new."""
        while not self._ends.is_set():
            for tree in self.api.objects.list(RAYJOB, self.namespace):
                uid = tree["metadata"]["uid"]
                if uid not in self._threads:
                    self._threads[uid] = threading.Thread(
                        target=self._run, args=(tree,), daemon=True
                    )
                    self._threads[uid].start()
            with self.api.objects.changed:
                self.api.objects.changed.wait(0.2)

    def _run(self, rayjob: Tree) -> None:
        """One RayJob from its first look to its end, retries included."""
        name, limit = rayjob["metadata"]["name"], int(rayjob["spec"]["backoffLimit"])
        self.hold(name)
        status = Status()
        while True:
            cluster = self.make_cluster(name)
            status = replace(status, deployment="Initializing", job="", cluster=cluster)
            self.write(name, status)
            status = replace(status, deployment="Running")
            self.write(name, status)
            status = replace(status, job="RUNNING", reason="", message="")
            self.write(name, status)
            code = self._execute(name, cluster, rayjob)
            if self._is_to_go(name):
                break
            failed = f"Job entrypoint command failed with exit code {code}, last available logs:"
            status = replace(
                status,
                job="FAILED" if code else "SUCCEEDED",
                message=failed if code else "Job finished successfully.",
            )
            self.write(name, status)  # beside Running, as the submitter has not ended yet
            limit = int(self.api.objects.get(RAYJOB, self.namespace, name)["spec"]["backoffLimit"])
            if code == 0:
                self.write(name, replace(status, deployment="Complete"))
                break
            status = next(_failing(status, "AppFailed", limit))
            self.write(name, status)
            if status.deployment == "Failed":
                break
            status = Status(failed=status.failed)
        while not self._is_to_go(name):
            if self._ends.wait(0.1):
                return
        self.release(name)

    def _execute(self, name: str, cluster: str, rayjob: dict[str, Any]) -> int:
        """Exit code of the driver; it gets SIGTERM once the RayJob is to be deleted."""
        self.started.append(name)
        of_pod = {key: v for key, v in driver_environment(rayjob).items() if key != "HOME"}
        printers = [(f"{name}-abcde", "submitter"), (f"{cluster}-head-0", "head")]
        with subprocess.Popen(
            rayjob["spec"]["entrypoint"],
            shell=True,
            env={**os.environ, **of_pod, **self.environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        ) as process:
            assert process.stdout is not None
            ender = threading.Thread(target=self._end_if_deleted, args=(name, process))
            ender.start()
            for line in process.stdout:
                for pod, role in printers:
                    self.api.print_line(pod, CONTAINERS[role], line.rstrip("\n"), moment=now())
            code = process.wait()
            ender.join()
        for pod, role in printers:
            self.api.end_log(pod, CONTAINERS[role])
        return code

    def _end_if_deleted(self, name: str, process: subprocess.Popen[str]) -> None:
        while process.poll() is None:
            if self._is_to_go(name) or self._ends.is_set():
                os.killpg(process.pid, signal.SIGTERM)
                return
            with self.api.objects.changed:
                self.api.objects.changed.wait(0.2)

    def _is_to_go(self, name: str) -> bool:
        try:
            found = self.api.objects.get(RAYJOB, self.namespace, name)
        except Refusal:
            return True
        return "deletionTimestamp" in found["metadata"]
