"""Searches replayed on recorded trainings: the best metric against the epochs spent.

    python bench/search_quality.py [--seeds N] [--table FILE] [--picture FILE.png] [--small]
                                   [--json FILE]

Each algorithm with each scheduler runs through the study's own engine, with its own samplers and
schedulers, over four simulated slots. What a trial finds, and how long it takes to, is that of the
recorded configuration nearest to what the algorithm proposed (bench/search_table.py). A trial that
was recorded to diverge fails where it did. Epochs are counted from every evaluation of every trial,
those of stopped ones included; a trial that waited goes on where it was.

Random search without stopping goes through the whole table; what it needs to come near the table's
best is the measure of the others. The Gaussian process, which takes about a second for a proposal,
is replayed without stopping alone, and not as far. Population-based training is not replayed: its
values change during a trial, and nobody has recorded what that gives.

Exit code 1 where ASHA, over random values, does not come within 0.005 of the best recorded metric
with at most a quarter of the epochs that random search without stopping needs: medians over seeds.
In the small size, which has few seeds, this is told and not judged.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lab
import numpy as np
from rich.table import Table as Shown
from search_table import METRIC, PATH, Run, Table, nearest, read_table

from jobs.parse import parse_spec
from jobs.record import Failure, State
from jobs.search_spec import Search
from jobs.study.engine import Engine, Leg, Report
from jobs.study.events import Asked, Event, Values
from jobs.study.samplers import Sampler, make_sampler
from jobs.study.schedulers import make_scheduler
from jobs.study.space import Space, space_of

NEAR = 0.005
MOST_SHARE = 0.25
SLOTS = 4
SCHEDULERS: dict[str, Any] = {
    "none": None,
    "asha": "asha",
    "hyperband": "hyperband",
    "median": "median",
    "asha of 3": {"kind": "asha", "reduction_factor": 3},
}
"""As the job file has them, with its defaults but for the last, whose factor is Hyperband's."""
PANELS = ("none", "asha", "hyperband", "median")
PLAIN, JUDGED = "random, none", "random, asha"
PAIRS = {
    (algorithm, scheduler): 120.0
    for algorithm in ("random", "tpe", "cmaes")
    for scheduler in PANELS
} | {
    ("random", "none"): None,
    ("random", "asha of 3"): 120.0,
    ("tpe", "asha of 3"): 120.0,
    ("gp", "none"): 60.0,
}
"""Algorithms and schedulers, each with the epochs after which its replay ends; None: no limit."""
SHOWN_EPOCHS = 120
MOMENTS = (3, 6, 12, 24, 48, 96)
"""Epochs at which the table tells the best."""
_CLOSE = 1e-9

Curve = list[tuple[float, float]]
"""(epochs spent, best metric so far) after each evaluation."""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, metavar="N", help="30, or 2 with --small")
    parser.add_argument("--table", type=Path, metavar="FILE", help=f"instead of bench/{PATH.name}")
    parser.add_argument(
        "--picture", type=Path, metavar="FILE.png", help="all curves; else beside --json"
    )
    arguments = lab.arguments_of(parser)
    seeds = arguments.seeds or (2 if arguments.small else 30)
    path = arguments.table or PATH
    if not path.exists():
        parser.error(f"there is no {path}; record it by bench/record_search.py")
    pairs = dict(PAIRS)
    if arguments.small:
        del pairs["gp", "none"]
    result = measure(read_table(path), pairs, seeds=seeds)
    picture = arguments.picture or (arguments.json and arguments.json.with_suffix(".png"))
    if picture is not None:
        draw(result, picture)
    lab.tell("search_quality", result, tables=tables(result), json_file=arguments.json)
    return 0 if arguments.small or result["is_right"] else 1


