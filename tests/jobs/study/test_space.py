"""The space of a study: its values, the jobs that they make, and what is refused."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import numpy as np
import pytest

from jobs.errors import SpecError
from jobs.parse import parse_spec, recorded_spec
from jobs.search_spec import CLONE_KEYS, RECOMMENDED
from jobs.spec import JobSpec
from jobs.study.recommended import recommended_space
from jobs.study.space import Choices, Range, job_with, space_of, trial_seed

TREE: dict[str, Any] = {
    "name": "sentiment",
    "task": {"labels": ["negative", "positive"]},
    "model": {"source": "m"},
    "data": {"train": "t", "validation": "v", "seed": 7},
    "store": "runs",
}
KINDS = {
    "optimizer.momentum": {"uniform": [0.8, 0.99], "when": {"optimizer.kind": "sgd"}},
    "optimizer.kind": {"choice": ["adamw", "sgd"]},
}


def job(space: Any = RECOMMENDED, *, search: dict[str, Any] | None = None, **more: Any) -> JobSpec:
    return parse_spec({**TREE, **more, "search": {"space": space, **(search or {})}}, where="job")


def problems(space: Any, **more: Any) -> list[tuple[str, str | None]]:
    with pytest.raises(SpecError) as caught:
        job(space, **more)
    return [(p.message, p.hint) for p in caught.value.problems]


def over_of(**given: Any) -> Range | Choices:
    """The values of a key that takes any number."""
    way = {name.replace("_", "-"): values for name, values in given.items()}
    (key,) = space_of(job({"optimizer.weight_decay": way})).keys
    return key.over


# ------------------------------------------------------------------------------------ values

WAYS: list[dict[str, Any]] = [
    {"uniform": [0, 0.5]},
    {"loguniform": [1e-6, 1e-2]},
    {"quniform": [0, 0.5, 0.1]},
    {"quniform": [0, 10, 4]},
    {"qloguniform": [1, 64, 3]},
    {"qloguniform": [1e-4, 1, 0.3]},
    {"integer": [3, 9]},
    {"log_integer": [1, 400]},
    {"choice": [0.1, 0, 3]},
]


@pytest.mark.parametrize("given", WAYS, ids=str)
def test_every_place_has_a_value_that_has_this_place(given: dict[str, Any]) -> None:
    over = over_of(**given)
    for place in np.linspace(0, 1, 257):
        value = over.at(float(place))
        assert over.holds(value)
        assert json.loads(json.dumps(value)) == value
        if isinstance(over, Range) and over.step is None:
            assert over.unit(value) == pytest.approx(place)
        again = over.at(over.unit(value))
        assert again == pytest.approx(value, rel=1e-12)
        assert again == value or not (isinstance(over, Choices) or over.step)


@pytest.mark.parametrize(
    ("given", "values"),
    [
        ({"quniform": [0, 0.5, 0.1]}, [0.0, 0.1, 0.2, 0.3, 0.4, 0.5]),
        ({"quniform": [0, 10, 4]}, [0, 4, 8]),
        ({"qloguniform": [1, 10, 4]}, [1, 5, 9]),
        ({"integer": [3, 5]}, [3, 4, 5]),
        ({"log_integer": [1, 4]}, [1, 2, 3, 4]),
    ],
)
def test_steps_are_exact_and_whole_where_they_are_written_so(
    given: dict[str, Any], values: list[float]
) -> None:
    over = over_of(**given)
    seen = sorted({over.at(float(place)) for place in np.linspace(0, 1, 1000)})
    assert [repr(value) for value in seen] == [repr(value) for value in values]
    assert isinstance(over, Range)
    assert over.ends == (values[0], values[-1])


def test_equal_lengths_are_equally_likely() -> None:
    places = [(place + 0.5) / 1200 for place in range(1200)]

    def values(**given: Any) -> list[Any]:
        return [*map(over_of(**given).at, places)]

    assert set(Counter(values(integer=[1, 4])).values()) == {300}
    assert set(Counter(values(choice=[1, 2, 3])).values()) == {400}
    logs = np.log10(values(loguniform=[1e-6, 1e-2]))
    assert np.allclose(np.histogram(logs, bins=4, range=(-6, -2))[0], 300, atol=1)
    # Each number has the logarithm's share of the half steps around it.
    share = np.log(10.5 / 9.5) / np.log(100.5 / 0.5)
    assert Counter(values(log_integer=[1, 100]))[10] == pytest.approx(1200 * share, abs=1)


def test_what_lies_outside_is_moved_to_the_nearest() -> None:
    over = over_of(quniform=[1, 2, 0.25])
    assert isinstance(over, Range)
    assert [over.nearest(v) for v in (-3.0, 1.6, 1.7, 9.0)] == [1.0, 1.5, 1.75, 2.0]
    assert not over.holds(1.6)


def test_true_is_not_one() -> None:
    choices = Choices((1, True, "1", [1]))
    assert [choices.index(v) for v in (1, True, "1", [1])] == [0, 1, 2, 3]
    assert not Choices((1, 0)).holds(False)
    assert not Range(0, 1).holds(True)


# ------------------------------------------------------------------------------- conditions


def test_a_key_comes_after_those_that_decide_about_it() -> None:
    space = {
        "model.dropout": {"uniform": [0, 0.1], "when": {"model.freeze": [["embeddings"]]}},
        "model.freeze": {"choice": [[], ["embeddings"]], "when": {"optimizer.kind": ["sgd"]}},
        **KINDS,
    }
    paths = [key.path for key in space_of(job(space)).keys]
    assert paths == ["optimizer.kind", "model.freeze", "model.dropout", "optimizer.momentum"]


def test_only_active_keys_have_values() -> None:
    space = space_of(job(KINDS))
    adamw = space.fill(lambda key: key.over.at(0))
    sgd = space.fill(lambda key: key.over.at(1))
    assert adamw == {"optimizer.kind": "adamw"}
    assert sgd == {"optimizer.kind": "sgd", "optimizer.momentum": 0.99}
    assert space.holds(adamw)
    assert space.holds(sgd)
    assert not space.holds({**adamw, "optimizer.momentum": 0.9})
    assert not space.holds({"optimizer.kind": "sgd"})
    assert not space.holds({"optimizer.kind": "sgd", "optimizer.momentum": 0.5})


def test_the_space_survives_the_way_through_the_run_folder_in_its_order() -> None:
    spec = job({**KINDS, "batching.global_batch_size": {"log-integer": [4, 64]}})
    again = recorded_spec(spec.to_bytes())
    assert again == spec
    assert space_of(again) == space_of(spec)
    assert json.loads(spec.to_bytes())["search"]["space"]["optimizer.momentum"] == {
        "uniform": [0.8, 0.99],
        "when": {"optimizer.kind": "sgd"},
    }


# ---------------------------------------------------------------------------- a trial's job


def test_a_trial_is_the_job_with_its_values_and_no_search() -> None:
    spec = job(KINDS, checkpoint={"keep_last": 4, "keep_best": 3, "every_steps": 9})
    values = {"optimizer.kind": "sgd", "optimizer.momentum": 0.85}
    trial = job_with(spec, values, seed=11)
    assert trial.search is None
    assert (trial.optimizer.kind, trial.optimizer.momentum) == ("sgd", 0.85)
    assert trial.data.seed == 11
    kept = trial.checkpoint
    assert (kept.keep_last, kept.keep_best, kept.every_steps) == (1, 1, 9)
    unchanged = job_with(spec, {}, seed=spec.data.seed)
    assert unchanged.digests() == spec.digests()
    assert recorded_spec(trial.to_bytes()) == trial


def test_a_trial_of_values_that_lists_hold_is_made_of_what_the_log_holds() -> None:
    spec = job({"model.freeze": {"choice": [[], ["embeddings"]]}})
    logged = json.loads(json.dumps(space_of(spec).fill(lambda key: key.over.at(1))))
    assert job_with(spec, logged, seed=0).model.freeze == ("embeddings",)


def test_a_trial_keeps_its_best_checkpoint_by_the_metric_of_the_study() -> None:
    trial = job_with(job(search={"metric": "validation/f1"}), {}, seed=0)
    assert trial.best == ("validation/f1", "max", 0.0)
    assert trial.train.early_stopping is not None
    assert trial.train.early_stopping.patience is None
    assert job_with(job(), {}, seed=0).train.early_stopping is None
    stopping = {"metric": "validation/accuracy", "patience": 2, "min_delta": 0.1}
    given = job_with(job(train={"early_stopping": stopping}), {}, seed=0).train.early_stopping
    assert given is not None
    assert (given.metric, given.patience, given.min_delta) == ("validation/accuracy", 2, 0.1)


def test_a_trial_whose_values_cannot_go_together_is_refused() -> None:
    values = {"optimizer.kind": "adamw", "optimizer.momentum": 0.5}
    with pytest.raises(SpecError, match="a trial's job: optimizer has momentum"):
        job_with(job(KINDS), values, seed=0)


def test_seeds_differ_by_repeat_and_the_first_is_the_job_s_own() -> None:
    seeds = [trial_seed(job(), repeat) for repeat in range(5)]
    assert seeds[0] == 7
    assert len(set(seeds)) == 5
    assert seeds == [trial_seed(job(KINDS), repeat) for repeat in range(5)]
    assert seeds[1] != trial_seed(job(search={"seed": 1}), 1)


# ------------------------------------------------------------------------------ recommended


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"optimizer": {"kind": "sgd", "learning_rate": 0.9, "weight_decay": 0.1}},
        {"optimizer": {"learning_rate": 1e-7, "warmup_steps": 77, "schedule": "constant"}},
        {"model": {"source": "m", "dropout": 0.5, "freeze": ["layer.0", "layer.1"]}},
        {"batching": {"global_batch_size": 1}},
        {"batching": {"global_batch_size": 6}, "workers": {"count": 4}},
        {"task": TREE["task"] | {"label_smoothing": 0.4}},
    ],
)
def test_the_recommended_space_holds_the_job_s_own_values(more: dict[str, Any]) -> None:
    spec = job(**more)
    space = space_of(spec)
    tree = spec.model_dump(mode="json")
    for key in space.keys:
        group, name = key.path.split(".")
        own = tree[group][name]
        assert own in (None, []) or key.over.holds(own), key.path
    batches = next(k.over for k in space.keys if k.path == "batching.global_batch_size")
    assert isinstance(batches, Choices)
    assert all(size >= spec.workers.count for size in batches.values)


def test_the_recommended_space_is_written_out_where_the_job_is_read() -> None:
    written = json.loads(job().to_bytes())["search"]["space"]
    assert written == json.loads(json.dumps(recommended_space(job())))
    assert job() == parse_spec({**TREE, "search": {}}, where="job")
    assert job(written) == job()


@pytest.mark.parametrize("scheduler", ["pbt", "pb2"])
def test_the_recommended_space_for_clones_has_what_clones_may_change(scheduler: str) -> None:
    space = space_of(job(search={"scheduler": scheduler}))
    assert {key.path for key in space.keys} < set(CLONE_KEYS)
    assert len(space.keys) == 4


# ----------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("space", "message", "hint"),
    [
        (
            {"optimizer.learning_rate": {"uniform": [0, 1]}},
            "optimizer.learning_rate: optimizer.learning_rate is 0.0, but must be a number above 0",
            "give it only values that are a number above 0",
        ),
        (
            {"model.dropout": {"choice": [0.1, 1.0]}},
            "model.dropout: model.dropout is 1.0, but must be a number of at least 0 and below 1",
            "give it only values that are a number of at least 0 and below 1",
        ),
        (
            {"train.epochs": {"uniform": [1, 4]}},
            "train.epochs: train.epochs is 1.0, but must be a whole number above 0",
            "write integer or log-integer: [low, high]",
        ),
        (
            {"optimizer.lr": {"uniform": [0, 1]}},
            "optimizer.lr: optimizer.lr is not a known key",
            "did you mean optimizer.learning_rate?",
        ),
        (
            {"optimizer": {"choice": ["adamw"]}},
            "optimizer is a group of keys",
            "search the keys in it, such as optimizer.kind",
        ),
        (
            {"store.uri": {"choice": ["a", "b"]}},
            "store.uri cannot be searched: the trials of a study are kept in its folder",
            "set store.uri in the job itself",
        ),
        (
            {"data.seed": {"integer": [0, 9]}},
            "data.seed cannot be searched: search.repeats and search.finalists train the same "
            "values with several seeds",
            "set data.seed in the job itself",
        ),
        (
            {"optimizer.momentum": KINDS["optimizer.momentum"]},
            "optimizer.momentum depends on optimizer.kind, which is not searched",
            "add optimizer.kind to search.space, or remove it from when",
        ),
        (
            {
                "train.epochs": {"integer": [1, 2]},
                "model.dropout": {"choice": [0], "when": {"train.epochs": 1}},
            },
            "model.dropout depends on train.epochs, which is given by integer",
            "give train.epochs as choice: [...], or remove it from when",
        ),
        (
            {
                **KINDS,
                "optimizer.momentum": {"uniform": [0.8, 0.9], "when": {"optimizer.kind": ["adam"]}},
            },
            "optimizer.momentum depends on optimizer.kind being adam, which it never is",
            "name one of adamw, sgd",
        ),
        (
            {
                "model.compile": {"choice": [True], "when": {"model.dropout": 0}},
                "model.dropout": {"choice": [0, 0.1], "when": {"model.compile": True}},
            },
            "model.compile depends on itself, by way of when of model.compile and model.dropout",
            "remove when from model.compile",
        ),
        (
            {
                **KINDS,
                "model.freeze": {"choice": [[], ["a"]], "when": {"optimizer.kind": "adamw"}},
                "optimizer.momentum": {
                    "uniform": [0.8, 0.9],
                    "when": {"optimizer.kind": "sgd", "model.freeze": [[]]},
                },
            },
            "optimizer.momentum is never searched: its when never holds",
            "remove one of the keys from when",
        ),
        (
            {"optimizer.kind": {"choice": ["adamw", "sgd"]}, "optimizer.momentum": {"choice": [0]}},
            "optimizer.momentum: optimizer has momentum, without effect on adamw",
            "add to optimizer.momentum when: {optimizer.kind: sgd}",
        ),
    ],
)
def test_a_space_that_is_wrong_says_where_and_what_to_type(
    space: dict[str, Any], message: str, hint: str
) -> None:
    assert problems(space) == [(f"job: search.space.{message}", hint)]


def test_all_wrong_keys_are_told_of_together() -> None:
    wrong = {"optimizer.learning_rate": {"choice": [0]}, "model.dropout": {"choice": [2]}}
    assert len(problems(wrong)) == 2


def test_values_that_cannot_go_together_are_found_before_a_trial_has_them() -> None:
    space = {
        "model.compile": {"choice": [False, True]},
        "batching.packing": {"choice": [False, True]},
    }
    ((message, hint),) = problems(space)
    assert message.startswith(
        "job: search.space allows model.compile true and batching.packing true, which cannot go "
        "together: model.compile and batching.packing are both true"
    )
    assert hint == "add to batching.packing when: {model.compile: false}"
    apart = {**space["batching.packing"], "when": {"model.compile": False}}
    job({**space, "batching.packing": apart})


def test_a_job_of_sgd_may_search_adamw_beside_what_sgd_alone_has() -> None:
    ((message, hint),) = problems(
        {
            "optimizer.kind": {"choice": ["sgd", "adamw"]},
            "optimizer.momentum": {"choice": [0, 0.5]},
        },
        optimizer={"kind": "sgd"},
    )
    assert "allows optimizer.kind adamw and optimizer.momentum 0" in message
    assert hint == "add to optimizer.momentum when: {optimizer.kind: sgd}"
