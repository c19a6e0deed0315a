"""Alerts over time, as Prometheus itself evaluates them: with promtool, where it is installed."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from overlays import Object, built, of_kind

RUN = 'run="r"'


def series(name: str, values: str, **labels: str) -> Object:
    """A series by the minute, in promtool's notation: `0+10x60` grows by 10, 60 times."""
    told = "".join(f', {label}="{value}"' for label, value in labels.items())
    return {"series": f"{name}{{{RUN}{told}}}", "values": values}


def state(values: str = "1x400", *, of: str = "RUNNING") -> Object:
    return series("shoal_state", values, state=of)


@dataclass(frozen=True)
class Case:
    alert: str
    what: str
    told: tuple[Object, ...]
    fires_at: str | None = None
    """Minutes or hours since the first value; None: never."""
    silent_at: str | None = None


CASES = (
    Case(
        "ShoalRunStalled",
        "no step for half an hour",
        (state(), series("shoal_step", "0+10x30 300x200")),
        fires_at="67m",
        silent_at="59m",
    ),
    Case(
        "ShoalRunStalled",
        "a run that falls back again and again",
        (state(of="RECOVERING"), series("shoal_step", " ".join(["100+1x10"] * 8))),
        fires_at="47m",
    ),
    Case(
        "ShoalRunStalled",
        "a run that gets on",
        (state(), series("shoal_step", "0+1x200")),
        silent_at="3h",
    ),
    Case(
        "ShoalRunStalled",
        "a run that has just begun",
        (state(), series("shoal_step", "0x25")),
        silent_at="25m",
    ),
    Case(
        "ShoalRunStalled",
        "a run that waits for its nodes",
        (state(of="STARTING"), series("shoal_step", "500x200")),
        silent_at="3h",
    ),
    Case(
        "ShoalStudyStalled",
        "no trial trains",
        (state(), series("shoal_trial_epochs_total", "0+1x60 60x300")),
        fires_at="190m",
        silent_at="170m",
    ),
    Case(
        "ShoalUploadsFail",
        "a save has failed",
        (series("shoal_failed_saves_total", "0x20 1x60"),),
        fires_at="25m",
        silent_at="60m",
    ),
    Case(
        "ShoalStoreDown",
        "the store is away for a while",
        (series("shoal_store_up", "1x10 0x20 1x30"),),
        fires_at="20m",
        silent_at="14m",
    ),
    Case(
        "ShoalWaitsForData",
        "half of the time is spent waiting",
        (state(), series("shoal_data_wait_share", "0.05x10 0.5x100", split="train")),
        fires_at="60m",
        silent_at="20m",
    ),
    Case(
        "ShoalGpusIdle",
        "two GPUs of which one does little",
        (
            state(),
            series("ray_node_gpus_utilization", "30x100", GpuIndex="0"),
            series("ray_node_gpus_utilization", "2x100", GpuIndex="1"),
        ),
        fires_at="40m",
        silent_at="20m",
    ),
    Case(
        "ShoalGpusIdle",
        "GPUs that are busy",
        (state(), series("ray_node_gpus_utilization", "85x100", GpuIndex="0")),
        silent_at="90m",
    ),
    Case(
        "ShoalGpusIdle",
        "GPUs of a run that starts",
        (state(of="STARTING"), series("ray_node_gpus_utilization", "0x100", GpuIndex="0")),
        silent_at="90m",
    ),
)


def rule() -> Object:
    (found,) = of_kind(built("gpu"), "PrometheusRule").values()
    return found


def severity(alert: str) -> str:
    (found,) = (
        each
        for group in rule()["spec"]["groups"]
        for each in group["rules"]
        if each["alert"] == alert
    )
    return str(found["labels"]["severity"])


def test_of_every_alert_it_is_told_when_it_fires_and_when_not() -> None:
    alerts = {each["alert"] for group in rule()["spec"]["groups"] for each in group["rules"]}
    assert {case.alert for case in CASES if case.fires_at} == alerts
    assert {case.alert for case in CASES if case.silent_at} == alerts


@pytest.mark.skipif(
    shutil.which("promtool") is None,
    reason="promtool is not installed (Debian: it is in the package prometheus)",
)
def test_alerts_fire_when_they_should_and_not_before(tmp_path: Path) -> None:
    tests = []
    for case in CASES:
        query = f'ALERTS{{alertname="{case.alert}", alertstate="firing"}}'
        labels = query[:-1] + f', severity="{severity(case.alert)}", {RUN}}}'
        expected = []
        if case.fires_at is not None:
            firing = [{"labels": labels, "value": 1}]
            expected.append({"expr": query, "eval_time": case.fires_at, "exp_samples": firing})
        if case.silent_at is not None:
            expected.append({"expr": query, "eval_time": case.silent_at, "exp_samples": []})
        tests.append(
            {
                "name": f"{case.alert}: {case.what}",
                "interval": "1m",
                "input_series": list(case.told),
                "promql_expr_test": expected,
            }
        )
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(rule()["spec"]))
    file = tmp_path / "tests.yaml"
    file.write_text(yaml.safe_dump({"rule_files": ["rules.yaml"], "tests": tests}))
    for command in (["check", "rules", "rules.yaml"], ["test", "rules", file.name]):
        done = subprocess.run(
            ["promtool", *command], cwd=tmp_path, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stdout + done.stderr
