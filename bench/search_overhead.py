"""What a study costs besides the training: seconds of a trial, memory and time of its driver.

    python bench/search_overhead.py [--rounds N] [--only PART] [--small] [--json FILE]

trials   Trials of three steps of a tiny model, one worker each, two at a time, with real Ray and a
         real S3 server: a study of Shoal, and in turns with it the pattern of Ray's documentation,
         a TorchTrainer in each trial of Ray Tune (bench/nested_tune.py). The first trial of either
         place, which waits for Ray and for modules, is told as the start: seconds of a trial are
         from the end of the second trial to the end of the last one, divided by the trials between.
driver   The study's engine, sampler, scheduler (ASHA) and log, with 100, 1,000 and 10,000 trials
         that a formula answers for, on eight slots; a fresh process for each size, which has the
         modules of a driver, and another one that takes up the finished log as a resumed driver
         does. Memory is what the process has at the end (RSS). The time of an event is that inside
         the engine's methods in the second half of the study, divided by the events of that half:
         of the processor (all threads), and by the clock. To propose values is told apart of the
         one, to append to the log of the other.
real     `shoal run` of 200 trials of a tiny model with TPE and ASHA, from the command to its end;
         and how long a trial takes from its claim to its first step, in a new process and later.

Exit code 1 where a trial of Shoal costs more than a twentieth of the nested pattern's; where a
driver has more than 1.5 times the memory with 10,000 trials than with 100; where an event takes
more than 1.5 times the processor time with 10,000 trials than with 1,000, or, without the
proposals, than with 100; or where a real trial did not come to its end. In the small size that
last one alone is judged.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import count
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import lab
import psutil
import yaml
from rich.table import Table

from cluster.storage import join_uri, open_store
from jobs.parse import parse_spec
from jobs.record import RunPaths
from jobs.search_spec import Search
from jobs.study.engine import Engine
from jobs.study.events import Asked, Decided, Event, Left, Started, Values
from jobs.study.log import StudyLog, read_events
from jobs.study.samplers import make_sampler
from jobs.study.schedulers import make_scheduler
from jobs.study.space import Space, space_of
from jobs.study.trials import Trials
from tests.jobs.study.simulated import Simulation
from tests.tiny import LABELS, MAX_TOKENS, tiny_model, tiny_reviews, tiny_tree
from trainers.records import read_attempts

HERE = Path(__file__).parent
PARTS = ("trials", "driver", "real")
AT_ONCE = 2
BATCH = 8
STEPS = 3
SLOTS = 8
MIB = 2**20
MOST_OF_NESTED = 1 / 20
MOST_GROWTH = 1.5
WAIT_SECONDS = 1800
DRIVERS = (("random", "folder"), ("tpe", "folder"), ("random", "S3"))
"""Algorithm, and where the log is."""
SPACE = {
    "optimizer.learning_rate": {"loguniform": [1e-4, 1e-1]},
    "optimizer.weight_decay": {"loguniform": [1e-4, 0.3]},
    "model.dropout": {"uniform": [0.0, 0.4]},
}


@dataclass(frozen=True)
class Size:
    rounds: int
    trials: int
    """Of a round of the study, and"""
    nested_trials: int
    """of the nested pattern."""
    drivers: tuple[int, ...]
    """Trials of simulated studies, the smallest number first."""
    real_trials: int


FULL = Size(rounds=2, trials=40, nested_trials=8, drivers=(100, 1_000, 10_000), real_trials=200)
SMALL = Size(rounds=1, trials=6, nested_trials=4, drivers=(10, 20), real_trials=6)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, help="of trials: 2, or 1 with --small")
    parser.add_argument("--only", choices=PARTS, help="one part, without a judgement of the rest")
    arguments = lab.arguments_of(parser)
    size = SMALL if arguments.small else FULL
    parts = (arguments.only,) if arguments.only else PARTS
    result: dict[str, Any] = {"is_small": arguments.small}
    with lab.place() as place, lab.object_store(place) as bucket:
        if "driver" in parts:
            result["driver"] = measure_drivers(place, bucket, size.drivers)
        arena = Arena(place, bucket)
        if "trials" in parts:
            measured = lab.interleaved(
                {
                    "shoal": lambda: arena.shoal(size.trials),
                    "nested": lambda: arena.nested(size.nested_trials),
                },
                rounds=arguments.rounds or size.rounds,
            )
            result["trials"] = trials_summary(measured)
        if "real" in parts:
            result["real"] = arena.real(size.real_trials)
    result["is_right"] = is_right(result)
    lab.tell("search_overhead", result, tables=tables(result), json_file=arguments.json)
    return 0 if result["is_right"] else 1


def is_right(result: dict[str, Any]) -> bool:
    """Whether what was measured keeps within its bounds."""
    real = result.get("real")
    is_done = real is None or real["stopped"] + real["finished"] == real["trials"]
    if result["is_small"]:
        return is_done
    trials = result.get("trials")
    is_cheap = trials is None or trials["share_of_nested"] <= MOST_OF_NESTED
    return (
        is_done
        and is_cheap
        and all(
            driver[growth] <= MOST_GROWTH
            for driver in result.get("driver", {}).values()
            for growth in ("memory_growth", "event_growth", "own_growth")
        )
    )


# ------------------------------------------------------------------------------------ real trials


class Arena:
    """A model and data, and the commands."""

    def __init__(self, place: Path, bucket: str) -> None:
        self._place = place
        self._bucket = bucket
        self._numbers = count(1)
        self._model = tiny_model(place / "model")

    def shoal(self, trials: int) -> dict[str, Any]:
        """A study of trivial trials."""
        run_id, began, ended = self._study(
            rows=STEPS * BATCH,
            epochs=1,
            trials=trials,
            search={"algorithm": "random", "scheduler": "none", "max_concurrent": AT_ONCE},
        )
        events = self._events(run_id)
        return timing(began, ended, [event.at for event in events if isinstance(event, Left)])

    def real(self, trials: int) -> dict[str, Any]:
        """A study as users run it."""
        run_id, began, ended = self._study(
            rows=5 * BATCH,
            epochs=4,
            trials=trials,
            search={
                "algorithm": "tpe",
                "scheduler": {"kind": "asha", "reduction_factor": 2, "first": 0.25},
            },
        )
        events = self._events(run_id)
        search = parse_spec(yaml.safe_load(self._job(run_id).read_text()), where=run_id).search
        assert search is not None
        statuses = [trial.status for trial in Trials(search, events).by_number.values()]
        moments = [event.at for event in events if event.at]
        return {
            "trials": len(statuses),
            "stopped": statuses.count("stopped"),
            "finished": statuses.count("finished"),
            "evaluations": sum(isinstance(event, Decided) for event in events),
            "seconds": ended - began,
            "seconds_of_search": moments[-1] - moments[0],
            "seconds_per_trial": (ended - began) / trials,
            **self._starts(run_id, events),
        }

    def _starts(self, run_id: str, events: Sequence[Event]) -> dict[str, float]:
        """Median seconds from the claim of a trial's first attempt to its first step: of the first
        trial of each process, which loads modules, model and data, and of the others."""
        store, paths = open_store(join_uri(self._bucket, "runs")), RunPaths(run_id)
        first, later, known = [], [], set[str]()
        for event in events:
            if isinstance(event, Started) and event.leg == 1:
                seconds = read_attempts(store, paths.trial(event.trial))[0].start_seconds
                (later if event.slot in known else first).append(seconds or 0.0)
                known.add(event.slot)
        return {
            "first_start_seconds": statistics.median(first),
            "later_start_seconds": statistics.median(later),
        }

    def nested(self, trials: int) -> dict[str, Any]:
        """As many trials of Ray Tune with a TorchTrainer each."""
        name = f"nested-{next(self._numbers)}"
        ends = self._place / f"{name}-ends"
        data = self._data(STEPS * BATCH)["train"]
        config = {
            "model": str(self._model), "labels": LABELS, "max_tokens": MAX_TOKENS,
            "rows": join_uri(data, "shard-00000.parquet"), "global_batch_size": BATCH,
            "storage": join_uri(self._bucket, "nested"), "name": name, "ends": str(ends),
            "trials": trials, "at_once": AT_ONCE,
        }  # fmt: skip
        began, ended = self._timed(
            [sys.executable, str(HERE / "nested_tune.py"), json.dumps(config)], name
        )
        return timing(began, ended, [float(line) for line in ends.read_text().split()])

    def _study(
        self, *, rows: int, epochs: int, trials: int, search: dict[str, Any]
    ) -> tuple[str, float, float]:
        """Runs a study; its id, and when the command began and ended."""
        run_id = f"study-{next(self._numbers)}"
        data = self._data(rows)
        tree = tiny_tree(
            self._model,
            {"train": data["train"], "validation": data["validation"], "seed": 3},
            join_uri(self._bucket, "runs"),
            batching={"global_batch_size": BATCH},
            train={"epochs": epochs},
            checkpoint={"every_steps": 10_000},
            search={
                "metric": "validation/loss",
                "space": SPACE,
                "trials": trials,
                "finalists": None,
                "baseline": False,
                **search,
            },
        )
        self._job(run_id).write_text(yaml.safe_dump(tree))
        began, ended = self._timed(
            [sys.executable, "-m", "jobs.cli", "run", str(self._job(run_id)), "--run-id", run_id],
            run_id,
        )
        return run_id, began, ended

    def _job(self, run_id: str) -> Path:
        return self._place / f"{run_id}.yaml"

    def _data(self, rows: int) -> dict[str, str]:
        uri = join_uri(self._bucket, f"data-{next(self._numbers)}")
        return tiny_reviews(uri, rows=rows, rows_per_group=rows, held_out=16)

    def _events(self, run_id: str) -> list[Event]:
        return read_events(open_store(join_uri(self._bucket, "runs")), RunPaths(run_id))

    def _timed(self, command: list[str], name: str) -> tuple[float, float]:
        """Unix seconds of a command's begin and end; SystemExit where it fails."""
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(
                path for path in (str(lab.ROOT), os.environ.get("PYTHONPATH")) if path
            )
        }
        said = self._place / f"{name}.log"
        began = time.time()
        with said.open("wb") as log:
            code = subprocess.run(
                command, cwd=self._place, env=environment, stdout=log, stderr=subprocess.STDOUT,
                timeout=WAIT_SECONDS, check=False,
            ).returncode  # fmt: skip
        ended = time.time()
        if code:
            sys.stderr.write(said.read_text(errors="replace")[-8000:])
            raise SystemExit(f"{name} failed")
        return began, ended


