from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml
from click.testing import CliRunner

from cluster.storage import StorageError, Store, open_store
from jobs.cli import cli
from jobs.errors import DataError, EnvironmentFault, ShoalError, SpecError
from jobs.record import RunPaths
from tests.tiny import LABELS, prepare_rows, review_rows, tiny_model, tiny_reviews, tiny_tree
from trainers.__main__ import main as train_command
from trainers.evaluate import evaluate_run

RUN_ID = "tiny-run"


@dataclass(frozen=True)
class TrainedRun:
    store: Store
    data: dict[str, str]
    folder: Path


@pytest.fixture(scope="module")
def trained(bucket: Store, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrainedRun]:
    """A run in S3 that has ended, of two epochs in one process."""
    folder = tmp_path_factory.mktemp("trained")
    place = f"{bucket.uri}/{folder.name}"
    data = tiny_reviews(f"{place}/data", rows=96, rows_per_group=20, rows_per_shard=50)
    tree = tiny_tree(tiny_model(folder / "model"), data, f"{place}/runs")
    (folder / "job.yaml").write_text(yaml.safe_dump(tree))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SHOAL_CACHE", str(folder / "cache"))
        done = CliRunner().invoke(train_command, [str(folder / "job.yaml"), "--run-id", RUN_ID])
        assert done.exit_code == 0, done.output
        yield TrainedRun(bucket.within(f"{folder.name}/runs"), data, folder)


def hint_of(error: ShoalError) -> str:
    return error.problems[0].hint or ""


def test_the_evaluation_of_the_test_set_is_that_of_the_run(trained: TrainedRun) -> None:
    measured = evaluate_run(trained.store, RUN_ID, trained.data["test"], None)
    result = json.loads(trained.store.read(RunPaths(RUN_ID).result))
    tested = result["outcome"]["test"]
    assert measured["confusion"] == tested["confusion"]
    assert measured["per_class"] == tested["per_class"]
    assert measured["metrics"] == pytest.approx(tested["metrics"], rel=1e-5)
    assert measured["rows"] == 24
    assert measured["step"] == tested["step"]
    assert measured["checkpoint"].endswith(result["best_checkpoint"])
    assert measured["data"]["uri"] == trained.data["test"]


def test_predictions_and_metrics_are_kept_in_the_run_folder(trained: TrainedRun) -> None:
    measured = evaluate_run(trained.store, RUN_ID, trained.data["train"], None)
    folder = RunPaths(RUN_ID).evaluation(measured["data"]["digest"])
    assert measured["predictions"] == f"{trained.store.uri}/{folder}predictions.parquet"
    assert json.loads(trained.store.read(folder + "metrics.json")) == measured
    local = trained.folder / "fetched.parquet"
    trained.store.download(folder + "predictions.parquet", local)
    table = pq.read_table(local)
    given = review_rows(96)
    assert table["row"].to_pylist() == list(range(96))
    assert table["text"].to_pylist() == [row["text"] for row in given]
    assert table["label"].to_pylist() == [row["label"] for row in given]
    right = 0
    for row in table.to_pylist():
        assert row["predicted"] == LABELS[row["probabilities"].index(max(row["probabilities"]))]
        assert row["score"] == max(row["probabilities"])
        assert sum(row["probabilities"]) == pytest.approx(1, abs=1e-5)
        right += row["predicted"] == row["label"]
    assert right / 96 == pytest.approx(measured["metrics"]["accuracy"])


def test_predictions_go_to_the_file_that_is_named(trained: TrainedRun, tmp_path: Path) -> None:
    output = tmp_path / "own.parquet"
    measured = evaluate_run(trained.store, RUN_ID, trained.data["validation"], output)
    assert measured["predictions"] == str(output)
    assert pq.read_table(output).num_rows == 24
    assert [path.name for path in tmp_path.iterdir()] == ["own.parquet"]
    key = RunPaths(RUN_ID).evaluation(measured["data"]["digest"]) + "metrics.json"
    assert trained.store.head(key) is None


