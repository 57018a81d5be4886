"""Plots as PNG bytes, from plain lists: object-oriented matplotlib, so no global state and no display.

Every plot has labelled axes with units, colours that colour-blind readers can tell apart (Okabe and Ito), and
is small enough to be embedded in a page.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

BLUE, ORANGE, GREEN, PINK = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
SKY, AMBER, GREY, INK = "#56B4E9", "#E69F00", "#8A8F98", "#22262B"
COLOURS = (BLUE, ORANGE, GREEN, PINK, SKY, AMBER, GREY, INK)
_DASHES = ("-", "--", "-.", ":")
_HEXBIN_ABOVE = 3_000  # points; more than that hide each other in a scatter plot


def accuracy_by_method(
    rows: Sequence[Mapping[str, Any]],
    *,
    label: str = "accuracy (%)",
    percent: bool = True,
    highlight: Sequence[str] = (),
    chance: float | None = None,
) -> bytes:
    """One line per method: mean, interval and a dot per seed.

    Args:
      rows: dicts with ``method``, ``mean`` and, where known, ``low``, ``high`` (the interval) and ``seeds``
        (one value per seed).
      label: the axis, with its unit.
      percent: values are fractions, to be shown times 100.
      highlight: methods drawn in the accent colour.
      chance: a dashed line, e.g. the accuracy of guessing.
    """
    scale = 100.0 if percent else 1.0
    figure, axes = _figure(0.9 + 0.42 * len(rows))
    for height, row in enumerate(rows):
        colour = ORANGE if row["method"] in highlight else BLUE
        seeds = [scale * value for value in row.get("seeds") or []]
        if row.get("low") is not None and row.get("high") is not None:
            ends = [scale * row["low"], scale * row["high"]]
            axes.plot(ends, [height, height], color=colour, linewidth=5, alpha=0.28, solid_capstyle="round")
        axes.plot(seeds, [height] * len(seeds), "o", color=colour, markersize=4, alpha=0.55, markeredgewidth=0)
        axes.plot([scale * row["mean"]], [height], "|", color=colour, markersize=17, markeredgewidth=2.5)
    if chance is not None:
        axes.axvline(scale * chance, color=GREY, linestyle="--", linewidth=1)
        axes.annotate("chance", (scale * chance, 1), xycoords=("data", "axes fraction"), xytext=(3, -9),
                      textcoords="offset points", fontsize=8, color=GREY)  # fmt: skip
    axes.set_yticks(range(len(rows)), [str(row["method"]) for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel(label)
    axes.grid(axis="y", visible=False)
    return _png(figure)


def score_distribution(
    scores: Sequence[float] | np.ndarray,
    selected: Sequence[bool] | np.ndarray,
    *,
    label: str = "score (dimensionless)",
    bins: int = 60,
) -> bytes:
    """Histogram of the scores [N] of the whole pool, with the selected ones (bool [N]) in front.

    Scores that are not finite cannot be drawn; the title counts them.
    """
    scores, selected = np.asarray(scores, dtype=np.float64), np.asarray(selected, dtype=bool)
    drawn = np.isfinite(scores)
    edges = np.histogram_bin_edges(scores[drawn], bins=bins)
    figure, axes = _figure(3.0)
    axes.hist(scores[drawn], bins=edges, color=SKY, label=f"offered ({len(scores):,})")
    axes.hist(scores[drawn & selected], bins=edges, color=ORANGE, label=f"chosen ({int(selected.sum()):,})")
    axes.set_yscale("symlog", linthresh=10)
    axes.set_xlabel(label)
    axes.set_ylabel("examples (log scale)")
    _count_left_out(axes, drawn)
    axes.legend(frameon=False, fontsize=9, loc="upper right")
    return _png(figure)


def score_against_length(
    scores: Sequence[float] | np.ndarray,
    lengths: Sequence[int] | np.ndarray,
    selected: Sequence[bool] | np.ndarray,
    *,
    label: str = "score (dimensionless)",
) -> bytes:
    """Scores [N] against response lengths [N] in tokens: points, or hexagons of log density for a large pool.

    The chosen examples lie on top (at most 3,000 of them are drawn, evenly spaced; the legend says so).
    Scores that are not finite cannot be drawn; the title counts them.
    """
    scores, lengths = np.asarray(scores, dtype=np.float64), np.asarray(lengths)
    drawn = np.isfinite(scores)
    chosen = np.flatnonzero(np.asarray(selected, dtype=bool))
    shown = chosen[np.linspace(0, len(chosen) - 1, min(len(chosen), _HEXBIN_ABOVE)).astype(int)]
    count = f"{len(chosen):,}" if len(shown) == len(chosen) else f"{len(shown):,} of {len(chosen):,} shown"
    figure, axes = _figure(3.4)
    logarithmic = len(lengths) > 0 and lengths.min() > 0 and lengths.max() > 20 * np.median(lengths)
    if len(scores) > _HEXBIN_ABOVE:
        axes.hexbin(lengths[drawn], scores[drawn], gridsize=55, bins="log", cmap=_greys(), mincnt=1,
                    linewidths=0, xscale="log" if logarithmic else "linear")  # fmt: skip
        axes.plot([], [], "h", color=GREY, label=f"offered ({len(scores):,}; darker is denser)")
    else:
        axes.plot(lengths, scores, "o", color=GREY, markersize=3, alpha=0.4, markeredgewidth=0,
                  label=f"offered ({len(scores):,})")  # fmt: skip
        axes.set_xscale("log" if logarithmic else "linear")
    axes.plot(lengths[shown], scores[shown], "o", color=ORANGE, markersize=2.5, alpha=0.45, markeredgewidth=0,
              label=f"chosen ({count})")  # fmt: skip
    _count_left_out(axes, drawn)
    axes.set_xlabel("response length (tokens)")
    axes.set_ylabel(label)
    # "best" would weigh every point against every place.
    axes.legend(frameon=False, fontsize=9, loc="upper right")
    return _png(figure)


def sources(offered: Mapping[str, int], chosen: Mapping[str, int], *, most: int = 12) -> bytes:
    """Share of each source in the pool and in the selection, in percent, large shares in either first.

    Args:
      offered: examples of each source in the pool.
      chosen: examples of each source in the selection.
      most: sources with a bar of their own; the rest share one, "other (k sources)".
    """
    totals = max(1, sum(offered.values())), max(1, sum(chosen.values()))
    larger = lambda name: max(offered.get(name, 0) / totals[0], chosen.get(name, 0) / totals[1])
    names = sorted({*offered, *chosen}, key=lambda name: (-larger(name), name))
    rest = names[most:]
    rows = [(name, offered.get(name, 0), chosen.get(name, 0)) for name in names[:most]]
    if rest:
        left = sum(offered.get(name, 0) for name in rest), sum(chosen.get(name, 0) for name in rest)
        rows.append((f"other ({len(rest)} sources)", *left))
    figure, axes = _figure(0.9 + 0.36 * len(rows))
    for height, (_, of, ch) in enumerate(rows):
        axes.barh(height - 0.19, 100 * of / totals[0], height=0.34, color=SKY)
        axes.barh(height + 0.19, 100 * ch / totals[1], height=0.34, color=ORANGE)
    axes.barh([0], [0], color=SKY, label=f"of the pool ({totals[0]:,})")
    axes.barh([0], [0], color=ORANGE, label=f"of the selection ({totals[1]:,})")
    axes.set_yticks(range(len(rows)), [_shorten(name) for name, *_ in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel("share (%)")
    axes.grid(axis="y", visible=False)
    axes.legend(frameon=False, fontsize=9)
    return _png(figure)


def training_curves(
    curves: Mapping[str, Sequence[Sequence[float | int]]],
    *,
    xlabel: str = "step (optimiser updates)",
    ylabel: str = "training loss (nats per token)",
) -> bytes:
    """One line per arm through its (step, value) points; colour and dashes both tell the arms apart."""
    figure, axes = _figure(3.2)
    for number, (name, points) in enumerate(curves.items()):
        axes.plot(
            [point[0] for point in points],
            [point[1] for point in points],
            label=_shorten(name),
            color=COLOURS[number % len(COLOURS)],
            linestyle=_DASHES[number % len(_DASHES)],
            linewidth=1.6,
            marker="o" if len(points) < 12 else None,
            markersize=3,
        )
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    if curves:
        axes.legend(frameon=False, fontsize=9)
    return _png(figure)


def _count_left_out(axes: Any, drawn: np.ndarray) -> None:
    if not drawn.all():
        axes.set_title(f"{int((~drawn).sum()):,} scores are not finite and not drawn", fontsize=9)


def _greys() -> Any:
    """Light to dark, where the lightest can still be told from the white page."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("greys", ["#D3D8DE", INK])


def _shorten(name: str, length: int = 32) -> str:
    return name if len(name) <= length else name[: length - 1] + "…"


def _figure(height: float) -> tuple[Any, Any]:
    """A figure 5.8 inches wide with one styled axes."""
    from matplotlib.figure import Figure  # here, so that commands without plots start fast

    figure = Figure(figsize=(5.8, height), dpi=150, layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#B8BEC6")
    axes.tick_params(color="#B8BEC6", labelcolor=INK, labelsize=9)
    axes.xaxis.label.set(color=INK, fontsize=10)
    axes.yaxis.label.set(color=INK, fontsize=10)
    axes.grid(color="#E6E9ED", linewidth=0.8)
    axes.set_axisbelow(True)
    return figure, axes


def _png(figure: Any, colours: int = 64) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    # Few colours are in a plot: a palette makes the file a third of the size, and no eye sees it.
    image = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB").quantize(colours, dither=Image.Dither.NONE)
    out = io.BytesIO()
    image.save(out, format="PNG", optimize=True)
    return out.getvalue()
