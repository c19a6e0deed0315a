"""RayJobs of several jobs: what the job asks for, and nothing else."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from cluster.disruption import disruption_budgets
from cluster.rayjob import RAY_VERSION, build_rayjob, driver_environment, label_value, past_of
from jobs import run
from jobs.errors import SpecError
from jobs.parse import load_spec
from jobs.record import NOTHING_PAST, Past
from jobs.spec import StoreAccess
from tests.manifests import groups_of, templates_of
from tests.rayjobs import GPUS, JOBS, SPOT, job, on_kuberay, rayjob

ROOT = Path(__file__).parent.parent.parent
EXAMPLES = sorted((ROOT / "k8s" / "examples").glob("*-rayjob.yaml"))
GIB = 2**30

Pod = dict[str, Any]


def pods(made: dict[str, Any]) -> list[Pod]:
    """Specs of the pods of submitter, head and workers."""
    return [template["spec"] for template in templates_of(made)]


def workers(kind: str, **changes: Any) -> tuple[dict[str, Any], Pod]:
    """The only group of workers of the job of that kind, and its pod."""
    (group,) = groups_of(rayjob(job(kind, **changes)))
    return group, group["template"]["spec"]


def container(pod: Pod) -> dict[str, Any]:
    (only,) = pod["containers"]
    return dict(only)


def environment(pod: Pod) -> dict[str, Any]:
    return {v["name"]: v.get("value", v.get("valueFrom")) for v in container(pod)["env"]}


def volumes(pod: Pod) -> dict[str, Any]:
    """What each folder of the pod's container is made of."""
    made = {v["name"]: {k: s for k, s in v.items() if k != "name"} for v in pod["volumes"]}
    return {m["mountPath"]: made[m["name"]] for m in container(pod)["volumeMounts"]}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_examples_in_the_repository_are_current(path: Path) -> None:
    name = path.name.removesuffix("-rayjob.yaml")
    spec = load_spec(path.with_name(f"{name}.yaml"))
    made = build_rayjob(spec, run_id=spec.name, run_uri=f"{spec.store.uri}/{spec.name}")
    shown = list(yaml.safe_load_all(path.read_text()))
    assert shown == [made, *disruption_budgets(made)], (
        f"run: shoal render k8s/examples/{name}.yaml > k8s/examples/{name}-rayjob.yaml"
    )


# ------------------------------------------------------------------------- names, labels, queue


def test_the_run_names_the_rayjob_and_kubernetes_finds_the_run() -> None:
    metadata = rayjob(job("gpus in a queue"))["metadata"]
    assert (metadata["name"], metadata["namespace"]) == ("sentiment-a1b2c3", "training")
    assert metadata["labels"]["kueue.x-k8s.io/queue-name"] == "team-a"
    assert metadata["labels"]["kueue.x-k8s.io/priority-class"] == "urgent"
    assert metadata["annotations"] == {"shoal/run": "s3://shoal/runs/sentiment-a1b2c3"}
    assert not [label for label in rayjob(job())["metadata"]["labels"] if "kueue" in label]


def test_all_objects_say_whose_they_are() -> None:
    made = rayjob(job("web identity and variables"), user="alice@example.com")
    ours = {
        "team": "search",
        "app.kubernetes.io/instance": "sentiment-a1b2c3",
        "shoal/job": "sentiment",
        "shoal/user": "alice-example.com",
    }
    objects = [made, *templates_of(made), *disruption_budgets(made)]
    for held in objects:
        labels = held["metadata"]["labels"]
        assert ours.items() <= labels.items()
        assert re.fullmatch(r"\d+\.\d+\.\d+.*", labels["app.kubernetes.io/version"])
    roles = [t["metadata"]["labels"]["app.kubernetes.io/component"] for t in templates_of(made)]
    assert roles == ["submitter", "head", "worker"]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("alice", "alice"),
        ("CORP\\alice", "CORP-alice"),
        ("-a b-", "a-b"),
        ("x" * 62 + "-y", "x" * 62),
    ],
)
def test_any_text_becomes_a_label(text: str, value: str) -> None:
    assert label_value(text) == value


def test_ray_is_that_of_the_image() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (ray,) = (r for r in project["optional-dependencies"]["train"] if r.startswith("ray["))
    assert re.search(r">=([\d.]+)", ray)[1] == RAY_VERSION.removesuffix(".0")  # type: ignore[index]
    assert rayjob(job())["spec"]["rayClusterSpec"]["rayVersion"] == RAY_VERSION


