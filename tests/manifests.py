"""What a cluster would say of rendered manifests: rules of Kubernetes, KubeRay and Kueue.

    crd_problems            the CRD's schema, unknown fields refused, and its CEL rules
    kubernetes_problems     pods and other objects against Kubernetes' own schemas
    restricted_problems     the Pod Security Standard `restricted`
    kuberay_problems        what KubeRay's operator refuses
    kueue_problems          what Kueue's webhook refuses

Each gives sentences, none where all is well. What KubeRay and Kueue refuse is from
ray-operator/controllers/ray/utils/validation.go of ray-project/kuberay, and pkg/controller/jobs/
rayjob and raycluster of kubernetes-sigs/kueue.
"""

from __future__ import annotations

import functools
import gzip
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import kubernetes_validate
import yaml
from cel import evaluate
from jsonschema import Draft202012Validator

Manifest = Mapping[str, Any]

CRD = Path(__file__).parent / "data" / "ray.io_rayjobs-v1.7.0.yaml.gz"
KUBERNETES_VERSION = "1.33"

_DNS_1035 = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_MOST_POD_SETS = 18
_LEAST_RAY_WITH_TOKENS = (2, 52)

KUBERAY_1_4 = {
    "spec": """activeDeadlineSeconds backoffLimit clusterSelector deletionStrategy entrypoint
        entrypointNumCpus entrypointNumGpus entrypointResources jobId managedBy metadata
        rayClusterSpec runtimeEnvYAML shutdownAfterJobFinishes submissionMode submitterConfig
        submitterPodTemplate suspend ttlSecondsAfterFinished""",
    "cluster": """autoscalerOptions enableInTreeAutoscaling gcsFaultToleranceOptions headGroupSpec
        headServiceAnnotations managedBy rayVersion suspend workerGroupSpecs""",
    "head": "enableIngress headService rayStartParams serviceType template",
    "workers": """groupName idleTimeoutSeconds maxReplicas minReplicas numOfHosts rayStartParams
        replicas scaleStrategy suspend template""",
    "autoscaler": """env envFrom idleTimeoutSeconds image imagePullPolicy resources securityContext
        upscalingMode version volumeMounts""",
}
"""Fields of ray.io/v1 as KubeRay 1.4 has it, of a RayJob's spec and the parts of its cluster."""


def groups_of(rayjob: Manifest) -> list[Any]:
    """The groups of workers."""
    return list(rayjob["spec"]["rayClusterSpec"]["workerGroupSpecs"])


def templates_of(rayjob: Manifest) -> list[Any]:
    """Templates of the pods of submitter, head and workers."""
    cluster = rayjob["spec"]["rayClusterSpec"]
    return [
        rayjob["spec"]["submitterPodTemplate"],
        cluster["headGroupSpec"]["template"],
        *(group["template"] for group in groups_of(rayjob)),
    ]


# ---------------------------------------------------------------------------------- the CRD


def crd_problems(rayjob: Manifest) -> list[str]:
    schema = crd_schema()
    found = [
        f"{error.json_path}: {error.message}"
        for error in Draft202012Validator(schema).iter_errors(rayjob)
    ]
    return found + list(_cel_problems(schema, rayjob, "$"))


