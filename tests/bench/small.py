"""Runs a benchmark in its small size, as a user would, and gives its JSON."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent


def small(script: str, folder: Path, *options: str) -> dict[str, Any]:
    """The result of `python bench/SCRIPT --small`; AssertionError with its output if it fails."""
    answer = folder / "result.json"
    done = subprocess.run(
        [sys.executable, f"bench/{script}", "--small", "--json", str(answer), *options],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    held: dict[str, Any] = json.loads(answer.read_text())
    return held
