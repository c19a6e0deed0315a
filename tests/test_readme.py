"""What the documents tell a reader to type exists."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import click
import pytest

from jobs.cli import COMMANDS, cli
from jobs.parse import load_spec

ROOT = Path(__file__).parent.parent
DOCUMENTS = [
    "README.md",
    "ARCHITECTURE.md",
    "CONTRIBUTING.md",
    "DECISIONS.md",
    "examples/README.md",
    "bench/README.md",
    "docs/growth.md",
    "k8s/README.md",
]


def text_of(document: str) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


def inline_code(text: str) -> list[str]:
    return re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))


def typed_commands(text: str) -> list[list[str]]:
    """Words of each `shoal ...` in code, up to a pipe: in backquotes, after a prompt, in `$()`."""
    typed = [code for code in inline_code(text) if code.startswith("shoal ")]
    typed += re.findall(r"^\$ (shoal .*)$", text, re.MULTILINE)
    typed += re.findall(r"\$\((shoal [^)]*)\)", text)
    # In a table a pipe is written with a backslash.
    return [command.replace("\\|", "|").partition(" | ")[0].split() for command in typed]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_command_and_option_in_a_document_exists(document: str) -> None:
    for _, name, *words in (words for words in typed_commands(text_of(document)) if words[1:]):
        if name.startswith("-"):
            continue
        command = cli.get_command(click.Context(cli), name)
        assert command is not None, name
        known = {option for param in command.params for option in param.opts} | {"--help"}
        options = {word.partition("=")[0] for word in words if word.startswith("-")}
        assert options <= known, (name, options - known)


def test_the_readme_tells_of_every_command() -> None:
    told = set(re.findall(r"[a-z]+", " ".join(inline_code(text_of("README.md")))))
    assert set(COMMANDS) <= told


def test_the_job_in_the_readme_is_a_job_and_so_is_its_search(tmp_path: Path) -> None:
    job, search = re.findall(r"```yaml\n(.*?)```", text_of("README.md"), re.DOTALL)
    file = tmp_path / "job.yaml"
    file.write_text(job, encoding="utf-8")
    assert load_spec(file).workers.count == 4
    fixed = job.replace("count: 4, min: 2", "count: 4")  # trials are not elastic
    file.write_text(fixed + search, encoding="utf-8")
    spec = load_spec(file)
    assert spec.search is not None
    assert spec.search.metric == "validation/f1"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_link_to_a_file_leads_somewhere(document: str) -> None:
    folder = (ROOT / document).parent
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", text_of(document))
    assert [link for link in links if not (folder / link).exists()] == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_file_that_a_document_names_exists(document: str) -> None:
    """Paths in backquotes that begin with one of the repository's folders."""
    named = re.findall(
        r"`((?:jobs|cluster|trainers|tests|examples|k8s)/[\w./-]+\.\w+)`", text_of(document)
    )
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_make_help_names_every_target() -> None:
    done = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    targets = re.findall(r"^make (\w+)", done.stdout, re.MULTILINE)
    assert targets == [
        "demo",
        "test",
        "chaos",
        "figures",
        "check",
        "manifests",
        "constraints",
        "clean",
    ]
    assert f".PHONY: help {' '.join(targets)}\n" in text_of("Makefile")
