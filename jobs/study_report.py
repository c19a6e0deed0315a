"""What the report of a study says besides what the report of any run does.

study_report(reader, status) -> dict     from the study's log and its trials' folders
winner_job(spec, trials)     -> str      the best values as a job file
"""

from __future__ import annotations

import importlib.util
import statistics
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import yaml

from cluster.storage import join_uri
from jobs.runs import RunReader
from jobs.spec import JobSpec
from jobs.study.course import Course
from jobs.study.space import (
    Choices,
    Range,
    Space,
    distributions_from,
    job_with,
    space_from,
    trial_seed,
)
from jobs.study.trials import Trial, Trials
from jobs.study_status import StudyStatus, trial_json
from jobs.study_view import over_text, short_names

RANKED = 20
CURVES = 40
"""Trials whose evaluations are drawn: the best."""
_MAX_PARALLEL_READS = 16
_CLOSE = 1e-9


def study_report(reader: RunReader, study: StudyStatus) -> dict[str, Any]:
    """The study with stable keys, for JSON and for the page."""
    spec = reader.spec()
    search, trials = study.search, study.trials
    job = spec.model_dump(mode="json")
    spaces = [job["search"]["space"], *study.course.spaces]
    ranked = trials.ranked()
    fraction, comparable = _comparable(study)
    return study.to_json() | {
        "score": search.score,
        "algorithm": search.algorithm.kind,
        "scheduler": search.scheduler.kind,
        "seed": search.seed,
        "repeats": search.repeats,
        "keys": _keys(spaces),
        "ranking": [_ranked(place, runs, trials) for place, runs in enumerate(ranked[:RANKED], 1)],
        "finalists": [
            _ranked(place, runs, trials) for place, runs in enumerate(trials.ranked("finalist"), 1)
        ],
        "all_trials": [
            trial_json(trial, trials)
            | {
                "ended_at": study.course.ended_at.get(trial.number),
                "comparable": comparable.get(trial.number),
            }
            for trial in trials.by_number.values()
        ],
        "history": _history(study),
        "curves": _curves(reader, study, ranked),
        "importance": _importance(space_from(spaces[-1]), job, trials, fraction, comparable),
        "epochs_by_status": _epochs_by_status(trials),
        "winner": _winner(reader, spec, study),
    }


