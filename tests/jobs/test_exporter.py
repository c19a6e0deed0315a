"""A run's numbers over HTTP, as Prometheus fetches them from the driver's pod."""

from __future__ import annotations

import urllib.request
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from synthetic import START, SyntheticRun, running

from cluster.folder import FolderStore
from cluster.storage import Head, Store, StoreAway
from jobs import exporter
from jobs.exporter import metrics_served
from jobs.prometheus import exposition
from jobs.record import Source
from jobs.runs import RunReader
from jobs.status import read_status


@pytest.fixture(autouse=True)
def always_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporter, "_FRESH_SECONDS", -1.0)


def fail(message: str) -> None:
    raise AssertionError(message)


def fetched(port: int | None) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        return str(answer.read().decode())


def values(text: str) -> dict[str, float]:
    """Of the samples without a label besides `run`."""
    return {
        sample.name: sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if set(sample.labels) == {"run"}
    }


def test_what_is_served_is_what_the_command_prints_and_that_the_store_answers(
    local_store: Store,
) -> None:
    made = running(local_store, now=START)
    with metrics_served(local_store, made.run_id, warn=fail, port=0) as port:
        told = fetched(port)
    reader = RunReader(local_store, made.run_id)
    printed = exposition(read_status(reader), reader.metrics_lines())
    assert told.startswith(printed)
    assert values(told)["shoal_store_up"] == 1


def test_what_has_come_since_is_served_too(local_store: Store) -> None:
    made = running(local_store, now=START)
    with metrics_served(local_store, made.run_id, warn=fail, port=0) as port:
        before = values(fetched(port))
        made.train(1, after=120, until=150, time=START)
        event = {"event": "warning", "message": "not stored", "failures_in_a_row": 1, "attempt": 1}
        made.lines("events", Source(1, 0), {"time": START, **event})
        after = values(fetched(port))
    assert (before["shoal_step"], after["shoal_step"]) == (120, 150)
    assert (before["shoal_checkpoint_step"], after["shoal_checkpoint_step"]) == (100, 150)
    assert (before["shoal_failed_saves_total"], after["shoal_failed_saves_total"]) == (0, 1)


class FailingStore(FolderStore):
    is_away = False

    def list(self, prefix: str, *, after: str | None = None) -> list[Head]:  # type: ignore[override]
        if self.is_away:
            raise StoreAway("no answer")
        return list(super().list(prefix, after=after))


def test_while_the_store_is_away_the_last_numbers_stay_and_say_so(local_store: Store) -> None:
    made = running(local_store, now=START)
    store = FailingStore(Path(local_store.uri))
    with metrics_served(store, made.run_id, warn=fail, port=0) as port:
        fetched(port)
        store.is_away = True
        told = values(fetched(port))
        assert (told["shoal_store_up"], told["shoal_step"]) == (0, 120)
        store.is_away = False
        assert values(fetched(port))["shoal_store_up"] == 1


def test_servers_that_ask_one_after_the_other_read_once(
    local_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporter, "_FRESH_SECONDS", 3600.0)
    made = running(local_store, now=START)
    with metrics_served(local_store, made.run_id, warn=fail, port=0) as port:
        first = fetched(port)
        made.train(1, after=120, until=150, time=START)
        assert fetched(port) == first


def test_a_port_that_is_taken_costs_a_warning(local_store: Store) -> None:
    made: SyntheticRun = running(local_store, now=START)
    warnings: list[str] = []
    with (
        metrics_served(local_store, made.run_id, warn=fail, port=0) as port,
        metrics_served(local_store, made.run_id, warn=warnings.append, port=port or 0) as none,
    ):
        assert none is None
    assert f"not served on port {port}" in warnings[0]
