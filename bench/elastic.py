"""Workers that come and go while a run goes on, against the same run with a fixed number of them.

    python bench/elastic.py [--small] [--json FILE] [--picture FILE.png]

Ray nodes with addresses of their own, one worker each; a real S3 server; one run, which nobody
touches. In full: 4 workers, of whose nodes two are taken with notice, then a node joins:
4 -> 2 -> 3. The small size starts with the one node that is there, of the two that it may have;
then the second joins; is taken, while the store refuses checkpoints for longer than the notice
leaves; and the first is taken as another joins: 1 -> 2 -> 1 -> 1. At last the head is taken, and
with it the driver: it has the state saved and ends. What was trained is compared, step by step,
with a run under torchrun that nothing has happened to, of two workers, in the small size of one. In
full it is also measured what each step pays for hearing of notices, against Ray's own call.

Exit code 1 if a row was lost or repeated, a global batch, a loss or an evaluation differs, the
workers were others than planned, an attempt ended without saving although there was time for it, or
notices cost a step more than 0.5 %: the look for one, and what its entry adds to the vote of all
ranks, which every step makes anyway.
"""

from __future__ import annotations

import argparse
import itertools
import os
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lab
import yaml
from rich.table import Table

from cluster import embedded
from cluster.storage import Store, join_uri, open_store
from jobs.runs import RunReader
from jobs.submit import request_stop
from tests.evidence import global_batches, losses, rows_by_epoch
from tests.faulty_proxy import FaultyProxy, proxy_to
from tests.raylets import Node, Raylets, raylets
from tests.tiny import tiny_model, tiny_reviews, tiny_tree

if TYPE_CHECKING:
    from trainers.agreement import PendingDecision

ROWS = 768
HELD_OUT = 64
GLOBAL_BATCH = 16
CHECKPOINT_STEPS = 20
RUN, FIXED = "elastic", "fixed"
WAIT_SECONDS = 400
GRACE_SECONDS = 30.0
"""Between the notice that a node is taken and its end, as some platforms have it."""
SLOW_SECONDS = 2.0
"""That a slow store takes over each request that writes a part of a checkpoint."""
MOST_POLLING = 0.005
"""Share of a step's time that hearing of notices may cost."""
MOST_DIFFERENCE = 1e-4
"""Between two losses near 0.7 that differ by rounding only; one row makes 1e-3."""
LOOK, ENTRY = "the look for a notice", "its entry in the vote of all ranks"
VOTE = "the whole vote, asked for a step ahead"
_EVER = 10**9


@dataclass(frozen=True)
class Change:
    """Nodes that are taken with notice, the newest first, and nodes that join after that."""

    taken: int = 0
    joining: int = 0
    grace_seconds: float = GRACE_SECONDS
    """That those who join will have."""
    store_refuses: bool = False
    """No checkpoint can be written until the others go on."""


@dataclass(frozen=True)
class Plan:
    """How many workers there are at first, and what changes, each time after so many steps."""

    workers: int
    changes: tuple[Change, ...]
    steps: int
    fixed_workers: int = 2
    """Of the run that nothing happens to."""
    store_is_slow: bool = False
    """Saves take their time, and training waits for them: nodes come and go in the same seconds,
    but fewer steps are made meanwhile, all of which the fixed run makes, too."""

    @property
    def counts(self) -> list[int]:
        """Of workers, at first and after each change."""
        counts = [self.workers]
        for change in self.changes:
            counts.append(counts[-1] - change.taken + change.joining)
        return counts

    @property
    def most(self) -> int:
        return max(self.counts)


