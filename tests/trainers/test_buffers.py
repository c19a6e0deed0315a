"""Buffers that a skipped step had changed are put back, without the host looking."""

from __future__ import annotations

import torch
from torch import nn

from trainers.buffers import KeptBuffers


class Caching(nn.Module):
    """Replaces its buffer by a longer one where it has to."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("cache", torch.zeros(1))

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        self.cache = torch.ones(len(rows))
        return rows


def held(model: nn.Module) -> dict[str, bytes]:
    return {name: b.detach().numpy().tobytes() for name, b in model.named_buffers()}


def test_running_statistics_come_back_bit_for_bit_where_the_step_is_skipped() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).train()
    buffers = KeptBuffers(model)
    for skipped in (0.0, 1.0, 0.0, 1.0, 1.0):
        buffers.keep()
        before = held(model)
        model(torch.randn(5, 3))
        after = held(model)
        assert before != after
        buffers.put_back(torch.tensor(skipped))
        assert held(model) == (before if skipped else after)


def test_a_poisoned_batch_leaves_no_trace() -> None:
    model = nn.BatchNorm1d(2).train()
    buffers = KeptBuffers(model)
    buffers.keep()
    model(torch.tensor([[1.0, float("nan")], [2.0, float("inf")]]))
    buffers.put_back(torch.tensor(1.0))
    assert all(bool(torch.isfinite(b).all()) for b in model.buffers())


def test_caches_that_were_replaced_are_left_alone() -> None:
    model = Caching()
    buffers = KeptBuffers(model)
    buffers.keep()
    model(torch.zeros(3))
    buffers.put_back(torch.tensor(1.0))
    assert model.cache.tolist() == [1.0, 1.0, 1.0]
    with torch.inference_mode():
        model(torch.zeros(2))
    buffers.keep()
    buffers.put_back(torch.tensor(1.0))
    assert model.cache.tolist() == [1.0, 1.0]
