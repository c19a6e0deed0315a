"""The desk of a study: what slots are told after what they say. No Ray is started."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("ray")

from synthetic import START, SyntheticRun, make_spec

from cluster.storage import ObjectMissing, Store, StoreAway
from jobs.errors import ClusterError, EnvironmentFault, SpecError
from jobs.record import Attempt, Failure, Outcome, RunPaths, State
from jobs.search import make_engine
from jobs.spec import JobSpec
from jobs.study import desk as desks
from jobs.study import setbacks
from jobs.study import slot as slots
from jobs.study.desk import Desk
from jobs.study.engine import Report
from jobs.study.events import Asked, Extended, Failed, Lost, Refused
from jobs.study.extension import request_extension
from jobs.study.log import StudyLog, StudySuperseded, read_events
from jobs.study.slot import Answer, Free, Gone, Told, Train, Wait
from trainers.assignment import Assignment
from trainers.finish import build_result

PATHS = RunPaths("study")


class Ear:
    """Telemetry that is listened to."""

    def __init__(self) -> None:
        self.told: list[tuple[str, str]] = []
        self.tracked: list[Any] = []

    def event(self, event: str, message: str, **fields: Any) -> None:
        self.told.append((event, message))

    def state(self, state: State, message: str, **fields: Any) -> None:
        self.told.append((state.value, message))

    def track(self, happening: Any) -> None:
        self.tracked.append(happening)


def study_spec(*, test: bool = False, **search: Any) -> JobSpec:
    return make_spec(
        search={
            "metric": "validation/f1",
            "space": {"optimizer.learning_rate": {"loguniform": [1e-5, 1e-1]}},
            "algorithm": "random",
            "scheduler": None,
            "trials": 3,
            "finalists": None,
            "baseline": False,
        }
        | search,
        workers={"count": 1},
        data={
            "train": "s3://lake/reviews/train",
            "validation": "s3://lake/reviews/validation",
            "seed": 7,
        }
        | ({"test": "s3://lake/reviews/test"} if test else {}),
    )


@pytest.fixture
def opened(local_store: Store) -> Callable[..., Desk]:
    """A desk of the next driver of the study in the store; `desk._telemetry` is an Ear."""
    generation = 0

    def open_desk(**search: Any) -> Desk:
        nonlocal generation
        generation += 1
        spec = study_spec(**search)
        log = StudyLog(local_store, PATHS, generation=generation)
        engine = make_engine(spec, log, is_saved=lambda trial, step: True)
        assignment = Assignment(spec, PATHS.run_id, generation, 0)
        return Desk(assignment, local_store, engine, Ear())  # type: ignore[arg-type]

    return open_desk


def trained(desk: Desk, slot: str, value: float | None) -> Any:
    """What a slot is told after it has trained the trial that it was given to its end."""
    report = Report(step=300, fraction=1.0, epochs=3.0, value=value, best=value, seconds=1.0)
    answer = desk.hear(slot, Told(report))
    assert answer == Answer("finish", None)
    return desk.hear(slot, Gone(Outcome(attempt=1, state=State.SUCCEEDED, step=300)))


def broke(message: str) -> Gone:
    failure = Failure(state=State.FAILED_USER, problems=((message, "lower it"),))
    return Gone(Outcome(attempt=1, state=failure.state, step=0, failure=failure))


def warnings(desk: Desk) -> list[str]:
    return [message for kind, message in desk._telemetry.told if kind == "warning"]  # type: ignore[attr-defined]


def test_a_request_for_more_trials_is_met_once(
    opened: Callable[..., Desk], local_store: Store
) -> None:
    request_extension(local_store, PATHS, trials=5, space=None, by="me")
    desk = opened()
    desk.hear_extensions()
    desk.hear_extensions()
    narrow = {"optimizer.learning_rate": {"loguniform": [1e-3, 1e-2]}}
    request_extension(local_store, PATHS, trials=6, space=narrow, by="me")
    opened().hear_extensions()
    later = opened()
    later.hear_extensions()
    met = [e for e in read_events(local_store, PATHS) if isinstance(e, Extended)]
    assert [(e.trials, e.request, e.space) for e in met] == [(5, 1, None), (6, 2, narrow)]
    order = later.hear("a", Free())
    assert isinstance(order, Train)
    assert 1e-3 <= order.assignment.spec.optimizer.learning_rate <= 1e-2


@pytest.mark.parametrize(
    ("keys", "trials", "why"),
    [
        ({}, 2, "2 trials in all are asked for, but the study has 3"),
        ({"scheduler": "pbt", "trials": 8}, 16, "whose population cannot grow"),
    ],
)
def test_a_request_that_the_study_cannot_meet_is_refused_once(
    opened: Callable[..., Desk], local_store: Store, keys: dict[str, Any], trials: int, why: str
) -> None:
    request_extension(local_store, PATHS, trials=trials, space=None, by="me")
    desk = opened(**keys)
    desk.hear_extensions()
    desk.hear_extensions()
    (warning,) = warnings(desk)
    assert why in warning
    (refused,) = [e for e in read_events(local_store, PATHS) if isinstance(e, Refused)]
    assert refused.request == 1
    assert why in refused.reason
    following = opened(**keys)
    following.hear_extensions()
    assert warnings(following) == []


def test_a_request_that_its_budget_does_not_allow_is_refused(
    opened: Callable[..., Desk], local_store: Store
) -> None:
    budget = {"epochs": 5.5}
    desk = opened(budget=budget)
    desk.hear("a", Free())
    trained(desk, "a", 0.5)
    request_extension(local_store, PATHS, trials=9, space=None, by="me")
    desk.hear_extensions()  # nearly half of the budget is left
    assert trained(desk, "a", 0.7) is None
    for later in (budget, {"epochs": 20}):
        request_extension(local_store, PATHS, trials=11, space=None, by="me")
        opened(budget=later).hear_extensions()
    answers = [e for e in read_events(local_store, PATHS) if isinstance(e, Extended | Refused)]
    assert [(type(e), e.request) for e in answers if e.request] == [
        (Extended, 1), (Refused, 2), (Extended, 3),
    ]  # fmt: skip
    assert isinstance(answers[1], Refused)
    assert answers[1].reason.startswith("search.budget.epochs (5.5) is used up, so the study")


def test_a_request_at_the_last_moment_is_met_or_waits_for_the_next_driver(
    opened: Callable[..., Desk], local_store: Store
) -> None:
    desk = opened(trials=1)
    assert isinstance(desk.hear("a", Free()), Train)
    request_extension(local_store, PATHS, trials=2, space=None, by="me")
    order = trained(desk, "a", 0.5)
    assert isinstance(order, Train)
    assert order.assignment.run_id == "study/trials/0001"
    assert trained(desk, "a", 0.7) is None
    assert desk.is_over
    request_extension(local_store, PATHS, trials=3, space=None, by="me")
    desk.hear_extensions()
    assert desk.ended().state is State.SUCCEEDED
    assert desk.ended().trial == 1
    following = opened(trials=1)
    following.hear_extensions()
    order = following.hear("a", Free())
    assert isinstance(order, Train)
    assert order.assignment.run_id == "study/trials/0002"


def test_what_the_first_trial_has_measured_is_in_the_jobs_of_the_later_ones(
    opened: Callable[..., Desk], local_store: Store
) -> None:
    desk = opened()
    first, second = desk.hear("a", Free()), desk.hear("b", Free())
    assert isinstance(first, Train)
    assert isinstance(second, Train)
    for number, found in ((0, 300), (1, 500)):
        attempt = Attempt(
            attempt=1,
            generation=1,
            world_size=1,
            restored_step=None,
            started_at=START,
            launch_tokens=found,
        )
        local_store.write(PATHS.trial(number).attempt(1), attempt.to_bytes())
    third = trained(desk, "a", 0.5)
    assert isinstance(third, Train)
    jobs = [order.assignment.spec.batching for order in (first, second, third)]
    assert [job.launch_tokens for job in jobs] == ["auto", "auto", 300]
    assert jobs[2].max_tokens_per_microbatch == 8192  # which the job says
    # The second goes on with what it measured itself; a new driver knows as much.
    desk.hear("b", Gone(None, Failure.of(OSError("gone"), where="slot")))
    again = opened()
    orders = [again.hear(slot, Free()) for slot in "ab"]
    assert [order.assignment.spec.batching.launch_tokens for order in orders] == [  # type: ignore[union-attr]
        "auto",
        300,
    ]


def test_values_that_make_no_job_fail_their_trial_alone(
    opened: Callable[..., Desk], local_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_with, made = desks.job_with, []

    def refusing(*arguments: Any, **named: Any) -> JobSpec:
        made.append(arguments)
        if len(made) == 1:
            raise SpecError("three keys cannot go together")
        return job_with(*arguments, **named)

    monkeypatch.setattr(desks, "job_with", refusing)
    desk = opened()
    order = desk.hear("a", Free())
    assert isinstance(order, Train)
    assert order.assignment.run_id == "study/trials/0001"
    failed = [e for e in read_events(local_store, PATHS) if isinstance(e, Failed)]
    assert [(e.trial, e.failure.state) for e in failed] == [(0, State.FAILED_SPEC)]
    assert "trial 0 failed: three keys" in desk._engine.trials.summary()


def test_a_study_whose_trials_all_fail_alike_stops_with_their_failure(
    opened: Callable[..., Desk], local_store: Store
) -> None:
    desk = opened(trials=50)
    order = desk.hear("a", Free())
    for step in range(3):
        assert isinstance(order, Train)
        order = desk.hear("a", broke(f"the loss is not finite at step {step}"))
    assert order is None
    assert desk.is_over
    ended = desk.ended()
    assert ended.state is State.FAILED_USER
    assert ended.failure is not None
    assert ended.failure.exit_code == 1
    assert "3 trials failed alike, and none has reported: the loss" in ended.failure.problems[0][0]
    assert sum(isinstance(e, Asked) for e in read_events(local_store, PATHS)) == 3


@pytest.mark.parametrize(
    ("says", "message"),
    [
        (["out of memory"] * 2, "the study has lost all 2 trials, the first as: out of memory"),
        ([None, None], "no trial has had a validation/f1 that is a number before the search ended"),
        (["out of memory", None], "no trial has had a validation/f1 that is a number"),
    ],
)
def test_a_study_without_any_score_says_why(
    opened: Callable[..., Desk], says: list[str | None], message: str
) -> None:
    desk = opened(trials=len(says))
    desk.hear("a", Free())
    for said in says:
        if said is None:
            trained(desk, "a", None)
        else:
            desk.hear("a", broke(said))
    ended = desk.ended()
    assert (ended.state, ended.trial) == (State.FAILED_USER, None)
    assert ended.failure is not None
    assert message in ended.failure.problems[0][0]


def test_a_trial_whose_node_is_taken_goes_on_in_another_slot_and_pays_nothing(
    opened: Callable[..., Desk],
) -> None:
    desk = opened(retries=0)
    first = desk.hear("a", Free())
    assert isinstance(first, Train)
    saved = Outcome(attempt=1, state=State.RECOVERING, step=40)
    assert desk.hear("a", Gone(saved, is_taken=True)) == Wait()
    assert desk.hear("a", Free(is_taken=True)) == Wait()
    again = desk.hear("b", Free())
    assert isinstance(again, Train)
    assert again.assignment.run_id == first.assignment.run_id
    desk.died("b", "its node ended", counts=False)
    assert desk._engine.trials[0].losses == 0
    desk.died("a", "its node ended", counts=False)
    assert len(warnings(desk)) == 1  # of the trial: the other slot had none


def full_disk() -> Gone:
    problem = ("no space left on device", "remove something")
    failure = Failure(state=State.FAILED_INFRA, problems=(problem,), exit_code=3)
    return Gone(Outcome(attempt=1, state=State.FAILED_INFRA, step=0, failure=failure))


def test_a_slot_on_which_trials_cannot_go_on_waits_while_others_go_on(
    opened: Callable[..., Desk], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr(setbacks.time, "monotonic", lambda: now[0])
    desk = opened()
    first, second = desk.hear("a", Free()), desk.hear("b", Free())
    assert isinstance(first, Train)
    assert isinstance(second, Train)
    assert desk.hear("a", full_disk()) == Wait()
    third = trained(desk, "b", 0.5)
    assert isinstance(third, Train)
    assert third.assignment.run_id == first.assignment.run_id
    now[0] += 1.0
    assert desk.hear("a", Free()) == Wait()
    now[0] += 1.1
    fourth = desk.hear("a", Free())
    assert isinstance(fourth, Train)
    assert fourth.assignment.run_id == "study/trials/0002"
    assert [t.status for t in desk._engine.trials.by_number.values()] == [
        "running",
        "finished",
        "running",
    ]


def test_what_keeps_all_slots_from_going_on_ends_the_study_for_now_and_costs_no_trial(
    opened: Callable[..., Desk], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr(setbacks.time, "monotonic", lambda: now[0])
    desk = opened(retries=2)
    for _ in range(3):
        now[0] += 60.0
        assert isinstance(desk.hear("a", Free()), Train)
        order = desk.hear("a", full_disk())
    assert order is None
    ended = desk.ended()
    assert ended.state is State.FAILED_INFRA
    assert ended.failure is not None
    assert ended.failure.exit_code == 3
    assert "no space left on device" in ended.failure.problems[0][0]
    assert not desk._engine.trials.counts["failed"]
    again = opened(retries=2).hear("a", Free())
    assert isinstance(again, Train)
    assert again.assignment.run_id == "study/trials/0000"


OF_THE_PLACE = [
    StoreAway("the store has not answered"),
    ClusterError("no workers could be started for 30 minutes"),
]
OF_THE_TRIAL = [
    ObjectMissing("trials/0000/attempts/1"),
    EnvironmentFault("rank 0 broke off, and told the others"),
    OSError("gone"),
]


def crash(error: Exception) -> Gone:
    """Of the slot itself, or of the driver of a trial's workers."""
    return Gone(None, Failure.of(error, where="slot"))