FULL = Plan(4, (Change(taken=2), Change(joining=1)), steps=150)
SMALL = Plan(
    1,
    (
        Change(joining=1, grace_seconds=8),
        Change(taken=1, store_refuses=True),
        Change(taken=1, joining=1),
    ),
    steps=45,
    fixed_workers=1,
    store_is_slow=True,
)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--picture", type=Path, metavar="FILE.png", help="both loss curves; else beside --json"
    )
    arguments = lab.arguments_of(parser)
    plan = SMALL if arguments.small else FULL
    with (
        lab.place() as place,
        lab.object_store(place),
        proxy_to(os.environ["AWS_ENDPOINT_URL_S3"]) as proxy,
    ):
        os.environ["AWS_ENDPOINT_URL_S3"] = proxy.url
        runs = _prepare(place, plan)
        # The head trains nothing, as on Kubernetes.
        with raylets(cpus=0) as cluster:
            _run_elastic(place, runs, plan, cluster, proxy)
        said = _log_of(place, RUN).read_text(errors="replace")
        polling = None if arguments.small else _measure_polling(place)
        _say(f"the same run with {_count(plan.fixed_workers)} throughout")
        _run_fixed(place, runs, workers=plan.fixed_workers, last_step=max(losses(runs, RUN)))
        result = _compare(runs, plan, polling)
    picture = arguments.picture or (arguments.json and arguments.json.with_suffix(".png"))
    if picture is not None:
        _draw(result, picture)
    lab.tell("elastic", result, tables=_tables(result), json_file=arguments.json)
    if not result["is_right"]:
        sys.stderr.write(said)
        return 1
    return 0


def _prepare(place: Path, plan: Plan) -> Store:
    """Model, data and job.yaml; the store of the runs."""
    bucket = f"s3://{embedded.DEFAULT_BUCKET}"
    data = tiny_reviews(join_uri(bucket, "data"), rows=ROWS, rows_per_group=64, held_out=HELD_OUT)
    tree = tiny_tree(
        # Dropout depends on how a batch is cut; without it all numbers of workers agree.
        tiny_model(place / "model", hidden=96, dropout=0.0),
        {"train": data["train"], "validation": data["validation"], "seed": 3},
        join_uri(bucket, "runs"),
        batching={"global_batch_size": GLOBAL_BATCH},
        optimizer={"learning_rate": 3e-4},
        train={"epochs": 500, "log_rows": True, "evaluate_every_steps": CHECKPOINT_STEPS},
        checkpoint={"every_steps": CHECKPOINT_STEPS},
        workers={"count": plan.most, "min": 1, "resize_seconds": 5.0},
        # Nodes that are taken and workers that are added are no failures.
        retries={"worker_failures": 0},
    )
    (place / "job.yaml").write_text(yaml.safe_dump(tree))
    return open_store(join_uri(bucket, "runs"))


# --------------------------------------------------------------------------------- the two runs


def _run_elastic(
    place: Path, runs: Store, plan: Plan, cluster: Raylets, proxy: FaultyProxy
) -> None:
    def recover() -> None:
        proxy.faults.clear()
        if plan.store_is_slow:
            proxy.late_seconds = SLOW_SECONDS
            proxy.fail("late", "PUT", "checkpoints/", times=_EVER)

    recover()
    nodes = [cluster.add(cpus=1, drain_seconds=GRACE_SECONDS) for _ in range(plan.workers)]
    reader = RunReader(runs, RUN)  # one for all: it reads no line twice
    with _process(["-m", "jobs.cli", "run", "job.yaml", "--run-id", RUN], place) as run:
        attempt = _await(run, reader, after=0, workers=plan.workers, steps=plan.steps)
        for change in plan.changes:
            if change.store_refuses:
                proxy.faults.clear()
                proxy.fail("slow down", "PUT", "checkpoints/", times=_EVER)
            nodes = _make(change, cluster, nodes)
            if change.store_refuses:
                _await(run, reader, after=attempt, workers=len(nodes), steps=0)
                recover()
            attempt = _await(run, reader, after=attempt, workers=len(nodes), steps=plan.steps)
        _say("the head is taken")
        cluster.head.process.send_signal(signal.SIGTERM)
        run.wait(WAIT_SECONDS)
    proxy.faults.clear()
    result = reader.result()
    assert result is not None
    assert result.failure is not None
    [(told, _)] = result.failure.problems
    assert told.startswith("the driver's machine is taken; step "), told


