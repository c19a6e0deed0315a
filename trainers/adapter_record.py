"""What a checkpoint says of its adapter: how it was made, and of which model; and whether a folder
holds that model."""

from __future__ import annotations

from pathlib import Path

import xxhash

from jobs.errors import Problem, SpecError
from jobs.record import ADAPTER_FOLDER, Record
from jobs.spec import Adapter, JobSpec
from trainers import watchdog

ADAPTER_RECORD = f"{ADAPTER_FOLDER}shoal.json"
_BLOCK_BYTES = 8 * 2**20


class AdapterRecord(Record):
    """An adapter and the model that it was trained on."""

    adapter: Adapter
    source: str
    """As `model.source` named the model."""
    revision: str | None
    digest: str
    """XXH3 of the model's configuration and weights."""


def adapter_record(spec: JobSpec, folder: Path) -> AdapterRecord:
    """What is to be said of the job's adapter and the model in a folder; reads all its weights."""
    adapter = spec.model.adapter
    assert adapter is not None
    digest = xxhash.xxh3_128()
    weights = [p for p in folder.rglob("*.safetensors") if p.is_file()]
    for path in sorted([folder / "config.json", *weights]):
        digest.update(f"{path.relative_to(folder).as_posix()} {path.stat().st_size} ".encode())
        with path.open("rb") as file:
            while block := file.read(_BLOCK_BYTES):
                digest.update(block)
                watchdog.tick()
    return AdapterRecord(
        adapter=adapter,
        source=spec.model.source,
        revision=spec.model.revision,
        digest=digest.hexdigest(),
    )


def read_adapter_record(folder: Path) -> AdapterRecord:
    """What a checkpoint's local copy says."""
    return AdapterRecord.model_validate_json((folder / ADAPTER_RECORD).read_bytes())


def refuse_other_base(saved: AdapterRecord, own: AdapterRecord) -> None:
    """SpecError where an adapter belongs to another model than the one that is there."""
    if saved.digest != own.digest:
        at = f" at revision {saved.revision}" if saved.revision else ""
        raise SpecError(
            Problem(
                f"the checkpoint holds an adapter of {saved.source}{at} (digest "
                f"{saved.digest[:12]}), but what is at model.source {own.source} now is another "
                f"model (digest {own.digest[:12]})",
                "put the model back as it was, or start a new run with model.source naming "
                "this run",
            )
        )
