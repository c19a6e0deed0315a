"""What people see of a study: status, live view, lines, list, Prometheus, and one of its trials."""

from __future__ import annotations

import io
import time
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from synthetic import START, SyntheticRun, make_spec
from synthetic_study import SyntheticStudy, ended_study, make_study_spec, running_study
from test_commands import Shell

from cluster.storage import Store
from jobs.prometheus import exposition
from jobs.record import State
from jobs.runs import RunReader
from jobs.status import RunStatus, read_status
from jobs.study.events import Donor
from jobs.study_status import StudyStatus
from jobs.study_view import (
    format_value,
    over_text,
    short_names,
    spent_text,
    trials_text,
    values_text,
)
from jobs.watch import LineView, live_renderable

RUNNING = "sentiment-5eed01"


@pytest.fixture
def shell(
    local_store: Store, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Shell:
    monkeypatch.setenv("SHOAL_STORE", local_store.uri)
    return Shell(local_store, capsys)


def status_of(made: SyntheticStudy) -> RunStatus:
    return read_status(RunReader(made.store, made.run_id))


def study_of(made: SyntheticStudy) -> StudyStatus:
    study = status_of(made).study
    assert study is not None
    return study


def drawn(status: RunStatus, *, width: int = 140) -> str:
    console = Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None)
    with console.capture() as capture:
        console.print(live_renderable(status))
    return capture.get()


def flat(text: str) -> str:
    return " ".join(text.split())


# ------------------------------------------------------------------------------------ status


def test_status_tells_how_many_trials_do_what_and_the_best(shell: Shell) -> None:
    running_study(shell.store, now=time.time())
    shown = shell.run("status", RUNNING)
    assert shown.startswith(f"{RUNNING}  RUNNING\n")
    text = flat(shown)
    assert (
        "16 of 24 begun: 2 running, 1 waiting, 3 paused, 8 stopped, 1 failed, 1 finished; " in text
    )
    assert " an hour, about 2h" in text
    assert "validation/f1 0.8986, trial 9 (learning_rate 2.449e-05, " in text
    assert "8.4 epochs, 25m 0" in text
    assert "9 finished 100% 0.8986 its budget is used up" in text
    assert "7% 11% - learning_rate 5.984e-06" in text


def test_a_failed_trial_is_told_with_its_cause(shell: Shell) -> None:
    made = SyntheticStudy(shell.store)
    made.ask()
    made.start(0, 1.0)
    made.fail(0)
    assert "0 failed 0% - the loss of step 40 is not a number" in flat(shell.run("status", RUNNING))
    ended = shell.json("status", RUNNING)["study"]["ended"]
    assert [(row["trial"], row["reason"]) for row in ended] == [
        (0, "the loss of step 40 is not a number")
    ]


def test_status_json_has_stable_names(shell: Shell) -> None:
    made = running_study(shell.store, now=time.time())
    found = shell.json("status", RUNNING)
    assert found["state"] == "RUNNING"
    study = found["study"]
    assert study["trials"] == {
        "wanted": 24,
        "begun": 16,
        "made": 16,
        "finalists": 0,
        "running": 2,
        "waiting": 1,
        "paused": 3,
        "stopped": 8,
        "failed": 1,
        "finished": 1,
    }
    assert study["best"]["trial"] == 9
    assert study["best"]["run"] == "trials/0009"
    assert study["best"]["score"] == made.bests[9]
    assert study["best"]["values"] == made.begun[9].values
    assert [(slot["trial"], slot["slot"], slot["until"]) for slot in study["slots"]] == [
        (13, "a1", pytest.approx(1 / 9)),
        (14, "b2", pytest.approx(1 / 9)),
    ]
    # From the trial's own metrics: the log has no report of it yet.
    assert study["slots"][0]["fraction"] == pytest.approx(20 / 300)
    assert found["eta_seconds"] == study["eta_seconds"] > 0
    assert study["spent"]["epochs"] == pytest.approx(8 + 2 * 0.2)
    assert set(study["budget"]) == {"epochs", "gpu_hours", "hours"}


