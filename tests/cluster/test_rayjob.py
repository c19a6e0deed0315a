"""RayJobs of several jobs: valid for KubeRay's own schema, safe, and what the job asks for."""

from __future__ import annotations

import gzip
import json
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator as Validator
from jsonschema import ValidationError

from cluster.rayjob import build_rayjob
from jobs.errors import SpecError
from jobs.parse import load_spec, parse_spec
from jobs.record import Past
from jobs.run import TAKEN_SECONDS
from jobs.spec import JobSpec, StoreAccess

ROOT = Path(__file__).parent.parent.parent
EXAMPLES = ROOT / "k8s" / "examples"
CRD = ROOT / "tests" / "data" / "ray.io_rayjobs-v1.7.0.yaml.gz"
KUBERAY = {"kind": "kuberay", "image": "registry.example.com/shoal:0.1.0"}

JOBS: dict[str, dict[str, Any]] = {
    "plain": {},
    "gpus in a queue": {
        "workers": {"count": 4, "cpus": 8, "memory_gib": 30.5, "gpus": 1},
        "cluster": {
            **KUBERAY,
            "namespace": "training",
            "queue": "team-a",
            "service_account": "shoal",
            "image_pull_secrets": ["registry"],
            "env_from_secrets": ["object-store", "hub"],
            "backoff_limit": 0,
        },
    },
    "from two to four workers in a queue": {
        "workers": {"count": 4, "min": 2},
        "cluster": {**KUBERAY, "queue": "team-a"},
    },
    "a store of its own": {
        "store": {
            "uri": "s3://shoal/my runs",
            "access": {"endpoint_url": "https://s3.example.com", "region": "eu-central-1"},
        }
    },
}


def job(**changes: Any) -> JobSpec:
    tree: dict[str, Any] = {
        "name": "sentiment",
        "task": {"labels": ["negative", "positive"]},
        "model": {"source": "s3://models/minilm"},
        "data": {"train": "s3://lake/reviews/train", "cache_gib": 2.5},
        "store": "s3://shoal/runs",
        "cluster": KUBERAY,
    }
    return parse_spec(tree | changes, where="test")


def rayjob(spec: JobSpec, **options: Any) -> dict[str, Any]:
    return build_rayjob(
        spec, run_id="sentiment-a1b2c3", run_uri=f"{spec.store.uri}/sentiment-a1b2c3", **options
    )


