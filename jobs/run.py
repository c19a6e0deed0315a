"""The program that drives a run, the same on a laptop and in a cluster: `python -m jobs.run URI`.

main -> drive        lease, result, report
          _fit       Ray, signals, the workers, or the trials of a study
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from types import FrameType
from typing import TYPE_CHECKING

import click
import psutil

from cluster.grace import saving_seconds
from cluster.lease import Held, acquire
from cluster.ray_runtime import is_attached, own_node_watched, ray_cluster
from cluster.storage import StorageError, Store, open_store, split_uri
from jobs.capture import captured_output
from jobs.errors import ShoalError, render_error
from jobs.exporter import metrics_served
from jobs.record import NOTHING_PAST, Failure, Lease, Outcome, Past, Result, RunPaths, Source, State
from jobs.report import write_report
from jobs.runs import RunReader
from jobs.spec import KubeRayCluster, StoreAccess
from jobs.submit import record_changes, request_stop
from trainers.controls import ask_to_yield, last_attempt
from trainers.fork_server import fork_server
from trainers.patience import Patience
from trainers.telemetry import IMPATIENT, Telemetry
from trainers.tracking.feeds import tell_end

if TYPE_CHECKING:
    from trainers.assignment import Assignment

LEASE_SECONDS = 60.0
"""How long a new driver waits to see whether one on another machine lives."""
_WATCH_SECONDS = 0.5
log = logging.getLogger("shoal.run")


@click.command()
@click.argument("run_uri")
@click.option(
    "--store-access",
    envvar="SHOAL_STORE_ACCESS",
    default="{}",
    help="JSON of the store's access, without secrets.",
)
@click.option(
    "--past-controls",
    envvar="SHOAL_PAST_CONTROLS",
    type=int,
    default=0,
    help="Requests up to this one are old.",
)
@click.option(
    "--past-generation",
    envvar="SHOAL_PAST_GENERATION",
    type=int,
    default=0,
    help="Ends up to this driver's are old.",
)
@click.option("--set", "overrides", multiple=True, help="Changes of the run's job, for good.")
@click.option("--attended-by", type=int, help="Stop the run if this process is gone.")
def main(
    run_uri: str,
    store_access: str,
    past_controls: int,
    past_generation: int,
    overrides: tuple[str, ...],
    attended_by: int | None,
) -> None:
    """Drive a run to its end; the exit code says how it ended."""
    try:
        parent, run_id = split_uri(run_uri)
        store = open_store(parent, StoreAccess.model_validate_json(store_access))
        past = Past(controls=past_controls, generation=past_generation)
        code = drive(store, run_id, past=past, overrides=overrides, attended_by=attended_by)
    except ShoalError as error:
        click.echo(render_error(error), err=True)
        code = error.exit_code
    sys.exit(code)


def drive(
    store: Store,
    run_id: str,
    *,
    past: Past = NOTHING_PAST,
    overrides: Sequence[str] = (),
    attended_by: int | None = None,
) -> int:
    """Takes the run's lease, trains, and writes result and report; the exit code.

    `overrides` change the run's job, once the lease is held: a driver that is refused leaves no
    trace.

    Where a driver after `past` has ended the run for a reason that a restart would meet again,
    nothing is started.
    """
    began_at = round(time.time(), 3)
    reader, paths = RunReader(store, run_id), RunPaths(run_id)
    reader.spec()
    ended_before = reader.result()
    if (
        ended_before is not None
        and ended_before.generation > past.generation
        and ended_before.state.ends_retries
    ):
        sys.stderr.write(f"shoal: the run has ended: {ended_before.state}\n")
        return ended_before.exit_code
    # Only now what takes time to load: a platform may start an ended run again and again.
    from trainers.assignment import Assignment
    from trainers.finish import build_result, write_result

    with acquire(store, paths.lease, ttl_seconds=LEASE_SECONDS, wait=_say_waiting) as lease:
        record_changes(store, run_id, overrides)
        spec = reader.spec()
        with ExitStack() as stack:
            impatient = open_store(spec.store.uri, spec.store.access, transfer=IMPATIENT)
            telemetry = stack.enter_context(
                Telemetry(impatient, paths, Source(lease.generation, None))
            )
            output = logging.getLogger("shoal.output")
            output.setLevel(logging.DEBUG)
            stack.enter_context(captured_output(lambda line: output.debug("%s", line)))
            # It may have waited for the lease, which is the run's time too.
            telemetry.state(State.STARTING, "starting Ray and the workers", began_at=began_at)
            if spec.unguarded is not None:
                telemetry.event("warning", spec.unguarded)
            if isinstance(spec.cluster, KubeRayCluster):
                stack.enter_context(metrics_served(impatient, run_id, warn=telemetry.warn))
            assignment = Assignment(spec, run_id, lease.generation, past.controls)
            ended = _fit(assignment, store, lease, telemetry, attended_by=attended_by)
            if isinstance(ended, Failure) and ended.traceback:
                log.error("%s", ended.traceback)
            patience = Patience(limit_seconds=60 * spec.retries.wait_minutes)
            patient = patience.store(store)
            patience.call(lease.confirm)
            result = build_result(patient, paths, generation=lease.generation, ended=ended)
            telemetry.state(result.state, _sentence(result), step=result.step)
        # Lines are durable now, so the report can tell all of it; the result is the last object.
        patience.call(lease.confirm)
        _report(patient, run_id, result)
        tell_end(assignment, patient, result, warn=_say)
        write_result(patient, paths, result)
        return result.exit_code


def _fit(
    assignment: Assignment,
    store: Store,
    lease: Held,
    telemetry: Telemetry,
    *,
    attended_by: int | None,
) -> Outcome | Failure:
    """The workers' outcome. Signals, and the loss of who attends, become requests to the run."""
    with _watched(assignment, store, lease, attended_by=attended_by) as taken:
        try:
            with ExitStack() as stack:
                workers = assignment.spec.workers
                # On a cluster that is there, workers are on other machines. With a GPU, no module
                # may have touched it before the fork, which only a GPU can show.
                forks = not is_attached() and not workers.gpus
                python = stack.enter_context(fork_server()) if forks else None
                # Trials with one worker have it in the processes of Ray Tune, whose command is that
                # of all.
                is_in_slot = assignment.spec.search is not None and workers.count == 1
                stack.enter_context(ray_cluster(workers, python=python if is_in_slot else None))
                stack.enter_context(own_node_watched(taken.announce))
                # Not in the main thread: there Ray would take SIGINT for an abort without a
                # checkpoint.
                work: Callable[..., Outcome | Failure]
                if assignment.spec.search is not None:
                    from jobs.search import search as work
                else:
                    from trainers.fit import fit as work
                given = partial(
                    work, assignment, telemetry, python=python, is_taken=taken.is_announced
                )
                return _in_thread(given, taken=taken)
        except Exception as error:
            return Failure.of(error, where="driver")


