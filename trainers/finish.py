"""The end of a run: what its result says, from what its last attempt left."""

from __future__ import annotations

import time

from cluster.storage import Store
from jobs.record import (
    Failure,
    Manifest,
    Outcome,
    Result,
    RunPaths,
    best_manifest,
    live_manifests,
)
from trainers.restore import read_attempts, read_manifests


def build_result(
    store: Store, paths: RunPaths, *, generation: int, ended: Outcome | Failure
) -> Result:
    """The result of a run that has just ended. Reads manifests and attempts."""
    live = live_manifests(read_manifests(store, paths), read_attempts(store, paths))
    outcome = ended if isinstance(ended, Outcome) else None
    tested_step = outcome.test["step"] if outcome is not None and outcome.test else None
    best = next((m for m in live if m.step == tested_step), None) or best_manifest(live)
    best = best or (live[-1] if live else None)
    failure = ended if isinstance(ended, Failure) else ended.failure
    return Result(
        run_id=paths.run_id,
        state=ended.state,
        generation=generation,
        step=outcome.step if outcome else (live[-1].step if live else 0),
        finished_at=time.time(),
        best_checkpoint=_relative(paths, best) if best else None,
        last_checkpoint=_relative(paths, live[-1]) if live else None,
        outcome=outcome,
        failure=failure,
    )


def _relative(paths: RunPaths, manifest: Manifest) -> str:
    folder = paths.checkpoint(manifest.name)
    return folder.removeprefix(paths.run_id + "/").rstrip("/")
