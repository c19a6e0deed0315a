"""The training loop: pure torch, no Ray, no storage.

    train           steps, evaluations and commits in their one order, to the end or to a request
      train_step    micro-batches, backward passes, clipping, optimizer

What the loop needs from outside it gets as functions: rows, evaluation, commit, and where to tell
what happened.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

import torch
from torch import nn

from jobs.errors import Problem, TrainingError
from jobs.spec import JobSpec, Plateau
from trainers import watchdog
from trainers.agreement import AgreedFailure, Agreement, Decision, PendingDecision, Vote
from trainers.assignment import EvaluationReport, TrialPlan, Verdict
from trainers.buffers import KeptBuffers, SharedStatistics
from trainers.data.lanes import NotNeeded
from trainers.data.partition import ItemKeys, rank_positions
from trainers.data.stream import RankBatch
from trainers.evaluation import BrokenOff, move
from trainers.memory import passes_over
from trainers.microbatch import Cutting, computed_tokens, cut_microbatches
from trainers.optim import (
    clear_gradients,
    gradient_norm,
    learning_rate,
    set_learning_rate,
    update,
)
from trainers.parallel import (
    autocast,
    plain,
    seed_generators,
    trained_parameters,
    without_reduction,
)
from trainers.stragglers import Busy, Stopwatch
from trainers.tasks.task import Batch, Evaluation, Task
from trainers.time_account import TimeAccount

if TYPE_CHECKING:
    from trainers.controls import Requests

_DIVERGED_HINT = (
    "lower optimizer.learning_rate, set optimizer.max_grad_norm, or use model.precision float32; "
    "the last good checkpoint is kept"
)


class Ending(StrEnum):
    """Why `train` returned."""

    FINISHED = "finished"
    """All epochs are done, or early stopping ended them."""
    STOPPED = "stopped"
    """On request; the state is committed."""
    YIELDED = "yielded"
    """To another attempt, which goes on from the state that is committed."""
    PRUNED = "pruned"
    """By the study of which this is a trial; nothing is committed for that."""
    FAILED = "failed"
    """A rank cannot read its rows; what was trained is committed."""


@dataclass(frozen=True)
class Progress:
    """How far training is; with the weights and the optimizer's state, all that a resume needs."""

    step: int = 0
    """Optimizer steps done."""
    epoch: int = 0
    next_item: int = 0
    """First position of `epoch` that no step has used."""
    best_step: int | None = None
    best_value: float | None = None
    bad_evaluations: int = 0
    """Evaluations in a row that brought no improvement."""
    skipped_in_a_row: int = 0
    """Last steps, one after the other, that were skipped: their gradient was not finite."""
    evaluation_pending: bool = False
    """Whether the evaluation after the last step is still to be made: it was broken off."""
    finished: bool = False
    best_score: float | None = None
    """Of a trial: the best that an evaluation found of its study's metric."""
    plateau_value: float | None = None
    """With optimizer.schedule plateau: the best that evaluations found by its own min_delta."""
    plateau_evaluations: int = 0
    """Evaluations in a row without improvement since the learning rate was lowered last."""
    rate_reductions: int = 0
    """How often it was lowered."""


@dataclass(frozen=True)
class Plan:
    """How long training is; a pure function of the job and the number of rows."""

    num_rows: int
    global_batch_size: int
    epochs: int
    epoch_items: tuple[int, ...] | None = None
    """With weighted sampling: the items of each epoch. None: each epoch has each row once."""

    def items_of(self, epoch: int) -> int:
        """Positions of an epoch."""
        return self.num_rows if self.epoch_items is None else self.epoch_items[epoch]

    @property
    def steps_per_epoch(self) -> int:
        """Of weighted sampling the mean, rounded."""
        if self.epoch_items is not None:
            return max(1, round(self.total_steps / self.epochs))
        return math.ceil(self.num_rows / self.global_batch_size)

    @property
    def total_steps(self) -> int:
        steps = (math.ceil(self.items_of(n) / self.global_batch_size) for n in range(self.epochs))
        return sum(steps)

    def epochs_done(self, progress: Progress) -> float:
        """The epochs up to there, the last one in part."""
        if self.epoch_items is None:
            return progress.step / self.steps_per_epoch
        if progress.epoch >= self.epochs:
            return float(progress.epoch)
        return progress.epoch + progress.next_item / self.items_of(progress.epoch)


