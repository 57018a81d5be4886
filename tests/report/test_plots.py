"""Plots: small PNGs whose axes say what they show, drawn without touching matplotlib's global state."""

from __future__ import annotations

import io
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from ntkjax.report import plots

RNG = np.random.default_rng(0)
SCORES = RNG.gamma(4.0, size=20_000)
LENGTHS = RNG.lognormal(4.0, 0.6, size=20_000).astype(np.int64) + 1
SELECTED = np.sort(SCORES)[-1_500] < SCORES
METHODS = [
    {"method": "base", "mean": 0.31},
    {"method": "random", "mean": 0.44, "low": 0.42, "high": 0.46, "seeds": [0.43, 0.45]},
    {"method": "ntk", "mean": 0.46, "low": None, "high": None, "seeds": []},
]
DRAW = {
    "accuracy": lambda: plots.accuracy_by_method(METHODS, highlight=("ntk",), chance=0.25),
    "distribution": lambda: plots.score_distribution(SCORES, SELECTED),
    "length, many": lambda: plots.score_against_length(SCORES, LENGTHS, SELECTED),
    "length, few": lambda: plots.score_against_length(SCORES[:99], LENGTHS[:99], SELECTED[:99]),
    "sources": lambda: plots.sources({f"s{i}": i + 1 for i in range(30)}, {"s3": 2, "not offered": 1}),
    "curves": lambda: plots.training_curves({f"arm {i}": [(s, 1 / (s + i + 1)) for s in range(40)] for i in range(9)}),
    "no curves": lambda: plots.training_curves({}),
    "nothing": lambda: plots.score_against_length([], [], []),
}


@pytest.fixture
def axes(monkeypatch):
    """The axes of every figure drawn in the test."""
    seen, png = [], plots._png
    monkeypatch.setattr(plots, "_png", lambda figure: seen.extend(figure.axes) or png(figure))
    return seen


@pytest.mark.parametrize("name", DRAW)
def test_a_plot_is_a_small_png_with_labelled_axes(name, axes):
    png = DRAW[name]()
    image = Image.open(io.BytesIO(png))
    assert image.format == "PNG" and image.width == 870 and len(png) < 80_000
    assert len(np.unique(np.asarray(image))) > 1, "the picture is blank"
    for axis in axes:
        assert "(" in axis.get_xlabel(), "the unit is missing"
        named_rows = [tick.get_text() for tick in axis.get_yticklabels()]
        assert "(" in axis.get_ylabel() or named_rows[0] in ("base", "s3")
    assert DRAW[name]() == png, "the same data gives another picture"


def test_what_cannot_be_drawn_is_counted(axes):
    plots.score_distribution([1.0, 2.0, np.nan, np.inf], [True, False, False, True])
    assert axes[0].get_title() == "2 scores are not finite and not drawn"
    labels = [text.get_text() for text in axes[0].get_legend().get_texts()]
    assert labels == ["offered (4)", "chosen (2)"]
    plots.score_distribution([np.nan], [False])
    assert axes[1].get_title() == "1 scores are not finite and not drawn"
    plots.score_against_length([1.0, np.nan], [3, 4], [True, False])
    assert axes[2].get_title() == "1 scores are not finite and not drawn"


def test_bars_add_up_to_the_whole(axes):
    plots.sources({f"s{i}": i + 1 for i in range(30)}, {"s3": 2, "s29": 6}, most=5)
    bars = [patch.get_width() for patch in axes[0].patches]
    assert axes[0].get_yticklabels()[-1].get_text() == "other (25 sources)"
    assert sum(bars) == pytest.approx(200.0), "100 % of the pool and 100 % of the selection"


def test_dots_and_intervals_stand_where_the_numbers_are(axes):
    plots.accuracy_by_method(METHODS)
    lines = [(line.get_marker(), [float(x) for x in line.get_xdata()]) for line in axes[0].lines]
    assert ("None", [42.0, 46.0]) in lines
    assert ("o", [43.0, 45.0]) in lines
    assert ("|", [31.0]) in lines and ("|", [44.0]) in lines


def test_drawing_leaves_no_global_state():
    script = (
        "import sys\n"
        "from ntkjax.report import plots\n"
        "assert 'matplotlib' not in sys.modules\n"
        "plots.training_curves({'a': [(0, 1.0), (1, 0.5)]})\n"
        "assert 'matplotlib.pyplot' not in sys.modules and 'jax' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=plots.__file__.rsplit("/ntkjax/", 1)[0])
