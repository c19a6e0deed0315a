"""Rows without padding: a model's repeated layers get the tokens of a batch one after the other.

packed_tensors       where these tokens are: what a task adds to its batches
packing_arguments    the same for the model's forward pass
pack_blocks          makes the layers of a model compute so; refuses a model that does not allow it

Embeddings and head see padded rows. Before the first layer the real tokens are gathered, [n, L, H]
to [1, T, H], and after the last they are put back, with zeros at the padding. What a layer does to
each token by itself needs nothing else; attention is told to which row a token belongs.
Transformers hands the arguments of a forward pass on to layers and attention, so that each pass has
its own packing, also where a layer is computed again in the backward pass.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from jobs.errors import Problem, SpecError
from trainers.memory import is_out_of_memory
from trainers.microbatch import IntArray
from trainers.parallel import blocks
from trainers.tasks.task import Batch

_POSITIONS = "packed_positions"
_OFFSETS = "packed_offsets"
_ATTENTION = "shoal_packed"
"""Name under which transformers knows the attention. It has no mask of that name: it makes none."""
_ARGUMENT = "packing"
_NOT_PACKED = ("position_bias", "sliding_window", "softcap", "s_aux")
"""Arguments of other attentions, which this one does not heed."""
_LARGEST_DIFFERENCE = 1e-3
"""Between a model's packed and padded outputs, relative to the largest of them. Rounding in float32
makes 1e-5 of it in deep models; tokens that see others than before, a multiple."""


@dataclass(frozen=True, eq=False)
class Packing:
    """Where the T tokens of n padded rows are, and where these begin among them."""

    rows: int
    longest: int
    """Tokens of a padded row."""
    positions: torch.Tensor
    """Of each token in the n * longest places; shape [T]."""
    offsets: torch.Tensor
    """First token of each row, and T; shape [n + 1]."""

    def pack(self, padded: torch.Tensor) -> torch.Tensor:
        """[n, longest, ...] without its padding: [1, T, ...]."""
        if padded.shape[:2] != (self.rows, self.longest):
            raise ValueError(
                f"the first layer gets {tuple(padded.shape)}, "
                f"not {self.rows} rows of {self.longest} tokens"
            )
        return padded.flatten(0, 1).index_select(0, self.positions).unsqueeze(0)

    def unpack(self, packed: torch.Tensor) -> torch.Tensor:
        """[1, T, ...] with zeros as padding: [n, longest, ...]."""
        places = packed.new_zeros(self.rows * self.longest, *packed.shape[2:])
        filled = places.index_copy(0, self.positions, packed.squeeze(0))
        return filled.view(self.rows, self.longest, *packed.shape[2:])

    @cached_property
    def groups(self) -> tuple[tuple[int, int], ...]:
        """Neighbouring rows of equal length as (rows, tokens of each). Waits for the device."""
        lengths = self.offsets.diff().tolist()
        return tuple((len(list(same)), length) for length, same in itertools.groupby(lengths))


def packed_tensors(lengths: IntArray) -> Batch:
    """What a batch of padded rows with these lengths, shape [n], holds besides to be packed.

    A row without tokens counts as one of one padding token.
    """
    lengths = np.maximum(1, lengths)
    is_token = np.arange(lengths.max(initial=1))[None, :] < lengths[:, None]
    offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return {
        _POSITIONS: torch.from_numpy(np.flatnonzero(is_token)),
        _OFFSETS: torch.from_numpy(offsets),
    }


def packing_arguments(batch: Batch) -> dict[str, Any]:
    """What a model's forward pass needs to compute `batch` without padding; nothing for a batch
    that has no `packed_tensors`."""
    if _POSITIONS not in batch:
        return {}
    rows, longest = batch["input_ids"].shape
    packing = Packing(rows, longest, batch[_POSITIONS], batch[_OFFSETS])
    return {_ARGUMENT: packing}


# ---------------------------------------------------------------------------------- the model


def pack_blocks(
    model: Any, forward: Callable[[nn.Module, Batch], torch.Tensor], sample: Batch
) -> None:
    """From here on the layers of `model`, one of transformers' on the CPU, compute packed batches,
    and such alone.

    `sample` holds rows of several lengths and their `packed_tensors`. `forward` gives the outputs
    for it, packed as it is and padded without them; where they differ by more than rounding, this
    raises SpecError, as for a model that cannot compute it. So positions must lie in the
    embeddings: what a layer does with them, as by rotation or by a bias, it would do to the
    positions in the packed row.
    """
    try:
        why_not = _pack_and_compare(model, forward, sample)
    except Exception as error:  # whatever a model does that was made for padded rows
        if is_out_of_memory(error):
            raise
        raise _not_allowed(
            model, f"its layers cannot compute it ({type(error).__name__})"
        ) from error
    if why_not is not None:
        raise _not_allowed(model, why_not)


def _pack_and_compare(
    model: Any, forward: Callable[[nn.Module, Batch], torch.Tensor], sample: Batch
) -> str | None:
    """Packs the layers; why that is not allowed, or None."""
    layers = blocks(model)
    if not layers:
        return "it has no repeated layers"
    model.eval()
    padded_sample = {k: v for k, v in sample.items() if k not in (_POSITIONS, _OFFSETS)}
    with torch.no_grad():
        padded = _outputs(layers[-1], lambda: forward(model, padded_sample))
        AttentionInterface.register(_ATTENTION, packed_attention)
        model.set_attn_implementation(_ATTENTION)
        if model.config._attn_implementation != _ATTENTION:
            return "its attention cannot be exchanged"
        layers[0].register_forward_pre_hook(_pack, with_kwargs=True)
        layers[-1].register_forward_hook(_unpack, with_kwargs=True)
        packed = _outputs(layers[-1], lambda: forward(model, sample))
    tokens = sample[_POSITIONS]
    like = _is_rounding(padded[0], packed[0]) and _is_rounding(
        *(states.flatten(0, 1)[tokens] for states in (padded[1], packed[1]))
    )
    return None if like else "what it computes would change"


def _outputs(
    layer: nn.Module, run: Callable[[], torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """What a pass gives, and what `layer` gives in it. (A head of zeros would tell nothing.)"""
    found: list[torch.Tensor] = []
    watch = layer.register_forward_hook(lambda *call: found.append(call[-1]))
    try:
        return run(), found[-1]
    finally:
        watch.remove()


def _is_rounding(expected: torch.Tensor, found: torch.Tensor) -> bool:
    largest = (expected - found).abs().max()
    return bool(largest <= _LARGEST_DIFFERENCE * expected.abs().max())


def _not_allowed(model: Any, why: str) -> SpecError:
    return SpecError(
        Problem(
            f"batching.packing is true, but a {model.config.model_type} model does not allow it: "
            f"{why}",
            "remove batching.packing",
        )
    )


def _pack(
    layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    states, *others = args
    return (kwargs[_ARGUMENT].pack(states), *others), kwargs


def _unpack(
    layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: torch.Tensor
) -> torch.Tensor:
    unpacked: torch.Tensor = kwargs[_ARGUMENT].unpack(output)
    return unpacked


# ---------------------------------------------------------------------------------- attention


def packed_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    packing: Packing,
    dropout: float = 0.0,
    scaling: float | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Scaled dot-product attention of each token to those of its own row.

    query, key, value [1, heads, T, head_dim], as transformers' AttentionInterface has them; gives
    [1, T, heads, head_dim]. Raises ValueError where a token is not to see all of its row alike.
    """
    unheeded = [name for name in _NOT_PACKED if others.get(name) is not None]
    if attention_mask is not None:
        unheeded.append("attention_mask")
    if others.get("is_causal") or getattr(module, "is_causal", False):
        unheeded.append("is_causal")
    if unheeded:
        raise ValueError(f"packed attention does not heed {', '.join(unheeded)}")
    attend = attend_by_length if query.device.type == "cpu" else attend_jagged
    query, key, value = (states.squeeze(0).transpose(0, 1) for states in (query, key, value))
    attended = attend(query, key, value, packing, dropout=dropout, scaling=scaling)
    return attended.unsqueeze(0), None


