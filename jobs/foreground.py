"""A run that was started from this terminal: it is shown, stopped by Ctrl-C, and summed up.

    attend(started, reader) -> exit code

The driver has a session of its own, so that Ctrl-C reaches only this process. The first one asks
the run to stop through its folder, as `shoal stop` does from any machine; the second kills.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import psutil
from rich.text import Text

from cluster.local import driver_log
from cluster.storage import join_uri
from jobs.commands.logs import format_log_line
from jobs.errors import ShoalError, render_error
from jobs.lines import Line
from jobs.record import State
from jobs.runs import RunReader
from jobs.status import RunStatus
from jobs.status_view import before_and_after
from jobs.study_view import best_text
from jobs.submit import SubmittedRun, request_stop
from jobs.terminal import console_for, print_to, state_text
from jobs.watch import NoView, View, make_view, watch_run

_LOG_LINES_SHOWN = 15
_INTERRUPTS = (signal.SIGINT, signal.SIGTERM)
EXIT_CODE_OF_A_DEAD_DRIVER = 3
EXIT_CODE_OF_A_STOP = 130


def attend(
    started: SubmittedRun, reader: RunReader, *, show_progress: bool, after_generation: int = 0
) -> int:
    """Show the run until it ends; the exit code for the shell.

    `after_generation` is the number of the last driver before this start: its end is not ours.
    """
    process = started.process
    if process is None:
        raise ValueError("a run in the background cannot be attended")
    since = time.time() if after_generation else 0.0
    view = (
        make_view(since=since, tells_end=False)
        if show_progress
        else NoView(console_for(sys.stderr))
    )
    interrupts = _Interrupts(process, reader, view)
    try:
        with interrupts.caught():
            status = watch_run(
                reader,
                view=view,
                after_generation=after_generation,
                give_up=lambda: process.poll() is not None,
                wake=interrupts.wake,
            )
    except _Killed:
        _say_what_is_durable(reader)
        return EXIT_CODE_OF_A_STOP
    situation = status.situation
    if not situation.is_over or situation.generation <= after_generation or status.result is None:
        _say_how_it_died(process, reader, after_generation=after_generation)
        return EXIT_CODE_OF_A_DEAD_DRIVER
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=30)  # The result is there; the rest is tidying up.
    print_to(sys.stdout, summary(status))
    return status.result.exit_code


class _Killed(BaseException):
    """The user has asked twice, and the driver was killed."""


@dataclass
class _Interrupts:
    """Counts Ctrl-C: the first asks for a stop, the second kills."""

    process: subprocess.Popen[bytes]
    reader: RunReader
    view: View
    wake: threading.Event = field(default_factory=threading.Event)
    count: int = 0

    @contextlib.contextmanager
    def caught(self) -> Iterator[None]:
        before = {number: signal.signal(number, self._on_signal) for number in _INTERRUPTS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.count += 1
        if self.count > 1:
            kill_tree(self.process.pid)
            raise _Killed
        # In a thread: the handler must not wait for a store that may be the reason for the stop.
        threading.Thread(target=self._ask_to_stop, daemon=True).start()
        self.wake.set()

    def _ask_to_stop(self) -> None:
        try:
            request_stop(self.reader.store, self.reader.run_id, by=requester())
        except ShoalError as error:
            self.view.say(f"{render_error(error)}\npress Ctrl-C again to kill the run")
            return
        self.view.say(
            "asked to stop; the run saves what it has trained and ends; press Ctrl-C again to kill "
            "it at once"
        )


def requester() -> str:
    """`user@host`, for the record of a stop."""
    try:
        return f"{getpass.getuser()}@{socket.gethostname()}"
    except (KeyError, OSError):  # A container's user may have no name.
        return f"{os.getuid()}@{socket.gethostname()}"


def kill_tree(pid: int) -> None:
    """SIGKILL for a process, its descendants and its process group."""
    try:
        family = [*psutil.Process(pid).children(recursive=True), psutil.Process(pid)]
    except psutil.NoSuchProcess:
        family = []
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()


def summary(status: RunStatus) -> Text:
    """How the run ended, the test before and after, where things are, and what to type next."""
    situation, reader_uri = status.situation, status.uri
    text = Text.assemble("\n", (status.run_id, "bold"), "  ", state_text(situation.state))
    if situation.cause:
        text.append(f"  {situation.cause}")
    rows: list[tuple[str, str]] = []
    outcome = status.result.outcome if status.result else None
    if outcome is not None and outcome.test:
        name = "test" if outcome.tested_on == "test" else "validation (no test set given)"
        rows.append((name, before_and_after(outcome)))
    if status.study is not None:
        rows.append(("best", best_text(status.study)))
    if status.result is not None:
        best, last = status.result.best_checkpoint, status.result.last_checkpoint
        if best:
            rows.append(("best checkpoint", join_uri(reader_uri, best)))
        elif last:
            rows.append(("last checkpoint", join_uri(reader_uri, last)))
    rows.append(("report", join_uri(reader_uri, "report/index.html")))
    if status.study is not None and status.study.best is not None:
        rows.append(("its job", join_uri(reader_uri, "report/winner.yaml")))
    rows.append(("next", _next_command(status)))
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        text.append("\n  ")
        text.append(name.ljust(width), style="dim")
        text.append(f"  {value}")
    if situation.hint and situation.state is not State.STOPPED:
        text.append("\n\nhint: ", style="bold cyan")
        text.append(situation.hint)
    return text


def _next_command(status: RunStatus) -> str:
    state = status.situation.state
    if state is State.SUCCEEDED:
        best = status.study.best if status.study else None
        trial = f" --trial {best.number}" if best else ""
        return f"shoal evaluate {status.uri}{trial} --data URI"
    if state in (State.STOPPED, State.FAILED_INFRA, State.FAILED_RESOURCES):
        return f"shoal resume {status.uri}"
    return f"shoal logs {status.uri}"


def _say_what_is_durable(reader: RunReader) -> None:
    manifests = reader.live_manifests()
    kept = (
        f"the checkpoint of step {manifests[-1].step} is durable"
        if manifests
        else "no checkpoint had been written; a resume starts anew"
    )
    print_to(sys.stderr, f"\nkilled; {kept}\n\ngo on with: shoal resume {reader.uri}")


def _say_how_it_died(
    process: subprocess.Popen[bytes], reader: RunReader, *, after_generation: int
) -> None:
    """Why there is no result, from the run's log, or from this machine where it is not there: a
    driver that another one keeps from the run writes nothing into its folder."""
    code = process.poll()
    how = (
        "has not ended, but has lost the run"
        if code is None
        else f"was killed by {signal.Signals(-code).name}"
        if code < 0
        else f"ended with exit code {code}"
    )
    printed = driver_log(reader.uri)
    lines = _lines_of(process, reader, after_generation=after_generation)
    if lines:
        shown = "\n".join(format_log_line(line) for line in lines[-_LOG_LINES_SHOWN:])
        told = "without a result; the last lines of its log are above"
        hint = f"go on from the last checkpoint with: shoal resume {reader.uri}"
    else:
        shown = _tail(printed)
        told = "and did not drive the run; the last lines that it printed are above"
        hint = f"once what they say is settled: shoal resume {reader.uri}"
    print_to(
        sys.stderr,
        Text.assemble(
            f"\n{shown}\n\n",
            ("error:", "bold red"),
            f" the driver of {reader.uri} (process {process.pid}) {how} {told}, all that it "
            f"printed is in {printed}\n\n",
            ("hint:", "bold cyan"),
            f" {hint}",
        ),
    )


def _lines_of(
    process: subprocess.Popen[bytes], reader: RunReader, *, after_generation: int
) -> list[Line]:
    """Log lines of the driver that this process is and of its workers; none where it is not the
    last that has driven the run."""
    lease = reader.lease()
    if lease is None or lease.pid != process.pid or lease.generation <= after_generation:
        return []
    generation = {attempt.attempt: attempt.generation for attempt in reader.attempts()}
    return [
        line
        for line in reader.log_lines().new()
        if line.get("generation", generation.get(line["attempt"])) == lease.generation
    ]


def _tail(path: Path) -> str:
    """The last lines of what a driver printed that never got as far as its log."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return "(it has logged nothing)"
    return "\n".join(lines[-_LOG_LINES_SHOWN:]) or "(it has printed nothing)"
