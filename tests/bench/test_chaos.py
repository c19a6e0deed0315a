"""The small size of bench/chaos.py: kills of ranks, and what is left of the run."""

from __future__ import annotations

from pathlib import Path

from tests.bench.small import small


def test_killed_runs_use_every_row_once_and_end_with_the_same_bits(tmp_path: Path) -> None:
    found = small("chaos.py", tmp_path, "--seed", "7")
    assert set(found["moments"]) == {"step", "evaluation", "upload", "parts"}
    steady, changing = found["runs"]
    assert steady["same_bits"]
    for run in (steady, changing):
        assert run["state"] == "SUCCEEDED"
        assert run["attempts"] > 1
        assert (run["rows_lost"], run["rows_repeated"], run["same_batches"]) == (0, 0, True)
