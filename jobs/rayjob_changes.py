"""What is done to the RayJob of a run: it is made, replaced, and goes with the run.

    start_rayjob, require_replaceable, replace_rayjob    for `shoal submit` and `shoal resume`
    Stopper                                              for `shoal stop`
    remove_rayjob                                        for `shoal delete`

Whatever can be done through the run's folder alone is done there, and waits for no cluster.
"""

from __future__ import annotations

import getpass
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from cluster.disruption import disruption_budgets
from cluster.kuberay import Applied, KubeRay
from cluster.kuberay_access import Tell
from cluster.rayjob import build_rayjob
from cluster.rayjob_status import SeenRayJob, state_of
from jobs.errors import EnvironmentFault, Problem, SpecError
from jobs.record import NOTHING_PAST, Past, State
from jobs.runs import RunReader
from jobs.situation import Situation
from jobs.spec import JobSpec, KubeRayCluster

_STOP_PATIENCE_SECONDS = 5.0
"""A request to stop waits for the cluster no longer before it goes into the run's folder."""


def start_rayjob(spec: JobSpec, *, reader: RunReader, past: Past, kuberay: KubeRay) -> Applied:
    """The run's RayJob, made unless it is there, and the budgets of its pods, where they may be."""
    saved = [] if past == NOTHING_PAST else reader.manifests()
    rayjob = build_rayjob(
        spec,
        run_id=reader.run_id,
        run_uri=reader.uri,
        past=past,
        checkpoint_bytes=max((m.total_bytes for m in saved), default=None),
        user=_user(),
    )
    applied = kuberay.apply(rayjob)
    if applied.is_new:
        for budget in disruption_budgets(rayjob):
            kuberay.apply_budget(budget, owner=applied.seen)
    return applied


def _user() -> str | None:
    """Who submits; None where this machine does not know."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a number without a name, as in containers
        return None


def require_replaceable(reader: RunReader, kuberay: KubeRay) -> SeenRayJob | None:
    """The RayJob that a resume is to replace, if there is one.

    Raises SpecError where KubeRay works on it, so that the run would have two.
    """
    seen = kuberay.find(reader.run_id, reader.uri)
    if seen is None:
        return None
    told, result = state_of(seen), reader.result()
    is_new = told.state in (State.PENDING, State.STARTING) and not seen.failed
    # A driver that has ended the run for good would end at once if KubeRay started it again.
    is_done = result is not None and result.state.ends_retries and not is_new
    if not (told.is_over or seen.is_being_deleted or is_done):
        raise SpecError(
            Problem(
                f"{reader.uri} cannot be resumed, as KubeRay has it in hand: {told.cause}",
                f"follow it: shoal watch {reader.uri}; or end it first: shoal stop {reader.uri}",
            )
        )
    return seen


def replace_rayjob(
    spec: JobSpec, *, reader: RunReader, past: Past, kuberay: KubeRay, old: SeenRayJob | None
) -> Applied:
    """The run's new RayJob; the old one and its pods are gone before it is made."""
    if old is not None:
        kuberay.delete(old)
        kuberay.wait_until_gone(old)
    return start_rayjob(spec, reader=reader, past=past, kuberay=kuberay)


def stop_step(
    situation: Situation, seen: SeenRayJob | None, *, stops: int
) -> Literal["ask", "delete", "over"]:
    """What a request to stop comes to, by the run's folder (`situation`) and its RayJob. Pure.

    A driver is asked to save and end. Where there is none, nothing is to be saved, and where it was
    asked before (`stops` is the number of the last request), one does not wait for it any longer.
    """
    is_there = seen is not None and not state_of(seen).is_over and not seen.is_being_deleted
    if situation.is_over or situation.generation == 0:
        if is_there:
            return "delete"
        return "over" if situation.is_over else "ask"
    if seen is not None and is_there and stops > seen.past.controls:
        return "delete"
    return "ask"


class Stopper:
    """Ends a run on Kubernetes together with its RayJob; of other runs it does nothing.

    A cluster that cannot be reached keeps no request from the run's folder: `tell` hears of it.
    """

    def __init__(self, reader: RunReader, *, context: str | None, tell: Tell) -> None:
        self._reader = reader
        self._tell = tell
        self._kuberay: KubeRay | None = None
        self._seen: SeenRayJob | None = None
        cluster = reader.spec().cluster
        if isinstance(cluster, KubeRayCluster):
            with self._told("whether KubeRay has it in hand is not known"):
                kuberay = KubeRay.of(
                    cluster.namespace,
                    context=context,
                    patience_seconds=_STOP_PATIENCE_SECONDS,
                    tell=tell,
                )
                self._seen = kuberay.find(reader.run_id, reader.uri)
                self._kuberay = kuberay

    @property
    def has_rayjob(self) -> bool:
        return self._seen is not None

    def step(self, situation: Situation) -> Literal["ask", "delete", "over"]:
        return stop_step(situation, self._seen, stops=self._reader.last_stop())

    def end_retries(self) -> None:
        """Keeps KubeRay from starting the run again after it has ended."""
        if self._kuberay is not None and self._seen is not None:
            with self._told("KubeRay may start the run again, which then ends within seconds"):
                self._kuberay.end_retries(self._seen.name)

    def delete(self) -> None:
        """The RayJob goes; without one, nothing. Raises KubernetesError where that fails."""
        if self._kuberay is not None and self._seen is not None:
            self._kuberay.delete(self._seen)

    def tidy(self) -> None:
        """As `delete`, of a run that has ended, so that a failure costs nothing."""
        with self._told("its RayJob is left, until a resume or a delete"):
            self.delete()

    @contextmanager
    def _told(self, otherwise: str) -> Iterator[None]:
        try:
            yield
        except EnvironmentFault as error:
            self._tell(f"{error}; {otherwise}")


def remove_rayjob(reader: RunReader, *, context: str | None, tell: Tell) -> None:
    """Deletes the RayJob of a run, if there is one, and waits until it is gone; where Kubernetes
    does not let that be done, `tell` hears what to type."""
    try:
        cluster = reader.spec().cluster
    except SpecError:  # Its job cannot be told any more, so neither where it was.
        return
    if not isinstance(cluster, KubeRayCluster):
        return
    try:
        kuberay = KubeRay.of(cluster.namespace, context=context, tell=tell)
        seen = kuberay.find(reader.run_id, reader.uri)
        if seen is not None:
            kuberay.delete(seen)
            kuberay.wait_until_gone(seen)
    except EnvironmentFault as error:
        tell(
            f"the RayJob of {reader.uri} may be left: {error}; remove it with: kubectl delete "
            f"rayjobs.ray.io {reader.run_id} --namespace {cluster.namespace} --ignore-not-found"
        )
