"""Versions of all that the image installs: `make constraints` writes them into constraints.txt.

What this environment has, and the tests were run with, is there in the same version; the rest, such
as Ray's dashboard, is what pip chooses beside that. Nothing is installed.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from importlib.metadata import distributions
from pathlib import Path

from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
EXTRAS = "train,pods,mlflow,wandb"
"""Of the image: jobs may ask for any tracker."""


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        tested = Path(folder, "tested.txt")
        tested.write_text("\n".join(_tested()))
        report = Path(folder, "report.json")
        subprocess.run(
            [
                *(sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed"),
                *("--quiet", "--disable-pip-version-check", "--report", str(report)),
                *("--constraint", str(tested), f"{ROOT}[{EXTRAS}]"),
            ],
            check=True,
        )
        chosen = json.loads(report.read_text())["install"]
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    sys.stdout.write(
        f"# What shoal[{EXTRAS}] needs, for Python {python} on Linux. Made by: make constraints\n"
    )
    for line in sorted(_pin(i["metadata"]["name"], i["metadata"]["version"]) for i in chosen):
        if not line.startswith("shoal=="):
            sys.stdout.write(line + "\n")


def _tested() -> list[str]:
    """Of each package that is installed here, but for this one."""
    return [_pin(d.name, d.version) for d in distributions() if d.name != "shoal"]


def _pin(name: str, version: str) -> str:
    """`torch==2.13.0`, without the suffix of a build: the image has one of its own."""
    return f"{canonicalize_name(name)}=={version.partition('+')[0]}"


if __name__ == "__main__":
    main()
