"""The small size of bench/recovery.py: both sides come back from a dead worker."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.bench.small import small


@pytest.mark.timeout(600)
def test_both_sides_come_back_from_a_dead_worker(tmp_path: Path) -> None:
    found = small("recovery.py", tmp_path)
    lost = {}
    for name in ("shoal", "plain"):
        (run,) = found["runs"][name]
        recoveries = run["recoveries"]
        assert [recovery["killed"] for recovery in recoveries] == ["worker"]
        assert all(recovery["seconds"] > 0 for recovery in recoveries)
        lost[name] = sum(recovery["steps_lost"] for recovery in recoveries)
    # Both are killed after the same number of steps; Shoal saves five times as often. A save that
    # is under way as its worker is killed may be lost with it.
    assert lost["shoal"] <= 2 * 20
    assert lost["plain"] <= 2 * 100
