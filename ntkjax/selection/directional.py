"""What the score of a directional method is made of, so that it can be taken apart by token, layer and module.

    s_j = max_r <u_r, g(x_j)> / d_j

with one direction u_r for the domain, or one for each group of its examples, and d_j = 1 unless the score is a cosine.
A score is linear in g(x_j), so it falls into parts that add up (`ntkjax.ntk.scores`: `scores_by_position`,
`ProductsByLeaf`).
"""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Float

from ntkjax.ntk.kernel import Kernel
from ntkjax.ntk.scores import Direction


@dataclasses.dataclass(frozen=True)
class Directional:
    """The directions of a selection's scores.

    Attributes:
      kernel: its features are g.
      directions: u_r.
      own: <u_r, g_bar_r>, the mean score of the domain's own examples (of the group's); None for cosines.
      divisors: d_j > 0, float64 [N], NaN where no score was asked for; None: 1.
    """

    kernel: Kernel
    directions: tuple[Direction, ...]
    own: tuple[float, ...] | None = None
    divisors: Float[np.ndarray, " N"] | None = None
