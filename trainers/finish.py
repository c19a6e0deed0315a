"""The end of a run: what its result says, from what its last attempt left."""

from __future__ import annotations

import time

import tenacity

from cluster.storage import DamagedObject, PreconditionFailed, Store
from jobs.errors import Problem
from jobs.record import (
    Failure,
    Outcome,
    Result,
    RunPaths,
    best_manifest,
    live_manifests,
)
from trainers.fence import Superseded
from trainers.records import read_attempts, read_manifests, read_result

_WRITE_ATTEMPTS = 5


def build_result(
    store: Store, paths: RunPaths, *, generation: int, ended: Outcome | Failure
) -> Result:
    """The result of a run that has just ended. Reads manifests and attempts: of a study, those of
    its best trial.

    Where an attempt's record is damaged, nobody can tell which checkpoints count: none is named.
    """
    trial = ended.trial if isinstance(ended, Outcome) else None
    model = paths if trial is None else paths.trial(trial)
    try:
        live = live_manifests(read_manifests(store, model), read_attempts(store, model))
    except DamagedObject as damaged:
        live = []
        if isinstance(ended, Outcome) and ended.failure is None:
            ended = Failure.of(damaged, where="driver")
    outcome = ended if isinstance(ended, Outcome) else None
    tested_step = outcome.test["step"] if outcome is not None and outcome.test else None
    best = next((m for m in live if m.step == tested_step), None) or best_manifest(live)
    failure = ended if isinstance(ended, Failure) else ended.failure
    return Result(
        run_id=paths.run_id,
        state=ended.state,
        generation=generation,
        # An outcome of no attempt knows no step.
        step=max(outcome.step if outcome else 0, live[-1].step if live else 0),
        finished_at=time.time(),
        best_checkpoint=_relative(paths, model.checkpoint(best.name)) if best else None,
        last_checkpoint=_relative(paths, model.checkpoint(live[-1].name)) if live else None,
        outcome=outcome,
        failure=failure,
    )


@tenacity.retry(
    # Another driver was faster: what it wrote decides.
    retry=tenacity.retry_if_exception_type(PreconditionFailed),
    stop=tenacity.stop_after_attempt(_WRITE_ATTEMPTS),
    reraise=True,
)
def write_result(store: Store, paths: RunPaths, result: Result) -> None:
    """Makes the result that of the run, unless a newer driver has written one (Superseded).

    A damaged one is replaced.
    """
    head = store.head(paths.result)
    if head is None:
        store.write_if_absent(paths.result, result.to_bytes())
        return
    # If it is replaced in between, the ETag is the older one: the write fails.
    try:
        there = read_result(store, paths)
    except DamagedObject:
        there = None
    if there is not None and there.generation > result.generation:
        raise Superseded(
            Problem(
                f"generation {result.generation} of the run was superseded: generation "
                f"{there.generation} has ended it as {there.state}",
                f"look at it with: shoal status {paths.run_id}",
            )
        )
    store.write_if_match(paths.result, result.to_bytes(), etag=head.etag)


def _relative(paths: RunPaths, folder: str) -> str:
    return folder.removeprefix(paths.run_id + "/").rstrip("/")
