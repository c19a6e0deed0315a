"""What Kubernetes and its extensions would say of an object: schemas, unknown fields, rules.

Kinds of Kubernetes itself: the schemas that kubernetes-validate ships. Those of Kueue: its custom
resource definitions, with defaults and CEL rules. Those of the operator of Prometheus: their JSON
schemas. Sources of the files are in tests/data/README.md.
"""

from __future__ import annotations

import copy
import gzip
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import cel
import kubernetes_validate
import yaml
from jsonschema import Draft202012Validator as Validator

DATA = Path(__file__).parent.parent / "data"
OLDEST_KUBERNETES, NEWEST_KUBERNETES = "1.30", "1.37"
KUEUE = "0.19.2"

Schema = dict[str, Any]


def refusals(thing: dict[str, Any]) -> list[str]:
    """Why the object would be refused, or lose a field; empty where it is right."""
    group = thing["apiVersion"].rpartition("/")[0]
    if group == "kueue.x-k8s.io":
        schema = kueue_schema(thing["kind"])
        found = [_told(error) for error in Validator(schema).iter_errors(thing)]
        return found or list(_broken_rules(schema, with_defaults(schema, thing), where=""))
    if group == "monitoring.coreos.com":
        return [_told(error) for error in _monitoring(thing["kind"]).iter_errors(thing)]
    found = []
    for version in (OLDEST_KUBERNETES, NEWEST_KUBERNETES):
        try:
            kubernetes_validate.validate(thing, version, strict=True)
        except kubernetes_validate.ValidationError as error:
            found.append(f"Kubernetes {version}: {_told(error)}")
    return found


def _told(error: Any) -> str:
    return f"{error.json_path}: {error.message}"


@cache
def kueue_schema(kind: str) -> Schema:
    """Of the version that is stored, made to refuse fields that Kubernetes would drop."""
    path = DATA / f"kueue.x-k8s.io_{_plural(kind.lower())}-v{KUEUE}.yaml.gz"
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    crd = yaml.load(gzip.decompress(path.read_bytes()), Loader=loader)
    (version,) = (v for v in crd["spec"]["versions"] if v["storage"])
    assert version["served"]
    assert not version.get("deprecated")
    schema: Schema = version["schema"]["openAPIV3Schema"]
    schema["properties"]["apiVersion"] = {"const": f"kueue.x-k8s.io/{version['name']}"}
    _refuse_unknown_fields(schema)
    return schema


def _plural(kind: str) -> str:
    return f"{kind}es" if kind.endswith("s") else f"{kind}s"


def _refuse_unknown_fields(schema: Any) -> None:
    if isinstance(schema, dict):
        if "properties" in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
            schema.setdefault("additionalProperties", False)
        for inner in list(schema.values()):
            _refuse_unknown_fields(inner)
    elif isinstance(schema, list):
        for inner in schema:
            _refuse_unknown_fields(inner)


@cache
def _monitoring(kind: str) -> Validator:
    path = DATA / "monitoring.coreos.com-v0.80.1.json.gz"
    definitions = json.loads(gzip.decompress(path.read_bytes()))["$defs"]
    return Validator({"$ref": f"#/$defs/{kind}", "$defs": definitions})


# ----------------------------------------------------------------------------- defaults and rules


def with_defaults(schema: Schema, value: Any) -> Any:
    """The value as the API server would store it."""
    value = copy.copy(value)
    if isinstance(value, dict):
        for name, inner in schema.get("properties", {}).items():
            if name not in value and "default" in inner:
                value[name] = copy.deepcopy(inner["default"])
            if name in value:
                value[name] = with_defaults(inner, value[name])
    elif isinstance(value, list):
        value = [with_defaults(schema.get("items", {}), each) for each in value]
    return value


def _broken_rules(schema: Schema, value: Any, *, where: str) -> Iterator[str]:
    """Rules about changes of an object (`oldSelf`) say nothing of a new one."""
    for rule in schema.get("x-kubernetes-validations", ()):
        if "oldSelf" in rule["rule"]:
            continue
        if cel.evaluate(rule["rule"], {"self": value}) is not True:
            yield f"{where}: {rule.get('message', rule['rule'])}"
    if isinstance(value, dict):
        for name, inner in schema.get("properties", {}).items():
            if name in value:
                yield from _broken_rules(inner, value[name], where=f"{where}.{name}")
    elif isinstance(value, list):
        for index, each in enumerate(value):
            yield from _broken_rules(schema.get("items", {}), each, where=f"{where}[{index}]")
