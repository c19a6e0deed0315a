"""A run as a RayJob of KubeRay: which pods it has, what they are given, what they execute. Pure.

build_rayjob -> _ray_cluster -> _head, _workers -> cluster.pods

Made for KubeRay 1.7 (ray.io/v1); what KubeRay 1.4 does not know is left out where the job says so
(`cluster.auth: null`, no `cluster.start_deadline_minutes`). One worker of the job is one pod; the
head trains nothing, and runs the driver that `cluster.local` starts on a laptop. The manifest holds
names of secrets only.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cluster.grace import Grace, grace_for
from cluster.placement import Manifest as Manifest
from cluster.pod_count import PodCount, count_pods
from cluster.pods import (
    WorkerRoom,
    autoscaler_options,
    head_pod,
    submitter_pod,
    worker_pod,
)
from jobs.cluster_spec import KubeRayCluster
from jobs.errors import Problem, SpecError
from jobs.record import NOTHING_PAST, Past
from jobs.spec import JobSpec

RAY_VERSION = "2.60.0"
"""Of the image, as pyproject.toml has it: KubeRay asks for it where tokens are wanted."""

_OBJECT_STORE_BYTES = 200 * 2**20
"""Nothing large goes through Ray's object store: rows come from storage, states go there."""
_SUBMITTER_RETRIES = 4
"""The submitter's pod submits, then only follows the driver's output. KubeRay 1.7 asks whether the
job is there before it submits again, so a retry attaches to the run; without retries, a submitter
that is evicted would end a healthy run."""
_PAST_CONTROLS, _PAST_GENERATION = "SHOAL_PAST_CONTROLS", "SHOAL_PAST_GENERATION"
_MAX_LABEL_CHARACTERS = 63


def build_rayjob(
    spec: JobSpec,
    *,
    run_id: str,
    run_uri: str,
    past: Past = NOTHING_PAST,
    checkpoint_bytes: int | None = None,
    user: str | None = None,
) -> Manifest:
    """The manifest of the run, keys in the order in which people write them.

    The same arguments give the same manifest. `past` is that of a run that starts again;
    `checkpoint_bytes` is the size of a checkpoint, measured or estimated, for which pods that must
    go are given time (None: nobody knows, see `cluster.grace`); `user` is who submits, for a label.
    Raises SpecError where `cluster.kind` is not kuberay.
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
    pods = count_pods(spec)
    run = _Run(
        spec,
        cluster,
        labels=_labels(spec, cluster, run_id=run_id, user=user),
        pods=pods,
        grace=_grace(spec, cluster, pods, checkpoint_bytes),
        driver_environment=_driver_environment(spec, past),
    )
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {
            "name": run_id,
            "namespace": cluster.namespace,
            "labels": {**run.labels, **_queue_labels(cluster)},
            "annotations": {"shoal/run": run_uri, **_queue_annotations(run)},
        },
        "spec": {
            "entrypoint": shlex.join(["python", "-m", "jobs.run", run_uri]),
            **({"suspend": True} if cluster.suspend else {}),
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": cluster.ttl_seconds,
            "backoffLimit": cluster.backoff_limit,
            **_seconds("activeDeadlineSeconds", cluster.deadline_minutes),
            **_seconds("preRunningDeadlineSeconds", cluster.start_deadline_minutes),
            "submissionMode": "K8sJobMode",
            "submitterConfig": {"backoffLimit": _SUBMITTER_RETRIES},
            "submitterPodTemplate": submitter_pod(cluster, run.labels),
            "rayClusterSpec": _ray_cluster(run),
        },
    }


@dataclass(frozen=True)
class _Run:
    """What all parts of the manifest follow from."""

    spec: JobSpec
    cluster: KubeRayCluster
    labels: dict[str, str]
    """Of all objects of the run."""
    pods: PodCount
    grace: Grace
    driver_environment: dict[str, str]


def _labels(
    spec: JobSpec, cluster: KubeRayCluster, *, run_id: str, user: str | None
) -> dict[str, str]:
    return {
        **cluster.labels,
        "app.kubernetes.io/name": "shoal",
        "app.kubernetes.io/instance": run_id,
        "app.kubernetes.io/version": label_value(importlib.metadata.version("shoal")),
        "shoal/job": spec.name,
        **({"shoal/user": label_value(user)} if user else {}),
    }


def label_value(text: str) -> str:
    """The text as a label's value may be: `alice-example.com` of alice@example.com."""
    allowed = re.sub(r"[^-A-Za-z0-9_.]", "-", text).strip("-_.")
    return allowed[:_MAX_LABEL_CHARACTERS].rstrip("-_.")


def _queue_labels(cluster: KubeRayCluster) -> dict[str, str]:
    named = {
        "kueue.x-k8s.io/queue-name": cluster.queue,
        "kueue.x-k8s.io/priority-class": cluster.queue_priority,
    }
    return {label: name for label, name in named.items() if name is not None}


def _queue_annotations(run: _Run) -> dict[str, str]:
    """Without it Kueue refuses what changes its size."""
    is_elastic = run.cluster.queue is not None and run.pods.is_elastic
    return {"kueue.x-k8s.io/elastic-job": "true"} if is_elastic else {}


def _seconds(key: str, minutes: float | None) -> dict[str, int]:
    return {} if minutes is None else {key: math.ceil(60 * minutes)}


