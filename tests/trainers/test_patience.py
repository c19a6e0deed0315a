"""Waiting for a store that is away: repeated, told, bounded, and never taken for another's work."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pytest
import tenacity

from cluster.storage import (
    ObjectExists,
    ObjectMissing,
    PreconditionFailed,
    StorageError,
    Store,
    StoreAway,
)
from jobs.errors import Problem, render_error
from jobs.record import Control, Outcome, State
from jobs.runs import RunReader
from jobs.spec import JobSpec
from tests.evidence import final_weights, rows_by_epoch
from tests.ranks import assignment_of, on_ranks, run_group, run_ranks
from tests.scene import Scene
from trainers import patience as module
from trainers import worker
from trainers.assignment import Assignment
from trainers.data.reader import VerifiedReader
from trainers.data.stream import RankBatch, RankStream
from trainers.loop import Progress
from trainers.patience import Patience
from trainers.records import read_attempts, read_manifests
from trainers.session import Session
from trainers.tasks.task import Evaluation
from trainers.watchdog import Watchdog


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_pause_at_random", tenacity.wait_none())


class Told:
    """What was told of waits."""

    def __init__(self) -> None:
        self.sentences: list[tuple[str, bool]] = []

    def __call__(self, sentence: str, is_over: bool) -> None:
        self.sentences.append((sentence, is_over))


@pytest.fixture
def told() -> Told:
    return Told()


@pytest.fixture
def patience(told: Told) -> Patience:
    return Patience(limit_seconds=30, tell=told)


def away() -> StoreAway:
    return StoreAway(Problem("cannot read s3://lake/k: it does not answer", "check it"))


class Failing:
    """An action that meets a store that is away `times` times."""

    def __init__(self, times: int, error: Callable[[], Exception] = away) -> None:
        self.times = times
        self.error = error
        self.calls = 0

    def __call__(self) -> str:
        self.calls += 1
        if self.calls <= self.times:
            raise self.error()
        return "done"


def test_what_a_store_refuses_while_it_is_away_is_repeated_and_told(
    patience: Patience, told: Told, capsys: pytest.CaptureFixture[str]
) -> None:
    action = Failing(3)
    assert patience.call(action) == "done"
    assert action.calls == 4
    (begun, is_over), (back, is_back) = told.sentences
    assert (is_over, is_back) == (False, True)
    assert begun.startswith("waits for the store since ")
    assert "s3://lake/k" in begun
    assert back.startswith("the store is back after ")
    said = capsys.readouterr().err
    assert begun in said
    assert back in said
    assert patience._num_waiting == 0


def test_what_succeeds_at_once_is_not_told(patience: Patience, told: Told) -> None:
    assert patience.call(Failing(0)) == "done"
    assert told.sentences == []


@pytest.mark.parametrize("error", [StorageError("denied"), ObjectMissing("k"), ValueError("bug")])
def test_what_waiting_does_not_mend_is_raised_at_once(
    patience: Patience, told: Told, error: Exception
) -> None:
    action = Failing(1000, lambda: error)
    with pytest.raises(type(error)) as caught:
        patience.call(action)
    assert caught.value is error
    assert action.calls == 1
    assert told.sentences == []


def test_a_wait_ends_at_its_limit_and_says_how_to_go_on(told: Told) -> None:
    patience = Patience(limit_seconds=0.2, tell=told)
    with pytest.raises(StoreAway) as caught:
        patience.call(Failing(10**9))
    text = render_error(caught.value)
    [minutes] = re.findall(r"does not answer, for (\S+) minutes now", text)
    assert float(minutes) * 1.01 >= 0.2 / 60
    assert "retries.wait_minutes" in text
    assert "shoal resume" in text
    assert [is_over for _, is_over in told.sentences] == [False]
    assert patience._num_waiting == 0


def test_the_limit_counts_from_the_first_failure(told: Told) -> None:
    def slow_then_away(action: Failing) -> str:
        if action.calls == 0:
            time.sleep(0.4)  # a long download, say, that breaks off at its end
        return action()

    patience = Patience(limit_seconds=0.3, tell=told)
    assert patience.call(partial(slow_then_away, Failing(2))) == "done"


def test_a_pause_that_the_store_asks_for_is_kept(patience: Patience) -> None:
    def busy() -> StoreAway:
        error = away()
        error.after_seconds = 0.3
        return error

    began = time.monotonic()
    assert patience.call(Failing(2, busy)) == "done"
    assert time.monotonic() - began >= 0.6


def test_a_pause_longer_than_the_limit_is_cut_and_the_store_is_tried_once_more(
    told: Told,
) -> None:
    def busy() -> StoreAway:
        error = away()
        error.after_seconds = 3600.0
        return error

    patience = Patience(limit_seconds=0.3, tell=told)
    assert patience.call(Failing(1, busy)) == "done"
    action = Failing(10**9, busy)
    began = time.monotonic()
    with pytest.raises(StoreAway, match="minutes now") as caught:
        patience.call(action)
    assert action.calls == 2
    waited = time.monotonic() - began
    [minutes] = re.findall(r"for (\S+) minutes now", str(caught.value))
    assert float(minutes) * 1.01 >= 0.3 / 60
    assert float(minutes) <= waited / 60 * 1.01


def test_a_wait_that_nobody_needs_any_more_ends(patience: Patience, told: Told) -> None:
    closed = threading.Event()

    def unless() -> None:
        if closed.is_set():
            raise RuntimeError("closed")

    def long() -> StoreAway:
        error = away()
        error.after_seconds = 20.0
        return error

    threading.Timer(0.1, closed.set).start()
    with pytest.raises(RuntimeError, match="closed"):
        patience.call(Failing(1, long), unless=unless)
    assert [is_over for _, is_over in told.sentences] == [False]


def test_a_wait_is_no_hang(patience: Patience) -> None:
    seen: list[tuple[int, int]] = []

    def look_then_fail(action: Failing) -> str:
        seen.append((watch.progress(), watch.progress()))
        return action()

    with Watchdog(limit_seconds=600) as watch:
        patience.call(partial(look_then_fail, Failing(2)))
        after = watch.progress(), watch.progress()
    (first, still), (waiting, gets_on), *_ = seen
    assert first == still
    assert gets_on > waiting
    assert after[0] == after[1]


def test_waits_at_one_time_are_told_as_one(patience: Patience, told: Told) -> None:
    barrier = threading.Barrier(6)
    is_back = threading.Event()

    def work(first: list[int]) -> str:
        if not first:
            first.append(1)
            barrier.wait()  # all of them have met the store that is away
            raise away()
        if not is_back.is_set():
            raise away()
        return "done"

    threads = [threading.Thread(target=patience.call, args=(partial(work, []),)) for _ in range(6)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 10
    while patience._num_waiting < 6 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert patience._num_waiting == 6
    is_back.set()
    for thread in threads:
        thread.join()
    assert [is_over for _, is_over in told.sentences] == [False, True]


class AnswersLost:
    """A store that does what it is asked, and whose next answers do not come."""

    def __init__(self, store: Store, times: int) -> None:
        self.store = store
        self.times = times

    def __getattr__(self, name: str) -> object:
        def use(*arguments: object, **options: object) -> object:
            given = getattr(self.store, name)(*arguments, **options)
            if self.times:
                self.times -= 1
                raise away()
            return given

        return use


def test_every_operation_of_a_store_is_waited_for(
    local_store: Store, patience: Patience, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"large")

    def shaky() -> Store:
        return patience.store(AnswersLost(local_store, 2))  # type: ignore[arg-type]

    shaky().write("a/k", b"1")
    shaky().upload("a/l", source)
    assert shaky().read("a/k") == b"1"
    assert shaky().read_range("a/l", start=1, end=3) == b"ar"
    assert shaky().head("a/k") == local_store.head("a/k")
    assert [head.key for head in shaky().list("a/")] == ["a/k", "a/l"]
    assert [head.key for head in shaky().list("a/", after="a/k")] == ["a/l"]
    assert list(shaky().list_folders()) == ["a"]
    shaky().download("a/l", tmp_path / "target")
    assert (tmp_path / "target").read_bytes() == b"large"
    shaky().delete(key for key in ["a/k", "a/l"])
    assert list(local_store.list()) == []
    assert patience.store(local_store).within("a").uri == f"{local_store.uri}/a"


def test_a_conditional_write_whose_answers_were_lost_has_won(
    local_store: Store, patience: Patience
) -> None:
    etag = patience.store(AnswersLost(local_store, 1)).write_if_absent("k", b"1")  # type: ignore[arg-type]
    assert local_store.head("k").etag == etag  # type: ignore[union-attr]
    losing = patience.store(AnswersLost(local_store, 1))  # type: ignore[arg-type]
    assert losing.write_if_match("k", b"2", etag=etag) == local_store.head("k").etag  # type: ignore[union-attr]
    assert local_store.read("k") == b"2"


def test_what_another_has_written_is_not_taken_for_ones_own(
    local_store: Store, patience: Patience
) -> None:
    etag = local_store.write("k", b"another's")
    store = patience.store(local_store)
    with pytest.raises(ObjectExists):
        store.write_if_absent("k", b"another's")
    with pytest.raises(PreconditionFailed):
        store.write_if_match("k", b"mine", etag="older")

    class AwayOnce(AnswersLost):
        def write_if_absent(self, key: str, data: bytes) -> str:
            if self.times:
                self.times -= 1
                raise away()
            return self.store.write_if_absent(key, data)

    with pytest.raises(ObjectExists):
        patience.store(AwayOnce(local_store, 1)).write_if_absent("k", b"mine")  # type: ignore[arg-type]
    assert local_store.head("k").etag == etag  # type: ignore[union-attr]


# ---------------------------------------------------------------------------- a run that waits


def take_stores_away(folder: str, *, after_reads: int, seconds: float) -> None:
    """In this process all stores of local folders below `folder` are away for some seconds, from
    the n-th ranged read on."""
    from cluster.folder import FolderStore

    reads, until = 0, 0.0
    lock = threading.Lock()

    def guarded(name: str) -> None:
        whole = getattr(FolderStore, name)

        def use(self: FolderStore, *arguments: object, **options: object) -> object:
            nonlocal reads, until
            with lock:
                if name == "read_range" and self.uri.startswith(folder):
                    reads += 1
                    if reads == after_reads:
                        until = time.monotonic() + seconds
                is_away = self.uri.startswith(folder) and time.monotonic() < until
            if is_away:
                raise StoreAway(Problem(f"cannot use {self.uri}: it is away"))
            return whole(self, *arguments, **options)

        setattr(FolderStore, name, use)

    for name in ("read", "read_range", "head", "write", "write_if_absent", "upload", "download"):
        guarded(name)


def test_a_run_waits_for_a_data_set_that_is_away_and_is_the_same(scene: Scene) -> None:
    spec = scene.job(workers={"count": 2}, train={"log_rows": True})
    data = str(Path(scene.data["train"]).parent)
    run_ranks(
        assignment_of(spec, "sick"),
        world_size=2,
        before=partial(take_stores_away, data, after_reads=4, seconds=2.5),
    )
    # After the other: what that one has fetched is in the node's cache.
    run_ranks(assignment_of(spec, "calm"), world_size=2)
    assert final_weights(scene.runs, "sick") == final_weights(scene.runs, "calm")
    rows = rows_by_epoch(scene.runs, "sick")
    assert all(set(epoch.values()) == {1} for epoch in rows.values())
    states = [
        (line["state"], line["message"])
        for line in RunReader(scene.runs, "sick").events()
        if line["event"] == "state"
    ]
    waits = [message for state, message in states if state == "RECOVERING"]
    assert waits
    assert all(f"cannot use {data}" in message for message in waits)
    assert any("the store is back after" in message for _, message in states)
    assert states[-1][0] != "RECOVERING"


def test_a_run_whose_data_stays_away_ends_and_says_how_to_go_on(scene: Scene) -> None:
    spec = scene.job(retries={"wait_minutes": 0.01})
    data = str(Path(scene.data["train"]).parent)
    outcome = run_ranks(
        assignment_of(spec, "run"),
        world_size=1,
        before=partial(take_stores_away, data, after_reads=8, seconds=600),
    )
    assert outcome is not None
    assert outcome.failure is not None
    assert outcome.failure.exit_code == 3
    message, hint = outcome.failure.problems[0]
    assert "retries.wait_minutes" in message
    assert "shoal resume" in str(hint)


class AwayOnLastRank:
    """The data set goes away, for good if not told otherwise, when the last rank reads a row group
    of the third step or a later one, once it has done the first."""

    def __init__(self, folder: str, *, seconds: float = 600) -> None:
        self.folder = folder
        self.seconds = seconds

    def __call__(self) -> None:
        worker._LISTEN_SECONDS = 0.1
        os.environ["SHOAL_CACHE"] += os.environ["RANK"]  # so that each rank reads by itself
        if int(os.environ["RANK"]) < int(os.environ["WORLD_SIZE"]) - 1:
            return
        named = RankStream.__init__.__kwdefaults__
        assert "fetch_threads" in named
        named["fetch_threads"] = 1  # so that row groups are read in the order in which they serve
        whole, stepped = VerifiedReader.read, worker._Rank.stepped
        calls = itertools.count(1)
        has_stepped = threading.Event()

        def read(reader: VerifiedReader, group: int) -> pa.Table:
            # A step begins when the rows of the next one are there: 16 rows, in groups of 7.
            if next(calls) == 4:
                assert has_stepped.wait(60), "the first step needs fewer row groups"
                take_stores_away(self.folder, after_reads=1, seconds=self.seconds)
            return whole(reader, group)

        def tell_stepped(rank: worker._Rank, batch: RankBatch, progress: Progress) -> None:
            stepped(rank, batch, progress)
            has_stepped.set()

        VerifiedReader.read = read  # type: ignore[method-assign]
        worker._Rank.stepped = tell_stepped  # type: ignore[method-assign]


@contextlib.contextmanager
def asking(scene: Scene, kind: Literal["stop", "yield"]) -> Iterator[None]:
    """Asks the run once a rank of it says that it waits."""
    is_over = threading.Event()

    def ask() -> None:
        while not is_over.wait(0.1):
            events = RunReader(scene.runs, "run").events()
            if any("waits for the store" in str(line.get("message")) for line in events):
                request = Control(kind=kind, requested_at=0.0, attempt=1, generation=1)
                scene.runs.write(scene.paths().control_request(1), request.to_bytes())
                return

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


@pytest.mark.parametrize(
    ("world_size", "kind", "state"),
    [(1, "stop", State.STOPPED), (2, "stop", State.STOPPED), (2, "yield", State.RECOVERING)],
)
def test_a_request_is_heard_while_a_rank_waits_for_its_rows_and_all_save_one_step(
    scene: Scene, world_size: int, kind: Literal["stop", "yield"], state: State
) -> None:
    spec = scene.job(
        workers={"count": world_size},
        checkpoint={"every_steps": 100},
        data={"validation": None, "test": None, "window": 1, "lanes": world_size},
        train={"log_rows": True},
    )
    away = AwayOnLastRank(str(Path(scene.data["train"]).parent))
    with asking(scene, kind):
        outcomes = run_group(assignment_of(spec, "run"), world_size=world_size, before=away)
    assert {(o.state, o.step) for o in outcomes} == {(state, outcomes[0].step)}, outcomes
    step = outcomes[0].step
    assert 0 < step < 5, "the step under way is finished, and no rows are there for the next"
    assert [m.step for m in read_manifests(scene.runs, scene.paths())] == [step]
    goes_on = assignment_of(spec, "run", generation=2)
    ended = run_ranks(dataclasses.replace(goes_on, controls_seen=1), world_size=world_size)
    assert ended is not None
    assert ended.state is State.SUCCEEDED
    run_ranks(assignment_of(spec, "calm"), world_size=world_size)
    assert final_weights(scene.runs, "run") == final_weights(scene.runs, "calm")
    rows = rows_by_epoch(scene.runs, "run")
    assert all(set(epoch.values()) == {1} for epoch in rows.values())


def test_a_rank_that_waits_does_not_hear_what_was_asked_of_the_driver_before(scene: Scene) -> None:
    spec = scene.job(
        workers={"count": 2},
        data={"validation": None, "test": None, "window": 1, "lanes": 2},
    )
    assignment = dataclasses.replace(assignment_of(spec, "run"), controls_seen=1)
    request = Control(kind="stop", requested_at=0.0)
    scene.runs.write(scene.paths().control_request(1), request.to_bytes())
    away = AwayOnLastRank(str(Path(scene.data["train"]).parent), seconds=3)
    work = partial(train_as_under_torchrun, assignment, away)
    outcomes = on_ranks(work, world_size=2)
    assert {(o.state, o.step) for o in outcomes} == {(State.SUCCEEDED, 10)}
    events = RunReader(scene.runs, "run").events()
    waits = [line for line in events if "waits for the store" in str(line.get("message"))]
    assert {line["rank"] for line in waits} == {1}


def train_as_under_torchrun(
    assignment: Assignment, before: Callable[[], None], session: Session
) -> Outcome:
    """Only the first rank knows the generation and the requests that it does not concern."""
    before()
    if session.rank:
        assignment = dataclasses.replace(assignment, generation=0, controls_seen=0)
    return worker.train_worker(session, assignment)


# --------------------------------------------------------------- a run that waits in an evaluation


class AwayInEvaluation:
    """The validation set goes away for good on some ranks, in their first evaluation on it."""

    def __init__(self, folder: str, *, ranks: tuple[int, ...]) -> None:
        self.folder = folder
        self.ranks = ranks

    def __call__(self) -> None:
        worker._LISTEN_SECONDS = 0.1
        os.environ["SHOAL_CACHE"] += os.environ["RANK"]  # so that each rank reads by itself
        if int(os.environ["RANK"]) not in self.ranks:
            return
        evaluate = worker._Rank.evaluate

        def take_away_and_evaluate(rank: worker._Rank, progress: Progress) -> Evaluation | None:
            take_stores_away(self.folder, after_reads=1, seconds=600)
            return evaluate(rank, progress)

        worker._Rank.evaluate = take_away_and_evaluate  # type: ignore[method-assign]


def evaluated_job(scene: Scene, world_size: int, **parts: Any) -> JobSpec:
    """Ten steps, evaluations after the third, sixth, ninth and last; saved where that is due."""
    return scene.job(
        workers={"count": world_size, **parts.pop("workers", {})},
        checkpoint={"every_steps": 100},
        data={"lanes": 2},
        train={"evaluate_every_steps": 3, "log_rows": True},
        **parts,
    )


def assert_made_up(
    scene: Scene, spec: JobSpec, *, world_size: int, controls_seen: int, generation: int = 2
) -> None:
    """Of the run, broken off after three steps: they are saved, their evaluation is to be made, and
    the next attempt does that first, and ends as a run that was left alone."""
    [saved] = read_manifests(scene.runs, scene.paths())
    assert (saved.step, saved.evaluation, saved.evaluation_pending) == (3, {}, True)
    goes_on = assignment_of(spec, "run", generation=generation)
    goes_on = dataclasses.replace(goes_on, controls_seen=controls_seen)
    outcomes = run_group(goes_on, world_size=world_size)
    assert {outcome.state for outcome in outcomes} == {State.SUCCEEDED}
    last = read_attempts(scene.runs, scene.paths())[-1]
    assert (last.restored_step, last.evaluates_first) == (3, True)
    run_group(assignment_of(spec, "calm"), world_size=world_size)
    run, calm = (
        [line["metrics"] for line in RunReader(scene.runs, name).metrics() if is_evaluation(line)]
        for name in ("run", "calm")
    )
    assert run == calm
    assert final_weights(scene.runs, "run") == final_weights(scene.runs, "calm")
    rows = rows_by_epoch(scene.runs, "run")
    assert all(set(epoch.values()) == {1} for epoch in rows.values())


def is_evaluation(line: Mapping[str, Any]) -> bool:
    return bool(line["kind"] == "evaluation")


@pytest.mark.parametrize(
    ("ranks", "world_size", "kind", "strategy"),
    [
        ((0,), 1, "stop", "ddp"),
        ((0,), 2, "stop", "ddp"),
        ((1,), 2, "yield", "ddp"),
        ((1,), 2, "stop", "fsdp"),
        ((0, 1), 2, "stop", "ddp"),
    ],
)
def test_a_request_is_heard_while_an_evaluation_waits_for_its_rows(
    scene: Scene,
    ranks: tuple[int, ...],
    world_size: int,
    kind: Literal["stop", "yield"],
    strategy: str,
) -> None:
    spec = evaluated_job(scene, world_size, workers={"strategy": strategy})
    away = AwayInEvaluation(scene.data["validation"], ranks=ranks)
    with asking(scene, kind):
        outcomes = run_group(assignment_of(spec, "run"), world_size=world_size, before=away)
    state = State.STOPPED if kind == "stop" else State.RECOVERING
    assert [(o.state, o.step, o.failure) for o in outcomes] == [(state, 3, None)] * world_size
    assert_made_up(scene, spec, world_size=world_size, controls_seen=1)


@pytest.mark.parametrize(("ranks", "world_size"), [((0,), 1), ((0,), 2), ((1,), 2)])
def test_a_run_whose_evaluation_waits_too_long_saves_its_state_and_says_how_to_go_on(
    scene: Scene, ranks: tuple[int, ...], world_size: int
) -> None:
    spec = evaluated_job(scene, world_size, retries={"wait_minutes": 0.01})
    away = AwayInEvaluation(scene.data["validation"], ranks=ranks)
    for outcome in run_group(assignment_of(spec, "run"), world_size=world_size, before=away):
        assert outcome.step == 3
        assert outcome.failure is not None
        assert outcome.failure.exit_code == 3
        assert outcome.failure.where.startswith(f"rank {ranks[0]} ")
        [(message, hint)] = outcome.failure.problems
        assert "retries.wait_minutes" in message
        assert "shoal resume" in str(hint)
    assert_made_up(scene, spec, world_size=world_size, controls_seen=0)


def test_an_evaluation_that_waits_too_long_twice_is_made_up_for_once(scene: Scene) -> None:
    spec = evaluated_job(scene, 1, retries={"wait_minutes": 0.01})
    away = AwayInEvaluation(scene.data["validation"], ranks=(0,))
    for generation in (1, 2):
        [outcome] = run_group(
            assignment_of(spec, "run", generation=generation), world_size=1, before=away
        )
        assert outcome.failure is not None
        assert (outcome.step, outcome.failure.exit_code) == (3, 3)
    assert_made_up(scene, spec, world_size=1, controls_seen=0, generation=3)


def hang_in_evaluation(manifests: Path) -> None:
    """In the first evaluation on validation rows a stop is asked for while a thread reads some; it
    gets no answer before a checkpoint is whole, as in a request that hangs."""
    read, evaluate = VerifiedReader.read, worker._Rank.evaluate
    is_evaluating = threading.Event()

    def tell_and_evaluate(rank: worker._Rank, progress: Progress) -> Evaluation | None:
        is_evaluating.set()
        return evaluate(rank, progress)

    def hang(reader: VerifiedReader, group: int) -> pa.Table:
        if is_evaluating.is_set() and "/validation" in reader._store.uri and group == 0:
            os.kill(os.getpid(), signal.SIGTERM)
            deadline = time.monotonic() + 60
            while not any(manifests.glob("*/manifest.json")):
                if time.monotonic() > deadline:
                    os._exit(1)
                time.sleep(0.05)
        return read(reader, group)

    worker._Rank.evaluate = tell_and_evaluate  # type: ignore[method-assign]
    VerifiedReader.read = hang  # type: ignore[method-assign]


def test_a_request_that_hangs_does_not_keep_a_state_from_being_saved(scene: Scene) -> None:
    spec = evaluated_job(scene, 1)
    hangs = partial(hang_in_evaluation, scene.run_folder() / "checkpoints")
    [outcome] = run_group(assignment_of(spec, "run"), world_size=1, before=hangs)
    assert (outcome.state, outcome.step) == (State.STOPPED, 3)
    assert_made_up(scene, spec, world_size=1, controls_seen=0)


class AwayInTest:
    """The test set goes away for good on the first rank, in the test of the best model."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def __call__(self) -> None:
        os.environ["SHOAL_CACHE"] += os.environ["RANK"]
        worker._LISTEN_SECONDS = 0.1
        test = worker._Rank._test_best

        def take_away_and_test(rank: worker._Rank, progress: Progress) -> dict[str, Any] | None:
            if rank._session.rank == 0:
                shutil.rmtree(os.environ["SHOAL_CACHE"])  # it has the rows of the test before
                take_stores_away(self.folder, after_reads=1, seconds=600)
            return test(rank, progress)

        worker._Rank._test_best = take_away_and_test  # type: ignore[method-assign]


@pytest.mark.parametrize("asks", [True, False])
def test_a_test_that_waits_for_its_rows_ends_and_is_made_by_the_next_attempt(
    scene: Scene, asks: bool
) -> None:
    spec = evaluated_job(scene, 2, retries={"wait_minutes": 30 if asks else 0.01})
    away = AwayInTest(scene.data["test"])
    with asking(scene, "stop") if asks else contextlib.nullcontext():
        outcomes = run_group(assignment_of(spec, "run"), world_size=2, before=away)
    ended = State.STOPPED if asks else State.FAILED_INFRA
    assert [(o.state, o.step, o.test) for o in outcomes] == [(ended, 10, None)] * 2
    goes_on = dataclasses.replace(assignment_of(spec, "run", generation=2), controls_seen=int(asks))
    outcomes = run_group(goes_on, world_size=2)
    [calm, _] = run_group(assignment_of(spec, "calm"), world_size=2)
    assert calm.test is not None
    assert [(o.state, o.step, o.test) for o in outcomes] == [(State.SUCCEEDED, 10, calm.test)] * 2
    assert read_attempts(scene.runs, scene.paths())[-1].restored_step == 10
