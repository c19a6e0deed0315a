"""The command line itself: help, completion, errors, exit codes."""

from __future__ import annotations

import subprocess
import sys

import pytest
from click.testing import CliRunner

from jobs import cli
from jobs.cli import COMMANDS, main
from jobs.commands import look
from jobs.errors import DataError, EnvironmentFault, Problem

HEAVY = ("pydantic", "yaml", "boto3", "rich", "pyarrow", "numpy", "matplotlib", "jinja2", "torch")
WRITTEN_ELSEWHERE = ("prepare",)


def run_main(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert isinstance(ended.value.code, int)
    return ended.value.code


def test_help_imports_nothing_heavy() -> None:
    program = (
        "import sys\n"
        "from jobs.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        f"print('loaded:', [m for m in {HEAVY!r} if m in sys.modules])"
    )
    shown = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert "Usage: shoal" in shown.stdout
    assert shown.stdout.splitlines()[-1] == "loaded: []"


def test_help_names_every_command_with_one_line() -> None:
    shown = CliRunner().invoke(cli.cli, ["--help"]).output
    for name, (_, line) in COMMANDS.items():
        assert f"  {name} " in shown
        assert line in shown


@pytest.mark.parametrize("name", [name for name in COMMANDS if name not in WRITTEN_ELSEWHERE])
def test_each_command_explains_itself(name: str) -> None:
    shown = CliRunner().invoke(cli.cli, [name, "--help"])
    assert shown.exit_code == 0, shown.output
    assert shown.output.startswith(f"Usage: cli {name}")


def test_reading_commands_print_json_on_request() -> None:
    for name in ("list", "status", "logs", "checkpoints", "report", "evaluate", "gc", "check"):
        assert "--json" in CliRunner().invoke(cli.cli, [name, "--help"]).output


def test_a_plan_is_what_check_tells() -> None:
    shown = CliRunner().invoke(cli.cli, ["plan", "--help"]).output
    assert shown.startswith("Usage: cli plan [OPTIONS] JOB.yaml")
    assert (
        shown.partition("\n")[2]
        == (CliRunner().invoke(cli.cli, ["check", "--help"]).output.partition("\n")[2])
    )


def test_an_unknown_command_gets_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main("statsu") == 2
    assert "shoal has no command statsu; did you mean status?" in capsys.readouterr().err


def test_a_usage_error_says_what_to_type(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main("status", "--jsn", "x") == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("error: No such option")
    assert shown.err.rstrip().endswith("hint: run: shoal status --help")


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main("--version") == 0
    assert capsys.readouterr().out.startswith("shoal, version ")


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (
            DataError(Problem("the set is empty", "prepare it")),
            2,
            "error: the set is empty\n\nhint",
        ),
        (EnvironmentFault("the store is gone"), 3, "error: the store is gone"),
        (KeyboardInterrupt(), 130, ""),
        (BrokenPipeError(), 0, ""),
        (ZeroDivisionError("oops"), 1, "error: this is a bug in shoal"),
    ],
)
def test_errors_become_text_and_exit_codes(
    error: BaseException,
    code: int,
    text: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(look, "open_runs", fail)
    assert run_main("list") == code
    shown = capsys.readouterr().err
    assert text in shown
    assert ("Traceback" in shown) == isinstance(error, ZeroDivisionError)


def test_errors_hold_no_color_where_they_are_no_terminal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    run_main("statsu")
    assert "\x1b[" not in capsys.readouterr().err


def test_a_run_id_without_a_store_is_refused_with_what_to_type(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("SHOAL_STORE", raising=False)
    assert run_main("status", "sentiment-a1b2c3") == 2
    assert "export SHOAL_STORE=s3://shoal/runs" in capsys.readouterr().err


def test_the_json_schema_of_the_job_file_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    import json

    assert run_main("schema") == 0
    assert "optimizer" in json.loads(capsys.readouterr().out)["properties"]