def _keys(spaces: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Every key that a trial may have a value for; those of the newest space come first."""
    overs: dict[str, list[Range | Choices]] = {}
    texts: dict[str, str] = {}
    for space in reversed(spaces):
        given = distributions_from(space)
        for key in space_from(space).keys:
            overs.setdefault(key.path, []).append(key.over)
            earlier = "" if space is spaces[-1] else ", in earlier trials"
            texts.setdefault(key.path, over_text(given[key.path]) + earlier)
    names = short_names(list(overs))
    return [
        {"path": path, "name": names[path], "over": texts[path]} | _axis(own)
        for path, own in overs.items()
    ]


def _axis(overs: Sequence[Range | Choices]) -> dict[str, Any]:
    """An axis for the values of a key that was searched over one thing after the other: `choices`,
    which stand side by side, or numbers from `low` to `high`."""
    ranges = [over for over in overs if isinstance(over, Range)]
    choices: list[Any] = []
    for over in overs:
        if isinstance(over, Choices):
            choices += [value for value in over.values if not Choices(tuple(choices)).holds(value)]
    is_of_numbers = all(
        isinstance(value, int | float) and not isinstance(value, bool) for value in choices
    )
    if not ranges or not is_of_numbers:
        return {"choices": choices}
    numbers = [end for over in ranges for end in over.ends] + choices
    low, high = min(numbers), max(numbers)
    return {"low": low, "high": high, "log": low > 0 and all(over.log for over in ranges)}


def _ranked(place: int, runs: Sequence[Trial], trials: Trials) -> dict[str, Any]:
    """One configuration: its runs, their mean and their spread."""
    scores = [score for run in runs if (score := trials.score(run)) is not None]
    return {
        "place": place,
        "of": runs[0].of,
        "trials": [run.number for run in runs],
        "values": dict(runs[0].values),
        "scores": scores,
        "failed": sum(
            t.failure is not None and t.of == runs[0].of and t.purpose == runs[0].purpose
            for t in trials.by_number.values()
        ),
        "mean": statistics.fmean(scores),
        "spread": statistics.stdev(scores) if len(scores) > 1 else None,
        "fraction": min(run.fraction for run in runs),
        "epochs": sum(run.own_epochs for run in runs),
        "status": runs[0].status,
    }


def _history(study: StudyStatus) -> list[dict[str, Any]]:
    """Of each trial of the search that has a score, in order: it, and the best up to it."""
    trials, better = study.trials, max if study.search.mode == "max" else min
    rows: list[dict[str, Any]] = []
    best: float | None = None
    for trial in trials.by_number.values():
        score = trials.score(trial)
        if trial.purpose != "search" or score is None:
            continue
        best = score if best is None else better(best, score)
        rows.append(
            {"trial": trial.number, "score": score, "best": best, "fraction": trial.fraction}
        )
    return rows


def _curves(
    reader: RunReader, study: StudyStatus, ranked: Sequence[Sequence[Trial]]
) -> list[dict[str, Any]]:
    """Evaluations along the budget: [fraction, value] of each of the best trials, by their own
    metrics, or by what the log has where those are not there."""
    chosen = [run for runs in ranked for run in runs][:CURVES]
    if not chosen:
        return []
    with ThreadPoolExecutor(min(_MAX_PARALLEL_READS, len(chosen))) as pool:
        points = list(pool.map(lambda trial: _points(reader, study, trial), chosen))
    return [
        {"trial": trial.number, "status": trial.status, "points": own}
        for trial, own in zip(chosen, points, strict=True)
    ]


def _points(reader: RunReader, study: StudyStatus, trial: Trial) -> list[list[float]]:
    reports = study.course.reports[trial.number]
    own = reader.trial(trial.number)
    attempts = own.attempts()
    total = attempts[-1].total_steps if attempts else 0
    split, _, metric = study.search.metric.partition("/")
    points = [
        [min(1.0, line["step"] / total), value]
        for line in own.metrics()
        if line["kind"] == "evaluation"
        and line.get("split") == split
        and isinstance(value := line["metrics"].get(metric), int | float)
        and total
    ]
    return points or [[r.fraction, r.value] for r in reports if r.value is not None]


def _comparable(study: StudyStatus) -> tuple[float | None, dict[int, float]]:
    """(fraction, scores by trial): what trials that were stopped at different rungs can be compared
    by, their scores at a part of the budget that at least half of them have had.

    Clones are left out: their scores are their donors' too.
    """
    trials = study.trials
    reached = {
        trial.number: trial.fraction
        for trial in trials.by_number.values()
        if trial.purpose == "search" and trial.donor is None and trials.score(trial) is not None
    }
    if not reached:
        return None, {}
    fraction = statistics.median_low(reached.values())
    is_best = study.search.score == "best"
    found = {n: score_at(study.course, n, fraction, best=is_best) for n in reached}
    return fraction, {number: score for number, score in found.items() if score is not None}


def _importance(
    space: Space,
    job: Mapping[str, Any],
    trials: Trials,
    fraction: float | None,
    comparable: Mapping[int, float],
) -> dict[str, Any]:
    """The keys' shares of the variance of comparable scores, or why they are not known.

    Of trials whose values the newest space has, whichever they were drawn from: `trials` is how
    many were looked at, `outside` how many others there are.
    """
    fitting = {
        number: own
        for number in comparable
        if (own := space.own_values(trials[number].values, job)) is not None
    }
    outside = len(comparable) - len(fitting)
    told: dict[str, Any] = {"fraction": fraction, "trials": 0, "outside": outside, "shares": {}}
    lacking = [name for name in ("optuna", "sklearn") if importlib.util.find_spec(name) is None]
    if lacking:
        names = " and ".join({"sklearn": "scikit-learn"}.get(name, name) for name in lacking)
        verb = "is" if len(lacking) == 1 else "are"
        missing = (
            f'not computed: {names} {verb} not installed here; run: pip install "shoal[train]"'
        )
        return told | {"missing": missing}
    from jobs.study.importance import Scored, importances

    shares, count = importances(
        space, [Scored(own, comparable[number]) for number, own in fitting.items()]
    )
    few = None if shares else "it takes at least two trials whose scores differ"
    if few is not None and outside:
        few += f", and {outside} lie outside of the newest space"
    return told | {"trials": count, "shares": shares, "missing": few}


def score_at(course: Course, number: int, fraction: float, *, best: bool) -> float | None:
    """The score of a trial once it had had that part of its budget; None where it had not."""
    for report in course.reports[number]:
        if report.fraction >= fraction - _CLOSE:
            return report.best if best else report.value
    return None


def _epochs_by_status(trials: Trials) -> dict[str, float]:
    """Epochs that went into trials, by what became of them; finalists apart."""
    spent = dict.fromkeys(("finished", "finalists", "stopped", "paused", "running", "failed"), 0.0)
    for trial in trials.by_number.values():
        status = {"leaving": "running", "ready": "running"}.get(trial.status, trial.status)
        spent["finalists" if trial.purpose == "finalist" else status] += trial.own_epochs
    return spent


def _winner(reader: RunReader, spec: JobSpec, study: StudyStatus) -> dict[str, Any] | None:
    best = study.best
    if best is None:
        return None
    group = next(runs for runs in study.trials.ranked(best.purpose) if best in runs)
    return trial_json(best, study.trials) | {
        "uri": join_uri(reader.uri, f"trials/{best.number:04d}"),
        "configuration": _ranked(1, group, study.trials),
        "job": winner_yaml(reader.uri, spec, study, best),
    }


def winner_job(spec: JobSpec, best: Trial) -> JobSpec:
    """The job of a trial as a run of its own."""
    return job_with(spec, best.values, seed=trial_seed(spec, best.repeat))


def winner_yaml(uri: str, spec: JobSpec, study: StudyStatus, best: Trial) -> str:
    """`winner_job` as a job file, with where it comes from."""
    tree = winner_job(spec, best).model_dump(mode="json", exclude={"search"})
    score = study.trials.score(best)
    return (
        f"# Trial {best.number} of {uri}: {study.search.metric} {score:.4f}.\n"
        f"# Run it with: shoal run winner.yaml\n"
        + yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=100)
    )
