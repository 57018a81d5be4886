"""Routed experts against the formula that computes every expert of every token, and what a checkpoint of them holds."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec
from safetensors.numpy import load_file, save_file

from ntkjax.errors import CheckpointError, ConfigError
from ntkjax.models import LoraConfig, ModelConfig, init_lm, load_lm
from ntkjax.models.experts import block_product, block_shape, dispatch, route
from ntkjax.models.export import save_merged
from ntkjax.models.layers import Experts
from ntkjax.models.lm import paths
from ntkjax.models.peft import adapter_lora_config, load_adapter, save_adapter
from ntkjax.ntk import KernelFunctions, build, kernel_scores
from ntkjax.parallel import make_mesh, weight_sharding
from ntkjax.pipeline.cost import multiplied_weights

_spec = importlib.util.spec_from_file_location("family_checks", Path(__file__).with_name("family_checks.py"))
assert _spec is not None and _spec.loader is not None
checks = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(checks)

GOLDEN = checks.GOLDEN
SIZES = {
    "vocab_size": 96, "hidden_size": 6, "intermediate_size": 5, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1,
    "head_dim": 4, "initializer_range": 0.6,
}  # fmt: skip
QWEN = ModelConfig(family="qwen3_moe", qk_norm=True, num_experts=5, experts_per_token=2, **SIZES)
MIXTRAL = ModelConfig(family="mixtral", num_experts=4, experts_per_token=3, norm_topk=True, **SIZES)
LORA = LoraConfig(rank=2, alpha=3.0)


def made(config: ModelConfig, dtype: str = "float64", **options):
    """A model whose adapters are random in both factors, so that every parameter moves the output."""
    model = init_lm(config, seed=3, lora=LORA, dtype=dtype, **options)
    random = np.random.default_rng(5)
    return model.with_params(
        jax.tree.map(lambda x: jnp.asarray(0.5 * random.normal(size=x.shape), x.dtype), model.lora)
    )


def experts_of(model):
    """(parameters of the first layer's experts, x [T, D] -> [T, D])."""
    graph, _ = nnx.split(nnx.eval_shape(lambda: Experts(model.spec)))
    params = jax.tree.map(lambda leaf: leaf[0], model.params["layers"]["mlp"])
    return params, lambda p, x: nnx.merge(graph, p)(x[None])[0]


def every_expert(config: ModelConfig):
    """(parameters, x) -> the output and how many tokens go to each expert, all experts computed for every token."""

    def output(p, x):
        w = {name: leaf["kernel"] + LORA.scale * (leaf["lora_a"] @ leaf["lora_b"]) for name, leaf in p.items()}
        shares = jax.nn.softmax(x @ w["router"], axis=-1)
        smallest = jnp.sort(shares, axis=-1)[:, config.num_experts - config.experts_per_token]
        kept = jnp.where(shares >= smallest[:, None], shares, 0)
        counts = (kept > 0).sum(0)
        if config.norm_topk:
            kept = kept / kept.sum(-1)[:, None]
        inner = jax.nn.silu(jnp.einsum("nd,edi->nei", x, w["gate"])) * jnp.einsum("nd,edi->nei", x, w["up"])
        return jnp.einsum("nei,eid,ne->nd", inner, w["down"], kept), counts

    return output


@pytest.mark.parametrize("config", [QWEN, MIXTRAL], ids=["qwen3_moe", "mixtral"])
def test_the_gradient_reaches_every_expert_that_a_token_was_routed_to(config, x64) -> None:
    """Output, and derivatives in both modes, are those of the formula; experts without a token have exactly none."""
    params, fn = experts_of(made(config))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, config.hidden_size)))
    formula = every_expert(config)
    expected, counts = formula(params, x)
    np.testing.assert_allclose(fn(params, x), expected, rtol=1e-12, atol=1e-13)
    assert counts.sum() == 2 * config.experts_per_token and ((counts == 0).any() or config is MIXTRAL)
    right = jax.jit(jax.jacrev(lambda p: formula(p, x)[0]))(params)
    for mode in (jax.jacrev, jax.jacfwd):
        found = paths(jax.jit(mode(lambda p: fn(p, x)))(params))
        for path, value in paths(right).items():
            np.testing.assert_allclose(found[path], value, rtol=1e-10, atol=1e-12, err_msg=f"{mode.__name__} {path}")
            if not path.startswith("router"):
                sizes = np.abs(np.asarray(found[path])).sum(axis=(0, 1, 3, 4))
                assert ((sizes > 0) == np.asarray(counts > 0)).all(), path
    assert float(jnp.abs(right["router"]["kernel"]).max()) > 1e-3


