"""Runs on Kubernetes: what a run's RayJob adds to what its folder says, and what is done to it.

    with_rayjob(situation, seen)    both together, as one state. Pure
    RayJobOnlooker                  looks at a run's RayJob, once or at each change
    start_rayjob, replace_rayjob    for `shoal submit` and `shoal resume`
    stop_rayjob, remove_rayjob      for `shoal stop` and `shoal delete`

A run is its folder: whatever is asked of Kubernetes here may fail, and what the folder says holds.
"""

from __future__ import annotations

import shlex
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Literal

from cluster.kuberay import Applied, KubeRay
from cluster.kuberay_access import Tell
from cluster.rayjob import build_rayjob
from cluster.rayjob_status import SeenRayJob, state_of
from jobs.errors import EnvironmentFault, Problem, ShoalError, SpecError
from jobs.overview import Overview
from jobs.record import Past, State
from jobs.runs import RunReader
from jobs.situation import Situation
from jobs.spec import JobSpec, KubeRayCluster
from jobs.status import RunStatus

LOOK_SECONDS = 1.0
"""How long somebody who only looks waits for Kubernetes: the run's folder says most of it."""
_TOLD_BY_DRIVER = (State.RUNNING, State.STOPPING)


# ------------------------------------------------------------------------------------------ state


def with_rayjob(situation: Situation, seen: SeenRayJob | None, *, run: str) -> Situation:
    """The state of a run by its folder and its RayJob together. Pure.

    The driver writes the folder, and its word counts. The RayJob tells what is before the first
    driver, between two, and after one that could not write its end. `run` is as for
    `jobs.situation.derive_state`.
    """
    if seen is None:
        return situation
    told = state_of(seen)
    if situation.is_over:
        return _after_driver(situation, seen)
    if situation.generation == 0:
        return _before_driver(situation, seen, run=run)
    if told.is_over and seen.driver_has_ended and situation.state not in _TOLD_BY_DRIVER:
        # It has written no result, and its process is gone.
        state = State.FAILED_INFRA if told.state is State.SUCCEEDED else told.state
        return _ended(situation, state, told.cause, run=run)
    if told.is_over or seen.is_being_deleted:
        return replace(situation, cause=_joined(situation.cause, told.cause))
    return situation


def _before_driver(situation: Situation, seen: SeenRayJob, *, run: str) -> Situation:
    told = state_of(seen)
    if told.is_over:
        return _ended(situation, told.state, told.cause, run=run)
    if told.state.is_final or told.state is State.RUNNING:
        # The driver's process is there, or was, and has written nothing yet.
        return replace(situation, state=State.STARTING, cause=told.cause)
    return replace(situation, state=told.state, cause=told.cause)


def _after_driver(situation: Situation, seen: SeenRayJob) -> Situation:
    """Of a run that has ended, for all that its folder says: KubeRay may be starting it again."""
    told = state_of(seen)
    if told.is_over:
        if situation.state is State.FAILED_INFRA and situation.cause != told.cause:
            return replace(situation, cause=_joined(situation.cause, told.cause))
        return situation
    has_not_begun = told.state in (State.PENDING, State.STARTING)
    if has_not_begun and not seen.failed:  # it was resumed, or its queue took its room
        return replace(
            situation, state=told.state, cause=told.cause, hint=None, is_over=False, exit_code=0
        )
    is_retried = told.state is State.RECOVERING or seen.failed < seen.backoff_limit
    if situation.state.ends_retries or not is_retried or seen.is_being_deleted:
        return situation
    cause = told.cause if told.state is State.RECOVERING else "KubeRay is about to start it again"
    return replace(
        situation,
        state=State.RECOVERING,
        cause=_joined(situation.cause, cause),
        hint=None,
        is_over=False,
        exit_code=0,
    )


def _ended(situation: Situation, state: State, cause: str, *, run: str) -> Situation:
    again = f"shoal resume {run}"
    hint = {
        State.FAILED_SPEC: f"see what Kubernetes was given: shoal render {run}; change the job",
        State.SUCCEEDED: None,
        State.STOPPED: again,
    }.get(state, f"see what its pods printed: shoal logs {run} --pods; then: {again}")
    return replace(
        situation, state=state, cause=cause, hint=hint, is_over=True, exit_code=state.exit_code
    )


def _joined(own: str | None, told: str) -> str:
    return f"{own}; {told}" if own else told


# ------------------------------------------------------------------------------------------- looks


def refuse_context(reader: RunReader, context: str | None) -> None:
    """Raises SpecError where a context is named for a run that is on no Kubernetes cluster."""
    cluster = reader.spec().cluster
    if context is not None and not isinstance(cluster, KubeRayCluster):
        raise SpecError(
            Problem(
                f"{reader.uri} is a run with cluster.kind {cluster.kind}, so --context {context} "
                "has no effect",
                "remove --context",
            )
        )


