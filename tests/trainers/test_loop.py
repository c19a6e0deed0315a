"""The loop: when it evaluates, judges, commits and ends, and that all ranks do so together."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.numpy import load_file
from torch import nn

from cluster.folder import FolderStore
from cluster.storage import StorageError, Store
from jobs.errors import TrainingError
from jobs.record import Outcome, RunPaths, State
from jobs.spec import JobSpec
from tests.ranks import assignment_of, run_group
from tests.scene import Scene
from tests.tiny import prepare_rows, review_rows, tiny_reviews
from trainers import loop, worker
from trainers.agreement import Agreement, Decision
from trainers.buffers import KeptBuffers
from trainers.controls import ControlPoller, Requests
from trainers.data.items import Items
from trainers.data.stream import RankBatch
from trainers.loop import (
    Plan,
    Progress,
    advance,
    commit_is_due,
    evaluation_is_due,
    judge,
    require_few_skipped,
    train_step,
)
from trainers.optim import build_optimizer
from trainers.records import read_attempts, read_manifests
from trainers.stragglers import Stopwatch
from trainers.tasks.task import Evaluation
from trainers.tasks.text_classification import TextClassification

PLAN = Plan(num_rows=10, global_batch_size=4, epochs=2)


# ------------------------------------------------------------------------------ pure decisions


def batch(next_item: int) -> RankBatch:
    return RankBatch(
        epoch=0, first_item=0, next_item=next_item, rows=np.empty(0, np.int64), items=Items({})
    )


def test_a_plan_counts_the_steps_of_whole_epochs() -> None:
    assert (PLAN.steps_per_epoch, PLAN.total_steps) == (3, 6)
    assert Plan(num_rows=3, global_batch_size=4, epochs=2).total_steps == 2
    assert Plan(num_rows=8, global_batch_size=4, epochs=1).total_steps == 2


def test_progress_goes_through_an_epoch_and_into_the_next() -> None:
    first = advance(Progress(), batch(4), PLAN)
    assert first == Progress(step=1, next_item=4)
    last = advance(Progress(step=2, next_item=8), batch(10), PLAN)
    assert last == Progress(step=3, epoch=1, next_item=0)


def due(spec: JobSpec, count: int) -> list[int]:
    """Steps of an uninterrupted training that are evaluated."""
    progress, steps = Progress(), []
    for _ in range(count):
        progress = advance(progress, batch(min(10, progress.next_item + 4)), PLAN)
        if evaluation_is_due(spec, PLAN, progress):
            steps.append(progress.step)
    return steps


@pytest.mark.parametrize(
    ("every", "steps"), [(None, [3, 6]), (1, [1, 2, 3, 4, 5, 6]), (4, [4, 6]), (50, [6])]
)
def test_evaluations_come_at_their_interval_or_each_epoch_and_at_the_end(
    scene: Scene, every: int | None, steps: list[int]
) -> None:
    assert due(scene.job(train={"evaluate_every_steps": every}), 6) == steps


def judged(spec: JobSpec, values: list[float], *, metric: str = "f1") -> list[Progress]:
    progress, found = Progress(), []
    for step, value in enumerate(values, start=1):
        progress = dataclasses.replace(progress, step=step)
        progress = judge(spec, progress, Evaluation(metrics={metric: value}, rows=1))
        found.append(progress)
    return found


def stopping(scene: Scene, **keys: Any) -> JobSpec:
    return scene.job(train={"early_stopping": keys})


def test_the_best_is_the_first_of_equals_and_bad_evaluations_are_counted(scene: Scene) -> None:
    found = judged(stopping(scene, patience=2), [0.5, 0.5, 0.7, 0.6, 0.6])
    assert [p.best_step for p in found] == [1, 1, 3, 3, 3]
    assert [p.bad_evaluations for p in found] == [0, 1, 0, 1, 2]
    assert [p.finished for p in found] == [False, False, False, False, True]


def test_without_patience_the_metric_only_tells_the_best(scene: Scene) -> None:
    found = judged(stopping(scene, patience=None), [0.5, 0.7, *[0.6] * 9])
    assert found[-1].best_step == 2
    assert not any(p.finished for p in found)


def test_a_change_up_to_min_delta_is_no_improvement(scene: Scene) -> None:
    found = judged(stopping(scene, min_delta=0.25, patience=9), [0.25, 0.5, 0.625])
    assert [p.best_step for p in found] == [1, 1, 3]


def test_smaller_is_better_where_the_job_says_so(scene: Scene) -> None:
    spec = stopping(scene, metric="validation/loss", mode="min", patience=9)
    found = judged(spec, [2.0, 3.0, 1.0], metric="loss")
    assert [p.best_step for p in found] == [1, 1, 3]


def test_without_early_stopping_the_lowest_loss_is_the_best_and_nothing_ends(scene: Scene) -> None:
    found = judged(scene.job(), [1.0] + [2.0] * 50, metric="loss")
    assert found[-1].best_step == 1
    assert not found[-1].finished


def test_without_an_evaluation_nothing_is_judged(scene: Scene) -> None:
    assert judge(scene.job(), Progress(step=4), None) == Progress(step=4)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_metric_that_is_not_finite_ends_training(scene: Scene, value: float) -> None:
    with pytest.raises(TrainingError, match="step 1: validation/loss is"):
        judged(scene.job(), [value], metric="loss")


def test_commits_come_at_their_interval_at_every_improvement_and_at_the_end(scene: Scene) -> None:
    spec = scene.job(checkpoint={"every_steps": 5})
    assert not commit_is_due(spec, Progress(step=4, best_step=3))
    assert commit_is_due(spec, Progress(step=5))
    assert commit_is_due(spec, Progress(step=4, best_step=4))
    assert commit_is_due(spec, Progress(step=4, finished=True))


def test_too_many_skipped_steps_in_a_row_are_told_with_the_last() -> None:
    require_few_skipped(5, limit=5, step=7, norm=math.inf)
    with pytest.raises(TrainingError, match=r"step 7: the gradient is not finite \(norm inf\)$"):
        require_few_skipped(1, limit=0, step=7, norm=math.inf)
    with pytest.raises(TrainingError, match="as in the 5 steps before") as raised:
        require_few_skipped(6, limit=5, step=7, norm=math.nan)
    assert "optimizer.learning_rate" in str(raised.value.problems[0].hint)


# -------------------------------------------------------------------------------- whole runs


def steps_saved(scene: Scene, run_id: str = "run") -> list[int]:
    return [m.step for m in read_manifests(scene.runs, RunPaths(run_id))]


def weights(scene: Scene, run_id: str = "run") -> dict[str, bytes]:
    last = read_manifests(scene.runs, RunPaths(run_id))[-1]
    folder = scene.runs_folder / RunPaths(run_id).checkpoint(last.name)
    return {
        f"{name}/{key}": value.tobytes()
        for name in ("model/model.safetensors", "optimizer.safetensors")
        for key, value in load_file(folder / name).items()
    }


def lines(scene: Scene, kind: str, run_id: str = "run") -> list[dict[str, Any]]:
    store = scene.runs
    return [
        json.loads(text)
        for head in store.list(f"{run_id}/{kind}/")
        for text in store.read(head.key).splitlines()
    ]


def same_on_all(outcomes: list[Outcome]) -> Outcome:
    """Rank 0's outcome, which must be that of all ranks but for where their time went."""
    first, *others = (o.model_copy(update={"seconds": {}}) for o in outcomes)
    assert all(other == first for other in others)
    return first