def test_a_run_without_a_search_is_no_study(shell: Shell) -> None:
    SyntheticRun(shell.store).submit()
    assert shell.json("status", "sentiment-a1b2c3")["study"] is None
    assert shell.json("list")["runs"][0]["trials"] is None


def test_a_study_without_a_trial_has_a_status(shell: Shell) -> None:
    SyntheticStudy(shell.store)
    text = flat(shell.run("status", RUNNING))
    assert "trials 0 of 24 begun" in text
    assert "no trial has reported validation/f1 yet" in text


def test_a_study_whose_driver_was_killed_has_nothing_on_slots(shell: Shell) -> None:
    made = running_study(shell.store, now=time.time() - 7200)
    made.run.lease(renewed_at=made.now - 7200)
    found = shell.json("status", RUNNING)
    assert (found["state"], found["study"]["slots"]) == ("FAILED_INFRA", [])
    assert found["study"]["eta_seconds"] is None
    assert found["study"]["spent"]["hours"] < 0.5


def test_finalists_are_told_apart_and_their_mean_with_the_winner(shell: Shell) -> None:
    ended_study(shell.store)
    text = flat(shell.run("status", RUNNING))
    assert "24 of 24 begun, then 6 of finalists: 20 stopped, 2 failed, 8 finished" in text
    assert "(mean of 3 seeds 0.9007), trial 28 " in text
    assert "29 (finalist) finished 100%" in text
    assert "test accuracy 0.884" in text


def test_a_damaged_log_is_named_and_the_rest_is_shown(shell: Shell) -> None:
    made = running_study(shell.store, now=time.time())
    shell.store.write(made.paths.study_object(3), b"{}")
    text = shell.run("status", RUNNING)
    assert "0 of 24 begun" in text
    assert "study/00000003.json is damaged" in flat(shell.error)


# --------------------------------------------------------------------------- live, lines, list


def test_the_live_view_has_the_trials_on_slots_and_those_that_ended(local_store: Store) -> None:
    screen = drawn(status_of(running_study(local_store, now=time.time())))
    lines = [flat(line) for line in screen.splitlines()]
    assert lines[0] == f"{RUNNING} RUNNING"
    assert any("16 of 24 begun: 2 running" in line for line in lines)
    assert any("13 ━" in line and "7% 11%" in line for line in lines)
    assert any("9 finished 100% 0.8986" in line for line in lines)
    assert "step 0" not in screen


def test_the_live_view_fits_eighty_columns(local_store: Store) -> None:
    screen = drawn(status_of(running_study(local_store, now=time.time())), width=80)
    assert max(map(len, screen.splitlines())) <= 80
    assert "learning_rate 5.984e-06" in flat(screen)


def test_lines_tell_each_end_of_a_trial_once_and_no_state_again_and_again(
    local_store: Store,
) -> None:
    made = SyntheticStudy(local_store)
    made.halve(9, failing=(3,))
    for _ in range(5):
        made.run.state(State.RUNNING, "9 of 24 trials begun", time=made.now)
    console = Console(file=io.StringIO(), width=200)
    reader = RunReader(local_store, made.run_id)
    with console.capture() as first, LineView(console) as view:
        view.show(read_status(reader))
    told = first.get().splitlines()
    assert sum("trial 3 failed at 0%: the loss of step 40 is not a number" in t for t in told) == 1
    assert sum(" stopped at 11%: validation/f1 " in line for line in told) == 6
    assert not any("9 of 24 trials begun" in line for line in told)
    best = made.ask()
    made.start(best, 1.0)
    made.report(best, 1.0, 0.95)
    made.decide(best, "finish", "its budget is used up")
    with console.capture() as second:
        view.show(read_status(reader))
    (line,) = second.get().splitlines()
    assert line.endswith(" trial 9 finished at 100%: validation/f1 0.95, the best so far")


