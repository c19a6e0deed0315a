"""What a check says: a verdict on one part of the job, in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from jobs.errors import Problem, ShoalError

USER_EXIT_CODE = 2
ENVIRONMENT_EXIT_CODE = 3


class Verdict(StrEnum):
    """How a check ended."""

    OK = "ok"
    WARNING = "warning"
    """The run would start, but hardly as meant."""
    PROBLEM = "problem"
    """The run would fail."""
    NOT_CHECKED = "not checked"


@dataclass(frozen=True)
class Finding:
    """One thing that a check found out."""

    part: str
    """The part of the job: `store`, `data.train`, `model`, `workers`..."""
    verdict: Verdict
    message: str
    hint: str | None = None
    exit_code: int = 0
    """Of a problem: 2 where the user's input is wrong, 3 where the environment is not usable."""

    @property
    def problem(self) -> Problem:
        return Problem(self.message, self.hint)


def ok(part: str, message: str) -> Finding:
    return Finding(part, Verdict.OK, message)


def warning(part: str, message: str, hint: str) -> Finding:
    return Finding(part, Verdict.WARNING, message, hint)


def not_checked(part: str, message: str, hint: str | None = None) -> Finding:
    """What was not looked at, and why."""
    return Finding(part, Verdict.NOT_CHECKED, message, hint)


def problem(part: str, message: str, hint: str, *, exit_code: int = USER_EXIT_CODE) -> Finding:
    return Finding(part, Verdict.PROBLEM, message, hint, exit_code)


def problems_of(part: str, error: ShoalError) -> list[Finding]:
    """The problems of an error, with its exit code."""
    return [
        Finding(part, Verdict.PROBLEM, p.message, p.hint, error.exit_code) for p in error.problems
    ]


def has_problem(findings: Sequence[Finding]) -> bool:
    return any(finding.verdict is Verdict.PROBLEM for finding in findings)


def merge_same_cause(findings: Sequence[Finding]) -> list[Finding]:
    """The findings in their order; of several faults of the environment with one cause, one.

    Errors of a store read `cannot DO URI: why`. Where a key is wrong or a bucket is missing, every
    part of the job that lies there meets the same `why`.
    """
    merged: dict[tuple[str, str | None] | int, Finding] = {}
    for place, finding in enumerate(findings):
        _, colon, why = finding.message.partition(": ")
        if finding.exit_code != ENVIRONMENT_EXIT_CODE or not colon:
            merged[place] = finding
            continue
        cause = (why, finding.hint)
        first = merged.get(cause)
        if first is None:
            merged[cause] = finding
        elif finding.part not in first.part.split(", "):
            merged[cause] = replace(first, part=f"{first.part}, {finding.part}")
    return list(merged.values())
