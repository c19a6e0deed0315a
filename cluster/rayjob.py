"""A run as a RayJob of KubeRay: which pods it has, what they are given, what they execute. Pure.

build_rayjob -> _cluster -> _head, _workers -> _pod

Made for KubeRay 1.7 (ray.io/v1). One worker of the job is one pod; the head trains nothing, and
runs the driver that `cluster.local` starts on a laptop. The manifest holds names of secrets only.
"""

from __future__ import annotations

import json
import math
import shlex
from typing import Any

from jobs.errors import Problem, SpecError
from jobs.record import NOTHING_PAST, Past
from jobs.spec import JobSpec, KubeRayCluster, StoreAccess

Manifest = dict[str, Any]

CACHE_FOLDER = "/cache"
"""$SHOAL_CACHE of the workers."""

_HEAD_CPUS = 2
_HEAD_MEMORY_MIB = 4096
"""Ray's own servers, its dashboard, and the driver with torch."""
_RAY_MEMORY_MIB = 1024
"""What Ray's processes and its object store take in a worker's pod besides the worker."""
_OBJECT_STORE_BYTES = 200 * 2**20
"""Nothing large goes through Ray's object store: rows come from storage, states go there."""
_SHARED_MEMORY_MIB = 512
_GRACE_SECONDS = 120
"""Between the notice that a pod must go and its end."""
_DRAIN_SECONDS = 110
"""How long a node of Ray that got this notice waits for workers to save and for the driver to write
down how the run stands. It ends as soon as they have; the rest of the grace is for its own end."""
_SECONDS_AFTER_END = 60
"""How long the Ray cluster outlives the run: for its last lines, not for idle GPUs."""
_SUBMITTER_RETRIES = 4
"""The submitter's pod submits, then only follows the driver's output. KubeRay 1.7 asks whether the
job is there before it submits again, so a retry attaches to the run; without retries, a submitter
that is evicted would end a healthy run."""
_USER_ID = 1000


def build_rayjob(
    spec: JobSpec, *, run_id: str, run_uri: str, past: Past = NOTHING_PAST
) -> Manifest:
    """The manifest of the run, keys in the order in which people write them.

    The same arguments give the same manifest. `past` is that of a run that starts again. Raises
    SpecError where `cluster.kind` is not kuberay.
    """
    cluster = spec.cluster
    if not isinstance(cluster, KubeRayCluster):
        raise SpecError(
            Problem(
                f"cluster.kind is {cluster.kind}, so there is no RayJob to render",
                "name a cluster, as in: "
                "--set 'cluster={kind: kuberay, image: registry.example.com/shoal:0.1.0}'",
            )
        )
    labels = _labels(spec, run_id)
    queue = {"kueue.x-k8s.io/queue-name": cluster.queue} if cluster.queue is not None else {}
    # Without it Kueue refuses what changes its size.
    is_elastic = cluster.queue is not None and spec.workers.min is not None
    elastic = {"kueue.x-k8s.io/elastic-job": "true"} if is_elastic else {}
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {
            "name": run_id,
            "namespace": cluster.namespace,
            "labels": {**labels, **queue},
            "annotations": {"shoal/run": run_uri, **elastic},
        },
        "spec": {
            "entrypoint": _entrypoint(run_uri, access=spec.store.access, past=past),
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": _SECONDS_AFTER_END,
            "backoffLimit": cluster.backoff_limit,
            "submissionMode": "K8sJobMode",
            "submitterConfig": {"backoffLimit": _SUBMITTER_RETRIES},
            "submitterPodTemplate": _submitter(cluster, labels),
            "rayClusterSpec": _cluster(spec, cluster, run_id),
        },
    }


def _cache_gib(spec: JobSpec) -> int:
    """Size of a worker's cache volume: half for rows, half for copies of models and checkpoints.

    Rows alone are kept within `data.cache_gib`, and a pod that outgrows its volume is evicted.
    """
    return math.ceil(2 * spec.data.cache_gib)


