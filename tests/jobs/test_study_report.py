"""The report of a study: what it says, in whatever state, and that it is one safe file."""

from __future__ import annotations

import importlib.util
import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
from synthetic import make_spec
from synthetic_study import (
    SPACE,
    SyntheticStudy,
    ended_study,
    make_study_spec,
    quality,
    running_study,
)
from test_report import EVIL, Balanced

from cluster.storage import Store
from jobs.parse import load_spec
from jobs.record import Failure, State
from jobs.report import build_report, render_html, to_json, write_report
from jobs.runs import RunReader
from jobs.study.events import Asked, Donor, Extended
from jobs.study.importance import Scored, importances
from jobs.study.space import job_with, space_of, trial_seed
from jobs.study_charts import draw_all


def report_of(made: SyntheticStudy) -> dict[str, Any]:
    return build_report(RunReader(made.store, made.run_id))


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> SyntheticStudy:
    from cluster.storage import open_store

    return ended_study(open_store(str(tmp_path_factory.mktemp("study"))))


@pytest.fixture(scope="module")
def report(ended: SyntheticStudy) -> dict[str, Any]:
    return report_of(ended)


@pytest.fixture(scope="module")
def html(report: dict[str, Any]) -> str:
    return render_html(report)


# ---------------------------------------------------------------------------------- what it says


def test_the_ranking_has_the_best_configurations_first(
    ended: SyntheticStudy, report: dict[str, Any]
) -> None:
    ranking = report["study"]["ranking"]
    assert len(ranking) == 20
    means = [row["mean"] for row in ranking]
    assert means == sorted(means, reverse=True)
    assert ranking[0]["of"] == 9
    assert ranking[0]["values"] == ended.begun[9].values
    assert (ranking[0]["fraction"], ranking[0]["status"]) == (1.0, "finished")


def test_finalists_are_compared_by_mean_and_spread_over_seeds(report: dict[str, Any]) -> None:
    first, second = report["study"]["finalists"]
    assert (first["of"], second["of"]) == (9, 16)
    assert len(first["scores"]) == 3
    assert first["mean"] == pytest.approx(sum(first["scores"]) / 3)
    deviations = [(score - first["mean"]) ** 2 for score in first["scores"]]
    assert first["spread"] == pytest.approx((sum(deviations) / 2) ** 0.5)
    assert first["mean"] > second["mean"]


def test_a_finalist_that_failed_is_told_and_ranks_behind(local_store: Store) -> None:
    made = SyntheticStudy(local_store)
    best, other = (made.ask() for _ in range(2))
    for number, value in ((best, 0.9), (other, 0.8)):
        made.start(number, 1.0)
        made.report(number, 1.0, value)
        made.decide(number, "finish")
    made.close()
    made.finalists([best, other], seeds=1)
    lost = made.ask(made.begun[best].values, repeat=2, repeats=best, purpose="finalist")
    made.start(lost, 1.0)
    made.fail(lost)
    report = report_of(made)
    shown = [(row["of"], len(row["scores"]), row["failed"]) for row in report["study"]["finalists"]]
    assert shown == [(other, 1, 0), (best, 1, 1)]
    assert "and 1 failed</td>" in render_html(report)


def test_the_history_has_each_trial_and_the_best_so_far(report: dict[str, Any]) -> None:
    history = report["study"]["history"]
    assert [row["trial"] for row in history] == [n for n in range(24) if n not in (3, 11)]
    best = [row["best"] for row in history]
    assert best == sorted(best)
    assert best[-1] == max(row["score"] for row in history)


def test_curves_are_the_trials_own_evaluations_where_they_are_there(local_store: Store) -> None:
    made = SyntheticStudy(local_store)
    for _ in range(2):
        made.train(made.ask(), 1.0, "finish")
    made.trial_run(1, steps=300)
    curves = {curve["trial"]: curve for curve in report_of(made)["study"]["curves"]}
    assert [point[0] for point in curves[1]["points"]] == pytest.approx(
        [step / 300 for step in range(50, 301, 50)]
    )
    assert curves[0]["points"] == [[1.0, made.bests[0]]]
    assert curves[0]["status"] == "finished"


def test_epochs_are_told_by_what_became_of_their_trials(report: dict[str, Any]) -> None:
    spent = report["study"]["epochs_by_status"]
    # 22 trials to the first rung, 7 to the second, 2 to the end, 2 configurations with 3 seeds.
    assert spent["finished"] == pytest.approx(2 * 3)
    assert spent["stopped"] == pytest.approx(5 * 1 + 15 / 3)
    assert spent["finalists"] == pytest.approx(6 * 3)
    assert spent["failed"] == 0
    assert sum(spent.values()) == pytest.approx(report["study"]["spent"]["epochs"])


