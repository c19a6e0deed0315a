"""Which checkpoints of a run are kept, and the removal of the others.

Everything in the folder of checkpoints goes that the run has passed and does not keep: checkpoints
of the lineage that are neither among the last nor among the best, those of superseded attempts,
damaged ones, and parts of which no manifest was ever written.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from cluster.storage import Store
from jobs.errors import EnvironmentFault
from jobs.record import (
    Attempt,
    CheckpointName,
    Manifest,
    RunPaths,
    by_merit,
    live_manifests,
    rightful,
)
from jobs.spec import JobSpec
from trainers.records import list_checkpoints, manifests_in, read_attempts
from trainers.telemetry import Telemetry


def apply_retention(
    spec: JobSpec, store: Store, paths: RunPaths, telemetry: Telemetry, *, attempt: int
) -> None:
    """Deletes what retention gives up: the manifest first, so that nothing half looks whole.

    `attempt` is the caller's own, whose newest manifest is durable. One that a newer attempt has
    superseded (its driver was frozen, say) deletes nothing: the newer one may need it. Nor is
    anything deleted while one of the records that decide cannot be read; a manifest that is damaged
    each time it is read is none. What cannot be deleted now is named again after the next
    checkpoint.
    """
    metric, mode, _ = spec.best
    try:
        listed = list_checkpoints(store, paths)
        found = [name for name in map(CheckpointName.parse, listed) if name is not None]
        manifests, _ = manifests_in(store, paths, listed)
        attempts = rightful(read_attempts(store, paths))
        if attempts[-1].attempt > attempt:
            telemetry.event("warning", "a newer attempt goes on: old checkpoints are left to it")
            return
        removed = superfluous(
            found,
            manifests,
            attempts,
            keep_last=spec.checkpoint.keep_last,
            keep_best=spec.checkpoint.keep_best,
            metric=metric,
            mode=mode,
        )
        for name in removed:
            store.delete([paths.manifest(name)])
            store.delete(listed[name.folder])
            telemetry.event("retention", f"deleted step {name.step}", step=name.step)
    except EnvironmentFault as error:
        telemetry.event("warning", f"old checkpoints could not be deleted: {error}")


def superfluous(
    found: Iterable[CheckpointName],
    manifests: list[Manifest],
    attempts: list[Attempt],
    *,
    keep_last: int,
    keep_best: int,
    metric: str,
    mode: Literal["min", "max"],
) -> list[CheckpointName]:
    """Names among `found`, those of all folders, that retention removes, in their order. Pure.

    Nothing beyond the newest checkpoint of the lineage is removed.
    """
    live = live_manifests(manifests, attempts)
    if not live:
        return []
    best = by_merit(live, metric=metric, mode=mode)[:keep_best]
    kept = {m.name for m in [*live[-keep_last:], *best]}
    return sorted(name for name in found if name not in kept and name.step <= live[-1].step)