def test_a_run_learns_and_tells_what_it_did(scene: Scene) -> None:
    train = scene.data["train"]
    spec = scene.job(
        data={"validation": train, "test": train},
        train={"epochs": 12, "log_every_steps": 8},
        model={"dropout": 0.0},
        optimizer={"schedule": "constant"},
    )
    outcome = scene.train(spec)
    assert outcome.state is State.SUCCEEDED
    assert outcome.test is not None
    assert outcome.before is not None
    assert outcome.tested_on == "test"
    assert outcome.before["metrics"]["accuracy"] < 0.8 < outcome.test["metrics"]["accuracy"]
    assert outcome.test["rows"] == 40
    told = [line for line in lines(scene, "metrics") if line["kind"] == "train"]
    assert [line["step"] for line in told] == [*range(8, 57, 8), 60]
    assert [line["rows"] for line in told] == [64] * 7 + [32]
    assert told[-1]["loss"] < told[0]["loss"]
    for seconds in (told[-1]["seconds"], outcome.seconds):
        assert seconds["other"] <= 0.02 * sum(seconds.values())
    evaluations = [line for line in lines(scene, "metrics") if line["kind"] == "evaluation"]
    assert [(e["step"], e["split"]) for e in evaluations] == [
        (0, "test"), *((step, "validation") for step in range(5, 61, 5))
    ]  # fmt: skip


