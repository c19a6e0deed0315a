"""Which run or store a command is about, and how its answer is printed as JSON."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from jobs.errors import Problem, SpecError

if TYPE_CHECKING:
    from cluster.storage import Store
    from jobs.runs import RunReader

F = TypeVar("F", bound=Callable[..., Any])

STORE_VARIABLE = "SHOAL_STORE"
_TRIALS_OF = re.compile(r"(.+)/trials/?")


def run_argument(command: F) -> F:
    """RUN and --store; the command gets `run` and `store`, for `open_run`."""
    return click.argument("run")(store_option(command))


def trial_option(command: F) -> F:
    """--trial; the command gets `trial`, for `open_run`."""
    return click.option(
        "--trial",
        metavar="N",
        type=click.IntRange(min=0),
        help="Of a study: this trial, a run of its own. The same as the URI of its folder, "
        "URI/trials/0007.",
    )(command)


def store_option(command: F) -> F:
    return click.option(
        "--store",
        metavar="URI",
        help="Store of the runs: a URI, or a job file that names it. Default: $SHOAL_STORE.",
    )(command)


def context_option(command: F) -> F:
    """--context; the command gets `context`."""
    return click.option(
        "--context",
        metavar="NAME",
        help="Of a run on Kubernetes: this context of the kubeconfig. Default: $SHOAL_CONTEXT, "
        "else the current one.",
    )(command)


def refuse_options(kind: str, given: dict[str, bool]) -> None:
    """Raises SpecError for each given option about Kubernetes, where `cluster.kind` is `kind`."""
    problems = [
        Problem(f"cluster.kind is {kind}, so {option} has no effect", f"remove {option}")
        for option, is_given in given.items()
        if is_given
    ]
    if problems:
        raise SpecError(*problems)


def json_option(command: F) -> F:
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")(command)


def open_run(run: str, store: str | None) -> RunReader:
    """A reader of the run that the user means; nothing is read yet.

    Raises SpecError where the store of a run id is not known, and for a trial: its study drives it.
    """
    reader = _open_run(run, store)
    if reader.study is not None:
        raise SpecError(
            Problem(
                f"{reader.uri} is a trial of a study, which alone starts, stops and removes it",
                f"name the study: {reader.study.uri}",
            )
        )
    return reader


def open_run_or_trial(run: str, store: str | None, trial: int | None) -> RunReader:
    """As `open_run`, for commands that only read: also trials, by their URI or by `trial`."""
    reader = _open_run(run, store)
    return reader if trial is None else reader.trial(trial)


def _open_run(run: str, store: str | None) -> RunReader:
    from jobs.runs import RunReader

    if not _is_uri(run):
        if not run or not run.isprintable() or run.startswith("."):
            raise SpecError(Problem(f"{run!r} is no run id", "see the runs with: shoal list"))
        return RunReader(open_runs(store, needed_for=f"run {run}"), run)
    from cluster.storage import open_store, split_uri

    parent, run_id = split_uri(run)
    study = _TRIALS_OF.fullmatch(parent)
    if study is not None and re.fullmatch(r"\d{4,}", run_id):
        # What goes on in a trial, its study tells.
        parent, study_id = split_uri(study[1])
        run_id = f"{study_id}/trials/{run_id}"
    if store is not None and not is_job_file(store):
        raise SpecError(
            Problem(
                f"{run} is a URI already, so --store {store} has no effect",
                f"remove --store, or write the run's id alone: {run_id}",
            )
        )
    access = None
    if store is not None:
        from jobs.parse import load_spec

        access = load_spec(Path(store)).store.access
    return RunReader(open_store(parent, access), run_id)


def open_runs(store: str | None, *, needed_for: str) -> Store:
    """The store of runs that --store or SHOAL_STORE names; SpecError where neither does."""
    from cluster.storage import open_store

    given = store or os.environ.get(STORE_VARIABLE)
    if not given:
        raise SpecError(
            Problem(
                f"{needed_for}: the store of runs is not known",
                f"add --store URI, or set {STORE_VARIABLE}, as in: "
                f"export {STORE_VARIABLE}=s3://shoal/runs",
            )
        )
    if is_job_file(given):
        from jobs.parse import load_spec

        at = load_spec(Path(given)).store
        return open_store(at.uri, at.access)
    return open_store(given)


def is_job_file(text: str) -> bool:
    """Whether an argument names a job file, not a store or a run."""
    return text.endswith((".yaml", ".yml"))


def job_file_of_store(store: str | None) -> str | None:
    """The job file from which --store or SHOAL_STORE takes the way to the store, if it does."""
    given = store or os.environ.get(STORE_VARIABLE)
    return given if given and is_job_file(given) else None


def print_json(document: Any) -> None:
    """One JSON document on stdout; numbers that JSON cannot hold (NaN, infinity) become null."""
    click.echo(json.dumps(_finite(document), indent=2, ensure_ascii=False))


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return value


def _is_uri(run: str) -> bool:
    return "://" in run or "/" in run or run.startswith((".", "~"))
