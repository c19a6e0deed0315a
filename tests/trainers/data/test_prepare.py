from __future__ import annotations

import csv
import gzip
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash
from click.testing import CliRunner
from PIL import Image

from cluster.storage import StorageError, Store, join_uri, open_store
from jobs.cli import main
from jobs.errors import DataError, ShoalError, SpecError
from jobs.prepare_command import prepare as prepare_command
from trainers.data.in_place import index_in_place
from trainers.data.index import (
    Index,
    chunk_records,
    open_index,
    read_index_record,
    row_labels,
    row_lengths,
)
from trainers.data.prepare import prepare
from trainers.data.prepare_plan import PrepareOptions
from trainers.data.shards import Sizes, cut_groups
from trainers.data.tokenizers import tokenizer_digest

SMALL = Sizes(rows_per_group=50, group_bytes=4096, shard_bytes=12_000)
LABELS = ("negative", "positive", "neutral")


def rows(num_rows: int, seed: int = 0) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    words = ["good", "bad", 'a "fine" film,', "two\nlines", "NA", "ünïcode", "123"]
    return [
        {
            "text": " ".join(rng.choice(words, rng.integers(1, 12))) + f" {n}",
            "label": LABELS[int(rng.choice(3, p=[0.6, 0.3, 0.1]))],
            "number": n,
        }
        for n in range(num_rows)
    ]


def write_csv(path: Path, given: Sequence[dict[str, Any]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, given[0])
        writer.writeheader()
        writer.writerows(given)
    return path


def write_jsonl(path: Path, given: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in given), encoding="utf-8")
    return path


def options(source: object, to: object, **changes: Any) -> PrepareOptions:
    given: dict[str, Any] = {"sizes": SMALL, "processes": 1, **changes}
    return PrepareOptions(source=str(source), to=str(to), **given)


def read_rows(store: Store) -> list[dict[str, Any]]:
    """All rows in order of their ids, every byte verified against the index."""
    index = open_index(store)
    result = []
    for group in range(index.num_groups):
        shard_number, inside = index.shard_of(group)
        shard = index.shard(shard_number)
        data = store.read(shard.name)
        assert len(data) == shard.num_bytes
        assert xxhash.xxh3_64_intdigest(data[shard.footer_start :]) == shard.footer_xxh3
        for chunk in chunk_records(store, index, group):
            start, end = int(chunk["start"]), int(chunk["start"] + chunk["length"])
            assert xxhash.xxh3_64_intdigest(data[start:end]) == chunk["xxh3"]
        table = pq.ParquetFile(io.BytesIO(data)).read_row_group(inside)
        assert table.num_rows == index.group_rows[group]
        assert len(result) == index.first_row(group)
        assert table.nbytes <= index.max_row_group_bytes
        result += table.to_pylist()
    assert len(result) == index.num_rows
    return result


def check_lengths_and_labels(store: Store, index: Index, found: list[dict[str, Any]]) -> None:
    assert index.labels is not None
    names = list(index.labels)
    assert names == sorted(names)
    codes = row_labels(store, index, start=0, end=index.num_rows)
    assert [names[code] for code in codes] == [row["label"] for row in found]
    counts = Counter(row["label"] for row in found)
    assert index.labels == {name: counts[name] for name in names}
    lengths = row_lengths(store, index, start=0, end=index.num_rows)
    assert lengths.tolist() == [len(row["text"].encode()) for row in found]


def problem_of(error: ShoalError) -> tuple[str, str]:
    return error.problems[0].message, error.problems[0].hint or ""


def keys(store: Store) -> list[str]:
    return [head.key for head in store.list()]


# ------------------------------------------------------------------------------------- sources


