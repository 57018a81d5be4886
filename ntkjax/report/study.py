"""Plots of a study of many arms: lines over sizes, results against cost, and which arms choose alike.

With twenty arms no palette keeps them apart, so lines and points carry their names, those asked for in colour and the
others in grey.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ntkjax.report.plots import COLOURS, GREY, INK, _figure, _png, _shorten

Points = Sequence[tuple[float | int, float | int, float | int | None]]
"""(size, mean, standard deviation or None)."""


def over_sizes(
    curves: Mapping[str, Points],
    *,
    xlabel: str,
    ylabel: str,
    percent: bool = False,
    highlight: Sequence[str] = (),
    logarithmic: bool = True,
) -> bytes:
    """One line per arm through (size, mean) with a band of one standard deviation where it is highlighted; sizes on a
    log axis unless ``logarithmic`` is False, names at the right end.

    Args:
      percent: values are fractions, to be shown times 100.
      highlight: arms in colour, at most as many as there are colours; the others are grey.
    """
    scale = 100.0 if percent else 1.0
    figure, axes = _figure(max(3.4, 0.22 * len(curves)))
    ends = []
    for name, points in curves.items():
        colour = _colour(name, highlight)
        x, y = [p[0] for p in points], scale * np.asarray([p[1] for p in points], np.float64)
        spread = scale * np.asarray([p[2] or 0.0 for p in points], np.float64)
        shown = name in highlight
        axes.plot(
            x, y, color=colour, marker="o", markersize=3, linewidth=1.8 if shown else 0.9, zorder=3 if shown else 2
        )
        if shown and spread.any():
            axes.fill_between(x, y - spread, y + spread, color=colour, alpha=0.14, linewidth=0)
        if len(points):
            ends.append((float(y[-1]), x[-1], name, colour))
    axes.set_xscale("log" if logarithmic else "linear")
    sizes = sorted({p[0] for points in curves.values() for p in points})
    axes.set_xticks(sizes, [f"{size:,.10g}" for size in sizes])
    axes.minorticks_off()
    _names_at_the_right(axes, ends)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    return _png(figure)


def against_cost(
    points: Sequence[Mapping[str, Any]],
    *,
    xlabel: str,
    ylabel: str,
    percent: bool = False,
    highlight: Sequence[str] = (),
) -> bytes:
    """One point per arm: its cost (log axis) and its result, with one standard deviation as a whisker.

    Args:
      points: dicts with ``arm``, ``cost``, ``mean`` and ``sd`` (or None).
    """
    from matplotlib.ticker import FuncFormatter, LogLocator

    scale = 100.0 if percent else 1.0
    figure, axes = _figure(max(3.6, 0.2 * len(points)))
    for point in points:
        colour = _colour(point["arm"], highlight)
        spread = None if point.get("sd") is None else scale * point["sd"]
        axes.errorbar([point["cost"]], [scale * point["mean"]], yerr=spread, fmt="o", color=colour, markersize=5,
                      capsize=2, linewidth=1)  # fmt: skip
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=8))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:.0e}".replace("e+0", "e").replace("e+", "e")))
    axes.minorticks_off()
    _names_at_the_right(axes, [(scale * p["mean"], p["cost"], p["arm"], _colour(p["arm"], highlight)) for p in points])
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    return _png(figure)


def heat_map(names: Sequence[str], matrix: Sequence[Sequence[float | None]], *, label: str) -> bytes:
    """A square matrix of shares in [0, 1] as an image with its numbers in the cells; None stays white."""
    from matplotlib.figure import Figure  # here, so that commands without plots start fast

    count = max(1, len(names))
    side = 2.2 + 0.42 * count
    figure = Figure(figsize=(side + 0.8, side), dpi=110, layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    values = np.asarray([[np.nan if v is None else v for v in row] for row in matrix], np.float64).reshape(count, -1)
    image = axes.imshow(values, vmin=0, vmax=1, cmap="Blues", interpolation="nearest")
    for row, line in enumerate(values):
        for column, value in enumerate(line):
            if np.isfinite(value):
                axes.text(column, row, f"{value:.2f}".removeprefix("0"), ha="center", va="center", fontsize=7,
                          color="white" if value > 0.6 else INK)  # fmt: skip
    short = [_shorten(name, 28) for name in names]
    axes.set_xticks(range(len(names)), short, rotation=90, fontsize=8)
    axes.set_yticks(range(len(names)), short, fontsize=8)
    axes.tick_params(length=0, labelcolor=INK)
    bar = figure.colorbar(image, ax=axes, shrink=0.7, aspect=20)
    bar.set_label(label, fontsize=8)
    bar.ax.tick_params(labelsize=7)
    return _png(figure)


def _colour(name: str, highlight: Sequence[str]) -> str:
    palette = [colour for colour in COLOURS if colour != GREY]
    return palette[list(highlight).index(name) % len(palette)] if name in highlight else GREY


def _names_at_the_right(axes: Any, ends: Sequence[tuple[float, float | int, str, str]]) -> None:
    """Names beside the last point of each line, moved apart where they would lie on one another, with a thin line to
    where they belong."""
    if not ends:
        return
    low, high = axes.get_ylim()
    gap = (high - low) / max(18, len(ends) + 2)
    order = sorted(range(len(ends)), key=lambda i: ends[i][0])
    places: list[float] = []
    for i in order:
        places.append(max(ends[i][0], places[-1] + gap) if places else ends[i][0])
    over = max(0.0, places[-1] - high)
    for rank in range(len(places) - 1, -1, -1):  # and back down, so that the highest name stays in the picture
        above = places[rank + 1] - gap if rank + 1 < len(places) else places[rank] - over
        places[rank] = min(places[rank], above)
    for height, i in zip(places, order):
        y, x, name, colour = ends[i]
        axes.annotate(
            _shorten(name, 30), xy=(x, y), xycoords="data", xytext=(1.02, (height - low) / (high - low)),
            textcoords="axes fraction", fontsize=7, color=colour if colour != GREY else INK, va="center",
            arrowprops={"arrowstyle": "-", "color": "#B8BEC6", "linewidth": 0.5, "shrinkA": 0, "shrinkB": 2},
        )  # fmt: skip
