"""What `shoal check` says of a search: its space, rungs, trials at a time, and epochs."""

from __future__ import annotations

from typing import Any

import pytest
from synthetic import make_spec

from jobs.checks.finding import Finding, Verdict
from jobs.checks.machine import Machine, check_memory, check_workers
from jobs.checks.schedule import Totals
from jobs.checks.search import SearchPlan, check_search, plan_search
from jobs.spec import JobSpec

SPACE = {
    "optimizer.learning_rate": {"loguniform": [1e-6, 1e-3]},
    "model.dropout": {"uniform": [0.0, 0.3]},
}
TOTALS = Totals(rows=3200, steps_per_epoch=100, total_steps=300)


def machine_of(cores: int = 8, gpus: int = 0, memory_gib: float = 16) -> Machine:
    return Machine(cores=cores, memory_bytes=int(memory_gib * 2**30), gpus=gpus)


def job(*, workers: Any = None, train: Any = None, batching: Any = None, **search: Any) -> JobSpec:
    return make_spec(
        workers={"count": 1} | (workers or {}),
        train={"epochs": 3} | (train or {}),
        batching=batching or {"global_batch_size": 32},
        search={"metric": "validation/f1", "space": SPACE, "trials": 27, "finalists": None}
        | search,
    )


def planned(
    spec: JobSpec, machine: Machine | None = None, totals: Totals = TOTALS
) -> tuple[SearchPlan, list[Finding]]:
    plan = plan_search(spec, totals, machine)
    assert plan is not None
    return plan, list(check_search(spec, plan, totals, machine))


def texts(findings: list[Finding], verdict: Verdict = Verdict.OK) -> list[str]:
    return [finding.message for finding in findings if finding.verdict is verdict]


def test_a_job_without_a_search_has_no_plan() -> None:
    assert plan_search(make_spec(), TOTALS, None) is None


def test_each_key_is_told_with_its_range() -> None:
    _, findings = planned(job(), machine_of())
    assert texts(findings)[:2] == [
        "optimizer.learning_rate: loguniform 1e-06 to 0.001",
        "model.dropout: uniform 0 to 0.3",
    ]


def test_the_recommended_space_is_written_out() -> None:
    plan, _ = planned(job(space="recommended"), machine_of())
    assert "optimizer.learning_rate" in plan.keys
    assert plan.keys["batching.global_batch_size"] == "choice of 16, 32, 64"


def test_asha_is_told_with_its_rungs_in_evaluations_and_its_epochs() -> None:
    scheduler = {"kind": "asha", "reduction_factor": 3}
    plan, findings = planned(
        job(train={"evaluate_every_steps": 10}, scheduler=scheduler), machine_of()
    )
    assert plan.rungs == (1 / 9, 1 / 3, 1.0)
    assert plan.evaluations == 30
    # The first rung is met at the fourth evaluation of thirty.
    expected = 3 * (27 * 4 / 30 + 9 * 6 / 30 + 3 * 20 / 30)
    assert plan.search_epochs == pytest.approx(expected)
    assert f"27 trials, algorithm tpe, scheduler asha: about {expected:.3g} epochs" in texts(
        findings
    )
    assert (
        "asha compares trials at 11%, 33% and 100% of their budget: after 4, 10 and 30 of 30 "
        "evaluations" in texts(findings)
    )


def test_fewer_evaluations_than_rungs_are_warned_of_with_what_to_set() -> None:
    scheduler = {"kind": "asha", "reduction_factor": 3}
    short = job(train={"epochs": 2}, scheduler=scheduler)
    _, findings = planned(short, machine_of(), Totals(3200, 100, 200))
    (warning,) = [f for f in findings if f.verdict is Verdict.WARNING]
    assert warning.part == "search.scheduler"
    assert "but a trial is evaluated 2 times only" in warning.message
    assert "at 2 evaluations instead of 3" in warning.message
    assert warning.hint == "set train.evaluate_every_steps to 22 or less"
    mended = job(train={"epochs": 2, "evaluate_every_steps": 22}, scheduler=scheduler)
    assert not texts(planned(mended, machine_of())[1], Verdict.WARNING)


