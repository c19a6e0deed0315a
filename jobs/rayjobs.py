"""Runs on Kubernetes: what a run's RayJob adds to what its folder says.

    with_rayjob(situation, seen)    both together, as one state. Pure
    RayJobOnlooker                  looks at a run's RayJob, once or at each change
    with_rayjobs(overviews)         the same for a list of runs

A run is its folder: whatever is asked of Kubernetes here may fail, and what the folder says holds.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from cluster.kuberay import KubeRay
from cluster.rayjob_status import SeenRayJob, state_of
from jobs.errors import Problem, ShoalError, SpecError
from jobs.overview import Overview
from jobs.record import State
from jobs.runs import RunReader
from jobs.situation import Situation
from jobs.spec import KubeRayCluster
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
    cause = told.cause
    if told.state is not State.RECOVERING:
        cause = "KubeRay has not acted on its end yet, and starts it again"
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
