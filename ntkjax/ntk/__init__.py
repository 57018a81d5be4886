"""Tangent kernels of any JAX function ``F(params, batch) -> [B]``: scores, features, sketches, agreement."""

from ntkjax.ntk.exact import centred_trace_ntk, empirical_ntk, logits, mean_trace_ntk, trace_ntk
from ntkjax.ntk.features import gradient_features, mean_features, per_example_gradients, squared_norms
from ntkjax.ntk.kernel import Kernel, kernel_diagonal, kernel_matrix
from ntkjax.ntk.kernels import KernelFunctions, KernelSpec, build, parse
from ntkjax.ntk.kronecker import KroneckerSketch, ProbedOutput
from ntkjax.ntk.linearise import linearisation_error, linearise
from ntkjax.ntk.metrics import (
    bootstrap_interval,
    cka,
    cos_frobenius,
    frobenius_error,
    kendall,
    matrix_scores,
    participation_ratio,
    pearson,
    spearman,
    top_n_overlap,
)
from ntkjax.ntk.outputs import directions, probe, sum_logits
from ntkjax.ntk.regression import choose_ridge, fit_kernel_regression, output_kernels, ridge_grid
from ntkjax.ntk.rows import NonFiniteError, Pass
from ntkjax.ntk.scores import (
    Direction,
    ForwardScorer,
    KernelScores,
    Scorer,
    SketchScorer,
    directional_derivatives,
    directional_scores,
    kernel_scores,
    mean_direction,
    mean_gradient,
    scores_along,
    scores_by_position,
)
from ntkjax.ntk.sketch import IdentitySketch, RademacherSketch, Sketch
from ntkjax.ntk.sparse import SparseSketch
from ntkjax.ntk.stability import collinearity, kernel_stability

__all__ = [
    "Direction",
    "ForwardScorer",
    "IdentitySketch",
    "Kernel",
    "KernelFunctions",
    "KernelScores",
    "KernelSpec",
    "KroneckerSketch",
    "NonFiniteError",
    "Pass",
    "ProbedOutput",
    "RademacherSketch",
    "Scorer",
    "Sketch",
    "SketchScorer",
    "SparseSketch",
    "bootstrap_interval",
    "build",
    "centred_trace_ntk",
    "choose_ridge",
    "cka",
    "collinearity",
    "cos_frobenius",
    "directional_derivatives",
    "directional_scores",
    "directions",
    "empirical_ntk",
    "fit_kernel_regression",
    "frobenius_error",
    "gradient_features",
    "kendall",
    "kernel_diagonal",
    "kernel_matrix",
    "kernel_scores",
    "kernel_stability",
    "linearisation_error",
    "linearise",
    "logits",
    "matrix_scores",
    "mean_direction",
    "mean_features",
    "mean_gradient",
    "mean_trace_ntk",
    "output_kernels",
    "parse",
    "participation_ratio",
    "pearson",
    "per_example_gradients",
    "probe",
    "ridge_grid",
    "scores_along",
    "scores_by_position",
    "spearman",
    "squared_norms",
    "sum_logits",
    "top_n_overlap",
    "trace_ntk",
]
