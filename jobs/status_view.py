"""What `shoal status` prints: a run's state with its cause, then its numbers."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from datetime import UTC, datetime

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from cluster.rayjob_status import SeenRayJob
from jobs.lines import Line
from jobs.record import Attempt, Outcome, State
from jobs.situation import format_seconds
from jobs.status import RunStatus
from jobs.study_view import study_rows
from jobs.terminal import format_number, format_percent, print_to, show_warnings, state_text

TIME_NAMES = {
    "compute": "compute",
    "data_wait": "waiting for data",
    "synchronisation": "synchronisation",
    "checkpoint": "checkpoints",
    "evaluation": "evaluation",
    "start": "start",
    "recovery": "recovery",
    "finish": "finishing",
    "other": "other",
}
"""What people read for the purposes of `jobs.account`."""
_SKIPPED_SHOWN = 10


def show_status(status: RunStatus) -> None:
    """Print it all on stdout."""
    print_to(sys.stdout, status_renderable(status))
    show_warnings(status.problems)


def status_renderable(status: RunStatus) -> RenderableType:
    """The whole of `shoal status`."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    for name, value in _rows(status):
        table.add_row(name, value)
    return Group(headline(status), Padding(table, (1, 0, 0, 2)))


def headline(status: RunStatus) -> Text:
    """`sentiment-a1b2c3  RUNNING`, the cause, and what to type."""
    situation = status.situation
    text = Text.assemble((status.run_id, "bold"), "  ", state_text(situation.state))
    # What the driver says of a study that runs is told below, by what its log holds now.
    if situation.cause and not (status.study and situation.state is State.RUNNING):
        text.append(f"  {situation.cause}")
    if situation.hint:
        text.append(f"\nhint: {situation.hint}", style="cyan")
    return text


def _rows(status: RunStatus) -> list[tuple[str, RenderableType]]:
    rows: list[tuple[str, RenderableType]] = [("run", status.uri)]
    if status.rayjob is not None:
        rows.append(("RayJob", rayjob_text(status.rayjob)))
    rows += study_rows(status.study) if status.study else [("progress", progress_text(status))]
    if status.train is not None:
        rows.append(("training", train_text(status.train)))
        straggler = status.train.get("straggler")
        if straggler and not status.situation.is_over:
            rows.append(("straggler", Text(straggler["message"], style="yellow")))
    if status.evaluations:
        rows.append(("last evaluation", evaluation_text(status.evaluations[-1])))
    if status.best is not None:
        value = format_number(status.best.evaluation.get(status.best_metric))
        rows.append(("best", f"{status.best_metric} {value} at step {status.best.step}"))
    outcome = status.result.outcome if status.result else None
    if outcome is not None and outcome.test:
        rows.append((str(outcome.tested_on), before_and_after(outcome)))
    if status.checkpoints:
        steps = ", ".join(str(m.step) for m in status.checkpoints)
        rows.append(("checkpoints", f"steps {steps}"))
    if status.skipped:
        rows.append(("skipped", skipped_text(status.skipped)))
    for attempt in status.attempts:
        rows.append((f"attempt {attempt.attempt}", _attempt_text(attempt, status)))
    if any(status.account.seconds.values()) and status.study is None:
        rows.append(("time", _time_text(status)))
    submitted = datetime.fromtimestamp(status.submitted_at, tz=UTC).astimezone()
    rows.append(
        (
            "submitted",
            f"{submitted:%Y-%m-%d %H:%M:%S}, {format_seconds(status.seconds_since_submitted)} "
            + ("until it ended" if status.finished_at else "ago"),
        )
    )
    return rows


def rayjob_text(rayjob: SeenRayJob) -> str:
    """`sentiment-1 in the namespace training: Running, PENDING`, the operator's word first."""
    told = ", ".join(filter(None, (rayjob.deployment_status or "New", rayjob.job_status)))
    return f"{rayjob.name} in the namespace {rayjob.namespace}: {told}"


