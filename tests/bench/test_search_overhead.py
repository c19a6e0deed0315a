"""bench/search_overhead.py: drivers of any size are measured, and what is made of the numbers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from tests.bench.small import small


def test_drivers_of_any_size_are_measured(tmp_path: Path) -> None:
    found = small("search_overhead.py", tmp_path, "--only", "driver")
    assert set(found["driver"]) == {"random, folder", "tpe, folder", "random, S3"}
    for driver in found["driver"].values():
        for trials, one in driver["curve"].items():
            assert one["events"] > 4 * int(trials)
            assert one["cpu_ms"] > one["ask_cpu_ms"] > 0
            assert one["clock_ms"] > one["append_clock_ms"] > 0


def test_seconds_of_a_trial_leave_out_the_first_ones(bench: Callable[[str], ModuleType]) -> None:
    found = bench("search_overhead").timing(100.0, 131.0, [120.0, 110.0, 125.0, 130.0])
    assert found == {
        "trials": 4, "start_seconds": 20.0, "seconds_per_trial": 5.0, "end_seconds": 1.0,
    }  # fmt: skip


def test_growth_is_that_of_the_largest_size(bench: Callable[[str], ModuleType]) -> None:
    curve = [
        {"memory_mib": 100, "cpu_ms": 2.0, "ask_cpu_ms": 1.0, "resumed": {"memory_mib": 90}},
        {"memory_mib": 110, "cpu_ms": 6.0, "ask_cpu_ms": 5.0, "resumed": {"memory_mib": 100}},
        {"memory_mib": 120, "cpu_ms": 9.0, "ask_cpu_ms": 7.0, "resumed": {"memory_mib": 140}},
    ]
    assert bench("search_overhead").growth(curve) == {
        "memory_growth": 1.4, "event_growth": 1.5, "own_growth": 2.0,
    }  # fmt: skip
