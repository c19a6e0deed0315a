"""Lines of a run: numbered whole objects that lose nothing while the store is away."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from tensorboardX import SummaryWriter

from cluster.storage import StorageError, Store
from jobs.record import LineKind, RunPaths, Source, State
from trainers import telemetry as module
from trainers.telemetry import LineWriter, Telemetry
from trainers.tracking.feeds import Feed
from trainers.tracking.tensorboard import TensorBoard

PATHS = RunPaths("run")
RANK = Source(2, 0)


class Flaky:
    """A store that refuses writes while `down` is set, and may hold one back in the middle."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.down = False
        self.loses_answers = False
        self.in_write = threading.Event()
        self.go_on: threading.Event | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def write(self, key: str, data: bytes | memoryview) -> str:
        if self.go_on is not None:
            self.in_write.set()
            assert self.go_on.wait(30)
        if self.down:
            raise StorageError("the store is away")
        etag = self._store.write(key, data)
        if self.loses_answers:
            raise StorageError("the answer was lost")
        return etag


@pytest.fixture
def flaky(local_store: Store) -> Flaky:
    return Flaky(local_store)


@pytest.fixture(autouse=True)
def flush_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FLUSH_SECONDS", 3600.0)


@pytest.fixture
def writer(flaky: Flaky) -> Iterator[LineWriter]:
    opened = LineWriter(flaky, PATHS, "metrics", RANK)
    yield opened
    opened.close()


def objects(store: Store, kind: LineKind = "metrics", source: Source = RANK) -> list[list[Any]]:
    """Lines of each object, in the order of their numbers."""
    prefix = f"run/{kind}/{source.folder}/"
    heads = list(store.list(prefix))
    numbers = [int(head.key.removeprefix(prefix).removesuffix(".jsonl")) for head in heads]
    assert numbers == list(range(1, len(heads) + 1))
    return [[json.loads(t) for t in store.read(h.key).splitlines()] for h in heads]


def numbers(store: Store) -> list[list[int]]:
    return [[line["n"] for line in lines] for lines in objects(store)]


def write(writer: LineWriter, *values: int) -> None:
    for value in values:
        writer.write({"n": value})


def test_each_flush_is_the_next_numbered_object(writer: LineWriter, flaky: Flaky) -> None:
    write(writer, 1, 2)
    writer.flush()
    writer.flush()
    write(writer, 3)
    writer.flush()
    assert numbers(flaky) == [[1, 2], [3]]


def test_closing_flushes(flaky: Flaky) -> None:
    writer = LineWriter(flaky, PATHS, "metrics", RANK)
    write(writer, 1)
    writer.close()
    assert numbers(flaky) == [[1]]


def test_a_line_has_its_time_unless_it_brings_one(writer: LineWriter, flaky: Flaky) -> None:
    writer.write({"n": 1})
    writer.write({"n": 2, "time": 7.0})
    writer.flush()
    [[first, second]] = objects(flaky)
    assert first["time"] > 1.6e9
    assert second["time"] == 7.0


def test_nothing_is_lost_while_the_store_is_away(
    writer: LineWriter, flaky: Flaky, capsys: pytest.CaptureFixture[str]
) -> None:
    write(writer, 1)
    writer.flush()
    flaky.down = True
    write(writer, 2)
    with pytest.raises(StorageError):
        writer.flush()
    write(writer, 3)
    writer._flush_or_say()
    assert "metrics are not written at present: the store is away" in capsys.readouterr().err
    flaky.down = False
    write(writer, 4)
    writer.flush()
    assert numbers(flaky) == [[1], [2], [3, 4]]


def test_an_object_whose_answer_was_lost_is_written_again_as_it_was(
    writer: LineWriter, flaky: Flaky
) -> None:
    write(writer, 1)
    flaky.loses_answers = True
    with pytest.raises(StorageError):
        writer.flush()
    seen = objects(flaky)
    flaky.loses_answers = False
    write(writer, 2)
    writer.flush()
    assert objects(flaky)[:1] == seen
    assert numbers(flaky) == [[1], [2]]


@pytest.mark.parametrize(
    "name", ["AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "HF_TOKEN", "RAY_AUTH_TOKEN"]
)
def test_secrets_of_the_environment_are_masked(
    flaky: Flaky, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, 'wJalr"XUtn\\FEMI')
    writer = LineWriter(flaky, PATHS, "metrics", RANK)
    text = 'key wJalr"XUtn\\FEMI!'
    writer.write({"message": text, "nested": [{"deep": text}], "error": ValueError(text)})
    writer.close()
    [[line]] = objects(flaky)
    assert line["message"] == line["nested"][0]["deep"] == line["error"] == "key ***!"


def test_what_is_too_short_for_a_secret_and_numbers_are_not_masked(
    flaky: Flaky, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "1234567")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "87654321")
    writer = LineWriter(flaky, PATHS, "metrics", RANK)
    writer.write({"message": "step 1234567", "n": 87654321})
    writer.close()
    [[line]] = objects(flaky)
    assert (line["message"], line["n"]) == ("step 1234567", 87654321)


