"""`shoal stop`: ask a run to end, from any machine."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from jobs.commands.target import context_option, open_run, run_argument

if TYPE_CHECKING:
    from jobs.rayjob_changes import Stopper
    from jobs.runs import RunReader


@click.command()
@run_argument
@context_option
@click.option("--wait", is_flag=True, help="Return when the run has ended, and exit as it did.")
@click.pass_context
def stop(ctx: click.Context, run: str, store: str | None, context: str | None, wait: bool) -> None:
    """Ask a run to save what it has trained and end. `shoal resume RUN` goes on from there.

    Of a run on Kubernetes, the second request ends it at once: its RayJob is deleted, and what it
    has trained since its last checkpoint is lost. With --wait the RayJob is deleted once the run
    has ended.
    """
    from jobs.errors import Problem, SpecError
    from jobs.foreground import requester
    from jobs.onlooker import Onlooker
    from jobs.rayjob_changes import Stopper
    from jobs.rayjobs import refuse_context
    from jobs.situation import read_situation
    from jobs.submit import request_stop

    reader = open_run(run, store)
    reader.spec_head()
    refuse_context(reader, context)
    situation = read_situation(reader, onlooker=Onlooker())
    stopper = Stopper(reader, context=context, tell=_warn)
    step = stopper.step(situation)
    if step == "over":
        raise SpecError(
            Problem(
                f"{reader.uri} has ended already: {situation.state}",
                f"see how with: shoal status {reader.uri}",
            )
        )
    if step == "delete":
        stopper.delete()
        click.echo(
            f"deleted the RayJob of {reader.uri}; go on with: shoal resume {reader.uri}", err=True
        )
        return
    request_stop(reader.store, reader.run_id, by=requester())
    stopper.end_retries()
    again = "; ask again to end it at once" if stopper.has_rayjob else ""
    click.echo(f"asked to stop; the run saves what it has trained and ends{again}", err=True)
    if wait:
        ctx.exit(_wait(reader, stopper, context))


def _wait(reader: RunReader, stopper: Stopper, context: str | None) -> int:
    from jobs.rayjobs import RayJobOnlooker
    from jobs.watch import watch_run

    beside = RayJobOnlooker(reader, context=context, follows=True)
    code = watch_run(reader, beside=beside, wake=beside.wake).situation.exit_code
    stopper.tidy()
    return code


def _warn(problem: str) -> None:
    click.echo(f"warning: {problem}", err=True)