def test_importance_is_of_scores_at_the_same_part_of_the_budget(report: dict[str, Any]) -> None:
    importance = report["study"]["importance"]
    assert importance["fraction"] == pytest.approx(1 / 9)
    assert importance["trials"] == 22
    shares = importance["shares"]
    assert set(shares) == set(SPACE)
    assert max(shares, key=lambda path: shares[path]) == "optimizer.learning_rate"
    rows = {row["trial"]: row for row in report["study"]["all_trials"]}
    assert rows[9]["comparable"] < rows[9]["score"]
    assert rows[3]["comparable"] is None


def test_importance_finds_the_key_that_the_score_depends_on() -> None:
    spec = make_study_spec()
    space = space_of(spec)
    draws = SyntheticStudy.drawn
    study = type("Drawn", (), {"space": space})()
    scored = []
    for number in range(80):
        values = draws(study, number)
        scored.append(Scored(values, score=abs(values["model.dropout"] - 0.2)))
    shares, count = importances(space, scored)
    assert shares["model.dropout"] > 0.8
    assert count == 80
    assert importances(space, scored) == (shares, 80)
    shares, count = importances(space, [*scored, *scored, *scored])
    assert shares
    assert count == 120  # not all of them are looked at
    assert importances(space, scored[:1]) == ({}, 1)


NARROW: dict[str, Any] = {
    "optimizer.learning_rate": {"loguniform": [1e-5, 1e-4]},
    "optimizer.warmup_steps": {"choice": [0, 30]},
}
DROPPED = ("optimizer.weight_decay", "model.dropout", "batching.global_batch_size")


def extended_study(store: Store) -> SyntheticStudy:
    """12 trials of SPACE, the first with the job's own values, then 8 of another space, whose score
    depends on a key that the first space has not."""
    made = SyntheticStudy(store)
    for number in range(12):
        made.fractions[number] = 0.0
        made.begun[number] = Asked(trial=number, values=made.drawn(number) if number else {})
        made.append(made.begun[number])
        made.start(number, 1.0)
        made.report(number, 1.0, 0.5 + 0.01 * number)
        made.decide(number, "finish")
    made.append(Extended(trials=20, space=NARROW))
    for number in range(12, 20):
        steps = 30 * (number % 2)
        made.ask({"optimizer.learning_rate": 1.5e-6 * number, "optimizer.warmup_steps": steps})
        made.start(number, 1.0)
        made.report(number, 1.0, 0.9 - 0.01 * steps)
        made.decide(number, "finish")
    return made


def test_an_extended_study_has_the_keys_of_all_its_spaces(local_store: Store) -> None:
    made = extended_study(local_store)
    study = report_of(made)["study"]
    keys = {key["path"]: key for key in study["keys"]}
    assert list(keys) == [*NARROW, *DROPPED]
    assert keys["optimizer.warmup_steps"]["choices"] == [0, 30]
    # Trials of both spaces lie between the ends of the axis.
    rate = keys["optimizer.learning_rate"]
    assert (rate["low"], rate["high"], rate["log"]) == (1e-6, 1e-3, True)
    assert rate["over"] == "loguniform 1e-05 to 0.0001"
    assert keys["model.dropout"]["over"] == "uniform 0 to 0.4, in earlier trials"
    charts = draw_all(study)
    assert {f"scatter {path}" for path in keys} <= charts.keys()
    page = render_html(report_of(made))
    for path in keys:
        assert f'title="{path}"' in page


def test_importance_is_of_the_newest_space_and_tells_of_how_many_trials(local_store: Store) -> None:
    made = extended_study(local_store)
    built = report_of(made)
    importance = built["study"]["importance"]
    assert set(importance["shares"]) == set(NARROW)
    assert importance["shares"]["optimizer.warmup_steps"] > 0.8
    # The new ones and the job's own values; those of the old space have other dropouts.
    assert (importance["trials"], importance["outside"]) == (9, 11)
    page = render_html(built)
    assert "Of 9 trials, by their scores at 100% of the budget" in page
    assert "11 more lie outside of the newest space." in page


def test_old_trials_count_in_a_wider_space_with_more_keys(local_store: Store) -> None:
    made = SyntheticStudy(local_store)
    for _ in range(6):
        made.train(made.ask(), 1.0, "finish")
    wider = SPACE | {
        "model.dropout": {"choice": [0.1, 0.2]},
        "optimizer.warmup_steps": {"integer": [0, 200]},
    }
    made.append(Extended(trials=20, space=wider))
    assert report_of(made)["study"]["importance"]["outside"] == 6  # their dropouts
    wider["model.dropout"] = {"uniform": [0.0, 0.9]}
    made.append(Extended(trials=21, space=wider))
    importance = report_of(made)["study"]["importance"]
    assert (importance["trials"], importance["outside"]) == (6, 0)
    assert set(importance["shares"]) == set(wider)
    wider["optimizer.warmup_steps"] = {"integer": [31, 200]}  # none of which is the job's
    made.append(Extended(trials=22, space=wider))
    built = report_of(made)
    assert built["study"]["importance"]["shares"] == {}
    few = "It takes at least two trials whose scores differ, and 6 lie outside of the newest space."
    assert few in render_html(built)


