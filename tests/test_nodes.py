"""A cluster of test nodes leaves nothing behind, however its maker ends."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests import nodes
from tests.networks import Network, make_network

MAKER = """
import sys, time
from tests.nodes import nodes
with nodes(cpus=0) as cluster:
    print(cluster.folder, flush=True)
    time.sleep(600)
"""


def test_a_cluster_is_removed_when_its_maker_is_killed() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", MAKER], stdout=subprocess.PIPE, text=True
    ) as maker:
        assert maker.stdout is not None
        folder = Path(maker.stdout.readline().strip())
        assert folder.is_dir()
        assert marked(folder)
        maker.kill()
    wait_until(lambda: not folder.exists())
    assert not marked(folder)
    assert not links_of(folder)


def test_the_next_cluster_removes_one_whose_maker_and_sweeper_were_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nodes.tempfile, "gettempdir", lambda: str(tmp_path))
    folder = tmp_path / f"{nodes._FOLDER}{os.getpid():08d}"
    folder.mkdir()
    (folder / "owner").touch()
    network = make_network(nodes._name_of(folder), folder)
    environment = os.environ | {nodes._MARK: f"{nodes._name_of(folder)}-7"}
    with subprocess.Popen(["sleep", "600"], env=environment) as left:
        with nodes._held(folder):
            nodes._sweep_abandoned()
            assert left.poll() is None, "its maker lives"
        nodes._sweep_abandoned()
        assert left.wait(10) is not None
    assert not folder.exists()
    if not isinstance(network, Network):
        pytest.skip(f"no network was there to be removed: {network}")
    assert not links_of(folder)


def marked(folder: Path) -> list[psutil.Process]:
    return nodes._marked(lambda mark: mark.startswith(f"{nodes._name_of(folder)}-"))


def links_of(folder: Path) -> list[str]:
    """Bridges and namespaces of a cluster."""
    found = [*Path("/sys/class/net").iterdir(), *Path("/run/netns").glob("*")]
    return [path.name for path in found if path.name.startswith(f"shoal{nodes._name_of(folder)}")]


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.1)
