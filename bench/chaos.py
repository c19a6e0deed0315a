"""A run that is killed again and again, and what is left of it: every row once, the same bits.

    python bench/chaos.py [--kills N] [--seed S] [--small] [--json FILE]

SIGKILL at moments drawn from the seed: in the middle of steps, evaluations and uploads, between the
parts of a checkpoint and its manifest; of workers, of the driver, of a whole Ray node. A fifth of
the kills hit a second run, which goes on with another number of workers after each. Afterwards, in
the lineage of the final weights, every row of every epoch must have been used exactly once; the
first run must end with the bits of a run that was never killed, the second with the same sequence
of global batches. Exit code 1 where any of this fails, or where fewer kills met a moment than they
should: 5 each of those above, two drivers and a node, of 50.

`--small` kills ranks that are no workers of Ray, for CI: no drivers, no nodes.
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
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

import lab
import yaml
from rich.table import Table

HOOKS = Path(__file__).parent / "hooks"
INSIDE = ("step", "evaluation", "upload", "parts")
"""Moments of a rank; `parts` is between the parts of a checkpoint and its manifest."""
WHOLE = 50
LEAST = dict.fromkeys(INSIDE, 5) | {"driver": 2, "node": 1}
"""How many of so many kills meet each moment at least."""
MOST_STEPS_BEFORE = 30
PATIENCE_SECONDS = 600
LOOK_SECONDS = 0.5
WORKERS = 2
BATCH = 8


@dataclass
class Kill:
    """One SIGKILL: what was ordered, and what it met."""

    run: str
    ordered: str
    moment: str
    attempt: int
    seconds_until_progress: float | None = None


@dataclass
class Verdict:
    """What is left of a killed run."""

    run: str
    state: str
    steps: int
    attempts: int
    steps_lost: int
    """Steps that were made again, over all attempts."""
    rows_lost: int
    rows_repeated: int
    same_batches: bool
    same_bits: bool | None
    """None where the number of workers changed: rounding may differ then."""

    @property
    def is_right(self) -> bool:
        return (
            self.state == "SUCCEEDED"
            and not self.rows_lost
            and not self.rows_repeated
            and self.same_batches
            and self.same_bits is not False
        )


@dataclass
class Arena:
    """A model, its data, a job and a store of runs."""

    folder: Path
    store: str
    rows: int
    epochs: int
    seed: int
    kills: list[Kill] = field(default_factory=list)

    @property
    def steps(self) -> int:
        return self.epochs * -(-self.rows // BATCH)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, help="how many; 50, or 4 with --small")
    parser.add_argument("--seed", type=int, help="of the moments; default: another each time")
    arguments = lab.arguments_of(parser)
    seed = arguments.seed if arguments.seed is not None else random.SystemRandom().getrandbits(32)
    kills = arguments.kills or (4 if arguments.small else 50)
    print(f"seed {seed}", file=sys.stderr)
    began = time.monotonic()
    with lab.place() as place, lab.object_store(place) as bucket:
        # Long enough to be there for all kills.
        rows, epochs = (200, 3) if arguments.small else (2000, 4 + kills // 3)
        arena = Arena(place, f"{bucket}/chaos", rows, epochs, seed)
        verdicts = (on_ranks if arguments.small else on_ray)(arena, kills)
    result = {
        "seed": seed,
        "seconds": round(time.monotonic() - began),
        "kills": [asdict(kill) for kill in arena.kills],
        "moments": dict(Counter(kill.moment for kill in arena.kills)),
        "runs": [asdict(verdict) | {"is_right": verdict.is_right} for verdict in verdicts],
    }
    result["is_right"] = is_right(result, kills=kills, is_small=arguments.small)
    lab.tell("chaos", result, tables=tables(result), json_file=arguments.json)
    sys.exit(0 if result["is_right"] else 1)


def is_right(result: dict[str, Any], *, kills: int, is_small: bool) -> bool:
    """Whether the runs are, and so many kills met so many of each moment."""
    met, least = result["moments"], {} if is_small or kills < WHOLE else LEAST
    return (
        all(run["is_right"] for run in result["runs"])
        and len(result["kills"]) == kills
        and all(met.get(moment, 0) >= number for moment, number in least.items())
    )


# ------------------------------------------------------------------------------------- the scene


def prepare(arena: Arena, *, evaluate_every: int, checkpoint_every: int) -> dict[str, Any]:
    """The job as a tree; model and data are made."""
    from tests.tiny import tiny_model, tiny_reviews, tiny_tree

    data = tiny_reviews(f"{arena.store}/data", rows=arena.rows, rows_per_group=64, held_out=90)
    return tiny_tree(
        tiny_model(arena.folder / "model", hidden=64),
        {**data, "lanes": 12, "seed": 3},
        f"{arena.store}/runs",
        workers={"count": WORKERS},
        train={
            "epochs": arena.epochs, "log_rows": True, "log_every_steps": 10,
            "evaluate_every_steps": evaluate_every,
        },
        checkpoint={"every_steps": checkpoint_every},
        retries={"worker_failures": 10_000},
    )  # fmt: skip


def judge(arena: Arena, run_id: str, *, calm: str, same_workers: bool) -> Verdict:
    """Compares what a killed run has left with an undisturbed one."""
    from cluster.storage import open_store
    from jobs.record import RunPaths
    from jobs.runs import RunReader
    from tests.evidence import final_weights, global_batches, rows_by_epoch
    from trainers.records import read_attempts

    runs = open_store(f"{arena.store}/runs")
    reader = RunReader(runs, run_id)
    attempts = read_attempts(runs, RunPaths(run_id))
    outcomes = [outcome.state for outcome in reader.outcomes().values()]
    used = rows_by_epoch(runs, run_id)
    lost = repeated = 0
    for epoch in range(arena.epochs):
        counts = used.get(epoch, Counter())
        lost += sum(counts[row] == 0 for row in range(arena.rows))
        repeated += sum(count - 1 for count in counts.values() if count > 1)
    last_step = {a.attempt: a.restored_step or 0 for a in attempts}
    for line in reader.metrics_lines():
        last_step[line["attempt"]] = max(last_step.get(line["attempt"], 0), int(line["step"]))
    again = [
        max(0, last_step[before.attempt] - (after.restored_step or 0))
        for before, after in pairwise(attempts)
    ]
    return Verdict(
        run=run_id,
        state="SUCCEEDED" if "SUCCEEDED" in outcomes else str(outcomes[-1:]),
        steps=arena.steps,
        attempts=len(attempts),
        steps_lost=sum(again),
        rows_lost=lost,
        rows_repeated=repeated,
        same_batches=global_batches(runs, run_id) == global_batches(runs, calm),
        same_bits=final_weights(runs, run_id) == final_weights(runs, calm)
        if same_workers
        else None,
    )


# ---------------------------------------------------------------------------------- without Ray


def on_ranks(arena: Arena, kills: int) -> list[Verdict]:
    """Kills groups of ranks, as torchrun would start them; each start is another generation."""
    from jobs.parse import parse_spec
    from tests.ranks import Kill as Order
    from tests.ranks import assignment_of, run_ranks

    tree = prepare(arena, evaluate_every=20, checkpoint_every=7)
    spec = parse_spec(tree, where="chaos")
    run_ranks(assignment_of(spec, "calm"), world_size=WORKERS)
    draw = random.Random(arena.seed)
    moments = [moment for moment in INSIDE for _ in range(-(-kills // len(INSIDE)))][:kills]
    draw.shuffle(moments)
    verdicts = []
    for run_id, counts in (("steady", [WORKERS]), ("changing", [1, 3, 2])):
        own = moments[kills // 4 :] if run_id == "steady" else moments[: kills // 4]
        generation = 0
        for generation, moment in enumerate(own, start=1):
            count = counts[generation % len(counts)]
            assignment = assignment_of(with_workers(spec, count), run_id, generation=generation)
            at = draw.randint(1, 12 if moment == "step" else 2 if moment != "upload" else 8)
            order = Order(moment, at)
            run_ranks(assignment, world_size=count, kill=order)
            arena.kills.append(Kill(run_id, f"{moment} {at}", moment, generation))
        run_ranks(assignment_of(spec, run_id, generation=generation + 1), world_size=WORKERS)
        verdicts.append(judge(arena, run_id, calm="calm", same_workers=run_id == "steady"))
    return verdicts


def with_workers(spec: Any, count: int) -> Any:
    return spec.model_copy(update={"workers": spec.workers.model_copy(update={"count": count})})


# -------------------------------------------------------------------------------------- with Ray


def on_ray(arena: Arena, kills: int) -> list[Verdict]:
    """Kills workers, drivers and nodes of a Ray cluster of this machine."""
    from tests.raylets import raylets

    tree = prepare(arena, evaluate_every=60, checkpoint_every=20)
    (arena.folder / "job.yaml").write_text(yaml.safe_dump(tree))
    orders = arena.folder / "orders"
    orders.mkdir()
    paths = [str(HOOKS), str(lab.ROOT), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    draw = random.Random(arena.seed)
    for_changing = kills // 5
    verdicts = []
    with undisturbed(arena) as calm, raylets(cpus=0) as cluster:
        os.environ["SHOAL_CHAOS_ORDERS"] = str(orders)
        cluster.add(cpus=3)
        for run_id in ("steady", "changing"):
            number = kills - for_changing if run_id == "steady" else for_changing
            with RayRun(arena, run_id, cluster, orders, draw) as run:
                for left in range(number, 0, -1):
                    run.kill(next_moment(run.met, left, draw, run_id=run_id))
                run.finish()
        if calm.wait(PATIENCE_SECONDS * 3):
            raise SystemExit("the calm run failed")
        for run_id in ("steady", "changing"):
            verdicts.append(judge(arena, run_id, calm="calm", same_workers=run_id == "steady"))
    return verdicts


def next_moment(met: Counter[str], left: int, draw: random.Random, *, run_id: str) -> str:
    """What the next of `left` kills is to hit: anything, or what has been met too rarely so far."""
    if run_id == "steady":
        lacking = [moment for moment in LEAST for _ in range(LEAST[moment] - met[moment])]
        return draw.choice(lacking if len(lacking) >= left else [*INSIDE, *LEAST])
    # The successor of a driver has another number of workers.
    return "driver" if draw.random() < 0.5 else draw.choice(INSIDE)


@contextmanager
def undisturbed(arena: Arena) -> Iterator[subprocess.Popen[bytes]]:
    """The same job by torchrun, which takes no orders; ended with the block."""
    process = subprocess.Popen(
        [
            "nice", sys.executable, "-m", "torch.distributed.run", "--standalone",
            "--nproc-per-node", str(WORKERS), "-m", "trainers", "job.yaml", "--run-id", "calm",
        ],
        cwd=arena.folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        yield process
    finally:
        process.terminate()
        process.wait()


class RayRun:
    """A run on the cluster, and the ways in which it is hit."""

    def __init__(
        self, arena: Arena, run_id: str, cluster: Any, orders: Path, draw: random.Random
    ) -> None:
        from cluster.storage import open_store
        from jobs.runs import RunReader

        self._arena = arena
        self._run_id = run_id
        self._cluster = cluster
        self._orders = orders
        self._draw = draw
        self._number = len(arena.kills)
        self.met: Counter[str] = Counter()
        """How many kills met each moment; one that was over before it could be hit is a step."""
        self._runs = open_store(f"{arena.store}/runs")
        self._reader = RunReader(self._runs, run_id)
        self._uri = f"{self._runs.uri}/{run_id}"

    def __enter__(self) -> Self:
        self._shoal("submit", "job.yaml", "--run-id", self._run_id, "--skip-check")
        return self

    def __exit__(self, *_: object) -> None:
        """Ends the driver, if it has not ended by itself."""
        from jobs.runs import driver_has_ended

        lease = self._reader.lease()
        if lease is not None and driver_has_ended(lease) is False:
            os.kill(lease.pid, signal.SIGKILL)

    def kill(self, moment: str) -> None:
        """Kills, and returns when training has got further than it was."""
        attempt = self._wait_for_progress()
        began = time.monotonic()
        self._number += 1
        if moment in INSIDE:
            met, attempt = self._order(moment)
        else:
            time.sleep(self._draw.random())
            met = moment
            (self._kill_driver if moment == "driver" else self._kill_node)()
        kill = Kill(self._run_id, moment, met, attempt)
        self._arena.kills.append(kill)
        self.met[met] += 1
        self._wait_for_progress(after=attempt)
        kill.seconds_until_progress = round(time.monotonic() - began, 1)
        print(
            f"{self._run_id}: {len(self._arena.kills)} kills, {met}, "
            f"{kill.seconds_until_progress} s until it goes on",
            file=sys.stderr,
        )

    def finish(self) -> None:
        """Returns when the run has ended by itself."""
        deadline = time.monotonic() + 2 * PATIENCE_SECONDS
        while self._reader.result() is None:
            if time.monotonic() > deadline:
                raise SystemExit(f"{self._run_id} does not end")
            time.sleep(1)

    def _order(self, moment: str) -> tuple[str, int]:
        order = {
            "number": self._number,
            "moment": moment,
            "rank": self._draw.randrange(WORKERS),
            "count": self._draw.randint(1, MOST_STEPS_BEFORE),
            "fraction": self._draw.random(),
        }
        path = self._orders / "order.json"
        path.with_suffix(".part").write_text(json.dumps(order))
        path.with_suffix(".part").replace(path)
        done = self._orders / f"done-{self._number}.json"
        self._wait(done.exists, f"nothing met the order {order}")
        held = json.loads(done.read_text())
        return held["moment"], held["attempt"]

    def _kill_driver(self) -> None:
        """Kills the driver; another one resumes the run."""
        lease = self._reader.lease()
        assert lease is not None
        os.kill(lease.pid, signal.SIGKILL)
        changes = []
        if self._run_id == "changing":
            workers = self._draw.choice([1, 2, 3])
            changes = ["--set", f"workers.count={workers}"]
        time.sleep(0.5)
        self._shoal("resume", self._uri, "--background", *changes)

    def _kill_node(self) -> None:
        """Kills the raylet that hosts the workers, with all of them; another node joins."""
        self._cluster.remove(self._cluster.nodes[-1])
        self._cluster.add(cpus=3)

    def _wait_for_progress(self, *, after: int = 0) -> int:
        """Number of the newest attempt, once one later than `after` has made steps of its own."""
        found = 0

        def has_progress() -> bool:
            # The first of these lines is written after some steps.
            nonlocal found
            folders = list(self._runs.list_folders(f"{self._run_id}/metrics/"))
            found = max((int(name.rpartition("-")[2]) for name in folders), default=0)
            return found > after

        self._wait(has_progress, f"no attempt after {after} gets on")
        return found

    def _wait(self, condition: Any, otherwise: str) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not condition():
            if time.monotonic() > deadline:
                raise SystemExit(f"{self._run_id}: {otherwise}")
            if self._reader.result() is not None:
                raise SystemExit(f"{self._run_id} has ended before: {self._reader.result()}")
            time.sleep(LOOK_SECONDS)

    def _shoal(self, *arguments: str) -> None:
        subprocess.run(
            [sys.executable, "-m", "jobs.cli", *arguments],
            cwd=self._arena.folder, check=True, stdout=subprocess.DEVNULL,
        )  # fmt: skip


# --------------------------------------------------------------------------------------- results


def tables(result: dict[str, Any]) -> list[Table]:
    moments = Table(title=f"{len(result['kills'])} kills, seed {result['seed']}")
    moments.title_justify = "left"
    for moment in result["moments"]:
        moments.add_column(moment, justify="right")
    moments.add_row(*(str(count) for count in result["moments"].values()))
    runs = Table(title="What is left", title_justify="left")
    columns = (
        "run", "state", "steps", "attempts", "steps made again", "rows lost", "rows repeated",
        "same batches", "same bits",
    )  # fmt: skip
    for column in columns:
        runs.add_column(column)
    words = {True: "yes", False: "NO", None: "-"}
    for run in result["runs"]:
        runs.add_row(
            run["run"],
            run["state"],
            *(
                str(run[key])
                for key in ("steps", "attempts", "steps_lost", "rows_lost", "rows_repeated")
            ),
            words[run["same_batches"]],
            words[run["same_bits"]],
        )
    return [moments, runs]


if __name__ == "__main__":
    main()