def timing(began: float, ended: float, ends: Sequence[float]) -> dict[str, Any]:
    """Of a command, by the moments at which its trials ended."""
    ends = sorted(ends)
    if len(ends) <= AT_ONCE:
        raise SystemExit(f"{len(ends)} trials are too few to be timed")
    first = ends[AT_ONCE - 1]
    return {
        "trials": len(ends),
        "start_seconds": first - began,
        "seconds_per_trial": (ends[-1] - first) / (len(ends) - AT_ONCE),
        "end_seconds": ended - ends[-1],
    }


def trials_summary(measured: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Medians over the rounds, and the share."""
    found: dict[str, Any] = {"rounds": measured}
    for name, rounds in measured.items():
        found[name] = {
            key: statistics.median(one[key] for one in rounds)
            for key in ("start_seconds", "seconds_per_trial", "end_seconds")
        }
    found["share_of_nested"] = (
        found["shoal"]["seconds_per_trial"] / found["nested"]["seconds_per_trial"]
    )
    return found


# ------------------------------------------------------------------------------ simulated drivers


def measure_drivers(place: Path, bucket: str, sizes: Sequence[int]) -> dict[str, Any]:
    """By algorithm and place of the log."""
    stores = {"folder": str(place / "studies"), "S3": join_uri(bucket, "studies")}
    found: dict[str, Any] = {}
    for algorithm, where in DRIVERS:
        curve = {}
        for trials in sizes:
            subject = {"trials": trials, "algorithm": algorithm, "store": stores[where]}
            curve[str(trials)] = _alone(drive, **subject) | {"resumed": _alone(take_up, **subject)}
            sys.stderr.write(f"{algorithm}, {where}, {trials}: {curve[str(trials)]}\n")
        found[f"{algorithm}, {where}"] = {"curve": curve} | growth(list(curve.values()))
    return found


def growth(curve: Sequence[dict[str, Any]]) -> dict[str, float]:
    """From the smallest size to the largest; of whole events, from the size before that."""
    first, before, last = curve[0], curve[-2], curve[-1]
    most = max(last["memory_mib"], last["resumed"]["memory_mib"])
    return {
        "memory_growth": most / first["memory_mib"],
        "event_growth": last["cpu_ms"] / before["cpu_ms"],
        "own_growth": (last["cpu_ms"] - last["ask_cpu_ms"])
        / (first["cpu_ms"] - first["ask_cpu_ms"]),
    }


def _alone(measure: Callable[..., dict[str, Any]], **arguments: Any) -> dict[str, Any]:
    """What `measure` gives in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(measure, **arguments).result()


class Watch:
    """Time inside of some calls."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.cpu_seconds = 0.0

    def over(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """The same call, watched."""

        def watched(*arguments: Any, **named: Any) -> Any:
            began, cpu = time.perf_counter(), time.process_time()
            try:
                return call(*arguments, **named)
            finally:
                self.seconds += time.perf_counter() - began
                self.cpu_seconds += time.process_time() - cpu

        return watched


class Watched:
    """An object some of whose methods are watched."""

    def __init__(self, held: Any, watch: Watch, *names: str) -> None:
        self._held = held
        for name in names:
            setattr(self, name, watch.over(getattr(held, name)))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._held, name)


class Driver:
    """A study's driver in this process, without slots."""

    def __init__(
        self, trials: int, algorithm: str, store: str, is_saved: Callable[[int, int], bool]
    ) -> None:
        # What a driver has loaded, though nothing of it is used here.
        importlib.import_module("jobs.search")
        self._trials = trials
        self.calls, self.asks, self.appends = Watch(), Watch(), Watch()
        self.events = self._asked = 0
        self.halfway: list[float] = []
        """The clocks when half of the trials were there."""
        search, space = search_of(trials, algorithm)
        self._log = StudyLog(open_store(store), RunPaths(f"{algorithm}-{trials}"), generation=1)
        self.engine = Engine(
            search,
            Watched(make_sampler(search, space, search.seed), self.asks, "ask"),
            make_scheduler(search, space),
            Watched(self, self.appends, "append"),
            self._log.open(),
            is_saved=is_saved,
        )
        self.watched = Watched(self.engine, self.calls, "work", "reported", "left")

    def append(self, events: Sequence[Event]) -> None:
        self.events += len(events)
        self._log.append(events)
        self._asked += sum(isinstance(event, Asked) for event in events)
        if not self.halfway and self._asked >= self._trials // 2:
            self.halfway = self.clocks()

    def clocks(self) -> list[float]:
        return [
            self.calls.seconds, self.appends.seconds, self.calls.cpu_seconds,
            self.asks.cpu_seconds, self.events,
        ]  # fmt: skip


def drive(*, trials: int, algorithm: str, store: str) -> dict[str, Any]:
    """A whole study in this process."""
    simulation = Simulation(loss, slots=SLOTS, speed=lambda trial: 1 + trial % 7 / 10)
    driver = Driver(
        trials, algorithm, store, lambda trial, step: simulation.saved.get(trial, 0) >= step
    )
    simulation.run(driver.watched, sign=-1)  # type: ignore[arg-type]
    clock, append, cpu, ask, events = (
        now - then for now, then in zip(driver.clocks(), driver.halfway, strict=True)
    )
    assert driver.engine.trials.configurations == trials
    found = {
        "events": driver.events,
        "memory_mib": memory_mib(),
        "cpu_ms": 1000 * cpu / events,
        "ask_cpu_ms": 1000 * ask / events,
        "clock_ms": 1000 * clock / events,
        "append_clock_ms": 1000 * append / events,
        "seconds": driver.calls.seconds,
    }
    summary = Watch()
    summary.over(driver.engine.trials.summary)()
    return found | {"summary_cpu_ms": 1000 * summary.cpu_seconds}


def take_up(*, trials: int, algorithm: str, store: str) -> dict[str, Any]:
    """Reads the log of that study as a driver that resumes it."""
    importlib.import_module("jobs.search")
    began, cpu = time.perf_counter(), time.process_time()
    driver = Driver(trials, algorithm, store, lambda trial, step: True)
    assert driver.engine.trials.configurations == trials
    return {
        "seconds": time.perf_counter() - began,
        "cpu_seconds": time.process_time() - cpu,
        "memory_mib": memory_mib(),
    }


def search_of(trials: int, algorithm: str) -> tuple[Search, Space]:
    tree = {
        "name": "study",
        "task": {"labels": LABELS},
        "model": {"source": "simulated"},
        "data": {"train": "simulated", "validation": "simulated"},
        "store": "simulated",
        "search": {
            "metric": "validation/loss", "space": SPACE, "trials": trials, "finalists": None,
            "baseline": False,
            "algorithm": algorithm, "scheduler": "asha",
        },
    }  # fmt: skip
    spec = parse_spec(tree, where="bench/search_overhead.py")
    assert spec.search is not None
    return spec.search, space_of(spec)


def loss(values: Values, repeat: int, fraction: float) -> float:
    """Least at a learning rate of 1e-3, and falling with the budget."""
    off = abs(math.log10(values["optimizer.learning_rate"]) + 3)
    return (0.3 + 0.2 * off + values["model.dropout"] * 0.1) * (0.5 + math.exp(-4 * fraction))


def memory_mib() -> float:
    return float(psutil.Process().memory_info().rss / MIB)


# ---------------------------------------------------------------------------------- what it shows


def tables(result: dict[str, Any]) -> list[Table]:
    shown = []
    if "trials" in result:
        shown.append(_trials_table(result["trials"]))
    if "driver" in result:
        shown.append(_driver_table(result["driver"]))
    if "real" in result:
        shown.append(_real_table(result["real"]))
    return shown


def _trials_table(trials: dict[str, Any]) -> Table:
    table = Table(
        title=f"Trials of {STEPS} steps, {AT_ONCE} at a time, seconds; medians of "
        f"{len(trials['rounds']['shoal'])} rounds",
        title_justify="left",
    )
    for column in ("", "a trial", "start, with the first trials", "last trial to the end"):
        table.add_column(column, justify="right" if column else "left")
    for name in ("shoal", "nested"):
        one = trials[name]
        table.add_row(
            name,
            f"{one['seconds_per_trial']:.2f}",
            f"{one['start_seconds']:.1f}",
            f"{one['end_seconds']:.1f}",
        )
    table.add_row("share", f"{trials['share_of_nested']:.3f}", "", "")
    return table


def _driver_table(drivers: dict[str, Any]) -> Table:
    table = Table(title="The driver of a simulated study", title_justify="left")
    for column in (
        "algorithm, log", "trials", "MiB", "resumed", "in s", "CPU ms", "asking", "clock ms",
        "log", "status",
    ):  # fmt: skip
        table.add_column(column, justify="left" if column.startswith("algo") else "right")
    for name, driver in drivers.items():
        for trials, one in driver["curve"].items():
            table.add_row(
                name, f"{int(trials):,}", f"{one['memory_mib']:.0f}",
                f"{one['resumed']['memory_mib']:.0f}", f"{one['resumed']['seconds']:.1f}",
                f"{one['cpu_ms']:.2f}", f"{one['ask_cpu_ms']:.2f}", f"{one['clock_ms']:.2f}",
                f"{one['append_clock_ms']:.2f}", f"{one['summary_cpu_ms']:.1f}",
            )  # fmt: skip
        table.add_row(
            "  growth", "", f"{driver['memory_growth']:.2f}", "", "",
            f"{driver['event_growth']:.2f}", f"{driver['own_growth']:.2f} *", "", "", "",
            end_section=True,
        )  # fmt: skip
    table.caption = (
        "CPU and clock: milliseconds of an event, and of it to ask for values and to append to the "
        "log; status: CPU ms of a line of status; * without asking, from the smallest size"
    )
    return table


def _real_table(real: dict[str, Any]) -> Table:
    table = Table(title="A study of real small trials", title_justify="left")
    for column in ("trials", "finished", "stopped", "reports", "seconds", "of it searching",
                   "seconds a trial", "start of a process's first", "of the others"):  # fmt: skip
        table.add_column(column, justify="right")
    table.add_row(
        *(str(real[key]) for key in ("trials", "finished", "stopped", "evaluations")),
        f"{real['seconds']:.1f}",
        f"{real['seconds_of_search']:.1f}",
        f"{real['seconds_per_trial']:.2f}",
        f"{real['first_start_seconds']:.2f}",
        f"{real['later_start_seconds']:.2f}",
    )
    return table


if __name__ == "__main__":
    sys.exit(main())
