"""`shoal prepare`: rows from anywhere -> data sets of Parquet shards with an index.

    options -> source, plan -> [pass 1: count the classes] -> pass 2: rows -> parts -> shards
            -> files beside the indexes -> the indexes, last

The same source and options give the same bytes, whatever the number of processes. Memory depends
on the size of a shard, the number of processes and the number of classes, not on that of the rows.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from cluster.storage import open_store
from jobs.errors import Problem, SpecError
from trainers.data.clean_rows import CleanRows
from trainers.data.columns import LabelValue, label_codes
from trainers.data.index import IndexRecord, SplitRecord
from trainers.data.index_draft import IndexDraft, check_label_count
from trainers.data.prepare_plan import (
    PrepareOptions,
    PreparePlan,
    check_options,
    make_plan,
    source_choice,
)
from trainers.data.shard_workers import ShardWorkers, WriteShard, available_cores
from trainers.data.shards import ShardCutter, Sizes, shard_name
from trainers.data.sources import Source, open_source
from trainers.data.split import PARTS, Assigner, part_sizes, quotas
from trainers.data.target import Places, Target

_ONLY_CLASS: LabelValue = ""
"""The class of every row where nothing is stratified."""


@dataclass(frozen=True)
class PartSummary:
    """A data set that was written."""

    name: str | None
    """train, validation or test; None without a split."""
    uri: str
    record: IndexRecord

    def to_json(self) -> dict[str, object]:
        r = self.record
        return {
            "name": self.name,
            "uri": self.uri,
            "digest": r.digest,
            "rows": r.num_rows,
            "shards": r.num_shards,
            "row_groups": r.num_row_groups,
            "bytes": r.bytes,
            "max_row_group_bytes": r.max_row_group_bytes,
            "labels": r.labels,
            "columns": {c.name: c.type for c in r.columns},
        }


@dataclass(frozen=True)
class Summary:
    """What a command did."""

    source: str
    outcome: Literal["written", "unchanged"]
    parts: tuple[PartSummary, ...]
    dropped_rows: int = 0
    """Rows left out because their text or label was null."""

    def to_json(self) -> dict[str, object]:
        return {
            "source": self.source,
            "outcome": self.outcome,
            "dropped_rows": self.dropped_rows,
            "parts": [part.to_json() for part in self.parts],
        }


class Progress(Protocol):
    """Who is told how far the work is."""

    def __call__(self, phase: str, *, done: int, total: int | None) -> None:
        """`done` of `total` bytes of the source; rows, where its bytes are not known (None)."""
        ...


def no_progress(phase: str, *, done: int, total: int | None) -> None:
    """Tells nobody."""


def prepare(options: PrepareOptions, progress: Progress = no_progress) -> Summary:
    """Write the data set or its parts, or do nothing where they are there already.

    Raises SpecError for options that contradict each other, DataError for a source that is wrong
    or a target that holds something else, StorageError where a store fails. Then nothing is left
    that looks like a data set.
    """
    if options.to is None:
        raise SpecError(Problem("no place to write to", "add --to URI, or --in-place"))
    check_options(options)
    source = open_source(source_choice(options))
    plan = make_plan(options, source)
    places = _places(options, plan)
    places.refuse_source(source.files)
    if places.are_complete(overwrite=options.overwrite):
        parts = [PartSummary(name, t.store.uri, t.verify()) for name, t in places.targets.items()]
        return Summary(source.uri, "unchanged", tuple(parts))
    assigner, sizes = _count(source, plan, options, progress) if plan.split else (None, None)
    rows = CleanRows(source, plan.columns, plan.required, options.on_null)
    with ExitStack() as undo:
        undo.callback(places.abandon)
        places.begin()
        scratch = Path(undo.enter_context(tempfile.TemporaryDirectory(prefix="shoal-prepare-")))
        parts_by_name = {
            name: undo.enter_context(_Part(target, plan, options.sizes, scratch / (name or "all")))
            for name, target in places.targets.items()
        }
        _write_shards(rows, parts_by_name, assigner, options, plan, progress)
        records = _write_indexes(parts_by_name, plan, sizes, options)
    parts = [PartSummary(name, t.store.uri, records[name]) for name, t in places.targets.items()]
    return Summary(source.uri, "written", tuple(parts), dropped_rows=rows.dropped)


def _places(options: PrepareOptions, plan: PreparePlan) -> Places:
    """Where each part goes; the key None is the data set without a split."""
    store = open_store(options.to or "", options.access)
    fingerprint = plan.facts.source.fingerprint
    if plan.split is None:
        return Places(targets={None: Target(store, fingerprint=fingerprint)}, stale=())
    parts = {name: Target(store.within(name), fingerprint=fingerprint) for name in PARTS}
    names = [name for name in PARTS if name == "train" or name in plan.split]
    return Places(
        targets={name: parts[name] for name in names},
        # A part of an earlier split that this one lacks: its rows would be in two parts.
        stale=tuple(target for name, target in parts.items() if name not in names),
    )


class _Part:
    """A data set that is being written."""

    def __init__(self, target: Target, plan: PreparePlan, sizes: Sizes, scratch: Path) -> None:
        scratch.mkdir()
        self.target = target
        self.cutter = ShardCutter(sizes.shard_bytes)
        self.draft = IndexDraft(scratch, plan.facts)
        self.num_shards = 0
        self._plan, self._sizes = plan, sizes

    def __enter__(self) -> _Part:
        return self

    def __exit__(self, *_: object) -> None:
        self.draft.close()

    def task(self, rows: pa.Table) -> WriteShard:
        """The task to write the next shard."""
        self.num_shards += 1
        return WriteShard(
            name=shard_name(self.num_shards - 1),
            rows=rows,
            store=self.target.store,
            sizes=self._sizes,
            roles=self._plan.roles,
            tokenization=self._plan.tokenization,
            image_columns=self._plan.image_columns,
        )


def _count(
    source: Source, plan: PreparePlan, options: PrepareOptions, progress: Progress
) -> tuple[Assigner, dict[str, int]]:
    """The first pass: how many rows of each class each part gets."""
    assert plan.split is not None
    counts: dict[LabelValue, int] = {}
    # Something must be read, or there are no rows to count.
    columns = plan.required or plan.columns[:1]
    rows = CleanRows(source, columns, plan.required, options.on_null)
    for table in rows.tables():
        codes, values = _classes(table, plan)
        of_values = np.bincount(codes, minlength=len(values)).tolist()
        for value, count in zip(values, of_values, strict=True):
            counts[value] = counts.get(value, 0) + count
        check_label_count(len(counts), plan.stratify)
        _tell(progress, "counting rows", rows)
    sizes = part_sizes(plan.split, num_rows=rows.kept)
    values = sorted(counts)
    left = quotas([counts[value] for value in values], list(sizes.values()))
    return Assigner(values, left, seed=options.seed or 0), sizes


def _classes(table: pa.Table, plan: PreparePlan) -> tuple[npt.NDArray[np.int32], list[LabelValue]]:
    if plan.stratify is None:
        return np.zeros(table.num_rows, np.int32), [_ONLY_CLASS]
    return label_codes(table[plan.stratify])


def _write_shards(
    rows: CleanRows,
    parts: Mapping[str | None, _Part],
    assigner: Assigner | None,
    options: PrepareOptions,
    plan: PreparePlan,
    progress: Progress,
) -> None:
    """The second pass, or the only one: each row to its part, each full shard to a process."""
    processes = options.processes or available_cores()
    with ShardWorkers(processes) as workers:
        for table in rows.tables():
            for part, piece in _deal(table, list(parts.values()), assigner, plan):
                for shard in part.cutter.add(piece):
                    workers.submit(part.task(shard), is_last=False, take_report=part.draft.add)
            _tell(progress, "writing shards", rows)
        if assigner is not None:
            assigner.finish()
        for part in parts.values():
            for shard in part.cutter.finish():
                workers.submit(part.task(shard), is_last=True, take_report=part.draft.add)
        workers.finish()


def _deal(
    table: pa.Table, parts: Sequence[_Part], assigner: Assigner | None, plan: PreparePlan
) -> Iterator[tuple[_Part, pa.Table]]:
    if assigner is None:
        yield parts[0], table
        return
    numbers = assigner.assign(*_classes(table, plan))
    for number, part in enumerate(parts):
        mine = numbers == number
        if mine.any():
            yield part, table.filter(pa.array(mine))


def _write_indexes(
    parts: Mapping[str | None, _Part],
    plan: PreparePlan,
    sizes: Mapping[str, int] | None,
    options: PrepareOptions,
) -> dict[str | None, IndexRecord]:
    """The files beside the indexes, then all indexes, one right after the other."""
    labels = {value for part in parts.values() for value in part.draft.label_values}
    records = {}
    for name, part in parts.items():
        split = None
        if name is not None and sizes is not None:
            split = SplitRecord(
                name=name, parts=dict(sizes), seed=options.seed or 0, stratify=plan.stratify
            )
        records[name] = part.draft.upload(part.target.store, labels=labels, split=split)
    for name, part in parts.items():
        part.target.commit(records[name])
    return records


def _tell(progress: Progress, phase: str, rows: CleanRows) -> None:
    total = rows.source.num_bytes
    done = rows.source.bytes_read if total is not None else rows.kept + rows.dropped
    progress(phase, done=done, total=total)