def test_who_speaks_to_ray_needs_a_token_unless_kuberay_knows_none() -> None:
    cluster = rayjob(job())["spec"]["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"}
    assert "authOptions" not in rayjob(job("without tokens"))["spec"]["rayClusterSpec"]


# ------------------------------------------------------------------------ resources and groups


def test_each_worker_is_a_pod_in_which_it_fits_alone() -> None:
    group, pod = workers("gpus in a queue")
    assert {group[key] for key in ("replicas", "minReplicas", "maxReplicas")} == {4}
    params = group["rayStartParams"]
    assert (params["num-cpus"], params["num-gpus"]) == ("8", "1")
    assert params["memory"] == str(int(30.5 * GIB))
    limits = {"cpu": "8", "memory": f"{31 * 1024 + 512}Mi", "nvidia.com/gpu": "1"}
    assert container(pod)["resources"]["limits"] == limits
    assert container(pod)["resources"]["requests"] == {**limits, "ephemeral-storage": "5Gi"}


def test_a_gpu_has_the_resource_and_the_type_that_the_job_names() -> None:
    _, pod = workers("gpus of a type")
    limits = container(pod)["resources"]["limits"]
    assert limits["nvidia.com/mig-3g.40gb"] == "1"
    assert "nvidia.com/gpu" not in limits
    assert limits["memory"] == "35Gi"  # with shared memory, which counts
    assert pod["nodeSelector"] == {"nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3"}
    assert pod["tolerations"] == [{"key": "nvidia.com/mig-3g.40gb", "operator": "Exists"}]
    assert volumes(pod)["/dev/shm"] == {"emptyDir": {"medium": "Memory", "sizeLimit": "4096Mi"}}


def test_a_worker_without_a_memory_limit_asks_for_none() -> None:
    group, pod = workers("plain")
    assert container(pod)["resources"]["limits"] == {"cpu": "1"}
    assert not {"memory", "num-gpus"} & set(group["rayStartParams"])
    assert not {"nodeSelector", "tolerations", "affinity", "topologySpreadConstraints"} & set(pod)


def test_the_head_trains_nothing_and_is_as_large_as_the_job_says() -> None:
    for kind in JOBS:
        head = rayjob(job(kind))["spec"]["rayClusterSpec"]["headGroupSpec"]
        assert head["rayStartParams"]["num-cpus"] == "0"
        assert "nvidia.com" not in json.dumps(head)
    _, head, _ = pods(rayjob(job("placed with care")))
    assert container(head)["resources"]["limits"] == {"cpu": "4", "memory": "6656Mi"}


def test_an_elastic_run_starts_with_its_fewest_workers_and_asks_for_more() -> None:
    for kind in ("two to four workers", "two to four workers in a queue"):
        made = rayjob(job(kind))
        (group,) = groups_of(made)
        assert (group["replicas"], group["minReplicas"], group["maxReplicas"]) == (2, 2, 4)
        cluster = made["spec"]["rayClusterSpec"]
        assert cluster["enableInTreeAutoscaling"] is True
        security = container(pods(made)[1])["securityContext"]
        assert cluster["autoscalerOptions"]["securityContext"] == security
        assert cluster["autoscalerOptions"]["version"] == "v2"
        elastic = made["metadata"]["annotations"].get("kueue.x-k8s.io/elastic-job")
        assert elastic == ("true" if "queue" in kind else None)


def test_a_run_of_a_fixed_size_has_no_autoscaler() -> None:
    made = rayjob(job("gpus in a queue"))
    assert "enableInTreeAutoscaling" not in made["spec"]["rayClusterSpec"]
    assert "kueue.x-k8s.io/elastic-job" not in made["metadata"]["annotations"]


def test_a_study_has_the_pods_of_its_trials() -> None:
    made = rayjob(job("a study of four trials at a time"))
    (group,) = groups_of(made)
    assert (group["minReplicas"], group["maxReplicas"]) == (8, 8)  # of two workers each
    assert "enableInTreeAutoscaling" not in made["spec"]["rayClusterSpec"]


def test_a_study_without_a_limit_grows_from_one_trial() -> None:
    made = rayjob(job("a study that grows"))
    (group,) = groups_of(made)
    # Two trials share a GPU, and with it a pod.
    assert (group["replicas"], group["minReplicas"], group["maxReplicas"]) == (1, 1, 5)
    assert group["rayStartParams"]["num-cpus"] == "16"
    limits = container(group["template"]["spec"])["resources"]["limits"]
    assert limits == {"cpu": "16", "memory": "62Gi", "nvidia.com/gpu": "1"}
    assert volumes(group["template"]["spec"])["/cache"] == {"emptyDir": {"sizeLimit": "8Gi"}}
    assert made["spec"]["rayClusterSpec"]["enableInTreeAutoscaling"] is True
    assert made["metadata"]["annotations"]["kueue.x-k8s.io/elastic-job"] == "true"