def groups(manifest: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The head group and the only worker group."""
    cluster = manifest["spec"]["rayClusterSpec"]
    (workers,) = cluster["workerGroupSpecs"]
    return cluster["headGroupSpec"], workers


def pods(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """Specs of the pods of submitter, head and workers."""
    templates = [
        manifest["spec"]["submitterPodTemplate"],
        *(g["template"] for g in groups(manifest)),
    ]
    return [template["spec"] for template in templates]


@pytest.fixture(scope="module")
def schema() -> Validator:
    """The CRD's schema of ray.io/v1, made to refuse the fields that Kubernetes would drop."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    crd = yaml.load(gzip.decompress(CRD.read_bytes()), Loader=loader)
    (version,) = (v for v in crd["spec"]["versions"] if v["name"] == "v1")
    found: dict[str, Any] = version["schema"]["openAPIV3Schema"]
    _refuse_unknown_fields(found)
    return Validator(found)


def _refuse_unknown_fields(schema: Any) -> None:
    if isinstance(schema, dict):
        if "properties" in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
            schema.setdefault("additionalProperties", False)
        for inner in list(schema.values()):
            _refuse_unknown_fields(inner)
    elif isinstance(schema, list):
        for inner in schema:
            _refuse_unknown_fields(inner)


# ---------------------------------------------------------------------------------------- validity


@pytest.mark.parametrize("changes", JOBS.values(), ids=JOBS)
def test_the_manifest_is_valid_for_kuberay(changes: dict[str, Any], schema: Validator) -> None:
    schema.validate(rayjob(job(**changes)))


def test_the_schema_would_refuse_an_unknown_field(schema: Validator) -> None:
    manifest = rayjob(job())
    pods(manifest)[1]["containers"][0]["volumeMount"] = []
    with pytest.raises(ValidationError, match="volumeMount"):
        schema.validate(manifest)


@pytest.mark.parametrize("changes", JOBS.values(), ids=JOBS)
def test_the_same_job_gives_the_same_text(changes: dict[str, Any]) -> None:
    texts = {yaml.safe_dump(rayjob(job(**changes)), sort_keys=False) for _ in range(2)}
    assert len(texts) == 1
    assert "&id" not in texts.pop()


def test_each_mounted_volume_exists() -> None:
    for pod in pods(rayjob(job()))[1:]:
        (container,) = pod["containers"]
        mounted = [mount["name"] for mount in container["volumeMounts"]]
        assert mounted == [volume["name"] for volume in pod["volumes"]]


def test_the_example_in_the_repository_is_current() -> None:
    spec = load_spec(EXAMPLES / "sentiment.yaml")
    made = build_rayjob(spec, run_id="sentiment", run_uri="s3://shoal/runs/sentiment")
    assert yaml.safe_load((EXAMPLES / "sentiment-rayjob.yaml").read_text()) == made, (
        "run: shoal render k8s/examples/sentiment.yaml > k8s/examples/sentiment-rayjob.yaml"
    )


# ----------------------------------------------------------------------------------- what it holds


def test_the_run_names_the_rayjob_and_kubernetes_finds_the_run() -> None:
    metadata = rayjob(job(**JOBS["gpus in a queue"]))["metadata"]
    assert (metadata["name"], metadata["namespace"]) == ("sentiment-a1b2c3", "training")
    assert metadata["labels"]["kueue.x-k8s.io/queue-name"] == "team-a"
    assert metadata["annotations"] == {"shoal/run": "s3://shoal/runs/sentiment-a1b2c3"}
    assert "kueue.x-k8s.io/queue-name" not in rayjob(job())["metadata"]["labels"]


def test_each_worker_is_a_pod_in_which_it_fits_alone() -> None:
    _, workers = groups(rayjob(job(**JOBS["gpus in a queue"])))
    assert {workers[key] for key in ("replicas", "minReplicas", "maxReplicas")} == {4}
    assert workers["rayStartParams"]["num-cpus"] == "8"
    assert workers["rayStartParams"]["memory"] == str(int(30.5 * 2**30))
    (container,) = workers["template"]["spec"]["containers"]
    limits = {"cpu": "8", "memory": f"{31 * 1024 + 512}Mi", "nvidia.com/gpu": "1"}
    assert container["resources"]["limits"] == limits
    assert container["resources"]["requests"] == {**limits, "ephemeral-storage": "5Gi"}


def test_a_worker_without_a_memory_limit_asks_for_none() -> None:
    _, workers = groups(rayjob(job()))
    (container,) = workers["template"]["spec"]["containers"]
    assert container["resources"]["limits"] == {"cpu": "1"}
    assert "memory" not in workers["rayStartParams"]


def test_the_head_trains_nothing() -> None:
    head, _ = groups(rayjob(job(**JOBS["gpus in a queue"])))
    assert head["rayStartParams"]["num-cpus"] == "0"
    assert "nvidia.com/gpu" not in json.dumps(head)


def test_the_workers_cache_has_a_volume_of_twice_its_rows() -> None:
    _, workers = groups(rayjob(job()))
    pod = workers["template"]["spec"]
    environment = {e["name"]: e["value"] for e in pod["containers"][0]["env"]}
    mounts = {m["name"]: m["mountPath"] for m in pod["containers"][0]["volumeMounts"]}
    volumes = {v["name"]: v["emptyDir"] for v in pod["volumes"]}
    assert environment["SHOAL_CACHE"] == mounts["cache"]
    assert volumes["cache"] == {"sizeLimit": "5Gi"}
    assert mounts["shared-memory"] == "/dev/shm"
    assert volumes["shared-memory"]["medium"] == "Memory"


@pytest.mark.parametrize("changes", JOBS.values(), ids=JOBS)
def test_no_pod_may_more_than_it_needs(changes: dict[str, Any]) -> None:
    """As the Pod Security Standard `restricted` demands."""
    for pod in pods(rayjob(job(**changes))):
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in pod["containers"]:
            context = container["securityContext"]
            assert context["allowPrivilegeEscalation"] is False
            assert context["capabilities"] == {"drop": ["ALL"]}


@pytest.mark.parametrize("changes", JOBS.values(), ids=JOBS)
def test_no_pod_speaks_to_kubernetes_but_the_head_whose_autoscaler_asks_for_pods(
    changes: dict[str, Any],
) -> None:
    submitter, head, workers = pods(rayjob(job(**changes)))
    is_elastic = "min" in changes.get("workers", {})
    assert head["automountServiceAccountToken"] is is_elastic
    assert submitter["automountServiceAccountToken"] is False
    assert workers["automountServiceAccountToken"] is False


def test_an_elastic_run_starts_with_its_fewest_workers_and_asks_for_more() -> None:
    manifest = rayjob(job(**JOBS["from two to four workers in a queue"]))
    _, workers = groups(manifest)
    assert (workers["replicas"], workers["minReplicas"], workers["maxReplicas"]) == (2, 2, 4)
    cluster = manifest["spec"]["rayClusterSpec"]
    assert cluster["enableInTreeAutoscaling"] is True
    context = cluster["autoscalerOptions"]["securityContext"]
    assert context == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    assert manifest["metadata"]["annotations"]["kueue.x-k8s.io/elastic-job"] == "true"


def test_a_run_of_a_fixed_size_has_no_autoscaler() -> None:
    manifest = rayjob(job(**JOBS["gpus in a queue"]))
    assert "enableInTreeAutoscaling" not in manifest["spec"]["rayClusterSpec"]
    assert "kueue.x-k8s.io/elastic-job" not in manifest["metadata"]["annotations"]


def test_pods_have_time_to_save() -> None:
    """The workers to save, the driver to write that down, Ray to end its node, in this order."""
    for pod in pods(rayjob(job()))[1:]:
        environment = {e["name"]: e["value"] for e in pod["containers"][0]["env"]}
        drain_seconds = float(environment["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"])
        assert TAKEN_SECONDS < drain_seconds < pod["terminationGracePeriodSeconds"]


def test_secrets_are_named_for_head_and_workers_only() -> None:
    submitter, head, workers = pods(rayjob(job(**JOBS["gpus in a queue"])))
    for pod in (head, workers):
        assert pod["containers"][0]["envFrom"] == [
            {"secretRef": {"name": "object-store"}},
            {"secretRef": {"name": "hub"}},
        ]
        assert pod["serviceAccountName"] == "shoal"
    assert "envFrom" not in submitter["containers"][0]
    assert "serviceAccountName" not in submitter
    assert all(p["imagePullSecrets"] == [{"name": "registry"}] for p in (submitter, head, workers))


def test_kuberay_retries_the_run_on_a_new_cluster_and_the_submitter_on_its_own() -> None:
    spec = rayjob(job(**JOBS["gpus in a queue"]))["spec"]
    assert spec["backoffLimit"] == 0
    assert spec["submitterConfig"]["backoffLimit"] > 0
    assert spec["submitterPodTemplate"]["spec"]["restartPolicy"] == "Never"
    assert spec["shutdownAfterJobFinishes"] is True
    assert spec["ttlSecondsAfterFinished"] > 0
    assert rayjob(job())["spec"]["backoffLimit"] == 2


# -------------------------------------------------------------------------------------- entrypoint


def test_the_entrypoint_is_the_driver_of_the_run() -> None:
    assert rayjob(job())["spec"]["entrypoint"] == (
        "python -m jobs.run s3://shoal/runs/sentiment-a1b2c3"
    )
    again = rayjob(job(), past=Past(controls=3, generation=2))["spec"]["entrypoint"]
    assert again.endswith(" --past-controls 3 --past-generation 2")


@pytest.mark.parametrize("joined_by", [shlex.join, subprocess.list2cmdline])
def test_the_entrypoint_survives_both_shells(joined_by: Any) -> None:
    """KubeRay's submitter reads it with bash; Ray joins the words again, for another shell."""
    spec = job(**JOBS["a store of its own"])
    submitted = _words_in_bash(rayjob(spec)["spec"]["entrypoint"])
    driver = _words_in_bash(joined_by(submitted))
    assert driver[:3] == ["python", "-m", "jobs.run"]
    assert driver[3] == "s3://shoal/my runs/sentiment-a1b2c3"
    assert StoreAccess.model_validate_json(driver[driver.index("--store-access") + 1]) == (
        spec.store.access
    )


def _words_in_bash(command: str) -> list[str]:
    printf = f"printf '%s\\0' {command}"
    done = subprocess.run(["bash", "-ce", printf], capture_output=True, text=True, check=True)
    return done.stdout.split("\0")[:-1]


def test_a_local_job_has_no_rayjob() -> None:
    with pytest.raises(SpecError) as error:
        rayjob(job(cluster={"kind": "local"}))
    assert error.value.problems[0].message == (
        "cluster.kind is local, so there is no RayJob to render"
    )
    assert "--set 'cluster={kind: kuberay" in (error.value.problems[0].hint or "")
