"""`torchrun --nproc-per-node 2 -m trainers JOB.yaml`: the same job without Ray.

The workers are those that torchrun started, or this one process; the job's `workers.count` must
say as many, since it decides how rows are dealt. The run folder is the same as that of
`shoal run`, and the same command with the same --run-id resumes it.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click

from cluster.lease import acquire
from cluster.storage import ObjectExists, open_store
from jobs.errors import Problem, ShoalError, SpecError, render_error
from jobs.parse import load_spec, spec_from_json, with_absolute_paths
from jobs.record import Outcome, RunPaths
from jobs.spec import JobSpec
from trainers.attempt import Assignment
from trainers.controls import last_request
from trainers.finish import build_result
from trainers.session import ProcessSession
from trainers.worker import train_worker

_LEASE_SECONDS = 60.0


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("job", type=click.Path(path_type=Path), metavar="JOB.yaml")
@click.option("--set", "overrides", multiple=True, metavar="PATH=VALUE", help="Change a key.")
@click.option("--run-id", required=True, metavar="ID", help="Name of the run; an old one resumes.")
def main(job: Path, overrides: tuple[str, ...], run_id: str) -> None:
    """Train the job in this process, or in those that torchrun started."""
    try:
        code = _train(with_absolute_paths(load_spec(job, overrides)), run_id)
    except ShoalError as error:
        if os.environ.get("RANK", "0") == "0":
            click.echo(render_error(error), err=True)
        code = error.exit_code
    sys.exit(code)


def _train(spec: JobSpec, run_id: str) -> int:
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size != spec.workers.count:
        raise SpecError(
            Problem(
                f"workers.count is {spec.workers.count}, but {world_size} processes were started",
                f"add --set workers.count={world_size}, or start "
                f"torchrun --nproc-per-node {spec.workers.count}",
            )
        )
    store = open_store(spec.store.uri, spec.store.access)
    paths = RunPaths(run_id)
    with ProcessSession(use_gpu=bool(spec.workers.gpus)) as session:
        if session.rank != 0:
            assignment = Assignment(spec, run_id, generation=0, controls_seen=0)
            return _exit_code(train_worker(session, assignment))
        try:
            store.write_if_absent(paths.spec, spec.to_json().encode())
        except ObjectExists:
            _refuse_other_job(spec, spec_from_json(store.read(paths.spec)), run_id)
        with acquire(store, paths.lease, ttl_seconds=_LEASE_SECONDS, wait=True) as lease:
            # Requests before this start were for the one before; before the first they count.
            seen = last_request(store, paths) if lease.generation > 1 else 0
            assignment = Assignment(spec, run_id, lease.generation, controls_seen=seen)
            outcome = train_worker(session, assignment)
            lease.check()
            result = build_result(spec, store, paths, generation=lease.generation, ended=outcome)
            store.write(paths.result, result.to_bytes())
        click.echo(f"{result.state.value} at step {result.step}: {store.uri}/{run_id}", err=True)
        if result.failure is not None:
            problems = (Problem(message, hint) for message, hint in result.failure.problems)
            click.echo(render_error(ShoalError(*problems)), err=True)
        return _exit_code(outcome)


def _exit_code(outcome: Outcome) -> int:
    return outcome.failure.exit_code if outcome.failure else outcome.state.exit_code


def _refuse_other_job(own: JobSpec, held: JobSpec, run_id: str) -> None:
    """SpecError where the run of that id is another job's; operation and epochs may differ."""
    for group in ("architecture", "data_order"):
        if own.digests()[group] != held.digests()[group]:
            raise SpecError(
                Problem(
                    f"the run {run_id} exists and is another job's ({group.replace('_', ' ')})",
                    "choose another --run-id",
                )
            )


if __name__ == "__main__":
    main()
