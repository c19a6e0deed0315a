"""The small size of bench/adapters.py: each way trains what it says; merged models are equal."""

from __future__ import annotations

from pathlib import Path

from tests.bench.small import small


def test_adapters_are_measured_beside_full_training(tmp_path: Path) -> None:
    found = small("adapters.py", tmp_path, "--kinds", "lora,prefix-tuning")["ways"]
    full, *adapted = found
    assert [way["way"] for way in adapted] == ["lora", "prefix-tuning"]
    assert full["trained_share"] == 1.0
    assert all(way["trained_share"] < 0.3 for way in adapted)
    assert all(way["difference"] < 1e-4 for way in adapted)
    assert all(way["checkpoint_bytes"] < full["checkpoint_bytes"] / 2 for way in adapted)