@dataclass(frozen=True)
class Trainee:
    """The model in training and what trains it."""

    task: Task
    model: nn.Module
    optimizer: torch.optim.Optimizer
    device: torch.device
    dtype: torch.dtype
    """What autocast computes in; float32 for a model that is cut over the ranks, which casts by
    itself."""

    @cached_property
    def trained(self) -> list[nn.Parameter]:
        """Parameters of the model that require a gradient."""
        return trained_parameters(plain(self.model))


@dataclass(frozen=True)
class StepFacts:
    """What is worth telling about the steps since the last entry, over all ranks."""

    progress: Progress
    loss: float | None
    """Mean over the steps that were not skipped; None where all were."""
    learning_rate: float
    grad_norm: float | None
    """Of the last step that was not skipped."""
    rows: int
    tokens: int
    """Without padding."""
    computed_tokens: int
    """With it, where it goes through the layers."""
    imbalance: float
    """Share of the steps in which the mean rank waits for the one whose micro-batches cost most."""
    steps: int
    busy: tuple[Busy, ...]
    """Of each rank, by rank: its own work in these steps, without waiting for other ranks."""


@dataclass(frozen=True)
class SkippedStep:
    """A step without an update; its rows are used up like those of any other."""

    step: int
    epoch: int
    first_item: int
    next_item: int
    """The rows at the positions first_item..next_item of the epoch have taught nothing."""
    norm: float
    """Norm of the gradient, over all ranks: infinite or not a number."""


class Surroundings(Protocol):
    """The loop's outside. Every method is called by all ranks at the same points."""

    def rows(self, progress: Progress) -> Iterator[RankBatch]:
        """This rank's batches from `progress` to the end of its epoch.

        Raises NotNeeded where this rank waits for one, and hears that the attempt is to end: what
        `requests` says from then on.
        """
        ...

    def evaluate(self, progress: Progress) -> Evaluation | None:
        """The validation metrics of the model as it is; None without a validation set.

        Raises BrokenOff where the attempt is asked to end meanwhile, and AgreedFailure where a rank
        cannot go on.
        """
        ...

    def decide(self, report: EvaluationReport) -> Verdict:
        """Whether a trial goes on, as its study says; the same on all ranks."""
        ...

    def commit(self, progress: Progress, evaluation: Evaluation | None) -> None:
        """Makes the state durable, or begins to."""
        ...

    def stepped(self, batch: RankBatch, progress: Progress) -> None:
        """A step is done; `progress` stands after it."""
        ...

    def skipped(self, step: SkippedStep) -> None:
        """A step has changed nothing. Told before a state that contains it is committed."""
        ...

    def tell(self, facts: StepFacts) -> None:
        """Another `log_every_steps` steps are done."""
        ...

    def requests(self) -> Requests:
        """What was asked for on this rank since the last call."""
        ...