def test_list_shows_a_study_as_one(shell: Shell) -> None:
    made = running_study(shell.store, now=time.time())
    made.trial_run(9, steps=300)
    ended_study(shell.store, run_id="sentiment-00dead")
    shown = [line.split() for line in shell.run("list").splitlines()]
    rows = {row[0]: row for row in shown[1:]}
    assert rows[RUNNING][1:6] == ["RUNNING", "3", "trials", "validation/f1", "0.8986"]
    assert rows["sentiment-00dead"][4:6] == ["test/accuracy", "0.884"]
    assert len(rows) == 2
    runs = {run["run_id"]: run for run in shell.json("list")["runs"]}
    assert runs[RUNNING]["trials"] == 3


def test_prometheus_counts_trials_by_status(local_store: Store) -> None:
    made = running_study(local_store, now=time.time())
    found: dict[str, dict[str, float]] = {}
    for family in text_string_to_metric_families(exposition(status_of(made), [])):
        assert family.documentation
        for sample in family.samples:
            labels = {k: v for k, v in sample.labels.items() if k != "run"}
            found.setdefault(sample.name, {})[",".join(labels.values())] = sample.value
    assert found["shoal_trials"] == {
        "running": 2,
        "waiting": 1,
        "paused": 3,
        "stopped": 8,
        "failed": 1,
        "finished": 1,
    }
    assert found["shoal_trials_wanted"] == {"": 24}
    assert found["shoal_best"] == {"validation/f1": made.bests[9]}
    assert found["shoal_trial_epochs_total"][""] == pytest.approx(8.4)
    assert found["shoal_state"]["RUNNING"] == 1
    assert "shoal_rows_total" not in found


def test_finalists_are_no_part_of_what_the_budget_bounds(local_store: Store) -> None:
    made = SyntheticStudy(local_store, spec=make_study_spec(trials=2, budget={"epochs": 7}))
    for number in (made.ask(), made.ask()):
        made.train(number, 1.0, "finish")
    assert spent_text(study_of(made)).startswith("6 of 7 epochs, ")
    made.close("all 2 trials have been made")
    made.finalists([0, 1], seeds=2)
    assert spent_text(study_of(made)).startswith("6 of 7 epochs and 12 for finalists, ")


def test_clones_and_seeds_are_counted_apart(local_store: Store) -> None:
    space = {"optimizer.learning_rate": {"loguniform": [1e-6, 1e-3]}}
    search = {"space": space, "trials": 2, "finalists": None}
    scheduler = {"kind": "pbt", "population": 2}
    made = SyntheticStudy(local_store, spec=make_study_spec(scheduler=scheduler, **search))
    made.train(made.ask(), 0.5, "pause")
    made.ask(donor=Donor(trial=0, step=150))
    assert trials_text(study_of(made)).startswith("1 of 2 begun, 1 clones of them: ")
    spec = make_study_spec(repeats=3, scheduler=None, **search)
    seeds = SyntheticStudy(local_store, run_id="sentiment-seeds0", spec=spec)
    seeds.ask()
    assert trials_text(study_of(seeds)).startswith("1 of 2 begun, each with 3 seeds: ")


# ------------------------------------------------------------------------------------ one trial


def test_a_trial_is_named_by_number_or_by_its_uri(shell: Shell) -> None:
    running_study(shell.store, now=time.time())
    by_number = shell.run("status", RUNNING, "--trial", "13")
    assert by_number.startswith(f"{RUNNING}/trials/0013  RUNNING  on slot a1, until 11%\n")
    assert "step 20 of 300 (7%)" in by_number
    uri = f"{shell.store.uri}/{RUNNING}/trials/0013"
    found = shell.json("status", uri)
    assert (found["run_id"], found["state"]) == (f"{RUNNING}/trials/0013", "RUNNING")
    assert found["uri"] == uri


