from __future__ import annotations

import io
import json
import time
from pathlib import Path

import numpy as np
import pytest

from cluster.storage import Store, open_store
from jobs.errors import DataError
from trainers.data.index import (
    CHUNK,
    Index,
    IndexRecord,
    Shard,
    SourceRecord,
    SplitRecord,
    chunk_records,
    chunk_table,
    open_index,
    row_labels,
    row_lengths,
)
from trainers.data.index_draft import (
    DraftFacts,
    IndexDraft,
    ShardReport,
    commit_index,
    npy_header,
)

COLUMNS = (("text", "string", (0,)), ("label", "string", (1,)), ("ids", "list<int32>", (2,)))


def facts(*, label: str | None = "label", text: str | None = "text") -> DraftFacts:
    return DraftFacts(
        columns=COLUMNS,
        text_column=text,
        label_column=label,
        tokenizer=None,
        source=SourceRecord(uri="reviews.csv", kind="csv", fingerprint="f"),
        made_by="a test",
    )


def report(
    number: int, *, group_rows: list[int], labels: tuple[str, ...], seed: int = 0
) -> ShardReport:
    rng = np.random.default_rng([seed, number])
    chunks = np.zeros((len(group_rows), 3), CHUNK)
    for name in CHUNK.names or ():
        chunks[name] = rng.integers(0, 2**63, chunks.shape)
    rows = sum(group_rows)
    return ShardReport(
        shard=Shard(f"shard-{number:05d}.parquet", 1000, 900, 17, rows, len(group_rows)),
        group_rows=np.array(group_rows, np.uint32),
        chunks=chunks,
        max_group_bytes=100 * max(group_rows),
        null_counts=(0, 0, 1),
        lengths=rng.integers(0, 99, rows).astype(np.uint32),
        label_codes=rng.integers(0, len(labels), rows).astype(np.int32),
        label_values=labels,
    )


REPORTS = [
    report(0, group_rows=[5, 3], labels=("pos", "neg")),
    report(1, group_rows=[4], labels=("neg", "other")),
    report(2, group_rows=[2, 2, 1], labels=("neg", "pos")),
]


def write(store: Store, folder: Path, reports: list[ShardReport] = REPORTS) -> IndexRecord:
    folder.mkdir(parents=True, exist_ok=True)
    draft = IndexDraft(folder, facts())
    for one in reports:
        draft.add(one)
    split = SplitRecord(name="train", parts={"train": 17}, seed=0, stratify="label")
    record = draft.upload(store, labels=draft.label_values | {"absent"}, split=split)
    commit_index(store, record)
    return record


@pytest.fixture
def opened(store: Store, tmp_path: Path) -> tuple[Store, Index]:
    write(store, tmp_path / "draft")
    return store, open_index(store)


def test_an_index_says_where_rows_and_groups_lie(opened: tuple[Store, Index]) -> None:
    _, index = opened
    assert (index.num_rows, index.num_groups, index.num_shards) == (17, 6, 3)
    assert [index.shard_of(g) for g in range(6)] == [(0, 0), (0, 1), (1, 0), (2, 0), (2, 1), (2, 2)]
    assert [index.first_row(g) for g in range(7)] == [0, 5, 8, 12, 14, 16, 17]
    assert [index.shard(s) for s in range(3)] == [r.shard for r in REPORTS]
    assert index.leaves(["ids", "text"]) == [0, 2]
    assert [c.null_count for c in index.schema] == [0, 0, 3]
    assert index.max_row_group_bytes == 500


def test_chunks_lengths_and_labels_are_read_by_range(opened: tuple[Store, Index]) -> None:
    store, index = opened
    chunks = np.concatenate([r.chunks for r in REPORTS])
    assert (chunk_records(store, index, 4) == chunks[4]).all()
    assert (chunk_table(store, index, start=1, end=6) == chunks[1:6]).all()
    lengths = np.concatenate([r.lengths for r in REPORTS])
    assert (row_lengths(store, index, start=3, end=16) == lengths[3:16]).all()
    expected = [r.label_values[code] for r in REPORTS for code in r.label_codes]
    assert index.labels is not None
    names = list(index.labels)
    assert names == ["absent", "neg", "other", "pos"]
    codes = row_labels(store, index, start=0, end=17)
    assert [names[code] for code in codes] == expected
    assert index.labels == {name: expected.count(name) for name in names}
    assert row_labels(store, index, start=4, end=4).tolist() == []
    with pytest.raises(IndexError):
        row_labels(store, index, start=0, end=18)


