"""A causal language model as weights plus functions of them."""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ntkjax.errors import ConfigError, UserError
from ntkjax.models import functions
from ntkjax.models.attention import resolve
from ntkjax.models.config import DTYPES, ModelConfig
from ntkjax.models.functions import ModelFn, model_fn, overlay, param_shapes
from ntkjax.models.layers import ModelSpec
from ntkjax.models.lora import LoraConfig, init_lora_a, lora_subset
from ntkjax.models.quantised import COMPUTED_IN, FORMATS, quantised, scale_path
from ntkjax.parallel import put, weights_over_rows
from ntkjax.rng import numpy_rng
from ntkjax.types import Params


@dataclasses.dataclass(frozen=True)
class LoadReport:
    """What a checkpoint held: where from, how many tensors and parameters, and how many tensors of each dtype.

    Attributes:
      source: the directory that was read. name: what transformers finds the model by from anywhere: its id on the hub,
      or the directory's absolute path.
      weight_bytes: bytes of its tensors. bytes_read: of those, what this process read: on a mesh over several processes
      its part (a tensor that is read for two parameters counts for each).
    """

    source: str = ""
    name: str = ""
    tensors: int = 0
    parameters: int = 0
    weight_bytes: int = 0
    bytes_read: int = 0
    dtypes: dict[str, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """Weights, tokenizer and functions of one causal language model.

    Attributes:
      spec: static structure (configuration, adapter, dtype, remat, attention implementation).
      params: the full parameter tree, layers stacked on axis 0:
        {"embed": {"weight" [V, D]}, "layers": {"attention": {"q": {"kernel" [L, in, out], "bias" [L, out],
        "lora_a" [L, in, r], "lora_b" [L, r, out]}, "k", "v", "o", "q_norm", "k_norm"}, "mlp": {"gate", "up",
        "down"}, "norm_1": {"scale" [L, D]}, "norm_2"}, "norm": {"scale" [D]}, "head": {"kernel" [V, D]}}.
        No head where it is tied; learned positions are "wpe"; biases, gate and norms as the layers have them. Of
        routed experts "mlp" has a "router" too, and the others are [L, experts, ...]. Kernels held in 8 or 4 bits are
        integers, with "kernel_scale" [L, tiles, out] beside them (`ntkjax.models.quantised`).
      tokenizer: a transformers tokenizer, or None.
      mesh: the device mesh the weights are spread over, or None.
      hf_config: the config.json it was loaded from, or None.
      report: what the checkpoint held.
    """

    spec: ModelSpec
    params: dict
    tokenizer: Any = None
    mesh: jax.sharding.Mesh | None = None
    hf_config: dict | None = None
    report: LoadReport = LoadReport()

    @property
    def config(self) -> ModelConfig:
        """The shape of the model."""
        return self.spec.config

    @property
    def lora_config(self) -> LoraConfig | None:
        """Rank, alpha and targets of the adapter, or None."""
        return self.spec.lora

    @property
    def lora(self) -> dict:
        """The adapter's leaves as a subset of ``params``; {} without an adapter."""
        return lora_subset(self.params)

    @property
    def stop_tokens(self) -> frozenset[int]:
        """Where generation stops: at the token that ends a turn in training, at the tokenizer's eos, and at the end
        tokens of config.json and generation_config.json."""
        from ntkjax.data.prompts import stop_tokens  # what reads records is not needed to run a model

        ends = self.config.eos_token_ids
        return frozenset(ends) if self.tokenizer is None else stop_tokens(self.tokenizer, ends)

    def fresh_lora(self, seed: int) -> dict:
        """A new adapter drawn from ``seed`` (A uniform, B zero), with the tree and dtypes of ``lora``."""
        shape = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        fresh = {path: init_leaf(self.spec, path, shape(leaf), seed) for path, leaf in paths(self.lora).items()}
        return unflatten({path: put(leaf, path, self.mesh, self.config.split(path)) for path, leaf in fresh.items()})

    def with_params(self, params: Params) -> LanguageModel:
        """The model with ``params`` (any subset of the tree) in place of its own weights; UserError as in overlay."""
        return dataclasses.replace(self, params=overlay(self.params, params))

    def select_params(self, which: str = "lora") -> dict:
        """The subset of ``params`` to train: "lora", "all", or a regular expression.

        The expression is searched in paths such as "layers/attention/q/kernel". Raises UserError where
        nothing is selected.
        """
        if which == "all":
            _refuse_held(self.spec, self.params, which)
            return jax.tree.map(lambda x: x, self.params)
        try:
            chosen = self.lora if which == "lora" else _matching(self.params, re.compile(which), "")
        except re.error as error:
            raise ConfigError(f"parameters {which!r}: not a regular expression: {error}") from None
        if not chosen:
            example = ", ".join(list(paths(self.params))[:4])
            raise UserError(f"parameters {which!r} select nothing; the model has {example}, ...")
        _refuse_held(self.spec, chosen, which)
        return chosen

    def output(self, kind: str, positions: str = "response") -> ModelFn:
        """The function ``kind`` ("apply", "hidden", "sum_logits", "nll", "entropy", "margin", "error", "embed",
        "weighted_embed", "states", "head") over ``positions``.
        """
        return model_fn(self.params, self.spec, kind, positions)

    @property
    def apply_fn(self) -> ModelFn:
        """(params, batch) -> pooled logits 1/|S| sum_t W h_t, each capped where they are; float32 or better [B, V]."""
        return self.output("apply")

    @property
    def hidden_fn(self) -> ModelFn:
        """(params, batch) -> pooled final hidden state 1/|S| sum_t h_t, float32 or better [B, D]."""
        return self.output("hidden")

    @property
    def sum_logits_fn(self) -> ModelFn | None:
        """(params, batch) -> mean over S(x) of the sum of the logits [B], where a soft cap makes them other than linear
        in the head; None where they are linear, and hidden_fn and head_fn give the same and more.
        """
        return None if self.config.logit_cap is None else self.output("sum_logits")

    @property
    def embed_fn(self) -> ModelFn:
        """(params, batch) -> mean final hidden state over all real tokens [B, D]."""
        return self.output("embed")

    @property
    def states_fn(self) -> ModelFn:
        """(params, batch) -> hidden states after the last norm [B, T, D]."""
        return self.output("states")

    @property
    def head_fn(self) -> ModelFn:
        """(params) -> W, float32 or better [V, D]."""
        return self.output("head")

    @property
    def nll_fn(self) -> ModelFn:
        """(params, batch) -> mean negative log-likelihood over S(x) in nats [B]."""
        return self.output("nll")

    @property
    def entropy_fn(self) -> ModelFn:
        """(params, batch) -> mean entropy of the prediction over S(x) in nats [B]."""
        return self.output("entropy")

    @property
    def margin_fn(self) -> ModelFn:
        """(params, batch) -> mean over S(x) of log(p / (1 - p)), p the probability of the next token [B]."""
        return self.output("margin")

    @property
    def error_fn(self) -> ModelFn:
        """(params, batch) -> mean over S(x) of 1 - p, p the probability of the next token [B]."""
        return self.output("error")

    def logits(self, token_ids: Int[Array | np.ndarray, "B T"] | list) -> Float[Array, "B T V"]:
        """Logits of every position, float32 or better [B, T, V]. UserError for a token outside the vocabulary."""
        tokens = np.asarray(token_ids)
        if tokens.ndim != 2 or not np.issubdtype(tokens.dtype, np.integer):
            raise UserError(f"token_ids: expected integers [B, T], found {tokens.dtype} {tokens.shape}")
        if tokens.size and (tokens.min() < 0 or tokens.max() >= self.config.vocab_size):
            worst = int(tokens.max() if tokens.max() >= self.config.vocab_size else tokens.min())
            raise UserError(
                f"token id {worst} is outside the vocabulary (0 to {self.config.vocab_size - 1}): was the text "
                "made with another model's tokenizer?"
            )
        return _logits(self.spec, self.params, jnp.asarray(tokens, jnp.int32))


@functools.partial(jax.jit, static_argnums=0)
def _logits(spec: ModelSpec, weights: dict, tokens: Array) -> Array:
    states, _ = functions.forward(spec, weights, tokens)
    return functions.project(spec, weights, states)


def _matching(tree: dict, pattern: re.Pattern, where: str) -> dict:
    chosen = {}
    for name, value in tree.items():
        path = f"{where}{name}"
        if isinstance(value, dict):
            inner = _matching(value, pattern, path + "/")
            if inner:
                chosen[name] = inner
        elif pattern.search(path):
            chosen[name] = value
    return chosen


def paths(tree: dict) -> dict[str, Any]:
    """The leaves of a nested dict by "/"-joined path."""
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {"/".join(str(key.key) for key in path): leaf for path, leaf in flat}


def unflatten(flat: dict[str, Any]) -> dict:
    """The nested dict whose leaves ``paths`` would list as ``flat``."""
    tree: dict = {}
    for path, leaf in flat.items():
        *branches, name = path.split("/")
        node = tree
        for branch in branches:
            node = node.setdefault(branch, {})
        node[name] = leaf
    return tree


def held_kernels(spec: ModelSpec) -> list[str]:
    """Paths of the kernels that are held in 8 or 4 bits."""
    return [f"layers/{name}/kernel" for name in spec.linears() if spec.format_of(name) is not None]


def _refuse_held(spec: ModelSpec, chosen: dict, which: str) -> None:
    """ConfigError where integers or their scales are among the parameters to be trained."""
    held = {name for path in held_kernels(spec) for name in (path, scale_path(path))} & paths(chosen).keys()
    if held:
        raise ConfigError(
            f"parameters {which!r}: {min(held)} is held as {spec.quantised} and cannot be trained; expected adapters "
            "(--parameters lora) or floating-point weights (--dtype bfloat16)"
        )


def quantise(model: LanguageModel, name: str) -> LanguageModel:
    """The model with the kernels of its blocks held in the format ``name``, one of `ntkjax.models.quantised.FORMATS`;
    all else stays as it is. One kernel at a time is held twice.

    Raises ConfigError for an unknown format, and where they are held in one already.
    """
    if name not in FORMATS or model.spec.quantised is not None:
        raise ConfigError(
            f"format {name!r} for weights in {model.spec.quantised or model.spec.dtype}: expected "
            f"{' or '.join(FORMATS)}, of floating-point weights"
        )
    spec, leaves = dataclasses.replace(model.spec, quantised=name), paths(model.params)
    for path in held_kernels(spec):
        leaves[path], leaves[scale_path(path)] = quantised(leaves[path], name)
    return dataclasses.replace(model, spec=spec, params=unflatten(leaves))


def check_dtype(dtype: str) -> tuple[str, str | None]:
    """(dtype of what is computed, format of the kernels or None) of a ``dtype`` that weights may have; ConfigError
    otherwise.
    """
    if dtype in FORMATS:
        return COMPUTED_IN, dtype
    if dtype not in DTYPES:
        raise ConfigError(f"dtype {dtype!r} is not supported; supported: {', '.join([*DTYPES, *FORMATS])}, auto")
    if dtype == "float64" and not jax.config.read("jax_enable_x64"):
        raise ConfigError("dtype 'float64' needs double precision: set JAX_ENABLE_X64=1")
    return dtype, None


def init_leaf(spec: ModelSpec, path: str, shape: jax.ShapeDtypeStruct, seed: int) -> Array:
    """A fresh leaf: adapters as in PEFT (A uniform, B zero), norms that multiply by 1, biases 0, weights
    normal(initializer_range).
    """
    name = path.rsplit("/", 1)[-1]
    if name == "lora_a":
        return jnp.asarray(init_lora_a(numpy_rng(seed, "lora", path), shape.shape, shape.dtype))
    if name in ("lora_b", "bias"):
        return jnp.zeros(shape.shape, shape.dtype)
    if name == "scale":
        return jnp.ones(shape.shape, shape.dtype) - spec.config.block.norm_offset
    noise = numpy_rng(seed, "weights", path).standard_normal(shape.shape, np.float32)
    return jnp.asarray((spec.config.initializer_range * noise).astype(shape.dtype))


def init_lm(
    config: ModelConfig,
    *,
    seed: int,
    lora: LoraConfig | None = None,
    dtype: str = "float32",
    tokenizer: Any = None,
    mesh: jax.sharding.Mesh | None = None,
    remat: bool = False,
    attention: str = "auto",
    weights: str = "tensor",
) -> LanguageModel:
    """A model of any shape with random weights; the same seed gives the same weights whatever the adapter.

    ``weights``: how they lie on a mesh, see ``parallel.weight_sharding``. ``attention``: one of
    `ntkjax.models.attention.IMPLEMENTATIONS`; ConfigError for another.
    """
    floating, held = check_dtype(dtype)
    spec = ModelSpec(
        config, lora, floating, remat, resolve(attention, mesh), gathered_on=weights_over_rows(mesh, weights)
    )
    flat = paths(param_shapes(spec))
    fresh = lambda path, shape: put(init_leaf(spec, path, shape, seed), path, mesh, config.split(path), weights)
    leaves = {path: fresh(path, shape) for path, shape in flat.items()}
    model = LanguageModel(spec, unflatten(leaves), tokenizer, mesh)
    return model if held is None else quantise(model, held)
