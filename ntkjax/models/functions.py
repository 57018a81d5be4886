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
from ntkjax.models.lora import half_product
from ntkjax.types import (
    Batch,
    Params,
    at_least_float32,
    capped,
    count_positions,
    owned,
    predict_mask,
    sequence_lengths,
    valid_mask,
)

OUTPUTS = (
    *("apply", "hidden", "sum_logits", "nll", "entropy", "margin", "error"),
    *("embed", "weighted_embed", "states", "head"),
)
BY_POSITION = ("hidden", "sum_logits", "nll", "entropy", "margin", "error")
"""Outputs that are the mean over positions of something that is linear in what a kernel makes of it."""
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
    examples: Int[Array, "B T"] | None = None,
    extents: Int[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B T D"], KVCache | None]:
    """Hidden states after the last norm [B, T, D], float32 or better, and the extended cache. See Decoder.forward."""
    return nnx.merge(structure(spec)[0], weights).forward(tokens, positions, cache, segments, examples, extents)


def head_weight(weights: dict) -> Float[Array, "V D"]:
    """W [V, D] in its stored dtype: the head, or the embedding where they are tied."""
    return weights["head"]["kernel"] if "head" in weights else weights["embed"]["weight"]


def project(spec: ModelSpec, weights: dict, states: Float[Array, "*A D"]) -> Float[Array, "*A V"]:
    """Logits W h [..., V], or c tanh(W h / c) with a ``logit_cap`` c, float32 or better; W h in the model's dtype,
    accumulated in float32.
    """
    return capped(matmul(states.astype(spec.dtype), head_weight(weights).T), spec.config.logit_cap)


def position_mask(batch: Batch, positions: str) -> Bool[Array, "R T"]:
    """The positions an output is pooled over, bool [R, T].

    "response": S(x), those whose next token belongs to the response. "all": those whose next token is real.
    "last": the last element of S(x), the position that predicts the response's last token.
    """
    if positions == "all":
        valid = valid_mask(batch)
        if batch.examples is not None:
            owner = jnp.asarray(batch.examples)
            valid = valid & jnp.pad(owner[:, 1:] == owner[:, :-1], ((0, 0), (1, 0)))
        return jnp.pad(valid[:, 1:], ((0, 0), (0, 1)))
    mask = predict_mask(batch)
    if positions == "response":
        return mask
    # The last masked position of an example is the one with as many masked ones up to it as there are in all.
    places, total = _places(mask, batch)
    return mask & (places == total)


def _places(mask: Bool[Array, "R T"], batch: Batch) -> tuple[Int[Array, "R T"], Int[Array, "R T"]]:
    """For every position the number of masked ones of its example up to it, and in all, int32 [R, T]."""
    seen = jnp.cumsum(mask.astype(jnp.int32), axis=1)
    counts = count_positions(batch, mask).reshape(mask.shape[0], -1)
    if batch.examples is None:
        return seen, jnp.broadcast_to(counts, seen.shape)
    # Padding, slot -1, counts as slot 0: nothing there is masked.
    slot = jnp.maximum(jnp.asarray(batch.examples), 0)
    of_slot = lambda x: jnp.take_along_axis(x, slot, axis=1)
    return seen - of_slot(jnp.cumsum(counts, axis=1) - counts), of_slot(counts)


def sums_by_example(
    values: Float[Array, "R T *rest"], weights: Float[Array, "R T"], batch: Batch
) -> Float[Array, "B *rest"]:
    """sum_t w_t x_t over the positions of each example, products and sums of 32 bits or more.

    A position of weight 0 counts nothing, whatever stands there, in rows of one example; in packed ones every value
    must be finite. Rows are summed apart, so rows that are spread over devices stay where they are.
    """
    nonzero = (weights != 0).reshape(weights.shape + (1,) * (values.ndim - 2))
    # By where: 0 times what stands in the padding would be NaN where that is infinite.
    kept, owners = jnp.where(nonzero, values, jnp.zeros((), values.dtype)), owned(batch)
    if owners is None:
        return jnp.einsum("rt,rt...->r...", weights, kept, precision=jax.lax.Precision.HIGHEST)
    shares = jnp.where(owners, weights[:, None, :], jnp.zeros((), weights.dtype))
    sums = jnp.einsum("rst,rt...->rs...", shares, kept, precision=jax.lax.Precision.HIGHEST)
    return sums.reshape(-1, *sums.shape[2:])


def pool(values: Float[Array, "R T *rest"], mask: Bool[Array, "R T"], batch: Batch) -> Float[Array, "B *rest"]:
    """Mean over the masked positions of each example; exactly 0 where there are none."""
    counts = jnp.maximum(count_positions(batch, mask), 1).astype(values.dtype)
    if batch.examples is None:  # a plain sum, bit for bit as in runs from before packing, which may go on
        extra = (1,) * (values.ndim - 2)
        kept = jnp.where(mask.reshape(mask.shape + extra), values, jnp.zeros((), values.dtype))
        sums = jnp.sum(kept, axis=1)
    else:
        sums = sums_by_example(values, mask.astype(values.dtype), batch)
    return sums / counts.reshape(counts.shape + (1,) * (sums.ndim - 1))


def shares(mask: Bool[Array, "R T"], batch: Batch, dtype: Any) -> Float[Array, "R T"]:
    """1/|S| at the masked positions of each example, |S| of them; 0 elsewhere."""
    counts = jnp.maximum(_places(mask, batch)[1], 1).astype(dtype)
    return jnp.where(mask, jnp.ones((), dtype) / counts, jnp.zeros((), dtype))


def spread(values: Float[Array, "R T *rest"], mask: Bool[Array, "R T"], batch: Batch) -> Float[Array, "R T *rest"]:
    """x_t / |S| at the masked positions, 0 elsewhere: the parts whose sum over an example `pool` gives."""
    weights = shares(mask, batch, values.dtype)
    extra = (1,) * (values.ndim - 2)
    kept = jnp.where(mask.reshape(mask.shape + extra), values, jnp.zeros((), values.dtype))
    return kept * weights.reshape(weights.shape + extra)


def position_weighted(
    values: Float[Array, "R T *rest"], mask: Bool[Array, "R T"], batch: Batch
) -> Float[Array, "B *rest"]:
    """sum_i i x_i / sum_i i over the masked positions of each example, i = 1, 2, ... their number; exactly 0 where
    there are none."""
    places, total = _places(mask, batch)
    count = jnp.maximum(total, 1).astype(values.dtype)  # 1 + ... + n is n (n + 1) / 2
    weights = jnp.where(mask, places, 0).astype(values.dtype) / (count * (count + 1) / 2)
    return sums_by_example(values, weights, batch)


def token_nll(
    spec: ModelSpec, weights: dict, states: Float[Array, "B T D"], tokens: Int[Array, "B T"]
) -> Float[Array, "B T"]:
    """-log p(token t+1 | tokens up to t) in nats at position t, [B, T]; the last column is meaningless.

    Where the logits [B, T, V] would be large they are made a slice of T at a time, and made again in the backward pass;
    in bfloat16 they are not, and no product with the head has a float32 operand (`_half_by_token`).
    """
    return _by_token(_nll, spec, weights, states, _following(tokens))


def token_sum(spec: ModelSpec, weights: dict, states: Float[Array, "B T D"]) -> Float[Array, "B T"]:
    """The sum of the V logits at every position, [B, T]. Logits as in token_nll."""
    return _by_token(_sum, spec, weights, states)


def token_entropy(spec: ModelSpec, weights: dict, states: Float[Array, "B T D"]) -> Float[Array, "B T"]:
    """H = -sum_v p_v log p_v in nats of the model's prediction p at every position, [B, T]. Logits as in token_nll."""
    return _by_token(_entropy, spec, weights, states)


def token_margin(
    spec: ModelSpec, weights: dict, states: Float[Array, "B T D"], tokens: Int[Array, "B T"]
) -> Float[Array, "B T"]:
    """log(p / (1 - p)), p = p(token t+1 | tokens up to t), at position t, [B, T]; the last column is meaningless.

    As z_y - log sum_{v != y} e^z_v for the logits z and the next token y, exact where p is near 1. Logits as in
    token_nll.
    """
    return _by_token(_margin, spec, weights, states, _following(tokens))


def _following(tokens: Int[Array, "B T"]) -> Int[Array, "B T"]:
    return jnp.pad(tokens[:, 1:], ((0, 0), (0, 1)))


def _taken(logits: Float[Array, "*A V"], targets: Int[Array, "*A"]) -> Float[Array, "*A"]:
    return jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]


