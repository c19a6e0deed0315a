"""How much an optimizer keeps beside the weights."""

from __future__ import annotations

from jobs.spec import Optimizer


def states_of(optimizer: Optimizer) -> int:
    """Numbers for each trained weight, as far as they are known: an optimizer that is named by its
    import path is taken for one like Adam, and what Adafactor keeps hardly counts."""
    return {"sgd": 1, "adafactor": 0}.get(optimizer.kind, 2)
