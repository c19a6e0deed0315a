"""From a YAML file to a `JobSpec`, and from what is wrong with it to errors that say what to type.

    load_spec(path, overrides) -> JobSpec      the only way in from a file
    spec_from_json(text)       -> JobSpec      what a run folder holds; what every worker reads

Unknown keys are refused with the nearest known one, and all problems of a file are reported
together.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from jobs.errors import Problem, SpecError
from jobs.spec import JobSpec, SpecPart


def load_spec(path: Path, overrides: Sequence[str] = ()) -> JobSpec:
    """The job in a YAML file, with `path=value` overrides applied to it.

    Raises SpecError with every problem of the file and of the overrides at once.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [p.name for p in _siblings(path)], n=1)
        hint = (
            f"did you mean {path.parent / near[0]}?"
            if near
            else "name a job file, as in: shoal run job.yaml"
        )
        raise SpecError(Problem(f"{path}: no such file", hint)) from None
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(Problem(f"{path} cannot be read: {error}")) from error
    try:
        tree = yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader
    except yaml.YAMLError as error:
        raise SpecError(Problem(f"{path} is not valid YAML: {error}")) from error
    if not isinstance(tree, dict):
        raise SpecError(Problem(f"{path} holds no job: keys such as name, task, model are needed"))
    return parse_spec(apply_overrides(tree, overrides), where=str(path))


def spec_from_json(text: str | bytes) -> JobSpec:
    """The job as a run folder holds it."""
    return parse_spec(json.loads(text), where="spec.json")


def parse_spec(tree: Mapping[str, Any], *, where: str) -> JobSpec:
    """The job in a tree of plain values; raises SpecError with every problem, each led by `where`."""
    try:
        return JobSpec.model_validate(tree)
    except ValidationError as error:
        raise SpecError(*(_problem(e, where) for e in error.errors())) from None


def apply_overrides(tree: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of `tree` in which each `dotted.path=value` is set; values are read as YAML."""
    result: dict[str, Any] = json.loads(json.dumps(tree, default=str))
    problems = []
    for override in overrides:
        path, equals, text = override.partition("=")
        if not equals or not path:
            problems.append(
                Problem(
                    f"--set {override}: a path, '=' and a value are needed",
                    "write --set optimizer.learning_rate=1e-4",
                )
            )
            continue
        try:
            value = yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader
        except yaml.YAMLError as error:
            problems.append(Problem(f"--set {override}: the value is not valid YAML: {error}"))
            continue
        node = result
        *parents, leaf = path.split(".")
        for depth, part in enumerate(parents):
            child = node.setdefault(part, {})
            if child is None or (part == "store" and isinstance(child, str)):
                child = node[part] = {} if child is None else {"uri": child}
            if not isinstance(child, dict):
                held = ".".join(parents[: depth + 1])
                problems.append(
                    Problem(f"--set {override}: {held} is {child!r}, not a group of keys")
                )
                break
            node = child
        else:
            node[leaf] = value
    if problems:
        raise SpecError(*problems)
    return result


def json_schema() -> dict[str, Any]:
    """The JSON schema of the job file, from which editors complete and check it."""
    schema = JobSpec.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "Shoal job"
    store = schema["properties"]["store"]
    reference = store.pop("$ref", None)
    if reference:
        store["anyOf"] = [{"type": "string"}, {"$ref": reference}]
    return schema


class _Loader(yaml.SafeLoader):
    """YAML in which 3e-5 is a number, and in which a key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=deep)  # type: ignore[no-untyped-call]
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key} stands twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


_Loader.add_implicit_resolver(  # type: ignore[no-untyped-call]
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d[\d_]*)(\.\d*)?[eE][-+]?\d+|[-+]?\.\d+[eE][-+]?\d+"),
    list("-+0123456789."),
)


