"""Optimizers, schedules, clipping, and state that comes back as it was."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from jobs.errors import SpecError
from jobs.spec import Optimizer, Plateau
from trainers.freezing import freeze
from trainers.loop import Progress, lower_rate
from trainers.optim import (
    build_optimizer,
    gradient_norm,
    learning_rate,
    load_optimizer_tensors,
    optimizer_tensors,
    set_learning_rate,
    update,
)

ADAMW = Optimizer(learning_rate=0.01)
SGD = Optimizer(kind="sgd", learning_rate=0.01)
PLAIN_SGD = Optimizer(kind="sgd", learning_rate=0.01, momentum=0.0)
ADAFACTOR = Optimizer(kind="adafactor", learning_rate=0.01)
NADAM = Optimizer(kind="torch.optim.NAdam", learning_rate=0.01, options={"betas": (0.8, 0.9)})
RPROP = Optimizer(kind="torch.optim.Rprop", learning_rate=0.01)
KINDS = [ADAMW, SGD, PLAIN_SGD, ADAFACTOR, NADAM, RPROP]
NAMES = ["adamw", "sgd", "plain-sgd", "adafactor", "nadam", "rprop"]


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3), nn.LayerNorm(3))


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int) -> None:
    for number in range(count):
        optimizer.zero_grad(set_to_none=True)
        model(torch.tensor([number % 5, 1])).square().sum().backward()
        optimizer.step()


def weights(model: nn.Module) -> list[bytes]:
    return [p.detach().numpy().tobytes() for p in model.parameters()]


def rates(total: int, **keys: object) -> list[float]:
    spec = Optimizer.model_validate({"learning_rate": 1.0, **keys})
    return [learning_rate(spec, step=step, total_steps=total) for step in range(total)]


# ------------------------------------------------------------------------------------ schedules


def test_a_constant_rate_stays() -> None:
    assert rates(3, schedule="constant") == [1.0, 1.0, 1.0]


def test_a_linear_rate_falls_to_zero_at_the_end() -> None:
    assert rates(4, schedule="linear") == [1.0, 0.75, 0.5, 0.25]
    spec = Optimizer(learning_rate=1.0)
    assert learning_rate(spec, step=4, total_steps=4) == 0.0


def test_a_cosine_rate_falls_as_half_a_cosine() -> None:
    assert rates(4, schedule="cosine") == pytest.approx(
        [(1 + math.cos(math.pi * x / 4)) / 2 for x in range(4)]
    )


def test_restarts_are_cosines_of_equal_length() -> None:
    one = rates(4, schedule="cosine")
    assert rates(8, schedule="cosine-restarts", cycles=2) == pytest.approx([*one, *one])
    spec = Optimizer(learning_rate=1.0, schedule="cosine-restarts")
    assert learning_rate(spec, step=8, total_steps=8) == 0.0


def test_one_cycle_is_torchs() -> None:
    total = 21
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=1.0, total_steps=total, pct_start=7 / total, cycle_momentum=False
    )
    theirs = []
    for _ in range(total):
        theirs.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    # Theirs reach the ends within the steps: the peak one step earlier.
    ours = rates(total - 1, schedule="one-cycle", warmup_steps=6)
    assert ours == pytest.approx(theirs[:-1], abs=1e-5)
    assert max(rates(10, schedule="one-cycle")) == rates(10, schedule="one-cycle")[3] == 1.0


def test_an_inverse_square_root_falls_from_the_end_of_the_warmup() -> None:
    found = rates(17, schedule="inverse-sqrt", warmup_steps=3)
    assert found[:4] == [0.25, 0.5, 0.75, 1.0]
    assert found[15] == 0.5


def test_a_plateau_lowers_the_rate_as_often_as_it_is_told() -> None:
    spec = Optimizer(learning_rate=1.0, schedule="plateau", plateau=Plateau(factor=0.1))
    found = [learning_rate(spec, step=9, total_steps=10, reductions=n) for n in range(3)]
    assert found == pytest.approx([1.0, 0.1, 0.01])


@pytest.mark.parametrize(
    ("sign", "values"), [(1.0, [3, 4, 4, 4.5, 4.5, 4.5]), (-1.0, [4, 3, 3, 2.5, 3, 3])]
)
def test_evaluations_without_enough_improvement_lower_the_rate(
    sign: float, values: list[float]
) -> None:
    plateau, progress, lowered = Plateau(patience=2, min_delta=0.6), Progress(), []
    for value in values:
        progress = lower_rate(plateau, progress, value, sign=sign)
        lowered.append(progress.rate_reductions)
    assert lowered == [0, 0, 0, 1, 1, 2]


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "plateau", "cosine-restarts"])
def test_warmup_rises_evenly_and_its_first_step_trains(schedule: str) -> None:
    assert rates(6, schedule=schedule, warmup_steps=3)[:4] == [0.25, 0.5, 0.75, 1.0]


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_a_warmup_longer_than_training_only_rises(schedule: str) -> None:
    assert rates(3, schedule=schedule, warmup_steps=7) == [0.125, 0.25, 0.375]


@pytest.mark.parametrize(
    "schedule", ["linear", "cosine", "cosine-restarts", "one-cycle", "inverse-sqrt"]
)
@pytest.mark.parametrize("warmup_steps", [0, 5, 6])
def test_no_rate_is_negative_after_the_last_step(schedule: str, warmup_steps: int) -> None:
    spec = Optimizer.model_validate(
        {"learning_rate": 1.0, "schedule": schedule, "warmup_steps": warmup_steps}
    )
    assert all(learning_rate(spec, step=s, total_steps=5) >= 0.0 for s in range(12))


def test_the_rate_is_set_for_all_groups() -> None:
    optimizer = build_optimizer(small_model(), ADAMW)
    set_learning_rate(optimizer, 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.5]


# ---------------------------------------------------------------------------- groups, clipping


@pytest.mark.parametrize("spec", [ADAMW, SGD])
def test_only_matrices_and_embeddings_decay(spec: Optimizer) -> None:
    model = small_model()
    decayed, plain = build_optimizer(model, spec).param_groups
    assert decayed["weight_decay"] == spec.weight_decay
    assert [tuple(p.shape) for p in decayed["params"]] == [(5, 4), (3, 4)]
    assert plain["weight_decay"] == 0.0
    assert {p.ndim for p in plain["params"]} == {1}


class Deep(nn.Module):
    """Embeddings, two blocks and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(5, 4)
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.head = nn.Linear(4, 2)


