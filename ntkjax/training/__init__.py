"""Fine-tuning: AdamW on the mean NLL per response token, resumable bit for bit."""

from ntkjax.training.config import NO_EFFECT, TrainConfig
from ntkjax.training.loop import STEP, fit, saved_params, saved_state, step_program
from ntkjax.training.manifest import TrainingData
from ntkjax.training.mixture import EpochPlan, mixture_indices
from ntkjax.training.optimiser import adam_moments, learning_rates
from ntkjax.training.result import FitResult

__all__ = [
    "NO_EFFECT",
    "STEP",
    "EpochPlan",
    "FitResult",
    "TrainConfig",
    "TrainingData",
    "adam_moments",
    "fit",
    "learning_rates",
    "mixture_indices",
    "saved_params",
    "saved_state",
    "step_program",
]
