"""The `shoal` command: which commands there are, and how their errors and ends reach the shell.

A command's module is imported only when it is invoked or its help is asked for, so that
`shoal --help` and completion answer at once.

Exit codes: 0 done, 1 the run failed (or a bug), 2 the user's input is wrong, 3 the environment is
not usable, 130 stopped.
"""

from __future__ import annotations

import difflib
import importlib
import os
import re
import sys
from collections.abc import Sequence
from typing import NoReturn

import click

from jobs.errors import ShoalError, render_error

SECTIONS: dict[str, dict[str, tuple[str, str]]] = {
    "Before a run": {
        "prepare": ("jobs.prepare_command:prepare", "Write a data set as Parquet shards."),
        "check": ("jobs.commands.job_file:check", "Test a job file before anything is spent."),
        "render": ("jobs.commands.render:render", "Print the run as a RayJob for Kubernetes."),
        "schema": ("jobs.commands.job_file:schema", "Print the JSON schema of the job file."),
    },
    "Run": {
        "run": ("jobs.commands.start:run", "Train here, with live progress."),
        "submit": ("jobs.commands.start:submit", "Start a run in the background."),
        "resume": ("jobs.commands.start:resume", "Go on with a stopped or failed run."),
        "extend": ("jobs.commands.extend:extend", "Give a study more trials."),
        "stop": ("jobs.commands.stop:stop", "Ask a run to save its state and end."),
    },
    "Look": {
        "list": ("jobs.commands.look:list_runs", "The runs in a store."),
        "status": ("jobs.commands.look:status", "What a run does, and why."),
        "why": ("jobs.commands.why:why", "Why a run waits or has failed, and what to type."),
        "watch": ("jobs.commands.look:watch", "Follow a run live."),
        "logs": ("jobs.commands.logs:logs", "Log lines of the driver and the workers."),
        "checkpoints": (
            "jobs.commands.look:checkpoints",
            "Saved states, and if they are whole.",
        ),
        "report": ("jobs.commands.report:report", "The report: one HTML file, or JSON."),
        "evaluate": ("jobs.commands.evaluate:evaluate", "Measure a run's model on other data."),
    },
    "Keep house": {
        "delete": ("jobs.commands.retention:delete", "Delete a run."),
        "gc": ("jobs.commands.retention:gc", "Remove what nobody can use any more."),
        "up": ("jobs.commands.object_store:up", "Start an object store on this machine."),
        "down": ("jobs.commands.object_store:down", "Stop it."),
    },
}
"""Section -> command -> (module:attribute, one line of help)."""

ALIASES = {"plan": "check"}
"""What some commands may be called besides."""
COMMANDS = {name: entry for section in SECTIONS.values() for name, entry in section.items()}


class LazyGroup(click.Group):
    """A group that imports the module of a command when the command is needed."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        name = ALIASES.get(cmd_name, cmd_name)
        if name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[name][0].partition(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if name not in COMMANDS and name not in ALIASES and not name.startswith("-"):
            near = difflib.get_close_matches(name, COMMANDS, n=1)
            raise click.UsageError(
                f"shoal has no command {name}" + (f"; did you mean {near[0]}?" if near else ""), ctx
            )
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        width = max(map(len, COMMANDS))
        for section, commands in SECTIONS.items():
            with formatter.section(section):
                rows = [(name.ljust(width), line) for name, (_, line) in commands.items()]
                formatter.write_dl(rows)


_COMPLETION = """\b
Completion of commands and options:
  bash  eval "$(_SHOAL_COMPLETE=bash_source shoal)"
  zsh   eval "$(_SHOAL_COMPLETE=zsh_source shoal)"
  fish  _SHOAL_COMPLETE=fish_source shoal | source
"""


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=_COMPLETION,
)
@click.version_option(package_name="shoal", prog_name="shoal")
def cli() -> None:
    """Fine-tune models on a cluster, from one YAML file.

    RUN is the id of a run in the store that --store or SHOAL_STORE names, or the run's URI.
    """


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run one command and exit; nothing but a bug shows a traceback."""
    code = _run(arguments)
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader of the pipe has gone (`shoal list | head`); without this, the interpreter
        # would complain when it closes the stream.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)


def _run(arguments: Sequence[str] | None) -> int:
    try:
        given = None if arguments is None else list(arguments)
        code = cli.main(given, prog_name="shoal", standalone_mode=False)
    except ShoalError as error:
        _show(render_error(error))
        return error.exit_code
    except click.UsageError as error:
        path = error.ctx.command_path if error.ctx else "shoal"
        _show(f"error: {error.format_message()}\n\nhint: run: {path} --help")
        return 2
    except click.ClickException as error:
        _show(f"error: {error.format_message()}")
        return error.exit_code
    except click.Abort as error:
        # click makes the same exception of Ctrl-C and of a prompt that met the end of its input.
        return 130 if isinstance(error.__cause__, KeyboardInterrupt) else 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        return 0
    except Exception:
        _report_bug()
        return 1
    return code if isinstance(code, int) else 0


def _report_bug() -> None:
    import traceback

    click.echo(traceback.format_exc(), err=True)
    _show(
        "error: this is a bug in shoal, not in your job\n\n"
        "hint: please report it, with the lines above and the output of: shoal --version"
    )


def _show(text: str) -> None:
    """Print an error to stderr, with its leading words colored on a terminal."""
    if not os.environ.get("NO_COLOR"):
        text = re.sub("^error:", click.style("error:", fg="red", bold=True), text, flags=re.M)
        text = re.sub("^hint:", click.style("hint:", fg="cyan", bold=True), text, flags=re.M)
    click.echo(text, err=True)


if __name__ == "__main__":
    main()