def test_the_largest_batch_of_the_space_leaves_the_fewest_evaluations() -> None:
    space = {**SPACE, "batching.global_batch_size": {"choice": [32, 320]}}
    plan, findings = planned(job(space=space, train={"evaluate_every_steps": 10}), machine_of())
    assert plan.evaluations == 3
    (warning,) = texts(findings, Verdict.WARNING)
    assert "evaluated 3 times only" in warning


@pytest.mark.parametrize("kind", ["pbt", "pb2"])
def test_rounds_of_a_population_need_an_evaluation_each(kind: str) -> None:
    search = {"scheduler": {"kind": kind, "every": 0.2, "population": 6}, "trials": 6}
    plan, findings = planned(job(train={"evaluate_every_steps": 100}, **search), machine_of())
    assert plan.rungs == pytest.approx((0.2, 0.4, 0.6, 0.8, 1.0))
    (warning,) = [f for f in findings if f.verdict is Verdict.WARNING]
    assert warning.hint == "set train.evaluate_every_steps to 60 or less"
    assert plan.search_epochs == 6 * 3


GRID = {
    "model.dropout": {"grid": [0.0, 0.1]},
    "optimizer.weight_decay": {"grid": [0.0, 0.1, 0.2]},
}


def test_a_grid_has_as_many_trials_as_combinations_and_the_jobs_own_values() -> None:
    keys = {"space": GRID, "algorithm": "grid", "scheduler": None, "repeats": 2}
    finalists = {"count": 9, "seeds": 2}
    plan, findings = planned(job(**keys, finalists=finalists))
    assert (plan.combinations, plan.trials, plan.finalists) == (6, 14, 14)
    assert (plan.search_epochs, plan.finalist_epochs) == (42, 42)
    assert not texts(findings, Verdict.WARNING)
    assert planned(job(**keys, finalists=finalists, baseline=False))[0].trials == 12


def test_combinations_that_are_not_tried_are_warned_of() -> None:
    plan, findings = planned(job(space=GRID, algorithm="grid", scheduler=None, trials=4))
    assert plan.trials == 5
    (warning,) = [f for f in findings if f.verdict is Verdict.WARNING]
    assert warning.message == (
        "search.trials is 4, but the grid has 6 combinations, of which 2 are not tried"
    )
    assert warning.hint == "remove search.trials, or set it to 6"
    whole = make_spec(
        workers={"count": 1},
        search={"space": GRID, "algorithm": "grid", "metric": "validation/f1", "scheduler": None},
    )
    assert not texts(planned(whole)[1], Verdict.WARNING)


def test_the_jobs_own_values_are_trained_again_besides_the_best() -> None:
    finalists = {"count": 3, "seeds": 3}
    plan, findings = planned(job(scheduler=None, finalists=finalists))
    assert (plan.finalists, plan.finalist_epochs) == (12, 36)
    assert (
        "27 trials, algorithm tpe, scheduler none: about 81 epochs; then at most 12 runs of "
        "finalists on the full budget: 36 epochs more, about 117 in all" in texts(findings)
    )
    assert planned(job(scheduler=None, finalists=finalists, baseline=False))[0].finalists == 9
    assert planned(job(scheduler=None, finalists=finalists, trials=2))[0].finalists == 6


def test_a_budget_bounds_the_epochs_of_the_search_and_none_of_the_finalists() -> None:
    keys = {"scheduler": None, "budget": {"epochs": 20}}
    plan, findings = planned(job(**keys, finalists={"count": 1, "seeds": 2}))
    assert (plan.search_epochs, plan.finalist_epochs) == (20, 12)
    assert (
        "27 trials, algorithm tpe, scheduler none: about 20 epochs; then at most 4 runs of "
        "finalists on the full budget: 12 epochs more, which search.budget does not bound, about "
        "32 in all" in texts(findings)
    )


@pytest.mark.parametrize(
    ("search", "machine", "text"),
    [
        # 27 trials of 3 epochs, 8 at a time.
        ({}, machine_of(cores=8), "takes about as long as 10.1 epochs of the job one after the "
         "other, at 8 trials at a time; shoal status tells"),
        # 12 runs of finalists take two rounds.
        ({"finalists": {"count": 3, "seeds": 3}}, machine_of(cores=8), "as long as 16.1 epochs"),
        ({"trials": 2}, machine_of(cores=8), "as long as 3 epochs"),
        ({"patience": 5}, machine_of(cores=8), "takes at most about as long as 10.1 epochs"),
        ({"finalists": {"count": 3, "seeds": 3}}, None, "as long as 117 epochs of the job one "
         "after the other, divided by the number of trials at a time"),
    ],
)  # fmt: skip
def test_the_time_is_told_in_epochs_of_the_job(
    search: Any, machine: Machine | None, text: str
) -> None:
    _, findings = planned(job(scheduler=None, **search), machine)
    (told,) = [message for message in texts(findings) if message.startswith("takes ")]
    assert text in told