def test_early_stopping_ends_with_the_best_model(scene: Scene) -> None:
    stop = {"metric": "validation/loss", "mode": "min", "patience": 2, "min_delta": 100.0}
    spec = scene.job(
        train={"epochs": 9, "evaluate_every_steps": 1, "early_stopping": stop},
        checkpoint={"every_steps": 1, "keep_last": 1},
    )
    outcome = scene.train(spec)
    assert outcome.state is State.SUCCEEDED
    assert outcome.step == 3
    assert outcome.best_step == 1
    assert outcome.test is not None
    assert outcome.test["step"] == 1
    assert steps_saved(scene) == [1, 3]
    assert read_manifests(scene.runs, scene.paths())[-1].is_last_step


class PoisonedLoss:
    """On one rank the losses of the n-th micro-batch and of those up to the last are infinite."""

    def __init__(self, *, rank: int, count: int, last: int | None = None) -> None:
        self.rank = rank
        self.count = count
        self.last = last or count

    def __call__(self) -> None:
        if int(os.environ.get("RANK", "0")) != self.rank:
            return
        whole, calls = TextClassification.loss, 0
        run, is_training = TextClassification.forward, False

        def forward(task: Any, model: nn.Module, rows: Any) -> torch.Tensor:
            nonlocal is_training
            is_training = model.training
            return run(task, model, rows)

        def loss(task: Any, output: torch.Tensor, rows: Any) -> torch.Tensor:
            nonlocal calls
            calls += is_training
            found = whole(task, output, rows)
            return found * math.inf if self.count <= calls <= self.last else found

        TextClassification.loss = loss  # type: ignore[method-assign]
        TextClassification.forward = forward  # type: ignore[method-assign]