@functools.cache
def crd_schema() -> dict[str, Any]:
    """The schema of a RayJob of ray.io/v1, made to refuse the fields that Kubernetes would drop."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    crd = yaml.load(gzip.decompress(CRD.read_bytes()), Loader=loader)
    (version,) = (v for v in crd["spec"]["versions"] if v["name"] == "v1")
    found: dict[str, Any] = version["schema"]["openAPIV3Schema"]
    # An API server knows these of every object.
    found["properties"]["metadata"] = {
        "type": "object",
        "properties": {
            "name": {"type": "string"},
            "namespace": {"type": "string"},
            "labels": {"type": "object", "additionalProperties": {"type": "string"}},
            "annotations": {"type": "object", "additionalProperties": {"type": "string"}},
        },
    }
    _refuse_unknown_fields(found)
    return found


def _refuse_unknown_fields(schema: Any) -> None:
    if isinstance(schema, dict):
        if "properties" in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
            schema.setdefault("additionalProperties", False)
        for inner in list(schema.values()):
            _refuse_unknown_fields(inner)
    elif isinstance(schema, list):
        for inner in schema:
            _refuse_unknown_fields(inner)


def _cel_problems(schema: Manifest, value: Any, path: str) -> Iterator[str]:
    """Rules of what is there; those of a change (oldSelf) have nothing to compare."""
    for rule in schema.get("x-kubernetes-validations", ()):
        if "oldSelf" not in rule["rule"] and evaluate(rule["rule"], {"self": value}) is not True:
            yield f"{path}: {rule['message']}"
    if isinstance(value, Mapping):
        properties, others = schema.get("properties", {}), schema.get("additionalProperties")
        for key, inner in value.items():
            below = properties.get(key, others)
            if isinstance(below, Mapping):
                yield from _cel_problems(below, inner, f"{path}.{key}")
    elif isinstance(value, list) and "items" in schema:
        for place, inner in enumerate(value):
            yield from _cel_problems(schema["items"], inner, f"{path}[{place}]")


# ----------------------------------------------------------------------------------- Kubernetes


def pods_problems(rayjob: Manifest) -> list[str]:
    """What is wrong with its pods for Kubernetes' own schemas and rules."""
    pods = [{"apiVersion": "v1", "kind": "Pod", **template} for template in templates_of(rayjob)]
    found = kubernetes_problems({"apiVersion": "v1", "kind": "PodList", "items": pods})
    for pod in pods:
        found += _volume_problems(pod["spec"])
        found += label_problems(pod["metadata"]["labels"])
    return found


def kubernetes_problems(manifest: Manifest) -> list[str]:
    try:
        kubernetes_validate.validate(dict(manifest), KUBERNETES_VERSION, strict=True)
    except kubernetes_validate.ValidationError as error:
        return [f"{error.json_path}: {error.message}"]
    return []


def _volume_problems(pod: Manifest) -> list[str]:
    """Each mount has its volume, each volume its mount, and no folder or variable is there
    twice."""
    names = {volume["name"] for volume in pod["volumes"]}
    found = []
    for container in pod["containers"]:
        mounts = container["volumeMounts"]
        if {mount["name"] for mount in mounts} != names:
            found.append(f"{container['name']} mounts {mounts}, but the pod has {sorted(names)}")
        folders = [mount["mountPath"] for mount in mounts]
        variables = [variable["name"] for variable in container.get("env", ())]
        for listed in (folders, variables):
            if len(set(listed)) < len(listed):
                found.append(f"{container['name']} has one of {listed} twice")
    return found


def label_problems(labels: Mapping[str, str]) -> list[str]:
    value = re.compile(r"([A-Za-z0-9]([-_.A-Za-z0-9]{0,61}[A-Za-z0-9])?)?")
    return [f"label {k}: {v!r} is no value" for k, v in labels.items() if not value.fullmatch(v)]


def restricted_problems(pod: Manifest) -> list[str]:
    """By https://kubernetes.io/docs/concepts/security/pod-security-standards/#restricted."""
    of_pod = pod.get("securityContext", {})
    found = [f"the pod has {key}" for key in ("hostNetwork", "hostPID", "hostIPC") if pod.get(key)]
    allowed = {
        "configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim",
        "projected", "secret",
    }  # fmt: skip
    for volume in pod.get("volumes", ()):
        if not set(volume) - {"name"} <= allowed:
            found.append(f"the volume {volume['name']} is of a kind that is not allowed")
    for container in [*pod["containers"], *pod.get("initContainers", ())]:
        own = container.get("securityContext", {})
        both = {**of_pod, **own}
        capabilities = own.get("capabilities", {})
        wrong = {
            "is privileged": own.get("privileged"),
            "may escalate": own.get("allowPrivilegeEscalation") is not False,
            "may be root": both.get("runAsNonRoot") is not True or both.get("runAsUser") == 0,
            "has no seccomp profile": both.get("seccompProfile", {}).get("type")
            not in ("RuntimeDefault", "Localhost"),
            "keeps capabilities": "ALL" not in capabilities.get("drop", ()),
            "adds capabilities": set(capabilities.get("add", ())) - {"NET_BIND_SERVICE"},
            "has ports of the host": any(p.get("hostPort") for p in container.get("ports", ())),
            "masks no part of /proc": own.get("procMount", "Default") != "Default",
        }
        found += [f"{container['name']} {what}" for what, is_so in wrong.items() if is_so]
    return found


# --------------------------------------------------------------------------- KubeRay and Kueue