def measure(
    table: Table, pairs: Mapping[tuple[str, str], float | None], *, seeds: int
) -> dict[str, Any]:
    """What each pair comes to with each seed."""
    best = max(run.score for run in table.configurations)
    result: dict[str, Any] = {
        "metric": METRIC,
        "configurations": len(table.configurations),
        "epochs_of_all": sum(epochs_of(table, run) for run in table.configurations),
        "best": best,
        "near": sum(run.score >= best - NEAR for run in table.configurations),
        "seeds": seeds,
        "slots": SLOTS,
        "pairs": {},
    }
    for (algorithm, scheduler), most_epochs in pairs.items():
        began = time.monotonic()
        name = f"{algorithm}, {scheduler}"
        curves = [
            replayed(table, algorithm, scheduler, seed=seed, most_epochs=most_epochs)
            for seed in range(seeds)
        ]
        result["pairs"][name] = summary(
            curves, target=best - NEAR, most_epochs=most_epochs or SHOWN_EPOCHS
        )
        sys.stderr.write(f"{name}: {time.monotonic() - began:.0f} s\n")
    result["share"] = share(result)
    result["is_right"] = is_right(result)
    return result


def is_right(result: dict[str, Any]) -> bool:
    """Whether ASHA comes near the best with so small a share of the epochs."""
    return result["share"] is not None and bool(result["share"] <= MOST_SHARE)


def share(result: dict[str, Any]) -> float | None:
    """Of the epochs that random search needs, those that it needs with ASHA; None where either of
    them, by its median, does not come near the best."""
    with_asha, plain = (result["pairs"][name]["median"] for name in (JUDGED, PLAIN))
    return None if with_asha is None or plain is None else with_asha / plain


# ------------------------------------------------------------------------------------- the replay


def replayed(
    table: Table, algorithm: str, scheduler: str, *, seed: int, most_epochs: float | None
) -> Curve:
    """One study, to the end of the table or of the epochs."""
    tree = {
        **table.setup["job"],
        "name": "replay",
        "model": {"source": "recorded"},
        "data": {"train": "recorded", "validation": "recorded"},
        "store": "recorded",
        "search": {
            "metric": METRIC,
            "mode": "max",
            "space": table.space.to_json(),
            "algorithm": algorithm,
            "scheduler": SCHEDULERS[scheduler],
            "trials": len(table.configurations),
            "seed": seed,
            "finalists": None,
            "baseline": False,
            "budget": {"epochs": most_epochs},
        },
    }
    spec = parse_spec(tree, where="replay")
    assert spec.search is not None
    return Replay(table, spec.search, space_of(spec)).run()


def epochs_of(table: Table, run: Run) -> float:
    """Epochs of a run up to its end."""
    whole: float = table.setup["job"]["train"]["epochs"]
    return whole if run.failure is None else whole * moments_of(run)[-1] / run.total_steps


def moments_of(run: Run) -> list[int]:
    """Steps of a run's evaluations, and of its failure, which was an evaluation's distance later or
    sooner: later is taken."""
    if run.failure is None or not run.steps:
        return list(run.steps) or [run.total_steps]
    distance = run.steps[-1] - (run.steps[-2] if len(run.steps) > 1 else 0)
    return [*run.steps, min(run.steps[-1] + distance, run.total_steps)]


class Recorded:
    """A Sampler whose proposals become recorded configurations, each once."""

    def __init__(self, sampler: Sampler, table: Table) -> None:
        self._sampler = sampler
        self._table = table
        self._number = {str(run.values): n for n, run in enumerate(table.configurations)}
        self._taken: set[int] = set()

    def run_of(self, values: Values) -> Run:
        return self._table.configurations[self._number[str(values)]]

    def observe(self, event: Event) -> None:
        if isinstance(event, Asked):
            self._taken.add(self._number[str(event.values)])
        self._sampler.observe(event)

    def ask(self, trial: int) -> Values | None:
        """None once all are taken."""
        runs = self._table.configurations
        proposed = self._sampler.ask(trial) if len(self._taken) < len(runs) else None
        if proposed is None:
            return None
        return dict(runs[nearest(self._table.space, proposed, runs, taken=self._taken)].values)


class NoLog:
    """Where events go that nobody reads again."""

    def append(self, events: Sequence[Event]) -> None:
        """Forgets them."""


@dataclass
class Training:
    """A trial of the replay."""

    run: Run
    done: int = 0
    """Evaluations that it has had."""


