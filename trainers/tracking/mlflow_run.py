"""MLflow: a run on the server of MLFLOW_TRACKING_URI, in the experiment of MLFLOW_EXPERIMENT_NAME
(else of the job's name). Trials are nested below their study.

The tracked run is found by its tag `shoal.uri`, so a resume goes on in it. MLflow appends whatever
it is given: steps that it has already are left out here.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import tenacity

# Read while it is imported, too. A thread waits for its answers, but the end of a run should not:
# by default they may take minutes.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException

from trainers.tracking.tracker import Ended, Parameters, Point, TrackedRun

PREFIX = "shoal."
"""Of tags."""
PARENT = "mlflow.parentRunId"
"""The tag by which MLflow nests runs."""
MOST_AT_ONCE = 100
"""Parameters of one request, as the server limits it."""
MOST_METRICS_AT_ONCE = 1000
MOST_CHARACTERS = 500
"""Of a parameter's value: what all servers take."""
_STUDY_SECONDS = 10.0
"""How long a trial waits for its study's tracked run, which the driver begins before it."""


class MlflowRun:
    """A Tracker."""

    def __init__(self, run: TrackedRun) -> None:
        """Opens the tracked run, or begins it. Raises what MLflow does, and ValueError where
        MLFLOW_TRACKING_URI is not set."""
        if not os.environ.get("MLFLOW_TRACKING_URI"):
            raise ValueError(f"MLFLOW_TRACKING_URI is not set on {socket.gethostname()}")
        self._client = MlflowClient()
        experiment = self._experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME") or run.job)
        parent = {}
        if run.study is not None and (study := self._wait_for(experiment, run.study)) is not None:
            parent = {PARENT: study.info.run_id}
        tags = {PREFIX + name: text for name, text in run.labels.items()} | parent
        found = self._find(experiment, run)
        if found is None:
            self._held: Run = self._client.create_run(
                experiment, tags={"mlflow.source.name": "shoal", **tags}, run_name=run.run_id
            )
        else:
            self._held = found
            changed = [RunTag(k, v) for k, v in tags.items() if found.data.tags.get(k) != v]
            self._client.log_batch(found.info.run_id, tags=changed)
            self._client.update_run(found.info.run_id, status="RUNNING")
        self._id: str = self._held.info.run_id
        self._last_steps: dict[str, int] = {}
        """Of metrics that an attempt before has told of."""

    def describe(self, parameters: Parameters) -> None:
        """MLflow keeps the first value of a parameter: another one becomes a tag of its name."""
        texts = dict(_flat(parameters.tree))
        held = self._client.get_run(self._id).data.params
        new = (Param(name, text) for name, text in texts.items() if name not in held)
        while some := list(islice(new, MOST_AT_ONCE)):
            self._client.log_batch(self._id, params=some)
        changed = (
            RunTag(f"{PREFIX}changed.{name}", text)
            for name, text in texts.items()
            if held.get(name, text) != text
        )
        while tags := list(islice(changed, MOST_AT_ONCE)):
            self._client.log_batch(self._id, tags=tags)

    def log(self, points: Sequence[Point]) -> None:
        metrics = (
            Metric(name, float(value), int(1000 * point.time), point.step)
            for point in points
            for name, value in point.values.items()
            if point.step > self._last_step(name)
        )
        while some := list(islice(metrics, MOST_METRICS_AT_ONCE)):
            self._client.log_batch(self._id, metrics=some)

    def end(self, ended: Ended) -> None:
        tags = {f"{PREFIX}state": ended.state, f"{PREFIX}cause": ended.cause}
        for name, text in tags.items():
            if text is not None:
                self._client.set_tag(self._id, name, text)
        for name, value in ended.values.items():
            self._client.log_metric(self._id, name, float(value), step=ended.step)
        if ended.report is not None:
            self._client.log_text(self._id, ended.report, "report/index.html")
        self._client.set_terminated(self._id, _status(ended.exit_code))

    def close(self) -> None:
        """Nothing is left: each call is answered once it is durable."""

    def _experiment(self, name: str) -> str:
        """Id of the experiment, which is made where it is not there."""
        found = self._client.get_experiment_by_name(name)
        if found is not None:
            return str(found.experiment_id)
        try:
            return str(self._client.create_experiment(name))
        except MlflowException:
            found = self._client.get_experiment_by_name(name)  # another run was faster
            if found is None:
                raise
            return str(found.experiment_id)

    def _find(self, experiment: str, run: TrackedRun) -> Run | None:
        """The tracked run of a run; of several, the oldest."""
        quote = '"' if "'" in run.uri else "'"  # it knows both, and no escapes
        found = self._client.search_runs(
            [experiment],
            f"tags.`{PREFIX}uri` = {quote}{run.uri}{quote}",
            max_results=1,
            order_by=["attributes.start_time ASC"],
        )
        return found[0] if found else None

    def _wait_for(self, experiment: str, study: TrackedRun) -> Run | None:
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_result(lambda found: found is None),
            wait=tenacity.wait_fixed(1),
            stop=tenacity.stop_after_delay(_STUDY_SECONDS),
            retry_error_callback=lambda _: None,
        )
        return retrying(self._find, experiment, study)

    def _last_step(self, name: str) -> int:
        """The last step of the metric that an attempt before has told of; -1 without one."""
        if name not in self._last_steps:
            told = name in self._held.data.metrics
            history = self._client.get_metric_history(self._id, name) if told else ()
            self._last_steps[name] = max((metric.step for metric in history), default=-1)
        return self._last_steps[name]


def _status(exit_code: int) -> str:
    if exit_code == 0:
        return "FINISHED"
    return "KILLED" if exit_code == 130 else "FAILED"


def _flat(tree: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, str]]:
    """(dotted path, text) of each leaf: text as it is, anything else as JSON, cut where needed."""
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{above}{key}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            yield f"{above}{key}", text[:MOST_CHARACTERS]
