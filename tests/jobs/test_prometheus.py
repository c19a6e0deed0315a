"""A run's numbers in Prometheus' text format, read back by its own client library."""

from __future__ import annotations

import pytest
from prometheus_client.parser import text_string_to_metric_families
from synthetic import START, SyntheticRun, running, succeeded

from cluster.storage import Store
from jobs.account import PURPOSES
from jobs.prometheus import exposition
from jobs.record import Source
from jobs.runs import RunReader
from jobs.status import read_status


def samples(made: SyntheticRun, *, now: float = START) -> dict[str, dict[str, float]]:
    """{name: {value of the label besides `run`, or nothing: value}}."""
    reader = RunReader(made.store, made.run_id)
    text = exposition(read_status(reader, now=now), reader.metrics_lines())
    found: dict[str, dict[str, float]] = {}
    for family in text_string_to_metric_families(text):
        assert family.documentation
        for sample in family.samples:
            labels = dict(sample.labels)
            assert labels.pop("run") == made.run_id
            assert sample.name.endswith("_total") == (family.type == "counter")
            values = found.setdefault(sample.name, {})
            key = ",".join(labels.values())
            assert key not in values
            values[key] = sample.value
    return found


def test_gauges_have_the_names_and_numbers_of_the_newest_lines(local_store: Store) -> None:
    made = running(local_store, now=START)
    status = read_status(RunReader(local_store, made.run_id), now=START)
    assert status.train is not None
    found = samples(made)
    assert found["shoal_step"] == {"": 120}
    assert found["shoal_loss"]["train"] == status.train["loss"]
    assert found["shoal_learning_rate"] == {"train": status.train["learning_rate"]}
    assert not {"shoal_rank", "shoal_time", "shoal_attempt", "shoal_rows"} & set(found)
    newest = {line["split"]: line["metrics"] for line in status.evaluations}
    assert set(newest) == {"test", "validation"}
    for split, metrics in newest.items():
        assert {name: found[f"shoal_{name}"][split] for name in metrics} == metrics


def test_only_the_state_in_which_the_run_is_has_a_one(local_store: Store) -> None:
    found = samples(running(local_store, now=START))["shoal_state"]
    assert [state for state, value in found.items() if value] == ["RUNNING"]
    assert "FAILED_INFRA" in found


def test_counters_hold_what_superseded_attempts_did_too(local_store: Store) -> None:
    found = samples(succeeded(local_store), now=START + 3600)
    assert found["shoal_attempts_total"] == {"": 2}
    assert found["shoal_rows_total"] == {"": 32 * (13 + 20)}
    assert found["shoal_lost_seconds_total"][""] == pytest.approx(30 * 0.5 * 0.78)
    assert list(found["shoal_seconds_total"]) == list(PURPOSES)
    assert sum(found["shoal_seconds_total"].values()) == pytest.approx(205)


def test_the_final_test_replaces_what_was_measured_before(local_store: Store) -> None:
    made = succeeded(local_store)
    result = RunReader(local_store, made.run_id).result()
    assert result is not None
    assert result.outcome is not None
    assert result.outcome.test is not None
    found = samples(made, now=START + 3600)
    assert found["shoal_accuracy"]["test"] == result.outcome.test["metrics"]["accuracy"]


def test_a_number_that_is_none_is_left_out(local_store: Store) -> None:
    made = running(local_store, now=START)
    line = {"time": START, "attempt": 1, "step": 121, "kind": "train", "loss": None, "rows": 32}
    made.lines("metrics", Source(1, 0), line)
    assert "train" not in samples(made)["shoal_loss"]


def test_a_run_that_has_not_started_has_a_state(local_store: Store) -> None:
    found = samples(SyntheticRun(local_store).submit())
    assert found["shoal_state"]["PENDING"] == 1
    assert found["shoal_step"] == {"": 0}
    assert "shoal_seconds_total" not in found
