"""What a rank has before its first step: data, task, model, optimizer, restored state."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from torch import nn

from cluster.storage import Store, open_store
from jobs.errors import DataError, Problem, SpecError
from jobs.record import Manifest, RunPaths, StreamPosition
from jobs.spec import JobSpec
from trainers import watchdog
from trainers.adapted_folder import adapt
from trainers.adapter_record import (
    AdapterRecord,
    adapter_record,
    read_adapter_record,
    refuse_other_base,
)
from trainers.block_training import adapt_blocks
from trainers.classes import class_weights, classes_of_codes, refuse_other_column
from trainers.data.cache import cache_folder
from trainers.data.index import Index, open_index
from trainers.data.partition import ORDER_VERSION, fit_window, refuse_small_memory
from trainers.data.weighting import Copies
from trainers.evaluation import move
from trainers.freezing import freeze
from trainers.kept import Kept
from trainers.local_copy import TICKING
from trainers.loop import Plan, Progress, Trainee, forward, stops_early
from trainers.optim import build_optimizer
from trainers.parallel import compute_type, is_sharded, replicate, shard
from trainers.patience import Patience
from trainers.pretrained import pretrained_folder
from trainers.restore import checkpoint_copy, load_progress
from trainers.session import Session
from trainers.state import load_optimizer, refuse_converted
from trainers.tasks.task import Task, build_task


@dataclass(frozen=True)
class DataSet:
    """A data set's folder and its index."""

    uri: str
    store: Store
    index: Index


@dataclass(frozen=True)
class Prepared:
    """All that a rank has before its first step."""

    train: DataSet
    validation: DataSet | None
    test: DataSet | None
    plan: Plan
    position: StreamPosition
    """Constants of the order, at the position where training goes on."""
    task: Task
    trainee: Trainee
    progress: Progress
    before: dict[str, Any] | None
    folder: Path
    """Of the model that training began with, or began anew with."""
    adapter: AdapterRecord | None
    """The job's adapter and what it belongs to."""
    copies: Copies | None
    """With weighted sampling: how often rows of the training set are used."""


def open_data(
    spec: JobSpec, uri: str, patience: Patience | None = None, kept: Kept | None = None
) -> DataSet:
    """A data set of the job; with `patience` its index is waited for while the store is away."""
    open_place = open_store if kept is None else kept.store
    store = open_place(uri, spec.data.access, transfer=TICKING)
    read_index = open_index if kept is None else kept.index
    index = read_index(store if patience is None else patience.store(store))
    if index.num_rows == 0:
        raise DataError(
            Problem(f"the data set {uri} has no rows", "prepare it from a source that has some")
        )
    return DataSet(uri, store, index)


def copies_of(spec: JobSpec, data: DataSet) -> Copies | None:
    """How often each row of the training set is used in an epoch; None where each is, once.

    Raises DataError where a row's weight is not known, SpecError where an epoch has no row.
    """
    sampling = spec.data.sampling
    if sampling is None:
        return None
    refuse_other_column(spec.task.label, data.index)
    labels = spec.task.labels
    weights = dict(
        zip(labels, class_weights(sampling, labels=labels, index=data.index), strict=True)
    )
    means = [weights.get(meant or "", 1.0) for meant in classes_of_codes(labels, data.index)]
    copies = Copies(data.store, data.index, mean_copies=np.array(means), seed=spec.data.seed)
    if any(copies.num_items(epoch) == 0 for epoch in range(spec.train.epochs)):
        raise SpecError(
            Problem(
                "data.sampling leaves an epoch without a row",
                "raise the numbers in data.sampling",
            )
        )
    return copies


def stream_position(
    spec: JobSpec, index: Index, progress: Progress, copies: Copies | None = None
) -> StreamPosition:
    """Where `progress` stands in the order of the job's rows."""
    return StreamPosition(
        order_version=ORDER_VERSION,
        index_digest=index.digest,
        lanes=spec.lanes,
        window=fit_window(
            window=spec.data.window,
            lanes=spec.lanes,
            max_row_group_bytes=_most_group_bytes(index, copies),
            stream_memory=spec.data.stream_memory,
        ),
        sampler_digest=None if copies is None else copies.digest,
        seed=spec.data.seed,
        global_batch_size=spec.batching.global_batch_size,
        epoch=progress.epoch,
        next_item=progress.next_item,
    )


def _most_group_bytes(index: Index, copies: Copies | None) -> int:
    """Bytes of the largest row group with all copies of its rows, at most."""
    return index.max_row_group_bytes * (1 if copies is None else copies.most)


def refuse_other_order(saved: StreamPosition, own: StreamPosition) -> None:
    """SpecError where a checkpoint's rows come in another order than this job's would."""
    differing = [
        f"{name} was {getattr(saved, name)} and is {getattr(own, name)}"
        for name in type(saved).model_fields
        if name not in ("epoch", "next_item") and getattr(saved, name) != getattr(own, name)
    ]
    if differing:
        raise SpecError(
            Problem(
                "the checkpoint was trained on rows in another order: " + "; ".join(differing),
                "restore the data set as it was, or start a new run with model.source naming this "
                "run to go on from its weights",
            )
        )


