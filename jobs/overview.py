"""The runs in a store as a list: a few reads a run, many runs at a time."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from cluster.storage import Store
from jobs.errors import SpecError
from jobs.lines import Line
from jobs.record import Result, State
from jobs.runs import RunReader, driver_has_ended, list_run_ids
from jobs.search_spec import Search
from jobs.situation import derive_state, format_seconds
from jobs.spec import KubeRayCluster
from jobs.study.trials import Trials

_MAX_PARALLEL_RUNS = 8


@dataclass(frozen=True)
class Overview:
    """One run as `shoal list` shows it."""

    run_id: str
    uri: str
    state: State | None
    """None where the folder holds no readable job."""
    cause: str | None
    step: int | None
    total_steps: int | None
    metric: str | None
    value: float | None
    submitted_at: float
    workers: int | None
    namespace: str | None = None
    """Of a run on Kubernetes."""
    trials: int | None = None
    """Of a study, those that have begun; None: it is a run like any other."""
    problems: tuple[str, ...] = ()
    """What of the run's folder could not be read, as far as it was looked at."""

    def to_json(self) -> dict[str, Any]:
        return {
            "run_id": self.run_id,
            "uri": self.uri,
            "state": self.state,
            "cause": self.cause,
            "step": self.step,
            "total_steps": self.total_steps,
            "metric": self.metric,
            "value": self.value,
            "submitted_at": self.submitted_at,
            "workers": self.workers,
            "trials": self.trials,
            "problems": list(self.problems),
        }


def read_overviews(store: Store) -> list[Overview]:
    """All runs of a store, the newest first."""
    run_ids = list_run_ids(store)
    if not run_ids:
        return []
    with ThreadPoolExecutor(min(_MAX_PARALLEL_RUNS, len(run_ids))) as pool:
        found = list(pool.map(lambda run_id: read_overview(RunReader(store, run_id)), run_ids))
    return sorted(found, key=lambda o: (-o.submitted_at, o.run_id))


def read_overview(reader: RunReader) -> Overview:
    """One run, without reading its metrics or checkpoints from the start."""
    head = reader.store.head(reader.paths.spec)
    submitted_at = head.modified_at if head else 0.0
    try:
        spec = reader.spec()
    except SpecError as error:
        return Overview(
            reader.run_id, reader.uri, None, str(error), None, None, None, None, submitted_at, None
        )
    # In the order of jobs.situation.look.
    lease = reader.lease()
    has_ended = None if lease is None else driver_has_ended(lease)
    result = reader.result()
    situation = derive_state(
        events=reader.newest_lines("events"),
        lease=lease,
        result=result,
        now=time.time(),
        driver_has_ended=has_ended,
        run=reader.run_id,
    )
    attempts = reader.attempts()
    current = result if result and result.generation == situation.generation else None
    lines = [line for line in reader.newest_lines("metrics") if isinstance(line.get("step"), int)]
    steps = [line["step"] for line in lines]
    restored = (attempts[-1].restored_step or 0) if attempts else None
    metric, value = _metric(current, lines)
    trials = None
    if spec.search is not None:
        trials = sum(1 for _ in reader.store.list_folders(reader.paths.trials))
        if current is None:  # else it says how good the winner is
            metric, value = _best_so_far(reader, spec.search)
    return Overview(
        run_id=reader.run_id,
        uri=reader.uri,
        state=situation.state,
        cause=situation.cause,
        step=current.step if current else max(steps, default=restored),
        total_steps=(attempts[-1].total_steps or None) if attempts else None,
        metric=metric,
        value=value,
        submitted_at=submitted_at,
        workers=spec.workers.count,
        namespace=spec.cluster.namespace if isinstance(spec.cluster, KubeRayCluster) else None,
        trials=trials,
        problems=tuple(reader.problems),
    )


def _metric(result: Result | None, lines: Sequence[Line]) -> tuple[str | None, float | None]:
    """What tells best how good the model is: the final test, an evaluation, or the loss."""
    outcome = result.outcome if result else None
    if outcome is not None and outcome.test:
        value = outcome.test.get("metrics", {}).get("accuracy")
        if isinstance(value, int | float):
            return f"{outcome.tested_on or 'test'}/accuracy", float(value)
    for line in reversed(lines):
        metrics = line.get("metrics") or {}
        if line.get("kind") == "evaluation" and isinstance(metrics.get("f1"), int | float):
            return f"{line.get('split')}/f1", float(metrics["f1"])
    for line in reversed(lines):
        if isinstance(line.get("loss"), int | float):
            return "train/loss", float(line["loss"])
    return None, None


def _best_so_far(reader: RunReader, search: Search) -> tuple[str | None, float | None]:
    """Of the trials of a study that goes on, or that no driver has ended."""
    trials = Trials(search, reader.study_events())
    best = trials.winner()
    return (None, None) if best is None else (search.metric, trials.score(best))


def show_overviews(overviews: Sequence[Overview]) -> None:
    """The table of `shoal list`, on stdout; what could not be read, on stderr."""
    from rich.text import Text

    from jobs.terminal import format_number, print_table, show_warnings, state_text

    rows: list[list[str | Text]] = []
    for o in overviews:
        of_total = f"/{o.total_steps}" if o.total_steps else ""
        rows.append(
            [
                o.run_id,
                state_text(o.state) if o.state else Text("UNREADABLE", style="bold red"),
                f"{o.trials} trials"
                if o.trials is not None
                else "-"
                if o.step is None
                else f"{o.step}{of_total}",
                f"{o.metric} {format_number(o.value)}" if o.metric else "-",
                "-" if o.workers is None else str(o.workers),
                format_seconds(time.time() - o.submitted_at),
            ]
        )
    print_table(
        ["run", "state", "step", "metric", "workers", "age"],
        rows,
        right={"step", "workers", "age"},
    )
    show_warnings(problem for o in overviews for problem in o.problems)
