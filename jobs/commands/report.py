"""`shoal report`: the evidence of a run as one HTML file or as JSON."""

from __future__ import annotations

from pathlib import Path

import click

from jobs.commands.target import (
    json_option,
    open_run_or_trial,
    print_json,
    run_argument,
    trial_option,
)


@click.command()
@run_argument
@trial_option
@click.option(
    "--output",
    metavar="FILE",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Where to write the page. Default: RUN-report.html here.",
)
@json_option
def report(
    run: str, store: str | None, trial: int | None, output: Path | None, as_json: bool
) -> None:
    """Build the report of a run from its folder, whatever its state.

    One HTML file that needs nothing else; its path is printed. With --json the numbers instead:
    to stdout, or to FILE.
    """
    from jobs.errors import EnvironmentFault, Problem
    from jobs.report import build_report, render_html, to_json

    reader = open_run_or_trial(run, store, trial)
    built = build_report(reader)
    if as_json and output is None:
        print_json(built)
        return
    path = output or Path(f"{reader.run_id.replace('/', '-')}-report.html")
    text = to_json(built) if as_json else render_html(built)
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise EnvironmentFault(
            Problem(f"{path} cannot be written: {error}", "name another place with --output FILE")
        ) from error
    click.echo(path)
