"""What grows with the workers, the data set and the model: the curves of docs/growth.md.

    python bench/growth.py [--rounds N] [--small] [--json FILE] [--picture FILE.png]

Four curves, each of whose points is measured in turns with the others:

    ranks    1, 2 and 4 ranks of this node read one data set from S3: rows a second, first batch
    shards   a data set of 10 to 100,000 shards: its index is opened, its first batch is read
    rows     the order of an epoch of a million to a thousand million rows
    models   a model of 4 to 256 MiB with AdamW: how long a save holds training up, beside a plain
             copy of the same bytes, and how long it then takes to its manifest in the background

An index and an order are each made in a process of its own; memory is the most that it holds
meanwhile, above what it held before. Of a data set only the shards are there in which its first
rows lie; its index is that of all of them.

Exit code 1 where the ranks did not read each row once; nothing about speed is judged.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lab
import numpy as np
import psutil
import pyarrow as pa
import stream
from rich.table import Table
from saved_model import MIB, Shape, Subject

from cluster.storage import join_uri, open_store
from trainers.data.columns import column_facts
from trainers.data.index import SourceRecord, open_index
from trainers.data.index_draft import DraftFacts, IndexDraft, ShardReport, commit_index
from trainers.data.partition import EpochOrder
from trainers.data.shards import Roles, Sizes, encode_shard, shard_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes

GROUPS_OF_SHARD = 8
ROWS_OF_GROUP = Sizes().rows_per_group
LANES_OF_ORDER, WINDOW_OF_ORDER = 8, 16
POSITIONS = 101
"""That an order is asked for, evenly over its epoch."""

Rounds = dict[str, list[dict[str, Any]]]
"""What was measured in each round, by the point of a curve."""


@dataclass(frozen=True)
class Points:
    """Where the curves are measured."""

    rounds: int
    rows_read: int
    """By all ranks together."""
    ranks: tuple[int, ...]
    shards: tuple[int, ...]
    rows: tuple[int, ...]
    models: tuple[Shape, ...]


FULL = Points(
    rounds=3,
    rows_read=400_000,
    ranks=(1, 2, 4),
    shards=(10, 1_000, 100_000),
    rows=(10**6, 10**7, 10**8, 10**9),
    models=(
        Shape(hidden=128, layers=2, vocabulary=4_000),
        Shape(hidden=256, layers=3, vocabulary=6_000),
        Shape(hidden=384, layers=6, vocabulary=15_000),
        Shape(hidden=768, layers=6, vocabulary=30_522),
    ),
)
SMALL = Points(
    rounds=1,
    rows_read=20_000,
    ranks=(1, 2),
    shards=(10, 100),
    rows=(10**6, 10**9),
    models=(
        Shape(hidden=64, layers=1, vocabulary=1_000),
        Shape(hidden=128, layers=2, vocabulary=2_000),
    ),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, help="3, or 1 with --small")
    parser.add_argument(
        "--picture", type=Path, metavar="FILE.png", help="all curves; else beside --json"
    )
    arguments = lab.arguments_of(parser)
    points = SMALL if arguments.small else FULL
    rounds = arguments.rounds or points.rounds
    with lab.place() as place:
        with lab.object_store(place / "data") as bucket:
            result = {
                "rows_read": points.rows_read,
                "ranks": measure_ranks(place, bucket, points, rounds=rounds),
                "shards": measure_shards(place, bucket, points, rounds=rounds),
                "rows": measure_rows(points, rounds=rounds),
            }
        with lab.object_store(place / "states", gives_way=True) as bucket:
            result["models"] = measure_models(place, bucket, points, rounds=rounds)
    result["is_right"] = is_right(result)
    picture = arguments.picture or (arguments.json and arguments.json.with_suffix(".png"))
    if picture is not None:
        draw(result, picture)
    lab.tell("growth", result, tables=tables(result), json_file=arguments.json)
    return 0 if result["is_right"] else 1


def is_right(result: dict[str, Any]) -> bool:
    """Whether all ranks together read each row once, however many there were."""
    read = {(one["rows"], one["tokens"]) for rounds in result["ranks"].values() for one in rounds}
    return len(read) == 1 and {rows for rows, _ in read} == {result["rows_read"]}


# ------------------------------------------------------------------------------------- the curves


def measure_ranks(place: Path, bucket: str, points: Points, *, rounds: int) -> Rounds:
    data = stream.prepare_rows(place, bucket, [stream.SHOAL], rows=points.rows_read)
    uri = data[stream.SHOAL.module]
    return lab.interleaved(
        {str(n): partial(stream.read_by_ranks, place, uri, n) for n in points.ranks},
        rounds=rounds,
    )


def measure_shards(place: Path, bucket: str, points: Points, *, rounds: int) -> Rounds:
    uris = {number: _write_data_set(bucket, shards=number) for number in points.shards}

    def measure(uri: str) -> dict[str, Any]:
        with stream.empty_cache(place) as cache:
            read = stream.read(stream.SHOAL, uri, cache, seconds=0.0)
        opened = _alone(open_one, uri=uri, another=uris[points.shards[0]])
        return opened | {"first_batch_seconds": read["first_batch_seconds"]}

    return lab.interleaved(
        {str(number): partial(measure, uri) for number, uri in uris.items()}, rounds=rounds
    )


def open_one(*, uri: str, another: str) -> dict[str, Any]:
    """Seconds to open an index, and what it holds in memory."""
    open_index(open_store(another))  # modules and threads are there before the clock runs
    with _peak_memory() as memory:
        began = time.perf_counter()
        index = open_index(open_store(uri))
        seconds = time.perf_counter() - began
    return {
        "row_groups": index.num_groups,
        "open_seconds": seconds,
        "bytes_of_row_group": index.nbytes / index.num_groups,
        **memory,
    }


def measure_rows(points: Points, *, rounds: int) -> Rounds:
    return lab.interleaved(
        {str(number): partial(_alone, order_one, rows=number) for number in points.rows},
        rounds=rounds,
    )


def order_one(*, rows: int) -> dict[str, Any]:
    """Seconds to make the order of an epoch and to find any position in it, and its memory."""
    make = partial(EpochOrder, seed=7, epoch=3, lanes=LANES_OF_ORDER, window=WINDOW_OF_ORDER)
    group_rows = np.full(-(-rows // ROWS_OF_GROUP), ROWS_OF_GROUP, np.uint32)
    make(group_rows[:1])  # numpy's modules are there before the clock runs
    with _peak_memory() as memory:
        began = time.perf_counter()
        order = make(group_rows)
        seconds = time.perf_counter() - began
    slowest = 0.0
    for position in np.linspace(0, order.num_items - 1, POSITIONS).astype(np.int64):
        began = time.perf_counter()
        order.rows_at([position])
        slowest = max(slowest, time.perf_counter() - began)
    return {
        "row_groups": len(group_rows),
        "order_seconds": seconds,
        "slowest_position_seconds": slowest,
        **memory,
    }


def measure_models(place: Path, bucket: str, points: Points, *, rounds: int) -> Rounds:
    """All models are there at once, so that their saves can take turns."""
    import torch

    torch.set_num_threads(1)
    with ExitStack() as stack:
        subjects = {}
        for number, shape in enumerate(points.models):
            folder = place / f"model-{number}"
            folder.mkdir()
            subject = Subject(shape, join_uri(bucket, folder.name), folder)
            stack.callback(subject.close)
            subject.steps(2, every=0, save=None)  # the optimizer has its state then
            save_one(subject)  # buffers, connections and threads are there before it counts
            mib = subject.state_bytes / 3 / MIB  # weights, and two moments of each
            subjects[f"{mib:.1f}"] = subject
        return lab.interleaved(
            {mib: partial(save_one, subject) for mib, subject in subjects.items()}, rounds=rounds
        )


def save_one(subject: Subject) -> dict[str, Any]:
    """Seconds in which a save holds training up, from then to its manifest, and of a plain copy."""
    os.sync()  # what was written before is not paid for here
    plain = subject.plain_copy()
    began = time.perf_counter()
    subject.save_with_shoal(0)
    held_up = time.perf_counter() - began
    subject.settle("shoal")
    return {
        "state_mib": subject.state_bytes / MIB,
        "held_up_seconds": held_up,
        "manifest_seconds": subject.committed_at - began - held_up,
        "plain_copy_seconds": plain,
    }


# --------------------------------------------------------------------------- processes and memory


def _alone(measure: Callable[..., dict[str, Any]], **arguments: Any) -> dict[str, Any]:
    """What `measure` gives in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(measure, **arguments).result()