class _Taken:
    """Whether the platform has announced that it takes this machine."""

    def __init__(self, when_announced: Callable[[], None]) -> None:
        self._when_announced = when_announced
        self._announced = threading.Event()

    def announce(self) -> None:
        """From a signal handler or any thread; the first time counts."""
        if not self._announced.is_set():
            self._announced.set()
            threading.Thread(target=self._when_announced, daemon=True).start()

    def is_announced(self) -> bool:
        return self._announced.is_set()


def _in_thread(work: Callable[[], Outcome | Failure], *, taken: _Taken) -> Outcome | Failure:
    """What `work` gives. Once this machine is taken, it is not waited for longer than there is."""
    limit_seconds = saving_seconds(os.environ)
    ended: list[Outcome | Failure | BaseException] = []

    def run() -> None:
        try:
            ended.append(work())
        except BaseException as error:
            ended.append(error)

    thread = threading.Thread(target=run, name="shoal-fit", daemon=True)
    thread.start()
    deadline: float | None = None
    while thread.is_alive():
        thread.join(_WATCH_SECONDS)
        if taken.is_announced():
            deadline = deadline or time.monotonic() + limit_seconds
            if time.monotonic() > deadline:
                message = (
                    f"the driver's machine is taken, and the workers have not saved their state in "
                    f"{limit_seconds:.0f} s; the last checkpoint before is kept"
                )
                return Failure(
                    state=State.FAILED_INFRA,
                    problems=((message, None),),
                    where="driver",
                    exit_code=State.FAILED_INFRA.exit_code,
                )
    if isinstance(ended[0], BaseException):
        raise ended[0]
    return ended[0]


