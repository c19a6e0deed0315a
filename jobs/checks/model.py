"""The pretrained model: configuration, weights and tokenizer, without torch or transformers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from jobs.checks.adaptation import check_adapter, trained_parameters
from jobs.checks.finding import Finding, not_checked, ok, problem, problems_of, warning
from jobs.checks.model_source import PART, ModelFolder, find_model
from jobs.checks.stores import Stores
from jobs.checks.tokenizer import TokenizerFiles, check_tokenizer
from jobs.checks.weights import Weights, read_weights, weight_files
from jobs.errors import ShoalError
from jobs.spec import JobSpec, PromptAdapter
from trainers.module_paths import is_under, nearest
from trainers.positions import most_tokens

_LEGACY_WEIGHTS = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack")


@dataclass(frozen=True, eq=False)
class ModelFacts:
    """What is known of a model whose files could be looked at."""

    shown: str
    weights: Weights | None
    trained_parameters: int | None
    """Of them and of a new head and adapter, about."""
    tokenizer: Any
    """A `tokenizers.Tokenizer`; None where it does not load."""
    tokenizer_files: TokenizerFiles | None


def check_model(spec: JobSpec, stores: Stores) -> tuple[list[Finding], ModelFacts | None]:
    """What there is to say of `model.source`; facts where its files could be looked at."""
    findings, folder = find_model(spec, stores)
    if folder is None:
        return findings, None
    config = weights = tokenizer = tokenizer_files = None
    try:
        more, config = _read_config(folder)
        findings += more
        more, weights = _check_weights(folder)
        findings += more
        more, tokenizer, tokenizer_files = check_tokenizer(folder.shown, folder.store, folder.files)
        findings += more
    except ShoalError as error:
        findings += problems_of(PART, error)
    if config is not None:
        findings += _check_limits(spec, config, folder.shown)
        findings += _check_head(spec, config, folder.shown)
        if tokenizer is not None:
            findings += _check_vocabulary(config, tokenizer, folder.shown)
    trained = None
    if weights is not None:
        findings += _check_freeze(spec, weights, folder.shown)
    if weights is not None and config is not None:
        findings += check_adapter(spec, weights, config, folder.shown)
        trained = trained_parameters(spec, weights, config)
    return findings, ModelFacts(folder.shown, weights, trained, tokenizer, tokenizer_files)


def _read_config(folder: ModelFolder) -> tuple[list[Finding], Mapping[str, Any] | None]:
    if "config.json" not in folder.files:
        return [
            problem(
                PART,
                f"{folder.shown} has no config.json, so it is no model folder",
                "name the folder that save_pretrained wrote",
            )
        ], None
    try:
        config = json.loads(folder.store.read("config.json"))
        config["model_type"]
    except (ValueError, KeyError, TypeError):
        return [
            problem(
                PART,
                f"{folder.shown}/config.json is no configuration of a transformers model",
                "name the folder that save_pretrained wrote",
            )
        ], None
    return [], config


def _check_weights(folder: ModelFolder) -> tuple[list[Finding], Weights | None]:
    if not weight_files(folder.files):
        old = sorted(name for name in folder.files if name.endswith(_LEGACY_WEIGHTS))
        only = f", only {', '.join(old[:3])}, which can run code on load" if old else ""
        return [
            problem(
                PART,
                f"{folder.shown} has no safetensors weights{only}",
                "load it with transformers and call save_pretrained, then name that folder",
            )
        ], None
    missing = _missing_shards(folder)
    if missing:
        return [
            problem(
                PART,
                f"{folder.shown} lacks {len(missing)} of its weight files: "
                + ", ".join(missing[:3]),
                "copy the model's folder again",
            )
        ], None
    weights = read_weights(folder.store, folder.files)
    count = weights.num_parameters
    shown = f"{count / 1e6:,.1f} M" if count >= 100_000 else f"{count:,}"
    return [ok(PART, f"{folder.shown}: {shown} parameters in safetensors")], weights


def _missing_shards(folder: ModelFolder) -> list[str]:
    """Files that an index of sharded weights names and that are not there."""
    name = "model.safetensors.index.json"
    if name not in folder.files or "model.safetensors" in folder.files:
        return []
    try:
        named = set(json.loads(folder.store.read(name))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError):
        return [name]
    return sorted(named - folder.files.keys())


def _check_limits(spec: JobSpec, config: Mapping[str, Any], shown: str) -> Iterator[Finding]:
    positions = config.get("max_position_embeddings")
    limit = most_tokens(
        str(config.get("model_type")),
        max_position_embeddings=positions if isinstance(positions, int) else None,
        pad_token_id=config.get("pad_token_id"),
    )
    adapter = spec.model.adapter
    virtual = adapter.virtual_tokens if isinstance(adapter, PromptAdapter) else 0
    if limit is not None and spec.task.max_tokens <= limit < spec.task.max_tokens + virtual:
        yield problem(
            PART,
            f"task.max_tokens is {spec.task.max_tokens}, and model.adapter.virtual_tokens is "
            f"{virtual}, but {shown} reads at most {limit} tokens",
            f"write max_tokens: {limit - virtual}, or less",
        )
    if limit is not None and spec.task.max_tokens > limit:
        yield problem(
            PART,
            f"task.max_tokens is {spec.task.max_tokens}, but {shown} reads at most {limit} tokens",
            f"write max_tokens: {limit}, or less",
        )


def _check_head(spec: JobSpec, config: Mapping[str, Any], shown: str) -> Iterator[Finding]:
    """A head that the model brings must fit the task: it is trained on, not replaced."""
    architecture = str((config.get("architectures") or [""])[0])
    names = config.get("id2label")
    if not architecture.endswith("ForSequenceClassification") or not isinstance(names, dict):
        return
    ordered = [str(names[key]) for key in sorted(names, key=int)]
    if len(ordered) != len(spec.task.labels):
        yield problem(
            PART,
            f"{shown} tells {len(ordered)} labels apart ({', '.join(ordered[:5])}), but "
            f"task.labels has {len(spec.task.labels)}",
            "name a model without a head, or give task.labels the same ones",
        )
    elif ordered != list(spec.task.labels) and not _are_unnamed(ordered):
        yield warning(
            PART,
            f"{shown} was trained for the labels {', '.join(ordered[:5])}, in this order; "
            f"task.labels is {', '.join(spec.task.labels[:5])}, and its head starts from those",
            "give task.labels the same order, or name a model without a head",
        )


def _are_unnamed(names: list[str]) -> bool:
    return all(name == f"LABEL_{place}" for place, name in enumerate(names))


def _check_vocabulary(config: Mapping[str, Any], tokenizer: Any, shown: str) -> Iterator[Finding]:
    size, rows = tokenizer.get_vocab_size(), config.get("vocab_size")
    if isinstance(rows, int) and size > rows:
        yield problem(
            PART,
            f"the tokenizer of {shown} knows {size:,} tokens, but the model has embeddings for "
            f"{rows:,}",
            "put the tokenizer that belongs to the weights beside them",
        )


def _check_freeze(spec: JobSpec, weights: Weights, shown: str) -> Iterator[Finding]:
    """Whether each frozen module is among the weights, which lack the head and, often, the name
    of the whole encoder at the start of their paths."""
    for pattern in spec.model.freeze:
        inside = pattern.partition(".")[2]
        wanted = [path for path in (pattern, inside) if path]
        if any(is_under(name, path) for name in weights.shapes for path in wanted):
            continue
        near = nearest(pattern, weights.shapes)
        said = f"model.freeze holds {pattern}, which no weight of {shown} is under"
        if near:
            yield warning(PART, said, f"did you mean {near[0]}?")
        else:
            yield not_checked(PART, f"{said}; it may be a part of the head, which is new")
