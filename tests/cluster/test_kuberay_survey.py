"""Questions to a cluster that is slow, or says strange things; what it says is tested with
`shoal check`."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest

from cluster.disruption import disruption_budgets
from cluster.kuberay_access import Connection
from cluster.kuberay_errors import Asked, KubernetesError
from cluster.kuberay_survey import Survey, survey
from jobs.cluster_spec import KubeRayCluster
from jobs.errors import EnvironmentFault, Problem
from tests.rayjobs import job, rayjob

Answering = Callable[[str, str], dict[str, Any]]


class Slow:
    """As much of a Connection as a survey uses: `answers(path, verb)` is what the API says."""

    server = "https://kubernetes.example.com"

    def __init__(self, answers: Answering) -> None:
        self.asked: list[str] = []
        self._answers = answers

    def request(self, method: str, path: str, asked: Asked, **rest: Any) -> dict[str, Any]:
        self.asked.append(path)
        return self._answers(path, asked.verb)


def surveyed(answers: Answering, *, seconds: float = 60.0) -> tuple[Survey, Slow]:
    spec, slow = job("gpus in a queue"), Slow(answers)
    manifest = rayjob(spec)
    assert isinstance(spec.cluster, KubeRayCluster)
    found = survey(
        cast(Connection, slow),
        spec.cluster,
        rayjob=manifest,
        budgets=disruption_budgets(manifest),
        seconds=seconds,
    )
    return found, slow


@pytest.fixture
def never() -> Iterator[threading.Event]:
    """Set once the test is over, so that threads that wait for it end."""
    event = threading.Event()
    yield event
    event.set()


def test_what_does_not_answer_in_time_is_not_waited_for(never: threading.Event) -> None:
    def answer(path: str, verb: str) -> dict[str, Any]:
        if path.endswith("/resourcequotas"):
            never.wait(60)
        return {}

    found, _ = surveyed(answer, seconds=1.0)
    assert found["quotas"].tree is None
    assert not never.is_set()


def test_after_an_api_that_does_not_answer_nothing_more_is_asked(never: threading.Event) -> None:
    def answer(path: str, verb: str) -> dict[str, Any]:
        never.wait(60)
        return {}

    found, slow = surveyed(answer, seconds=0.2)
    assert found.unreachable is not None
    assert "did not answer within 0.2 s" in str(found.unreachable)
    assert not any("/namespaces/" in path for path in slow.asked)


def test_credentials_that_cannot_be_renewed_are_one_answer() -> None:
    def answer(path: str, verb: str) -> dict[str, Any]:
        raise EnvironmentFault(Problem("the plugin gives no credentials"))

    found, slow = surveyed(answer)
    assert str(found.unreachable) == "the plugin gives no credentials"
    assert len(slow.asked) == 3


def test_a_version_that_may_not_be_read_does_not_end_the_survey() -> None:
    def answer(path: str, verb: str) -> dict[str, Any]:
        if path == "/version":
            raise KubernetesError(Problem("forbidden"), code=403, reason="Forbidden")
        return {}

    found, slow = surveyed(answer)
    assert found.unreachable is None
    assert any(path.endswith("/resourcequotas") for path in slow.asked)


@pytest.mark.parametrize(
    ("image", "version"),
    [
        ("quay.io/kuberay/operator:v1.7.0", "1.7.0"),
        ("registry.example.com:5000/operator:1.6.1@sha256:" + 64 * "a", "1.6.1"),
        ("registry.example.com:5000/operator", None),
        ("quay.io/kuberay/operator:nightly", None),
    ],
)
def test_the_operators_version_is_that_of_its_image(image: str, version: str | None) -> None:
    deployment = {
        "metadata": {"name": "operator", "namespace": "kuberay-system"},
        "spec": {"template": {"spec": {"containers": [{"image": image}]}}},
    }

    def answer(path: str, verb: str) -> dict[str, Any]:
        return {"items": [deployment]} if path.endswith("/deployments") else {}

    found, _ = surveyed(answer)
    (operator,) = found.operators("ray.io")
    assert operator.version == version
    assert not operator.is_available
    assert operator.watched == ()
