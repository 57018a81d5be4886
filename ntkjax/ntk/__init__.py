"""Tangent kernels of any JAX function ``F(params, batch) -> [B]``: scores, features, sketches, agreement."""

from ntkjax.ntk.features import gradient_features, kernel_scores, mean_features, per_example_gradients
from ntkjax.ntk.metrics import bootstrap_interval, kendall, pearson, spearman, top_n_overlap
from ntkjax.ntk.outputs import directions, probe, sum_logits
from ntkjax.ntk.scores import (
    KernelScores,
    NonFiniteError,
    directional_derivatives,
    directional_scores,
    mean_gradient,
)
from ntkjax.ntk.sketch import IdentitySketch, RademacherSketch, Sketch

__all__ = [
    "IdentitySketch",
    "KernelScores",
    "NonFiniteError",
    "RademacherSketch",
    "Sketch",
    "bootstrap_interval",
    "directional_derivatives",
    "directional_scores",
    "directions",
    "gradient_features",
    "kendall",
    "kernel_scores",
    "mean_features",
    "mean_gradient",
    "pearson",
    "per_example_gradients",
    "probe",
    "spearman",
    "sum_logits",
    "top_n_overlap",
]
