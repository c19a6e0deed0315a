"""`shoal logs`: what the driver and the workers of a run wrote, merged by time."""

from __future__ import annotations

import json
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import click

from jobs.commands.ages import to_moment
from jobs.commands.target import (
    context_option,
    json_option,
    open_run_or_trial,
    print_json,
    run_argument,
    trial_option,
)
from jobs.errors import Problem, SpecError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from jobs.runs import RunReader

LEVELS = ("debug", "info", "warning", "error")
POLL_SECONDS = 1.0


@click.command()
@run_argument
@trial_option
@click.option("-f", "--follow", is_flag=True, help="Go on until the run ends.")
@click.option("--rank", type=click.IntRange(min=0), help="Only this worker's lines.")
@click.option("--attempt", type=click.IntRange(min=1), help="Only this attempt's lines.")
@click.option(
    "--since",
    metavar="AGE|TIME",
    callback=to_moment,
    help="Only newer lines: 10m, or 2026-11-01T09:30.",
)
@click.option("--level", type=click.Choice(LEVELS), default="info", show_default=True)
@click.option(
    "--pods",
    is_flag=True,
    help="Of a run on Kubernetes: what its pods print (submitter, head, workers), while they are "
    "there; after that what the run's folder has.",
)
@context_option
@json_option
def logs(
    run: str,
    store: str | None,
    trial: int | None,
    follow: bool,
    rank: int | None,
    attempt: int | None,
    since: float | None,
    level: str,
    pods: bool,
    context: str | None,
    as_json: bool,
) -> None:
    """Log lines of a run, by time: the driver's and the workers'.

    With --json and --follow each line is a document of its own.
    """
    reader = open_run_or_trial(run, store, trial)
    reader.spec_head()
    if pods:
        _refuse_beside_pods(rank=rank, attempt=attempt, trial=trial)
        if _show_pods(reader, follow=follow, since=since, context=context, as_json=as_json):
            return
    elif context is not None:
        raise SpecError(
            Problem("--context has no effect without --pods", "add --pods, or remove --context")
        )
    batches = _batches(reader, follow=follow, rank=rank, attempt=attempt)
    wanted = (
        [line for line in batch if _is_wanted(line, since=since, level=level)] for batch in batches
    )
    if as_json and not follow:
        print_json({"lines": [line for batch in wanted for line in batch]})
        return
    for batch in wanted:
        for line in batch:
            click.echo(_as_json(line) if as_json else format_log_line(line))


def _refuse_beside_pods(**given: int | None) -> None:
    problems = [
        Problem(f"--{name} has no effect with --pods", f"remove --{name}, or --pods")
        for name, value in given.items()
        if value is not None
    ]
    if problems:
        raise SpecError(*problems)


def _show_pods(
    reader: RunReader, *, follow: bool, since: float | None, context: str | None, as_json: bool
) -> bool:
    """What the run's pods print; whether there were any that have printed something.

    Raises SpecError where the run is not on Kubernetes.
    """
    from jobs.pod_logs import pod_lines

    is_any, documents = False, []
    for line in pod_lines(reader, follow=follow, since=since, context=context, tell=_warn):
        is_any = True
        if as_json and not follow:
            documents.append(line.to_json())
        else:
            click.echo(_as_json(line.to_json()) if as_json else line.text)
    if not is_any:
        click.echo("no pod of it has printed anything that is still there; its folder:", err=True)
    elif as_json and not follow:
        print_json({"lines": documents})
    return is_any


def _warn(problem: str) -> None:
    click.echo(f"warning: {problem}", err=True)


def _batches(
    reader: RunReader, *, follow: bool, rank: int | None, attempt: int | None
) -> Iterator[list[dict[str, Any]]]:
    """Lines as they come, until the run is over."""
    from jobs.onlooker import Onlooker
    from jobs.situation import read_situation

    lines, onlooker = reader.log_lines(rank=rank, attempt=attempt), Onlooker()
    while True:
        # Before the lines: what is written before the run ends must not be missed.
        over = not follow or read_situation(reader, onlooker=onlooker).is_over
        yield lines.new()
        if over:
            break
        time.sleep(POLL_SECONDS)
    for problem in lines.problems:
        click.echo(f"warning: {problem}", err=True)


def _is_wanted(line: dict[str, Any], *, since: float | None, level: str) -> bool:
    if since is not None and float(line["time"]) < since:
        return False
    own = str(line.get("level", "info")).lower()
    own = {"critical": "error", "fatal": "error", "warn": "warning"}.get(own, own)
    return own not in LEVELS or LEVELS.index(own) >= LEVELS.index(level)


def format_log_line(line: dict[str, Any]) -> str:
    """`14:02:11 rank 1 warning: message`, in local time; a traceback follows, indented."""
    moment = datetime.fromtimestamp(float(line["time"]), tz=UTC).astimezone()
    today = datetime.now(tz=UTC).astimezone().date()
    clock = f"{moment:%H:%M:%S}" if moment.date() == today else f"{moment:%Y-%m-%d %H:%M:%S}"
    rank = line.get("rank")
    writer = "driver" if rank is None else f"rank {rank}"
    level = str(line.get("level", "info")).lower()
    shown = "" if level == "info" else f"{level}: "
    text = f"{clock} {writer:<7} {shown}{line.get('message', '')}"
    if line.get("traceback"):
        text += "\n" + _indented(str(line["traceback"]).rstrip().splitlines())
    return text


def _indented(lines: Iterable[str]) -> str:
    return "\n".join(f"         {line}" for line in lines)


def _as_json(line: dict[str, Any]) -> str:
    return json.dumps(line, ensure_ascii=False)
