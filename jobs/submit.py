"""From a job to a run that has started: run id, spec.json, then a driver. Also resume, extend and
stop.

Where `cluster.kind` is kuberay the run is recorded, and its RayJob is made; or, without access to
Kubernetes, the command of `SubmittedRun.start_command` makes it.
"""

from __future__ import annotations

import importlib.util
import re
import secrets
import shlex
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from cluster.kuberay import KubeRay
from cluster.kuberay_errors import KubernetesError
from cluster.local import start_driver
from cluster.rayjob import Manifest, build_rayjob
from cluster.rayjob_status import SeenRayJob
from cluster.storage import ObjectExists, Store, is_s3, join_uri, open_store, write_numbered
from jobs.errors import EnvironmentFault, Problem, SpecError
from jobs.parse import (
    apply_overrides,
    check_resume_overrides,
    check_run_id,
    parse_spec,
    with_absolute_paths,
)
from jobs.rayjob_changes import replace_rayjob, require_replaceable, start_rayjob
from jobs.record import NOTHING_PAST, Amendment, Control, Lease, Past, RunPaths, State
from jobs.runs import RunReader, driver_has_ended
from jobs.situation import LOST_AFTER_TTLS, read_situation
from jobs.spec import RUN_ID_SUFFIX_CHARACTERS, JobSpec, KubeRayCluster
from jobs.study.extension import checked_space, is_waiting, request_extension, used_up_of
from jobs.study.log import read_events
from jobs.study.trials import Trials
from trainers.controls import last_request

OpenKubeRay = Callable[[str], KubeRay]
"""The RayJobs of a namespace; raises where it is not known how the cluster is reached."""
_ALPHABET = "abcdefghijkmnpqrstuvwxyz23456789"
"""Characters of a run id's suffix: none that looks like another."""
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


@dataclass(frozen=True)
class SubmittedRun:
    """A run that is recorded, and whose driver has been started, here or by Kubernetes, or is left
    to the user."""

    run_id: str
    uri: str
    process: subprocess.Popen[bytes] | None
    """The driver, where this process attends it; None in the background."""
    kubectl: Literal["apply", "replace --force"] | None = None
    """What kubectl is to do with the rendered run, where that is left to the user. `replace` makes
    what it does not find."""
    rayjob: SeenRayJob | None = None
    """The RayJob of a run on Kubernetes, unless that is left to the user."""

    def start_command(self, *, store: str | None) -> str | None:
        """What starts the driver, where that is left to the user; `store` as for `--store`."""
        if self.kubectl is None:
            return None
        option = f" --store {shlex.quote(store)}" if store is not None else ""
        return f"shoal render {shlex.quote(self.uri)}{option} | kubectl {self.kubectl} -f -"


def submit_job(
    spec: JobSpec,
    *,
    run_id: str | None = None,
    foreground: bool,
    open_kuberay: OpenKubeRay | None = None,
) -> SubmittedRun:
    """Records the job as a new run and starts its driver.

    On Kubernetes its RayJob is made, by `open_kuberay`; without that it is left to the user. There,
    the same job under the same run id may be submitted again, as after a connection that broke:
    there is one run, and one RayJob. Raises SpecError where the run id is not allowed or taken, or
    pods could not reach what the job names.
    """
    require_place(spec, foreground=foreground)
    spec = with_absolute_paths(spec)
    run_id = check_run_id(run_id) if run_id is not None else new_run_id(spec.name)
    on_kubernetes = isinstance(spec.cluster, KubeRayCluster)
    kuberay = _opened(spec, open_kuberay)
    store = open_store(spec.store.uri, spec.store.access)
    if store.head(RunPaths(run_id).deleting) is not None:
        uri = join_uri(store.uri, run_id)
        raise SpecError(
            Problem(
                f"the run {uri} is being deleted",
                f"choose another --run-id, or finish that first: shoal delete {uri} --yes",
            )
        )
    try:
        store.write_if_absent(RunPaths(run_id).spec, spec.to_bytes())
    except ObjectExists as error:
        uri = join_uri(store.uri, run_id)
        if not on_kubernetes or not _is_same(RunReader(store, run_id), spec):
            raise SpecError(
                Problem(
                    f"the run {uri} exists",
                    f"choose another --run-id, or go on with it: shoal resume {uri}",
                )
            ) from error
    if on_kubernetes:
        return _submit_rayjob(RunReader(store, run_id), spec, kuberay)
    return _start(store, spec, run_id, past=NOTHING_PAST, foreground=foreground)


