"""Nodes of a real Ray cluster are taken and join while a run goes on: the benchmark's small run."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.timeout(900)
def test_a_run_whose_nodes_come_and_go_trains_on_the_same_batches_and_loses_no_step_it_could_save(
    tmp_path: Path,
) -> None:
    found, picture = tmp_path / "elastic.json", tmp_path / "elastic.png"
    command = [sys.executable, ROOT / "bench" / "elastic.py", "--small"]
    ended = subprocess.run(
        [*command, "--json", found],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr[-20_000:]
    result = json.loads(found.read_text())
    assert result["global_batches_that_differ"] == 0
    assert result["rows"]["epochs"] >= 1
    assert result["rows"]["lost"] == result["rows"]["repeated"] == 0
    # Of numbers near 0.7; a batch that differed by one row would differ by 1e-3.
    assert result["loss_difference_max"] < 1e-4
    assert result["evaluations"]["shared"] >= 4
    assert result["evaluations"]["not_each_row_once"] == 0
    assert result["evaluations"]["loss_difference_max"] < 1e-4

    # Started with the one node of two that was there; a second joined.
    alone, grown, *others = result["attempts"]
    assert (alone["workers"], grown["workers"]) == (1, 2)
    assert alone["gave_way"]
    assert alone["steps_lost"] == 0
    assert grown["from_step"] == alone["to_step"]
    # The store took no checkpoint within the notice: the run went on from the one before.
    assert not grown["gave_way"]
    assert grown["from_step"] < others[0]["from_step"] <= grown["to_step"]
    # Its node was taken with 30 seconds, as another joined; then the head was, and the driver heard
    # of it: each time all that was trained is saved, and training goes on exactly there.
    assert len(others) >= 2
    assert {a["workers"] for a in others} == {1}
    assert all(a["gave_way"] and a["steps_lost"] == 0 for a in others)
    for before, after in itertools.pairwise(others):
        assert after["from_step"] == before["to_step"]
    assert picture.read_bytes().startswith(b"\x89PNG")
