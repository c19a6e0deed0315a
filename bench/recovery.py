"""From SIGKILL to the next optimizer step, and what is lost: Shoal against a plain Ray Train loop.

    python bench/recovery.py [--rounds N] [--seed S] [--small] [--json FILE]

One cluster of a head and three nodes, on which both train the same model on the same rows with two
workers, in turns; a real S3 server. (In the small size one node and one worker.) In each run one
worker after the other is killed, then a node with all that runs on it, after a number of steps that
is drawn from the seed and is the same for both. The plain loop (bench/plain_ray_train.py) saves as
Ray's documentation has it, at the end of each epoch; Shoal five times an epoch. So the table also
says for how long training stands still for checkpoints. Ray misses a dead node as soon as it does
here for both, by the same settings.

Exit code 1 where Shoal takes longer than the plain loop to come back from a worker's death, by more
than medians differ from one run of this to the next (1.15 times), or loses as much work; in the
small size nothing is judged.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lab
import psutil
import yaml
from rich.table import Table

from cluster import embedded
from cluster.storage import join_uri, open_store
from jobs.runs import RunReader
from tests.nodes import Node, Nodes, nodes
from tests.tiny import LABELS, MAX_TOKENS, tiny_model, tiny_reviews, tiny_tree

HERE = Path(__file__).parent
CLOCK = HERE / "step_clock"
ROWS = 1600
GLOBAL_BATCH = 16
STEPS_PER_EPOCH = ROWS // GLOBAL_BATCH
SHOAL_EVERY = STEPS_PER_EPOCH // 5
WORKERS = 2
"""In the small size one."""
WAIT_SECONDS = 180
LOOK_SECONDS = 0.02
MOST_SECONDS = 1.15
"""Shoal's seconds to come back from a worker's death, of the plain loop's: one, and what medians of
nine differ by from one run of this to the next."""


@dataclass(frozen=True)
class Recovery:
    """One kill, and what came after it."""

    killed: str
    """`worker` or `node`."""
    seconds: float
    """To the next optimizer step."""
    steps_lost: int
    """Steps that had been done and were done again."""
    seconds_lost: float
    """What those steps had taken."""


@dataclass(frozen=True)
class Measured:
    """One run of one of both."""

    recoveries: list[Recovery]
    first_step_seconds: float
    """From the start of the command to the first step."""
    step_seconds: float
    """Median of a step."""
    standing_still_share: float
    """Part of the time for which training stood still where it saved."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, help="3, or 1 with --small")
    parser.add_argument("--seed", type=int, default=1, help="of the moments")
    arguments = lab.arguments_of(parser)
    rounds = arguments.rounds or (1 if arguments.small else 3)
    kills = ("worker",) if arguments.small else ("worker", "worker", "worker", "node")
    with lab.place() as place, lab.object_store(place):
        arena = Arena(place, is_small=arguments.small)
        with nodes(cpus=0, env=arena.environment()) as cluster:
            cluster.add_several(arena.workers + ("node" in kills), cpus=1)
            measured = lab.interleaved(
                {
                    name: Turns(arena, cluster, name, kills, seed=arguments.seed).run
                    for name in ("shoal", "plain")
                },
                rounds=rounds,
            )
        shared = cluster.shared
    result = summary(measured) | {
        "workers": arena.workers, "rounds": rounds, "seed": arguments.seed, "shared_host": shared,
    }  # fmt: skip
    result["is_right"] = arguments.small or is_right(result)
    lab.tell("recovery", result, tables=tables(result), json_file=arguments.json)
    sys.exit(0 if result["is_right"] else 1)


# ------------------------------------------------------------------------------------ both sides


class Arena:
    """A model and data, and a command for each side."""

    def __init__(self, place: Path, *, is_small: bool) -> None:
        self.place = place
        self.bucket = f"s3://{embedded.DEFAULT_BUCKET}"
        self.workers = 1 if is_small else WORKERS
        larger = {} if is_small else {"layers": 4, "hidden": 128}
        self.model = tiny_model(place / "model", **larger)
        self.data = tiny_reviews(
            join_uri(self.bucket, "data"), rows=ROWS, rows_per_group=200, held_out=16
        )["train"]
        self.steps = place / "steps"

    def environment(self) -> dict[str, str]:
        self.steps.mkdir()
        paths = [str(CLOCK), str(lab.ROOT), os.environ.get("PYTHONPATH", "")]
        return {
            "PYTHONPATH": os.pathsep.join(path for path in paths if path),
            "SHOAL_BENCH_STEPS": str(self.steps),
        }

    def command(self, name: str, run_id: str) -> list[str]:
        if name == "plain":
            config = {
                "model": str(self.model), "labels": LABELS, "max_tokens": MAX_TOKENS,
                "rows": join_uri(self.data, "shard-00000.parquet"),
                "global_batch_size": GLOBAL_BATCH, "workers": self.workers,
                "learning_rate": 3e-4, "checkpoint_every": STEPS_PER_EPOCH,
                "steps": sys.maxsize, "name": run_id,
                "storage": join_uri(self.bucket, "plain"), "starts": str(self.starts(run_id)),
            }  # fmt: skip
            return [sys.executable, str(HERE / "plain_ray_train.py"), json.dumps(config)]
        tree = tiny_tree(
            self.model,
            {"train": self.data, "seed": 3},
            join_uri(self.bucket, "runs"),
            batching={"global_batch_size": GLOBAL_BATCH},
            optimizer={"learning_rate": 3e-4, "schedule": "constant"},
            train={"epochs": 10_000, "log_every_steps": 10},
            checkpoint={"every_steps": SHOAL_EVERY},
            workers={"count": self.workers},
            retries={"worker_failures": 100},
        )
        job = self.place / f"{run_id}.yaml"
        job.write_text(yaml.safe_dump(tree))
        return [sys.executable, "-m", "jobs.cli", "run", str(job), "--run-id", run_id]

    def begun_at(self, name: str, run_id: str) -> list[int]:
        """The step from which each start of the workers went on."""
        if name == "plain":
            return [int(line) for line in self.starts(run_id).read_text().split()]
        attempts = RunReader(open_store(join_uri(self.bucket, "runs")), run_id).attempts()
        return [attempt.restored_step or 0 for attempt in attempts]

    def starts(self, run_id: str) -> Path:
        return self.place / f"{run_id}.starts"


