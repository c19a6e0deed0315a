"""A run's best model on other data: metrics, and the prediction of each row.

evaluate_run -> the run's job, its best checkpoint, the data's index -> measure -> predictions
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from cluster.storage import (
    DamagedObject,
    ObjectMissing,
    Store,
    join_uri,
    open_store,
    read_whole,
)
from jobs.errors import DataError, EnvironmentFault, Problem, SpecError
from jobs.parse import recorded_spec
from jobs.record import (
    DAMAGED_RECORD_HINT,
    Manifest,
    RunPaths,
    best_manifest,
    live_manifests,
)
from jobs.spec import JobSpec
from trainers.adapted_folder import add_exported
from trainers.attempt import as_cut
from trainers.data.cache import NodeCache, cache_folder
from trainers.data.index import Index, open_index
from trainers.data.reader import VerifiedReader
from trainers.data.shard_workers import available_cores
from trainers.data.stream import RankStream
from trainers.evaluation import measure
from trainers.memory import MicrobatchTooLarge
from trainers.microbatch import Cutting, IntArray
from trainers.parallel import compute_type, float32_products
from trainers.predictions import PredictionWriter
from trainers.pretrained import model_of_checkpoint
from trainers.records import read_attempts, read_manifests, read_result
from trainers.tasks.task import Batch, Evaluation, Task, build_task

PREDICTIONS = "predictions.parquet"
METRICS = "metrics.json"
_BATCH_ROWS = 512


@dataclass(frozen=True, eq=False)
class _Data:
    """The data set on which the model is measured."""

    store: Store
    index: Index
    cache: NodeCache


def evaluate_run(store: Store, run_id: str, data_uri: str, output: Path | None) -> dict[str, Any]:
    """Measures the best model of a run on a data set, in this process, on all of its cores.

    The prediction of each row goes to the Parquet file `output`, or where that is None into the
    run's folder, together with the metrics. Returns `metrics`, `per_class`, `confusion` and `rows`
    as an evaluation of the run has them, and `run`, `step`, `checkpoint`, `data`, `predictions`.

    Raises SpecError where there is no such run, or no model of it yet; DataError for a data set
    that does not fit its task; EnvironmentFault where a store or the disk is not usable.
    """
    paths = RunPaths(run_id)
    spec = _read_spec(store, paths)
    manifest = _best_manifest(store, paths)
    spec = as_cut(spec, read_attempts(store, paths)[-1])
    data = _open_data(spec, data_uri)
    checkpoint = store.within(paths.checkpoint(manifest.name).rstrip("/"))
    folder = model_of_checkpoint(checkpoint, manifest, spec, cache_folder())
    task = build_task(spec, model_folder=folder, index=data.index)
    with _place(store, paths, data.index, output) as (path, shown):
        model = task.build_model(folder, dropout=None, seed=0)
        add_exported(model, folder)
        try:
            evaluation = _measure(spec, task, model, data, path)
        except MicrobatchTooLarge as error:
            raise EnvironmentFault(
                Problem(
                    f"the memory of this machine does not suffice: {error}",
                    "evaluate the run on a machine with more memory, such as those of its workers",
                )
            ) from error
        measured = {
            **evaluation.to_json(),
            "run": join_uri(store.uri, run_id),
            "step": manifest.step,
            "checkpoint": join_uri(store.uri, paths.checkpoint(manifest.name).rstrip("/")),
            "data": {"uri": data.store.uri, "digest": data.index.digest},
            "predictions": shown,
        }
    if output is None:
        key = paths.evaluation(data.index.digest) + METRICS
        store.write(key, json.dumps(measured, indent=1).encode())
    return measured


def _measure(
    spec: JobSpec, task: Task, model: torch.nn.Module, data: _Data, path: Path
) -> Evaluation:
    """The evaluation, with the predictions written to `path`."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(available_cores())
    metrics = task.metrics()
    stream = RankStream(
        store=data.store,
        index=data.index,
        columns=task.columns,
        encode=task.encode,
        rank=0,
        world_size=1,
        seed=0,
        lanes=1,
        window=1,
        cache=data.cache,
    )
    texts = _Texts(spec.task.text, data)
    with (
        stream,
        PredictionWriter(path, other_columns=texts.columns) as writer,
        float32_products(spec.model, device),
    ):

        def keep(rows: IntArray, output: torch.Tensor, batch: Batch) -> None:
            writer.add(rows, task.predictions(output, batch))

        measure(
            model.to(device),
            task,
            stream.sequential(batch_rows=_BATCH_ROWS),
            metrics,
            device=device,
            dtype=compute_type(spec.model, device),
            cutting=Cutting.of(spec.batching),
            on_output=keep,
        )
    return metrics.compute(metrics.state())


