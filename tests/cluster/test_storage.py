"""The contract of every Store, run on S3 and on a local folder."""

from __future__ import annotations

import os
import pickle
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash

from cluster.storage import (
    Head,
    ObjectExists,
    ObjectMissing,
    PreconditionFailed,
    StorageError,
    Store,
    Transfer,
    check_key,
    join_uri,
    local_path,
    open_store,
    split_s3_uri,
    split_uri,
)
from jobs.errors import SpecError
from tests.killed_writer import kill_writer_of

NUM_WRITERS = 10


def keys(store: Store, prefix: str = "") -> list[str]:
    return [head.key for head in store.list(prefix)]


def test_what_is_written_is_read(store: Store) -> None:
    etag = store.write("a/b.bin", b"hello")
    assert store.read("a/b.bin") == b"hello"
    head = store.head("a/b.bin")
    assert head is not None
    assert (head.key, head.num_bytes, head.etag) == ("a/b.bin", 5, etag)
    assert head.modified_at > 1.6e9


def test_a_memoryview_is_written_as_its_bytes(store: Store) -> None:
    store.write("part", memoryview(bytearray(b"0123456789"))[2:6])
    assert store.read("part") == b"2345"


def test_an_empty_object_is_an_object(store: Store, tmp_path: Path) -> None:
    store.write("empty", b"")
    assert store.read("empty") == b""
    head = store.head("empty")
    assert head is not None
    assert head.num_bytes == 0
    assert store.read_range("empty", start=0, end=0) == b""
    store.download("empty", tmp_path / "empty")
    assert (tmp_path / "empty").read_bytes() == b""
    assert store.upload("empty-again", tmp_path / "empty") == store.head("empty-again").etag  # type: ignore[union-attr]
    assert keys(store) == ["empty", "empty-again"]


def test_writing_replaces_and_changes_the_etag(store: Store) -> None:
    etags = {store.write("k", bytes([n])) for n in range(5)}
    assert len(etags) == 5
    assert store.read("k") == b"\x04"


def test_a_missing_object_is_told_apart(store: Store, tmp_path: Path) -> None:
    store.write("folder/k", b"")
    for key in ("nothing", "folder", "folder/k/below"):
        assert store.head(key) is None
        for read in (
            lambda key=key: store.read(key),
            lambda key=key: store.read_range(key, start=0, end=1),
            lambda key=key: store.download(key, tmp_path / "file"),
        ):
            with pytest.raises(ObjectMissing) as caught:
                read()
            assert caught.value.key == key
            assert store.uri in str(caught.value)
    assert not (tmp_path / "file").exists()


def test_a_range_gives_exactly_its_bytes(store: Store) -> None:
    data = bytes(range(256)) * 40
    store.write("k", data)
    for start, end in ((0, 1), (0, len(data)), (100, 5000), (len(data) - 1, len(data)), (7, 7)):
        assert store.read_range("k", start=start, end=end) == data[start:end]


@pytest.mark.parametrize(("start", "end"), [(5, 11), (0, 11), (10, 12), (50, 60)])
def test_a_range_behind_the_end_is_an_error(store: Store, start: int, end: int) -> None:
    store.write("k", b"0123456789")
    with pytest.raises(StorageError, match="shorter than it should be"):
        store.read_range("k", start=start, end=end)


def test_a_range_that_runs_backwards_is_a_bug(store: Store) -> None:
    with pytest.raises(ValueError, match="no range"):
        store.read_range("k", start=3, end=2)


def test_a_new_object_is_created_once(store: Store) -> None:
    etag = store.write_if_absent("k", b"first")
    with pytest.raises(ObjectExists) as caught:
        store.write_if_absent("k", b"second")
    assert isinstance(caught.value, PreconditionFailed)
    assert store.read("k") == b"first"
    assert store.head("k").etag == etag  # type: ignore[union-attr]


def test_of_many_creators_one_wins(store: Store) -> None:
    for turn in range(2):
        won = race(lambda n, turn=turn: store.write_if_absent(f"turn-{turn}", b"%d" % n))
        assert len(won) == 1
        assert store.read(f"turn-{turn}") == b"%d" % won[0]


def test_an_object_is_replaced_only_by_who_knows_it(store: Store) -> None:
    first = store.write("k", b"1")
    second = store.write_if_match("k", b"2", etag=first)
    assert second != first
    with pytest.raises(PreconditionFailed) as caught:
        store.write_if_match("k", b"3", etag=first)
    assert not isinstance(caught.value, ObjectExists)
    assert store.read("k") == b"2"
    with pytest.raises(PreconditionFailed):
        store.write_if_match("absent/k", b"3", etag=first)
    assert keys(store) == ["k"]


def test_of_many_replacers_one_wins(store: Store) -> None:
    etag = store.write("k", b"start")
    for _ in range(2):
        won = race(lambda n, etag=etag: store.write_if_match("k", b"%d" % n, etag=etag))
        assert len(won) == 1
        assert store.read("k") == b"%d" % won[0]
        etag = store.write("k", b"again")


