"""Selection methods. A new one is a file here and a line in ``METHODS``."""

from ntkjax.selection.base import Dataset, Selection, SelectionProblem, Selector, rank, select_top
from ntkjax.selection.embedding import EmbeddingSelector
from ntkjax.selection.ntk import NtkSelector
from ntkjax.selection.random import RandomSelector

METHODS = {
    "ntk": NtkSelector,
    "embedding": EmbeddingSelector,
    "random": RandomSelector,
}
"""Name -> frozen dataclass of the method's options, callable on a ``SelectionProblem``."""

__all__ = [
    "METHODS",
    "Dataset",
    "EmbeddingSelector",
    "NtkSelector",
    "RandomSelector",
    "Selection",
    "SelectionProblem",
    "Selector",
    "rank",
    "select_top",
]