def train(
    spec: JobSpec,
    plan: Plan,
    trainee: Trainee,
    progress: Progress,
    around: Surroundings,
    *,
    agreement: Agreement,
    time: TimeAccount,
    trial: TrialPlan | None = None,
) -> tuple[Ending, Progress, Exception | None]:
    """Trains from `progress` on; returns how it ended, where, and this rank's error if it has one,
    or that of all in an evaluation.

    The order at a step: step, evaluation, early stopping, the study's verdict on a trial, commit.
    All that a decision depends on is committed with it, so a run killed anywhere takes the same
    decisions when it is resumed. Requests are heeded between two steps, at the same step on all
    ranks, and in evaluations: one that is broken off is the first thing that the next attempt does.

    A step whose gradient is not finite is skipped. Raises TrainingError, on all ranks at the same
    step, when too many in a row are, or when what was measured is not finite; the state is not
    committed then. Raises MicrobatchTooLarge, on one rank while the others wait for it, where the
    memory of that rank runs out.

    `time` counts as `compute` what is no wait, save or evaluation: the caller has opened that span.
    """
    trainee.model.train()  # pretrained models come with their dropout switched off
    feed = _Feed(spec, plan, trainee.task, around, agreement=agreement, time=time)
    buffers = KeptBuffers(plain(trainee.model))
    statistics = SharedStatistics(plain(trainee.model), world_size=agreement.world_size)
    stopwatch = Stopwatch(trainee.model, trainee.device)
    window = _Window(spec.train.max_skipped_in_a_row, stopwatch, time)
    committed_step = progress.step
    if progress.evaluation_pending:
        progress, evaluation, ending, failure = _evaluate(spec, plan, progress, around, trial)
        saves = ending is Ending.YIELDED or commit_is_due(spec, progress)
        if saves and not progress.evaluation_pending:
            around.commit(progress, evaluation)
        if ending is not None:
            return ending, progress, failure
    coming = None if progress.finished else feed.next_after(progress)
    while coming is not None:
        with time.spent("synchronisation"):
            decision = coming.pending.wait()
        ends = decision.failed or decision.stop or decision.yields
        if ends or decision.save:
            if committed_step != progress.step:
                progress = window.look(progress, around)
                around.commit(progress, None)
                committed_step = progress.step
            if ends:
                window.tell(around, agreement, time)
            if decision.failed:
                return Ending.FAILED, progress, coming.error
            if decision.stop:
                return Ending.STOPPED, progress, None
            if decision.yields:
                return Ending.YIELDED, progress, None

        assert coming.batch is not None  # a rank without rows has an empty batch, not none
        advanced = advance(progress, coming.batch, plan)
        following = feed.next_after(advanced)
        watchdog.tick(f"step {advanced.step}")
        is_told = advanced.step % spec.train.log_every_steps == 0
        is_told = is_told or advanced.step == plan.total_steps
        is_evaluated = evaluation_is_due(spec, plan, advanced)
        facts = train_step(
            spec, plan, trainee, coming.batch, coming.microbatches, decision,
            computed_tokens=coming.computed_tokens, step=progress.step,
            reductions=progress.rate_reductions, buffers=buffers, agreement=agreement,
            stopwatch=stopwatch,
        )  # fmt: skip
        statistics.average()
        progress = advanced
        window.add(facts, coming.batch, progress)
        # On a GPU looking at each step would wait for it; what comes now waits anyway.
        if is_told or is_evaluated or trainee.device.type == "cpu":
            progress = window.look(progress, around)
        around.stepped(coming.batch, progress)
        if is_told:
            window.tell(around, agreement, time)

        evaluation, ending, failure = None, None, None
        if is_evaluated:
            progress, evaluation, ending, failure = _evaluate(spec, plan, progress, around, trial)
        if ending not in (None, Ending.PRUNED) or commit_is_due(spec, progress):
            progress = window.look(progress, around)
            around.commit(progress, evaluation)
            committed_step = progress.step
        is_over = progress.finished or ending is not None
        if is_over and following is not None:
            with time.spent("synchronisation"):
                following.pending.wait()
            window.tell(around, agreement, time)
        if ending is not None:
            return ending, progress, failure
        coming = None if progress.finished else following
    return Ending.FINISHED, progress, None


