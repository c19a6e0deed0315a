"""Trials: paused and continued to the same bits, ended by their study, many in one process."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import signal
import stat
import tempfile
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.storage import open_store
from jobs.record import Failure, Lease, RunPaths, State
from jobs.runs import RunReader
from jobs.spec import JobSpec
from tests.evidence import final_weights, global_batches
from tests.ranks import run_group, run_ranks
from tests.scene import Scene
from tests.trainers.test_broken_off import BreaksOff
from trainers import watchdog, worker
from trainers.assignment import Assignment, EvaluationReport, TrialPlan, Verdict
from trainers.loop import Plan, Progress, score
from trainers.records import outcome_of, read_attempts, read_manifests
from trainers.session import ProcessSession
from trainers.tasks.task import Evaluation
from trainers.trial import run_trial

PLAN = TrialPlan("study", "validation/f1", "max")


def job(scene: Scene, **parts: Any) -> JobSpec:
    """Ten steps, an evaluation after each second one; saves that are due hardly ever are there."""
    own: dict[str, Any] = {
        "train": {"evaluate_every_steps": 2, "log_rows": True},
        "checkpoint": {"every_steps": 7, "keep_last": 9},
        "data": {"lanes": 2},
    }
    for part, keys in parts.items():
        own[part] = {**own.get(part, {}), **keys}
    return scene.job(**own)


def trial_of(spec: JobSpec, run_id: str, *, generation: int = 1) -> Assignment:
    open_store(spec.store.uri).write(RunPaths(run_id).spec, spec.to_bytes())
    return Assignment(spec, run_id, generation, controls_seen=0, trial=PLAN)


def evaluations(scene: Scene, run_id: str) -> dict[int, dict[str, float]]:
    return {
        line["step"]: line["metrics"]
        for line in RunReader(scene.runs, run_id).metrics()
        if line["kind"] == "evaluation"
    }


class Study:
    """Answers reports by their step, and remembers them; going on is the default."""

    def __init__(self, verdicts: dict[int, Verdict] | None = None) -> None:
        self.verdicts = verdicts or {}
        self.reports: list[EvaluationReport] = []

    def __call__(self, report: EvaluationReport) -> Verdict:
        self.reports.append(report)
        return self.verdicts.get(report.step, Verdict.GO_ON)


# ---------------------------------------------------------------------------------- the decision


def test_a_report_tells_the_best_of_the_studys_own_metric() -> None:
    plan, progress = Plan(num_rows=8, global_batch_size=2, epochs=2), Progress()
    for mode, expected in (("max", [0.5, 0.5, 0.75]), ("min", [0.5, 0.25, 0.25])):
        progress, found = Progress(), []
        for step, value in enumerate([0.5, 0.25, 0.75], start=1):
            progress = replace(progress, step=step)
            trial = replace(PLAN, mode=mode)
            progress, report = score(trial, plan, progress, Evaluation({"f1": value}, rows=1))
            assert (report.value, report.step, report.epochs) == (value, step, step / 4)
            assert report.fraction == step / 8
            found.append(report.best)
        assert found == expected
    _, last = score(PLAN, plan, replace(progress, finished=True), Evaluation({"f1": 0.5}, rows=1))
    assert (last.is_last, last.fraction) == (True, 1.0)


# ----------------------------------------------------------------------------- paused, continued


class Reports:
    """In a process of a test: the study's answers; what it is told goes into a file."""

    def __init__(self, file: Path, verdict: Verdict) -> None:
        self.file, self.verdict = file, verdict

    def __call__(self) -> None:
        def evaluated(session: ProcessSession, report: EvaluationReport) -> Verdict:
            if session.rank:
                return Verdict.END  # nobody heeds it
            with self.file.open("a") as file:
                file.write(f"{report.step} {report.value!r} {report.best!r} {report.is_last}\n")
            return self.verdict

        ProcessSession.evaluated = evaluated  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("workers", "strategy"), [(1, "ddp"), (2, "ddp"), (2, "fsdp")], ids=["1", "2", "2-fsdp"]
)
def test_a_trial_that_is_paused_at_each_evaluation_ends_with_the_same_bits(
    scene: Scene, workers: int, strategy: str
) -> None:
    spec = job(
        scene,
        workers={"count": workers, "strategy": strategy},
        train={"early_stopping": {"metric": "validation/loss", "mode": "min", "patience": 99}},
    )
    calm = run_ranks(
        trial_of(spec, "calm"),
        world_size=workers,
        before=Reports(scene.folder / "calm.txt", Verdict.GO_ON),
    )
    assert calm is not None
    states, pauses = [], Reports(scene.folder / "paused.txt", Verdict.PAUSE)
    for _ in range(5):
        outcome = run_ranks(trial_of(spec, "paused"), world_size=workers, before=pauses)
        assert outcome is not None
        states.append((outcome.state, outcome.step))
    paused = [(State.RECOVERING, step) for step in (2, 4, 6, 8)]
    assert states == [*paused, (State.SUCCEEDED, 10)]
    assert [a.restored_step for a in read_attempts(scene.runs, RunPaths("paused"))] == [
        None, 2, 4, 6, 8,
    ]  # fmt: skip
    assert (scene.folder / "paused.txt").read_text() == (scene.folder / "calm.txt").read_text()
    assert final_weights(scene.runs, "paused") == final_weights(scene.runs, "calm")
    assert global_batches(scene.runs, "paused") == global_batches(scene.runs, "calm")
    assert evaluations(scene, "paused") == evaluations(scene, "calm")
    assert outcome is not None
    assert outcome.best_step == calm.best_step
    own = {m.step: m.evaluation for m in read_manifests(scene.runs, RunPaths("paused"))}
    assert all(own[step] for step in (2, 4, 6, 8, 10)), "a pause saves what was evaluated"


