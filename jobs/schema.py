"""The JSON schema of the job file: what editors complete from, and what error messages say.

python -m jobs.schema                 print it
python -m jobs.schema --write FILE    write it to a file, such as jobs/job.schema.json
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jobs.spec import JobSpec

Schema = Mapping[str, Any]


def job_schema() -> dict[str, Any]:
    """JSON schema (draft 2020-12) of the job file; every key has a description."""
    schema = JobSpec.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "Shoal job"
    parts: dict[str, Any] = schema["$defs"]
    store = schema["properties"]["store"]
    store["anyOf"] = [{"type": "string", "minLength": 1}, {"$ref": store.pop("$ref")}]
    for part in (schema, *parts.values()):
        part["description"] = _one_line(part["description"])
        for field in part["properties"].values():
            reference = field.get("$ref", "").rpartition("/")[2]
            if reference:
                # A default of a whole group would be pasted into the user's file.
                field.pop("default", None)
                field.setdefault("description", parts[reference]["description"])
            field["description"] = _one_line(field["description"])
            field.pop("title", None)
    for part in parts.values():
        part.pop("title", None)
    return schema


def schema_text() -> str:
    """The schema as jobs/job.schema.json holds it."""
    return json.dumps(job_schema(), indent=2, ensure_ascii=False) + "\n"


def field_schema(path: Sequence[int | str]) -> Schema | None:
    """Schema of the key at `path` (an integer is a place in a list); None for an unknown key."""
    found: Schema = _schema()
    for key in path:
        for option in _options(found):
            if isinstance(key, int) and "prefixItems" in option:
                items = option["prefixItems"]
                inner = items[key] if key < len(items) else None
            elif isinstance(key, int):
                inner = option.get("items")
            else:
                inner = option.get("properties", {}).get(key)
            if inner is not None:
                found = inner
                break
        else:
            return None
    return found


def known_paths() -> list[str]:
    """Every dotted path of the job file."""
    return list(_paths(_schema(), ""))


def keys_of(schema: Schema) -> list[str]:
    """Keys of a group; empty for what is no group."""
    return [key for option in _options(schema) for key in option.get("properties", ())]


def expected(schema: Schema) -> str:
    """What a key may hold, in words: `a number above 0`, `adamw or sgd`, `a list of texts`."""
    words = [w for option in _options(schema) if (w := _words(option))]
    return " or ".join(dict.fromkeys(words))


def _words(option: Schema) -> str:
    if "enum" in option:
        *first, last = (str(v) for v in option["enum"])
        return f"{', '.join(first)} or {last}"
    if "const" in option:
        return str(option["const"])
    match option.get("type"):
        case "object":
            return "a group of keys"
        case "integer":
            return "a whole number" + _limits(option)
        case "number":
            return "a number" + _limits(option)
        case "boolean":
            return "true or false"
        case "array":
            return _list_words(option)
        case "string" if "pattern" in option:
            return "a size such as 512 MiB"
        case "string":
            return "a text"
    return ""


def _list_words(option: Schema) -> str:
    if "prefixItems" in option:
        items = option["prefixItems"]
        return f"a list of {len(items)}, each {expected(items[0])}"
    inner = expected(option["items"])
    of = "texts" if inner.startswith("a text") else inner
    return (
        f"a list of at least {option['minItems']} {of}"
        if "minItems" in option
        else f"a list of {of}"
    )


def _limits(option: Schema) -> str:
    words = {
        "exclusiveMinimum": "above",
        "minimum": "of at least",
        "exclusiveMaximum": "below",
        "maximum": "of at most",
    }
    limits = [f"{word} {option[key]}" for key, word in words.items() if key in option]
    return " " + " and ".join(limits) if limits else ""


def _options(schema: Schema) -> list[Schema]:
    """The alternatives of a schema, references followed; a plain schema is its own only one."""
    if "$ref" in schema:
        return [_schema()["$defs"][schema["$ref"].rpartition("/")[2]]]
    return [o for choice in schema.get("anyOf", ()) for o in _options(choice)] or [schema]


def _paths(schema: Schema, prefix: str) -> Iterator[str]:
    for option in _options(schema):
        for name, field in option.get("properties", {}).items():
            yield prefix + name
            yield from _paths(field, f"{prefix}{name}.")


def _one_line(text: str) -> str:
    return " ".join(text.split())


@functools.cache
def _schema() -> dict[str, Any]:
    return job_schema()


if __name__ == "__main__":
    match sys.argv[1:]:
        case []:
            sys.stdout.write(schema_text())
        case ["--write", file]:
            Path(file).write_text(schema_text(), encoding="utf-8")
        case _:
            sys.exit("usage: python -m jobs.schema [--write FILE]")
