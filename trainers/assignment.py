"""What a driver tells the ranks of its run."""

from __future__ import annotations

from dataclasses import dataclass

from jobs.spec import JobSpec


@dataclass(frozen=True)
class Assignment:
    """What a rank is to do; pickles, and holds no secret.

    The generation and the requests seen of rank 0 count: `claim_attempt` tells them to the others.
    """

    spec: JobSpec
    run_id: str
    generation: int
    controls_seen: int
    """Number of the last control request that does not concern this generation."""
