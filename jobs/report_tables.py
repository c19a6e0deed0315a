"""What the tables of the report show, as plain rows for its template."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from jobs.situation import format_seconds
from jobs.spec import format_bytes
from jobs.status_view import TIME_NAMES
from jobs.study_view import format_value
from jobs.terminal import format_number

_HUGE_MATRIX, _LARGE_MATRIX, _MEDIUM_MATRIX = 4, 10, 24
"""Up to so many classes each cell shows count and share, the first in bigger cells; up to so many
the count alone. Beyond, cells are only colored, and tell their count when pointed at."""
_MOST_SIDE_BY_SIDE = 60
"""Classes up to which two matrices stand beside each other on a wide screen."""
_CONFUSIONS_SHOWN = 10
_FAILED_SHOWN = 20

Evaluation = Mapping[str, Any] | None


def time_shares(seconds: Mapping[str, float]) -> list[dict[str, Any]]:
    """Where the wall clock went, in the order of `seconds`, without what took nothing."""
    total = sum(seconds.values())
    return [
        {
            "key": name if name in TIME_NAMES else "other",
            "name": TIME_NAMES.get(name, name),
            "seconds": spent,
            "share": spent / total,
        }
        for name, spent in seconds.items()
        if spent > 0
    ]


def class_rows(after: Evaluation, before: Evaluation) -> list[dict[str, Any]]:
    """Precision, recall, F1 and support of each class, with its F1 before fine-tuning."""
    was = {row["label"]: row.get("f1") for row in (before or {}).get("per_class") or []}
    return [
        {
            **row,
            "before": was.get(row["label"]),
            "change": None
            if was.get(row["label"]) is None or row["f1"] is None
            else row["f1"] - was[row["label"]],
        }
        for row in (after or {}).get("per_class") or []
    ]


def matrices(after: Evaluation, before: Evaluation) -> list[dict[str, Any]]:
    """The confusion matrices, before and after, with the share of each cell in its row."""
    found = []
    for title, evaluation in (("before fine-tuning", before), ("after", after)):
        confusion = (evaluation or {}).get("confusion")
        if not evaluation or not confusion:
            continue
        labels = _labels(evaluation)
        n = len(labels)
        rows = []
        for i, counts in enumerate(confusion):
            total = sum(counts)
            cells = [
                {
                    "count": count,
                    "share": count / total if total else 0.0,
                    "predicted": labels[j],
                    "hit": i == j,
                }
                for j, count in enumerate(counts)
            ]
            rows.append({"label": labels[i], "cells": cells})
        side_by_side = n <= _MOST_SIDE_BY_SIDE
        found.append(
            {
                "title": title,
                "labels": labels,
                "rows": rows,
                "size": _matrix_size(n),
                "side_by_side": side_by_side,
                "cell_pixels": max(3, min(14, (400 if side_by_side else 950) // n - 1)),
            }
        )
    return found


def _matrix_size(num_classes: int) -> str:
    if num_classes <= _HUGE_MATRIX:
        return "huge large"
    if num_classes <= _LARGE_MATRIX:
        return "large"
    return "medium" if num_classes <= _MEDIUM_MATRIX else "small"


def top_confusions(after: Evaluation, before: Evaluation) -> list[dict[str, Any]]:
    """The most frequent mistakes of the fine-tuned model, with how often each was made before."""
    confusion = (after or {}).get("confusion")
    if not after or not confusion:
        return []
    labels = _labels(after)
    was = (before or {}).get("confusion")
    mistakes = [
        {
            "true": labels[i],
            "predicted": labels[j],
            "count": count,
            "share": count / sum(counts),
            "before": was[i][j] if was else None,
        }
        for i, counts in enumerate(confusion)
        for j, count in enumerate(counts)
        if i != j and count
    ]
    return sorted(mistakes, key=lambda m: -m["count"])[:_CONFUSIONS_SHOWN]


def _labels(evaluation: Mapping[str, Any]) -> list[str]:
    rows = evaluation.get("per_class") or []
    n = len(evaluation["confusion"])
    return [str(row["label"]) for row in rows] if len(rows) == n else [str(i) for i in range(n)]


EPOCHS_NAMES = {
    "finished": ("trials that were trained to the end", "compute"),
    "finalists": ("finalists", "synchronisation"),
    "stopped": ("trials that were stopped early", "data_wait"),
    "paused": ("trials that wait", "checkpoint"),
    "running": ("trials under way", "start"),
    "failed": ("trials that failed", "recovery"),
}
"""What people read for where epochs went, and the color of it."""


def epoch_shares(epochs: Mapping[str, float]) -> list[dict[str, Any]]:
    """Where the epochs of a study went, without what took none."""
    total = sum(epochs.values())
    return [
        {"name": name, "color": color, "epochs": epochs[key], "share": epochs[key] / total}
        for key, (name, color) in EPOCHS_NAMES.items()
        if epochs.get(key, 0) > 0
    ]


def failed_trials(study: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The newest of a study's trials that failed, with why."""
    failed = [row for row in study["all_trials"] if row["status"] == "failed"]
    return failed[-_FAILED_SHOWN:]


def _as_moment(unix_seconds: float | None) -> str:
    if unix_seconds is None:
        return "-"
    return f"{datetime.fromtimestamp(unix_seconds, tz=UTC):%Y-%m-%d %H:%M:%S} UTC"


def _as_signed(value: float | None) -> str:
    return "-" if value is None else f"{value:+.3f}".replace("-", "\N{MINUS SIGN}")


def _as_score(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


FILTERS = {
    "number": format_number,
    "seconds": lambda value: "-" if value is None else format_seconds(value),
    "moment": _as_moment,
    "bytes": format_bytes,
    "signed": _as_signed,
    "score": _as_score,
    "score4": lambda value: "-" if value is None else f"{value:.4f}",
    "value": format_value,
    "capitalize_first": lambda text: text[:1].upper() + text[1:],
    "percent": lambda value: "-" if value is None else f"{value:.1%}",
}