def test_the_thread_flushes_by_itself(flaky: Flaky, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FLUSH_SECONDS", 0.01)
    flaky.go_on = threading.Event()
    writer = LineWriter(flaky, PATHS, "metrics", RANK)
    write(writer, 1)
    assert flaky.in_write.wait(30)
    flaky.go_on.set()
    writer.close()
    assert numbers(flaky) == [[1]]


def test_the_oldest_lines_go_first_where_too_many_wait(
    writer: LineWriter,
    flaky: Flaky,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(module, "MAX_WAITING_LINES", 20)
    flaky.down = True
    write(writer, *range(25))
    writer._flush_or_say()
    flaky.down = False
    writer.flush()
    assert numbers(flaky) == [list(range(6, 25))]
    assert "6 lines of metrics are lost" in capsys.readouterr().err


def test_lines_that_come_during_a_flush_are_kept_though_others_are_dropped(
    writer: LineWriter, flaky: Flaky, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_WAITING_LINES", 20)
    write(writer, *range(15))
    flaky.go_on = threading.Event()
    flushing = threading.Thread(target=writer.flush)
    flushing.start()
    assert flaky.in_write.wait(30)
    write(writer, *range(15, 23))
    flaky.go_on.set()
    flushing.join()
    writer.flush()
    assert numbers(flaky) == [list(range(15)), list(range(15, 23))]


# ----------------------------------------------------------------------------------- Telemetry


def test_every_stream_is_flushed_at_the_end(local_store: Store) -> None:
    with Telemetry(local_store, PATHS, RANK, rows=True) as telemetry:
        telemetry.event("checkpoint", "saved", step=3)
        telemetry.metrics({"kind": "train", "step": 3, "loss": 1.0})
        telemetry.rows({"step": 3, "rows": [1, 2]})
        logging.getLogger("somebody").warning("look: %s", "here")
        module.log.info("for the log only")
    [[event]] = objects(local_store, "events")
    assert event.items() >= {"event": "checkpoint", "message": "saved", "step": 3}.items()
    [[metrics]] = objects(local_store, "metrics")
    assert metrics.items() >= {"kind": "train", "step": 3, "loss": 1.0, "attempt": 2}.items()
    [[rows]] = objects(local_store, "rows")
    assert rows["rows"] == [1, 2]
    [lines] = objects(local_store, "logs")
    assert [line["message"] for line in lines] == ["look: here", "for the log only"]
    assert lines[0].items() >= {
        "level": "WARNING", "logger": "somebody", "rank": 0, "attempt": 2, "generation": None,
    }.items()  # fmt: skip


def test_a_log_line_that_cannot_be_formatted_does_not_stop_who_logs(
    local_store: Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # pytest's own handlers raise for such a line.
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    with Telemetry(local_store, PATHS, RANK):
        module.log.warning("%d of them", "many")
        module.log.warning("after it")
    [lines] = objects(local_store, "logs")
    assert [line["message"] for line in lines] == ["after it"]
    assert "%d of them" in capsys.readouterr().err


def test_a_driver_writes_as_its_generation_and_its_state_at_once(local_store: Store) -> None:
    driver = Source(3, None)
    with Telemetry(local_store, PATHS, driver) as telemetry:
        telemetry.state(State.STARTING, "starting")
        [[event]] = objects(local_store, "events", driver)
        assert event["state"] == "STARTING"
        assert event["generation"] == 3


def test_rows_are_not_written_unless_they_are_asked_for(local_store: Store) -> None:
    with Telemetry(local_store, PATHS, RANK) as telemetry:
        telemetry.rows({"step": 1, "rows": [1]})
    assert objects(local_store, "rows") == []


def test_an_error_is_logged_with_its_traceback_and_the_handler_is_gone(
    local_store: Store,
) -> None:
    before = list(logging.getLogger().handlers)

    def fail() -> None:
        with Telemetry(local_store, PATHS, RANK):
            raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        fail()
    [[line]] = objects(local_store, "logs")
    assert line["message"] == "a bug"
    assert "ValueError: a bug" in line["traceback"]
    assert logging.getLogger().handlers == before


def test_training_ends_well_though_the_store_is_away_at_the_end(
    flaky: Flaky, capsys: pytest.CaptureFixture[str]
) -> None:
    with Telemetry(flaky, PATHS, RANK) as telemetry:
        telemetry.event("error", "x")
        flaky.down = True
    assert "events are not written at present" in capsys.readouterr().err


def board(store: Store, telemetry: Telemetry) -> Feed:
    prefix = f"{PATHS.tensorboard}attempt-{RANK.number:04d}/"
    return Feed("TensorBoard", lambda: TensorBoard(store, prefix), warn=telemetry.warn)


def test_tensorboard_files_lie_in_the_run_folder(local_store: Store) -> None:
    with Telemetry(local_store, PATHS, RANK) as telemetry:
        telemetry.with_trackers([board(local_store, telemetry)])
        telemetry.metrics({"kind": "train", "step": 1, "loss": 0.5})
        telemetry.metrics(
            {"kind": "evaluation", "split": "validation", "step": 1, "metrics": {"f1": 0.25}}
        )
    [head] = local_store.list("run/tensorboard/")
    data = local_store.read(head.key)
    assert "attempt-0002" in head.key
    assert b"train/loss" in data
    assert b"validation/f1" in data


def test_a_tensorboard_that_cannot_be_written_costs_no_line(
    local_store: Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(writer: SummaryWriter) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(SummaryWriter, "flush", full)
    with Telemetry(local_store, PATHS, RANK) as telemetry:
        telemetry.with_trackers([board(local_store, telemetry)])
        telemetry.metrics({"kind": "train", "step": 1, "loss": 0.5})
        telemetry.event("error", "x")
    assert len(objects(local_store, "events")) == 1
    assert "No space left on device" in capsys.readouterr().err
