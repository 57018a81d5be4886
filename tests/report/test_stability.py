"""Curves along fine-tuning: every arm in the legend, points where they belong, files small enough to keep."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from ntkjax.report.stability import Panel, over_epochs


def lines(arms: int, start: float = 1.0, sd: float | None = 0.01):
    return {f"arm {i}": [(epoch, start - 0.01 * i * epoch, sd) for epoch in (0, 1, 5, 20)] for i in range(arms)}


def drawn(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def test_panels_are_small_pngs_and_show_every_arm():
    panels = [Panel(f"measure {i}", "units", lines(7)) for i in range(5)]  # a grid of six, one place left empty
    png = over_epochs(panels)
    assert png.startswith(b"\x89PNG") and len(png) < 100_000
    few = drawn(over_epochs([Panel(p.title, p.label, dict(list(p.lines.items())[:1])) for p in panels]))
    coloured = lambda image: int(np.sum(np.ptp(image.astype(int), axis=2) > 60))
    assert coloured(drawn(png)) > 3 * coloured(few) > 0


def test_spread_is_drawn_and_a_band_below_zero_leaves_a_logarithmic_axis_alone():
    plain, banded = (drawn(over_epochs([Panel("m", "u", lines(1, sd=sd))])) for sd in (None, 0.2))
    assert not np.array_equal(plain, banded)
    wide = lines(1, start=0.5, sd=0.7)
    logarithmic = over_epochs([Panel("m", "u", wide, logarithmic=True)])
    narrow = over_epochs([Panel("m", "u", lines(1, start=0.5, sd=None), logarithmic=True)])
    assert np.array_equal(drawn(logarithmic), drawn(narrow))


def test_limits_are_kept():
    free, fixed = (over_epochs([Panel("m", "u", lines(2), limits=limits)]) for limits in ((None, None), (0, 2)))
    assert not np.array_equal(drawn(free), drawn(fixed))
