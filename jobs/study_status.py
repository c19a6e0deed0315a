"""Where a study stands: what `shoal status`, `watch` and `list` show of it.

read_study(reader)  ->  StudyStatus
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from jobs.runs import RunReader
from jobs.search_spec import Search
from jobs.study.course import Course
from jobs.study.pace import Pace
from jobs.study.trials import ENDED, Trial, Trials

_ENDED_SHOWN = 5
_SLOTS_LOOKED_AT = 32
"""Trials whose own metrics are looked at; of others on slots the log's last report is shown."""
_MAX_PARALLEL_READS = 16


@dataclass(frozen=True)
class OnSlot:
    """A trial on a slot, and how far it has got."""

    trial: Trial
    fraction: float
    """Of its budget, by its newest line of metrics."""
    epochs: float


@dataclass(frozen=True)
class StudyStatus:
    """A study at one moment."""

    search: Search
    trials: Trials
    course: Course
    pace: Pace
    on_slots: tuple[OnSlot, ...]
    is_over: bool

    @property
    def best(self) -> Trial | None:
        """The trial whose model is the study's, as far as it is known."""
        return self.trials.winner()

    @property
    def counts(self) -> dict[str, int]:
        """Trials by what people ask for; one that its slot is about to leave is running."""
        counts = self.trials.counts
        return {
            "running": counts["running"] + counts["leaving"],
            "waiting": counts["ready"],
            **{name: counts[name] for name in ("paused", "stopped", "failed", "finished")},
        }

    @property
    def eta_seconds(self) -> float | None:
        """About how long it still takes; None where that is not known, and once it is over."""
        return None if self.is_over else self.pace.eta_seconds

    @property
    def newest_ended(self) -> list[Trial]:
        """The trials that ended last, the newest first."""
        ended = self.course.ended_at
        numbers = [n for n in ended if self.trials[n].status in ENDED]
        numbers.sort(key=lambda n: (-ended[n], -n))
        return [self.trials[number] for number in numbers[:_ENDED_SHOWN]]

    def to_json(self) -> dict[str, Any]:
        """One JSON document with stable keys."""
        best, search = self.best, self.search
        return {
            "metric": search.metric,
            "mode": search.mode,
            "trials": {
                "wanted": self.trials.wanted,
                "begun": self.trials.configurations,
                "made": len(self.trials),
                "finalists": self.trials.finalists,
                **self.counts,
            },
            "closed": self.trials.closed,
            "best": best and trial_json(best, self.trials),
            "trials_per_hour": self.pace.trials_per_hour,
            "eta_seconds": self.eta_seconds,
            "spent": {
                "epochs": self.pace.epochs,
                "gpu_hours": self.pace.gpu_hours,
                "hours": self.pace.seconds / 3600,
            },
            "budget": search.budget.model_dump(),
            "slots": [
                {
                    "slot": on.trial.slot,
                    "trial": on.trial.number,
                    "fraction": on.fraction,
                    "until": on.trial.until,
                    "score": self.trials.score(on.trial),
                }
                for on in self.on_slots
            ],
            "ended": [
                trial_json(trial, self.trials) | {"ended_at": self.course.ended_at[trial.number]}
                for trial in self.newest_ended
            ],
        }


def trial_json(trial: Trial, trials: Trials) -> dict[str, Any]:
    """A trial as JSON documents have it."""
    return {
        "trial": trial.number,
        "run": f"trials/{trial.number:04d}",
        "status": trial.status,
        "purpose": trial.purpose,
        "values": dict(trial.values),
        "score": trials.score(trial),
        "step": trial.step,
        "fraction": trial.fraction,
        "epochs": trial.epochs,
        "reason": why(trial),
    }


def why(trial: Trial) -> str:
    """Why a trial is where it is: the cause of its failure, or the study's reason."""
    if trial.failure is not None:
        return trial.failure.problems[0][0]
    return trial.reason


def read_study(reader: RunReader, *, now: float, is_over: bool) -> StudyStatus:
    """Where the study of a job that searches stands at `now` (Unix seconds).

    `is_over`: whether no driver works on it, so that no time passes and nothing is on a slot.
    """
    spec = reader.spec()
    search = spec.search
    assert search is not None
    events = reader.study_events()
    trials, course = Trials(search, events), Course(events)
    running = () if is_over else tuple(trials[number] for number in trials.running)
    on_slots = _on_slots(reader, running)
    worked = course.worked
    pace = Pace(
        search,
        trials,
        seconds=worked.seconds if is_over else worked.until(now),
        epochs_of_trial=float(spec.train.epochs),
        gpus=spec.gpus_held,
        epochs_now={on.trial.number: on.epochs for on in on_slots},
    )
    return StudyStatus(search, trials, course, pace, on_slots, is_over)


def _on_slots(reader: RunReader, running: Sequence[Trial]) -> tuple[OnSlot, ...]:
    looked_at = running[:_SLOTS_LOOKED_AT]
    if not looked_at:
        return ()
    with ThreadPoolExecutor(min(_MAX_PARALLEL_READS, len(looked_at))) as pool:
        lines = list(
            pool.map(lambda trial: reader.trial(trial.number).newest_lines("metrics"), looked_at)
        )
    found = [_on_slot(trial, own) for trial, own in zip(looked_at, lines, strict=True)]
    rest = running[_SLOTS_LOOKED_AT:]
    return (*found, *(OnSlot(trial, trial.fraction, trial.epochs) for trial in rest))


def _on_slot(trial: Trial, lines: Iterable[dict[str, Any]]) -> OnSlot:
    """By the newest line of training, where the trial has one that is newer than its report."""
    fraction, epochs = trial.fraction, trial.epochs
    for line in lines:
        told = [line.get(key) for key in ("step", "total_steps", "epoch")]
        numbers = [float(number) for number in told if isinstance(number, int | float)]
        if line.get("kind") != "train" or len(numbers) < len(told) or not numbers[1]:
            continue
        step, total, epoch = numbers
        if step > trial.step:
            fraction, epochs = max(fraction, min(1.0, step / total)), max(epochs, epoch)
    return OnSlot(trial, fraction, epochs)
