"""What W&B has written offline, by its own messages.

A file is a LevelDB log (https://github.com/google/leveldb/blob/main/doc/log_format.md) behind a
header of seven bytes, whose records are messages of `wandb_internal.proto`.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_BLOCK = 32 * 1024
_HEADER = struct.Struct("<IHB")
"""Checksum, length, and kind: 1 is a whole record; 2, 3 and 4 are its first, middle, last part."""


@dataclass
class OfflineRun:
    """One attempt, as one file has it."""

    run_id: str = ""
    project: str = ""
    group: str = ""
    job_type: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    history: dict[int, dict[str, Any]] = field(default_factory=dict)
    """Metrics by step."""
    summary: dict[str, Any] = field(default_factory=dict)
    exit_code: int | None = None
    """None where it was killed."""


def offline_runs(folder: Path) -> list[OfflineRun]:
    """All below a folder, the oldest first."""
    return [_read(path) for path in sorted(folder.glob("wandb/offline-run-*/run-*.wandb"))]


def _read(path: Path) -> OfflineRun:
    from wandb.proto import wandb_internal_pb2

    run = OfflineRun()
    for payload in _records(path.read_bytes()):
        record = wandb_internal_pb2.Record.FromString(payload)
        match record.WhichOneof("record_type"):
            case "run":
                told = record.run
                run.run_id, run.project = told.run_id, told.project
                run.group, run.job_type = told.run_group, told.job_type
                run.config |= _values(told.config.update)
            case "config":
                run.config |= _values(record.config.update)
            case "history":
                values = _values(record.history.item)
                step = record.history.step.num
                run.history[step] = run.history.get(step, {}) | values
            case "summary":
                run.summary |= _values(record.summary.update)
            case "exit":
                run.exit_code = record.exit.exit_code
    return run


def _values(items: Any) -> dict[str, Any]:
    return {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items}


def _records(data: bytes) -> Iterator[bytes]:
    assert data[:4] == b":W&B"
    place, parts = 7, b""
    while place + _HEADER.size <= len(data):
        left = _BLOCK - place % _BLOCK
        if left < _HEADER.size:
            place += left
            continue
        _, length, kind = _HEADER.unpack_from(data, place)
        place += _HEADER.size
        parts = (b"" if kind in (1, 2) else parts) + data[place : place + length]
        place += length
        if kind in (1, 4):
            yield parts