def _compared(logits: Float[Array, "*A V"], targets: Int[Array, "*A"]) -> Float[Array, "*A"]:
    """`_taken` as a sum over V, whose derivative by the logits is a comparison instead of a scatter."""
    own = jax.lax.broadcasted_iota(targets.dtype, logits.shape, logits.ndim - 1) == targets[..., None]
    return jnp.sum(jnp.where(own, logits, jnp.zeros_like(logits)), axis=-1)


# Functions of the logits of a position and of its next token, whose logit ``pick`` gives.


def _nll(pick: Callable, logits: Float[Array, "*A V"], targets: Int[Array, "*A"]) -> Float[Array, "*A"]:
    chosen = pick(logits, targets)
    return jax.nn.logsumexp(logits, axis=-1) - chosen


def _sum(pick: Callable, logits: Float[Array, "*A V"]) -> Float[Array, "*A"]:
    return jnp.sum(logits, axis=-1)


def _entropy(pick: Callable, logits: Float[Array, "*A V"]) -> Float[Array, "*A"]:
    # Below the largest: log sum e^z - sum p z then subtracts no large numbers.
    shifted = logits - jnp.max(logits, axis=-1, keepdims=True)
    return jax.nn.logsumexp(shifted, axis=-1) - jnp.sum(jax.nn.softmax(shifted, axis=-1) * shifted, axis=-1)


