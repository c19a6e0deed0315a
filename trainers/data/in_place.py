"""`shoal prepare URI --in-place`: an index beside Parquet that is there, which is only read."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from pathlib import Path

import pyarrow as pa

from cluster.storage import Head, Store, is_s3, local_path, open_store
from jobs.errors import DataError, Problem, SpecError
from trainers.data.columns import column_facts
from trainers.data.index import SourceRecord
from trainers.data.index_draft import DraftFacts, IndexDraft
from trainers.data.inspection import shard_schema
from trainers.data.prepare import PartSummary, Progress, Summary, no_progress
from trainers.data.prepare_plan import (
    PrepareOptions,
    check_known,
    check_options,
    find_roles,
    fingerprint_of,
    made_by,
)
from trainers.data.shard_workers import InspectShard, ShardWorkers, available_cores
from trainers.data.shards import Roles, Sizes
from trainers.data.sources import file_kind, find_files
from trainers.data.target import IN_PLACE, Places, Target


def index_in_place(options: PrepareOptions, progress: Progress = no_progress) -> Summary:
    """Index the Parquet files below a folder, in order of their names, as they are.

    Every byte of their columns is read once, for its checksum. Raises SpecError for options that
    would change rows, DataError for files that are broken, differ in schema, or have null texts or
    labels.
    """
    _refuse_options(options)
    check_options(options)
    store = _folder(options)
    _, heads = find_files(store.uri, options.access)
    heads = [head for head in heads if file_kind(head.key) == "parquet"]
    if not heads:
        raise DataError(
            Problem(f"{options.source} holds no Parquet file", "copy rows: add --to URI instead")
        )
    schema = shard_schema(store, heads[0].key)
    for flag, name in (("--text", options.text), ("--label", options.label)):
        if name is not None:
            check_known(flag, name, schema.names, store.uri)
    roles = find_roles(schema, schema.names, text=options.text, label=options.label)
    facts = _facts(store, heads, schema, roles)
    target = Target(store, fingerprint=facts.source.fingerprint, in_place=True)
    places = Places(targets={None: target}, stale=())
    if places.are_complete(overwrite=options.overwrite):
        return Summary(store.uri, "unchanged", (PartSummary(None, store.uri, target.verify()),))
    with ExitStack() as undo:
        undo.callback(places.abandon)
        places.begin()
        scratch = Path(undo.enter_context(tempfile.TemporaryDirectory(prefix="shoal-prepare-")))
        draft = IndexDraft(scratch, facts)
        undo.callback(draft.close)
        _inspect(store, heads, schema, roles, draft, options, progress)
        if not draft.num_rows:
            raise DataError(Problem(f"{store.uri} holds no rows", "name a folder with rows"))
        record = draft.upload(store, labels=draft.label_values, split=None)
        target.commit(record)
    return Summary(store.uri, "written", (PartSummary(None, store.uri, record),))


def _refuse_options(options: PrepareOptions) -> None:
    changing = {
        "--to": options.to,
        "--split": options.split,
        "--tokenizer": options.tokenizer,
        "--columns": options.columns,
        "--on-null drop": True if options.on_null == "drop" else None,
        "--rows-per-group": _other(options.sizes.rows_per_group, Sizes().rows_per_group),
        "--group-bytes": _other(options.sizes.group_bytes, Sizes().group_bytes),
        "--shard-bytes": _other(options.sizes.shard_bytes, Sizes().shard_bytes),
        "--revision": options.revision,
        "--config": options.config,
        "--source-split": options.source_split,
    }
    problems = [
        Problem(
            f"{flag} would write rows anew, and --in-place leaves them as they are",
            f"leave {flag} out, or write a copy: shoal prepare {options.source} --to URI"
            if flag != "--to"
            else "leave --in-place out to write a copy",
        )
        for flag, given in changing.items()
        if given is not None
    ]
    if problems:
        raise SpecError(*problems)


def _other(value: int, default: int) -> int | None:
    return None if value == default else value


def _folder(options: PrepareOptions) -> Store:
    uri = options.source
    if not is_s3(uri) and not local_path(uri).is_dir():
        raise DataError(
            Problem(f"{uri} is no folder", "--in-place needs the folder that holds the files")
        )
    return open_store(uri, options.access)


def _facts(store: Store, heads: list[Head], schema: pa.Schema, roles: Roles) -> DraftFacts:
    files = [[head.key, head.num_bytes, head.etag] for head in heads]
    fingerprint = fingerprint_of({"format": 1, "files": files, "roles": [roles.text, roles.label]})
    return DraftFacts(
        columns=column_facts(schema),
        text_column=roles.text,
        label_column=roles.label,
        tokenizer=None,
        source=SourceRecord(uri=store.uri, kind=IN_PLACE, fingerprint=fingerprint),
        made_by=made_by(),
    )


def _inspect(
    store: Store,
    heads: list[Head],
    schema: pa.Schema,
    roles: Roles,
    draft: IndexDraft,
    options: PrepareOptions,
    progress: Progress,
) -> None:
    total = sum(head.num_bytes for head in heads)
    with ShardWorkers(options.processes or available_cores()) as workers:
        for number, head in enumerate(heads):
            task = InspectShard(
                name=head.key, store=store, schema=schema, roles=roles, num_bytes=head.num_bytes
            )
            is_last = number == len(heads) - 1
            workers.submit(task, is_last=is_last, take_report=draft.add)
            progress("reading shards", done=draft.num_bytes, total=total)
        workers.finish()
    progress("reading shards", done=total, total=total)
