"""BatchNorm's running statistics: the same on all ranks, whenever they are saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from jobs.record import State
from tests.evidence import final_weights
from tests.ranks import Kill, assignment_of, on_ranks, run_ranks
from tests.scene import Scene
from trainers.buffers import SharedStatistics
from trainers.layout import WEIGHTS
from trainers.records import read_attempts, read_manifests
from trainers.session import Session
from trainers.tasks.text_classification import TextClassification

NAME = "bert.embeddings.LayerNorm."


class OverTokens(nn.Module):
    """BatchNorm over all tokens of a batch."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`x`: [rows, tokens, width]."""
        normed: torch.Tensor = self.norm(x.flatten(0, 1)).view_as(x)
        return normed


def with_batchnorm() -> None:
    """In this process the tiny model has BatchNorm in place of its first LayerNorm."""
    whole = TextClassification.build_model

    def build_model(task: Any, folder: Path, **options: Any) -> Any:
        model: Any = whole(task, folder, **options)
        model.bert.embeddings.LayerNorm = OverTokens(model.config.hidden_size)
        held = load_file(folder / "model.safetensors")
        own = {n.removeprefix(NAME): t for n, t in held.items() if n.startswith(NAME + "norm.")}
        if own:
            model.bert.embeddings.LayerNorm.load_state_dict(own)
        return model

    TextClassification.build_model = build_model  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("workers", "strategy"), [(1, "ddp"), (2, "ddp"), (2, "fsdp")], ids=lambda value: str(value)
)
def test_a_run_that_saved_more_often_and_was_resumed_has_the_same_statistics(
    scene: Scene, workers: int, strategy: str
) -> None:
    """Some ranks have fewer micro-batches in some steps."""
    for run_id, every in (("calm", 5), ("run", 2)):
        spec = scene.job(
            workers={"count": workers, "strategy": strategy},
            batching={"max_tokens_per_microbatch": 48},
            checkpoint={"every_steps": every},
            train={"evaluate_every_steps": 5},
            data={"lanes": 2},
        )
        if run_id == "run":
            run_ranks(
                assignment_of(spec, run_id), world_size=workers, kill=Kill("manifest", 2),
                before=with_batchnorm,
            )  # fmt: skip
        outcome = run_ranks(
            assignment_of(spec, run_id, generation=1 if run_id == "calm" else 2),
            world_size=workers, before=with_batchnorm,
        )  # fmt: skip
        assert outcome is not None
        assert outcome.state is State.SUCCEEDED
    assert read_attempts(scene.runs, scene.paths())[-1].restored_step == 4
    assert final_weights(scene.runs, "run") == final_weights(scene.runs, "calm")
    last = read_manifests(scene.runs, scene.paths())[-1]
    held = load_file(scene.run_folder() / "checkpoints" / last.name.folder / WEIGHTS)
    assert int(held[NAME + "norm.num_batches_tracked"]) >= 10
    assert bool((held[NAME + "norm.running_mean"] != 0).all())


def averaged(session: Session) -> list[tuple[Any, ...]]:
    """What each rank holds after two averages of its own values, and those of another module."""
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2), nn.BatchNorm2d(1).bfloat16())
    model.register_buffer("other", torch.tensor([float(session.rank)]))
    first = model[0]
    first.running_mean += torch.tensor([0.1, 1e-30]) * (session.rank + 1)
    first.running_var *= session.rank
    first.num_batches_tracked += int(session.rank == 1)
    statistics = SharedStatistics(model, world_size=session.world_size)
    told = []
    for _ in range(2):
        statistics.average()
        told.append(tuple(b.tolist() for b in first.buffers()))
    return [*told, model.other.tolist()]


def test_all_ranks_hold_the_average_and_an_average_of_equals_keeps_its_bits() -> None:
    ranks = on_ranks(averaged, world_size=3)
    (first, again, _), *others = ranks
    mean, var, num_batches = first
    assert mean == pytest.approx([0.2, 2e-30])
    assert var == [1.0, 1.0]
    assert num_batches == 1
    assert again == first
    assert all(other[:2] == [first, again] for other in others)
    assert [rank[2] for rank in ranks] == [[0.0], [1.0], [2.0]], "no buffer of another module"