def test_csv_becomes_shards_whose_rows_keep_their_order(store: Store, tmp_path: Path) -> None:
    given = rows(1000)
    summary = prepare(options(write_csv(tmp_path / "r.csv", given), store.uri))
    index = open_index(store)
    assert index.num_shards > 3
    assert max(index.group_rows) <= 50
    found = read_rows(store)
    assert found == given
    check_lengths_and_labels(store, index, found)
    assert summary.parts[0].record == index.record
    assert not [key for key in keys(store) if "writing" in key]


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "parquet", "tsv", "folder", "glob"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, kind: str) -> None:
    given = rows(300)
    path = tmp_path / f"r.{kind}"
    if kind == "jsonl":
        write_jsonl(path, given)
    elif kind == "jsonl.gz":
        path.write_bytes(gzip.compress(write_jsonl(tmp_path / "plain", given).read_bytes()))
    elif kind == "parquet":
        table = pa.Table.from_pylist(given)
        at = table.column_names.index("label")
        coded = table.set_column(at, "label", table["label"].dictionary_encode())
        pq.write_table(coded, path, row_group_size=77)
    elif kind == "tsv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, given[0], delimiter="\t")
            writer.writeheader()
            writer.writerows(given)
    else:
        path = tmp_path / "many"
        (path / "b").mkdir(parents=True)
        (path / "_SUCCESS").write_text("")
        write_jsonl(path / "a.jsonl", given[:100])
        write_jsonl(path / "b" / "c.jsonl", given[100:])
        path = path / "**/*.jsonl" if kind == "glob" else path
    out = open_store(tmp_path / "out")
    prepare(options(path, out.uri))
    assert read_rows(out) == given


def test_a_source_in_the_object_store_is_read(s3_store: Store, tmp_path: Path) -> None:
    given = rows(200)
    path = write_csv(tmp_path / "r.csv", given)
    s3_store.upload("raw/1.csv", path)
    for source in ("raw/1.csv", "raw", "raw/*.csv"):
        out = open_store(tmp_path / source.replace("*", "x"))
        prepare(options(join_uri(s3_store.uri, source), out.uri))
        assert read_rows(out) == given


def test_empty_fields_of_csv_are_null_and_quoted_ones_are_empty_texts(tmp_path: Path) -> None:
    (tmp_path / "r.csv").write_text('text,label,note\n"",1,\nNA,0,""\n123,1,x\n')
    out = open_store(tmp_path / "out")
    prepare(options(tmp_path / "r.csv", out.uri))
    assert read_rows(out) == [
        {"text": "", "label": 1, "note": None},
        {"text": "NA", "label": 0, "note": ""},
        {"text": "123", "label": 1, "note": "x"},
    ]
    index = open_index(out)
    assert index.labels == {"0": 1, "1": 2}
    assert [column.null_count for column in index.schema] == [0, 0, 1]


def test_texts_that_look_like_times_or_numbers_stay_texts(tmp_path: Path) -> None:
    given = [{"text": "2024-01-01", "when": "2024-01-01T10:00:00Z", "label": n} for n in range(3)]
    out = open_store(tmp_path / "out")
    prepare(options(write_jsonl(tmp_path / "r.jsonl", given), out.uri))
    assert read_rows(out) == given


def image_bytes(colour: int) -> bytes:
    sink = io.BytesIO()
    Image.new("RGB", (4, 3), (colour, 0, 0)).save(sink, "PNG")
    return sink.getvalue()


def write_images(folder: Path) -> dict[str, bytes]:
    images = {f"{label}/{n}.png": image_bytes(n) for label in ("cat", "dog") for n in range(6)}
    for name, data in images.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return images


def test_a_folder_of_images_by_class_becomes_bytes_and_labels(store: Store, tmp_path: Path) -> None:
    images = write_images(tmp_path / "images")
    prepare(options(tmp_path / "images", store.uri, split="test=0.5"))
    found = [row for part in ("train", "test") for row in read_rows(store.within(part))]
    assert {row["image"]["path"]: row["image"]["bytes"] for row in found} == images
    assert all(row["label"] == row["image"]["path"].split("/")[0] for row in found)
    index = open_index(store.within("test"))
    assert index.labels == {"cat": 3, "dog": 3}
    assert [column.leaves for column in index.schema] == [(0, 1), (2,)]
    assert index.leaves(["label"]) == [2]


def test_a_broken_image_is_named(tmp_path: Path) -> None:
    write_images(tmp_path / "images")
    (tmp_path / "images/dog/3.png").write_bytes(image_bytes(3)[:50])
    with pytest.raises(DataError, match=r"dog/3\.png is no readable image"):
        prepare(options(tmp_path / "images", tmp_path / "out"))
    (tmp_path / "images/dog/3.png").write_bytes(image_bytes(3))
    (tmp_path / "images/loose.png").write_bytes(image_bytes(3))
    with pytest.raises(DataError, match="no folder of a class"):
        prepare(options(tmp_path / "images", tmp_path / "out"))
    assert keys(open_store(tmp_path / "out")) == []