def test_large_sets_are_written_in_the_order_of_their_rows(
    trained: TrainedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainers.predictions._ROWS_AT_A_TIME", 16)
    given = review_rows(1100, seed=5)
    uri = prepare_rows(str(tmp_path / "data"), given, rows_per_group=300)
    output = tmp_path / "predictions.parquet"
    evaluate_run(trained.store, RUN_ID, uri, output)
    file = pq.ParquetFile(output)
    assert file.metadata.num_row_groups > 2
    assert file.read()["text"].to_pylist() == [row["text"] for row in given]


def test_the_command_prints_metrics_and_json(trained: TrainedRun) -> None:
    arguments = ["evaluate", f"{trained.store.uri}/{RUN_ID}", "--data", trained.data["test"]]
    shown = CliRunner().invoke(cli, arguments)
    assert shown.exit_code == 0, shown.output
    assert "accuracy" in shown.stdout
    assert "positive" in shown.stdout
    assert "predictions.parquet" in shown.stderr
    as_json = json.loads(CliRunner().invoke(cli, [*arguments, "--json"]).stdout)
    assert as_json["rows"] == 24


def test_a_run_that_does_not_exist_is_told(trained: TrainedRun) -> None:
    with pytest.raises(SpecError, match="has no run other") as caught:
        evaluate_run(trained.store, "other", trained.data["test"], None)
    assert "shoal list" in hint_of(caught.value)


def test_a_run_without_a_checkpoint_has_no_model_yet(trained: TrainedRun) -> None:
    spec = trained.store.read(RunPaths(RUN_ID).spec)
    trained.store.write(RunPaths("new-run").spec, spec)
    with pytest.raises(SpecError, match="has no model yet") as caught:
        evaluate_run(trained.store, "new-run", trained.data["test"], None)
    assert "shoal status" in hint_of(caught.value)


def test_a_run_that_goes_on_is_measured_by_its_best_checkpoint_so_far(trained: TrainedRun) -> None:
    paths, copy = RunPaths(RUN_ID), RunPaths("going-on")
    for head in trained.store.list(f"{RUN_ID}/"):
        if head.key != paths.result:
            trained.store.write(
                head.key.replace(RUN_ID, copy.run_id, 1), trained.store.read(head.key)
            )
    so_far = evaluate_run(trained.store, "going-on", trained.data["test"], None)
    ended = evaluate_run(trained.store, RUN_ID, trained.data["test"], None)
    assert so_far["metrics"] == ended["metrics"]
    assert so_far["step"] == ended["step"]


def test_data_without_the_label_column_is_refused(trained: TrainedRun, tmp_path: Path) -> None:
    rows = [{"text": row["text"], "answer": row["label"]} for row in review_rows(4)]
    uri = prepare_rows(str(tmp_path / "data"), rows, rows_per_group=4)
    with pytest.raises(DataError, match=r"label column label.*no such column") as caught:
        evaluate_run(trained.store, RUN_ID, uri, None)
    assert "text, answer" in hint_of(caught.value)


def test_labels_that_the_model_does_not_know_are_refused(
    trained: TrainedRun, tmp_path: Path
) -> None:
    rows = review_rows(4, labels=["negative", "neutral"])
    uri = prepare_rows(str(tmp_path / "data"), rows, rows_per_group=4)
    output = tmp_path / "out.parquet"
    with pytest.raises(DataError, match=r"row 1: .*'neutral', which is none of negative, positive"):
        evaluate_run(trained.store, RUN_ID, uri, output)
    assert not list(tmp_path.glob("*.parquet"))
    assert not list(tmp_path.glob(".*"))


def test_data_without_an_index_is_refused(trained: TrainedRun, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no index"):
        evaluate_run(trained.store, RUN_ID, str(tmp_path), None)


def test_a_store_that_is_away_is_the_environments_fault(
    trained: TrainedRun, tmp_path: Path
) -> None:
    class Away:
        uri = trained.store.uri

        def read(self, key: str) -> bytes:
            raise StorageError("the store does not answer")

    with pytest.raises(StorageError, match="does not answer") as caught:
        evaluate_run(Away(), RUN_ID, trained.data["test"], None)  # type: ignore[arg-type]
    assert caught.value.exit_code == 3


def test_a_damaged_checkpoint_is_not_used(
    trained: TrainedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHOAL_CACHE", str(tmp_path / "cache"))
    copy = open_store(tmp_path / "runs")
    for head in trained.store.list(f"{RUN_ID}/"):
        data = trained.store.read(head.key)
        if head.key.endswith("model/model.safetensors"):
            data = data[:-1] + bytes([data[-1] ^ 1])
        copy.write(head.key, data)
    with pytest.raises(EnvironmentFault, match=r"model\.safetensors is damaged"):
        evaluate_run(copy, RUN_ID, trained.data["test"], None)


def test_an_output_that_cannot_be_written_is_told(trained: TrainedRun, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="there is no folder"):
        evaluate_run(trained.store, RUN_ID, trained.data["test"], tmp_path / "no" / "out.parquet")
    with pytest.raises(EnvironmentFault, match="cannot be written"):
        evaluate_run(trained.store, RUN_ID, trained.data["test"], tmp_path)