def test_gradients_of_single_examples_are_those_of_the_formula(x64) -> None:
    """Each example has blocks of its own under ``jax.vmap``."""
    params, fn = experts_of(made(QWEN))
    formula = every_expert(QWEN)
    examples = jnp.asarray(np.random.default_rng(1).normal(size=(4, 2, QWEN.hidden_size)))
    of = lambda f: jax.jit(jax.vmap(jax.grad(lambda p, x: jnp.sum(jnp.sin(f(p, x)))), (None, 0)))(params, examples)
    found, right = of(fn), of(lambda p, x: formula(p, x)[0])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12), found, right)


@pytest.mark.slow  # forward mode of the layer alone is above, that of whole models in test_every_family.py
def test_scores_are_products_of_explicit_gradients_of_a_model_with_experts(x64) -> None:
    model, domain, pool = made(MIXTRAL), checks.batch(1, 2), checks.batch(2, 3)
    fn = model.nll_fn
    rows = lambda of: np.concatenate(
        [np.asarray(x).reshape(len(of.tokens), -1) for x in jax.tree.leaves(jax.jit(jax.jacrev(fn))(model.lora, of))], 1
    )
    functions = KernelFunctions(model.hidden_fn, model.head_fn({}), fn, model.sum_logits_fn)
    built = build("loss", functions, model.lora, seed=0)
    got = kernel_scores(built, model.lora, [domain], [pool], rows=3).scores[:, 0]
    np.testing.assert_allclose(got, rows(pool) @ rows(domain).mean(0), rtol=1e-10)


ROUTINGS = {
    "one expert gets all": np.zeros((7, 1)),
    "in turn": np.arange(12).reshape(4, 3) % 6,
    "fewer pairs than experts": np.asarray([[5, 1]]),
    "one after the other": np.stack([np.full(9, 3), np.arange(9) % 3], 1),
    "at random": np.argsort(np.random.default_rng(0).random((33, 6)))[:, :4],
}


