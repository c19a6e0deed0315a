"""`space: recommended`: the keys that matter most in fine-tuning, over the ranges of the field.

For adamw's learning rates they hold what Devlin et al. (2019), Liu et al. (2019) and Clark et al.
(2020) fine-tune encoders with, from large to small ones. The decay of adamw is decoupled; sgd's is
not, and smaller. Labels are smoothed by up to twice the 0.1 of Szegedy et al. (2016).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jobs.problems import Sources
from jobs.search_spec import CLONE_KEYS, RECOMMENDED
from jobs.spec import JobSpec, LoraAdapter
from jobs.tree import job_of

_LEARNING_RATES = {"adamw": (5e-6, 5e-4), "sgd": (1e-3, 0.3), "adafactor": (1e-5, 1e-2)}
_ADAPTER_LEARNING_RATES = {
    "lora": (5e-5, 5e-3),
    "dora": (5e-5, 5e-3),
    "ia3": (5e-4, 2e-2),
    "prompt-tuning": (1e-3, 0.3),
    "prefix-tuning": (1e-3, 5e-2),
}
"""Of adamw, where an adapter is trained: new weights take larger steps than a model's own."""
_WEIGHT_DECAYS = {"adamw": (1e-3, 0.3), "sgd": (1e-6, 1e-2)}
_RANKS = (4, 8, 16, 32)
_DROPOUTS = (0.0, 0.3)
_LABEL_SMOOTHINGS = (0.0, 0.2)
_WARMUP_STEPS = (0, 50, 200)
_FREEZE = ("embeddings",)


def recommended_space(spec: JobSpec) -> dict[str, Any]:
    """The space that suits a job, as its file could hold it; the job's own values lie in it.

    Where trials are cloned (pbt, pb2), it has only keys that a clone may change.
    """
    optimizer, batch = spec.optimizer, spec.batching.global_batch_size
    batches = {size for size in (batch // 2, 2 * batch) if size >= spec.workers.count} | {batch}
    freeze = list(spec.model.freeze or _FREEZE)
    adapter = spec.model.adapter
    rates = _LEARNING_RATES.get(optimizer.kind, _LEARNING_RATES["adamw"])
    if adapter is not None and optimizer.kind == "adamw":
        rates = _ADAPTER_LEARNING_RATES[adapter.kind]
    decays = _WEIGHT_DECAYS.get(optimizer.kind, _WEIGHT_DECAYS["adamw"])
    space: dict[str, Any] = {
        "optimizer.learning_rate": {"loguniform": _around(optimizer.learning_rate, rates)},
        "optimizer.weight_decay": {"loguniform": _around(optimizer.weight_decay, decays)},
        "model.dropout": {"uniform": _around(spec.model.dropout, _DROPOUTS)},
        "task.label_smoothing": {"uniform": _around(spec.task.label_smoothing, _LABEL_SMOOTHINGS)},
        "optimizer.warmup_steps": {"choice": sorted({*_WARMUP_STEPS, optimizer.warmup_steps})},
        "batching.global_batch_size": {"choice": sorted(batches)},
    }
    if adapter is None:
        space["model.freeze"] = {"choice": [[], freeze]}
    elif isinstance(adapter, LoraAdapter):
        space["model.adapter.rank"] = {"choice": sorted({*_RANKS, adapter.rank})}
    clones = spec.search is not None and spec.search.clones
    return {path: over for path, over in space.items() if not clones or path in CLONE_KEYS}


def with_recommended_space(tree: Mapping[str, Any]) -> Mapping[str, Any]:
    """The tree of a job, `search.space` written out where it is `recommended` or not given.

    A study keeps the space that it began with, whatever later versions recommend.
    """
    search = tree.get("search")
    if not isinstance(search, Mapping) or search.get("space", RECOMMENDED) != RECOMMENDED:
        return tree
    rest = {key: value for key, value in search.items() if key != "space"}
    spec, problems = job_of({**tree, "search": rest}, Sources(""))
    if spec is None or problems:
        return {**tree, "search": rest}  # and is refused for them
    return {**tree, "search": {**search, "space": recommended_space(spec)}}


def _around(own: float | None, ends: tuple[float, float]) -> list[float]:
    """The ends, moved out to the job's own value; 0 has no logarithm, and stays outside."""
    return [min(ends[0], own or ends[0]), max(ends[1], own or ends[1])]
