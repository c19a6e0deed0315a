"""Ray for the length of a run: attached to where RAY_ADDRESS points, or started and shut down."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from jobs.errors import ClusterError, Problem
from jobs.spec import Workers, format_bytes

_SETTINGS = {
    # A report waits for the controller to look; two seconds, the default, are felt at the end.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    # Sixty seconds are too short for workers that import torch on a loaded machine.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "600",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # Repeated lines of workers are wanted: they go to the run's log, not to a terminal.
    "RAY_DEDUP_LOGS": "0",
}
_OBJECT_STORE_BYTES = 200 * 2**20
"""Nothing large goes through Ray's object store: rows come from storage, states go there."""


@contextmanager
def ray_cluster(workers: Workers) -> Iterator[None]:
    """A Ray cluster that can hold the workers, inside the block.

    Attaches where RAY_ADDRESS is set, and leaves that cluster running. Raises ClusterError where
    it is not reached, does not start, or is too small.
    """
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    import ray

    if " " in sys.executable:
        raise ClusterError(
            Problem(
                f"Ray starts no worker with an interpreter whose path has a space: "
                f"{sys.executable}",
                "install shoal in a virtual environment whose path has none",
            )
        )
    address = os.environ.get("RAY_ADDRESS")
    try:
        if address:
            ray.init(address=address, logging_level=logging.WARNING)
        else:
            ray.init(
                address="local",
                num_gpus=None if workers.gpus else 0,
                object_store_memory=_OBJECT_STORE_BYTES,
                logging_level=logging.WARNING,
            )
    except (ConnectionError, OSError, RuntimeError, ValueError) as error:
        where = f"the Ray cluster at {address}" if address else "Ray on this machine"
        raise ClusterError(
            Problem(
                f"{where} is not usable: {error}",
                "check RAY_ADDRESS, or unset it to start Ray here"
                if address
                else "look for free memory, disk space in the temporary folder, and old Ray "
                "processes",
            )
        ) from error
    try:
        refuse_too_small(workers, ray.cluster_resources())  # type: ignore[no-untyped-call]
        yield
    finally:
        ray.shutdown()


def refuse_too_small(workers: Workers, resources: dict[str, float]) -> None:
    """Raises ClusterError where the whole cluster, were it idle, could not hold the workers."""
    problems = []
    for name, each, text in (
        ("CPU", workers.cpus, "CPUs"),
        ("GPU", workers.gpus, "GPUs"),
        ("memory", int((workers.memory_gib or 0) * 2**30), "memory"),
    ):
        need, has = each * workers.count, resources.get(name, 0.0)
        if need > has:
            shown = (
                (format_bytes(need), format_bytes(has)) if name == "memory" else (need, int(has))
            )
            problems.append(
                Problem(
                    f"{workers.count} workers need {shown[0]} {text}, "
                    f"but the cluster has {shown[1]}",
                    "lower workers.count"
                    + {
                        "CPU": " or workers.cpus",
                        "GPU": ", or set workers.gpus to 0",
                        "memory": " or workers.memory_gib",
                    }[name],
                )
            )
    if problems:
        raise ClusterError(*problems)
