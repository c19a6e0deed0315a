"""`shoal delete` and `shoal gc`."""

from __future__ import annotations

import sys
import time

import click

from jobs.commands.ages import to_age_seconds
from jobs.commands.target import (
    context_option,
    json_option,
    open_run,
    open_runs,
    print_json,
    run_argument,
    store_option,
)


@click.command()
@run_argument
@context_option
@click.option("--yes", is_flag=True, help="Do not ask.")
def delete(run: str, store: str | None, context: str | None, yes: bool) -> None:
    """Delete a run with all of its checkpoints, a study with all of its trials; of one on
    Kubernetes also its RayJob.

    A run that goes on is refused.
    """
    from jobs.errors import Problem, SpecError
    from jobs.rayjob_changes import remove_rayjob
    from jobs.retention import delete_run, describe_unfinished, find_unfinished, refuse_running
    from jobs.spec import format_bytes

    reader = open_run(run, store)
    heads = list(reader.store.list(f"{reader.run_id}/"))
    unfinished = find_unfinished(reader.store, f"{reader.run_id}/", tell=_hush)
    if not heads and not unfinished:
        reader.spec_head()  # Says that there is no such run, and which are near.
    refuse_running(reader, wait=lambda reason: click.echo(reason, err=True))
    what = f"{len(heads)} objects, {format_bytes(sum(head.num_bytes for head in heads))}"
    if unfinished:
        what += f", {describe_unfinished(len(unfinished))}"
    if not yes:
        if not sys.stdin.isatty():
            raise SpecError(
                Problem(
                    f"{reader.uri} is not deleted without a question, and here nobody can answer",
                    f"run: shoal delete {reader.uri} --yes",
                )
            )
        click.confirm(f"delete {reader.uri} ({what})?", abort=True, err=True)
        # It may have been resumed while the question stood.
        refuse_running(reader, wait=lambda reason: click.echo(reason, err=True))
    remove_rayjob(reader, context=context, tell=_warn)
    delete_run(reader.store, reader.run_id, tell=_warn)
    click.echo(f"deleted {reader.uri}: {what}", err=True)


def _warn(problem: str) -> None:
    click.echo(f"warning: {problem}", err=True)


def _hush(problem: str) -> None:
    """For what is tried again, and told, a little later."""


@click.command()
@store_option
@click.option(
    "--older-than",
    "older_than_seconds",
    metavar="AGE",
    default="7d",
    show_default=True,
    callback=to_age_seconds,
    help="Leave what is younger.",
)
@click.option("--dry-run", is_flag=True, help="Only say what would be removed.")
@json_option
def gc(store: str | None, older_than_seconds: float, dry_run: bool, as_json: bool) -> None:
    """Remove what nobody can use any more.

    That is: checkpoints without a manifest, checkpoints that a later attempt has superseded, both
    also of a study's trials, runs whose deletion was cut off, and uploads whose writer was killed,
    which no list of objects shows and which a store bills all the same. Runs that go on are left
    alone; a lifecycle rule of the bucket (AbortIncompleteMultipartUpload) removes their uploads
    too.
    """
    from jobs.retention import collect, describe_unfinished, find_garbage
    from jobs.spec import format_bytes
    from jobs.terminal import print_table

    runs = open_runs(store, needed_for="shoal gc")
    found = list(
        find_garbage(runs, older_than_seconds=older_than_seconds, now=time.time(), tell=_warn)
    )
    if not dry_run:
        for garbage in found:
            collect(runs, garbage, tell=_warn)
    if as_json:
        print_json({"removed": not dry_run, "garbage": [g.to_json() for g in found]})
        return
    if found:
        print_table(
            ["run", "what", "why", "objects", "size"],
            [
                [
                    g.run_id,
                    g.what,
                    g.why,
                    str(len(g.heads) or len(g.unfinished)),
                    format_bytes(g.num_bytes) if g.heads else "-",
                ]
                for g in found
            ],
            right={"objects", "size"},
        )
    total = format_bytes(sum(g.num_bytes for g in found))
    if num_unfinished := sum(len(g.unfinished) for g in found):
        total += f" and {describe_unfinished(num_unfinished)}"
    click.echo(f"{total} {'would be' if dry_run else 'were'} removed", err=True)
