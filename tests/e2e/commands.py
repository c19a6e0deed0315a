"""Commands of Shoal as processes: started, waited for, and nothing of them left."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path

import psutil

_PAUSE_SECONDS = 0.5
"""Between two looks, each of which asks the store several times: the cores are for what is looked
at."""


def shoal(*arguments: str, folder: Path) -> subprocess.Popen[str]:
    """A command in a folder; what it says comes out of `communicate`."""
    return subprocess.Popen(
        [sys.executable, "-m", "jobs.cli", *arguments],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for(
    condition: Callable[[], bool], process: subprocess.Popen[str] | subprocess.Popen[bytes]
) -> None:
    """Returns when the condition holds; the process may not end before."""
    deadline = time.monotonic() + 300
    while not condition():
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            raise AssertionError(f"it ended or hung: {process.communicate()[0]!s}")
        time.sleep(_PAUSE_SECONDS)


def wait_until_none_is_left(cache: Path, *, but: Collection[int] = ()) -> None:
    """Waits for the end of all processes with this SHOAL_CACHE; `but` are ids of those that may
    stay. Those of a driver that was killed end by themselves, once they miss it."""
    deadline = time.monotonic() + 240
    while left := [p for p in psutil.process_iter() if p.pid not in but and _is_of(p, cache)]:
        assert time.monotonic() < deadline, f"left running: {left}"
        time.sleep(_PAUSE_SECONDS)


def _is_of(process: psutil.Process, cache: Path) -> bool:
    with suppress(psutil.Error):
        return process.environ().get("SHOAL_CACHE") == str(cache)
    return False


def tree_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """The driver of an attended run and all that it has started, not the command itself."""
    return psutil.Process(process.pid).children(recursive=True)


def is_actor(process: psutil.Process, *names: str) -> bool:
    """Whether it is Ray's process of an actor of one of these classes; one that has ended is not.

    It is called by its class, and during a call by the class that Tune makes of that.
    """
    with suppress(psutil.NoSuchProcess):
        title = " ".join(process.cmdline())
        return any(f"ray::{name}" in title for name in names)
    return False
