"""A run's numbers in Prometheus' text format, from its folder: `shoal status RUN --prometheus`.

Names are those of the lines of metrics and of TensorBoard: `validation/f1` there is
`shoal_f1{split="validation"}` here. Source of the format and of the conventions for names:
https://prometheus.io/docs/instrumenting/exposition_formats and .../practices/naming.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from jobs.lines import Line
from jobs.record import State
from jobs.status import RunStatus
from jobs.study_status import StudyStatus

_NO_GAUGES = frozenset({"time", "step", "attempt", "rank", "total_steps", "rows", "tokens"})
"""Of a line of training: what has a metric of its own, or is none."""


def exposition(status: RunStatus, lines: Iterable[Line]) -> str:
    """The metrics of a run as text; see `families`."""
    registry = CollectorRegistry()
    registry.register(_Families(status, list(lines)))
    return generate_latest(registry).decode()


def families(status: RunStatus, lines: Iterable[Line]) -> list[Metric]:
    """The metrics of a run, each with the label `run`; `lines` are all of its metrics.

    Gauges tell of the newest line; counters also count what attempts did that were superseded.
    """
    return list(_Families(status, list(lines)).collect())


class _Families:
    """The collector of one run."""

    def __init__(self, status: RunStatus, lines: list[Line]) -> None:
        self._status = status
        self._lines = lines
        self._run = status.run_id

    def collect(self) -> Iterator[Metric]:
        status, account = self._status, self._status.account
        state = self._gauge("state", "1 for the state in which the run is, else 0.", "state")
        for each in State:
            state.add_metric([self._run, each.value], float(each is status.situation.state))
        yield state
        if status.study is not None:
            yield from self._study(status.study)
            return
        yield self._one_gauge("step", "Optimizer steps that are done.", status.step)
        if status.total_steps:
            yield self._one_gauge("total_steps", "Steps of all epochs.", status.total_steps)
        if status.checkpoints:
            newest = status.checkpoints[-1].step
            yield self._one_gauge("checkpoint_step", "Step of the newest checkpoint.", newest)
        yield from self._newest()

        seconds = self._counter("seconds", "Wall clock of the run, by purpose.", "purpose")
        for purpose, value in account.seconds.items():
            seconds.add_metric([self._run, purpose], value)
        yield seconds
        training = [line for line in self._lines if line["kind"] == "train"]
        for name, meaning, count in (
            ("lost_seconds", "Of compute: steps that were done again.", account.lost_seconds),
            ("rows", "Rows of all steps.", _sum(training, "rows")),
            ("tokens", "Tokens of all steps, without padding.", _sum(training, "tokens")),
            ("attempts", "Starts of the group of workers.", len(status.attempts)),
            (
                "skipped_steps",
                "Steps that changed nothing, as their gradient was not finite.",
                sum(line["kind"] == "skipped" for line in self._lines),
            ),
            (
                "failed_saves",
                "Checkpoints that could not be stored.",
                sum("failures_in_a_row" in event for event in status.events),
            ),
        ):
            family = self._counter(name, meaning)
            family.add_metric([self._run], count)
            yield family

    def _study(self, study: StudyStatus) -> Iterator[Metric]:
        """A study trains nothing itself: these stand in place of a run's own."""
        counts = self._gauge("trials", "Trials that exist, by what they do.", "status")
        for status, number in study.counts.items():
            counts.add_metric([self._run, status], number)
        yield counts
        yield self._one_gauge("trials_wanted", "Trials to try, at most.", study.trials.wanted)
        best = study.best
        score = None if best is None else study.trials.score(best)
        if score is not None:
            value = self._gauge("best", "Score of the best trial, by search.metric.", "metric")
            value.add_metric([self._run, study.search.metric], score)
            yield value
        for name, meaning, count in (
            ("trial_epochs", "Epochs of training in all trials.", study.pace.epochs),
            ("trial_gpu_seconds", "Of GPUs that trials held.", 3600 * study.pace.gpu_hours),
        ):
            family = self._counter(name, meaning)
            family.add_metric([self._run], count)
            yield family

    def _newest(self) -> Iterator[GaugeMetricFamily]:
        """The numbers of the newest line of training, and of the newest evaluation on each set."""
        status = self._status
        told: dict[str, Mapping[str, Any]] = {}
        if status.train is not None:
            told["train"] = {k: v for k, v in status.train.items() if k not in _NO_GAUGES}
        for line in status.evaluations:
            told[str(line.get("split"))] = line["metrics"]
        outcome = status.result.outcome if status.result else None
        if outcome is not None and outcome.test and outcome.tested_on:
            told[outcome.tested_on] = outcome.test["metrics"]
        families: dict[str, GaugeMetricFamily] = {}
        for split, metrics in told.items():
            for name, value in metrics.items():
                if isinstance(value, int | float):
                    meaning = f"{name} of the newest line of training, or evaluation on a set."
                    family = families.setdefault(name, self._gauge(name, meaning, "split"))
                    family.add_metric([self._run, split], value)
        yield from families.values()

    def _one_gauge(self, name: str, meaning: str, value: float) -> GaugeMetricFamily:
        family = self._gauge(name, meaning)
        family.add_metric([self._run], value)
        return family

    def _gauge(self, name: str, meaning: str, *labels: str) -> GaugeMetricFamily:
        return GaugeMetricFamily(f"shoal_{name}", meaning, labels=["run", *labels])

    def _counter(self, name: str, meaning: str, *labels: str) -> CounterMetricFamily:
        return CounterMetricFamily(f"shoal_{name}", meaning, labels=["run", *labels])


def _sum(lines: Iterable[Line], key: str) -> float:
    return sum(value for line in lines if isinstance(value := line.get(key), int | float))