def test_the_rate_falls_with_the_depth() -> None:
    model = Deep()
    optimizer = build_optimizer(model, Optimizer(layer_decay=0.5))
    set_learning_rate(optimizer, 8.0)
    found = {
        name: group["lr"]
        for group in optimizer.param_groups
        for name in group["param_names"]
        if name.endswith("weight")
    }
    assert found == {
        "embeddings.weight": 1.0,
        "layers.0.weight": 2.0,
        "layers.1.weight": 4.0,
        "head.weight": 8.0,
    }
    assert {g["weight_decay"] for g in optimizer.param_groups} == {0.0, 0.01}


def test_a_model_without_blocks_has_no_depth() -> None:
    with pytest.raises(SpecError, match=r"layer_decay is 0\.9, but this model has no list"):
        build_optimizer(small_model(), Optimizer(layer_decay=0.9))


def test_frozen_parameters_have_no_group() -> None:
    model = small_model()
    freeze(model, ["0", "1"])
    [group] = build_optimizer(model, ADAMW).param_groups
    assert [tuple(p.shape) for p in group["params"]] == [(3,), (3,)]


def test_gradients_are_clipped_to_the_largest_norm_and_the_norm_before_is_told() -> None:
    weight = nn.Parameter(torch.zeros(2))
    weight.grad = torch.tensor([3.0, 4.0])
    assert float(gradient_norm([weight], max_norm=None)) == 5.0
    assert weight.grad.tolist() == [3.0, 4.0]
    assert float(gradient_norm([weight], max_norm=1.0)) == 5.0
    assert float(weight.grad.norm()) == pytest.approx(1.0)


def test_a_small_gradient_is_not_clipped() -> None:
    weight = nn.Parameter(torch.zeros(2))
    weight.grad = torch.tensor([0.3, 0.4])
    gradient_norm([weight], max_norm=1.0)
    assert weight.grad.tolist() == pytest.approx([0.3, 0.4])


# ------------------------------------------------------------------------------- skipped steps