@pytest.mark.parametrize("name", ROUTINGS)
def test_no_token_is_dropped_and_a_block_is_of_one_expert(name: str) -> None:
    chosen = ROUTINGS[name].astype(np.int32)
    tokens, experts = len(chosen), 6
    to = jax.jit(lambda c: dispatch(c, experts))(jnp.asarray(chosen))
    count, rows = to.tokens.shape
    assert (count, rows) == block_shape(chosen.size, experts) and count <= 2 * experts
    places = np.asarray(to.rows)
    assert len(set(places.ravel().tolist())) == chosen.size  # a row of its own for every pair
    np.testing.assert_array_equal(np.asarray(to.expert)[places // rows], chosen)
    held = np.asarray(to.tokens).ravel()
    np.testing.assert_array_equal(held[places], np.broadcast_to(np.arange(tokens)[:, None], chosen.shape))
    assert (held < tokens).sum() == chosen.size
    random = np.random.default_rng(1)
    x, w = (random.normal(size=shape).astype(np.float32) for shape in ((tokens, 3), (experts, 3, 2)))
    weights = random.random(chosen.shape).astype(np.float32)
    got = to.combine(block_product(to.gather(jnp.asarray(x)), jnp.asarray(w), to.expert), jnp.asarray(weights))
    np.testing.assert_allclose(got, np.einsum("nd,nkdo,nk->no", x, w[chosen], weights), atol=1e-5)


def test_the_backward_pass_keeps_no_copy_of_the_weights() -> None:
    x, w = jnp.ones((12, 4)), jnp.ones((6, 4, 5))
    to = dispatch(jnp.asarray(ROUTINGS["at random"][:12], jnp.int32), 6)
    _, back = jax.vjp(lambda x, w: block_product(to.gather(x), w, to.expert), x, w)
    kept = {leaf.shape for leaf in jax.tree.leaves(back)}
    assert w.shape in kept and (len(to.expert), 4, 5) not in kept


def test_a_router_s_weights_are_the_largest_of_a_softmax_over_all_experts() -> None:
    logits = jnp.asarray([[1.0, 3.0, 2.0, -1.0], [0.0, 0.0, 5.0, 4.0]])
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    chosen, weights = route(logits, 2, False)
    np.testing.assert_array_equal(chosen, [[1, 2], [2, 3]])
    np.testing.assert_allclose(weights, [shares[0, [1, 2]], shares[1, [2, 3]]], rtol=1e-6)
    normed = route(logits.astype(jnp.bfloat16), 2, True)[1]
    assert normed.dtype == jnp.float32
    np.testing.assert_allclose(normed, weights / weights.sum(1, keepdims=True), rtol=1e-6)


def test_a_row_s_logits_do_not_depend_on_padding_or_on_the_rows_beside_it(x64) -> None:
    """Other rows change which block a token lies in, and nothing else: no expert is ever full."""
    model, tokens = made(QWEN), checks.tokens(rows=6, length=9)
    together = np.asarray(model.logits(tokens))
    for i in range(2):
        alone = np.asarray(model.logits(tokens[i : i + 1, :5]))
        np.testing.assert_allclose(alone, together[i : i + 1, :5], rtol=1e-10, atol=1e-12)


def test_a_token_is_multiplied_with_the_experts_it_goes_to(x64) -> None:
    whole, width, inner = made(QWEN), 6, 5
    expected = 2 * width * 8 + 2 * width * 4 + width * 5 + 2 * 3 * width * inner + 96 * width
    assert multiplied_weights(whole.params, whole.config) == expected


@pytest.mark.parametrize(
    ("path", "shape", "spec"),
    [
        ("layers/mlp/gate/kernel", (2, 6, 8, 4), PartitionSpec(None, None, None, "model")),
        ("layers/mlp/down/kernel", (2, 6, 4, 8), PartitionSpec(None, None, "model", None)),
        ("layers/mlp/router/kernel", (2, 8, 6), PartitionSpec()),
        ("layers/mlp/up/lora_a", (2, 6, 8, 2), PartitionSpec()),
    ],
)
def test_each_expert_is_split_over_a_mesh_and_their_axis_is_not(path, shape, spec) -> None:
    mesh = make_mesh(data=1, model=2, devices=jax.devices()[:2])
    assert weight_sharding(path, shape, mesh, QWEN.split(path)).spec == spec


def test_logits_do_not_depend_on_the_mesh_a_checkpoint_is_spread_over() -> None:
    mesh = make_mesh(data=2, model=2, devices=jax.devices()[:4])
    alone = load_lm(GOLDEN / "mixtral", lora=LORA)
    spread = load_lm(GOLDEN / "mixtral", lora=LORA, mesh=mesh, weights="fully-sharded")
    shard = spread.params["layers"]["mlp"]["gate"]["kernel"].addressable_shards[0].data
    assert shard.shape == (2, 4, 12, 10)
    np.testing.assert_allclose(spread.logits(checks.tokens()), alone.logits(checks.tokens()), atol=1e-5)


# -- LoRA --


def test_targets_are_our_names_and_those_of_the_checkpoint() -> None:
    linears = tuple(QWEN.linears)
    of = lambda *targets: LoraConfig(targets=targets).matches(linears)
    assert of("all-linear") == linears == (*of("attention"), *of("mlp"))
    assert of("gate_proj", "up_proj", "down_proj") == of("w1", "w2", "w3") == ("mlp/gate", "mlp/up", "mlp/down")
    assert of("mlp.gate") == of("router") == of("block_sparse_moe.gate") == ("mlp/router",)
    with pytest.raises(ConfigError, match=r"'gate' has two meanings.*mlp/router in its checkpoint, mlp/gate here"):
        of("gate")
    dense = ("attention/q", "mlp/gate", "mlp/up", "mlp/down")
    assert LoraConfig(targets=("gate",)).matches(dense) == ("mlp/gate",)


EXPERT = {
    "mixtral": ("block_sparse_moe.gate", "block_sparse_moe.experts.{}.", ("w1", "w2", "w3")),
    "qwen3-moe": ("mlp.gate", "mlp.experts.{}.", ("gate_proj", "up_proj", "down_proj")),
}


@pytest.mark.parametrize("name", EXPERT)
def test_an_adapter_has_peft_s_names_of_every_expert_and_is_read_as_it_was(name: str, tmp_path: Path) -> None:
    model = checks.adapted(GOLDEN / name)
    save_adapter(tmp_path, model, model.lora)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    router, expert, linears = EXPERT[name]
    modules = {router, *(f"{expert.format(e)}{x}" for e in range(model.config.num_experts) for x in linears)}
    modules |= {f"self_attn.{x}_proj" for x in "qkvo"}
    assert tensors.keys() == {
        f"base_model.model.model.layers.{i}.{module}.lora_{part}.weight"
        for i in range(2) for module in modules for part in "AB"
    }  # fmt: skip
    at = f"base_model.model.model.layers.1.{expert.format(3)}{linears[1]}.lora_A.weight"
    ours = model.lora["layers"]["mlp"]["down" if name == "mixtral" else "up"]["lora_a"][1, 3]
    np.testing.assert_array_equal(tensors[at], np.asarray(ours).T)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert set(config["target_modules"]) == {"q_proj", "k_proj", "v_proj", "o_proj", "gate", *linears}
    again = load_lm(GOLDEN / name, lora=adapter_lora_config(tmp_path))
    assert again.lora_config == LoraConfig(2, 3.0, tuple(sorted(model.config.linears)))
    jax.tree.map(np.testing.assert_array_equal, load_adapter(tmp_path, again), model.lora)


def test_layers_and_experts_that_an_adapter_leaves_out_have_zeros(tmp_path: Path) -> None:
    model = checks.adapted(GOLDEN / "qwen3-moe")
    save_adapter(tmp_path, model, model.lora)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    kept = {key: value for key, value in tensors.items() if ".layers.1." in key and ".experts.4." not in key}
    save_file(kept, tmp_path / "adapter_model.safetensors")
    said = {
        "layers_to_transform": [1],
        "target_modules": r".*layers\.(0|1)\..*",
        "exclude_modules": r".*experts\.4\..*",
    }
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | said))
    for path, value in paths(load_adapter(tmp_path, model)).items():
        whole = np.array(paths(model.lora)[path])
        whole[0] = 0
        if whole.ndim == 4:
            whole[1, 4] = 0
        np.testing.assert_array_equal(value, whole, err_msg=path)


