"""What bench/record_search.py runs next, and its small size, stopped and gone on with."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.bench.small import ROOT


@pytest.fixture
def script(bench: Callable[[str], ModuleType]) -> ModuleType:
    return bench("record_search")


def recorded(script: ModuleType, table: Any, wanted: list[tuple[Any, int]]) -> Any:
    """The table with runs that are better the greater their learning rate is."""
    for values, seed in wanted:
        run = script.Run(
            values=values,
            seed=seed,
            total_steps=1,
            steps=(1,),
            metrics={script.METRIC: (values["optimizer.learning_rate"],)},
            failure=None,
            seconds=1.0,
            machine=0,
        )
        table = table.with_run(run, {})
    return table


def test_a_design_is_even_and_grows_at_its_end(script: ModuleType) -> None:
    space, beyond = script.FULL.core, script.FULL.beyond
    whole = script.design(script.FULL, 128)
    few = script.design(script.FULL, 100)
    assert few == whole[:100] + whole[128:]
    assert len(whole) == 128 + beyond
    assert all(map(space.holds, whole[:128]))
    assert not any(map(space.holds, whole[128:]))
    assert all(map(script.FULL.space.holds, whole))
    whole = whole[:128]
    for path, own in space.ranges.items():
        if own.kind == "choice":
            counts = Counter(values[path] for values in whole)
            assert set(counts) == set(own.of)
            assert max(counts.values()) - min(counts.values()) <= 2
        else:
            counts = Counter(int(8 * own.coordinate(values[path])) for values in whole)
            assert counts == dict.fromkeys(range(8), 16)


def test_each_batch_size_is_evaluated_at_whole_steps(script: ModuleType) -> None:
    for size in (script.FULL, script.SMALL):
        for batch in size.space.ranges["batching.global_batch_size"].of:
            assert size.rows["train"] % batch == 0
            assert size.epochs * size.rows["train"] % (batch * size.evaluations) == 0


def test_configurations_come_first_and_then_the_seeds_of_the_best(script: ModuleType) -> None:
    table = script.Table(setup={}, space=script.SMALL.space)
    first = script.missing(table, script.SMALL, configurations=3)
    assert [seed for _, seed in first] == [0, 0, 0]
    table = recorded(script, table, first[:2])
    assert script.missing(table, script.SMALL, configurations=3) == first[2:]
    table = recorded(script, table, first[2:])
    best = [run.values for run in table.top(2)]
    assert script.missing(table, script.SMALL, configurations=3) == [(v, 1) for v in best]
    table = recorded(script, table, [(best[0], 1)])
    assert script.missing(table, script.SMALL, configurations=3) == [(best[1], 1)]
    table = recorded(script, table, [(best[1], 1)])
    assert script.missing(table, script.SMALL, configurations=3) == []
    longer = replace(script.SMALL, contender_seeds=4)
    [winner] = table.contenders(1, of=2, seeds=2)
    wanted = [(winner.values, 2), (winner.values, 3)]
    assert script.missing(table, longer, configurations=3) == wanted
    more = script.missing(table, script.SMALL, configurations=5)
    assert [seed for _, seed in more] == [0, 0]
    assert script.missing(table, script.SMALL, configurations=2) == []


def test_runs_of_another_setup_are_not_mixed(script: ModuleType, tmp_path: Path) -> None:
    path, space = tmp_path / "table.json", script.SMALL.space
    assert script.begun(path, {"job": 1, "model": "a"}, space).runs == ()
    table = recorded(
        script,
        script.Table(setup={"job": 1, "model": "a"}, space=space),
        [(space.values([0] * 4), 0)],
    )
    script.write_table(table, path)
    assert script.begun(path, {"job": 1, "model": "a"}, space) == table
    with pytest.raises(SystemExit, match="recorded with another model\n\nhint: record into"):
        script.begun(path, {"job": 1, "model": "b"}, space)


def test_a_recording_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    said = small("--table", str(path), "--configurations", "2")
    whole = json.loads(path.read_text())
    assert "2 of 3 configurations are recorded" in said
    assert [(run["seed"], run["failure"]) for run in whole["runs"]] == [(0, None)] * 2 + [
        (1, None)
    ] * 2
    for run in whole["runs"]:
        steps = 64 // run["values"]["batching.global_batch_size"]
        assert run["total_steps"] == steps
        assert run["steps"] == [steps * part // 4 for part in (1, 2, 3, 4)]
    fast = max(whole["runs"], key=lambda run: run["values"]["optimizer.learning_rate"])
    assert len(set(fast["metrics"]["validation/loss"])) == 4, "other weights each time"

    again = {**whole, "runs": whole["runs"][1:]}
    path.write_text(json.dumps(again))
    said = small("--table", str(path), code=0)
    assert "1 of 2: seed 0" in said
    assert "2 of 2: seed 0" in said
    there = json.loads(path.read_text())["runs"]
    assert len([run for run in there if run["seed"] == 0]) == 3
    lost = whole["runs"][0]
    [made_again] = [run for run in there if (run["seed"], run["values"]) == (0, lost["values"])]
    assert made_again["metrics"] == lost["metrics"]
    small("--table", str(path), "--check", code=0)


def small(*options: str, code: int = 1) -> str:
    """What the script said, which ends with `code`."""
    done = subprocess.run(
        [sys.executable, "bench/record_search.py", "--small", *options],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout
