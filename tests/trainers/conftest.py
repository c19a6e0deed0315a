"""A tiny model and data sets for whole runs, and a fresh cache and place for runs in each test."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cluster.storage import Store, open_store
from jobs.record import Outcome, RunPaths
from jobs.spec import JobSpec
from tests.ranks import assignment_of
from tests.tiny import tiny_job, tiny_model, tiny_reviews

TRAIN_ROWS = 40
HELD_OUT_ROWS = 11


@dataclass(frozen=True)
class Scene:
    """A model, its data sets (40, 11 and 11 rows in row groups of 7), and a store of runs."""

    model: Path
    data: dict[str, str]
    folder: Path

    @property
    def runs(self) -> Store:
        return open_store(self.folder / "runs")

    def job(self, *, data: dict[str, Any] | None = None, **parts: Any) -> JobSpec:
        """A job of 10 steps, 5 an epoch; `data` and `parts` change it as in `tiny_job`."""
        sets = {name: uri for name, uri in ({**self.data, **(data or {})}).items() if uri}
        return tiny_job(self.model, sets, str(self.folder / "runs"), **parts)

    def train(self, spec: JobSpec, run_id: str = "run", *, generation: int = 1) -> Outcome:
        """The run's outcome; one rank, in this process."""
        from trainers.session import ProcessSession
        from trainers.worker import train_worker

        with ProcessSession(use_gpu=False) as session:
            return train_worker(session, assignment_of(spec, run_id, generation=generation))

    def run_folder(self, run_id: str = "run") -> Path:
        return self.folder / "runs" / run_id

    def paths(self, run_id: str = "run") -> RunPaths:
        return RunPaths(run_id)


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
