"""The room for a study's slots in its cluster, and what they wait for."""

from __future__ import annotations

import time

from cluster.ray_runtime import describe_shortage, free_on_nodes, room_for_trials, staying_nodes
from jobs.errors import ClusterError, Problem
from jobs.record import State
from jobs.search_spec import MAX_SLOTS
from jobs.spec import JobSpec
from jobs.study.trials import Trials
from trainers.telemetry import Telemetry

_SLOT_SECONDS = 20.0
"""How long slots may take to start before it is said what they wait for."""


class Room:
    """Says in the study's state why it has no slot, or fewer than it could use."""

    def __init__(self, spec: JobSpec, telemetry: Telemetry) -> None:
        self._spec = spec
        self._telemetry = telemetry
        self._without_since = time.monotonic()
        self._said = ""
        self._living = 0
        self._living_since = 0.0
        self.fewer = ""
        """That there are fewer slots than the study could use, if so."""

    def say(self, living: int, *, busy: int, useful: int, summary: str) -> None:
        """What slots wait for: `living` of them are there, of which `busy` have a trial, and
        `useful` would be used. Raises ClusterError where there has been none for too long."""
        if living:
            self._without_since = time.monotonic()
            self._say_fewer(living, busy=busy, useful=useful, summary=summary)
        else:
            self._say_waiting(time.monotonic() - self._without_since)

    def _say_waiting(self, seconds: float) -> None:
        workers, limit = self._spec.workers, 60 * self._spec.retries.wait_minutes
        if seconds < _SLOT_SECONDS:
            return
        assert self._spec.search is not None
        shortage = describe_shortage(
            workers, staying_nodes(), free=free_on_nodes(), gpu_share=self._spec.search.gpu_share
        )
        if seconds > limit:
            raise ClusterError(
                Problem(
                    f"no trial could be started in {limit / 60:g} minutes: {shortage}",
                    "lower workers.count, workers.cpus, workers.gpus or workers.memory_gib, add "
                    "nodes, or raise retries.wait_minutes",
                )
            )
        if shortage != self._said:
            self._said = shortage
            self._telemetry.state(State.STARTING, f"no slot for a trial yet: {shortage}")

    def _say_fewer(self, living: int, *, busy: int, useful: int, summary: str) -> None:
        if living != self._living:
            self._living, self._living_since = living, time.monotonic()
        # A slot without a trial shows that no other could be used.
        if not useful > living == busy:
            fewer = ""
        elif time.monotonic() - self._living_since < _SLOT_SECONDS:
            return  # more of them may be starting
        else:
            now = living + room_for_trials(self._spec, free_on_nodes())
            idle = room_for_trials(self._spec, staying_nodes())
            fewer = fewer_slots(living, useful, room=idle, room_now=now)
        is_new, self.fewer = fewer not in ("", self.fewer), fewer
        if is_new:
            self._telemetry.state(State.RUNNING, summary + fewer)


def fewer_slots(living: int, useful: int, *, room: int, room_now: int) -> str:
    """`; 2 of 8 slots: room for 2`. Pure. `room` is that for slots if the cluster were idle,
    `room_now` that which slots have or could have."""
    held = ", of which something else holds part" if room_now < min(room, useful) else ""
    return f"; {living} of {useful} slots: room for {room}{held}"


def most_slots(spec: JobSpec, trials: Trials) -> int:
    """As many as could ever be at work at once; Tune starts those that there is room for."""
    assert spec.search is not None
    return min(spec.search.most_at_once(trials.wanted), MAX_SLOTS)
