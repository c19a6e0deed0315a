"""Pods of a run reach what they need, and nobody else reaches them."""

from __future__ import annotations

import pytest
from cluster_network import Host, Network, Pod
from overlays import EXAMPLES, NAMESPACE, OVERLAYS, built, of_kind, pods_of, rayjob_of

from jobs.exporter import METRICS_PORT

GCS, DASHBOARD, RAY_METRICS = 6379, 8265, 8080
ANY_PORTS = (GCS, DASHBOARD, 10002, 29500, 41873, 60999)
"""Of Ray's workers and of torch's collectives, which the system chooses."""

INTERNET = Host("203.0.113.7")
INTERNET_6 = Host("2001:db8::7")
NODE_METADATA = Host("169.254.169.254")
API_SERVER = Host("10.0.0.10")
OPERATOR = Pod("kuberay-system", {"app.kubernetes.io/name": "kuberay-operator"})
DNS = Pod("kube-system", {"k8s-app": "kube-dns"})
PROMETHEUS = Pod("monitoring", {"app.kubernetes.io/name": "prometheus"})
STORE = Pod("object-store", {"app": "seaweedfs"})
STRANGERS = (
    Pod(NAMESPACE, {"app": "notebook"}),
    Pod("default", {"app.kubernetes.io/name": "shoal", "ray.io/is-ray-node": "yes"}),
    Pod("kuberay-system", {"app.kubernetes.io/name": "something-else"}),
    INTERNET,
)


def network(overlay: str) -> Network:
    return Network.of(built(overlay))


def run(example: str) -> dict[str, Pod]:
    """A pod of each role."""
    assert rayjob_of(example)["metadata"]["namespace"] == NAMESPACE
    return {
        role: Pod(NAMESPACE, template["metadata"]["labels"])
        for role, _, template in pods_of(rayjob_of(example))
    }


pytestmark = pytest.mark.parametrize("overlay", OVERLAYS)


@pytest.mark.parametrize("example", EXAMPLES)
def test_head_and_workers_of_a_run_reach_each_other_on_any_port(overlay: str, example: str) -> None:
    net, pods = network(overlay), run(example)
    for source in (pods["head"], pods["worker"]):
        for destination in (pods["head"], pods["worker"]):
            for port in ANY_PORTS:
                assert net.allows(source, destination, port)


@pytest.mark.parametrize("example", EXAMPLES)
def test_submitter_and_operator_reach_the_dashboard_and_nothing_else(
    overlay: str, example: str
) -> None:
    net, pods = network(overlay), run(example)
    for source in (pods["submitter"], OPERATOR):
        assert net.allows(source, pods["head"], DASHBOARD)
        assert not net.allows(source, pods["head"], GCS)
        assert not net.allows(source, pods["worker"], DASHBOARD)


@pytest.mark.parametrize("example", EXAMPLES)
def test_every_pod_finds_names_and_servers_with_tls(overlay: str, example: str) -> None:
    net = network(overlay)
    for pod in run(example).values():
        assert net.allows(pod, DNS, 53, protocol="UDP")
        assert net.allows(pod, DNS, 53)
        assert net.allows(pod, Host("169.254.20.10"), 53, protocol="UDP")
        assert net.allows(pod, INTERNET, 443)
        assert net.allows(pod, INTERNET_6, 443)


@pytest.mark.parametrize("example", EXAMPLES)
def test_no_pod_reaches_what_it_does_not_need(overlay: str, example: str) -> None:
    net = network(overlay)
    for pod in run(example).values():
        assert not net.allows(pod, NODE_METADATA, 80)
        assert not net.allows(pod, INTERNET, 80)
        assert not net.allows(pod, INTERNET, 22)
        assert not net.allows(pod, STRANGERS[0], 8888)
        assert not net.allows(pod, INTERNET, 53, protocol="UDP")


@pytest.mark.parametrize("example", EXAMPLES)
def test_the_heads_autoscaler_reaches_the_api_server(overlay: str, example: str) -> None:
    net, pods = network(overlay), run(example)
    assert net.allows(pods["head"], API_SERVER, 443)
    assert net.allows(pods["head"], API_SERVER, 6443)
    assert not net.allows(pods["worker"], API_SERVER, 6443)
    assert not net.allows(pods["submitter"], API_SERVER, 6443)


@pytest.mark.parametrize("example", EXAMPLES)
def test_nobody_else_reaches_a_pod(overlay: str, example: str) -> None:
    net, pods = network(overlay), run(example)
    for stranger in STRANGERS:
        for pod in pods.values():
            for port in (*ANY_PORTS, RAY_METRICS, METRICS_PORT):
                assert not net.allows(stranger, pod, port)


@pytest.mark.parametrize("example", EXAMPLES)
def test_prometheus_reaches_the_metrics_where_there_is_monitoring(
    overlay: str, example: str
) -> None:
    net, pods = network(overlay), run(example)
    is_monitored = bool(of_kind(built(overlay), "PodMonitor"))
    assert is_monitored is (overlay != "cpu-dev")
    assert net.allows(PROMETHEUS, pods["head"], RAY_METRICS) is is_monitored
    assert net.allows(PROMETHEUS, pods["worker"], RAY_METRICS) is is_monitored
    assert net.allows(PROMETHEUS, pods["head"], METRICS_PORT) is is_monitored
    assert not net.allows(PROMETHEUS, pods["head"], DASHBOARD)


@pytest.mark.parametrize("example", EXAMPLES)
def test_a_store_without_tls_is_reached_for_development_alone(overlay: str, example: str) -> None:
    net = network(overlay)
    for pod in run(example).values():
        assert net.allows(pod, STORE, 8333) is (overlay == "cpu-dev")


def test_a_pod_of_anybody_in_the_namespace_is_cut_off_but_for_names(overlay: str) -> None:
    net, notebook = network(overlay), STRANGERS[0]
    assert net.allows(notebook, DNS, 53, protocol="UDP")
    assert not net.allows(notebook, INTERNET, 443)
    assert not net.allows(STORE, notebook, 8888)
