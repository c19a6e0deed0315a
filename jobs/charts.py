"""The curves of a run's report."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from jobs.drawing import CARD, FIRST, MUTED, SECOND, THIRD, legend, new_axes, to_svg

_POINTS_SHOWN = 600
"""Longer curves are drawn by means of equal spans: more points than pixels only cost bytes."""


def draw_all(report: dict[str, Any]) -> dict[str, str]:
    """Charts by name; a chart without data is absent."""
    training, evaluations = report["training"], report["evaluations"]
    restarts = [a["restored_step"] or 0 for a in report["attempts"][1:]]
    best = report["best"] and report["best"]["step"]
    charts = {
        "loss": _loss(training, evaluations, restarts),
        "learning_rate": _learning_rate(training),
        "evaluations": _evaluations(evaluations, best),
        "throughput": _throughput(report["throughput"]),
    }
    return {name: svg for name, svg in charts.items() if svg is not None}


def _loss(
    training: Sequence[dict[str, Any]],
    evaluations: Sequence[dict[str, Any]],
    restarts: Sequence[int],
) -> str | None:
    steps, losses = _points(training, "step", "loss")
    if not steps:
        return None
    figure, axes = new_axes("step")
    axes.plot(steps, losses, color=FIRST, linewidth=1, alpha=0.28)
    axes.plot(steps, _smooth(losses), color=FIRST, linewidth=2, label="training")
    validation = [e for e in evaluations if e.get("split") == "validation"]
    at, values = _points([{"step": e["step"], **e["metrics"]} for e in validation], "step", "loss")
    if at:
        axes.plot(at, values, color=SECOND, linewidth=2, marker="o", markersize=4)
        axes.plot([], [], color=SECOND, linewidth=2, marker="o", markersize=4, label="validation")
    for number, step in enumerate(restarts):
        label = "restart" if number == 0 else None
        axes.axvline(step, color=MUTED, linewidth=1, linestyle=(0, (3, 3)), label=label)
    legend(axes)
    return to_svg(figure, "loss")


def _learning_rate(training: Sequence[dict[str, Any]]) -> str | None:
    steps, rates = _points(training, "step", "learning_rate")
    if not steps:
        return None
    figure, axes = new_axes("step")
    axes.plot(steps, rates, color=THIRD, linewidth=2)
    axes.fill_between(steps, rates, color=THIRD, alpha=0.1, linewidth=0)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.2g}")
    return to_svg(figure, "learning-rate")


def _evaluations(evaluations: Sequence[dict[str, Any]], best: int | None) -> str | None:
    validation = [
        {"step": e["step"], **e["metrics"]} for e in evaluations if e.get("split") == "validation"
    ]
    figure, axes = new_axes("step")
    drawn = False
    # The dashed one last: where both nearly agree, each can be seen.
    for name, color, style in (("accuracy", FIRST, "-"), ("f1", SECOND, (0, (4, 2)))):
        steps, values = _points(validation, "step", name)
        if not steps:
            continue
        drawn = True
        label = {"f1": "macro F1"}.get(name, name)
        axes.plot(
            steps, values, color=color, linestyle=style, linewidth=2, marker="o", markersize=4,
            label=label,
        )  # fmt: skip
        if best in steps:
            axes.plot(
                [best], [values[steps.index(best)]], color=color, marker="o", markersize=9,
                markerfacecolor=CARD, markeredgewidth=2.5, zorder=5,
            )  # fmt: skip
    if not drawn:
        return None
    if best is not None:
        axes.axvline(
            best, color=MUTED, linewidth=1, linestyle=(0, (3, 3)), zorder=0, label=f"best ({best})"
        )
    legend(axes)
    return to_svg(figure, "evaluations")


def _throughput(lines: Sequence[dict[str, Any]]) -> str | None:
    if not lines:
        return None
    began = min(float(line["time"]) for line in lines)
    figure, axes = new_axes("minutes")
    for number, attempt in enumerate(sorted({line["attempt"] for line in lines})):
        own = [
            line | {"minutes": (float(line["time"]) - began) / 60}
            for line in lines
            if line["attempt"] == attempt
        ]
        minutes, rates = _points(own, "minutes", "rows_per_second")
        color = (FIRST, SECOND, THIRD)[number % 3]
        axes.plot(minutes, rates, color=color, linewidth=1.8, label=f"attempt {attempt}")
        axes.fill_between(minutes, rates, color=color, alpha=0.1, linewidth=0)
    axes.set_ylim(bottom=0)
    if len(axes.lines) > 1:
        legend(axes)
    return to_svg(figure, "throughput")


def _points(lines: Sequence[dict[str, Any]], x: str, y: str) -> tuple[list[float], list[float]]:
    """Finite points, thinned by means of equal spans."""
    pairs = [
        (line[x], line[y])
        for line in lines
        if isinstance(line.get(x), int | float)
        and isinstance(line.get(y), int | float)
        and math.isfinite(line[y])
    ]
    span = math.ceil(len(pairs) / _POINTS_SHOWN)
    if span > 1:
        groups = [pairs[i : i + span] for i in range(0, len(pairs), span)]
        pairs = [(g[-1][0], sum(p[1] for p in g) / len(g)) for g in groups]
    return [p[0] for p in pairs], [p[1] for p in pairs]


def _smooth(values: Sequence[float]) -> list[float]:
    """Centred means over about a twentieth of the curve."""
    reach = max(1, len(values) // 40)
    return [
        sum(values[max(0, i - reach) : i + reach + 1])
        / len(values[max(0, i - reach) : i + reach + 1])
        for i in range(len(values))
    ]