def attend_by_length(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    packing: Packing,
    *,
    dropout: float,
    scaling: float | None,
) -> torch.Tensor:
    """Attention inside each row, those of equal length together; all [T, heads, head_dim]."""
    sizes = [rows * length for rows, length in packing.groups]
    attended = []
    for (rows, length), *tokens in zip(
        packing.groups, *(torch.split(states, sizes) for states in (query, key, value)), strict=True
    ):
        q, k, v = (t.reshape(rows, length, *t.shape[1:]).transpose(1, 2) for t in tokens)
        found = scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scaling)
        attended.append(found.transpose(1, 2).flatten(0, 1))
    return torch.cat(attended)


def attend_jagged(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    packing: Packing,
    *,
    dropout: float,
    scaling: float | None,
) -> torch.Tensor:
    """The same as one nested tensor, for which torch has kernels on a GPU. The host waits for
    nothing: it knows the longest row."""

    def rows_of(states: torch.Tensor) -> torch.Tensor:
        jagged = torch.nested.nested_tensor_from_jagged(
            states.contiguous(),
            packing.offsets,
            min_seqlen=1,  # all that is asked of it is whether a row is empty
            max_seqlen=packing.longest,
        )
        return jagged.transpose(1, 2)

    found = scaled_dot_product_attention(
        rows_of(query), rows_of(key), rows_of(value), dropout_p=dropout, scale=scaling
    )
    attended: torch.Tensor = found.transpose(1, 2).values()
    return attended
