"""What the parts of a job say about themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from jobs.errors import SpecError
from jobs.parse import check_resume_overrides, parse_spec, with_absolute_paths
from jobs.spec import MAX_RUN_ID_CHARACTERS, JobSpec, format_bytes, parse_bytes

TREE: dict[str, Any] = {
    "name": "sentiment",
    "task": {"labels": ["negative", "positive"]},
    "model": {"source": "s3://models/minilm"},
    "data": {"train": "s3://lake/train", "validation": "s3://lake/validation"},
    "store": "s3://shoal/runs",
}


def job(**changes: Any) -> JobSpec:
    return parse_spec(TREE | changes, where="test")


def changed_digests(**changes: Any) -> set[str]:
    before, after = job().digests(), job(**changes).digests()
    return {group for group in before if before[group] != after[group]}


def test_a_job_cannot_be_changed_after_it_was_read() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        job().workers.count = 2  # type: ignore[misc]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_lanes_follow_the_worker_count_unless_they_are_given(count: int) -> None:
    data = TREE["data"]
    assert job(workers={"count": count}).lanes == count
    assert job(workers={"count": count}, data=data | {"lanes": 12}).lanes == 12


@pytest.mark.parametrize(
    ("fewest", "most", "lanes"),
    [
        (2, 4, 12),  # the smallest common multiple of 2, 3 and 4
        (1, 8, 24),  # that of all would be 840; 1, 2, 3, 4, 6 and 8 divide 24
        (60, 100, 100),  # more than 64 only for the largest count itself
        (4, 4, 4),
    ],
)
def test_lanes_suit_every_worker_count_of_an_elastic_run(
    fewest: int, most: int, lanes: int
) -> None:
    assert job(workers={"min": fewest, "count": most}).lanes == lanes


def test_the_best_is_the_lowest_loss_or_what_early_stopping_watches() -> None:
    assert job().best == ("validation/loss", "min", 0.0)
    stopping = {"metric": "validation/accuracy", "min_delta": 0.01}
    assert job(train={"early_stopping": stopping}).best == ("validation/accuracy", "max", 0.01)


@pytest.mark.parametrize(
    ("changes", "groups"),
    [
        ({"workers": {"count": 4}}, set()),
        ({"store": "elsewhere"}, set()),
        ({"retries": {"worker_failures": 9}}, set()),
        ({"checkpoint": {"every_steps": 7}}, set()),
        ({"optimizer": {"learning_rate": 1.0}}, {"hyper_parameters"}),
        ({"train": {"epochs": 9}}, {"hyper_parameters"}),
        ({"batching": {"global_batch_size": 7}}, {"data_order"}),
        ({"data": TREE["data"] | {"seed": 7}}, {"data_order"}),
        ({"data": TREE["data"] | {"train": "s3://other"}}, {"data_order"}),
        ({"model": TREE["model"] | {"compile": True}}, {"hyper_parameters"}),
        ({"task": {"labels": ["positive", "negative"]}}, {"architecture"}),
        ({"task": TREE["task"] | {"label_smoothing": 0.1}}, {"hyper_parameters"}),
        ({"model": {"source": "other"}}, {"architecture", "hyper_parameters"}),
    ],
)
def test_each_key_belongs_to_the_digest_of_what_it_decides(
    changes: dict[str, Any], groups: set[str]
) -> None:
    assert changed_digests(**changes) == groups


def test_packed_rows_are_not_compiled() -> None:
    compiled = TREE["model"] | {"compile": True}
    assert job(model=compiled).model.compile
    assert job(batching={"packing": True}).batching.packing
    with pytest.raises(SpecError, match="both true") as told:
        job(model=compiled, batching={"packing": True})
    assert told.value.problems[0].hint == "remove one of them"


def test_tf32_is_for_gpus() -> None:
    model = TREE["model"] | {"precision": "tf32"}
    assert job(model=model, workers={"gpus": 1}).model.precision == "tf32"
    with pytest.raises(SpecError, match="is tf32, which GPUs alone have") as told:
        job(model=model)
    hint = "set workers.gpus to 1, or model.precision to float32"
    assert told.value.problems[0].hint == hint


def test_a_resume_may_change_how_the_blocks_run_but_no_other_key_of_the_model() -> None:
    check_resume_overrides(["model.compile=true", "model.activation_checkpointing=true"])
    for other in ("model.precision=bfloat16", "model.compiled=true", "model={compile: true}"):
        with pytest.raises(SpecError, match="cannot change"):
            check_resume_overrides([other])


def test_local_paths_become_absolute_and_others_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/someone")
    (tmp_path / "model").mkdir()
    data = {"train": "sets/train", "validation": "~/validation", "test": "s3://lake/test"}
    spec = with_absolute_paths(job(data=data, model={"source": "model"}, store="runs"))
    assert spec.data.train == str(tmp_path / "sets/train")
    assert spec.data.validation == "/home/someone/validation"
    assert spec.data.test == "s3://lake/test"
    assert spec.model.source == str(tmp_path / "model")
    assert spec.store.uri == str(tmp_path / "runs")


def test_a_model_that_is_no_folder_here_keeps_its_name() -> None:
    assert with_absolute_paths(job(model={"source": "google/bert"})).model.source == "google/bert"


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [("1 B", 1), ("1.5 GiB", 3 * 2**29), ("512MiB", 2**29), (" 2 TiB ", 2**41), ("2 KiB", 2048)],
)
def test_sizes_are_read_with_their_units(text: str, num_bytes: int) -> None:
    assert parse_bytes(text) == num_bytes


@pytest.mark.parametrize("text", ["5 GB", "lots", "-1 MiB", "1e3 MiB", "MiB", ""])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="a size such as 512 MiB"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 B"), (1023, "1023 B"), (2**20, "1 MiB"), (3 * 2**29, "1.5 GiB"), (2**40, "1 TiB")],
)
def test_sizes_are_shown_in_the_largest_unit_that_fits(num_bytes: int, text: str) -> None:
    assert format_bytes(num_bytes) == text


def test_the_longest_name_leaves_room_for_the_suffix_of_a_run() -> None:
    assert len(job(name="a" * 40).name) + len("-") + 6 == MAX_RUN_ID_CHARACTERS
