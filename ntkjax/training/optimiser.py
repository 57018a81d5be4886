"""AdamW and its learning rate, in optax."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PyTree

from ntkjax.data.buckets import round_up
from ntkjax.training.config import TrainConfig
from ntkjax.training.lift import Lift
from ntkjax.types import Params


@dataclasses.dataclass(frozen=True)
class AdamW:
    """What the compiled step knows of the optimiser. The learning rate is an argument of every step instead,
    so runs of other lengths and rates share one compilation."""

    b1: float
    b2: float
    eps: float
    weight_decay: float
    clip_norm: float | None
    lift: Lift | None = None

    @classmethod
    def of(cls, config: TrainConfig) -> AdamW:
        lift = None if config.lift_rank is None else Lift(config.lift_rank, config.lift_interval)
        return cls(config.b1, config.b2, config.eps, config.weight_decay, config.clip_norm, lift)

    def _transform(self, learning_rate: float | Array) -> optax.GradientTransformation:
        clip = optax.identity() if self.clip_norm is None else optax.clip_by_global_norm(self.clip_norm)
        adam = optax.scale_by_adam(self.b1, self.b2, self.eps)
        decay = optax.add_decayed_weights(self.weight_decay, mask=decay_mask)
        # Decay behind Adam, before the rate: decoupled (AdamW), so that it is not divided by the second moment.
        chain = optax.chain(clip, adam, decay, optax.scale_by_learning_rate(learning_rate))
        return chain if self.lift is None else self.lift.wrap(chain)

    def init(self, params: Params) -> Any:
        """The optimiser's state before the first step: zero moments shaped like ``params``."""
        return self._transform(0.0).init(params)

    def step(self, params: Params, grads: Params, opt_state: Any, learning_rate: float | Array) -> tuple[Params, Any]:
        """(theta, state) after one step:

        g <- g min(1, clip / |g|);  m <- b1 m + (1 - b1) g;  v <- b2 v + (1 - b2) g^2;
        theta <- theta - lr [ m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps) + weight_decay theta ].
        """
        with jax.numpy_dtype_promotion("standard"):  # optax raises floats to integer powers
            updates, opt_state = self._transform(learning_rate).update(grads, opt_state, params)
            return optax.apply_updates(params, updates), opt_state


def decay_mask(params: Params) -> PyTree[bool]:
    """True for the leaves that weight decay applies to: all but those named ``bias`` or ``scale``."""

    def decays(path: tuple, _leaf: Any) -> bool:
        return getattr(path[-1], "key", None) not in ("bias", "scale") if path else True

    return jax.tree_util.tree_map_with_path(decays, params)


def learning_rates(config: TrainConfig, steps: int) -> Float[np.ndarray, " steps"]:
    """The learning rate of every step, float64 [steps].

    With w = max(1, ceil(warmup_ratio steps)) and s = 1 ... steps:  lr s / w  for s <= w, then lr times
    1 - x (linear), (1 + cos(pi x)) / 2 (cosine) or 1 (constant), where x = (s - w) / (steps - w + 1).
    Neither the first nor the last step is wasted on a rate of zero.
    """
    peak = config.learning_rate
    warmup = max(1, math.ceil(config.warmup_ratio * steps))
    decay_steps = max(1, steps - warmup + 1)
    after = {
        "linear": optax.linear_schedule(peak, 0.0, decay_steps),
        "cosine": optax.cosine_decay_schedule(peak, decay_steps),
        "constant": optax.constant_schedule(peak),
    }[config.schedule]
    schedule = optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup])
    # Whole multiples of 256, so that runs of different lengths share the compiled operations.
    counts = jnp.arange(1, round_up(steps, 256) + 1)
    with jax.numpy_dtype_promotion("standard"):  # optax divides integers by floats
        return np.asarray(jax.vmap(schedule)(counts), np.float64)[:steps]


def adam_moments(opt_state: PyTree) -> tuple[Params, Params, Array]:
    """(m, v, t) of a state of :class:`AdamW`: both moments, shaped like the parameters, and the count."""
    states = [s for s in jax.tree.leaves(opt_state, is_leaf=_is_adam) if _is_adam(s)]
    if len(states) != 1:
        raise ValueError(f"expected one Adam state, found {len(states)}")
    return states[0].mu, states[0].nu, states[0].count


def _is_adam(node: object) -> bool:
    return isinstance(node, optax.ScaleByAdamState)
