"""Recorded fine-tuning results on which searches are replayed: bench/search_table.json.

    table = read_table(PATH)
    row = table.configurations[nearest(table.space, proposed, table.configurations, taken=used)]

bench/record_search.py recorded it: each run is one configuration, trained to its end with one seed
and evaluated at even distances.

A replay needs what an algorithm would have measured at the values that it proposes. It gets the
recorded configuration nearest to them that it has not had (`nearest`), is told that one's own
values, and sees that one's curve. So each number that decides anything was measured. A regression
over the table would answer for any values, but with curves that nobody has seen, smoother than real
ones: it would reward those who model what the regression models. What it costs: an algorithm
cannot refine its choice beyond the distances between configurations, and what is taken changes
what is left, as in any search without replacement. Values that change during a trial
(population-based training) cannot be replayed.
"""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

PATH = Path(__file__).resolve().parent / "search_table.json"
METRIC = "validation/accuracy"
"""By which configurations are compared; larger is better."""
FIRST_SEED = 0
"""The seed with which every configuration is recorded."""

Values = dict[str, Any]
"""Dotted path of the job file to a configuration's value."""


@dataclass(frozen=True)
class Range:
    """What one key may be: `[low, high]`, by its logarithm or not, or an ordered choice."""

    kind: Literal["uniform", "loguniform", "choice"]
    of: tuple[Any, ...]

    def coordinate(self, value: Any) -> float:
        """Where a value lies, from 0 (the first) to 1 (the last); choices have equal distances.

        ValueError for what is no choice.
        """
        if self.kind == "choice":
            if value not in self.of:
                raise ValueError(f"{value} is none of {list(self.of)}")
            return self.of.index(value) / (len(self.of) - 1)
        low, high = self.of
        if self.kind == "loguniform":
            low, high, value = math.log(low), math.log(high), math.log(value)
        return (value - low) / (high - low)

    def holds(self, value: Any) -> bool:
        """Whether it is a value of this range."""
        return value in self.of if self.kind == "choice" else self.of[0] <= value <= self.of[1]

    def value(self, share: float) -> Any:
        """The value below which `share`, in [0, 1), of the range lies; four digits of a number."""
        if self.kind == "choice":
            return self.of[int(share * len(self.of))]
        low, high = self.of
        if self.kind == "loguniform":
            return _rounded(low * (high / low) ** share)
        return _rounded(low + (high - low) * share)


@dataclass(frozen=True)
class Space:
    """The searched keys, in their order."""

    ranges: Mapping[str, Range]

    def coordinates(self, values: Values) -> npt.NDArray[np.float64]:
        """Where a configuration lies in the unit cube; shape [keys]."""
        return np.array([own.coordinate(values[path]) for path, own in self.ranges.items()])

    def holds(self, values: Values) -> bool:
        """Whether a configuration lies in it."""
        return all(own.holds(values[path]) for path, own in self.ranges.items())

    def values(self, shares: Sequence[float]) -> Values:
        """The configuration at a point of the unit cube that is even over the values."""
        pairs = zip(self.ranges.items(), shares, strict=True)
        return {path: own.value(share) for (path, own), share in pairs}

    def to_json(self) -> dict[str, Any]:
        """As `search.space` of a job file has it."""
        return {path: {own.kind: list(own.of)} for path, own in self.ranges.items()}

    @classmethod
    def from_json(cls, tree: Mapping[str, Mapping[str, Any]]) -> Space:
        return cls(
            {
                path: Range(kind, tuple(of))  # type: ignore[arg-type]
                for path, held in tree.items()
                for kind, of in held.items()
            }
        )


@dataclass(frozen=True)
class Run:
    """One configuration, trained to its end with one seed."""

    values: Values
    seed: int
    total_steps: int
    """Of the whole training, as the learning rate was scheduled."""
    steps: tuple[int, ...]
    """At which the model was evaluated."""
    metrics: Mapping[str, tuple[float | None, ...]]
    """What each evaluation found, by `validation/...`; None where it is no finite number."""
    failure: str | None
    """Why training ended before its time, such as that it diverged."""
    seconds: float
    machine: int
    """Which of the table's machines trained it."""

    @property
    def score(self) -> float:
        """The best evaluation; minus infinity where there is none."""
        return max((v for v in self.metrics[METRIC] if v is not None), default=-math.inf)


