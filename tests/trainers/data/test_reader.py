"""Verified reads of row groups: what is fetched, and what is said of shards that are not right."""

from __future__ import annotations

import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash

from cluster.storage import StorageError, open_store
from jobs.errors import DataError
from trainers.data.index import chunk_records
from trainers.data.reader import VerifiedReader

SHARDS = [[5, 1, 30], [8]]
COLUMNS = ["tokens", "row"]


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "set"


@pytest.fixture
def local(folder, watched):
    return watched(open_store(folder))


@pytest.fixture
def index(local, write_set):
    index = write_set(local, SHARDS)
    local.reads.clear()
    return index


@pytest.fixture
def reader(local, index, cache):
    return VerifiedReader(store=local, index=index, columns=COLUMNS, cache=cache)


def refused(reader, group):
    with pytest.raises(DataError) as raised:
        reader.read(group)
    [problem] = raised.value.problems
    assert "shoal prepare" in problem.hint
    assert "--in-place" in problem.hint
    return problem.message


def test_each_row_group_is_read_as_it_was_written(reader, table_of):
    for group, ids in enumerate([range(5), range(5, 6), range(6, 36), range(36, 44)]):
        assert reader.read(group) == table_of(ids).select(COLUMNS)


def test_only_the_wanted_columns_are_fetched_in_one_request(reader, local, index):
    reader.read(2)
    footer, chunks = local.shard_reads()
    shard = index.shard(0)
    assert footer == (shard.name, shard.footer_start, shard.num_bytes)
    records = chunk_records(local, index, 2)[index.leaves(COLUMNS)]
    start, end = records["start"].min(), (records["start"] + records["length"]).max()
    assert chunks == (shard.name, start, end)
    before = len(local.shard_reads())
    reader.read(0)
    assert len(local.shard_reads()) == before + 1, "the footer is kept"


def test_columns_that_lie_far_apart_are_fetched_apart(folder, write_set, watched, cache):
    local = watched(open_store(folder))
    index = write_set(local, [[20_000]], compression="none", use_dictionary=False)
    reader = VerifiedReader(store=local, index=index, columns=["label", "unused"], cache=cache)
    local.reads.clear()
    table = reader.read(0)
    assert table.column_names == ["label", "unused"]
    assert len(local.shard_reads()) == 3
    records = chunk_records(local, index, 0)
    unused, label = (records[leaf] for leaf in index.leaves(["unused", "label"]))
    fetched = sum(end - start for _, start, end in local.shard_reads()[1:])
    assert fetched == unused["length"] + label["length"]


def test_a_second_reader_of_the_node_fetches_nothing(reader, local, index, cache):
    first = reader.read(2)
    assert reader.bytes_fetched == sum(end - start for _, start, end in local.reads)
    local.reads.clear()
    other = VerifiedReader(store=local, index=index, columns=COLUMNS, cache=cache)
    assert other.read(2) == first
    assert not local.reads
    assert other.bytes_fetched == 0


def test_a_column_that_the_set_lacks_is_named(local, index, cache):
    with pytest.raises(DataError, match="no column txet"):
        VerifiedReader(store=local, index=index, columns=["txet"], cache=cache)


def test_a_spoilt_cache_is_fetched_anew(reader, local, index, cache, table_of):
    reader.read(2)
    for blob in (cache.folder / "blobs").glob("*/*"):
        data = bytearray(blob.read_bytes())
        data[len(data) // 2] ^= 1
        blob.write_bytes(data)
    local.reads.clear()
    fresh = VerifiedReader(store=local, index=index, columns=COLUMNS, cache=cache)
    assert fresh.read(2) == table_of(range(6, 36)).select(COLUMNS)
    assert local.reads
    local.reads.clear()
    fresh = VerifiedReader(store=local, index=index, columns=COLUMNS, cache=cache)
    assert fresh.read(2) == table_of(range(6, 36)).select(COLUMNS)
    assert not local.reads, "what was fetched anew is kept"


def test_a_flipped_byte_names_shard_group_and_column(reader, folder, index, local):
    flip(folder / "shard-00000.parquet", int(chunk_records(local, index, 1)["start"][1]) + 3)
    message = refused(reader, 1)
    assert "shard-00000.parquet, row group 1, column row" in message
    assert "changed after it was indexed" in message
    assert reader.read(0).num_rows == 5
    flip(folder / "shard-00001.parquet", -5)
    assert "shard-00001.parquet, row group 0: " in refused(reader, 3)


class Spoiling:
    """A store that flips bits in the next ranged reads of the keys that contain `part`."""

    def __init__(self, store, part, *, times):
        self.store, self.part, self.times = store, part, times
        self.uri = store.uri

    def read_range(self, key, *, start, end):
        data = self.store.read_range(key, start=start, end=end)
        if self.part in key and self.times:
            self.times -= 1
            data = bytearray(data)
            data[3::8] = bytes(byte ^ 0x10 for byte in data[3::8])
        return bytes(data)

    def __getattr__(self, name):
        return getattr(self.store, name)


@pytest.mark.parametrize("part", ["shard-", "chunks.npy"])
def test_bytes_that_were_spoilt_on_their_way_are_fetched_anew(part, local, index, cache, table_of):
    spoiling = Spoiling(local, part, times=4)
    reader = VerifiedReader(store=spoiling, index=index, columns=COLUMNS, cache=cache)
    assert reader.read(2) == table_of(range(6, 36)).select(COLUMNS)
    assert not spoiling.times


def test_bytes_that_come_spoilt_each_time_are_refused(local, index, cache):
    spoiling = Spoiling(local, "shard-", times=1000)
    reader = VerifiedReader(store=spoiling, index=index, columns=COLUMNS, cache=cache)
    assert "its checksum is another" in refused(reader, 2)


@pytest.mark.parametrize("bit", [0, 20, 62, 63])
@pytest.mark.parametrize("field", ["start", "length", "xxh3"])
def test_a_wrong_bit_in_a_chunks_record_is_found(folder, local, index, cache, field, bit):
    path = next(folder.rglob("chunks.npy"))
    table = np.load(path)
    table[field][2, index.leaves(COLUMNS)[0]] ^= np.uint64(1 << bit)
    np.save(path, table)
    assert "changed after it was indexed" in refused(
        VerifiedReader(store=local, index=index, columns=COLUMNS, cache=cache), 2
    )


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 0x40
    path.write_bytes(data)


def test_a_truncated_shard_says_its_size(reader, folder):
    path = folder / "shard-00000.parquet"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-50])
    message = refused(reader, 0)
    assert f"it has {size - 50} bytes, the index says {size}" in message
    path.write_bytes(b"")
    assert "it has 0 bytes" in refused(reader, 0)