def _evaluate(
    spec: JobSpec, plan: Plan, progress: Progress, around: Surroundings, trial: TrialPlan | None
) -> tuple[Progress, Evaluation | None, Ending | None, AgreedFailure | None]:
    """The progress after the evaluation at its step, and why training ends there: the evaluation
    was broken off, by a request or a failure, or a trial is not to go on."""
    pending = replace(progress, evaluation_pending=True)
    try:
        evaluation = around.evaluate(progress)
    except BrokenOff as broken:
        ending = Ending.STOPPED if broken.stops else Ending.YIELDED
        return pending, None, ending, None
    except AgreedFailure as failure:
        return pending, None, Ending.FAILED, failure
    progress = judge(spec, replace(progress, evaluation_pending=False), evaluation)
    if progress.step == plan.total_steps:
        progress = replace(progress, finished=True)
    if trial is None or evaluation is None:
        return progress, evaluation, None, None
    progress, report = score(trial, plan, progress, evaluation)
    verdict = around.decide(report)
    if progress.finished or verdict is Verdict.GO_ON:
        return progress, evaluation, None, None
    ending = Ending.YIELDED if verdict is Verdict.PAUSE else Ending.PRUNED
    return progress, evaluation, ending, None


# ------------------------------------------------------------------------------ pure decisions


def advance(progress: Progress, batch: RankBatch, plan: Plan) -> Progress:
    """The progress after the step that uses `batch`."""
    done = batch.next_item >= plan.items_of(progress.epoch)
    return replace(
        progress,
        step=progress.step + 1,
        epoch=progress.epoch + 1 if done else progress.epoch,
        next_item=0 if done else batch.next_item,
    )


def evaluation_is_due(spec: JobSpec, plan: Plan, progress: Progress) -> bool:
    """Each `evaluate_every_steps`, else at the end of each epoch; and after the last step."""
    every = spec.train.evaluate_every_steps
    if progress.step == plan.total_steps:
        return True
    return progress.next_item == 0 if every is None else progress.step % every == 0


def judge(spec: JobSpec, progress: Progress, evaluation: Evaluation | None) -> Progress:
    """The progress with what an evaluation means for the best model and for early stopping.

    Raises TrainingError where a metric is not finite: the model is destroyed.
    """
    if evaluation is None:
        return progress
    for name, value in evaluation.metrics.items():
        if not math.isfinite(value):
            raise TrainingError(
                Problem(f"step {progress.step}: validation/{name} is {value}", _DIVERGED_HINT)
            )
    metric, mode, min_delta = spec.best
    value = evaluation.metrics[metric.removeprefix("validation/")]
    sign = 1.0 if mode == "max" else -1.0
    if spec.optimizer.schedule == "plateau":
        progress = lower_rate(spec.optimizer.plateau, progress, value, sign=sign)
    if progress.best_value is None or sign * (value - progress.best_value) > min_delta:
        return replace(progress, best_step=progress.step, best_value=value, bad_evaluations=0)
    bad = progress.bad_evaluations + 1
    return replace(progress, bad_evaluations=bad, finished=stops_early(spec, bad))


def lower_rate(plateau: Plateau, progress: Progress, value: float, *, sign: float) -> Progress:
    """The progress with what an evaluation means for the learning rate; `sign`: 1 where larger
    values are better, else -1."""
    best = progress.plateau_value
    if best is None or sign * (value - best) > plateau.min_delta:
        return replace(progress, plateau_value=value, plateau_evaluations=0)
    waited = progress.plateau_evaluations + 1
    if waited < plateau.patience:
        return replace(progress, plateau_evaluations=waited)
    return replace(progress, plateau_evaluations=0, rate_reductions=progress.rate_reductions + 1)


def stops_early(spec: JobSpec, bad_evaluations: int) -> bool:
    """Whether so many evaluations in a row without improvement end the training."""
    stopping = spec.train.early_stopping
    patience = None if stopping is None else stopping.patience
    return patience is not None and bad_evaluations >= patience


def score(
    trial: TrialPlan, plan: Plan, progress: Progress, evaluation: Evaluation
) -> tuple[Progress, EvaluationReport]:
    """The progress with the best that the study's metric has been, and what the study is told."""
    value = evaluation.metrics[trial.metric.removeprefix("validation/")]
    known = [value] if progress.best_score is None else [value, progress.best_score]
    best = max(known) if trial.mode == "max" else min(known)
    report = EvaluationReport(
        step=progress.step,
        total_steps=plan.total_steps,
        epochs=plan.epochs_done(progress),
        value=value,
        best=best,
        is_last=progress.finished,
    )
    return replace(progress, best_score=best), report


