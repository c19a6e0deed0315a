"""Stores for all tests: one embedded object store a session, and fresh folders in it."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from xdist.scheduler import LoadFileScheduling

from cluster import embedded
from cluster.embedded import EmbeddedStore
from cluster.storage import Store, open_store
from tests.kubernetes_api.server import KubernetesApi, running_api


class _FromBothEnds(LoadFileScheduling):
    """Two processes take the files in their order, the others from its end: whole runs, which need
    all cores at times and wait at others, are two at a time, beside short tests."""

    def _assign_work_unit(self, node: Any) -> None:
        if node.gateway.id not in ("gw0", "gw1"):
            self.workqueue.move_to_end(next(reversed(self.workqueue)), last=False)
        super()._assign_work_unit(node)


def pytest_configure() -> None:
    """Object stores, and the core of W&B, are written in Go: with several threads that run at once
    each request costs them half as much again."""
    os.environ.setdefault("GOMAXPROCS", "1")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> _FromBothEnds | None:
    return _FromBothEnds(config, log) if config.getvalue("dist") == "loadfile" else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with the longest time limits first: side by side, the last to end is a short one."""
    limits = dict[Path, float]()
    for item in items:
        marker = item.get_closest_marker("timeout")
        limit = float(marker.args[0]) if marker else 0.0
        limits[item.path] = max(limits.get(item.path, 0.0), limit)
    items.sort(key=lambda item: -limits[item.path])


@pytest.fixture(scope="session")
def object_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedStore]:
    """A running embedded store, found by every client through the AWS variables."""
    with (
        embedded.running(tmp_path_factory.mktemp("object-store")) as store,
        pytest.MonkeyPatch.context() as patch,
    ):
        for name in ("AWS_PROFILE", "AWS_ENDPOINT_URL", "AWS_SESSION_TOKEN"):
            patch.delenv(name, raising=False)
        for name, value in embedded.environment(store).items():
            patch.setenv(name, value)
        # Files of the user must not reach the tests, nor a look for a metadata service slow them.
        patch.setenv("AWS_CONFIG_FILE", "/nonexistent/config")
        patch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent/credentials")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        # Ray's workers must not wait until nothing else is to be done (their default: 15).
        patch.setenv("RAY_worker_niceness", "0")
        yield store


@pytest.fixture(scope="session")
def bucket(object_store: EmbeddedStore) -> Store:
    """The whole bucket; stores within it share its connections."""
    return open_store(f"s3://{embedded.DEFAULT_BUCKET}")


@pytest.fixture
def s3_store(bucket: Store) -> Store:
    """A store below a prefix that no other test uses."""
    return bucket.within(f"test-{uuid.uuid4().hex[:12]}")


@pytest.fixture
def local_store(tmp_path: Path) -> Store:
    """A store in a local folder that does not exist yet."""
    return open_store(tmp_path / "store")


@pytest.fixture(params=["s3", "local"])
def store(request: pytest.FixtureRequest) -> Store:
    """Each kind of store in turn."""
    opened: Store = request.getfixturevalue(f"{request.param}_store")
    return opened


@pytest.fixture
def api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[KubernetesApi]:
    """A Kubernetes API that listens, with KubeRay's definitions; KUBECONFIG names it."""
    for name in ("SHOAL_CONTEXT", "KUBERNETES_SERVICE_HOST", "HTTP_PROXY", "http_proxy"):
        monkeypatch.delenv(name, raising=False)
    with running_api() as api:
        monkeypatch.setenv("KUBECONFIG", str(api.write_kubeconfig(tmp_path / "kubeconfig")))
        yield api
