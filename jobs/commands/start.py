"""`shoal run`, `submit` and `resume`: a run starts, or starts again."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from jobs.commands.job_file import job_argument
from jobs.commands.target import (
    job_file_of_store,
    json_option,
    open_run,
    print_json,
    run_argument,
)

if TYPE_CHECKING:
    from jobs.spec import JobSpec
    from jobs.submit import SubmittedRun

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
    from jobs.parse import load_spec
    from jobs.runs import RunReader
    from jobs.submit import refuse_attending, submit_job

    spec = load_spec(job, overrides)
    refuse_attending(spec)
    _check(spec, skip=skip_check)
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
    """Start a run in the background and print its URI at once.

    Where cluster.kind is kuberay the run is recorded, and the command that starts it is printed.
    """
    from jobs.parse import load_spec
    from jobs.spec import StoreAccess
    from jobs.submit import submit_job

    spec = load_spec(job, overrides)
    _check(spec, skip=skip_check)
    submitted = submit_job(spec, run_id=run_id, foreground=False)
    # What the environment does not say of the way to the store is in the job file.
    store = None if spec.store.access == StoreAccess() else str(job)
    tell_start(submitted, store=store, as_json=as_json)


@click.command()
@run_argument
@click.option(
    "--set",
    "overrides",
    metavar="PATH=VALUE",
    multiple=True,
    help="Change workers, retries, checkpoint, cluster, tracking, model.compile or "
    "model.activation_checkpointing; of a run train.epochs, of a study search.trials, budget, "
    "patience, max_concurrent or retries. Repeatable.",
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
    from jobs.situation import read_situation
    from jobs.submit import resume_run

    reader = open_run(run, store)
    reader.spec_head()
    before = read_situation(reader).generation
    submitted = resume_run(
        reader.store, reader.run_id, overrides=overrides, foreground=not background
    )
    if background or submitted.kubectl:
        tell_start(submitted, store=job_file_of_store(store), as_json=False)
        return
    ctx.exit(
        attend(
            submitted,
            reader,
            show_progress=not no_progress,
            after_generation=before,
        )
    )


def _check(spec: JobSpec, *, skip: bool) -> None:
    if not skip:
        from jobs.checks.finding import Verdict
        from jobs.preflight import check_job

        checked = check_job(spec)
        for finding in checked.findings:
            if finding.verdict is Verdict.WARNING:
                hint = f" (hint: {finding.hint})" if finding.hint else ""
                click.echo(f"warning: {finding.message}{hint}", err=True)
        checked.raise_problems()


def tell_start(submitted: SubmittedRun, *, store: str | None, as_json: bool) -> None:
    """What is to be known of a run that was started in the background, or is to be started."""
    command = submitted.start_command(store=store)
    if as_json:
        print_json({"run_id": submitted.run_id, "uri": submitted.uri, "start_command": command})
        return
    click.echo(submitted.uri)
    if command is not None:
        click.echo(f"recorded; start it with: {command}", err=True)
    elif sys.stderr.isatty():
        click.echo(f"follow it with: shoal watch {submitted.uri}", err=True)