def progress_text(status: RunStatus) -> str:
    """`step 420 of 1,200 (35%), epoch 1.05 of 3, about 2m 10s left`."""
    text = f"step {status.step:,}"
    if status.total_steps:
        text += f" of {status.total_steps:,} ({format_percent(status.progress)})"
    if status.epoch is not None:
        text += f", epoch {status.epoch:.2f} of {status.epochs}"
    if status.eta_seconds is not None:
        text += f", about {format_seconds(status.eta_seconds)} left"
    return text


def train_text(line: Line) -> str:
    """`loss 0.612, learning rate 2.9e-05, 512 rows/s, padding 4%, data wait 3%, imbalance 2%`."""
    parts = [
        f"loss {format_number(line.get('loss'))}",
        f"learning rate {format_number(line.get('learning_rate'))}",
        f"{format_number(line.get('rows_per_second'))} rows/s",
        f"padding {format_percent(line.get('padding_share'))}",
        f"data wait {format_percent(line.get('data_wait_share'))}",
        f"imbalance {format_percent(line.get('imbalance'))}",
    ]
    return ", ".join(parts)


def skipped_text(skipped: Sequence[Line]) -> str:
    """`3 steps whose gradient was not finite: 12, 13, 40`."""
    shown = ", ".join(f"{line['step']}" for line in skipped[-_SKIPPED_SHOWN:])
    more = "... " if len(skipped) > _SKIPPED_SHOWN else ""
    return f"{len(skipped)} step{'s' * (len(skipped) > 1)} without a finite gradient: {more}{shown}"


def evaluation_text(line: Line) -> str:
    """`validation at step 200: loss 0.52, accuracy 0.79, f1 0.788`."""
    metrics = line.get("metrics") or {}
    numbers = ", ".join(f"{name} {format_number(value)}" for name, value in metrics.items())
    return f"{line.get('split')} at step {line.get('step')}: {numbers}"


def before_and_after(outcome: Outcome) -> str:
    """`accuracy 0.511 -> 0.842, f1 0.34 -> 0.841`: the pretrained and the fine-tuned model."""
    after = (outcome.test or {}).get("metrics") or {}
    before = (outcome.before or {}).get("metrics") or {}
    parts = []
    for name, value in after.items():
        was = f"{format_number(before[name])} -> " if name in before else ""
        parts.append(f"{name} {was}{format_number(value)}")
    return ", ".join(parts)


def _attempt_text(attempt: Attempt, status: RunStatus) -> Text:
    outcome = status.outcomes.get(attempt.attempt)
    workers = f"{attempt.world_size} worker" + ("s" if attempt.world_size != 1 else "")
    origin = (
        "from the start"
        if attempt.restored_step is None
        else f"from the checkpoint of step {attempt.restored_step}"
    )
    text = Text(f"{workers}, {origin}")
    if attempt.max_tokens_per_microbatch is not None:
        text.append(f", micro-batches of {attempt.max_tokens_per_microbatch} tokens at most")
    crash = status.crashes.get(attempt.attempt)
    if outcome is not None:
        text.append(", ")
        text.append_text(state_text(outcome.state))
        text.append(f" at step {outcome.step}")
        if outcome.failure and outcome.failure.problems:
            text.append(f": {outcome.failure.problems[0][0]}")
    elif crash is not None:
        text.append(f", broke off: {crash.reason}", style="yellow")
    elif status.situation.is_over or attempt is not status.attempts[-1]:
        text.append(", ended without a word (killed)", style="yellow")
    return text


def _time_text(status: RunStatus) -> str:
    """`compute 47s (70%), start 6s (9%); 12s of compute were lost: steps that were done again`."""
    seconds = status.account.seconds
    total = sum(seconds.values())
    text = ", ".join(
        f"{TIME_NAMES.get(name, name)} {format_seconds(spent)} ({format_percent(spent / total)})"
        for name, spent in seconds.items()
        if spent
    )
    lost = status.account.lost_seconds
    if lost >= 1:
        text += f"; {format_seconds(lost)} of compute were lost: steps that were done again"
    return text
