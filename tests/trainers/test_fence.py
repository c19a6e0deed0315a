"""A generation that was superseded commits nothing more, and what it did begin does not count."""

from __future__ import annotations

import contextlib
import threading
from functools import partial

import pytest

from cluster.folder import FolderStore
from cluster.storage import DamagedObject, Store, open_store
from jobs.record import (
    Attempt,
    Lease,
    Outcome,
    Result,
    RunPaths,
    State,
    lineage,
    rightful,
)
from tests.ranks import assignment_of, run_group
from tests.scene import Scene
from trainers import controls, worker
from trainers.fence import Fence, Superseded
from trainers.finish import write_result
from trainers.records import read_attempts, read_manifests, read_result

PATHS = RunPaths("run")


def lease(generation: int) -> Lease:
    return Lease(
        generation=generation, holder="h", host="node-7", pid=9, renewals=0, ttl_seconds=60.0
    )


def attempt(number: int, generation: int, restored_step: int | None) -> Attempt:
    return Attempt(
        attempt=number, generation=generation, world_size=1, restored_step=restored_step,
        started_at=0.0,
    )  # fmt: skip


def test_a_fence_closes_once_a_newer_generation_has_the_lease(store: Store) -> None:
    fence = Fence(store, PATHS, generation=3)
    fence.check()
    for generation in (2, 3):
        store.write(PATHS.lease, lease(generation).to_bytes())
        fence.check()
    store.write(PATHS.lease, lease(4).to_bytes())
    with pytest.raises(Superseded, match=r"driven by process 9 on node-7 \(generation 4\)"):
        fence.check()


def test_what_a_superseded_driver_begins_late_is_not_in_the_lineage() -> None:
    attempts = [attempt(1, 1, None), attempt(2, 2, 5), attempt(3, 1, 10), attempt(4, 2, 15)]
    assert [a.attempt for a in rightful(attempts)] == [1, 2, 4]
    assert lineage(attempts) == [(1, 0, 5), (2, 5, 15), (4, 15, None)]


def take_over(store_uri: str) -> None:
    """In this process, rank 0 finds after step 7 that another driver has taken the run."""
    stepped = worker._Rank.stepped

    def then_lose(self, batch, progress) -> None:  # type: ignore[no-untyped-def]
        stepped(self, batch, progress)
        if progress.step == 7 and self._session.rank == 0:
            open_store(store_uri).write(PATHS.lease, lease(2).to_bytes())

    worker._Rank.stepped = then_lose  # type: ignore[method-assign]


def assert_superseded(outcome: Outcome) -> None:
    assert outcome.failure is not None
    assert outcome.state is State.FAILED_INFRA
    assert "generation 1 of the run was superseded" in outcome.failure.problems[0][0]


def test_ranks_of_a_superseded_driver_end_in_the_midst_of_training(scene: Scene) -> None:
    spec = scene.job(workers={"count": 2}, train={"epochs": 100_000})
    before = partial(take_over, str(scene.runs_folder))
    for outcome in run_group(assignment_of(spec, "run"), world_size=2, before=before):
        assert_superseded(outcome)
    assert {m.step for m in read_manifests(scene.runs, PATHS)} <= {5}


def test_a_superseded_driver_commits_no_last_state(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Too busy to listen: only the commit itself finds out.
    monkeypatch.setattr(controls, "POLL_SECONDS", 600.0)
    monkeypatch.setattr(worker._Rank, "stepped", worker._Rank.stepped)  # put back afterwards
    take_over(str(scene.runs_folder))
    assert_superseded(scene.train(scene.job()))
    assert {m.step for m in read_manifests(scene.runs, PATHS)} <= {5}


def test_no_rank_of_a_superseded_driver_begins_an_attempt(scene: Scene) -> None:
    scene.runs.write(PATHS.lease, lease(2).to_bytes())
    outcomes = run_group(assignment_of(scene.job(workers={"count": 2}), "run"), world_size=2)
    for outcome in outcomes:
        assert_superseded(outcome)
    assert read_attempts(scene.runs, PATHS) == []


def test_an_attempt_whose_number_a_superseded_driver_takes_first_gets_the_next(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_if_absent = FolderStore.write_if_absent

    def be_late(store: FolderStore, key: str, data: bytes) -> str:
        if key == PATHS.attempt(1) and store.head(key) is None:
            write_if_absent(store, key, attempt(1, 1, None).to_bytes())
        return write_if_absent(store, key, data)

    monkeypatch.setattr(FolderStore, "write_if_absent", be_late)
    assignment_of(scene.job(), "run")
    assert scene.train(scene.job(), generation=2).state is State.SUCCEEDED
    assert [(a.attempt, a.generation) for a in read_attempts(scene.runs, PATHS)] == [(1, 1), (2, 2)]


def result(generation: int, state: State = State.SUCCEEDED) -> Result:
    return Result(
        run_id="run", state=state, generation=generation, step=1, finished_at=0.0,
        best_checkpoint=None, last_checkpoint=None,
        outcome=Outcome(attempt=1, state=state, step=1), failure=None,
    )  # fmt: skip


def test_a_late_result_does_not_replace_that_of_a_newer_driver(store: Store) -> None:
    for generation in (1, 1, 3):
        write_result(store, PATHS, result(generation))
    with pytest.raises(Superseded, match="generation 3 has ended it as SUCCEEDED"):
        write_result(store, PATHS, result(2, State.STOPPED))
    assert Result.model_validate_json(store.read(PATHS.result)).generation == 3


@pytest.mark.parametrize(
    ("whole", "damaged"),
    [(b'"generation": 1', b'"generation": 9'), (b'"step"', b'"stop"'), (b"\n}", b"")],
    ids=["a generation", "a name", "its end"],
)
def test_a_damaged_result_is_believed_by_nobody_and_written_anew(
    store: Store, whole: bytes, damaged: bytes
) -> None:
    write_result(store, PATHS, result(1))
    data = store.read(PATHS.result)
    assert whole in data
    store.write(PATHS.result, data.replace(whole, damaged))
    with pytest.raises(DamagedObject, match=r"result\.json is damaged"):
        read_result(store, PATHS)
    write_result(store, PATHS, result(2))
    assert read_result(store, PATHS) == result(2)


def test_of_results_that_are_written_at_once_the_newest_stays(local_store: Store) -> None:
    barrier = threading.Barrier(4)

    def write(generation: int) -> None:
        barrier.wait()
        with contextlib.suppress(Superseded):
            write_result(local_store, PATHS, result(generation))

    threads = [threading.Thread(target=write, args=(number,)) for number in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert Result.model_validate_json(local_store.read(PATHS.result)).generation == 4
