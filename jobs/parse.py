"""From a YAML file to a `JobSpec`, and from what is wrong with it to errors that say what to type.

    load_spec(path, overrides) -> JobSpec      the only way in from a file
    recorded_spec(payload)     -> JobSpec      what a run folder holds

Unknown keys are refused with the nearest known one, and all problems of a file are reported
together. What a key may hold is said from the JSON schema of the job file, so that messages,
editors and validation cannot differ.
"""

from __future__ import annotations

import copy
import difflib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jobs.errors import Problem, SpecError
from jobs.problems import Sources, no_group
from jobs.schema import job_schema
from jobs.seal import DIGEST, unsealed
from jobs.spec import MAX_RUN_ID_CHARACTERS, RUN_ID_PATTERN, JobSpec
from jobs.strict_yaml import read_yaml
from jobs.study.recommended import with_recommended_space
from jobs.study.space_checks import space_problems
from jobs.tree import job_of


def load_spec(path: Path, overrides: Sequence[str] = ()) -> JobSpec:
    """The job in a YAML file, with `path=value` overrides applied to it.

    Raises SpecError with every problem of the file and of the overrides at once.
    """
    document = read_yaml(_read_text(path), where=str(path))
    if not isinstance(document.value, dict):
        found = "is empty" if document.value is None else f"holds {_kind(document.value)}"
        raise SpecError(
            Problem(
                f"{path} {found}, but a job is a group of keys",
                "start from examples/sentiment.yaml; name, task, model, data and store are needed",
            )
        )
    # A run's spec.json is a job file too, and may have been edited.
    given = {key: value for key, value in document.value.items() if key != DIGEST}
    tree, problems = _with_overrides(given, overrides)
    sources = Sources(str(path), lines=document.lines, overrides=overrides)
    spec, more = _validate(tree, sources)
    problems = [*document.repeated, *problems, *more]
    if spec is None or problems:
        raise SpecError(*problems)
    return spec


def recorded_spec(
    payload: str | bytes, overrides: Sequence[str] = (), *, where: str = "spec.json"
) -> JobSpec:
    """The job of a run: its spec.json, and what resumes have changed of it.

    Raises ValueError where spec.json is damaged, SpecError where it is not of this version.
    """
    return parse_spec(apply_overrides(unsealed(json.loads(payload)), overrides), where=where)


def parse_spec(tree: Mapping[str, Any], *, where: str) -> JobSpec:
    """The job in a tree of plain values; raises SpecError with every problem, led by `where`."""
    spec, problems = _validate(tree, Sources(where))
    if spec is None:
        raise SpecError(*problems)
    return spec