class RayJobOnlooker:
    """Who looks at the RayJob of a run beside its folder, where the run is on Kubernetes.

    What goes wrong is told once, as a problem of the status, and the folder's word holds then.
    """

    def __init__(self, reader: RunReader, *, context: str | None, follows: bool = False) -> None:
        """`follows`: the RayJob is watched in a thread from the first look on."""
        self._reader = reader
        self._context = context
        self._follows = follows
        self._has_looked = False
        self._seen: SeenRayJob | None = None
        self._problem: str | None = None
        self.wake = threading.Event()
        """Set at each change of a RayJob that is followed."""

    def __call__(self, status: RunStatus) -> RunStatus:
        """The status with what the RayJob says, where that may add something."""
        cluster = self._cluster(status.situation)
        if cluster is None:
            return status
        if not self._has_looked:
            self._has_looked = True
            self._look(cluster)
        seen, problem = self._seen, self._problem
        return replace(
            status,
            situation=with_rayjob(status.situation, seen, run=self._reader.uri),
            rayjob=seen,
            problems=status.problems if problem is None else (*status.problems, problem),
        )

    def _cluster(self, situation: Situation) -> KubeRayCluster | None:
        if self._reader.study is not None or situation.state in _TOLD_BY_DRIVER:
            return None
        cluster = self._reader.spec().cluster
        return cluster if isinstance(cluster, KubeRayCluster) else None

    def _look(self, cluster: KubeRayCluster) -> None:
        reader = self._reader
        try:
            kuberay = KubeRay.of(
                cluster.namespace,
                context=self._context,
                patience_seconds=0.0,
                answer_seconds=LOOK_SECONDS,
            )
            self._seen = kuberay.find(reader.run_id, reader.uri)
        except ShoalError as error:
            self._note(error)
            return
        if self._follows:
            name = self._seen.name if self._seen else reader.run_id
            watch = partial(self._watch, name, cluster.namespace)
            threading.Thread(target=watch, name="shoal-rayjob", daemon=True).start()

    def _watch(self, name: str, namespace: str) -> None:
        try:
            kuberay = KubeRay.of(namespace, context=self._context, tell=_hush)
            for seen in kuberay.watch(name):
                if seen is None or seen.run_uri == self._reader.uri:
                    self._seen = seen
                    self.wake.set()
        except ShoalError as error:
            self._note(error)

    def _note(self, error: ShoalError) -> None:
        self._seen = None
        self._problem = (
            f"KubeRay could not be asked, so this is what the run's folder says: {error}"
        )


def with_rayjobs(overviews: Sequence[Overview], *, context: str | None) -> list[Overview]:
    """The list of runs with what Kubernetes says of those that wait for a driver, by one question
    for each namespace; what cannot be asked is left as it is, with the problem."""
    waiting = {o.namespace for o in overviews if o.namespace and o.state in _WAITING}
    found: dict[str, list[SeenRayJob]] = {}
    problems: dict[str, str] = {}
    for namespace in sorted(waiting):
        try:
            kuberay = KubeRay.of(
                namespace, context=context, patience_seconds=0.0, answer_seconds=LOOK_SECONDS
            )
            found[namespace] = kuberay.rayjobs()
        except ShoalError as error:
            problems[namespace] = f"KubeRay was not asked about {namespace}: {error}"
    return [_with_rayjob_of(o, found, problems) for o in overviews]


_WAITING = (State.PENDING, State.STARTING, State.RECOVERING)


def _with_rayjob_of(
    overview: Overview, found: dict[str, list[SeenRayJob]], problems: dict[str, str]
) -> Overview:
    if overview.state not in _WAITING or overview.namespace is None:
        return overview
    if overview.namespace in problems:
        return replace(overview, problems=(*overview.problems, problems[overview.namespace]))
    seen = next((j for j in found[overview.namespace] if j.run_uri == overview.uri), None)
    generation = 0 if overview.state is State.PENDING else 1
    situation = Situation(overview.state, overview.cause, None, generation, is_over=False)
    told = with_rayjob(situation, seen, run=overview.run_id)
    return replace(overview, state=told.state, cause=told.cause)


def _hush(sentence: str) -> None:
    """For waits that nobody is to hear of: the run's folder tells what counts."""


# ----------------------------------------------------------------------------------------- changes


def start_rayjob(
    spec: JobSpec, *, run_id: str, run_uri: str, past: Past, kuberay: KubeRay
) -> Applied:
    """The run's RayJob, made unless it is there."""
    return kuberay.apply(build_rayjob(spec, run_id=run_id, run_uri=run_uri, past=past))


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
    return start_rayjob(spec, run_id=reader.run_id, run_uri=reader.uri, past=past, kuberay=kuberay)


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
    if seen is not None and is_there and stops > past_controls(seen):
        return "delete"
    return "ask"


def past_controls(seen: SeenRayJob) -> int:
    """Number of the last request that was old when this RayJob was made, from its entrypoint."""
    words = shlex.split(seen.entrypoint)
    if "--past-controls" not in words[:-1]:
        return 0
    number = words[words.index("--past-controls") + 1]
    return int(number) if number.isdecimal() else 0


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
                kuberay = KubeRay.of(cluster.namespace, context=context, tell=tell)
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