def _opened(spec: JobSpec, open_kuberay: OpenKubeRay | None) -> KubeRay | None:
    """The cluster, before anything is recorded; None where it is left to the user."""
    if not isinstance(spec.cluster, KubeRayCluster) or open_kuberay is None:
        return None
    return open_kuberay(spec.cluster.namespace)


def _is_same(reader: RunReader, spec: JobSpec) -> bool:
    """Whether the run is of that very job, and has not ended yet."""
    return reader.result() is None and reader.spec() == spec


def _submit_rayjob(reader: RunReader, spec: JobSpec, kuberay: KubeRay | None) -> SubmittedRun:
    """Of a run that is recorded, and may have been submitted before."""
    if kuberay is None:
        return SubmittedRun(reader.run_id, reader.uri, None, kubectl="apply")
    with _recorded(f"shoal submit JOB.yaml --run-id {reader.run_id}"):
        applied = start_rayjob(spec, reader=reader, past=NOTHING_PAST, kuberay=kuberay)
    return SubmittedRun(reader.run_id, reader.uri, None, rayjob=applied.seen)


@contextmanager
def _recorded(again: str) -> Iterator[None]:
    """Says of what Kubernetes refuses that the run is recorded, and how it is started then."""
    try:
        yield
    except KubernetesError as error:
        hint = f"once that is settled, since the run is recorded: {again}"
        first, *rest = error.problems
        with_hint = Problem(first.message, f"{first.hint}; {hint}" if first.hint else hint)
        error.problems = (with_hint, *rest)
        raise


def require_place(spec: JobSpec, *, foreground: bool) -> None:
    """Raises where the run could not start in the place that `cluster` names.

    EnvironmentFault where this machine would train and cannot, SpecError for what is wrong with
    the job. Nothing is asked of stores or clusters.
    """
    if not isinstance(spec.cluster, KubeRayCluster):
        require_training()
        return
    if foreground:
        refuse_attending(spec)
    refuse_local_places(spec)


def refuse_attending(spec: JobSpec) -> None:
    """Raises SpecError where the job's driver is no process of this machine."""
    if isinstance(spec.cluster, KubeRayCluster):
        raise SpecError(
            Problem(
                "cluster.kind is kuberay, but shoal run trains on this machine",
                "run: shoal submit JOB.yaml, or train here with --set 'cluster={kind: local}'",
            )
        )


def refuse_local_places(spec: JobSpec) -> None:
    """Raises SpecError for each local path of the job: pods do not have this machine's folders."""
    places = {
        "data.train": spec.data.train,
        "data.validation": spec.data.validation,
        "data.test": spec.data.test,
        "store": spec.store.uri,
    }
    local = {key: uri for key, uri in places.items() if uri is not None and not is_s3(uri)}
    source = spec.model.source
    if not is_s3(source) and (Path(source).is_dir() or not _HUB_NAME.fullmatch(source)):
        local["model.source"] = source
    hints = {
        "model.source": "copy it to a store and name that, as in: s3://models/minilm; or name a "
        "model of the hub",
        "store": "name a bucket, as in: s3://shoal/runs",
    }
    if local:
        raise SpecError(
            *(
                Problem(
                    f"{key} is {uri}, a path of this machine, but cluster.kind is kuberay, whose "
                    "pods reach object storage only",
                    hints.get(key, "prepare it there: shoal prepare SOURCE --to s3://lake/reviews"),
                )
                for key, uri in local.items()
            )
        )


def rayjob_of_job(spec: JobSpec, *, run_id: str | None) -> Manifest:
    """The manifest that a run of the job would have; by default its id is the job's name."""
    run_id = check_run_id(run_id) if run_id is not None else spec.name
    rayjob = build_rayjob(spec, run_id=run_id, run_uri=join_uri(spec.store.uri, run_id))
    refuse_local_places(spec)
    return rayjob


def rayjob_of_run(reader: RunReader) -> Manifest:
    """The manifest that starts, or starts again, the driver of a recorded run.

    Raises SpecError where the run's job is not for KubeRay.
    """
    spec = reader.spec()
    if not isinstance(spec.cluster, KubeRayCluster):
        raise SpecError(
            Problem(
                f"the run {reader.uri} was submitted with cluster.kind {spec.cluster.kind}, so "
                "there is no RayJob to render",
                "submit the job again with cluster.kind: kuberay, or move the run: shoal resume "
                f"{reader.uri} --set 'cluster={{kind: kuberay, image: IMAGE}}'",
            )
        )
    past = _past(reader)
    saved = [] if past == NOTHING_PAST else reader.manifests()
    return build_rayjob(
        spec,
        run_id=reader.run_id,
        run_uri=reader.uri,
        past=past,
        checkpoint_bytes=max((m.total_bytes for m in saved), default=None),
    )


