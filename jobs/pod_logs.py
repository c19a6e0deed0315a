"""What the pods of a run on Kubernetes print, merged as it comes.

    pod_lines(reader)  ->  lines of the submitter, the head and the workers

Pods come one after the other, and new ones after a retry: while the run is followed, those that
are new are read too, each by a thread of its own.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from cluster.kuberay import KubeRay, Pod
from cluster.kuberay_access import Tell
from cluster.rayjob_status import state_of
from jobs.errors import Problem, ShoalError, SpecError
from jobs.runs import RunReader
from jobs.spec import KubeRayCluster

_LOOK_SECONDS = 2.0
"""Between two looks for new pods."""


@dataclass(frozen=True)
class PodLine:
    """One line that a container printed."""

    time: str
    """RFC 3339, as its node has it."""
    pod: str
    role: str
    """`submitter`, `head` or `worker`."""
    message: str

    @property
    def text(self) -> str:
        return f"{self.time[:19]} {self.pod}  {self.message}"

    def to_json(self) -> dict[str, Any]:
        return {"time": self.time, "pod": self.pod, "role": self.role, "message": self.message}


def pod_lines(
    reader: RunReader, *, follow: bool, since: float | None, context: str | None, tell: Tell
) -> Iterator[PodLine]:
    """Lines of all pods of the run: those that are there by time, or with `follow` as they come,
    until KubeRay is done with the run and its pods have ended.

    `since` is in Unix seconds. `tell` hears of rights that are missing. Raises SpecError where the
    run is not on Kubernetes, KubernetesError where it cannot be asked.
    """
    cluster = reader.spec().cluster
    if not isinstance(cluster, KubeRayCluster):
        raise SpecError(
            Problem(
                f"{reader.uri} is a run with cluster.kind {cluster.kind}, which has no pods",
                "remove --pods",
            )
        )
    kuberay = KubeRay.of(cluster.namespace, context=context, tell=tell)
    begin = None if since is None else f"{datetime.fromtimestamp(since, UTC):%Y-%m-%dT%H:%M:%SZ}"
    try:
        if follow:
            yield from _Followed(kuberay, reader, since=begin).lines()
        else:
            yield from _present(kuberay, reader, since=begin)
    finally:
        for sentence in kuberay.missing:
            tell(sentence)


def _present(kuberay: KubeRay, reader: RunReader, *, since: str | None) -> list[PodLine]:
    seen = kuberay.find(reader.run_id, reader.uri)
    if seen is None:
        return []
    lines = [
        PodLine(moment, pod.name, pod.role, text)
        for pod in kuberay.pods(seen)
        if pod.has_started
        for moment, text in kuberay.log_lines(pod, follow=False, since=since)
    ]
    return sorted(lines, key=lambda line: line.time)


class _Followed:
    """Reads the logs of all pods that a run has, and gets, at the same time."""

    def __init__(self, kuberay: KubeRay, reader: RunReader, *, since: str | None) -> None:
        self._kuberay = kuberay
        self._reader = reader
        self._since = since
        self._lines: queue.SimpleQueue[PodLine | ShoalError | None] = queue.SimpleQueue()
        """None: nothing more is to be expected."""
        self._threads: dict[str, threading.Thread] = {}
        self._ends = threading.Event()

    def lines(self) -> Iterator[PodLine]:
        threading.Thread(target=self._look, name="shoal-pods", daemon=True).start()
        try:
            while (line := self._lines.get()) is not None:
                if isinstance(line, ShoalError):
                    raise line
                yield line
        finally:
            self._ends.set()

    def _look(self) -> None:
        """Finds new pods until no more will come, and waits for the logs of the last."""
        try:
            while not self._ends.is_set():
                # Before the pods: none comes after the operator is done with the run.
                seen = self._kuberay.find(self._reader.run_id, self._reader.uri)
                for pod in self._kuberay.pods(seen) if seen is not None else ():
                    if pod.has_started and pod.name not in self._threads:
                        self._read(pod)
                if seen is None or state_of(seen).is_over or self._kuberay.missing:
                    break
                self._ends.wait(_LOOK_SECONDS)
            for thread in self._threads.values():
                thread.join()
        except ShoalError as error:
            self._lines.put(error)
        self._lines.put(None)

    def _read(self, pod: Pod) -> None:
        def read() -> None:
            try:
                for moment, text in self._kuberay.log_lines(pod, follow=True, since=self._since):
                    self._lines.put(PodLine(moment, pod.name, pod.role, text))
            except ShoalError as error:
                self._lines.put(error)

        thread = threading.Thread(target=read, name=f"shoal-log-{pod.name}", daemon=True)
        self._threads[pod.name] = thread
        thread.start()
