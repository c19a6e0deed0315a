"""`shoal extend`: more trials for a study, from any machine."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from jobs.commands.start import (
    no_progress_option,
    open_kuberay,
    record_only_option,
    refuse_without_kubernetes,
    tell_start,
)
from jobs.commands.target import context_option, job_file_of_store, open_run, run_argument

if TYPE_CHECKING:
    from jobs.study.log import LogReader

_HEAR_SECONDS = 30.0
_LOOK_SECONDS = 0.5


@click.command()
@run_argument
@click.option(
    "--trials",
    required=True,
    type=click.IntRange(min=1),
    metavar="N",
    help="How many trials the study is to have in all, those that it has made included.",
)
@click.option(
    "--space",
    metavar="SPACE",
    help="What the new trials search: YAML as of search.space, or a file that holds it, such as "
    "the job file. Default: as before.",
)
@click.option("--background", is_flag=True, help="Return at once where the study starts again.")
@no_progress_option
@context_option
@record_only_option
@click.pass_context
def extend(
    ctx: click.Context,
    run: str,
    store: str | None,
    trials: int,
    space: str | None,
    background: bool,
    no_progress: bool,
    context: str | None,
    record_only: bool,
) -> None:
    """Give a study more trials, and another space where wanted.

    A study that goes on hears of it; one that has ended is resumed. What it has learned so far
    counts, as far as the new space holds it.
    """
    from jobs.foreground import attend, requester
    from jobs.situation import read_situation
    from jobs.study.log import LogReader
    from jobs.submit import extend_study, is_driven_soon, resume_run

    reader = open_run(run, store)
    refuse_without_kubernetes(reader, context=context, record_only=record_only)
    request = extend_study(
        reader,
        trials=trials,
        space=None if space is None else _space_of(space),
        by=requester(),
    )
    log, deadline = LogReader(reader.store, reader.paths), time.monotonic() + _HEAR_SECONDS
    while True:
        # Looked at before the log, in which the driver's last word is then not missed.
        is_driven = is_driven_soon(reader, now=time.time())
        if _is_extended(log, request, reader.uri):
            click.echo(f"the study has {trials} trials in all from now on", err=True)
            return
        if not is_driven:
            break
        if time.monotonic() > deadline:
            click.echo(
                f"asked for {trials} trials in all; the study's driver has not answered yet",
                err=True,
            )
            return
        time.sleep(_LOOK_SECONDS)
    before = read_situation(reader).generation
    submitted = resume_run(
        reader.store,
        reader.run_id,
        foreground=not background,
        open_kuberay=None if record_only else partial(open_kuberay, context),
    )
    if background or submitted.kubectl or submitted.rayjob:
        tell_start(submitted, store=job_file_of_store(store), context=context, as_json=False)
        return
    ctx.exit(attend(submitted, reader, show_progress=not no_progress, after_generation=before))


def _is_extended(log: LogReader, request: int, study: str) -> bool:
    """Whether the study has the trials that the request asks for; SpecError where it has been
    refused."""
    from jobs.errors import Problem, SpecError
    from jobs.study.events import Refused
    from jobs.study.extension import answer_to

    answer = answer_to(log, request)
    if isinstance(answer, Refused):
        raise SpecError(
            Problem(
                f"the study is not extended: {answer.reason}",
                f"look where it stands: shoal status {study}",
            )
        )
    return answer is not None


def _space_of(text: str) -> Any:
    """What is given as the space: YAML, or a file of it."""
    from jobs.errors import Problem, SpecError
    from jobs.strict_yaml import read_yaml

    where, path = "--space", Path(text)
    if text.endswith((".yaml", ".yml", ".json")):
        try:
            where, text = text, path.read_text(encoding="utf-8-sig")
        except OSError as error:
            raise SpecError(
                Problem(f"--space is {path}, which cannot be read: {error.strerror}")
            ) from error
    document = read_yaml(text, where=where)
    if document.repeated:
        raise SpecError(*document.repeated)
    value = document.value
    if isinstance(value, dict) and isinstance(value.get("search"), dict):
        value = value["search"].get("space", {})
    return value