@contextmanager
def _peak_memory() -> Iterator[dict[str, float]]:
    """`peak_mib`: MiB that this process held at most inside the block, above those before it."""
    found: dict[str, float] = {}
    before = psutil.Process().memory_info().rss
    Path("/proc/self/clear_refs").write_text("5")  # the peak is taken anew: proc(5)
    yield found
    kib = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    found["peak_mib"] = max(0.0, (int(kib[0]) * 1024 - before) / MIB)


# ------------------------------------------------------------------------- data sets of any size


def _write_data_set(bucket: str, *, shards: int) -> str:
    """The URI of a data set of so many shards of which those are there that are read first."""
    uri = join_uri(bucket, f"shards-{shards}")
    store = open_store(uri)
    rows = _rows_of_shard()
    data, written = encode_shard(
        shard_name(0), rows, sizes=Sizes(), roles=Roles(label="label", tokens="input_ids")
    )
    source = SourceRecord(uri=uri, kind="bench", fingerprint="")
    facts = DraftFacts(column_facts(rows.schema), None, None, None, source, "bench")
    read_first = _shards_read_first(shards)
    with tempfile.TemporaryDirectory() as folder:
        draft = IndexDraft(Path(folder), facts)
        for number in range(shards):
            if number in read_first:
                store.write(shard_name(number), data)
                shard = replace(written.shard, name=shard_name(number))
                draft.add(replace(written, shard=shard))
            else:
                draft.add(_absent(written, number))
        commit_index(store, draft.upload(store, labels=(), split=None))
    return uri


