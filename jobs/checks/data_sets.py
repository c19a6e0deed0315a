"""One data set of the job: index, columns, labels, shards, and some rows that are really read."""

from __future__ import annotations

import difflib
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from cluster.storage import Store
from jobs.checks.finding import (
    ENVIRONMENT_EXIT_CODE,
    Finding,
    has_problem,
    not_checked,
    ok,
    problem,
    problems_of,
    warning,
)
from jobs.checks.labels import check_labels
from jobs.checks.stores import Stores
from jobs.errors import ShoalError
from jobs.spec import JobSpec, format_bytes
from trainers.classes import is_integer_type
from trainers.data.cache import NodeCache
from trainers.data.index import ColumnRecord, Index, chunk_records, open_index
from trainers.data.reader import VerifiedReader

_TEXT_TYPES = ("string", "large_string", "string_view")
_DICTIONARY = re.compile(r"dictionary<values=([^,]+),.*")
_MOST_SHARDS_LISTED = 20_000
_MOST_BYTES_READ = 64 * 2**20
_SAMPLE_ROWS = 256


@dataclass(frozen=True, eq=False)
class DataSetFacts:
    """A data set whose index could be opened."""

    part: str
    uri: str
    index: Index
    texts: tuple[str, ...] = ()
    """Some of its texts, for the tokenizer; empty where it holds tokens, or has problems."""


def check_data_set(
    part: str, uri: str, spec: JobSpec, stores: Stores
) -> tuple[list[Finding], DataSetFacts | None]:
    """What there is to say of the data set at `uri`; facts where its index can be read."""
    try:
        store = stores.open(uri, spec.data.access)
        index = open_index(store)
    except ShoalError as error:
        return problems_of(part, error), None
    facts = DataSetFacts(part, uri, index)
    if not index.num_rows:
        return [_no_rows(part, store)], facts
    findings = [
        ok(
            part,
            f"{store.uri}: {index.num_rows:,} rows in {index.num_groups:,} row groups of "
            f"{index.num_shards:,} shards, {format_bytes(index.record.bytes)}",
        )
    ]
    wrong = list(_check_columns(part, spec, index, store))
    try:
        wrong += list(_check_shards(part, index, store))
        if has_problem(wrong):
            return findings + wrong, facts
        read, texts = _read_rows(part, spec, index, store)
    except ShoalError as error:
        return findings + wrong + problems_of(part, error), facts
    except OSError as error:
        unusable = problem(
            part,
            f"the temporary folder {tempfile.gettempdir()} cannot be used: {error.strerror}",
            "free space there, or set TMPDIR to another folder",
            exit_code=ENVIRONMENT_EXIT_CODE,
        )
        return [*findings, *wrong, unusable], facts
    return findings + wrong + read, DataSetFacts(part, uri, index, texts)


def _no_rows(part: str, store: Store) -> Finding:
    return problem(
        part,
        f"{store.uri} holds no rows",
        f"prepare it from a source that has rows: shoal prepare SOURCE --to {store.uri} "
        "--overwrite",
    )


def text_column(spec: JobSpec, index: Index) -> str:
    """The column from which the model's input comes: texts, or tokens if it holds them."""
    return index.tokenizer.column if index.tokenizer is not None else spec.task.text


# ------------------------------------------------------------------------------------- columns


def _check_columns(part: str, spec: JobSpec, index: Index, store: Store) -> Iterator[Finding]:
    by_name = {column.name: column for column in index.schema}
    own, label = text_column(spec, index), spec.task.label
    for key, name in (("task.text", own), ("task.label", label)):
        if name not in by_name:
            near = difflib.get_close_matches(name, by_name, n=1)
            yield problem(
                part,
                f"{key} is {name}, but {store.uri} has no such column",
                f"did you mean {near[0]}?" if near else f"its columns: {', '.join(by_name)}",
            )
    if own in by_name and index.tokenizer is None:
        yield from _check_texts(part, by_name[own], index, store)
    if label in by_name:
        yield from _check_label_column(part, by_name[label], spec, index, store)


def _check_texts(part: str, column: ColumnRecord, index: Index, store: Store) -> Iterator[Finding]:
    kind = _plain_type(column.type)
    if kind not in _TEXT_TYPES:
        yield problem(
            part,
            f"task.text is {column.name}, but that column of {store.uri} holds {column.type}, "
            "not text",
            "name the column of texts in task.text"
            + _others(index, kinds=_TEXT_TYPES, but=column.name),
        )
    elif column.null_count:
        yield _nulls(part, column, index, store, what="text")


def _check_label_column(
    part: str, column: ColumnRecord, spec: JobSpec, index: Index, store: Store
) -> Iterator[Finding]:
    kind = _plain_type(column.type)
    if not (kind in _TEXT_TYPES or kind == "bool" or is_integer_type(kind)):
        yield problem(
            part,
            f"task.label is {column.name}, but that column of {store.uri} holds {column.type}; "
            "labels are texts, whole numbers or booleans",
            "name the column of labels in task.label, or write it anew with such values",
        )
        return
    if column.null_count:
        yield _nulls(part, column, index, store, what="label")
    if index.labels is None or index.label_column != column.name:
        yield not_checked(
            part,
            f"the labels in column {column.name} of {store.uri} were not counted when it was "
            "prepared, so they are only met while training",
            f"prepare it again with --label {column.name}",
        )
        return
    yield from check_labels(
        part,
        index.labels,
        column=column.name,
        kind=kind,
        labels=spec.task.labels,
        uri=store.uri,
        must_have_all=part == "data.train",
    )


