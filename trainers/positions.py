"""How many tokens an encoder can read, from its configuration."""

from __future__ import annotations

_POSITIONS_AFTER_PADDING = ("roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "mpnet")
"""Models whose first position is the one after the padding token's id."""


def most_tokens(
    model_type: str, *, max_position_embeddings: int | None, pad_token_id: int | None
) -> int | None:
    """Longest sequence in tokens; None where positions are not bounded by the configuration."""
    if max_position_embeddings is None or model_type not in _POSITIONS_AFTER_PADDING:
        return max_position_embeddings
    return max_position_embeddings - 1 - (pad_token_id or 0)