def updates(model: nn.Module, optimizer: torch.optim.Optimizer, poisoned: list[bool]) -> None:
    """One update each; the gradients are the same functions of model and place in the list."""
    for is_poisoned in poisoned:
        optimizer.zero_grad(set_to_none=True)
        model(torch.tensor([2, 1])).square().sum().backward()
        parameters = list(model.parameters())
        if is_poisoned:
            assert parameters[0].grad is not None
            parameters[0].grad[0, 0] = math.nan
        norm = gradient_norm(parameters, max_norm=1.0)
        update(optimizer, skipped=(~torch.isfinite(norm)).float())


def state_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, bytes]:
    tensors = optimizer_tensors(optimizer)
    return {name: tensor.detach().numpy().tobytes() for name, tensor in tensors.items()}


@pytest.mark.parametrize("spec", KINDS, ids=NAMES)
@pytest.mark.parametrize("at", [0, 1, 3], ids=["the first", "the second", "the last"])
def test_a_step_that_is_skipped_never_was(spec: Optimizer, at: int) -> None:
    model, calm = small_model(), small_model()
    optimizer, calm_optimizer = build_optimizer(model, spec), build_optimizer(calm, spec)
    updates(model, optimizer, [place == at for place in range(4)])
    updates(calm, calm_optimizer, [False] * 3)
    assert weights(model) == weights(calm)
    assert state_bytes(model, optimizer) == state_bytes(calm, calm_optimizer)


@pytest.mark.parametrize("spec", KINDS, ids=NAMES)
def test_an_update_is_the_optimizers_own_step(spec: Optimizer) -> None:
    model, plain = small_model(), small_model()
    optimizer, plain_optimizer = build_optimizer(model, spec), build_optimizer(plain, spec)
    for _ in range(3):
        for one, its in ((model, optimizer), (plain, plain_optimizer)):
            its.zero_grad(set_to_none=True)
            one(torch.tensor([2, 1])).square().sum().backward()
        update(optimizer, skipped=torch.tensor(0.0))
        plain_optimizer.step()
    assert weights(model) == weights(plain)


def test_state_that_is_saved_after_a_skipped_first_step_can_be_restored() -> None:
    model, other = small_model(), small_model()
    optimizer, restored = build_optimizer(model, SGD), build_optimizer(other, SGD)
    updates(model, optimizer, [True])
    load_optimizer_tensors(restored, optimizer_tensors(optimizer))
    for one, its in ((model, optimizer), (other, restored)):
        updates(one, its, [False, False])
    assert weights(other) == weights(model)


# ----------------------------------------------------------------------------------- state


@pytest.mark.parametrize("spec", [ADAMW, SGD, PLAIN_SGD], ids=["adamw", "sgd", "plain-sgd"])
def test_the_state_is_there_before_the_first_step_and_no_bit_of_the_numbers_changes(
    spec: Optimizer,
) -> None:
    model, lazy = small_model(), small_model()
    optimizer, its = build_optimizer(model, spec), build_optimizer(lazy, spec)
    room = {name: t.numel() for name, t in optimizer_tensors(optimizer).items()}
    its.state.clear()  # as torch leaves it
    steps(model, optimizer, 3)
    steps(lazy, its, 3)
    assert {name: t.numel() for name, t in optimizer_tensors(optimizer).items()} == room
    assert weights(model) == weights(lazy)
    assert state_bytes(model, optimizer) == state_bytes(lazy, its)


@pytest.mark.parametrize("spec", KINDS, ids=NAMES)
@pytest.mark.parametrize("frozen", [[], ["0"]], ids=["all", "frozen"])
def test_restored_state_goes_on_with_the_same_bits(spec: Optimizer, frozen: list[str]) -> None:
    model = small_model()
    freeze(model, frozen)
    optimizer = build_optimizer(model, spec)
    steps(model, optimizer, 3)
    saved = {name: t.clone() for name, t in optimizer_tensors(optimizer).items()}
    other = copy.deepcopy(model)
    restored = build_optimizer(other, spec)
    load_optimizer_tensors(restored, saved)
    for one, its in ((model, optimizer), (other, restored)):
        steps(one, its, 3)
    assert weights(other) == weights(model)


def test_what_is_loaded_is_a_copy() -> None:
    model = small_model()
    optimizer = build_optimizer(model, ADAMW)
    steps(model, optimizer, 1)
    saved = {name: t.clone() for name, t in optimizer_tensors(optimizer).items()}
    before = {name: t.clone() for name, t in saved.items()}
    load_optimizer_tensors(optimizer, saved)
    steps(model, optimizer, 1)
    assert all(torch.equal(saved[name], before[name]) for name in saved)


