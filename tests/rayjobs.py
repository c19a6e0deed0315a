"""Jobs for Kubernetes, one of each kind, and the RayJobs that they become."""

from __future__ import annotations

from typing import Any

from cluster.rayjob import build_rayjob
from jobs.parse import parse_spec
from jobs.spec import JobSpec

KUBERAY: dict[str, Any] = {"kind": "kuberay", "image": "registry.example.com/shoal:0.1.0"}
GPUS: dict[str, Any] = {"count": 4, "cpus": 8, "memory_gib": 30.5, "gpus": 1}
DATA: dict[str, Any] = {"train": "s3://lake/reviews/train", "cache_gib": 2.5}
SEARCHED_DATA = {**DATA, "validation": "s3://lake/reviews/validation"}
SPOT: dict[str, Any] = {"label": "cloud.google.com/gke-spot"}


def on_kuberay(**keys: Any) -> dict[str, Any]:
    """The job file's `cluster`."""
    return {**KUBERAY, **keys}


JOBS: dict[str, dict[str, Any]] = {
    "plain": {},
    "gpus in a queue": {
        "workers": GPUS,
        "cluster": on_kuberay(
            namespace="training",
            queue="team-a",
            queue_priority="urgent",
            service_account="shoal",
            image_pull_secrets=["registry"],
            env_from_secrets=["object-store", "hub"],
            backoff_limit=0,
        ),
    },
    "gpus of a type": {
        "workers": GPUS,
        "cluster": on_kuberay(
            gpu={"resource": "nvidia.com/mig-3g.40gb", "type": "NVIDIA-H100-80GB-HBM3"},
            shared_memory_gib=4,
        ),
    },
    "two to four workers": {"workers": {"count": 4, "min": 2}},
    "two to four workers in a queue": {
        "workers": {"count": 4, "min": 2},
        "cluster": on_kuberay(queue="team-a"),
    },
    "all workers on spot nodes": {"workers": GPUS, "cluster": on_kuberay(spot=SPOT)},
    "more workers on spot nodes": {
        "workers": {**GPUS, "min": 1},
        "cluster": on_kuberay(
            spot={
                "label": "karpenter.sh/capacity-type",
                "value": "spot",
                "taint": "example.com/spot",
                "over_min": True,
            },
            queue="team-a",
        ),
    },
    "placed with care": {
        "workers": GPUS,
        "cluster": on_kuberay(
            head={
                "cpus": 4,
                "memory_gib": 6.5,
                "nodes": {
                    "selector": {"pool": "system"},
                    "tolerations": [{"key": "system", "value": "true", "effect": "NoExecute"}],
                },
            },
            nodes={
                "selector": {"pool": "gpu"},
                "required": [
                    {"label": "node.kubernetes.io/instance-type", "any_of": ["p5", "p4d"]},
                    {"label": "example.com/nvme"},
                ],
                "preferred": [
                    {"label": "topology.kubernetes.io/zone", "any_of": ["a"]},
                    {"label": "example.com/old", "none_of": ["true"]},
                ],
                "tolerations": [{"key": "dedicated", "value": "team-a"}],
            },
            pack="topology.kubernetes.io/zone",
            spread="kubernetes.io/hostname",
            priority_class="training",
        ),
    },
    "a cache on ephemeral volumes": {
        "cluster": on_kuberay(cache={"kind": "ephemeral", "storage_class": "local-nvme"})
    },
    "a cache on a claim": {"cluster": on_kuberay(cache={"kind": "claim", "name": "lake-cache"})},
    "web identity and variables": {
        "cluster": on_kuberay(
            service_account="shoal",
            labels={"azure.workload.identity/use": "true", "team": "search"},
            env_from_config_maps=["tracking"],
            env_secrets={"HF_TOKEN": {"secret": "hub", "key": "token"}},
            image_pull_policy="Always",
        )
    },
    "a study of four trials at a time": {
        "workers": {"count": 2},
        "data": SEARCHED_DATA,
        "search": {"trials": 10, "max_concurrent": 4},
        "cluster": on_kuberay(queue="team-a"),
    },
    "a study that grows": {
        "workers": GPUS | {"count": 1},
        "data": SEARCHED_DATA,
        "search": {"trials": 10, "gpu_share": 0.5},
        "cluster": on_kuberay(queue="team-a"),
    },
    "without tokens": {"cluster": on_kuberay(auth=None)},
    "suspended, with deadlines": {
        "cluster": on_kuberay(
            suspend=True, deadline_minutes=90, start_deadline_minutes=0.5, ttl_seconds=0
        )
    },
    "a store of its own": {
        "store": {
            "uri": "s3://shoal/my runs",
            "access": {"endpoint_url": "https://s3.example.com", "region": "eu-central-1"},
        }
    },
    "cut over eight workers": {"workers": {**GPUS, "count": 8, "strategy": "fsdp"}},
}


def job(kind: str = "plain", **changes: Any) -> JobSpec:
    """The job of that kind, with other keys."""
    tree: dict[str, Any] = {
        "name": "sentiment",
        "task": {"labels": ["negative", "positive"]},
        "model": {"source": "s3://models/minilm"},
        "data": DATA,
        "store": "s3://shoal/runs",
        "cluster": KUBERAY,
    }
    return parse_spec(tree | JOBS[kind] | changes, where="test")


def rayjob(spec: JobSpec, *, run_id: str = "sentiment-a1b2c3", **options: Any) -> dict[str, Any]:
    """What a run of the job becomes."""
    return build_rayjob(spec, run_id=run_id, run_uri=f"{spec.store.uri}/{run_id}", **options)
