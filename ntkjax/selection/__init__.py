"""Selection methods: the problem, what a method is, and the table of methods (`ntkjax.selection.methods`)."""

from ntkjax.selection.base import Dataset, Selection, SelectionProblem, Selector, rank, select_top
from ntkjax.selection.diagnostics import described
from ntkjax.selection.methods import METHODS

__all__ = [
    "METHODS",
    "Dataset",
    "Selection",
    "SelectionProblem",
    "Selector",
    "described",
    "rank",
    "select_top",
]
