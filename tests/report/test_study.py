"""Plots and page of a study: names beside what they belong to, numbers in the cells, every part optional."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from ntkjax.report import study

NAMES = [f"method {i}" for i in range(20)]
CURVES = {name: [(50, 0.4 + i / 100, 0.02), (1000, 0.5 + i / 1000, None)] for i, name in enumerate(NAMES)}
POINTS = [
    {"arm": name, "cost": 10.0 ** (4 + i / 5), "mean": 0.5, "sd": 0.01 * (i % 2) or None}
    for i, name in enumerate(NAMES)
]
MATRIX = np.eye(20).tolist()
MATRIX[0][1] = None
LABELS = {"xlabel": "N", "ylabel": "accuracy (%)"}
DRAW = {
    "sizes": lambda: study.over_sizes(CURVES, percent=True, highlight=NAMES[:3], **LABELS),
    "cost": lambda: study.against_cost(POINTS, highlight=NAMES[:1], **LABELS),
    "heat": lambda: study.heat_map(NAMES, MATRIX, label="Jaccard (1)"),
    "nothing": lambda: study.over_sizes({}, **LABELS),
}


@pytest.fixture
def axes(monkeypatch):
    """The axes of what is drawn."""
    seen, png = [], study._png
    monkeypatch.setattr(study, "_png", lambda figure, *rest: seen.extend(figure.axes) or png(figure, *rest))
    return seen


@pytest.mark.parametrize("name", DRAW)
def test_a_plot_is_a_small_png_and_the_same_every_time(name):
    png = DRAW[name]()
    assert Image.open(io.BytesIO(png)).format == "PNG" and len(png) < 150_000
    assert DRAW[name]() == png


def test_lines_carry_their_names_apart_from_one_another_and_those_asked_for_are_in_colour(axes):
    DRAW["sizes"]()
    texts = [t for t in axes[0].texts if t.get_text() in NAMES]
    assert {t.get_text() for t in texts} == set(NAMES)
    heights = np.sort([t.xyann[1] for t in texts])
    assert np.all(np.diff(heights) > 0.02) and heights[-1] <= 1.001
    colours = {line.get_color() for line in axes[0].lines}
    assert len(colours) == 4  # three, and grey
    assert [label.get_text() for label in axes[0].get_xticklabels()] == ["50", "1,000"]
    first = axes[0].lines[0]
    assert list(first.get_ydata()) == pytest.approx([40, 50])


def test_points_stand_where_cost_and_result_say(axes):
    DRAW["cost"]()
    assert axes[0].get_xscale() == "log"
    drawn = [tuple(line.get_xydata()[0]) for line in axes[0].lines if line.get_marker() == "o"]
    assert (10_000, 0.5) in drawn and len(drawn) == 20


def test_the_heat_map_shows_its_numbers(axes):
    DRAW["heat"]()
    texts = [t.get_text() for t in axes[0].texts]
    assert texts.count("1.00") == 20 and texts.count(".00") == 20 * 20 - 20 - 1  # what is not known stays empty