def _rows_of_shard() -> pa.Table:
    """Random tokens and labels, as many as fill the row groups of one shard."""
    rows = GROUPS_OF_SHARD * ROWS_OF_GROUP
    rng = np.random.default_rng(0)
    offsets = np.arange(rows + 1, dtype=np.int32) * stream.MEAN_TOKENS
    ids = rng.integers(0, stream.WORDS, offsets[-1], dtype=np.int32)
    return pa.table(
        {
            "input_ids": pa.ListArray.from_arrays(pa.array(offsets), pa.array(ids)),
            "label": rng.integers(0, 2, rows),
        }
    )


def _shards_read_first(shards: int) -> set[int]:
    """Those of the two blocks that the only rank's reader begins to fetch."""
    from readers import shoal

    order = EpochOrder(
        np.full(shards * GROUPS_OF_SHARD, ROWS_OF_GROUP, np.uint32),
        seed=shoal.SEED,
        epoch=0,
        lanes=1,
        window=shoal.WINDOW,
    )
    groups = np.concatenate([order.block(0, number).groups for number in range(2)])
    return set((groups // GROUPS_OF_SHARD).tolist())


def _absent(written: ShardReport, number: int) -> ShardReport:
    """A shard that is nowhere, with numbers of its own: equal ones would make a small index."""
    mixed = (number * 0x9E3779B97F4A7C15) % 2**64
    more_bytes = mixed >> 44
    shard = replace(
        written.shard,
        name=shard_name(number),
        num_bytes=written.shard.num_bytes + more_bytes,
        footer_start=written.shard.footer_start + more_bytes,
        footer_xxh3=mixed,
    )
    return replace(written, shard=shard)


# --------------------------------------------------------------------------------- what it shows


def tables(result: dict[str, Any]) -> list[Table]:
    return [
        _table(
            f"{result['rows_read']:,} rows from S3, ranks of one node, nothing cached",
            "ranks",
            result["ranks"],
            {
                "rows a second": ("rows_per_second", "{:,.0f}"),
                "first batch, s": ("first_batch_seconds", "{:.2f}"),
            },
        ),
        _table(
            f"A data set of so many shards, of {GROUPS_OF_SHARD} row groups each",
            "shards",
            result["shards"],
            {
                "open, s": ("open_seconds", "{:.3f}"),
                "first batch, s": ("first_batch_seconds", "{:.2f}"),
                "peak, MiB": ("peak_mib", "{:.1f}"),
                "bytes a row group": ("bytes_of_row_group", "{:.1f}"),
            },
        ),
        _table(
            f"The order of an epoch, {LANES_OF_ORDER} lanes",
            "rows",
            result["rows"],
            {
                "made in, s": ("order_seconds", "{:.4f}"),
                f"slowest of {POSITIONS} positions, s": ("slowest_position_seconds", "{:.4f}"),
                "peak, MiB": ("peak_mib", "{:.1f}"),
            },
        ),
        _table(
            "A checkpoint of a model with AdamW",
            "MiB of weights",
            result["models"],
            {
                "MiB of state": ("state_mib", "{:.0f}"),
                "holds training up, s": ("held_up_seconds", "{:.4f}"),
                "plain copy, s": ("plain_copy_seconds", "{:.4f}"),
                "to the manifest, s": ("manifest_seconds", "{:.2f}"),
            },
        ),
    ]


def _table(title: str, point: str, curve: Rounds, columns: dict[str, tuple[str, str]]) -> Table:
    """Medians, with the smallest and the largest where a round is not alone."""
    table = Table(title=title, title_justify="left")
    for name in (point, *columns):
        table.add_column(name, justify="right")
    for at, rounds in curve.items():
        shown = []
        for key, form in columns.values():
            values = [one[key] for one in rounds]
            low, middle, high = map(
                form.format, (min(values), statistics.median(values), max(values))
            )
            shown.append(middle if low == high else f"{middle} ({low} - {high})")
        table.add_row(f"{float(at):,.1f}".removesuffix(".0"), *shown)
    return table


# ------------------------------------------------------------------------------------ the picture


@dataclass(frozen=True)
class Line:
    """One line of a panel: a value of each round against a point of the curve, or another value."""

    label: str
    curve: str
    value: str
    against: str | None = None


@dataclass(frozen=True)
class Panel:
    title: str
    x: str
    y: str
    lines: Sequence[Line]
    is_log: bool = True


PANELS = (
    Panel(
        "Reading rows", "ranks of one node", "rows a second",
        [Line("all ranks together", "ranks", "rows_per_second")], is_log=False,
    ),
    Panel(
        "Start-up by ranks", "ranks of one node", "seconds",
        [Line("first batch, the last rank's", "ranks", "first_batch_seconds")], is_log=False,
    ),
    Panel(
        "Start-up by shards", "shards", "seconds",
        [
            Line("first batch", "shards", "first_batch_seconds"),
            Line("index opened", "shards", "open_seconds"),
        ],
    ),
    Panel(
        "Order of an epoch", "rows", "seconds",
        [
            Line("made", "rows", "order_seconds"),
            Line(f"slowest of {POSITIONS} positions", "rows", "slowest_position_seconds"),
        ],
    ),
    Panel(
        "Memory of index and order", "row groups", "MiB at the peak",
        [
            Line("index", "shards", "peak_mib", "row_groups"),
            Line("order", "rows", "peak_mib", "row_groups"),
        ],
    ),
    Panel(
        "Checkpoint", "MiB of weights and optimizer state", "seconds",
        [
            Line("to the manifest, in the background", "models", "manifest_seconds", "state_mib"),
            Line("training held up", "models", "held_up_seconds", "state_mib"),
            Line("plain copy of the same bytes", "models", "plain_copy_seconds", "state_mib"),
        ],
    ),
)  # fmt: skip
STYLES = (("#c2410c", "o", "-"), ("#1f4e8c", "s", "--"), ("#6b6b6b", "^", ":"))
"""Color, marker and dashes of the lines of a panel: told apart in print, too."""


def draw(result: dict[str, Any], file: Path) -> None:
    """All curves in one picture: medians, with bars from the smallest to the largest."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6.6), layout="constrained")
    FigureCanvasAgg(figure)
    for panel, axes in zip(PANELS, figure.subplots(2, 3).flat, strict=True):
        _draw_panel(panel, axes, result)
    figure.savefig(file, dpi=150)


def _draw_panel(panel: Panel, axes: Axes, result: dict[str, Any]) -> None:
    for line, (color, marker, dashes) in zip(panel.lines, STYLES, strict=False):
        # What is too small to be seen has no place on a logarithmic axis.
        curve: Rounds = {
            point: rounds
            for point, rounds in result[line.curve].items()
            if not panel.is_log or min(one[line.value] for one in rounds) > 0
        }
        at = [
            statistics.median(one[line.against] for one in rounds) if line.against else float(point)
            for point, rounds in curve.items()
        ]
        spreads = [lab.spread([one[line.value] for one in rounds]) for rounds in curve.values()]
        medians = [spread["median"] for spread in spreads]
        below = [spread["median"] - spread["min"] for spread in spreads]
        above = [spread["max"] - spread["median"] for spread in spreads]
        axes.errorbar(
            at, medians, yerr=[below, above], color=color, marker=marker, linestyle=dashes,
            linewidth=1.4, markersize=4.5, capsize=2.5, label=line.label,
        )  # fmt: skip
    if panel.is_log:
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.margins(y=0.3)
    else:
        axes.set_xticks([int(point) for point in result[panel.lines[0].curve]])
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter("{x:,g}")
    axes.set_title(panel.title, fontsize=10, loc="left")
    axes.set_xlabel(panel.x, fontsize=9)
    axes.set_ylabel(panel.y, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(color="#dddddd", linewidth=0.6)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(frameon=False, fontsize=8)


if __name__ == "__main__":
    sys.exit(main())