def race(write: object) -> list[int]:
    """Which of the writers that started together did not lose."""
    barrier = threading.Barrier(NUM_WRITERS)

    def run(number: int) -> bool:
        barrier.wait()
        try:
            write(number)  # type: ignore[operator]
        except PreconditionFailed:
            return False
        return True

    with ThreadPoolExecutor(NUM_WRITERS) as pool:
        return [n for n, won in enumerate(pool.map(run, range(NUM_WRITERS))) if won]


def test_a_counter_kept_by_compare_and_swap_loses_nothing(store: Store) -> None:
    store.write("counter", b"0")

    def add(_: int) -> None:
        while True:
            head = store.head("counter")
            assert head is not None
            value = int(store.read("counter")) + 1
            try:
                store.write_if_match("counter", b"%d" % value, etag=head.etag)
            except PreconditionFailed:
                continue
            return

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(add, range(12)))
    assert store.read("counter") == b"12"


def test_a_list_is_sorted_within_each_folder_and_whole(store: Store) -> None:
    written = ["a", "a/x", "a/y/z", "b/1", "b/10", "b/2", "c", "z", "é"]
    for key in reversed(written):
        if not (key == "a" and store.uri.startswith("/")):
            store.write(key, key.encode())
    found = keys(store)
    assert [k for k in found if k != "a"] == written[1:]
    assert keys(store, "b/1") == ["b/1", "b/10"]
    assert keys(store, "b/") == ["b/1", "b/10", "b/2"]
    assert keys(store, "b/1/") == []
    assert keys(store, "nothing/") == []
    assert all(isinstance(head, Head) and head.etag for head in store.list())
    by_key = {head.key: head for head in store.list()}
    assert by_key["b/10"] == store.head("b/10")


def test_a_list_goes_on_after_a_key(store: Store) -> None:
    for n in range(6):
        store.write(f"logs/rank-{n % 2}/{n:06d}.jsonl", b"")
    all_keys = keys(store)
    for position, key in enumerate(all_keys):
        assert [h.key for h in store.list(after=key)] == all_keys[position + 1 :]
    after = "logs/rank-0/000001.jsonl"
    assert [h.key for h in store.list("logs/rank-0/", after=after)] == [
        "logs/rank-0/000002.jsonl",
        "logs/rank-0/000004.jsonl",
    ]


def test_folders_are_listed_without_what_is_in_them(store: Store) -> None:
    for key in ("runs/b/spec.json", "runs/a/spec.json", "runs/a/logs/1", "runs/note", "other/x"):
        store.write(key, b"")
    assert list(store.list_folders()) == ["other", "runs"]
    assert list(store.list_folders("runs")) == ["a", "b"]
    assert list(store.list_folders("runs/")) == ["a", "b"]
    assert list(store.list_folders("runs/b")) == []
    assert list(store.list_folders("nothing")) == []


def test_a_store_within_has_keys_of_its_own(store: Store) -> None:
    inner = store.within("runs/a/")
    inner.write("k", b"1")
    assert store.read("runs/a/k") == b"1"
    assert inner.uri == f"{store.uri}/runs/a"
    assert keys(inner) == ["k"]
    assert keys(store.within("runs")) == ["a/k"]
    assert open_store(inner.uri).read("k") == b"1"
    assert store.within("").uri == store.uri


def test_deleted_objects_are_gone_and_absent_ones_no_error(store: Store) -> None:
    for key in ("a/1", "a/2", "b/c/3"):
        store.write(key, b"")
    store.delete(iter(["a/1", "never", "a/b/never", "b/c/3"]))
    assert keys(store) == ["a/2"]
    assert keys(store, "b/") == []
    assert "a" in store.list_folders()
    store.delete([])


def test_names_in_any_script_are_names(store: Store) -> None:
    names = ["données/été 1.txt", "数据/分片-0001", "a b+c&d=e%20'x'\"(1)#?.txt", "😀"]
    for name in names:
        store.write(name, name.encode())
    assert sorted(keys(store)) == sorted(names)
    for name in names:
        assert store.read(name) == name.encode()
        assert keys(store, name) == [name]
    store.delete(names)
    assert keys(store) == []


@pytest.mark.parametrize(
    "key", ["", "/a", "a/", "a//b", "../a", "a/./b", "a\nb", "a\x00", ".shoal-lock", "a\ud800"]
)
def test_a_key_that_could_mean_something_else_is_refused(store: Store, key: str) -> None:
    with pytest.raises(ValueError, match="no key"):
        store.write(key, b"")
    with pytest.raises(ValueError, match="no key"):
        check_key(key)