# ----------------------------------------------------------------------------------- nodes

OFF_SPOT = {"key": "cloud.google.com/gke-spot", "operator": "NotIn", "values": ["true"]}


def required(pod: Pod) -> list[Any]:
    affinity = pod.get("affinity", {}).get("nodeAffinity", {})
    terms = affinity.get("requiredDuringSchedulingIgnoredDuringExecution", {})
    return [e for t in terms.get("nodeSelectorTerms", ()) for e in t["matchExpressions"]]


def test_workers_are_on_spot_nodes_and_the_head_is_not() -> None:
    submitter, head, worker = pods(rayjob(job("all workers on spot nodes")))
    for pod in (submitter, head):
        assert required(pod) == [OFF_SPOT]
        assert "tolerations" not in pod
    assert worker["nodeSelector"] == {"cloud.google.com/gke-spot": "true"}
    assert {"key": "cloud.google.com/gke-spot", "operator": "Exists"} in worker["tolerations"]
    assert required(worker) == []


def test_the_head_may_be_on_spot_nodes_where_the_job_says_so() -> None:
    made = rayjob(job(cluster=on_kuberay(spot={**SPOT, "head": True})))
    for pod in pods(made)[:2]:
        assert required(pod) == []
        assert pod["tolerations"] == [{"key": "cloud.google.com/gke-spot", "operator": "Exists"}]
        assert "nodeSelector" not in pod


def test_only_workers_beyond_the_fewest_are_on_spot_nodes_where_the_job_says_so() -> None:
    made = rayjob(job("more workers on spot nodes"))
    stays, goes = groups_of(made)
    sizes = [(g["replicas"], g["minReplicas"], g["maxReplicas"]) for g in (stays, goes)]
    assert sizes == [(1, 1, 1), (0, 0, 3)]
    assert stays["rayStartParams"] == goes["rayStartParams"]
    label = "karpenter.sh/capacity-type"
    off = {"key": label, "operator": "NotIn", "values": ["spot"]}
    assert required(stays["template"]["spec"]) == required(pods(made)[1]) == [off]
    assert goes["template"]["spec"]["nodeSelector"] == {label: "spot"}
    tainted = {"key": "example.com/spot", "operator": "Exists"}
    assert tainted in goes["template"]["spec"]["tolerations"]
    assert tainted not in stays["template"]["spec"]["tolerations"]


def test_pods_are_placed_as_the_job_says() -> None:
    submitter, head, worker = pods(rayjob(job("placed with care")))
    for pod in (submitter, head):
        assert pod["nodeSelector"] == {"pool": "system"}
        assert pod["tolerations"] == [
            {"key": "system", "operator": "Equal", "value": "true", "effect": "NoExecute"}
        ]
        assert "affinity" not in pod
    assert worker["nodeSelector"] == {"pool": "gpu"}
    assert worker["tolerations"] == [
        {"key": "dedicated", "operator": "Equal", "value": "team-a"},
        {"key": "nvidia.com/gpu", "operator": "Exists"},
    ]
    assert required(worker) == [
        {"key": "node.kubernetes.io/instance-type", "operator": "In", "values": ["p5", "p4d"]},
        {"key": "example.com/nvme", "operator": "Exists"},
    ]
    preferred = worker["affinity"]["nodeAffinity"][
        "preferredDuringSchedulingIgnoredDuringExecution"
    ]
    assert [p["weight"] for p in preferred] == [64, 32]
    found = {
        "matchLabels": {
            "app.kubernetes.io/instance": "sentiment-a1b2c3",
            "app.kubernetes.io/component": "worker",
        }
    }
    (together,) = worker["affinity"]["podAffinity"][
        "requiredDuringSchedulingIgnoredDuringExecution"
    ]
    assert together == {"labelSelector": found, "topologyKey": "topology.kubernetes.io/zone"}
    (spread,) = worker["topologySpreadConstraints"]
    assert (spread["topologyKey"], spread["labelSelector"]) == ("kubernetes.io/hostname", found)
    assert {pod["priorityClassName"] for pod in (submitter, head, worker)} == {"training"}


# ------------------------------------------------------------------------ volumes and rights