@contextmanager
def _place(
    store: Store, paths: RunPaths, index: Index, output: Path | None
) -> Iterator[tuple[Path, str]]:
    """The local file for the predictions and where it is to be found after the block."""
    if output is not None:
        if not output.absolute().parent.is_dir():
            raise SpecError(
                Problem(
                    f"--output is {output}, but there is no folder {output.parent}",
                    "make it, or name a file in a folder that exists",
                )
            )
        yield output, str(output)
        return
    key = paths.evaluation(index.digest) + PREDICTIONS
    try:
        scratch = tempfile.TemporaryDirectory(prefix="shoal-evaluate-")
    except OSError as error:
        raise EnvironmentFault(
            Problem(
                f"the temporary folder {tempfile.gettempdir()} cannot be used: {error.strerror}",
                "free space there, or set TMPDIR to another folder",
            )
        ) from error
    with scratch as folder:
        path = Path(folder, PREDICTIONS)
        yield path, join_uri(store.uri, key)
        store.upload(key, path)


class _Texts:
    """The texts of rows, read once more for the predictions; nothing where there is no column."""

    def __init__(self, column: str, data: _Data) -> None:
        self._column = column
        self._reader = (
            VerifiedReader(store=data.store, index=data.index, columns=[column], cache=data.cache)
            if column in {c.name for c in data.index.schema}
            else None
        )
        rows = data.index.group_rows
        self._starts = np.cumsum(rows, dtype=np.int64) - rows

    def columns(self, start: int, end: int) -> Mapping[str, Any]:
        """The text column of the rows [start, end)."""
        if self._reader is None:
            return {}
        first = int(np.searchsorted(self._starts, start, side="right")) - 1
        last = int(np.searchsorted(self._starts, end, side="left"))
        chunks = [
            chunk
            for group in range(first, last)
            for chunk in self._rows_of(group, start, end).chunks
        ]
        return {self._column: pa.chunked_array(chunks)}

    def _rows_of(self, group: int, start: int, end: int) -> pa.ChunkedArray:
        assert self._reader is not None
        begin = int(self._starts[group])
        column = self._reader.read(group).column(0)
        low = max(start - begin, 0)
        return column.slice(low, max(0, min(end - begin, len(column)) - low))


# ------------------------------------------------------------------------------- what is measured


def _read_spec(store: Store, paths: RunPaths) -> JobSpec:
    """The run's job; what a resume may change of it does not matter here."""
    try:
        return read_whole(store, paths.spec, recorded_spec, hint=DAMAGED_RECORD_HINT)
    except ObjectMissing as error:
        raise SpecError(
            Problem(
                f"{store.uri} has no run {paths.run_id}",
                f"see the runs with: shoal list --store {store.uri}",
            )
        ) from error


def _best_manifest(store: Store, paths: RunPaths) -> Manifest:
    """The best checkpoint of the run: that of its result, or the best so far while it goes on."""
    uri = join_uri(store.uri, paths.run_id)
    result = read_result(store, paths)
    folder = result and (result.best_checkpoint or result.last_checkpoint)
    if folder:
        key = f"{paths.run_id}/{folder.rstrip('/')}/manifest.json"
        try:
            return read_whole(store, key, Manifest.model_validate_json, hint="")
        except (ObjectMissing, DamagedObject) as error:
            raise DataError(
                Problem(
                    f"the best checkpoint of {uri} ({folder}) is gone or damaged",
                    f"see what is left with: shoal checkpoints {uri}",
                )
            ) from error
    live = live_manifests(read_manifests(store, paths), read_attempts(store, paths))
    best = best_manifest(live) or (live[-1] if live else None)
    if best is None:
        raise SpecError(
            Problem(
                f"the run {uri} has no model yet: it has saved no checkpoint",
                f"see what it does with: shoal status {uri}",
            )
        )
    return best


def _open_data(spec: JobSpec, uri: str) -> _Data:
    """The data set; DataError where it lacks the columns of the task."""
    store = open_store(uri, spec.data.access)
    index = open_index(store)
    known = [column.name for column in index.schema]
    wanted = {"label": spec.task.label}
    if index.tokenizer is None:
        wanted["text"] = spec.task.text
    problems = [
        Problem(
            f"the run learned from the {role} column {name}, and {store.uri} has no such column",
            f"its columns: {', '.join(known)}; prepare it with one of that name",
        )
        for role, name in wanted.items()
        if name not in known
    ]
    if problems:
        raise DataError(*problems)
    if not index.num_rows:
        raise DataError(Problem(f"{store.uri} holds no rows", "name a data set with rows"))
    cache = NodeCache(cache_folder() / "rows", limit_bytes=int(spec.data.cache_gib * 2**30))
    return _Data(store, index, cache)
