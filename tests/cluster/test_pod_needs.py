"""What pods ask for, in Kubernetes' quantities; rules over labels."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import pytest

from cluster.label_rules import matches_selector, may_be_on
from cluster.pod_needs import needs_of, pod_groups
from cluster.quantities import parse_quantity, show_amount
from tests.rayjobs import JOBS, job, rayjob

GIB = 2**30


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("500m", "0.5"),
        ("2", "2"),
        (4, "4"),
        ("1.5Gi", str(3 * 2**29)),
        ("1e3", "1000"),
        ("12E", "12000000000000000000"),
        ("1Ki", "1024"),
        ("100k", "100000"),
        (".5", "0.5"),
    ],
)
def test_quantities_are_read_as_kubernetes_writes_them(text: object, number: str) -> None:
    assert parse_quantity(text) == Decimal(number)


@pytest.mark.parametrize("text", ["", "1 Gi", "Gi", "1GiB", "one"])
def test_what_is_no_quantity_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="no quantity"):
        parse_quantity(text)


def test_amounts_are_shown_in_their_units() -> None:
    assert show_amount("requests.cpu", Decimal("0.5")) == "0.5 cores"
    assert show_amount("cpu", Decimal(1)) == "1 core"
    assert show_amount("limits.memory", Decimal(3 * 2**29)) == "1.5 GiB of memory"
    assert show_amount("requests.ephemeral-storage", Decimal(100 * GIB)) == "100 GiB of disk"
    assert show_amount("requests.nvidia.com/gpu", Decimal(8)) == "8 nvidia.com/gpu"


def test_a_run_asks_for_its_pods_and_what_kuberay_adds() -> None:
    groups = pod_groups(rayjob(job("two to four workers")))
    shown = {g.name: (g.fewest, g.most, [c.name for c in g.containers]) for g in groups}
    assert shown == {
        "submitter": (1, 1, ["ray-job-submitter"]),
        "head": (1, 1, ["ray-head", "autoscaler"]),
        "workers": (2, 4, ["ray-worker"]),
    }
    head = groups[1]
    assert head.requests()["cpu"] - head.requests(with_kuberay=False)["cpu"] == Decimal("0.5")
    fewest, most = needs_of(groups)
    worker = groups[2].requests()["cpu"]
    assert most["cpu"] - fewest["cpu"] == 2 * worker
    assert fewest["cpu"] == 1 + Decimal("2.5") + 2 * worker


def test_groups_on_spot_nodes_and_volumes_are_counted() -> None:
    groups = pod_groups(rayjob(job("more workers on spot nodes")))
    assert [(g.name, g.fewest, g.most) for g in groups[2:]] == [("workers", 1, 1), ("spot", 0, 3)]
    assert groups[3].requests()["nvidia.com/gpu"] == 1
    (claim,) = pod_groups(rayjob(job("a cache on ephemeral volumes")))[2].claims
    assert claim.storage_class == "local-nvme"
    assert claim.bytes % GIB == 0


@pytest.mark.parametrize("name", JOBS)
def test_every_kind_of_job_is_added_up(name: str) -> None:
    fewest, most = needs_of(pod_groups(rayjob(job(name))))
    assert all(most[resource] >= amount for resource, amount in fewest.items())


@pytest.mark.parametrize(
    ("expression", "holds"),
    [
        ({"key": "a", "operator": "In", "values": ["1", "2"]}, True),
        ({"key": "a", "operator": "In", "values": ["2"]}, False),
        ({"key": "a", "operator": "NotIn", "values": ["1"]}, False),
        ({"key": "b", "operator": "NotIn", "values": ["1"]}, True),
        ({"key": "a", "operator": "Exists"}, True),
        ({"key": "b", "operator": "DoesNotExist"}, True),
        ({"key": "a", "operator": "Gt", "values": ["0"]}, True),
        ({"key": "a", "operator": "Lt", "values": ["1"]}, False),
        ({"key": "b", "operator": "Gt", "values": ["0"]}, False),
    ],
)
def test_rules_over_labels_hold_as_in_kubernetes(expression: dict[str, Any], holds: bool) -> None:
    assert matches_selector({"matchExpressions": [expression]}, {"a": "1"}) is holds
    terms = [{"matchExpressions": [{"key": "c", "operator": "Exists"}]}]
    terms.append({"matchExpressions": [expression]})
    required = {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": terms}}
    assert may_be_on({"affinity": {"nodeAffinity": required}}, {"a": "1"}) is holds


def test_selectors_want_all_their_labels() -> None:
    assert matches_selector({}, {})
    assert not matches_selector({"matchLabels": {"a": "1", "b": "2"}}, {"a": "1"})
    assert may_be_on({}, {})
    assert not may_be_on({"nodeSelector": {"a": "1"}}, {"a": "2"})
