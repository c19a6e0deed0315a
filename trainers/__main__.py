"""`torchrun --nproc-per-node 2 -m trainers JOB.yaml`: the same job without Ray.

The workers are those that torchrun started, or this one process: as many as the job's
`workers.count` says, or from `workers.min` up to it. The run folder is the same as that of
`shoal run`, and the same command with the same --run-id resumes it.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import click

from cluster.lease import Held, acquire
from cluster.storage import ObjectExists, Store, open_store, read_whole
from jobs.errors import Problem, ShoalError, SpecError, render_error
from jobs.parse import (
    check_run_id,
    load_spec,
    may_change_on_resume,
    recorded_spec,
    with_absolute_paths,
)
from jobs.record import DAMAGED_RECORD_HINT, Amendment, Outcome, RunPaths
from jobs.spec import JobSpec
from trainers.assignment import Assignment
from trainers.controls import last_request
from trainers.finish import build_result, write_result
from trainers.patience import Patience
from trainers.records import read_attempts
from trainers.session import ProcessSession
from trainers.tracking.feeds import tell_end
from trainers.worker import train_worker

_LEASE_SECONDS = 60.0
_WATCH_SECONDS = 0.5


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("job", type=click.Path(path_type=Path), metavar="JOB.yaml")
@click.option("--set", "overrides", multiple=True, metavar="PATH=VALUE", help="Change a key.")
@click.option("--run-id", required=True, metavar="ID", help="Name of the run; an old one resumes.")
def main(job: Path, overrides: tuple[str, ...], run_id: str) -> None:
    """Train the job in this process, or in those that torchrun started."""
    try:
        code = _train(with_absolute_paths(load_spec(job, overrides)), check_run_id(run_id))
    except ShoalError as error:
        # On every rank: one of them may have met what no other did.
        click.echo(render_error(error), err=True)
        code = error.exit_code
    sys.exit(code)


def _train(spec: JobSpec, run_id: str) -> int:
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size not in spec.workers.counts:
        few, most = spec.workers.fewest, spec.workers.count
        given = f"workers.count is {most}" if few == most else f"workers may be {few} to {most}"
        raise SpecError(
            Problem(
                f"{given}, but {world_size} processes were started",
                f"add --set workers.count={world_size}, or start torchrun --nproc-per-node {most}",
            )
        )
    store = open_store(spec.store.uri, spec.store.access)
    paths = RunPaths(run_id)
    with ProcessSession(use_gpu=bool(spec.workers.gpus)) as session:
        if session.rank != 0:
            assignment = Assignment(spec, run_id, generation=0, controls_seen=0)
            return _exit_code(train_worker(session, assignment))
        try:
            store.write_if_absent(paths.spec, spec.to_bytes())
        except ObjectExists:
            _changes(store, paths, spec)  # refuses another job before it waits for the lease
        with acquire(store, paths.lease, ttl_seconds=_LEASE_SECONDS, wait=True) as lease:
            if spec.unguarded is not None:
                sys.stderr.write(f"shoal: {spec.unguarded}\n")
            seen = _controls_seen(store, paths, generation=lease.generation)
            assignment = Assignment(spec, run_id, lease.generation, controls_seen=seen)
            _record_changes(store, paths, spec)
            with _ends_with(lease):
                outcome = train_worker(session, assignment)
            patience = Patience(limit_seconds=60 * spec.retries.wait_minutes)
            patient = patience.store(store)
            patience.call(lease.confirm)
            result = build_result(patient, paths, generation=lease.generation, ended=outcome)
            tell_end(assignment, patient, result, warn=lambda told: click.echo(told, err=True))
            write_result(patient, paths, result)
        click.echo(f"{result.state.value} at step {result.step}: {store.uri}/{run_id}", err=True)
        if result.failure is not None:
            problems = (Problem(message, hint) for message, hint in result.failure.problems)
            click.echo(render_error(ShoalError(*problems)), err=True)
        return _exit_code(outcome)


def _controls_seen(store: Store, paths: RunPaths, *, generation: int) -> int:
    """Number of the newest request that was meant for a start before this one.

    Before the first start all requests count. Where torchrun has started the ranks again, those
    count that came since it was started itself.
    """
    if generation == 1:
        return 0
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
        last = read_attempts(store, paths)[-1:]
        if last and last[0].generation == generation - 1:
            return last[0].controls_seen
    return last_request(store, paths)


def _exit_code(outcome: Outcome) -> int:
    return outcome.failure.exit_code if outcome.failure else outcome.state.exit_code


@contextmanager
def _ends_with(lease: Held) -> Iterator[None]:
    """Inside the block the loss of the lease ends this process, and with it the other ranks."""
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(_WATCH_SECONDS):
            if lease.lost.is_set():
                # Another driver may have started: nothing more may be written from here.
                sys.stderr.write(f"shoal: {lease.loss}; ending at once\n")
                sys.stderr.flush()
                os._exit(3)

    thread = threading.Thread(target=watch, name="shoal-watch", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _record_changes(store: Store, paths: RunPaths, spec: JobSpec) -> None:
    """Records what differs from the run's job, as a resume does; the caller holds the lease."""
    changes = _changes(store, paths, spec)
    if changes:
        overrides = tuple(
            f"{path}={json.dumps(own, ensure_ascii=False)}" for path, own, _ in changes
        )
        amendment = Amendment(overrides=overrides, made_at=time.time())
        number = len(list(store.list(paths.amendments))) + 1
        store.write_if_absent(paths.amendment(number), amendment.to_bytes())


def _changes(store: Store, paths: RunPaths, spec: JobSpec) -> list[tuple[str, Any, Any]]:
    """(path, own value, value in the run) of what a resume may change; SpecError for more."""
    differing = list(_differences(spec.model_dump(mode="json"), _recorded(store, paths)))
    refused = [change for change in differing if not may_change_on_resume(change[0])]
    if refused:
        raise SpecError(
            *(
                Problem(
                    f"{path} is {json.dumps(own)}, but {json.dumps(held)} in the run "
                    f"{paths.run_id}, which exists",
                    "go on with the job as it was, or choose another --run-id",
                )
                for path, own, held in refused
            )
        )
    return differing


def _recorded(store: Store, paths: RunPaths) -> dict[str, Any]:
    """The run's job as it is now, as a tree of plain values: all amendments applied."""
    overrides: list[str] = []
    hint = DAMAGED_RECORD_HINT
    for head in store.list(paths.amendments):
        amendment = read_whole(store, head.key, Amendment.model_validate_json, hint=hint)
        overrides += amendment.overrides
    parse = partial(recorded_spec, overrides=overrides, where=f"{store.uri}/{paths.spec}")
    return read_whole(store, paths.spec, parse, hint=hint).model_dump(mode="json")


def _differences(
    own: dict[str, Any], held: dict[str, Any], group: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    """(dotted path, own value, held value) of each difference.

    Groups of different keys differ as a whole: an override cannot take a key away.
    """
    for key, value in own.items():
        other, path = held[key], group + key
        if isinstance(value, dict) and isinstance(other, dict) and value.keys() == other.keys():
            yield from _differences(value, other, path + ".")
        elif value != other:
            yield path, value, other


if __name__ == "__main__":
    main()