def test_a_range_that_was_logarithmic_and_now_holds_zero_has_a_plain_axis(
    local_store: Store,
) -> None:
    made = SyntheticStudy(local_store)
    made.train(made.ask(), 1.0, "finish")
    space = SPACE | {"optimizer.weight_decay": {"uniform": [0, 0.1]}}
    made.append(Extended(trials=20, space=space))
    made.train(made.ask(made.drawn(1) | {"optimizer.weight_decay": 0.0}), 1.0, "finish")
    study = report_of(made)["study"]
    decay = next(key for key in study["keys"] if key["path"] == "optimizer.weight_decay")
    assert (decay["low"], decay["high"], decay["log"]) == (0.0, 0.3, False)
    assert "parallel" in draw_all(study)


def test_clones_do_not_count_for_what_their_donors_have_learned(local_store: Store) -> None:
    spec = make_study_spec(
        scheduler={"kind": "pbt", "population": 2},
        trials=2,
        space={key: SPACE[key] for key in ("model.dropout", "optimizer.learning_rate")},
        finalists=None,
    )
    made = SyntheticStudy(local_store, spec=spec)
    values = {"model.dropout": 0.1, "optimizer.learning_rate": 3e-5}
    for dropout in (0.1, 0.3):
        made.ask({**values, "model.dropout": dropout})
        made.start(len(made.begun) - 1, 0.5)
        made.report(len(made.begun) - 1, 0.5, 0.5 + dropout)
        made.decide(len(made.begun) - 1, "pause")
    made.ask(values, donor=Donor(trial=1, step=150))
    made.train(2, 1.0, "finish")
    study = report_of(made)["study"]
    assert study["importance"]["trials"] == 2
    assert study["spent"]["epochs"] == pytest.approx(1.5 * 3)
    render_html(report_of(made))


def test_without_optuna_the_report_says_so(
    local_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "optuna" else find(name)
    )
    built = report_of(running_study(local_store, now=time.time()))
    assert built["study"]["importance"]["shares"] == {}
    assert "Not computed: optuna is not installed here" in render_html(built)
    assert "contour" in draw_all(built["study"])


# ------------------------------------------------------------------------------------ the winner


def test_the_winner_is_a_job_file_to_run(ended: SyntheticStudy, tmp_path: Path) -> None:
    uri = write_report(ended.store, ended.run_id)
    assert uri.endswith("report/index.html")
    file = tmp_path / "winner.yaml"
    file.write_bytes(ended.store.read(ended.paths.winner))
    winner = report_of(ended)["study"]["winner"]
    assert winner["trial"] == 28
    asked = ended.begun[28]
    seed = trial_seed(ended.spec, asked.repeat)
    assert seed != ended.spec.data.seed
    assert load_spec(file) == job_with(ended.spec, asked.values, seed=seed)
    assert load_spec(file).search is None
    assert file.read_text().startswith(f"# Trial 28 of {ended.store.uri}/{ended.run_id}: ")


def test_the_model_is_that_of_the_winner(report: dict[str, Any], html: str) -> None:
    commands = report["commands"]
    assert "/trials/0028/checkpoints/step-" in commands["load"]
    assert commands["evaluate"].endswith("/trials/0028 --data URI")
    assert "AutoModelForSequenceClassification.from_pretrained(" in html


def test_without_a_score_there_is_no_winner(local_store: Store) -> None:
    made = SyntheticStudy(local_store)
    write_report(local_store, made.run_id)
    assert local_store.head(made.paths.winner) is None


# --------------------------------------------------------------------------------- any condition


def test_a_study_that_goes_on_has_a_report(local_store: Store) -> None:
    made = running_study(local_store, now=time.time())
    page = render_html(report_of(made))
    assert "The run goes on" in page
    assert "about 2h" in page
    assert "Finalists" not in page


def test_a_study_that_was_killed_has_a_report(local_store: Store) -> None:
    made = running_study(local_store, now=time.time() - 7200)
    made.run.lease(renewed_at=made.now - 7200)
    page = render_html(report_of(made))
    assert "shoal resume" in page
    assert "The winner as a job" in page


@pytest.mark.parametrize("failed", [False, True])
def test_a_study_without_a_finished_trial_has_a_report(local_store: Store, failed: bool) -> None:
    made = SyntheticStudy(local_store)
    if failed:
        made.start(made.ask(), 1.0)
        made.fail(0)
    built = report_of(made)
    assert draw_all(built["study"]) == {}
    page = render_html(built)
    assert "no trial has reported yet" in page
    assert "It takes at least two trials whose scores differ." in page
    assert ("the loss of step 40 is not a number" in page) is failed
    assert "The winner as a job" not in page


