"""Versions of what a run's numbers depend on."""

from __future__ import annotations

import functools
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version

_PACKAGES = (
    "shoal", "torch", "transformers", "tokenizers", "safetensors", "numpy", "pyarrow", "ray",
    "boto3", "scikit-learn",
)  # fmt: skip


@functools.cache
def versions() -> Mapping[str, str]:
    """Version of Python and of each package that is installed here, as this process has them."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