@pytest.mark.parametrize(
    ("kind", "source"),
    [
        ("plain", {"emptyDir": {"sizeLimit": "5Gi"}}),
        (
            "a cache on ephemeral volumes",
            {
                "ephemeral": {
                    "volumeClaimTemplate": {
                        "spec": {
                            "accessModes": ["ReadWriteOnce"],
                            "storageClassName": "local-nvme",
                            "resources": {"requests": {"storage": "5Gi"}},
                        }
                    }
                }
            },
        ),
        ("a cache on a claim", {"persistentVolumeClaim": {"claimName": "lake-cache"}}),
    ],
)
def test_the_workers_cache_is_where_the_job_says(kind: str, source: dict[str, Any]) -> None:
    _, pod = workers(kind)
    told = environment(pod)
    assert volumes(pod)[told["SHOAL_CACHE"]] == source
    assert told["HF_HOME"].startswith(told["SHOAL_CACHE"])
    requests = container(pod)["resources"]["requests"]
    assert ("ephemeral-storage" in requests) is (kind == "plain")


@pytest.mark.parametrize("kind", JOBS)
def test_nothing_is_written_but_to_volumes(kind: str) -> None:
    for pod in pods(rayjob(job(kind))):
        assert container(pod)["securityContext"]["readOnlyRootFilesystem"] is True
        assert volumes(pod)["/tmp"] == {"emptyDir": {}}
        assert environment(pod)["HOME"] == "/tmp"


@pytest.mark.parametrize("kind", JOBS)
def test_no_pod_speaks_to_kubernetes_but_the_head_whose_autoscaler_asks_for_pods(
    kind: str,
) -> None:
    made = rayjob(job(kind))
    scales = "enableInTreeAutoscaling" in made["spec"]["rayClusterSpec"]
    submitter, head, *others = pods(made)
    assert head["automountServiceAccountToken"] is scales
    assert not any(p["automountServiceAccountToken"] for p in (submitter, *others))
    assert not any(p["enableServiceLinks"] for p in pods(made))


def test_secrets_are_named_for_head_and_workers_only() -> None:
    submitter, head, worker = pods(rayjob(job("gpus in a queue")))
    for pod in (head, worker):
        assert container(pod)["envFrom"] == [
            {"secretRef": {"name": "object-store"}},
            {"secretRef": {"name": "hub"}},
        ]
        assert pod["serviceAccountName"] == "shoal"
    assert "envFrom" not in container(submitter)
    assert "serviceAccountName" not in submitter
    assert all(p["imagePullSecrets"] == [{"name": "registry"}] for p in (submitter, head, worker))


def test_variables_come_from_config_maps_and_from_single_keys_of_secrets() -> None:
    submitter, head, worker = pods(rayjob(job("web identity and variables")))
    for pod in (head, worker):
        assert container(pod)["envFrom"] == [{"configMapRef": {"name": "tracking"}}]
        key = {"secretKeyRef": {"name": "hub", "key": "token"}}
        assert environment(pod)["HF_TOKEN"] == key
    assert "HF_TOKEN" not in environment(submitter)
    pulled = {container(pod)["imagePullPolicy"] for pod in (submitter, head, worker)}
    assert pulled == {"Always"}


# ---------------------------------------------------------------------------- start and end


def test_kuberay_retries_the_run_on_a_new_cluster_and_the_submitter_on_its_own() -> None:
    spec = rayjob(job("gpus in a queue"))["spec"]
    assert spec["backoffLimit"] == 0
    assert spec["submitterConfig"]["backoffLimit"] > 0
    assert spec["submitterPodTemplate"]["spec"]["restartPolicy"] == "Never"
    assert spec["shutdownAfterJobFinishes"] is True
    assert spec["ttlSecondsAfterFinished"] == 60
    assert rayjob(job())["spec"]["backoffLimit"] == 2


def test_deadlines_and_suspension_are_as_the_job_says() -> None:
    spec = rayjob(job("suspended, with deadlines"))["spec"]
    assert spec["suspend"] is True
    assert spec["activeDeadlineSeconds"] == 5400
    assert spec["preRunningDeadlineSeconds"] == 30
    assert spec["ttlSecondsAfterFinished"] == 0
    absent = {"suspend", "activeDeadlineSeconds", "preRunningDeadlineSeconds"}
    assert not absent & set(rayjob(job())["spec"])


def drains(kind: str, checkpoint_bytes: int | None) -> tuple[int, int]:
    """Seconds that Ray's node waits, and those after which its pod is killed."""
    (found,) = {
        (
            int(environment(pod)["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"]),
            pod["terminationGracePeriodSeconds"],
        )
        for pod in pods(rayjob(job(kind), checkpoint_bytes=checkpoint_bytes))[1:]
    }
    return found