def test_a_saved_hugging_face_dataset_is_streamed_with_the_names_of_its_classes(
    tmp_path: Path,
) -> None:
    datasets = pytest.importorskip("datasets")
    given = rows(2500)
    features = datasets.Features(
        text=datasets.Value("string"),
        label=datasets.ClassLabel(names=list(LABELS)),
        number=datasets.Value("int64"),
    )
    coded = [row | {"label": LABELS.index(row["label"])} for row in given]
    datasets.disable_progress_bars()
    whole = datasets.Dataset.from_list(coded, features=features)
    whole.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=whole, test=whole.select(range(9))).save_to_disk(tmp_path / "two")
    out = open_store(tmp_path / "out")
    prepare(options(tmp_path / "one", out.uri))
    assert read_rows(out) == given
    with pytest.raises(DataError, match="several splits: train, test") as raised:
        prepare(options(tmp_path / "two", tmp_path / "other"))
    assert "--source-split train" in problem_of(raised.value)[1]
    test = open_store(tmp_path / "test")
    prepare(options(tmp_path / "two", test.uri, source_split="test", columns=("text", "label")))
    assert read_rows(test) == [{k: row[k] for k in ("text", "label")} for row in given[:9]]
    assert prepare(options(tmp_path / "one", out.uri)).outcome == "unchanged"


def test_nested_columns_keep_a_record_for_each_leaf(tmp_path: Path) -> None:
    table = pa.table(
        {
            "text": ["a", "b", "c"],
            "boxes": pa.array([[[1, 2], [3]], [], None], pa.list_(pa.list_(pa.int16()))),
            "meta": pa.array(
                [{"x": 1.5, "tags": [("k", 1)]}, None, {"x": None, "tags": []}],
                pa.struct([("x", pa.float32()), ("tags", pa.map_(pa.string(), pa.int8()))]),
            ),
            "pixel": pa.array([[1, 2], [3, 4], [5, 6]], pa.list_(pa.uint8(), 2)),
            "price": pa.array([1, 2, 3], pa.int64()).cast(pa.decimal128(21, 2)),
        }
    )
    pq.write_table(table, tmp_path / "r.parquet")
    out = open_store(tmp_path / "out")
    prepare(options(tmp_path / "r.parquet", out.uri, sizes=replace(SMALL, rows_per_group=2)))
    assert read_rows(out) == table.to_pylist()
    leaves = {c.name: c.leaves for c in open_index(out).schema}
    assert leaves == {"text": (0,), "boxes": (1,), "meta": (2, 3, 4), "pixel": (5,), "price": (6,)}


# ------------------------------------------------------------------------------------- splits


def test_a_split_is_exact_disjoint_complete_and_stratified(store: Store, tmp_path: Path) -> None:
    given = sorted(rows(1503), key=lambda row: str(row["label"]))
    path = write_csv(tmp_path / "r.csv", given)
    summary = prepare(options(path, store.uri, split="train=0.8,validation=0.1,test=0.1", seed=3))
    parts = {p.name: read_rows(store.within(str(p.name))) for p in summary.parts}
    assert {name: len(found) for name, found in parts.items()} == {
        "train": 1203,
        "validation": 150,
        "test": 150,
    }
    numbers = [row["number"] for found in parts.values() for row in found]
    assert sorted(numbers) == list(range(1503))
    position = {row["number"]: n for n, row in enumerate(given)}
    total = Counter(row["label"] for row in given)
    for name, found in parts.items():
        places = [position[row["number"]] for row in found]
        assert places == sorted(places)
        of_part = Counter(row["label"] for row in found)
        for label in LABELS:
            assert abs(of_part[label] - total[label] * len(found) / 1503) <= 1
        index = open_index(store.within(str(name)))
        check_lengths_and_labels(store.within(str(name)), index, found)
        assert index.record.split is not None
        assert index.record.split.stratify == "label"
    again = prepare(options(path, tmp_path / "again", split="validation=0.1,test=0.1", seed=3))
    assert [p.record.digest for p in again.parts] == [p.record.digest for p in summary.parts]
    other = prepare(options(path, tmp_path / "other", split="validation=0.1,test=0.1", seed=4))
    assert other.parts[2].record.digest != summary.parts[2].record.digest


def test_a_label_that_a_part_lacks_keeps_its_code(tmp_path: Path) -> None:
    given = [{"text": "x", "label": "rare" if n == 0 else "a"} for n in range(40)]
    prepare(options(write_csv(tmp_path / "r.csv", given), tmp_path / "out", split="test=2"))
    index = open_index(open_store(tmp_path / "out/test"))
    assert list(index.labels or {}) == ["a", "rare"]
    assert sum((index.labels or {}).values()) == 2


