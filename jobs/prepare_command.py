"""The command `shoal prepare`."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from trainers.data.prepare import PartSummary, Progress, Summary

_LABELS_SHOWN = 8


def _bytes(ctx: click.Context, param: click.Parameter, value: str) -> int:
    """Bytes, as the job file writes them."""
    from jobs.spec import parse_bytes

    try:
        return int(str(parse_bytes(int(value) if value.isdigit() else value)))
    except ValueError as error:
        raise click.BadParameter(f"{value}: {error}", ctx, param) from error


@click.command()
@click.argument("source")
@click.option("--to", metavar="URI", help="Where to write: s3://bucket/prefix or a local folder.")
@click.option(
    "--in-place", is_flag=True, help="Index the Parquet files of the folder SOURCE as they are."
)
@click.option(
    "--split",
    metavar="PARTS",
    help="Parts as shares or numbers of rows: train=0.8,validation=0.1,test=0.1, or test=1000; "
    "train gets what is left. They are written to URI/train, URI/validation, URI/test.",
)
@click.option(
    "--stratify",
    metavar="COLUMN",
    help="Spread the values of this column evenly over the parts; the label, unless it is 'none'.",
)
@click.option("--seed", type=int, help="Seed of the split.  [default: 0]")
@click.option("--text", metavar="COLUMN", help="Column of texts.  [default: text, if there is one]")
@click.option(
    "--label", metavar="COLUMN", help="Column of labels.  [default: label, if there is one]"
)
@click.option("--columns", metavar="A,B,...", help="Columns to keep, in this order.")
@click.option(
    "--tokenizer",
    metavar="MODEL",
    help="Tokenize the texts into a column input_ids with the tokenizer of a model: a folder, a "
    "URI, or a name on the hub.",
)
@click.option("--max-tokens", type=int, help="Tokens of a text that are kept.  [default: 512]")
@click.option(
    "--on-null",
    type=click.Choice(["error", "drop"]),
    default="error",
    show_default=True,
    help="What to do with rows whose text or label is null.",
)
@click.option(
    "--rows-per-group", type=int, default=2048, show_default=True, help="Rows of a row group."
)
@click.option(
    "--group-bytes",
    metavar="SIZE",
    callback=_bytes,
    default="4 MiB",
    show_default=True,
    help="Memory of a row group; whichever limit is met first ends it.",
)
@click.option(
    "--shard-bytes",
    metavar="SIZE",
    callback=_bytes,
    default="64 MiB",
    show_default=True,
    help="Memory of the rows of a shard, before compression.",
)
@click.option("--revision", help="Commit, tag or branch of a dataset on the Hugging Face hub.")
@click.option("--config", help="Configuration of a dataset on the hub.")
@click.option("--source-split", metavar="NAME", help="Split of a Hugging Face dataset to read.")
@click.option("--processes", type=int, help="Processes that write shards.  [default: all cores]")
@click.option("--overwrite", is_flag=True, help="Replace a data set that is there already.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
def prepare(*, as_json: bool, in_place: bool, columns: str | None, **given: Any) -> None:
    """Write a data set as Parquet shards with an index, ready to be streamed.

    SOURCE is a file, a folder or a pattern of CSV, JSON Lines or Parquet (here or in a store), a
    folder with one folder of images for each class, a folder that save_to_disk wrote, or a dataset
    of the Hugging Face hub (hf://OWNER/NAME).

    Rows keep their order, within each part of a split too: training shuffles them, and how the
    source is sorted has no influence on which part a row goes to. The same source, options and
    seed give the same bytes. A command that was interrupted can be run again; one that has nothing
    to do says so.

    In CSV files an empty field is null, "" is an empty text. The labels of a Hugging Face dataset
    become the names of its classes.

    \b
    shoal prepare reviews.csv --to s3://lake/reviews --split validation=0.1,test=0.1
    shoal prepare 's3://raw/logs/**/*.jsonl.gz' --to s3://lake/logs --text message --label topic
    shoal prepare s3://lake/warehouse/reviews --in-place --text body --label stars
    """
    from trainers.data.in_place import index_in_place
    from trainers.data.prepare import prepare as prepare_copy
    from trainers.data.prepare_plan import PrepareOptions
    from trainers.data.shards import Sizes

    sizes = Sizes(
        rows_per_group=given.pop("rows_per_group"),
        group_bytes=given.pop("group_bytes"),
        shard_bytes=given.pop("shard_bytes"),
    )
    names = tuple(name.strip() for name in columns.split(",")) if columns is not None else None
    options = PrepareOptions(sizes=sizes, columns=names, **given)
    started = time.monotonic()
    with _progress() as progress:
        summary = (index_in_place if in_place else prepare_copy)(options, progress)
    if as_json:
        click.echo(json.dumps(summary.to_json(), indent=1))
    else:
        click.echo("\n".join(_lines(summary, seconds=time.monotonic() - started)))


@contextmanager
def _progress() -> Iterator[Progress]:
    """A bar on stderr, where that is a terminal; nothing anywhere else."""
    from trainers.data.prepare import no_progress

    if not sys.stderr.isatty():
        yield no_progress
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(show_speed=True),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )
    tasks: dict[str, Any] = {}
    with bar:

        def show(phase: str, *, done: int, total: int | None) -> None:
            if phase not in tasks:
                tasks[phase] = bar.add_task(phase, total=total)
            bar.update(tasks[phase], completed=done, total=total)

        yield show


def _lines(summary: Summary, *, seconds: float) -> Iterator[str]:
    from jobs.spec import format_bytes

    if summary.outcome == "unchanged":
        yield f"nothing to do: {summary.source} is prepared already, with the same options"
    else:
        yield f"prepared {summary.source} in {seconds:.1f} s"
    if summary.dropped_rows:
        yield f"left out {summary.dropped_rows:,} rows whose text or label is null"
    yield ""
    rows = [["", "rows", "shards", "row groups", "bytes"]]
    for part in summary.parts:
        record = part.record
        counts = [record.num_rows, record.num_shards, record.num_row_groups]
        rows.append([part.name or "all", *(f"{n:,}" for n in counts), format_bytes(record.bytes)])
    labels = summary.parts[0].record.labels
    if labels is not None and len(labels) <= _LABELS_SHOWN:
        rows[0] += labels
        for row, part in zip(rows[1:], summary.parts, strict=True):
            row += [f"{n:,}" for n in (part.record.labels or {}).values()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True)]
        yield "  ".join(cells).rstrip()
    if labels is not None and len(labels) > _LABELS_SHOWN:
        yield ""
        for part in summary.parts:
            yield _label_range(part)
    yield ""
    yield "in the job file:"
    places = [f"{part.name or 'train'}: {part.uri}" for part in summary.parts]
    yield f"  data: {{{', '.join(places)}}}"
    if labels is not None and len(labels) <= _LABELS_SHOWN:
        yield f"  task: {{labels: [{', '.join(map(_yaml_text, labels))}]}}"


def _label_range(part: PartSummary) -> str:
    labels = part.record.labels or {}
    fewest, most = min(labels, key=labels.__getitem__), max(labels, key=labels.__getitem__)
    return (
        f"{part.name or 'all'}: {len(labels):,} labels, from {labels[fewest]:,} rows ({fewest}) "
        f"to {labels[most]:,} ({most})"
    )


def _yaml_text(label: str) -> str:
    """A label as YAML reads it back as text; numbers and the like in quotes."""
    import yaml

    try:
        plain = yaml.safe_load(f"[{label}]") == [label]
    except yaml.YAMLError:
        plain = False
    return label if plain else json.dumps(label)
