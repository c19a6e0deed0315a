"""How a study is shown in a terminal: `shoal status`, and live."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import yaml
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from jobs.search_spec import Distribution
from jobs.situation import format_seconds
from jobs.study.events import Values
from jobs.study.trials import Status, Trial
from jobs.study_status import StudyStatus, why
from jobs.terminal import format_number, format_percent

_SLOTS_SHOWN = 16
_BAR_WIDTH = 24
_STYLES: dict[Status, str] = {
    "finished": "green",
    "stopped": "dim",
    "failed": "red",
}


def study_rows(study: StudyStatus) -> list[tuple[str, RenderableType]]:
    """What is told of a study in place of a run's steps: names and values."""
    rows: list[tuple[str, RenderableType]] = [("trials", trials_text(study))]
    rows.append(("best", best_text(study)))
    rows.append(("spent", spent_text(study)))
    if study.trials.closed is not None:
        rows.append(("search ended", study.trials.closed))
    if study.on_slots:
        rows.append(("on slots", slots_table(study)))
    if study.newest_ended:
        rows.append(("ended last", ended_table(study)))
    return rows


def live_study(study: StudyStatus) -> list[RenderableType]:
    """The parts of the live view of a study, below its state."""
    grid = Table.grid(padding=(0, 2, 0, 0), expand=False)
    whole, done = float(study.trials.wanted or 1), float(study.trials.configurations)
    grid.add_row(_bar(done / whole, 36), f"{trials_text(study)}")
    names = Table.grid(padding=(0, 2))
    names.add_column(style="dim")
    names.add_column(overflow="fold")
    for name, value in study_rows(study)[1:]:
        names.add_row(name, value)
    return [grid, Padding(names, (1, 0, 0, 0))]


def trials_text(study: StudyStatus) -> str:
    """`12 of 64 begun: 2 running, 7 paused, 3 finished; 14 an hour, about 2h 10m left`."""
    trials = study.trials
    counts = ", ".join(f"{number} {name}" for name, number in study.counts.items() if number)
    text = f"{trials.configurations} of {trials.wanted} begun"
    if study.search.repeats > 1:
        text += f", each with {study.search.repeats} seeds"
    if study.search.clones:
        text += f", {len(trials) - trials.configurations} clones of them"
    if trials.finalists:
        text += f", then {trials.finalists} of finalists"
    text += f": {counts}" if counts else ""
    rate, left = study.pace.trials_per_hour, study.eta_seconds
    if rate is not None:
        text += f"; {rate:.3g} an hour"
    if left is not None:
        text += f", about {format_seconds(left)} left"
    return text


def best_text(study: StudyStatus) -> str:
    """`validation/f1 0.9123, trial 7 (learning_rate 3.1e-05, dropout 0.12)`."""
    best = study.best
    if best is None:
        return f"no trial has reported {study.search.metric} yet"
    score = format_number(study.trials.score(best))
    mean = _mean(study, best)
    return (
        f"{study.search.metric} {score}{mean}, trial {best.number} "
        f"({values_text(best.values, study.search.space)})"
    )


def _mean(study: StudyStatus, best: Trial) -> str:
    ranked = study.trials.ranked(best.purpose)
    scores = [study.trials.score(trial) for trial in (ranked[0] if ranked else [])]
    numbers = [score for score in scores if score is not None]
    if len(numbers) < 2:
        return ""
    return f" (mean of {len(numbers)} seeds {format_number(sum(numbers) / len(numbers))})"


def spent_text(study: StudyStatus) -> str:
    """`41.5 of 100 epochs and 27 for finalists, 1.2 GPU hours, 1h 12m`."""
    pace, budget = study.pace, study.search.budget
    limit = f" of {budget.epochs:g}" if budget.epochs is not None else ""
    text = f"{format_number(round(pace.search_epochs, 2))}{limit} epochs"
    more = round(pace.epochs - pace.search_epochs, 2)
    parts = [text + (f" and {format_number(more)} for finalists" if more else "")]
    if pace.gpus:
        limit = f" of {budget.gpu_hours:g}" if budget.gpu_hours is not None else ""
        text = f"{pace.search_gpu_hours:.3g}{limit} GPU hours"
        more = pace.gpu_hours - pace.search_gpu_hours
        parts.append(text + (f" and {more:.3g} for finalists" if more else ""))
    limit = f" of {format_seconds(budget.hours * 3600)}" if budget.hours is not None else ""
    parts.append(f"{format_seconds(pace.seconds)}{limit}")
    return ", ".join(parts)