def test_the_digest_is_that_of_the_content(store: Store, tmp_path: Path) -> None:
    one = write(store.within("a"), tmp_path / "a")
    again = write(store.within("b"), tmp_path / "b")
    other = write(
        store.within("c"),
        tmp_path / "c",
        [*REPORTS[:2], report(2, group_rows=[2, 2, 1], labels=("neg", "pos"), seed=1)],
    )
    assert one.to_bytes() == again.to_bytes()
    assert one.digest != other.digest


def test_a_second_index_is_refused(opened: tuple[Store, Index], tmp_path: Path) -> None:
    store, index = opened
    with pytest.raises(DataError, match="another command"):
        write(store, tmp_path / "second", REPORTS[:1])
    assert open_index(store).digest == index.digest


def test_a_folder_without_an_index_is_refused_with_what_to_type(tmp_path: Path) -> None:
    with pytest.raises(DataError) as raised:
        open_index(open_store(str(tmp_path)))
    assert "shoal prepare" in (raised.value.problems[0].hint or "")


@pytest.mark.parametrize("name", ["groups.npy", "shards.parquet"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_file_beside_the_index_is_refused(tmp_path: Path, name: str, damage: str) -> None:
    store = open_store(str(tmp_path / "set"))
    record = write(store, tmp_path / "draft")
    key = f"_shoal/{record.digest}/{name}"
    data = bytearray(store.read(key))
    if damage == "remove":
        store.delete([key])
    else:
        data[-9] ^= 1
        store.write(key, bytes(data if damage == "flip" else data[:-1]))
    with pytest.raises(DataError, match="damaged"):
        open_index(store)


def test_a_damaged_or_later_index_is_refused(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "set"))
    record = json.loads(write(store, tmp_path / "draft").to_bytes())
    store.write("_shoal/index.json", json.dumps(record | {"version": 2}).encode())
    with pytest.raises(DataError, match="version 2"):
        open_index(store)
    store.write("_shoal/index.json", json.dumps(record | {"num_rows": 18}).encode())
    with pytest.raises(DataError, match="do not agree"):
        open_index(store)
    store.write("_shoal/index.json", b'{"version": 1')
    with pytest.raises(DataError, match="cannot be read"):
        open_index(store)


def test_numpy_reads_the_headers_of_side_files() -> None:
    for dtype, shape in ((np.dtype("<u4"), (3,)), (CHUNK, (2, 5)), (CHUNK, (10**12, 10**4))):
        header = npy_header(dtype, shape)
        assert len(header) == 192
        stream = io.BytesIO(header)
        assert np.lib.format.read_magic(stream) == (1, 0)
        assert np.lib.format.read_array_header_1_0(stream) == (shape, False, dtype)


def test_a_hundred_thousand_shards_open_at_once_and_take_little_memory(tmp_path: Path) -> None:
    folder = tmp_path / "draft"
    folder.mkdir()
    draft = IndexDraft(folder, facts(label=None, text=None))
    chunks = np.zeros((1, 3), CHUNK)
    groups = np.array([2048], np.uint32)
    rng = np.random.default_rng(0)
    checksums = rng.integers(0, 2**63, 100_000).tolist()
    sizes = rng.integers(2**20, 2**26, 100_000).tolist()
    for number, (checksum, size) in enumerate(zip(checksums, sizes, strict=True)):
        shard = Shard(f"shard-{number:05d}.parquet", size + 900, size, checksum, 2048, 1)
        draft.add(ShardReport(shard, groups, chunks, 2**22, (0, 0, 0), None, None))
    store = open_store(str(tmp_path / "set"))
    commit_index(store, draft.upload(store, labels=(), split=None))
    started = time.monotonic()
    index = open_index(store)
    seconds = time.monotonic() - started
    print(f"opened in {seconds:.2f} s, {index.nbytes / index.num_groups:.1f} bytes a row group")
    assert index.nbytes <= 32 * index.num_groups
    assert index.shard(99_999).name == "shard-99999.parquet"
    assert index.shard_of(77_777) == (77_777, 0)
    assert index.first_row(100_000) == 2048 * 100_000