# ------------------------------------------------------------------------- several processes


def test_the_number_of_processes_does_not_change_a_byte(store: Store, tmp_path: Path) -> None:
    path = write_csv(tmp_path / "r.csv", rows(3000))
    one, two = store.within("one"), store.within("two")
    given = options(path, one.uri, split="test=0.2")
    first = prepare(replace(given, processes=1))
    second = prepare(replace(given, to=two.uri, processes=2))
    assert first.parts[0].record.num_shards > 5
    assert keys(one) == keys(two)
    for key in keys(one):
        assert one.read(key) == two.read(key), key
    assert [p.record for p in first.parts] == [p.record for p in second.parts]


def test_how_the_source_is_cut_into_files_does_not_change_the_digest(tmp_path: Path) -> None:
    given = rows(700)
    (tmp_path / "many").mkdir()
    for n in range(7):
        write_jsonl(tmp_path / "many" / f"{n}.jsonl", given[100 * n : 100 * n + 100])
    one = prepare(options(write_jsonl(tmp_path / "r.jsonl", given), tmp_path / "one"))
    many = prepare(options(tmp_path / "many", tmp_path / "two"))
    assert one.parts[0].record.digest == many.parts[0].record.digest


def test_row_groups_stay_within_both_limits_but_for_a_single_large_row() -> None:
    sizes = np.array([10, 10, 10, 500, 10, 60, 60, 1, 1, 1, 1])
    limits = Sizes(rows_per_group=3, group_bytes=100)
    assert cut_groups(sizes, limits) == [(0, 3), (3, 4), (4, 6), (6, 9), (9, 11)]


def test_an_error_in_another_process_names_the_row(tmp_path: Path) -> None:
    write_images(tmp_path / "images")
    (tmp_path / "images/cat/4.png").write_bytes(b"no image")
    sizes = replace(SMALL, shard_bytes=300)
    out = open_store(tmp_path / "out")
    with pytest.raises(DataError, match=r"cat/4\.png"):
        prepare(options(tmp_path / "images", out.uri, processes=2, sizes=sizes))
    assert keys(out) == []


_SLOW = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background ignores it
from trainers.data import shard_workers
from trainers.data.shards import encode_shard
def slowly(name, *arguments, **named):
    if name == "shard-00003.parquet":
        print("between shards", flush=True)
        time.sleep(600)
    return encode_shard(name, *arguments, **named)
