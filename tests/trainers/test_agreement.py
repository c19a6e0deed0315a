"""What ranks decide together, between real processes."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

from tests.ranks import on_ranks
from trainers.agreement import Agreement, Decision, Vote
from trainers.session import Session


def agreement_of(session: Session) -> Agreement:
    warnings.simplefilter("error")
    return Agreement(rank=session.rank, world_size=session.world_size)


def exchange(session: Session) -> dict[str, Any]:
    """Every collective once, with values of different sizes."""
    agreement = agreement_of(session)
    rank = session.rank
    big = {"rank": rank, "text": "é" * (1000 * rank), "none": None}
    found = {
        "gathered": agreement.gather(big)
        == [{"rank": r, "text": "é" * (1000 * r), "none": None} for r in range(session.world_size)],
        "first": agreement.first({"from": rank}),
        "sum": agreement.sum(
            torch.tensor([2.0**53 - 1 if rank == 0 else 0.0, rank], dtype=torch.float64)
        ).tolist(),
    }
    agreement.barrier()
    return found


def votes(session: Session) -> list[Decision]:
    """A vote of each kind by one rank in turn, with other collectives while it is under way."""
    agreement = agreement_of(session)
    decisions = []
    for voter in range(session.world_size):
        mine = session.rank == voter
        for kind in ("stop", "save", "yields", "failed"):
            pending = agreement.start(
                Vote(
                    weight=session.rank + 1.0,
                    num_microbatches=session.rank,
                    cost=100.0 * session.rank,
                    **{kind: mine},
                )
            )
            assert float(agreement.sum(torch.ones(1).double())) == session.world_size
            assert agreement.gather(kind) == [kind] * session.world_size
            decisions.append(pending.wait())
    return decisions


def ahead(session: Session) -> list[float]:
    """Votes that are started before the ones before them are waited for."""
    agreement = agreement_of(session)
    pending = agreement.start(Vote(weight=0.0, num_microbatches=1))
    weights = []
    for step in range(1, 20):
        following = agreement.start(Vote(weight=float(step), num_microbatches=1))
        weights.append(pending.wait().weight)
        pending = following
    return [*weights, pending.wait().weight]


@pytest.mark.parametrize("world_size", [2, 3])
def test_all_ranks_hear_the_same(world_size: int) -> None:
    for found in on_ranks(exchange, world_size=world_size):
        assert found["gathered"]
        assert found["first"] == {"from": 0}
        assert found["sum"] == [2.0**53 - 1, sum(range(world_size))]


@pytest.mark.parametrize("world_size", [2, 3])
def test_one_vote_decides_for_all_while_other_collectives_run(world_size: int) -> None:
    first, *others = on_ranks(votes, world_size=world_size)
    assert all(other == first for other in others)
    weight = float(sum(range(1, world_size + 1)))
    expected = [
        Decision(
            weight=weight,
            num_microbatches=world_size - 1,
            stop=kind == "stop",
            save=kind == "save",
            yields=kind == "yields",
            failed=kind == "failed",
            mean_cost=50.0 * (world_size - 1),
            most_cost=100.0 * (world_size - 1),
        )
        for kind in ("stop", "save", "yields", "failed")
    ]
    assert first == expected * world_size


def test_a_vote_may_be_started_before_the_one_before_is_waited_for() -> None:
    for weights in on_ranks(ahead, world_size=2):
        assert weights == [2.0 * step for step in range(20)]


def test_one_rank_agrees_with_itself() -> None:
    agreement = Agreement(rank=0, world_size=1)
    vote = Vote(weight=3.0, num_microbatches=2, save=True)
    assert agreement.start(vote).wait() == Decision(
        3.0, 2, stop=False, save=True, yields=False, failed=False
    )
    assert agreement.gather({"a": 1}) == [{"a": 1}]
    assert agreement.first("x") == "x"
    assert agreement.sum(torch.ones(2)).tolist() == [1.0, 1.0]
    agreement.barrier()
