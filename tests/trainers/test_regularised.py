"""Runs whose rows are weighted and whose rates change: resumed, they end with the same bits."""

from __future__ import annotations

from typing import Any

import pytest

from jobs.runs import RunReader
from tests.scene import Scene

PARTS: dict[str, dict[str, Any]] = {
    "plateau": {
        "optimizer": {
            "schedule": "plateau",
            "plateau": {"patience": 1, "min_delta": 10.0, "factor": 0.5},
            "layer_decay": 0.8,
            "kind": "adafactor",
        },
        "train": {"evaluate_every_steps": 2},
        "checkpoint": {"keep_last": 9},
    },
    "sampling": {
        "data": {"sampling": {"positive": 1.6, "negative": 0.3}},
        "task": {
            "class_weights": "balanced",
            "augment": {"delete": 0.1, "swap": 0.1, "word_dropout": 0.1},
        },
        "optimizer": {"kind": "torch.optim.NAdam", "schedule": "one-cycle"},
    },
}


@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS)
def test_a_resumed_run_ends_with_the_same_bits(scene: Scene, parts: dict[str, Any]) -> None:
    spec = scene.job(**parts)
    assert scene.train(spec).state == "SUCCEEDED"
    scene.crash(spec, "broken")
    assert scene.train(spec, "broken", generation=2).state == "SUCCEEDED"
    assert scene.manifests("broken")[-1].parent_step is not None
    assert scene.tensors("broken") == scene.tensors()


def rates(scene: Scene) -> dict[int, float]:
    lines = RunReader(scene.runs, "run").metrics()
    return {line["step"]: line["learning_rate"] for line in lines if line["kind"] == "train"}


def test_a_plateau_is_remembered_over_a_resume(scene: Scene) -> None:
    """No evaluation after the first brings the improvement that is asked for."""
    spec = scene.job(**PARTS["plateau"])
    scene.crash(spec)
    scene.train(spec, generation=2)
    found = rates(scene)
    assert [found[step] / found[1] for step in range(1, 11)] == [
        *(1.0, 1.0, 1.0, 1.0, 0.5, 0.5, 0.25, 0.25, 0.125, 0.125)
    ]


def test_rows_in_another_order_are_refused(scene: Scene) -> None:
    parts = PARTS["sampling"]
    scene.crash(scene.job(**parts))
    outcome = scene.train(scene.job(**{**parts, "data": {"sampling": "balanced"}}), generation=2)
    assert outcome.failure is not None
    assert "sampler_digest was" in outcome.failure.problems[0][0]


def test_an_epoch_has_as_many_steps_as_its_rows_make(scene: Scene) -> None:
    """40 rows, half of them positive: 32 + 6 in the mean."""
    spec = scene.job(**PARTS["sampling"])
    outcome = scene.train(spec)
    last = scene.manifests()[-1]
    assert last.is_last_step
    assert last.stream.sampler_digest is not None
    assert outcome.step in (9, 10, 11)
    assert (last.stream.epoch, last.stream.next_item) == (2, 0)
