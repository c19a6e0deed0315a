"""How long a pod that must go is given, so that a checkpoint is saved before it ends. Pure.

The notice comes first to the pod's hook and to Ray's node (`cluster.drain`), and from there to the
workers and the driver. The times nest: the workers save; the driver writes down how the run stands;
Ray ends its node; the platform ends the pod.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

DRAIN_VARIABLE = "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"
"""How long `ray start --block` waits, after SIGTERM, for what runs on its node; in its
environment, and so in that of the driver on the head."""

_LEAST_SAVING_SECONDS = 90
_HEARING_SECONDS = 40
"""For the notice to reach all ranks, the steps under way, and the copy off the device."""
_UPLOAD_MARGIN = 2.0
"""A store is slower at times, and its manifest comes after the parts."""
_RECORDING_SECONDS = 20
"""For the driver to write its result and report, once the workers have ended."""
_ENDING_SECONDS = 10
"""For the node's own processes to end."""


@dataclass(frozen=True)
class Grace:
    """Seconds from the notice on; each ends after the one before."""

    saving_seconds: int
    """The workers save their state."""
    drain_seconds: int
    """The driver has written its result; Ray ends its node."""
    total_seconds: int
    """The platform kills the pod."""


def grace_for(checkpoint_bytes: int | None, *, bytes_per_second: float) -> Grace:
    """What one pod needs that uploads so many bytes; None where nobody knows how many: 1.2 GiB at
    50 MiB/s fit then."""
    upload = (checkpoint_bytes or 0) / bytes_per_second
    needed = math.ceil(_HEARING_SECONDS + _UPLOAD_MARGIN * upload)
    saving = max(_LEAST_SAVING_SECONDS, needed)
    drain = saving + _RECORDING_SECONDS
    return Grace(saving, drain, drain + _ENDING_SECONDS)


def saving_seconds(environment: Mapping[str, str]) -> float:
    """How long a driver waits for its workers to save once its own node is taken; from the time
    that its node waits for it, where it is told."""
    drain = environment.get(DRAIN_VARIABLE)
    if drain is None:
        return _LEAST_SAVING_SECONDS
    return max(0.0, float(drain) - _RECORDING_SECONDS)
