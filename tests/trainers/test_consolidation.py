"""All weights of a checkpoint as one file: stored whole, or the store's error and nothing left."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from cluster.embedded import EmbeddedStore
from cluster.storage import Store, StoreAway, Transfer, open_store
from jobs.record import Manifest
from jobs.spec import StoreAccess
from tests.faulty_proxy import proxy_to
from tests.scene import Scene
from trainers.consolidation import store_model, store_weights
from trainers.layout import WEIGHTS
from trainers.records import read_manifests

NAME = "model.safetensors"


def trained(scene: Scene) -> tuple[Store, Manifest]:
    """A checkpoint of a short run, and its manifest."""
    scene.train(scene.job(train={"epochs": 1}))
    manifest = read_manifests(scene.runs, scene.paths())[-1]
    return scene.runs.within(scene.paths().checkpoint(manifest.name).rstrip("/")), manifest


def files_in_use(folder: Path) -> list[str]:
    """Files below `folder`, with a name or without, that this process has open or mapped."""
    held = [os.readlink(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd") if _is_open(n)]
    held += Path("/proc/self/maps").read_text().splitlines()
    return [line for line in held if str(folder) in line]


def _is_open(descriptor: str) -> bool:
    return os.path.lexists(f"/proc/self/fd/{descriptor}")


@pytest.mark.parametrize("part_bytes", [16 * 2**20, 30_000], ids=["at once", "in parts"])
def test_a_store_that_goes_away_is_told_and_nothing_is_left(
    scene: Scene, object_store: EmbeddedStore, s3_store: Store, part_bytes: int
) -> None:
    checkpoint, manifest = trained(scene)
    scratch = scene.folder / "scratch"
    with proxy_to(object_store.endpoint_url) as proxy:
        to = open_store(
            s3_store.uri,
            StoreAccess(endpoint_url=proxy.url),
            transfer=Transfer(part_bytes=part_bytes, retry_seconds=0.5),
        )
        proxy.fail("drop", "PUT", NAME, times=10**9)
        with pytest.raises(StoreAway) as raised:
            store_model(checkpoint, manifest.parts, to, scratch=scratch)
        # The error and all that it refers to are still there.
        assert NAME in str(raised.value)
        assert files_in_use(scratch) == []
        assert list(scratch.iterdir()) == []
        assert s3_store.head("config.json") is None, "a folder without weights is no model's"
    store_model(checkpoint, manifest.parts, s3_store, scratch=scratch)
    assert s3_store.read(NAME) == checkpoint.read(WEIGHTS)


def test_what_is_stored_is_told_with_its_digest(scene: Scene, store: Store) -> None:
    checkpoint, manifest = trained(scene)
    part = store_weights(checkpoint, manifest.parts, store, "some/name", scratch=scene.folder)
    data = checkpoint.read(WEIGHTS)
    assert store.read("some/name") == data
    assert (part.name, part.bytes) == ("some/name", len(data))
    assert part.sha256 == hashlib.sha256(data).hexdigest()
