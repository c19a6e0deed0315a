"""`shoal list`, `status`, `watch` and `checkpoints`: what runs are doing and have saved."""

from __future__ import annotations

import click

from jobs.commands.target import (
    context_option,
    json_option,
    open_run_or_trial,
    open_runs,
    print_json,
    run_argument,
    store_option,
    trial_option,
)
from jobs.errors import Problem, ShoalError, SpecError, render_error


@click.command("list")
@store_option
@context_option
@json_option
def list_runs(store: str | None, context: str | None, as_json: bool) -> None:
    """The runs in a store, the newest first."""
    from jobs.overview import read_overviews, show_overviews
    from jobs.rayjobs import with_rayjobs

    overviews = read_overviews(open_runs(store, needed_for="shoal list"))
    overviews = with_rayjobs(overviews, context=context)
    if as_json:
        print_json({"runs": [overview.to_json() for overview in overviews]})
    else:
        show_overviews(overviews)


@click.command()
@run_argument
@trial_option
@context_option
@json_option
@click.option("--prometheus", is_flag=True, help="Print the numbers in Prometheus' text format.")
def status(
    run: str,
    store: str | None,
    trial: int | None,
    context: str | None,
    as_json: bool,
    prometheus: bool,
) -> None:
    """What a run does and why: progress, metrics, attempts, checkpoints, where the time went.

    The exit code is 0 whatever the run's state is; see `state` with --json.
    """
    from jobs.rayjobs import RayJobOnlooker, refuse_context
    from jobs.status import read_status

    _refuse(as_json and prometheus, "--prometheus with --json", "remove one of them")
    reader = open_run_or_trial(run, store, trial)
    refuse_context(reader, context)
    found = RayJobOnlooker(reader, context=context)(read_status(reader))
    if prometheus:
        from jobs.prometheus import exposition
        from jobs.terminal import show_warnings

        click.echo(exposition(found, reader.metrics_lines()), nl=False)
        show_warnings(found.problems)
    elif as_json:
        print_json(found.to_json())
    else:
        from jobs.status_view import show_status

        show_status(found)


@click.command()
@run_argument
@trial_option
@context_option
@click.pass_context
def watch(
    ctx: click.Context, run: str, store: str | None, trial: int | None, context: str | None
) -> None:
    """Follow a run live until it ends, and exit as it did.

    Ctrl-C ends the watching, not the run.
    """
    from jobs.rayjobs import RayJobOnlooker, refuse_context
    from jobs.watch import watch_run

    reader = open_run_or_trial(run, store, trial)
    refuse_context(reader, context)
    beside = RayJobOnlooker(reader, context=context, follows=True)
    try:
        ended = watch_run(reader, beside=beside, wake=beside.wake)
    except KeyboardInterrupt:
        click.echo(f"the run goes on; stop it with: shoal stop {reader.uri}", err=True)
        ctx.exit(130)
    ctx.exit(ended.situation.exit_code)


@click.command()
@run_argument
@trial_option
@click.option("--verify", is_flag=True, help="Read every byte again and compare its sha256.")
@click.option(
    "--consolidate",
    "step",
    metavar="STEP",
    type=int,
    help="Make the plain model folder of this step's checkpoint, and print where it is.",
)
@click.option(
    "--to",
    metavar="PLACE",
    help="With --consolidate: a new folder or S3 URI. Default: models/ in the run's folder.",
)
@json_option
@click.pass_context
def checkpoints(
    ctx: click.Context,
    run: str,
    store: str | None,
    trial: int | None,
    verify: bool,
    step: int | None,
    to: str | None,
    as_json: bool,
) -> None:
    """The checkpoints of a run: step, size, metrics; with --verify, whether they are whole."""
    from jobs.checkpoints import consolidate, read_checkpoints, show_checkpoints
    from jobs.terminal import show_warnings

    reader = open_run_or_trial(run, store, trial)
    reader.spec_head()
    if step is not None:
        _refuse(verify, "--verify", "--consolidate verifies what it reads: remove --verify")
        made = consolidate(reader, step, to=to)
        show_warnings(reader.problems)
        if as_json:
            print_json(made)
        else:
            click.echo(made["uri"])
        return
    _refuse(to is not None, f"--to {to}", "add --consolidate STEP, or remove --to")
    found = read_checkpoints(reader, verify=verify)
    problems = reader.problems
    if as_json:
        states = [checkpoint.to_json() for checkpoint in found]
        print_json({"checkpoints": states, "problems": problems})
    else:
        show_checkpoints(found)
    if verify and problems:
        click.echo(render_error(ShoalError(*problems)), err=True)
    else:
        show_warnings(problems)
    if verify and (problems or any(checkpoint.faults for checkpoint in found)):
        ctx.exit(1)


def _refuse(is_given: bool, option: str, hint: str) -> None:
    if is_given:
        raise SpecError(Problem(f"{option} has no effect here", hint))