def _margin(pick: Callable, logits: Float[Array, "*A V"], targets: Int[Array, "*A"]) -> Float[Array, "*A"]:
    own = jax.nn.one_hot(targets, logits.shape[-1], dtype=bool)
    chosen = pick(logits, targets)
    others = jnp.where(own, jnp.full((), -jnp.inf, logits.dtype), logits)
    return chosen - jax.nn.logsumexp(others, axis=-1)


def _by_token(
    fn: Callable[..., Array], spec: ModelSpec, weights: dict, states: Float[Array, "B T D"], *of: Int[Array, "B T"]
) -> Float[Array, "B T"]:
    """``fn`` of the logits and of ``of`` at every position."""
    vocab = spec.config.vocab_size
    if jnp.dtype(spec.dtype) == jnp.bfloat16:
        head = head_weight(weights).astype(jnp.bfloat16)
        return _half_by_token(functools.partial(fn, _compared), spec.config.logit_cap, head, states, of)
    return _sliced(lambda states, *of: fn(_taken, project(spec, weights, states), *of), vocab, states, *of)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _half_by_token(
    fn: Callable[..., Array], cap: float | None, head: Float[Array, "V D"], states: Float[Array, "B T D"], of: tuple
) -> Float[Array, "B T"]:
    """y_t = fn(z_t), z_t = W h_t or its cap, W in bfloat16: [B, T] in float32. Products have operands of 16 bits alone
    and are summed in float32; ``fn`` is computed in float32.

    Its tangent under a fixed head is g_t . dh_t with g_t = W^T fn'(z_t), float32 [B, T, D], and fn'(z_t) rounded to
    bfloat16. g is made together with the value: a backward pass makes no logits again, and several tangents share it.
    Where the head moves too, logits are made again, and their cotangents rounded.
    """
    piece = lambda states, *of: fn(capped(_half_logits(head, states), cap), *of)
    return _sliced(piece, len(head), states, *of)


@functools.partial(_half_by_token.defjvp, symbolic_zeros=True)
def _half_by_token_jvp(fn: Callable[..., Array], cap: float | None, primals: tuple, tangents: tuple) -> tuple:
    head, states, of = primals
    zero = jax.custom_derivatives.SymbolicZero
    dhead, dstates = (None if isinstance(tangent, zero) else tangent for tangent in tangents[:2])
    if dhead is not None:

        def both(head: Array, states: Array) -> Array:
            piece = lambda states, *of: fn(capped(_half_logits(head, states), cap), *of)
            return _sliced(piece, len(head), states, *of)

        return jax.jvp(both, (head, states), (dhead, jnp.zeros_like(states) if dstates is None else dstates))

    def with_slope(states: Array, *of: Array) -> tuple[Array, Array]:
        value, pull = jax.vjp(lambda logits: fn(capped(logits, cap), *of), _half_logits(head, states))
        return value, matmul(pull(jnp.ones_like(value))[0].astype(head.dtype), head)

    value, slope = _sliced(with_slope, len(head), states, *of)
    return value, jnp.zeros_like(value) if dstates is None else jnp.sum(slope * dstates, axis=-1)


@jax.custom_jvp
def _half_logits(head: Float[Array, "V D"], states: Float[Array, "*A D"]) -> Float[Array, "*A V"]:
    """W h in float32, of operands of 16 bits. Its tangent is rounded to 16 bits, and so are its cotangents."""
    return matmul(states.astype(head.dtype), head.T)


