"""How a model is adapted: whether the adapter of a job fits it, and how many weights are trained.
Pure, from the names and shapes of the weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from jobs.checks.finding import Finding, ok, problem
from jobs.checks.weights import Weights
from jobs.spec import Adapter, JobSpec, PromptAdapter
from trainers.adapter_targets import (
    Targets,
    adapter_weights,
    matching,
    no_auto_targets,
    targets_of,
)
from trainers.module_paths import is_under

PART = "model.adapter"
_HEADS = ("classifier", "pre_classifier", "score", "lm_head", "qa_outputs", "cls")


def check_adapter(
    spec: JobSpec, weights: Weights, config: Mapping[str, Any], shown: str
) -> Iterator[Finding]:
    """Whether the layers that the job's adapter names are there, and what it trains."""
    adapter = spec.model.adapter
    if adapter is None:
        return
    if not isinstance(adapter, PromptAdapter) and adapter.target_modules != "all-linear":
        targets = targets_of(adapter, str(config.get("model_type")))
        if targets is None:
            told = no_auto_targets(adapter, str(config.get("model_type")))
            yield problem(PART, told.message, told.hint or "")
            return
        _, problems = matching(targets.modules, list(_linear_layers(weights)))
        if problems:
            yield from (problem(PART, told.message, told.hint or "") for told in problems)
            return
    trained = trained_parameters(spec, weights, config)
    share = trained / max(1, weights.num_parameters)
    yield ok(PART, f"{adapter.kind}: about {trained:,} weights are trained, {share:.2%} of {shown}")


def trained_parameters(spec: JobSpec, weights: Weights, config: Mapping[str, Any]) -> int:
    """About how many weights the job trains, a new head included."""
    head = _head_weights(spec, weights, config)
    adapter = spec.model.adapter
    if adapter is None:
        frozen = sum(
            weights.size(name)
            for name in weights.shapes
            if any(is_under(name, pattern) for pattern in spec.model.freeze)
        )
        return weights.num_parameters - frozen + head
    layers = _linear_layers(weights)
    targets, found = _adapted(adapter, config, layers)
    blocks = {name.rpartition(f".{n}.")[0] + n for name in layers for n in _numbers(name)}
    return head + adapter_weights(
        adapter, targets, {name: layers[name] for name in found}, blocks=len(blocks)
    )


def _adapted(
    adapter: Adapter, config: Mapping[str, Any], layers: Mapping[str, tuple[int, int]]
) -> tuple[Targets, list[str]]:
    """The ends of names, and the layers that they name."""
    if isinstance(adapter, PromptAdapter):
        width = config.get("hidden_size")
        return Targets(()), [n for n, (_, inputs) in layers.items() if inputs == width]
    if adapter.target_modules == "all-linear":
        return Targets(()), list(layers)
    targets = targets_of(adapter, str(config.get("model_type"))) or Targets(())
    return targets, matching(targets.modules, list(layers))[0]


def _linear_layers(weights: Weights) -> dict[str, tuple[int, int]]:
    """Outputs and inputs of the layers whose weights are matrices, but embeddings and heads."""
    return {
        name.removesuffix(".weight"): (shape[0], shape[1])
        for name, shape in weights.shapes.items()
        if len(shape) == 2
        and name.endswith(".weight")
        and "embed" not in name
        and not any(part in _HEADS for part in name.split("."))
    }


def _numbers(name: str) -> list[str]:
    """The first number in a layer's name: that of its block."""
    return [part for part in name.split(".") if part.isdigit()][:1]


def _head_weights(spec: JobSpec, weights: Weights, config: Mapping[str, Any]) -> int:
    """Weights of a head: those that the model brings, or of a new one."""
    own = [n for n in weights.shapes if any(part in _HEADS for part in n.split("."))]
    if own:
        return sum(map(weights.size, own)) if spec.model.adapter is not None else 0
    hidden = config.get("hidden_size")
    return (hidden + 1) * len(spec.task.labels) if isinstance(hidden, int) else 0
