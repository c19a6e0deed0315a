"""`shoal extend`: more trials for a study, from any machine."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click

from jobs.commands.start import no_progress_option, tell_start
from jobs.commands.target import job_file_of_store, open_run, run_argument

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
@click.pass_context
def extend(
    ctx: click.Context,
    run: str,
    store: str | None,
    trials: int,
    space: str | None,
    background: bool,
    no_progress: bool,
) -> None:
    """Give a study more trials, and another space where wanted.

    A study that goes on hears of it; one that has ended is resumed. What it has learned so far
    counts, as far as the new space holds it.
    """
    from jobs.foreground import attend, requester
    from jobs.situation import read_situation
    from jobs.study.extension import is_met
    from jobs.submit import extend_study, is_driven_soon, resume_run

    reader = open_run(run, store)
    request = extend_study(
        reader,
        trials=trials,
        space=None if space is None else _space_of(space),
        by=requester(),
    )
    deadline = time.monotonic() + _HEAR_SECONDS
    while is_driven_soon(reader, now=time.time()):
        if is_met(reader, request):
            click.echo(f"the study has {trials} trials in all from now on", err=True)
            return
        if time.monotonic() > deadline:
            click.echo(
                f"asked for {trials} trials in all; the study's driver has not heard of it yet, "
                "and will",
                err=True,
            )
            return
        time.sleep(_LOOK_SECONDS)
    before = read_situation(reader).generation
    submitted = resume_run(reader.store, reader.run_id, foreground=not background)
    if background or submitted.kubectl:
        tell_start(submitted, store=job_file_of_store(store), as_json=False)
        return
    ctx.exit(attend(submitted, reader, show_progress=not no_progress, after_generation=before))


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
