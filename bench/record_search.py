"""Records the table of real fine-tuning results on which searches are replayed.

    python bench/record_search.py [--configurations N] [--processes N] [--table FILE] [--check]
                                  [--small]

MiniLM-L6, cut to its embeddings and its last layer, learns the sentiment of short film reviews: 160
configurations of learning rate, weight decay, dropout and batch size, scrambled Sobol sequences
over a space that is wider than anybody would search, 32 of them outside the core where the others
lie, as the best of those lay at its border. Each is one run of Shoal's worker in a process with one
thread. The best twelve are trained with two more seeds, and the best four of those with six more:
three do not tell them apart. See bench/search_table.py for what is recorded.

The last layer, as it has learned to gather a sentence's meaning in the first token: cut to its
first layers, the model learns next to nothing from so few rows.

The table is written after each run, so the same command goes on where it was stopped; with more
configurations it adds what is missing. Run with TMPDIR=/dev/shm, the checkpoints of the runs do not
wait for a disk.

--check records nothing. Either way the exit code is 1 where the table has too few configurations,
evaluations or seeds, or its best configuration lies on the edge of a range; in the small size the
best may lie there.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import multiprocessing
import os
import shutil
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import lab
import numpy as np
from rich.console import Console
from rich.table import Table as Shown
from search_table import (
    FIRST_SEED,
    METRIC,
    PATH,
    Demands,
    Range,
    Run,
    Space,
    Table,
    Values,
    contenders_of,
    read_table,
    shortfalls,
    write_table,
)

from examples import assets
from jobs.parse import apply_overrides, parse_spec
from jobs.record import RunPaths, State

LABELS = ["negative", "positive"]
DESIGN_SEED = 2026
MOST_CHARACTERS = 100
"""Of a text: short ones are quick."""
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    [
        "pyarrow.dataset",
        "sklearn.metrics",
        "transformers.models.bert.modeling_bert",
        "trainers.tasks.text_classification",
        "trainers.worker",
    ]
)


def space_of(most_weight_decay: float, batch_sizes: tuple[int, ...]) -> Space:
    return Space(
        {
            "optimizer.learning_rate": Range("loguniform", (1e-5, 3e-2)),
            "optimizer.weight_decay": Range("loguniform", (1e-3, most_weight_decay)),
            "model.dropout": Range("uniform", (0.0, 0.6)),
            "batching.global_batch_size": Range("choice", batch_sizes),
        }
    )


@dataclass(frozen=True)
class Size:
    """How much is recorded, and of what. All evaluations of a run are at a whole number of steps
    for each batch size."""

    configurations: int
    finalists: int
    seeds: int
    contenders: int
    contender_seeds: int
    layers: tuple[int, ...]
    """Of MiniLM-L6, which has 0 to 5; none: the tests' tiny model."""
    rows: Mapping[str, int]
    """Of the sets train, validation and test. The test set is small as nobody asks for its result;
    without one, a run measures its validation set twice more."""
    epochs: int
    evaluations: int
    max_tokens: int
    core: Space
    """Over which most of the configurations lie."""
    space: Space
    beyond: int
    """Configurations of the space outside its core."""
    margin: float

    @property
    def demands(self) -> Demands:
        return Demands(
            configurations=self.configurations + self.beyond,
            evaluations=self.evaluations,
            finalists=self.finalists,
            seeds=self.seeds,
            contenders=self.contenders,
            contender_seeds=self.contender_seeds,
            margin=self.margin,
        )


FULL = Size(
    configurations=128, finalists=12, seeds=3, contenders=4, contender_seeds=9, layers=(5,),
    rows={"train": 1024, "validation": 800, "test": 100}, epochs=3, evaluations=12, max_tokens=32,
    core=space_of(10.0, (4, 8, 16, 32, 64, 128)),
    space=space_of(100.0, (2, 4, 8, 16, 32, 64, 128)), beyond=32, margin=0.1,
)  # fmt: skip
SMALL = Size(
    configurations=3, finalists=2, seeds=2, contenders=1, contender_seeds=2, layers=(),
    rows={"train": 32, "validation": 16, "test": 4}, epochs=2, evaluations=4, max_tokens=32,
    core=space_of(10.0, (4, 8, 16)), space=space_of(10.0, (4, 8, 16)), beyond=0, margin=0.0,
)  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--configurations", type=int, metavar="N", help="of the core, at least")
    parser.add_argument("--processes", type=int, metavar="N", help="runs at once; one a core")
    parser.add_argument("--table", type=Path, metavar="FILE", help=f"instead of bench/{PATH.name}")
    parser.add_argument("--check", action="store_true", help="record nothing")
    parser.add_argument("--small", action="store_true", help="the size that CI runs")
    arguments = parser.parse_args()
    if arguments.small and arguments.table is None:
        parser.error("--small needs --table: its results do not belong into the real one")
    path, size = arguments.table or PATH, SMALL if arguments.small else FULL
    if not arguments.check:
        record(
            path,
            size,
            configurations=arguments.configurations or size.configurations,
            processes=arguments.processes or os.cpu_count() or 1,
        )
    if not path.exists():
        parser.error(f"there is no {path}; record it without --check")
    return tell(read_table(path), size)