def resume_run(
    store: Store,
    run_id: str,
    *,
    overrides: Sequence[str] = (),
    foreground: bool,
    open_kuberay: OpenKubeRay | None = None,
) -> SubmittedRun:
    """Starts a driver for a run that has ended; what `--set` changes is recorded by it, once the
    run is its own.

    On Kubernetes, where the driver starts later and in a pod that follows from the changed job, the
    changes are recorded here, and a new RayJob takes the place of the old one once that is gone;
    without `open_kuberay` that is left to the user. A study's `search.trials` is no change of its
    job, but asked for as `extend_study` does. Raises SpecError where the run is done, a driver
    lives, KubeRay has the run in hand, or a key may not be changed by a resume.
    """
    reader = RunReader(store, run_id)
    spec = reader.spec()
    _refuse_driven(reader, now=time.time())
    trials = None
    if overrides:
        is_study = spec.search is not None
        check_resume_overrides(overrides, is_study=is_study)
        changed = apply_overrides(spec.model_dump(mode="json"), overrides)
        before, spec = spec, parse_spec(changed, where="--set")
        kept = [o for o in overrides if o.partition("=")[0].strip() != "search.trials"]
        if spec.search is not None and len(kept) < len(overrides):
            trials, overrides = spec.search.trials, kept
            _check_extension(reader, before, budgeted=spec, wanted=trials, space=None)
    # On Kubernetes a run is started again, never attended.
    on_kubernetes = isinstance(spec.cluster, KubeRayCluster)
    require_place(spec, foreground=foreground and not on_kubernetes)
    result = reader.result()
    if result is not None and result.state is State.SUCCEEDED and not overrides and not trials:
        _refuse_done(reader, spec)
    kuberay = _opened(spec, open_kuberay)
    old = require_replaceable(reader, kuberay) if kuberay is not None else None
    past = _past(reader)
    if trials is not None:
        request_extension(store, reader.paths, trials=trials, space=None, by="shoal resume")
    if on_kubernetes:
        record_changes(store, run_id, overrides)
        if kuberay is None:
            return SubmittedRun(run_id, reader.uri, None, kubectl="replace --force")
        # Who resumes a run that no driver has begun takes back what was asked of it before.
        past = replace(past, controls=last_request(store, reader.paths))
        with _recorded(f"shoal resume {reader.uri}"):
            applied = replace_rayjob(spec, reader=reader, past=past, kuberay=kuberay, old=old)
        return SubmittedRun(run_id, reader.uri, None, rayjob=applied.seen)
    return _start(store, spec, run_id, past=past, foreground=foreground, overrides=overrides)


def extend_study(reader: RunReader, *, trials: int, space: object | None, by: str) -> int:
    """Asks a study for so many trials in all, drawn from another space where one is given, as in
    the job file; the request's number.

    Its driver answers, or the next one that a resume starts. Raises SpecError where the study
    cannot have them.
    """
    spec = reader.spec()
    if spec.search is None:
        raise SpecError(
            Problem(
                f"{reader.uri} is no study: its job has no search",
                f"train it longer with: shoal resume {reader.uri} --set train.epochs=N",
            )
        )
    checked = _check_extension(reader, spec, budgeted=spec, wanted=trials, space=space)
    return request_extension(reader.store, reader.paths, trials=trials, space=checked, by=by)


def _check_extension(
    reader: RunReader, spec: JobSpec, *, budgeted: JobSpec, wanted: int, space: object | None
) -> dict[str, Any] | None:
    """As `checked_space`, from the study's log; `budgeted` is the job with the budget from now
    on."""
    assert spec.search is not None
    events = read_events(reader.store, reader.paths)
    used_up = used_up_of(budgeted, events)
    trials = Trials(spec.search, events)
    return checked_space(spec, trials, used_up=used_up, wanted=wanted, space=space)


