"""What a cluster would say of each kind of RayJob; and that those who say it can say no."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import yaml

from cluster.disruption import disruption_budgets
from tests.manifests import (
    crd_problems,
    groups_of,
    kuberay_problems,
    kubernetes_problems,
    kueue_problems,
    label_problems,
    pods_problems,
    restricted_problems,
    templates_of,
    unknown_to_kuberay_1_4,
)
from tests.rayjobs import JOBS, job, rayjob

GIB = 2**30


@pytest.mark.parametrize("kind", JOBS)
def test_a_cluster_takes_the_manifests(kind: str) -> None:
    made = rayjob(job(kind), user="DOMAIN\\alice@example.com", checkpoint_bytes=20 * GIB)
    assert crd_problems(made) == []
    assert kuberay_problems(made) == []
    assert kueue_problems(made) == []
    assert pods_problems(made) == []
    assert label_problems(made["metadata"]["labels"]) == []
    assert [restricted_problems(t["spec"]) for t in templates_of(made)] == [[]] * len(
        templates_of(made)
    )
    for budget in disruption_budgets(made):
        assert kubernetes_problems(budget) == []


@pytest.mark.parametrize("kind", JOBS)
def test_the_same_job_gives_the_same_text(kind: str) -> None:
    def text() -> str:
        made = rayjob(job(kind))
        return yaml.safe_dump_all([made, *disruption_budgets(made)], sort_keys=False)

    assert text() == text()
    assert "&id" not in text()


def test_kuberay_1_4_knows_all_fields_of_a_job_without_tokens() -> None:
    for kind in JOBS:
        new = {"authOptions"}
        if kind == "suspended, with deadlines":
            new |= {"preRunningDeadlineSeconds"}
        if kind == "without tokens":
            new = set()
        assert unknown_to_kuberay_1_4(rayjob(job(kind))) == new


# ----------------------------------------------------------------------------- they can say no

Change = Callable[[dict[str, Any]], object]


def _head(made: dict[str, Any]) -> Any:
    return made["spec"]["rayClusterSpec"]["headGroupSpec"]


WRONG: dict[str, tuple[Callable[[dict[str, Any]], list[str]], Change, str]] = {
    "a field that nobody knows": (
        crd_problems,
        lambda m: templates_of(m)[1]["spec"]["containers"][0].update(volumeMount=[]),
        "volumeMount",
    ),
    "a text for a number": (
        crd_problems,
        lambda m: m["spec"].update(backoffLimit="2"),
        "is not of type 'integer'",
    ),
    "a rule of the CRD": (
        crd_problems,
        lambda m: m["spec"].update(managedBy="nobody"),
        "must be either 'ray.io/kuberay-operator' or",
    ),
    "half a deletion strategy": (
        crd_problems,
        lambda m: m["spec"].update(deletionStrategy={"onSuccess": {"policy": "DeleteCluster"}}),
        "requires either BOTH onSuccess and onFailure",
    ),
    "a pod's field of the wrong type": (
        pods_problems,
        lambda m: templates_of(m)[2]["spec"].update(terminationGracePeriodSeconds="120"),
        "'120' is not of type",
    ),
    "a mount without its volume": (
        pods_problems,
        lambda m: templates_of(m)[2]["spec"]["volumes"].pop(),
        "but the pod has",
    ),
    "a label that is none": (
        pods_problems,
        lambda m: templates_of(m)[0]["metadata"]["labels"].update(user="a@b"),
        "is no value",
    ),
    "a long name": (
        kuberay_problems,
        lambda m: m["metadata"].update(name="a" * 48),
        "47 characters",
    ),
    "deletion rules": (
        kuberay_problems,
        lambda m: m["spec"].update(deletionStrategy={"deletionRules": [{}]}),
        "deletionRules",
    ),
    "tokens of an old Ray": (
        kuberay_problems,
        lambda m: m["spec"]["rayClusterSpec"].update(rayVersion="2.51.0"),
        "tokens need",
    ),
    "no version for tokens": (
        kuberay_problems,
        lambda m: m["spec"]["rayClusterSpec"].pop("rayVersion"),
        "tokens need",
    ),
    "resources twice": (
        kuberay_problems,
        lambda m: _head(m).update(resources={"CPU": "1"}),
        "given twice",
    ),
    "a cluster that stays": (
        kueue_problems,
        lambda m: m["spec"].update(shutdownAfterJobFinishes=False),
        "not shut down",
    ),
    "a cluster that is there": (
        kueue_problems,
        lambda m: m["spec"].update(clusterSelector={"ray.io/cluster": "a"}),
        "that is there",
    ),
    "many groups": (
        kueue_problems,
        lambda m: (
            groups_of(m) and m["spec"]["rayClusterSpec"].update(workerGroupSpecs=18 * groups_of(m))
        ),
        "more than 17",
    ),
    "scaling without slices": (
        kueue_problems,
        lambda m: m["spec"]["rayClusterSpec"].update(enableInTreeAutoscaling=True),
        "without slices",
    ),
    "a group with the name of the head's": (
        kueue_problems,
        lambda m: groups_of(m)[0].update(groupName="head"),
        "is called head",
    ),
}


@pytest.mark.parametrize(("judge", "change", "said"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_told(
    judge: Callable[[dict[str, Any]], list[str]], change: Change, said: str
) -> None:
    made = copy.deepcopy(rayjob(job("gpus in a queue")))
    assert judge(made) == []
    change(made)
    assert [problem for problem in judge(made) if said in problem]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda pod: pod.update(hostNetwork=True), "hostNetwork"),
        (lambda pod: pod["securityContext"].pop("seccompProfile"), "seccomp"),
        (lambda pod: pod["securityContext"].update(runAsNonRoot=False), "root"),
        (lambda pod: pod["volumes"].append({"name": "d", "hostPath": {"path": "/"}}), "allowed"),
        (lambda pod: pod["containers"][0]["securityContext"].pop("capabilities"), "capabilities"),
        (
            lambda pod: pod["containers"][0]["securityContext"].update(
                allowPrivilegeEscalation=True
            ),
            "escalate",
        ),
    ],
)
def test_a_pod_with_more_rights_is_told(change: Callable[[Any], object], said: str) -> None:
    pod = copy.deepcopy(templates_of(rayjob(job()))[2]["spec"])
    assert restricted_problems(pod) == []
    change(pod)
    assert said in "".join(restricted_problems(pod))
