"""Selection methods. A new one is a file here and a line in ``METHODS``."""

from ntkjax.selection.base import Dataset, Selection, SelectionProblem, Selector, rank, select_top
from ntkjax.selection.betr import BetrSelector
from ntkjax.selection.dsir import DsirSelector
from ntkjax.selection.embedding import EmbeddingSelector
from ntkjax.selection.euds import EudsSelector
from ntkjax.selection.g2is import G2isSelector
from ntkjax.selection.gais import GaisSelector
from ntkjax.selection.gradient_cosine import GradientCosineSelector
from ntkjax.selection.influence import InfluenceSelector
from ntkjax.selection.length import LengthSelector
from ntkjax.selection.less import LessSelector
from ntkjax.selection.ntk import NtkSelector
from ntkjax.selection.quad import QuadSelector
from ntkjax.selection.random import RandomSelector
from ntkjax.selection.random_from_stage_1 import RandomFromStage1Selector
from ntkjax.selection.rds import RdsSelector
from ntkjax.selection.tsds import TsdsSelector

METHODS = {
    "ntk": NtkSelector,
    "gradient-cosine": GradientCosineSelector,
    "influence": InfluenceSelector,
    "less": LessSelector,
    "g2is": G2isSelector,
    "embedding": EmbeddingSelector,
    "random": RandomSelector,
    "random-from-stage-1": RandomFromStage1Selector,
    "length": LengthSelector,
    "dsir": DsirSelector,
    "rds": RdsSelector,
    "betr": BetrSelector,
    "tsds": TsdsSelector,
    "euds": EudsSelector,
    "quad": QuadSelector,
    "gais": GaisSelector,
}
"""Name -> frozen dataclass of the method's options, callable on a ``SelectionProblem``."""

__all__ = [
    "METHODS",
    "BetrSelector",
    "Dataset",
    "DsirSelector",
    "EmbeddingSelector",
    "EudsSelector",
    "G2isSelector",
    "GaisSelector",
    "GradientCosineSelector",
    "InfluenceSelector",
    "LengthSelector",
    "LessSelector",
    "NtkSelector",
    "QuadSelector",
    "RandomFromStage1Selector",
    "RandomSelector",
    "RdsSelector",
    "Selection",
    "SelectionProblem",
    "Selector",
    "TsdsSelector",
    "rank",
    "select_top",
]
