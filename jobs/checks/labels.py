"""Whether the labels of a data set are those of the task, from the counts of its index. Pure."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence

from jobs.checks.finding import Finding, ok, problem, warning
from trainers.classes import are_positions, class_of

_MOST_SHOWN = 5


def check_labels(
    part: str,
    counts: Mapping[str, int],
    *,
    column: str,
    kind: str,
    labels: Sequence[str],
    uri: str,
    must_have_all: bool,
) -> list[Finding]:
    """`counts` are the rows of each value of the column, `kind` is the column's type.

    A value that means no class is a problem; where `must_have_all`, a class without rows is a
    warning.
    """
    positions = are_positions(kind, labels)
    rows_of = dict.fromkeys(labels, 0)
    unknown: dict[str, int] = {}
    for value, rows in counts.items():
        meant = class_of(value, labels=labels, are_positions=positions)
        if meant is not None:
            rows_of[meant] += rows
        elif rows:
            unknown[value] = rows
    findings = []
    if unknown:
        findings.append(
            _unknown_labels(part, unknown, column=column, labels=labels, uri=uri, given=positions)
        )
    absent = [label for label, rows in rows_of.items() if not rows]
    if absent and must_have_all and not unknown:
        findings.append(
            warning(
                part,
                f"no row of {uri} has the label {_listed(absent)}, which the model can then not "
                "learn",
                "remove it from task.labels, or add rows that have it",
            )
        )
    if not findings:
        shown = ", ".join(f"{label} {rows:,}" for label, rows in list(rows_of.items())[:12])
        findings.append(ok(part, f"labels: {shown}{', ...' if len(rows_of) > 12 else ''}"))
    return findings


def _unknown_labels(
    part: str,
    unknown: Mapping[str, int],
    *,
    column: str,
    labels: Sequence[str],
    uri: str,
    given: bool,
) -> Finding:
    """What is wrong, with the rows of each label, those of most rows first."""
    most = sorted(unknown, key=lambda label: (-unknown[label], label))
    shown = ", ".join(f"{label!r} ({unknown[label]:,})" for label in most[:_MOST_SHOWN])
    more = f" and {len(most) - _MOST_SHOWN} others" if len(most) > _MOST_SHOWN else ""
    rows = sum(unknown.values())
    allowed = (
        f"none of the positions 0 to {len(labels) - 1} in task.labels"
        if given
        else f"none of {_listed(labels)}"
    )
    near = {
        label: found[0]
        for label in most
        if (found := difflib.get_close_matches(label, labels, n=1, cutoff=0.7))
    }
    if given:
        hint = f"task.labels needs {max(map(int, most)) + 1} labels for these numbers"
    elif near:
        pairs = "; ".join(f"{label!r} is near {near[label]!r}" for label in list(near)[:3])
        hint = f"{pairs}: correct task.labels, or those rows, and prepare them again"
    else:
        hint = f"add {_listed(most)} to task.labels, or leave such rows out when you prepare them"
    return problem(
        part,
        f"{rows:,} {'row has' if rows == 1 else 'rows have'} a label in column {column} of {uri} "
        f"that is {allowed}: {shown}{more}",
        hint,
    )


def _listed(labels: Sequence[str]) -> str:
    shown = ", ".join(labels[:_MOST_SHOWN])
    return shown + (f" and {len(labels) - _MOST_SHOWN} others" if len(labels) > _MOST_SHOWN else "")
