"""Studies that are killed again and again, beside the same ones that are left alone.

    python bench/search_chaos.py [--kills N] [--seed S] [--small] [--json FILE]

A study with ASHA, one trial at a time, and one of population-based training, two at a time, with
real Ray and a real S3 server. SIGKILL at moments drawn from the seed: some reports and a part of a
second after the kill before, of the process of a slot, or of the study's driver, which `shoal
resume` follows. Each study also runs once with the same search seed and without a kill.

Afterwards both must have the same configurations by number, and have completed the same set of
(configuration, rung, metric), each once: the metric to its last bit. Every trial must have come to
the same end, and none twice to its end. Exit code 1 where any of this fails, or where a study ended
before all kills were made.

`--small` is a short study with ASHA, which loses a slot and a driver.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lab
import psutil
import yaml
from rich.table import Table

from cluster.storage import Store, join_uri, open_store
from jobs.foreground import EXIT_CODE_OF_A_DEAD_DRIVER
from jobs.record import RunPaths, State
from jobs.runs import RunReader
from jobs.study.events import Asked, Event, Lost, Reported
from jobs.study.log import read_events, read_objects
from jobs.study.trials import Trials
from tests.tiny import tiny_model, tiny_reviews, tiny_tree

DRIVERS_OF = 3
"""One kill of so many meets the driver."""
MOST_REPORTS = 3
MOST_SECONDS = 1.0
"""Between two kills: so many reports, and a delay."""
PATIENCE_SECONDS = 300
LOOK_SECONDS = 0.1
SLOT_TITLES = ("ray::Slot", "ray::ResourceTrainable")
"""Of a slot's process: while it waits for its next call, and in it, by Tune's class around it."""
ENDS = ("stopped", "finished")
"""Of a trial."""


@dataclass(frozen=True)
class Plan:
    """One of the two studies."""

    name: str
    evaluate_every: int
    """Steps; a trial plans EPOCHS epochs of ROWS / BATCH steps."""
    search: dict[str, Any]


ROWS, BATCH, EPOCHS = 320, 8, 4
ASHA = Plan(
    "asha",
    evaluate_every=40,
    search={
        "algorithm": "tpe",
        "scheduler": {"kind": "asha", "reduction_factor": 2, "first": 0.25},
        "trials": 30,
        "finalists": None,
        "baseline": False,
        "max_concurrent": 1,
    },
)
PBT = Plan(
    "pbt",
    evaluate_every=16,
    search={
        "algorithm": "random",
        "scheduler": {"kind": "pbt", "population": 4, "every": 0.1, "quantile": 0.25},
        "max_concurrent": 2,
    },
)
SHORT = Plan("asha", evaluate_every=40, search={**ASHA.search, "trials": 8})


@dataclass
class Kill:
    """One SIGKILL."""

    study: str
    of: str
    after: str
    """Kind of the newest event in the log by then."""
    at: float
    """Unix seconds."""


@dataclass
class Verdict:
    """What is left of a killed study, beside the calm one."""

    study: str
    trials: int
    reports: int
    legs_lost: int
    same_configurations: bool
    reports_missing: int
    """(configuration, rung, metric) of the calm study alone,"""
    reports_added: int
    """and of the killed one alone."""
    reports_twice: int
    other_ends: int
    """Trials whose end is not that of the calm study, or that have none."""
    ended_twice: int

    @property
    def is_right(self) -> bool:
        return self.same_configurations and not (
            self.reports_missing
            or self.reports_added
            or self.reports_twice
            or self.other_ends
            or self.ended_twice
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", type=int, help="how many; 20, or 2 with --small")
    parser.add_argument("--seed", type=int, help="of the moments; default: another each time")
    arguments = lab.arguments_of(parser)
    seed = arguments.seed if arguments.seed is not None else random.SystemRandom().getrandbits(32)
    kills = arguments.kills or (2 if arguments.small else 20)
    plans = (SHORT,) if arguments.small else (ASHA, PBT)
    print(f"seed {seed}", file=sys.stderr)
    began = time.monotonic()
    draw = random.Random(seed)
    result: dict[str, Any] = {"seed": seed, "kills": [], "studies": []}
    with lab.place() as place, lab.object_store(place) as bucket:
        arena = Arena(place, bucket)
        for number, plan in enumerate(plans):
            share = kills // len(plans) + (number < kills % len(plans))
            arena.write_job(plan)
            arena.calm(plan)
            made = arena.killed(plan, share, draw)
            calm, killed = (read_events(arena.runs, RunPaths(run_id)) for run_id in ids(plan))
            verdict = judge(arena.runs, plan, calm, killed)
            study = asdict(verdict) | {"is_right": verdict.is_right}
            if not verdict.is_right:
                study["logs"] = [
                    [json.loads(e.model_dump_json()) for e in own] for own in (calm, killed)
                ]
            result["studies"].append(study)
            result["kills"] += [
                asdict(kill) | {"seconds_until_report": until_report(kill, killed)} for kill in made
            ]
    result["seconds"] = round(time.monotonic() - began)
    result["is_right"] = is_right(result, kills=kills)
    lab.tell("search_chaos", result, tables=tables(result), json_file=arguments.json)
    return 0 if result["is_right"] else 1


def is_right(result: dict[str, Any], *, kills: int) -> bool:
    """Whether the studies are, and as many kills as there should be met slots and drivers."""
    met = Counter(kill["of"] for kill in result["kills"])
    return (
        all(study["is_right"] for study in result["studies"])
        and met.total() == kills
        and met["driver"] >= kills // DRIVERS_OF
        and met["slot"] > 0
    )


# -------------------------------------------------------------------------------------- the scene


class Arena:
    """A model and data, and studies that run here."""

    def __init__(self, place: Path, bucket: str) -> None:
        self._place = place
        self._bucket = bucket
        self._model = tiny_model(place / "model")
        self._data = tiny_reviews(
            join_uri(bucket, "data"), rows=ROWS, rows_per_group=64, held_out=90
        )
        self.runs = open_store(join_uri(bucket, "runs"))

    def write_job(self, plan: Plan) -> None:
        tree = tiny_tree(
            self._model,
            {**self._data, "test": None, "seed": 3},
            self.runs.uri,
            batching={"global_batch_size": BATCH},
            train={"epochs": EPOCHS, "evaluate_every_steps": plan.evaluate_every},
            search={
                "metric": "validation/loss",
                "space": {
                    "optimizer.learning_rate": {"loguniform": [1e-4, 1e-1]},
                    "model.dropout": {"uniform": [0.0, 0.4]},
                },
                "retries": 1_000,
                **plan.search,
            },
        )
        self._job(plan).write_text(yaml.safe_dump(tree))

    def calm(self, plan: Plan) -> None:
        """The study, left alone."""
        with self._shoal("run", str(self._job(plan)), "--run-id", calm_id(plan)) as process:
            self._must_end(process)

    def killed(self, plan: Plan, kills: int, draw: random.Random) -> list[Kill]:
        """The study, killed so often, and then to its end."""
        run_id = killed_id(plan)
        drivers = -(-kills // DRIVERS_OF)
        targets = ["driver"] * drivers + ["slot"] * (kills - drivers)
        draw.shuffle(targets)
        watch = LogWatch(self.runs, RunPaths(run_id))
        command = ["run", str(self._job(plan)), "--run-id", run_id]
        made: list[Kill] = []
        while True:
            with self._shoal(*command) as process:
                while len(made) < kills:
                    target = targets[len(made)]
                    if not self._next_moment(watch, process, draw):
                        return made  # it has ended before
                    made.append(Kill(plan.name, target, watch.newest, time.time()))
                    self._say(made[-1], len(made))
                    if target == "slot":
                        self._kill_slot(process, draw)
                    else:
                        self._kill_driver(run_id)
                        break
                else:
                    self._must_end(process)
                    return made
                if process.wait(PATIENCE_SECONDS) != EXIT_CODE_OF_A_DEAD_DRIVER:
                    raise SystemExit(f"{run_id} ended with {process.returncode} after its driver")
            command = ["resume", join_uri(self.runs.uri, run_id)]

    def _next_moment(
        self, watch: LogWatch, process: subprocess.Popen[bytes], draw: random.Random
    ) -> bool:
        """Waits for it; False where the study has ended instead."""
        wanted = watch.look() + draw.randint(1, MOST_REPORTS)
        seconds = draw.random() * MOST_SECONDS
        deadline = time.monotonic() + PATIENCE_SECONDS
        while watch.look() < wanted:
            if process.poll() is not None:
                return False
            if time.monotonic() > deadline:
                raise SystemExit(f"the study does not get on after {watch.reports} reports")
            time.sleep(LOOK_SECONDS)
        time.sleep(seconds)
        watch.look()
        return process.poll() is None

    def _kill_slot(self, process: subprocess.Popen[bytes], draw: random.Random) -> None:
        """One of those that there are; where none is, as one was killed just now, the next."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not (slots := slots_of(process)):
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit("there is no slot to be killed")
            time.sleep(LOOK_SECONDS)
        with suppress(psutil.NoSuchProcess):
            draw.choice(slots).kill()

    def _kill_driver(self, run_id: str) -> None:
        lease = RunReader(self.runs, run_id).lease()
        assert lease is not None
        os.kill(lease.pid, signal.SIGKILL)

    def _must_end(self, process: subprocess.Popen[bytes]) -> None:
        if process.wait(4 * PATIENCE_SECONDS):
            sys.stderr.write(self._said.read_text(errors="replace")[-8000:])
            raise SystemExit(f"a study ended with {process.returncode}")

    def _job(self, plan: Plan) -> Path:
        return self._place / f"{plan.name}.yaml"

    @property
    def _said(self) -> Path:
        return self._place / "said.log"

    @contextmanager
    def _shoal(self, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
        """The command, which is ended with the block."""
        paths = (str(lab.ROOT), os.environ.get("PYTHONPATH", ""))
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in paths if path)}
        with self._said.open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "jobs.cli", *arguments],
                cwd=self._place, env=environment, stdout=log, stderr=subprocess.STDOUT,
            )  # fmt: skip
        try:
            yield process
        finally:
            if process.poll() is None:
                for child in psutil.Process(process.pid).children(recursive=True):
                    with suppress(psutil.NoSuchProcess):
                        child.kill()
                process.kill()
                process.wait()

    def _say(self, kill: Kill, number: int) -> None:
        print(f"{kill.study}: kill {number}, {kill.of}, after {kill.after}", file=sys.stderr)


