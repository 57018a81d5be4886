"""Plots of kernels: small PNGs with labelled axes that cope with what is not known."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from ntkjax.report import kernels

RNG = np.random.default_rng(0)
FEATURES = RNG.normal(size=(30, 5))
GRAM = FEATURES @ FEATURES.T
NAN = float("nan")
ROWS = [
    {"approximation": "spectral:16", "group": "LoRA", "value": 0.9, "low": 0.8, "high": 0.95, "sd": 0.01},
    {"approximation": "spectral:16", "group": "all parameters", "value": 0.7, "low": NAN, "high": NAN, "sd": NAN},
    {"approximation": "loss", "group": "LoRA", "value": -0.1, "low": -0.3, "high": 0.2, "sd": None},
]
CURVES = {"spectral": [(1, 0.5, 0.1), (2, 0.6, None), (4, 0.9, NAN)], "nothing": []}
DRAW = {
    "approximations": lambda: kernels.approximations(ROWS, label="Spearman (1)"),
    "sizes": lambda: kernels.against_size(CURVES, xlabel="outputs (passes)", ylabel="CKA (1)"),
    "images": lambda: kernels.kernel_images({"trace": GRAM, "loss": -GRAM, "zero": 0 * GRAM}, domain=8),
    "scores": lambda: kernels.score_pairs(GRAM[0], {"a": GRAM[1], "constant": np.ones(30)}, label="trace"),
    "cosines": lambda: kernels.cosine_histogram({"LoRA": np.arange(100), "empty": np.zeros(100)}, means={"LoRA": 0.3}),
}


@pytest.mark.parametrize("name", DRAW)
def test_a_plot_is_a_small_png(name):
    png = DRAW[name]()
    image = Image.open(io.BytesIO(png))
    assert image.format == "PNG" and len(png) < 80_000
    assert len(np.unique(np.asarray(image))) > 1, "the picture is blank"
    assert DRAW[name]() == png, "the same data gives another picture"


def test_values_and_intervals_stand_where_the_numbers_are(monkeypatch):
    seen, png = [], kernels._png
    monkeypatch.setattr(kernels, "_png", lambda figure, *rest: seen.extend(figure.axes) or png(figure, *rest))
    DRAW["approximations"]()
    lines = [[float(x) for x in line.get_xdata()] for line in seen[0].lines]
    assert [0.8, 0.95] in lines and [0.9] in lines and [0.7] in lines and [-0.3, 0.2] in lines
    assert [label.get_text() for label in seen[0].get_yticklabels()] == ["spectral:16", "loss"]
    DRAW["cosines"]()
    density = seen[1].patches[0].get_data().values
    assert density.sum() * 0.02 == pytest.approx(1)
    assert "(" in seen[1].get_xlabel() and "(" in seen[1].get_ylabel()
