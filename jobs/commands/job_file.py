"""`shoal check` and `shoal schema`: about a job file, before there is a run."""

from __future__ import annotations

import json
from pathlib import Path

import click

from jobs.commands.target import json_option


def job_argument(command: click.decorators.FC) -> click.decorators.FC:
    """JOB.yaml and --set, for `load_spec(job, overrides)`."""
    command = click.option(
        "--set",
        "overrides",
        metavar="PATH=VALUE",
        multiple=True,
        help="Set a key of the job file, such as optimizer.learning_rate=1e-4. Repeatable.",
    )(command)
    return click.argument("job", metavar="JOB.yaml", type=click.Path(path_type=Path))(command)


@click.command()
@job_argument
@json_option
def check(job: Path, overrides: tuple[str, ...], as_json: bool) -> None:
    """Test a job file against its store, data, model and this machine.

    Every problem at once; nothing is created and no training is started. Of a search also what it
    amounts to: space, trials, how many at a time with which resources, epochs and time. `shoal
    plan` is the same.
    """
    from jobs.parse import load_spec
    from jobs.preflight import check_job, show_check

    checked = check_job(load_spec(job, overrides))
    show_check(checked, as_json=as_json)
    click.get_current_context().exit(checked.exit_code)


@click.command()
def schema() -> None:
    """Print the JSON schema of the job file, for editors and other programs."""
    from jobs.parse import json_schema

    click.echo(json.dumps(json_schema(), indent=2))
