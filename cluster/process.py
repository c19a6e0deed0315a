"""Which process it was: enough to tell, later and on the same machine, that it has ended."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from pathlib import Path

import psutil

_START_FIELD = 19
"""Position of `starttime` behind the command's closing bracket in /proc/PID/stat; proc(5)."""


@dataclass(frozen=True)
class ProcessIdentity:
    """A process, told from any other that has had or will have its number."""

    host: str
    boot: str
    """Boot of the machine and space of process numbers in it; empty where the system tells none."""
    pid: int
    started: str
    """When it started, in the system's own count; empty where it does not exist."""

    @property
    def is_here(self) -> bool:
        """Whether it is, or was, a process of this machine since its last start."""
        return bool(self.boot) and (self.host, self.boot) == (socket.gethostname(), _boot())

    @property
    def is_alive(self) -> bool:
        """Whether it runs; asked only of a process of this machine."""
        return (self.boot, self.started) == (_boot(), _started(self.pid)) and bool(self.started)

    @property
    def has_ended(self) -> bool | None:
        """Whether it is gone. None where that cannot be told: it was a process of another machine
        or before the last start of this one, or the system hides it from this user."""
        if not self.is_here:
            return None
        started = _started(self.pid)
        if not started and _is_hidden(self.pid):
            return None
        return started != self.started


def identify(pid: int | None = None) -> ProcessIdentity:
    """The identity of a process of this machine; of this process by default."""
    pid = os.getpid() if pid is None else pid
    return ProcessIdentity(host=socket.gethostname(), boot=_boot(), pid=pid, started=_started(pid))


def _boot() -> str:
    """The kernel's id of this boot, and the namespace of process numbers (one a container)."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _started(pid: int) -> str:
    """The start of a process that has not ended; empty for one that has, a zombie included, and
    for one that is hidden from this user.

    Ticks since the boot where there is /proc: dates would move when the clock is set. A zombie
    whose other threads have not ended yet, as after SIGKILL for a moment, is there: they may
    still write.
    """
    try:
        process = psutil.Process(pid)
        is_dead = process.status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
        if is_dead and process.num_threads() <= 1:
            return ""
        stat = Path(f"/proc/{pid}/stat")
        if stat.exists():
            return stat.read_text().rpartition(")")[2].split()[_START_FIELD]
        return f"{process.create_time():.2f}"
    except (psutil.NoSuchProcess, psutil.AccessDenied, FileNotFoundError, ProcessLookupError):
        return ""


def _is_hidden(pid: int) -> bool:
    """Whether there is a process of another user of which /proc tells nothing: proc(5), hidepid."""
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except ProcessLookupError:
        pass
    return False
