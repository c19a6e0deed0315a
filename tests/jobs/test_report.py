"""The report: what it says, and that it is one safe file."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from typing import Any

import pytest
from synthetic import START, SyntheticRun, evaluation, make_spec, running, succeeded

from cluster.storage import Store
from jobs.charts import draw_all
from jobs.record import Source
from jobs.report import build_report, render_html, to_json, write_report
from jobs.report_tables import matrices, top_confusions
from jobs.runs import RunReader

EVIL = '<script>alert("x")</script> & <b>'
VOID = {"meta", "br", "img", "path", "use", "rect"}


class Balanced(HTMLParser):
    """Checks that tags are closed in order, and keeps attributes that could fetch something."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [v or "" for k, v in attrs if k in ("src", "href", "xlink:href", "action")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [v or "" for k, v in attrs if k in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag


def report_of(made: SyntheticRun) -> dict[str, Any]:
    return build_report(RunReader(made.store, made.run_id))


def test_the_report_holds_the_evidence(local_store: Store) -> None:
    report = report_of(succeeded(local_store))
    assert report["headline"] == {
        "metric": "accuracy",
        "after": report["test"]["metrics"]["accuracy"],
        "before": report["before"]["metrics"]["accuracy"],
    }
    assert report["tested_on"] == "test"
    assert report["notes"] == []
    assert [p["step"] for p in report["training"]] == list(range(10, 301, 10))
    assert len(report["throughput"]) == 13 + 20  # the lost steps took time too
    assert [a["restored_step"] for a in report["attempts"]] == [None, 100]
    assert report["data"]["digest"] == "9f86d081884c7d65" * 4
    assert report["data"]["splits"][0] == {
        "split": "train",
        "uri": "s3://lake/reviews/train",
        "rows": 3200,
    }
    assert report["environment"]["versions"]["torch"] == "2.13.0"
    assert report["spec"]["optimizer"]["learning_rate"] == 5e-5
    assert report["seconds"]["compute"] == pytest.approx((130 + 200) * 0.5 * 0.78)
    assert report["lost_seconds"] == pytest.approx(30 * 0.5 * 0.78)
    assert json.loads(to_json(report)) == json.loads(json.dumps(report))


def test_the_model_is_loaded_from_the_best_checkpoint(local_store: Store) -> None:
    report = report_of(succeeded(local_store))
    step = report["best"]["step"]
    assert f"checkpoints/step-{step:08d}-attempt-0002/model'" in report["commands"]["load"]
    assert "AutoModelForSequenceClassification.from_pretrained(" in report["commands"]["load"]
    assert report["commands"]["download"] is None


def test_without_a_test_set_the_report_says_so(local_store: Store) -> None:
    data = {"train": "s3://lake/train", "validation": "s3://lake/validation"}
    report = report_of(succeeded(local_store, tested_on="validation", spec=make_spec(data=data)))
    assert report["tested_on"] == "validation"
    assert report["notes"][0].startswith("The validation set was used: no test set given")
    assert "The validation set was used: no test set given" in render_html(report)


def test_a_run_that_goes_on_has_a_report(local_store: Store) -> None:
    report = report_of(running(local_store, now=START))
    html = render_html(report)
    assert report["tested_on"] == "validation"
    assert "the test comes at the end" in html or "the run ended before the test" in html


def test_a_run_that_never_started_has_a_report(local_store: Store) -> None:
    report = report_of(SyntheticRun(local_store).submit())
    assert draw_all(report) == {}
    html = render_html(report)
    assert "not evaluated yet" in html
    assert "No worker has started." in html


def test_the_page_is_one_file_that_fetches_nothing(local_store: Store) -> None:
    html = render_html(report_of(succeeded(local_store)))
    page = Balanced()
    page.feed(html)
    assert page.open == []
    assert all(link.startswith("#") for link in page.links)
    assert "<script" not in html
    assert "@import" not in html
    assert not re.search(r"url\((?!#)", html)
    assert html.count("<svg") == 4
    assert "prefers-color-scheme: dark" in html


def test_charts_take_the_colors_of_the_page(local_store: Store) -> None:
    charts = draw_all(report_of(succeeded(local_store)))
    assert sorted(charts) == ["evaluations", "learning_rate", "loss", "throughput"]
    for svg in charts.values():
        assert "var(--text)" in svg or "var(--muted)" in svg
        assert "#0001" not in svg
        assert "restart" in charts["loss"]


def test_text_of_the_job_is_escaped(local_store: Store) -> None:
    made = succeeded(local_store, spec=make_spec([EVIL, "positive"]))
    made.lines(
        "events", Source(1, None), {"time": START, "event": "warning", "message": f"label {EVIL}"}
    )
    html = render_html(report_of(made))
    assert "<script>" not in html
    assert "&lt;script&gt;alert(&#34;x&#34;)&lt;/script&gt; &amp; &lt;b&gt;" in html


def test_numbers_that_are_not_finite_are_null(local_store: Store) -> None:
    made = running(local_store, now=START)
    line = {"time": START, "attempt": 1, "step": 121, "kind": "train", "loss": float("nan")}
    made.lines("metrics", Source(1, 0), line)
    report = report_of(made)
    assert report["training"][-1]["loss"] is None
    json.loads(to_json(report), parse_constant=lambda name: pytest.fail(name))
    render_html(report)


def test_a_matrix_of_fifty_classes_stays_readable(local_store: Store) -> None:
    labels = [f"class {i}" for i in range(50)]
    html = render_html(report_of(succeeded(local_store, spec=make_spec(labels))))
    assert len(html) < 500_000
    assert 'class="matrix small"' in html
    assert "most frequent mistakes" in html


def test_matrices_show_shares_of_the_true_class() -> None:
    confusion = [[3, 1], [0, 0]]
    after = {"per_class": [{"label": "a"}, {"label": "b"}], "confusion": confusion}
    (matrix,) = matrices(after, None)
    assert [cell["share"] for cell in matrix["rows"][0]["cells"]] == [0.75, 0.25]
    assert [cell["share"] for cell in matrix["rows"][1]["cells"]] == [0.0, 0.0]
    assert top_confusions(after, None) == [
        {"true": "a", "predicted": "b", "count": 1, "share": 0.25, "before": None}
    ]


def test_mistakes_are_sorted_and_compared_with_before() -> None:
    labels = ["a", "b", "c"]
    after = evaluation(labels, skill=0.8, rows=300, seed=1)
    before = evaluation(labels, skill=0.4, rows=300, seed=2)
    found = top_confusions(after, before)
    counts = [mistake["count"] for mistake in found]
    assert counts == sorted(counts, reverse=True)
    assert all(isinstance(mistake["before"], int) for mistake in found)


def test_the_report_is_written_into_the_run_folder(local_store: Store) -> None:
    made = succeeded(local_store)
    uri = write_report(local_store, made.run_id)
    assert uri == f"{local_store.uri}/{made.run_id}/report/index.html"
    assert local_store.read(made.paths.report_html).startswith(b"<!doctype html>")
    assert json.loads(local_store.read(made.paths.report_json))["run_id"] == made.run_id


def test_a_driver_reports_the_result_that_it_is_about_to_write(local_store: Store) -> None:
    made = succeeded(local_store)
    result = RunReader(local_store, made.run_id).result()
    local_store.delete([made.paths.result])
    made.lease(renewed_at=START)
    write_report(local_store, made.run_id, result=result)
    report = json.loads(local_store.read(made.paths.report_json))
    assert (report["state"], report["tested_on"], report["is_over"]) == ("SUCCEEDED", "test", True)
