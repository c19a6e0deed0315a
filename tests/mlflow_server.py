"""A real MLflow server on a free port of loopback, with its runs in a folder."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import urllib3

_START_SECONDS = 200


@contextmanager
def mlflow_server(folder: Path) -> Iterator[str]:
    """Its URL, as MLFLOW_TRACKING_URI has it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    with (folder / "server.log").open("wb") as log:
        server = subprocess.Popen(
            [
                sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1",
                "--port", str(port), "--workers", "1",
                "--backend-store-uri", f"sqlite:///{folder}/mlflow.db",
                "--artifacts-destination", str(folder / "artifacts"),
            ],
            cwd=folder,
            env=os.environ | {
                "MLFLOW_DISABLE_TELEMETRY": "true",
                # A queue of jobs, for which more packages would be needed.
                "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            },
            stdout=log,
            stderr=log,
            start_new_session=True,
        )  # fmt: skip
    try:
        deadline = time.monotonic() + _START_SECONDS
        while not _answers(url):
            said = (folder / "server.log").read_text
            assert server.poll() is None, said()
            assert time.monotonic() < deadline, said()
            time.sleep(0.2)
        yield url
    finally:
        os.killpg(server.pid, 9)  # its worker is a process of its own
        server.wait()


def _answers(url: str) -> bool:
    try:
        with urllib3.PoolManager(timeout=5, retries=False) as http:
            return http.request("GET", f"{url}/health").status == 200
    except urllib3.exceptions.HTTPError:
        return False