def record(path: Path, size: Size, *, configurations: int, processes: int) -> None:
    """Adds to the table at `path` what it lacks."""
    with lab.place() as place:
        job = prepare_job(place, size)
        table = begun(path, setup_of(job, size), size.space)
        machine = _machine()
        while wanted := missing(table, size, configurations=configurations):
            for run in trained(job, wanted, size, processes=processes):
                table = table.with_run(run, machine)
                write_table(table, path)


# ---------------------------------------------------------------------------- what is to be run


def missing(table: Table, size: Size, *, configurations: int) -> list[tuple[Values, int]]:
    """(values, seed) of the runs that come next: the configurations; once all of those are there,
    the other seeds of the best; then those of the contenders. Empty where the table is complete."""
    held = [run.values for run in table.configurations]
    first = [values for values in design(size, configurations) if values not in held]
    if first:
        return [(values, FIRST_SEED) for values in first]
    return seeds_missing(table, table.top(size.finalists), size.seeds) or seeds_missing(
        table, contenders_of(table, size.demands), size.contender_seeds
    )


def seeds_missing(table: Table, runs: Sequence[Run], seeds: int) -> list[tuple[Values, int]]:
    """(values, seed) of the seeds that these configurations lack."""
    return [
        (run.values, seed)
        for run in runs
        for seed in range(FIRST_SEED, FIRST_SEED + seeds)
        if seed not in {own.seed for own in table.seeds_of(run.values)}
    ]


def design(size: Size, count: int) -> list[Values]:
    """Configurations that fill the core evenly, then those outside of it: scrambled Sobol sequences
    (Owen 1998), of which the first ones stay the same when `count`, of the core, grows."""
    outside = (v for v in sobol(size.space, 8 * size.beyond) if not size.core.holds(v))
    return [*sobol(size.core, count), *itertools.islice(outside, size.beyond)]


def sobol(space: Space, count: int) -> list[Values]:
    # Here, as each process of a run imports this file.
    from scipy.stats import qmc

    if not count:
        return []
    engine = qmc.Sobol(len(space.ranges), rng=np.random.default_rng(DESIGN_SEED))
    points = engine.random_base2(math.ceil(math.log2(count)))[:count]
    return [space.values(point.tolist()) for point in points]


def begun(path: Path, setup: Mapping[str, Any], space: Space) -> Table:
    """The table so far, over the space as it is now. SystemExit if others' runs are in it."""
    if not path.exists():
        return Table(setup=setup, space=space)
    table = read_table(path)
    if table.setup != setup:
        differing = [name for name in setup if setup[name] != table.setup.get(name)]
        sys.exit(
            f"error: {path} was recorded with another {' and another '.join(differing)}\n\n"
            "hint: record into another file with --table, or remove this one"
        )
    return Table(setup=setup, space=space, machines=table.machines, runs=table.runs)


# ------------------------------------------------------------------------------- model and data


def prepare_job(place: Path, size: Size) -> dict[str, Any]:
    """The job of all runs as a tree, its model and its data sets in `place`."""
    source = place / "rows.jsonl"
    if size.layers:
        model = cut_model(size.layers, place / "model")
        rows = short_reviews(sum(size.rows.values()))
    else:
        from tests.tiny import review_rows, tiny_model

        model, rows = tiny_model(place / "model"), review_rows(sum(size.rows.values()))
    source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    _prepare(source, place / "data", model=model, size=size)
    return {
        "name": "search-table",
        "task": {"labels": LABELS, "max_tokens": size.max_tokens},
        # Frozen, the embeddings, most of the model, cost neither steps nor checkpoints much.
        "model": {"source": str(model), "freeze": ["embeddings"], "precision": "float32"},
        "data": {part: str(place / "data" / part) for part in size.rows},
        # Nothing is measured that would make a run add up otherwise when it is repeated.
        "batching": {"max_tokens_per_microbatch": 1024, "launch_tokens": 50},
        "train": {"epochs": size.epochs, "log_every_steps": 10_000},
        "checkpoint": {"every_steps": 10_000, "keep_last": 1},
        "workers": {"count": 1, "cpus": 1},
        "store": str(place / "runs"),
        "tracking": [],
    }


