"""The hook that tells Ray's node of the pod's end."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from cluster import drain

NODE = """
import signal, sys
signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
print("up", flush=True)
signal.pause()
"""


def test_ray_start_hears_it_and_nobody_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = tmp_path / "ray"
    ray.write_text(NODE)
    commands = ([str(ray), "start", "--head"], ["-c", NODE, "ray start --head"])
    started = [
        subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, text=True)
        for command in commands
    ]
    try:
        for process in started:
            assert process.stdout is not None
            assert process.stdout.readline() == "up\n"
        # Another Ray of this machine is none of this pod's processes.
        ours = [drain.psutil.Process(process.pid) for process in started]
        for process in ours:
            process.info = {"cmdline": process.cmdline()}  # type: ignore[attr-defined]
        monkeypatch.setattr(drain.psutil, "process_iter", lambda attrs: iter(ours))
        assert drain.main() == 0
        node, other = started
        assert node.wait(60) == 7
        assert other.poll() is None
    finally:
        for process in started:
            process.kill()
            process.communicate()


def test_a_pod_without_a_node_is_told_of(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(drain.psutil, "process_iter", lambda attrs: iter(()))
    assert drain.main() == 1
    assert "nobody was told" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "is_node"),
    [
        (["/usr/bin/python3.12", "/usr/local/bin/ray", "start", "--block"], True),
        (["ray", "start", "--address=a"], True),
        (["/bin/bash", "-c", "ulimit -n 65536; ray start --head"], False),
        (["python", "-m", "cluster.drain"], False),
        (["ray", "job", "submit"], False),
        (["python", "start", "ray"], False),
        ([], False),
    ],
)
def test_ray_start_is_known_by_its_words(command: list[str], is_node: bool) -> None:
    assert drain.is_node(command) is is_node
