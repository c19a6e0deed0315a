"""Gathers what explains a run: its folder, and what Kubernetes tells whoever asks.

Whatever Kubernetes refuses is named, and what is left is explained; only where nothing is left is
that an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from cluster.kuberay import KubeRay, Pod
from cluster.local import driver_log
from cluster.rayjob_status import SeenRayJob
from jobs.errors import ShoalError
from jobs.rayjobs import with_rayjob
from jobs.record import State
from jobs.runs import RunReader
from jobs.spec import KubeRayCluster
from jobs.status import RunStatus, read_status
from jobs.why.evidence import ClusterEvidence, Evidence, Printed

ANSWER_SECONDS = 5.0
_LINES = 40
_PODS_READ = 6
"""Of how many pods the last lines are read: head, submitter, and workers that are not well."""

T = TypeVar("T")


def gather(reader: RunReader, *, context: str | None) -> Evidence:
    """All that is known of a run, at this moment.

    Raises SpecError if there is no such run, and the error of the cluster where the run's folder
    says nothing yet and Kubernetes cannot be asked.
    """
    spec = reader.spec()
    status = read_status(reader)
    study_uri = reader.study.uri if reader.study is not None else None
    evidence = Evidence(spec, status, study_uri=study_uri)
    if isinstance(spec.cluster, KubeRayCluster) and reader.study is None:
        evidence = _with_kubernetes(evidence, spec.cluster, reader, context)
    return replace(evidence, lines=_lines(reader, evidence.status))


# ------------------------------------------------------------------------------------ Kubernetes


def _with_kubernetes(
    evidence: Evidence, cluster: KubeRayCluster, reader: RunReader, context: str | None
) -> Evidence:
    status = evidence.status
    if status.situation.state in (State.SUCCEEDED, State.STOPPED):
        return evidence
    try:
        kuberay = KubeRay.of(
            cluster.namespace,
            context=context,
            patience_seconds=0.0,
            answer_seconds=ANSWER_SECONDS,
        )
        seen = kuberay.find(reader.run_id, reader.uri)
    except ShoalError as error:
        if status.situation.generation == 0 and not status.situation.is_over:
            raise
        problem = f"Kubernetes could not be asked, so this is what the run's folder says: {error}"
        return replace(evidence, status=replace(status, problems=(*status.problems, problem)))
    if seen is None:
        return replace(evidence, cluster=ClusterEvidence(has_no_rayjob=True))
    status = replace(
        status, situation=with_rayjob(status.situation, seen, run=reader.uri), rayjob=seen
    )
    asked = _Asked()
    found = _ask(kuberay, seen, status, asked)
    status = replace(status, problems=(*status.problems, *asked.problems))
    return replace(evidence, status=status, cluster=found)


class _Asked:
    """Questions, some of which may fail: what failed is told."""

    def __init__(self) -> None:
        self.problems: list[str] = []

    def __call__(self, question: Callable[[], T], otherwise: T) -> T:
        try:
            return question()
        except ShoalError as error:
            if str(error) not in self.problems:
                self.problems.append(str(error))
            return otherwise


def _ask(kuberay: KubeRay, seen: SeenRayJob, status: RunStatus, asked: _Asked) -> ClusterEvidence:
    none: list[dict[str, Any]] = []
    pods = asked(lambda: kuberay.pods(seen), list[Pod]())
    events = asked(lambda: kuberay.events(seen), none)
    ray_cluster = asked(lambda: kuberay.ray_cluster(seen), None)
    workload = asked(lambda: kuberay.workload(seen), None) if seen.queue is not None else None
    printed = list(_printed(kuberay, pods, status, asked))
    return ClusterEvidence(
        ray_cluster=ray_cluster,
        workload=workload,
        pods=tuple(pod.tree for pod in pods),
        events=tuple(events),
        printed=tuple(printed),
        missing=tuple(kuberay.missing),
    )


def _printed(
    kuberay: KubeRay, pods: list[Pod], status: RunStatus, asked: _Asked
) -> Iterator[Printed]:
    """The last lines of pods that have ended or were started again; of all, where the run has."""
    is_over = status.situation.is_over
    telling = [pod for pod in pods if pod.has_started and (is_over or _has_ended(pod))]
    telling.sort(key=lambda pod: not _has_ended(pod))
    for pod in telling[:_PODS_READ]:
        question = partial(kuberay.last_lines, pod, _LINES, before_restart=_restarts(pod) > 0)
        lines = asked(question, list[str]())
        if lines:
            yield Printed(pod.name, tuple(lines))


def _containers(pod: Pod) -> list[dict[str, Any]]:
    statuses = (pod.tree.get("status") or {}).get("containerStatuses") or ()
    return [c for c in statuses if c.get("name") == pod.container]


def _restarts(pod: Pod) -> int:
    return sum(int(c.get("restartCount") or 0) for c in _containers(pod))


def _has_ended(pod: Pod) -> bool:
    return _restarts(pod) > 0 or any(
        "terminated" in (c.get("state") or {}) for c in _containers(pod)
    )


# ------------------------------------------------------------------------------------- the folder


def _lines(reader: RunReader, status: RunStatus) -> tuple[str, ...]:
    """The last lines of the run's log; before its driver could write there, what it printed on this
    machine."""
    situation = status.situation
    has_failed = situation.is_over and situation.exit_code not in (0, 130)
    if situation.generation and reader.study is None and has_failed:
        told = [_line(line) for line in reader.newest_lines("logs")]
        return tuple(text for text in told if text)[-_LINES:]
    if situation.generation == 0 and not isinstance(reader.spec().cluster, KubeRayCluster):
        return _of_this_machine(driver_log(reader.uri))
    return ()


def _line(line: dict[str, Any]) -> str:
    rank = line.get("rank")
    writer = "driver" if rank is None else f"rank {rank}"
    trace = str(line.get("traceback") or "").strip().splitlines()[-1:]
    return " ".join((f"{writer}:", str(line.get("message", "")), *trace)).rstrip()


def _of_this_machine(path: Path) -> tuple[str, ...]:
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ()  # The driver was started on another machine, or has printed nothing.
    return tuple(text.splitlines()[-_LINES:])
