from __future__ import annotations

import json
import shutil
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from safetensors.numpy import load_file, save_file

import jobs.checks.machine as machine
from cluster.storage import StorageError, Store, Transfer, open_store
from jobs.checks.finding import Finding, Verdict, merge_same_cause, problem
from jobs.checks.machine import (
    DiskNeed,
    Machine,
    check_disk,
    check_memory,
    check_strategy,
    check_workers,
)
from jobs.checks.stores import Stores, check_store
from jobs.checks.weights import Weights
from jobs.errors import PreflightError
from jobs.preflight import Checked, check_job, show_check
from jobs.record import CheckpointName, Manifest, Part, Result, RunPaths, State, StreamPosition
from jobs.spec import StoreAccess
from tests.tiny import (
    VOCABULARY,
    prepare_rows,
    review_rows,
    tiny_job,
    tiny_model,
    tiny_reviews,
    tiny_tokenizer,
    tiny_tree,
)
from trainers.data.columns import column_facts
from trainers.data.in_place import index_in_place
from trainers.data.index import SourceRecord
from trainers.data.index_draft import DraftFacts, IndexDraft, commit_index
from trainers.data.inspection import inspect_shard, shard_schema
from trainers.data.prepare_plan import PrepareOptions
from trainers.data.shards import Roles


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and data sets that no test changes."""
    folder = tmp_path_factory.mktemp("preflight")
    tiny_model(folder / "model")
    tiny_reviews(str(folder / "data"), rows=64, rows_per_group=10, rows_per_shard=15)
    return folder


@pytest.fixture(autouse=True)
def _own_surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOAL_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("jobs.preflight.look_at_machine", lambda *, count_gpus: machine_of())


def machine_of(*, cores: int = 8, memory_gib: float = 16, gpus: int = 0) -> Machine:
    return Machine(cores=cores, memory_bytes=int(memory_gib * 2**30), gpus=gpus)


@pytest.fixture
def job(shared: Path, tmp_path: Path) -> Any:
    """job(task={...}, ...): what `check_job` says of the good job with these changes; a model
    that is no group of keys is its source."""

    def check(*, model: object = None, **parts: Any) -> Checked:
        uris = {name: str(shared / "data" / name) for name in ("train", "validation", "test")}
        keys = model if isinstance(model, dict) else {"source": str(model)} if model else {}
        runs = str(tmp_path / "runs")
        return check_job(tiny_job(shared / "model", uris, runs, model=keys, **parts))

    return check


def of(checked: Checked, verdict: Verdict, part: str) -> list[Finding]:
    return [f for f in checked.findings if f.verdict is verdict and part in f.part.split(", ")]


def only_problem(checked: Checked, part: str, *, exit_code: int = 2) -> Finding:
    assert [f.part for f in checked.problems] == [part], checked.problems
    assert checked.exit_code == exit_code
    assert checked.problems[0].hint
    return checked.problems[0]


def only_warning(checked: Checked, part: str) -> Finding:
    assert checked.exit_code == 0, checked.problems
    found = of(checked, Verdict.WARNING, part)
    assert len(found) == 1, checked.findings
    return found[0]


def files_below(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def copied(source: Path, to: Path) -> Path:
    shutil.copytree(source, to)
    return to


# --------------------------------------------------------------------------------- the good job


def test_a_good_job_has_only_good_findings_and_leaves_nothing_behind(
    shared: Path, bucket: Store, s3_store: Store, tmp_path: Path
) -> None:
    uris = tiny_reviews(f"{s3_store.uri}/data", rows=64, rows_per_group=10)
    for file in (shared / "model").iterdir():
        s3_store.upload(f"model/{file.name}", file)
    before = {head.key: head.etag for head in bucket.list()}
    checked = check_job(
        tiny_job(f"{s3_store.uri}/model", uris, f"{s3_store.uri}/runs", train={"epochs": 3})
    )
    assert {f.verdict for f in checked.findings} == {Verdict.OK}, checked.findings
    assert checked.exit_code == 0
    checked.raise_problems()
    assert {head.key: head.etag for head in bucket.list()} == before
    assert not list(tmp_path.iterdir())
    totals = checked.totals
    assert (totals.rows, totals.steps_per_epoch, totals.total_steps) == (64, 8, 24)
    assert totals.stream_bytes
    assert totals.parameters == sum(
        tensor.size for tensor in load_file(shared / "model" / "model.safetensors").values()
    )


def test_a_search_is_told_with_its_space_and_its_trials(job: Any) -> None:
    checked = job(search={"space": "recommended", "trials": 9}, train={"evaluate_every_steps": 1})
    assert checked.exit_code == 0, checked.problems
    told = [f.message for f in of(checked, Verdict.OK, "search.space")]
    assert any(text.startswith("optimizer.learning_rate: loguniform ") for text in told)
    assert checked.to_json()["search"]["at_a_time"] == 8
    assert job().to_json()["search"] is None


def test_a_trial_that_does_not_fit_is_refused_with_the_sum(job: Any) -> None:
    checked = job(workers={"count": 9}, search={"space": "recommended"})
    problem = only_problem(checked, "workers", exit_code=3)
    assert "9 workers with workers.cpus 1 need 9 cores, but this machine has 8" in problem.message


def test_trackers_are_looked_at_where_the_workers_are(
    job: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobs.checks.tracking.importlib.util.find_spec", lambda name: None)
    found = only_problem(job(tracking=["tensorboard", "mlflow"]), "tracking", exit_code=3)
    assert "the package mlflow is not installed here" in found.message
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert of(job(tracking=["mlflow"]), Verdict.NOT_CHECKED, "tracking")


def test_a_good_job_in_local_folders_creates_none_of_them(job: Any, tmp_path: Path) -> None:
    checked = job()
    assert {f.verdict for f in checked.findings} == {Verdict.OK}, checked.findings
    assert not list(tmp_path.iterdir())


def test_the_command_loads_neither_torch_nor_ray(shared: Path, tmp_path: Path) -> None:
    uris = {name: str(shared / "data" / name) for name in ("train", "validation", "test")}
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(tiny_tree(shared / "model", uris, str(tmp_path / "runs"))))
    code = (
        "import sys\nfrom jobs.cli import main\n"
        f"try:\n    main(['check', {str(path)!r}, '--json'])\n"
        "except SystemExit as end:\n    print(end.code, file=sys.stderr)\n"
        "print([n for n in ('torch', 'ray', 'transformers') if n in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.splitlines() == ["0", "[]"]
    shown = json.loads(done.stdout)
    assert shown["exit_code"] == 0
    assert shown["totals"]["total_steps"] == 16
    assert "problem" not in {check["verdict"] for check in shown["checks"]}


# -------------------------------------------------------------------------------------- the store


def test_a_wrong_key_is_one_problem_of_the_environment(
    s3_store: Store, shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-secret")
    uris = {"train": f"{s3_store.uri}/train", "validation": f"{s3_store.uri}/validation"}
    checked = check_job(tiny_job(shared / "model", uris, f"{s3_store.uri}/runs"))
    found = only_problem(checked, "store, data.train, data.validation", exit_code=3)
    assert "does not accept the credentials" in found.message
    assert "wrong-secret" not in repr(checked)


def test_a_missing_bucket_is_a_problem_of_the_environment(s3_store: Store, job: Any) -> None:
    found = only_problem(job(store="s3://no-such-bucket-here/runs"), "store", exit_code=3)
    assert "no bucket no-such-bucket-here" in found.message


def test_a_store_that_is_away_is_a_problem_of_the_environment(
    job: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobs.checks.stores._HASTE", Transfer(retry_seconds=0.1))
    access = {"endpoint_url": "http://127.0.0.1:9"}
    found = only_problem(job(store={"uri": "s3://runs/x", "access": access}), "store", exit_code=3)
    assert "does not answer" in found.message


def test_a_folder_that_cannot_be_written_to_is_a_problem(job: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    found = only_problem(job(store=str(tmp_path / "file" / "runs")), "store", exit_code=3)
    assert "cannot be written to: Not a directory" in found.message


class FaultyStore:
    """Passes on to a store; `write_if_absent` does what it is told to."""

    def __init__(self, store: Store, *, then: str) -> None:
        self.store, self.then = store, then
        self.num_writes = 0

    def write_if_absent(self, key: str, data: bytes) -> str:
        self.num_writes += 1
        if self.num_writes == 1:
            return self.store.write_if_absent(key, data)
        if self.then == "fails":
            raise StorageError("cannot write s3://x/y: the store keeps failing")
        return self.store.write(key, data)

    def __getattr__(self, name: str) -> object:
        return getattr(self.store, name)


@pytest.mark.parametrize(
    ("then", "message"),
    [("fails", "keeps failing"), ("replaces", "though If-None-Match forbids it")],
)
def test_a_probe_is_deleted_also_where_the_store_fails(
    s3_store: Store, monkeypatch: pytest.MonkeyPatch, then: str, message: str
) -> None:
    stores = Stores()
    faulty = FaultyStore(s3_store, then=then)
    monkeypatch.setattr(stores, "open", lambda uri, access: faulty)
    (found,) = check_store("store", s3_store.uri, StoreAccess(), stores, lease="required")
    assert found.verdict is Verdict.PROBLEM
    assert found.exit_code == 3
    assert message in found.message
    assert faulty.num_writes == 2
    assert not list(s3_store.list())


def test_faults_of_one_cause_are_merged_and_others_are_not() -> None:
    def fault(part: str, message: str, exit_code: int) -> Finding:
        return problem(part, message, "hint", exit_code=exit_code)

    given = [
        fault("store", "cannot write s3://a/b: no bucket a", 3),
        fault("data.train", "cannot read s3://a/c: no bucket a", 3),
        fault("data.test", "cannot read s3://d/c: no bucket d", 3),
        fault("model", "cannot read s3://a/c: no bucket a", 2),
    ]
    merged = merge_same_cause(given)
    assert [f.part for f in merged] == ["store, data.train", "data.test", "model"]


# -------------------------------------------------------------------------------------- data sets


def test_a_missing_index_says_how_to_prepare(job: Any, tmp_path: Path) -> None:
    found = only_problem(job(data={"validation": str(tmp_path / "none")}), "data.validation")
    assert "has no index" in found.message
    assert "shoal prepare" in (found.hint or "")


def test_labels_outside_the_task_are_counted_with_the_nearest(job: Any, tmp_path: Path) -> None:
    rows = review_rows(10)
    for row in rows[:3]:
        row["label"] = "postive"
    uri = prepare_rows(str(tmp_path / "data"), rows, rows_per_group=5)
    found = only_problem(job(data={"train": uri}), "data.train")
    assert "3 rows have a label in column label" in found.message
    assert "'postive' (3)" in found.message
    assert "'postive' is near 'positive'" in (found.hint or "")


def test_positions_of_labels_are_allowed_up_to_the_last(job: Any, tmp_path: Path) -> None:
    rows = [{"text": "good1", "label": number % 3} for number in range(9)]
    uri = prepare_rows(str(tmp_path / "data"), rows, rows_per_group=9)
    found = only_problem(job(data={"test": uri}), "data.test")
    assert "none of the positions 0 to 1 in task.labels: '2' (3)" in found.message
    assert "3 labels" in (found.hint or "")
    three = job(data={"test": uri}, task={"labels": ["negative", "positive", "neutral"]})
    assert not of(three, Verdict.PROBLEM, "data.test")


def test_numbers_that_are_labels_themselves_are_no_positions(job: Any, tmp_path: Path) -> None:
    rows = [{"text": "good1", "label": number % 2} for number in range(8)]
    data = {
        name: prepare_rows(str(tmp_path / name), [*rows, *rows[:n]], rows_per_group=9)
        for n, name in enumerate(("train", "validation", "test"))
    }
    assert job(data=data, task={"labels": [1, 0]}).exit_code == 0
    wrong = job(data=data, task={"labels": [0, 5]})
    assert [f.part for f in wrong.problems] == ["data.train", "data.validation", "data.test"]
    assert "none of 0, 5: '1' (4)" in wrong.problems[0].message


def test_a_label_without_training_rows_is_a_warning(job: Any) -> None:
    checked = job(task={"labels": ["negative", "positive", "neutral"]})
    found = only_warning(checked, "data.train")
    assert "has the label neutral" in found.message
    assert not of(checked, Verdict.WARNING, "data.test")


def test_null_texts_of_an_index_in_place_are_counted(job: Any, tmp_path: Path) -> None:
    table = pa.table({"review": ["good1", None, "bad2", None], "label": ["positive"] * 4})
    pq.write_table(table, tmp_path / "part.parquet")
    index_in_place(PrepareOptions(source=str(tmp_path), processes=1))
    checked = job(
        data={"train": str(tmp_path), "validation": None, "test": None}, task={"text": "review"}
    )
    found = only_problem(checked, "data.train")
    assert "2 of 4 rows" in found.message
    assert "column review is null" in found.message
    assert "--on-null drop" in (found.hint or "")


def test_columns_that_are_absent_or_of_another_type_are_problems(job: Any, tmp_path: Path) -> None:
    absent = job(data={"validation": None, "test": None}, task={"text": "txt", "label": "labels"})
    assert [f.part for f in absent.problems] == ["data.train"] * 2
    assert [f.hint for f in absent.problems] == ["did you mean text?", "did you mean label?"]
    numbers = job(data={"validation": None, "test": None}, task={"text": "number"})
    assert "holds int64, not text" in only_problem(numbers, "data.train").message
    rows = [{"text": "good1", "label": "positive", "score": 0.5}]
    uri = prepare_rows(str(tmp_path / "data"), rows, rows_per_group=9)
    scores = job(data={"train": uri, "validation": None, "test": None}, task={"label": "score"})
    assert "holds double" in only_problem(scores, "data.train").message


def test_labels_that_were_not_counted_are_not_checked(job: Any, tmp_path: Path) -> None:
    rows = [{"text": "good1", "label": "x", "answer": "positive"}]
    uri = prepare_rows(str(tmp_path / "data"), rows, rows_per_group=9)
    checked = job(data={"train": uri, "validation": None, "test": None}, task={"label": "answer"})
    assert checked.exit_code == 0
    (found,) = of(checked, Verdict.NOT_CHECKED, "data.train")
    assert found.hint == "prepare it again with --label answer"


def test_a_data_set_without_rows_is_a_problem(job: Any, tmp_path: Path) -> None:
    store = open_store(tmp_path / "empty")
    sink = pa.BufferOutputStream()
    pq.write_table(
        pa.table({"text": pa.array([], "string"), "label": pa.array([], "string")}), sink
    )
    store.write("shard-00000.parquet", sink.getvalue().to_pybytes())
    schema = shard_schema(store, "shard-00000.parquet")
    facts = DraftFacts(
        columns=column_facts(schema),
        text_column=None,
        label_column=None,
        tokenizer=None,
        source=SourceRecord(uri=store.uri, kind="parquet", fingerprint=""),
        made_by="a test",
    )
    (tmp_path / "draft").mkdir()
    with closing(IndexDraft(tmp_path / "draft", facts)) as draft:
        draft.add(inspect_shard(store, "shard-00000.parquet", schema=schema, roles=Roles()))
        commit_index(store, draft.upload(store, labels=(), split=None))
    checked = job(data={"train": store.uri})
    assert "holds no rows" in only_problem(checked, "data.train").message
    assert checked.totals.rows is None


def test_a_test_set_that_is_trained_on_is_a_problem(job: Any, shared: Path, tmp_path: Path) -> None:
    train = shared / "data" / "train"
    same_folder = only_problem(job(data={"test": str(train)}), "data.test")
    assert "data.test and data.train hold the same rows" in same_folder.message
    same_bytes = only_problem(job(data={"test": str(copied(train, tmp_path / "x"))}), "data.test")
    assert "both have the digest" in same_bytes.message


def test_a_validation_set_that_is_used_twice_is_a_warning(job: Any, shared: Path) -> None:
    data = {"validation": str(shared / "data" / "train")}
    assert "hold the same rows" in only_warning(job(data=data), "data.validation").message
    data = {"validation": str(shared / "data" / "test")}
    assert "chosen by them" in only_warning(job(data=data), "data.test").message


def test_shards_that_are_gone_or_of_another_size_are_problems(
    job: Any, shared: Path, tmp_path: Path
) -> None:
    folder = copied(shared / "data" / "train", tmp_path / "data")
    shards = sorted(folder.glob("*.parquet"))
    assert len(shards) > 2
    shards[0].unlink()
    shards[1].write_bytes(shards[1].read_bytes() + b"x")
    found = only_problem(job(data={"train": str(folder)}), "data.train")
    assert f"2 of {len(shards)} shards" in found.message
    assert "shard-00000.parquet is missing; shard-00001.parquet has" in found.message
    assert "--in-place --overwrite" in (found.hint or "")


def test_rows_whose_checksum_is_wrong_are_a_problem(job: Any, tmp_path: Path) -> None:
    uri = prepare_rows(str(tmp_path / "data"), review_rows(8), rows_per_group=8)
    shard = tmp_path / "data" / "shard-00000.parquet"
    data = bytearray(shard.read_bytes())
    data[20] ^= 1
    shard.write_bytes(bytes(data))
    found = only_problem(job(data={"train": uri}), "data.train")
    assert "changed after it was indexed, or damaged" in found.message


def test_tokens_must_be_those_of_the_models_tokenizer(
    job: Any, shared: Path, model: Path, tmp_path: Path
) -> None:
    def tokenized(name: str, tokenizer: Path, max_tokens: int) -> dict[str, Any]:
        uri = prepare_rows(
            str(tmp_path / name),
            review_rows(12),
            rows_per_group=5,
            tokenizer=str(tokenizer),
            max_tokens=max_tokens,
        )
        return {"train": uri, "validation": None, "test": None}

    good = job(data=tokenized("good", shared / "model", 32))
    assert good.exit_code == 0, good.problems
    assert "its tokens are those of" in of(good, Verdict.OK, "data.train")[-1].message
    cut = only_problem(job(data=tokenized("cut", shared / "model", 16)), "data.train")
    assert cut.hint == ("set task.max_tokens to 16, or prepare it again with --max-tokens 32")
    other = tiny_tokenizer(tmp_path / "other", words=VOCABULARY[:150])
    # A class of transformers may bring a padding token of its own: it is asked, and not refused.
    settings = json.loads((model / "tokenizer_config.json").read_text())
    del settings["pad_token"]
    settings["tokenizer_class"] = "BertTokenizer"
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    checked = job(model=model, data=tokenized("other-tokens", other, 32))
    found = only_problem(checked, "data.train")
    assert "was tokenized with" in found.message
    assert "is another one" in found.message


def test_texts_that_are_mostly_cut_off_are_a_warning(job: Any) -> None:
    checked = job(task={"max_tokens": 8}, data={"validation": None, "test": None})
    assert "are cut at 8" in of(checked, Verdict.WARNING, "data.train")[0].message


# -------------------------------------------------------------------------------------- the model


@pytest.fixture
def model(shared: Path, tmp_path: Path) -> Path:
    """A copy of the model's folder that a test may spoil."""
    return copied(shared / "model", tmp_path / "model")