def commit_is_due(spec: JobSpec, progress: Progress) -> bool:
    """Each `checkpoint.every_steps`, at every improvement, and at the end."""
    return (
        progress.step % spec.checkpoint.every_steps == 0
        or progress.best_step == progress.step
        or progress.finished
    )


# -------------------------------------------------------------------------------------- a step


@dataclass(frozen=True)
class _LocalFacts:
    """One rank's share of a step: tensors stay on the device until somebody asks."""

    loss_sum: torch.Tensor
    grad_norm: torch.Tensor
    skipped: torch.Tensor
    """1 where the gradient was not finite and nothing has changed, else 0; equal on all ranks."""
    weight: float
    rows: int
    tokens: int
    computed_tokens: int
    mean_cost: float
    """As in the decision; equal on all ranks."""
    most_cost: float
    learning_rate: float


def train_step(
    spec: JobSpec,
    plan: Plan,
    trainee: Trainee,
    batch: RankBatch,
    microbatches: list[Batch],
    decision: Decision,
    *,
    computed_tokens: int,
    step: int,
    reductions: int = 0,
    buffers: KeptBuffers,
    agreement: Agreement,
    stopwatch: Stopwatch,
) -> _LocalFacts:
    """One optimizer step on this rank's share of a global batch.

    The gradient is that of (sum of the losses of all rows) / (sum of their weights): DDP and FSDP
    average over ranks, so each rank's loss is scaled by world size over the global weight. Every
    rank runs `decision.num_microbatches` passes; missing ones weigh nothing and come first, so
    that the last, which reduces the gradients, has work to overlap with.

    Where the norm of the reduced gradient, which has the same bits on all ranks, is not finite,
    neither weights nor optimizer nor buffers change. The device decides; the host is not asked.
    (A loss may overflow while its gradient is finite: that step counts.)

    Raises MicrobatchTooLarge, on this rank alone, where memory runs out.
    """
    rate = learning_rate(
        spec.optimizer, step=step, total_steps=plan.total_steps, reductions=reductions
    )
    set_learning_rate(trainee.optimizer, rate)
    clear_gradients(trainee.model, trainee.optimizer)
    scale = agreement.world_size / (decision.weight or 1.0)
    padding = decision.num_microbatches - len(microbatches)
    passes = [trainee.task.empty_batch() for _ in range(padding)] + microbatches
    loss_sum = torch.zeros((), device=trainee.device)
    buffers.keep()
    lengths = trainee.task.lengths(batch.items)
    with passes_over(lengths, Cutting.of(spec.batching)):
        for number, microbatch in enumerate(passes):
            watchdog.tick()
            seed_generators(spec.data.seed, step, agreement.rank, number)
            is_last = number == len(passes) - 1
            # DDP asks in the forward pass already whether the backward pass is to reduce.
            with contextlib.nullcontext() if is_last else without_reduction(trainee.model):
                with stopwatch.running():
                    loss = forward(trainee, move(microbatch, trainee.device))
                with stopwatch.running_until_gradients():
                    (loss * scale).backward()  # type: ignore[no-untyped-call]
            loss_sum += loss.detach()
            if number < padding:
                buffers.put_back(torch.ones_like(loss_sum))  # no statistics of rows that are none
        norm = gradient_norm(trainee.trained, max_norm=spec.optimizer.max_grad_norm)
        skipped = (~torch.isfinite(norm)).float()
        update(trainee.optimizer, skipped=skipped)
        buffers.put_back(skipped)
    return _LocalFacts(
        loss_sum=loss_sum,
        grad_norm=norm,
        skipped=skipped,
        weight=float(trainee.task.weights(batch.items).sum()),
        rows=len(batch.rows),
        tokens=int(lengths.sum()),
        computed_tokens=computed_tokens,
        mean_cost=decision.mean_cost,
        most_cost=decision.most_cost,
        learning_rate=rate,
    )