def test_a_pause_at_an_evaluation_that_is_made_up_for_saves_it(scene: Scene) -> None:
    # Evaluations of several passes, after the first of which the request is heard.
    spec = job(scene, batching={"max_tokens_per_microbatch": 16})
    run_trial(trial_of(spec, "calm"), Study())
    broken = run_group(trial_of(spec, "run"), world_size=1, before=BreaksOff(0, 4))[0]
    assert (broken.state, broken.step) == (State.STOPPED, 4)
    study = Study({4: Verdict.PAUSE})
    paused = run_trial(trial_of(spec, "run", generation=2), study)
    assert (paused.state, paused.step) == (State.RECOVERING, 4)
    assert [report.step for report in study.reports] == [4]
    ended = run_trial(trial_of(spec, "run", generation=2), study)
    assert [report.step for report in study.reports] == [4, 6, 8, 10]
    assert ended.state is State.SUCCEEDED
    assert final_weights(scene.runs, "run") == final_weights(scene.runs, "calm")
    assert evaluations(scene, "run") == evaluations(scene, "calm")


def test_a_trial_that_its_study_ends_is_pruned_and_has_saved_what_was_due(scene: Scene) -> None:
    stopping = {"metric": "validation/accuracy", "mode": "min", "patience": 99}
    spec = job(scene, train={"early_stopping": stopping})
    # The lowest accuracy is the best here: that of the first evaluation.
    outcome = run_trial(trial_of(spec, "run"), Study({6: Verdict.END}))
    assert (outcome.state, outcome.step, outcome.failure) == (State.PRUNED, 6, None)
    assert outcome.state.is_final
    assert outcome.state.exit_code == 0
    assert outcome_of(scene.runs, scene.paths(), 1) == outcome
    saved = [m.step for m in read_manifests(scene.runs, scene.paths())]
    assert saved[0] == 2
    assert 6 not in saved or outcome.best_step == 6
    # It stays ended for this driver.
    assert run_trial(trial_of(spec, "run"), Study()) == outcome


def test_a_verdict_that_comes_with_the_last_evaluation_changes_nothing(scene: Scene) -> None:
    spec = job(scene)
    for run_id, verdict in (("paused", Verdict.PAUSE), ("ended", Verdict.END)):
        study = Study({10: verdict})
        outcome = run_trial(trial_of(spec, run_id), study)
        assert (outcome.state, outcome.step) == (State.SUCCEEDED, 10)
        assert [report.is_last for report in study.reports] == [False] * 4 + [True]
        assert read_manifests(scene.runs, RunPaths(run_id))[-1].is_last_step


