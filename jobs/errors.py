"""The errors whose text is for the user, as one tree, and how they are printed."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with what the user gave: what it is, and what to type instead."""

    message: str
    hint: str | None = None


class ShoalError(Exception):
    """Root of all errors whose text is for the user.

    ShoalError
      SpecError        the job file or a flag is wrong                       exit code 2
      DataError        the data set, the index or a row is wrong             exit code 2
      PreflightError   a check before the start failed                       exit code 2 or 3
      TrainingError    the run itself failed (a loss that is not finite...)  exit code 1
      EnvironmentFault the store or the cluster is not usable                exit code 3
        StorageError   (cluster.storage)
        ClusterError
    """

    exit_code = 1
    is_of_place = False
    """Whether it is the store or the cluster that is not usable, for other work as well."""

    def __init__(self, *problems: Problem | str) -> None:
        self.problems = tuple(p if isinstance(p, Problem) else Problem(p) for p in problems)
        super().__init__(*self.problems)

    def __str__(self) -> str:
        return "; ".join(p.message for p in self.problems)


class SpecError(ShoalError):
    """The job file or a flag is wrong."""

    exit_code = 2


class DataError(ShoalError):
    """The data set, its index or one of its rows is wrong."""

    exit_code = 2


class PreflightError(ShoalError):
    """A check before the start failed; `exit_code` is 2 if any problem is the user's, else 3."""

    def __init__(self, *problems: Problem | str, exit_code: int) -> None:
        super().__init__(*problems)
        self.exit_code = exit_code


class TrainingError(ShoalError):
    """The run itself failed."""

    exit_code = 1


class EnvironmentFault(ShoalError):  # noqa: N818 - a fault of the place, not a wrong call
    """The environment (storage, cluster, disk) is not usable."""

    exit_code = 3


class ClusterError(EnvironmentFault):
    """The Ray or Kubernetes cluster is not usable."""

    is_of_place = True


def render_error(error: ShoalError) -> str:
    """`error: ...`, a blank line and `hint: ...` for each problem, ready for stderr."""
    return "\n\n".join(
        f"error: {p.message}" + (f"\n\nhint: {p.hint}" if p.hint else "") for p in error.problems
    )
