"""Checkpoints as they are read: which one a run goes on from, verified, and what is in it.

newest_restorable       the newest checkpoint of the lineage whose every byte is what it was
checkpoint_copy         its parts, as a folder of this node
load_progress
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from cluster.storage import ObjectMissing, Store
from jobs.record import Manifest, RunPaths, live_manifests
from trainers.consolidation import complete_weights
from trainers.layout import WEIGHTS
from trainers.local_copy import DamagedPart, drop_copy, local_copy
from trainers.loop import Progress
from trainers.records import read_attempts, read_manifests_and_damage


def newest_restorable(
    store: Store, paths: RunPaths, *, cache_folder: Path
) -> tuple[Manifest | None, tuple[str, ...]]:
    """The newest checkpoint of the lineage whose every part is what its manifest says.

    Also says of each newer one, damaged or incomplete, why it is skipped. The local copy is left
    in `cache_folder` for `checkpoint_copy`. An attempt before this one that was thought dead may
    save and apply retention meanwhile: where that takes a checkpoint away, it is looked for anew.
    """
    manifests, damaged = read_manifests_and_damage(store, paths)
    skipped = [f"a checkpoint is skipped: {reason}" for reason in damaged]
    live = live_manifests(manifests, read_attempts(store, paths))
    for manifest in reversed(live):
        try:
            checkpoint_copy(store, paths, manifest, cache_folder=cache_folder)
        except (DamagedPart, ObjectMissing) as error:
            if store.head(paths.manifest(manifest.name)) is None:
                return newest_restorable(store, paths, cache_folder=cache_folder)
            skipped.append(f"the checkpoint of step {manifest.step} is skipped: {error}")
            continue
        return manifest, tuple(skipped)
    return None, tuple(skipped)


def checkpoint_copy(
    store: Store, paths: RunPaths, manifest: Manifest, *, cache_folder: Path
) -> Path:
    """The checkpoint as a verified folder of this node, whose `model/` is whole, or which has an
    adapter in its place.

    Named after its content: a run of the same name may have been here, from another store.
    """
    # What an adapter makes of its model is no part of the state.
    parts = [p for p in manifest.parts if p.name != WEIGHTS or not manifest.has_adapter]
    content = repr([(part.name, part.sha256) for part in parts])
    digest = hashlib.sha256(content.encode()).hexdigest()[:24]
    name = f"{_flat(paths.run_id)}-{manifest.step:08d}-{digest}"
    folder = cache_folder / "checkpoints" / name
    local_copy(store.within(paths.checkpoint(manifest.name).rstrip("/")), parts, folder)
    complete_weights(folder, parts)
    return folder


def drop_checkpoint_copies(run_id: str, *, cache_folder: Path) -> None:
    """Removes this node's copies of a run's checkpoints; no process may be using them."""
    name = re.compile(rf"{re.escape(_flat(run_id))}-\d{{8}}-[0-9a-f]{{24}}")
    for path in (cache_folder / "checkpoints").glob(f"{_flat(run_id)}-*"):
        copy = path.name.removesuffix(".lock").removesuffix(".unfinished").removesuffix(".boot")
        if name.fullmatch(copy):
            drop_copy(path.with_name(copy))


def _flat(run_id: str) -> str:
    """The run id as one name of a folder: that of a trial has slashes. No id has a plus."""
    return run_id.replace("/", "+")


def load_progress(folder: Path) -> tuple[Progress, dict[str, Any] | None]:
    """Progress and the evaluation of the untrained model from a checkpoint's local copy."""
    return parse_progress((folder / "progress.json").read_bytes())


def parse_progress(text: bytes) -> tuple[Progress, dict[str, Any] | None]:
    """The same from the file's content."""
    held = json.loads(text)
    return Progress(**held["progress"]), held["before"]