def slots_table(study: StudyStatus) -> RenderableType:
    """Trials on slots, each with how much of its budget it has had."""
    table = _table("trial", "", "done", "until", "score", "values")
    for on in study.on_slots[:_SLOTS_SHOWN]:
        table.add_row(
            _number(on.trial),
            _bar(on.fraction, _BAR_WIDTH),
            format_percent(on.fraction),
            format_percent(on.trial.until),
            format_number(study.trials.score(on.trial)),
            values_text(on.trial.values, study.search.space),
        )
    more = len(study.on_slots) - _SLOTS_SHOWN
    return Group(table, Text(f"and {more} more", style="dim")) if more > 0 else table


def ended_table(study: StudyStatus) -> RenderableType:
    """The trials that ended last, and why."""
    table = _table("trial", "", "at", "score", "why")
    for trial in study.newest_ended:
        table.add_row(
            _number(trial),
            Text(trial.status, style=_STYLES.get(trial.status, "")),
            format_percent(trial.fraction),
            format_number(study.trials.score(trial)),
            why(trial),
        )
    return table


def ended_line(study: StudyStatus, trial: Trial) -> str:
    """`trial 7 stopped at 33%: validation/f1 0.871: not among the best 1/3`."""
    score = study.trials.score(trial)
    text = f"trial {trial.number} {trial.status} at {format_percent(trial.fraction)}"
    if score is not None:
        text += f": {study.search.metric} {format_number(score)}"
    if study.best is trial:
        return f"{text}, the best so far"
    return f"{text}: {why(trial)}" if trial.status != "finished" else text


def values_text(values: Values, paths: Iterable[str]) -> str:
    """`learning_rate 3.1e-05, dropout 0.12`: by the last part of each key that tells them apart."""
    names = short_names(list(dict.fromkeys([*paths, *values])))
    return ", ".join(f"{names[path]} {format_value(value)}" for path, value in values.items())


def short_names(paths: Sequence[str]) -> dict[str, str]:
    """The last part of each dotted path, or all of it where others end alike."""
    last = [path.rpartition(".")[2] for path in paths]
    return {
        path: name if last.count(name) == 1 else path
        for path, name in zip(paths, last, strict=True)
    }


def format_value(value: Any) -> str:
    """A searched value: numbers shortened, all else as the job file has it."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(format_value, value)) + "]"
    return format_number(value) if isinstance(value, int | float) else str(value)


def over_text(over: Distribution) -> str:
    """`loguniform 1e-06 to 0.001`, `choice of 16, 32, 64 where optimizer.kind is adamw`."""
    if over.way in ("choice", "grid"):
        text = f"{over.way} of {', '.join(map(_shown, over.values))}"
    else:
        low, high, *step = over.values
        text = f"{over.way} {low:g} to {high:g}" + "".join(f" in steps of {s:g}" for s in step)
    conditions = [
        f"{path} is {' or '.join(map(_shown, wanted if isinstance(wanted, tuple) else (wanted,)))}"
        for path, wanted in (over.when or {}).items()
    ]
    return f"{text} where {' and '.join(conditions)}" if conditions else text


def _shown(value: Any) -> str:
    """A value as the job file has it."""
    if isinstance(value, tuple):
        value = list(value)
    return str(yaml.safe_dump(value, default_flow_style=True, width=1000)).split("\n...")[0].strip()


def _number(trial: Trial) -> str:
    return f"{trial.number}" + (" (finalist)" if trial.purpose == "finalist" else "")


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    for column in columns:
        right = column in ("done", "until", "at", "score")
        table.add_column(column, justify="right" if right else "left", overflow="fold")
    return table


def _bar(share: float, width: int) -> ProgressBar:
    return ProgressBar(
        total=1.0,
        completed=min(1.0, share),
        width=width,
        complete_style="cyan",
        finished_style="green",
    )