class SkipsStep:
    """The update of step `number` is skipped, whatever its gradient."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __call__(self) -> None:
        whole, calls = loop.update, 0

        def update(optimizer: torch.optim.Optimizer, *, skipped: torch.Tensor) -> None:
            nonlocal calls
            calls += 1
            whole(optimizer, skipped=torch.ones(()) if calls == self.number else skipped)

        loop.update = update


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_gradient_that_is_not_finite_is_skipped_on_all_ranks_and_recorded(
    scene: Scene, world_size: int
) -> None:
    spec = scene.job(
        workers={"count": world_size},
        checkpoint={"every_steps": 4},
        data={"lanes": 6},
        batching={"max_tokens_per_microbatch": 999},
    )
    poisoned = PoisonedLoss(rank=world_size - 1, count=4)
    same_on_all(run_group(assignment_of(spec, "run"), world_size=world_size, before=poisoned))
    told = SkipsStep(4)
    same_on_all(run_group(assignment_of(spec, "calm"), world_size=world_size, before=told))
    assert weights(scene) == weights(scene, "calm")
    [skipped] = [line for line in lines(scene, "metrics") if line["kind"] == "skipped"]
    assert {key: skipped[key] for key in ("step", "epoch", "first_item", "next_item", "norm")} == {
        "step": 4, "epoch": 0, "first_item": 24, "next_item": 32, "norm": "nan"
    }  # fmt: skip
    [event] = [line for line in lines(scene, "events") if line["event"] == "skipped"]
    assert event["step"] == 4
    trained = [line for line in lines(scene, "metrics") if line["kind"] == "train"]
    assert [line["step"] for line in trained if line["loss"] is None] == [4]
    assert all(math.isfinite(line["loss"]) for line in trained if line["step"] != 4)


def test_skipped_steps_in_a_row_are_counted_over_a_resume(scene: Scene) -> None:
    """Two are allowed: one is skipped before the stop, two after it."""
    spec = scene.job(train={"max_skipped_in_a_row": 2}, checkpoint={"every_steps": 100})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TextClassification, "loss", TextClassification.loss)
        patch.setattr(TextClassification, "forward", TextClassification.forward)
        PoisonedLoss(rank=0, count=3)()
        hear(patch, stop_at=4)
        stopped = scene.train(spec)
    assert (stopped.state, stopped.step) == (State.STOPPED, 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TextClassification, "loss", TextClassification.loss)
        patch.setattr(TextClassification, "forward", TextClassification.forward)
        PoisonedLoss(rank=0, count=1, last=2)()
        outcome = scene.train(spec, generation=2)
    assert outcome.state is State.FAILED_USER
    assert outcome.failure is not None
    assert "step 5: the gradient is not finite" in outcome.failure.problems[0][0]
    skipped = [line["step"] for line in lines(scene, "metrics") if line["kind"] == "skipped"]
    assert skipped == [3, 4, 5]
    assert scene.train(spec, generation=3).state is State.SUCCEEDED, "nothing was saved of it"


def test_statistics_of_a_skipped_batch_are_forgotten(scene: Scene) -> None:
    trainee = scene.trainee(scene.job())
    with_norm = nn.Sequential(trainee.model.classifier, nn.BatchNorm1d(2))
    trainee.model.classifier = with_norm
    trainee.model.train()
    optimizer = build_optimizer(trainee.model, scene.job().optimizer)
    trainee = replace(trainee, optimizer=optimizer)
    task = trainee.task
    items = task.encode(
        pa.table({"text": ["good", "bad day"], "label": ["positive", "negative"]}), 0
    )
    rows = RankBatch(epoch=0, first_item=0, next_item=2, rows=np.arange(2), items=items)
    buffers = KeptBuffers(trainee.model)
    states = []
    for weight in (2.0, math.nan, 2.0):
        decision = Decision(weight, 1, stop=False, save=False, yields=False, failed=False)
        facts = train_step(
            scene.job(), PLAN, trainee, rows, [task.collate(items)], decision,
            computed_tokens=0, step=0, buffers=buffers, agreement=Agreement(rank=0, world_size=1),
            stopwatch=Stopwatch(trainee.model, trainee.device),
        )  # fmt: skip
        assert bool(facts.skipped) == math.isnan(weight)
        states.append({k: v.numpy().tobytes() for k, v in trainee.model.state_dict().items()})
    assert states[0] == states[1]
    assert states[1] != states[2]
    assert int(with_norm[1].num_batches_tracked) == 2


def test_a_state_is_not_committed_before_the_record_of_its_skipped_steps(scene: Scene) -> None:
    """The store refuses lines of metrics from the first step on: no manifest appears."""
    whole = FolderStore.write

    def write(store: Store, key: str, data: bytes) -> str:
        if "/metrics/" in key:
            raise StorageError("the store is away")
        return whole(store, key, data)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FolderStore, "write", write)
        scene.train(scene.job())
    assert steps_saved(scene) == []


def test_a_gradient_that_may_not_be_skipped_ends_all_ranks_and_keeps_the_last_good_checkpoint(
    scene: Scene,
) -> None:
    train = {"max_skipped_in_a_row": 0}
    spec = scene.job(workers={"count": 2}, checkpoint={"every_steps": 2}, train=train)
    outcomes = run_group(
        assignment_of(spec, "run"), world_size=2, before=PoisonedLoss(rank=1, count=4)
    )
    outcome = same_on_all(
        [o.model_copy(update={"failure": o.failure and o.failure.model_copy(update={"where": ""})})
         for o in outcomes]
    )  # fmt: skip
    assert outcome.state is State.FAILED_USER
    assert outcome.failure is not None
    assert outcome.failure.exit_code == 1
    assert "step 4: the gradient is not finite" in outcome.failure.problems[0][0]
    assert outcome.step == 3
    assert steps_saved(scene) == [2]
    assert json.loads(scene.runs.read(scene.paths().outcome(1)))["state"] == "FAILED_USER"


def test_a_validation_that_is_not_finite_ends_the_run_without_a_checkpoint_of_it(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = worker._Rank._measure

    def measured(rank: Any, model: Any, data: Any) -> Evaluation:
        found = whole(rank, model, data)
        metrics = found.metrics | ({"loss": math.nan} if rank._step == 10 else {})
        return dataclasses.replace(found, metrics=metrics)

    monkeypatch.setattr(worker._Rank, "_measure", measured)
    outcome = scene.train(scene.job())
    assert outcome.state is State.FAILED_USER
    assert outcome.failure is not None
    assert outcome.failure.problems[0][0] == "step 10: validation/loss is nan"
    assert steps_saved(scene) == [5]


def test_a_signal_commits_and_stops_and_the_run_goes_on_to_the_same_bits(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = scene.job(checkpoint={"every_steps": 100})
    scene.train(spec, "calm")
    whole = worker._Rank.stepped

    def stepped(rank: Any, rows: RankBatch, progress: Progress) -> None:
        whole(rank, rows, progress)
        if progress.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(worker._Rank, "stepped", stepped)
        stopped = scene.train(spec)
    assert stopped.state is State.STOPPED
    assert stopped.step == 4, "the step under way is finished"
    assert steps_saved(scene) == [4]
    outcome = scene.train(spec, generation=2)
    assert outcome.state is State.SUCCEEDED
    assert [a.restored_step for a in read_attempts(scene.runs, scene.paths())] == [None, 4]
    assert weights(scene) == weights(scene, "calm")
    assert outcome.before is not None


def hear(
    monkeypatch: pytest.MonkeyPatch, *, stop_at: int = 99, save_at: int = 99, yield_at: int = 99
) -> None:
    """Requests are heard when the poller is asked for the n-th time."""
    calls = 0

    def take(_: ControlPoller) -> Requests:
        nonlocal calls
        calls += 1
        return Requests(stop=calls >= stop_at, save=calls == save_at, yields=calls >= yield_at)

    monkeypatch.setattr(ControlPoller, "take", take)


def test_an_attempt_that_gives_way_has_saved_and_the_next_goes_on_from_there(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = scene.job(checkpoint={"every_steps": 100})
    scene.train(spec, "calm")
    with monkeypatch.context() as patch:
        hear(patch, yield_at=5)
        outcome = scene.train(spec)
    assert outcome.state == "RECOVERING"
    assert outcome.step == 4
    assert scene.train(spec, generation=2).state == "SUCCEEDED"
    assert [a.restored_step for a in read_attempts(scene.runs, scene.paths())] == [None, 4]
    assert weights(scene) == weights(scene, "calm")


def test_a_request_to_save_commits_once(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    hear(monkeypatch, save_at=4)
    spec = scene.job(checkpoint={"every_steps": 100, "keep_last": 9})
    assert scene.train(spec).state is State.SUCCEEDED
    assert steps_saved(scene)[0] == 3
    saved = [e["step"] for e in lines(scene, "events") if e["event"] == "checkpoint"]
    assert saved == steps_saved(scene)


def test_a_request_to_stop_before_the_first_step_is_heeded(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    hear(monkeypatch, stop_at=1)
    outcome = scene.train(scene.job())
    assert (outcome.state, outcome.step) == (State.STOPPED, 0)
    assert steps_saved(scene) == []
    monkeypatch.undo()


def test_a_stop_at_a_committed_step_commits_nothing_more(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    hear(monkeypatch, stop_at=6)
    outcome = scene.train(scene.job(checkpoint={"every_steps": 5}))
    assert (outcome.state, outcome.step) == (State.STOPPED, 5)
    [manifest] = read_manifests(scene.runs, scene.paths())
    assert manifest.evaluation, "the commit of the evaluation was not replaced"


def test_a_run_that_has_ended_is_only_tested_again(scene: Scene) -> None:
    first = scene.train(scene.job())
    again = scene.train(scene.job(), generation=2)
    assert (again.state, again.step, again.test) == (State.SUCCEEDED, 10, first.test)


def test_more_epochs_train_on_from_the_end(scene: Scene) -> None:
    scene.train(scene.job(train={"epochs": 1}))
    outcome = scene.train(scene.job(train={"epochs": 2}), generation=2)
    assert (outcome.state, outcome.step) == (State.SUCCEEDED, 10)
    assert read_attempts(scene.runs, scene.paths())[-1].restored_step == 5


def test_fewer_rows_than_ranks_train_and_evaluate(scene: Scene) -> None:
    data = tiny_reviews(str(scene.folder / "few"), rows=2, rows_per_group=1, held_out=2)
    spec = scene.job(data={**data, "lanes": 3}, workers={"count": 3}, train={"epochs": 3})
    outcome = same_on_all(run_group(assignment_of(spec, "run"), world_size=3))
    assert (outcome.state, outcome.step) == (State.SUCCEEDED, 3)
    assert outcome.test is not None
    assert outcome.test["rows"] == 2


# ------------------------------------------------------------------------------------ bad data


def test_a_shard_that_was_changed_ends_all_ranks_with_what_was_trained_saved(
    scene: Scene,
) -> None:
    train = prepare_rows(
        str(scene.folder / "damaged"), review_rows(40), rows_per_group=2, rows_per_shard=8
    )
    shard = sorted(Path(train).glob("shard-*.parquet"))[-1]
    content = bytearray(shard.read_bytes())
    content[len(content) // 3] ^= 1
    shard.write_bytes(content)
    spec = scene.job(
        data={"train": train, "lanes": 2, "window": 1, "seed": 3},
        workers={"count": 2},
        batching={"global_batch_size": 4},
        checkpoint={"every_steps": 100},
    )
    outcome = same_on_all(run_group(assignment_of(spec, "run"), world_size=2))
    assert outcome.state is State.FAILED_USER
    assert outcome.failure is not None
    assert outcome.failure.exit_code == 2
    assert shard.name in outcome.failure.problems[0][0]
    assert 0 < outcome.step < 10
    assert steps_saved(scene) == [outcome.step]


def test_a_label_outside_the_list_names_its_row(scene: Scene) -> None:
    outcome = scene.train(scene.job(task={"labels": ["negative", "neutral"]}))
    assert outcome.failure is not None
    assert outcome.failure.exit_code == 2
    [[message, hint]] = outcome.failure.problems
    assert "the label column label holds 'positive', which is none of negative, neutral" in message
    assert message.startswith("row ")
    assert "task.labels" in str(hint)


@pytest.mark.parametrize(
    ("column", "said"),
    [
        ("comment", "the text column comment is null"),
        ("number", "the text column number holds int64"),
        ("nothing", "nothing"),
    ],
)
def test_a_column_that_holds_no_text_is_named(scene: Scene, column: str, said: str) -> None:
    rows = [{**row, "comment": "x" if row["number"] % 3 else None} for row in review_rows(9)]
    train = prepare_rows(str(scene.folder / "set"), rows, rows_per_group=4)
    data = {"train": train, "validation": None, "test": None}
    outcome = scene.train(scene.job(data=data, task={"text": column}))
    assert outcome.state is State.FAILED_USER
    assert outcome.failure is not None
    assert outcome.failure.exit_code == 2
    assert said in outcome.failure.problems[0][0]


def test_a_validation_set_that_lacks_a_column_ends_all_ranks(scene: Scene) -> None:
    rows = [{"text": row["text"], "mark": row["label"]} for row in review_rows(9)]
    other = prepare_rows(str(scene.folder / "set"), rows, rows_per_group=4)
    spec = scene.job(data={"validation": other}, workers={"count": 2})
    outcome = same_on_all(run_group(assignment_of(spec, "run"), world_size=2))
    assert outcome.failure is not None
    assert outcome.failure.exit_code == 2
    assert "label" in outcome.failure.problems[0][0]
