"""Versions of what a run's numbers depend on."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

_PACKAGES = (
    "shoal", "torch", "transformers", "tokenizers", "safetensors", "numpy", "pyarrow", "ray",
    "boto3", "scikit-learn",
)  # fmt: skip


def versions() -> dict[str, str]:
    """Version of Python and of each package that is installed here."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
