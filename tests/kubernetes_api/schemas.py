"""The definitions of KubeRay's and Kueue's kinds as the projects ship them, and what a real API
server refuses by them.

CEL rules are not evaluated: they are tested with the manifests themselves.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft202012Validator

CRDS = Path(__file__).parent.parent.parent.parent / "shared" / "crds"


@dataclass(frozen=True)
class Kind:
    """A kind of objects, as the API names it."""

    group: str
    version: str
    plural: str
    name: str
    is_namespaced: bool = True

    @property
    def api_version(self) -> str:
        return f"{self.group}/{self.version}" if self.group else self.version

    @property
    def resource(self) -> str:
        """`rayjobs.ray.io`, as messages have it."""
        return f"{self.plural}.{self.group}" if self.group else self.plural


RAYJOB = Kind("ray.io", "v1", "rayjobs", "RayJob")
RAYCLUSTER = Kind("ray.io", "v1", "rayclusters", "RayCluster")
WORKLOAD = Kind("kueue.x-k8s.io", "v1beta1", "workloads", "Workload")
POD = Kind("", "v1", "pods", "Pod")
EVENT = Kind("", "v1", "events", "Event")
NAMESPACE = Kind("", "v1", "namespaces", "Namespace", is_namespaced=False)
NODE = Kind("", "v1", "nodes", "Node", is_namespaced=False)
SECRET = Kind("", "v1", "secrets", "Secret")
CONFIG_MAP = Kind("", "v1", "configmaps", "ConfigMap")
SERVICE_ACCOUNT = Kind("", "v1", "serviceaccounts", "ServiceAccount")
CLAIM = Kind("", "v1", "persistentvolumeclaims", "PersistentVolumeClaim")
QUOTA = Kind("", "v1", "resourcequotas", "ResourceQuota")
LIMIT_RANGE = Kind("", "v1", "limitranges", "LimitRange")
DEPLOYMENT = Kind("apps", "v1", "deployments", "Deployment")
BUDGET = Kind("policy", "v1", "poddisruptionbudgets", "PodDisruptionBudget")
STORAGE_CLASS = Kind("storage.k8s.io", "v1", "storageclasses", "StorageClass", is_namespaced=False)
PRIORITY_CLASS = Kind(
    "scheduling.k8s.io", "v1", "priorityclasses", "PriorityClass", is_namespaced=False
)
LOCAL_QUEUE = Kind("kueue.x-k8s.io", "v1beta2", "localqueues", "LocalQueue")
CLUSTER_QUEUE = Kind(
    "kueue.x-k8s.io", "v1beta2", "clusterqueues", "ClusterQueue", is_namespaced=False
)
QUEUE_PRIORITY = Kind(
    "kueue.x-k8s.io",
    "v1beta2",
    "workloadpriorityclasses",
    "WorkloadPriorityClass",
    is_namespaced=False,
)
KINDS = (
    *(RAYJOB, RAYCLUSTER, WORKLOAD, POD, EVENT, NAMESPACE, NODE, SECRET, CONFIG_MAP, CLAIM),
    *(SERVICE_ACCOUNT, QUOTA, LIMIT_RANGE, DEPLOYMENT, BUDGET, STORAGE_CLASS, PRIORITY_CLASS),
    *(LOCAL_QUEUE, CLUSTER_QUEUE, QUEUE_PRIORITY),
)
_FILES = {
    RAYJOB: "kuberay-v1.7.0/ray.io_rayjobs.yaml",
    RAYCLUSTER: "kuberay-v1.7.0/ray.io_rayclusters.yaml",
    WORKLOAD: "kueue-v0.19.2/kueue.x-k8s.io_workloads.yaml",
    LOCAL_QUEUE: "kueue-v0.19.2/kueue.x-k8s.io_localqueues.yaml",
    CLUSTER_QUEUE: "kueue-v0.19.2/kueue.x-k8s.io_clusterqueues.yaml",
    QUEUE_PRIORITY: "kueue-v0.19.2/kueue.x-k8s.io_workloadpriorityclasses.yaml",
}


@cache
def schema_of(kind: Kind) -> dict[str, Any] | None:
    """The OpenAPI schema of a kind; None for those of Kubernetes itself, which are not checked."""
    if kind not in _FILES:
        return None
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    crd = yaml.load((CRDS / _FILES[kind]).read_text(encoding="utf-8"), Loader=loader)
    (version,) = (v for v in crd["spec"]["versions"] if v["name"] == kind.version)
    found: dict[str, Any] = version["schema"]["openAPIV3Schema"]
    return found


def undeclared(kind: Kind, tree: Mapping[str, Any]) -> list[str]:
    """Paths of the fields that the definition does not have: `.spec.enrtypoint`."""
    schema = schema_of(kind)
    return [] if schema is None else list(_undeclared(schema, tree, ""))


def _undeclared(schema: Mapping[str, Any], value: Any, path: str) -> Iterator[str]:
    if path == ".metadata" or schema.get("x-kubernetes-preserve-unknown-fields"):
        return
    if isinstance(value, dict):
        properties = schema.get("properties", {})
        rest = schema.get("additionalProperties")
        for key, inner in value.items():
            if key in properties:
                yield from _undeclared(properties[key], inner, f"{path}.{key}")
            elif isinstance(rest, dict):
                yield from _undeclared(rest, inner, f"{path}.{key}")
            elif not rest:
                yield f"{path}.{key}"
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from _undeclared(schema.get("items", {}), inner, f"{path}[{number}]")


def wrong_values(kind: Kind, tree: Mapping[str, Any]) -> list[dict[str, str]]:
    """Causes of a refusal for fields that do not have a value of their definition."""
    schema = schema_of(kind)
    if schema is None:
        return []
    return [
        {
            "reason": "FieldValueInvalid",
            "field": ".".join(str(part) for part in error.absolute_path) or "<nil>",
            "message": f"Invalid value: {error.message}",
        }
        for error in Draft202012Validator(schema).iter_errors(tree)
    ]


def with_defaults(kind: Kind, tree: dict[str, Any]) -> dict[str, Any]:
    """The object with the defaults of its definition filled in, in place."""
    schema = schema_of(kind)
    if schema is not None:
        _fill(schema, tree)
    return tree


def _fill(schema: Mapping[str, Any], value: Any) -> None:
    if isinstance(value, dict):
        for key, inner in schema.get("properties", {}).items():
            if key not in value and "default" in inner:
                value[key] = inner["default"]
            if key in value:
                _fill(inner, value[key])
    elif isinstance(value, list):
        for item in value:
            _fill(schema.get("items", {}), item)