@pytest.mark.parametrize(
    ("was", "now"),
    [
        ((ADAMW, []), (ADAMW, ["0"])),
        ((ADAMW, []), (SGD, [])),
        ((SGD, []), (ADAMW, [])),
        ((SGD, []), (PLAIN_SGD, [])),
        ((PLAIN_SGD, []), (SGD, [])),
        ((ADAFACTOR, []), (NADAM, [])),
        ((NADAM, []), (ADAMW, [])),
    ],
    ids=[
        *("more frozen", "sgd now", "adamw now", "no momentum now", "momentum now"),
        *("nadam now", "adamw after nadam"),
    ],
)
def test_state_of_another_optimizer_or_of_other_parameters_is_refused(
    was: tuple[Optimizer, list[str]], now: tuple[Optimizer, list[str]]
) -> None:
    model = small_model()
    freeze(model, was[1])
    optimizer = build_optimizer(model, was[0])
    steps(model, optimizer, 1)
    saved = optimizer_tensors(optimizer)
    other = small_model()
    freeze(other, now[1])
    with pytest.raises(SpecError, match="optimizer"):
        load_optimizer_tensors(build_optimizer(other, now[0]), saved)


# ------------------------------------------------------------------------ optimizers by their path


class NumbersOnly(torch.optim.SGD):
    """Keeps numbers that are no tensors, as other people's optimizers do."""

    def step(self, closure: object = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                state["count"] = state.get("count", 0) + 1
                state["mean"] = state.get("mean", 0.5) * 0.9
                step = group["lr"] * state["mean"] / state["count"]
                if parameter.grad is not None:
                    parameter.data.add_(parameter.grad, alpha=-step)


class CountsElsewhere(torch.optim.SGD):
    """Keeps what it needs where no checkpoint looks."""

    def step(self, closure: object = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["count"] = group.get("count", 0) + 1


def by_path(kind: type) -> Optimizer:
    return Optimizer(kind=f"{kind.__module__}.{kind.__name__}", learning_rate=0.01)


def test_numbers_that_are_no_tensors_are_restored_as_they_were() -> None:
    model, spec = small_model(), by_path(NumbersOnly)
    optimizer = build_optimizer(model, spec)
    steps(model, optimizer, 3)
    other = copy.deepcopy(model)
    restored = build_optimizer(other, spec)
    load_optimizer_tensors(restored, optimizer_tensors(optimizer))
    assert list(restored.state.values()) == list(optimizer.state.values())
    for one, its in ((model, optimizer), (other, restored)):
        steps(one, its, 2)
    assert weights(other) == weights(model)


@pytest.mark.parametrize(
    ("given", "message", "hint"),
    [
        ({"kind": "torch.optim.NAdm"}, "has no optimizer NAdm", "torch.optim.NAdam"),
        ({"kind": "torch.nn.Linear"}, "has no optimizer Linear", "torch.optim"),
        ({"kind": "no.such.module"}, "no.such cannot be imported", "install it"),
        ({"kind": "torch.optim.LBFGS"}, "cannot be made", "its arguments"),
        ({"kind": "torch.optim.NAdam", "options": {"beta": 1}}, "holds beta", "betas"),
        ({"kind": "torch.optim.NAdam", "options": {"betas": 3}}, "cannot be made", "betas"),
        ({"kind": "torch.optim.Rprop", "weight_decay": 0.3}, "no weight_decay", "weight_decay: 0"),
        ({"kind": "torch.optim.SparseAdam"}, "dense gradients", "its arguments"),
    ],
)
def test_an_optimizer_that_cannot_be_used_is_refused_before_the_first_step(
    given: dict[str, object], message: str, hint: str
) -> None:
    with pytest.raises(SpecError) as refused:
        build_optimizer(small_model(), Optimizer.model_validate(given))
    [problem] = refused.value.problems
    assert message in problem.message
    assert hint in (problem.hint or "")


def test_an_optimizer_whose_state_would_be_lost_is_refused() -> None:
    with pytest.raises(SpecError, match="keeps more than tensors and numbers"):
        build_optimizer(small_model(), by_path(CountsElsewhere))