def kuberay_problems(rayjob: Manifest) -> list[str]:
    name, spec = rayjob["metadata"]["name"], rayjob["spec"]
    cluster = spec["rayClusterSpec"]
    head, groups = cluster["headGroupSpec"], cluster["workerGroupSpecs"]
    deletion, auth = spec.get("deletionStrategy", {}), cluster.get("authOptions", {})
    version = tuple(int(part) for part in cluster.get("rayVersion", "0").split(".")[:2])
    scales = cluster.get("enableInTreeAutoscaling", False)
    head_variables = {v["name"] for v in head["template"]["spec"]["containers"][0].get("env", ())}
    wrong = {
        "the name is no DNS-1035 label of at most 47 characters": len(name) > 47
        or not _DNS_1035.fullmatch(name),
        "it is suspended without shutdownAfterJobFinishes": spec.get("suspend")
        and not spec.get("shutdownAfterJobFinishes"),
        "ttlSecondsAfterFinished needs shutdownAfterJobFinishes": spec.get(
            "ttlSecondsAfterFinished", 0
        )
        and not spec.get("shutdownAfterJobFinishes"),
        "ttlSecondsAfterFinished is negative": spec.get("ttlSecondsAfterFinished", 0) < 0,
        "deletionRules and shutdownAfterJobFinishes are both there": deletion.get("deletionRules")
        and spec.get("shutdownAfterJobFinishes"),
        "clusterSelector and suspend are both there": spec.get("clusterSelector")
        and spec.get("suspend"),
        "backoffLimit is negative": spec.get("backoffLimit", 0) < 0,
        "a deadline is not positive": any(
            spec.get(key, 1) <= 0 for key in ("activeDeadlineSeconds", "preRunningDeadlineSeconds")
        ),
        "tokens need rayVersion 2.52 or later": auth.get("mode") == "token"
        and version < _LEAST_RAY_WITH_TOKENS,
        "enableK8sTokenAuth is not for RayJobs": auth.get("enableK8sTokenAuth"),
        "a group has replicas outside of its bounds": any(
            not g["minReplicas"] <= g["replicas"] <= g["maxReplicas"] for g in groups
        ),
        "two groups have one name": len({g["groupName"] for g in groups}) < len(groups),
        "resources are given twice": any(
            g.get("resources") and g["rayStartParams"].get("num-cpus") for g in [head, *groups]
        ),
        "labels are parameters of ray start": any(
            "labels" in g["rayStartParams"] for g in [head, *groups]
        ),
        "a group is suspended beside an autoscaler": scales
        and any(g.get("suspend") for g in groups),
        "a pod of an autoscaled cluster restarts": scales
        and any(
            t["spec"].get("restartPolicy", "Never") != "Never" for t in templates_of(rayjob)[1:]
        ),
        "Redis is set by a variable": head_variables & {"RAY_REDIS_ADDRESS", "REDIS_USERNAME"},
    }
    return [what for what, is_so in wrong.items() if is_so]


def kueue_problems(rayjob: Manifest) -> list[str]:
    metadata, spec = rayjob["metadata"], rayjob["spec"]
    if "kueue.x-k8s.io/queue-name" not in metadata["labels"]:
        return []
    cluster, groups = spec["rayClusterSpec"], groups_of(rayjob)
    slices = metadata["annotations"].get("kueue.x-k8s.io/elastic-job") == "true"
    wrong = {
        "the cluster is not shut down": not spec.get("shutdownAfterJobFinishes"),
        "it uses a cluster that is there": spec.get("clusterSelector"),
        "it scales without slices of workload": cluster.get("enableInTreeAutoscaling")
        and not slices,
        "it has more than 17 groups of workers": len(groups) + 1 > _MOST_POD_SETS,
        "a group is called head": any(g["groupName"] == "head" for g in groups),
    }
    return [what for what, is_so in wrong.items() if is_so]


def unknown_to_kuberay_1_4(rayjob: Manifest) -> set[str]:
    """Fields of the manifest that KubeRay 1.4 does not know."""
    spec = rayjob["spec"]
    cluster = spec["rayClusterSpec"]
    parts = {
        "spec": [spec],
        "cluster": [cluster],
        "head": [cluster["headGroupSpec"]],
        "workers": cluster["workerGroupSpecs"],
        "autoscaler": [cluster.get("autoscalerOptions", {})],
    }
    return {
        field
        for part, held in parts.items()
        for one in held
        for field in set(one) - set(KUBERAY_1_4[part].split())
    }
