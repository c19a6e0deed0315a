"""A run's numbers on a port of its driver's pod, for Prometheus to fetch.

    with metrics_served(store, run_id, warn=...):
        ...

They are what `shoal status RUN --prometheus` prints, under the same names and from the run folder,
with one more that the folder cannot tell: whether the store answers.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from cluster.storage import StorageError, Store
from jobs.prometheus import families
from jobs.runs import RunReader
from jobs.status import read_status

METRICS_PORT = 8090
"""Of the head's pod, where nothing else has it: 8080 there is that of Ray's own metrics. Whoever
scrapes it is told so in k8s/monitoring."""
_FRESH_SECONDS = 10.0
"""Two servers that ask one after the other are given the same numbers: each reading asks the store
for what is new in each of the run's folders."""


@contextmanager
def metrics_served(
    store: Store, run_id: str, *, warn: Callable[[str], None], port: int = METRICS_PORT
) -> Iterator[int | None]:
    """Serves the run's metrics over HTTP while the block lasts; the port, or None without one.

    A port that is taken costs a warning. `store` is that of the run folder, and should give up
    sooner than Prometheus does (10 s). Port 0 takes any.
    """
    registry = CollectorRegistry()
    registry.register(_Run(RunReader(store, run_id)))
    try:
        server, thread = start_http_server(port, registry=registry)
    except OSError as error:
        warn(f"the run's metrics are not served on port {port}: {error}")
        yield None
        return
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Run(Collector):
    """The collector of one run. Thread-safe."""

    def __init__(self, reader: RunReader) -> None:
        self._reader = reader
        self._lock = threading.Lock()
        self._families: list[Metric] = []
        self._is_store_up = False
        self._read_at: float | None = None

    def collect(self) -> Iterator[Metric]:
        with self._lock:
            now = time.monotonic()
            if self._read_at is None or now - self._read_at > _FRESH_SECONDS:
                self._read()
                self._read_at = now
            yield from self._families
            meaning = "1 where the store has just answered; else the run's other numbers are older."
            family = GaugeMetricFamily("shoal_store_up", meaning, labels=["run"])
            family.add_metric([self._reader.run_id], float(self._is_store_up))
            yield family

    def _read(self) -> None:
        """What the folder holds now; where the store is away, what it held before is kept."""
        try:
            status = read_status(self._reader)
            self._families = families(status, self._reader.metrics_lines())
            self._is_store_up = True
        except StorageError:
            self._is_store_up = False
