"""`max_tokens_per_microbatch: auto`: found by trying, bounded by memory, kept for the whole run."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from jobs.record import State
from jobs.runs import RunReader
from tests.evidence import final_weights
from tests.ranks import assignment_of, run_ranks
from tests.scene import Scene
from trainers import microbatch_size, worker
from trainers.microbatch_size import Trial, gains_nothing, largest_of_the_quick
from trainers.tasks.text_classification import TextClassification

AUTO = {"max_tokens_per_microbatch": "auto", "launch_tokens": 16, "global_batch_size": 8}
MAX_TOKENS = 32
"""Of a row in the scene's jobs."""


def trials(*rates: float) -> list[Trial]:
    """Of 1, 2, 4... tokens, at so many tokens per second."""
    return [Trial(2**n, 2**n / rate) for n, rate in enumerate(rates)]


@pytest.mark.parametrize(
    ("rates", "ends", "found"),
    [
        ((100,), False, 1),
        ((100, 100), False, 2),  # as quick: launches are saved, and may be worth it
        ((100, 190, 300), False, 4),
        ((100, 101, 102), True, 4),
        ((100, 190, 150), False, 2),  # one slow size may be chance
        ((100, 190, 150, 140), True, 2),
        ((100, 190, 150, 260), False, 8),
        ((100, 190, 192, 120, 110), True, 4),
    ],
)
def test_the_largest_of_the_quick_sizes_is_taken(
    rates: tuple[float, ...], ends: bool, found: int
) -> None:
    assert gains_nothing(trials(*rates)) == ends
    assert largest_of_the_quick(trials(*rates)) == found


def tried(
    monkeypatch: pytest.MonkeyPatch, scene: Scene, run_id: str = "run", **patches: Any
) -> tuple[list[int], int]:
    """Rows of each size that a run tries, and the tokens that it found."""
    sizes = list[int]()
    own = microbatch_size._try

    def look(trainee: Any, *, rows: int, tokens: int, ranks_of_node: int) -> Any:
        assert tokens == MAX_TOKENS
        sizes.append(rows)
        return own(trainee, rows=rows, tokens=tokens, ranks_of_node=ranks_of_node)

    monkeypatch.setattr(microbatch_size, "_try", look)
    for name, value in patches.items():
        monkeypatch.setattr(microbatch_size, name, value)
    assert scene.train(scene.job(batching=AUTO), run_id).state is State.SUCCEEDED
    reader = RunReader(scene.runs, run_id)
    [attempt] = reader.attempts()
    assert attempt.max_tokens_per_microbatch is not None
    assert reader.manifests()[-1].max_tokens_per_microbatch == attempt.max_tokens_per_microbatch
    return sizes, attempt.max_tokens_per_microbatch


def test_sizes_double_to_the_whole_batch(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, found = tried(monkeypatch, scene, gains_nothing=lambda _: False)
    assert sizes == [1, 2, 4, 8]
    assert found in {MAX_TOKENS * rows for rows in sizes}


def test_no_size_is_tried_that_memory_would_not_hold(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a pass over two rows keeps, times what the next needs, is more than there is."""
    kept = dict[int, int]()
    own = microbatch_size._kept_bytes

    def look(*arguments: Any) -> int:
        kept[len(kept)] = own(*arguments)
        return kept[len(kept) - 1]

    monkeypatch.setattr(microbatch_size, "gains_nothing", lambda _: False)
    monkeypatch.setattr(microbatch_size, "_kept_bytes", look)
    sizes, _ = tried(monkeypatch, scene)
    assert [round(kept[n] / kept[0]) for n in range(len(sizes))] == sizes  # bytes grow with rows
    room = int(2 * 1.5 * kept[1] / 0.9) - 1
    sizes, found = tried(monkeypatch, scene, "narrow", free_bytes=lambda: room)
    assert sizes == [1, 2]
    assert found <= 2 * MAX_TOKENS


def test_a_size_that_does_not_fit_is_not_taken(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An allocation that really fails, in the middle of the sizes."""
    whole = TextClassification.empty_batch

    def empty_batch(task: TextClassification, *, rows: int = 1, tokens: int = 2) -> Any:
        if rows > 2:
            torch.empty(2**50)
        return whole(task, rows=rows, tokens=tokens)

    monkeypatch.setattr(TextClassification, "empty_batch", empty_batch)
    sizes, found = tried(monkeypatch, scene, gains_nothing=lambda _: False)
    assert sizes == [1, 2, 4]
    assert found <= 2 * MAX_TOKENS


def test_trying_leaves_no_trace(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights of a job that finds 64 are those of one that says 64."""
    monkeypatch.setattr(microbatch_size, "largest_of_the_quick", lambda _: 64)
    said = AUTO | {"max_tokens_per_microbatch": 64}
    for run_id, batching in (("found", AUTO), ("said", said)):
        assert scene.train(scene.job(batching=batching), run_id).state is State.SUCCEEDED
    assert final_weights(scene.runs, "found") == final_weights(scene.runs, "said")


def test_a_resume_cuts_as_the_run_did(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = scene.job(batching=AUTO)
    assert scene.train(spec).state is State.SUCCEEDED
    [first] = RunReader(scene.runs, "run").attempts()

    def again(*_: Any, **__: Any) -> int:
        raise AssertionError("tried again")

    monkeypatch.setattr(worker, "tried_max_tokens", again)
    assert scene.train(spec, generation=2).state is State.SUCCEEDED
    last = RunReader(scene.runs, "run").attempts()[-1]
    assert last.attempt == 2
    assert last.max_tokens_per_microbatch == first.max_tokens_per_microbatch


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_ranks_try_together(scene: Scene, strategy: str) -> None:
    spec = scene.job(batching=AUTO, workers={"count": 2, "strategy": strategy})
    outcome = run_ranks(assignment_of(spec, "run"), world_size=2)
    assert outcome is not None
    assert outcome.state is State.SUCCEEDED
    assert RunReader(scene.runs, "run").attempts()[0].max_tokens_per_microbatch is not None
