"""Virtual tokens before each text, inside a transformers model: peft's weights for them, put in by
hooks around the model's body.

Prompt tuning has embeddings of its own, which go through all layers before those of the text; of
what the last layer gives the head sees the text's positions alone. Prefix tuning has keys and
values for each layer, to which the text's tokens attend.
"""

from __future__ import annotations

import inspect
from typing import Any

import peft
import torch
from peft.tuners import PrefixEncoder, PromptEmbedding
from torch import nn
from transformers import DynamicCache

from jobs.errors import Problem, SpecError
from jobs.spec import PromptAdapter
from trainers.adapters import PROMPTS

_CACHES = ("cache", "past_key_values")
"""What transformers' models call the keys and values that they go on from."""


def add_prompts(model: Any, adapter: PromptAdapter) -> peft.PeftConfig:
    """Adds the virtual tokens to a model on the CPU; peft's configuration of them."""
    body = model.base_model
    if getattr(model.config, "is_encoder_decoder", False) or not hasattr(
        body, "get_input_embeddings"
    ):
        raise _refused(model, adapter, "it has no single row of tokens")
    arguments = tuple(inspect.signature(body.forward).parameters)
    encoder: nn.Module
    config: peft.PeftConfig
    if adapter.kind == "prompt-tuning":
        if "inputs_embeds" not in arguments:
            raise _refused(model, adapter, "it takes no embeddings in place of tokens")
        embeddings = body.get_input_embeddings()
        config = peft.PromptTuningConfig(
            num_virtual_tokens=adapter.virtual_tokens,
            token_dim=embeddings.embedding_dim,
            num_transformer_submodules=1,
            prompt_tuning_init=peft.PromptTuningInit.SAMPLE_VOCAB,
        )
        encoder = PromptEmbedding(config, embeddings)  # type: ignore[no-untyped-call]
        around: _Around = _Prompt(encoder, arguments, embeddings)
        body.register_forward_hook(around.after)
    else:
        cache = next((name for name in _CACHES if name in arguments), None)
        if cache is None:
            raise _refused(model, adapter, "its layers take no keys and values from outside")
        text = model.config.get_text_config()
        config = peft.PrefixTuningConfig(
            num_virtual_tokens=adapter.virtual_tokens,
            token_dim=_key_width(text),
            num_transformer_submodules=1,
            num_attention_heads=_key_heads(text),
            num_layers=text.num_hidden_layers,
        )
        encoder = PrefixEncoder(config)  # type: ignore[no-untyped-call]
        layers, heads = text.num_hidden_layers, _key_heads(text)
        around = _Prefix(encoder, arguments, cache, layers=layers, heads=heads)
    setattr(model, PROMPTS, encoder)
    body.register_forward_pre_hook(around.before, with_kwargs=True)
    return config


def _key_width(text: Any) -> int:
    """Numbers of a token's keys in one layer, over all heads."""
    each = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return int(each) * _key_heads(text)


def _key_heads(text: Any) -> int:
    return int(getattr(text, "num_key_value_heads", None) or text.num_attention_heads)


def _refused(model: Any, adapter: PromptAdapter, why: str) -> SpecError:
    return SpecError(
        Problem(
            f"model.adapter.kind is {adapter.kind}, which a {model.config.model_type} model does "
            f"not allow: {why}",
            "write model.adapter: {kind: lora}",
        )
    )


class _Around:
    """What virtual tokens do around a forward pass of the model's body."""

    def __init__(self, encoder: nn.Module, arguments: tuple[str, ...]) -> None:
        self._encoder = encoder
        self._arguments = arguments

    def before(
        self, body: nn.Module, given: tuple[Any, ...], keys: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of the body, by name, with the virtual tokens."""
        named = {**dict(zip(self._arguments, given, strict=False)), **keys}
        first = named.get("input_ids")
        first = named["inputs_embeds"] if first is None else first
        mask = named.get("attention_mask")
        if mask is None:
            mask = torch.ones(first.shape[:2], dtype=torch.int64, device=first.device)
        named["attention_mask"] = torch.cat([self._ones(mask), mask], dim=1)
        return (), self._with_tokens(named, rows=len(first))

    def after(self, body: nn.Module, given: tuple[Any, ...], output: Any) -> Any:
        """What the body gives for the text's own positions."""
        raise NotImplementedError

    def _with_tokens(self, named: dict[str, Any], *, rows: int) -> dict[str, Any]:
        raise NotImplementedError

    def _ones(self, mask: torch.Tensor) -> torch.Tensor:
        return mask.new_ones(len(mask), self._num_tokens)

    @property
    def _num_tokens(self) -> int:
        weight: torch.Tensor = self._encoder.embedding.weight  # type: ignore[union-attr,assignment]
        return len(weight)

    def _tokens(self) -> torch.Tensor:
        """What the encoder holds of each virtual token; shape [virtual tokens, numbers]."""
        weight: torch.Tensor = self._encoder.embedding.weight  # type: ignore[union-attr,assignment]
        numbers = torch.arange(self._num_tokens, device=weight.device)
        tokens: torch.Tensor = self._encoder(numbers)
        return tokens


class _Prompt(_Around):
    """Embeddings before those of the text."""

    def __init__(
        self, encoder: nn.Module, arguments: tuple[str, ...], embeddings: nn.Module
    ) -> None:
        super().__init__(encoder, arguments)
        self._embeddings = embeddings

    def _with_tokens(self, named: dict[str, Any], *, rows: int) -> dict[str, Any]:
        ids, embedded = named.pop("input_ids", None), named.get("inputs_embeds")
        embedded = self._embeddings(ids) if embedded is None else embedded
        tokens = self._tokens().to(embedded.dtype).expand(rows, -1, -1)
        named["inputs_embeds"] = torch.cat([tokens, embedded], dim=1)
        types = named.get("token_type_ids")
        if types is not None:
            zeros = types.new_zeros(rows, self._num_tokens)
            named["token_type_ids"] = torch.cat([zeros, types], dim=1)
        return named

    def after(self, body: nn.Module, given: tuple[Any, ...], output: Any) -> Any:
        output["last_hidden_state"] = output["last_hidden_state"][:, self._num_tokens :]
        return output


class _Prefix(_Around):
    """Keys and values before those of the text."""

    def __init__(
        self,
        encoder: nn.Module,
        arguments: tuple[str, ...],
        cache: str,
        *,
        layers: int,
        heads: int,
    ) -> None:
        super().__init__(encoder, arguments)
        self._cache = cache
        self._num_layers = layers
        self._num_heads = heads

    def _with_tokens(self, named: dict[str, Any], *, rows: int) -> dict[str, Any]:
        shape = (self._num_tokens, 2 * self._num_layers, self._num_heads, -1)
        # [2 * layers, heads, virtual tokens, numbers of a head]
        layers = self._tokens().view(shape).permute(1, 2, 0, 3)
        cache = DynamicCache()
        for layer in range(self._num_layers):
            key, value = layers[2 * layer], layers[2 * layer + 1]
            cache.update(key.expand(rows, -1, -1, -1), value.expand(rows, -1, -1, -1), layer)
        named[self._cache] = cache
        return named
