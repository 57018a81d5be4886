"""The selection methods, one file each: its formula and source, its options, its class. The table is at the end.

A new method is one file in this folder and one line in the table. Its options become flags of the command line and of
``ntkjax select --method NAME --help``, and the study, the forecast and the documentation know it.
"""

from __future__ import annotations

from typing import Any

from ntkjax.selection.base import Selector
from ntkjax.selection.options import Options
from ntkjax.selection.tables import load_table

TABLE = {
    "ntk": "ntk.NtkSelector",
    "gradient-cosine": "gradient_cosine.GradientCosineSelector",
    "influence": "influence.InfluenceSelector",
    "less": "less.LessSelector",
    "trak": "trak.TrakSelector",
    "g2is": "g2is.G2isSelector",
    "embedding": "embedding.EmbeddingSelector",
    "perplexity": "perplexity.PerplexitySelector",
    "ifd": "ifd.IfdSelector",
    "loss-drop": "loss_drop.LossDropSelector",
    "for-value": "for_value.ForValueSelector",
    "random": "random.RandomSelector",
    "random-from-stage-1": "random_from_stage_1.RandomFromStage1Selector",
    "length": "length.LengthSelector",
    "length-matched": "length_matched.LengthMatchedSelector",
    "dsir": "dsir.DsirSelector",
    "rds": "rds.RdsSelector",
    "betr": "betr.BetrSelector",
    "tsds": "tsds.TsdsSelector",
    "euds": "euds.EudsSelector",
    "quad": "quad.QuadSelector",
    "gais": "gais.GaisSelector",
    "parts": "parts.PartsSelector",
}
"""Name of the method, as ``--method`` takes it: module in this folder and class."""


METHODS: dict[str, type[Any]] = load_table(__name__, TABLE)
"""Name of the method: its class, a frozen dataclass of its options that is called with a ``SelectionProblem``."""


def option_classes(selector: type) -> list[type[Options]]:
    """The dataclasses that hold the options of a method, most derived first: its bases that are no selectors."""
    return [base for base in selector.__mro__ if issubclass(base, Options) and not issubclass(base, Selector)]


def all_option_classes() -> list[type[Options]]:
    """Those of all methods, in the order of the table, without those that others among them inherit from."""
    classes = dict.fromkeys(cls for selector in METHODS.values() for cls in option_classes(selector))
    inherited = {base for cls in classes for base in cls.__mro__[1:]}
    return [cls for cls in classes if cls not in inherited]