def test_pods_have_time_to_save_a_checkpoint_of_that_size() -> None:
    assert drains("plain", None) == (110, 120)
    drain, total = drains("plain", 30 * GIB)
    assert drain >= 30 * 1024 / 50
    assert total > drain
    # Each of eight workers uploads its own part.
    assert drains("cut over eight workers", 30 * GIB) == drains("plain", 30 * GIB // 8)
    # Two trials in one pod may save at the same time.
    assert drains("a study that grows", 15 * GIB) == drains("plain", 30 * GIB)


def test_ray_hears_of_the_end_whatever_the_first_process_of_its_pod_is() -> None:
    for pod in pods(rayjob(job()))[1:]:
        hook = container(pod)["lifecycle"]["preStop"]["exec"]["command"]
        assert hook == ["python", "-m", "cluster.drain"]


# -------------------------------------------------------------------------------- entrypoint


def test_the_entrypoint_is_the_driver_of_the_run() -> None:
    for kind in set(JOBS) - {"a store of its own"}:
        assert rayjob(job(kind), past=Past(3, 2))["spec"]["entrypoint"] == (
            "python -m jobs.run s3://shoal/runs/sentiment-a1b2c3"
        )


@pytest.mark.parametrize("joined_by", [shlex.join, subprocess.list2cmdline])
def test_the_entrypoint_survives_both_shells(joined_by: Any) -> None:
    """KubeRay's submitter reads it with bash; Ray joins the words again, for another shell."""
    made = rayjob(job("a store of its own"))
    driver = _words_in_bash(joined_by(_words_in_bash(made["spec"]["entrypoint"])))
    assert driver == ["python", "-m", "jobs.run", "s3://shoal/my runs/sentiment-a1b2c3"]


def _words_in_bash(command: str) -> list[str]:
    printf = f"printf '%s\\0' {command}"
    done = subprocess.run(["bash", "-ce", printf], capture_output=True, text=True, check=True)
    return done.stdout.split("\0")[:-1]


def test_the_driver_hears_the_rest_from_the_environment_of_the_head(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spec = job("a store of its own")
    made = rayjob(spec, past=Past(controls=3, generation=2))
    _, head, worker = pods(made)
    heard: dict[str, Any] = {}

    def open_store(uri: str, access: StoreAccess) -> str:
        heard.update(uri=uri, access=access)
        return "the store"

    monkeypatch.setattr(run, "open_store", open_store)
    monkeypatch.setattr(run, "drive", lambda *_, **options: heard.update(options) or 0)
    words = shlex.split(made["spec"]["entrypoint"])[3:]
    assert driver_environment(made) == environment(head)
    ended = CliRunner(env=driver_environment(made)).invoke(run.main, words)
    assert ended.exit_code == 0, ended.output
    assert (heard["uri"], heard["access"]) == (spec.store.uri, spec.store.access)
    assert heard["past"] == past_of(made) == Past(controls=3, generation=2)
    assert past_of(rayjob(spec)) == NOTHING_PAST
    assert past_of({"spec": {"clusterSelector": {"ray.io/cluster": "a"}}}) == NOTHING_PAST
    assert not [name for name in environment(worker) if name.startswith("SHOAL_PAST")]


def test_a_local_job_has_no_rayjob() -> None:
    with pytest.raises(SpecError) as error:
        rayjob(job(cluster={"kind": "local"}))
    assert error.value.problems[0].message == (
        "cluster.kind is local, so there is no RayJob to render"
    )
    assert "--set 'cluster={kind: kuberay" in (error.value.problems[0].hint or "")


# ------------------------------------------------------------------------------- disruptions


@pytest.mark.parametrize(
    ("workers", "staying"),
    [
        ({"count": 1}, {"head": 1}),
        ({"count": 4}, {"head": 1, "worker": 3}),
        ({"count": 4, "min": 2}, {"head": 1, "worker": 2}),
        ({"count": 4, "min": 1}, {"head": 1, "worker": 1}),
        ({**GPUS, "min": 4}, {"head": 1, "worker": 3}),
    ],
)
def test_nodes_are_drained_of_workers_that_the_run_can_spare(
    workers: dict[str, Any], staying: dict[str, int]
) -> None:
    made = rayjob(job(workers=workers))
    budgets = disruption_budgets(made)
    assert {
        b["spec"]["selector"]["matchLabels"]["app.kubernetes.io/component"]: (
            b["spec"]["minAvailable"]
        )
        for b in budgets
    } == staying
    for budget in budgets:
        chosen = budget["spec"]["selector"]["matchLabels"].items()
        meant = [t for t in templates_of(made) if chosen <= t["metadata"]["labels"].items()]
        assert len(meant) == 1