def test_a_trial_whose_node_is_taken_saves_its_state_and_goes_on_elsewhere(scene: Scene) -> None:
    spec = job(scene)
    study = Study()
    outcome = run_trial(trial_of(spec, "taken"), study, is_taken=lambda: bool(study.reports))
    assert outcome.state is State.RECOVERING
    assert outcome.step in (2, 3)
    outcome = run_trial(trial_of(spec, "taken"), study)
    assert outcome.state is State.SUCCEEDED
    assert [report.step for report in study.reports] == [2, 4, 6, 8, 10]


@pytest.mark.parametrize("state", [State.FAILED_INFRA, State.FAILED_USER])
def test_what_its_environment_has_ended_is_run_again_by_the_same_driver(
    scene: Scene, state: State
) -> None:
    spec, study = job(scene), Study({4: Verdict.PAUSE})
    paused = run_trial(trial_of(spec, "again"), study)
    failure = Failure(state=state, problems=(("no space left on device", None),))
    ended = paused.model_copy(update={"state": state, "failure": failure})
    scene.runs.write(RunPaths("again").outcome(paused.attempt), ended.to_bytes())
    again = run_trial(trial_of(spec, "again"), study)
    expected = State.SUCCEEDED if state is State.FAILED_INFRA else state
    assert again.state is expected


def test_early_stopping_makes_a_report_the_last(scene: Scene) -> None:
    stopping = {"metric": "validation/accuracy", "mode": "min", "patience": 1, "min_delta": 2.0}
    study = Study()
    outcome = run_trial(trial_of(job(scene, train={"early_stopping": stopping}), "run"), study)
    assert outcome.state is State.SUCCEEDED
    assert [(r.step, r.is_last) for r in study.reports] == [(2, False), (4, True)]
    assert study.reports[-1].fraction == 1.0


def test_a_run_that_is_no_trial_asks_nobody(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ProcessSession, "evaluated", None)
    assert scene.train(job(scene)).state is State.SUCCEEDED


def test_a_trial_measures_neither_the_untrained_model_nor_on_the_test_set(scene: Scene) -> None:
    spec = job(scene, data={"test": str(scene.folder / "nowhere")})
    outcome = run_trial(trial_of(spec, "run"), Study())
    assert outcome.state is State.SUCCEEDED
    assert (outcome.before, outcome.test, outcome.tested_on) == (None, None, None)
    assert sorted(evaluations(scene, "run")) == [2, 4, 6, 8, 10]


def test_a_wait_for_a_verdict_is_no_hang_and_counts_as_synchronisation(scene: Scene) -> None:
    """Whether it would end the process is asked of the watchdog, not waited for."""
    progress = []

    def slow(report: EvaluationReport) -> Verdict:
        assert watchdog._own is not None
        progress.append((watchdog._own.progress(), watchdog._own.progress()))
        time.sleep(0.1)
        return Verdict.GO_ON

    outcome = run_trial(trial_of(job(scene), "run"), slow)
    assert len(progress) == 5
    assert all(first != second for first, second in progress)
    assert outcome.seconds["synchronisation"] >= 0.5


def test_a_trial_whose_study_has_another_driver_saves_nothing_more(scene: Scene) -> None:
    lease = Lease(generation=2, holder="h", host="node-7", pid=9, renewals=0, ttl_seconds=60.0)

    def taken_over(report: EvaluationReport) -> Verdict:
        scene.runs.write(RunPaths("study").lease, lease.to_bytes())
        return Verdict.PAUSE

    outcome = run_trial(trial_of(job(scene), "run"), taken_over)
    assert outcome.state is State.FAILED_INFRA
    assert outcome.failure is not None
    assert "superseded" in outcome.failure.problems[0][0]
    assert read_manifests(scene.runs, scene.paths()) == []


# ----------------------------------------------------------------------------- one after another


