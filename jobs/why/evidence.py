"""All that was gathered of a run: what its folder says, and what Kubernetes says of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from jobs.spec import JobSpec, KubeRayCluster
from jobs.status import RunStatus

Tree = Mapping[str, Any]
"""An object as the API of Kubernetes has it."""


@dataclass(frozen=True)
class Printed:
    """The last lines of a container."""

    pod: str
    lines: tuple[str, ...]


@dataclass(frozen=True)
class ClusterEvidence:
    """What Kubernetes says of a run. Empty: there is no such object, or it may not be looked at,
    see `missing`."""

    ray_cluster: Tree | None = None
    workload: Tree | None = None
    """What Kueue has made of the run."""
    pods: tuple[Tree, ...] = ()
    events: tuple[Tree, ...] = ()
    """About any of these, and about pods that are gone, in no order."""
    printed: tuple[Printed, ...] = ()
    has_no_rayjob: bool = False
    """Whether it was asked, and has no RayJob of the run."""
    missing: tuple[str, ...] = ()
    """Rights that are missing, each with what is lost."""


@dataclass(frozen=True)
class Evidence:
    """All that is known of a run at one moment."""

    spec: JobSpec
    status: RunStatus
    """As `shoal status` has it, its RayJob included."""
    lines: tuple[str, ...] = ()
    """The last lines of its log, warnings and errors before others."""
    cluster: ClusterEvidence = field(default_factory=ClusterEvidence)
    study_uri: str | None = None
    """Of a trial: its study, which alone starts and stops it."""

    @property
    def kuberay(self) -> KubeRayCluster | None:
        """What the job says of Kubernetes; None: the run is not there."""
        given = self.spec.cluster
        return given if isinstance(given, KubeRayCluster) else None
