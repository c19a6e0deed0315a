"""`shoal run`, `submit` and `resume`: a run starts, or starts again."""

from __future__ import annotations

import shlex
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from jobs.commands.job_file import job_argument
from jobs.commands.target import (
    context_option,
    job_file_of_store,
    json_option,
    open_run,
    print_json,
    refuse_options,
    run_argument,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cluster.kuberay import KubeRay
    from jobs.runs import RunReader
    from jobs.spec import JobSpec
    from jobs.submit import OpenKubeRay, SubmittedRun

run_id_option = click.option(
    "--run-id", metavar="ID", help="Id of the run; default: the job's name and a short suffix."
)
skip_check_option = click.option(
    "--skip-check", is_flag=True, help="Start without testing store, data and model before."
)
record_only_option = click.option(
    "--record-only",
    is_flag=True,
    help="Of a run on Kubernetes: only record it, and print the command that starts it, for "
    "kubectl.",
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
@context_option
@record_only_option
@json_option
def submit(
    job: Path,
    overrides: tuple[str, ...],
    run_id: str | None,
    skip_check: bool,
    context: str | None,
    record_only: bool,
    as_json: bool,
) -> None:
    """Start a run in the background and print its URI at once.

    Where cluster.kind is kuberay it runs on Kubernetes, as a RayJob. Submitted again with the same
    --run-id, the same job stays one run.
    """
    from jobs.parse import load_spec
    from jobs.spec import StoreAccess
    from jobs.submit import submit_job

    spec = load_spec(job, overrides)
    opener = _opener(spec, context=context, record_only=record_only)
    _check(spec, skip=skip_check, context=context, asks_kubernetes=not record_only)
    submitted = submit_job(spec, run_id=run_id, foreground=False, open_kuberay=opener)
    # What the environment does not say of the way to the store is in the job file.
    store = None if spec.store.access == StoreAccess() else str(job)
    tell_start(submitted, store=store, context=context, as_json=as_json)


def _opener(spec: JobSpec, *, context: str | None, record_only: bool) -> OpenKubeRay | None:
    """How the run's Kubernetes cluster is reached; None for other runs, and where that is left to
    the user. Raises SpecError for options without effect, EnvironmentFault without the client."""
    from cluster.kuberay_config import require_client
    from jobs.spec import KubeRayCluster

    if not isinstance(spec.cluster, KubeRayCluster):
        refuse_options(
            spec.cluster.kind, {"--context": context is not None, "--record-only": record_only}
        )
        return None
    if record_only:
        return None
    require_client()
    return partial(open_kuberay, context)


def refuse_without_kubernetes(
    reader: RunReader, overrides: Sequence[str] = (), *, context: str | None, record_only: bool
) -> None:
    """Raises SpecError for options about Kubernetes where the run is not there, nor goes there."""
    from jobs.spec import KubeRayCluster

    cluster = reader.spec().cluster
    is_moved = any(o.partition("=")[0].strip().startswith("cluster") for o in overrides)
    if not isinstance(cluster, KubeRayCluster) and not is_moved:
        refuse_options(
            cluster.kind, {"--context": context is not None, "--record-only": record_only}
        )


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
@context_option
@record_only_option
@click.pass_context
def resume(
    ctx: click.Context,
    run: str,
    store: str | None,
    overrides: tuple[str, ...],
    background: bool,
    no_progress: bool,
    context: str | None,
    record_only: bool,
) -> None:
    """Go on with a run that was stopped, failed or was killed, from its last checkpoint.

    On Kubernetes a new RayJob takes the place of the old one, and the command returns.
    """
    from jobs.foreground import attend
    from jobs.situation import read_situation
    from jobs.submit import resume_run

    reader = open_run(run, store)
    reader.spec_head()
    before = read_situation(reader).generation
    refuse_without_kubernetes(reader, overrides, context=context, record_only=record_only)
    submitted = resume_run(
        reader.store,
        reader.run_id,
        overrides=overrides,
        foreground=not background,
        open_kuberay=None if record_only else partial(open_kuberay, context),
    )
    if background or submitted.kubectl or submitted.rayjob:
        tell_start(submitted, store=job_file_of_store(store), context=context, as_json=False)
        return
    ctx.exit(
        attend(
            submitted,
            reader,
            show_progress=not no_progress,
            after_generation=before,
        )
    )


def open_kuberay(context: str | None, namespace: str) -> KubeRay:
    from cluster.kuberay import KubeRay

    return KubeRay.of(namespace, context=context, tell=_say)


def _say(sentence: str) -> None:
    click.echo(sentence, err=True)


def _check(
    spec: JobSpec, *, skip: bool, context: str | None = None, asks_kubernetes: bool = True
) -> None:
    if not skip:
        from jobs.checks.finding import Verdict
        from jobs.preflight import check_job

        checked = check_job(spec, context=context, asks_kubernetes=asks_kubernetes)
        for finding in checked.findings:
            if finding.verdict is Verdict.WARNING:
                hint = f" (hint: {finding.hint})" if finding.hint else ""
                click.echo(f"warning: {finding.message}{hint}", err=True)
        checked.raise_problems()


def tell_start(
    submitted: SubmittedRun, *, store: str | None, context: str | None = None, as_json: bool
) -> None:
    """What is to be known of a run that was started in the background, or is to be started."""
    command, rayjob = submitted.start_command(store=store), submitted.rayjob
    if as_json:
        place = rayjob and {"name": rayjob.name, "namespace": rayjob.namespace}
        print_json(
            {
                "run_id": submitted.run_id,
                "uri": submitted.uri,
                "start_command": command,
                "rayjob": place,
            }
        )
        return
    click.echo(submitted.uri)
    if command is not None:
        click.echo(f"recorded; start it with: {command}", err=True)
    elif rayjob is not None:
        options = "".join(
            f" {option} {shlex.quote(value)}"
            for option, value in (("--store", store), ("--context", context))
            if value is not None
        )
        click.echo(
            f"submitted as the RayJob {rayjob.name} in the namespace {rayjob.namespace}", err=True
        )
        for verb, what in _FOLLOWING.items():
            follow = f"shoal {verb} {shlex.quote(submitted.uri)}{options}"
            click.echo(f"  {follow}    {what}", err=True)
    elif sys.stderr.isatty():
        click.echo(f"follow it with: shoal watch {submitted.uri}", err=True)


_FOLLOWING = {
    "watch": "follow it",
    "logs --follow": "what it says",
    "stop": "have it save and end",
}