def _refuse_done(reader: RunReader, spec: JobSpec) -> None:
    """Raises SpecError for a run that has succeeded, but for a study that was given more trials
    since."""
    if spec.search is None:
        raise SpecError(
            Problem(
                f"the run {reader.uri} has succeeded: all its epochs are done",
                f"train longer with: shoal resume {reader.uri} --set train.epochs=N, or start a "
                f"new run with model.source: {reader.uri}",
            )
        )
    known = Trials(spec.search, read_events(reader.store, reader.paths))
    if not is_waiting(reader, known):
        raise SpecError(
            Problem(
                f"the study {reader.uri} has succeeded: its {known.wanted} trials are done",
                f"give it more with: shoal extend {reader.uri} --trials {2 * known.wanted}",
            )
        )


def record_changes(store: Store, run_id: str, overrides: Sequence[str]) -> None:
    """Changes the run's job for good; nothing without overrides."""
    if not overrides:
        return
    paths = RunPaths(run_id)
    amendment = Amendment(overrides=tuple(overrides), made_at=time.time())
    number_before = sum(1 for _ in store.list(paths.amendments))  # they have no gaps
    write_numbered(store, paths.amendment, amendment.to_bytes(), after=number_before)


def request_stop(store: Store, run_id: str, *, by: str) -> None:
    """Asks the run to save its state and end; heard by its driver wherever that is."""
    paths = RunPaths(run_id)
    control = Control(kind="stop", requested_at=time.time(), by=by)
    number_before = last_request(store, paths)
    write_numbered(store, paths.control_request, control.to_bytes(), after=number_before)


def new_run_id(name: str) -> str:
    """`name` and a short random suffix."""
    suffix = "".join(secrets.choice(_ALPHABET) for _ in range(RUN_ID_SUFFIX_CHARACTERS))
    return f"{name}-{suffix}"


def require_training() -> None:
    """Raises EnvironmentFault where the packages that train are not installed."""
    missing = [
        name
        for name in ("torch", "transformers", "ray", "datasets", "sklearn", "safetensors")
        if importlib.util.find_spec(name) is None
    ]
    if missing:
        raise EnvironmentFault(
            Problem(
                f"cluster.kind is local, so this machine would train, but {', '.join(missing)} "
                f"{'is' if len(missing) == 1 else 'are'} not installed here",
                'run: pip install "shoal[train]"',
            )
        )


def _start(
    store: Store,
    spec: JobSpec,
    run_id: str,
    *,
    past: Past,
    foreground: bool,
    overrides: Sequence[str] = (),
) -> SubmittedRun:
    uri = join_uri(store.uri, run_id)
    process = start_driver(
        uri, access=spec.store.access, past=past, attended=foreground, overrides=overrides
    )
    return SubmittedRun(run_id, uri, process if foreground else None)


def _past(reader: RunReader) -> Past:
    """What a start from now on is not concerned with."""
    lease, result = reader.lease(), reader.result()
    if lease is None and result is None:
        return NOTHING_PAST  # a request to stop that came before the first start still counts
    return Past(
        controls=last_request(reader.store, reader.paths),
        generation=result.generation if result is not None else 0,
    )


def living_driver(reader: RunReader, *, now: float) -> Lease | None:
    """The lease of the driver that works on the run, for all that can be known here."""
    lease = reader.lease()
    if lease is None or lease.released or read_situation(reader, now=now).is_over:
        return None
    borne_ttls = 1.0 if driver_has_ended(lease) is None else LOST_AFTER_TTLS
    return None if now - lease.renewed_at > borne_ttls * lease.ttl_seconds else lease


def is_driven_soon(reader: RunReader, *, now: float) -> bool:
    """Whether a driver works on the run, or its first one may be about to."""
    is_new = reader.lease() is None and reader.result() is None
    return is_new or living_driver(reader, now=now) is not None


def _refuse_driven(reader: RunReader, *, now: float) -> None:
    """Raises SpecError if a driver works on the run for all that can be known here.

    A holder on another machine that has been silent for its time to live may be gone, and one on
    this machine frozen: the new driver finds that out, by waiting.
    """
    lease = living_driver(reader, now=now)
    if lease is None:
        return
    raise SpecError(
        Problem(
            f"{reader.uri} is driven by {lease.driver}, so it cannot be resumed",
            f"stop that one first: shoal stop {reader.uri} --wait, or follow it: shoal watch "
            f"{reader.uri} (if its machine is gone, its lease ends {lease.ttl_seconds:.0f} s "
            f"after its last sign; if it hangs, end it on {lease.host}: kill -9 {lease.pid})",
        )
    )
