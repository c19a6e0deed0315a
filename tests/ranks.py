"""Ranks of a run as processes of this machine, without Ray: in seconds, and killed for real.

run_ranks(assignment, world_size=3)                         -> Outcome
run_ranks(assignment, world_size=3, kill=Kill("step", 7))   -> None: SIGKILL for all of them
run_group(assignment, world_size=3)                         -> [Outcome]: what each rank was told
break_group(assignment, world_size=3, before=Breaks())      -> {1: 1}: exit codes by rank
on_ranks(work, world_size=3)                                -> what any function gives on each
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from typing import Any, Literal

from jobs.record import Outcome, RunPaths
from trainers.assignment import Assignment
from trainers.session import Session

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["tests.ranks_preload"])
TIMEOUT_SECONDS = 120

Moment = Literal["step", "evaluation", "upload", "parts", "manifest", "retention"]
"""After the n-th step of rank 0, after its n-th validation (before its commit), while the n-th file
of a checkpoint is uploaded, after the n-th checkpoint's parts (before its manifest), after its
manifest, and after retention."""


@dataclass(frozen=True)
class Kill:
    """When rank 0 sends SIGKILL to the whole group."""

    moment: Moment
    count: int


def run_ranks(
    assignment: Assignment,
    *,
    world_size: int,
    kill: Kill | None = None,
    before: Callable[[], None] | None = None,
) -> Outcome | None:
    """Runs `train_worker` in `world_size` processes; None if they were killed.

    `before` (picklable) is called in each process first.
    """
    port = _free_port()
    receiver, sender = PROCESSES.Pipe(duplex=False)
    ranks = [
        PROCESSES.Process(
            target=_rank,
            args=(assignment, rank, world_size, port, kill, before, dict(os.environ), sender),
        )
        for rank in range(world_size)
    ]
    for rank in ranks:
        rank.start()
    sender.close()
    outcome = _receive(receiver)
    if kill is not None:
        ranks[0].join(TIMEOUT_SECONDS)
        for rank in ranks[1:]:
            rank.kill()
        if ranks[0].exitcode == -signal.SIGKILL:
            outcome = None  # what the others saw of it before they were killed does not count
    for rank in ranks:
        rank.join(TIMEOUT_SECONDS)
    if isinstance(outcome, str):
        raise AssertionError(f"a rank failed:\n{outcome}")
    assert (outcome is None) == (kill is not None), "the ranks ended otherwise than was meant"
    return outcome


def _receive(receiver: Connection) -> Outcome | str | None:
    try:
        if not receiver.poll(TIMEOUT_SECONDS):
            return f"no outcome in {TIMEOUT_SECONDS} s"
        kind, text = receiver.recv()
    except EOFError:
        return None
    return Outcome.model_validate_json(text) if kind == "outcome" else str(text)


def _rank(
    assignment: Assignment,
    rank: int,
    world_size: int,
    port: int,
    kill: Kill | None,
    before: Callable[[], None] | None,
    environment: dict[str, str],
    sender: Connection,
) -> None:
    import traceback

    from trainers.session import ProcessSession
    from trainers.worker import train_worker

    _take_place(rank, world_size, port, environment)
    try:
        if before is not None:
            before()
        if kill is not None and rank == 0:
            _arm(kill, multiprocessing.parent_process())
        with ProcessSession(use_gpu=False) as session:
            outcome = train_worker(session, assignment)
        if rank == 0:
            sender.send(("outcome", outcome.model_dump_json()))
    except BaseException:
        sender.send(("error", f"rank {rank}: {traceback.format_exc()}"))
        raise


def _take_place(rank: int, world_size: int, port: int, environment: dict[str, str]) -> None:
    """Sets this process's environment: that of the test, and what torchrun would add to it."""
    os.environ.clear()
    os.environ.update(environment)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip


def on_ranks(
    work: Callable[[Session], Any], *, world_size: int, timeout_seconds: float = 240
) -> list[Any]:
    """What `work` (picklable, as is what it gives) gives on each rank of a group, by rank.

    AssertionError with the traceback where it raises, or where a rank does not end in time: the
    time is that of all ranks together, and ends a rank that waits for another for ever.
    """
    port = _free_port()
    pipes = [PROCESSES.Pipe(duplex=False) for _ in range(world_size)]
    ranks = [
        PROCESSES.Process(
            target=_work, args=(work, rank, world_size, port, dict(os.environ), sender)
        )
        for rank, (_, sender) in enumerate(pipes)
    ]
    for rank, (_, sender) in zip(ranks, pipes, strict=True):
        rank.start()
        sender.close()
    deadline = time.monotonic() + timeout_seconds
    given: list[Any] = []
    try:
        for number, (receiver, _) in enumerate(pipes):
            if not receiver.poll(max(0.0, deadline - time.monotonic())):
                raise AssertionError(f"rank {number} did not end in {timeout_seconds} s")
            kind, value = receiver.recv()
            assert kind == "given", value
            given.append(value)
    finally:
        for rank in ranks:
            rank.join(1 if len(given) < world_size else TIMEOUT_SECONDS)
            rank.kill()
            rank.join()
    return given


def break_group(
    assignment: Assignment, *, world_size: int, before: Callable[[], None], until: int = 1
) -> dict[int, int]:
    """Exit codes of the ranks that ended by themselves, the first `until` of them; the others are
    killed then, as a platform does that has seen a rank end.

    `before` is called in each process first. AssertionError where fewer end in time.
    """
    port = _free_port()
    receiver, sender = PROCESSES.Pipe(duplex=False)
    ranks = [
        PROCESSES.Process(
            target=_rank,
            args=(assignment, rank, world_size, port, None, before, dict(os.environ), sender),
        )
        for rank in range(world_size)
    ]
    for rank in ranks:
        rank.start()
    deadline = time.monotonic() + TIMEOUT_SECONDS
    try:
        while len(ended := [n for n, r in enumerate(ranks) if not r.is_alive()]) < until:
            left = deadline - time.monotonic()
            assert left > 0, f"only the ranks {ended} ended in {TIMEOUT_SECONDS} s"
            multiprocessing.connection.wait([r.sentinel for r in ranks if r.is_alive()], left)
    finally:
        for rank in ranks:
            rank.kill()
            rank.join()
        receiver.close()
        sender.close()
    return {number: int(ranks[number].exitcode or 0) for number in ended}


def run_group(
    assignment: Assignment, *, world_size: int, before: Callable[[], None] | None = None
) -> list[Outcome]:
    """The outcome of `train_worker` on each rank; `before` is called in each process first."""
    return on_ranks(partial(_train, assignment, before), world_size=world_size)


def _train(assignment: Assignment, before: Callable[[], None] | None, session: Session) -> Outcome:
    from trainers.worker import train_worker

    if before is not None:
        before()
    return train_worker(session, assignment)


def _work(
    work: Callable[[Session], Any],
    rank: int,
    world_size: int,
    port: int,
    environment: dict[str, str],
    sender: Connection,
) -> None:
    import traceback

    from trainers.session import ProcessSession

    _take_place(rank, world_size, port, environment)
    try:
        with ProcessSession(use_gpu=False) as session:
            given = work(session)
        sender.send(("given", given))
    except BaseException:
        sender.send(("error", f"rank {rank}: {traceback.format_exc()}"))
        raise


def _arm(kill: Kill, parent: Any) -> None:
    """Kills this process at the wanted moment; the harness then kills the rest of the group."""
    from trainers import checkpoint, worker

    owner, name = {
        "step": (worker._Rank, "stepped"),
        "evaluation": (worker._Rank, "evaluate"),
        "upload": (checkpoint, "Part"),
        "parts": (checkpoint.CheckpointWriter, "_upload"),
        "manifest": (checkpoint.CheckpointWriter, "_commit"),
        "retention": (checkpoint, "apply_retention"),
    }[kill.moment]
    whole = getattr(owner, name)
    calls = 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        given = whole(*args, **kwargs)
        calls += 1
        if calls == kill.count:
            os.kill(os.getpid(), signal.SIGKILL)
        return given

    setattr(owner, name, counted)


def lose_patience() -> None:
    """From here on the watchdog of this process waits for two seconds only.

    A job's own limit must bear what a loaded machine makes of a start.
    """
    from trainers import watchdog

    assert watchdog._own is not None
    watchdog._own.limit_seconds = 2.0


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def assignment_of(spec: Any, run_id: str, *, generation: int = 1) -> Assignment:
    """The assignment of a run; records the job where it is new."""
    from cluster.storage import ObjectExists, open_store

    store = open_store(spec.store.uri, spec.store.access)
    try:
        store.write_if_absent(RunPaths(run_id).spec, spec.to_bytes())
    except ObjectExists:
        assert generation > 1, "a resumed run is a later generation"
    return Assignment(spec, run_id, generation, controls_seen=0)