def _nulls(part: str, column: ColumnRecord, index: Index, store: Store, *, what: str) -> Finding:
    rows = column.null_count
    return problem(
        part,
        f"{rows:,} of {index.num_rows:,} rows of {store.uri} have no {what}: column "
        f"{column.name} is null",
        f"write a copy without them: shoal prepare {store.uri} --to URI --{what} {column.name} "
        "--on-null drop",
    )


def _others(index: Index, *, kinds: tuple[str, ...], but: str) -> str:
    """`: a, b`, the other columns of these types; empty where there is none."""
    names = [c.name for c in index.schema if _plain_type(c.type) in kinds and c.name != but]
    return f": {', '.join(names)}" if names else ""


def _plain_type(kind: str) -> str:
    """The type of a column's values: that inside a dictionary's."""
    match = _DICTIONARY.fullmatch(kind)
    return match[1] if match else kind


# -------------------------------------------------------------------------------- shards and rows


def _check_shards(part: str, index: Index, store: Store) -> Iterator[Finding]:
    """Whether every shard is there with the bytes that it had when it was indexed."""
    if index.num_shards > _MOST_SHARDS_LISTED:
        yield not_checked(
            part, f"the sizes of {index.num_shards:,} shards of {store.uri}: too many"
        )
        return
    found = {head.key: head.num_bytes for head in store.list()}
    shards = [index.shard(number) for number in range(index.num_shards)]
    wrong = [
        f"{shard.name} is missing"
        if shard.name not in found
        else f"{shard.name} has {found[shard.name]:,} bytes instead of {shard.num_bytes:,}"
        for shard in shards
        if found.get(shard.name) != shard.num_bytes
    ]
    if wrong:
        shown = "; ".join(wrong[:3]) + (f"; {len(wrong) - 3} others" if len(wrong) > 3 else "")
        yield problem(
            part,
            f"{len(wrong)} of {index.num_shards} shards of {store.uri} were changed after they "
            f"were indexed: {shown}",
            "restore them, or, if they are as you want them, run: "
            f"shoal prepare {store.uri} --in-place --overwrite",
        )


def _read_rows(
    part: str, spec: JobSpec, index: Index, store: Store
) -> tuple[list[Finding], tuple[str, ...]]:
    """Reads a small row group as training would, every byte of it verified."""
    enough = index.group_rows >= min(_SAMPLE_ROWS, int(index.group_rows.max()))
    group = int(np.argmin(np.where(enough, index.group_rows, 2**32 - 1)))
    columns = (text_column(spec, index), spec.task.label)
    leaves = index.leaves(columns)
    num_bytes = int(chunk_records(store, index, group)[leaves]["length"].sum())
    if num_bytes > _MOST_BYTES_READ:
        finding = not_checked(
            part,
            f"no row of {store.uri} was read: its row groups have {format_bytes(num_bytes)}",
        )
        return [finding], ()
    with tempfile.TemporaryDirectory(prefix="shoal-check-") as scratch:
        # A cache without room keeps nothing, and so leaves the node's own as it is.
        cache = NodeCache(Path(scratch), limit_bytes=0)
        reader = VerifiedReader(store=store, index=index, columns=columns, cache=cache)
        table = reader.read(group)
    finding = ok(part, f"{table.num_rows:,} rows were read, and their checksums are right")
    sample = table.slice(0, _SAMPLE_ROWS).column(0)
    texts = () if index.tokenizer is not None else _texts(sample)
    return [finding], texts


def _texts(column: pa.ChunkedArray) -> tuple[str, ...]:
    return tuple(text for text in column.to_pylist() if text is not None)


# --------------------------------------------------------------------------------- between sets


def check_apart(sets: dict[str, DataSetFacts]) -> Iterator[Finding]:
    """Whether what is tested on was kept out of what is trained on. Pure."""
    train, validation, test = (sets.get(f"data.{name}") for name in ("train", "validation", "test"))
    if train and test and _same(train, test):
        yield problem(
            "data.test",
            f"data.test and data.train hold the same rows ({_how_same(train, test)}), so the test "
            "would tell what the model has learned by heart",
            "split the source: shoal prepare SOURCE --to URI "
            "--split train=0.8,validation=0.1,test=0.1, or write test: null",
        )
    if train and validation and _same(train, validation):
        yield warning(
            "data.validation",
            f"data.validation and data.train hold the same rows ({_how_same(train, validation)}), "
            "so the best checkpoint is the one that knows them by heart",
            "split the source: shoal prepare SOURCE --to URI "
            "--split train=0.8,validation=0.1,test=0.1",
        )
    if validation and test and _same(validation, test):
        yield warning(
            "data.test",
            "data.test and data.validation hold the same rows "
            f"({_how_same(validation, test)}), and the best checkpoint is chosen by them",
            "give data.test rows of its own, or write test: null",
        )


def _same(one: DataSetFacts, other: DataSetFacts) -> bool:
    return one.index.digest == other.index.digest


def _how_same(one: DataSetFacts, other: DataSetFacts) -> str:
    if one.uri.rstrip("/") == other.uri.rstrip("/"):
        return one.uri
    return f"both have the digest {one.index.digest[:12]}"