@pytest.mark.parametrize("error", OF_THE_PLACE, ids=lambda error: type(error).__name__)
def test_a_place_that_breaks_the_driver_of_a_trials_workers_costs_no_trial(
    opened: Callable[..., Desk],
    local_store: Store,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
) -> None:
    now = [1000.0]
    monkeypatch.setattr(setbacks.time, "monotonic", lambda: now[0])
    desk = opened(retries=2)
    assert isinstance(desk.hear("a", Free()), Train)
    assert desk.hear("a", crash(error)) == Wait()
    for _ in range(2):
        now[0] += 60.0
        assert isinstance(desk.hear("a", Free()), Train)
        order = desk.hear("a", crash(error))
    assert order is None
    ended = desk.ended()
    assert ended.state is State.FAILED_INFRA
    assert ended.failure is not None
    assert str(error) in ended.failure.problems[0][0]
    lost = [e.counts for e in read_events(local_store, PATHS) if isinstance(e, Lost)]
    assert lost == [True, True, False]
    following = opened(retries=2)
    assert following._engine.trials[0].losses == desk._engine.trials[0].losses == 2
    again = following.hear("a", Free())
    assert isinstance(again, Train)
    assert again.assignment.run_id == "study/trials/0000"


@pytest.mark.parametrize("error", OF_THE_TRIAL, ids=lambda error: type(error).__name__)
def test_a_trial_that_breaks_off_by_itself_again_and_again_is_given_up(
    opened: Callable[..., Desk], local_store: Store, error: Exception
) -> None:
    desk = opened(retries=2)
    order = desk.hear("a", Free())
    for _ in range(3):
        assert isinstance(order, Train)  # at once: the slot is as good as any
        assert order.assignment.run_id == "study/trials/0000"
        order = desk.hear("a", crash(error))
    assert isinstance(order, Train)
    assert order.assignment.run_id == "study/trials/0001"
    (failed,) = [e for e in read_events(local_store, PATHS) if isinstance(e, Failed)]
    assert failed.trial == 0
    assert opened(retries=2)._engine.trials[0].status == "failed"


