"""The small size of bench/checkpoint.py: every way to save is run, and every figure is there."""

from __future__ import annotations

from pathlib import Path

from tests.bench.small import small


def test_all_ways_to_save_and_restore_are_measured(tmp_path: Path) -> None:
    found = small("checkpoint.py", tmp_path)
    assert set(found["still_seconds"]) == {"shoal", "ray sync", "ray async"}
    assert found["checkpoints"] == 3
    assert min(speed["min"] for speed in found["mib_per_second"].values()) > 0
    assert set(found["restore_ratio"]) == {"on disk", "in memory"}
