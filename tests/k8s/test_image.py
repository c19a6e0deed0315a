"""The image: what a linter says of its Dockerfile, who runs in it, and what is pinned."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from importlib.metadata import requires
from pathlib import Path

import pytest
from overlays import K8S, ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

DOCKERFILE = (K8S / "Dockerfile").read_text(encoding="utf-8")
EXTRAS = ("train", "pods", "mlflow", "wandb")


def instructions() -> list[tuple[str, str]]:
    """Each with its argument, lines joined."""
    text = re.sub(r"^\s*#.*\n", "", DOCKERFILE, flags=re.MULTILINE)
    lines = re.sub(r"\\\n", " ", text).splitlines()
    return [(line.split(" ", 1)[0], line.split(" ", 1)[1]) for line in lines if line.strip()]


def stages() -> dict[str, list[tuple[str, str]]]:
    found: dict[str, list[tuple[str, str]]] = {}
    for name, argument in instructions():
        if name == "FROM":
            base, _, stage = argument.partition(" AS ")
            found[stage] = [("FROM", base)]
        elif found:
            found[stage].append((name, argument))
    return found


def pins() -> dict[str, str]:
    lines = (K8S / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines if not line.startswith("#")]
    return dict(pairs)  # type: ignore[arg-type]


def lint(dockerfile: Path) -> str:
    hadolint = Path(sys.executable).parent / "hadolint"
    command = [str(hadolint), "--no-color", str(dockerfile)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode != 0) == bool(done.stdout)
    return done.stdout + done.stderr


def test_the_linter_has_nothing_to_say(tmp_path: Path) -> None:
    assert lint(K8S / "Dockerfile") == ""
    bad = tmp_path / "Dockerfile"
    bad.write_text(DOCKERFILE.replace("--no-install-recommends ", ""))
    assert "DL3015" in lint(bad)


def test_there_is_an_image_for_gpus_and_one_without() -> None:
    assert {"cpu", "cuda"} <= set(stages())
    assert list(stages())[-1] == "cuda", "what is built where no target is named"


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_an_image_runs_as_the_user_of_a_runs_pods(target: str) -> None:
    stage = stages()[target]
    assert stage[0] == ("FROM", "runtime")
    assert stage[-1] == ("USER", "1000:1000")
    assert "useradd --uid 1000" in str(stages()["runtime"])


def test_every_base_is_one_python_by_its_digest() -> None:
    arguments = dict(argument.split("=", 1) for name, argument in instructions() if name == "ARG")
    assert re.fullmatch(r"3\.\d+\.\d+-slim-\w+@sha256:[0-9a-f]{64}", arguments["PYTHON"])
    bases = {stage[0][1] for stage in stages().values()}
    assert bases == {"python:${PYTHON}", "runtime"}
    made_with = re.search(r"for Python (3\.\d+)", (K8S / "constraints.txt").read_text())
    assert made_with
    assert arguments["PYTHON"].startswith(made_with[1] + ".")


def test_compilers_and_caches_of_pip_stay_out_of_the_image() -> None:
    for _, argument in instructions():
        if "pip install" in argument:
            assert "--no-cache-dir" in argument
            assert "--prefix /packages" in argument
        if "apt-get install" in argument:
            assert "rm -rf /var/lib/apt/lists/*" in argument
    for target in ("runtime", "cpu", "cuda"):
        assert "pip install" not in str(stages()[target])


def test_everything_that_is_copied_reaches_the_build() -> None:
    ignored = (K8S / "Dockerfile.dockerignore").read_text().splitlines()
    assert "*" in ignored
    reaches = {line[1:] for line in ignored if line.startswith("!")}
    copied = {
        source
        for name, argument in instructions()
        if name == "COPY" and not argument.startswith("--from")
        for source in argument.split()[:-1]
    }
    assert copied == reaches
    assert all((ROOT / source).exists() for source in copied)
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert {name.rstrip("*") for name in packages["packages"]["find"]["include"]} <= copied


def test_everything_that_shoal_needs_is_pinned_within_its_bounds() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = [*project["dependencies"]]
    for extra in EXTRAS:
        needed += project["optional-dependencies"][extra]
    for requirement in map(Requirement, needed):
        pin = pins()[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(pin), requirement


def test_what_the_pinned_packages_need_is_pinned_too() -> None:
    """As far as they are installed here; Ray's dashboard is not."""
    pinned, environments = pins(), [{"extra": ""}]
    for name in ("transformers", "datasets", "boto3", "pydantic", "scikit-learn", "wandb"):
        for requirement in map(Requirement, requires(name) or ()):
            if not requirement.marker or any(map(requirement.marker.evaluate, environments)):
                assert canonicalize_name(requirement.name) in pinned, (name, requirement)


def test_ray_has_its_dashboard() -> None:
    """KubeRay submits the job to it, and Prometheus reads its metrics."""
    assert {"aiohttp-cors", "opencensus", "opentelemetry-exporter-prometheus"} <= set(pins())


def test_no_pin_names_a_build_of_one_machine() -> None:
    assert pins()
    for name, version in pins().items():
        assert re.fullmatch(r"[a-z0-9][a-z0-9-]*", name)
        assert re.fullmatch(r"[0-9][0-9a-z.]*(\.post\d+)?", version), (name, version)