shard_workers.encode_shard = slowly
from jobs.cli import main
main(sys.argv[1:])
"""


def test_a_command_killed_between_shards_leaves_no_data_set_and_can_be_run_again(
    store: Store, tmp_path: Path
) -> None:
    given = rows(1000)
    path = write_csv(tmp_path / "r.csv", given)
    arguments = ["prepare", str(path), "--to", store.uri, "--shard-bytes", "12000"]
    command = [sys.executable, "-c", _SLOW, *arguments, "--processes", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "between shards\n"
        process.send_signal(signal.SIGKILL)
    assert read_index_record(store) is None
    left = keys(store)
    assert "shard-00002.parquet" in left
    # A left-over of a longer data set must go, too.
    store.write("shard-00099.parquet", b"left over")
    sizes = replace(Sizes(), shard_bytes=12_000)
    assert prepare(options(path, store.uri, sizes=sizes)).outcome == "written"
    assert read_rows(store) == given
    assert "shard-00099.parquet" not in keys(store)
    assert prepare(options(path, store.uri, sizes=sizes)).outcome == "unchanged"


def test_an_interrupted_command_removes_what_it_wrote(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "r.csv", rows(1000))
    arguments = ["prepare", str(path), "--to", str(tmp_path / "out"), "--shard-bytes", "12000"]
    command = [sys.executable, "-c", _SLOW, *arguments, "--processes", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "between shards\n"
        process.send_signal(signal.SIGINT)
    assert process.returncode == 130
    assert keys(open_store(tmp_path / "out")) == []


def test_the_processes_of_a_killed_command_end(tmp_path: Path) -> None:
    script = tmp_path / "command.py"
    script.write_text(
        "import os, time\n"
        "from trainers.data.shard_workers import ShardWorkers\n"
        "from cluster.storage import Store, open_store\n"
        "from dataclasses import dataclass\n"
        "@dataclass(frozen=True)\n"
        "class Slow:\n"
        "    store: Store\n"
        "    num_bytes: int = 10**9\n"
        "    def run(self):\n"
        "        print(os.getpid(), flush=True)\n"
        "        time.sleep(600)\n"
        "if __name__ == '__main__':\n"
        "    with ShardWorkers(2) as workers:\n"
        "        workers.submit(Slow(open_store('.')), is_last=False, take_report=print)\n"
        "        workers.finish()\n"
    )
    with subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, text=True, cwd=Path.cwd()
    ) as process:
        assert process.stdout is not None
        worker = int(process.stdout.readline())
        process.kill()
    deadline = time.monotonic() + 20
    while _is_alive(worker):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


# --------------------------------------------------------------------------- what is there


def test_other_rows_or_options_are_refused_unless_overwritten(store: Store, tmp_path: Path) -> None:
    path = write_csv(tmp_path / "r.csv", rows(500))
    first = prepare(options(path, store.uri))
    assert prepare(options(path, store.uri)).outcome == "unchanged"
    os.utime(path, (0, 0))
    assert prepare(options(path, store.uri)).outcome == "unchanged"
    with pytest.raises(DataError, match="other options") as raised:
        prepare(options(path, store.uri, columns=("text",)))
    assert "--overwrite" in problem_of(raised.value)[1]
    write_csv(path, rows(100, seed=1))
    with pytest.raises(DataError, match="other rows"):
        prepare(options(path, store.uri))
    assert open_index(store).digest == first.parts[0].record.digest
    prepare(options(path, store.uri, overwrite=True))
    assert read_rows(store) == rows(100, seed=1)
    shards = [key for key in keys(store) if key.startswith("shard-")]
    assert len(shards) == open_index(store).num_shards


def test_a_part_of_an_earlier_split_is_not_left_beside_a_new_split(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "r.csv", rows(200))
    prepare(options(path, tmp_path / "out", split="validation=0.1,test=0.1"))
    with pytest.raises(DataError, match="holds a data set"):
        prepare(options(path, tmp_path / "out", split="test=0.1"))
    prepare(options(path, tmp_path / "out", split="test=0.1", overwrite=True))
    assert read_index_record(open_store(tmp_path / "out/validation")) is None
    assert read_index_record(open_store(tmp_path / "out/test")) is not None


def test_files_that_are_not_ours_are_neither_deleted_nor_written_over(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "r.csv", rows(50))
    (tmp_path / "out").mkdir()
    pq.write_table(pa.table({"text": ["mine"]}), tmp_path / "out/shard-00000.parquet")
    (tmp_path / "out/notes.txt").write_text("mine")
    with pytest.raises(DataError, match="nothing says who wrote them") as raised:
        prepare(options(path, tmp_path / "out"))
    assert "--in-place" in problem_of(raised.value)[1]
    with pytest.raises(DataError, match="would be written over"):
        prepare(options(tmp_path / "out/shard-00000.parquet", tmp_path / "out", overwrite=True))
    prepare(options(path, tmp_path / "out", overwrite=True))
    assert (tmp_path / "out/notes.txt").read_text() == "mine"
    in_place = tmp_path / "lake"
    in_place.mkdir()
    pq.write_table(pa.table({"text": ["mine"]}), in_place / "shard-00000.parquet")
    index_in_place(PrepareOptions(str(in_place), processes=1))
    with pytest.raises(DataError, match="indexed in place"):
        prepare(options(path, in_place, overwrite=True))
    assert pq.read_table(in_place / "shard-00000.parquet").to_pylist() == [{"text": "mine"}]


def test_a_shard_that_is_gone_is_noticed(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "r.csv", rows(500))
    prepare(options(path, tmp_path / "out"))
    (tmp_path / "out/shard-00001.parquet").unlink()
    with pytest.raises(DataError, match=r"shard-00001\.parquet is missing"):
        prepare(options(path, tmp_path / "out"))


def test_a_store_that_fails_at_the_end_leaves_nothing_that_looks_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cluster.folder import FolderStore

    path = write_csv(tmp_path / "r.csv", rows(500))
    write = FolderStore.write_if_absent

    def fail(self: FolderStore, key: str, data: bytes) -> str:
        if self.uri.endswith("test"):
            raise StorageError("the disk is full")
        return write(self, key, data)

    monkeypatch.setattr(FolderStore, "write_if_absent", fail)
    with pytest.raises(StorageError):
        prepare(options(path, tmp_path / "out", split="test=0.1"))
    assert keys(open_store(tmp_path / "out/test")) == []
    monkeypatch.undo()
    assert prepare(options(path, tmp_path / "out", split="test=0.1")).outcome == "written"


# ----------------------------------------------------------------------------------- in place


def test_parquet_that_is_there_is_indexed_without_a_change(store: Store, tmp_path: Path) -> None:
    given = rows(900)
    tables = [pa.Table.from_pylist(given[n : n + 300]) for n in (0, 300, 600)]
    names = ["year=2023/a.parquet", "year=2024/b.parquet", "z.parquet"]
    for name, table, codec in zip(names, tables, ("snappy", "zstd", "none"), strict=True):
        sink = io.BytesIO()
        pq.write_table(table, sink, row_group_size=70, compression=codec, write_page_index=True)
        store.write(name, sink.getvalue())
    before = {key: store.read(key) for key in keys(store)}
    summary = index_in_place(PrepareOptions(store.uri, processes=1))
    index = open_index(store)
    assert [index.shard(n).name for n in range(3)] == names
    found = read_rows(store)
    assert found == given
    check_lengths_and_labels(store, index, found)
    assert {key: store.read(key) for key in before} == before
    assert index_in_place(PrepareOptions(store.uri)).outcome == "unchanged"
    again = index_in_place(PrepareOptions(store.uri, processes=2, overwrite=True))
    assert again.parts[0].record == summary.parts[0].record


def test_an_index_in_place_is_that_of_the_command_that_wrote_the_shards(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "r.csv", rows(500))
    written = prepare(options(path, tmp_path / "out"))
    found = index_in_place(PrepareOptions(str(tmp_path / "out"), processes=1, overwrite=True))
    assert found.parts[0].record.digest == written.parts[0].record.digest


def test_options_that_change_rows_are_refused_in_place(tmp_path: Path) -> None:
    with pytest.raises(SpecError) as raised:
        index_in_place(PrepareOptions(str(tmp_path), split="test=0.1", tokenizer="x"))
    assert [p.message.split()[0] for p in raised.value.problems] == ["--split", "--tokenizer"]
    assert "--to URI" in problem_of(raised.value)[1]


def test_bad_parquet_is_refused_in_place(tmp_path: Path) -> None:
    good = pa.table({"text": ["a", "b"], "label": [1, 0]})
    pq.write_table(good, tmp_path / "a.parquet")
    given = PrepareOptions(str(tmp_path), processes=1)
    bad = tmp_path / "b.parquet"
    whole = (tmp_path / "a.parquet").read_bytes()
    flipped = bytearray(whole)
    flipped[8] ^= 0xFF
    for data in (b"", b"PAR1 no parquet PAR1", whole[:-1], bytes(flipped)):
        bad.write_bytes(data)
        with pytest.raises(DataError, match=r"b\.parquet is no whole Parquet file"):
            index_in_place(given)
    for table, message in (
        (good.select(["text"]), "column label is absent, but int64"),
        (pa.table({"text": ["a", None], "label": [1, 1]}), "null in 1 rows.* row 2 of the file"),
    ):
        pq.write_table(table, bad)
        with pytest.raises(DataError, match=message):
            index_in_place(given)
    assert [key for key in keys(open_store(tmp_path)) if key.startswith("_shoal")] == []


# --------------------------------------------------------------------------------- tokenizer


@pytest.fixture
def tokenizer_folder(tmp_path: Path) -> Path:
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=special)
    tokenizer.train_from_iterator((row["text"] for row in rows(300)), trainer)
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = dict(zip(("pad", "unk", "cls", "sep", "mask"), special, strict=True))
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **{f"{name}_token": text for name, text in names.items()}
    )
    fast.save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


@pytest.mark.parametrize("place", ["local", "s3"])
def test_token_ids_are_those_of_the_tokenizer_itself(
    tokenizer_folder: Path, tmp_path: Path, s3_store: Store, place: str
) -> None:
    from transformers import AutoTokenizer

    source = str(tokenizer_folder)
    if place == "s3":
        for path in tokenizer_folder.iterdir():
            s3_store.upload(f"model/{path.name}", path)
        source = join_uri(s3_store.uri, "model")
    given = rows(600)
    out = open_store(tmp_path / "out")
    path = write_csv(tmp_path / "r.csv", given)
    processes = 2 if place == "local" else 1
    prepare(options(path, out.uri, tokenizer=source, max_tokens=12, processes=processes))
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    expected = tokenizer([r["text"] for r in given], truncation=True, max_length=12)["input_ids"]
    found = read_rows(out)
    assert [row["input_ids"] for row in found] == expected
    index = open_index(out)
    assert row_lengths(out, index, start=0, end=600).tolist() == [len(ids) for ids in expected]
    assert index.tokenizer is not None
    assert index.tokenizer.max_tokens == 12
    # A call with truncation changes the tokenizer's own settings; the digest must not see it.
    assert index.tokenizer.digest == tokenizer_digest(tokenizer)
    assert index.schema[-1].type.startswith("list<")
    assert prepare(options(path, out.uri, tokenizer=source, max_tokens=12)).outcome == "unchanged"


def test_a_place_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "r.csv", rows(5))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no tokenizer can be loaded"):
        prepare(options(path, tmp_path / "out", tokenizer=str(tmp_path / "empty")))


# --------------------------------------------------------------------------------- bad input


def test_null_texts_and_labels_are_counted_and_can_be_dropped(tmp_path: Path) -> None:
    given: list[dict[str, Any]] = rows(100)
    given[7]["text"] = given[9]["text"] = None
    given[50]["label"] = None
    path = write_jsonl(tmp_path / "r.jsonl", given)
    for split in (None, "test=0.1"):
        with pytest.raises(DataError) as raised:
            prepare(options(path, tmp_path / "out", split=split))
        messages = [p.message for p in raised.value.problems]
        assert f"text is null in 2 rows, the first is row 8 of {path}" in messages
        assert f"label is null in 1 row, the first is row 51 of {path}" in messages
        assert "--on-null drop" in problem_of(raised.value)[1]
        assert keys(open_store(tmp_path / "out")) == []
    summary = prepare(options(path, tmp_path / "out", on_null="drop"))
    assert summary.dropped_rows == 3
    kept = [row for row in given if None not in row.values()]
    assert read_rows(open_store(tmp_path / "out")) == kept


GOOD = '{"text": "a", "label": 1}\n'


@pytest.mark.parametrize(
    ("name", "content", "message", "hint"),
    [
        ("r.csv", "", "is empty", "rows"),
        ("r.csv", "text,label\n", "holds no rows", "rows"),
        (
            "r.csv",
            "text,label\n" + "a,1\n" * 9 + "a,1,2\n",
            "row 11 .*Expected 2 columns",
            "quotes",
        ),
        ("r.csv", "text,text\na,b\n", "text stands twice", "rename"),
        ("r.csv", b"text,label\na,1\n\xff\xfe,1\n", "row 3 .*UTF8", ""),
        ("r.jsonl", GOOD * 9 + '{"text": "a"\n', "row 10: ", "one JSON object"),
        ("r.jsonl", "no json\n", "row 1: ", "one JSON object"),
        ("r.jsonl", '[{"text": "a"}]\n', "row 1: it is no JSON object", "one object"),
        ("r.jsonl", "", "is empty", "rows"),
        ("r.parquet", "no parquet at all", "no whole parquet file", "again"),
        ("r.parquet", "", "no whole parquet file", "again"),
        ("r.xlsx", "x", "holds no file that can be read", ".csv"),
    ],
)
def test_a_broken_file_is_named_with_its_row(
    tmp_path: Path, name: str, content: str | bytes, message: str, hint: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message) as raised:
        prepare(options(path, tmp_path / "out"))
    assert hint in problem_of(raised.value)[1]
    assert str(path) in problem_of(raised.value)[0]
    assert keys(open_store(tmp_path / "out")) == []


def test_rows_that_break_in_a_later_block_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainers.data.table_files._BLOCK_BYTES", 512)
    path = tmp_path / "r.jsonl"
    for line, message in (
        ('{"text": "a", "label": "x"}\n', 'row 101: label is "x", but int64 in the first rows'),
        ('{"text": "a", "label": 1, "extra": 2}\n', "row 101: the field extra is not in the first"),
    ):
        path.write_text(GOOD * 100 + line)
        with pytest.raises(DataError, match=message):
            prepare(options(path, tmp_path / "out"))
    prepare(options(path, tmp_path / "out", columns=("text", "label")))
    assert open_index(open_store(tmp_path / "out")).num_rows == 101
    path = tmp_path / "r.csv"
    path.write_text("text,label\n" + "a,1\n" * 300 + "a,x\n")
    with pytest.raises(DataError, match=r"row 302 .*invalid value 'x'"):
        prepare(options(path, tmp_path / "other"))


@pytest.mark.parametrize(
    ("changes", "message", "hint"),
    [
        ({"text": "txet"}, "--text txet", "did you mean text"),
        ({"label": "labels"}, "--label labels", "did you mean label"),
        ({"columns": ("text", "numbr")}, "--columns numbr", "did you mean number"),
        ({"columns": ("text",), "label": "label"}, "not among --columns", "text,label"),
        ({"text": "number"}, "--text number: the column holds int64", "--text"),
        ({"split": "test=0.1", "stratify": "lable"}, "--stratify lable", "did you mean label"),
        ({"stratify": "label"}, "no effect without --split", "--split"),
        ({"seed": 3}, "no effect without --split", "--split"),
        ({"max_tokens": 3}, "no effect without --tokenizer", "--tokenizer"),
        ({"processes": 0}, "--processes is 0", "--processes 1"),
        ({"revision": "main"}, "is no Hugging Face dataset", "--revision"),
        ({"split": "test=1000"}, "no row of the 20", "fewer"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_written(
    tmp_path: Path, changes: dict[str, Any], message: str, hint: str
) -> None:
    path = write_jsonl(tmp_path / "r.jsonl", rows(20))
    with pytest.raises((SpecError, DataError), match=message) as raised:
        prepare(options(path, tmp_path / "out", **changes))
    assert raised.value.exit_code == 2
    assert hint in problem_of(raised.value)[1]
    assert not (tmp_path / "out").exists()


def test_missing_and_mixed_sources_are_refused(tmp_path: Path, s3_store: Store) -> None:
    write_csv(tmp_path / "reviews.csv", rows(5))
    (tmp_path / "empty").mkdir()
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    write_csv(mixed / "a.csv", rows(5))
    write_jsonl(mixed / "b.jsonl", rows(5))
    schemas = tmp_path / "schemas"
    schemas.mkdir()
    pq.write_table(pa.table({"text": ["a"], "n": [1]}), schemas / "a.parquet")
    pq.write_table(pa.table({"text": ["a"], "n": ["x"]}), schemas / "b.parquet")
    unsupported = tmp_path / "unsupported.jsonl"
    unsupported.write_text('{"text": "a", "meta": {}}\n')
    for source, message, hint in (
        (tmp_path / "revews.csv", "no such file", "reviews.csv"),
        (tmp_path / "empty", "is empty", "folder"),
        (tmp_path / "*.parquet", "matches no file", ""),
        (join_uri(s3_store.uri, "nothing"), "no such object", ""),
        (mixed, "several kinds: 1 csv, 1 jsonl", "*.csv"),
        (schemas, "b.parquet: column n is string, but int64 in the first file", "--columns"),
        (unsupported, "column meta has the type struct<>", "--columns text"),
    ):
        with pytest.raises(DataError) as raised:
            prepare(options(source, tmp_path / "out"))
        assert message in problem_of(raised.value)[0]
        assert hint in problem_of(raised.value)[1]
        assert keys(open_store(tmp_path / "out")) == []


# ------------------------------------------------------------------------------- the command


def run(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(prepare_command, list(map(str, arguments)))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout


def test_the_command_ends_with_a_summary_and_the_uris_for_the_job_file(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "r.csv", rows(300))
    arguments = (path, "--to", tmp_path / "out", "--split", "test=100")
    code, text = run(*arguments)
    assert code == 0
    assert f"data: {{train: {tmp_path}/out/train, test: {tmp_path}/out/test}}" in text
    assert "labels: [negative, neutral, positive]" in text
    code, text = run(*arguments, "--json")
    summary = json.loads(text)
    assert summary["outcome"] == "unchanged"
    assert [part["rows"] for part in summary["parts"]] == [200, 100]
    assert sum(summary["parts"][1]["labels"].values()) == 100
    code, text = run(*arguments)
    assert "nothing to do" in text
    code, text = run(tmp_path / "out/test", "--in-place", "--overwrite", "--processes", 1)
    assert "all " in text


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["missing.csv", "--to", "out"], 2),
        (["r.csv"], 2),
        (["r.csv", "--to", "out", "--shard-bytes", "lots"], 2),
        (["r.csv", "--to", "s3://no-such-bucket-here/x"], 3),
    ],
)
def test_the_command_ends_with_the_exit_code_of_its_error(
    object_store: object,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_csv(tmp_path / "r.csv", rows(5))
    with pytest.raises(SystemExit) as ended:
        main(["prepare", *arguments])
    captured = capsys.readouterr()
    assert ended.value.code == code
    assert captured.err.startswith("error: ")
    assert "Traceback" not in captured.err
    assert captured.out == ""
