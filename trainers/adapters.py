"""Few new weights beside those of a model, through peft: added, saved by themselves, and merged.

    add_adapter         the adapter in its place; it and the head are trained, nothing else
    adapter_tensors     what a checkpoint holds of it, under the names that peft gives
    plain_state         the model's other tensors, under the names that they had before
    merged_tensors      those of them that an adapter changes, with its change

Adapters lie inside the transformers model, which stays what it was: of the same class, with the
same outputs. So DDP, packing, compiling and the tasks know nothing of them.
"""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from jobs.errors import Problem, SpecError
from jobs.record import ADAPTER_FOLDER, ADAPTER_WEIGHTS
from jobs.spec import Adapter, Ia3Adapter, LoraAdapter, PromptAdapter
from trainers.adapter_targets import Targets, matching, no_auto_targets, targets_of
from trainers.parallel import seed_generators

if TYPE_CHECKING:
    import peft

PROMPTS = "prompt_encoder"
"""The module of a model that holds its virtual tokens."""
CONFIG = f"{ADAPTER_FOLDER}adapter_config.json"
_WHOLE_MODEL = "base_model.model."
_PROMPTED_MODEL = "base_model."
"""What peft puts before the names of a model's own tensors, with and without virtual tokens."""
_SEED_KEY = 1
_NEW_WEIGHTS = "new_weights"
_TASK_TYPES = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForCausalLM": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForQuestionAnswering": "QUESTION_ANS",
}


def add_adapter(model: Any, adapter: Adapter, *, seed: int) -> None:
    """Adds the adapter of a job to a transformers model on the CPU; its weights are drawn from
    `seed`.

    From here on only they and the head require a gradient: what lies outside of the pretrained
    body, and what no weights were found for. Raises SpecError where the adapter names layers that
    the model has not, or needs what it has not.
    """
    head = head_names(model)
    own = {id(parameter) for parameter in model.parameters()}
    seed_generators(seed, _SEED_KEY)
    config: peft.PeftConfig
    if isinstance(adapter, PromptAdapter):
        from trainers.prompts import add_prompts  # with peft, which takes seconds to load

        config = add_prompts(model, adapter)
    else:
        config = _inject(model, adapter, head)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(id(parameter) not in own or name in head)
    config.task_type = _task_type(model)
    config.modules_to_save = _modules_of(model, head)  # type: ignore[attr-defined]
    model.peft_config = {"default": config}


def remember_new(model: nn.Module, names: set[str]) -> None:
    """Keeps in mind for which of its weights a model found none where it was loaded from."""
    setattr(model, _NEW_WEIGHTS, frozenset(names))


def head_names(model: Any) -> set[str]:
    """Parameters that are trained with every adapter."""
    body = getattr(model, "base_model", model)
    inside = {id(parameter) for parameter in body.parameters()}
    # The words of a language model are no new head.
    outputs = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if isinstance(outputs, nn.Module):
        inside |= {id(parameter) for parameter in outputs.parameters()}
    new: frozenset[str] = getattr(model, _NEW_WEIGHTS, frozenset())
    return {
        name
        for name, parameter in model.named_parameters()
        if id(parameter) not in inside or name in new
    }


def is_adapted(model: nn.Module) -> bool:
    """Whether the model has an adapter."""
    return "default" in getattr(model, "peft_config", {})


def is_merged(model: nn.Module) -> bool:
    """Whether the adapter's changes can be made in the model's own weights."""
    return not hasattr(model, PROMPTS)


# ------------------------------------------------------------------------------- which layers


def _inject(model: Any, adapter: LoraAdapter | Ia3Adapter, head: set[str]) -> peft.PeftConfig:
    import peft

    layers = _layers(model, head)
    targets = _targets(adapter, model, layers)
    found, problems = matching(targets.modules, list(layers))
    if problems:
        raise SpecError(*problems)
    inputs, _ = matching(targets.inputs, found)
    turned = any(isinstance(layers[name], Conv1D) for name in found)
    config: peft.PeftConfig
    if isinstance(adapter, LoraAdapter):
        config = peft.LoraConfig(
            r=adapter.rank,
            lora_alpha=adapter.alpha,  # type: ignore[arg-type]
            lora_dropout=adapter.dropout,
            target_modules=found,
            use_dora=adapter.kind == "dora",
            fan_in_fan_out=turned,
        )
    else:
        config = peft.IA3Config(
            target_modules=found, feedforward_modules=inputs, fan_in_fan_out=turned
        )
    peft.inject_adapter_in_model(config, model)
    _refuse_joined(model)
    return config


