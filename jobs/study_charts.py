"""The charts of a study's report."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jobs.drawing import CARD, FIRST, GRID, MUTED, SECOND, TEXT, THIRD, legend, new_axes, to_svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

Row = dict[str, Any]
Key = Mapping[str, Any]

_TRIALS_DRAWN = 800
"""Of more trials the best half of so many are drawn, and some of the rest."""
_LINES_DRAWN = 250
_BEST_SHARE = 10
"""One in so many trials counts among the best in parallel coordinates."""
_GRID_POINTS = 44
_BANDWIDTH = 0.12
"""Of the smoothed surface, in parts of an axis."""
_LEVELS = 7
_FULL = 1.0 - 1e-9
_PAPER = {"facecolor": CARD, "edgecolor": "none", "alpha": 0.85, "pad": 1.0}
"""Behind text that lines cross."""


def draw_all(study: Mapping[str, Any]) -> dict[str, str]:
    """Charts by name; a chart without data is absent. Of `scatters` there is one for each key,
    named by its path."""
    rows = _drawn(study, _TRIALS_DRAWN)
    charts: dict[str, str | None] = {
        "history": _history(study),
        "curves": _curves(study),
        "parallel": _parallel(study),
        "contour": _contour(study),
    }
    for key in study["keys"]:
        charts[f"scatter {key['path']}"] = _scatter(study, key, rows)
    return {name: svg for name, svg in charts.items() if svg is not None}


def _drawn(study: Mapping[str, Any], most: int) -> list[Row]:
    """Trials of the search with a score, the best last, so that they lie on top."""
    rows = [r for r in study["all_trials"] if r["score"] is not None and r["purpose"] == "search"]
    rows.sort(key=lambda row: (_sign(study) * row["score"], -row["trial"]))
    if len(rows) > most:
        rest, best = rows[: -most // 2], rows[-most // 2 :]
        rows = rest[:: math.ceil(len(rest) / (most // 2))] + best
    return rows


def _sign(study: Mapping[str, Any]) -> int:
    return 1 if study["mode"] == "max" else -1


def _history(study: Mapping[str, Any]) -> str | None:
    history = study["history"]
    if not history:
        return None
    figure, axes = new_axes("trial", integer=True)
    span = math.ceil(len(history) / _TRIALS_DRAWN)
    for full, color, label in (
        (False, MUTED, "not trained to the end"),
        (True, FIRST, "trained to the end"),
    ):
        own = [row for row in history[::span] if (row["fraction"] >= _FULL) is full]
        axes.scatter(
            [row["trial"] for row in own], [row["score"] for row in own], s=16, color=color,
            alpha=0.75, linewidths=0, label=label,
        )  # fmt: skip
    axes.step(
        [row["trial"] for row in history], [row["best"] for row in history], where="post",
        color=SECOND, linewidth=2, label="best so far",
    )  # fmt: skip
    _fit_scores(axes, study, [row["score"] for row in history])
    legend(axes)
    return to_svg(figure, "history")


def _curves(study: Mapping[str, Any]) -> str | None:
    curves = [curve for curve in study["curves"] if curve["points"]]
    if not curves:
        return None
    best = curves[0]["trial"]
    figure, axes = new_axes("share of the budget")
    axes.xaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    for curve in reversed(curves):
        shares, values = [p[0] for p in curve["points"]], [p[1] for p in curve["points"]]
        is_best = curve["trial"] == best
        axes.plot(
            shares, values, color=SECOND if is_best else FIRST, linewidth=2.2 if is_best else 1,
            alpha=1 if is_best else 0.4, zorder=4 if is_best else 2,
        )  # fmt: skip
        marker = {"finished": "o", "failed": "X", "stopped": "s", "paused": "s"}.get(
            curve["status"]
        )
        if marker is not None:
            axes.plot(
                shares[-1:], values[-1:], color=SECOND if is_best else FIRST, marker=marker,
                markersize=5, markerfacecolor=CARD if marker == "s" else None, zorder=5,
            )  # fmt: skip
    for marker, face, label in (("o", FIRST, "finished"), ("s", CARD, "stopped or paused")):
        axes.plot(
            [], [], color=FIRST, marker=marker, markersize=5, markerfacecolor=face, linestyle="",
            label=label,
        )  # fmt: skip
    axes.plot([], [], color=SECOND, linewidth=2.2, label=f"the best, trial {best}")
    axes.set_xlim(0, 1.03)
    _fit_scores(axes, study, [p[1] for curve in curves for p in curve["points"]])
    legend(axes)
    return to_svg(figure, "curves")


def _scatter(study: Mapping[str, Any], key: Key, rows: Sequence[Row]) -> str | None:
    own = [row for row in rows if key["path"] in row["values"]]
    if not own:
        return None
    figure, axes = new_axes(key["path"], inches=(2.8, 2.05))
    for full, color in ((False, MUTED), (True, FIRST)):
        part = [row for row in own if (row["fraction"] >= _FULL) is full]
        axes.scatter(
            [_along(key, row["values"][key["path"]], row["trial"]) for row in part],
            [row["score"] for row in part],
            s=18, color=color, alpha=0.75, linewidths=0,
        )  # fmt: skip
    best = own[-1]
    axes.scatter(
        [_along(key, best["values"][key["path"]], best["trial"])], [best["score"]], s=70,
        facecolors="none", edgecolors=SECOND, linewidths=2, zorder=5,
    )  # fmt: skip
    _set_axis(axes, key)
    _fit_scores(axes, study, [row["score"] for row in own])
    return to_svg(figure, f"scatter {key['path']}")


def _along(key: Key, value: Any, trial: int) -> float:
    """Where a value lies on its axis; choices stand side by side, their trials a little apart."""
    if "choices" not in key:
        return float(value)
    return _place(key["choices"], value) + ((trial * 0.618) % 1 - 0.5) * 0.4


def _place(choices: Sequence[Any], value: Any) -> int:
    """The choice that a value is; those of an earlier space stand behind the last."""
    same = [i for i, held in enumerate(choices) if held == value and type(held) is type(value)]
    return same[0] if same else len(choices)


def _set_axis(axes: Axes, key: Key) -> None:
    if "choices" in key:
        axes.xaxis.set_ticks(range(len(key["choices"])), [_short(c) for c in key["choices"]])
        axes.set_xlim(-0.5, len(key["choices"]) - 0.5)
    elif key["log"]:
        axes.set_xscale("log")
        _set_powers(axes, axes.xaxis)


def _set_powers(axes: Axes, along: Axis) -> None:
    """Marks of an axis that is logarithmic: powers of ten, few of them."""
    from matplotlib.ticker import LogLocator, NullFormatter

    along.set_major_locator(LogLocator(numticks=5))
    along.set_major_formatter(lambda value, _: f"{value:.0e}".replace("e-0", "e-"))
    along.set_minor_formatter(NullFormatter())
    axes.tick_params(which="minor", length=0)


def _short(value: Any) -> str:
    text = (
        {True: "true", False: "false", None: "null"}.get(value)
        if isinstance(value, bool | None)
        else None
    )
    text = text or (
        "[" + ", ".join(map(str, value)) + "]" if isinstance(value, list) else str(value)
    )
    return text if len(text) <= 14 else text[:13] + "\N{HORIZONTAL ELLIPSIS}"


def _fit_scores(axes: Axes, study: Mapping[str, Any], scores: Sequence[float]) -> None:
    """The vertical axis from the best to where nine of ten trials lie: what diverged would press
    all others into one line."""
    if len(scores) < 10:
        return
    ordered = sorted(scores, reverse=study["mode"] == "max")
    best, bound = ordered[0], ordered[int(len(ordered) * 0.9)]
    worst = ordered[-1]
    if abs(worst - best) > 2.5 * abs(bound - best) > 0:
        low, high = sorted((best, bound))
        margin = 0.08 * (high - low)
        axes.set_ylim(low - margin, high + margin)


def _parallel(study: Mapping[str, Any]) -> str | None:
    keys, rows = study["keys"], _drawn(study, _LINES_DRAWN)
    if not rows or not keys:
        return None
    figure, axes = new_axes("", inches=(10.4, 3.1))
    axes.grid(visible=False)
    axes.yaxis.set_visible(False)
    axes.spines["bottom"].set_visible(False)
    scores = [row["score"] for row in rows]
    # Too far off to be told apart from each other: they meet at the foot of the axis.
    better = sorted(scores, reverse=study["mode"] == "max")[: max(2, round(0.9 * len(scores)))]
    low, high = min(better), max(better)
    best_count = max(1, len(rows) // _BEST_SHARE)
    for number, row in enumerate(rows):
        is_best = number >= len(rows) - best_count
        places = [
            _unit(key, row["values"].get(key["path"]), key["path"] in row["values"]) for key in keys
        ]
        share = (row["score"] - low) / (high - low) if high > low else 0.5
        places.append(min(1.0, max(0.0, share)))
        axes.plot(
            range(len(places)), places, color=SECOND if is_best else FIRST,
            linewidth=1.6 if is_best else 0.9, alpha=0.95 if is_best else 0.28,
            zorder=4 if is_best else 2,
        )  # fmt: skip
    for place in range(len(keys) + 1):
        axes.axvline(place, color=GRID, linewidth=1.2, zorder=1)
    for place, key in enumerate(keys):
        for unit, text in _marks(key):
            axes.annotate(
                text, (place, unit), xytext=(5, 0), textcoords="offset points", color=TEXT,
                fontsize=8, va="center", zorder=6, bbox=_PAPER,
            )  # fmt: skip
    for unit, value in ((0.0, low), (1.0, high)):
        axes.annotate(
            f"{value:.4g}", (len(keys), unit), xytext=(5, 0), textcoords="offset points",
            color=TEXT, fontsize=8, va="center", zorder=6, bbox=_PAPER,
        )  # fmt: skip
    names = [key["name"] for key in keys] + [study["metric"]]
    axes.xaxis.set_ticks(range(len(names)), names, color=TEXT)
    axes.set_xlim(-0.1, len(keys) + 0.35)
    axes.set_ylim(-0.06, 1.06)
    return to_svg(figure, "parallel")


def _unit(key: Key, value: Any, is_active: bool) -> float:
    """The place of a value between the ends of its axis; none where the trial has no such value."""
    if not is_active:
        return math.nan
    if "choices" in key:
        count = len(key["choices"])
        return min(1.0, (_place(key["choices"], value) + 0.5) / count)
    low, high = _scaled(key, key["low"]), _scaled(key, key["high"])
    return min(1.0, max(0.0, (_scaled(key, value) - low) / (high - low))) if high > low else 0.5


def _scaled(key: Key, value: float) -> float:
    return math.log(value) if key["log"] else value


def _marks(key: Key) -> list[tuple[float, str]]:
    if "choices" in key:
        count = len(key["choices"])
        shown = key["choices"] if count <= 8 else ()
        return [((i + 0.5) / count, _short(choice)) for i, choice in enumerate(shown)]
    return [(0.0, f"{key['low']:g}"), (1.0, f"{key['high']:g}")]


def _contour(study: Mapping[str, Any]) -> str | None:
    """The comparable scores over the two keys that matter most, of those with a range: a smoothed
    surface (Nadaraya and Watson's regression) where trials are near, and the trials."""
    rows = [row for row in _drawn(study, _TRIALS_DRAWN) if row["comparable"] is not None]
    shares = study["importance"]["shares"]
    ranges = [key for key in study["keys"] if "choices" not in key]
    ranges.sort(key=lambda key: -shares.get(key["path"], 0.0))
    if len(ranges) < 2:
        return None
    x, y = ranges[:2]
    own = [row for row in rows if x["path"] in row["values"] and y["path"] in row["values"]]
    if len(own) < 4:
        return None
    figure, axes = new_axes(x["path"])
    axes.grid(visible=False)
    axes.set_ylabel(y["path"], color=MUTED, fontsize=9)
    _surface(axes, study, x, y, own)
    axes.scatter(
        [row["values"][x["path"]] for row in own], [row["values"][y["path"]] for row in own],
        s=9, color=TEXT, alpha=0.55, linewidths=0, zorder=4,
    )  # fmt: skip
    best = own[-1]
    axes.scatter(
        [best["values"][x["path"]]], [best["values"][y["path"]]], s=80, facecolors="none",
        edgecolors=SECOND, linewidths=2, zorder=5,
    )  # fmt: skip
    for key, scale, along in ((x, axes.set_xscale, axes.xaxis), (y, axes.set_yscale, axes.yaxis)):
        if key["log"]:
            scale("log")
            _set_powers(axes, along)
    return to_svg(figure, "contour")


def _surface(axes: Axes, study: Mapping[str, Any], x: Key, y: Key, rows: Sequence[Row]) -> None:
    import numpy as np

    places = np.array(
        [[_unit(key, row["values"][key["path"]], True) for key in (x, y)] for row in rows]
    )
    # Ranks: a few trials that diverged would take all levels for themselves.
    order = np.argsort(np.argsort([_sign(study) * row["comparable"] for row in rows]))
    heights = order / max(1, len(rows) - 1)
    line = np.linspace(0, 1, _GRID_POINTS)
    across, up = np.meshgrid(line, line)
    squares = (across[..., None] - places[:, 0]) ** 2 + (up[..., None] - places[:, 1]) ** 2
    weights = np.exp(-squares / (2 * _BANDWIDTH**2))
    near = weights.max(axis=-1) > math.exp(-2)
    surface = np.where(
        near, (weights * heights).sum(-1) / np.maximum(weights.sum(-1), 1e-12), np.nan
    )
    shown = np.ma.masked_invalid(surface)
    low, high = float(shown.min()), float(shown.max())
    if not high > low:
        return
    ends = [(key["low"], key["high"]) for key in (x, y)]
    xs, ys = (
        np.exp(np.log(a) + line * (np.log(b) - np.log(a))) if key["log"] else a + line * (b - a)
        for key, (a, b) in zip((x, y), ends, strict=True)
    )
    for level in np.linspace(low, high, _LEVELS + 1)[:-1]:
        axes.contourf(xs, ys, shown, levels=[level, high + 1], colors=[THIRD], alpha=0.11, zorder=1)