class Replay:
    """A study over simulated slots, whose clock jumps from evaluation to evaluation."""

    def __init__(self, table: Table, search: Search, space: Space) -> None:
        self._table = table
        self._recorded = Recorded(make_sampler(search, space, search.seed), table)
        self._engine = Engine(
            search,
            self._recorded,
            make_scheduler(search, space),
            NoLog(),
            is_saved=lambda trial, step: True,
            clock=lambda: self._now,
        )
        self._now = 0.0
        self._order = itertools.count()
        self._coming: list[tuple[float, int, str]] = []
        """When which slot comes to its next evaluation; equal ones in the order of their start."""
        self._legs: dict[str, tuple[Leg, float]] = {}
        """What each busy slot trains, and until which fraction."""
        self._trainings: dict[int, Training] = {}
        self._epochs = 0.0
        self._best = -math.inf
        self._curve: Curve = []

    def run(self) -> Curve:
        """Works until the study is over."""
        self._begin_legs()
        while self._coming:
            self._now, _, slot = heapq.heappop(self._coming)
            self._evaluate(slot)
            self._begin_legs()
        return self._curve

    def _begin_legs(self) -> None:
        for slot in (f"slot-{number}" for number in range(SLOTS)):
            if slot in self._legs or (leg := self._engine.work(slot)) is None:
                continue
            run = self._recorded.run_of(leg.values)
            self._trainings.setdefault(leg.trial, Training(run))
            self._legs[slot] = leg, leg.until
            self._wait_for(slot, run)

    def _wait_for(self, slot: str, run: Run) -> None:
        seconds = run.seconds / len(moments_of(run))
        heapq.heappush(self._coming, (self._now + seconds, next(self._order), slot))

    def _evaluate(self, slot: str) -> None:
        """A trial comes to its next evaluation, or to where it fails."""
        leg, until = self._legs[slot]
        training = self._trainings[leg.trial]
        run = training.run
        steps = [0, *moments_of(run)]
        epochs = [step / run.total_steps * self._whole for step in steps]
        self._epochs += epochs[training.done + 1] - epochs[training.done]
        training.done += 1
        if training.done > len(run.steps):
            problem = (run.failure or "it was never evaluated", None)
            self._engine.failed(leg.trial, Failure(state=State.FAILED_USER, problems=(problem,)))
            self._curve.append((self._epochs, self._best))
            del self._legs[slot]
            return
        values = run.metrics[METRIC][: training.done]
        best = max((v for v in values if v is not None), default=None)
        self._best = max(self._best, -math.inf if best is None else best)
        self._curve.append((self._epochs, self._best))
        fraction = steps[training.done] / run.total_steps
        if fraction >= until - _CLOSE:
            decided = self._engine.reported(
                leg.trial,
                Report(
                    step=steps[training.done],
                    fraction=fraction,
                    epochs=epochs[training.done],
                    value=values[-1],
                    best=best,
                    seconds=0.0,
                ),
            )
            if decided.decision != "continue":
                self._engine.left(leg.trial)
                del self._legs[slot]
                return
            assert decided.until is not None
            self._legs[slot] = leg, decided.until
        self._wait_for(slot, run)

    @property
    def _whole(self) -> float:
        epochs: float = self._table.setup["job"]["train"]["epochs"]
        return epochs


# ---------------------------------------------------------------------------------- what it shows


def summary(curves: Sequence[Curve], *, target: float, most_epochs: float) -> dict[str, Any]:
    """Quartiles of the best at each whole number of epochs, and of the epochs to the target."""
    at = list(range(1, int(most_epochs) + 1))
    best = np.array([[best_at(curve, epochs) for epochs in at] for curve in curves])
    needed = [epochs_to(curve, target) for curve in curves]
    low, median, high = np.quantile(best, (0.25, 0.5, 0.75), axis=0, method="nearest")
    return {
        "epochs_to_near": needed,
        "reached": sum(epochs is not None for epochs in needed),
        "first_quartile": quantile(needed, 0.25),
        "median": quantile(needed, 0.5),
        "third_quartile": quantile(needed, 0.75),
        "best": {
            "epochs": at,
            "first_quartile": [finite(value) for value in low],
            "median": [finite(value) for value in median],
            "third_quartile": [finite(value) for value in high],
        },
    }


def best_at(curve: Curve, epochs: float) -> float:
    """The best metric once so many epochs are spent; minus infinity before any."""
    return next((best for spent, best in reversed(curve) if spent <= epochs + _CLOSE), -math.inf)


