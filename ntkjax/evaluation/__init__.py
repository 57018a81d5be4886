"""Evaluation of models: accuracy over choices, generated answers, likelihood, and tests of differences."""

from ntkjax.evaluation.choices import ChoiceScores, score_choices
from ntkjax.evaluation.comparison import compare, compare_seeds, paired_values
from ntkjax.evaluation.generation import GeneratedAnswer, generate_answers
from ntkjax.evaluation.likelihood import ResponseNLL, response_nll, summarise_nll
from ntkjax.evaluation.metrics import METRICS, Metric, values
from ntkjax.evaluation.options import Batching, EvaluationOptions, EvaluationSettings
from ntkjax.evaluation.outcomes import Outcome, read_outcomes, write_outcomes
from ntkjax.evaluation.run import Evaluation, evaluate_model
from ntkjax.evaluation.significance import (
    Interval,
    McNemar,
    bootstrap_mean,
    hierarchical_bootstrap,
    hierarchical_p,
    holm,
    mcnemar,
    paired_bootstrap,
    wilson_interval,
)
from ntkjax.evaluation.summary import summarise

__all__ = [
    "METRICS",
    "Batching",
    "ChoiceScores",
    "Evaluation",
    "EvaluationOptions",
    "EvaluationSettings",
    "GeneratedAnswer",
    "Interval",
    "McNemar",
    "Metric",
    "Outcome",
    "ResponseNLL",
    "bootstrap_mean",
    "compare",
    "compare_seeds",
    "evaluate_model",
    "generate_answers",
    "hierarchical_bootstrap",
    "hierarchical_p",
    "holm",
    "mcnemar",
    "paired_bootstrap",
    "paired_values",
    "read_outcomes",
    "response_nll",
    "score_choices",
    "summarise",
    "summarise_nll",
    "values",
    "wilson_interval",
    "write_outcomes",
]
