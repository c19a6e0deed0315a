"""A tiny model, its data sets and a place for runs: what a test of whole runs starts from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.storage import Store, open_store
from jobs.record import Outcome, RunPaths
from jobs.spec import JobSpec
from tests.ranks import assignment_of
from tests.tiny import tiny_job


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
