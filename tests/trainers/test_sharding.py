"""FSDP2: the same gradients and weights as one process, however rows and weights are cut."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import MixtralConfig, MixtralForSequenceClassification

from cluster.storage import StorageError
from jobs.errors import Problem, SpecError
from jobs.spec import Optimizer
from tests.ranks import on_ranks
from tests.tiny import tiny_model
from trainers.agreement import Agreement
from trainers.evaluation import measure
from trainers.freezing import freeze
from trainers.layout import rows_of
from trainers.microbatch import Cutting
from trainers.optim import (
    build_optimizer,
    clear_gradients,
    gradient_norm,
    optimizer_tensors,
    update,
)
from trainers.parallel import (
    blocks,
    is_sharded,
    local_part,
    plain,
    replicate,
    shard,
    trained_parameters,
)
from trainers.session import ProcessSession, Session
from trainers.state import refuse_converted

CPU = torch.device("cpu")
ADAMW = Optimizer(kind="adamw", learning_rate=1e-2)
SGD = Optimizer(kind="sgd", learning_rate=1e-1, momentum=0.9)
ALONE = ProcessSession(use_gpu=False)
CASES = [(ADAMW, False), (SGD, True)]
Given = Callable[[Any], list[Any]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("sharding"), hidden=64)


def encoder(folder: Path, *, frozen: bool) -> nn.Module:
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(3)
    model: nn.Module = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
    freeze(model, ["embeddings"] if frozen else [])
    refuse_converted(model)
    return model.train()


def rows_held(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    return local_part(tensor.detach()).numpy().copy()


def whole(ranks: list[dict[str, Any]], kind: str, strategy: str) -> dict[str, Any]:
    """The arrays of all ranks as one; where each has all rows, those of the first."""
    if strategy == "ddp":
        return dict(ranks[0][kind])
    return {n: np.concatenate([rank[kind][n] for rank in ranks]) for n in ranks[0][kind]}


@dataclass(frozen=True)
class Steps:
    """Steps of two passes each on seven rows that the ranks share out: some have fewer rows, or
    none in the second pass. Gives the gradients of the first, all norms and the final weights.
    """

    folder: Path
    strategy: str
    optimizer: Optimizer
    frozen: bool = False
    skipped: tuple[bool, ...] = (False, False, False)

    def __call__(self, session: Session) -> dict[str, Any]:
        model = encoder(self.folder, frozen=self.frozen)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        world, rank = session.world_size, session.rank
        if self.strategy == "fsdp" and world > 1:
            model = shard(model, device=CPU, dtype=torch.float32)
        optimizer = build_optimizer(model, self.optimizer)
        if self.strategy == "ddp":
            ids = torch.full((1, 2), 5)
            model = replicate(
                model,
                device=CPU,
                world_size=world,
                loss_of=lambda model: 0 * model(input_ids=ids).logits.sum(),
            )
        norms, first = [], {}
        for step, is_skipped in enumerate(self.skipped):
            clear_gradients(model, optimizer)
            rows = torch.arange(5, 5 + 2 * (2 * 4 - 1)).reshape(-1, 2)[rank::world]
            for part in (rows[:1], rows[1:]):
                ids = part if len(part) else torch.full((1, 2), 5)
                loss = model(input_ids=ids).logits[:, step % 2].sum() * (len(part) > 0)
                (loss * world / 7).backward()
            norm = gradient_norm(trained_parameters(plain(model)), max_norm=0.5)
            norms.append(float(norm).hex())
            if step == 0:
                named = plain(model).named_parameters()
                first = {n: rows_held(p.grad) for n, p in named if p.grad is not None}
            update(optimizer, skipped=torch.tensor(float(is_skipped)))
        weights = {n: rows_held(p) for n, p in plain(model).named_parameters()}
        states = {n: tuple(t.shape) for n, t in optimizer_tensors(optimizer).items()}
        return {"norms": norms, "first": first, "weights": weights, "states": states}


@dataclass(frozen=True)
class Measures:
    """Trains a pass, evaluates uneven shares of four rows (the last of three ranks has none), and
    trains again; gives the sums over all rows and the names of what stayed gathered. A rank that
    `fails` cannot read its share."""

    folder: Path
    sharded: bool
    fails: int | None = None

    def __call__(self, session: Session) -> Any:
        model = encoder(self.folder, frozen=False)
        world, rank = session.world_size, session.rank
        agreement = Agreement(rank=rank, world_size=world)
        if self.sharded:
            model = shard(model, device=CPU, dtype=torch.float32)
        ids = torch.full((1, 3), 5 + rank)
        model(input_ids=ids).logits.sum().backward()
        task = cast("Any", RowsAsBatches())
        first, stop = rows_of(4, rank=rank, world_size=world)
        try:
            measure(
                model, task, task.rows(first, stop, fails=self.fails == rank), task,
                device=CPU, dtype=torch.float32, cutting=Cutting(1, 1), agreement=agreement,
            )  # fmt: skip
        except StorageError as error:
            return str(error)
        if self.fails is not None:
            return float(task.total[2])
        gathered = [n for n, p in model.named_parameters() if not isinstance(p, DTensor)]
        model(input_ids=ids).logits.sum().backward()
        return agreement.sum(task.total).tolist(), gathered, model.training


@dataclass(frozen=True)
class InHalf:
    """Types of what a pass in bfloat16 gives, and of what it leaves."""

    folder: Path

    def __call__(self, session: Session) -> tuple[str, set[str]]:
        model = shard(encoder(self.folder, frozen=False), device=CPU, dtype=torch.bfloat16)
        logits = model(input_ids=torch.full((1, 3), 5)).logits
        logits.float().sum().backward()
        kept = [p.dtype for p in model.parameters()]
        kept += [p.grad.dtype for p in model.parameters() if p.grad is not None]
        return str(logits.dtype), set(map(str, kept))


class RowsAsBatches:
    """Task, items and metrics in one: row n is the tokens [5 + n, 6]; adds up the logits."""

    def __init__(self) -> None:
        self.total = torch.zeros(3, dtype=torch.float64)

    def rows(self, first: int, stop: int, *, fails: bool) -> Iterator[Any]:
        for row in range(first, stop):
            rows = np.array([row])
            yield SimpleNamespace(rows=rows, items=SimpleNamespace(take=lambda _, row=row: row))
        if fails:
            raise StorageError(Problem("the store is away"))

    def lengths(self, items: Any) -> np.ndarray[Any, Any]:
        return np.ones(1, dtype=np.int64)

    def collate(self, row: int) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.tensor([[5 + row, 6]])}

    def empty_batch(self, *, rows: int = 1, tokens: int = 2) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.full((rows, tokens), 5)}

    def forward(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        logits: torch.Tensor = model(**batch).logits
        return logits

    def update(self, output: torch.Tensor, batch: dict[str, torch.Tensor]) -> None:
        self.total += torch.tensor([*output[0].double().tolist(), 1.0], dtype=torch.float64)


class InTurn:
    """Several works in one group of ranks, whose start takes longer than they do; gives all."""

    def __init__(self, works: list[Any]) -> None:
        self._works = works

    def __call__(self, session: Session) -> dict[str, Any]:
        torch.set_num_threads(1)  # the ranks are more than the cores
        return {repr(work): work(session) for work in self._works}


@pytest.fixture(scope="module")
def given(folder: Path) -> Given:
    """What all works of this module give on each of three ranks."""
    ranks = on_ranks(InTurn(works(folder)), world_size=3)
    return lambda work: [rank[repr(work)] for rank in ranks]


def works(folder: Path) -> list[Any]:
    return [
        *(
            Steps(folder, strategy, optimizer, frozen=frozen)
            for strategy in ("ddp", "fsdp")
            for optimizer, frozen in CASES
        ),
        *(
            Steps(folder, "fsdp", optimizer, skipped=skipped)
            for optimizer in (ADAMW, SGD)
            for skipped in ((False, True), (False,))
        ),
        Measures(folder, sharded=True),
        Measures(folder, sharded=True, fails=1),
        InHalf(folder),
    ]


@pytest.mark.parametrize(("optimizer", "frozen"), CASES, ids=["adamw", "sgd, frozen"])
def test_gradients_norms_and_weights_are_those_of_one_process(
    folder: Path, given: Given, optimizer: Optimizer, frozen: bool
) -> None:
    alone = Steps(folder, "ddp", optimizer, frozen=frozen)(ALONE)
    for strategy in ("ddp", "fsdp"):
        ranks = given(Steps(folder, strategy, optimizer, frozen=frozen))
        assert {tuple(r["norms"]) for r in ranks} == {tuple(ranks[0]["norms"])}, "ranks differ"
        gradients, weights = (whole(ranks, kind, strategy) for kind in ("first", "weights"))
        assert alone["first"].keys() == gradients.keys()
        for name, gradient in alone["first"].items():
            np.testing.assert_allclose(gradients[name], gradient, atol=1e-6, rtol=1e-4)
        for name, weight in alone["weights"].items():
            # adamw divides by the size of a gradient, also where it is all rounding
            np.testing.assert_allclose(weights[name], weight, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("optimizer", [ADAMW, SGD], ids=["adamw", "sgd"])
def test_a_rank_holds_its_rows_of_weights_and_state_only(
    folder: Path, given: Given, optimizer: Optimizer
) -> None:
    ranks = given(Steps(folder, "fsdp", optimizer, skipped=(False,)))
    name = "bert.embeddings.word_embeddings.weight"
    state = "exp_avg" if optimizer.kind == "adamw" else "momentum_buffer"
    assert [r["states"][f"{name}/{state}"] for r in ranks] == [(67, 64), (67, 64), (66, 64)]


@pytest.mark.parametrize("optimizer", [ADAMW, SGD], ids=["adamw", "sgd"])
def test_a_skipped_step_changes_nothing_of_a_sharded_model(
    folder: Path, given: Given, optimizer: Optimizer
) -> None:
    with_skip, without = (
        given(Steps(folder, "fsdp", optimizer, skipped=skipped))[0]
        for skipped in ((False, True), (False,))
    )
    assert with_skip["norms"][:1] == without["norms"]
    for name, weight in without["weights"].items():
        assert np.array_equal(with_skip["weights"][name], weight)


def test_an_evaluation_counts_each_row_once_and_leaves_nothing_gathered(
    folder: Path, given: Given
) -> None:
    alone, _, _ = Measures(folder, sharded=False)(ALONE)
    for total, gathered, training in given(Measures(folder, sharded=True)):
        assert total == pytest.approx(alone, abs=1e-5)
        assert total[2] == 4
        assert gathered == []
        assert training


def test_passes_in_bfloat16_leave_weights_and_gradients_in_float32(
    folder: Path, given: Given
) -> None:
    assert given(InHalf(folder)) == [("torch.bfloat16", {"torch.float32"})] * 3


def test_a_rank_that_cannot_read_ends_the_evaluation_of_all(folder: Path, given: Given) -> None:
    """By the vote after the first pass: rank 0 has measured one of its two rows by then."""
    told = given(Measures(folder, sharded=True, fails=1))
    assert told == [1, "the store is away", 0]


def test_blocks_are_the_repeated_layers_outermost_first() -> None:
    experts = [nn.Sequential(nn.ModuleList([nn.Linear(1, 1), nn.Linear(1, 1)])) for _ in range(3)]
    model = nn.Sequential(nn.Linear(1, 1), nn.ModuleList(experts), nn.ModuleList([nn.Linear(1, 1)]))
    assert blocks(model) == experts


def test_a_model_with_a_scalar_parameter_is_refused() -> None:
    model = nn.Linear(1, 1)
    model.scale = nn.Parameter(torch.tensor(1.0))
    with pytest.raises(SpecError, match="scale") as caught:
        shard(model, device=CPU, dtype=torch.float32)
    assert caught.value.problems[0].hint == "set workers.strategy to ddp"


def test_a_model_whose_weights_are_joined_on_loading_is_refused(tmp_path: Path) -> None:
    config = MixtralConfig(
        vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, pad_token_id=0,
        num_attention_heads=1, num_key_value_heads=1, num_local_experts=2,
    )  # fmt: skip
    MixtralForSequenceClassification(config).save_pretrained(tmp_path)
    model = MixtralForSequenceClassification.from_pretrained(tmp_path)
    with pytest.raises(SpecError, match=r"experts\.0") as caught:
        refuse_converted(model)
    assert caught.value.problems[0].hint == "set workers.strategy to ddp"


def test_a_plain_model_is_not_sharded() -> None:
    assert not is_sharded(nn.Linear(1, 1))
