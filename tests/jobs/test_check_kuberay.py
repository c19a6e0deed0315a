"""What `shoal check` says of a job's Kubernetes cluster, asked over a socket."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_cli import run_main

from cluster.storage import Store
from jobs.checks.finding import Finding, Verdict
from jobs.checks.kuberay import check_kuberay, look_at_kubernetes
from jobs.checks.kuberay_plan import plan_cluster, plan_lines
from jobs.checks.machine import DiskNeed
from tests.kubernetes_api.manifests import IMAGE, kuberay_job
from tests.kubernetes_api.schemas import (
    CLAIM,
    CLUSTER_QUEUE,
    CONFIG_MAP,
    DEPLOYMENT,
    LIMIT_RANGE,
    LOCAL_QUEUE,
    NAMESPACE,
    NODE,
    PRIORITY_CLASS,
    QUEUE_PRIORITY,
    QUOTA,
    RAYJOB,
    SECRET,
    SERVICE_ACCOUNT,
    STORAGE_CLASS,
    Kind,
)
from tests.kubernetes_api.server import TOKEN, KubernetesApi

CANARY = "canary-in-a-secret-7731"
GPU, TYPE = "nvidia.com/gpu", "NVIDIA-H100-80GB-HBM3"
WORKERS = {"count": 2, "cpus": 4, "memory_gib": 8, "gpus": 1}
CLUSTER: dict[str, Any] = {
    "kind": "kuberay",
    "image": IMAGE,
    "queue": "team-a",
    "queue_priority": "urgent",
    "service_account": "shoal",
    "priority_class": "training",
    "image_pull_secrets": ["registry"],
    "env_from_secrets": ["object-store"],
    "env_secrets": {"HF_TOKEN": {"secret": "hub", "key": "token"}},
    "env_from_config_maps": ["tracking"],
    "cache": {"kind": "ephemeral", "storage_class": "local-nvme"},
    "gpu": {"type": TYPE},
    "start_deadline_minutes": 30,
}
HARD = {
    "count/rayjobs.ray.io": "5",
    "pods": "10",
    "requests.cpu": "20",
    "requests.memory": "64Gi",
    "limits.memory": "64Gi",
    "requests.nvidia.com/gpu": "4",
    "requests.storage": "1Ti",
}


class World:
    """A cluster in which everything is fine, and what is said of a job there."""

    def __init__(self, api: KubernetesApi) -> None:
        self.api = api
        for name in ("registry", "object-store", "hub"):
            self.add(SECRET, name, data={"token": CANARY})
        self.add(CONFIG_MAP, "tracking", data={"MLFLOW_TRACKING_URI": CANARY})
        self.add(SERVICE_ACCOUNT, "shoal")
        self.add(PRIORITY_CLASS, "training", value=10)
        self.add(STORAGE_CLASS, "local-nvme", provisioner="example.com/nvme")
        self.add_operator("kuberay-operator", "quay.io/kuberay/operator:v1.7.0")
        self.add_operator("kueue", "registry.k8s.io/kueue/kueue:v0.19.2")
        self.add_node("node-1")
        self.add(QUOTA, "runs", spec={"hard": HARD}, status={"hard": HARD, "used": {}})
        self.add(QUEUE_PRIORITY, "urgent", value=100)
        self.add(LOCAL_QUEUE, "team-a", spec={"clusterQueue": "shoal"})
        self.add_cluster_queue()

    def add(self, kind: Kind, name: str, *, in_: str = "default", **tree: Any) -> None:
        """The object, in place of one that is there."""
        namespace = in_ if kind.is_namespaced else ""
        self.remove(kind, name, in_=in_)
        labels = tree.pop("labels", {})
        whole = {"apiVersion": kind.api_version, "kind": kind.name, **tree}
        metadata = {"name": name, "labels": labels}
        self.api.objects.create(kind, namespace, {**whole, "metadata": metadata})

    def remove(self, kind: Kind, name: str, *, in_: str = "default") -> None:
        namespace = in_ if kind.is_namespaced else ""
        if any(t["metadata"]["name"] == name for t in self.api.objects.list(kind, namespace)):
            self.api.objects.delete(kind, namespace, name)

    def add_operator(
        self, name: str, image: str, *, available: int = 1, args: list[str] | None = None
    ) -> None:
        container = {"name": name, "image": image, "command": ["/manager"], "args": args or []}
        self.add(
            DEPLOYMENT,
            name,
            in_="default",
            labels={"app.kubernetes.io/name": name},
            spec={"template": {"spec": {"containers": [container]}}},
            status={"availableReplicas": available},
        )

    def add_node(self, name: str, *, type_: str = TYPE, cpu: str = "64") -> None:
        allocatable = {"cpu": cpu, "memory": "500Gi", "pods": "110", GPU: "8"}
        allocatable["ephemeral-storage"] = "1Ti"
        self.add(
            NODE,
            name,
            labels={"nvidia.com/gpu.product": type_},
            status={"allocatable": allocatable},
        )

    def add_cluster_queue(self, *, gpus: str = "4", covered: str = GPU, **spec: Any) -> None:
        plain = {"cpu": "64", "memory": "256Gi"}
        groups = [
            _resource_group({"cpu": plain}),
            _resource_group({"spot": {covered: "1"}, "on-demand": {covered: gpus}}),
        ]
        spec = {"namespaceSelector": {}, "resourceGroups": groups, **spec}
        self.add(CLUSTER_QUEUE, "shoal", spec=spec)

    def check(self, *, context: str | None = None, **changes: Any) -> list[Finding]:
        """Of the job with these changes; those of `cluster` and `workers` are merged."""
        cluster = {**CLUSTER, **changes.pop("cluster", {})}
        workers = {**WORKERS, **changes.pop("workers", {})}
        cluster = {k: v for k, v in cluster.items() if v is not None or k == "auth"}
        spec = kuberay_job(cluster=cluster, workers=workers, **changes)
        look = look_at_kubernetes(spec, context=context)
        assert look is not None
        self.plan = plan_cluster(spec, look)
        return list(check_kuberay(spec, DiskNeed(0, 0, 0), look))

    def only(self, verdict: Verdict, **changes: Any) -> Finding:
        """The one finding that is a problem or a warning."""
        found = [f for f in self.check(**changes) if f.verdict in _BAD]
        assert [f.verdict for f in found] == [verdict], found
        assert found[0].hint
        return found[0]

    def problem(self, **changes: Any) -> Finding:
        return self.only(Verdict.PROBLEM, **changes)

    def warning(self, **changes: Any) -> Finding:
        return self.only(Verdict.WARNING, **changes)

    def not_checked(self, **changes: Any) -> list[str]:
        """What was not checked, where nothing is wrong, but for what never is."""
        found = self.check(**changes)
        assert not [f for f in found if f.verdict in _BAD], found
        said = [f.message for f in found if f.verdict is Verdict.NOT_CHECKED]
        assert "whether pods can pull" in said.pop()
        return said


_BAD = (Verdict.PROBLEM, Verdict.WARNING)


def _resource_group(flavors: dict[str, dict[str, str]]) -> dict[str, Any]:
    first = next(iter(flavors.values()))
    return {
        "coveredResources": list(first),
        "flavors": [
            {
                "name": name,
                "resources": [{"name": r, "nominalQuota": q} for r, q in resources.items()],
            }
            for name, resources in flavors.items()
        ],
    }


@pytest.fixture
def world(api: KubernetesApi, monkeypatch: pytest.MonkeyPatch) -> World:
    # The server reads large definitions at first, however slow this machine is.
    monkeypatch.setattr("jobs.checks.kuberay.SURVEY_SECONDS", 60.0)
    return World(api)


def test_where_everything_is_fine_nothing_is_left_unchecked(world: World) -> None:
    assert world.not_checked() == []
    found = world.check()
    said = {f.message for f in found if f.verdict is Verdict.OK}
    assert any(m.endswith("with KubeRay 1.7.0") and "v1.33.1" in m for m in said)
    assert "Kueue 0.19.2 has team-a; shoal has quota for the run" in said
    assert "the RayJob is accepted by a strict dry run" in said
    assert "the secret hub is there; its keys and values were not read" in said
    parts = {f.part for f in found}
    for key in ("queue", "queue_priority", "service_account", "priority_class", "gpu", "rights"):
        assert f"cluster.{key}" in parts
    for key in ("env_from_secrets", "env_secrets", "image_pull_secrets", "env_from_config_maps"):
        assert f"cluster.{key}" in parts


def test_nothing_is_made_and_no_value_of_a_secret_is_asked_for(world: World) -> None:
    before = world.api.objects.version
    found = world.check()
    assert world.api.objects.version == before
    assert world.api.objects.list(RAYJOB, "default") == []
    assert CANARY not in repr(found)
    held = [a for a in world.api.requests if "/secrets" in a.path or "/configmaps" in a.path]
    assert len(held) == 4
    assert all("as=PartialObjectMetadata" in a.headers["Accept"] for a in held)
    writes = [a for a in world.api.requests if a.method != "GET"]
    reviews = [a for a in writes if a.path.endswith("/selfsubjectaccessreviews")]
    assert all(a.query.get("dryRun") == "All" for a in writes if a not in reviews)
    assert len(writes) > len(reviews) > 6


# --------------------------------------------------------------------------------------- the API


def test_an_api_that_does_not_answer_is_one_problem(world: World) -> None:
    found = world.problem(context="elsewhere")
    assert "does not answer" in found.message
    assert found.exit_code == 3


def test_credentials_that_are_refused_are_one_problem(world: World) -> None:
    world.api.users.clear()
    found = world.problem()
    assert "does not accept the credentials" in found.message
    assert found.exit_code == 3
    assert TOKEN not in repr(found)


def test_a_context_that_is_not_there_is_the_users_problem(world: World) -> None:
    found = world.problem(context="nowhere")
    assert "has no context nowhere" in found.message
    assert found.exit_code == 2


def test_without_a_kubeconfig_it_says_why_nothing_was_asked(
    world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "missing"))
    (said,) = world.not_checked()
    assert said.startswith("Kubernetes was not asked: it is not known how to reach Kubernetes")


def test_without_the_client_it_says_why_nothing_was_asked(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "kubernetes.client", None)
    (said,) = world.not_checked()
    assert "the Kubernetes client" in said


def test_kuberay_that_is_not_installed_is_a_problem(world: World) -> None:
    world.api.kinds = [k for k in world.api.kinds if k.group != "ray.io"]
    found = world.problem()
    assert "KubeRay is not installed" in found.message
    assert "helm" in (found.hint or "")
    assert found.exit_code == 3


def test_an_operator_that_does_not_run_is_a_problem(world: World) -> None:
    world.add_operator("kuberay-operator", "quay.io/kuberay/operator:v1.7.0", available=0)
    assert "is not running" in world.problem().message


def test_an_operator_of_other_namespaces_is_a_problem(world: World) -> None:
    image = "quay.io/kuberay/operator:v1.7.0"
    for args in (["--watch-namespace", "a,b"], ["-watch-namespace=a,b"]):
        world.add_operator("kuberay-operator", image, args=args)
        assert "takes up RayJobs of a, b, not of default" in world.problem().message
    # Somebody else's may stand beside that of the namespace.
    world.add_operator("kuberay", image, args=["--watch-namespace", "c,default"])
    assert world.not_checked() == []


def test_an_operator_without_a_version_is_looked_at_all_the_same(world: World) -> None:
    world.add_operator("kuberay-operator", "quay.io/kuberay/operator:nightly")
    assert world.not_checked() == []
    world.add_operator("kuberay-operator", "quay.io/kuberay/operator:nightly", available=0)
    assert "is not running" in world.problem().message


@pytest.mark.parametrize(
    ("version", "cluster", "verdict", "words"),
    [
        (
            "1.3.2",
            {"auth": None, "start_deadline_minutes": None},
            Verdict.WARNING,
            "older than 1.4",
        ),
        ("1.5.0", {"start_deadline_minutes": None}, Verdict.PROBLEM, "knows no tokens before"),
        ("1.5.1", {}, Verdict.WARNING, "has no effect with KubeRay 1.5.1, before 1.6"),
        ("1.6.0-rc.1", {}, None, None),
    ],
)
def test_versions_of_kuberay_are_held_against_what_the_job_asks_for(
    world: World, version: str, cluster: dict[str, Any], verdict: Verdict | None, words: str | None
) -> None:
    world.add_operator("kuberay-operator", f"registry.example.com:5000/operator:v{version}")
    if verdict is None or words is None:
        assert world.not_checked(cluster=cluster) == []
    else:
        assert words in world.only(verdict, cluster=cluster).message


def test_without_rights_on_deployments_versions_are_not_known(world: World) -> None:
    world.api.forbidden.add(("list", "deployments"))
    (said,) = world.not_checked()
    assert said.startswith("which version of KubeRay runs, and whether it does: you have no right")


# ---------------------------------------------------------------------------- rights and namespace


def test_rights_without_which_nothing_is_submitted_are_one_problem(world: World) -> None:
    world.api.forbidden |= {("delete", "rayjobs"), ("watch", "rayjobs")}
    found = world.problem()
    assert "no right to watch, delete rayjobs.ray.io in the namespace default" in found.message
    assert '{apiGroups: ["ray.io"], resources: ["rayjobs"], verbs: [watch, delete]}' in found.hint
    assert found.exit_code == 3


def test_without_the_right_to_apply_the_dry_run_is_not_told_twice(world: World) -> None:
    world.api.forbidden |= {("patch", "rayjobs"), ("create", "rayjobs")}
    assert "no right to create, patch rayjobs.ray.io" in world.problem().message


@pytest.mark.parametrize(
    ("right", "lost"),
    [
        (("list", "pods"), "list pods, so shoal logs --pods finds no pod"),
        (("get", "pods/log"), "get pods/log, so shoal logs --pods prints nothing"),
        (("list", "events"), "list events, so why a pod waits or has failed is not told"),
        (("get", "rayclusters"), "get rayclusters.ray.io, so which pods are ready is not told"),
        (("list", "workloads"), "list workloads.kueue.x-k8s.io, so why its queue does not admit"),
        (("patch", "poddisruptionbudgets"), "patch poddisruptionbudgets.policy, so nodes may be"),
    ],
)
def test_of_each_other_right_it_is_told_what_is_lost(
    world: World, right: tuple[str, str], lost: str
) -> None:
    world.api.forbidden.add(right)
    found = world.warning()
    assert lost in found.message
    assert f"verbs: [{right[0]}]" in (found.hint or "")


def test_rights_that_cannot_be_told_are_not_checked(world: World) -> None:
    world.api.fail(on="selfsubjectaccessreviews", code=403, times=99, message="no")
    (said,) = world.not_checked()
    assert said.startswith("whether you have the right to get rayjobs.ray.io, list rayjobs.ray.io")


def test_a_namespace_that_is_not_there_is_the_users_problem(world: World) -> None:
    found = [f for f in world.check(cluster={"namespace": "typo"}) if f.part == "cluster.namespace"]
    assert [f.verdict for f in found] == [Verdict.PROBLEM]
    assert "there is no namespace typo" in found[0].message
    assert found[0].exit_code == 2
    # Whoever may not read it learns that from the dry run.
    world.api.forbidden.add(("get", "namespaces"))
    found = world.check(cluster={"namespace": "typo"})
    assert any("there is no namespace typo" in f.message for f in found)
    assert world.not_checked() == []


def test_a_namespace_that_is_being_deleted_is_a_problem(world: World) -> None:
    world.api.objects.set_status(NAMESPACE, "", "default", {"phase": "Terminating"})
    assert "is being deleted" in world.problem().message


# ------------------------------------------------------------------------------------ the dry run


def test_what_the_cluster_refuses_of_the_rayjob_is_a_problem(world: World) -> None:
    on = "PATCH .*/rayjobs/.*dryRun=All"
    message = "failed to create typed patch object: .spec.preRunningDeadlineSeconds: field not "
    world.api.fail(on=on, code=500, message=f"{message}declared in schema")
    found = world.problem()
    assert "has no .spec.preRunningDeadlineSeconds" in found.message
    assert found.exit_code == 3
    world.api.fail(on=on, code=422, reason="Invalid", message="spec.backoffLimit: no")
    assert world.problem().exit_code == 2
    quota = "exceeded quota: runs, requested: count/rayjobs.ray.io=1, used: 5, limited: 5"
    world.api.fail(on=on, code=403, reason="Forbidden", message=quota)
    assert "exceeded quota: runs" in world.problem().message


def test_a_webhook_that_knows_no_dry_run_leaves_that_unchecked(world: World) -> None:
    message = 'admission webhook "a.example.com" does not support dry run'
    world.api.fail(on="PATCH .*/rayjobs/", code=400, reason="BadRequest", message=message)
    (said,) = world.not_checked()
    assert message in said


def test_a_disruption_budget_that_is_refused_is_a_warning(world: World) -> None:
    world.api.fail(on="PATCH .*/poddisruptionbudgets/.*-head", code=403, message="denied by policy")
    found = world.warning()
    assert "denied by policy; without it nodes" in found.message
    world.api.fail(on="PATCH .*/poddisruptionbudgets/.*-head", code=422, message="minAvailable: no")
    assert "minAvailable: no" in world.problem().message


# ---------------------------------------------------------------------------------------- the names


@pytest.mark.parametrize(
    ("kind", "name", "key"),
    [
        (SECRET, "registry", "image_pull_secrets"),
        (SECRET, "object-store", "env_from_secrets"),
        (SECRET, "hub", "env_secrets"),
        (CONFIG_MAP, "tracking", "env_from_config_maps"),
        (SERVICE_ACCOUNT, "shoal", "service_account"),
        (PRIORITY_CLASS, "training", "priority_class"),
        (STORAGE_CLASS, "local-nvme", "cache"),
        (QUEUE_PRIORITY, "urgent", "queue_priority"),
    ],
)
def test_what_the_job_names_must_be_there(world: World, kind: Kind, name: str, key: str) -> None:
    world.api.forbidden.add(("get", kind.plural))
    said = world.not_checked()
    assert said
    assert all("is there: you have no right to get" in message for message in said)
    world.api.forbidden.clear()
    world.remove(kind, name)
    found = world.problem()
    assert found.part == f"cluster.{key}"
    assert "there is no " in found.message
    assert name in found.message
    assert found.exit_code == 2


def test_a_claim_must_be_there_and_serve_all_nodes(world: World) -> None:
    cache = {"cache": {"kind": "claim", "name": "lake"}}
    assert "no volume claim lake" in world.problem(cluster=cache).message
    for modes, phase in ((["ReadWriteMany"], "Bound"), (["ReadWriteOnce"], "Bound")):
        world.add(CLAIM, "lake", spec={"accessModes": modes}, status={"phase": phase})
        if modes == ["ReadWriteMany"]:
            assert world.not_checked(cluster=cache) == []
    assert "is ReadWriteOnce" in world.warning(cluster=cache).message
    assert world.not_checked(cluster=cache, workers={"count": 1}) == []
    world.add(CLAIM, "lake", spec={"accessModes": ["ReadWriteMany"]}, status={"phase": "Lost"})
    assert "is lost" in world.problem(cluster=cache).message


@pytest.mark.parametrize(
    ("image", "words"),
    [
        ("registry.example.com:5000/shoal", "has no tag"),
        ("shoal:latest", "has the tag latest"),
        (f"registry.example.com/shoal@sha256:{'a' * 64}", None),
        ("registry.example.com:5000/team/shoal:0.1.0", None),
    ],
)
def test_an_image_that_may_be_another_tomorrow_is_warned_of(
    world: World, image: str, words: str | None
) -> None:
    if words is None:
        assert world.not_checked(cluster={"image": image}) == []
    else:
        assert words in world.warning(cluster={"image": image}).message


# ----------------------------------------------------------------------------------------- the room


@pytest.mark.parametrize(
    ("resource", "limit", "words"),
    [
        ("requests.cpu", "10", "need 11 cores"),
        ("cpu", "10", "need 11 cores"),
        ("pods", "3", "need 4 pods"),
        ("limits.memory", "20Gi", "as limits"),
        ("requests.nvidia.com/gpu", "1", "need 2 nvidia.com/gpu"),
        ("persistentvolumeclaims", "1", "need 2 persistentvolumeclaims"),
        ("local-nvme.storageclass.storage.k8s.io/requests.storage", "1Gi", "GiB of "),
    ],
)
def test_a_quota_that_the_pods_exceed_is_a_problem(
    world: World, resource: str, limit: str, words: str
) -> None:
    hard = {resource: limit}
    world.add(QUOTA, "runs", spec={"hard": hard}, status={"hard": hard, "used": {}})
    found = world.problem()
    assert words in found.message
    assert "the quota runs of the namespace default has" in found.message
    assert found.exit_code == 3


def test_what_others_use_of_a_quota_is_a_wait(world: World) -> None:
    used = {"requests.nvidia.com/gpu": "3"}
    world.add(QUOTA, "runs", spec={"hard": HARD}, status={"hard": HARD, "used": used})
    assert "has 1 nvidia.com/gpu left of 4 nvidia.com/gpu" in world.warning().message


def test_a_quota_below_all_elastic_workers_is_a_warning(world: World) -> None:
    world.add_cluster_queue(gpus="16")
    found = [f for f in world.check(workers={"min": 2, "count": 6}) if f.verdict in _BAD]
    assert {f.verdict for f in found} == {Verdict.WARNING}
    assert any("with all its workers the run needs 6 nvidia.com/gpu" in f.message for f in found)


def test_quotas_of_other_pods_do_not_count(world: World) -> None:
    def scoped(**spec: Any) -> None:
        hard = {"pods": "0"}
        world.add(QUOTA, "scoped", spec={"hard": hard, **spec}, status={"hard": hard})

    def of_class(operator: str, *names: str) -> dict[str, Any]:
        rule = {"scopeName": "PriorityClass", "operator": operator, "values": list(names)}
        return {"scopeSelector": {"matchExpressions": [rule]}}

    for spec in (
        {"scopes": ["Terminating"]},
        {"scopes": ["BestEffort"]},
        of_class("In", "other"),
        of_class("NotIn", "training"),
        of_class("DoesNotExist"),
    ):
        scoped(**spec)
        assert world.not_checked() == []
    for spec in ({"scopes": ["NotTerminating"]}, of_class("In", "training"), of_class("Exists")):
        scoped(**spec)
        assert "the quota scoped" in world.problem().message


def test_a_quota_refuses_pods_that_do_not_say_what_they_need(world: World) -> None:
    found = [f for f in world.check(workers={"memory_gib": None}) if f.verdict is Verdict.PROBLEM]
    assert any("has no request of memory" in f.message for f in found)
    assert all(f.hint == "set workers.memory_gib" and f.exit_code == 2 for f in found)
    # Unless the namespace says it for them.
    limit = {"type": "Container", "default": {"memory": "4Gi"}, "defaultRequest": {"memory": "4Gi"}}
    world.add(LIMIT_RANGE, "defaults", spec={"limits": [limit]})
    found = world.check(workers={"memory_gib": None})
    assert not [f for f in found if f.verdict is Verdict.PROBLEM]


@pytest.mark.parametrize(
    ("limit", "words"),
    [
        (
            {"type": "Container", "max": {"cpu": "3"}},
            "the container ray-worker of workers: at most 3 cores, but 4 cores",
        ),
        (
            {"type": "Pod", "min": {"cpu": "2"}},
            "the pod of submitter: at least 2 cores, but 1 core",
        ),
        (
            {"type": "PersistentVolumeClaim", "max": {"storage": "1Gi"}},
            "the volume of workers: at most 1 GiB",
        ),
        ({"type": "Container", "min": {"example.com/x": "1"}}, "nothing is asked for"),
        ({"type": "Container", "max": {"example.com/x": "1"}}, "example.com/x has no limit"),
    ],
)
def test_limit_ranges_refuse_what_is_beyond_them(
    world: World, limit: dict[str, Any], words: str
) -> None:
    world.add(LIMIT_RANGE, "limits", spec={"limits": [limit]})
    found = [f for f in world.check() if f.verdict in _BAD]
    assert {f.verdict for f in found} == {Verdict.PROBLEM}
    assert any(words in f.message for f in found), found


def test_a_ratio_of_a_limit_range_holds_for_what_is_limited(world: World) -> None:
    limit = {"type": "Container", "maxLimitRequestRatio": {"cpu": "1"}}
    world.add(LIMIT_RANGE, "limits", spec={"limits": [limit]})
    assert world.not_checked() == []


def test_without_rights_on_quotas_and_nodes_they_are_not_checked(world: World) -> None:
    resources = ("resourcequotas", "limitranges", "nodes")
    world.api.forbidden |= {("list", resource) for resource in resources}
    said = world.not_checked()
    assert len(said) == 3
    for resource in resources:
        assert any(f"no right to list {resource}" in message for message in said)


def test_a_type_of_gpu_that_no_node_has_is_a_warning(world: World) -> None:
    world.add_node("node-1", type_="NVIDIA-L4")
    found = world.warning()
    assert found.part == "cluster.gpu"
    assert f"none has the labels nvidia.com/gpu.product={TYPE}" in found.message


def test_workers_that_fit_on_no_node_are_a_warning(world: World) -> None:
    world.add_node("node-1", cpu="2")
    assert "none has 4 cores, which a pod of workers asks for" in world.warning().message
    (asked,) = (a for a in world.api.requests if a.path == "/api/v1/nodes")
    assert asked.query == {"limit": "100", "labelSelector": f"nvidia.com/gpu.product={TYPE}"}


# ---------------------------------------------------------------------------------------- the queue


def test_a_queue_without_kueue_is_a_problem(world: World) -> None:
    world.api.kinds = [k for k in world.api.kinds if k.group != "kueue.x-k8s.io"]
    found = world.problem()
    assert "Kueue is not installed" in found.message
    assert found.exit_code == 3
    none = {"queue": None, "queue_priority": None}
    assert world.not_checked(cluster=none) == []


def test_a_queue_that_is_not_there_is_the_users_problem(world: World) -> None:
    found = world.problem(cluster={"queue": "team-b"})
    assert "no queue team-b in the namespace default; it has team-a" in found.message
    assert found.exit_code == 2
    world.remove(LOCAL_QUEUE, "team-a")
    assert "it has none" in world.problem().message


@pytest.mark.parametrize("kind", [LOCAL_QUEUE, CLUSTER_QUEUE])
def test_a_queue_that_admits_nothing_is_a_problem(world: World, kind: Kind) -> None:
    condition = {
        "type": "Active",
        "status": "False",
        "reason": "FlavorNotFound",
        "message": "references missing ResourceFlavor(s): h100",
        "lastTransitionTime": "2026-11-29T12:00:00Z",
    }
    (tree,) = world.api.objects.list(kind, "default" if kind.is_namespaced else "")
    name, spec = tree["metadata"]["name"], tree["spec"]
    world.add(kind, name, spec=spec, status={"conditions": [condition]})
    found = world.problem()
    assert "admits no run (FlavorNotFound): references missing ResourceFlavor(s)" in found.message
    assert found.exit_code == 3
    world.add(kind, name, spec={**spec, "stopPolicy": "HoldAndDrain"})
    assert "is stopped (stopPolicy HoldAndDrain)" in world.problem().message


def test_a_cluster_queue_of_other_namespaces_is_a_problem(world: World) -> None:
    selector = {"matchLabels": {"kubernetes.io/metadata.name": "training"}}
    world.add_cluster_queue(namespaceSelector=selector)
    assert "takes no runs of the namespace default" in world.problem().message


def test_a_cluster_queue_that_is_not_there_is_a_problem(world: World) -> None:
    world.remove(CLUSTER_QUEUE, "shoal")
    assert "the cluster queue shoal, which is not there" in world.problem().message


def test_a_cluster_queue_that_never_has_the_room_is_a_problem(world: World) -> None:
    # Pods of one group get one flavour: one GPU here and one there are not two.
    world.add_cluster_queue(gpus="1")
    assert "the pods of workers ask for 2 nvidia.com/gpu" in world.problem().message
    # What its cohort lends is not known.
    world.add_cluster_queue(gpus="1", cohortName="all")
    assert world.not_checked() == []


def test_resources_that_a_cluster_queue_does_not_cover_are_warned_of(world: World) -> None:
    world.add_cluster_queue(covered="amd.com/gpu")
    assert "has no quota of nvidia.com/gpu" in world.warning().message


def test_without_rights_on_queues_they_are_not_checked(world: World) -> None:
    world.api.forbidden.add(("get", "clusterqueues"))
    (said,) = world.not_checked()
    assert said.startswith("whether the cluster queue shoal has the room: you have no right")
    world.api.forbidden.add(("list", "localqueues"))
    (said,) = world.not_checked()
    assert said.startswith("whether the queue team-a is there: you have no right")


# ----------------------------------------------------------------------------------------- the plan


def test_the_plan_tells_pods_sums_and_cost(world: World) -> None:
    world.check(
        workers={"min": 2, "count": 4},
        cluster={
            "deadline_minutes": 120,
            "prices": {"gpu_hour": 2.5, "cpu_hour": 0.04, "memory_gib_hour": 0.005},
        },
    )
    assert world.plan is not None
    shown = "\n".join(plan_lines(world.plan))
    assert "creates in the namespace default, in the queue team-a: a RayJob" in shown
    assert "  1 head with 2.5 cores, 4.5 GiB of memory (with the autoscaler)" in shown
    assert "  2 to 4 workers, each with 4 cores, 9 GiB of memory, 1 nvidia.com/gpu" in shown
    assert "and a volume of" in shown
    assert "disruption budgets, by which drained nodes leave 1 head and 2 workers" in shown
    assert "together they ask for 11.5 cores" in shown
    document = json.loads(json.dumps(world.plan.to_json()))
    assert document["requests"]["most"]["nvidia.com/gpu"] == 4
    fewest = document["cost_an_hour"]["fewest"]
    memory = document["requests"]["fewest"]["memory"] / 2**30
    assert fewest == pytest.approx(2 * 2.5 + 11.5 * 0.04 + memory * 0.005)
    assert document["most_cost"] == pytest.approx(2 * document["cost_an_hour"]["most"])
    assert f"an hour costs {fewest:.2f} to " in shown
    assert f"{document['most_cost']:.2f} until cluster.deadline_minutes" in shown
    world.check(cluster={"prices": {"gpu_hour": 2.5}})
    assert world.plan is not None
    assert "an hour costs 5.00 at cluster.prices" in list(plan_lines(world.plan))


def test_check_of_the_command_asks_the_context_and_prints_the_plan(
    world: World, s3_store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = kuberay_job(workers=WORKERS, cluster=CLUSTER | {"queue": "team-b"}).model_dump(
        mode="json"
    )
    tree["model"] = {"source": f"{s3_store.uri}/model"}
    tree["data"] = {"train": f"{s3_store.uri}/train"}
    tree["store"] = f"{s3_store.uri}/runs"
    job = tmp_path / "job.yaml"
    job.write_text(yaml.safe_dump(tree))
    assert run_main("check", str(job), "--json", "--context", "here") == 2
    document = json.loads(capsys.readouterr().out)
    assert any("no queue team-b" in check["message"] for check in document["checks"])
    assert [pods["group"] for pods in document["cluster"]["pods"]] == [
        "submitter",
        "head",
        "workers",
    ]
    assert run_main("plan", str(job)) == 2
    shown = capsys.readouterr()
    assert "creates in the namespace default" in shown.out
    assert "no queue team-b" in shown.err
    assert CANARY not in shown.out + shown.err
    # A submit asks as well, before anything is recorded; one that only records does not.
    assert run_main("submit", str(job)) == 2
    assert "no queue team-b" in capsys.readouterr().err
    world.api.requests.clear()
    assert run_main("submit", str(job), "--record-only") == 2
    assert "no queue team-b" not in capsys.readouterr().err
    assert world.api.requests == []
    tree["cluster"] = {"kind": "local"}
    job.write_text(yaml.safe_dump(tree))
    assert run_main("check", str(job), "--context", "here") == 2
    assert "cluster.kind is local, so --context has no effect" in capsys.readouterr().err