def forward(trainee: Trainee, batch: Batch) -> torch.Tensor:
    """The summed loss of one micro-batch, a scalar on the device."""
    with autocast(trainee.device, trainee.dtype):
        output = trainee.task.forward(trainee.model, batch)
        return trainee.task.loss(output, batch)


@dataclass(frozen=True)
class _WindowStep:
    """A step of the window, and the rows that it used."""

    facts: _LocalFacts
    step: int
    epoch: int
    first_item: int
    next_item: int


class _Window:
    """Adds up the steps between two entries of the metrics, and over the ranks when one is due."""

    def __init__(self, max_skipped_in_a_row: int, stopwatch: Stopwatch, time: TimeAccount) -> None:
        self._max_skipped_in_a_row = max_skipped_in_a_row
        self._stopwatch = stopwatch
        self._time = time
        self._waited_before = 0.0
        self._unseen: list[_WindowStep] = []
        self._applied: list[_LocalFacts] = []
        self._all: list[_LocalFacts] = []
        self._progress = Progress()

    def add(self, facts: _LocalFacts, batch: RankBatch, progress: Progress) -> None:
        """Another step; `progress` stands after it."""
        self._all.append(facts)
        self._unseen.append(
            _WindowStep(facts, progress.step, batch.epoch, batch.first_item, batch.next_item)
        )
        self._progress = progress

    def look(self, progress: Progress, around: Surroundings) -> Progress:
        """The progress with the steps since the last look counted; tells of those skipped.

        Waits for the device. Raises TrainingError where more steps in a row were skipped than are
        allowed.
        """
        seen, self._unseen = self._unseen, []
        if not seen:
            return progress
        in_a_row = progress.skipped_in_a_row
        for held, skipped in zip(
            seen, torch.stack([held.facts.skipped for held in seen]).tolist(), strict=True
        ):
            if not skipped:
                in_a_row = 0
                self._applied.append(held.facts)
                continue
            in_a_row += 1
            norm = float(held.facts.grad_norm)
            around.skipped(
                SkippedStep(held.step, held.epoch, held.first_item, held.next_item, norm)
            )
            require_few_skipped(
                in_a_row, limit=self._max_skipped_in_a_row, step=held.step, norm=norm
            )
        self._progress = replace(progress, skipped_in_a_row=in_a_row)
        return self._progress

    def tell(self, around: Surroundings, agreement: Agreement, time: TimeAccount) -> None:
        """Tells of the steps since the last entry, if there are any. Called by all ranks, after a
        look at them."""
        assert not self._unseen
        if not self._all:
            return
        with time.spent("synchronisation"):
            around.tell(self._summed(agreement))

    def _summed(self, agreement: Agreement) -> StepFacts:
        applied, self._applied = self._applied, []
        steps, self._all = self._all, []
        losses = [f.loss_sum for f in applied]
        loss = float(torch.stack(losses).sum().double().cpu()) if losses else 0.0
        weight = sum(f.weight for f in applied)
        counts = [
            float(sum(getattr(f, name) for f in steps))
            for name in ("rows", "tokens", "computed_tokens")
        ]
        # A place for each rank's own work, which the others leave 0.
        busy = [0.0] * 2 * agreement.world_size
        own = 2 * agreement.rank
        busy[own : own + 2] = self._reading_seconds(), self._stopwatch.take()
        total = agreement.sum(torch.tensor([loss, weight, *counts, *busy], dtype=torch.float64))
        return StepFacts(
            progress=self._progress,
            loss=float(total[0] / total[1]) if applied else None,
            learning_rate=steps[-1].learning_rate,
            grad_norm=float(applied[-1].grad_norm) if applied else None,
            rows=int(total[2]),
            tokens=int(total[3]),
            computed_tokens=int(total[4]),
            imbalance=1 - sum(f.mean_cost for f in steps) / sum(f.most_cost for f in steps),
            steps=len(steps),
            busy=tuple(Busy(*seconds) for seconds in total[5:].reshape(-1, 2).tolist()),
        )

    def _reading_seconds(self) -> float:
        """Seconds since the last call in which this rank waited for its rows."""
        waited = self._time.seconds()["data_wait"]
        since, self._waited_before = waited - self._waited_before, waited
        return since


