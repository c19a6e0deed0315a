"""A tiny model, its data sets and a place for runs: what a test of whole runs starts from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cluster.storage import Store, open_store
from jobs.record import Manifest, Outcome, RunPaths
from jobs.spec import JobSpec
from tests.ranks import assignment_of
from tests.tiny import tiny_job
from trainers.data.index import open_index
from trainers.loop import Trainee
from trainers.optim import build_optimizer
from trainers.records import read_manifests
from trainers.session import ProcessSession
from trainers.tasks.task import build_task
from trainers.worker import _Rank, train_worker


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
        with ProcessSession(use_gpu=False) as session:
            return train_worker(session, assignment_of(spec, run_id, generation=generation))

    def crash(self, spec: JobSpec, run_id: str = "run", *, after_step: int = 7) -> None:
        """Begins the run, whose process dies after that step: what it was saving is stored."""
        whole = _Rank.stepped

        def stepped(rank: Any, batch: Any, progress: Any) -> None:
            whole(rank, batch, progress)
            if progress.step == after_step:
                raise RuntimeError("the process dies")

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_Rank, "stepped", stepped)
            with pytest.raises(RuntimeError, match="the process dies"):
                self.train(spec, run_id)

    def trainee(self, spec: JobSpec) -> Trainee:
        """The job's model and optimizer before the first step, on one rank."""
        index = open_index(open_store(spec.data.train))
        task = build_task(spec, model_folder=self.model, index=index)
        model = task.build_model(self.model, dropout=spec.model.dropout, seed=spec.data.seed)
        optimizer = build_optimizer(model, spec.optimizer)
        return Trainee(task, model, optimizer, torch.device("cpu"), torch.float32)

    def manifests(self, run_id: str = "run") -> list[Manifest]:
        return read_manifests(self.runs, self.paths(run_id))

    def checkpoint_folder(self, manifest: Manifest, run_id: str = "run") -> Path:
        return self.runs_folder / self.paths(run_id).checkpoint(manifest.name)

    def tensors(self, run_id: str = "run") -> dict[str, bytes]:
        """Every tensor of the last checkpoint, as bytes."""
        folder = self.checkpoint_folder(self.manifests(run_id)[-1], run_id)
        return {
            f"{path.relative_to(folder)}/{name}": tensor.numpy().tobytes()
            for path in sorted(folder.rglob("*.safetensors"))
            for name, tensor in load_file(path).items()
        }

    @property
    def runs_folder(self) -> Path:
        return self.folder / "runs"

    def run_folder(self, run_id: str = "run") -> Path:
        return self.runs_folder / run_id

    def paths(self, run_id: str = "run") -> RunPaths:
        return RunPaths(run_id)
