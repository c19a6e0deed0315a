"""The JSON schema of the job file: current, complete, and of one mind with the parser."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from jobs.parse import load_spec
from jobs.schema import expected, field_schema, job_schema, known_paths, schema_text

ROOT = Path(__file__).parent.parent.parent
SCHEMA = ROOT / "jobs" / "job.schema.json"
JOBS = sorted((ROOT / "examples").glob("*.yaml"))


def groups() -> Iterator[tuple[str, dict[str, Any]]]:
    schema = job_schema()
    yield "job", schema
    yield from schema["$defs"].items()


def test_the_schema_in_the_repository_is_current() -> None:
    assert SCHEMA.read_text(encoding="utf-8") == schema_text(), (
        "run: python -m jobs.schema --write jobs/job.schema.json"
    )


def test_the_schema_is_a_valid_schema() -> None:
    jsonschema.Draft202012Validator.check_schema(json.loads(schema_text()))


@pytest.mark.parametrize(("name", "group"), list(groups()), ids=lambda value: str(value)[:20])
def test_every_key_has_a_description_of_one_line(name: str, group: dict[str, Any]) -> None:
    assert group["additionalProperties"] is False
    for key, field in group["properties"].items():
        assert field["description"].strip(), f"{name}.{key}"
        assert "\n" not in field["description"], f"{name}.{key}"


def test_there_are_examples_to_test() -> None:
    assert [path.name for path in JOBS] == [
        "laptop.yaml",
        "search-sentiment.yaml",
        "sentiment.yaml",
    ]


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.name)
def test_every_example_is_right_for_editors_and_for_the_parser(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert "# yaml-language-server: $schema=../jobs/job.schema.json" in text.splitlines()
    spec = load_spec(path)
    # 3e-5 is a number for editors, whose YAML is 1.2, but a text for plain PyYAML.
    tree = json.loads(spec.model_dump_json(exclude_unset=True))
    jsonschema.validate(tree, json.loads(SCHEMA.read_text(encoding="utf-8")))
    assert set(tree) == set(yaml.safe_load(text))


@pytest.mark.parametrize(
    "change",
    [
        {"store": {"uri": "s3://a/runs"}},
        {"data": {"train": "t", "stream_memory": "1.5 GiB", "lanes": "auto"}},
        {"data": {"train": "t", "stream_memory": 4096, "lanes": 8}},
        {"task": {"labels": ["a", 1]}},
        {"model": {"source": "m", "dropout": None}},
        {"search": {}},
        {"search": {"space": "recommended", "algorithm": "tpe", "scheduler": None}},
        {"search": {"algorithm": {"kind": "gp"}, "scheduler": {"kind": "asha", "first": 0.1}}},
        {"search": {"space": {"train.epochs": {"log-integer": [1, 4], "when": {"a.b": [1, 2]}}}}},
        {"search": {"space": {"model.freeze": {"choice": [[], ["embeddings"]]}}}},
    ],
)
def test_the_schema_takes_each_way_to_write_a_value(change: dict[str, Any]) -> None:
    job = {
        "name": "a",
        "task": {"labels": ["x", "y"]},
        "model": {"source": "m"},
        "data": {"train": "t"},
        "store": "runs",
    }
    jsonschema.validate(job | change, job_schema())


@pytest.mark.parametrize(
    "change",
    [
        {"stor": "runs"},
        {"workers": {"count": 0}},
        {"model": {}},
        {"search": {"space": "recomended"}},
        {"search": {"space": {"model.dropout": {"lognormal": [0, 1]}}}},
        {"search": {"algorithm": "tpee"}},
    ],
)
def test_the_schema_refuses_what_the_parser_refuses(change: dict[str, Any]) -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"name": "a"} | change, job_schema())


def test_every_key_can_be_found_and_said_in_words() -> None:
    for path in known_paths():
        schema = field_schema(path.split("."))
        assert schema is not None, path
        assert expected(schema), path


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("optimizer.learning_rate", "a number above 0"),
        ("model.dropout", "a number of at least 0 and below 1"),
        ("task.max_tokens", "a whole number of at least 8"),
        ("task.label_smoothing", "a number of at least 0 and below 1"),
        ("data.lanes", "a whole number above 0 or auto"),
        ("model.precision", "float32, tf32, bfloat16 or auto"),
        ("train.log_rows", "true or false"),
        ("model.freeze", "a list of texts"),
        ("task.labels", "a list of at least 2 texts"),
        ("store", "a text or a group of keys"),
        ("store.access.profile", "a text"),
        ("search.space", "recommended or a group of keys"),
        ("search.scheduler.kind", "none or asha or hyperband or median or pbt or pb2"),
    ],
)
def test_what_a_key_may_hold_is_said_in_words(path: str, words: str) -> None:
    schema = field_schema(path.split("."))
    assert schema is not None
    assert expected(schema) == words


def test_an_unknown_path_has_no_schema() -> None:
    assert field_schema(["task", "lables"]) is None
    assert field_schema(["name", "first"]) is None
    assert field_schema(["optimizer", "betas", 2]) is None