def test_a_rewritten_shard_is_noticed_whatever_its_size(reader, folder, index, local):
    path = folder / "shard-00000.parquet"
    before = path.read_bytes()
    pq.write_table(pa.table({"row": np.arange(99)}), path)
    assert "changed after it was indexed" in refused(reader, 0)
    path.write_bytes(before + b"more")
    assert reader.read(0).num_rows == 5, "what is read is what was indexed"
    path.write_bytes(before[::-1])
    assert "its checksum is another" in refused(reader, 1)


def test_a_missing_shard_is_said_to_be_missing(reader, folder):
    (folder / "shard-00001.parquet").unlink()
    assert "shard-00001.parquet: " in refused(reader, 3)
    assert "it is missing" in refused(reader, 3)
    assert reader.read(0).num_rows == 5


def test_a_store_that_is_down_is_no_fault_of_the_data(reader, local):
    reader.read(0)
    local.fail_when = lambda key, number: True
    with pytest.raises(StorageError, match="does not answer"):
        reader.read(2)
    local.fail_when = lambda key, number: False
    assert reader.read(2).num_rows == 30


def test_parquet_that_was_damaged_before_it_was_indexed(folder, write_set, cache, monkeypatch):
    """Its checksums are right: the index was made of the damaged bytes."""
    local = open_store(folder)
    index = write_set(local, SHARDS)
    start = int(chunk_records(local, index, 2)["start"][1])
    flip(folder / "shard-00000.parquet", start + 1)
    as_indexed = xxhash.xxh3_64_intdigest
    by_content = {}
    data = (folder / "shard-00000.parquet").read_bytes()
    records = chunk_records(local, index, 2)
    for record in records:
        begin, length = int(record["start"]), int(record["length"])
        by_content[data[begin : begin + length]] = int(record["xxh3"])
    monkeypatch.setattr(
        xxhash,
        "xxh3_64_intdigest",
        lambda chunk: by_content.get(bytes(chunk)) or as_indexed(chunk),
    )
    reader = VerifiedReader(store=local, index=index, columns=COLUMNS, cache=cache)
    message = refused(reader, 2)
    assert "shard-00000.parquet, row group 2: the Parquet data is damaged" in message


def test_a_set_that_is_prepared_anew_shares_nothing_with_the_old_one(
    folder, write_set, cache, table_of, reader
):
    reader.read(0)
    shutil.rmtree(folder)
    index = write_set(open_store(folder), [[4], [7]])
    again = VerifiedReader(store=open_store(folder), index=index, columns=COLUMNS, cache=cache)
    assert again.read(0) == table_of(range(4)).select(COLUMNS)


def nested(ids):
    return pa.table(
        {
            "a.b": pa.array([f"{n}" for n in ids], pa.string()),
            "a": pa.array(list(ids), pa.int32()),
            "deep": pa.array(
                [{"x": [n] * (n % 3), "y": {"z": float(n)}} for n in ids],
                pa.struct([("x", pa.list_(pa.int64())), ("y", pa.struct([("z", pa.float32())]))]),
            ),
        }
    )


@pytest.mark.parametrize("columns", [["a.b"], ["a"], ["deep"], ["deep", "a.b"]])
def test_nested_columns_and_names_with_dots_are_read(folder, write_set, cache, columns):
    store = open_store(folder)
    index = write_set(store, [[4, 9]], make=nested)
    reader = VerifiedReader(store=store, index=index, columns=columns, cache=cache)
    assert reader.read(1).to_pylist() == nested(range(4, 13)).select(columns).to_pylist()
