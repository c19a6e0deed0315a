"""What `shoal check` says of MLflow and W&B: by the environment, and by asking."""

from __future__ import annotations

import http.server
import importlib.util
import socket
import threading
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest

from jobs.checks import tracking
from jobs.checks.finding import Finding, Verdict
from jobs.checks.tracking import check_tracking
from tests.tiny import tiny_job

KUBERAY = {"kind": "kuberay", "image": "shoal:1"}


@pytest.fixture(autouse=True)
def _installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Both packages, and nothing of the user's own."""
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    for name in ("MODE", "API_KEY", "PROJECT", "ENTITY", "BASE_URL", "DIR", "IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(f"WANDB_{name}", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: ModuleSpec(name, None))


def said(tracked: list[str], *, is_here: bool = True, **parts: Any) -> list[Finding]:
    spec = tiny_job("model", {"train": "s3://b/train"}, "s3://b/runs", tracking=tracked, **parts)
    return [*check_tracking(spec, is_here=is_here)]


def only(tracked: list[str], **parts: Any) -> tuple[Verdict, str, str | None, int]:
    [finding] = said(tracked, **parts)
    assert finding.part == "tracking"
    return finding.verdict, finding.message, finding.hint, finding.exit_code


def test_tensorboard_needs_nothing() -> None:
    assert said(["tensorboard"]) == []


def test_a_missing_package_is_a_problem_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert only(["wandb"]) == (
        Verdict.PROBLEM,
        "tracking has wandb, but the package wandb is not installed here",
        'run: pip install "shoal[wandb]", or remove wandb from tracking',
        3,
    )


def test_mlflow_needs_an_address() -> None:
    verdict, message, hint, code = only(["mlflow"])
    assert (verdict, code) == (Verdict.PROBLEM, 3)
    assert message == "tracking has mlflow, but MLFLOW_TRACKING_URI is not set"
    assert hint is not None
    assert hint.startswith("export MLFLOW_TRACKING_URI=")


@pytest.fixture
def answering() -> Iterator[tuple[str, list[int]]]:
    """The address of a server, and the status that it answers with."""
    statuses = [200]

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(statuses[0] if self.path == "/base/health" else 500)
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://user:secret@127.0.0.1:{server.server_port}/base", statuses
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_a_server_that_answers_is_told_of_without_its_password(
    answering: tuple[str, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    uri, statuses = answering
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    shown = uri.replace("user:secret@", "***@")
    for status in (200, 401):
        statuses[0] = status
        assert only(["mlflow"])[:2] == (Verdict.OK, f"MLflow at {shown}, experiment tiny")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "others")
    assert only(["mlflow"])[1].endswith("experiment others")
    statuses[0] = 503
    verdict, message, *_ = only(["mlflow"])
    assert verdict is Verdict.WARNING
    assert message.startswith(f"MLflow at {shown} does not answer: HTTP status 503")


def test_a_server_that_does_not_answer_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "_ANSWER_SECONDS", 0.2)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        for port in (silent.getsockname()[1], 9):
            monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
            verdict, message, _, code = only(["mlflow"])
            assert (verdict, code) == (Verdict.WARNING, 0)
            assert message.startswith(f"MLflow at http://127.0.0.1:{port} does not answer: ")
            assert "object at" not in message


def test_wandb_needs_a_key_unless_it_is_offline(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    verdict, message, hint, _ = only(["wandb"])
    assert verdict is Verdict.WARNING
    assert "no key for W&B at https://api.wandb.ai" in message
    assert hint is not None
    assert "WANDB_MODE=offline" in hint
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password secret\n")
    assert only(["wandb"])[:2] == (Verdict.OK, "W&B at https://api.wandb.ai, project tiny")
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.com")
    assert only(["wandb"])[0] is Verdict.WARNING
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    monkeypatch.setenv("WANDB_ENTITY", "team")
    verdict, message, *_ = only(["wandb"])
    assert message == "W&B at https://wandb.example.com, project team/tiny"
    assert "secret" not in message


def test_wandb_offline_says_where_its_files_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", "/somewhere")
    verdict, message, *_ = only(["wandb"])
    assert verdict is Verdict.OK
    assert message.startswith("W&B offline: /somewhere/wandb, project tiny; send it with: wandb ")
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert only(["wandb"])[0] is Verdict.WARNING


def test_what_other_machines_have_is_not_checked_and_said() -> None:
    pods, nodes = (
        said(["tensorboard", "mlflow", "wandb"], is_here=False, **parts)
        for parts in ({"cluster": KUBERAY}, {})
    )
    assert {f.verdict for f in (*pods, *nodes)} == {Verdict.NOT_CHECKED}
    assert [f.hint for f in pods] == [
        "install shoal[mlflow] there, and give them MLFLOW_TRACKING_URI by "
        "cluster.env_from_secrets",
        "install shoal[wandb] there, and give them WANDB_API_KEY by cluster.env_from_secrets",
    ]
    assert "the nodes of the Ray cluster" in nodes[0].message
