"""A rank that hangs: its process ends, with those that wait for it, and says where it stood."""

from __future__ import annotations

import itertools
import os
import queue
import subprocess
import sys
import threading
import time
from typing import Any

import pytest

from cluster.folder import FolderStore
from jobs.record import State
from jobs.runs import RunReader
from tests.ranks import assignment_of, break_group, lose_patience, on_ranks
from tests.scene import Scene
from trainers import preparation, watchdog
from trainers.agreement import Agreement
from trainers.data.stream import RankStream
from trainers.pulse import Pulse
from trainers.saving import Saving
from trainers.session import Session
from trainers.watchdog import HUNG_EXIT_CODE, Hang, Watchdog

HOLDS_THE_LOCK = """
import ctypes
from trainers.watchdog import Watchdog

with Watchdog(limit_seconds=0.5) as watch:
    while not watch.looks:
        pass
    ctypes.PyDLL(None).sleep(100)
"""


@pytest.fixture(autouse=True)
def outlives_a_busy_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits of a tenth of a second, in this very process: where the machine is too busy to look
    within it, the guard against code that keeps the lock would end all tests."""
    monkeypatch.setattr(watchdog.faulthandler, "dump_traceback_later", lambda *_, **__: None)


class Watched:
    """A watchdog that ends nothing; `ended` gives (hang, exit code)."""

    def __init__(self, *, limit_seconds: float) -> None:
        self.ended: queue.Queue[tuple[Hang, int]] = queue.Queue()
        told: list[Hang] = []
        self.watch = Watchdog(
            limit_seconds=limit_seconds, end=lambda code: self.ended.put((told[0], code))
        )
        self.watch.tell = told.append


def sleeps(event: threading.Event) -> None:
    event.wait()


def test_a_process_without_progress_ends_and_says_where_it_stands() -> None:
    watched, woken = Watched(limit_seconds=0.1), threading.Event()
    with watched.watch:
        watchdog.tick("step 7")
        stuck = threading.Thread(target=sleeps, args=(woken,), name="stuck")
        stuck.start()
        hang, code = watched.ended.get(timeout=60)
        woken.set()
        stuck.join()
    assert code == HUNG_EXIT_CODE
    assert hang.doing == "step 7"
    assert hang.seconds >= 0.1
    assert "thread stuck:" in hang.stacks
    assert "in sleeps" in hang.stacks


def test_last_words_that_hang_do_not_keep_the_process(monkeypatch: Any) -> None:
    monkeypatch.setattr(watchdog, "_TELL_SECONDS", 0.1)
    codes: queue.Queue[int] = queue.Queue()
    woken = threading.Event()
    watch = Watchdog(limit_seconds=0.1, end=codes.put)
    watch.tell = lambda _: sleeps(woken)
    with watch:
        assert codes.get(timeout=60) == HUNG_EXIT_CODE
    woken.set()


def test_a_wait_that_somebody_else_bounds_is_no_hang() -> None:
    watched = Watched(limit_seconds=0.1)
    with watched.watch:
        with watchdog.suspended("waits for the store"), watchdog.suspended("and for the disk"):
            time.sleep(0.5)
        assert watched.ended.empty()
        assert watched.ended.get(timeout=60)[0].doing == "starts"


def test_a_rank_may_wait_as_long_as_another_gets_on() -> None:
    watched = Watched(limit_seconds=0.1)
    watched.watch.others = itertools.count().__next__
    with watched.watch:
        time.sleep(0.5)
        assert watched.ended.empty()
        watched.watch.others = lambda: None
        watched.ended.get(timeout=60)


def test_nothing_is_watched_outside() -> None:
    watchdog.tick("reads rows")
    with watchdog.suspended("waits"):
        pass


def test_code_that_keeps_the_interpreters_lock_is_ended_too() -> None:
    done = subprocess.run(
        [sys.executable, "-c", HOLDS_THE_LOCK], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    assert "Timeout" in done.stderr
    assert 'File "<string>", line 8' in done.stderr


class HearsOfOthers:
    """Rank 1 hears again and again that rank 0 gets on, though it only waits for something."""

    def __call__(self, session: Session) -> None:
        agreement = Agreement(rank=session.rank, world_size=session.world_size)
        watch = Watchdog(limit_seconds=2)  # for how often the others are asked; nobody looks on
        with Pulse(watch, rank=session.rank, world_size=session.world_size):
            if session.rank == 0:
                with watch.suspended("waits for the store"):
                    agreement.barrier()
                return
            heard = set[object]()
            while len(heard) < 4:
                heard.add(watch.others())
                time.sleep(0.05)
            agreement.barrier()


def test_ranks_hear_of_each_others_progress() -> None:
    on_ranks(HearsOfOthers(), world_size=2)


class FetchHangs:
    """Rank 1 waits for ever for its batch of the fourth step."""

    def __call__(self) -> None:
        whole = RankStream.batches

        def batches(stream: RankStream, **where: Any) -> Any:
            for number, batch in enumerate(whole(stream, **where), start=1):
                if number == 4:
                    lose_patience()
                    if os.environ["RANK"] == "1":
                        sleeps(threading.Event())
                yield batch

        RankStream.batches = batches  # type: ignore[method-assign]


class UploadHangs:
    """The store never answers to the first checkpoint, which the second one waits for."""

    def __call__(self) -> None:
        whole, waits = Saving._settle, 0

        def settle(saving: Saving) -> bool:
            nonlocal waits
            waits += 1
            if waits == 2:
                lose_patience()
            return whole(saving)

        def write(store: Any, key: str, data: Any) -> Any:
            if "/checkpoints/" in key:
                sleeps(threading.Event())
            return whole_write(store, key, data)

        whole_write = FolderStore.write
        FolderStore.write = write  # type: ignore[method-assign,assignment]
        Saving._settle = settle  # type: ignore[method-assign]


class StartHangs:
    """Rank 1 waits for ever for its model."""

    def __call__(self) -> None:
        if os.environ["RANK"] == "1":
            preparation.pretrained_folder = lambda *_, **__: sleeps(threading.Event())


def test_a_fetch_that_hangs_ends_all_ranks_and_the_run_goes_on(scene: Scene) -> None:
    spec = scene.job(workers={"count": 2}, checkpoint={"every_steps": 2})
    codes = break_group(assignment_of(spec, "run"), world_size=2, before=FetchHangs(), until=2)
    assert HUNG_EXIT_CODE in codes.values()

    reader = RunReader(scene.runs, "run")
    crash = reader.crashes()[1]
    assert crash.failure.state is State.FAILED_INFRA
    assert not crash.failure.is_of_place
    assert "no progress for" in crash.reason
    logs = [line for line in reader.log_lines(rank=1).new() if "no progress" in line["message"]]
    assert "reads rows" in logs[0]["message"]
    assert "in sleeps" in logs[0]["message"]

    with_one = spec.model_copy(update={"workers": spec.workers.model_copy(update={"count": 1})})
    with_one = with_one.model_copy(update={"data": with_one.data.model_copy(update={"lanes": 2})})
    assert scene.train(with_one, generation=2).state is State.SUCCEEDED
    assert reader.attempts()[1].restored_step == 2
    assert any(f"broke off: {crash.reason}" in str(e["message"]) for e in reader.events())


def test_an_upload_that_hangs_ends_all_ranks(scene: Scene) -> None:
    spec = scene.job(workers={"count": 2}, checkpoint={"every_steps": 2})
    codes = break_group(assignment_of(spec, "run"), world_size=2, before=UploadHangs(), until=2)
    assert HUNG_EXIT_CODE in codes.values()
    crash = RunReader(scene.runs, "run").crashes()[1]
    assert "waits for the checkpoint under way" in crash.reason


def test_a_start_that_hangs_ends_all_ranks(scene: Scene) -> None:
    spec = scene.job(workers={"count": 2}, retries={"hang_minutes": 0.03})
    codes = break_group(assignment_of(spec, "run"), world_size=2, before=StartHangs(), until=2)
    assert HUNG_EXIT_CODE in codes.values()
