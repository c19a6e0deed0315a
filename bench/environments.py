"""Environments of peers: each has its own packages from PyPI, over those of this Python.

    python = environments.python_of("litdata")

They lie in build/bench/environments and are kept. What this Python has and a peer can use (torch,
numpy, boto3) is taken from here: all readers then decode with the same versions.
"""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import lab
from packaging.requirements import Requirement

NEVER = frozenset({"torch", "torchvision", "transformers"})
"""Gigabytes, of which no reader uses anything that is not here."""


def python_of(package: str) -> str:
    """The Python of an environment with `package`, made if there is none; its path."""
    folder = lab.ROOT / "build" / "bench" / "environments" / package
    python = folder / "bin" / "python"
    done = folder / "installed.json"
    if not done.exists():
        sys.stderr.write(f"installing {package} into {folder}\n")
        venv.create(folder, clear=True, with_pip=False)
        site = Path(_asked(python, "import sysconfig; print(sysconfig.get_path('purelib'))"))
        (site / "outer.pth").write_text(sysconfig.get_path("purelib") + "\n")
        _install(python, "--no-deps", package)
        _install(python, *_requirements(site, package))
        done.write_text(json.dumps({"version": version_of(package, site)}))
    return str(python)


def installed_version(package: str) -> str:
    """The version in the environment of `package`."""
    folder = lab.ROOT / "build" / "bench" / "environments" / package
    found: dict[str, str] = json.loads((folder / "installed.json").read_text())
    return found["version"]


def version_of(package: str, site: Path) -> str:
    return _distribution(package, site).version


def _requirements(site: Path, package: str) -> list[str]:
    """What the package asks for besides, without extras and without NEVER."""
    asked = map(Requirement, _distribution(package, site).requires or ())
    return [
        f"{one.name}{one.specifier}"
        for one in asked
        if (one.marker is None or one.marker.evaluate({"extra": ""})) and one.name not in NEVER
    ]


def _distribution(package: str, site: Path) -> importlib.metadata.Distribution:
    return next(
        one
        for one in importlib.metadata.distributions(path=[str(site)])
        if one.name.replace("_", "-").lower() == package
    )


def _install(python: Path, *what: str) -> None:
    if what:
        subprocess.run(
            [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet",
             "--no-input", "--disable-pip-version-check", *what],
            check=True,
        )  # fmt: skip


def _asked(python: Path, program: str) -> str:
    run = subprocess.run([python, "-c", program], check=True, capture_output=True, text=True)
    return run.stdout.strip()
