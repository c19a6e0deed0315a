"""Studies whose trials train nothing: an objective tells what each would find, and a clock that
jumps tells when."""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from jobs.search_spec import Search
from jobs.study.engine import Engine, Leg, Report
from jobs.study.events import Event, Values
from jobs.study.samplers import make_sampler
from jobs.study.schedulers import make_scheduler
from jobs.study.space import Space

Objective = Callable[[Values, int, float], float]
"""(values, repeat, fraction) -> metric"""


@dataclass
class MemoryLog:
    """A log that dies where it is told to: after that many appends."""

    events: list[Event] = field(default_factory=list)
    appends: int = 0
    dies_after: int | None = None

    def append(self, events: Sequence[Event]) -> None:
        if self.dies_after is not None and self.appends >= self.dies_after:
            raise KilledError
        self.appends += 1
        self.events += events

    def read(self) -> list[Event]:
        return list(self.events)


class KilledError(Exception):
    """The driver is gone."""


def engine_of(
    search: Search,
    space: Space,
    log: MemoryLog,
    simulation: Simulation | None = None,
    *,
    clock: Callable[[], float] = lambda: 0.0,
) -> Engine:
    saved = {} if simulation is None else simulation.saved
    return Engine(
        search,
        make_sampler(search, space, search.seed),
        make_scheduler(search, space),
        log,
        list(log.events),
        is_saved=lambda trial, step: saved.get(trial, 0) >= step,
        clock=clock,
    )


@dataclass
class Simulation:
    """Slots that work on a study. What they have saved outlives the driver."""

    objective: Objective
    evaluations: int = 9
    """Of a trial's full budget."""
    slots: int = 1
    speed: Callable[[int], float] = lambda trial: 1.0
    """Seconds between two evaluations of a trial."""
    saved: dict[int, int] = field(default_factory=dict)
    """Evaluations of each trial in its last checkpoint."""
    dies: Callable[[str], bool] = lambda moment: False
    """Whether the slot's process dies now: "before it reports", "before it saves", "after it has
    saved"."""
    computed: int = 0
    """Evaluations made, those that were made again included."""
    _best: dict[tuple[int, int], float] = field(default_factory=dict)

    def run(self, engine: Engine, *, sign: int = 1) -> None:
        """Works until the study is over; raises what the engine's log does. `sign` is 1 where
        larger is better."""
        busy: dict[str, tuple[Leg, int, float]] = {}
        coming: list[tuple[float, int, str]] = []
        order = itertools.count()
        clock = 0.0

        def begin(slot: str) -> None:
            leg = engine.work(slot)
            if leg is None:
                return
            if leg.donor is not None:
                assert self.saved[leg.donor.trial] == leg.donor.step, "the donor has gone on"
                self.saved[leg.trial] = leg.donor.step
                engine.cloned(leg.trial)
            schedule(slot, leg, self.saved.get(leg.trial, 0), leg.until)

        def schedule(slot: str, leg: Leg, done: int, until: float) -> None:
            target = max(done + 1, math.ceil(until * self.evaluations - 1e-9))
            if done >= self.evaluations:
                target = done  # all is trained, and told once more
            busy[slot] = leg, target, until
            self.computed += target - done
            seconds = (target - done) * self.speed(leg.trial)
            heapq.heappush(coming, (clock + seconds, next(order), slot))

        def begin_idle() -> None:
            for number in range(self.slots):
                if f"slot-{number}" not in busy:
                    begin(f"slot-{number}")

        begin_idle()
        while coming:
            clock, _, slot = heapq.heappop(coming)
            leg, done, _ = busy[slot]

            def is_dead(moment: str, leg: Leg = leg, slot: str = slot) -> bool:
                if not self.dies(moment):
                    return False
                engine.lost(leg.trial, f"it died {moment}", counts=False)
                del busy[slot]
                begin_idle()
                return True

            if is_dead("before it reports"):
                continue
            decided = engine.reported(leg.trial, self._report(leg, done, sign))
            if decided.decision == "continue":
                assert decided.until is not None
                schedule(slot, leg, done, decided.until)
                continue
            if is_dead("before it saves"):
                continue
            if decided.decision != "stop":
                self.saved[leg.trial] = done
            if is_dead("after it has saved"):
                continue
            # Else the desk takes it for a trial that has ended by itself.
            assert engine.trials[leg.trial].status == "leaving"
            engine.left(leg.trial)
            del busy[slot]
            begin_idle()

    def _report(self, leg: Leg, done: int, sign: int) -> Report:
        values = [
            self.objective(leg.values, leg.repeat, n / self.evaluations) for n in range(1, done + 1)
        ]
        return Report(
            step=done,
            fraction=done / self.evaluations,
            epochs=float(done),
            value=values[-1],
            best=sign * max(sign * v for v in values),
            seconds=self.speed(leg.trial),
        )