def apply_overrides(tree: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of `tree` in which each `dotted.path=value` is set; values are read as YAML.

    Raises SpecError with every override that cannot be applied.
    """
    result, problems = _with_overrides(tree, overrides)
    if problems:
        raise SpecError(*problems)
    return result


RESUME_PATHS = (
    "workers",
    "retries",
    "cluster",
    "checkpoint",
    "tracking",
    "train.epochs",
    "model.compile",
    "model.activation_checkpointing",
)
"""What `shoal resume --set` may change: operation, and the number of epochs."""
STUDY_RESUME_PATHS = (
    *(path for path in RESUME_PATHS if path != "train.epochs"),
    "search.trials",
    "search.budget",
    "search.patience",
    "search.max_concurrent",
    "search.retries",
)
"""What it may change of a study: not the budget of a trial, by whose fractions all are compared."""


def may_change_on_resume(path: str, *, is_study: bool = False) -> bool:
    """Whether a resume may change the key with that dotted path."""
    paths = STUDY_RESUME_PATHS if is_study else RESUME_PATHS
    return any(path == allowed or path.startswith(allowed + ".") for allowed in paths)


def check_resume_overrides(overrides: Sequence[str], *, is_study: bool = False) -> None:
    """Raises SpecError for each override of a key that a resume may not change."""
    problems = []
    for override in overrides:
        path = override.partition("=")[0].strip()
        if may_change_on_resume(path, is_study=is_study):
            continue
        if is_study:
            extends = path == "search.space" or path.startswith("search.space.")
            problem = Problem(
                f"--set {override}: a resume goes on with the same study, so {path} cannot change",
                "have more trials drawn from another space with: shoal extend STUDY --trials N "
                "--space SPACE"
                if extends
                else f"change {', '.join(STUDY_RESUME_PATHS)}, or start a new study",
            )
        else:
            problem = Problem(
                f"--set {override}: a resume goes on with the same training, so {path} cannot "
                "change",
                f"change {', '.join(RESUME_PATHS)}, or start a new run with model.source naming "
                "this run",
            )
        problems.append(problem)
    if problems:
        raise SpecError(*problems)


def check_run_id(run_id: str) -> str:
    """The run id, if it may name a run; raises SpecError."""
    if not RUN_ID_PATTERN.fullmatch(run_id) or len(run_id) > MAX_RUN_ID_CHARACTERS:
        raise SpecError(
            Problem(
                f"--run-id {run_id} is not allowed: at most {MAX_RUN_ID_CHARACTERS} lower-case "
                "letters, digits and hyphens, with a letter first and no hyphen last",
                "write for example --run-id sentiment-1",
            )
        )
    return run_id


def with_absolute_paths(spec: JobSpec) -> JobSpec:
    """The job with its local paths made absolute: workers have other working folders."""

    def absolute(uri: str | None) -> str | None:
        if uri is None or "://" in uri:
            return uri
        return os.path.abspath(os.path.expanduser(uri))

    data, source = spec.data, spec.model.source
    is_folder = "://" not in source and Path(source).expanduser().is_dir()
    return spec.model_copy(
        update={
            "data": data.model_copy(
                update={
                    "train": absolute(data.train),
                    "validation": absolute(data.validation),
                    "test": absolute(data.test),
                }
            ),
            "store": spec.store.model_copy(update={"uri": absolute(spec.store.uri)}),
            "model": spec.model.model_copy(
                update={"source": absolute(source) if is_folder else source}
            ),
        }
    )


def json_schema() -> dict[str, Any]:
    """The JSON schema of the job file, from which editors complete and check it."""
    return job_schema()


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        files = [str(p) for p in _siblings(path)]
        near = difflib.get_close_matches(str(path), files, n=1)
        hint = f"did you mean {near[0]}?" if near else "name a job file: shoal run job.yaml"
        raise SpecError(Problem(f"{path}: no such file", hint)) from None
    except IsADirectoryError:
        files = [str(p) for p in _siblings(path / "job.yaml")]
        hint = f"did you mean {files[0]}?" if files else "name a job file: shoal run job.yaml"
        raise SpecError(Problem(f"{path} is a folder, but a job is a YAML file", hint)) from None
    except UnicodeDecodeError as error:
        raise SpecError(
            Problem(
                f"{path} is not UTF-8 text: byte {error.start} is {error.object[error.start]:#x}",
                "save it as UTF-8",
            )
        ) from error
    except OSError as error:
        raise SpecError(Problem(f"{path} cannot be read: {error.strerror}")) from error


def _validate(tree: Mapping[str, Any], sources: Sources) -> tuple[JobSpec | None, list[Problem]]:
    spec, problems = job_of(with_recommended_space(tree), sources)
    if spec is not None and (problems := space_problems(spec, sources)):
        return None, problems
    return spec, problems


def _with_overrides(
    tree: Mapping[str, Any], overrides: Sequence[str]
) -> tuple[dict[str, Any], list[Problem]]:
    result = copy.deepcopy(dict(tree))
    problems: list[Problem] = []
    for override in overrides:
        try:
            _apply(result, override)
        except SpecError as error:
            problems.extend(error.problems)
    return result, problems


def _apply(tree: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    parts = _parts(path.strip())
    where = f"--set {override}"
    if not equals or not all(parts):
        raise SpecError(
            Problem(
                f"{where}: a path, '=' and a value are needed",
                "write --set optimizer.learning_rate=1e-4",
            )
        )
    document = read_yaml(text, where=where)
    if document.repeated:
        raise SpecError(*document.repeated)
    node = tree
    for depth, part in enumerate(parts[:-1]):
        held = node.get(part)
        if held is None:
            held = {}
        elif depth == 0 and part == "store" and isinstance(held, str):
            held = {"uri": held}
        elif not isinstance(held, dict):
            raise SpecError(no_group(parts[: depth + 1], held, where=where))
        node[part] = held
        node = held
    node[parts[-1]] = document.value


def _parts(path: str) -> list[str]:
    """The keys on the way to a value; those of `search.space` hold dots themselves."""
    searched = path.removeprefix("search.space.")
    return path.split(".") if searched == path else ["search", "space", searched]


def _kind(value: object) -> str:
    return "a list" if isinstance(value, list) else "a single value"


def _siblings(path: Path) -> list[Path]:
    return sorted(path.parent.glob("*.y*ml")) if path.parent.is_dir() else []