def test_a_place_that_lets_other_trials_go_on_is_not_borne_without_end(
    opened: Callable[..., Desk], local_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr(setbacks.time, "monotonic", lambda: now[0])
    desk = opened(trials=9, retries=2)
    orders = [desk.hear(slot, Free()) for slot in "ab"]
    for step in (30, 60, 90):
        assert isinstance(orders[0], Train)
        assert orders[0].assignment.run_id == "study/trials/0000"
        assert desk.hear("a", crash(OF_THE_PLACE[0])) == Wait()
        report = Report(
            step=step, fraction=step / 300, epochs=1.0, value=0.5, best=0.5, seconds=1.0
        )
        assert desk.hear("b", Told(report)) == Answer("continue", 1.0)
        now[0] += 60.0
        orders[0] = desk.hear("a", Free())
    assert [e.trial for e in read_events(local_store, PATHS) if isinstance(e, Failed)] == [0]
    assert not desk.is_over


def test_slots_that_die_before_they_begin_end_the_study(opened: Callable[..., Desk]) -> None:
    desk = opened()
    for number in range(7):
        desk.died(f"slot-{number}", "No module named 'torch'")
    desk.hear("slot-7", Free())
    for number in range(8):
        assert not desk.is_over
        desk.died("slot-7" if number == 0 else f"late-{number}", "No module named 'torch'")
    assert not desk.is_over  # the first had had its say
    desk.died("late-8", "No module named 'torch'")
    assert desk.is_over
    with pytest.raises(EnvironmentFault, match="No module named 'torch'"):
        desk.ended()
    assert 5 <= len(warnings(desk)) <= 9


def test_a_test_that_kills_its_slot_is_not_tried_for_ever(opened: Callable[..., Desk]) -> None:
    desk = opened(test=True, trials=1, retries=1)
    desk.hear("a", Free())
    assert isinstance(trained(desk, "a", 0.5), slots.Test)
    desk.died("a", "killed")
    assert isinstance(desk.hear("b", Free()), slots.Test)
    desk.died("b", "its node ended", counts=False)
    assert isinstance(desk.hear("c", Free()), slots.Test)
    desk.died("c", "killed")
    assert desk.hear("d", Free()) is None
    ended = desk.ended()
    assert ended.state is State.FAILED_INFRA
    assert ended.failure is not None
    assert "the test of trial 0 broke off 2 times" in ended.failure.problems[0][0]


def test_a_driver_whose_study_another_one_has_taken_over_ends_with_that(
    opened: Callable[..., Desk],
) -> None:
    first = opened()
    assert isinstance(first.hear("a", Free()), Train)
    second = opened()
    assert isinstance(second.hear("b", Free()), Train)
    first.died("a", "its process died")
    assert first.is_over
    with pytest.raises(StudySuperseded):
        first.ended()


def test_a_study_that_is_stopped_names_its_best_checkpoint_so_far(
    opened: Callable[..., Desk], local_store: Store
) -> None:
    desk = opened()
    assert desk.ended().trial is None
    desk.hear("a", Free())
    trained(desk, "a", 0.5)
    trained(desk, "a", 0.8)
    run = SyntheticRun(local_store, run_id=PATHS.trial(1).run_id, spec=study_spec())
    run.start_attempt(1, time=START)
    run.checkpoint(1, 300, time=START)
    desk._stop(State.STOPPED)
    desk.hear("a", Gone(Outcome(attempt=1, state=State.STOPPED, step=40)))
    assert desk.is_over
    ended = desk.ended()
    assert (ended.state, ended.trial) == (State.STOPPED, 1)
    result = build_result(local_store, PATHS, generation=1, ended=ended)
    assert result.best_checkpoint == "trials/0001/checkpoints/step-00000300-attempt-0001"
    assert result.exit_code == 130

    taken = opened()
    taken._stop(State.FAILED_INFRA)
    result = build_result(local_store, PATHS, generation=2, ended=taken.ended())
    assert result.best_checkpoint == "trials/0001/checkpoints/step-00000300-attempt-0001"
    assert (result.state, result.exit_code) == (State.FAILED_INFRA, 3)
