"""What the administrator's guide says is so: commands, versions, namespaces, overlays."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import yaml
from kinds import DATA, KUEUE, NEWEST_KUBERNETES, OLDEST_KUBERNETES
from overlays import K8S, NAMESPACE, OVERLAYS, build, built, of_kind

GUIDE = (K8S / "README.md").read_text(encoding="utf-8")
COMMANDS = re.sub(r" *\\\n *", " ", GUIDE)
KUBERAY = re.findall(r"rayjobs-v([\d.]+)\.yaml", " ".join(os.listdir(DATA)))[0]


def option(chart: str, name: str) -> str:
    (command,) = re.findall(rf"^\$ helm upgrade --install {chart} .*$", COMMANDS, re.MULTILINE)
    (value,) = re.findall(rf" {name} (\S+)", command)
    return str(value)


def values(chart: str) -> Any:
    path = K8S.parent / option(chart, "--values")
    return yaml.safe_load(path.read_text(encoding="utf-8")), path.read_text(encoding="utf-8")


def test_versions_are_those_that_are_tested() -> None:
    assert (option("kueue", "--version"), option("kuberay-operator", "--version")) == (
        KUEUE,
        KUBERAY,
    )
    for chart, version in (("kueue", KUEUE), ("kuberay-operator", KUBERAY)):
        assert f"chart {chart}, version {version}" in values(chart)[1]
    assert f"| Kubernetes | {OLDEST_KUBERNETES} to {NEWEST_KUBERNETES} |" in GUIDE
    assert f"| Kueue | {KUEUE} (`{_queue_version()}`)" in GUIDE
    assert f"| KubeRay | {KUBERAY}; " in GUIDE


def _queue_version() -> str:
    versions = {o["apiVersion"] for o in built("gpu-kueue-spot") if "kueue" in o["apiVersion"]}
    (version,) = versions
    return str(version)


def test_kuberay_is_where_the_network_expects_it_and_watches_the_namespace_of_runs() -> None:
    head = of_kind(built("gpu"), "NetworkPolicy")["head"]["spec"]
    namespaces = [
        peer["namespaceSelector"]["matchLabels"]["kubernetes.io/metadata.name"]
        for peer in head["ingress"][0]["from"]
        if "namespaceSelector" in peer
    ]
    assert namespaces == [option("kuberay-operator", "--namespace")]
    assert values("kuberay-operator")[0]["watchNamespace"] == [NAMESPACE]


def test_every_overlay_is_described_and_every_target_of_the_image() -> None:
    rows = re.findall(r"^\| `([\w-]+)` \| (?:a small cluster|GPUs)", GUIDE, re.MULTILINE)
    assert sorted(rows) == sorted(OVERLAYS)
    stages = re.findall(r"FROM runtime AS (\w+)", (K8S / "Dockerfile").read_text())
    assert all(f"`{stage}`" in GUIDE for stage in stages)


def test_the_overlay_of_ones_own_that_is_shown_is_built(tmp_path: Path) -> None:
    (text,) = re.findall(r"```yaml\n(.*?)```", GUIDE, re.DOTALL)
    shown = yaml.safe_load(text)
    (overlay,) = shown["resources"]
    assert overlay.startswith("../shoal/")
    shown["resources"] = [os.path.relpath(K8S.parent / overlay[len("../shoal/") :], tmp_path)]
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(shown))
    hard = {"requests.nvidia.com/gpu": "2"}
    patch = {
        "apiVersion": "v1",
        "kind": "ResourceQuota",
        "metadata": {"name": "runs", "namespace": NAMESPACE},
        "spec": {"hard": hard},
    }
    (tmp_path / shown["patches"][0]["path"]).write_text(yaml.safe_dump(patch))
    quota = of_kind(build(tmp_path), "ResourceQuota")["runs"]
    assert quota["metadata"]["namespace"] == shown["namespace"]
    assert quota["spec"]["hard"].items() >= hard.items()
