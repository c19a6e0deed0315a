"""What is wrong with a job file, in words: where, what was given, the limit, what to type."""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from jobs.errors import Problem
from jobs.schema import expected, field_schema, keys_of, kinds_of, known_paths
from jobs.spec_parts import UnfitError

Path = tuple[int | str, ...]

_EXAMPLES = {
    "name": "sentiment",
    "task": "{kind: text-classification, labels: [negative, positive]}",
    "task.labels": "[negative, positive]",
    "model": "{source: s3://models/minilm}",
    "model.source": "s3://models/minilm",
    "model.freeze": "[embeddings]",
    "model.dropout": "0.1",
    "data": "{train: s3://lake/reviews/train}",
    "data.train": "s3://lake/reviews/train",
    "data.stream_memory": "1 GiB",
    "cluster": "{kind: local}",
    "cluster.kind": "local",
    "cluster.image": "registry.example.com/shoal:0.1.0",
    "cluster.service_account": "shoal",
    "cluster.queue": "team-a",
    "cluster.env_from_secrets": "[object-store]",
    "cluster.env_secrets": "{HF_TOKEN: {secret: hub, key: token}}",
    "cluster.spot": "{label: cloud.google.com/gke-spot}",
    "cluster.nodes": "{selector: {pool: gpu}}",
    "store": "s3://shoal/runs",
    "store.uri": "s3://shoal/runs",
    "train.early_stopping": "{metric: validation/f1, patience: 3}",
    "search": "{space: recommended, trials: 64}",
    "search.finalists": "{count: 3, seeds: 3}",
}
"""What to type for keys whose default says too little."""

_NAMES_ELSEWHERE = {
    "batch_size": "batching.global_batch_size",
    "per_device_train_batch_size": "batching.global_batch_size",
    "train_batch_size": "batching.global_batch_size",
    "gradient_accumulation_steps": "batching.max_tokens_per_microbatch",
    "lr": "optimizer.learning_rate",
    "lr_scheduler_type": "optimizer.schedule",
    "warmup": "optimizer.warmup_steps",
    "max_seq_length": "task.max_tokens",
    "max_length": "task.max_tokens",
    "num_train_epochs": "train.epochs",
    "num_workers": "workers.count",
    "model_name_or_path": "model.source",
    "output_dir": "store",
    "eval_steps": "train.evaluate_every_steps",
    "save_steps": "checkpoint.every_steps",
    "save_total_limit": "checkpoint.keep_last",
    "n_trials": "search.trials",
    "num_samples": "search.trials",
}
"""Names that other tools give to our keys."""

_DECIMAL_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT])B?\s*", re.IGNORECASE)
_SECRET = re.compile(r"secret|password|access_key|token|credential", re.IGNORECASE)


@dataclass(frozen=True)
class Sources:
    """Where the values of a job came from."""

    where: str
    """The file."""
    lines: Mapping[Path, int] = field(default_factory=dict)
    """Its line of each path."""
    overrides: Sequence[str] = ()
    """`path=value` from the command line; they count more than the file."""

    def of(self, path: Path, *, shows_value: bool = True) -> str:
        """`job.yaml, line 7` or `--set optimizer.kind=adam`; without the value where that may be a
        secret."""
        dotted = ".".join(map(str, path))
        for override in reversed(self.overrides):
            target = override.partition("=")[0].strip()
            brought = target.startswith(dotted + ".") and path not in self.lines
            if brought or dotted == target or dotted.startswith(target + "."):
                is_known = field_schema(tuple(target.split("."))) is not None
                told = override.removeprefix(target) if is_known else override
                if not shows_value or _SECRET.search(told):
                    return f"--set {target}=..."
                return f"--set {override}"
        while path:
            if path in self.lines:
                return f"{self.where}, line {self.lines[path]}"
            path = path[:-1]
        return self.where


def problems_of(error: ValidationError, sources: Sources) -> list[Problem]:
    """Every problem of a job file once, in the order of its keys."""
    found: dict[Path, ErrorDetails] = {}
    for detail in error.errors():
        if detail["type"] == "default_factory_not_called":
            continue  # a default that follows from keys which are wrong themselves
        path = _known_part(detail)
        # Each branch of `auto or a number` fails; one of them is enough.
        found.setdefault(path, detail)
    problems: dict[Path, Problem] = {}
    # One override may bring many keys, of which one is wrong and another a secret.
    shows_value = all(_shows_value(detail) for detail in found.values())
    for path, detail in found.items():
        where, group = sources.of(path, shows_value=shows_value), path[:-1]
        if _is_of_another_kind(path, detail):
            # All of them are told at once, at the place of the first.
            others = [p for p, d in found.items() if p[:-1] == group and _is_of_another_kind(p, d)]
            kind = str(detail["loc"][-2])
            problems.setdefault(group, _keys_of_another_kind(others, kind, where=where))
        elif not _follows_from_parts(path, found):
            problems[path] = _problem(detail, path, where=where)
    return list(problems.values())


