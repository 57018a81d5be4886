"""Loss reweighting (arXiv 2502.06733): weights of the examples of each batch from their losses.

Source: Sow et al., Dynamic Loss-Based Sample Reweighting for Improved Large Language Model Pretraining, ICLR 2025
(arXiv 2502.06733), Section 3.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Reweighting = Literal["none", "linupper", "quadratic", "extremes"]


@dataclasses.dataclass(frozen=True)
class LossReweighting:
    """v = softmax(f(h) / r) over the examples of the global batch, the objective sum_i stop_gradient(v_i) l_i, with

        h_i = (2 l_i - l_max - l_min) / (l_max - l_min)   in [-1, 1]; 0 where all losses are equal
        f(h) = min(h + 1, 1) (``linupper``: losses below the middle count less) | 1 - h^2 (``quadratic``: both ends
               count less) | |h| (``extremes``: the middle counts less)

    l_i is the mean NLL of example i over its response. The source writes the examples of a batch with equal weight
    where all losses are equal, which the token-mean objective does not: v_i takes the place of |S_i| / sum_j |S_j|.
    It lets r fall from a large value in the first steps of pre-training; fine-tuning here starts from a trained model,
    so r is constant.

    Attributes:
      strategy: which f.
      temperature: r > 0; large r gives equal weights (source: 0.4).
    """

    strategy: Reweighting
    temperature: float

    def weights(self, nll: Float[Array, " B"], counts: Int[Array, " B"]) -> Float[Array, " B"]:
        """v [B] in the dtype of ``nll``, without a gradient; 0 for rows without a response token (fillers).

        A loss that is not finite, or a batch without any response token, gives NaN on purpose: it stops the run.
        """
        nll, real = jax.lax.stop_gradient(nll), counts > 0
        low = jnp.min(jnp.where(real, nll, jnp.inf))
        high = jnp.max(jnp.where(real, nll, -jnp.inf))
        spread = high - low
        h = jnp.where(spread == 0, jnp.zeros_like(nll), (2 * nll - high - low) / jnp.where(spread == 0, 1, spread))
        f = {"linupper": jnp.minimum(h + 1, 1), "quadratic": 1 - h**2, "extremes": jnp.abs(h)}[self.strategy]
        return jax.nn.softmax(jnp.where(real, f / self.temperature, -jnp.inf))
