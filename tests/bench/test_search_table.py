"""The table of recorded runs: what is near, what is best, what it lacks, and its file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


@pytest.fixture
def tables(bench: Callable[[str], ModuleType]) -> ModuleType:
    return bench("search_table")


def space_of(tables: ModuleType) -> Any:
    return tables.Space(
        {
            "rate": tables.Range("loguniform", (1e-5, 1e-1)),
            "dropout": tables.Range("uniform", (0.0, 0.5)),
            "batch": tables.Range("choice", (8, 16, 64)),
        }
    )


def run_of(
    tables: ModuleType, rate: float, *, score: float = 0.5, seed: int = 0, batch: int = 16
) -> Any:
    return tables.Run(
        values={"rate": rate, "dropout": 0.25, "batch": batch},
        seed=seed,
        total_steps=8,
        steps=(4, 8),
        metrics={"validation/accuracy": (0.1, score)},
        failure=None,
        seconds=1.5,
        machine=0,
    )


def filled(tables: ModuleType, *runs: Any) -> Any:
    table = tables.Table(setup={"job": "a job"}, space=space_of(tables))
    for run in runs:
        table = table.with_run(run, {"cpu": "one"})
    return table


def test_coordinates_are_shares_of_the_ranges(tables: ModuleType) -> None:
    space = space_of(tables)
    where = space.coordinates({"rate": 1e-3, "dropout": 0.1, "batch": 64})
    assert where.tolist() == pytest.approx([0.5, 0.2, 1.0])
    assert space.values([0.0, 0.0, 0.0]) == {"rate": 1e-5, "dropout": 0.0, "batch": 8}
    assert space.values([0.5, 0.2, 0.34]) == {"rate": 1e-3, "dropout": 0.1, "batch": 16}
    assert space.values([0.999999] * 3) == {"rate": 1e-1, "dropout": 0.5, "batch": 64}
    assert tables.Space.from_json(space.to_json()) == space


def test_a_choice_that_the_space_lacks_has_no_place(tables: ModuleType) -> None:
    with pytest.raises(ValueError, match="32"):
        space_of(tables).coordinates({"rate": 1e-3, "dropout": 0.1, "batch": 32})


def test_near_is_what_differs_by_the_smallest_part_of_its_ranges(tables: ModuleType) -> None:
    # 1e-3 is nearer to 2e-2 than 5e-2 by its value, but not by its logarithm.
    rates = [1e-3, 5e-2, 1e-5]
    runs = [run_of(tables, rate) for rate in rates]
    proposed = {"rate": 2e-2, "dropout": 0.25, "batch": 16}
    space = space_of(tables)
    assert tables.nearest(space, proposed, runs) == 1
    assert tables.nearest(space, proposed, runs, taken={1}) == 0
    assert tables.nearest(space, proposed, runs, taken={0, 1}) == 2
    # Two batch sizes on are the whole range; half of the learning rates are less.
    runs = [run_of(tables, 2e-2, batch=64), run_of(tables, 2e-4, batch=8)]
    assert tables.nearest(space, proposed | {"batch": 8}, runs) == 1


def test_of_equally_near_ones_the_first_is_taken(tables: ModuleType) -> None:
    runs = [run_of(tables, 1e-2), run_of(tables, 1e-4), run_of(tables, 1e-2)]
    assert tables.nearest(space_of(tables), runs[2].values, runs) == 0
    assert tables.nearest(space_of(tables), runs[2].values, runs, taken={0}) == 2


def test_a_table_that_is_used_up_is_told(tables: ModuleType) -> None:
    runs = [run_of(tables, 1e-2)]
    with pytest.raises(ValueError, match="all 1 recorded configurations are taken"):
        tables.nearest(space_of(tables), runs[0].values, runs, taken={0})


def test_a_score_is_the_best_evaluation(tables: ModuleType) -> None:
    run = run_of(tables, 1e-3)
    for curve, score in (((0.4, 0.7, 0.6), 0.7), ((0.4, None), 0.4), ((), float("-inf"))):
        assert replace(run, metrics={"validation/accuracy": curve}).score == score


def test_the_order_of_runs_is_not_that_of_recording(tables: ModuleType) -> None:
    runs = [run_of(tables, 1e-3), run_of(tables, 1e-4), run_of(tables, 1e-5, seed=1)]
    table = filled(tables, *runs)
    assert table == filled(tables, *runs[::-1])
    assert [run.values["rate"] for run in table.runs] == [1e-4, 1e-3, 1e-5]
    assert [run.values["rate"] for run in table.configurations] == [1e-4, 1e-3]


def test_a_run_that_is_made_again_takes_the_place_of_the_first(tables: ModuleType) -> None:
    table = filled(tables, run_of(tables, 1e-3, score=0.5), run_of(tables, 1e-3, score=0.6))
    assert [run.score for run in table.runs] == [0.6]
    assert table.machines == ({"cpu": "one"},)
    table = table.with_run(run_of(tables, 1e-4), {"cpu": "two"})
    assert [run.machine for run in table.runs] == [1, 0]


def test_contenders_are_those_of_the_highest_mean_over_seeds(tables: ModuleType) -> None:
    lucky = [run_of(tables, 1e-3, score=0.9), run_of(tables, 1e-3, score=0.3, seed=1)]
    steady = [run_of(tables, 1e-4, score=0.8), run_of(tables, 1e-4, score=0.8, seed=1)]
    table = filled(tables, *lucky, *steady, run_of(tables, 1e-2, score=0.7))
    assert [run.score for run in table.top(2)] == [0.9, 0.8]
    assert table.mean(lucky[0].values) == pytest.approx(0.6)
    assert table.mean(lucky[0].values, seeds=1) == 0.9
    rates = [run.values["rate"] for run in table.contenders(2, of=2, seeds=2)]
    assert rates == [1e-4, 1e-3]
    assert [run.values["rate"] for run in table.contenders(1, of=2, seeds=1)] == [1e-3]
    assert filled(tables).contenders(2, of=2, seeds=2) == []


def test_what_a_table_lacks_is_told(tables: ModuleType) -> None:
    demands = demands_of(tables, configurations=3, finalists=2, seeds=2)
    seeds = [run_of(tables, rate, seed=seed, score=0.8) for rate in (1e-3, 1e-2) for seed in (0, 1)]
    right = filled(tables, *seeds, run_of(tables, 1e-4, score=0.7))
    assert tables.shortfalls(right, demands) == []

    [few] = tables.shortfalls(filled(tables, *seeds), demands)
    assert few == "2 of 3 configurations are recorded"
    [seed] = tables.shortfalls(filled(tables, *seeds[:3], run_of(tables, 1e-4)), demands)
    assert seed.startswith("place {'rate': 0.01")
    assert "1 of 2 seeds" in seed
    [short] = tables.shortfalls(
        filled(tables, *seeds, replace(run_of(tables, 1e-4), steps=(4,))), demands
    )
    assert "1 evaluations instead of 2" in short
    diverged = replace(run_of(tables, 1e-4), steps=(4,), failure="the loss is not finite")
    assert tables.shortfalls(filled(tables, *seeds, diverged), demands) == []
    more = replace(demands, contender_seeds=3)
    [contender] = tables.shortfalls(right, more)
    assert contender.startswith("contender {'rate': 0.001")
    assert "2 of 3 seeds" in contender
    right = right.with_run(run_of(tables, 1e-3, seed=2, score=0.1), {"cpu": "one"})
    assert tables.shortfalls(right, more) == []


def demands_of(tables: ModuleType, *, configurations: int, finalists: int, seeds: int) -> Any:
    return tables.Demands(
        configurations=configurations,
        evaluations=2,
        finalists=finalists,
        seeds=seeds,
        contenders=1,
        contender_seeds=seeds,
        margin=0.1,
    )


@pytest.mark.parametrize(("path", "value"), [("rate", 2e-5), ("dropout", 0.46), ("batch", 8)])
def test_a_best_one_on_an_edge_is_told(tables: ModuleType, path: str, value: float) -> None:
    demands = demands_of(tables, configurations=1, finalists=1, seeds=1)
    run = run_of(tables, 1e-3)
    assert tables.shortfalls(filled(tables, run), demands) == []
    [edge] = tables.shortfalls(
        filled(tables, replace(run, values=run.values | {path: value})), demands
    )
    assert f"the best has {path} {value}" in edge


def test_a_dropout_near_0_is_not_on_an_edge(tables: ModuleType) -> None:
    demands = demands_of(tables, configurations=1, finalists=1, seeds=1)
    run = run_of(tables, 1e-3)
    none = replace(run, values=run.values | {"dropout": 0.0})
    assert tables.shortfalls(filled(tables, none), demands) == []


def test_a_table_is_read_as_it_was_written(tables: ModuleType, tmp_path: Path) -> None:
    diverged = replace(
        run_of(tables, 1e-2), metrics={"validation/accuracy": (0.5, None)}, failure="diverged"
    )
    table = filled(tables, run_of(tables, 1e-3), diverged)
    path = tmp_path / "table.json"
    tables.write_table(table, path)
    assert tables.read_table(path) == table
    assert sum('"seed"' in line for line in path.read_text().splitlines()) == 2
    empty = filled(tables)
    tables.write_table(empty, path)
    assert tables.read_table(path) == empty
    assert [own.name for own in tmp_path.iterdir()] == ["table.json"]
