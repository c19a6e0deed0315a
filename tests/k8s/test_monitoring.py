"""Alerts and dashboard ask for metrics that are there; Prometheus finds the pods that have them."""

from __future__ import annotations

import itertools
import json
import random
import re
from collections.abc import Iterator
from functools import cache
from typing import Any

import exported
import promql_parser as promql
import pytest
from cluster_network import selects
from exported import Metrics
from overlays import EXAMPLES, OVERLAYS, Object, built, of_kind, pods_of, rayjob_of
from synthetic import SyntheticRun

from cluster.storage import open_store
from jobs.exporter import METRICS_PORT
from jobs.record import State

MONITORED = [overlay for overlay in OVERLAYS if overlay != "cpu-dev"]
RAY_LABELS = {"run", "instance", "namespace", "pod"}
"""What Prometheus adds, with the run from the pod's label."""


@cache
def rules() -> list[Object]:
    (rule,) = of_kind(built("gpu"), "PrometheusRule").values()
    return [each for group in rule["spec"]["groups"] for each in group["rules"]]


@cache
def dashboard() -> Object:
    config_map = of_kind(built("gpu"), "ConfigMap")["shoal-dashboard"]
    assert config_map["metadata"]["labels"] == {"grafana_dashboard": "1"}
    (text,) = config_map["data"].values()
    return json.loads(text)  # type: ignore[no-any-return]


def panels() -> list[Object]:
    return [panel for panel in dashboard()["panels"] if panel["type"] != "row"]


def expressions() -> list[str]:
    """All of PromQL, as Prometheus is given it: Grafana puts a choice in the variable's place."""
    shown = [target["expr"] for panel in panels() for target in panel["targets"]]
    return [rule["expr"] for rule in rules()] + [expr.replace("$run", ".*") for expr in shown]


def selectors(expression: str) -> Iterator[Any]:
    found: list[Any] = []

    def visit(node: Any) -> None:
        if isinstance(node, promql.VectorSelector):
            found.append(node)
        elif isinstance(node, promql.MatrixSelector):
            found.append(node.vector_selector)

    promql.walk(promql.parse(expression), visit)
    seen = set()
    for selector in found:  # a matrix selector holds a vector selector, which is met as well
        if str(selector) not in seen:
            seen.add(str(selector))
            yield selector


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Metrics:
    """All metrics that are exported."""
    ray: Metrics = dict.fromkeys(exported.of_ray(), RAY_LABELS)
    return exported.of_drivers(tmp_path_factory.mktemp("runs")) | ray


def test_the_synthetic_lines_are_those_of_a_rank() -> None:
    """So that the metrics here are those of real runs."""
    line = SyntheticRun(open_store("unused"))._train_line(1, 10, 0.0, {}, random.Random(0))
    assert set(line) - {"time", "attempt"} <= exported.keys_of_training_lines()


def test_every_expression_is_promql() -> None:
    assert len(expressions()) > 30
    for expression in expressions():
        promql.parse(expression)


def test_every_metric_is_one_that_is_exported_with_these_labels(
    known: Metrics,
) -> None:
    for expression in expressions():
        for selector in selectors(expression):
            assert selector.name in known, expression
            labels = {matcher.name for matcher in selector.matchers.matchers}
            assert labels <= known[selector.name] | {"run"}, expression


def test_what_is_grouped_by_is_a_label_of_what_is_grouped(known: Metrics) -> None:
    for expression in expressions():
        for labels, inner in re.findall(r"by \(([^)]*)\) \(+(?:\w+\()?(\w+)", expression):
            there = known[inner] | RAY_LABELS
            assert {label.strip() for label in labels.split(",")} <= there, expression


def test_every_state_that_is_asked_for_is_one() -> None:
    asked = re.findall(r'state=~?"([^"]*)"', " ".join(expressions()))
    assert asked
    assert {name for names in asked for name in names.split("|")} <= {s.value for s in State}


def test_every_metric_of_a_run_and_of_a_study_is_on_the_dashboard(
    known: Metrics,
) -> None:
    shown = {selector.name for expr in expressions() for selector in selectors(expr)}
    own = {name for name in known if name.startswith("shoal_")}
    # Parts of others; sums of which the rate is shown.
    left_out = {"shoal_precision", "shoal_recall", "shoal_epoch"}
    left_out |= {"shoal_rows_total", "shoal_tokens_total"}
    assert own - shown == left_out


def test_alerts_say_what_is_wrong_with_which_run_and_what_to_do() -> None:
    for rule in rules():
        assert rule["labels"]["severity"] in {"info", "warning", "critical"}
        assert "{{ $labels.run }}" in rule["annotations"]["summary"]
        assert rule["annotations"]["description"]
    names = [rule["alert"] for rule in rules()]
    assert len(set(names)) == len(names)


def test_commands_that_alerts_name_exist() -> None:
    from jobs.cli import COMMANDS

    text = " ".join(rule["annotations"]["description"] for rule in rules())
    named = re.findall(r"shoal ([a-z]+)", text)
    assert named
    assert set(named) <= set(COMMANDS)


# ------------------------------------------------------------------------------------- dashboard


def test_panels_have_ids_of_their_own_and_lie_beside_each_other() -> None:
    everything = dashboard()["panels"]
    assert len({panel["id"] for panel in everything}) == len(everything)
    places = [panel["gridPos"] for panel in everything]
    for place in places:
        assert 0 <= place["x"] < place["x"] + place["w"] <= 24
    for one, other in itertools.combinations(places, 2):
        apart = (
            one["x"] + one["w"] <= other["x"]
            or other["x"] + other["w"] <= one["x"]
            or one["y"] + one["h"] <= other["y"]
            or other["y"] + other["h"] <= one["y"]
        )
        assert apart, (one, other)


def test_panels_use_variables_that_the_dashboard_has() -> None:
    variables = {each["name"] for each in dashboard()["templating"]["list"]}
    assert set(re.findall(r"\$\{?(\w+)", json.dumps(panels()))) == variables
    for panel in panels():
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
        for target in panel["targets"]:
            assert 'run=~"$run"' in target["expr"]
            legend = set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
            by = re.findall(r"by \(([^)]*)\)", target["expr"])
            assert legend == {label.strip() for label in by[0].split(",")}


# ------------------------------------------------------------------------------- who is scraped


@pytest.mark.parametrize("overlay", MONITORED)
@pytest.mark.parametrize("example", EXAMPLES)
def test_prometheus_finds_ray_in_its_pods_and_the_driver_in_the_head(
    overlay: str, example: str
) -> None:
    monitors = of_kind(built(overlay), "PodMonitor")
    found = {
        name: {
            role
            for role, _, template in pods_of(rayjob_of(example))
            if selects(monitor["spec"]["selector"], template["metadata"]["labels"])
        }
        for name, monitor in monitors.items()
    }
    assert found == {"shoal-ray": {"head", "worker"}, "shoal-driver": {"head"}}


@pytest.mark.parametrize("example", EXAMPLES)
def test_the_label_that_names_the_run_is_that_of_its_pods(example: str) -> None:
    (endpoint,) = of_kind(built("gpu"), "PodMonitor")["shoal-ray"]["spec"]["podMetricsEndpoints"]
    (relabeling,) = endpoint["relabelings"]
    assert relabeling["targetLabel"] == "run"
    (source,) = relabeling["sourceLabels"]
    for _, _, template in pods_of(rayjob_of(example)):
        labels = {
            "__meta_kubernetes_pod_label_" + re.sub(r"[^a-zA-Z0-9_]", "_", key): value
            for key, value in template["metadata"]["labels"].items()
        }
        assert labels[source] == "run-1"


@pytest.mark.parametrize(
    ("found", "scraped"),
    [
        ("10.1.2.3:8080", f"10.1.2.3:{METRICS_PORT}"),
        ("[fd00::1:2]:8080", f"[fd00::1:2]:{METRICS_PORT}"),
    ],
)
def test_the_drivers_address_is_that_of_ray_with_the_drivers_port(found: str, scraped: str) -> None:
    monitor = of_kind(built("gpu"), "PodMonitor")["shoal-driver"]
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    (relabeling,) = endpoint["relabelings"]
    assert relabeling["sourceLabels"] == ["__address__"]
    assert relabeling["targetLabel"] == "__address__"
    match = re.fullmatch(relabeling["regex"], found)  # Prometheus anchors both ends
    assert match
    assert relabeling["replacement"].replace("$1", match[1]) == scraped


def test_the_port_that_prometheus_looks_for_is_the_one_that_kuberay_names() -> None:
    """`metrics`, 8080, unless the template has one of that name."""
    for monitor in of_kind(built("gpu"), "PodMonitor").values():
        (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
        assert endpoint["port"] == "metrics"
    for example in EXAMPLES:
        for _, _, template in pods_of(rayjob_of(example)):
            ports = template["spec"]["containers"][0].get("ports", [])
            assert [p["containerPort"] for p in ports if p["name"] == "metrics"] in ([], [8080])
            assert METRICS_PORT not in {p["containerPort"] for p in ports if p["name"] != "shoal"}
