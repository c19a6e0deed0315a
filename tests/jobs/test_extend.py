"""`shoal extend`, and what a resume may change of a study: over a real folder, without a driver."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from synthetic import START, SyntheticRun, make_spec
from test_commands import Shell

from cluster.storage import Store, open_store, split_uri
from jobs import submit
from jobs.commands import extend
from jobs.record import Control, Outcome, Result, State
from jobs.runs import RunReader
from jobs.study import log as study_log
from jobs.study.events import (
    Asked,
    Closed,
    Decided,
    Event,
    Extended,
    Left,
    Refused,
    Reported,
    Started,
)
from jobs.study.extension import request_extension
from jobs.study.log import StudyLog

STUDY = "study-a1b2c3"
SPACE = {"optimizer.learning_rate": {"loguniform": [1e-5, 1e-1]}}


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """URIs for which a driver would have been started; it records the changes, as the real one
    does."""
    uris: list[str] = []

    def start(uri: str, *, overrides: Sequence[str] = (), **_: Any) -> None:
        uris.append(uri)
        parent, run_id = split_uri(uri)
        submit.record_changes(open_store(parent), run_id, overrides)

    monkeypatch.setattr(submit, "start_driver", start)
    monkeypatch.setattr(submit, "require_place", lambda *_, **__: None)
    return uris


@pytest.fixture
def shell(
    local_store: Store, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Shell:
    monkeypatch.setenv("SHOAL_STORE", local_store.uri)
    return Shell(local_store, capsys)


def made_study(store: Store, *, is_over: bool = True, **search: Any) -> SyntheticRun:
    """A study of 3 trials that has made 2 of them, or that has ended."""
    spec = make_spec(search={"space": SPACE, "trials": 3, "scheduler": None} | search)
    made = SyntheticRun(store, run_id=STUDY, spec=spec).submit()
    log = StudyLog(store, made.paths, generation=1)
    list(log.open())
    events: list[Event] = []
    for number in range(3 if is_over else 2):
        events += [
            Asked(trial=number, values={"optimizer.learning_rate": 1e-3}),
            Started(trial=number, leg=1, slot="a", until=1.0),
            Reported(trial=number, step=9, fraction=1.0, epochs=3, value=0.5, best=0.5),
            Decided(trial=number, decision="finish"),
            Left(trial=number),
        ]
    if is_over:
        events.append(Closed(reason="all 3 trials have been made"))
        outcome = Outcome(attempt=0, state=State.SUCCEEDED, step=9, trial=0)
        result = Result(
            run_id=STUDY,
            state=State.SUCCEEDED,
            generation=1,
            step=9,
            finished_at=START,
            outcome=outcome,
        )
        store.write(made.paths.result, result.to_bytes())
    log.append(events)
    made.lease(renewed_at=time.time(), released=is_over)
    return made


def requests(store: Store) -> list[Control]:
    return RunReader(store, STUDY).controls()


def test_a_study_that_has_ended_is_resumed_with_more_trials(
    shell: Shell, started: list[str]
) -> None:
    made_study(shell.store)
    shell.run("resume", STUDY, "--background", code=2)
    assert "its 3 trials are done" in shell.error
    assert "--trials 6" in shell.error
    assert started == []
    shown = shell.run("extend", STUDY, "--trials", "5", "--background")
    assert shown.strip() == f"{shell.store.uri}/{STUDY}"
    assert started == [f"{shell.store.uri}/{STUDY}"]
    (control,) = requests(shell.store)
    assert (control.kind, control.trials, control.space) == ("extend", 5, None)
    # One that a driver did not hear of any more is met by the next.
    shell.run("resume", STUDY, "--background")
    assert len(started) == 2


@pytest.mark.parametrize("source", ["yaml", "file", "job file"])
def test_another_space_is_checked_and_recorded_whole(
    shell: Shell, started: list[str], tmp_path: Path, source: str
) -> None:
    made_study(shell.store)
    space = "{optimizer.learning_rate: {loguniform: [1e-4, 1]}, model.dropout: {choice: [0, 0.1]}}"
    given = str(tmp_path / "space.yaml")
    if source == "yaml":
        given = space
    else:
        lead = "" if source == "file" else "name: x\nsearch:\n  trials: 2\n  space: "
        Path(given).write_text(lead + space)
    shell.run("extend", STUDY, "--trials", "5", "--space", given, "--background")
    (control,) = requests(shell.store)
    assert control.space == {
        "optimizer.learning_rate": {"loguniform": [1e-4, 1.0]},
        "model.dropout": {"choice": [0, 0.1]},
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--trials", "2"], "2 trials in all are asked for, but the study has 3, all of which"),
        (["--trials", "3"], "3 trials in all are asked for, but the study has 3"),
        (
            ["--trials", "5", "--space", "{model.dropot: {uniform: [0, 1]}}"],
            "model.dropot is not a known key",
        ),
        (["--trials", "5", "--space", "{}"], "--space: search.space holds no key"),
        (["--trials", "5", "--space", "none.yaml"], "none.yaml, which cannot be read"),
        (["--trials", "5", "--space", "[1, 2]"], "search.space"),
        (["--trials", "0"], "--trials"),
    ],
)
def test_what_cannot_be_met_is_refused_and_leaves_no_request(
    shell: Shell, started: list[str], options: list[str], message: str
) -> None:
    made_study(shell.store)
    shell.run("extend", STUDY, *options, code=2)
    assert message in shell.error
    assert requests(shell.store) == []
    assert started == []


def test_a_population_cannot_grow(shell: Shell, started: list[str]) -> None:
    made_study(shell.store, scheduler="pbt", trials=8)
    shell.run("extend", STUDY, "--trials", "16", code=2)
    assert "search.scheduler is pbt, whose population cannot grow" in shell.error
    assert "larger search.scheduler.population" in shell.error


def test_a_run_is_no_study(shell: Shell, started: list[str]) -> None:
    SyntheticRun(shell.store, run_id=STUDY).submit()
    shell.run("extend", STUDY, "--trials", "5", code=2)
    assert "is no study: its job has no search" in shell.error


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[Callable[[], None]]:
    """What happens while the command waits: one of these after each look at the log, in turn."""
    happens: list[Callable[[], None]] = []

    def sleep(seconds: float) -> None:
        happens.pop(0)()

    slept = SimpleNamespace(sleep=sleep, time=time.time, monotonic=time.monotonic)
    monkeypatch.setattr(extend, "time", slept)
    return happens


def driver_log(made: SyntheticRun) -> StudyLog:
    log = StudyLog(made.store, made.paths, generation=2)
    list(log.open())
    return log


def test_the_driver_of_a_study_that_goes_on_hears_of_it(
    shell: Shell,
    started: list[str],
    looks: list[Callable[[], None]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    log = driver_log(made_study(shell.store, is_over=False))
    read, fetched = study_log._events, Counter[str]()

    def counted(store: Store, key: str) -> list[Event]:
        fetched[key] += 1
        return read(store, key)

    monkeypatch.setattr(study_log, "_events", counted)
    looks += [lambda: None] * 5 + [lambda: log.append([Extended(trials=7, request=1)])]
    shell.run("extend", STUDY, "--trials", "7")
    assert looks == []
    assert shell.error == "the study has 7 trials in all from now on\n"
    assert max(fetched.values()) == 2, "to check the request, and to wait for the answer"
    monkeypatch.setattr(extend, "_HEAR_SECONDS", 0.0)
    shell.run("extend", STUDY, "--trials", "9")
    assert "the study's driver has not answered yet" in shell.error
    assert started == []
    assert [control.trials for control in requests(shell.store)] == [7, 9]


def test_what_the_driver_refuses_is_told_and_asked_of_no_other(
    shell: Shell, started: list[str], looks: list[Callable[[], None]]
) -> None:
    made = made_study(shell.store, is_over=False)
    log = driver_log(made)
    # Somebody else asks for more at the same moment.
    looks.append(lambda: log.append([Extended(trials=20, request=1)]))
    reason = "7 trials in all are asked for, but the study has 20"
    looks.append(lambda: log.append([Refused(request=2, reason=reason)]))
    request_extension(shell.store, made.paths, trials=20, space=None, by="another")
    shell.run("extend", STUDY, "--trials", "7", code=2)
    assert f"error: the study is not extended: {reason}" in shell.error
    assert f"shoal status {shell.store.uri}/{STUDY}" in shell.error
    assert started == []


def test_the_last_word_of_a_driver_is_heard(
    shell: Shell, started: list[str], looks: list[Callable[[], None]]
) -> None:
    made = made_study(shell.store, is_over=False)
    log = driver_log(made)

    def answers_and_ends() -> None:
        log.append([Extended(trials=7, request=1)])
        made.lease(renewed_at=time.time(), released=True)

    looks.append(answers_and_ends)
    shell.run("extend", STUDY, "--trials", "7")
    assert shell.error == "the study has 7 trials in all from now on\n"
    assert started == []


def test_a_finished_study_that_has_refused_a_request_is_not_driven_for_it(
    shell: Shell, started: list[str]
) -> None:
    made = made_study(shell.store)
    request_extension(shell.store, made.paths, trials=3, space=None, by="another")
    driver_log(made).append([Refused(request=1, reason="the study has 3")])
    shell.run("resume", STUDY, "--background", code=2)
    assert "its 3 trials are done" in shell.error
    assert started == []


def test_a_budget_that_is_used_up_allows_no_more_trials_unless_it_grows_too(
    shell: Shell, started: list[str]
) -> None:
    made = made_study(shell.store, trials=5, budget={"epochs": 9})
    shell.run("extend", STUDY, "--trials", "6", code=2)
    assert "search.budget.epochs (9) is used up, so the study would make none" in shell.error
    hint = "shoal resume STUDY --set search.budget.epochs=18 --set search.trials=6"
    assert hint in shell.error
    changed = "{optimizer.learning_rate: {loguniform: [1e-4, 1]}}"
    shell.run("extend", STUDY, "--trials", "6", "--space", changed, code=2)
    assert "first: shoal resume STUDY --set search.budget.epochs=18 --background" in shell.error
    shell.run("resume", STUDY, "--set", "search.trials=6", "--background", code=2)
    assert "search.budget.epochs (9) is used up" in shell.error
    assert (requests(shell.store), started) == ([], [])
    options = hint.removeprefix("shoal resume STUDY ").split()
    shell.run("resume", STUDY, *options, "--background")
    assert [control.trials for control in requests(shell.store)] == [6]
    spec = RunReader(shell.store, STUDY).spec()
    assert spec.search is not None
    assert spec.search.budget.epochs == 18
    assert len(started) == 1
    made.lease(renewed_at=time.time(), released=True)
    shell.run("extend", STUDY, "--trials", "7", "--background")
    assert [control.trials for control in requests(shell.store)] == [6, 7]


# ------------------------------------------------------------------------------------------ resume


def test_a_resume_may_change_budgets_and_operation_of_a_study(
    shell: Shell, started: list[str]
) -> None:
    made_study(shell.store)
    changes = [
        "search.budget.hours=5",
        "search.patience=9",
        "search.max_concurrent=3",
        "search.retries=4",
        "workers.memory_gib=3",
        "search.trials=6",
    ]
    options = [part for change in changes for part in ("--set", change)]
    shell.run("resume", STUDY, *options, "--background")
    spec = RunReader(shell.store, STUDY).spec()
    assert spec.search is not None
    search = spec.search
    assert (search.budget.hours, search.patience, search.max_concurrent) == (5, 9, 3)
    assert (search.retries, search.trials) == (4, 3)  # of which the log tells
    assert [control.trials for control in requests(shell.store)] == [6]
    assert len(started) == 1


@pytest.mark.parametrize(
    ("change", "message", "hint"),
    [
        ("search.trials=2", "2 trials in all are asked for", "shoal extend"),
        ("search.space={}", "search.space cannot change", "shoal extend STUDY --trials N --space"),
        ("search.seed=1", "search.seed cannot change", "search.patience"),
        ("train.epochs=9", "train.epochs cannot change", "start a new study"),
        ("optimizer.learning_rate=1", "optimizer.learning_rate cannot change", "new study"),
        ("search.patience=soon", "must be a whole number above 0", "patience"),
    ],
)
def test_a_resume_changes_nothing_else_of_a_study(
    shell: Shell, started: list[str], change: str, message: str, hint: str
) -> None:
    made_study(shell.store)
    before = [head.key for head in shell.store.list()]
    shell.run("resume", STUDY, "--set", change, "--background", code=2)
    assert message in shell.error
    assert hint in shell.error
    assert [head.key for head in shell.store.list()] == before
    assert started == []


def test_a_resume_of_a_run_has_no_search_to_change(shell: Shell, started: list[str]) -> None:
    SyntheticRun(shell.store, run_id=STUDY).submit()
    shell.run("resume", STUDY, "--set", "search.patience=3", "--background", code=2)
    assert "so search.patience cannot change" in shell.error


@pytest.mark.parametrize("command", [["resume"], ["stop"], ["delete", "--yes"]])
def test_a_trial_alone_is_not_to_be_driven_or_deleted(shell: Shell, command: list[str]) -> None:
    made = made_study(shell.store)
    shell.store.write(made.paths.trial(1).spec, made.spec.to_bytes())
    uri = f"{shell.store.uri}/{STUDY}"
    shell.run(command[0], f"{uri}/trials/0001", *command[1:], code=2)
    assert "trials/0001 is a trial of a study, which alone starts, stops and removes" in shell.error
    assert f"name the study: {uri}\n" in shell.error
    assert shell.json("status", f"{uri}/trials/0001")["run_id"] == f"{STUDY}/trials/0001"
