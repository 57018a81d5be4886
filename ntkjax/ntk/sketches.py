"""The table of sketches by name, and the one that is taken unless another is asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from ntkjax.ntk.kronecker import KroneckerSketch
from ntkjax.ntk.sketch import RademacherSketch, Sketch
from ntkjax.ntk.sparse import SparseSketch

SketchName = Literal["rademacher", "sparse", "kronecker"]
SKETCHES: dict[str, Callable[..., Sketch]] = {
    "rademacher": RademacherSketch,
    "sparse": SparseSketch,
    "kronecker": KroneckerSketch,
}
DEFAULT_SKETCH: SketchName = "sparse"
PAPER_SKETCH: SketchName = "rademacher"