def _make(change: Change, cluster: Raylets, nodes: list[Node]) -> list[Node]:
    """The nodes that stay, once the change is announced or made."""
    _say(f"nodes that are taken: {change.taken}, that join: {change.joining}")
    stay = len(nodes) - change.taken
    for node in nodes[stay:]:
        node.process.send_signal(signal.SIGTERM)  # `ray start --block` then drains its node
    joining = range(change.joining)
    return nodes[:stay] + [cluster.add(cpus=1, drain_seconds=change.grace_seconds) for _ in joining]


def _run_fixed(place: Path, runs: Store, *, workers: int, last_step: int) -> None:
    reader = RunReader(runs, FIXED)
    command = [
        "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(workers),
        "-m", "trainers", "job.yaml", "--run-id", FIXED,
    ]  # fmt: skip
    with _process(command, place) as run:
        _wait_for(lambda: max(_steps_of(reader).get(1, [0])) >= last_step, run)
        request_stop(runs, FIXED, by="the benchmark")
        run.wait(WAIT_SECONDS)


def _log_of(place: Path, run_id: str) -> Path:
    """What the command said that trained the run."""
    return place / f"{run_id}.log"


@contextmanager
def _process(command: list[str], place: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A Python program that is ended with the block; what it says is shown where it fails."""
    said = _log_of(place, command[-1])
    with said.open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, *command],
            cwd=place,
            env=os.environ | {"PYTHONPATH": os.pathsep.join([str(lab.ROOT), *sys.path])},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            yield process
        except BaseException:
            sys.stderr.write(said.read_text(errors="replace")[-8000:])
            raise
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
                process.wait(WAIT_SECONDS)


def _await(
    run: subprocess.Popen[bytes], reader: RunReader, *, after: int, workers: int, steps: int
) -> int:
    """Until an attempt later than `after`, the newest, has so many workers and has done so many
    steps; its number."""
    found: list[int] = []

    def is_so() -> bool:
        attempts = reader.attempts()
        if not attempts or attempts[-1].attempt <= after or attempts[-1].world_size != workers:
            return False
        found.append(attempts[-1].attempt)
        return len(_steps_of(reader).get(found[-1], ())) >= steps

    _wait_for(is_so, run)
    _say(f"{_count(workers)}, {steps} steps done")
    return found[-1]


def _wait_for(condition: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        if process.poll() is not None or time.monotonic() > deadline:
            raise AssertionError("the run has ended, or hangs")
        time.sleep(1.0)  # each look asks the store several times


def _count(workers: int) -> str:
    return f"{workers} worker{'s' if workers > 1 else ''}"


def _say(what: str) -> None:
    sys.stderr.write(f"{time.strftime('%H:%M:%S')} {what}\n")


def _steps_of(reader: RunReader) -> dict[int, list[int]]:
    """The steps that each attempt has done, superseded ones included."""
    steps: dict[int, list[int]] = {}
    for line in reader.metrics_lines():
        if line["kind"] == "train":
            steps.setdefault(line["attempt"], []).append(line["step"])
    return steps


def _measure_polling(place: Path) -> dict[str, float]:
    """Seconds of one look for a notice, of its entry in the vote and of the vote itself, as Shoal's
    workers do it in each step, and of Ray's call. Two ranks."""
    import ray
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    _say("what hearing of notices costs")
    ray.init(address="local", num_cpus=2, num_gpus=0, log_to_driver=False)
    try:
        trainer = TorchTrainer(
            _poll,
            scaling_config=ScalingConfig(num_workers=2),
            run_config=RunConfig(name="polling", storage_path=str(place / "ray")),
        )
        seconds: dict[str, float] = trainer.fit().return_value
    finally:
        ray.shutdown()
    return seconds


def _poll() -> dict[str, float]:
    import ray.train

    from trainers.agreement import Agreement, Vote
    from trainers.ray_worker import RaySession

    session = RaySession(use_gpu=False)
    agreement = Agreement(rank=session.rank, world_size=session.world_size)

    def seconds_of(look: Callable[[], object], times: int) -> float:
        started = time.perf_counter()
        for _ in range(times):
            look()
        return (time.perf_counter() - started) / times

    return {
        LOOK: seconds_of(session.yield_requested, 10_000),
        ENTRY: _seconds_of_entry(session.world_size, seconds_of),
        VOTE: _seconds_of_vote(lambda: agreement.start(Vote(weight=8.0, num_microbatches=1))),
        "ray.train.get_preemption_info": seconds_of(ray.train.get_preemption_info, 100),
    }


def _seconds_of_entry(
    world_size: int, seconds_of: Callable[[Callable[[], object], int], float]
) -> float:
    """How much longer ranks gather a vote's numbers than one number less; the median of rounds
    that take turns, since it is lost in how much two such gatherings differ."""
    import torch
    import torch.distributed as dist

    from trainers.agreement import Vote

    group = dist.new_group(backend="gloo")
    numbers = len(fields(Vote))

    def gather(count: int) -> None:
        own = torch.zeros(count, dtype=torch.float64)
        votes = torch.empty(world_size, count, dtype=torch.float64)
        dist.all_gather(list(votes), own, group=group)

    def difference() -> float:
        without = seconds_of(lambda: gather(numbers - 1), 50)
        return seconds_of(lambda: gather(numbers), 50) - without

    return max(0.0, statistics.median(difference() for _ in range(40)))


def _seconds_of_vote(start: Callable[[], PendingDecision]) -> float:
    """What beginning a vote and taking its result cost, with work of some milliseconds between,
    as a step has it; the median."""
    import torch

    matrix = torch.ones(800, 800)

    def once() -> float:
        started = time.perf_counter()
        vote = start()
        begun = time.perf_counter() - started
        _ = matrix @ matrix
        started = time.perf_counter()
        vote.wait()
        return begun + time.perf_counter() - started

    return statistics.median(once() for _ in range(500))


# --------------------------------------------------------------------------------- what it shows


def _compare(runs: Store, plan: Plan, polling: dict[str, float] | None) -> dict[str, Any]:
    elastic, fixed = losses(runs, RUN), losses(runs, FIXED)
    shared = sorted(set(elastic) & set(fixed))
    batches, fixed_batches = global_batches(runs, RUN), global_batches(runs, FIXED)
    differing = [s for s in shared if batches.get(s) != fixed_batches.get(s)]
    rows = _rows(runs)
    attempts = _attempts(runs)
    evaluations = _evaluations(runs)
    share = (polling[LOOK] + polling[ENTRY]) / _quickest_step(attempts) if polling else None
    result = {
        "fixed_workers": plan.fixed_workers,
        "attempts": attempts,
        "steps": len(shared),
        "rows": rows,
        "global_batches_that_differ": len(differing),
        "loss_difference_max": max(abs(elastic[s] - fixed[s]) for s in shared),
        "evaluations": evaluations,
        "loss": {"elastic": elastic, "fixed": {s: fixed[s] for s in shared}},
        "polling_seconds": polling,
        "polling_share_of_a_step": share,
        "are_all_steps_there": shared == list(range(1, max(elastic) + 1)),
    }
    return result | {"is_right": is_right(result, plan)}


def is_right(result: dict[str, Any], plan: Plan) -> bool:
    rows, evaluations, share = (
        result[key] for key in ("rows", "evaluations", "polling_share_of_a_step")
    )
    differences = result["loss_difference_max"], evaluations["loss_difference_max"]
    # The last step's may have been broken off.
    evaluations_due = result["steps"] // CHECKPOINT_STEPS - 1
    return (
        goes_as_planned(result["attempts"], plan)
        and result["are_all_steps_there"]
        and result["global_batches_that_differ"] == 0
        and rows["lost"] == rows["repeated"] == evaluations["not_each_row_once"] == 0
        and evaluations["shared"] >= evaluations_due
        and max(differences) < MOST_DIFFERENCE
        and (share is None or share < MOST_POLLING)
    )


def goes_as_planned(attempts: list[dict[str, Any]], plan: Plan) -> bool:
    """Whether there were as many workers as planned, one after the other, and each attempt saved
    all that it had done, but for those that could not."""
    counts = [count for count, _ in itertools.groupby(a["workers"] for a in attempts)]
    planned = [count for count, _ in itertools.groupby(plan.counts)]
    cut_off = [a for a in attempts if not a["gave_way"]]
    return (
        counts == planned
        and len(cut_off) == sum(change.store_refuses for change in plan.changes)
        and not any(a["steps_lost"] for a in attempts if a["gave_way"])
    )


def _evaluations(runs: Store) -> dict[str, Any]:
    """Of those that both runs have made: how many, those that counted other rows, and losses."""
    elastic, fixed = (
        {
            line["step"]: (sum(map(sum, line["confusion"])), line["metrics"]["loss"])
            for line in RunReader(runs, run_id).metrics()
            if line["kind"] == "evaluation" and line["step"] > 0
        }
        for run_id in (RUN, FIXED)
    )
    shared = set(elastic) & set(fixed)
    return {
        "shared": len(shared),
        "not_each_row_once": sum({elastic[s][0], fixed[s][0]} != {HELD_OUT} for s in shared),
        "loss_difference_max": max((abs(elastic[s][1] - fixed[s][1]) for s in shared), default=0.0),
    }


def _quickest_step(attempts: list[dict[str, Any]]) -> float:
    return float(min(a["seconds_per_step"] for a in attempts if a["seconds_per_step"]))


def _rows(runs: Store) -> dict[str, int]:
    """How many rows of the epochs that are over were lost, and of all epochs repeated."""
    epochs = rows_by_epoch(runs, RUN)
    over = list(epochs)[:-1]
    return {
        "epochs": len(over),
        "used": sum(sum(used.values()) for used in epochs.values()),
        "lost": sum(len(set(range(ROWS)) - set(epochs[epoch])) for epoch in over),
        "repeated": sum(sum((used - Counter(set(used))).values()) for used in epochs.values()),
    }


def _attempts(runs: Store) -> list[dict[str, Any]]:
    """One line for each attempt: its workers, its steps, and what its successor had to repeat."""
    reader = RunReader(runs, RUN)
    attempts, outcomes, steps = reader.attempts(), reader.outcomes(), _steps_of(reader)
    saved = [*((a.restored_step or 0) for a in attempts[1:]), reader.manifests()[-1].step]
    first_line, last_line = _line_times(reader)
    lines = []
    for attempt, saved_step in zip(attempts, saved, strict=True):
        done = steps.get(attempt.attempt, [])
        outcome = outcomes.get(attempt.attempt)
        lines.append(
            {
                "attempt": attempt.attempt,
                "workers": attempt.world_size,
                "from_step": attempt.restored_step or 0,
                "to_step": max(done, default=attempt.restored_step or 0),
                "gave_way": outcome is not None and outcome.state == "RECOVERING",
                "steps_lost": sum(step > saved_step for step in done),
                "seconds_per_step": _pace(first_line, last_line, attempt.attempt, len(done)),
                "seconds_to_next_step": _pause(first_line, last_line, attempt.attempt),
            }
        )
    return lines


def _pace(
    first: dict[int, float], last: dict[int, float], attempt: int, steps: int
) -> float | None:
    """Seconds of a step, checkpoints included."""
    return round((last[attempt] - first[attempt]) / (steps - 1), 4) if steps > 1 else None


def _pause(first: dict[int, float], last: dict[int, float], attempt: int) -> float | None:
    """Seconds between an attempt's last step and the first step of the next."""
    if attempt not in last or attempt + 1 not in first:
        return None
    return round(first[attempt + 1] - last[attempt], 1)


def _line_times(reader: RunReader) -> tuple[dict[int, float], dict[int, float]]:
    """When each attempt told its first and its last step; Unix seconds."""
    first: dict[int, float] = {}
    last: dict[int, float] = {}
    for line in reader.metrics_lines():
        if line["kind"] == "train":
            first.setdefault(line["attempt"], line["time"])
            last[line["attempt"]] = line["time"]
    return first, last


def _tables(result: dict[str, Any]) -> list[Table]:
    rows, evaluations = result["rows"], result["evaluations"]
    table = Table(
        title="One run whose workers come and go",
        caption=f"{result['steps']} steps; {rows['used']} rows used, {rows['lost']} lost, "
        f"{rows['repeated']} repeated; {result['global_batches_that_differ']} global batches "
        f"differ from the fixed run's; losses differ by {result['loss_difference_max']:.1e} at "
        f"most, those of {evaluations['shared']} evaluations by "
        f"{evaluations['loss_difference_max']:.1e}",
    )
    names = ("attempt", "workers", "steps", "s a step", "ended by", "steps lost", "s to the next")
    for name in names:
        table.add_column(name, justify="left" if name == "ended by" else "right")
    for a in result["attempts"]:
        table.add_row(
            str(a["attempt"]),
            str(a["workers"]),
            f"{a['from_step'] + 1} to {a['to_step']}",
            str(a["seconds_per_step"] or ""),
            "giving way" if a["gave_way"] else "Ray, without saving",
            str(a["steps_lost"]),
            str(a["seconds_to_next_step"] or ""),
        )
    return [table] if result["polling_seconds"] is None else [table, _polling_table(result)]


def _polling_table(result: dict[str, Any]) -> Table:
    """Against the fastest steps of the run."""
    step = _quickest_step(result["attempts"])
    table = Table(title="What a step pays for hearing of notices, two ranks")
    for name in ("look", "microseconds", f"of a step of {step * 1000:.0f} ms"):
        table.add_column(name, justify="left" if name == "look" else "right")
    for name, seconds in result["polling_seconds"].items():
        table.add_row(name, f"{seconds * 1e6:.2f}", f"{100 * seconds / step:.4f} %")
    return table


def _draw(result: dict[str, Any], file: Path) -> None:
    """Both loss curves, over each other, and the number of workers."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="constrained")
    FigureCanvasAgg(figure)
    curves, counts = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    for name, width, color in (("fixed", 4.0, "#b9cbe4"), ("elastic", 1.0, "#c2410c")):
        steps, values = zip(*sorted(result["loss"][name].items()), strict=True)
        fixed = f"{_count(result['fixed_workers'])} throughout"
        label = fixed if name == "fixed" else "workers come and go"
        curves.plot(steps, values, linewidth=width, color=color, label=label)
    for a in result["attempts"]:
        counts.plot([a["from_step"], a["to_step"]], [a["workers"]] * 2, color="#c2410c")
        if a is not result["attempts"][0]:
            curves.axvline(a["from_step"], color="#999999", linewidth=0.6, linestyle=":")
    curves.set_yscale("log")
    curves.set_ylabel("training loss")
    curves.legend(frameon=False)
    counts.set_ylabel("workers")
    counts.set_xlabel("optimizer step")
    counts.set_yticks(range(max(a["workers"] for a in result["attempts"]) + 2))
    figure.savefig(file, dpi=120)


if __name__ == "__main__":
    sys.exit(main())