def prepare(
    session: Session,
    spec: JobSpec,
    store: Store,
    paths: RunPaths,
    restored: Manifest | None,
    *,
    patience: Patience,
    kept: Kept | None = None,
) -> Prepared:
    """Everything before the first step but the replication of the model. Talks to no other rank.

    Stores of data and model that are away are waited for, as `store` is by itself. With `kept` what
    this process has of an earlier trial is not made again.
    """
    watchdog.tick("opens the data sets")
    data = spec.data
    train_set = open_data(spec, data.train, patience, kept)
    validation = open_data(spec, data.validation, patience, kept) if data.validation else None
    test = open_data(spec, data.test, patience, kept) if data.test else None
    copies = patience.call(lambda: copies_of(spec, train_set))
    epochs = range(spec.train.epochs)
    plan = Plan(
        num_rows=train_set.index.num_rows,
        global_batch_size=spec.batching.global_batch_size,
        epochs=spec.train.epochs,
        epoch_items=None if copies is None else tuple(map(copies.num_items, epochs)),
    )
    progress, before, folder = Progress(), None, None
    if restored is not None:
        watchdog.tick("fetches the checkpoint")
        folder = checkpoint_copy(store, paths, restored, cache_folder=cache_folder())
        progress, before = load_progress(folder)
        # The lanes and the window of the run's first attempt stay, whatever the worker count now.
        own = stream_position(spec, train_set.index, progress, copies)
        refuse_other_order(
            restored.stream,
            own.model_copy(
                update={"lanes": restored.stream.lanes, "window": restored.stream.window}
            ),
        )
        position = own.model_copy(
            update={"lanes": restored.stream.lanes, "window": restored.stream.window}
        )
    else:
        position = stream_position(spec, train_set.index, progress, copies)
    refuse_small_memory(
        uri=data.train,
        lanes=position.lanes,
        window=position.window,
        world_size=session.world_size,
        max_row_group_bytes=_most_group_bytes(train_set.index, copies),
        stream_memory=data.stream_memory,
    )
    watchdog.tick("fetches the model")
    find_model = pretrained_folder if kept is None else kept.folder
    source, adapter = None if folder is None else folder / "model", None
    if source is None or spec.model.adapter is not None:
        source = patience.call(lambda: find_model(spec, cache_folder=cache_folder()))
    if spec.model.adapter is not None:
        watchdog.tick("looks whether the model is the adapter's")
        adapter = adapter_record(spec, source)
        if folder is not None:
            refuse_other_base(read_adapter_record(folder), adapter)
    make_task = build_task if kept is None else kept.task
    task = make_task(spec, model_folder=source, index=train_set.index)
    for held_out in (validation, test):
        if held_out is not None:
            task.check_data(held_out.index)
    watchdog.tick("builds the model")
    dtype = compute_type(spec.model, session.device)
    model = build_model(task, source, spec, session, dropout=spec.model.dropout, adapter_in=folder)
    optimizer = build_optimizer(model, spec.optimizer)
    if folder is not None:
        load_optimizer(folder, model, optimizer)
    if progress.step < plan.total_steps and not stops_early(spec, progress.bad_evaluations):
        progress = replace(progress, finished=False)  # epochs may have been added
    trainee = Trainee(
        task=task,
        model=model,
        optimizer=optimizer,
        device=session.device,
        dtype=torch.float32 if is_sharded(model) else dtype,
    )
    return Prepared(
        train_set, validation, test, plan, position, task, trainee, progress, before,
        source, adapter, copies,
    )  # fmt: skip


def build_model(
    task: Task,
    folder: Path,
    spec: JobSpec,
    session: Session,
    *,
    dropout: float | None,
    adapter_in: Path | None = None,
) -> nn.Module:
    """The model of a folder as this rank trains or measures it, on its device: all of it, or its
    shard; with the job's adapter, as it is in the checkpoint `adapter_in` or as it begins.

    Before a rank cuts the model it has all of it in the host's memory, so the ranks of a node take
    turns. Talks to no other rank. A single rank holds all of it, whatever the strategy.
    """
    is_cut = spec.workers.strategy == "fsdp" and session.world_size > 1
    with _turn() if is_cut else nullcontext():
        model = task.build_model(folder, dropout=dropout, seed=spec.data.seed)
        adapt(model, spec, folder=folder, adapter_in=adapter_in)
        freeze(model, spec.model.freeze)
        adapt_blocks(model, spec.model)
        if not is_cut:
            return _in_own_memory(model.to(session.device))
        refuse_converted(model)
        dtype = compute_type(spec.model, session.device)
        return shard(model, device=session.device, dtype=dtype)


def _in_own_memory(model: nn.Module) -> nn.Module:
    """The model with each tensor on the CPU in memory of its own, which torch aligns.

    As they are loaded they may lie in a mapped file, where their alignment depends on what else is
    in it; and by its alignment a kernel may choose the order in which it adds up.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type == "cpu":
            tensor.data = tensor.data.clone()
    return model


def _turn() -> AbstractContextManager[object]:
    """A context in which no other process of this node is."""
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    return FileLock(folder / "building.lock")


def replicated(prepared: Prepared, session: Session) -> Prepared:
    """The same with a model whose gradients are averaged. All ranks call it at the same point.

    Apart from `prepare`, where a rank may fail: the others would wait for it in here.
    """
    trainee = prepared.trainee
    if is_sharded(trainee.model):
        return prepared  # its gradients are averaged as they are cut
    model = replicate(
        trainee.model,
        device=session.device,
        world_size=session.world_size,
        loss_of=lambda model: forward(
            replace(trainee, model=model), move(trainee.task.empty_batch(), trainee.device)
        ),
    )
    return replace(prepared, trainee=replace(trainee, model=model))
