"""The pods of a run: their container, environment, volumes, resources and rights. Pure.

    submitter_pod              speaks to the head alone
    head_pod, worker_pod       nodes of Ray

All meet the Pod Security Standard `restricted`, and have a root file system that is read-only:
what is written lies in /tmp, which is HOME as well, in /dev/shm and in the cache. Secrets are
named, never written.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.grace import DRAIN_VARIABLE, Grace
from cluster.placement import Manifest, place_head, place_workers
from jobs.cluster_spec import Claim, EphemeralVolume, KubeRayCluster

CACHE_FOLDER = "/cache"
"""$SHOAL_CACHE of the workers."""
_SCRATCH_FOLDER = "/tmp"  # noqa: S108 - of the pod

ROLE = "app.kubernetes.io/component"
"""Label of a pod that tells what it is: head, worker or submitter."""

_RAY_MEMORY_MIB = 512
"""What Ray's processes take in a worker's pod besides the workers and shared memory."""
_USER_ID = 1000
_NOTICE = ("python", "-m", "cluster.drain")


@dataclass(frozen=True)
class Volume:
    """A volume of a pod, and where its container sees it."""

    name: str
    folder: str
    source: Manifest
    """What it is made of, as Kubernetes writes it."""


def submitter_pod(cluster: KubeRayCluster, labels: Mapping[str, str]) -> Manifest:
    """A small pod that talks to the head alone: no secrets, no service account's token.

    KubeRay fills in its command.
    """
    return _pod(
        cluster,
        labels,
        role="submitter",
        container={
            "name": "ray-job-submitter",
            "resources": _resources(cpus=1, memory_mib=1024),
            "env": _values({"HOME": _SCRATCH_FOLDER}),
        },
        volumes=[_scratch()],
        more={"restartPolicy": "Never", "automountServiceAccountToken": False},
        placement=place_head(cluster),
    )


def head_pod(
    cluster: KubeRayCluster,
    labels: Mapping[str, str],
    *,
    environment: Mapping[str, str],
    grace: Grace,
    has_autoscaler: bool,
) -> Manifest:
    """The pod of Ray's servers and the driver, to which `environment` is told."""
    return _ray_pod(
        cluster,
        labels,
        role="head",
        container={
            "name": "ray-head",
            "ports": [
                {"name": "gcs-server", "containerPort": 6379},
                {"name": "dashboard", "containerPort": 8265},
                {"name": "client", "containerPort": 10001},
            ],
            "resources": _resources(
                cpus=cluster.head.cpus, memory_mib=math.ceil(cluster.head.memory_gib * 1024)
            ),
        },
        environment=environment,
        volumes=[],
        grace=grace,
        # Only an autoscaler speaks to Kubernetes; clouds give their own tokens.
        speaks_to_kubernetes=has_autoscaler,
        placement=place_head(cluster),
    )


@dataclass(frozen=True)
class WorkerRoom:
    """What one pod of workers has."""

    cpus: int
    memory_gib: float | None
    gpus: int
    cache_gib: int


def worker_pod(
    cluster: KubeRayCluster,
    labels: Mapping[str, str],
    *,
    room: WorkerRoom,
    grace: Grace,
    on_spot: bool,
) -> Manifest:
    """A pod in which workers fit beside Ray's own processes, and no more."""
    memory_mib = None
    if room.memory_gib is not None:
        beside = _RAY_MEMORY_MIB + math.ceil(cluster.shared_memory_gib * 1024)
        memory_mib = math.ceil(room.memory_gib * 1024) + beside
    gpus = {cluster.gpu.resource: room.gpus} if room.gpus else {}
    on_node = cluster.cache.kind == "node"
    return _ray_pod(
        cluster,
        labels,
        role="worker",
        container={
            "name": "ray-worker",
            "resources": _resources(
                cpus=room.cpus,
                memory_mib=memory_mib,
                devices=gpus,
                disk_gib=room.cache_gib if on_node else None,
            ),
        },
        environment={"SHOAL_CACHE": CACHE_FOLDER, "HF_HOME": f"{CACHE_FOLDER}/huggingface"},
        volumes=[_cache(cluster, room.cache_gib)],
        grace=grace,
        speaks_to_kubernetes=False,
        placement=place_workers(
            cluster,
            has_gpus=bool(room.gpus),
            on_spot=on_spot,
            labels=selector_of(labels, role="worker"),
        ),
    )


def selector_of(labels: Mapping[str, str], *, role: str) -> dict[str, str]:
    """Labels by which the run's pods of a role are found."""
    return {
        "app.kubernetes.io/instance": labels["app.kubernetes.io/instance"],
        ROLE: role,
    }


def autoscaler_options(cluster: KubeRayCluster) -> Manifest:
    """What KubeRay gives the container beside the head that has it add and remove pods.

    Ray's autoscaler is version 2 since Ray 2.47; only where that is said does KubeRay replace pods
    that have ended instead of starting them again, as that version expects.
    """
    scratch = _scratch()
    return {
        "version": "v2",
        **_pull_policy(cluster),
        "env": _values({"HOME": _SCRATCH_FOLDER}),
        "volumeMounts": [{"name": scratch.name, "mountPath": scratch.folder}],
        "securityContext": _container_security(),
    }