@dataclass(frozen=True)
class Table:
    """All that was recorded."""

    setup: Mapping[str, Any]
    """What was the same for all runs: the command, the job, the data."""
    space: Space
    machines: tuple[Mapping[str, Any], ...] = ()
    runs: tuple[Run, ...] = ()
    """By seed, then by their values."""

    @cached_property
    def configurations(self) -> list[Run]:
        """The run of each configuration with the first seed."""
        return [run for run in self.runs if run.seed == FIRST_SEED]

    def seeds_of(self, values: Values) -> list[Run]:
        """All runs of a configuration, by seed."""
        return [run for run in self.runs if run.values == values]

    def top(self, count: int) -> list[Run]:
        """The best configurations by their first seed, the best first."""
        return sorted(self.configurations, key=lambda run: -run.score)[:count]

    def contenders(self, count: int, *, of: int, seeds: int) -> list[Run]:
        """Those of the top `of` with the highest mean score over the first `seeds` seeds, the best
        first: what makes them so does not change with more seeds."""
        return sorted(self.top(of), key=lambda run: -self.mean(run.values, seeds=seeds))[:count]

    def mean(self, values: Values, *, seeds: int | None = None) -> float:
        """The mean score of a configuration over its first seeds, or all of them."""
        return statistics.fmean(run.score for run in self.seeds_of(values)[:seeds])

    def with_run(self, run: Run, machine: Mapping[str, Any]) -> Table:
        """The table with one more run, or with another in place of the same one."""
        machines = (*self.machines, *([] if machine in self.machines else [machine]))
        run = replace(run, machine=machines.index(machine))
        others = (own for own in self.runs if (own.seed, own.values) != (run.seed, run.values))
        order = sorted((*others, run), key=lambda own: (own.seed, *own.values.values()))
        return replace(self, machines=machines, runs=tuple(order))


def nearest(
    space: Space, values: Values, runs: Sequence[Run], *, taken: Collection[int] = ()
) -> int:
    """Position in `runs` of the one nearest to `values`, without those whose positions are `taken`.

    Near by Euclid's distance in the unit cube, where each range has length 1; of two that are
    equally near the first. ValueError where all are taken.
    """
    free = [number for number in range(len(runs)) if number not in taken]
    if not free:
        raise ValueError(f"all {len(runs)} recorded configurations are taken")
    points = np.stack([space.coordinates(runs[number].values) for number in free])
    distances = np.linalg.norm(points - space.coordinates(values), axis=1)
    return free[int(np.argmin(distances))]


# ------------------------------------------------------------------------------------ demands


@dataclass(frozen=True)
class Demands:
    """What a table must have to be of use."""

    configurations: int
    evaluations: int
    """Of each run that did not fail."""
    finalists: int
    """The best configurations, which are recorded with several seeds."""
    seeds: int
    contenders: int
    """Of those, the best by the mean over these seeds, which are recorded with more: the best of
    them by the mean over all of its seeds is the table's best."""
    contender_seeds: int
    margin: float
    """Part of each range, at either end, in which the best must not lie, where the range could go
    on: there is no dropout below 0."""


def contenders_of(table: Table, demands: Demands) -> list[Run]:
    """Those that may be the best, by what was asked of the table."""
    return table.contenders(demands.contenders, of=demands.finalists, seeds=demands.seeds)


def shortfalls(table: Table, demands: Demands) -> list[str]:
    """What the table lacks, each as a sentence; empty where it meets the demands."""
    found = []
    if len(table.configurations) < demands.configurations:
        found.append(
            f"{len(table.configurations)} of {demands.configurations} configurations are recorded"
        )
    for run in table.runs:
        if run.failure is None and len(run.steps) != demands.evaluations:
            found.append(
                f"{run.values}, seed {run.seed}, has {len(run.steps)} evaluations instead of "
                f"{demands.evaluations}"
            )
    contenders = contenders_of(table, demands)
    wanted = [("place", run, demands.seeds) for run in table.top(demands.finalists)]
    wanted += [("contender", run, demands.contender_seeds) for run in contenders]
    for kind, run, seeds in wanted:
        held = len(table.seeds_of(run.values))
        if held < seeds:
            found.append(f"{kind} {run.values} is recorded with {held} of {seeds} seeds")
    if contenders:
        best = max(contenders, key=lambda run: table.mean(run.values))
        for path, own in table.space.ranges.items():
            share = own.coordinate(best.values[path])
            low = 0.0 if own.kind == "uniform" and own.of[0] == 0 else demands.margin
            if not low <= share <= 1 - demands.margin:
                found.append(
                    f"the best has {path} {best.values[path]}, which is {share:.0%} of its range, "
                    f"on the edge of {list(own.of)}"
                )
    return found


# --------------------------------------------------------------------------------------- file


def read_table(path: Path) -> Table:
    """The table that `write_table` wrote."""
    tree = json.loads(path.read_text(encoding="utf-8"))
    runs = (
        Run(
            **{
                **own,
                "steps": tuple(own["steps"]),
                "metrics": {name: tuple(values) for name, values in own["metrics"].items()},
            }
        )
        for own in tree["runs"]
    )
    return Table(
        setup=tree["setup"],
        space=Space.from_json(tree["space"]),
        machines=tuple(tree["machines"]),
        runs=tuple(runs),
    )


def write_table(table: Table, path: Path) -> None:
    """Puts the table at `path` in one step: a reader, and whoever is killed, finds a whole one.

    Each run is one line.
    """
    head = {"setup": table.setup, "space": table.space.to_json(), "machines": table.machines}
    above = json.dumps(head, indent=1, allow_nan=False).removesuffix("\n}")
    lines = ",\n".join("  " + json.dumps(asdict(run), allow_nan=False) for run in table.runs)
    part = path.with_name(f".{path.name}.part")
    part.write_text(f'{above},\n "runs": [\n{lines}\n ]\n}}\n', encoding="utf-8")
    os.replace(part, path)


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")
