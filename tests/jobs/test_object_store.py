"""`shoal up` and `shoal down`."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from test_cli import run_main

from cluster import embedded


def test_up_prints_what_a_shell_can_take_and_down_stops_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "a store"
    try:
        assert run_main("up", "--folder", str(folder), "--bucket", "lake") == 0
        shown = capsys.readouterr()
        words = [shlex.split(line) for line in shown.out.splitlines()]
        assert {word[0] for word in words} == {"export"}
        variables = dict(word[1].split("=", 1) for word in words)
        assert variables["SHOAL_STORE"] == "s3://lake/runs"
        assert variables["AWS_ENDPOINT_URL_S3"].startswith("http://127.0.0.1:")
        assert variables["AWS_SECRET_ACCESS_KEY"]
        assert variables["AWS_SECRET_ACCESS_KEY"] not in shown.err
        assert f"shoal down --folder '{folder}'" in shown.err
        assert run_main("up", "--folder", str(folder), "--bucket", "lake") == 0
        assert capsys.readouterr().out == shown.out
        assert run_main("down", "--folder", str(folder)) == 0
        assert capsys.readouterr().err == "stopped\n"
    finally:
        embedded.down(folder)
    assert run_main("down", "--folder", str(folder)) == 0
    assert "no object store of" in capsys.readouterr().err