def _layers(model: nn.Module, head: set[str]) -> dict[str, nn.Module]:
    """The linear layers of the body."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and f"{name}.weight" not in head
    }


def _targets(
    adapter: LoraAdapter | Ia3Adapter, model: Any, layers: Mapping[str, nn.Module]
) -> Targets:
    if adapter.target_modules == "all-linear":
        outputs = model.get_output_embeddings()
        return Targets(tuple(name for name, layer in layers.items() if layer is not outputs))
    model_type = model.config.model_type
    targets = targets_of(adapter, model_type)
    if targets is None:
        raise SpecError(no_auto_targets(adapter, model_type))
    return targets


def _refuse_joined(model: nn.Module) -> None:
    """Weights that are saved in another form than they are computed with cannot be merged."""
    from trainers.state import saved_weights

    saved = saved_weights(model)
    for name, _ in _adapted_layers(model):
        if f"{name}.weight" not in saved:
            raise SpecError(
                Problem(
                    f"model.adapter changes {name}, but this model joins weights on loading, and "
                    "with joined ones an adapter cannot be merged",
                    "name other layers in model.adapter.target_modules",
                )
            )


def _task_type(model: nn.Module) -> str | None:
    name = type(model).__name__
    return next((kind for end, kind in _TASK_TYPES.items() if name.endswith(end)), None)


def _modules_of(model: nn.Module, head: set[str]) -> list[str]:
    """The outermost modules all of whose parameters are the head's."""
    found: list[str] = []
    for name, module in model.named_modules():
        names = [f"{name}.{key}" for key, _ in module.named_parameters()]
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if name and names and not inside and head.issuperset(names):
            found.append(name)
    return found


# ------------------------------------------------------------------------------- what is saved


def adapter_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """All that training changes, uncopied, as peft names it: adapter, head and buffers."""
    frozen = {
        name
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if not parameter.requires_grad
    }
    return {
        _saved_name(model, name): tensor
        for name, tensor in model.state_dict().items()
        if name not in frozen
    }


def _saved_name(model: nn.Module, name: str) -> str:
    if not is_merged(model):
        is_prompt = name.startswith(f"{PROMPTS}.")
        return "prompt_embeddings" if is_prompt else _PROMPTED_MODEL + name
    short = name.replace("lora_magnitude_vector.default.weight", "lora_magnitude_vector")
    for part in ("lora_A", "lora_B", "ia3_l"):
        short = short.replace(f".{part}.default", f".{part}")
    return _WHOLE_MODEL + short


def load_adapter(model: nn.Module, folder: Path) -> None:
    """Puts back what `adapter_tensors` gave, from below a folder; SpecError where it is that of
    another adapter or another model."""
    held = load_file(folder / ADAPTER_WEIGHTS)
    own = adapter_tensors(model)
    differing = sorted(
        name
        for name in {*held, *own}
        if name not in held or name not in own or held[name].shape != own[name].shape
    )
    if differing:
        raise SpecError(
            Problem(
                f"the checkpoint holds another adapter than model.adapter: {differing[0]} differs",
                "set model.adapter as it was, or start a new run with model.source naming this run",
            )
        )
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(held[name])


def adapter_config(model: Any, *, source: str, revision: str | None) -> bytes:
    """peft's adapter_config.json."""
    config = copy.copy(model.peft_config["default"])
    config.base_model_name_or_path, config.revision = source, revision
    config.inference_mode = True
    with tempfile.TemporaryDirectory(prefix="shoal-adapter-") as folder:
        config.save_pretrained(folder)
        written = json.loads(Path(folder, "adapter_config.json").read_text(encoding="utf-8"))
    return json.dumps(written, indent=1, sort_keys=True).encode()


# ---------------------------------------------------------------------------------- the whole


def plain_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The model's `state_dict` without its adapter, names as if it had none."""
    state: dict[str, torch.Tensor] = model.state_dict()
    layers = [f"{name}." for name, _ in _adapted_layers(model)]
    plain: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        layer = next((layer for layer in layers if name.startswith(layer)), None)
        if layer is None:
            if not name.startswith(f"{PROMPTS}."):
                plain[name] = tensor
        elif name.startswith(f"{layer}base_layer."):
            plain[name.replace(f"{layer}base_layer.", layer, 1)] = tensor
    return plain


def merged_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights that the adapter changes, by their names in `plain_state`, changed.

    Copies, made one layer at a time; the model stays as it is.
    """
    for name, layer in _adapted_layers(model):
        merged = copy.deepcopy(layer)
        with torch.no_grad():
            merged.merge()
        for key, parameter in merged.get_base_layer().named_parameters():
            yield f"{name}.{key}", parameter.detach()


def _adapted_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    if not is_adapted(model):
        return
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            yield name, module
