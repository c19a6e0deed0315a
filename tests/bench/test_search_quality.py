"""bench/search_quality.py on tables that are made up: what a replay spends and finds."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.bench.small import small

JOB = {
    "task": {"labels": ["negative", "positive"], "max_tokens": 32},
    "batching": {"max_tokens_per_microbatch": 1024},
    "train": {"epochs": 3},
}


@pytest.fixture
def quality(bench: Callable[[str], ModuleType]) -> ModuleType:
    return bench("search_quality")


def table_of(tables: Any, *, count: int, diverges_above: float = math.inf) -> Any:
    """Runs of six evaluations in three epochs, best at a learning rate in the middle."""
    space = tables.Space(
        {
            "optimizer.learning_rate": tables.Range("loguniform", (1e-5, 1e-1)),
            "model.dropout": tables.Range("uniform", (0.0, 0.5)),
        }
    )
    table = tables.Table(setup={"job": JOB}, space=space)
    for number in range(count):
        share = (number + 0.5) / count
        values = space.values([share, number * 0.37 % 1])
        best = 0.9 - abs(share - 0.5) / 2 - values["model.dropout"] / 10
        curve = tuple(round(best - 0.2 / part, 6) for part in range(1, 7))
        has_diverged = values["optimizer.learning_rate"] > diverges_above
        done = 2 if has_diverged else 6
        run = tables.Run(
            values=values,
            seed=0,
            total_steps=60,
            steps=tuple(range(10, 10 * done + 1, 10)),
            metrics={tables.METRIC: curve[:done]},
            failure="the loss is not finite" if has_diverged else None,
            seconds=3.0 + number % 3,
            machine=0,
        )
        table = table.with_run(run, {})
    return table


def test_random_search_without_stopping_goes_through_the_table(
    quality: ModuleType, bench: Callable[[str], ModuleType]
) -> None:
    table = table_of(bench("search_table"), count=12)
    curve = quality.replayed(table, "random", "none", seed=1, most_epochs=None)
    assert len(curve) == 12 * 6
    assert curve[-1] == (pytest.approx(36.0), max(run.score for run in table.configurations))
    assert [spent for spent, _ in curve[:3]] == pytest.approx([0.5, 1.0, 1.5])
    assert curve == quality.replayed(table, "random", "none", seed=1, most_epochs=None)
    assert curve != quality.replayed(table, "random", "none", seed=2, most_epochs=None)


@pytest.mark.parametrize("algorithm", ["random", "tpe", "cmaes"])
@pytest.mark.parametrize("scheduler", ["asha", "hyperband", "median"])
def test_stopped_trials_spend_less_and_each_is_had_once(
    quality: ModuleType, bench: Callable[[str], ModuleType], algorithm: str, scheduler: str
) -> None:
    table = table_of(bench("search_table"), count=24)
    curve = quality.replayed(table, algorithm, scheduler, seed=0, most_epochs=None)
    assert 24 * 0.5 <= curve[-1][0] < 72
    bests = [best for _, best in curve]
    assert bests == sorted(bests)
    assert bests[-1] <= max(run.score for run in table.configurations)


def test_a_replay_ends_with_its_epochs(
    quality: ModuleType, bench: Callable[[str], ModuleType]
) -> None:
    table = table_of(bench("search_table"), count=24)
    curve = quality.replayed(table, "random", "none", seed=0, most_epochs=9)
    # Those that were under way are stopped at their next report, which is their end.
    assert 9 <= curve[-1][0] <= 9 + 3 * quality.SLOTS


def test_what_has_diverged_fails_where_it_did_and_counts(
    quality: ModuleType, bench: Callable[[str], ModuleType]
) -> None:
    table = table_of(bench("search_table"), count=12, diverges_above=1e-2)
    diverged = [run for run in table.configurations if run.failure]
    assert len(diverged) == 3
    curve = quality.replayed(table, "random", "none", seed=0, most_epochs=None)
    # Two evaluations, and what came after them up to the failure.
    assert curve[-1][0] == pytest.approx(9 * 3 + 3 * 1.5)
    assert quality.epochs_of(table, diverged[0]) == pytest.approx(1.5)


def test_quantiles_know_of_seeds_that_never_come_near(quality: ModuleType) -> None:
    assert quality.quantile([3.0, None, 1.0], 0.5) == 3.0
    assert quality.quantile([None, None, 1.0], 0.5) is None
    assert quality.quantile([4.0, 2.0], 0.5) == 3.0
    curve = [(1.0, 0.5), (2.0, 0.7), (3.0, 0.7)]
    assert quality.epochs_to(curve, 0.7) == 2.0
    assert quality.epochs_to(curve, 0.8) is None
    assert quality.best_at(curve, 2.5) == 0.7
    assert quality.best_at(curve, 0.5) == -math.inf


def test_the_small_size_draws_and_tells(tmp_path: Path, bench: Callable[[str], ModuleType]) -> None:
    tables = bench("search_table")
    path = tmp_path / "table.json"
    tables.write_table(table_of(tables, count=16, diverges_above=1e-2), path)
    picture = tmp_path / "picture.png"
    found = small("search_quality.py", tmp_path, "--table", str(path), "--picture", str(picture))
    assert found["configurations"] == 16
    assert found["best"] == max(run.score for run in tables.read_table(path).configurations)
    assert set(found["pairs"]) == {
        f"{algorithm}, {scheduler}"
        for algorithm in ("random", "tpe", "cmaes")
        for scheduler in ("none", "asha", "hyperband", "median")
    } | {"random, asha of 3", "tpe, asha of 3"}
    plain = found["pairs"]["random, none"]
    assert plain["reached"] == found["seeds"] == 2
    assert len(plain["best"]["median"]) == 120
    assert picture.stat().st_size > 10_000
    assert json.dumps(found)