def epochs_to(curve: Curve, target: float) -> float | None:
    """Epochs after which the best is at least `target`; None where it never is."""
    return next((spent for spent, best in curve if best >= target - _CLOSE), None)


def quantile(needed: Sequence[float | None], share: float) -> float | None:
    """Of epochs, where None is more than any; None where the quantile is among those."""
    whole = sorted(math.inf if epochs is None else epochs for epochs in needed)
    place = share * (len(whole) - 1)
    below, above = whole[math.floor(place)], whole[math.ceil(place)]
    return finite(below if below == above else below + (place % 1) * (above - below))


def finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def tables(result: dict[str, Any]) -> list[Shown]:
    needed = Shown(
        title=f"Epochs until {result['metric']} is within {NEAR} of {result['best']:.4f}, the best "
        f"of {result['configurations']} configurations",
        caption=f"{result['near']} configurations are as near; all of them are "
        f"{result['epochs_of_all']:.0f} epochs; {result['seeds']} seeds, {result['slots']} slots",
        title_justify="left",
    )
    for column in ("algorithm, scheduler", "median", "quartiles", "reached", "share of plain"):
        needed.add_column(column, justify="left" if column.startswith("algo") else "right")
    best = Shown(title=f"Best {result['metric']} by epochs spent, medians", title_justify="left")
    best.add_column("algorithm, scheduler")
    for epochs in MOMENTS:
        best.add_column(f"{epochs}", justify="right")
    plain = result["pairs"][PLAIN]["median"]
    for name, pair in result["pairs"].items():
        median, medians = pair["median"], pair["best"]["median"]
        needed.add_row(
            name,
            _epochs(median),
            f"{_epochs(pair['first_quartile'])} to {_epochs(pair['third_quartile'])}",
            f"{pair['reached']} of {result['seeds']}",
            f"{median / plain:.2f}" if median is not None and plain is not None else "-",
        )
        found = (medians[epochs - 1] for epochs in MOMENTS if epochs <= len(medians))
        best.add_row(name, *("-" if value is None else f"{value:.4f}" for value in found))
    return [needed, best]


def _epochs(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def draw(result: dict[str, Any], file: Path) -> None:
    """One panel for each scheduler: medians of the algorithms, and their quartiles as bands."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    colors = {"random": "#6b6b6b", "tpe": "#c2410c", "cmaes": "#1f4e8c", "gp": "#3f7d3f"}
    dashes = {"random": "-", "tpe": "-", "cmaes": "--", "gp": "-."}
    figure = Figure(figsize=(11, 7), layout="constrained")
    FigureCanvasAgg(figure)
    for scheduler, axes in zip(PANELS, figure.subplots(2, 2, sharey=True).flat, strict=True):
        names = [name for name in result["pairs"] if name.endswith(f", {scheduler}")]
        for name in [PLAIN, *(name for name in names if name != PLAIN)]:
            algorithm = name.partition(",")[0]
            is_measure = name == PLAIN and scheduler != "none"
            color = "#bbbbbb" if is_measure else colors[algorithm]
            curve = result["pairs"][name]["best"]
            low, median, high = (
                [math.nan if value is None else value for value in curve[key]]
                for key in ("first_quartile", "median", "third_quartile")
            )
            axes.plot(
                curve["epochs"], median, color=color, linewidth=1.6,
                linestyle=":" if is_measure else dashes[algorithm],
                label="random, without stopping" if is_measure else algorithm,
            )  # fmt: skip
            axes.fill_between(curve["epochs"], low, high, color=color, alpha=0.12, linewidth=0)
        axes.axhline(result["best"] - NEAR, color="#000000", linewidth=0.7)
        axes.set_title(f"scheduler {scheduler}", fontsize=10, loc="left")
        axes.set_xlabel("epochs spent, of all trials", fontsize=9)
        axes.set_ylabel(result["metric"], fontsize=9)
        axes.set_ylim(result["best"] - 0.06, result["best"] + 0.004)
        axes.tick_params(labelsize=8)
        axes.grid(color="#dddddd", linewidth=0.6)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        axes.legend(frameon=False, fontsize=8, loc="lower right")
    figure.savefig(file, dpi=150)


if __name__ == "__main__":
    sys.exit(main())