def no_group(path: Sequence[str], held: object, *, where: str) -> Problem:
    """A key is to be set inside something that holds no keys."""
    dotted = ".".join(path)
    if isinstance(held, list | tuple):
        return Problem(
            f"{where}: {dotted} is a list, not a group of keys",
            f"set the whole list: --set '{dotted}={_shown(held)}'",
        )
    return Problem(f"{where}: {dotted} is {_shown(held)}, not a group of keys", f"set {dotted}=...")


def _known_part(detail: ErrorDetails) -> Path:
    """The path without the names that pydantic gives to the branches of a union."""
    path = _without_kinds(detail["loc"])
    if detail["type"] == "extra_forbidden":
        return path
    if detail["type"] in ("union_tag_invalid", "union_tag_not_found"):
        return (*path, "kind") if isinstance(detail["input"], dict) else path
    if detail["type"] == "missing" and isinstance(path[-1], int):
        return path[:-1]
    while path and field_schema(path) is None:
        path = path[:-1]
    return path


def _without_kinds(location: Sequence[int | str]) -> Path:
    """The path without the kinds that pydantic puts between a group and its keys."""
    path: Path = ()
    after_kind = False
    for part in location:
        after_kind = not after_kind and part in kinds_of(field_schema(path) or {})
        if not after_kind:
            path += (part,)
    return path


def _is_of_another_kind(path: Path, detail: ErrorDetails) -> bool:
    """Whether the key is refused only because its group is of a kind that has no such key."""
    return detail["type"] == "extra_forbidden" and field_schema(path) is not None


def _keys_of_another_kind(paths: Sequence[Path], given: str, *, where: str) -> Problem:
    group = _name(paths[0][:-1])
    names = " and ".join(_name(path) for path in paths)
    keys = {path[-1] for path in paths}
    kinds = kinds_of(field_schema(paths[0][:-1]) or {})
    other = next(kind for kind, known in kinds.items() if keys & set(known) and kind != given)
    return Problem(
        f"{where}: {names} {'belongs' if len(paths) == 1 else 'belong'} to {group}.kind {other}, "
        f"but {group}.kind is {given}",
        f"write {group}.kind: {other}, or keep {given} alone: --set '{group}={{kind: {given}}}'",
    )


def _follows_from_parts(path: Path, found: dict[Path, ErrorDetails]) -> bool:
    """Whether a list is called too short only because some of its items are wrong."""
    return found[path]["type"] == "too_short" and any(
        len(other) > len(path) and other[: len(path)] == path for other in found
    )


def _shows_value(detail: ErrorDetails) -> bool:
    """Whether what was given may be repeated: not what may be a secret."""
    unfit = detail.get("ctx", {}).get("error")
    return unfit.shows_value if isinstance(unfit, UnfitError) else True


def _problem(detail: ErrorDetails, path: Path, *, where: str) -> Problem:
    name, given, kind = _name(path), detail["input"], detail["type"]
    unfit = detail.get("ctx", {}).get("error")
    if kind == "extra_forbidden":
        return _unknown_key(path, where)
    if isinstance(unfit, UnfitError):
        if kind == "value_error" and not path:
            return Problem(f"{where}: {unfit}", unfit.hint)
        hidden = isinstance(given, dict) or not unfit.shows_value
        shown = "" if hidden else f"is {_shown(given)}, but "
        return Problem(f"{where}: {name} {shown}{unfit}", unfit.hint)
    schema = field_schema(path) or {}
    if kind == "union_tag_invalid":
        given = given["kind"]
    if kind == "union_tag_not_found" and isinstance(given, dict):
        return Problem(f"{where}: {name} is missing", f"add {name}: {expected(schema)}")
    if kind == "missing" and path == _without_kinds(detail["loc"]):
        example = _example(path)
        return Problem(
            f"{where}: {name} is missing", f"add {name}: {example}" if example else f"add {name}"
        )
    wanted = expected(schema)
    shown = "empty" if given is None or given == "" else _shown(given)
    return Problem(f"{where}: {name} is {shown}, but must be {wanted}", _hint(path, given, schema))