@_half_logits.defjvp
def _half_logits_jvp(primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    (head, states), (dhead, dstates) = primals, tangents
    moved = half_product(dstates.astype(head.dtype), head.T) + half_product(states.astype(head.dtype), dhead.T)
    return _half_logits(head, states), moved.astype(jnp.float32)


def pooled_logits(
    spec: ModelSpec, weights: dict, states: Float[Array, "R T D"], mask: Bool[Array, "R T"], batch: Batch
) -> Float[Array, "B V"]:
    """The mean over the masked positions of each example of the logits, which pools hidden states where they are linear
    in the head."""
    # Linear in h: pooling first turns T products with the head into one.
    if spec.config.logit_cap is None:
        return project(spec, weights, pool(states, mask, batch))
    parts = shares(mask, batch, states.dtype)
    slot = None if batch.examples is None else jnp.maximum(jnp.asarray(batch.examples), 0)
    rows = jnp.arange(states.shape[0], dtype=jnp.int32)

    def add(total: Array, at: tuple) -> tuple[Array, None]:
        hidden, share, slot = at
        logits = share[:, None] * project(spec, weights, hidden)
        if slot is None:
            return total + logits[:, None], None
        return total.at[rows, slot].add(logits, unique_indices=True), None

    slots = 1 if slot is None else batch.index.shape[0] // states.shape[0]
    zero = jnp.zeros((states.shape[0], slots, spec.config.vocab_size), states.dtype)
    along = (jnp.moveaxis(states, 1, 0), parts.T, None if slot is None else slot.T)
    # With a soft cap every position needs its logits before they are added up: one position of all rows at a time.
    sums = jax.lax.scan(jax.checkpoint(add, prevent_cse=False), zero, along)[0]
    return sums.reshape(-1, spec.config.vocab_size)


def _sliced(piece: Callable[..., Any], vocab: int, *arrays: Array) -> Any:
    """``piece`` of arrays [B, T, ...], which gives one such array or several: at once, or slice after slice of T where
    [B, T, vocab] would be large."""
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

    def joined(x: Array) -> Array:
        return jnp.moveaxis(x, 0, 1).reshape(rows, pieces * size, *x.shape[3:])[:, :length]

    # A scan, so that one slice of logits is in memory at a time, and checkpointed, so that the backward pass makes it
    # again: kept, the slices would be the whole [B, T, V].
    _, out = jax.lax.scan(
        lambda _, xs: (None, jax.checkpoint(piece, prevent_cse=False)(*xs)), None, tuple(map(cut, arrays))
    )
    return jax.tree.map(joined, out)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ModelFn:
    """One output of a language model: ``fn(params, batch)``; ``fn(params)`` for the head.

    Every output but ``states`` has one row for each element of ``batch.index``, whether rows of tokens hold one example
    or, packed, several; with ``pooled`` False one value for each position, before they are summed.

    Attributes:
      weights: the full parameter tree (pytree leaves). ``params``, any subset of it, is laid over it at each
      call.
      spec, kind, positions, pooled: static; two functions of one model with the same kind are the same to the
      compiler.
    """

    weights: Any
    spec: ModelSpec = dataclasses.field(metadata={"static": True})
    kind: str = dataclasses.field(metadata={"static": True})
    positions: str = dataclasses.field(default="response", metadata={"static": True})
    pooled: bool = dataclasses.field(default=True, metadata={"static": True})

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
        positions, segments, examples = map(optional, (batch.positions, batch.segments, batch.examples))
        extents = sequence_lengths(batch) if self.spec.config.turns_by_length else None
        states, _ = forward(self.spec, weights, tokens, positions, None, segments, examples, extents)
        if self.kind == "states":
            return states
        if self.kind in ("embed", "weighted_embed"):
            return (pool if self.kind == "embed" else position_weighted)(states, valid_mask(batch), batch)
        mask = position_mask(batch, self.positions)
        sums = pool if self.pooled else spread
        if self.kind == "hidden":
            return sums(states, mask, batch)
        if self.kind == "apply":
            return pooled_logits(self.spec, weights, states, mask, batch)
        if self.kind in ("entropy", "sum_logits"):
            by_token = {"entropy": token_entropy, "sum_logits": token_sum}[self.kind]
            return sums(by_token(self.spec, weights, states), mask, batch)
        if self.kind == "nll":
            return sums(token_nll(self.spec, weights, states, tokens), mask, batch)
        margin = token_margin(self.spec, weights, states, tokens)
        return sums(margin if self.kind == "margin" else jax.nn.sigmoid(-margin), mask, batch)

    def before_pooling(self) -> ModelFn:
        """See `ntkjax.types.before_pooling`; of the outputs that are a mean over positions."""
        if self.kind not in BY_POSITION:
            raise ConfigError(f"output {self.kind!r} has no values by position; {', '.join(BY_POSITION)} have")
        return dataclasses.replace(self, pooled=False)

    def for_forward_mode(self) -> ModelFn:
        """See `ntkjax.types.forward_mode`."""
        return dataclasses.replace(self, spec=dataclasses.replace(self.spec, forward_mode=True))


def model_fn(weights: dict, spec: ModelSpec, kind: str, positions: str = "response") -> ModelFn:
    """The function ``kind`` (one of OUTPUTS) over ``positions`` (one of POSITIONS); ConfigError for another name."""
    for value, allowed, what in ((kind, OUTPUTS, "output"), (positions, POSITIONS, "positions")):
        if value not in allowed:
            raise ConfigError(f"{what} {value!r} is not one of {', '.join(allowed)}")
    return ModelFn(weights, spec, kind, positions)