def _entrypoint(run_uri: str, *, access: StoreAccess, past: Past) -> str:
    """The driver's command line, for a shell; as `cluster.local.start_driver` has it.

    Two shells read it: the submitter's, and the one in which Ray starts the driver. Older versions
    of Ray put it together for the second without quoting what holds no space, so that a shell
    would expand the braces of compact JSON; the spaces in this JSON make all versions quote it.
    """
    command = ["python", "-m", "jobs.run", run_uri]
    if given := access.model_dump(mode="json", exclude_defaults=True):
        command += ["--store-access", json.dumps(given)]
    if past != NOTHING_PAST:
        command += ["--past-controls", str(past.controls)]
        command += ["--past-generation", str(past.generation)]
    return shlex.join(command)


def _labels(spec: JobSpec, run_id: str) -> dict[str, str]:
    return {
        "app.kubernetes.io/name": "shoal",
        "app.kubernetes.io/instance": run_id,
        "shoal/job": spec.name,
    }


def _submitter(cluster: KubeRayCluster, labels: dict[str, str]) -> Manifest:
    """A small pod that talks to the head alone: no secrets, no service account's token.

    KubeRay fills in its command.
    """
    container = {
        "name": "ray-job-submitter",
        "image": cluster.image,
        "resources": _resources(cpus=1, memory_mib=1024),
        "securityContext": _container_security(),
    }
    return {
        "metadata": {"labels": labels.copy()},
        "spec": {
            "restartPolicy": "Never",
            "automountServiceAccountToken": False,
            **_pull_secrets(cluster),
            "securityContext": _pod_security(),
            "containers": [container],
        },
    }


def _cluster(spec: JobSpec, cluster: KubeRayCluster, run_id: str) -> Manifest:
    return {
        **(_autoscaling() if spec.workers.min is not None else {}),
        "headGroupSpec": _head(spec, cluster, run_id),
        "workerGroupSpecs": [_workers(spec, cluster, run_id)],
    }


def _autoscaling() -> Manifest:
    """A container beside the head that has KubeRay add the pods which the run asks Ray for.

    KubeRay starts a run only once all `replicas` are there. Those of an elastic run are its fewest
    workers; Ray Train asks for the others while it trains.
    """
    return {
        "enableInTreeAutoscaling": True,
        "autoscalerOptions": {"securityContext": _container_security()},
    }


def _head(spec: JobSpec, cluster: KubeRayCluster, run_id: str) -> Manifest:
    """The head has no cores to give, so that no worker is placed there."""
    return {
        "rayStartParams": {
            "dashboard-host": "0.0.0.0",  # noqa: S104 - of the pod; the submitter reaches it there
            "num-cpus": "0",
            "object-store-memory": str(_OBJECT_STORE_BYTES),
        },
        "template": _pod(
            spec,
            cluster,
            run_id,
            container={
                "name": "ray-head",
                "image": cluster.image,
                "ports": [
                    {"name": "gcs-server", "containerPort": 6379},
                    {"name": "dashboard", "containerPort": 8265},
                    {"name": "client", "containerPort": 10001},
                ],
                "resources": _resources(cpus=_HEAD_CPUS, memory_mib=_HEAD_MEMORY_MIB),
            },
            speaks_to_kubernetes=spec.workers.min is not None,
        ),
    }


