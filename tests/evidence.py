"""What a run's folder proves: which rows the final weights have seen, and what they are.

global_batches(store, run_id)   {step: rows of the global batch, in the order of their positions}
rows_by_epoch(store, run_id)    {epoch: how often each row was used}
final_weights(store, run_id)    {file: sha256} of the last checkpoint
losses(store, run_id)           {step: loss}

All of them hold for the lineage of the final weights: what an attempt did that was superseded does
not count. The job must have `train.log_rows`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

from cluster.storage import Store
from jobs.record import RunPaths, Source, in_lineage, lineage
from jobs.runs import RunReader
from trainers.records import read_attempts, read_manifests


def global_batches(store: Store, run_id: str) -> dict[int, list[int]]:
    """Rows of each step, dealt back from the ranks; AssertionError where a rank is missing."""
    world = {a.attempt: a.world_size for a in read_attempts(store, RunPaths(run_id))}
    shares: dict[int, dict[int, dict[str, Any]]] = {}
    for rank, line in _row_lines(store, run_id):
        ranks = shares.setdefault(line["step"], {})
        assert rank not in ranks, f"step {line['step']} was logged twice by rank {rank}"
        ranks[rank] = line
    batches = {}
    for step, ranks in sorted(shares.items()):
        size = world[ranks[0]["attempt"]]
        assert sorted(ranks) == list(range(size)), f"step {step} lacks a rank"
        first = ranks[0]["first_item"]
        queues = {rank: iter(line["rows"]) for rank, line in ranks.items()}
        total = sum(len(line["rows"]) for line in ranks.values())
        batches[step] = [next(queues[p % size]) for p in range(first, first + total)]
    return batches


def rows_by_epoch(store: Store, run_id: str) -> dict[int, Counter[int]]:
    epochs: dict[int, Counter[int]] = {}
    for _, line in _row_lines(store, run_id):
        epochs.setdefault(line["epoch"], Counter()).update(line["rows"])
    return dict(sorted(epochs.items()))


def final_weights(store: Store, run_id: str) -> dict[str, str]:
    last = read_manifests(store, RunPaths(run_id))[-1]
    assert last.is_last_step, f"the run has got to step {last.step} only"
    return {p.name: p.sha256 for p in last.parts if p.name.endswith(".safetensors")}


def losses(store: Store, run_id: str) -> dict[int, float]:
    lines = RunReader(store, run_id).metrics()
    return {line["step"]: line["loss"] for line in lines if line["kind"] == "train"}


def _row_lines(store: Store, run_id: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """(rank, line) of each step and rank of the lineage."""
    paths = RunPaths(run_id)
    spans = lineage(read_attempts(store, paths))
    folder = paths.lines_folder("rows")
    for head in store.list(folder):
        source = Source.parse(head.key.removeprefix(folder).rpartition("/")[0])
        assert source.rank is not None
        for text in store.read(head.key).splitlines():
            line = json.loads(text)
            if in_lineage(line["step"], line["attempt"], spans):
                yield source.rank, line
