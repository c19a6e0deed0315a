"""The driver of a run as a process of this machine."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from jobs.record import Past
from jobs.spec import StoreAccess


def start_driver(
    run_uri: str, *, access: StoreAccess, past: Past, attended: bool
) -> subprocess.Popen[bytes]:
    """Starts `python -m jobs.run RUN_URI` in a session of its own, and returns at once.

    The driver outlives this process; if `attended`, it ends the run, with a checkpoint, should
    this process vanish. What it prints goes to the run folder; before it gets there, to a file
    in the temporary folder that is named after the run.
    """
    command = [
        sys.executable, "-m", "jobs.run", run_uri,
        "--store-access", access.model_dump_json(exclude_defaults=True),
        "--past-controls", str(past.controls), "--past-generation", str(past.generation),
    ]  # fmt: skip
    if attended:
        command += ["--attended-by", str(os.getpid())]
    with driver_log(run_uri).open("ab") as log:
        return subprocess.Popen(  # noqa: S603 - our own program, no shell
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def driver_log(run_uri: str) -> Path:
    """File for what a driver prints on this machine."""
    folder = Path(tempfile.gettempdir()) / f"shoal-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder / f"{run_uri.rstrip('/').rpartition('/')[2]}.log"
