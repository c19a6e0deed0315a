"""`shoal run`, `submit` and `resume`: a run starts, or starts again."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from jobs.commands.job_file import job_argument
from jobs.commands.target import json_option, open_run, print_json, run_argument

if TYPE_CHECKING:
    from jobs.spec import JobSpec

run_id_option = click.option(
    "--run-id", metavar="ID", help="Id of the run; default: the job's name and a short suffix."
)
skip_check_option = click.option(
    "--skip-check", is_flag=True, help="Start without testing store, data and model before."
)
no_progress_option = click.option(
    "--no-progress", is_flag=True, help="Print the summary at the end, and no progress."
)


@click.command()
@job_argument
@run_id_option
@skip_check_option
@no_progress_option
@click.pass_context
def run(
    ctx: click.Context,
    job: Path,
    overrides: tuple[str, ...],
    run_id: str | None,
    skip_check: bool,
    no_progress: bool,
) -> None:
    """Train here (or on the Ray cluster of RAY_ADDRESS), with live progress.

    Ctrl-C once asks the run to save its state and end; twice kills it.
    """
    from cluster.storage import open_store
    from jobs.foreground import attend
    from jobs.runs import RunReader
    from jobs.submit import submit_job

    spec = _checked(job, overrides, skip_check=skip_check)
    submitted = submit_job(spec, run_id=run_id, foreground=True)
    reader = RunReader(open_store(spec.store.uri, spec.store.access), submitted.run_id)
    ctx.exit(attend(submitted, reader, show_progress=not no_progress))


@click.command()
@job_argument
@run_id_option
@skip_check_option
@json_option
def submit(
    job: Path,
    overrides: tuple[str, ...],
    run_id: str | None,
    skip_check: bool,
    as_json: bool,
) -> None:
    """Start a run in the background and print its URI at once."""
    from jobs.submit import submit_job

    spec = _checked(job, overrides, skip_check=skip_check)
    submitted = submit_job(spec, run_id=run_id, foreground=False)
    _tell(submitted.run_id, submitted.uri, as_json=as_json)


@click.command()
@run_argument
@click.option(
    "--set",
    "overrides",
    metavar="PATH=VALUE",
    multiple=True,
    help="Change workers, retries, checkpoint, cluster, tracking or train.epochs. Repeatable.",
)
@click.option("--background", is_flag=True, help="Return at once and print the run's URI.")
@no_progress_option
@click.pass_context
def resume(
    ctx: click.Context,
    run: str,
    store: str | None,
    overrides: tuple[str, ...],
    background: bool,
    no_progress: bool,
) -> None:
    """Go on with a run that was stopped, failed or was killed, from its last checkpoint."""
    from jobs.foreground import attend
    from jobs.status import read_situation
    from jobs.submit import resume_run

    reader = open_run(run, store)
    reader.spec_head()
    before = read_situation(reader).generation
    submitted = resume_run(
        reader.store, reader.run_id, overrides=overrides, foreground=not background
    )
    if background:
        _tell(submitted.run_id, submitted.uri, as_json=False)
        return
    ctx.exit(
        attend(
            submitted,
            reader,
            show_progress=not no_progress,
            after_generation=before,
        )
    )


def _checked(job: Path, overrides: tuple[str, ...], *, skip_check: bool) -> JobSpec:
    from jobs.parse import load_spec

    spec = load_spec(job, overrides)
    if not skip_check:
        from jobs.preflight import check_job

        check_job(spec).raise_problems()
    return spec


def _tell(run_id: str, uri: str, *, as_json: bool) -> None:
    if as_json:
        print_json({"run_id": run_id, "uri": uri})
        return
    click.echo(uri)
    if sys.stderr.isatty():
        click.echo(f"follow it with: shoal watch {uri}", err=True)
