"""What a process prints, taken as lines of its log too."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import os, sys
from jobs.capture import captured_output

with open(sys.argv[1], "w") as taken:
    with captured_output(lambda line: taken.write(line + "\\n")):
        for number in range(int(sys.argv[2])):
            os.write(1, b"line %06d\\n" % number)
"""


def run_printing(lines: int, *, output: int, taken: Path) -> int:
    """Exit code of a process that prints `lines` lines to `output` and takes them too."""
    command = [sys.executable, "-c", PROGRAM, str(taken), str(lines)]
    return subprocess.run(command, stdout=output, stderr=output, timeout=60).returncode


def test_lines_are_taken_and_still_go_where_they_went(tmp_path: Path) -> None:
    shown, taken = tmp_path / "shown", tmp_path / "taken"
    with shown.open("wb") as file:
        assert run_printing(3, output=file.fileno(), taken=taken) == 0
    assert shown.read_text() == taken.read_text() == "line 000000\nline 000001\nline 000002\n"


def test_a_full_disk_behind_the_output_neither_hangs_nor_costs_a_line(tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    full = os.open("/dev/full", os.O_RDWR)
    try:
        assert run_printing(20_000, output=full, taken=taken) == 0  # more than a pipe holds
    finally:
        os.close(full)
    lines = taken.read_text().splitlines()
    said = [line for line in lines if not line.startswith("line ")]
    assert [line for line in lines if line.startswith("line ")] == [
        f"line {number:06d}" for number in range(20_000)
    ]
    assert len(said) == 1
    assert "No space left on device" in said[0]
