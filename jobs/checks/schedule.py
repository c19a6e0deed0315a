"""What follows from several parts of the job and the training set: steps, lanes, memory. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from jobs.checks.data_sets import DataSetFacts
from jobs.checks.finding import Finding, ok, problem, problems_of, warning
from jobs.checks.model import ModelFacts
from jobs.checks.states import states_of
from jobs.checks.weighting import epoch_rows, most_copies
from jobs.errors import SpecError
from jobs.spec import MAX_AUTO_LANES, JobSpec, format_bytes
from trainers.data.partition import (
    fit_window,
    item_step,
    lanes_of_rank,
    refuse_small_cache,
    refuse_small_memory,
    stream_bytes,
)


@dataclass(frozen=True)
class Totals:
    """What the run amounts to; None where a part of it is not known."""

    rows: int | None = None
    """Of one epoch."""
    steps_per_epoch: int | None = None
    total_steps: int | None = None
    lanes: int | None = None
    window: int | None = None
    """Row groups of a lane among which rows are shuffled."""
    stream_bytes: int | None = None
    """Row groups that one worker holds in memory."""
    parameters: int | None = None
    trained_parameters: int | None = None
    training_bytes: int | None = None
    """Weights, gradients and optimizer state of one worker."""

    def to_json(self) -> dict[str, int | None]:
        return asdict(self)


def totals_of(spec: JobSpec, train: DataSetFacts | None, model: ModelFacts | None) -> Totals:
    """Counts of the run; those that need the training set are None without it."""
    weights = model.weights if model is not None else None
    parameters = weights.num_parameters if weights is not None else None
    trained = model.trained_parameters if model is not None else None
    training = None
    if parameters is not None:
        cut_into = spec.workers.fewest if spec.workers.strategy == "fsdp" else 1
        # Gradients and states are those of what is trained; its number may be unknown.
        counted = parameters if trained is None else trained
        numbers = parameters + counted * (1 + states_of(spec.optimizer))
        training = math.ceil(4 * numbers / cut_into)
    if train is None or not train.index.num_rows:
        return Totals(parameters=parameters, trained_parameters=trained, training_bytes=training)
    index = train.index
    rows = epoch_rows(spec, index)
    steps = math.ceil(rows / spec.batching.global_batch_size)
    window = _window(spec, train)
    return Totals(
        rows=rows,
        steps_per_epoch=steps,
        total_steps=steps * spec.train.epochs,
        lanes=spec.lanes,
        window=window,
        stream_bytes=stream_bytes(
            lanes=spec.lanes,
            window=window,
            world_size=_hungriest(spec),
            max_row_group_bytes=_group_bytes(spec, train),
        ),
        parameters=parameters,
        trained_parameters=trained,
        training_bytes=training,
    )


def _hungriest(spec: JobSpec) -> int:
    """The allowed number of workers with which one worker touches the most lanes."""
    return max(spec.workers.counts, key=lambda count: lanes_of_rank(spec.lanes, count))


def _window(spec: JobSpec, train: DataSetFacts) -> int:
    return fit_window(
        window=spec.data.window,
        lanes=spec.lanes,
        max_row_group_bytes=_group_bytes(spec, train),
        stream_memory=spec.data.stream_memory,
    )


def _group_bytes(spec: JobSpec, train: DataSetFacts) -> int:
    """Of the largest row group, with all copies of its rows."""
    return train.index.max_row_group_bytes * most_copies(spec, train.index)


def check_batching(spec: JobSpec) -> Iterator[Finding]:
    """Whether rows, micro-batches and workers go together."""
    batching, workers = spec.batching, spec.workers.count
    most = batching.max_tokens_per_microbatch
    if most != "auto" and most < spec.task.max_tokens:
        yield problem(
            "batching",
            f"batching.max_tokens_per_microbatch is {most}, but one row may have "
            f"{spec.task.max_tokens} tokens (task.max_tokens)",
            f"set batching.max_tokens_per_microbatch to {spec.task.max_tokens} or more",
        )
    if batching.global_batch_size < workers:
        yield warning(
            "batching",
            f"batching.global_batch_size is {batching.global_batch_size} rows, so that of "
            f"{workers} workers {workers - batching.global_batch_size} have nothing to do in a "
            "step",
            f"set batching.global_batch_size to {workers} or more, or lower workers.count",
        )


def check_steps(spec: JobSpec, totals: Totals) -> Iterator[Finding]:
    """Whether warmup, evaluations and checkpoints happen within the run's steps."""
    total, each = totals.total_steps, totals.steps_per_epoch
    if total is None or each is None:
        return
    warmup = spec.optimizer.warmup_steps
    if warmup >= total:
        yield warning(
            "optimizer",
            f"optimizer.warmup_steps is {warmup:,}, but the run has {total:,} steps, so the "
            "learning rate never reaches optimizer.learning_rate",
            f"set optimizer.warmup_steps to {max(0, total // 10)} or so",
        )
    every = spec.train.evaluate_every_steps
    stopping = spec.train.early_stopping
    if every is not None and every > total and spec.data.validation is not None:
        yield warning(
            "train",
            f"train.evaluate_every_steps is {every:,}, but the run has {total:,} steps, so only "
            "its end is evaluated",
            f"set train.evaluate_every_steps to {each} (once an epoch) or less, or remove it",
        )
    evaluations = math.ceil(total / (every or each))
    patience = stopping.patience if stopping is not None else None
    if patience is not None and patience >= evaluations:
        yield warning(
            "train",
            f"train.early_stopping.patience is {patience}, but the run is evaluated "
            f"{evaluations} times, so it never stops early",
            "lower train.early_stopping.patience or train.evaluate_every_steps, or raise "
            "train.epochs",
        )
    if stopping is not None and (stopping.mode == "min") != (stopping.metric == "validation/loss"):
        right = "min" if stopping.metric == "validation/loss" else "max"
        yield warning(
            "train",
            f"train.early_stopping.mode is {stopping.mode} for {stopping.metric}, so the worst "
            "checkpoint counts as the best",
            f"set train.early_stopping.mode to {right}",
        )
    if spec.data.validation is None and spec.data.test is None:
        yield warning(
            "data",
            "neither data.validation nor data.test is given, so nothing tells how good the model "
            "is",
            "split the source: shoal prepare SOURCE --to URI --split validation=0.1,test=0.1",
        )


