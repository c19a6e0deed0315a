"""Adapters, optimizers and weights of labels in the job file: what goes together, and what is said
where it does not."""

from __future__ import annotations

from typing import Any

import pytest

from jobs.errors import Problem, SpecError
from jobs.parse import parse_spec
from jobs.search_spec import CLONE_KEYS
from jobs.spec import JobSpec
from jobs.study.recommended import recommended_space

LORA = {"kind": "lora", "rank": 8}


def job(**parts: Any) -> JobSpec:
    tree: dict[str, Any] = {
        "name": "adapted",
        "task": {"labels": ["ham", "spam"]},
        "model": {"source": "s3://models/minilm"},
        "data": {"train": "s3://lake/train", "validation": "s3://lake/validation"},
        "store": "s3://shoal/runs",
    }
    for part, keys in parts.items():
        tree[part] = {**tree.get(part, {}), **keys}
    return parse_spec(tree, where="job.yaml")


def problem(**parts: Any) -> Problem:
    with pytest.raises(SpecError) as refused:
        job(**parts)
    [found] = refused.value.problems
    return found


@pytest.mark.parametrize(
    ("parts", "message", "hint"),
    [
        (
            {"model": {"adapter": LORA, "freeze": ["embeddings"]}},
            "model.freeze is without effect",
            "remove model.freeze",
        ),
        (
            {"model": {"adapter": LORA}, "workers": {"count": 2, "strategy": "fsdp"}},
            "cuts no model with an adapter",
            "set workers.strategy to ddp",
        ),
        (
            {"model": {"adapter": {"kind": "prefix-tuning"}, "activation_checkpointing": True}},
            "model.activation_checkpointing is true",
            "remove model.activation_checkpointing",
        ),
        (
            {"model": {"adapter": {"kind": "prompt-tuning"}}, "batching": {"packing": True}},
            "packed rows have no virtual tokens",
            "remove batching.packing",
        ),
        (
            {"model": {"adapter": {"kind": "ia3", "feedforward_modules": ["dense"]}}},
            "feedforward_modules, without effect on target_modules auto",
            "name target_modules too",
        ),
        (
            {"model": {"adapter": {"kind": "ia3", "rank": 8}}},
            "model.adapter.rank belongs to model.adapter.kind",
            "write model.adapter.kind: dora",
        ),
        (
            {"model": {"adapter": {"kind": "lora", "ranks": 8}}},
            "model.adapter.ranks is not a known key",
            "did you mean model.adapter.rank?",
        ),
        (
            {"optimizer": {"kind": "adafactor", "betas": [0.8, 0.9]}},
            "has betas, without effect on adafactor",
            "write optimizer.kind: adamw",
        ),
        (
            {"optimizer": {"kind": "torch.optim.NAdam", "epsilon": 1e-6}},
            "has epsilon, without effect on torch.optim.NAdam",
            "optimizer.options: {epsilon: ...}",
        ),
        (
            {"optimizer": {"options": {"amsgrad": True}}},
            "has options, without effect on adamw",
            "by its import path",
        ),
        (
            {"optimizer": {"kind": "torch.optim.NAdam", "options": {"lr": 0.1}}},
            "has lr in options",
            "set optimizer.learning_rate instead",
        ),
        (
            {"optimizer": {"cycles": 2}},
            "has cycles, without effect on schedule linear",
            "write optimizer.schedule: cosine-restarts",
        ),
        (
            {"optimizer": {"schedule": "plateau"}, "data": {"validation": None}},
            "optimizer.schedule plateau needs a validation set",
            "give data.validation",
        ),
        (
            {"optimizer": {"kind": "adafactor"}, "workers": {"count": 2, "strategy": "fsdp"}},
            "only adamw and sgd are known to need no more",
            "set optimizer.kind to adamw",
        ),
        (
            {"task": {"class_weights": {"span": 2.0}}},
            "task.class_weights holds span, which is none of task.labels",
            "did you mean spam?",
        ),
        (
            {"data": {"sampling": {"eggs": 2.0}}},
            "data.sampling holds eggs, which is none of task.labels",
            "name some of ham, spam",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(
    parts: dict[str, Any], message: str, hint: str
) -> None:
    found = problem(**parts)
    assert message in found.message
    assert hint in (found.hint or "")


def test_the_adapter_is_part_of_what_must_stay_the_same() -> None:
    plain, adapted = job().digests(), job(model={"adapter": LORA}).digests()
    assert plain["architecture"] != adapted["architecture"]
    other = job(model={"adapter": {**LORA, "rank": 4}}).digests()
    assert other["architecture"] != adapted["architecture"]
    dropout = job(model={"adapter": {**LORA, "dropout": 0.1}}).digests()
    assert dropout["architecture"] == adapted["architecture"]


def test_sampling_decides_the_order_and_class_weights_the_loss_alone() -> None:
    plain = job().digests()
    sampled = job(data={"sampling": "balanced"}).digests()
    assert sampled["data_order"] != plain["data_order"]
    weighted = job(task={"class_weights": "balanced"}).digests()
    assert {k for k in plain if plain[k] != weighted[k]} == {"hyper_parameters"}


def test_the_recommended_space_has_the_rank_and_larger_steps() -> None:
    space = recommended_space(job(model={"adapter": {"kind": "dora", "rank": 6}}))
    assert space["model.adapter.rank"] == {"choice": [4, 6, 8, 16, 32]}
    assert "model.freeze" not in space
    full = recommended_space(job())["optimizer.learning_rate"]["loguniform"]
    assert space["optimizer.learning_rate"]["loguniform"][1] > full[1]
    assert "model.adapter.rank" not in recommended_space(job(model={"adapter": {"kind": "ia3"}}))


def test_a_clone_never_changes_the_rank() -> None:
    search = {"scheduler": "pbt", "space": {"model.adapter.rank": {"choice": [4, 8]}}}
    found = problem(model={"adapter": LORA}, search=search)
    assert "model.adapter.rank cannot change" in found.message
    adapted = job(model={"adapter": LORA}, search={"scheduler": "pbt"})
    assert recommended_space(adapted).keys() <= set(CLONE_KEYS)
