"""Records by which a run's lineage is known: no damage of them is believed, and each is named."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from cluster.lease import acquire
from cluster.storage import DamagedObject, Store
from jobs.errors import render_error
from jobs.record import Attempt, Lease, Outcome, RunPaths, SealedRecord, State
from jobs.runs import RunReader
from tests.scene import Scene
from trainers.fence import Fence
from trainers.finish import build_result
from trainers.records import outcome_of, read_attempts

PATHS = RunPaths("run")
ATTEMPT = Attempt(attempt=2, generation=1, world_size=2, restored_step=40, started_at=1.5)
OUTCOME = Outcome(attempt=2, state=State.STOPPED, step=60, seconds={"start": 1.0})
LEASE = Lease(generation=3, holder="h", host="node-7", pid=9, renewals=4, ttl_seconds=60.0)


class SpoiltReads:
    """A store whose next reads give bytes in which one digit differs."""

    def __init__(self, store: Store, times: int) -> None:
        self._store = store
        self.times = times

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def read(self, key: str) -> bytes:
        data = self._store.read(key)
        self.times -= 1
        return data.replace(b"40", b"90", 1) if self.times >= 0 else data


@pytest.mark.parametrize("record", [ATTEMPT, OUTCOME, LEASE], ids=["attempt", "outcome", "lease"])
def test_no_flipped_bit_and_no_missing_end_is_believed(record: SealedRecord) -> None:
    held = record.to_bytes()
    assert type(record).model_validate_json(held) == record
    num_found = 0
    for bit in range(8 * len(held)):
        flipped = bytearray(held)
        flipped[bit // 8] ^= 1 << bit % 8
        try:
            # Harmless: JSON's layout, and the name of the digest.
            assert type(record).model_validate_json(bytes(flipped)) == record
        except ValidationError:
            num_found += 1
    assert num_found > 7.2 * len(held)
    for end in range(len(held)):
        with pytest.raises(ValidationError):
            type(record).model_validate_json(held[:end])


def test_an_attempt_that_was_spoilt_on_its_way_is_read_again(local_store: Store) -> None:
    local_store.write(PATHS.attempt(2), ATTEMPT.to_bytes())
    assert read_attempts(SpoiltReads(local_store, 2), PATHS) == [ATTEMPT]  # type: ignore[arg-type]
    with pytest.raises(DamagedObject):
        read_attempts(SpoiltReads(local_store, 3), PATHS)  # type: ignore[arg-type]
    reader = RunReader(SpoiltReads(local_store, 2), "run")  # type: ignore[arg-type]
    assert reader.attempts() == [ATTEMPT]
    assert reader.problems == []


def test_a_damaged_record_is_named_with_a_way_out(local_store: Store) -> None:
    for key in (PATHS.attempt(2), PATHS.outcome(2), PATHS.lease):
        local_store.write(key, b'{"attempt": 2, "gen')
    for use, key, way_out in (
        (lambda: read_attempts(local_store, PATHS), PATHS.attempt(2), "an older version"),
        (lambda: outcome_of(local_store, PATHS, 2), PATHS.outcome(2), "shoal resume"),
        (
            lambda: acquire(local_store, PATHS.lease, ttl_seconds=60),
            PATHS.lease,
            "an older version",
        ),
        (Fence(local_store, PATHS, generation=3).check, PATHS.lease, "an older version"),
    ):
        with pytest.raises(DamagedObject) as caught:
            use()  # type: ignore[operator]
        text = render_error(caught.value)
        assert f"{local_store.uri}/{key} is damaged" in text
        assert way_out in text


def test_a_run_whose_attempt_is_damaged_says_so_and_goes_on_once_it_is_mended(
    scene: Scene,
) -> None:
    spec = scene.job()
    trained = scene.train(spec)
    key = PATHS.attempt(1)
    whole = scene.runs.read(key)
    scene.runs.write(key, whole.replace(b'"restored_step": null', b'"restored_step": 5'))
    outcome = scene.train(spec, generation=2)
    assert (outcome.state, outcome.attempt) == (State.FAILED_INFRA, 0)
    assert outcome.failure is not None
    assert "attempts/0001.json is damaged" in outcome.failure.problems[0][0]
    result = build_result(scene.runs, PATHS, generation=2, ended=outcome)
    assert result.failure == outcome.failure
    assert result.last_checkpoint is None
    cannot_tell = build_result(scene.runs, PATHS, generation=2, ended=trained)
    assert (cannot_tell.state, cannot_tell.last_checkpoint) == (State.FAILED_INFRA, None)
    scene.runs.write(key, whole)
    assert scene.train(spec, generation=2).state is State.SUCCEEDED
    assert [a.restored_step for a in read_attempts(scene.runs, PATHS)] == [None, 10]


def test_a_run_that_evaluates_nothing_has_no_best_checkpoint(scene: Scene) -> None:
    trained = scene.train(scene.job(data={"validation": "", "test": ""}))
    result = build_result(scene.runs, PATHS, generation=1, ended=trained)
    assert (result.state, result.best_checkpoint) == (State.SUCCEEDED, None)
    assert result.last_checkpoint == "checkpoints/step-00000010-attempt-0001"