def _hint(path: Path, given: object, schema: Any) -> str | None:
    """What to type instead of `given`."""
    key, wanted = path[-1], expected(schema)
    example = _example(path)
    if isinstance(key, int):
        # An item of a list has no key of its own to write.
        return _quoting_hint(given) or f"write {wanted} there, or remove item {key + 1}"
    if wanted.startswith("a group of keys"):
        keys = ", ".join(keys_of(schema))
        if given is None and example is None:
            return f"write its keys below it ({keys}), or remove {key}:"
        kinds = field_schema((*path, "kind"))
        if isinstance(given, str) and kinds and given in _choices(expected(kinds)):
            return f"write {key}: {{kind: {given}}}"
        return f"write {key}: {example}" if example else f"write its keys below it: {keys}"
    if given is None:
        return f"write {key}: {example}" if example else f"remove {key}:"
    if "text" in wanted and not wanted.startswith("a list") and (hint := _quoting_hint(given)):
        return hint
    if isinstance(given, bool):
        return "YAML reads yes, no, on and off as true and false" + (
            f"; write for example {key}: {example}" if example else ""
        )
    if wanted.startswith("a list of ") and "at least" not in wanted and isinstance(given, str):
        return f"write {key}: [{given}]"
    if "number" in wanted and (number := _number_in(given, whole="whole" in wanted)) is not None:
        return f"write {key}: {number}" + (", without quotes" if isinstance(given, str) else "")
    if isinstance(given, str):
        choices = _choices(wanted)
        near = difflib.get_close_matches(given.lower(), choices, n=1)
        if near := near or [choice for choice in choices if choice.endswith(f"/{given}")]:
            return f"write {key}: {near[0]}"
        if "size" in wanted and (match := _DECIMAL_SIZE.fullmatch(given)):
            return f"write {key}: {match[1]} {match[2].upper()}iB"
    return f"write for example {key}: {example}" if example else None


def _quoting_hint(given: object) -> str | None:
    if isinstance(given, bool):
        word = "yes" if given else "no"
        return (
            f"YAML reads yes, no, on and off without quotes as true and false; "
            f'for a text, quote the word: "{word}"'
        )
    if given is None:
        return None
    if not isinstance(given, str | list | tuple | dict):
        return f'quote it, to make it a text: "{given}"'
    return None


def _number_in(given: object, *, whole: bool) -> str | None:
    """The number that was meant by a quoted one, or by a whole one with a point."""
    try:
        number = float(given) if isinstance(given, str | float) else None
    except ValueError:
        return None
    if number is None or not 0 < number < math.inf:
        return None
    if not whole:
        return _plain(number) if isinstance(given, str) else None
    return str(int(number)) if number.is_integer() else None


def _choices(wanted: str) -> list[str]:
    return re.split(", | or ", wanted)


def _example(path: Path) -> str | None:
    dotted = ".".join(map(str, path))
    if dotted in _EXAMPLES:
        return _EXAMPLES[dotted]
    schema = field_schema(path) or {}
    default = schema.get("default")
    return None if default is None else _plain(default)


def _plain(value: object) -> str:
    """A value as one writes it in YAML: 3e-5, not 3e-05."""
    if isinstance(value, float):
        return re.sub(r"e([-+])0+", r"e\1", f"{value:g}").replace("e+", "e")
    return value if isinstance(value, str) else _shown(value)


def _unknown_key(path: Path, where: str) -> Problem:
    *parents, last = path
    key, parent = str(last), _name(tuple(parents))
    message = f"{where}: {_name(path)} is not a known key"
    paths = known_paths()
    siblings = keys_of(field_schema(parents) or {})
    if _SECRET.search(key) and not difflib.get_close_matches(key, siblings, n=1, cutoff=0.9):
        instead = (
            "name a secret of Kubernetes in cluster.env_from_secrets"
            if parent == "cluster"
            else "name a profile, or set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )
        return Problem(
            message, f"a job file is stored with the run and holds no secrets: {instead}"
        )
    elsewhere = [p for p in paths if p.rpartition(".")[2] == key]
    near = difflib.get_close_matches(key, siblings, n=1, cutoff=0.75)
    if near:
        return Problem(message, f"did you mean {'.'.join(filter(None, [parent, near[0]]))}?")
    if key in _NAMES_ELSEWHERE or elsewhere:
        return Problem(message, f"did you mean {_NAMES_ELSEWHERE.get(key) or elsewhere[0]}?")
    leaves = {p.rpartition(".")[2]: p for p in reversed(paths)}
    near = difflib.get_close_matches(key, siblings, n=1) or difflib.get_close_matches(
        key, leaves, n=1, cutoff=0.8
    )
    if near:
        full = ".".join(filter(None, [parent, near[0]])) if near[0] in siblings else leaves[near[0]]
        return Problem(message, f"did you mean {full}?")
    return Problem(message, f"known {'in ' + parent if parent else 'here'}: {', '.join(siblings)}")


def _name(path: Path) -> str:
    """task.labels[0]: keys with dots, places in lists in brackets."""
    return "".join(
        f"[{part}]" if isinstance(part, int) else f".{part}" for part in path
    ).removeprefix(".")


def _shown(value: object) -> str:
    """What was given, without a password in a URL, cut to a line."""
    if isinstance(value, float) and not math.isfinite(value):
        return "not a number" if math.isnan(value) else "infinite"
    text = json.dumps(value, default=str, ensure_ascii=False)
    text = re.sub(r"//[^/@\s]*@", "//***@", text)
    return text if len(text) <= 80 else text[:77] + "..."
