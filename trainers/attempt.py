"""Attempts: which start of the group this is, and the checkpoint from which it goes on."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import tenacity
import torch

from cluster.storage import ObjectExists, Store
from jobs.errors import EnvironmentFault, Problem, ShoalError
from jobs.record import Attempt, Crash, Failure, Manifest, Outcome, RunPaths, rightful
from jobs.spec import JobSpec
from trainers.agreement import Agreement
from trainers.assignment import Assignment
from trainers.clone import begin_clone
from trainers.controls import last_attempt
from trainers.data.cache import cache_folder
from trainers.fence import Fence
from trainers.records import outcome_of, read_attempts, read_crash
from trainers.restore import newest_restorable
from trainers.session import Session
from trainers.versions import versions

_CLAIMS = 10
"""How often the next free number is tried for an attempt."""


@dataclass(frozen=True)
class Claim:
    """An attempt that is recorded, and what it goes on from."""

    attempt: Attempt
    controls_seen: int
    """As in the assignment of rank 0."""
    restored: Manifest | None
    skipped: tuple[str, ...]
    """Why newer checkpoints were not taken."""
    recovers: bool
    """Whether this driver had started the group before."""
    crash: Crash | None
    """Why the attempt before broke off, as far as it could tell."""

    @property
    def hopeless(self) -> Failure | None:
        """Why there is no use in training: what this driver's attempt before did not get over.

        A later driver tries again: it may have been given more memory.
        """
        found = self.crash if self.recovers else None
        return found.failure if found is not None and not _can_halve(found) else None


def claim_attempt(
    session: Session,
    assignment: Assignment,
    agreement: Agreement,
    store: Store,
    paths: RunPaths,
    *,
    started_at: float,
) -> Claim | Outcome:
    """The attempt that this start of the group is, and the checkpoint from which it goes on.

    `started_at`, of rank 0, is when it opened its account of the time, in Unix seconds.

    Where an attempt of this driver has ended the run, and the group was started again all the same
    (a worker died, or the cluster grew, just then), that outcome: there is nothing to do. Where
    rank 0 meets a ShoalError (another driver has the run, the store stays away), an outcome with
    that failure, of no attempt.

    Rank 0 chooses both and records them before anything is trained; the others are told. Any other
    error of rank 0 is raised there, and an EnvironmentFault on the others.
    """
    hosts = agreement.gather(socket.gethostname())
    told: dict[str, Any] = {}
    error: Exception | None = None
    if session.rank == 0:
        try:
            claim = _claim(
                assignment, store, paths, hosts=hosts, session=session, started_at=started_at
            )
            if isinstance(claim, Outcome):
                told = {"ended": claim.model_dump(mode="json")}
            else:
                told = {
                    "attempt": claim.attempt.model_dump(mode="json"),
                    "controls_seen": claim.controls_seen,
                    "restored": claim.restored and claim.restored.model_dump(mode="json"),
                    "skipped": claim.skipped,
                    "recovers": claim.recovers,
                    "crash": claim.crash and claim.crash.model_dump(mode="json"),
                }
        except ShoalError as caught:
            failure = Failure.of(caught, where="rank 0")
            ended = Outcome(attempt=0, state=failure.state, step=0, failure=failure)
            told = {"ended": ended.model_dump(mode="json")}
        except Exception as caught:  # whatever it is, the others must not wait for it
            error = caught
            told = {"problems": Failure.of(caught, where="rank 0").problems}
    told = agreement.first(told)
    if error is not None:
        raise error
    if "problems" in told:
        raise EnvironmentFault(*(Problem(*problem) for problem in told["problems"]))
    if "ended" in told:
        return Outcome.model_validate(told["ended"])
    return Claim(
        attempt=Attempt.model_validate(told["attempt"]),
        controls_seen=told["controls_seen"],
        restored=told["restored"] and Manifest.model_validate(told["restored"]),
        skipped=tuple(told["skipped"]),
        recovers=told["recovers"],
        crash=told["crash"] and Crash.model_validate(told["crash"]),
    )


def _is_for_good(ended: Outcome, assignment: Assignment) -> bool:
    """Whether an attempt of this driver with that outcome is the last one. A study runs a trial
    again that its environment has ended."""
    return ended.state.is_final and (assignment.trial is None or ended.state.ends_retries)


@tenacity.retry(
    # A driver that does not know yet that this one has taken the run from it was faster.
    retry=tenacity.retry_if_exception_type(ObjectExists),
    stop=tenacity.stop_after_attempt(_CLAIMS),
    reraise=True,
)
def _claim(
    assignment: Assignment,
    store: Store,
    paths: RunPaths,
    *,
    hosts: list[str],
    session: Session,
    started_at: float,
) -> Claim | Outcome:
    Fence(store, RunPaths(assignment.leaseholder), generation=assignment.generation).check()
    donor = assignment.trial.donor if assignment.trial is not None else None
    if assignment.trial is not None and donor is not None:
        begin_clone(store, paths, assignment, assignment.trial, donor)
    before = rightful(read_attempts(store, paths))
    own = [a for a in before if a.generation == assignment.generation]
    if own:
        ended = outcome_of(store, paths, own[-1].attempt)
        if ended is not None and _is_for_good(ended, assignment):
            return ended
    number = last_attempt(store, paths) + 1
    crash = read_crash(store, paths, number - 1) if number > 1 else None
    restored, skipped = newest_restorable(store, paths, cache_folder=cache_folder())
    if donor is not None and restored is None:
        raise EnvironmentFault(
            Problem(
                f"{paths.run_id}, a clone of {donor.run_id}, has no checkpoint to go on from",
                "; ".join(skipped) or None,
            )
        )
    attempt = Attempt(
        attempt=number,
        generation=assignment.generation,
        world_size=session.world_size,
        restored_step=restored.step if restored else None,
        evaluates_first=restored is not None and restored.evaluation_pending,
        controls_seen=assignment.controls_seen,
        started_at=started_at,
        hosts=tuple(hosts),
        versions=dict(versions()),
        device=_device_name(session.device),
        max_tokens_per_microbatch=microbatch_limit(
            before[-1] if before else None,
            restored,
            crash,
            of_job=assignment.spec.batching.max_tokens_per_microbatch,
        ),
        launch_tokens=_measured_before(assignment.spec, before, restored),
    )
    store.write_if_absent(paths.attempt(number), attempt.to_bytes())
    seen = assignment.controls_seen
    return Claim(attempt, seen, restored, skipped, recovers=bool(own), crash=crash)


def microbatch_limit(
    last: Attempt | None,
    restored: Manifest | None,
    crash: Crash | None,
    *,
    of_job: int | Literal["auto"],
) -> int | None:
    """Tokens that a micro-batch of the next attempt may have, where they are fewer than the job's,
    or the job leaves them open; None where nobody has found them out then.

    As many as in the last attempt, or in the state that is restored; where memory ran out in that
    attempt, half of those that did not fit: the largest micro-batch may have been smaller than the
    limit. Pure.
    """
    known = [record.max_tokens_per_microbatch for record in (last, restored) if record is not None]
    limits = [limit for limit in (of_job, *known) if limit is not None and limit != "auto"]
    if crash is not None and crash.out_of_memory is not None and _can_halve(crash):
        limits = [min([*limits, crash.out_of_memory.tokens]) // 2]
    held = min(limits, default=None)
    return None if held == of_job else held


def _measured_before(
    spec: JobSpec, before: Sequence[Attempt], restored: Manifest | None
) -> int | None:
    """What a launch costs, as the run's state was trained with it; None where the job says it, or
    nobody has measured it yet."""
    if spec.batching.launch_tokens != "auto":
        return None
    known = [attempt.launch_tokens for attempt in reversed(before)]
    if restored is not None:
        known.insert(0, restored.launch_tokens)
    return next((found for found in known if found is not None), None)


def as_cut(spec: JobSpec, attempt: Attempt) -> JobSpec:
    """The job with what an attempt has of its own: a smaller limit of a micro-batch, and what its
    launch was measured to cost."""
    own = {
        "max_tokens_per_microbatch": attempt.max_tokens_per_microbatch,
        "launch_tokens": attempt.launch_tokens,
    }
    changes = {key: value for key, value in own.items() if value is not None}
    return spec.model_copy(update={"batching": spec.batching.model_copy(update=changes)})


def _can_halve(crash: Crash) -> bool:
    """Whether smaller micro-batches may help, or memory was not the cause."""
    return crash.out_of_memory is None or crash.out_of_memory.rows > 1


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