def test_logs_of_a_trial(shell: Shell) -> None:
    made = running_study(shell.store, now=time.time())
    SyntheticRun(shell.store, made.paths.trial(13).run_id).logs(time=START)
    assert "rank 0 loads the model" in shell.run("logs", RUNNING, "--trial", "13")
    assert shell.run("logs", RUNNING) == ""


def test_a_trial_that_has_not_begun_is_refused(shell: Shell) -> None:
    running_study(shell.store, now=time.time())
    shell.run("status", RUNNING, "--trial", "99", code=2)
    assert f"there is no trial 99 of {shell.store.uri}/{RUNNING}, or it has not begun" in flat(
        shell.error
    )
    assert "shoal status" in shell.error


@pytest.mark.parametrize("command", ["resume", "stop", "delete"])
def test_what_acts_on_runs_acts_on_the_study_alone(shell: Shell, command: str) -> None:
    running_study(shell.store, now=time.time())
    shell.run(command, f"{shell.store.uri}/{RUNNING}/trials/0013", code=2)
    assert "is a trial of a study" in shell.error
    assert f"name the study: {shell.store.uri}/{RUNNING}" in shell.error


@pytest.mark.parametrize(
    ("number", "state", "cause"),
    [
        (9, "SUCCEEDED", "its budget is used up"),
        (8, "PRUNED", "its study ended it at 11% of its budget: not among the best 1/3"),
        (3, "FAILED_USER", "the loss of step 40 is not a number"),
        (10, "PENDING", "paused at 11% of its budget: not among the best 1/3"),
        (15, "PENDING", "it waits for a slot"),
        (14, "RUNNING", "on slot b2, until 11%"),
    ],
)
def test_a_trial_is_in_the_state_that_its_study_tells(
    local_store: Store, number: int, state: str, cause: str
) -> None:
    made = running_study(local_store, now=time.time())
    if number != 14:  # which has its folder already
        made.trial_run(number, steps=30)
    found = read_status(RunReader(local_store, made.run_id).trial(number)).situation
    assert (found.state, found.is_over) == (state, state not in ("PENDING", "RUNNING"))
    assert (found.cause or "").startswith(cause)


def test_a_trial_under_way_ends_with_its_study(local_store: Store) -> None:
    made = running_study(local_store, now=time.time())
    made.ended(9, State.STOPPED)
    found = read_status(RunReader(local_store, made.run_id).trial(13)).situation
    assert (found.state, found.is_over, found.cause) == (
        State.STOPPED,
        True,
        "its study is STOPPED",
    )


# --------------------------------------------------------------------------------------- words


def test_values_are_named_by_what_tells_them_apart() -> None:
    assert short_names(["model.dropout", "optimizer.kind", "task.kind"]) == {
        "model.dropout": "dropout",
        "optimizer.kind": "optimizer.kind",
        "task.kind": "task.kind",
    }
    values: dict[str, Any] = {"model.dropout": 0.12345, "model.freeze": ["embeddings"]}
    assert values_text(values, values) == "dropout 0.1235, freeze [embeddings]"
    assert [format_value(v) for v in (True, None, 16, "adamw", [])] == [
        *("true", "null", "16", "adamw", "[]")
    ]


def test_distributions_are_told_as_people_write_them() -> None:
    space = {
        "optimizer.learning_rate": {"loguniform": [1e-6, 1e-3]},
        "optimizer.momentum": {"uniform": [0.0, 0.9], "when": {"optimizer.kind": "sgd"}},
        "optimizer.kind": {"choice": ["adamw", "sgd"]},
        "batching.global_batch_size": {"quniform": [16, 64, 16]},
    }
    search = make_study_spec(space=space).search
    assert search is not None
    assert {path: over_text(over) for path, over in search.space.items()} == {
        "optimizer.learning_rate": "loguniform 1e-06 to 0.001",
        "optimizer.momentum": "uniform 0 to 0.9 where optimizer.kind is sgd",
        "optimizer.kind": "choice of adamw, sgd",
        "batching.global_batch_size": "quniform 16 to 64 in steps of 16",
    }
    assert make_spec().search is None
