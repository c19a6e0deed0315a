"""A tiny model and data sets for whole runs, and a fresh cache and place for runs in each test."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.scene import Scene
from tests.tiny import tiny_model, tiny_reviews

TRAIN_ROWS = 40
HELD_OUT_ROWS = 11


@pytest.fixture(scope="session")
def tiny_world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """The model's folder and the URIs of the data sets; not to be changed by a test."""
    folder = tmp_path_factory.mktemp("tiny")
    model = tiny_model(folder / "model")
    data = tiny_reviews(
        str(folder / "data"), rows=TRAIN_ROWS, rows_per_group=7, held_out=HELD_OUT_ROWS
    )
    return model, data


@pytest.fixture
def scene(
    tiny_world: tuple[Path, dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Scene:
    model, data = tiny_world
    monkeypatch.setenv("SHOAL_CACHE", str(tmp_path / "cache"))
    return Scene(model, data, tmp_path)