def _problem(error: ErrorDetails, where: str) -> Problem:
    """One validation error as where, what was given, the limit, and what to type."""
    path = [
        part for part in error["loc"] if part not in ("int", "literal['auto']", "constrained-int")
    ]
    dotted = ".".join(str(part) for part in path)
    given = error["input"]
    kind = error["type"]
    context = error.get("ctx", {})
    if kind == "extra_forbidden":
        return _unknown_key(path, where)
    if kind == "missing":
        hint = _hint_for(path)
        return Problem(
            f"{where}: {dotted} is missing", f"add {dotted}: {hint}" if hint else f"add {dotted}"
        )
    if kind == "literal_error":
        allowed = str(context["expected"])
        near = difflib.get_close_matches(str(given), re.findall(r"'([^']+)'", allowed), n=1)
        return Problem(
            f"{where}: {dotted} is {given!r}, but must be {allowed}",
            f"write {path[-1]}: {near[0]}" if near else None,
        )
    message = error["msg"].removeprefix("Value error, ")
    if not dotted:
        return Problem(f"{where}: {message}")
    if isinstance(given, bool) and kind != "value_error":
        message += (
            f" (YAML reads yes, no, on and off as booleans; this one became {str(given).lower()})"
        )
    message = message[0].lower() + message[1:]
    return Problem(
        f"{where}: {dotted} is {_shown(given)}: {message}", _hint_of_limit(kind, path, context)
    )


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _hint_of_limit(kind: str, path: Sequence[int | str], context: Mapping[str, Any]) -> str | None:
    bound = context.get("ge", context.get("le"))
    if bound is not None:
        return f"write {path[-1]}: {bound}, or {'more' if 'ge' in context else 'less'}"
    if kind.startswith(("int_", "float_", "string_type", "greater_than", "less_than")):
        default = _hint_for(path)
        return f"write for example {path[-1]}: {default}" if default else None
    return None


_EXAMPLES = {
    "name": "sentiment",
    "task": "{kind: text-classification, labels: [negative, positive]}",
    "task.labels": "[negative, positive]",
    "model": "{source: s3://models/minilm}",
    "model.source": "s3://models/minilm",
    "data": "{train: s3://lake/reviews/train}",
    "data.train": "s3://lake/reviews/train",
    "store": "s3://shoal/runs",
}


def _hint_for(path: Sequence[int | str]) -> str | None:
    dotted = ".".join(str(part) for part in path)
    if dotted in _EXAMPLES:
        return _EXAMPLES[dotted]
    part: Any = JobSpec
    for key in path:
        field = getattr(part, "model_fields", {}).get(key)
        if field is None:
            return None
        part = _part_class(field.annotation) or field
    default = getattr(part, "default", None)
    return None if default is None or isinstance(part, type) else str(default)


def _part_class(annotation: Any) -> type[SpecPart] | None:
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, SpecPart):
            return candidate
    return None


def known_paths() -> list[str]:
    """Every dotted path of the job file."""
    return list(_paths(JobSpec, ""))


def _paths(part: type[SpecPart], prefix: str) -> Iterator[str]:
    for name, field in part.model_fields.items():
        yield prefix + name
        inner = _part_class(field.annotation)
        if inner is not None:
            yield from _paths(inner, f"{prefix}{name}.")


def _unknown_key(path: Sequence[int | str], where: str) -> Problem:
    dotted = ".".join(str(part) for part in path)
    *parents, key = (str(part) for part in path)
    parent = ".".join(parents)
    paths = known_paths()
    siblings = [p for p in paths if p.rpartition(".")[0] == parent]
    near = difflib.get_close_matches(key, [s.rpartition(".")[2] for s in siblings], n=1)
    if near:
        return Problem(
            f"{where}: {dotted} is not a known key",
            f"did you mean {'.'.join([*parents, near[0]])}?",
        )
    elsewhere = [p for p in paths if p.rpartition(".")[2] == key]
    if elsewhere:
        return Problem(f"{where}: {dotted} is not a known key", f"did you mean {elsewhere[0]}?")
    names = ", ".join(s.rpartition(".")[2] for s in siblings)
    return Problem(
        f"{where}: {dotted} is not a known key",
        f"known {'in ' + parent if parent else 'here'}: {names}",
    )


def _siblings(path: Path) -> list[Path]:
    return sorted(path.parent.glob("*.y*ml")) if path.parent.is_dir() else []
