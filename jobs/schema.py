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

from jobs.search_spec import RECOMMENDED
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
    search = parts["Search"]["properties"]
    space = {"type": "object", "additionalProperties": search["space"].pop("additionalProperties")}
    search["space"].pop("type")
    search["space"] |= {"default": RECOMMENDED, "anyOf": [{"const": RECOMMENDED}, space]}
    for key, default in (("algorithm", "tpe"), ("scheduler", "asha")):
        group = {name: search[key].pop(name) for name in ("discriminator", "oneOf")}
        kinds: list[dict[str, Any]] = [{"enum": list(group["discriminator"]["mapping"])}]
        kinds += [{"type": "null"}] if key == "scheduler" else []
        search[key] |= {"default": default, "anyOf": [*kinds, group]}
    for part in (schema, *parts.values()):
        part["description"] = _one_line(part["description"])
        for field in part["properties"].values():
            reference = field.get("$ref", "").rpartition("/")[2]
            if reference:
                # A default of a whole group would be pasted into the user's file.
                field.pop("default", None)
                field.setdefault("description", parts[reference]["description"])
            if "discriminator" in field:
                field.pop("default", None)
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
        options = [inner for o in _options(found) if (inner := _inside(o, key)) is not None]
        if not options:
            return None
        # A group that has several kinds may have the key in more than one of them.
        found = options[0] if len(options) == 1 else {"anyOf": options}
    return found


def kinds_of(schema: Schema) -> dict[str, list[str]]:
    """Kind -> its keys, of a group whose key `kind` decides which others it has; else empty."""
    for group in (schema, *schema.get("anyOf", ())):
        mapping = group.get("discriminator", {}).get("mapping", {})
        if mapping:
            return {kind: keys_of({"$ref": reference}) for kind, reference in mapping.items()}
    return {}


def known_paths() -> list[str]:
    """Every dotted path of the job file."""
    return list(dict.fromkeys(_paths(_schema(), "")))


def keys_of(schema: Schema) -> list[str]:
    """Keys of a group; empty for what is no group."""
    keys = [key for option in _options(schema) for key in option.get("properties", ())]
    return list(dict.fromkeys(keys))


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
        case "string" if option.get("format") == "import-path":
            return "an import path such as torch.optim.NAdam"
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


def _inside(option: Schema, key: int | str) -> Schema | None:
    """Schema of one key, or of one place in a list."""
    inner: Schema | None
    if isinstance(key, int) and "prefixItems" in option:
        items = option["prefixItems"]
        inner = items[key] if key < len(items) else None
    elif isinstance(key, int):
        inner = option.get("items")
    else:
        others = option.get("additionalProperties") or None
        inner = option.get("properties", {}).get(key, others)
    return inner


def _options(schema: Schema) -> list[Schema]:
    """The alternatives of a schema, references followed; a plain schema is its own only one."""
    if "$ref" in schema:
        return [_schema()["$defs"][schema["$ref"].rpartition("/")[2]]]
    choices = schema.get("anyOf") or schema.get("oneOf") or ()
    return [o for choice in choices for o in _options(choice)] or [schema]


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