def _driver_environment(spec: JobSpec, past: Past) -> dict[str, str]:
    """What the driver must know before it can read the run's spec; options of `jobs.run`.

    As variables, so that no shell between here and there reads them: KubeRay's submitter and Ray
    each have one.
    """
    environment = {}
    if given := spec.store.access.model_dump(mode="json", exclude_defaults=True):
        environment["SHOAL_STORE_ACCESS"] = json.dumps(given)
    if past != NOTHING_PAST:
        environment[_PAST_CONTROLS] = str(past.controls)
        environment[_PAST_GENERATION] = str(past.generation)
    return environment


def driver_environment(rayjob: Mapping[str, Any]) -> dict[str, str]:
    """The variables with values that the driver of a RayJob finds on its head; none where it has
    no cluster of its own."""
    cluster = rayjob["spec"].get("rayClusterSpec")
    if not cluster:
        return {}
    (container, *_) = cluster["headGroupSpec"]["template"]["spec"]["containers"]
    return {v["name"]: v["value"] for v in container.get("env") or () if "value" in v}


def past_of(rayjob: Mapping[str, Any]) -> Past:
    """What is past for the driver of a RayJob, as it was rendered."""
    told = driver_environment(rayjob)
    return Past(
        controls=int(told.get(_PAST_CONTROLS, 0)), generation=int(told.get(_PAST_GENERATION, 0))
    )


def _grace(
    spec: JobSpec, cluster: KubeRayCluster, pods: PodCount, checkpoint_bytes: int | None
) -> Grace:
    """What the pod needs that has most to upload: the first rank saves all of a model that is not
    cut; with several trials in a pod each of them saves."""
    held = None
    if checkpoint_bytes is not None:
        ranks = spec.workers.fewest if spec.workers.strategy == "fsdp" else 1
        held = math.ceil(checkpoint_bytes / ranks) * pods.workers_each
    return grace_for(held, bytes_per_second=cluster.upload_mib_per_second * 2**20)


def _ray_cluster(run: _Run) -> Manifest:
    cluster, is_elastic = run.cluster, run.pods.is_elastic
    return {
        "rayVersion": RAY_VERSION,
        **({"authOptions": {"mode": "token"}} if cluster.auth == "token" else {}),
        **(_autoscaling(cluster) if is_elastic else {}),
        "headGroupSpec": {
            "rayStartParams": {
                "dashboard-host": "0.0.0.0",  # noqa: S104 - of the pod; the submitter is another
                # No cores to give, so that no worker is placed there.
                "num-cpus": "0",
                "object-store-memory": str(_OBJECT_STORE_BYTES),
            },
            "template": head_pod(
                cluster,
                run.labels,
                environment=run.driver_environment,
                grace=run.grace,
                has_autoscaler=is_elastic,
            ),
        },
        "workerGroupSpecs": _groups(run),
    }


def _autoscaling(cluster: KubeRayCluster) -> Manifest:
    """A container beside the head that has KubeRay add the pods which the run asks Ray for.

    KubeRay starts a run only once all `replicas` are there. Those of an elastic run are its fewest
    workers; Ray Train and Ray Tune ask for the others meanwhile.
    """
    return {"enableInTreeAutoscaling": True, "autoscalerOptions": autoscaler_options(cluster)}


def _groups(run: _Run) -> list[Manifest]:
    """One group of workers, or two where only those beyond the fewest are on spot nodes."""
    spot, fewest, most = run.cluster.spot, run.pods.fewest, run.pods.most
    if spot is None or not spot.over_min:
        return [_group(run, "workers", fewest=fewest, most=most, on_spot=spot is not None)]
    return [
        _group(run, "workers", fewest=fewest, most=fewest, on_spot=False),
        _group(run, "spot", fewest=0, most=most - fewest, on_spot=True),
    ]


def _group(run: _Run, name: str, *, fewest: int, most: int, on_spot: bool) -> Manifest:
    """Pods in which Ray offers what their workers ask Ray for, no more."""
    workers, each = run.spec.workers, run.pods.workers_each
    memory_gib = None if workers.memory_gib is None else each * workers.memory_gib
    params = {"num-cpus": str(each * workers.cpus)}
    if workers.gpus:
        params["num-gpus"] = str(workers.gpus)
    params["object-store-memory"] = str(_OBJECT_STORE_BYTES)
    if workers.memory_gib is not None:
        params["memory"] = str(each * int(workers.memory_gib * 2**30))
    return {
        "groupName": name,
        "replicas": fewest,
        "minReplicas": fewest,
        "maxReplicas": most,
        "rayStartParams": params,
        "template": worker_pod(
            run.cluster,
            run.labels,
            room=WorkerRoom(
                cpus=each * workers.cpus,
                memory_gib=memory_gib,
                gpus=workers.gpus,
                cache_gib=_cache_gib(run.spec, each),
            ),
            grace=run.grace,
            on_spot=on_spot,
        ),
    }


def _cache_gib(spec: JobSpec, workers_each: int) -> int:
    """Size of a pod's cache volume: a part for rows, and as much for each worker's copies of models
    and checkpoints.

    Rows alone are kept within `data.cache_gib`, and a pod that outgrows its volume is evicted.
    """
    return math.ceil((1 + workers_each) * spec.data.cache_gib)