def elsewhere(work: Callable[[], Any]) -> Any:
    """What `work` gives in a thread that is not the main one."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result()


def state_of_process() -> dict[str, Any]:
    """What a trial could leave behind."""
    gc.collect()
    modes = []
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # that by which the folder was listed
            modes.append(os.fstat(int(number)).st_mode)
    return {
        "threads": sorted(thread.name for thread in threading.enumerate()),
        "files": sum(not stat.S_ISSOCK(mode) for mode in modes),
        "sockets": sum(stat.S_ISSOCK(mode) for mode in modes),
        "signals": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)],
        "handlers": {
            name: list(logging.getLogger(name).handlers)
            for name in (None, "shoal", "cluster", "jobs", "trainers")
        },
        "watchdog": watchdog._own,
        "float32": torch.get_float32_matmul_precision(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "copies": [*Path(os.environ["SHOAL_CACHE"], "checkpoints").iterdir()],
        "temporary": os.listdir(tempfile.gettempdir()),
    }


@pytest.mark.parametrize("place", ["local", "s3"])
def test_twenty_trials_in_a_thread_leave_nothing_behind(
    scene: Scene, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    (scene.folder / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scene.folder / "temporary"))
    store = scene.runs if place == "local" else request.getfixturevalue("s3_store")
    held = []

    def run(number: int) -> None:
        # What differs from trial to trial, and one that fails, one that pauses, one that is ended.
        spec = scene.job(
            store=store.uri,
            train={"epochs": 1, "evaluate_every_steps": 3},
            model={"dropout": number / 100},
            optimizer={"learning_rate": 1e-3 * (1 + number % 3)},
            **({"task": {"max_tokens": 99}} if number % 5 == 4 else {}),
        )
        verdict = (Verdict.GO_ON, Verdict.PAUSE, Verdict.END)[number % 3]
        trial = trial_of(spec, f"study/trials/{number:04d}")
        outcome = run_trial(trial, Study({3: verdict}))
        held.append((number % 5, outcome.state))
        if outcome.state is State.RECOVERING:
            assert run_trial(trial, Study()).state is State.SUCCEEDED

    def twenty() -> tuple[dict[str, Any], dict[str, Any]]:
        for number in range(5):
            run(number)
        before = state_of_process()
        for number in range(5, 25):
            run(number)
        return before, state_of_process()

    before, after = elsewhere(twenty)
    # Connections are kept for the next requests: as many as there were at once, by chance.
    assert after.pop("sockets") < before.pop("sockets") + 10
    assert after == before
    assert [state for kind, state in held if kind == 4] == [State.FAILED_SPEC] * 5
    assert {state for kind, state in held if kind != 4} == {
        State.SUCCEEDED, State.RECOVERING, State.PRUNED,
    }  # fmt: skip


def test_a_model_is_given_up_with_its_trial(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    models: list[weakref.ref[torch.nn.Module]] = []
    whole = worker.replicated

    def seen(prepared: Any, session: Any) -> Any:
        models.append(weakref.ref(prepared.trainee.model))
        return whole(prepared, session)

    monkeypatch.setattr(worker, "replicated", seen)
    gc.disable()
    try:
        for verdict in (Verdict.PAUSE, Verdict.GO_ON):
            run_trial(trial_of(job(scene), "run"), Study({4: verdict}))
    finally:
        gc.enable()
    assert [model() for model in models] == [None, None]


@pytest.mark.parametrize("packing", [False, True])
def test_trials_in_a_warm_process_have_the_bits_of_a_fresh_one(scene: Scene, packing: bool) -> None:
    """Other trials come before, with other values and seeds; each is paused and goes on here."""
    trials = [
        (f"{seed}-{dropout}", {"data": {"seed": seed, "lanes": 2}, "model": {"dropout": dropout}})
        for seed, dropout in ((1, 0.1), (2, 0.1), (1, 0.3), (3, None), (1, 0.1))
    ]
    for name, parts in trials:
        spec = job(scene, batching={"packing": packing}, **parts)
        fresh = f"fresh-{name}"
        if scene.runs.head(RunPaths(fresh).spec) is None:
            run_ranks(trial_of(spec, fresh), world_size=1)
        warm = f"warm-{len([*scene.runs.list_folders()])}"
        assert run_trial(trial_of(spec, warm), Study({4: Verdict.PAUSE})).step == 4
        assert run_trial(trial_of(spec, warm), Study()).state is State.SUCCEEDED
        assert final_weights(scene.runs, warm) == final_weights(scene.runs, fresh)