def cut_model(layers: Sequence[int], folder: Path) -> Path:
    """MiniLM-L6 with some of its layers, as save_pretrained writes it; the folder."""
    from torch import nn
    from transformers import AutoModel, AutoTokenizer

    whole = assets.minilm()
    model = AutoModel.from_pretrained(whole)
    model.encoder.layer = nn.ModuleList(model.encoder.layer[number] for number in layers)
    model.config.num_hidden_layers = len(layers)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(whole).save_pretrained(folder)
    return folder


def short_reviews(count: int) -> list[dict[str, str]]:
    """Some of the sentences that are short, drawn by a fixed seed."""
    lines = assets.movie_sentences().read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if len(row["text"]) <= MOST_CHARACTERS]
    order = np.random.default_rng(DESIGN_SEED).permutation(len(rows))[:count]
    return [rows[number] for number in order]


def _prepare(source: Path, to: Path, *, model: Path, size: Size) -> None:
    from trainers.data.prepare import prepare
    from trainers.data.prepare_plan import PrepareOptions

    prepare(
        PrepareOptions(
            source=str(source),
            to=str(to),
            split=",".join(f"{part}={rows}" for part, rows in size.rows.items()),
            tokenizer=str(model),
            max_tokens=size.max_tokens,
            processes=1,
        )
    )


def setup_of(job: Mapping[str, Any], size: Size) -> dict[str, Any]:
    """What all runs have in common, without the paths of this machine."""
    from cluster.storage import open_store
    from trainers.data.index import open_index

    parts = {part: open_index(open_store(uri)).digest for part, uri in job["data"].items()}
    return {
        "command": "python bench/record_search.py",
        "model": f"MiniLM-L6, layers {list(size.layers)}" if size.layers else "tests/tiny.py",
        "job": {key: job[key] for key in ("task", "batching", "train")}
        | {"model": {key: own for key, own in job["model"].items() if key != "source"}},
        "evaluations": size.evaluations,
        "data": {part: {"rows": size.rows[part], "digest": parts[part]} for part in parts},
    }


# ------------------------------------------------------------------------------------- the runs


def trained(
    job: Mapping[str, Any], wanted: Sequence[tuple[Values, int]], size: Size, *, processes: int
) -> Iterator[Run]:
    """The runs as they end, each in a process of its own, so that none depends on another."""
    began = time.monotonic()
    with ThreadPoolExecutor(processes) as pool:
        try:
            futures = [
                pool.submit(_in_own_process, dict(job), values, seed, size)
                for values, seed in wanted
            ]
            for done, future in enumerate(as_completed(futures), 1):
                run = future.result()
                left = (time.monotonic() - began) / done * (len(wanted) - done)
                shown = ", ".join(f"{path} {value}" for path, value in run.values.items())
                print(
                    f"{done} of {len(wanted)}: seed {run.seed}, {shown}: {METRIC} {run.score:.4f} "
                    f"in {run.seconds:.1f} s; {left / 60:.0f} min to go",
                    flush=True,
                )
                yield run
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _in_own_process(job: dict[str, Any], values: Values, seed: int, size: Size) -> Run:
    receiver, sender = PROCESSES.Pipe(duplex=False)
    process = PROCESSES.Process(
        target=_train_and_send, args=(sender, job, values, seed, size), daemon=True
    )
    process.start()
    sender.close()
    try:
        run: Run = receiver.recv()
    except EOFError:
        process.join()
        raise RuntimeError(f"the process of {values} ended with {process.exitcode}") from None
    process.join()
    return run


def _train_and_send(
    sender: Connection, job: dict[str, Any], values: Values, seed: int, size: Size
) -> None:
    sender.send(train_one(job, values, seed, size))


