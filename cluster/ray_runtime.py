"""Ray for the length of a run: attached to where RAY_ADDRESS points, or started and shut down."""

from __future__ import annotations

import logging
import math
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from jobs.errors import ClusterError, Problem
from jobs.spec import JobSpec, Workers, format_bytes

if TYPE_CHECKING:
    from ray.util.placement_group import PlacementGroup

_SETTINGS = {
    # A report waits for the controller to look; two seconds, the default, are felt at the end.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    # After this Ray counts anew how many workers the cluster has room for. Sixty seconds, the
    # default, are too short on a loaded machine.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "120",
    # How often the nodes of the workers are asked whether they are being taken. Each second counts
    # of the thirty that some platforms give; the default is five.
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    # Whoever still calls Ray after its end here starts no other one.
    "RAY_ENABLE_AUTO_CONNECT": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # Repeated lines of workers are wanted: they go to the run's log, not to a terminal.
    "RAY_DEDUP_LOGS": "0",
    # Files of every saying of a study's slots, which nobody reads, without bound.
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
}
_OWN_SETTINGS = {
    # Of a Ray that is started here: no processes ahead of time, as workers are not made of them.
    "RAY_prestart_worker_first_driver": "0",
}
_OBJECT_STORE_BYTES = 200 * 2**20
"""Nothing large goes through Ray's object store: rows come from storage, states go there."""
_ROUNDING = 1e-6
"""Ray counts resources to four digits; so much more or less is an error of the sum."""
_LOOK_SECONDS = 1.0
_JOIN_SECONDS = 5.0
"""A look at a cluster that is gone may take longer to fail; nobody waits for it then."""

log = logging.getLogger(__name__)


def use_settings() -> None:
    """Gives Ray our settings in this process, where its environment has no others."""
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)


def is_attached() -> bool:
    """Whether Ray runs by itself, and this process is its guest; else it is started here."""
    return bool(os.environ.get("RAY_ADDRESS"))


@contextmanager
def ray_cluster(workers: Workers, *, python: str | None = None) -> Iterator[None]:
    """A Ray cluster for the workers, inside the block.

    `python` is the command by which all processes of this driver are started on a cluster that is
    made here, where it is not the interpreter.

    Attaches where RAY_ADDRESS is set, and leaves that cluster running: nodes may still come to it.
    Raises ClusterError where it is not reached or does not start, or where this machine, which can
    never grow, is too small.
    """
    use_settings()
    if not is_attached():
        for name, value in _OWN_SETTINGS.items():
            os.environ.setdefault(name, value)
    import ray

    if " " in sys.executable:
        raise ClusterError(
            Problem(
                f"Ray starts no worker with an interpreter whose path has a space: "
                f"{sys.executable}",
                "install shoal in a virtual environment whose path has none",
            )
        )
    address = os.environ.get("RAY_ADDRESS")
    try:
        with _own_sigterm():
            if address:
                ray.init(address=address, logging_level=logging.WARNING)
            else:
                ray.init(
                    address="local",
                    num_gpus=None if workers.gpus else 0,
                    include_dashboard=False,
                    object_store_memory=_OBJECT_STORE_BYTES,
                    logging_level=logging.WARNING,
                    runtime_env={"py_executable": python} if python else None,
                )
    except (ConnectionError, OSError, RuntimeError, ValueError) as error:
        where = f"the Ray cluster at {address}" if address else "Ray on this machine"
        raise ClusterError(
            Problem(
                f"{where} is not usable: {error}",
                "check RAY_ADDRESS, or unset it to start Ray here"
                if address
                else "look for free memory, disk space in the temporary folder, and old Ray "
                "processes",
            )
        ) from error
    try:
        if not address:
            refuse_too_small(workers, ray.cluster_resources())  # type: ignore[no-untyped-call]
        yield
    finally:
        ray.shutdown()


