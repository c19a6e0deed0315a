"""The C++ compiler of this machine, as torch.compile looks for it. Loads no torch."""

from __future__ import annotations

import os
import shutil
import socket
import sys
import sysconfig
from pathlib import Path

from jobs.errors import Problem


def lacks_compiler() -> Problem | None:
    """What this machine lacks to compile a model; None where it has all of it.

    Inductor writes C++ that includes Python's headers, and runs $CXX, or else g++ (clang++ on
    macOS): torch/_inductor/config.py, `cpp.cxx`. Triton, for GPUs, builds its launchers likewise.
    """
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if shutil.which(compiler) is None:
        return Problem(
            f"model.compile is true, but {socket.gethostname()} has no C++ compiler named "
            f"{compiler}",
            "install it (on Debian and Ubuntu: apt-get install g++), set CXX to another one, or "
            "set model.compile to false",
        )
    header = Path(sysconfig.get_path("include"), "Python.h")
    if not header.is_file():
        return Problem(
            f"model.compile is true, but {socket.gethostname()} has no C headers of Python "
            f"({header} is missing)",
            "install them (on Debian and Ubuntu: apt-get install python3-dev), or set "
            "model.compile to false",
        )
    return None
