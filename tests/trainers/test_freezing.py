"""model.freeze: what its patterns match, and what is said where they match nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification

from jobs.errors import SpecError
from trainers.freezing import freeze


@pytest.fixture
def model(tiny_world: tuple[Path, dict[str, str]]) -> nn.Module:
    loaded: nn.Module = AutoModelForSequenceClassification.from_pretrained(
        tiny_world[0], dtype=torch.float32
    )
    return loaded


def frozen(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if not p.requires_grad}


def test_nothing_is_frozen_without_patterns(model: nn.Module) -> None:
    freeze(model, [])
    assert frozen(model) == set()


@pytest.mark.parametrize(
    ("pattern", "prefix"),
    [
        ("embeddings", "bert.embeddings."),
        ("encoder.layer.0", "bert.encoder.layer.0."),
        ("bert", "bert."),
        ("bert.pooler.dense.bias", "bert.pooler.dense.bias"),
    ],
)
def test_a_pattern_freezes_all_below_its_path(model: nn.Module, pattern: str, prefix: str) -> None:
    freeze(model, [pattern])
    assert frozen(model) == {n for n, _ in model.named_parameters() if n.startswith(prefix)}
    assert frozen(model)


def test_only_whole_parts_of_a_path_match(model: nn.Module) -> None:
    with pytest.raises(SpecError, match="embed") as raised:
        freeze(model, ["embed"])
    assert "embeddings" in str(raised.value.problems[0].hint)


def test_every_pattern_that_matches_nothing_is_named(model: nn.Module) -> None:
    with pytest.raises(SpecError) as raised:
        freeze(model, ["poler", "bert", "xyz"])
    poler, xyz = raised.value.problems
    assert poler.hint == "did you mean pooler?"
    assert "xyz" in xyz.message
    assert xyz.hint == "the model's parts are bert, dropout, classifier"


def test_a_model_without_a_trained_parameter_is_refused(model: nn.Module) -> None:
    with pytest.raises(SpecError, match="leaves no parameter to train"):
        freeze(model, ["bert", "classifier"])
