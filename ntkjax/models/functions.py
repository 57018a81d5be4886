"""A language model's functions as callable pytrees: weights are leaves, structure is static.

A jitted function takes them as ordinary arguments, so no weight is ever captured as a constant.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from ntkjax.errors import ConfigError, UserError
from ntkjax.models.decoder import Decoder
from ntkjax.models.layers import KVCache, ModelSpec, matmul
from ntkjax.types import Batch, Params, at_least_float32, capped, predict_mask, valid_mask

OUTPUTS = ("apply", "hidden", "sum_logits", "nll", "entropy", "embed", "weighted_embed", "states", "head")
POSITIONS = ("response", "all", "last")

# Logits of more than this many numbers are made and dropped a slice of T at a time (float32: 256 MiB).
MAX_LOGITS = 1 << 26


@functools.lru_cache(maxsize=64)
def structure(spec: ModelSpec) -> tuple[Any, dict]:
    """The nnx graph of the model and its parameter tree of jax.ShapeDtypeStruct; nothing is allocated."""
    graph, state = nnx.split(nnx.eval_shape(lambda: Decoder(spec)))
    return graph, nnx.to_pure_dict(state)


def param_shapes(spec: ModelSpec) -> dict:
    """The parameter tree as jax.ShapeDtypeStruct leaves: layers stacked on axis 0."""
    return jax.tree.map(lambda leaf: leaf, structure(spec)[1])


def overlay(weights: dict, params: Params, where: str = "") -> dict:
    """``weights`` with the leaves of ``params``, any subset of the tree, in their place; nothing is copied.

    Raises UserError naming the path of a parameter the model does not have, or whose shape differs.
    """
    out = dict(weights)
    for name, value in params.items():
        path = f"{where}{name}"
        if name not in weights or isinstance(value, dict) != isinstance(weights[name], dict):
            raise UserError(f"parameter {path!r} does not exist in the model; here it has: {', '.join(weights)}")
        if isinstance(value, dict):
            out[name] = overlay(weights[name], value, path + "/")
        elif jnp.shape(value) != jnp.shape(weights[name]):
            raise UserError(f"parameter {path!r} has shape {jnp.shape(value)}: expected {jnp.shape(weights[name])}")
        else:
            out[name] = value
    return out


def forward(
    spec: ModelSpec,
    weights: dict,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"] | None = None,
    cache: KVCache | None = None,
    segments: Int[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B T D"], KVCache | None]:
    """Hidden states after the last norm [B, T, D], float32 or better, and the extended cache. See Decoder.forward."""
    return nnx.merge(structure(spec)[0], weights).forward(tokens, positions, cache, segments)


def head_weight(weights: dict) -> Float[Array, "V D"]:
    """W [V, D] in its stored dtype: the head, or the embedding where they are tied."""
    return weights["head"]["kernel"] if "head" in weights else weights["embed"]["weight"]


def project(spec: ModelSpec, weights: dict, states: Float[Array, "*A D"]) -> Float[Array, "*A V"]:
    """Logits W h [..., V], or c tanh(W h / c) with a ``logit_cap`` c, float32 or better; W h in the model's dtype,
    accumulated in float32.
    """
    return capped(matmul(states.astype(spec.dtype), head_weight(weights).T), spec.config.logit_cap)


def position_mask(batch: Batch, positions: str) -> Bool[Array, "B T"]:
    """The positions an output is pooled over, bool [B, T].

    "response": S(x), those whose next token belongs to the response. "all": those whose next token is real.
    "last": the last element of S(x), the position that predicts the response's last token.
    """
    if positions == "all":
        return jnp.pad(valid_mask(batch)[:, 1:], ((0, 0), (0, 1)))
    mask = predict_mask(batch)
    if positions == "response":
        return mask
    later = jnp.cumsum(mask[:, ::-1].astype(jnp.int32), axis=1)[:, ::-1]
    return mask & (later == 1)


def pool(values: Float[Array, "B T *rest"], mask: Bool[Array, "B T"]) -> Float[Array, "B *rest"]:
    """Mean over the masked positions; exactly 0 where there are none."""
    extra = (1,) * (values.ndim - 2)
    counts = jnp.maximum(jnp.sum(mask, axis=1), 1).astype(values.dtype)
    kept = jnp.where(mask.reshape(mask.shape + extra), values, jnp.zeros((), values.dtype))
    return jnp.sum(kept, axis=1) / counts.reshape(counts.shape + extra)


def position_weighted(values: Float[Array, "B T *rest"], mask: Bool[Array, "B T"]) -> Float[Array, "B *rest"]:
    """sum_i i x_i / sum_i i over the masked positions, i = 1, 2, ... their number; exactly 0 where there are none."""
    places = jnp.where(mask, jnp.cumsum(mask.astype(jnp.int32), axis=1), 0)
    weights = (places / jnp.maximum(jnp.sum(places, axis=1, keepdims=True), 1)).astype(values.dtype)
    kept = jnp.where(mask.reshape(mask.shape + (1,) * (values.ndim - 2)), values, jnp.zeros((), values.dtype))
    return jnp.einsum("bt,bt...->b...", weights, kept, precision=jax.lax.Precision.HIGHEST)


def token_nll(
    spec: ModelSpec, weights: dict, states: Float[Array, "B T D"], tokens: Int[Array, "B T"]
) -> Float[Array, "B T"]:
    """-log p(token t+1 | tokens up to t) in nats at position t, [B, T]; the last column is meaningless.

    Where the logits [B, T, V] would be large they are made a slice of T at a time, and made again in the
    backward pass.
    """
    targets = jnp.pad(tokens[:, 1:], ((0, 0), (0, 1)))

    def piece(states, targets):
        logits = project(spec, weights, states)
        chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        return jax.nn.logsumexp(logits, axis=-1) - chosen

    return _sliced(piece, spec.config.vocab_size, states, targets)


def token_sum(spec: ModelSpec, weights: dict, states: Float[Array, "B T D"]) -> Float[Array, "B T"]:
    """The sum of the V logits at every position, [B, T]. Logits as in token_nll."""
    return _sliced(lambda h: jnp.sum(project(spec, weights, h), axis=-1), spec.config.vocab_size, states)


def pooled_logits(
    spec: ModelSpec, weights: dict, states: Float[Array, "B T D"], mask: Bool[Array, "B T"]
) -> Float[Array, "B V"]:
    """The mean over the masked positions of the logits, which pools hidden states where they are linear in the head."""
    if spec.config.logit_cap is None:
        return project(spec, weights, pool(states, mask))
    counts = jnp.maximum(jnp.sum(mask, axis=1), 1).astype(states.dtype)
    shares = jnp.where(mask, 1.0 / counts[:, None], jnp.zeros((), states.dtype))

    def add(total: Array, at: tuple[Array, Array]) -> tuple[Array, None]:
        return total + at[1][:, None] * project(spec, weights, at[0]), None

    zero = jnp.zeros((states.shape[0], spec.config.vocab_size), states.dtype)
    return jax.lax.scan(jax.checkpoint(add, prevent_cse=False), zero, (jnp.moveaxis(states, 1, 0), shares.T))[0]


def token_entropy(spec: ModelSpec, weights: dict, states: Float[Array, "B T D"]) -> Float[Array, "B T"]:
    """H = -sum_v p_v log p_v in nats of the model's prediction p at every position, [B, T]. Logits as in token_nll."""

    def piece(states):
        logits = project(spec, weights, states)
        # Below the largest: log sum e^z - sum p z then subtracts no large numbers.
        shifted = logits - jnp.max(logits, axis=-1, keepdims=True)
        return jax.nn.logsumexp(shifted, axis=-1) - jnp.sum(jax.nn.softmax(shifted, axis=-1) * shifted, axis=-1)

    return _sliced(piece, spec.config.vocab_size, states)


