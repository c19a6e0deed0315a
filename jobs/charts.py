"""The curves of the report as inline SVG.

matplotlib draws with colors that stand for names; they become CSS variables of the page, so that
one picture serves light and dark. Text stays text and takes the page's font.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TEXT, MUTED, GRID, CARD = "#000101", "#000102", "#000103", "#000104"
FIRST, SECOND, THIRD = "#000105", "#000106", "#000107"
_VARIABLES = {
    TEXT: "--text",
    MUTED: "--muted",
    GRID: "--line",
    CARD: "--card",
    FIRST: "--first",
    SECOND: "--second",
    THIRD: "--third",
}
_TICK_STEPS = (1, 2, 2.5, 5, 10)
_INCHES = (5.0, 2.75)
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
    figure, axes = _axes("step")
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
    _legend(axes)
    return _to_svg(figure, "loss")


def _learning_rate(training: Sequence[dict[str, Any]]) -> str | None:
    steps, rates = _points(training, "step", "learning_rate")
    if not steps:
        return None
    figure, axes = _axes("step")
    axes.plot(steps, rates, color=THIRD, linewidth=2)
    axes.fill_between(steps, rates, color=THIRD, alpha=0.1, linewidth=0)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.2g}")
    return _to_svg(figure, "learning-rate")


def _evaluations(evaluations: Sequence[dict[str, Any]], best: int | None) -> str | None:
    validation = [
        {"step": e["step"], **e["metrics"]} for e in evaluations if e.get("split") == "validation"
    ]
    figure, axes = _axes("step")
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
    _legend(axes)
    return _to_svg(figure, "evaluations")


def _throughput(lines: Sequence[dict[str, Any]]) -> str | None:
    if not lines:
        return None
    began = min(float(line["time"]) for line in lines)
    figure, axes = _axes("minutes")
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
        _legend(axes)
    return _to_svg(figure, "throughput")


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


def _axes(x_label: str) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=_INCHES, layout="constrained")
    figure.patch.set_visible(False)
    axes = figure.add_subplot()
    axes.patch.set_visible(False)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(GRID)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=MUTED, labelsize=9, length=0, pad=5)
    axes.set_xlabel(x_label, color=MUTED, fontsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=_TICK_STEPS, integer=x_label == "step"))
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=_TICK_STEPS))
    axes.margins(x=0.02, y=0.08)
    return figure, axes


def _legend(axes: Axes) -> None:
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(0, 1.0),
        ncols=3,
        frameon=False,
        labelcolor=TEXT,
        fontsize=9,
        borderpad=0,
        borderaxespad=0.3,
        handlelength=1.6,
        columnspacing=1.4,
    )


def _to_svg(figure: Figure, name: str) -> str:
    """The figure as an `<svg>` element without fixed size, fonts, dates or ids of groups."""
    import matplotlib as mpl

    buffer = io.StringIO()
    # The salt keeps the ids of two charts of a page apart, and the same from run to run.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r'<g id="[^"]*">', "<g>", svg)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r"\n\s*", "\n", svg)
    for color, variable in _VARIABLES.items():
        svg = svg.replace(color, f"var({variable})")
    return svg.replace("<svg", f'<svg role="img" aria-label="{name}"', 1)
