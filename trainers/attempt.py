"""Attempts: which start of the group this is, and the checkpoint from which it goes on."""

from __future__ import annotations

import socket
import time
from dataclasses import dataclass
from typing import Any

import torch

from cluster.storage import ObjectExists, Store
from jobs.errors import EnvironmentFault, Problem
from jobs.record import Attempt, Manifest, RunPaths
from jobs.spec import JobSpec
from trainers.agreement import Agreement
from trainers.data.cache import cache_folder
from trainers.restore import newest_restorable, read_attempts
from trainers.session import Session
from trainers.versions import versions


@dataclass(frozen=True)
class Assignment:
    """What a rank is to do; pickles, and holds no secret."""

    spec: JobSpec
    run_id: str
    generation: int
    controls_seen: int
    """Number of the last control request that does not concern this generation."""


@dataclass(frozen=True)
class Claim:
    """An attempt that is recorded, and what it goes on from."""

    attempt: Attempt
    restored: Manifest | None
    skipped: tuple[str, ...]
    """Why newer checkpoints were not taken."""
    recovers: bool
    """Whether this driver had started the group before."""


def claim_attempt(
    session: Session, assignment: Assignment, agreement: Agreement, store: Store, paths: RunPaths
) -> Claim:
    """The attempt that this start of the group is, and the checkpoint from which it goes on.

    Rank 0 chooses both and records them before anything is trained; the others are told. Raises
    EnvironmentFault on all ranks where rank 0 cannot.
    """
    hosts = agreement.gather(socket.gethostname())
    told: dict[str, Any] = {}
    if session.rank == 0:
        try:
            claim = _claim(assignment, store, paths, hosts=hosts, session=session)
            told = {
                "attempt": claim.attempt.model_dump(mode="json"),
                "restored": claim.restored and claim.restored.model_dump(mode="json"),
                "skipped": claim.skipped,
                "recovers": claim.recovers,
            }
        except EnvironmentFault as error:
            told = {"problems": [[p.message, p.hint] for p in error.problems]}
    told = agreement.first(told)
    if "problems" in told:
        raise EnvironmentFault(*(Problem(*problem) for problem in told["problems"]))
    return Claim(
        attempt=Attempt.model_validate(told["attempt"]),
        restored=told["restored"] and Manifest.model_validate(told["restored"]),
        skipped=tuple(told["skipped"]),
        recovers=told["recovers"],
    )


def _claim(
    assignment: Assignment, store: Store, paths: RunPaths, *, hosts: list[str], session: Session
) -> Claim:
    before = read_attempts(store, paths)
    number = max((a.attempt for a in before), default=0) + 1
    restored, skipped = newest_restorable(store, paths, cache_folder=cache_folder())
    attempt = Attempt(
        attempt=number,
        generation=assignment.generation,
        world_size=session.world_size,
        restored_step=restored.step if restored else None,
        started_at=time.time(),
        hosts=tuple(hosts),
        versions=versions(),
        device=_device_name(session.device),
    )
    try:
        store.write_if_absent(paths.attempt(number), attempt.to_bytes())
    except ObjectExists as error:
        raise EnvironmentFault(
            Problem(f"attempt {number} was begun by another driver at the same time")
        ) from error
    recovers = any(a.generation == assignment.generation for a in before)
    return Claim(attempt, restored, skipped, recovers)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
