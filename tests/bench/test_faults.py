"""The small size of bench/faults.py: a run through a sick store, and flipped bits."""

from __future__ import annotations

from pathlib import Path

from tests.bench.small import small


def test_a_sick_store_costs_a_run_nothing_but_time(tmp_path: Path) -> None:
    found = small("faults.py", tmp_path, "--seed", "7", "--share", "0.3")
    went = found["run"]
    assert sum(went["injected"].values()) > 0.2 * went["requests"]
    assert went["injected"]["away"] > 0
    assert (went["same_weights"], went["same_batches"]) == (True, True)
    assert (went["rows_lost"], went["rows_repeated"]) == (0, 0)
    for what, counts in (found["bodies"] | found["stored"]).items():
        assert counts["found"] > 0, what
        assert not counts.get("accepted"), what
    for what in ("rows read", "checkpoints restored"):
        assert found["bodies"][what]["objects_hit"] > 1, what