class Turns:
    """The runs of one side."""

    def __init__(
        self, arena: Arena, cluster: Nodes, name: str, kills: tuple[str, ...], *, seed: int
    ) -> None:
        self._arena = arena
        self._cluster = cluster
        self._name = name
        self._kills = kills
        # The same for both sides.
        self._draw = random.Random(seed)
        self._numbers = itertools.count(1)

    def run(self) -> Measured:
        run_id = f"{self._name}-{next(self._numbers)}"
        clock = Clock(self._arena.steps, every=self._every)
        recoveries = []
        began = time.time()
        with self._process(run_id) as process:
            first_step = clock.await_start(process) - began
            begun = 0
            for killed in self._kills:
                # Anywhere between two checkpoints of either side, after the first of both.
                clock.await_steps(STEPS_PER_EPOCH + self._draw.randint(5, STEPS_PER_EPOCH), process)
                at = self._kill(killed)
                seconds = clock.await_start(process) - at
                before, begun = begun, self._arena.begun_at(self._name, run_id)[-1]
                lost = before + clock.steps_of_last(until=at) - begun
                recoveries.append(Recovery(killed, seconds, lost, lost * clock.step_seconds))
                say(f"{run_id}: {recoveries[-1]}")
                self._bring_back()
            clock.await_steps(STEPS_PER_EPOCH + 5, process)
        return Measured(recoveries, first_step, clock.step_seconds, clock.standing_still_share)

    @property
    def _every(self) -> int:
        """Steps between two checkpoints."""
        return STEPS_PER_EPOCH if self._name == "plain" else SHOAL_EVERY

    @contextmanager
    def _process(self, run_id: str) -> Iterator[subprocess.Popen[Any]]:
        """The command of a run on the head, ended with the block; on failure, what it said."""
        said = self._arena.place / f"{run_id}.log"
        with said.open("wb") as log:
            process = self._cluster.popen(
                self._arena.command(self._name, run_id),
                cwd=self._arena.place,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        try:
            yield process
        except BaseException:
            sys.stderr.write(said.read_text(errors="replace")[-8000:])
            raise
        finally:
            with suppress(psutil.NoSuchProcess):  # it may have ended by itself
                for child in psutil.Process(process.pid).children(recursive=True):
                    with suppress(psutil.NoSuchProcess):
                        child.kill()
            process.kill()
            process.wait()
            wait_until(lambda: not self._workers(), "the workers of a dead driver do not end")

    def _kill(self, what: str) -> float:
        """SIGKILL to a worker, or to all that runs on its node; Unix seconds."""
        workers = self._workers()
        if len(workers) != self._arena.workers:
            raise SystemExit(f"there are {len(workers)} workers")
        node, worker = workers[self._draw.randrange(len(workers))]
        at = time.time()
        if what == "worker":
            worker.kill()
        else:
            node.kill()
        return at

    def _bring_back(self) -> None:
        for node in self._cluster.all:
            if node.process.poll() is not None:
                node.start()

    def _workers(self) -> list[tuple[Node, psutil.Process]]:
        """Of Ray Train, by node."""
        found = []
        for node in self._cluster.all:
            for process in node.processes():
                with suppress(psutil.NoSuchProcess):
                    if "RayTrainWorker" in " ".join(process.cmdline()):
                        found.append((node, process))
        return found


class Clock:
    """When the workers of a run made their steps, start by start."""

    def __init__(self, folder: Path, *, every: int) -> None:
        """`every`: steps between two checkpoints."""
        self._folder = folder
        self._every = every
        for file in self._files():
            file.unlink()
        self._known: set[Path] = set()
        """Of workers that were started before those that are awaited."""
        self._starts: list[Path] = []
        """Of one worker of each start."""

    def await_start(self, process: subprocess.Popen[Any]) -> float:
        """When workers that are new have done their first step; Unix seconds."""
        wait_until(lambda: any(map(times_of, self._files() - self._known)), "no step", process)
        new = self._files() - self._known
        first = min(new, key=lambda file: times_of(file)[:1] or [float("inf")])
        self._known |= new
        self._starts.append(first)
        return times_of(first)[0]

    def await_steps(self, count: int, process: subprocess.Popen[Any]) -> None:
        """Until the present workers have done so many steps."""
        # Those that were a little later than the first belong to the same start.
        wait_until(lambda: len(times_of(self._starts[-1])) >= count, "too few steps", process)
        self._known |= self._files()

    def steps_of_last(self, *, until: float) -> int:
        """Steps that the workers before the present ones had done at that time."""
        return sum(at <= until for at in times_of(self._starts[-2]))

    @property
    def step_seconds(self) -> float:
        """Median of a step."""
        return statistics.median(gap for gaps in self._gaps() for gap in gaps)

    @property
    def standing_still_share(self) -> float:
        """Part of the time that goes into the steps right after checkpoints, beyond what a step
        takes. Every start goes on from a checkpoint."""
        step = self.step_seconds
        still = sum(
            gap - step for gaps in self._gaps() for gap in gaps[self._every - 1 :: self._every]
        )
        return still / sum(gap for gaps in self._gaps() for gap in gaps)

    def _gaps(self) -> list[list[float]]:
        """Seconds between one step and the next of each start."""
        return [
            [after - before for before, after in itertools.pairwise(times_of(file))]
            for file in self._starts
        ]

    def _files(self) -> set[Path]:
        return set(self._folder.iterdir())


def times_of(file: Path) -> list[float]:
    return [float(line) for line in file.read_text().split("\n")[:-1]]


def wait_until(
    is_so: Callable[[], bool], otherwise: str, process: subprocess.Popen[Any] | None = None
) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not is_so():
        if time.monotonic() > deadline or (process is not None and process.poll() is not None):
            raise SystemExit(f"{otherwise}: it has ended, or hangs")
        time.sleep(LOOK_SECONDS)


def say(what: str) -> None:
    sys.stderr.write(f"{time.strftime('%H:%M:%S')} {what}\n")


# --------------------------------------------------------------------------------- what it shows


def summary(measured: dict[str, list[Measured]]) -> dict[str, Any]:
    found: dict[str, Any] = {"runs": {}, "medians": {}, "ratios": {}}
    for name, runs in measured.items():
        found["runs"][name] = [asdict(run) for run in runs]
        medians = {
            "step_seconds": statistics.median(run.step_seconds for run in runs),
            "first_step_seconds": statistics.median(run.first_step_seconds for run in runs),
            "standing_still_share": statistics.median(run.standing_still_share for run in runs),
        }
        for killed in {r.killed for run in runs for r in run.recoveries}:
            of_kind = [r for run in runs for r in run.recoveries if r.killed == killed]
            for key in ("seconds", "steps_lost", "seconds_lost"):
                medians[f"{killed}_{key}"] = statistics.median(getattr(r, key) for r in of_kind)
        found["medians"][name] = medians
    ours, plain = found["medians"]["shoal"], found["medians"]["plain"]
    found["ratios"] = {key: round(ours[key] / plain[key], 3) for key in ours if plain[key]}
    return found


def is_right(result: dict[str, Any]) -> bool:
    ratios = result["ratios"]
    return (
        ratios["worker_seconds"] <= MOST_SECONDS
        and ratios["worker_steps_lost"] < 1
        and ratios["node_steps_lost"] < 1
    )


def tables(result: dict[str, Any]) -> list[Table]:
    network = (
        "nodes with networks of their own"
        if result["shared_host"] is None
        else f"raylets of one host ({result['shared_host']})"
    )
    table = Table(
        title=f"Recovery, workers: {result['workers']}, {network}; medians of {result['rounds']} "
        "rounds",
        title_justify="left",
    )
    for name, justify in (("", "left"), ("Shoal", "right"), ("plain", "right"), ("ratio", "right")):
        table.add_column(name, justify=justify)
    ours, plain = result["medians"]["shoal"], result["medians"]["plain"]
    for key, title, digits in (
        ("worker_seconds", "worker killed: s to the next step", 1),
        ("worker_steps_lost", "worker killed: steps lost", 0),
        ("worker_seconds_lost", "worker killed: s of work lost", 2),
        ("node_seconds", "node killed: s to the next step", 1),
        ("node_steps_lost", "node killed: steps lost", 0),
        ("node_seconds_lost", "node killed: s of work lost", 2),
        ("first_step_seconds", "command to first step, s", 1),
        ("step_seconds", "a step, s", 3),
        ("standing_still_share", "standing still for checkpoints, part of the time", 4),
    ):
        if key not in ours:
            continue  # no node was killed, in the small size
        ratio = result["ratios"].get(key)
        table.add_row(
            title,
            f"{ours[key]:.{digits}f}",
            f"{plain[key]:.{digits}f}",
            "" if ratio is None else f"{ratio:.2f}",
        )
    return [table]


if __name__ == "__main__":
    main()