def check_stream(spec: JobSpec, train: DataSetFacts, totals: Totals) -> Iterator[Finding]:
    """Whether lanes, workers, memory and the node's cache fit the training set."""
    if totals.window is None or totals.stream_bytes is None:
        return
    index, lanes = train.index, spec.lanes
    try:
        refuse_small_memory(
            uri=train.uri,
            lanes=lanes,
            window=totals.window,
            world_size=_hungriest(spec),
            max_row_group_bytes=_group_bytes(spec, train),
            stream_memory=spec.data.stream_memory,
        )
    except SpecError as error:
        yield from problems_of("data.stream_memory", error)
    else:
        yield from _tell_memory(spec, train, totals)
    sharing = [count for count in spec.workers.counts if item_step(lanes, count) > 1]
    if not sharing:
        return
    yield _tell_sharing(spec, sharing)
    try:
        refuse_small_cache(
            uri=train.uri,
            lanes=lanes,
            window=totals.window,
            num_groups=index.num_groups,
            stored_bytes=index.record.bytes,
            cache_bytes=int(spec.data.cache_gib * 2**30),
        )
    except SpecError as error:
        yield from problems_of("data.cache_gib", error)


def _tell_sharing(spec: JobSpec, sharing: list[int]) -> Finding:
    """`sharing`: the worker counts that do not divide the lanes."""
    lanes, counts = spec.lanes, spec.workers.counts
    if len(counts) == 1:
        workers = counts[0]
        return warning(
            "data.lanes",
            f"{workers} workers do not divide the {lanes} lanes, so {item_step(lanes, workers)} "
            "workers read each row group",
            f"set data.lanes to a multiple of {workers}",
        )
    exact = math.lcm(*counts)
    shown = ", ".join(map(str, sharing[:8])) + (", ..." if len(sharing) > 8 else "")
    return warning(
        "data.lanes",
        f"{len(sharing)} of the {len(counts)} worker counts from workers.min to workers.count do "
        f"not divide the {lanes} lanes ({shown}), so with them several workers read each row group",
        f"leave it: the order of rows is the same; or set data.lanes to {exact}"
        if exact <= MAX_AUTO_LANES
        else "leave it: the order of rows is the same; or raise workers.min, as lanes for all of "
        "the counts would take too much memory",
    )


def _tell_memory(spec: JobSpec, train: DataSetFacts, totals: Totals) -> Iterator[Finding]:
    index, window = train.index, totals.window
    assert totals.stream_bytes is not None
    groups = 2 * (window or 1) * lanes_of_rank(spec.lanes, _hungriest(spec))
    message = (
        f"a worker holds at most {groups} row groups of {format_bytes(index.max_row_group_bytes)}: "
        f"{format_bytes(totals.stream_bytes)} of {format_bytes(spec.data.stream_memory)}"
    )
    if window is not None and window < min(spec.data.window, index.num_groups // spec.lanes):
        wanted = stream_bytes(
            lanes=spec.lanes,
            window=spec.data.window,
            world_size=1,
            max_row_group_bytes=index.max_row_group_bytes,
        )
        yield warning(
            "data.stream_memory",
            f"{message}; rows are shuffled within {window} row groups instead of data.window's "
            f"{spec.data.window}",
            f"set data.stream_memory to {-(-wanted // 2**20)} MiB for the whole window",
        )
    else:
        yield ok("data.stream_memory", message)
