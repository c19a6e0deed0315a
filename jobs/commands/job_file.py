"""`shoal check` and `shoal schema`: about a job file, before there is a run."""

from __future__ import annotations

import json
from pathlib import Path

import click

from jobs.commands.target import context_option, json_option, refuse_options


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
@context_option
@json_option
def check(job: Path, overrides: tuple[str, ...], context: str | None, as_json: bool) -> None:
    """Test a job file against its store, data, model, and this machine or its Kubernetes cluster.

    Every problem at once; nothing is created and no training is started. Of a search also what it
    amounts to: space, trials, how many at a time with which resources, epochs and time. On
    Kubernetes also which pods a submit would create, and what they ask for. `shoal plan` is the
    same.
    """
    from jobs.parse import load_spec
    from jobs.preflight import check_job, show_check

    spec = load_spec(job, overrides)
    if spec.cluster.kind != "kuberay":
        refuse_options(spec.cluster.kind, {"--context": context is not None})
    checked = check_job(spec, context=context)
    show_check(checked, as_json=as_json)
    click.get_current_context().exit(checked.exit_code)


@click.command()
def schema() -> None:
    """Print the JSON schema of the job file, for editors and other programs."""
    from jobs.parse import json_schema

    click.echo(json.dumps(json_schema(), indent=2))
