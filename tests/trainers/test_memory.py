"""Memory that runs out: in a pass, an evaluation or an update, for one row, for a checkpoint."""

from __future__ import annotations

import ctypes
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from jobs.errors import ClusterError, EnvironmentFault, TrainingError
from jobs.record import Attempt, Crash, Failure, Manifest, Microbatch, State, StreamPosition
from jobs.runs import RunReader
from jobs.status import read_status
from jobs.status_view import status_renderable
from jobs.terminal import print_to
from tests import evidence
from tests.ranks import assignment_of, break_group, run_ranks
from tests.scene import Scene
from trainers import loop, preparation, snapshot
from trainers.attempt import microbatch_limit
from trainers.evaluate import evaluate_run
from trainers.memory import MicrobatchTooLarge, is_out_of_memory, passes_over
from trainers.microbatch import Cutting
from trainers.session import ProcessSession
from trainers.tasks.text_classification import TextClassification
from trainers.worker import train_worker

BYTES_A_TOKEN = 2**23


class RunsOut:
    """On one rank a pass needs 8 MiB a token, of address space that is limited from its n-th pass
    in training on, once a checkpoint is in the folder: what does not fit makes torch's own
    allocator fail."""

    def __init__(self, *, rank: int, after: int, most_tokens: int, checkpoints: Path) -> None:
        self.rank, self.after, self.most_tokens = rank, after, most_tokens
        self.checkpoints = checkpoints

    def __call__(self) -> None:
        if os.environ["RANK"] != str(self.rank):
            return
        whole, passes = TextClassification.forward, 0

        def forward(task: Any, model: Any, batch: Any) -> Any:
            nonlocal passes
            passes += model.training
            if passes < self.after:
                return whole(task, model, batch)
            deadline = time.monotonic() + 60
            while not any(self.checkpoints.glob("*/manifest.json")):
                assert time.monotonic() < deadline, "no checkpoint before the pass"
                time.sleep(0.02)
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            limits = resource.getrlimit(resource.RLIMIT_AS)
            # Half a token more, for what else a pass takes.
            limit = used + self.most_tokens * BYTES_A_TOKEN + BYTES_A_TOKEN // 2
            resource.setrlimit(resource.RLIMIT_AS, (limit, limits[1]))
            try:
                tokens = batch["input_ids"].numel()
                held = torch.empty(tokens * BYTES_A_TOKEN, dtype=torch.uint8)
                del held
                return whole(task, model, batch)
            finally:
                resource.setrlimit(resource.RLIMIT_AS, limits)

        TextClassification.forward = forward  # type: ignore[method-assign]


def refuses(*, when: Callable[[Any, Any], bool]) -> Any:
    """A forward pass that the device has no memory for."""
    whole = TextClassification.forward

    def forward(task: Any, model: Any, batch: Any) -> Any:
        if when(model, batch):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return whole(task, model, batch)

    return forward


def shown(reader: RunReader, capsys: pytest.CaptureFixture[str]) -> str:
    import sys

    print_to(sys.stdout, status_renderable(read_status(reader)))
    return " ".join(capsys.readouterr().out.split())