def _sliced(piece: Callable[..., Array], vocab: int, *arrays: Array) -> Float[Array, "B T"]:
    """``piece`` of arrays [B, T, ...], at once, or slice after slice of T where [B, T, vocab] would be large."""
    rows, length = arrays[0].shape[:2]
    if rows * length * vocab <= MAX_LOGITS:
        return piece(*arrays)
    size = max(1, min(length, MAX_LOGITS // (rows * vocab)))
    pieces = -(-length // size)
    pad = pieces * size - length

    def cut(x: Array) -> Array:
        rest = x.shape[2:]
        x = jnp.pad(x, ((0, 0), (0, pad), *((0, 0) for _ in rest)))
        return jnp.moveaxis(x.reshape(rows, pieces, size, *rest), 1, 0)

    _, out = jax.lax.scan(
        lambda _, xs: (None, jax.checkpoint(piece, prevent_cse=False)(*xs)), None, tuple(map(cut, arrays))
    )
    return jnp.moveaxis(out, 0, 1).reshape(rows, pieces * size)[:, :length]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ModelFn:
    """One output of a language model: ``fn(params, batch)``; ``fn(params)`` for the head.

    Attributes:
      weights: the full parameter tree (pytree leaves). ``params``, any subset of it, is laid over it at each
      call.
      spec, kind, positions: static; two functions of one model with the same kind are the same to the
      compiler.
    """

    weights: Any
    spec: ModelSpec = dataclasses.field(metadata={"static": True})
    kind: str = dataclasses.field(metadata={"static": True})
    positions: str = dataclasses.field(default="response", metadata={"static": True})

    @property
    def logit_cap(self) -> float | None:
        """c where logits are c tanh(W h / c), and so not linear in the head; None where they are W h."""
        return self.spec.config.logit_cap

    def __call__(self, params: Params, batch: Batch | None = None) -> Float[Array, "..."]:
        weights = overlay(self.weights, params)
        if self.kind == "head":
            return at_least_float32(head_weight(weights))
        if batch is None:
            raise TypeError(f"the {self.kind!r} function takes (params, batch)")
        tokens = jnp.asarray(batch.tokens)
        optional = lambda x: None if x is None else jnp.asarray(x)
        states, _ = forward(self.spec, weights, tokens, optional(batch.positions), segments=optional(batch.segments))
        if self.kind == "states":
            return states
        if self.kind in ("embed", "weighted_embed"):
            return (pool if self.kind == "embed" else position_weighted)(states, valid_mask(batch))
        mask = position_mask(batch, self.positions)
        if self.kind == "nll":
            return pool(token_nll(self.spec, weights, states, tokens), mask)
        if self.kind == "entropy":
            return pool(token_entropy(self.spec, weights, states), mask)
        if self.kind == "sum_logits":
            return pool(token_sum(self.spec, weights, states), mask)
        return pool(states, mask) if self.kind == "hidden" else pooled_logits(self.spec, weights, states, mask)

    def for_forward_mode(self) -> ModelFn:
        """See `ntkjax.types.forward_mode`."""
        return dataclasses.replace(self, spec=dataclasses.replace(self.spec, forward_mode=True))


def model_fn(weights: dict, spec: ModelSpec, kind: str, positions: str = "response") -> ModelFn:
    """The function ``kind`` (one of OUTPUTS) over ``positions`` (one of POSITIONS); ConfigError for another name."""
    for value, allowed, what in ((kind, OUTPUTS, "output"), (positions, POSITIONS, "positions")):
        if value not in allowed:
            raise ConfigError(f"{what} {value!r} is not one of {', '.join(allowed)}")
    return ModelFn(weights, spec, kind, positions)
