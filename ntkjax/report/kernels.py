"""Plots of kernel matrices and of their agreement."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ntkjax.report.plots import _DASHES, COLOURS, GREY, INK, _figure, _png, _shorten


def approximations(rows: Sequence[Mapping[str, Any]], *, label: str, best: float | None = 1.0) -> bytes:
    """One line per approximation: value, interval over examples (band) and standard deviation over draws (whiskers).

    Args:
      rows: dicts with ``approximation``, ``group`` (colour; one legend entry each), ``value``, ``low``, ``high`` and
        ``sd``, the last three None or NaN where not known.
      label: the axis, with its unit.
      best: a dashed line at the best possible value.
    """
    names = list(dict.fromkeys(row["approximation"] for row in rows))
    groups = list(dict.fromkeys(row["group"] for row in rows))
    figure, axes = _figure(1.0 + 0.3 * len(names))
    for row in rows:
        colour = COLOURS[groups.index(row["group"]) % len(COLOURS)]
        level = names.index(row["approximation"]) + 0.24 * (groups.index(row["group"]) - (len(groups) - 1) / 2)
        if _known(row.get("low")) and _known(row.get("high")):
            axes.plot([row["low"], row["high"]], [level] * 2, color=colour, linewidth=4, alpha=0.28,
                      solid_capstyle="round")  # fmt: skip
        spread = row["sd"] if _known(row.get("sd")) else None
        axes.errorbar([row["value"]], [level], xerr=spread, fmt="o", color=colour, markersize=4, capsize=2, linewidth=1)
    for group, colour in zip(groups, COLOURS):
        axes.plot([], [], "o", color=colour, markersize=4, label=group)
    if best is not None:
        axes.axvline(best, color=GREY, linestyle="--", linewidth=1)
    axes.set_yticks(range(len(names)), [_shorten(name) for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlabel(label)
    axes.grid(axis="y", visible=False)
    if len(groups) > 1:
        axes.legend(frameon=False, fontsize=8, loc="best")
    return _png(figure)


def against_size(
    curves: Mapping[str, Sequence[tuple[float | int, float | int, float | int | None]]], *, xlabel: str, ylabel: str
) -> bytes:
    """One line per curve through its points (size, mean, standard deviation or None), sizes on a log axis."""
    figure, axes = _figure(3.2)
    for number, (name, points) in enumerate(curves.items()):
        colour = COLOURS[number % len(COLOURS)]
        x, y = [p[0] for p in points], np.asarray([p[1] for p in points])
        spread = np.asarray([p[2] if _known(p[2]) else 0.0 for p in points])
        axes.plot(x, y, color=colour, linestyle=_DASHES[number % len(_DASHES)], marker="o", markersize=3, linewidth=1.6,
                  label=_shorten(name, 40))  # fmt: skip
        if spread.any():
            axes.fill_between(x, y - spread, y + spread, color=colour, alpha=0.16, linewidth=0)
    axes.set_xscale("log", base=2)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    if curves:
        axes.legend(frameon=False, fontsize=8)
    return _png(figure)


def kernel_images(kernels: Mapping[str, np.ndarray], *, domain: int = 0) -> bytes:
    """Each matrix [n, n] as an image of K_ij / sqrt(K_ii K_jj), -1 to 1, side by side.

    Args:
      domain: the first so many examples are the domain; thin lines set them apart from the others.
    """
    from matplotlib.figure import Figure

    count = len(kernels)
    figure = Figure(figsize=(2.0 * count + 0.5, 2.4), dpi=120, layout="constrained", facecolor="white")
    axes = figure.subplots(1, count, squeeze=False)[0]
    image = None
    for axis, (name, matrix) in zip(axes, kernels.items()):
        scale = np.sqrt(np.abs(np.diag(matrix)))
        with np.errstate(divide="ignore", invalid="ignore"):
            shown = matrix / np.outer(scale, scale)
        image = axis.imshow(shown, vmin=-1, vmax=1, cmap="RdBu_r", interpolation="nearest")
        if domain:
            axis.axhline(domain - 0.5, color=INK, linewidth=0.6)
            axis.axvline(domain - 0.5, color=INK, linewidth=0.6)
        axis.set_title(name, fontsize=9, color=INK)
        axis.set_xticks([])
        axis.set_yticks([])
        axis.set_xlabel("example (domain first)" if domain else "example", fontsize=8, color=INK)
    if image is not None:
        bar = figure.colorbar(image, ax=list(axes), shrink=0.8, aspect=18)
        bar.ax.tick_params(labelsize=7)
        bar.set_label("cosine (1)", fontsize=8)
    return _png(figure, 256)


def score_pairs(reference: np.ndarray, scores: Mapping[str, np.ndarray], *, label: str) -> bytes:
    """Scores of the same examples by each kernel against those by a reference: one panel each, standardised.

    Args:
      reference: [p]; ``label``: what it is, for the axis.
      scores: kernel -> [p].
    """
    from matplotlib.figure import Figure

    count = len(scores)
    figure = Figure(figsize=(2.1 * count + 0.3, 2.4), dpi=120, layout="constrained", facecolor="white")
    axes = figure.subplots(1, count, squeeze=False, sharex=True, sharey=True)[0]
    for axis, (name, values) in zip(axes, scores.items()):
        axis.plot(_standard(reference), _standard(values), "o", color=COLOURS[0], markersize=3, alpha=0.7,
                  markeredgewidth=0)  # fmt: skip
        axis.set_title(name, fontsize=9, color=INK)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=7, labelcolor=INK, color="#B8BEC6")
        axis.grid(color="#E6E9ED", linewidth=0.8)
        axis.set_axisbelow(True)
        axis.set_xlabel(f"{label} (sd)", fontsize=8, color=INK)
    axes[0].set_ylabel("this kernel (sd)", fontsize=8, color=INK)
    return _png(figure)


def cosine_histogram(counts: Mapping[str, np.ndarray], *, means: Mapping[str, float] | None = None) -> bytes:
    """Distributions over [-1, 1], equal bins, each scaled to density; dashed lines at the means.

    Args:
      counts: name -> how many cosines fall into each bin.
      means: name -> mean cosine.
    """
    figure, axes = _figure(3.0)
    for number, (name, values) in enumerate(counts.items()):
        values = np.asarray(values, np.float64)
        edges = np.linspace(-1, 1, len(values) + 1)
        density = values / max(values.sum(), 1) / np.diff(edges)
        colour = COLOURS[number % len(COLOURS)]
        axes.stairs(density, edges, color=colour, linewidth=1.5, label=_shorten(name, 40))
        if means and _known(means.get(name)):
            axes.axvline(means[name], color=colour, linestyle="--", linewidth=1)
    axes.axvline(0, color=GREY, linewidth=1)
    axes.set_xlabel("cosine between the gradients of two outputs (1)")
    axes.set_ylabel("density (pairs of outputs)")
    if counts:
        axes.legend(frameon=False, fontsize=8)
    return _png(figure)


def _known(value: Any) -> bool:
    return value is not None and bool(np.isfinite(value))


def _standard(values: np.ndarray) -> np.ndarray:
    values = np.asarray(values, np.float64)
    spread = values.std()
    return (values - values.mean()) / (spread if spread > 0 else 1.0)
