"""What goes of a study's checkpoints, and when: never what anybody needs later."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from cluster.storage import StorageError, Store
from jobs.record import CheckpointName, RunPaths
from jobs.study.engine import Engine
from jobs.study.events import Asked, Cloned, Decided, Donor, Event, Left, Reported, Started
from jobs.study.retention import KEPT_CONFIGURATIONS, Holdings, Sweeper
from jobs.study.trials import Trials
from tests.jobs.study.simulated import MemoryLog, Simulation, engine_of
from tests.jobs.study.test_engine import SCHEDULERS, accuracy, study


@dataclass
class SweptLog(MemoryLog):
    """A log after each append of which all is removed that may go."""

    holdings: Holdings | None = None
    engine: Engine | None = None
    gone: set[int] = field(default_factory=set)

    def append(self, events: Sequence[Event]) -> None:
        super().append(events)
        for event in events:
            if isinstance(event, Started):
                assert event.trial not in self.gone, "it goes on without its checkpoint"
            if isinstance(event, Asked) and event.donor is not None:
                assert event.donor.trial not in self.gone, "its donor's checkpoint is gone"
        if self.holdings is not None and self.engine is not None:
            taken = self.holdings.take()
            assert self.gone.isdisjoint(taken)
            self.gone.update(taken)
            winner = self.engine.trials.winner()
            assert winner is None or winner.number not in self.gone
            assert self.gone.isdisjoint(self.engine.trials.paused)
            assert self.gone.isdisjoint(self.engine.trials.uncloned)


@pytest.mark.parametrize("score", ["best", "last"])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_nothing_goes_that_is_needed_later(scheduler: str, score: str) -> None:
    keys: dict[str, Any] = {"score": score}
    if scheduler not in ("pbt", "pb2"):
        keys |= {"trials": 27, "finalists": {"count": 4, "seeds": 2}}
    if scheduler == "none":
        keys["repeats"] = 2
    search, space = study(scheduler, **keys)

    def up_and_down(values: dict[str, Any], repeat: int, fraction: float) -> float:
        """Ranks change on the way, so that one that was ahead falls behind."""
        height = accuracy(values, repeat, fraction)
        return height - 0.3 * (round(fraction * 9) % 2) * (round(height * 1e4) % 3)

    log = SweptLog()
    engine = log.engine = engine_of(search, space, log)
    log.holdings = Holdings(search, engine.trials)
    simulation = Simulation(up_and_down, slots=3, speed=lambda trial: 1 + trial % 3)
    simulation.run(engine)
    if scheduler not in ("pbt", "pb2"):
        engine.extend(36)
        simulation.run(engine)
    assert log.gone
    kept = {t.of for n, t in engine.trials.by_number.items() if n not in log.gone}
    most = 4 if scheduler not in ("pbt", "pb2") else KEPT_CONFIGURATIONS
    assert len(kept) <= 2 * most  # the best of the search, and the best finalists
    assert {runs[0].of for runs in engine.trials.ranked()[:most]} <= kept


def test_the_jobs_own_values_keep_their_checkpoints() -> None:
    search, space = study("none", trials=20, baseline=True, finalists={"count": 1, "seeds": 1})
    engine = engine_of(search, space, MemoryLog())
    worst = Simulation(lambda values, repeat, fraction: 0.5 if values else 0.1)
    worst.run(engine)
    gone = Holdings(search, engine.trials).take()
    own = engine.trials.baseline_model()
    assert own is not None
    assert own.number not in gone
    assert 0 not in gone
    assert len(gone) > 10


def test_a_donor_is_kept_until_its_clone_has_begun() -> None:
    search, _ = study("pbt")
    events: list[Event] = []
    for number in range(6):
        told = Reported(trial=number, step=3, fraction=0.3, epochs=1, value=number, best=number)
        events += [
            Asked(trial=number, values={}),
            Started(trial=number, leg=1, slot="a", until=0.3),
            told,
            Decided(trial=number, decision="pause"),
            Left(trial=number),
        ]
    events.append(Asked(trial=6, values={}, donor=Donor(trial=0, step=3)))
    # The search is closed before the clone begins.
    events += [Decided(trial=number, decision="stop") for number in range(6)]
    trials = Trials(search, events)
    holdings = Holdings(search, trials)
    assert holdings.take() == [1, 2]
    trials.observe(Started(trial=6, leg=1, slot="a", until=0.6))
    trials.observe(Cloned(trial=6))
    assert holdings.take() == [0]


class Told:
    """Telemetry that is listened to."""

    def __init__(self) -> None:
        self.events: list[tuple[str, str]] = []

    def event(self, event: str, message: str, **fields: Any) -> None:
        self.events.append((event, message))


class FullStore:
    """A store that refuses some deletions."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.refuses: str | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def delete(self, keys: Any) -> None:
        keys = list(keys)
        if self.refuses is not None and any(self.refuses in key for key in keys):
            raise StorageError("refused")
        self._store.delete(keys)


def test_the_sweeper_removes_checkpoints_and_tells_it(local_store: Store) -> None:
    search, space = study("asha")
    engine = engine_of(search, space, MemoryLog())
    Simulation(accuracy).run(engine)
    paths = RunPaths("study")
    for number in range(len(engine.trials)):
        folder = paths.trial(number).checkpoint(CheckpointName(9, 1))
        local_store.write(folder + "model/model.safetensors", b"12345678")
        local_store.write(folder + "manifest.json", b"{}")
        local_store.write(paths.trial(number).spec, b"{}")
    store, told = FullStore(local_store), Told()
    holdings = Holdings(search, engine.trials)
    sweeper = Sweeper(holdings, store, paths, told, deciding=threading.RLock())  # type: ignore[arg-type]
    store.refuses = "trials/0000/"
    sweeper.sweep()
    ranked = [runs[0].number for runs in engine.trials.ranked()]
    best = set(ranked[:KEPT_CONFIGURATIONS])
    assert 0 not in best

    def holders() -> set[int]:
        keys = [h.key for h in local_store.list("study/trials/") if "/checkpoints/" in h.key]
        return {int(key.split("/")[2]) for key in keys}

    assert holders() == best | {0}
    assert [kind for kind, _ in told.events] == ["warning", "retention"]
    assert "trial 0 could not be deleted: refused" in told.events[0][1]
    store.refuses = None
    sweeper.sweep()
    assert holders() == best
    assert told.events[-1] == ("retention", "deleted the checkpoints of trial 0, 10 B")
    sweeper.sweep()
    assert len(told.events) == 3
    assert all(local_store.head(paths.trial(n).spec) for n in range(len(engine.trials)))
