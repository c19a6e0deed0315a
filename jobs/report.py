"""The report of a run: all of its evidence as one JSON document, and as one HTML file.

    build_report(reader) -> dict      what is known, from the run folder alone
    render_html(report)  -> str       one self-contained file: no request leaves it
    write_report(store, run_id, ...)  both, into the run folder; of a study, the winner's job too

Text from the job (labels, names, messages) is escaped wherever it lands.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import yaml

from cluster.storage import Store, is_s3, join_uri
from jobs.lines import Line
from jobs.record import Manifest, Result, RunPaths, State
from jobs.runs import RunReader
from jobs.spec import JobSpec, PromptAdapter
from jobs.status import RunStatus, read_status
from jobs.status_view import skipped_text
from jobs.study_report import study_report

REPORT_VERSION = 1
HEADLINE_METRIC = "accuracy"

Report = dict[str, Any]


def write_report(store: Store, run_id: str, *, result: Result | None = None) -> str:
    """Write report.json and index.html into the run folder; the URI of the page.

    `result` is that of a driver that will record it, as its last object, after the report.
    """
    report = build_report(RunReader(store, run_id, ending=result))
    paths = RunPaths(run_id)
    store.write(paths.report_json, to_json(report).encode())
    store.write(paths.report_html, render_html(report).encode())
    winner = report["study"] and report["study"]["winner"]
    if winner:
        store.write(paths.winner, winner["job"].encode())
    return join_uri(store.uri, paths.report_html)


def to_json(report: Report) -> str:
    """The report as JSON text; numbers that JSON cannot hold are null already."""
    return json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False)


def build_report(reader: RunReader, *, result: Result | None = None) -> Report:
    """Everything that the report says, with stable keys; only finite numbers.

    Raises SpecError if there is no such run. A run that goes on, or was killed, has a report too.
    """
    status = read_status(reader, result=result)
    spec = reader.spec()
    test, before, tested_on = _final_evaluations(status)
    report = {
        "version": REPORT_VERSION,
        "made_at": status.now,
        "made_by": f"shoal {version('shoal')}",
        "run_id": status.run_id,
        "uri": status.uri,
        "name": status.name,
        "state": status.situation.state,
        "cause": status.situation.cause,
        "hint": status.situation.hint,
        "is_over": status.situation.is_over,
        "submitted_at": status.submitted_at,
        "finished_at": status.finished_at,
        "step": status.step,
        "total_steps": status.total_steps,
        "epoch": status.epoch,
        "epochs": status.epochs,
        "tested_on": tested_on,
        "notes": _notes(spec, status, tested_on),
        "headline": _headline(test, before),
        "test": test,
        "before": before,
        "best": _best(status),
        "training": [_only(line, _TRAINING_KEYS) for line in _of_kind(reader.metrics(), "train")],
        "evaluations": [_only(line, _EVALUATION_KEYS) for line in status.evaluations],
        "skipped": [_only(line, _SKIPPED_KEYS) for line in status.skipped],
        "throughput": _throughput(reader.metrics_lines()),
        "seconds": dict(status.account.seconds),
        "lost_seconds": status.account.lost_seconds,
        "attempts": _attempts(status),
        "checkpoints": [_checkpoint(m) for m in status.checkpoints],
        "events": [_only(event, _EVENT_KEYS) for event in status.events],
        "data": _data(spec, status),
        "environment": _environment(spec, status),
        "spec": spec.model_dump(mode="json"),
        "commands": _commands(spec, status) | _commands_of_winner(reader, spec, status),
        "study": status.study and study_report(reader, status.study),
        "problems": list(reader.problems),
    }
    finite: Report = _finite(report)
    return finite


_TRAINING_KEYS = (
    *("step", "time", "attempt", "epoch", "loss", "learning_rate", "grad_norm"),
    *("rows_per_second", "tokens_per_second", "padding_share", "data_wait_share"),
    "imbalance",
)
_EVALUATION_KEYS = ("step", "time", "attempt", "split", "rows", "seconds", "metrics")
_SKIPPED_KEYS = ("step", "time", "attempt", "epoch", "first_item", "next_item", "norm")
_EVENT_KEYS = ("time", "event", "state", "message", "attempt", "generation", "step")


def _final_evaluations(
    status: RunStatus,
) -> tuple[dict[str, Any] | None, dict[str, Any] | None, str | None]:
    """(after, before, set) of the model: of the outcome, or as far as the run has got.

    A run without an outcome shows its newest evaluation beside the one of step 0, if both were
    made on the same set.
    """
    outcome = status.result.outcome if status.result else None
    if outcome is not None and outcome.test:
        was = _tables(outcome.before) if outcome.before else None
        return _tables(outcome.test), was, outcome.tested_on
    best = status.best.step if status.best else None
    after = [e for e in status.evaluations if e.get("step")]
    chosen = [e for e in after if e.get("step") == best] or after[-1:]
    if not chosen:
        return None, None, None
    split = chosen[-1].get("split")
    before = [e for e in status.evaluations if e.get("step") == 0 and e.get("split") == split]
    return _tables(chosen[-1]), _tables(before[0]) if before else None, split


_CLASS_KEYS = ("label", "precision", "recall", "f1", "support")


def _headline(
    test: Mapping[str, Any] | None, before: Mapping[str, Any] | None
) -> dict[str, Any] | None:
    metrics = (test or {}).get("metrics") or {}
    if HEADLINE_METRIC not in metrics:
        return None
    return {
        "metric": HEADLINE_METRIC,
        "after": metrics[HEADLINE_METRIC],
        "before": ((before or {}).get("metrics") or {}).get(HEADLINE_METRIC),
    }


def _notes(spec: JobSpec, status: RunStatus, tested_on: str | None) -> list[str]:
    """What a reader must know to take the headline for what it is."""
    notes = []
    if status.skipped:
        rows = sum(int(line["next_item"]) - int(line["first_item"]) for line in status.skipped)
        notes.append(f"Skipped: {skipped_text(status.skipped)}. Their {rows} rows taught nothing.")
    if tested_on != "validation":
        return notes
    if spec.data.test is None:
        notes.append(
            "The validation set was used: no test set given. It also chose the best checkpoint, "
            "so expect a little less on new data."
        )
    elif status.situation.is_over:
        notes.append("Measured on the validation set: the run ended before the test.")
    else:
        notes.append("Measured on the validation set so far; the test comes at the end.")
    return notes


def _best(status: RunStatus) -> dict[str, Any] | None:
    if status.best is None:
        return None
    return {
        "step": status.best.step,
        "metric": status.best_metric,
        "value": status.best.evaluation.get(status.best_metric),
        "uri": join_uri(status.uri, f"checkpoints/{status.best.name.folder}"),
    }


def _throughput(lines: Iterable[Line]) -> list[dict[str, Any]]:
    """Rows per second by the clock, lost work of dead attempts included."""
    keys = ("time", "attempt", "step", "rows_per_second", "data_wait_share")
    return [_only(line, keys) for line in _of_kind(lines, "train")]


def _attempts(status: RunStatus) -> list[dict[str, Any]]:
    rows = []
    for attempt in status.attempts:
        outcome = status.outcomes.get(attempt.attempt)
        crash = status.crashes.get(attempt.attempt)
        failure = outcome.failure if outcome else crash and crash.failure
        rows.append(
            {
                "attempt": attempt.attempt,
                "generation": attempt.generation,
                "workers": attempt.world_size,
                "hosts": list(attempt.hosts),
                "started_at": attempt.started_at,
                "start_seconds": attempt.start_seconds,
                "restored_step": attempt.restored_step,
                "last_step": outcome.step if outcome else None,
                "state": outcome.state if outcome else None,
                "cause": failure.problems[0][0] if failure and failure.problems else None,
            }
        )
    return rows


def _checkpoint(manifest: Manifest) -> dict[str, Any]:
    return {
        "step": manifest.step,
        "created_at": manifest.created_at,
        "bytes": manifest.total_bytes,
        "evaluation": manifest.evaluation,
    }


def _data(spec: JobSpec, status: RunStatus) -> dict[str, Any]:
    newest = status.attempts[-1] if status.attempts else None
    rows: dict[str, Any] = {str(e.get("split")): e.get("rows") for e in status.evaluations}
    outcome = status.result.outcome if status.result else None
    if outcome is not None and outcome.test and outcome.tested_on:
        rows[outcome.tested_on] = outcome.test.get("rows", rows.get(outcome.tested_on))
    return {
        "splits": [
            {"split": "train", "uri": spec.data.train, "rows": newest and newest.rows_per_epoch},
            *(
                {"split": split, "uri": uri, "rows": rows.get(split)}
                for split, uri in (("validation", spec.data.validation), ("test", spec.data.test))
                if uri is not None
            ),
        ],
        "digest": newest.data_digest if newest else None,
        "lanes": newest.lanes if newest else None,
        "window": newest.window if newest else None,
        "seed": spec.data.seed,
        "labels": list(spec.task.labels),
    }


def _environment(spec: JobSpec, status: RunStatus) -> dict[str, Any]:
    newest = status.attempts[-1] if status.attempts else None
    return {
        "versions": dict(newest.versions) if newest else {},
        "device": newest.device if newest else None,
        "workers": newest.world_size if newest else spec.workers.count,
        "model": spec.model.source,
        "revision": spec.model.revision,
        "parameters": newest.num_parameters if newest else None,
        "trained_parameters": newest.num_trained_parameters if newest else None,
    }


def _commands(spec: JobSpec, status: RunStatus) -> dict[str, str | None]:
    """What to type to use the model, to go on, and to measure it on other data."""
    uri = shlex.quote(status.uri)
    more = f" --set train.epochs={status.epochs + 1}"
    done = status.situation.state is State.SUCCEEDED
    commands: dict[str, str | None] = {
        "evaluate": f"shoal evaluate {uri} --data URI",
        "resume": f"shoal resume {uri}{more if done else ''}" if status.situation.is_over else None,
        "download": None,
        "load": None,
    }
    manifest = status.best or (status.checkpoints[-1] if status.checkpoints else None)
    if manifest is None:
        return commands
    model = join_uri(status.uri, f"checkpoints/{manifest.name.folder}/model")
    steps = []
    if not manifest.has_model:
        model = join_uri(status.uri, RunPaths("").model(manifest.step).rstrip("/"))
        steps.append(f"shoal checkpoints {uri} --consolidate {manifest.step}")
    folder = model
    if is_s3(status.uri):
        folder = status.run_id
        endpoint = spec.store.access.endpoint_url
        option = f" --endpoint-url {shlex.quote(endpoint)}" if endpoint else ""
        steps.append(f"aws s3 cp{option} --recursive {shlex.quote(model + '/')} {folder}/")
    commands["download"] = " && ".join(steps) or None
    commands["load"] = _loading(spec, folder, manifest)
    return commands


def _loading(spec: JobSpec, folder: str, manifest: Manifest) -> str:
    """Python that loads a model's folder."""
    names, imports = ["AutoModelForSequenceClassification"], []
    loads = [f"model = AutoModelForSequenceClassification.from_pretrained({folder!r})"]
    if isinstance(spec.model.adapter, PromptAdapter):  # from_pretrained knows no virtual tokens
        names = []
        imports = ["from trainers.adapted_folder import load_model"]
        loads = [f"model = load_model({folder!r})"]
    if any(part.name.startswith("model/tokenizer") for part in manifest.parts):
        names.append("AutoTokenizer")
        loads.append(f"tokenizer = AutoTokenizer.from_pretrained({folder!r})")
    if names:
        imports.append(f"from transformers import {', '.join(names)}")
    return "\n".join([*imports, "", *loads])