def test_the_fused_experts_of_transformers_5_are_refused_by_name(tmp_path: Path) -> None:
    model = checks.adapted(GOLDEN / "qwen3-moe")
    save_adapter(tmp_path, model, model.lora)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"target_parameters": ["gate_up_proj"]}))
    with pytest.raises(CheckpointError, match=r"target_parameters = \['gate_up_proj'\].*fused experts.*merge it"):
        load_adapter(tmp_path, model)


def test_a_merge_adds_each_expert_s_adapter_to_its_own_tensor(tmp_path: Path) -> None:
    model = checks.adapted(GOLDEN / "mixtral")
    save_merged(tmp_path, model, {})
    base, merged = load_file(GOLDEN / "mixtral" / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert merged.keys() == base.keys()
    leaf = model.params["layers"]["mlp"]["up"]
    for layer, e in np.ndindex(2, 4):
        name = f"model.layers.{layer}.block_sparse_moe.experts.{e}.w3.weight"
        delta = 1.5 * np.asarray(leaf["lora_a"])[layer, e] @ np.asarray(leaf["lora_b"])[layer, e]
        np.testing.assert_allclose(merged[name], base[name] + delta.T, atol=1e-6)


# -- checkpoints that do not fit --


def changed(folder: Path, name: str, change) -> Path:
    shutil.copytree(GOLDEN / name, folder / name)
    weights = folder / name / "model.safetensors"
    tensors = load_file(weights)
    change(tensors)
    save_file(tensors, weights)
    return folder / name


def test_a_missing_expert_is_named(tmp_path: Path) -> None:
    gone = "model.layers.1.mlp.experts.5.up_proj.weight"
    with pytest.raises(CheckpointError, match=re.escape(f"tensor '{gone}' is missing")):
        load_lm(changed(tmp_path / "a", "qwen3-moe", lambda tensors: tensors.pop(gone)))
    gone = "model.layers.0.block_sparse_moe.gate.weight"
    with pytest.raises(CheckpointError, match=re.escape(f"tensor '{gone}' is missing")):
        load_lm(changed(tmp_path / "b", "mixtral", lambda tensors: tensors.pop(gone)))


def test_experts_in_one_tensor_are_refused_with_the_way_to_separate_them(tmp_path: Path) -> None:
    def fuse(tensors):
        for i in range(2):
            for x in ("gate_proj", "up_proj", "down_proj"):
                parts = [tensors.pop(f"model.layers.{i}.mlp.experts.{e}.{x}.weight") for e in range(6)]
                tensors[f"model.layers.{i}.mlp.experts.{x}"] = np.stack(parts)

    with pytest.raises(
        CheckpointError, match=r"missing \('model.layers.0.mlp.experts.down_proj' seems.*save_pretrained"
    ):
        load_lm(changed(tmp_path, "qwen3-moe", fuse))


def test_an_expert_too_many_or_of_another_shape_is_named(tmp_path: Path) -> None:
    name = "model.layers.1.block_sparse_moe.experts.{}.w2.weight"
    more = lambda tensors: tensors.update({name.format(4): tensors[name.format(3)]})
    with pytest.raises(CheckpointError, match=re.escape(name.format(4))):
        load_lm(changed(tmp_path / "a", "mixtral", more))
    cut = lambda tensors: tensors.update({name.format(2): np.ascontiguousarray(tensors[name.format(2)][:, 1:])})
    with pytest.raises(CheckpointError, match=re.escape(f"{name.format(2)!r} has shape [24, 19]")):
        load_lm(changed(tmp_path / "b", "mixtral", cut))


def test_more_experts_than_tensors_are_refused_before_anything_is_made(tmp_path: Path) -> None:
    folder = changed(tmp_path, "mixtral", lambda tensors: None)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_local_experts": 2**31 - 1}))
    with pytest.raises(CheckpointError, match="2 layers of 2147483647 experts: there are only"):
        load_lm(folder)


def test_a_shape_without_experts_for_its_tokens_is_refused() -> None:
    for experts, per_token in ((0, 0), (4, 0), (4, 5)):
        with pytest.raises(CheckpointError, match=f"experts_per_token = {per_token} with num_experts = {experts}"):
            ModelConfig(family="mixtral", norm_topk=True, num_experts=experts, experts_per_token=per_token, **SIZES)
    with pytest.raises(CheckpointError, match="num_experts = 4 with family 'llama', which has no experts"):
        ModelConfig(family="llama", num_experts=4, experts_per_token=1, **SIZES)
