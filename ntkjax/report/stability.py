"""Curves along fine-tuning: one small panel a measure, one line an arm, mean and spread over seeds."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from ntkjax.report.plots import _DASHES, COLOURS, INK, _png, _shorten

Points = Sequence[tuple[float | int, float | int, float | int | None]]
"""(epoch, mean, standard deviation or None) in order."""


@dataclasses.dataclass(frozen=True)
class Panel:
    """One measure.

    Attributes:
      title: what it is; ``label``: its axis, with the unit.
      lines: arm -> points; logarithmic: whether the axis is.
      limits: of the axis, None where matplotlib chooses.
    """

    title: str
    label: str
    lines: Mapping[str, Points]
    logarithmic: bool = False
    limits: tuple[float | int | None, float | int | None] = (None, None)


def over_epochs(panels: Sequence[Panel], *, columns: int = 3) -> bytes:
    """The panels as one PNG, ``columns`` wide, with one legend; bands are one standard deviation over seeds."""
    from matplotlib.figure import Figure  # here, so that commands without plots start fast

    rows = math.ceil(len(panels) / columns)
    arms = list(dict.fromkeys(arm for panel in panels for arm in panel.lines))
    figure = Figure(figsize=(2.75 * columns, 2.25 * rows + 0.5), dpi=120, layout="constrained", facecolor="white")
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, panel in zip(grid, panels):
        _draw(axes, panel, arms)
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    handles = [grid[0].plot([], [], **_style(number), label=_shorten(arm))[0] for number, arm in enumerate(arms)]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(3, len(arms)), frameon=False, fontsize=8)
    return _png(figure)


def _style(number: int) -> dict[str, Any]:
    return {"color": COLOURS[number % len(COLOURS)], "linestyle": _DASHES[number % len(_DASHES)], "linewidth": 1.5}


def _draw(axes: Any, panel: Panel, arms: Sequence[str]) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(which="both", color="#B8BEC6", labelcolor=INK, labelsize=8)
    axes.grid(color="#E6E9ED", linewidth=0.8)
    axes.set_axisbelow(True)
    for arm, points in panel.lines.items():
        style = _style(arms.index(arm))
        epochs, means = [point[0] for point in points], [point[1] for point in points]
        axes.plot(epochs, means, marker="o", markersize=2.5, **style)
        spread = [point[2] or 0 for point in points]
        low, high = ([mean + sign * sd for mean, sd in zip(means, spread)] for sign in (-1, 1))
        if not panel.logarithmic or min(low, default=1) > 0:
            axes.fill_between(epochs, low, high, color=style["color"], alpha=0.18, linewidth=0)
    if panel.logarithmic:
        axes.set_yscale("log")
    axes.set_ylim(*panel.limits)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title(panel.title, fontsize=9, color=INK)
    axes.set_xlabel("epoch", fontsize=8, color=INK)
    axes.set_ylabel(panel.label, fontsize=8, color=INK)
