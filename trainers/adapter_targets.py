"""Which layers an adapter changes, and how many weights it trains. Needs no torch, as checks have
none.

auto_targets        the layers that `target_modules: auto` means, by the model's type
adapter_weights     how many weights an adapter of the job file has, from the shapes of the layers
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from jobs.errors import Problem
from jobs.spec import Adapter, Ia3Adapter, LoraAdapter
from trainers.module_paths import ends_with, nearest


@dataclass(frozen=True)
class Targets:
    """Ends of the names of layers."""

    modules: tuple[str, ...]
    inputs: tuple[str, ...] = ()
    """Of IA3: those of them whose inputs are scaled, in place of their outputs."""


_QUERY_VALUE = {
    "albert": ("query", "value"),
    "bart": ("q_proj", "v_proj"),
    "bert": ("query", "value"),
    "camembert": ("query", "value"),
    "deberta": ("in_proj",),
    "deberta-v2": ("query_proj", "value_proj"),
    "distilbert": ("q_lin", "v_lin"),
    "electra": ("query", "value"),
    "gemma": ("q_proj", "v_proj"),
    "gemma2": ("q_proj", "v_proj"),
    "gpt2": ("c_attn",),
    "gpt_neox": ("query_key_value",),
    "layoutlm": ("query", "value"),
    "llama": ("q_proj", "v_proj"),
    "mistral": ("q_proj", "v_proj"),
    "modernbert": ("Wqkv",),
    "mpnet": ("attn.q", "attn.v"),
    "mt5": ("q", "v"),
    "opt": ("q_proj", "v_proj"),
    "phi": ("q_proj", "v_proj"),
    "qwen2": ("q_proj", "v_proj"),
    "qwen3": ("q_proj", "v_proj"),
    "roberta": ("query", "value"),
    "t5": ("q", "v"),
    "vit": ("query", "value"),
    "xlm-roberta": ("query", "value"),
}
"""By config.model_type: the layers that Hu et al. (2021) adapt."""
_KEY_VALUE_OUTPUT = {
    "albert": Targets(("key", "value", "ffn_output"), ("ffn_output",)),
    "bart": Targets(("k_proj", "v_proj", "fc2"), ("fc2",)),
    "bert": Targets(("key", "value", "[0-9]*.output.dense"), ("[0-9]*.output.dense",)),
    "camembert": Targets(("key", "value", "[0-9]*.output.dense"), ("[0-9]*.output.dense",)),
    "deberta": Targets(("in_proj", "[0-9]*.output.dense"), ("[0-9]*.output.dense",)),
    "deberta-v2": Targets(
        ("key_proj", "value_proj", "[0-9]*.output.dense"), ("[0-9]*.output.dense",)
    ),
    "distilbert": Targets(("k_lin", "v_lin", "ffn.lin2"), ("ffn.lin2",)),
    "electra": Targets(("key", "value", "[0-9]*.output.dense"), ("[0-9]*.output.dense",)),
    "gemma": Targets(("k_proj", "v_proj", "down_proj"), ("down_proj",)),
    "gemma2": Targets(("k_proj", "v_proj", "down_proj"), ("down_proj",)),
    "llama": Targets(("k_proj", "v_proj", "down_proj"), ("down_proj",)),
    "mistral": Targets(("k_proj", "v_proj", "down_proj"), ("down_proj",)),
    "opt": Targets(("k_proj", "v_proj", "fc2"), ("fc2",)),
    "qwen2": Targets(("k_proj", "v_proj", "down_proj"), ("down_proj",)),
    "qwen3": Targets(("k_proj", "v_proj", "down_proj"), ("down_proj",)),
    "roberta": Targets(("key", "value", "[0-9]*.output.dense"), ("[0-9]*.output.dense",)),
    "t5": Targets(("k", "v", "wo"), ("wo",)),
    "mt5": Targets(("k", "v", "wo"), ("wo",)),
    "xlm-roberta": Targets(("key", "value", "[0-9]*.output.dense"), ("[0-9]*.output.dense",)),
}
"""By config.model_type: the layers that Liu et al. (2022) scale."""


def auto_targets(adapter: LoraAdapter | Ia3Adapter, model_type: str) -> Targets | None:
    """What `target_modules: auto` means for such a model; None where nobody has said so."""
    if isinstance(adapter, Ia3Adapter):
        return _KEY_VALUE_OUTPUT.get(model_type)
    names = _QUERY_VALUE.get(model_type)
    return None if names is None else Targets(names)


def no_auto_targets(adapter: LoraAdapter | Ia3Adapter, model_type: str) -> Problem:
    """What to say where `auto` means nothing."""
    other = " or all-linear" if isinstance(adapter, LoraAdapter) else ""
    return Problem(
        f"model.adapter.target_modules is auto, which is not known for a {model_type} model",
        f"name its layers{other} there, as in target_modules: [q_proj, v_proj]",
    )


def targets_of(adapter: LoraAdapter | Ia3Adapter, model_type: str) -> Targets | None:
    """The ends of names that the job gives, or means by auto; None for auto of an unknown type."""
    if adapter.target_modules == "auto":
        return auto_targets(adapter, model_type)
    assert adapter.target_modules != "all-linear"
    inputs = adapter.feedforward_modules if isinstance(adapter, Ia3Adapter) else ()
    return Targets(adapter.target_modules, inputs)


def matching(targets: Iterable[str], layers: Sequence[str]) -> tuple[list[str], list[Problem]]:
    """The layers that any of the ends names, in their own order, and what is wrong with ends that
    name none."""
    targets = tuple(targets)
    found = [layer for layer in layers if any(ends_with(layer, end) for end in targets)]
    problems = []
    for end in targets:
        if not any(ends_with(layer, end) for layer in layers):
            near = nearest(end, layers) or sorted({layer.rpartition(".")[2] for layer in layers})
            problems.append(
                Problem(
                    f"model.adapter.target_modules holds {end}, but no linear layer of this model "
                    "has such a name",
                    f"did you mean {' or '.join(near[:3])}?",
                )
            )
    return found, problems


def adapter_weights(
    adapter: Adapter, targets: Targets, layers: Mapping[str, tuple[int, int]], *, blocks: int
) -> int:
    """About how many weights an adapter trains, without the head.

    `layers`: outputs and inputs of each layer that it changes, or, of virtual tokens, of any layer
    whose inputs are as wide as the embeddings; `blocks`: the model's repeated blocks.
    """
    if isinstance(adapter, LoraAdapter):
        lengths = adapter.kind == "dora"
        return sum(adapter.rank * (a + b) + (a if lengths else 0) for a, b in layers.values())
    if isinstance(adapter, Ia3Adapter):
        return sum(
            b if any(ends_with(name, end) for end in targets.inputs) else a
            for name, (a, b) in layers.items()
        )
    width = max((inputs for _, inputs in layers.values()), default=0)
    each = 2 * blocks if adapter.kind == "prefix-tuning" else 1
    return adapter.virtual_tokens * width * each