def change_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_model_folder_without_weights_is_a_problem(job: Any, model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    found = only_problem(job(model=model), "model")
    assert "no safetensors weights, only pytorch_model.bin" in found.message


def test_all_that_a_model_folder_lacks_is_told_at_once(job: Any, model: Path) -> None:
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (model / name).unlink()
    checked = job(model=model)
    assert len(of(checked, Verdict.PROBLEM, "model")) == 3


def test_weights_that_are_cut_off_or_none_are_a_problem(job: Any, model: Path) -> None:
    weights = model / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    assert "no whole safetensors file" in only_problem(job(model=model), "model").message
    weights.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    assert "does not begin as such" in only_problem(job(model=model), "model").message


def test_sharded_weights_must_all_be_there(job: Any, model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    names = sorted(tensors)
    save_file({names[0]: tensors[names[0]]}, model / "model-1.safetensors")
    (model / "model.safetensors").unlink()
    shards = {name: f"model-{place + 1}.safetensors" for place, name in enumerate(names[:2])}
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    found = only_problem(job(model=model), "model")
    assert "lacks 1 of its weight files: model-2.safetensors" in found.message


def test_a_tokenizer_that_does_not_load_or_pad_is_a_problem(job: Any, model: Path) -> None:
    settings = model / "tokenizer_config.json"
    change_json(settings, pad_token=None)
    assert "no padding token" in only_problem(job(model=model), "model").message
    (model / "tokenizer.json").write_text("{}")
    assert "tokenizer.json does not load" in only_problem(job(model=model), "model").message


def test_more_tokens_than_the_model_reads_are_a_problem(job: Any, model: Path) -> None:
    batching = {"max_tokens_per_microbatch": 1000}
    found = only_problem(job(task={"max_tokens": 65}, batching=batching), "model")
    assert "reads at most 64 tokens" in found.message
    assert found.hint == "write max_tokens: 64, or less"
    change_json(model / "config.json", model_type="roberta", pad_token_id=1)
    checked = job(model=model, task={"max_tokens": 64}, batching=batching)
    assert "reads at most 62 tokens" in only_problem(checked, "model").message


def test_a_tokenizer_of_another_model_is_a_problem(job: Any, model: Path) -> None:
    change_json(model / "config.json", vocab_size=100)
    found = only_problem(job(model=model), "model")
    assert "knows 200 tokens, but the model has embeddings for 100" in found.message


def test_a_head_of_other_labels_is_told(job: Any, model: Path) -> None:
    head = {"architectures": ["BertForSequenceClassification"]}
    change_json(model / "config.json", **head, id2label={"0": "a", "1": "b", "2": "c"})
    assert "tells 3 labels apart (a, b, c)" in only_problem(job(model=model), "model").message
    change_json(model / "config.json", id2label={"0": "positive", "1": "negative"})
    assert "in this order" in only_warning(job(model=model), "model").message


def test_a_frozen_part_that_is_none_is_a_warning_with_the_nearest(job: Any) -> None:
    found = only_warning(frozen(job, "embedings"), "model")
    assert found.hint == "did you mean embeddings?"
    for right in ("embeddings", "bert.embeddings", "encoder.layer.0"):
        assert not of(frozen(job, right), Verdict.WARNING, "model")
    (unknown,) = of(frozen(job, "classifier"), Verdict.NOT_CHECKED, "model")
    assert "may be a part of the head" in unknown.message


def frozen(job: Any, pattern: str) -> Checked:
    checked: Checked = job(model={"freeze": [pattern]})
    return checked


def test_a_place_without_a_model_is_a_problem(job: Any, s3_store: Store, tmp_path: Path) -> None:
    found = only_problem(job(model=tmp_path / "none"), "model")
    assert "there is no such folder" in found.message
    found = only_problem(job(model=f"{s3_store.uri}/none"), "model")
    assert "nothing is there" in found.message


def run_with_checkpoint(store: Store, model: Path, spec: bytes) -> None:
    paths = RunPaths("old")
    store.write(paths.spec, spec)
    parts = []
    for file in model.iterdir():
        store.upload(f"{paths.checkpoint(CheckpointName(7, 1))}model/{file.name}", file)
        parts.append(Part(name=f"model/{file.name}", bytes=file.stat().st_size, sha256="", xxh3=""))
    position = StreamPosition(
        order_version=1,
        index_digest="",
        lanes=1,
        window=1,
        seed=0,
        global_batch_size=8,
        epoch=0,
        next_item=0,
    )
    manifest = Manifest(
        step=7,
        attempt=1,
        generation=1,
        parent_step=None,
        created_at=0,
        parts=tuple(parts),
        digests={},
        stream=position,
    )
    store.write(paths.manifest(CheckpointName(7, 1)), manifest.to_bytes())
    result = Result(
        run_id="old",
        state=State.SUCCEEDED,
        generation=1,
        step=7,
        finished_at=0,
        best_checkpoint="checkpoints/step-00000007-attempt-0001",
    )
    store.write(paths.result, result.to_bytes())


def test_a_run_can_be_the_source_once_it_has_a_model(
    job: Any, shared: Path, s3_store: Store, tmp_path: Path
) -> None:
    runs = open_store(tmp_path / "runs")
    runs.write(RunPaths("young").spec, b"{}")
    assert "has no model yet" in only_problem(job(model="young"), "model").message
    for store, source in ((runs, "old"), (s3_store, f"{s3_store.uri}/old")):
        run_with_checkpoint(store, shared / "model", b"{}")
        checked = job(model=source)
        assert checked.exit_code == 0, checked.problems
        assert "checkpoint of step 7" in of(checked, Verdict.OK, "model")[0].message
    manifest = RunPaths("old").manifest(CheckpointName(7, 1))
    whole = Manifest.model_validate_json(runs.read(manifest))
    layout = Part(name="shards/layout.json", bytes=1, sha256="", xxh3="")
    small = [part for part in whole.parts if part.name != "model/model.safetensors"]
    cut = whole.model_copy(update={"parts": (*small, layout)})
    runs.write(manifest, cut.to_bytes())
    (found,) = of(job(model="old"), Verdict.NOT_CHECKED, "model")
    assert "old --consolidate 7" in (found.hint or "")
    runs.delete([manifest])
    found = only_problem(job(model="old"), "model", exit_code=3)
    assert "gone or damaged" in found.message


def test_a_model_of_the_hub_needs_a_revision(job: Any) -> None:
    found = only_problem(job(model="some/model"), "model")
    assert "model.revision is missing" in found.message


def test_a_model_of_the_hub_that_is_not_here_is_a_problem_offline(
    job: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    offline = job(model={"source": "some/model", "revision": "abc"})
    assert "HF_HUB_OFFLINE is set" in only_problem(offline, "model", exit_code=3).message
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    assert job(model={"source": "some/model", "revision": "abc"}).exit_code == 0


# ----------------------------------------------------------------------------------- the machine


def workers_on(shared: Path, has: Machine | None, **workers: Any) -> list[Finding]:
    uris = {"train": str(shared / "data" / "train")}
    return check_workers(tiny_job(shared / "model", uris, "runs", workers=workers), has)


def test_more_workers_than_this_machine_has_cores_are_a_problem(job: Any) -> None:
    checked = job(workers={"count": 100_000}, batching={"global_batch_size": 100_000})
    found = only_problem(checked, "workers", exit_code=3)
    assert "100000 workers with workers.cpus 1 need 100000 cores, but this machine" in found.message
    assert "set workers.count to" in (found.hint or "")


def test_workers_must_fit_cores_gpus_and_memory(shared: Path) -> None:
    fitting = workers_on(shared, machine_of(gpus=2), count=2, cpus=4, gpus=1, memory_gib=8)
    assert [f.verdict for f in fitting] == [Verdict.OK]
    found = workers_on(shared, machine_of(), count=3, cpus=4, gpus=1, memory_gib=6)
    assert [f.message.partition(",")[0] for f in found] == [
        "3 workers with workers.cpus 4 need 12 cores",
        "3 workers with workers.gpus 1 need 3 GPUs",
        "3 workers with workers.memory_gib 6 need 18 GiB",
    ]
    assert {f.exit_code for f in found} == {3}
    assert (found[0].hint or "").startswith("set workers.count to 2,")
    assert (found[1].hint or "").startswith("set workers.gpus to 0,")


def test_an_elastic_run_needs_a_machine_for_its_fewest_workers(shared: Path) -> None:
    (fitting,) = workers_on(shared, machine_of(), count=9, min=1, cpus=4)
    assert fitting.verdict is Verdict.OK
    assert fitting.message == (
        "2 workers with 4 cores each: 8 of this machine's 8; workers.count 9 needs a larger one"
    )
    (lacking,) = workers_on(shared, machine_of(), count=9, min=3, cpus=4)
    assert lacking.message.startswith("3 workers with workers.cpus 4 need 12 cores")
    assert (lacking.hint or "").startswith("set workers.min to 2,")


def test_a_model_is_cut_over_several_workers_where_it_has_rows(shared: Path, job: Any) -> None:
    whole = job(workers={"count": 2}).totals.training_bytes
    cut = job(workers={"count": 2, "strategy": "fsdp"})
    assert not of(cut, Verdict.WARNING, "workers.strategy")
    assert cut.totals.training_bytes == -(-whole // 2)
    alone = only_warning(job(workers={"strategy": "fsdp"}), "workers.strategy")
    assert "without effect on workers.count 1" in alone.message
    uris = {"train": str(shared / "data" / "train")}
    spec = tiny_job(shared / "model", uris, "runs", workers={"count": 2, "strategy": "fsdp"})
    weights = Weights({"norm.num_batches_tracked": (), "w": (2,), "logit_scale": ()}, 8)
    (scalar,) = check_strategy(spec, weights)
    assert "logit_scale of this model is a single number" in scalar.message
    assert scalar.hint == "set workers.strategy to ddp"


def test_a_model_that_is_compiled_needs_a_compiler(
    job: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    compiled = {"compile": True}
    (tmp_path / "my-c++").touch(mode=0o755)
    monkeypatch.setenv("CXX", str(tmp_path / "my-c++"))
    assert job(model=compiled).exit_code == 0
    monkeypatch.setattr("sysconfig.get_path", lambda _: str(tmp_path))
    found = only_problem(job(model=compiled), "model.compile", exit_code=3)
    assert f"no C headers of Python ({tmp_path}/Python.h is missing)" in found.message
    monkeypatch.setenv("CXX", "no-such-compiler")
    found = only_problem(job(model=compiled), "model.compile", exit_code=3)
    assert "has no C++ compiler named no-such-compiler" in found.message
    assert job(model={"compile": False}).exit_code == 0
    monkeypatch.setenv("RAY_ADDRESS", "ray://elsewhere:10001")
    assert job(model=compiled).exit_code == 0


def test_a_cluster_elsewhere_is_not_checked(job: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "ray://elsewhere:10001")
    checked = job(workers={"count": 100_000}, batching={"global_batch_size": 100_000})
    assert checked.exit_code == 0
    assert "RAY_ADDRESS is set" in of(checked, Verdict.NOT_CHECKED, "workers")[0].message


def test_memory_that_workers_need_is_compared_with_what_there_is(shared: Path) -> None:
    uris = {"train": str(shared / "data" / "train")}

    def spec(**workers: Any) -> Any:
        return tiny_job(shared / "model", uris, "runs", workers=workers)

    assert not check_memory(spec(count=2), machine_of(), worker_bytes=2**30)
    (few,) = check_memory(spec(count=20), machine_of(), worker_bytes=2**30)
    assert "20 workers need about 20 GiB" in few.message
    (little,) = check_memory(spec(memory_gib=0.5), machine_of(), worker_bytes=2**30)
    assert little.hint == "set workers.memory_gib to 1.2 or more"


def test_the_disk_of_the_cache_must_have_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (fits,) = check_disk(DiskNeed(rows_bytes=1, checkpoint_bytes=1, model_bytes=1))
    assert fits.verdict is Verdict.OK
    (full,) = check_disk(DiskNeed(rows_bytes=0, checkpoint_bytes=2**60, model_bytes=0))
    assert (full.verdict, full.exit_code) == (Verdict.PROBLEM, 3)
    assert "SHOAL_CACHE" in (full.hint or "")
    (slow,) = check_disk(DiskNeed(rows_bytes=2**60, checkpoint_bytes=0, model_bytes=0))
    assert slow.verdict is Verdict.WARNING
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SHOAL_CACHE", str(tmp_path / "file" / "cache"))
    (refused,) = check_disk(DiskNeed(rows_bytes=0, checkpoint_bytes=0, model_bytes=0))
    assert "cannot be written to" in refused.message
    monkeypatch.setattr(machine, "shared_by", lambda _: "nfs4")
    *_, shared = check_disk(DiskNeed(rows_bytes=0, checkpoint_bytes=0, model_bytes=0))
    assert shared.verdict is Verdict.WARNING
    assert "machines share (nfs4)" in shared.message
    assert "a local disk of each node" in (shared.hint or "")


def test_gpus_are_counted_within_those_that_are_visible(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("0000:01:00.0", "0000:02:00.0"):
        (tmp_path / name).mkdir()
    seen = machine.look_at_machine(count_gpus=False)
    assert seen.cores >= 1
    assert seen.memory_bytes > 0
    assert seen.gpus == 0
    monkeypatch.setattr(machine, "_NVIDIA", tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert machine.look_at_machine(count_gpus=True).gpus == 2
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert machine.look_at_machine(count_gpus=True).gpus == 1
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert machine.look_at_machine(count_gpus=True).gpus == 0


def test_without_the_training_packages_it_says_what_it_could_not_check(
    job: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("torch", "ray", "transformers", "tokenizers", "huggingface_hub"):
        monkeypatch.setitem(sys.modules, name, None)
    checked = job()
    assert checked.exit_code == 0
    (packages,) = of(checked, Verdict.NOT_CHECKED, "cluster")
    assert "torch, transformers, ray are not installed here" in packages.message
    assert 'pip install "shoal[train]"' in (packages.hint or "")
    (tokenizer,) = of(checked, Verdict.NOT_CHECKED, "model")
    assert "tokenizers is not installed" in tokenizer.message
    hub = job(model={"source": "some/model", "revision": "abc"})
    assert "huggingface_hub is not installed" in of(hub, Verdict.NOT_CHECKED, "model")[0].message


# ---------------------------------------------------------------------------------- several parts


def test_a_row_must_fit_a_microbatch(job: Any) -> None:
    found = only_problem(job(batching={"max_tokens_per_microbatch": 31}), "batching")
    assert found.hint == "set batching.max_tokens_per_microbatch to 32 or more"


def test_workers_without_rows_in_a_step_are_a_warning(job: Any) -> None:
    found = of(job(batching={"global_batch_size": 1}, workers={"count": 2}), *_BATCHING)[0]
    assert "of 2 workers 1 have nothing to do" in found.message


_BATCHING = (Verdict.WARNING, "batching")


def test_a_warmup_longer_than_the_run_is_a_warning(job: Any) -> None:
    found = only_warning(job(optimizer={"warmup_steps": 16}), "optimizer")
    assert "the run has 16 steps" in found.message
    assert not of(job(optimizer={"warmup_steps": 15}), Verdict.WARNING, "optimizer")


def test_early_stopping_that_cannot_happen_or_is_upside_down_is_a_warning(job: Any) -> None:
    patient = job(train={"early_stopping": {"patience": 2}})
    assert "is evaluated 2 times" in only_warning(patient, "train").message
    upside_down = job(train={"epochs": 9, "early_stopping": {"mode": "min"}})
    assert only_warning(upside_down, "train").hint == "set train.early_stopping.mode to max"
    rare = job(train={"evaluate_every_steps": 17})
    assert "only its end is evaluated" in only_warning(rare, "train").message


def test_a_run_that_nothing_measures_is_a_warning(job: Any) -> None:
    assert "--split" in only_warning(job(data={"validation": None, "test": None}), "data").hint


def test_a_window_that_memory_cannot_hold_is_a_problem(job: Any) -> None:
    found = only_problem(job(data={"stream_memory": "2 KiB"}), "data.stream_memory")
    assert "data.stream_memory is 2 KiB, but the windows" in found.message
    assert "shoal prepare" in (found.hint or "")


def test_a_window_that_shrinks_to_fit_is_a_warning(job: Any) -> None:
    found = only_warning(job(data={"stream_memory": "8 KiB"}), "data.stream_memory")
    assert "instead of data.window's 16" in found.message


def test_lanes_that_the_workers_do_not_divide_are_a_warning(job: Any) -> None:
    three = {"lanes": 3}
    checked = job(data=three, workers={"count": 2})
    assert (
        "2 workers do not divide the 3 lanes"
        in of(checked, Verdict.WARNING, "data.lanes")[0].message
    )
    small = job(data=three | {"cache_gib": 1e-6}, workers={"count": 2})
    assert "but the windows of" in of(small, Verdict.PROBLEM, "data.cache_gib")[0].message


def test_worker_counts_that_share_shards_are_told(job: Any) -> None:
    many = {"count": 8, "min": 4}
    found = only_warning(job(workers=many, batching={"global_batch_size": 8}), "data.lanes")
    assert found.message.startswith("2 of the 5 worker counts from workers.min to workers.count")
    assert "the 24 lanes (5, 7)" in found.message
    assert "set data.lanes to" not in (found.hint or "")
    found = only_warning(job(workers={"count": 2, "min": 1}, data={"lanes": 3}), "data.lanes")
    assert (found.hint or "").endswith("set data.lanes to 2")


def test_all_problems_of_a_job_are_told_at_once(
    job: Any, s3_store: Store, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (model / "model.safetensors").unlink()
    reviews = tmp_path / "reviews"
    reviews.mkdir()
    table = pa.table({"review": ["good1", None], "label": ["positive", "postive"]})
    pq.write_table(table, reviews / "part.parquet")
    index_in_place(PrepareOptions(source=str(reviews), processes=1))
    checked = job(
        model=model,
        store="s3://no-such-bucket-here/runs",
        task={"text": "review", "max_tokens": 500},
        data={
            "train": str(reviews),
            "validation": f"{s3_store.uri}/none",
            "test": str(reviews),
            "stream_memory": "1 B",
        },
        workers={"count": 100_000},
    )
    expected = (
        ("store", "has no bucket no-such-bucket-here"),
        ("data.train", "1 of 2 rows"),
        ("data.train", "'postive' (1)"),
        ("data.validation", "has no index"),
        ("data.test", "1 of 2 rows"),
        ("data.test", "hold the same rows"),
        ("model", "has no safetensors weights"),
        ("model", "reads at most 64 tokens"),
        ("batching", "one row may have 500 tokens"),
        ("data.stream_memory", "data.stream_memory is 1 B"),
        ("workers", "need 100000 cores"),
    )
    for part, words in expected:
        found = of(checked, Verdict.PROBLEM, part)
        assert any(words in f.message and f.hint for f in found), (part, words, found)
    assert checked.exit_code == 2
    with pytest.raises(PreflightError) as caught:
        checked.raise_problems()
    assert caught.value.exit_code == 2
    assert len(caught.value.problems) == len(checked.problems)
    show_check(checked, as_json=False)
    shown = capsys.readouterr()
    assert shown.err.count("error: ") == shown.err.count("hint: ") == len(checked.problems)
    assert "see the 2 errors below" in shown.out
    assert "'postive'" not in shown.out


def test_what_was_checked_is_shown_with_totals(
    job: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    checked = job(optimizer={"warmup_steps": 99})
    show_check(checked, as_json=False)
    shown = capsys.readouterr()
    assert not shown.err
    assert "64 rows in 8 steps an epoch, 16 steps in all" in shown.out
    assert "memory of a worker: " in shown.out
    assert "(hint: set optimizer.warmup_steps to 1 or so)" in shown.out
    show_check(checked, as_json=True)
    assert json.loads(capsys.readouterr().out) == checked.to_json()