@contextmanager
def _own_sigterm() -> Iterator[None]:
    """Keeps what this process does at SIGTERM: `ray.init` puts an end at once in its place."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():  # elsewhere Ray leaves it alone
            signal.signal(signal.SIGTERM, handler)


def refuse_too_small(workers: Workers, resources: dict[str, float]) -> None:
    """Raises ClusterError where this machine, were it idle, could not hold the workers."""
    problems = []
    number = workers.fewest
    key = "workers.count" if workers.min is None else "workers.min"
    for name, each, text in (
        ("CPU", workers.cpus, "CPUs"),
        ("GPU", workers.gpus, "GPUs"),
        ("memory", int((workers.memory_gib or 0) * 2**30), "memory"),
    ):
        need, has = each * number, resources.get(name, 0.0)
        if need > has:
            shown = (
                (format_bytes(need), format_bytes(has)) if name == "memory" else (need, int(has))
            )
            problems.append(
                Problem(
                    f"{number} worker{' needs' if number == 1 else 's need'} {shown[0]} {text}, "
                    f"but this machine has {shown[1]}",
                    f"lower {key}"
                    + {
                        "CPU": " or workers.cpus",
                        "GPU": ", or set workers.gpus to 0",
                        "memory": " or workers.memory_gib",
                    }[name],
                )
            )
    if problems:
        raise ClusterError(*problems)


# ----------------------------------------------------------------------- nodes that are taken


@contextmanager
def own_node_watched(when_taken: Callable[[], None]) -> Iterator[None]:
    """Calls `when_taken`, once, if this process's node is to be taken while the block lasts.

    SIGTERM to the first process of a pod reaches `ray start --block`, which drains its node; nobody
    passes it on to a driver there.
    """
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(_LOOK_SECONDS):
            try:
                is_taken = _own_node_is_draining()
            except Exception as error:  # the cluster may be ending: its workers tell more of it
                log.debug("it is not known whether this node is taken: %s", error)
                continue
            if is_taken:
                when_taken()
                return

    thread = threading.Thread(target=watch, name="shoal-own-node", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(_JOIN_SECONDS)


def _own_node_is_draining() -> bool:
    import ray

    return own_node() in ray._private.state.state.get_draining_nodes()


def own_node() -> str:
    """The id of the node of this process."""
    import ray

    return str(ray.get_runtime_context().get_node_id())


def is_alive(node: str) -> bool:
    """Whether the cluster still has the node of that id."""
    import ray

    nodes = ray.nodes()  # type: ignore[no-untyped-call]
    return any(known["NodeID"] == node and known["Alive"] for known in nodes)


# -------------------------------------------------------------------------- room on the nodes


def resources_of(workers: Workers, *, gpu_share: float | None = None) -> dict[str, float]:
    """What one worker asks Ray for; `gpu_share` is how much of its GPU, if not all of it."""
    asked: dict[str, float] = {"CPU": workers.cpus}
    if workers.gpus:
        asked["GPU"] = workers.gpus if gpu_share is None else gpu_share
    if workers.memory_gib is not None:
        asked["memory"] = int(workers.memory_gib * 2**30)
    return asked


def staying_nodes() -> list[dict[str, float]]:
    """Resources of each node that lives and is not being taken; of the cluster this process is in.

    Ray's own count of what elastic workers may have includes nodes that are being drained, on which
    nothing is placed any more, and for up to 20 s nodes that have died.
    """
    return [node["Resources"] for node in _staying()]


def free_on_nodes(*, own: PlacementGroup | None = None) -> list[dict[str, float]]:
    """What nobody holds of the resources of each of `staying_nodes`, but for the group `own`."""
    import ray

    free = ray._private.state.available_resources_per_node()  # type: ignore[no-untyped-call]
    found = {node["NodeID"]: dict(free.get(node["NodeID"], {})) for node in _staying()}
    if own is not None:
        held = ray.util.placement_group_table(own)
        places = held["bundles_to_node_id"] if held["state"] != "REMOVED" else {}
        for number, node in places.items():  # a bundle whose node is lost may have none
            for name, amount in held["bundles"][number].items() if node in found else ():
                found[node][name] = found[node].get(name, 0.0) + amount
    return list(found.values())


def _staying() -> list[dict[str, Any]]:
    import ray

    draining = ray._private.state.state.get_draining_nodes()
    return [
        node
        for node in ray.nodes()  # type: ignore[no-untyped-call]
        if node["Alive"] and node["NodeID"] not in draining
    ]


def room_for(
    workers: Workers, nodes: Iterable[Mapping[str, float]], *, gpu_share: float | None = None
) -> int:
    """How many workers the nodes could hold, were they idle; each lies in one node, and its share
    of a GPU on one GPU. Pure."""
    asked = resources_of(workers, gpu_share=gpu_share)

    def fitting(name: str, has: float) -> int:
        if name == "GPU" and asked[name] < 1:
            # What is free of several GPUs is not told by GPU: it is taken to lie together.
            whole, part = divmod(has + _ROUNDING, 1)
            return int(whole) * _times(1.0, asked[name]) + _times(part, asked[name])
        return _times(has, asked[name])

    return sum(min(fitting(name, node.get(name, 0.0)) for name in asked) for node in nodes)


def _times(has: float, each: float) -> int:
    return math.floor(has / each + _ROUNDING)


def room_for_trials(spec: JobSpec, nodes: Iterable[Mapping[str, float]]) -> int:
    """How many trials of the job's search the nodes could hold at a time, were they idle. Pure."""
    share = None if spec.search is None else spec.search.gpu_share
    return room_for(spec.workers, nodes, gpu_share=share) // spec.workers.count


def describe_shortage(
    workers: Workers,
    nodes: Sequence[Mapping[str, float]],
    *,
    free: Sequence[Mapping[str, float]] | None = None,
    gpu_share: float | None = None,
) -> str:
    """`2 workers need 2 x 4 CPUs, and the 3 nodes have room for 1 (6 CPUs)`. Pure.

    `free` is what nobody holds of the nodes, where there would be room if they were idle.
    """
    asked = resources_of(workers, gpu_share=gpu_share)

    def shown(name: str, amount: float) -> str:
        if name == "memory":
            return f"{format_bytes(amount)} memory"
        return f"{amount:.10g} {name}{'' if amount == 1 else 's'}"

    number = workers.fewest
    each = " and ".join(shown(name, amount) for name, amount in asked.items())
    held = ", ".join(shown(name, sum(node.get(name, 0.0) for node in nodes)) for name in asked)
    now = None if free is None else room_for(workers, free, gpu_share=gpu_share)
    taken = (
        f", but something else holds part of it: there is room for {now} now"
        if now is not None and now < number
        else ""
    )
    return (
        f"{number} worker{'' if number == 1 else 's'} need{'s' if number == 1 else ''} "
        f"{number} x {each}, and the cluster's {len(nodes)} node{'' if len(nodes) == 1 else 's'} "
        f"ha{'s' if len(nodes) == 1 else 've'} room for "
        f"{room_for(workers, nodes, gpu_share=gpu_share)} ({held})"
        f"{taken}"
    )
