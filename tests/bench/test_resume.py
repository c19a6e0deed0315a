"""The small size of bench/resume.py: resumes go on from the checkpoint that they should."""

from __future__ import annotations

from pathlib import Path

from tests.bench.small import small


def test_a_run_is_resumed_at_both_ends_of_an_epoch(tmp_path: Path) -> None:
    found = small("resume.py", tmp_path)
    assert set(found["seconds"]) == {"1 %", "99 %"}
    assert all(len(seconds) == found["rounds"] for seconds in found["seconds"].values())
    assert found["ratio_99_to_1"] > 0
