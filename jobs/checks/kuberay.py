"""A job for KubeRay: what can be told of it from here, and what its Kubernetes cluster says.

look_at_kubernetes -> the cluster's answers, asked for before all else and beside it
check_kuberay      -> all findings. Pure
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from cluster.disruption import disruption_budgets
from cluster.kuberay_access import connect
from cluster.kuberay_config import NoAccess
from cluster.kuberay_survey import Survey, survey
from cluster.pod_needs import PodGroup, pod_groups
from cluster.rayjob import Manifest, build_rayjob
from cluster.storage import join_uri
from jobs.checks.finding import Finding, not_checked, problem, problems_of, warning
from jobs.checks.kuberay_api import check_api
from jobs.checks.kuberay_names import check_image, check_names
from jobs.checks.kuberay_queue import check_queue
from jobs.checks.kuberay_room import check_room
from jobs.checks.machine import DiskNeed
from jobs.errors import ShoalError, SpecError
from jobs.image import parse_image
from jobs.spec import JobSpec, KubeRayCluster, StoreAccess, format_bytes
from jobs.submit import new_run_id, refuse_local_places

PART = "cluster"
SURVEY_SECONDS = 3.0
"""How long the cluster has to answer."""


@dataclass(frozen=True)
class Look:
    """What a run would have on Kubernetes, and what the cluster says to that."""

    rayjob: Manifest
    budgets: tuple[Manifest, ...]
    groups: tuple[PodGroup, ...]
    survey: Survey | None
    """None: nothing was asked."""
    findings: tuple[Finding, ...] = ()
    """Why nothing was asked."""


def look_at_kubernetes(spec: JobSpec, *, context: str | None, asks: bool = True) -> Look | None:
    """Asks the cluster of a context all that concerns the job; nothing is made. None for other
    clusters. Without `asks` it is left alone, as where somebody else submits the run."""
    cluster = spec.cluster
    if not isinstance(cluster, KubeRayCluster):
        return None
    run_id = new_run_id(spec.name)
    rayjob = build_rayjob(spec, run_id=run_id, run_uri=join_uri(spec.store.uri, run_id))
    budgets = tuple(disruption_budgets(rayjob))
    groups = tuple(pod_groups(rayjob))
    if not asks:
        return Look(rayjob, budgets, groups, None)
    try:
        seconds = SURVEY_SECONDS
        connection = connect(context, patience_seconds=0.0, answer_seconds=seconds)
        found = survey(connection, cluster, rayjob=rayjob, budgets=budgets, seconds=seconds)
    except NoAccess as error:
        (why,) = error.problems
        said = not_checked(PART, f"Kubernetes was not asked: {why.message}", why.hint)
        return Look(rayjob, budgets, groups, None, (said,))
    except ShoalError as error:
        return Look(rayjob, budgets, groups, None, tuple(problems_of(PART, error)))
    return Look(rayjob, budgets, groups, found)


def check_kuberay(spec: JobSpec, need: DiskNeed, look: Look | None) -> Iterator[Finding]:
    """Whether the cluster takes the job, and its pods can hold and reach what the job names;
    nothing for other clusters."""
    cluster = spec.cluster
    if not isinstance(cluster, KubeRayCluster) or look is None:
        return
    try:
        refuse_local_places(spec)
    except SpecError as error:
        yield from problems_of(PART, error)
    yield from _check_profile("data.access", spec.data.access)
    yield from _check_profile("store.access", spec.store.access)
    yield from _check_memory(spec)
    yield from _check_cache(spec, need)
    yield from check_image(cluster)
    yield from look.findings
    if look.survey is not None:
        yield from _check_survey(spec, cluster, look, look.survey)
    reference = parse_image(cluster.image)
    registry = f" from {reference.registry}" if reference is not None else ""
    yield not_checked(
        PART,
        f"whether pods can pull {cluster.image}{registry}, and reach the stores, which were tried "
        "with this shell's credentials, not with those of the pods",
    )


def _check_survey(
    spec: JobSpec, cluster: KubeRayCluster, look: Look, found: Survey
) -> Iterator[Finding]:
    if found.unreachable is not None:
        yield from problems_of(PART, found.unreachable)
        yield not_checked(PART, "whether the cluster takes the run: it was not reached")
        return
    yield from check_api(cluster, found, manifests=(look.rayjob, *look.budgets))
    yield from check_names(spec, cluster, found)
    yield from check_queue(cluster, found, look.groups)
    yield from check_room(spec, cluster, found, look.groups)


def _check_profile(where: str, access: StoreAccess) -> Iterator[Finding]:
    if access.profile is not None:
        yield warning(
            PART,
            f"{where}.profile is {access.profile}, but the pods have no AWS configuration files "
            "except those of the image",
            f"remove {where}.profile, and give the pods keys with cluster.env_from_secrets or an "
            "identity with cluster.service_account",
        )


def _check_memory(spec: JobSpec) -> Iterator[Finding]:
    if spec.workers.memory_gib is None:
        yield warning(
            PART,
            "workers.memory_gib is not given, so the workers' pods ask for no memory, and are the "
            "first to be evicted where a node runs out of it",
            "set workers.memory_gib",
        )


def _check_cache(spec: JobSpec, need: DiskNeed) -> Iterator[Finding]:
    """Whether models and checkpoints fit beside the rows: a pod that outgrows its volume ends."""
    half_bytes = int(spec.data.cache_gib * 2**30)
    if need.needed_bytes > half_bytes:
        yield problem(
            "data.cache_gib",
            f"data.cache_gib is {spec.data.cache_gib:g}, which the workers' pods have for rows and "
            "as much again for the rest, but a checkpoint and a copy of the model take "
            f"{format_bytes(need.needed_bytes)}",
            f"set data.cache_gib to {math.ceil(need.needed_bytes / 2**30)} or more",
        )