def require_few_skipped(in_a_row: int, *, limit: int, step: int, norm: float) -> None:
    """Raises TrainingError where `in_a_row` steps, of which `step` is the last, are too many.

    `step` counts from 1: it is the number that the step has in the metrics.
    """
    if in_a_row > limit:
        message = f"step {step}: the gradient is not finite (norm {norm})"
        if in_a_row > 1:
            message += f", as in the {in_a_row - 1} steps before"
        raise TrainingError(Problem(message, _DIVERGED_HINT))


# ------------------------------------------------------------------------------- a batch ahead


@dataclass(frozen=True)
class _Coming:
    """The next step's rows on this rank, and the agreement on it under way."""

    batch: RankBatch | None
    microbatches: list[Batch]
    computed_tokens: int
    """Padding included."""
    pending: PendingDecision
    error: Exception | None


class _Feed:
    """Fetches and collates a batch ahead, and starts the agreement on it."""

    def __init__(
        self,
        spec: JobSpec,
        plan: Plan,
        task: Task,
        around: Surroundings,
        *,
        agreement: Agreement,
        time: TimeAccount,
    ) -> None:
        self._spec = spec
        self._plan = plan
        self._task = task
        self._around = around
        self._agreement = agreement
        self._time = time
        self._rows: Iterator[RankBatch] | None = None

    def next_after(self, progress: Progress) -> _Coming | None:
        """The step that follows `progress`; None where none does."""
        if progress.step >= self._plan.total_steps:
            return None
        watchdog.tick("reads rows")
        with self._time.spent("synchronisation"):
            asked = self._around.requests()
        batch, error, weight, computed, launches = None, None, 0.0, 0, 0
        microbatches = list[Batch]()
        with self._time.spent("data_wait"):
            try:
                if not asked.ends:
                    if self._rows is None or progress.next_item == 0:
                        self._rows = self._around.rows(progress)
                    batch = self._augmented(next(self._rows))
                    weight = float(self._task.weights(batch.items).sum())
                    microbatches, computed = self._collate(batch)
                    launches = len(microbatches) * Cutting.of(self._spec.batching).launch_tokens
            except NotNeeded:
                # The others wait for this rank: by its vote they hear of it.
                asked |= self._around.requests()
                assert asked.ends
            # Whatever kept this rank from its rows, the others must hear of it, not wait for it.
            except Exception as caught:
                error = caught
        error = asked.superseded or error
        vote = Vote(
            weight=weight,
            num_microbatches=max(1, len(microbatches)),
            stop=asked.stop,
            save=asked.save,
            yields=asked.yields,
            failed=error is not None,
            cost=float(max(1, computed + launches)),
        )
        with self._time.spent("synchronisation"):
            pending = self._agreement.start(vote)
        return _Coming(batch, microbatches, computed, pending, error)

    def _augmented(self, batch: RankBatch) -> RankBatch:
        """The batch as it is trained on."""
        positions = rank_positions(
            rank=self._agreement.rank,
            world_size=self._agreement.world_size,
            start=batch.first_item,
            stop=batch.next_item,
        )
        keys = ItemKeys(self._spec.data.seed, batch.epoch, positions)
        return replace(batch, items=self._task.augment(batch.items, keys))

    def _collate(self, batch: RankBatch) -> tuple[list[Batch], int]:
        """Micro-batches, and their tokens with the padding that is computed."""
        lengths = self._task.lengths(batch.items)
        cutting = Cutting.of(self._spec.batching)
        cuts = cut_microbatches(lengths, cutting)
        computed = sum(computed_tokens(lengths[cut], cutting) for cut in cuts)
        return [self._task.collate(batch.items.take(cut)) for cut in cuts], computed
