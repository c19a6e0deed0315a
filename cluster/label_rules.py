"""Rules over labels as Kubernetes has them: selectors of namespaces and nodes. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


def matches_selector(selector: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    """Whether a label selector (`matchLabels`, `matchExpressions`) selects these labels."""
    wanted = selector.get("matchLabels") or {}
    return all(labels.get(label) == value for label, value in wanted.items()) and _all_hold(
        selector.get("matchExpressions") or (), labels
    )


def may_be_on(pod_spec: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    """Whether a pod's node selector and required node affinity let it be on a node with these
    labels. Taints are not looked at."""
    wanted = pod_spec.get("nodeSelector") or {}
    if any(labels.get(label) != value for label, value in wanted.items()):
        return False
    affinity = (pod_spec.get("affinity") or {}).get("nodeAffinity") or {}
    required = affinity.get("requiredDuringSchedulingIgnoredDuringExecution")
    if required is None:
        return True
    return any(
        _all_hold(term.get("matchExpressions") or (), labels)
        for term in required["nodeSelectorTerms"]
    )


def _all_hold(expressions: Iterable[Mapping[str, Any]], labels: Mapping[str, str]) -> bool:
    return all(_holds(expression, labels) for expression in expressions)


def _holds(expression: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    value, values = labels.get(expression["key"]), list(expression.get("values") or ())
    match expression["operator"]:
        case "In":
            return value in values
        case "NotIn":
            return value not in values
        case "Exists":
            return value is not None
        case "DoesNotExist":
            return value is None
        case "Gt" | "Lt" as operator:
            if value is None or not value.lstrip("-").isdecimal():
                return False
            number, limit = int(value), int(values[0])
            return number > limit if operator == "Gt" else number < limit
        case _:
            return False