class LogWatch:
    """What a study's log tells while it grows."""

    def __init__(self, store: Store, paths: RunPaths) -> None:
        self._store = store
        self._paths = paths
        self._last = 0
        self.reports = 0
        self.newest = "nothing"

    def look(self) -> int:
        """Number of reports by now."""
        for one, events in read_objects(self._store, self._paths, after=self._last):
            self._last = one.last
            self.reports += sum(isinstance(event, Reported) for event in events)
            if events:
                self.newest = events[-1].kind
        return self.reports


def calm_id(plan: Plan) -> str:
    return f"{plan.name}-calm"


def killed_id(plan: Plan) -> str:
    return f"{plan.name}-killed"


def slots_of(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """Ray's processes of slots that the command has started, by their ids."""
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if any(title in " ".join(child.cmdline()) for title in SLOT_TITLES):
                found.append(child)
    return sorted(found, key=lambda child: child.pid)


# ------------------------------------------------------------------------------------ what is left


def until_report(kill: Kill, events: list[Event]) -> float | None:
    """Seconds from a kill to the next report; None where there was none."""
    moments = [event.at for event in events if isinstance(event, Reported) and event.at > kill.at]
    return round(min(moments) - kill.at, 1) if moments else None


def judge(runs: Store, plan: Plan, calm: list[Event], killed: list[Event]) -> Verdict:
    """Compares the killed study with the calm one, by their logs and the folders of the trials."""
    calm_told, told = Counter(triples(calm)), Counter(triples(killed))
    search = RunReader(runs, killed_id(plan)).spec().search
    assert search is not None
    calm_ends, ends = (
        {trial.number: trial.status for trial in Trials(search, own).by_number.values()}
        for own in (calm, killed)
    )
    outcomes = [
        [outcome.state for outcome in RunReader(runs, trial.run_id).outcomes().values()]
        for trial in (RunPaths(killed_id(plan)).trial(number) for number in ends)
    ]
    return Verdict(
        study=plan.name,
        trials=len(ends),
        reports=sum(told.values()),
        legs_lost=sum(isinstance(event, Lost) for event in killed),
        same_configurations=configurations(calm) == configurations(killed),
        reports_missing=len(calm_told.keys() - told.keys()),
        reports_added=len(told.keys() - calm_told.keys()),
        reports_twice=sum(count - 1 for count in told.values()),
        other_ends=other_ends(calm_ends, ends),
        ended_twice=sum(sum(map(is_end, states)) > 1 for states in outcomes),
    )


def ids(plan: Plan) -> tuple[str, str]:
    return calm_id(plan), killed_id(plan)


def configurations(events: list[Event]) -> dict[int, str]:
    """Values of each trial, and what it began with."""
    return {
        event.trial: json.dumps([event.values, event.donor and event.donor.model_dump()])
        for event in events
        if isinstance(event, Asked)
    }


def triples(events: list[Event]) -> list[tuple[str, float, float | None]]:
    """(configuration, rung, metric) of each report."""
    values = configurations(events)
    return [
        (values[event.trial], event.fraction, event.value)
        for event in events
        if isinstance(event, Reported)
    ]


def other_ends(calm: dict[int, str], killed: dict[int, str]) -> int:
    """Trials that ended otherwise, or not at all, or that only one of the studies has."""
    return sum(
        calm.get(number) != killed.get(number) or killed.get(number) not in ENDS
        for number in calm.keys() | killed.keys()
    )


def is_end(state: State) -> bool:
    """Whether an attempt with this outcome was the trial's last one."""
    return state in (State.SUCCEEDED, State.PRUNED)


# ---------------------------------------------------------------------------------------- results


def tables(result: dict[str, Any]) -> list[Table]:
    kills = Table(
        title=f"{len(result['kills'])} kills, seed {result['seed']}, {result['seconds']} s",
        title_justify="left",
    )
    for column in ("study", "of", "number", "the log's newest event", "s until a report (median)"):
        kills.add_column(column)
    for (study, of), own in grouped(result["kills"], "study", "of"):
        after = Counter(kill["after"] for kill in own)
        waits = sorted(kill["seconds_until_report"] or 0.0 for kill in own)
        kills.add_row(
            study,
            of,
            str(len(own)),
            ", ".join(f"{kind} {number}" for kind, number in sorted(after.items())),
            f"{waits[len(waits) // 2]:.1f}",
        )
    studies = Table(title="What is left, beside the calm study", title_justify="left")
    columns = (
        "study", "trials", "reports", "legs lost", "same configurations", "reports missing",
        "added", "twice", "other ends", "ended twice",
    )  # fmt: skip
    for column in columns:
        studies.add_column(column, justify="left" if column == "study" else "right")
    for study in result["studies"]:
        studies.add_row(
            study["study"],
            *(str(study[key]) for key in ("trials", "reports", "legs_lost")),
            "yes" if study["same_configurations"] else "NO",
            *(
                str(study[key])
                for key in (
                    "reports_missing", "reports_added", "reports_twice", "other_ends",
                    "ended_twice",
                )
            ),
        )  # fmt: skip
    return [kills, studies]


def grouped(
    kills: list[dict[str, Any]], *keys: str
) -> Iterator[tuple[tuple[str, ...], list[dict[str, Any]]]]:
    """Kills by the values of some keys."""

    def of(kill: dict[str, Any]) -> tuple[str, ...]:
        return tuple(kill[key] for key in keys)

    for key in sorted(set(map(of, kills))):
        yield key, [kill for kill in kills if of(kill) == key]


if __name__ == "__main__":
    sys.exit(main())
