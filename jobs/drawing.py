"""How the charts of reports are drawn: inline SVG by matplotlib, in the colors of the page.

matplotlib draws with colors that stand for names; they become CSS variables of the page, so that
one picture serves light and dark. Text stays text and takes the page's font.
"""

from __future__ import annotations

import io
import re
from typing import TYPE_CHECKING

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


def new_axes(
    x_label: str, *, inches: tuple[float, float] = _INCHES, integer: bool = False
) -> tuple[Figure, Axes]:
    """A figure and its axes, with horizontal lines alone; `integer`: whole numbers along x."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=inches, layout="constrained")
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
    axes.xaxis.set_major_locator(
        MaxNLocator(6, steps=_TICK_STEPS, integer=integer or x_label == "step")
    )
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=_TICK_STEPS))
    axes.margins(x=0.02, y=0.08)
    return figure, axes


def legend(axes: Axes) -> None:
    """What the colors mean, above the axes."""
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


def to_svg(figure: Figure, name: str) -> str:
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