@contextmanager
def _watched(
    assignment: Assignment, store: Store, lease: Held, *, attended_by: int | None
) -> Iterator[_Taken]:
    """Inside the block signals ask for a stop, and the loss of the lease ends this process.

    On Kubernetes nobody but the platform sends SIGTERM: the pod is taken, as where Ray drains this
    machine, and another driver is to go on. All attempts then save their state and give way.
    """
    run_id = assignment.run_id
    ended = threading.Event()
    asked = threading.Event()
    taken = _Taken(partial(_ask_to_give_way, assignment, store, ended))

    def ask(by: str) -> None:
        if not asked.is_set():
            asked.set()
            ask_to_stop = partial(_ask_to_stop, store, run_id, ended, by=by)
            threading.Thread(target=ask_to_stop, daemon=True).start()

    def on_signal(number: int, frame: FrameType | None) -> None:
        if number != signal.SIGTERM or not isinstance(assignment.spec.cluster, KubeRayCluster):
            ask(signal.Signals(number).name)
        else:
            taken.announce()

    def watch() -> None:
        while not ended.wait(_WATCH_SECONDS):
            if lease.lost.is_set():
                # Another driver may have started: nothing more may be written from here.
                sys.stderr.write(f"shoal: {lease.loss}; ending at once\n")
                _kill_descendants()
                os._exit(3)
            if attended_by is not None and not psutil.pid_exists(attended_by):
                ask("the end of the command that started the run")

    before = {n: signal.signal(n, on_signal) for n in (signal.SIGINT, signal.SIGTERM)}
    thread = threading.Thread(target=watch, name="shoal-watch", daemon=True)
    thread.start()
    try:
        yield taken
    finally:
        ended.set()
        thread.join()
        for number, handler in before.items():
            signal.signal(number, handler)


def _ask_to_stop(store: Store, run_id: str, ended: threading.Event, *, by: str) -> None:
    """Asks the run to stop; where its store is away, once it is back."""
    is_told = False
    while True:
        try:
            request_stop(store, run_id, by=by)
            return
        except StorageError as error:
            if not is_told:
                sys.stderr.write(f"shoal: the request to stop cannot be written yet: {error}\n")
            is_told = True
        if ended.wait(_WATCH_SECONDS):
            return


def _ask_to_give_way(assignment: Assignment, store: Store, ended: threading.Event) -> None:
    """Asks this driver's attempt that goes on, and the one after it, which may be waiting for nodes
    or about to begin, to save its state and end."""
    paths, asked = RunPaths(assignment.run_id), 0
    while not ended.wait(_WATCH_SECONDS):
        try:
            newest = last_attempt(store, paths)
            for attempt in range(max(asked + 1, newest), newest + 2):
                ask_to_yield(
                    store,
                    paths,
                    attempt=attempt,
                    generation=assignment.generation,
                    by="the driver, whose machine is taken",
                )
                asked = attempt
        except StorageError as error:
            sys.stderr.write(f"shoal: the request to give way cannot be written: {error}\n")


def _kill_descendants() -> None:
    for child in psutil.Process().children(recursive=True):
        try:
            child.kill()
        except psutil.NoSuchProcess:
            continue


def _report(store: Store, run_id: str, result: Result) -> None:
    """Writes the report; a failure of it must not cost the run its result."""
    try:
        write_report(store, run_id, result=result)
    except Exception:
        sys.stderr.write("shoal: the report could not be written; try: shoal report RUN\n")
        traceback.print_exc()


def _sentence(result: Result) -> str:
    if result.failure is not None:
        return result.failure.problems[0][0]
    best = result.outcome.trial if result.outcome is not None else None
    if result.state is State.STOPPED:
        if best is not None:
            return f"stopped on request; the best trial so far is {best}"
        return f"stopped on request at step {result.step}"
    if result.outcome is not None and result.outcome.trial is not None:
        return f"done; the best is trial {result.outcome.trial}, at step {result.step}"
    return f"done after step {result.step}"


def _say(message: str) -> None:
    sys.stderr.write(f"shoal: {message}\n")


def _say_waiting(lease: Lease) -> None:
    sys.stderr.write(
        f"shoal: waiting up to {lease.ttl_seconds:.0f} s to see whether the driver {lease.pid} on "
        f"{lease.host} still lives\n"
    )


if __name__ == "__main__":
    main()
