"""What can be told of a job for KubeRay from here; its Kubernetes cluster is not asked. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterator

from jobs.checks.finding import Finding, not_checked, problem, problems_of, warning
from jobs.checks.machine import DiskNeed
from jobs.errors import SpecError
from jobs.spec import JobSpec, KubeRayCluster, StoreAccess, format_bytes
from jobs.submit import refuse_local_places

PART = "cluster"


def check_kuberay(spec: JobSpec, need: DiskNeed) -> Iterator[Finding]:
    """Whether pods can reach what the job names, and hold it; nothing for other clusters."""
    cluster = spec.cluster
    if not isinstance(cluster, KubeRayCluster):
        return
    try:
        refuse_local_places(spec)
    except SpecError as error:
        yield from problems_of(PART, error)
    yield from _check_profile("data.access", spec.data.access)
    yield from _check_profile("store.access", spec.store.access)
    yield from _check_memory(spec)
    yield from _check_cache(spec, need)
    yield not_checked(
        PART,
        f"Kubernetes was not asked: whether the namespace {cluster.namespace} takes the RayJob and "
        f"its pods can pull {cluster.image}; and whether they reach the stores, which were tried "
        "with this shell's credentials, not with those of the pods",
    )


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
