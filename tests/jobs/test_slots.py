"""The slots of a study: their room, their number, and what the process of one does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.storage import Store, StoreAway, open_store
from jobs.record import Failure, Outcome, RunPaths, State
from jobs.search import make_engine, slot_resources
from jobs.spec import JobSpec
from jobs.study import room as rooms
from jobs.study import slot as slots
from jobs.study.desk import Desk, most_slots
from jobs.study.log import StudyLog
from jobs.study.room import fewer_slots
from jobs.study.slot import Answer, Gone, Note, SlotWork, Told, Train, Wait
from jobs.study.trials import Trials
from jobs.submit import request_stop
from tests.tiny import tiny_job
from tests.trainers.test_notices import Told as Remembers
from trainers import ray_trial
from trainers.assignment import Assignment, EvaluationReport, TrialPlan, Verdict
from trainers.controls import requests_to
from trainers.notices import Told as Ear
from trainers.trial_folder import prepare_trial

SPACE = {"model.dropout": {"uniform": [0, 0.1]}}


def job(folder: Path, *, workers: Any = None, **keys: Any) -> JobSpec:
    data = {"train": str(folder / "train"), "validation": str(folder / "validation")}
    parts = {"workers": workers or {}, "search": {"space": SPACE, **keys}}
    return tiny_job(folder / "model", data, str(folder / "runs"), **parts)


# -------------------------------------------------------------------------------- room and number


def test_a_slot_has_the_room_of_its_trials(tmp_path: Path) -> None:
    alone = slot_resources(job(tmp_path, workers={"cpus": 2, "gpus": 1}))
    assert alone.bundles == [{"CPU": 2.0, "GPU": 1.0}]
    shared = slot_resources(job(tmp_path, workers={"gpus": 1}, gpu_share=0.25))
    assert shared.bundles == [{"CPU": 1.0, "GPU": 0.25}]
    several = slot_resources(job(tmp_path, workers={"count": 3, "cpus": 2}))
    assert several.bundles == [{"CPU": 2.0}] * 3  # none for the slot itself
    assert several.head_bundle_is_empty
    assert several.strategy == "PACK"


def slots_of(spec: JobSpec) -> int:
    assert spec.search is not None
    return most_slots(spec, Trials(spec.search))


def test_there_are_no_more_slots_than_trials_or_than_the_job_allows(tmp_path: Path) -> None:
    assert slots_of(job(tmp_path, trials=5, repeats=3, scheduler=None)) == 15
    assert slots_of(job(tmp_path, trials=5, max_concurrent=2)) == 2
    assert slots_of(job(tmp_path, trials=5, max_concurrent=9)) == 5
    assert slots_of(job(tmp_path, trials=100_000)) == 1024


def test_why_there_are_fewer_slots_is_told_with_the_room() -> None:
    assert fewer_slots(2, 8, room=2, room_now=2) == "; 2 of 8 slots: room for 2"
    assert fewer_slots(2, 8, room=4, room_now=3) == (
        "; 2 of 8 slots: room for 4, of which something else holds part"
    )
    assert fewer_slots(2, 8, room=12, room_now=9) == "; 2 of 8 slots: room for 12"


@pytest.fixture
def one_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A Ray that takes this machine to have a GPU; the process of a job sees none."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    ray.init(address="local", num_cpus=3, num_gpus=1, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.mark.usefixtures("one_gpu")
def test_two_trials_share_a_gpu_and_a_third_waits(tmp_path: Path) -> None:
    room = slot_resources(job(tmp_path, workers={"gpus": 1}, gpu_share=0.5))
    slots = {slot.ready(): slot for slot in (room.to_placement_group() for _ in range(3))}
    ready, waiting = ray.wait(list(slots), num_returns=2, timeout=60)
    assert len(ready) == 2
    assert not ray.wait(waiting, timeout=1)[0]
    placed = [slots[is_ready] for is_ready in ready]
    assert [seen_in(slot) for slot in placed] == [[0], [0]]
    ray.util.remove_placement_group(placed[0])
    assert ray.wait(waiting, timeout=60)[0]


def seen_in(slot: PlacementGroup) -> list[int]:
    place = PlacementGroupSchedulingStrategy(slot, placement_group_bundle_index=0)
    work = ray.remote(lambda: ray.get_gpu_ids())
    found: list[int] = ray.get(
        work.options(num_cpus=1, num_gpus=0.5, scheduling_strategy=place).remote()
    )
    return found


# ------------------------------------------------------------------------------------- the desk


def desk_of(spec: JobSpec, told: Remembers) -> tuple[Desk, Store]:
    store = open_store(spec.store.uri)
    log = StudyLog(store, RunPaths("study"), generation=1)
    engine = make_engine(spec, log, is_saved=lambda trial, step: True)
    assignment = Assignment(spec, "study", 1, controls_seen=0)
    return Desk(assignment, store, engine, told), store  # type: ignore[arg-type]


def test_a_trial_that_is_given_out_as_the_study_is_stopped_hears_of_it(tmp_path: Path) -> None:
    desk, store = desk_of(job(tmp_path), Remembers())
    paths = RunPaths("study/trials/0000")
    request_stop(store, paths.run_id, by="who stopped the study before it was resumed")
    train = desk._next("a")
    assert isinstance(train, Train)
    desk._stop(State.STOPPED)
    prepare_trial(store, train.assignment)  # in the slot, which is slower
    after = train.assignment.controls_seen
    assert after == 1
    assert requests_to(store, paths, after=after, attempt=1, generation=1).stop


def test_the_studys_state_says_why_it_has_fewer_slots_than_it_could_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = Remembers()
    desk, _ = desk_of(job(tmp_path, trials=5, workers={"count": 2}), told)
    monkeypatch.setattr(rooms, "_SLOT_SECONDS", 0.0)
    monkeypatch.setattr(rooms, "staying_nodes", lambda: [{"CPU": 3.0}, {"CPU": 1.0}])
    free = [{"CPU": 1.0}, {"CPU": 1.0}]
    monkeypatch.setattr(rooms, "free_on_nodes", lambda: free)
    desk._slots.add("a")
    desk._next("a")
    desk._tell()
    desk._say_room()
    assert told.lines[-1][1].endswith("; 1 of 5 slots: room for 2")
    free[1]["CPU"] = 0.0
    desk._say_room()
    assert told.lines[-1][1].endswith("room for 2, of which something else holds part")
    said = len(told.lines)
    desk._slots.add("b")  # which has no trial: no other slot could be used
    desk._say_room()
    assert len(told.lines) == said


# ------------------------------------------------------------------- a trial with several workers


class Workers:
    """Instead of those of Ray Train: they do as `does` says, and remember how they were started."""

    def __init__(
        self, does: Callable[[Callable[[EvaluationReport], Verdict], Ear], Outcome | Failure]
    ) -> None:
        self._does = does
        self.started: list[tuple[str, dict[str, Any]]] = []

    def __call__(
        self,
        assignment: Assignment,
        exchange: Callable[[EvaluationReport], Verdict],
        told: Ear,
        **how: Any,
    ) -> Outcome | Failure:
        self.started.append((assignment.run_id, how))
        return self._does(exchange, told)


def report(step: int) -> EvaluationReport:
    return EvaluationReport(step, 8, step / 4, value=0.5, best=0.5, is_last=step == 8)


def order(folder: Path, *, until: float) -> Train:
    spec = job(folder, workers={"count": 2}).model_copy(update={"search": None})
    plan = TrialPlan("study", "validation/loss", "min", leg=2)
    return Train(Assignment(spec, "study/trials/0003", 1, 0, trial=plan), until)


def test_the_workers_of_a_trial_report_through_their_slot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def does(exchange: Callable[[EvaluationReport], Verdict], told: Ear) -> Outcome:
        assert exchange(report(2)) is Verdict.GO_ON  # before the slot is to report
        told.state(State.RECOVERING, "rank 1 failed", step=2)
        assert exchange(report(4)) is Verdict.GO_ON
        assert exchange(report(4)) is Verdict.GO_ON  # again, after a restart: it was answered
        assert exchange(report(8)) is Verdict.PAUSE
        return Outcome(attempt=2, state=State.RECOVERING, step=8)

    workers = Workers(does)
    monkeypatch.setattr(ray_trial, "fit_trial", workers)
    slot = SlotWork(python="python --forked", is_own_cluster=False)
    slot.hear(order(tmp_path, until=0.5))
    assert slot.say() == Note("rank 1 failed")
    slot.hear(Wait())
    told = slot.say()
    assert isinstance(told, Told)
    assert told.report.step == 4
    slot.hear(Answer("continue", 1.0))
    told = slot.say()
    assert isinstance(told, Told)
    assert told.report.step == 8
    slot.hear(Answer("pause", None))
    gone = slot.say()
    assert isinstance(gone, Gone)
    assert gone.outcome is not None
    assert gone.outcome.state is State.RECOVERING
    how = {"python": "python --forked", "is_own_cluster": False}
    assert workers.started == [("study/trials/0003", how)]
    assert (tmp_path / "runs" / RunPaths("study/trials/0003").spec).exists()


def test_what_ends_the_workers_for_good_is_a_failure_that_the_trials_retries_pay_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failure = Failure(state=State.FAILED_INFRA, problems=(("rank 0 died", None),))
    monkeypatch.setattr(ray_trial, "fit_trial", Workers(lambda *_: failure))
    slot = SlotWork()
    slot.hear(order(tmp_path, until=1.0))
    assert slot.say() == Gone(None, failure)


def test_a_store_that_stays_away_from_the_slot_is_the_places_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: Any) -> None:
        raise StoreAway("the store has not answered")

    monkeypatch.setattr(slots, "prepare_trial", away)
    slot = SlotWork()
    slot.hear(order(tmp_path, until=1.0))
    gone = slot.say()
    assert isinstance(gone, Gone)
    assert gone.crash is not None
    assert gone.crash.is_of_place


def test_a_hopeless_trial_is_not_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failure = Failure(state=State.FAILED_USER, problems=(("validation/loss is nan", None),))
    outcome = Outcome(attempt=1, state=State.FAILED_USER, step=3, failure=failure)
    monkeypatch.setattr(ray_trial, "fit_trial", Workers(lambda *_: outcome))
    slot = SlotWork()
    slot.hear(order(tmp_path, until=1.0))
    assert slot.say() == Gone(outcome)
    assert (tmp_path / "runs" / RunPaths("study/trials/0003").result).exists()