def test_files_go_up_and_come_down_whole(store: Store, tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "new" / "target"
    source.write_bytes(os.urandom(300_000))
    etag = store.upload("k", source)
    assert etag == store.head("k").etag  # type: ignore[union-attr]
    target.parent.mkdir()
    target.write_bytes(b"older")
    digest = store.download("k", target, hashed=True)
    assert target.read_bytes() == source.read_bytes()
    assert digest == xxhash.xxh3_128_hexdigest(source.read_bytes())
    assert os.listdir(target.parent) == ["target"]


def test_a_copy_is_an_object_of_its_own(store: Store) -> None:
    store.write("a/été 1+2%.json", b"first")
    store.write("b", b"older")
    for key in ("b", "c/d"):
        store.copy("a/été 1+2%.json", key)
        assert store.head(key).num_bytes == 5  # type: ignore[union-attr]
        assert store.read(key) == b"first"
        store.copy("a/été 1+2%.json", key)  # as after an answer that was lost
    store.write("a/été 1+2%.json", b"second")
    store.delete(["b"])
    assert store.read("c/d") == b"first"
    assert keys(store.within("a")) == ["été 1+2%.json"]
    assert list(store.list_unfinished()) == []


def test_of_what_is_absent_there_is_no_copy(store: Store) -> None:
    store.write("folder/k", b"")
    for source in ("nothing", "folder"):
        with pytest.raises(ObjectMissing) as caught:
            store.copy(source, "copy")
        assert caught.value.key == source
    assert store.head("copy") is None


def test_each_part_of_a_large_object_that_moves_is_told(store: Store, tmp_path: Path) -> None:
    parts: list[str] = []
    transfer = Transfer(part_bytes=5 * 2**20, on_part=lambda: parts.append(doing))
    telling = open_store(store.uri, transfer=transfer).within("runs")
    data = os.urandom(11 * 2**20)
    (tmp_path / "source").write_bytes(data)
    doing = "write"
    telling.write("a", memoryview(data))
    doing = "upload"
    telling.upload("b", tmp_path / "source")
    doing = "download"
    telling.download("b", tmp_path / "target")
    assert all(2 <= parts.count(each) <= 3 for each in ("write", "upload", "download")), parts
    assert (tmp_path / "target").read_bytes() == telling.read("a") == data
    parts.clear()
    telling.write("c", data[: 2**20])  # as telemetry does, whatever training does
    assert parts == []


def test_what_killed_writers_have_left_is_found_and_dropped(store: Store) -> None:
    for key in ("a/b/k", "a-b/k"):
        kill_writer_of(store, key)
    assert keys(store) == []
    [left] = store.list_unfinished("a")
    assert left.key.startswith("a/b/")
    assert abs(left.last_sign_at - time.time()) < 60
    assert [u.key for u in store.within("a").list_unfinished()] == [left.key.removeprefix("a/")]
    for _ in range(2):
        store.drop_unfinished([left])
    assert list(store.list_unfinished("a/")) == []
    [other] = store.list_unfinished()
    assert other.key.startswith("a-b/")
    inner = store.within("a-b")
    inner.drop_unfinished(inner.list_unfinished())
    assert list(store.list_unfinished()) == []
    store.write("a/b/k", b"1")
    assert keys(store) == ["a/b/k"]


def test_a_store_pickles_without_connections_or_secrets(store: Store) -> None:
    store.write("k", b"1")
    pickled = pickle.dumps(store)
    secret = os.environ.get("AWS_SECRET_ACCESS_KEY", "no secret is set")
    assert secret.encode() not in pickled
    again = pickle.loads(pickled)
    assert again.uri == store.uri
    assert again.read("k") == b"1"
    assert secret not in repr(store) + repr(again)


def test_pyarrow_reads_what_the_store_wrote(store: Store) -> None:
    table = pa.table({"x": list(range(100))})
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    store.write("data/t.parquet", sink.getvalue().to_pybytes())
    inner = store.within("data")
    read = pq.read_table(f"{inner.filesystem_root}/t.parquet", filesystem=inner.filesystem())
    assert read.equals(table)


@pytest.mark.parametrize(
    "error",
    [
        ObjectMissing("k", "there is no k"),
        ObjectExists("k"),
        PreconditionFailed("k", "changed"),
        StorageError("broken"),
    ],
)
def test_errors_of_a_store_survive_pickling(error: StorageError) -> None:
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error)
    assert again.problems == error.problems
    assert vars(again) == vars(error)


def test_uris_are_taken_apart_and_joined() -> None:
    assert split_s3_uri("s3://bucket/a/b/") == ("bucket", "a/b")
    assert split_s3_uri("s3://bucket") == ("bucket", "")
    assert split_uri("s3://bucket/a/b") == ("s3://bucket/a", "b")
    assert split_uri("s3://bucket/a") == ("s3://bucket", "a")
    assert split_uri("/x/y") == ("/x", "y")
    assert join_uri("s3://bucket", "a/b") == "s3://bucket/a/b"
    assert local_path("file:///x/y/../z") == Path("/x/z")
    assert open_store("~/runs").uri == str(Path.home() / "runs")
    assert Path(open_store("runs").uri) == Path.cwd() / "runs"


@pytest.mark.parametrize(
    "uri", ["s3://", "s3:/bucket/x", "s3://b/../c", "gs://bucket/x", "", "s3://b"]
)
def test_a_uri_that_names_no_store_is_the_users_error(uri: str) -> None:
    with pytest.raises(SpecError):
        open_store(uri)
