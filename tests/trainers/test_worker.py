"""One rank's trouble: all ranks end with one outcome, none waits for another for ever."""

from __future__ import annotations

import os

from cluster.storage import StorageError
from jobs.errors import Problem
from jobs.record import Outcome, State
from tests.ranks import assignment_of, run_group
from tests.scene import Scene
from trainers import preparation


class FailsToPrepare:
    """Before training: on rank 1 the model cannot be fetched."""

    def __call__(self) -> None:
        if os.environ["RANK"] == "1":
            preparation.pretrained_folder = refuse


def same_on_all(outcomes: list[Outcome]) -> Outcome:
    """Rank 0's outcome, which must be that of all ranks but for where their time went."""
    first, *others = (o.model_copy(update={"seconds": {}}) for o in outcomes)
    assert all(other == first for other in others)
    return first


def refuse(*_: object, **__: object) -> None:
    raise StorageError(Problem("the model is not reached"))


def test_a_rank_that_cannot_prepare_ends_all_ranks(scene: Scene) -> None:
    spec = scene.job(workers={"count": 2})
    outcomes = run_group(assignment_of(spec, "run"), world_size=2, before=FailsToPrepare())
    outcome = same_on_all(outcomes)
    assert outcome.state is State.FAILED_INFRA
    assert outcome.failure is not None
    assert outcome.failure.where.startswith("rank 1 ")
    assert outcome.failure.exit_code == 3
