"""Pods of workers that jobs have on Kubernetes."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.pod_count import PodCount, count_pods
from jobs.search_spec import MAX_SLOTS
from tests.rayjobs import SEARCHED_DATA, job


@pytest.mark.parametrize(
    ("workers", "search", "pods"),
    [
        ({"count": 3}, None, PodCount(3, 3)),
        ({"count": 3, "min": 1}, None, PodCount(1, 3)),
        ({}, {"trials": 10, "max_concurrent": 4}, PodCount(4, 4)),
        ({}, {"trials": 3, "max_concurrent": 4}, PodCount(3, 3)),
        ({"count": 2}, {"trials": 10, "max_concurrent": 4}, PodCount(8, 8)),
        ({"count": 2}, {"trials": 10}, PodCount(2, 20)),
        ({}, {"trials": 1}, PodCount(1, 1)),
        ({}, {"trials": 4, "repeats": 3, "scheduler": "none"}, PodCount(1, 12)),
        ({}, {"trials": 10**5}, PodCount(1, MAX_SLOTS)),
        ({"gpus": 1}, {"trials": 10, "gpu_share": 0.3}, PodCount(1, 4, 3)),
        ({"gpus": 1}, {"trials": 10, "gpu_share": 0.6}, PodCount(1, 10)),
        ({"gpus": 1}, {"trials": 2, "gpu_share": 0.1}, PodCount(1, 1, 2)),
        ({"gpus": 1}, {"trials": 9, "gpu_share": 0.5, "max_concurrent": 3}, PodCount(2, 2, 2)),
    ],
)
def test_pods_follow_from_workers_trials_and_those_at_a_time(
    workers: dict[str, Any], search: dict[str, Any] | None, pods: PodCount
) -> None:
    assert count_pods(job(workers=workers, data=SEARCHED_DATA, search=search)) == pods
