"""RayJobs as runs have them, for tests of the client."""

from __future__ import annotations

from typing import Any

from cluster.rayjob import Manifest, build_rayjob
from jobs.parse import parse_spec
from jobs.spec import JobSpec

IMAGE = "registry.example.com/shoal:0.1.0"
RUN_URI = "s3://shoal/runs/sentiment-1"


def kuberay_job(**changes: Any) -> JobSpec:
    tree: dict[str, Any] = {
        "name": "sentiment",
        "task": {"labels": ["negative", "positive"]},
        "model": {"source": "s3://models/minilm"},
        "data": {"train": "s3://lake/reviews/train"},
        "workers": {"count": 2, "memory_gib": 8},
        "store": "s3://shoal/runs",
        "cluster": {"kind": "kuberay", "image": IMAGE},
    }
    return parse_spec(tree | changes, where="test")


def rayjob(name: str = "sentiment-1", *, run_uri: str = RUN_URI, **changes: Any) -> Manifest:
    return build_rayjob(kuberay_job(**changes), run_id=name, run_uri=run_uri)
