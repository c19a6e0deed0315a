"""Memory of the host that a process may still take, by the machine and by its container."""

from __future__ import annotations

from pathlib import Path

import psutil

_CGROUP = Path("/sys/fs/cgroup")


def free_bytes() -> int:
    """Bytes that are free now, within the limits of the container."""
    free = int(psutil.virtual_memory().available)
    limit = _read_number(_CGROUP / "memory.max")
    return max(0, free if limit is None else min(free, limit - _container_bytes()))


def _container_bytes() -> int:
    """Memory that the container uses, without files that are only kept for later reads."""
    used = _read_number(_CGROUP / "memory.current") or 0
    try:
        stat = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return used
    return max(0, used - int(stat.get("inactive_file", 0)))


def _read_number(path: Path) -> int | None:
    """None where there is no such file, or no limit in it."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None
