"""The driver of a run as a process of this machine."""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from jobs.errors import EnvironmentFault, Problem
from jobs.record import Past
from jobs.spec import StoreAccess

_DIGEST_CHARACTERS = 8


def start_driver(
    run_uri: str,
    *,
    access: StoreAccess,
    past: Past,
    attended: bool,
    overrides: Sequence[str] = (),
) -> subprocess.Popen[bytes]:
    """Starts `python -m jobs.run RUN_URI` in a session of its own, and returns at once.

    The driver outlives this process; if `attended`, it ends the run, with a checkpoint, should
    this process vanish. What it prints goes to the run folder; before it gets there, to a file
    in the temporary folder that is named after the run. `overrides` it records as changes of the
    run's job.
    """
    command = [
        sys.executable, "-m", "jobs.run", run_uri,
        "--store-access", access.model_dump_json(exclude_defaults=True),
        "--past-controls", str(past.controls), "--past-generation", str(past.generation),
    ]  # fmt: skip
    for override in overrides:
        command += ["--set", override]
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
    """File for what a driver prints on this machine; each run of each store has its own.

    Raises EnvironmentFault where its folder is not this user's alone.
    """
    uri = run_uri.rstrip("/")
    digest = hashlib.sha256(uri.encode()).hexdigest()[:_DIGEST_CHARACTERS]
    return _own_folder() / f"{uri.rpartition('/')[2]}-{digest}.log"


def _own_folder() -> Path:
    """A folder of this user in the temporary folder, where anybody may have made it before."""
    folder = Path(tempfile.gettempdir()) / f"shoal-{os.getuid()}"
    try:
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        found = folder.lstat()
    except OSError as error:
        raise EnvironmentFault(
            Problem(
                f"the folder {folder} for what drivers print cannot be made: {error.strerror}",
                "set TMPDIR to a folder that can be written to",
            )
        ) from error
    mode = stat.S_IMODE(found.st_mode)
    if not stat.S_ISDIR(found.st_mode):
        fault = "is no folder"
    elif found.st_uid != os.getuid():
        fault = f"belongs to the user with number {found.st_uid}"
    elif mode != stat.S_IRWXU:
        fault = f"has the mode {mode:04o}, not 0700"
    else:
        return folder
    raise EnvironmentFault(
        Problem(
            f"{folder}, where drivers print to, {fault}: others could read or replace what is "
            "printed",
            f"remove it: rm -r {folder}, or set TMPDIR to a folder of your own",
        )
    )
