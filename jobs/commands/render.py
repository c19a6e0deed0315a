"""`shoal render`: the RayJob of a job, or of a recorded run, for kubectl."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from jobs.commands.target import is_job_file, json_option, open_run, print_json, store_option
from jobs.errors import Problem, SpecError

if TYPE_CHECKING:
    from cluster.rayjob import Manifest


@click.command()
@click.argument("target", metavar="JOB.yaml|RUN")
@click.option(
    "--set",
    "overrides",
    metavar="PATH=VALUE",
    multiple=True,
    help="Set a key of the job file, such as workers.count=4. Repeatable.",
)
@click.option("--run-id", metavar="ID", help="Id of a run of the job; default: the job's name.")
@store_option
@json_option
def render(
    target: str, overrides: tuple[str, ...], run_id: str | None, store: str | None, as_json: bool
) -> None:
    """Print the RayJob of a run whose cluster.kind is kuberay, and the disruption budgets of its
    pods, as YAML.

    Of a run that was submitted, for kubectl apply; or of a job file, to look at.
    """
    from cluster.disruption import disruption_budgets

    if is_job_file(target) or Path(target).is_file():
        _refuse("of a run", target, {"--store": store})
        rayjob = _of_job(Path(target), overrides, run_id=run_id)
    else:
        _refuse("of a job file", target, {"--set": overrides, "--run-id": run_id})
        rayjob = _of_run(target, store)
    manifests = [rayjob, *disruption_budgets(rayjob)]
    if as_json:
        print_json({"apiVersion": "v1", "kind": "List", "items": manifests})
    else:
        click.echo(_as_yaml(manifests), nl=False)


def _of_job(job: Path, overrides: tuple[str, ...], *, run_id: str | None) -> Manifest:
    from jobs.parse import load_spec
    from jobs.submit import rayjob_of_job

    rayjob = rayjob_of_job(load_spec(job, overrides), run_id=run_id)
    click.echo(
        f"a preview: the RayJob starts a run that is recorded before, with: shoal submit {job}",
        err=True,
    )
    return rayjob


def _of_run(run: str, store: str | None) -> Manifest:
    from jobs.submit import rayjob_of_run

    return rayjob_of_run(open_run(run, store))


def _refuse(whose: str, target: str, options: dict[str, object]) -> None:
    """Raises SpecError for each given option that has no effect on the target."""
    problems = [
        Problem(f"{option} is an option {whose}, without effect on {target}", f"remove {option}")
        for option, value in options.items()
        if value
    ]
    if problems:
        raise SpecError(*problems)


def _as_yaml(manifests: list[Manifest]) -> str:
    import yaml

    # The entrypoint stays on one line, so that it can be copied.
    text: str = yaml.safe_dump_all(manifests, sort_keys=False, allow_unicode=True, width=4096)
    return text
