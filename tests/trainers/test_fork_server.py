"""A fork stands for the process that was asked for, and outlives neither side's end."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from trainers.fork_server import fork_server

SCRIPT = """
import json, os, signal, sys, threading

names = ("torch", "transformers", "trainers.worker", "ray")
loaded = [name for name in names if name in sys.modules]
import torch

print(json.dumps({
    "arguments": sys.argv[1:], "folder": os.getcwd(), "variable": os.environ.get("FORKED"),
    "gone": os.environ.get("GONE"), "said": sys.stdin.read(), "loaded": loaded, "name": __name__,
    "threads": threading.active_count(), "sum": torch.ones(1000, 1000).sum().item(),
    "parent": os.getppid(), "pid": os.getpid(),
    "hears": signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, []),
}))
print("to errors", file=sys.stderr)
sys.exit(0)
"""


@pytest.fixture(scope="module")
def python() -> Iterator[list[str]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        patch.setenv("GONE", "only in the server")
        with fork_server() as command:
            assert command is not None
            patch.delenv("GONE")
            yield shlex.split(command)


@pytest.fixture
def script(tmp_path: Path) -> str:
    file = tmp_path / "script.py"
    file.write_text(SCRIPT)
    return str(file)


def servers() -> list[psutil.Process]:
    return [
        process
        for process in psutil.Process().children()
        if "trainers.fork_server" in " ".join(process.cmdline())
    ]


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.timeout(120)
def test_a_fork_is_the_process_that_was_asked_for_with_its_modules_loaded(
    python: list[str], script: str, tmp_path: Path
) -> None:
    done = subprocess.run(
        [*python, script, "--one", "two words"],
        cwd=tmp_path, env=os.environ | {"FORKED": "yes"}, input="hear this",
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    [server] = servers()
    found = json.loads(done.stdout)
    assert found.pop("pid") not in (server.pid, os.getpid())
    assert found == {
        "arguments": ["--one", "two words"],
        "folder": str(tmp_path),
        "variable": "yes",
        "gone": None,
        "said": "hear this",
        # Ray is not: it reads settings, and the token of the cluster, as it is loaded.
        "loaded": ["torch", "transformers", "trainers.worker"],
        "name": "__main__",
        "threads": 1,
        "sum": 1_000_000.0,
        "parent": server.pid,
        # Ctrl-C is for the driver, as with all processes that Ray starts.
        "hears": False,
    }
    assert done.stderr == "to errors\n"


@pytest.mark.timeout(120)
def test_temporary_files_may_lie_where_a_shell_would_stumble(
    script: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray gives the command to bash as it is."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    with tempfile.TemporaryDirectory(prefix="it's a $(place)") as folder:
        monkeypatch.setattr("tempfile.tempdir", folder)
        with fork_server() as command:
            done = subprocess.run(
                ["bash", "-c", f"exec {command} {script} argument"],
                input="", capture_output=True, text=True, check=True,
            )  # fmt: skip
    found = json.loads(done.stdout)
    assert found["arguments"] == ["argument"]
    assert "torch" in found["loaded"]


@pytest.mark.timeout(120)
def test_the_command_ends_as_its_fork_is_killed(python: list[str], tmp_path: Path) -> None:
    file, told = tmp_path / "sleeps.py", tmp_path / "pid"
    file.write_text(
        f"import os, time\nopen({str(told)!r}, 'w').write(str(os.getpid()) + ' ')\ntime.sleep(600)"
    )
    with subprocess.Popen([*python, str(file)]) as command:
        wait_until(lambda: told.exists() and told.read_text().endswith(" "))
        time.sleep(0.3)
        assert command.poll() is None
        os.kill(int(told.read_text()), signal.SIGKILL)
        command.wait(30)


@pytest.mark.timeout(120)
def test_without_its_server_the_command_is_python_itself(
    script: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    before = servers()
    with fork_server() as command:
        assert command is not None
        [server] = [process for process in servers() if process not in before]
        server.kill()
        server.wait()
        done = subprocess.run(
            [*shlex.split(command), script, "argument"],
            input="", capture_output=True, text=True, check=True,
        )  # fmt: skip
    found = json.loads(done.stdout)
    assert (found["arguments"], found["loaded"], found["parent"]) == (["argument"], [], os.getpid())


@pytest.mark.timeout(120)
def test_a_server_ends_with_the_process_that_has_started_it() -> None:
    starter = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import time\nfrom trainers.fork_server import fork_server\n"
            "with fork_server():\n    time.sleep(600)",
        ],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    wait_until(lambda: bool(psutil.Process(starter.pid).children()))
    [server] = psutil.Process(starter.pid).children()
    starter.kill()
    starter.wait()
    wait_until(lambda: not server.is_running() or server.status() == psutil.STATUS_ZOMBIE)


def test_where_no_socket_can_be_workers_are_started_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = tmp_path / ("long" * 40)
    deep.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(deep))
    with fork_server() as command:
        assert command is None
