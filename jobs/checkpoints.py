"""The checkpoints of a run: as a list, whether their bytes are what their manifests say, and the
plain model folder of any."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from cluster.storage import ObjectMissing, StorageError, Store, join_uri, open_store
from jobs.errors import EnvironmentFault, Problem, SpecError
from jobs.record import Manifest, Part
from jobs.runs import RunReader
from trainers.consolidation import CONFIG_NAME, store_model
from trainers.data.cache import cache_folder
from trainers.local_copy import DamagedPart, reads_again

_NUM_THREADS = 8
_RANGE_BYTES = 8 * 2**20


@dataclass(frozen=True)
class SavedState:
    """One checkpoint as `shoal checkpoints` shows it."""

    manifest: Manifest
    uri: str
    is_best: bool
    is_last: bool
    faults: tuple[str, ...] | None
    """What --verify found, empty if nothing; None where it was not asked for."""

    def to_json(self) -> dict[str, Any]:
        m = self.manifest
        return {
            "step": m.step,
            "epoch": m.stream.epoch,
            "uri": self.uri,
            "created_at": m.created_at,
            "bytes": m.total_bytes,
            "files": len(m.parts),
            "attempt": m.attempt,
            "evaluation": m.evaluation,
            "is_best": self.is_best,
            "is_last": self.is_last,
            "has_model": m.has_model,
            "is_whole": None if self.faults is None else not self.faults,
            "faults": list(self.faults or ()),
        }


def read_checkpoints(reader: RunReader, *, verify: bool) -> list[SavedState]:
    """Checkpoints that the run, or a resume of it, can use, by step."""
    best = reader.best_manifest()
    manifests = reader.live_manifests()
    return [
        SavedState(
            manifest=manifest,
            uri=join_uri(reader.store.uri, reader.paths.checkpoint(manifest.name).rstrip("/")),
            is_best=best is not None and manifest.step == best.step,
            is_last=manifest is manifests[-1],
            faults=verify_checkpoint(reader, manifest) if verify else None,
        )
        for manifest in manifests
    ]


def verify_checkpoint(reader: RunReader, manifest: Manifest) -> tuple[str, ...]:
    """What is wrong with the parts of a checkpoint, read and hashed in threads."""
    folder = reader.paths.checkpoint(manifest.name)
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        faults = pool.map(lambda part: _fault(reader.store, folder, part), manifest.parts)
        return tuple(fault for fault in faults if fault)


def _fault(store: Store, folder: str, part: Part) -> str | None:
    head = store.head(folder + part.name)
    if head is None:
        return f"{part.name} is missing"
    if head.num_bytes != part.bytes:
        return f"{part.name} has {head.num_bytes} bytes, not {part.bytes}"
    try:
        _verify(store, folder, part)
    except DamagedPart as error:
        return str(error)
    except StorageError as error:
        return f"{part.name} cannot be read: {error}"
    return None


@reads_again
def _verify(store: Store, folder: str, part: Part) -> None:
    """Reads a part; raises DamagedPart where its sha256 is not that of its record."""
    digest = hashlib.sha256()
    for start in range(0, part.bytes, _RANGE_BYTES):
        end = min(start + _RANGE_BYTES, part.bytes)
        digest.update(store.read_range(folder + part.name, start=start, end=end))
    if digest.hexdigest() != part.sha256:
        raise DamagedPart(f"{part.name} has another sha256")


def consolidate(reader: RunReader, step: int, *, to: str | None) -> dict[str, Any]:
    """Makes the model folder of the checkpoint of a step, as `from_pretrained` loads it.

    In the run's folder, or in the folder or at the S3 URI `to`, which must hold nothing yet.
    Returns `uri`, `step` and `bytes`. Raises SpecError where there is no such checkpoint.
    """
    found = {manifest.step: manifest for manifest in reader.live_manifests()}
    if step not in found:
        raise SpecError(
            Problem(
                f"--consolidate is {step}, but {reader.uri} has no checkpoint of that step",
                "those that it has: " + (", ".join(map(str, found)) or "none yet"),
            )
        )
    if to is None:
        place = reader.store.within(reader.paths.model(step).rstrip("/"))
    else:
        place = open_store(to)
        if next(place.list(), None) is not None:
            raise SpecError(
                Problem(f"--to is {to}, which holds something already", "name a new folder")
            )
    manifest = found[step]
    checkpoint = reader.store.within(reader.paths.checkpoint(manifest.name).rstrip("/"))
    try:
        if manifest.has_adapter and not manifest.has_model:
            num_bytes = _store_merged(reader, checkpoint, manifest, place)
        else:
            num_bytes = store_model(checkpoint, manifest.parts, place, scratch=cache_folder())
    except (DamagedPart, ObjectMissing) as error:
        raise EnvironmentFault(
            Problem(
                f"the checkpoint of step {step} is not whole: {error}",
                f"see which are with: shoal checkpoints {reader.uri} --verify",
            )
        ) from error
    return {"uri": place.uri, "step": step, "bytes": num_bytes}


def _store_merged(reader: RunReader, checkpoint: Store, manifest: Manifest, to: Store) -> int:
    """Puts the model that an adapter and its base make right below `to`; its bytes."""
    from trainers.pretrained import model_of_checkpoint

    folder = model_of_checkpoint(checkpoint, manifest, reader.spec(), cache_folder())
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    config = folder / CONFIG_NAME
    to.delete([CONFIG_NAME])
    for path in [*(path for path in files if path != config), config]:  # it makes it a model's
        to.upload(path.relative_to(folder).as_posix(), path)
    return sum(path.stat().st_size for path in files)


def show_checkpoints(found: Sequence[SavedState]) -> None:
    """The table of `shoal checkpoints`, on stdout."""
    from rich.text import Text

    from jobs.situation import format_seconds
    from jobs.spec import format_bytes
    from jobs.terminal import format_number, print_table

    metrics = sorted({name for state in found for name in state.manifest.evaluation})
    rows: list[list[str | Text]] = []
    for state in found:
        m = state.manifest
        told = {
            "best": state.is_best,
            "last": state.is_last,
            "adapter only": m.has_adapter and not m.has_model,
            "in parts": not m.has_adapter and not m.has_model,
        }
        marks = [mark for mark, is_so in told.items() if is_so]
        row: list[str | Text] = [
            str(m.step),
            f"{format_seconds(time.time() - m.created_at)} ago",
            format_bytes(m.total_bytes),
            *(format_number(m.evaluation.get(name)) for name in metrics),
            Text(", ".join(marks), style="bold green" if state.is_best else "cyan"),
        ]
        if state.faults is not None:
            row.append(
                Text("; ".join(state.faults), style="bold red")
                if state.faults
                else Text("whole", style="green")
            )
        rows.append(row)
    columns = ["step", "saved", "size", *metrics, "marks"]
    if any(state.faults is not None for state in found):
        columns.append("bytes")
    print_table(columns, rows, right={"step", "size", *metrics})
