"""What a micro-batch costs besides its tokens: measured once, and kept for the whole run."""

from __future__ import annotations

from typing import Any

import pytest

from jobs.record import State
from jobs.runs import RunReader
from tests.evidence import final_weights
from tests.ranks import assignment_of, run_ranks
from tests.scene import Scene
from trainers import launch_cost, worker
from trainers.launch_cost import launch_in_tokens
from trainers.tasks.text_classification import TextClassification

AUTO = {"launch_tokens": "auto"}


@pytest.mark.parametrize(
    ("short", "long", "expected"),
    [
        (0.010, 0.110, 64),  # 0.2 ms a token: 50 tokens
        (0.010, 0.020, 512),  # 0.02 ms: 500
        (0.001, 1.001, 1),
        (0.010, 0.010, 8192),  # tokens cost nothing that can be measured
        (0.010, 0.009, 8192),
        (9.0, 9.5, 8192),
    ],
)
def test_the_launch_is_a_power_of_two_of_tokens(short: float, long: float, expected: int) -> None:
    assert launch_in_tokens(short, long, tokens=500, most=8192) == expected


def test_the_launch_is_at_most_what_a_microbatch_may_hold() -> None:
    assert launch_in_tokens(0.590, 0.640, tokens=500, most=6000) == 6000  # 5,900, rounded to 8,192


@pytest.mark.parametrize(
    ("max_tokens", "limit"), [(8, 4096), (32, 48), (32, 1)], ids=["short rows", "few", "one row"]
)
def test_it_is_measured_with_what_the_job_allows(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, max_tokens: int, limit: int
) -> None:
    shapes = list[tuple[int, int]]()
    whole = TextClassification.empty_batch

    def empty_batch(task: TextClassification, *, rows: int = 1, tokens: int = 2) -> Any:
        shapes.append((rows, tokens))
        return whole(task, rows=rows, tokens=tokens)

    monkeypatch.setattr(TextClassification, "empty_batch", empty_batch)
    spec = scene.job(
        batching=AUTO | {"max_tokens_per_microbatch": limit}, task={"max_tokens": max_tokens}
    )
    assert scene.train(spec).state is State.SUCCEEDED
    rows, tokens = max(shapes)
    assert tokens <= max_tokens
    assert rows * tokens <= max(limit, 2)


def test_measuring_leaves_no_trace(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights of a job that measures 16 are those of one that says 16."""
    monkeypatch.setattr(launch_cost, "launch_in_tokens", lambda *_, **__: 16)
    for run_id, batching in (("measured", AUTO), ("said", {"launch_tokens": 16})):
        assert scene.train(scene.job(batching=batching), run_id).state is State.SUCCEEDED
    measured, said = (final_weights(scene.runs, run_id) for run_id in ("measured", "said"))
    assert measured == said


def test_a_resume_cuts_as_the_run_did(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = scene.job(batching=AUTO)
    assert scene.train(spec).state is State.SUCCEEDED
    reader = RunReader(scene.runs, "run")
    [first] = reader.attempts()
    assert first.launch_tokens is not None
    assert first.launch_tokens & (first.launch_tokens - 1) == 0
    assert reader.manifests()[-1].launch_tokens == first.launch_tokens

    def again(*_: Any) -> int:
        raise AssertionError("measured again")

    monkeypatch.setattr(worker, "measured_launch_tokens", again)
    assert scene.train(spec, generation=2).state is State.SUCCEEDED
    assert RunReader(scene.runs, "run").attempts()[-1].launch_tokens == first.launch_tokens


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_ranks_measure_together(scene: Scene, strategy: str) -> None:
    spec = scene.job(batching=AUTO, workers={"count": 2, "strategy": strategy})
    outcome = run_ranks(assignment_of(spec, "run"), world_size=2)
    assert outcome is not None
    assert outcome.state is State.SUCCEEDED
    assert RunReader(scene.runs, "run").attempts()[0].launch_tokens is not None