def _ray_pod(
    cluster: KubeRayCluster,
    labels: Mapping[str, str],
    *,
    role: str,
    container: Manifest,
    environment: Mapping[str, str],
    volumes: Sequence[Volume],
    grace: Grace,
    speaks_to_kubernetes: bool,
    placement: Manifest,
) -> Manifest:
    values = {
        "HOME": _SCRATCH_FOLDER,
        "RAY_USAGE_STATS_ENABLED": "0",
        DRAIN_VARIABLE: str(grace.drain_seconds),
        **environment,
    }
    env_from = [
        *({"configMapRef": {"name": name}} for name in cluster.env_from_config_maps),
        *({"secretRef": {"name": name}} for name in cluster.env_from_secrets),
    ]
    account = {"serviceAccountName": cluster.service_account} if cluster.service_account else {}
    return _pod(
        cluster,
        labels,
        role=role,
        container={
            **container,
            "env": [*_values(values), *_references(cluster)],
            **({"envFrom": env_from} if env_from else {}),
            "lifecycle": {"preStop": {"exec": {"command": list(_NOTICE)}}},
        },
        volumes=[_shared_memory(cluster), _scratch(), *volumes],
        more={
            **account,
            "automountServiceAccountToken": speaks_to_kubernetes,
            "terminationGracePeriodSeconds": grace.total_seconds,
        },
        placement=placement,
    )


def _pod(
    cluster: KubeRayCluster,
    labels: Mapping[str, str],
    *,
    role: str,
    container: Manifest,
    volumes: Sequence[Volume],
    more: Manifest,
    placement: Manifest,
) -> Manifest:
    """A template of a pod with one container. `more` are parts of its spec that its kind has."""
    secrets = [{"name": secret} for secret in cluster.image_pull_secrets]
    return {
        "metadata": {"labels": {**labels, ROLE: role}},
        "spec": {
            **more,
            # Else each service of the namespace adds variables, such as RAY_PORT of one named ray.
            "enableServiceLinks": False,
            **({"imagePullSecrets": secrets} if secrets else {}),
            **({"priorityClassName": cluster.priority_class} if cluster.priority_class else {}),
            **placement,
            "securityContext": _pod_security(),
            "containers": [
                {
                    "name": container["name"],
                    "image": cluster.image,
                    **_pull_policy(cluster),
                    **container,
                    "volumeMounts": [{"name": v.name, "mountPath": v.folder} for v in volumes],
                    "securityContext": _container_security(),
                }
            ],
            "volumes": [{"name": v.name, **v.source} for v in volumes],
        },
    }


def _pull_policy(cluster: KubeRayCluster) -> Manifest:
    return {"imagePullPolicy": cluster.image_pull_policy} if cluster.image_pull_policy else {}


# ------------------------------------------------------------------------------- environment


def _values(environment: Mapping[str, str]) -> list[Manifest]:
    return [{"name": name, "value": value} for name, value in environment.items()]


def _references(cluster: KubeRayCluster) -> list[Manifest]:
    return [
        {"name": name, "valueFrom": {"secretKeyRef": {"name": held.secret, "key": held.key}}}
        for name, held in cluster.env_secrets.items()
    ]


# ----------------------------------------------------------------------------------- volumes


def _shared_memory(cluster: KubeRayCluster) -> Volume:
    size = f"{math.ceil(cluster.shared_memory_gib * 1024)}Mi"
    source = {"emptyDir": {"medium": "Memory", "sizeLimit": size}}
    return Volume("shared-memory", "/dev/shm", source)  # noqa: S108 - of the pod


def _scratch() -> Volume:
    return Volume("scratch", _SCRATCH_FOLDER, {"emptyDir": {}})


def _cache(cluster: KubeRayCluster, size_gib: int) -> Volume:
    cache, size = cluster.cache, f"{size_gib}Gi"
    source: dict[str, Any]
    if isinstance(cache, Claim):
        source = {"persistentVolumeClaim": {"claimName": cache.name}}
    elif isinstance(cache, EphemeralVolume):
        of_class = {"storageClassName": cache.storage_class} if cache.storage_class else {}
        claim = {
            "accessModes": ["ReadWriteOnce"],
            **of_class,
            "resources": {"requests": {"storage": size}},
        }
        source = {"ephemeral": {"volumeClaimTemplate": {"spec": claim}}}
    else:
        source = {"emptyDir": {"sizeLimit": size}}
    return Volume("cache", CACHE_FOLDER, source)


# ------------------------------------------------------------------------ resources and rights


def _resources(
    *,
    cpus: int,
    memory_mib: int | None,
    devices: Mapping[str, int] | None = None,
    disk_gib: int | None = None,
) -> Manifest:
    """Requests that are also the limits, so that pods are the last to be evicted."""
    amounts = {"cpu": str(cpus)}
    if memory_mib is not None:
        whole_gib = memory_mib % 1024 == 0
        amounts["memory"] = f"{memory_mib // 1024}Gi" if whole_gib else f"{memory_mib}Mi"
    amounts |= {name: str(number) for name, number in (devices or {}).items()}
    requests = dict(amounts)
    if disk_gib is not None:
        requests["ephemeral-storage"] = f"{disk_gib}Gi"
    return {"requests": requests, "limits": amounts}


def _pod_security() -> Manifest:
    """What the Pod Security Standard `restricted` asks of a pod; volumes belong to the user."""
    return {
        "runAsNonRoot": True,
        "runAsUser": _USER_ID,
        "runAsGroup": _USER_ID,
        "fsGroup": _USER_ID,
        # A volume that is there is not walked through at each start.
        "fsGroupChangePolicy": "OnRootMismatch",
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def _container_security() -> Manifest:
    return {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