def train_one(job: dict[str, Any], values: Values, seed: int, size: Size) -> Run:
    """One configuration from its first step to its end, in this process."""
    from cluster.storage import open_store
    from jobs.runs import RunReader
    from trainers.assignment import Assignment
    from trainers.session import ProcessSession
    from trainers.worker import train_worker

    steps = size.epochs * size.rows["train"] // values["batching.global_batch_size"]
    own = values | {"data.seed": seed, "train.evaluate_every_steps": steps // size.evaluations}
    tree = apply_overrides(job, [f"{path}={json.dumps(value)}" for path, value in own.items()])
    spec = parse_spec(tree, where="bench/record_search.py")
    store, run_id = open_store(spec.store.uri), f"run-{os.getpid()}"
    store.write_if_absent(RunPaths(run_id).spec, spec.to_bytes())
    began = time.monotonic()
    with ProcessSession(use_gpu=False) as session:
        outcome = train_worker(session, Assignment(spec, run_id, generation=1, controls_seen=0))
    seconds = time.monotonic() - began
    has_diverged = outcome.state is State.FAILED_USER and outcome.step > 0
    if outcome.state is not State.SUCCEEDED and not has_diverged:
        raise RuntimeError(f"the run of {values} ended {outcome.state}: {outcome.failure}")
    lines = [line for line in RunReader(store, run_id).metrics() if line["kind"] == "evaluation"]
    found = [line for line in lines if line["split"] == "validation"]
    shutil.rmtree(Path(store.uri) / run_id)
    return Run(
        values=values,
        seed=seed,
        total_steps=steps,
        steps=tuple(line["step"] for line in found),
        metrics={
            f"validation/{name}": tuple(_finite(line["metrics"][name]) for line in found)
            for name in ("loss", "accuracy", "f1")
        },
        failure=outcome.failure.problems[0][0] if outcome.failure is not None else None,
        seconds=round(seconds, 1),
        machine=0,
    )


def _finite(value: float) -> float | None:
    return round(value, 6) if math.isfinite(value) else None


def _machine() -> dict[str, Any]:
    """The machine without what changes from hour to hour."""
    return {name: own for name, own in lab.machine().items() if name not in ("measured_at", "load")}


# --------------------------------------------------------------------------------- what it shows


def tell(table: Table, size: Size) -> int:
    """Prints what the table holds and lacks; the exit code."""
    console = Console(width=max(100, Console().width))
    if table.configurations:
        console.print(_finalists(table, size))
        console.print(_early_signs(table))
    found = shortfalls(table, size.demands)
    for sentence in found:
        console.print(f"lacking: {sentence}", style="red")
    return 1 if found else 0


def _finalists(table: Table, size: Size) -> Shown:
    scores = [run.score for run in table.configurations]
    shown = Shown(
        title=f"The best of {len(scores)} configurations by {METRIC}",
        caption=f"best {max(scores):.4f}, within 0.005 of it {_near_best(scores)}, median "
        f"{np.median(scores):.4f}, worst {min(scores):.4f}; {len(table.runs)} runs in "
        f"{sum(run.seconds for run in table.runs) / 60:.0f} min",
        title_justify="left",
    )
    for path in table.space.ranges:
        shown.add_column(path.rpartition(".")[2], justify="right")
    for name in ("first seed", "seeds", "mean", "deviation"):
        shown.add_column(name, justify="right")
    for run in table.top(size.finalists):
        own = table.seeds_of(run.values)
        shown.add_row(
            *(str(run.values[path]) for path in table.space.ranges),
            f"{run.score:.4f}",
            str(len(own)),
            f"{table.mean(run.values):.4f}",
            f"{statistics.stdev(o.score for o in own):.4f}" if len(own) > 1 else "",
        )
    return shown


def _near_best(scores: Sequence[float]) -> int:
    return sum(score >= max(scores) - 0.005 for score in scores)


def _early_signs(table: Table) -> Shown:
    """How far the score after a part of the training tells that after all of it."""
    shown = Shown(title="Rank correlation with the score at the end", title_justify="left")
    whole = [run for run in table.configurations if run.failure is None]
    count = min((len(run.steps) for run in whole), default=0)
    row = []
    for until in range(1, count):
        early = [max(v or 0.0 for v in run.metrics[METRIC][:until]) for run in whole]
        shown.add_column(f"{until}/{count}", justify="right")
        row.append(_rank_correlation(early, [run.score for run in whole]))
    shown.add_row(*row)
    return shown


def _rank_correlation(some: Sequence[float], others: Sequence[float]) -> str:
    """Spearman's; nothing where one of them is the same throughout."""
    from scipy.stats import spearmanr

    if min(len(set(some)), len(set(others))) == 1:
        return ""
    return f"{spearmanr(some, others).statistic:.2f}"


if __name__ == "__main__":
    sys.exit(main())