def _commands_of_winner(
    reader: RunReader, spec: JobSpec, status: RunStatus
) -> dict[str, str | None]:
    """Those that concern the model, which is that of the study's best trial; of a run, nothing."""
    best = status.study.best if status.study else None
    if best is None:
        return {}
    trial = reader.trial(best.number)
    if reader.store.head(trial.paths.spec) is None:
        return {}
    commands = _commands(spec, read_status(trial))
    return {name: commands[name] for name in ("evaluate", "download", "load")}


def _of_kind(lines: Iterable[Line], kind: str) -> list[Line]:
    return [line for line in lines if line.get("kind") == kind]


def _only(line: Mapping[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    return {key: line.get(key) for key in keys}


def _tables(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "step": evaluation.get("step"),
        "rows": evaluation.get("rows"),
        "metrics": evaluation.get("metrics") or {},
        "per_class": [_only(row, _CLASS_KEYS) for row in evaluation.get("per_class") or []],
        "confusion": evaluation.get("confusion"),
    }


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return value


def render_html(report: Report) -> str:
    """The report as one HTML file with inline style and charts; light and dark by the system."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    from jobs import charts, report_tables, study_charts

    environment = Environment(
        loader=PackageLoader("jobs", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters.update(report_tables.FILTERS)
    study = report["study"]
    svgs = charts.draw_all(report) if study is None else study_charts.draw_all(study)
    drawn = {name: Markup(svg) for name, svg in svgs.items()}  # noqa: S704 - ours
    template = "report.html.j2" if study is None else "study_report.html.j2"
    return environment.get_template(template).render(
        report=report,
        charts=drawn,
        time=report_tables.time_shares(report["seconds"]),
        classes=report_tables.class_rows(report["test"], report["before"]),
        matrices=report_tables.matrices(report["test"], report["before"]),
        budget=report_tables.epoch_shares(study["epochs_by_status"]) if study else [],
        failed=report_tables.failed_trials(study) if study else [],
        confusions=report_tables.top_confusions(report["test"], report["before"]),
        spec_yaml=yaml.safe_dump(report["spec"], sort_keys=False, allow_unicode=True, width=100),
        made_at=datetime.fromtimestamp(report["made_at"], tz=UTC),
    )