def test_a_study_of_conditional_keys_choices_and_diverged_trials_has_a_report(
    local_store: Store,
) -> None:
    space = {
        "optimizer.learning_rate": {"loguniform": [1e-6, 1e-3]},
        "optimizer.kind": {"choice": ["adamw", "sgd"]},
        "optimizer.momentum": {"uniform": [0.0, 0.9], "when": {"optimizer.kind": "sgd"}},
        "model.freeze": {"choice": [[], ["embeddings"]]},
        "batching.packing": {"choice": [True, False]},
    }
    made = SyntheticStudy(local_store, spec=make_study_spec(space=space))
    for number in range(30):
        made.ask()
        made.start(number, 1.0)
        made.report(number, 1.0, 0.001 if number % 10 == 3 else None)
        made.decide(number, "finish")
    built = report_of(made)
    assert "optimizer.momentum" not in built["study"]["importance"]["shares"]
    charts = draw_all(built["study"])
    assert {name for name in charts if name.startswith("scatter ")} == {
        f"scatter {path}" for path in space
    }
    assert "[embeddings]" in charts["scatter model.freeze"]
    render_html(built)


# -------------------------------------------------------------------------------------- the page


def test_the_page_is_one_file_that_fetches_nothing(html: str) -> None:
    page = Balanced()
    page.feed(html)
    assert page.open == []
    assert all(link.startswith("#") for link in page.links)
    assert "<script" not in html
    assert not re.search(r"url\((?!#)", html)
    # History, curves, four keys, parallel coordinates, contour.
    assert html.count("<svg") == 8
    assert "#0001" not in html


def test_axes_are_logarithmic_where_the_space_is(report: dict[str, Any]) -> None:
    charts = draw_all(report["study"])
    assert "1e-5" in charts["scatter optimizer.learning_rate"]
    assert "1e-" not in charts["scatter model.dropout"]
    assert {"16", "32", "64"} <= set(
        re.findall(r">(\d+)<", charts["scatter batching.global_batch_size"])
    )


def test_text_of_the_study_is_escaped(local_store: Store) -> None:
    made = SyntheticStudy(local_store)
    made.start(made.ask(), 1.0)
    made.fail(0, Failure(state=State.FAILED_USER, problems=((f"bad {EVIL}", None),)))
    made.train(made.ask(), 1.0, "stop", EVIL)
    page = render_html(report_of(made))
    assert "<script>" not in page
    assert "bad &lt;script&gt;" in page


def test_json_has_only_finite_numbers(report: dict[str, Any]) -> None:
    json.loads(to_json(report), parse_constant=lambda name: pytest.fail(name))


def test_a_thousand_trials_make_a_page_of_bounded_size(local_store: Store) -> None:
    made = SyntheticStudy(local_store, spec=make_study_spec(trials=3000))
    values = [made.drawn(number) for number in range(1200)]
    made.log.append([Asked(trial=n, values=v, at=made.now) for n, v in enumerate(values)])
    from jobs.study.events import Decided, Left, Reported

    events: list[Any] = []
    for number, own in enumerate(values):
        score = quality(own, 1.0)
        events += [
            Reported(
                trial=number,
                step=300,
                fraction=1.0,
                epochs=3.0,
                value=score,
                best=score,
                at=made.now,
            ),
            Decided(trial=number, decision="finish", at=made.now),
            Left(trial=number, at=made.now),
        ]
    made.log.append(events)
    page = render_html(report_of(made))
    assert len(page) < 1_500_000


def test_the_report_of_a_trial_is_that_of_a_run(ended: SyntheticStudy) -> None:
    built = build_report(RunReader(ended.store, ended.run_id).trial(28))
    assert built["study"] is None
    assert built["state"] == "SUCCEEDED"
    assert [e["step"] for e in built["evaluations"]] == list(range(50, 301, 50))
    render_html(built)


def test_scores_where_less_is_better_rank_upwards(local_store: Store) -> None:
    stopping = {"early_stopping": {"metric": "validation/loss", "mode": "min"}}
    search = {"metric": "validation/loss", "mode": "min", "space": SPACE, "trials": 3}
    made = SyntheticStudy(local_store, spec=make_spec(train=stopping, search=search))
    for value in (0.5, 0.2, 0.9):
        number = made.ask()
        made.start(number, 1.0)
        made.report(number, 1.0, value)
        made.decide(number, "finish")
        made.bests[number] = value
    study = report_of(made)["study"]
    assert [row["of"] for row in study["ranking"]] == [1, 0, 2]
    assert [row["best"] for row in study["history"]] == [0.5, 0.2, 0.2]
    assert study["winner"]["trial"] == 1
