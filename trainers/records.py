"""A run's records, as its driver and its ranks read them: attempts, how they ended, manifests.

Nothing here needs torch: a driver imports it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial

from pydantic import ValidationError

from cluster.storage import DamagedObject, ObjectMissing, Store, join_uri, read_whole
from jobs.errors import EnvironmentFault, Problem
from jobs.record import (
    DAMAGED_RECORD_HINT,
    MANIFEST_VERSION,
    Attempt,
    Crash,
    Manifest,
    Outcome,
    Result,
    RunPaths,
    live_manifests,
)
from jobs.seal import unsealed


def read_manifests(store: Store, paths: RunPaths) -> list[Manifest]:
    """All manifests of a run that can be read, by step.

    Raises EnvironmentFault where one is of another version: going on would destroy its checkpoint.
    """
    return read_manifests_and_damage(store, paths)[0]


def read_manifests_and_damage(store: Store, paths: RunPaths) -> tuple[list[Manifest], list[str]]:
    """(manifests by step, what is wrong with each damaged one)."""
    return manifests_in(store, paths, list_checkpoints(store, paths))


def list_checkpoints(store: Store, paths: RunPaths) -> dict[str, list[str]]:
    """Keys in each folder of checkpoints, whole or not, by the folder's name.

    From the objects, not from the folders: SeaweedFS names those some time after they are empty,
    and a run that saves often would look into all that it has ever deleted.
    """
    keys: dict[str, list[str]] = {}
    for head in store.list(paths.checkpoints):
        folder, _, name = head.key.removeprefix(paths.checkpoints).partition("/")
        if name:
            keys.setdefault(folder, []).append(head.key)
    return keys


def manifests_in(
    store: Store, paths: RunPaths, listed: Mapping[str, Sequence[str]]
) -> tuple[list[Manifest], list[str]]:
    """(manifests by step, what is wrong with each damaged one) in the folders listed."""
    manifests, damaged = [], []
    for folder, keys in listed.items():
        key = f"{paths.checkpoints}{folder}/manifest.json"
        if key not in keys:
            continue  # parts without a manifest are no checkpoint
        try:
            manifests.append(read_whole(store, key, partial(_parse_manifest, key), hint=""))
        except ObjectMissing:
            continue  # deleted since it was listed
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


def outcome_of(store: Store, paths: RunPaths, attempt: int) -> Outcome | None:
    """How the attempt ended by itself; None where it goes on or was killed.

    Raises DamagedObject where it cannot be told.
    """
    try:
        return read_whole(
            store,
            paths.outcome(attempt),
            Outcome.model_validate_json,
            hint="let another driver take the run over: shoal resume RUN",
        )
    except ObjectMissing:
        return None


def read_result(store: Store, paths: RunPaths) -> Result | None:
    """How the run ended; None where it has not. Raises DamagedObject where it cannot be told."""
    try:
        return read_whole(
            store,
            paths.result,
            Result.model_validate_json,
            hint=f"have it written again: shoal resume {join_uri(store.uri, paths.run_id)}",
        )
    except ObjectMissing:
        return None


def last_crash(store: Store, paths: RunPaths, *, generation: int) -> Crash | None:
    """Why the newest attempt of a driver broke off, as far as it could tell."""
    attempts = read_attempts(store, paths)
    if not attempts or attempts[-1].generation != generation:
        return None
    return read_crash(store, paths, attempts[-1].attempt)


def read_crash(store: Store, paths: RunPaths, attempt: int) -> Crash | None:
    """Why an attempt broke off, as far as it could tell; None where nobody has told."""
    try:
        return Crash.model_validate_json(store.read(paths.crash(attempt)))
    except (ObjectMissing, ValidationError):
        return None  # as after a kill, of which nobody can tell
