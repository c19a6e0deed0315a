"""Reading run folders: what is there, what comes later, and what is damaged."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from synthetic import START, SyntheticRun, running, succeeded

from cluster.storage import Head, Store, open_store
from jobs.errors import SpecError
from jobs.lines import LineReader
from jobs.record import Amendment, CheckpointName, RunPaths, Source, State
from jobs.runs import RunReader, list_run_ids
from jobs.status import read_status
from tests.spoiling import SpoilingStore


class CountingStore:
    """A store that remembers which objects were read."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.reads: list[str] = []

    def read(self, key: str) -> bytes:
        self.reads.append(key)
        return self._store.read(key)

    def list(self, prefix: str = "", *, after: str | None = None) -> Iterator[Head]:
        return self._store.list(prefix, after=after)

    def list_folders(self, prefix: str = "") -> Iterator[str]:
        return self._store.list_folders(prefix)


def test_a_run_is_read_alike_from_each_kind_of_store(store: Store) -> None:
    made = succeeded(store)
    reader = RunReader(store, made.run_id)
    status = read_status(reader)
    assert status.situation.state is State.SUCCEEDED
    assert (status.step, status.total_steps) == (300, 300)
    assert [a.restored_step for a in status.attempts] == [None, 100]
    assert status.best is not None
    assert (
        status.best.step
        == max(status.checkpoints, key=lambda m: m.evaluation["validation/f1"]).step
    )
    assert list_run_ids(store) == [made.run_id]
    assert reader.problems == []


def test_steps_that_a_later_attempt_did_again_are_shown_once(local_store: Store) -> None:
    made = succeeded(local_store)
    reader = RunReader(local_store, made.run_id)
    steps = [line["step"] for line in reader.metrics() if line["kind"] == "train"]
    assert steps == list(range(10, 301, 10))
    by_step = {line["step"]: line["attempt"] for line in reader.metrics()}
    assert (by_step[100], by_step[110]) == (1, 2)
    assert len(reader.metrics_lines()) > len(reader.metrics())


def test_amendments_change_the_job_that_a_reader_sees(local_store: Store) -> None:
    made = SyntheticRun(local_store).submit()
    reader = RunReader(local_store, made.run_id)
    assert reader.spec().workers.count == 2
    for number, overrides in ((1, ("workers.count=3",)), (2, ("train.epochs=5",))):
        amendment = Amendment(overrides=overrides, made_at=START)
        local_store.write(made.paths.amendment(number), amendment.to_bytes())
    assert (reader.spec().workers.count, reader.spec().train.epochs) == (3, 5)


@pytest.mark.parametrize("part", ["spec.json", "amendments/0001.json"])
def test_a_job_one_bit_of_which_has_changed_is_not_taken_for_another(
    local_store: Store, part: str
) -> None:
    made = SyntheticRun(local_store).submit()
    amendment = Amendment(overrides=("workers.count=2",), made_at=START)
    local_store.write(made.paths.amendment(1), amendment.to_bytes())
    assert RunReader(local_store, made.run_id).spec().workers.count == 2
    key = f"{made.run_id}/{part}"
    held = local_store.read(key)
    place = held.index(b"2", held.index(b"workers"))
    local_store.write(key, held[:place] + b"3" + held[place + 1 :])
    with pytest.raises(SpecError, match=r"is not a job: it is damaged|cannot be told") as caught:
        RunReader(local_store, made.run_id).spec()
    assert "put an older version of it back" in str(caught.value.problems[0].hint)


def test_only_new_objects_are_fetched(local_store: Store) -> None:
    made = SyntheticRun(local_store).submit()
    counting = CountingStore(local_store)
    lines = LineReader(counting, made.paths, "logs")  # type: ignore[arg-type]
    made.lines("logs", Source(1, 0), {"time": 2, "message": "b"})
    made.lines("logs", Source(1, None), {"time": 1, "message": "a"})
    assert [line["message"] for line in lines.new()] == ["a", "b"]
    assert lines.new() == []
    made.lines("logs", Source(1, 0), {"time": 3, "message": "c"})
    made.lines("logs", Source(2, 1), {"time": 4, "message": "d"})
    assert [(line["message"], line["rank"], line["attempt"]) for line in lines.new()] == [
        ("c", 0, 1),
        ("d", 1, 2),
    ]
    assert len(counting.reads) == len(set(counting.reads)) == 4