def test_a_rank_without_memory_ends_the_attempt_and_the_next_one_takes_half(
    scene: Scene, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = scene.job(
        data={"lanes": 2},
        train={"log_rows": True},
        checkpoint={"every_steps": 3},
        model={"dropout": 0.0},
        batching={"max_tokens_per_microbatch": 96},
    )
    assert scene.train(alone, "calm").state is State.SUCCEEDED
    spec = alone.model_copy(update={"workers": alone.workers.model_copy(update={"count": 2})})
    checkpoints = scene.run_folder() / "checkpoints"
    before = RunsOut(rank=1, after=5, most_tokens=48, checkpoints=checkpoints)
    codes = break_group(assignment_of(spec, "run"), world_size=2, before=before)
    assert set(codes.values()) == {1}

    crash = RunReader(scene.runs, "run").crashes()[1]
    assert crash.failure.where.startswith("rank 1 ")
    assert crash.out_of_memory is not None
    assert crash.out_of_memory.rows > 1
    assert 48 < crash.out_of_memory.tokens <= 96
    half = crash.out_of_memory.tokens // 2

    outcome = run_ranks(assignment_of(spec, "run", generation=2), world_size=2, before=before)
    assert outcome is not None
    assert outcome.state is State.SUCCEEDED
    reader = RunReader(scene.runs, "run")
    assert [a.max_tokens_per_microbatch for a in reader.attempts()] == [None, half]
    assert reader.attempts()[1].restored_step == 3
    assert evidence.global_batches(scene.runs, "run") == evidence.global_batches(scene.runs, "calm")
    losses = evidence.losses(scene.runs, "run")
    assert losses == pytest.approx(evidence.losses(scene.runs, "calm"), rel=1e-3)
    assert any("broke off: rank 1 " in str(e["message"]) for e in reader.events())
    text = shown(reader, capsys)
    assert "broke off: rank 1 " in text
    assert f"micro-batches of {half} tokens at most" in text


def test_a_resume_keeps_the_halved_size(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where memory runs out in the evaluation before the first step, and twice."""
    spec = scene.job()
    sizes: list[int] = []

    def too_large(model: Any, batch: Any) -> bool:
        sizes.append(batch["input_ids"].numel())
        return sizes[-1] > 64

    monkeypatch.setattr(TextClassification, "forward", refuses(when=too_large))
    for generation in (1, 2):
        with pytest.raises(ClusterError, match="does not fit into memory") as raised:
            scene.train(spec, generation=generation)
        failure = Failure.of(raised.value, where="rank 0")
        assert (failure.state, failure.is_of_place) == (State.FAILED_RESOURCES, False)
    assert scene.train(spec, generation=3).state is State.SUCCEEDED
    limits = [a.max_tokens_per_microbatch for a in RunReader(scene.runs, "run").attempts()]
    assert limits[0] is None
    assert limits[1] is not None
    assert limits[2] is not None
    assert limits[2] <= limits[1] // 2 <= 64
    sizes.clear()
    assert scene.train(spec, generation=4).state is State.SUCCEEDED
    assert RunReader(scene.runs, "run").attempts()[-1].max_tokens_per_microbatch == limits[2]
    evaluate_run(scene.runs, "run", scene.data["test"], scene.folder / "predictions.parquet")
    assert max(sizes) <= limits[2]


def run_out() -> None:
    """Makes torch's own allocator fail, by a limit of the system."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**24, limits[1]))
    try:
        torch.empty(2**30, dtype=torch.uint8)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def runs_out_in_the_first_update() -> None:
    """On rank 1."""
    if os.environ["RANK"] == "1":
        loop.update = lambda *_, **__: run_out()


def test_memory_that_runs_out_in_an_update_ends_all_ranks_and_halves_too(scene: Scene) -> None:
    spec = scene.job(workers={"count": 2}, data={"lanes": 2}, train={"epochs": 1})
    codes = break_group(
        assignment_of(spec, "run"), world_size=2, before=runs_out_in_the_first_update, until=2
    )
    assert codes == {0: 1, 1: 1}
    crash = RunReader(scene.runs, "run").crashes()[1]
    assert crash.failure.where.startswith("rank 1 ")
    assert crash.out_of_memory is not None
    assert crash.out_of_memory.rows > 1
    outcome = run_ranks(assignment_of(spec, "run", generation=2), world_size=2)
    assert outcome is not None
    assert outcome.state is State.SUCCEEDED
    limit = RunReader(scene.runs, "run").attempts()[-1].max_tokens_per_microbatch
    assert limit == crash.out_of_memory.tokens // 2


def test_a_checkpoint_alone_knows_the_halved_size(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = scene.job()
    with monkeypatch.context() as patch:
        large = refuses(when=lambda model, batch: batch["input_ids"].numel() > 64)
        patch.setattr(TextClassification, "forward", large)
        for generation in (1, 2):
            with pytest.raises(ClusterError, match="does not fit into memory"):
                scene.train(spec, generation=generation)
        scene.train(spec, generation=3)
    *_, last = RunReader(scene.runs, "run").attempts()
    limit = last.max_tokens_per_microbatch
    assert limit is not None
    forgets = last.model_copy(update={"max_tokens_per_microbatch": None})
    scene.runs.write(scene.paths().attempt(last.attempt), forgets.to_bytes())
    scene.train(spec, generation=4)
    assert RunReader(scene.runs, "run").attempts()[-1].max_tokens_per_microbatch == limit


def test_memory_that_runs_out_for_a_checkpoint_is_recorded_as_such(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshot, "TensorFile", lambda *_: run_out())
    with pytest.raises(TrainingError, match="does not suffice for the model and its optimizer"):
        scene.train(scene.job())
    crash = RunReader(scene.runs, "run").crashes()[1]
    assert crash.out_of_memory is None
    assert crash.failure.state is State.FAILED_USER


def test_one_row_that_does_not_fit_ends_the_run_with_what_to_type(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver starts the group once more; that attempt ends before it prepares anything."""
    spec = scene.job(batching={"max_tokens_per_microbatch": 8})
    never = refuses(when=lambda model, batch: model.training)
    monkeypatch.setattr(TextClassification, "forward", never)
    with pytest.raises(TrainingError, match=r"one row, \d+ tokens, does not fit"):
        scene.train(spec)
    assignment = assignment_of(spec, "run", generation=2)
    again = type(assignment)(spec, "run", generation=1, controls_seen=0)
    with ProcessSession(use_gpu=False) as session:
        outcome = train_worker(session, again)
    assert outcome.state is State.FAILED_USER
    assert outcome.failure is not None
    assert "task.max_tokens, which is 32" in (outcome.failure.problems[0][1] or "")
    # A later driver may have more memory.
    monkeypatch.undo()
    monkeypatch.setenv("SHOAL_CACHE", str(scene.folder / "cache"))
    assert scene.train(spec, generation=2).state is State.SUCCEEDED


def test_a_model_without_room_ends_the_run_at_once(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(*_: object) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB.\nmore")

    monkeypatch.setattr(preparation, "build_optimizer", no_room)
    outcome = scene.train(scene.job())
    assert outcome.state is State.FAILED_USER
    assert outcome.failure is not None
    assert outcome.failure.problems[0][0].endswith("Tried to allocate 3.00 GiB.")


def test_an_evaluation_that_does_not_fit_here_says_so(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene.train(scene.job(train={"epochs": 1}))
    monkeypatch.setattr(TextClassification, "forward", refuses(when=lambda model, batch: True))
    with pytest.raises(EnvironmentFault, match="memory of this machine"):
        evaluate_run(scene.runs, "run", scene.data["test"], scene.folder / "predictions.parquet")


def test_the_largest_micro_batch_is_named_whichever_failed() -> None:
    lengths = np.array([4, 10, 10, 3, 9])
    with (
        pytest.raises(MicrobatchTooLarge) as raised,
        passes_over(lengths, Cutting(max_tokens=20, launch_tokens=1000)),
    ):
        raise MemoryError
    assert (raised.value.rows, raised.value.tokens) == (2, 20)


def test_errors_of_other_kinds_pass_through() -> None:
    with pytest.raises(RuntimeError, match="shape"), passes_over(np.array([3]), Cutting(8, 1)):
        raise RuntimeError("shape mismatch")


def test_what_the_allocators_of_torch_raise_is_known() -> None:
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(raised.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not is_out_of_memory(RuntimeError("memory format is not supported"))


def attempt(limit: int | None) -> Attempt:
    return Attempt(
        attempt=1, generation=1, world_size=1, restored_step=None, started_at=0.0,
        max_tokens_per_microbatch=limit,
    )  # fmt: skip


def crash(rows: int | None, tokens: int = 0) -> Crash:
    failure = Failure(state=State.FAILED_USER, problems=(("", None),))
    found = Microbatch(rows=rows, tokens=tokens) if rows is not None else None
    return Crash(attempt=1, failure=failure, out_of_memory=found)


def restored(limit: int | None) -> Manifest:
    return Manifest(
        step=1, attempt=1, generation=1, parent_step=None, created_at=0.0, parts=(), digests={},
        stream=StreamPosition(
            order_version=1, index_digest="d", lanes=1, window=1, seed=0, global_batch_size=8,
            epoch=0, next_item=0,
        ),
        max_tokens_per_microbatch=limit,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("last", "state", "broke_off", "limit"),
    [
        (None, None, None, None),
        (attempt(None), None, None, None),
        (attempt(64), None, None, 64),
        (attempt(999), None, None, None),
        (attempt(64), None, crash(None), 64),
        (attempt(None), None, crash(8, 250), 125),
        (attempt(None), None, crash(8, 100), 50),
        (attempt(64), None, crash(2, 64), 32),
        (attempt(64), None, crash(1, 90), 64),
        (None, restored(64), None, 64),
        (attempt(32), restored(64), None, 32),
        (attempt(None), restored(64), crash(8, 250), 32),
        (attempt(64), restored(None), None, 64),
    ],
)
def test_the_limit_halves_where_several_rows_did_not_fit(
    last: Attempt | None, state: Manifest | None, broke_off: Crash | None, limit: int | None
) -> None:
    """The job's own is 256."""
    assert microbatch_limit(last, state, broke_off, of_job=256) == limit


@pytest.mark.parametrize(
    ("last", "broke_off", "limit"),
    [
        (None, None, None),
        (attempt(None), None, None),
        (attempt(512), None, 512),
        (attempt(512), crash(8, 500), 250),
        (attempt(None), crash(8, 500), 250),  # while sizes were tried
        (attempt(None), crash(1, 90), None),
    ],
)
def test_a_size_that_was_found_or_did_not_fit_bounds_what_the_job_leaves_open(
    last: Attempt | None, broke_off: Crash | None, limit: int | None
) -> None:
    assert microbatch_limit(last, None, broke_off, of_job="auto") == limit


def pages_cleared(program: str) -> int:
    """Pages that the system gives a process that takes 64 MiB twenty times over."""
    code = f"""
import resource, torch
from trainers.memory import keep_freed_memory
{program}
torch.ones(2**24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    torch.ones(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    return int(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True).stdout)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="not glibc")
def test_memory_that_was_freed_is_kept_for_the_next_pass() -> None:
    assert pages_cleared("keep_freed_memory()") < pages_cleared("") / 2