def _workers(spec: JobSpec, cluster: KubeRayCluster, run_id: str) -> Manifest:
    """One pod for each worker; Ray offers in it what the worker asks Ray for, no more."""
    workers = spec.workers
    ray = {"num-cpus": str(workers.cpus), "object-store-memory": str(_OBJECT_STORE_BYTES)}
    memory_mib = None
    if workers.memory_gib is not None:
        ray["memory"] = str(int(workers.memory_gib * 2**30))
        memory_mib = math.ceil(workers.memory_gib * 1024) + _RAY_MEMORY_MIB
    cache_gib = _cache_gib(spec)
    return {
        "groupName": "workers",
        "replicas": workers.fewest,
        "minReplicas": workers.fewest,
        "maxReplicas": workers.count,
        "rayStartParams": ray,
        "template": _pod(
            spec,
            cluster,
            run_id,
            container={
                "name": "ray-worker",
                "image": cluster.image,
                "resources": _resources(
                    cpus=workers.cpus,
                    memory_mib=memory_mib,
                    gpus=workers.gpus,
                    disk_gib=cache_gib,
                ),
            },
            environment={
                "SHOAL_CACHE": CACHE_FOLDER,
                "HF_HOME": f"{CACHE_FOLDER}/huggingface",
            },
            volumes={CACHE_FOLDER: {"name": "cache", "emptyDir": {"sizeLimit": f"{cache_gib}Gi"}}},
        ),
    }


def _pod(
    spec: JobSpec,
    cluster: KubeRayCluster,
    run_id: str,
    *,
    container: Manifest,
    environment: dict[str, str] | None = None,
    volumes: dict[str, Manifest] | None = None,
    speaks_to_kubernetes: bool = False,
) -> Manifest:
    """A pod of Ray. `volumes` are by the folder at which they are mounted."""
    shared_memory = {"medium": "Memory", "sizeLimit": f"{_SHARED_MEMORY_MIB}Mi"}
    volumes = {"/dev/shm": {"name": "shared-memory", "emptyDir": shared_memory}, **(volumes or {})}  # noqa: S108
    environment = {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": str(_DRAIN_SECONDS),
        **(environment or {}),
    }
    secrets = [{"secretRef": {"name": name}} for name in cluster.env_from_secrets]
    account = {"serviceAccountName": cluster.service_account} if cluster.service_account else {}
    return {
        "metadata": {"labels": _labels(spec, run_id)},
        "spec": {
            **account,
            # Only an autoscaler speaks to Kubernetes; clouds give their own tokens.
            "automountServiceAccountToken": speaks_to_kubernetes,
            **_pull_secrets(cluster),
            "terminationGracePeriodSeconds": _GRACE_SECONDS,
            "securityContext": _pod_security(),
            "containers": [
                {
                    **container,
                    "env": [{"name": key, "value": value} for key, value in environment.items()],
                    **({"envFrom": secrets} if secrets else {}),
                    "volumeMounts": [
                        {"name": volume["name"], "mountPath": folder}
                        for folder, volume in volumes.items()
                    ],
                    "securityContext": _container_security(),
                }
            ],
            "volumes": list(volumes.values()),
        },
    }


def _resources(
    *, cpus: int, memory_mib: int | None, gpus: int = 0, disk_gib: int | None = None
) -> Manifest:
    """Requests that are also the limits, so that pods are the last to be evicted."""
    amounts = {"cpu": str(cpus)}
    if memory_mib is not None:
        whole_gib = memory_mib % 1024 == 0
        amounts["memory"] = f"{memory_mib // 1024}Gi" if whole_gib else f"{memory_mib}Mi"
    if gpus:
        amounts["nvidia.com/gpu"] = str(gpus)
    requests = dict(amounts)
    if disk_gib is not None:
        requests["ephemeral-storage"] = f"{disk_gib}Gi"
    return {"requests": requests, "limits": amounts}


def _pull_secrets(cluster: KubeRayCluster) -> Manifest:
    if not cluster.image_pull_secrets:
        return {}
    return {"imagePullSecrets": [{"name": name} for name in cluster.image_pull_secrets]}


def _pod_security() -> Manifest:
    """What the Pod Security Standard `restricted` asks of a pod; volumes belong to the user."""
    return {
        "runAsNonRoot": True,
        "runAsUser": _USER_ID,
        "runAsGroup": _USER_ID,
        "fsGroup": _USER_ID,
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def _container_security() -> Manifest:
    return {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
