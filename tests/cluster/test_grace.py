"""How long pods that must go are given."""

from __future__ import annotations

import pytest

from cluster.grace import DRAIN_VARIABLE, grace_for, saving_seconds

MIB = 2**20


@pytest.mark.parametrize("size", [None, 0, 10 * MIB, 2**30, 2**40])
@pytest.mark.parametrize("rate", [MIB, 50 * MIB, 10**10])
def test_the_times_nest_and_the_upload_fits_twice(size: int | None, rate: float) -> None:
    grace = grace_for(size, bytes_per_second=rate)
    assert 2 * (size or 0) / rate < grace.saving_seconds < grace.drain_seconds < grace.total_seconds


def test_the_driver_waits_for_its_workers_as_long_as_the_pods_were_rendered_for() -> None:
    grace = grace_for(40 * 2**30, bytes_per_second=50 * MIB)
    told = {DRAIN_VARIABLE: str(grace.drain_seconds)}
    assert saving_seconds(told) == grace.saving_seconds
    assert saving_seconds({}) == grace_for(None, bytes_per_second=1).saving_seconds
    assert saving_seconds({DRAIN_VARIABLE: "5"}) == 0
