"""The overlays are built, and Kubernetes and its extensions would take all of their objects."""

from __future__ import annotations

import copy
import os
from pathlib import Path

import pytest
import yaml
from kinds import refusals
from overlays import K8S, NAMESPACE, OVERLAYS, Object, build, built, of_kind

CLUSTER_WIDE = {
    "ClusterQueue",
    "Namespace",
    "PriorityClass",
    "ResourceFlavor",
    "WorkloadPriorityClass",
}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_object_is_valid(overlay: str) -> None:
    for thing in built(overlay):
        assert refusals(thing) == [], (thing["kind"], thing["metadata"]["name"])


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_object_is_in_the_namespace_of_runs_or_in_none(overlay: str) -> None:
    for thing in built(overlay):
        expected = None if thing["kind"] in CLUSTER_WIDE else NAMESPACE
        assert thing["metadata"].get("namespace") == expected, thing["metadata"]["name"]
    assert list(of_kind(built(overlay), "Namespace")) == [NAMESPACE]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_no_object_holds_a_secret(overlay: str) -> None:
    assert of_kind(built(overlay), "Secret") == {}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_pods_that_are_not_restricted_are_refused_in_the_namespace(overlay: str) -> None:
    labels = of_kind(built(overlay), "Namespace")[NAMESPACE]["metadata"]["labels"]
    for mode in ("enforce", "audit", "warn"):
        assert labels[f"pod-security.kubernetes.io/{mode}"] == "restricted"


def test_every_folder_of_overlays_is_tested() -> None:
    assert sorted(OVERLAYS) == sorted(path.name for path in (K8S / "overlays").iterdir())


def test_every_file_is_part_of_what_is_built() -> None:
    for path in K8S.rglob("*.yaml"):
        if path.name == "kustomization.yaml" or path.parent in (K8S, K8S / "examples"):
            continue
        listed = yaml.safe_load((path.parent / "kustomization.yaml").read_text())
        patches = [patch["path"] for patch in listed.get("patches", ())]
        assert path.name in [*listed["resources"], *patches], path


def test_an_overlay_of_ones_own_moves_everything_to_another_namespace(tmp_path: Path) -> None:
    base = os.path.relpath(K8S / "overlays" / "gpu", tmp_path)
    file = tmp_path / "kustomization.yaml"
    file.write_text(yaml.safe_dump({"namespace": "team-b", "resources": [base]}))
    for thing in build(tmp_path):
        if thing["kind"] == "PriorityClass":
            continue
        name = "name" if thing["kind"] == "Namespace" else "namespace"
        assert thing["metadata"][name] == "team-b"


# --------------------------------------------------------------- what the tests above would refuse


def changed(kind: str, name: str, *path: str | int, to: object) -> Object:
    """An object of the largest overlay with another value at a path."""
    thing = copy.deepcopy(of_kind(built("gpu-kueue-spot"), kind)[name])
    place = thing
    for step in path[:-1]:
        place = place[step]  # type: ignore[index]
    place[path[-1]] = to  # type: ignore[index]
    return thing


GROUPS = ("spec", "resourceGroups", 1)


@pytest.mark.parametrize(
    "thing",
    [
        changed("NetworkPolicy", "dns", "spec", "podSelectors", to={}),
        changed("NetworkPolicy", "dns", "spec", "egress", 0, "ports", 0, "protocol", to=53),
        changed("Role", "shoal-user", "rules", 0, "verbs", to="get"),
        changed("ResourceQuota", "runs", "spec", "hard", "pods", to=[]),
        changed("ClusterQueue", "shoal", "spec", "cohort", to="old"),
        changed("ClusterQueue", "shoal", "spec", "queueingStrategy", to="Fair"),
        changed("ClusterQueue", "shoal", "apiVersion", to="kueue.x-k8s.io/v1beta1"),
        changed("ResourceFlavor", "gpu-spot", "spec", "tolerations", 0, "value", to="true"),
        changed("ClusterQueue", "shoal", *GROUPS, "coveredResources", to=["nvidia.com/gpu", "x"]),
        changed("PodMonitor", "shoal-ray", "spec", "podMetricsEndpoints", 0, "ports", to=8080),
        changed("PodMonitor", "shoal-ray", "spec", "podMetricsEndpoints", 0, "interval", to="30"),
        changed("PrometheusRule", "shoal", "spec", "groups", 0, "rules", 0, "expression", to="1"),
    ],
    ids=str,
)
def test_what_is_wrong_is_refused(thing: Object) -> None:
    assert refusals(thing)