def test_the_brackets_of_hyperband_are_reckoned_one_by_one() -> None:
    plan, _ = planned(job(scheduler="hyperband", trials=17, train={"evaluate_every_steps": 1}))
    # Brackets of 9, 5 and 3 trials that begin at a ninth, a third and the end.
    first = (9 + 3 * 2 + 1 * 6) / 9
    second = (5 + 5 / 3 * 2) / 3
    at_evaluations = pytest.approx(3 * (first + second + 3), rel=0.02)
    assert plan.search_epochs == at_evaluations


@pytest.mark.parametrize(
    ("workers", "machine", "search", "at_a_time", "text"),
    [
        ({}, machine_of(cores=8), {}, 8, "8 trials at a time, each of 1 worker with 1 core: 8 "),
        ({"count": 3}, machine_of(), {}, 2, "each of 3 workers with 1 core: 6 of this machine"),
        ({"gpus": 1}, machine_of(gpus=2), {}, 2, "and a GPU: 2 of this machine's 8 cores, 2 of"),
        ({"memory_gib": 6}, machine_of(), {}, 2, "12 GiB of its 16 GiB free"),
        ({"memory_gib": 6}, machine_of(), {}, 2, "each of 1 worker with 1 core and 6 GiB: 2 of"),
        ({}, machine_of(), {"max_concurrent": 3}, 3, "3 trials at a time"),
        ({"gpus": 1}, machine_of(gpus=1), {"gpu_share": 0.25}, 4, "and 0.25 of a GPU: 4 of this"),
        ({"gpus": 1}, machine_of(gpus=2), {"gpu_share": 0.6}, 2, "1.2 of its 2 GPUs"),
        ({}, machine_of(), {"trials": 2}, 2, "2 trials at a time"),
    ],
)  # fmt: skip
def test_trials_at_a_time_are_told_with_the_sum(
    workers: Any, machine: Machine, search: Any, at_a_time: int, text: str
) -> None:
    plan, findings = planned(job(workers=workers, **search), machine)
    assert plan.at_a_time == at_a_time
    assert any(text in message for message in texts(findings)), texts(findings)


def test_a_trial_that_can_never_fit_is_refused_with_the_sum() -> None:
    spec = job(workers={"count": 4})
    plan, findings = planned(spec, machine_of(cores=2))
    assert plan.at_a_time == 0
    assert not [text for text in texts(findings) if "at a time" in text]
    assert plan.epochs_in_a_row is None
    (problem,) = check_workers(spec, machine_of(cores=2))
    assert problem.verdict is Verdict.PROBLEM
    assert problem.message == ("4 workers with workers.cpus 1 need 4 cores, but this machine has 2")
    assert (problem.hint or "").startswith("set workers.count to 2,")
    assert problem.exit_code == 3


def test_memory_is_reckoned_for_all_trials_at_a_time() -> None:
    (found,) = check_memory(job(workers={"count": 2}), machine_of(), worker_bytes=3 * 2**30)
    assert found.message.startswith("8 workers of trials need about 24 GiB")
    assert (found.hint or "").startswith("lower search.max_concurrent")
    fewer = job(workers={"count": 2}, max_concurrent=2)
    assert not check_memory(fewer, machine_of(), worker_bytes=3 * 2**30)


def test_on_a_cluster_nothing_is_said_of_its_room() -> None:
    plan, findings = planned(job(), None)
    assert plan.at_a_time is None
    (text,) = texts(findings, Verdict.NOT_CHECKED)
    assert (
        text
        == "how many trials, each of 1 worker with 1 core, run at a time: the cluster was not asked"
    )


def test_without_the_training_set_the_rungs_are_not_judged() -> None:
    plan, findings = planned(job(), machine_of(), Totals())
    assert plan.evaluations is None
    assert not texts(findings, Verdict.WARNING)
