"""Replication: gradient buckets that never change their layout, and keyed generators."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from jobs.spec import Model
from tests.ranks import on_ranks
from tests.scene import Scene
from tests.tiny import tiny_model
from trainers import worker
from trainers.assignment import Assignment
from trainers.parallel import (
    autocast,
    compute_type,
    float32_products,
    plain,
    replicate,
    seed_generators,
    trained_parameters,
    without_reduction,
)
from trainers.session import Session

CPU = torch.device("cpu")


class Partial(nn.Module):
    """An encoder with a weight that no pass uses."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inner = model
        self.idle = nn.Linear(300, 300)

    def forward(self, input_ids: torch.Tensor) -> Any:
        return self.inner(input_ids=input_ids)


class BucketsOf:
    """Steps a replicated encoder; gives its bucket layout after each, and its last gradients."""

    def __init__(self, folder: Path, kind: str) -> None:
        self.folder = folder
        self.kind = kind

    def __call__(self, session: Session) -> dict[str, Any]:
        from transformers import AutoModelForSequenceClassification

        model: nn.Module = AutoModelForSequenceClassification.from_pretrained(self.folder)
        if self.kind == "frozen":
            model.bert.embeddings.requires_grad_(False)
        elif self.kind == "idle weight":
            model = Partial(model)
        elif self.kind == "layerdrop":
            model.config.encoder_layerdrop = 0.1
        torch.manual_seed(session.rank)  # what ranks draw differs, as in a run
        before = {name: value.clone() for name, value in model.state_dict().items()}
        whole = replicate(
            model,
            device=session.device,
            world_size=session.world_size,
            loss_of=lambda model: 0 * model(input_ids=torch.full((1, 2), 5)).logits.sum(),
        )
        assert isinstance(whole, DistributedDataParallel)
        assert all(p.grad is None for p in model.parameters())
        after = model.state_dict()
        assert all(torch.equal(after[name], value) for name, value in before.items())
        sizes = list[int]()

        def reduce(group, bucket):  # DDP wants real types, or none
            sizes.append(bucket.buffer().numel())
            return allreduce_hook(group, bucket)

        whole.register_comm_hook(None, reduce)
        layouts = []
        for step in range(5):
            whole.zero_grad(set_to_none=True)
            sizes.clear()
            ids = torch.full((2, 3), 5 + session.rank)
            if step == 1:
                with without_reduction(whole):
                    whole(input_ids=ids).logits.sum().backward()
            whole(input_ids=ids).logits.sum().backward()
            layouts.append(list(sizes))
        trained = trained_parameters(plain(whole))
        norm = sum(float(p.grad.norm()) for p in trained if p.grad is not None)
        return {"layouts": layouts, "norm": norm, "searches": whole.find_unused_parameters}


@pytest.mark.parametrize("kind", ["whole", "frozen", "idle weight", "layerdrop"])
def test_gradient_buckets_are_four_or_more_and_keep_their_layout(tmp_path: Path, kind: str) -> None:
    folder = tiny_model(tmp_path, hidden=384)
    first, second = on_ranks(BucketsOf(folder, kind), world_size=2)
    assert len(first["layouts"][0]) >= 4
    assert first["layouts"] == [first["layouts"][0]] * 5
    assert first["searches"] == (kind in ("idle weight", "layerdrop"))
    assert first["norm"] == second["norm"], "gradients differ between ranks"


def test_one_rank_needs_no_replication() -> None:
    model = nn.Linear(2, 2)
    found = replicate(model, device=CPU, world_size=1, loss_of=lambda model: torch.zeros(()))
    assert found is model
    assert plain(model) is model
    with without_reduction(model):
        model(torch.ones(1, 2)).sum().backward()
    assert model.weight.grad is not None


def draws(*keys: int) -> list[float]:
    seed_generators(*keys)
    return nn.functional.dropout(torch.ones(64), 0.5).tolist()


def test_dropout_is_a_function_of_its_keys() -> None:
    assert draws(7, 3, 1, 0) == draws(7, 3, 1, 0)
    torch.rand(100)
    assert draws(7, 3, 1, 0) == draws(7, 3, 1, 0)


def test_each_seed_step_rank_and_microbatch_draws_its_own() -> None:
    keys = [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (2**40, 0, 0, 0)]
    assert len({tuple(draws(*key)) for key in keys}) == len(keys)


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [
        ("float32", torch.float32),
        ("tf32", torch.float32),
        ("bfloat16", torch.bfloat16),
        ("auto", torch.float32),
    ],
)
def test_precision_is_that_of_the_job_and_auto_is_full_on_a_cpu(
    precision: Any, dtype: torch.dtype
) -> None:
    found = compute_type(Model(source="x", precision=precision), CPU)
    assert found == dtype
    with autocast(CPU, found):
        assert nn.Linear(2, 2)(torch.ones(1, 2)).dtype == dtype


def products() -> tuple[str, bool]:
    return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize(
    ("precision", "device", "inside"),
    [
        ("tf32", "cuda", ("high", True)),
        ("tf32", "cpu", ("highest", False)),
        ("float32", "cuda", ("highest", False)),
        ("bfloat16", "cuda", ("highest", False)),
    ],
)
def test_products_of_float32_are_rounded_for_tf32_alone_and_as_before_afterwards(
    precision: Any, device: str, inside: tuple[str, bool]
) -> None:
    before = products()
    spec = Model(source="x", precision=precision)
    with float32_products(spec, torch.device(device)):
        assert products() == inside
    assert products() == before


def test_a_worker_multiplies_as_its_job_says_and_the_next_one_as_its_own(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "_work", lambda *_: products())
    session: Any = SimpleNamespace(rank=0, world_size=1, device=torch.device("cuda"))
    jobs = [
        scene.job(model={"precision": precision}, workers={"gpus": 1})
        for precision in ("tf32", "float32")
    ]
    given = [
        worker.train_worker(session, Assignment(job, "run", generation=1, controls_seen=0))
        for job in jobs
    ]
    assert given == [("high", True), ("highest", False)]
