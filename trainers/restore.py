"""Checkpoints as they are read: which one a run goes on from, verified, and what is in it.

newest_restorable       the newest checkpoint of the lineage whose every byte is what it was
checkpoint_copy         its parts, as a folder of this node
load_progress
"""

from __future__ import annotations

import hashlib
import json
import re
from functools import partial
from pathlib import Path
from typing import Any

from cluster.storage import DamagedObject, ObjectMissing, Store, read_whole
from jobs.errors import EnvironmentFault, Problem
from jobs.record import (
    DAMAGED_RECORD_HINT,
    MANIFEST_VERSION,
    Attempt,
    Manifest,
    RunPaths,
    live_manifests,
)
from jobs.seal import unsealed
from trainers.consolidation import complete_weights
from trainers.local_copy import DamagedPart, drop_copy, local_copy
from trainers.loop import Progress


def read_manifests(store: Store, paths: RunPaths) -> list[Manifest]:
    """All manifests of a run that can be read, by step.

    Raises EnvironmentFault where one is of another version: going on would destroy its checkpoint.
    """
    return _read_manifests(store, paths)[0]


def _read_manifests(store: Store, paths: RunPaths) -> tuple[list[Manifest], list[str]]:
    """(manifests by step, what is wrong with each damaged one)."""
    manifests, damaged = [], []
    for folder in store.list_folders(paths.checkpoints):
        key = f"{paths.checkpoints}{folder}/manifest.json"
        try:
            manifests.append(read_whole(store, key, partial(_parse_manifest, key), hint=""))
        except ObjectMissing:
            continue  # parts without a manifest are no checkpoint
        except DamagedObject as error:
            damaged.append(str(error))
    return sorted(manifests, key=lambda m: m.name), damaged


def _parse_manifest(key: str, text: bytes) -> Manifest:
    """Raises ValueError where it is damaged, EnvironmentFault where it is of another version."""
    try:
        tree = unsealed(json.loads(text))
        version = tree["version"]
        if version != MANIFEST_VERSION:
            raise EnvironmentFault(
                Problem(
                    f"{key} has version {version}, this Shoal reads {MANIFEST_VERSION}",
                    "install the Shoal that wrote it",
                )
            )
        return Manifest.model_validate_json(text)
    except (KeyError, TypeError) as error:
        raise ValueError("it is no manifest") from error


def read_attempts(store: Store, paths: RunPaths) -> list[Attempt]:
    """All attempts of a run, by number.

    Raises DamagedObject where one cannot be read: it may decide which checkpoints count.
    """
    return [
        read_whole(store, head.key, Attempt.model_validate_json, hint=DAMAGED_RECORD_HINT)
        for head in store.list(paths.attempts)
        if paths.is_attempt(head.key)
    ]


def read_live_manifests(store: Store, paths: RunPaths) -> list[Manifest]:
    """Manifests of a run that no later attempt has superseded, by step."""
    return live_manifests(read_manifests(store, paths), read_attempts(store, paths))


def newest_restorable(
    store: Store, paths: RunPaths, *, cache_folder: Path
) -> tuple[Manifest | None, tuple[str, ...]]:
    """The newest checkpoint of the lineage whose every part is what its manifest says.

    Also says of each newer one, damaged or incomplete, why it is skipped. The local copy is left
    in `cache_folder` for `checkpoint_copy`. An attempt before this one that was thought dead may
    save and apply retention meanwhile: where that takes a checkpoint away, it is looked for anew.
    """
    manifests, damaged = _read_manifests(store, paths)
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
    """The checkpoint as a verified folder of this node, whose `model/` is whole.

    Named after its content: a run of the same name may have been here, from another store.
    """
    content = repr([(part.name, part.sha256) for part in manifest.parts])
    digest = hashlib.sha256(content.encode()).hexdigest()[:24]
    folder = cache_folder / "checkpoints" / f"{paths.run_id}-{manifest.step:08d}-{digest}"
    local_copy(store.within(paths.checkpoint(manifest.name).rstrip("/")), manifest.parts, folder)
    complete_weights(folder, manifest.parts)
    return folder


def drop_checkpoint_copies(run_id: str, *, cache_folder: Path) -> None:
    """Removes this node's copies of a run's checkpoints; no process may be using them."""
    name = re.compile(rf"{re.escape(run_id)}-\d{{8}}-[0-9a-f]{{24}}")
    for path in (cache_folder / "checkpoints").glob(f"{run_id}-*"):
        copy = path.name.removesuffix(".lock").removesuffix(".unfinished").removesuffix(".boot")
        if name.fullmatch(copy):
            drop_copy(path.with_name(copy))


def load_progress(folder: Path) -> tuple[Progress, dict[str, Any] | None]:
    """Progress and the evaluation of the untrained model from a checkpoint's local copy."""
    held = json.loads((folder / "progress.json").read_text())
    return Progress(**held["progress"]), held["before"]
