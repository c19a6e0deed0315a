"""Weights & Biases: a run whose id is the run's own, in the project of WANDB_PROJECT (else of the
job's name). Trials are in the group of their study.

A resume goes on in the same run, by its id. W&B leaves out steps that it has already. Offline
(WANDB_MODE=offline) each attempt is a folder of its own with that id; `wandb sync` joins them.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # read while it is imported

import wandb

from trainers.data.cache import cache_folder
from trainers.tracking.tracker import Ended, Parameters, Point, TrackedRun

_FINISH_SECONDS = 10.0
"""How long the end waits for an upload. What is not sent by then can be, with `wandb sync`."""
_INIT_SECONDS = 12.0


class WandbRun:
    """A Tracker."""

    def __init__(self, run: TrackedRun) -> None:
        """Opens the run, or begins it. Raises what W&B does, as where it has no key."""
        top = run if run.study is None else run.study
        group = None if top.kind == "run" else top.run_id
        self._run: Any = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or run.job,
            id=wandb_id(run.run_id),
            name=run.run_id,
            group=group,
            job_type=run.kind,
            dir=files_folder(),
            config={"shoal": run.labels},
            resume="allow",
            allow_val_change=True,
            reinit="create_new",  # a process may have one trial after another
            settings=wandb.Settings(
                silent=True,
                console="off",  # the run's logs have it
                disable_git=True,
                save_code=False,
                x_disable_stats=True,
                x_disable_machine_info=True,
                x_save_requirements=False,
                init_timeout=_INIT_SECONDS,
                finish_timeout=_FINISH_SECONDS,
            ),
        )
        self._exit_code = 0

    def describe(self, parameters: Parameters) -> None:
        self._run.config.update(dict(parameters.tree), allow_val_change=True)

    def log(self, points: Sequence[Point]) -> None:
        for point in points:
            self._run.log(dict(point.values), step=point.step)

    def end(self, ended: Ended) -> None:
        self._run.summary.update({"state": ended.state, **ended.values})
        if ended.cause is not None:
            self._run.summary["cause"] = ended.cause
        if ended.report is not None:
            self._run.log({"report": wandb.Html(ended.report, inject=False)})
        self._exit_code = ended.exit_code

    def close(self) -> None:
        self._run.finish(exit_code=self._exit_code)


def files_folder() -> str:
    """Folder for W&B's own, `wandb/`: that of WANDB_DIR, else the node's cache. Workers of Ray have
    working folders in which nobody would look for it."""
    folder = Path(os.environ.get("WANDB_DIR") or cache_folder())
    folder.mkdir(parents=True, exist_ok=True)
    return str(folder)


def wandb_id(run_id: str) -> str:
    """Id of the tracked run: W&B allows no slash, which a trial's run id has."""
    return run_id.replace("/", "-")
