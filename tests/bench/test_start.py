"""The small size of bench/start.py: both sides make their steps."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.bench.small import small


@pytest.mark.timeout(300)
def test_both_sides_start_and_end(tmp_path: Path) -> None:
    found = small("start.py", tmp_path)
    [shoal], [plain] = found["runs"]["shoal"], found["runs"]["plain"]
    assert shoal["steps"] == plain["steps"] == found["steps"]
    assert shoal["first_step_seconds"] > shoal["account"]["start"] > 0
    assert 0 <= shoal["after_result_seconds"] < shoal["after_last_seconds"]
