"""`shoal stop`: ask a run to end, from any machine."""

from __future__ import annotations

import click

from jobs.commands.target import open_run, run_argument


@click.command()
@run_argument
@click.option("--wait", is_flag=True, help="Return when the run has ended, and exit as it did.")
@click.pass_context
def stop(ctx: click.Context, run: str, store: str | None, wait: bool) -> None:
    """Ask a run to save what it has trained and end. `shoal resume RUN` goes on from there."""
    from jobs.errors import Problem, SpecError
    from jobs.foreground import requester
    from jobs.onlooker import Onlooker
    from jobs.situation import read_situation
    from jobs.submit import request_stop

    reader = open_run(run, store)
    reader.spec_head()
    situation = read_situation(reader, onlooker=Onlooker())
    if situation.is_over:
        raise SpecError(
            Problem(
                f"{reader.uri} has ended already: {situation.state}",
                f"see how with: shoal status {reader.uri}",
            )
        )
    request_stop(reader.store, reader.run_id, by=requester())
    click.echo("asked to stop; the run saves what it has trained and ends", err=True)
    if wait:
        from jobs.watch import watch_run

        ctx.exit(watch_run(reader).situation.exit_code)