def test_a_look_asks_as_often_of_a_run_that_was_restarted(
    local_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = SyntheticRun(local_store).submit()
    made.lease(renewed_at=START)
    reader, asked, counts = RunReader(local_store, made.run_id), list[str](), list[int]()
    for name in ("list", "list_folders", "read"):
        whole = getattr(local_store, name)

        def counted(prefix: str = "", _whole: Any = whole, **options: Any) -> Any:
            asked.append(prefix)
            return _whole(prefix, **options)

        monkeypatch.setattr(local_store, name, counted)
    for attempt in (1, 2, 3, 4):
        made.start_attempt(attempt, time=START + attempt)
        for source in (Source(attempt, None), Source(attempt, 0)):
            made.lines("events", source, {"time": START + attempt, "event": "told"})
        read_status(reader, now=START + attempt)
        asked.clear()
        assert len(read_status(reader, now=START + attempt).attempts) == attempt
        counts.append(len(asked))
    assert counts == [counts[0]] * 4
    assert counts[0] <= 12


def test_a_missing_run_names_the_nearest(local_store: Store) -> None:
    succeeded(local_store)
    with pytest.raises(SpecError) as refused:
        RunReader(local_store, "sentiment-a1b2").spec()
    assert refused.value.problems[0].hint == "did you mean sentiment-a1b2c3?"


def test_a_store_without_runs_says_so(local_store: Store) -> None:
    with pytest.raises(SpecError, match="there is no run x-1") as refused:
        RunReader(local_store, "x-1").spec()
    assert "holds no runs" in str(refused.value.problems[0].hint)


@pytest.mark.parametrize("garbage", [b"", b"not json", b"[1]", b'{"name": "x"}', b"\xff\xfe"])
def test_a_spec_that_is_no_job_is_an_error_with_a_way_out(
    local_store: Store, garbage: bytes
) -> None:
    local_store.write(RunPaths("broken-1").spec, garbage)
    with pytest.raises(SpecError, match=r"broken-1/spec\.json"):
        RunReader(local_store, "broken-1").spec()


def test_damaged_parts_are_named_and_the_rest_is_read(local_store: Store) -> None:
    made = running(local_store, now=START)
    local_store.write(made.paths.manifest(CheckpointName(100, 1)), b"{")
    local_store.write(made.paths.attempt(7), b"nonsense")
    local_store.write(made.paths.lines("metrics", Source(1, 0), 900), b'{"time": 1}\nxx\n"text"\n')
    local_store.write(f"{made.run_id}/logs/elsewhere/x/000001.jsonl", b"{}\n")
    reader = RunReader(local_store, made.run_id)
    status = read_status(reader, now=START)
    assert status.situation.state is State.RUNNING
    assert (status.step, [m.step for m in status.checkpoints]) == (120, [50])
    text = "\n".join(reader.problems)
    assert "step-00000100-attempt-0001/manifest.json is not a readable Manifest" in text
    assert "attempts/0007.json is not a readable Attempt" in text
    assert "line 2 of" in text
    assert "a line of metrics has no step" in text


def test_a_run_with_nothing_but_its_job_is_pending(local_store: Store) -> None:
    made = SyntheticRun(local_store).submit()
    status = read_status(RunReader(local_store, made.run_id))
    assert status.situation.state is State.PENDING
    assert (status.step, status.train, status.progress) == (0, None, None)


def test_a_run_that_is_being_deleted_is_refused(local_store: Store) -> None:
    made = succeeded(local_store)
    local_store.write(made.paths.deleting, b"{}")
    with pytest.raises(SpecError, match="is being deleted"):
        RunReader(local_store, made.run_id).spec()


def test_a_step_that_was_saved_again_is_read_again(local_store: Store) -> None:
    made = succeeded(local_store)
    reader = RunReader(local_store, made.run_id)
    assert [m.attempt for m in reader.manifests() if m.step == 100] == [1]
    made.checkpoint(2, 100, time=START + 500)
    assert [m.attempt for m in reader.manifests() if m.step == 100] == [1, 2]
    assert [m.attempt for m in reader.live_manifests() if m.step == 100] == [1]


def test_an_overview_takes_the_newest_object_of_driver_and_first_rank(local_store: Store) -> None:
    made = succeeded(local_store)
    lines = RunReader(local_store, made.run_id).newest_lines("logs")
    assert [line["message"] for line in lines] == ["bucket layout fixed", "rank 1 died"]
    assert open_store(local_store.uri).head(made.paths.spec) is not None


@pytest.mark.parametrize("times", [1, 2])
def test_a_record_that_was_spoilt_on_its_way_is_read_anew(local_store: Store, times: int) -> None:
    made = succeeded(local_store)
    key = made.paths.manifest(CheckpointName(300, 2))
    reader = RunReader(SpoilingStore(local_store, key, times=times), made.run_id)  # type: ignore[arg-type]
    assert [m.step for m in reader.live_manifests()] == [50, 100, 150, 200, 250, 300]
    assert reader.problems == []
