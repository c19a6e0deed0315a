"""Queues, flavours, priorities and quotas fit together, and the examples fit into them."""

from __future__ import annotations

from collections import Counter
from decimal import Decimal
from typing import Any

import pytest
from kinds import kueue_schema, with_defaults
from overlays import EXAMPLES, NAMESPACE, Object, built, example, of_kind, pods_of, rayjob_of

KUEUE = "gpu-kueue-spot"
SPOT, ON_DEMAND = "gpu-spot", "gpu-on-demand"
GPU = "nvidia.com/gpu"
QUEUED = [name for name in EXAMPLES if example(name).cluster.queue]  # type: ignore[union-attr]
_UNITS = {"": 1, "m": Decimal("0.001"), "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


def quantity(text: Any) -> Decimal:
    """The amount: `1500m`, `4Gi`, `2`."""
    number = str(text).rstrip("mMGTi")
    return Decimal(number) * _UNITS[str(text).removeprefix(number)]


def requests_of(rayjob: Object) -> Counter[str]:
    """What all pods of the run ask for, when it is as large as it may become."""
    total: Counter[str] = Counter()
    for _, number, template in pods_of(rayjob):
        for container in template["spec"]["containers"]:
            for name, amount in container["resources"]["requests"].items():
                total[name] += number * quantity(amount)  # type: ignore[assignment]
    return total


def cluster_queue() -> Object:
    (queue,) = of_kind(built(KUEUE), "ClusterQueue").values()
    return queue


def quotas_by_flavor() -> dict[str, dict[str, Decimal]]:
    return {
        flavor["name"]: {r["name"]: quantity(r["nominalQuota"]) for r in flavor["resources"]}
        for group in cluster_queue()["spec"]["resourceGroups"]
        for flavor in group["flavors"]
    }


def nominal_quotas() -> Counter[str]:
    """Of all flavours together."""
    total: Counter[str] = Counter()
    for quotas in quotas_by_flavor().values():
        total.update(quotas)  # type: ignore[arg-type]
    return total


def quota(overlay: str) -> dict[str, Decimal]:
    hard = of_kind(built(overlay), "ResourceQuota")["runs"]["spec"]["hard"]
    return {
        name.removeprefix("requests."): quantity(amount)
        for name, amount in hard.items()
        if name.startswith("requests.")
    }


def test_the_local_queue_leads_to_the_cluster_queue_which_lets_it_in() -> None:
    (local,) = of_kind(built(KUEUE), "LocalQueue").values()
    assert local["spec"]["clusterQueue"] == cluster_queue()["metadata"]["name"]
    labels = cluster_queue()["spec"]["namespaceSelector"]["matchLabels"]
    assert labels == {"kubernetes.io/metadata.name": local["metadata"]["namespace"]}


def test_every_flavor_of_the_queue_exists_and_each_that_exists_is_used() -> None:
    assert set(quotas_by_flavor()) == set(of_kind(built(KUEUE), "ResourceFlavor"))


def test_spot_is_tried_first_and_its_nodes_are_others() -> None:
    *_, gpus = cluster_queue()["spec"]["resourceGroups"]
    assert [flavor["name"] for flavor in gpus["flavors"]] == [SPOT, ON_DEMAND]
    flavors = of_kind(built(KUEUE), "ResourceFlavor")
    spot, on_demand = (flavors[name]["spec"] for name in (SPOT, ON_DEMAND))
    assert spot["nodeLabels"].keys() == on_demand["nodeLabels"].keys()
    assert spot["nodeLabels"] != on_demand["nodeLabels"]


def test_what_asks_for_no_gpu_is_never_admitted_to_nodes_with_taints() -> None:
    """So that a head, which a spot node's end would take along, stays off those."""
    flavors = of_kind(built(KUEUE), "ResourceFlavor")
    for name, resources in quotas_by_flavor().items():
        assert ("tolerations" in flavors[name]["spec"]) == (GPU in resources)
    spot, on_demand = (
        {t["key"] for t in flavors[name]["spec"]["tolerations"]} for name in (SPOT, ON_DEMAND)
    )
    assert on_demand == {GPU}
    assert spot == {GPU, "cloud.google.com/gke-spot"}


def test_there_is_a_class_for_runs_that_give_way_and_one_for_those_that_do_not() -> None:
    classes = of_kind(built(KUEUE), "WorkloadPriorityClass")
    values = {name: each["value"] for name, each in classes.items()}
    assert values["interruptible"] < values["normal"] == 0 < values["urgent"]
    assert cluster_queue()["spec"]["preemption"]["withinClusterQueue"] == "LowerPriority"


def test_a_run_tries_the_next_flavor_before_it_ends_another_run() -> None:
    stored = with_defaults(kueue_schema("ClusterQueue"), cluster_queue())
    assert stored["spec"].get("flavorFungibility", {}).get("whenCanPreempt") in (
        None,
        "TryNextFlavor",
    )


def test_what_is_admitted_is_not_refused_by_the_quota() -> None:
    nominal, hard = nominal_quotas(), quota(KUEUE)
    assert set(nominal) == set(hard)
    for name, amount in nominal.items():
        assert hard[name] > amount or (name == GPU and hard[name] == amount), name


def test_pods_that_say_nothing_of_a_resource_pass_a_quota_over_it() -> None:
    for overlay in ("cpu-dev", "gpu", KUEUE):
        (limits,) = of_kind(built(overlay), "LimitRange")["requests"]["spec"]["limits"]
        # A GPU must be asked for.
        assert set(limits["defaultRequest"]) == set(quota(overlay)) - {GPU}
        # Nothing is bounded that did not ask for it.
        assert set(limits) == {"type", "defaultRequest"}


@pytest.mark.parametrize("name", QUEUED)
def test_a_queued_example_may_be_admitted(name: str) -> None:
    labels = rayjob_of(name)["metadata"]["labels"]
    assert rayjob_of(name)["metadata"]["namespace"] == NAMESPACE
    assert labels["kueue.x-k8s.io/queue-name"] in of_kind(built(KUEUE), "LocalQueue")
    priority = labels.get("kueue.x-k8s.io/priority-class", "normal")
    assert priority in of_kind(built(KUEUE), "WorkloadPriorityClass")
    asked, nominal = requests_of(rayjob_of(name)), nominal_quotas()
    for resource, amount in asked.items():
        assert amount <= nominal[resource], resource
    # All workers of one group get one flavour.
    assert asked[GPU] <= max(quotas.get(GPU, 0) for quotas in quotas_by_flavor().values())


@pytest.mark.parametrize("name", QUEUED)
def test_nodes_that_a_queued_example_asks_for_are_told_apart_by_the_flavors(name: str) -> None:
    """Kueue heeds of a pod's selector what a flavour has a label for, and nothing else."""
    spot = getattr(example(name).cluster, "spot", None)
    if spot is None:
        return
    flavors = of_kind(built(KUEUE), "ResourceFlavor")
    assert flavors[SPOT]["spec"]["nodeLabels"].get(spot.label) == spot.value
    assert spot.label in flavors[ON_DEMAND]["spec"]["nodeLabels"]
    tolerated = {t["key"] for t in flavors[SPOT]["spec"]["tolerations"]}
    assert (spot.taint or spot.label) in tolerated


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_fits_into_the_quota_of_an_overlay(name: str) -> None:
    asked = requests_of(rayjob_of(name))
    overlays = [KUEUE] if name in QUEUED else ["gpu"] if asked[GPU] else ["cpu-dev", "gpu"]
    priority = getattr(example(name).cluster, "priority_class", None)
    for overlay in overlays:
        assert priority in {None, *of_kind(built(overlay), "PriorityClass")}
        hard = quota(overlay)
        for resource, amount in asked.items():
            assert amount <= hard[resource], (overlay, resource)
    account = example(name).cluster.service_account  # type: ignore[union-attr]
    assert account in {None, *of_kind(built(KUEUE), "ServiceAccount")}
