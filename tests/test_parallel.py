"""Meshes, sharding rules, and the same logits on one device and on many (simulated)."""

import json

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from ntkjax.data import TokenisedDataset
from ntkjax.errors import ConfigError
from ntkjax.models import LoraConfig, ModelConfig, init_lm, load_lm
from ntkjax.models.lm import paths
from ntkjax.ntk.features import gradient_features
from ntkjax.ntk.outputs import sum_logits
from ntkjax.ntk.scores import kernel_scores
from ntkjax.ntk.sketch import RademacherSketch
from ntkjax.parallel import Split, describe_mesh, make_mesh, mesh_of, parse_mesh, put, shard_batch, weight_sharding
from ntkjax.selection.vote import embed
from ntkjax.training import TrainConfig, fit
from ntkjax.training.step import train_step
from ntkjax.types import Batch

CONFIG = ModelConfig(
    family="qwen2", vocab_size=64, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4,
    num_kv_heads=2, head_dim=8, qkv_bias=True, initializer_range=0.2,
)  # fmt: skip


def need(count: int) -> list[jax.Device]:
    if len(jax.devices()) < count:
        pytest.skip(f"needs {count} devices")
    return jax.devices()[:count]


@pytest.mark.parametrize(("data", "model", "near"), [(3, 1, (4, 1)), (2, 3, (2, 2)), (1, 2, (2, 2)), (0, 4, (1, 4))])
def test_a_mesh_that_does_not_fit_names_the_nearest_that_does(data, model, near):
    with pytest.raises(ConfigError, match=f"there are 4.*data={near[0]}, model={near[1]}"):
        make_mesh(data=data, model=model, devices=need(4))


def test_a_mesh_of_three_axes_that_does_not_fit_names_all_three():
    with pytest.raises(ConfigError, match=r"data=2 x fsdp=3 x model=1 needs 6 .* data=2, fsdp=4, model=1"):
        make_mesh(data=2, fsdp=3, devices=need(8))


def test_weights_are_split_over_fsdp_and_rows_over_data_and_fsdp():
    mesh = make_mesh(data=2, fsdp=2, model=2, devices=need(8))
    where = lambda path, shape: weight_sharding(path, shape, mesh, CONFIG.split(path)).spec
    assert where("layers/attention/q/kernel", (2, 32, 64)) == PartitionSpec(None, "fsdp", "model")
    assert where("embed/weight", (64, 32)) == PartitionSpec("model", "fsdp")
    assert where("layers/attention/q/lora_a", (2, 32, 4)) == where("norm/scale", (32,)) == PartitionSpec()
    assert shard_batch(np.zeros((8, 3)), mesh).sharding.spec == PartitionSpec(("data", "fsdp"))
    with pytest.raises(ConfigError, match=r"6 rows does not divide over data x fsdp=4 devices; .* has 8"):
        shard_batch(np.zeros((6, 3)), mesh)


@pytest.mark.parametrize(
    ("path", "shape", "spec"),
    [
        ("layers/attention/q/kernel", (2, 32, 64), PartitionSpec(None, None, "model")),
        ("layers/attention/k/bias", (2, 64), PartitionSpec(None, "model")),
        ("layers/attention/o/kernel", (2, 64, 32), PartitionSpec(None, "model", None)),
        ("layers/attention/o/bias", (2, 32), PartitionSpec()),
        ("layers/mlp/gate/kernel", (2, 32, 48), PartitionSpec(None, None, "model")),
        ("layers/mlp/down/kernel", (2, 48, 32), PartitionSpec(None, "model", None)),
        ("layers/mlp/down/lora_a", (2, 48, 4), PartitionSpec()),
        ("embed/weight", (64, 32), PartitionSpec("model", None)),
        ("head/kernel", (64, 32), PartitionSpec("model", None)),
        ("layers/norm_1/scale", (2, 32), PartitionSpec()),
        ("wpe/weight", (64, 32), PartitionSpec()),
    ],
)
def test_the_sharding_rule(path, shape, spec):
    mesh = make_mesh(data=1, model=4, devices=need(4))
    assert weight_sharding(path, shape, mesh, CONFIG.split(path)).spec == spec


def test_an_axis_that_does_not_divide_is_an_error_that_names_what_would():
    mesh = make_mesh(data=1, model=4, devices=need(4))
    with pytest.raises(ConfigError, match=r"embed/weight.*model=4.*model=2 would"):
        weight_sharding("embed/weight", (66, 32), mesh, CONFIG.split("embed/weight"))
    with pytest.raises(ConfigError, match="6 rows"):
        rows = np.zeros((6, 4), np.int32)
        shard_batch({"tokens": rows}, make_mesh(data=4, devices=need(4)))


@pytest.mark.parametrize(("data", "model"), [(1, 2), (2, 2), (2, 4)])
def test_logits_and_gradients_do_not_depend_on_the_mesh(data, model):
    mesh = make_mesh(data=data, model=model, devices=need(data * model))
    alone = init_lm(CONFIG, seed=1, lora=LoraConfig(rank=2))
    spread = init_lm(CONFIG, seed=1, lora=LoraConfig(rank=2), mesh=mesh)
    if model > 1:
        shard = spread.params["layers"]["attention"]["q"]["kernel"].addressable_shards[0].data
        assert shard.shape == (2, 32, 32 // model)
    tokens = np.random.default_rng(0).integers(0, 64, (8, 12)).astype(np.int32)
    np.testing.assert_allclose(spread.logits(tokens), alone.logits(tokens), atol=1e-5)
    batch = Batch(tokens, np.ones((8, 12), bool), np.full(8, 12, np.int32), np.arange(8, dtype=np.int32))
    gradient = jax.jit(jax.grad(lambda p, fn, b: fn(p, b).sum()))
    here = gradient(alone.lora, alone.nll_fn, batch)
    there = gradient(spread.lora, spread.nll_fn, shard_batch(batch, mesh))
    for path, value in paths(there).items():
        np.testing.assert_allclose(value, paths(here)[path], atol=1e-5, err_msg=path)


def test_a_checkpoint_is_spread_as_it_is_read(tmp_path):
    from safetensors.numpy import save_file

    from ntkjax.models.names import sources

    mesh = make_mesh(data=2, model=2, devices=need(4))
    model = init_lm(CONFIG, seed=3)
    flat, tensors = paths(model.params), {}
    for path, source in sources(model.spec).items():
        layers = range(2) if path.startswith("layers/") else [None]
        for i in layers:
            value = np.asarray(flat[path] if i is None else flat[path][i])
            tensors[source.name.format(i)] = np.ascontiguousarray(value.T if source.transpose else value)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG.to_hf()))
    loaded = load_lm(tmp_path, mesh=mesh, lora=None)
    for path, value in paths(loaded.params).items():
        assert value.sharding == put(np.asarray(value), path, mesh, CONFIG.split(path)).sharding, path
        np.testing.assert_array_equal(value, flat[path], err_msg=path)


# -- every pass, on every mesh --

SHAPES = [(d, n // d) for n in (2, 4, 8) for d in (1, 2, 4, 8) if n % d == 0]
SIZES = [9, 14, 12, 16, 9, 11, 15, 10, 13, 12, 16]  # 11 examples: a number that no mesh divides


def dataset(seed: int) -> TokenisedDataset:
    rng = np.random.default_rng(seed)
    return TokenisedDataset.from_sequences([rng.integers(1, 64, size).tolist() for size in SIZES], [3] * len(SIZES))


def passes(mesh, weights: str = "tensor") -> dict[str, np.ndarray]:
    """Embeddings, scores, gradient features and fine-tuned parameters, all on ``mesh`` (None: one device)."""
    model = init_lm(CONFIG, seed=1, lora=LoraConfig(rank=2), mesh=mesh, weights=weights)
    domain, pool = dataset(2).on(mesh), dataset(3).on(mesh)
    noise = np.random.default_rng(4)
    params = jax.tree.map(  # a B that is not zero
        lambda x: jax.device_put(noise.normal(size=x.shape).astype("f4") / 20, x.sharding), model.lora
    )
    batches = pool.batches(token_budget=64)
    kernel = sum_logits(model.hidden_fn, model.head_fn({}))
    scores = kernel_scores(
        kernel, params, domain.batches(token_budget=64), batches, rows=len(pool), references=[batches]
    ).scores
    sketched = gradient_features(kernel, params, batches, RademacherSketch(16, 0), rows=len(pool))
    embedded = embed(model.embed_fn, params, batches, rows=len(pool))(np.arange(len(pool)))
    config = TrainConfig(steps=3, batch_size=6, learning_rate=1e-3, max_buckets=1)
    tuned = fit(model.nll_fn, params, pool, config, seed=0, progress=False)
    found = {"scores": scores, "features": sketched, "embeddings": embedded}
    found |= {path: np.asarray(leaf) for path, leaf in paths(tuned.params).items()}
    return found | {"loss": np.array([line["loss"] for line in tuned.history])}


@pytest.mark.parametrize(("mesh", "weights"), [("fsdp=8", "tensor"), ("data=8", "fully-sharded")])
def test_gradients_of_single_examples_where_rows_and_weights_are_split_over_one_axis(mesh, weights):
    """One example is one row, which no mesh divides."""
    need(8)
    found = []
    for place in (None, mesh_of(mesh)):
        model = init_lm(CONFIG, seed=1, lora=LoraConfig(rank=2), mesh=place, weights=weights)
        batches = dataset(3).on(place).batches(token_budget=64, max_buckets=1)
        kernel = sum_logits(model.hidden_fn, model.head_fn({}))
        found.append(gradient_features(kernel, model.lora, batches, RademacherSketch(16, 0), rows=len(SIZES)))
        if place is not None:
            assert model.spec.gathered_on == place
    np.testing.assert_allclose(found[1], found[0], rtol=0, atol=1e-5 * np.abs(found[0]).max())


@pytest.fixture(scope="module")
def alone() -> dict[str, np.ndarray]:
    return passes(None)


def check_same(alone: dict[str, np.ndarray], data: int, model: int, weights: str) -> None:
    spread = passes(make_mesh(data=data, model=model, devices=need(data * model)), weights)
    for name, value in alone.items():
        scale = np.abs(value).max()
        np.testing.assert_allclose(spread[name] / scale, value / scale, rtol=0, atol=1e-5, err_msg=name)


@pytest.mark.slow
def test_no_pass_depends_on_the_mesh(alone):
    check_same(alone, 2, 2, "fully-sharded")  # rows over data, weights over both axes; all the other shapes are slow


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["tensor", "fully-sharded"])
@pytest.mark.parametrize(("data", "model"), SHAPES)
def test_no_pass_depends_on_any_mesh(alone, data, model, weights):
    check_same(alone, data, model, weights)


# -- meshes by name --


@pytest.mark.parametrize(
    ("text", "shape"),
    [("data=4,model=2", (4, 1, 2)), ("4,2", (4, 1, 2)), ("4x2", (4, 1, 2)), ("data=8", (8, 1, 1)), ("8", (8, 1, 1)),
     ("model=2", (None, 1, 2)), ("auto", (None, 1, 1)), ("data=4, model=2", (4, 1, 2)), ("fsdp=4", (None, 4, 1)),
     ("data=2,fsdp=2,model=2", (2, 2, 2)), ("fsdp=4,model=2", (None, 4, 2)), ("data=4,fsdp=2", (4, 2, 1))],
)  # fmt: skip
def test_a_mesh_by_name(text, shape):
    assert parse_mesh(text) == shape
    data, fsdp, model = shape
    if len(jax.local_devices()) == 8 and 8 % (fsdp * model) == 0:
        data = data or 8 // (fsdp * model)
        mesh = mesh_of(text)
        assert mesh == make_mesh(data=data, fsdp=fsdp, model=model) and mesh.size == 8
        assert describe_mesh(mesh) == f"data={data},fsdp={fsdp},model={model}".replace(",fsdp=1", "")


@pytest.mark.parametrize(
    "text",
    ["", "four", "data=0", "2,0", "model=2,data=4", "2x2x2", "-1", "fsdp=0", "2,fsdp=2", "data=2,data=2", "rows=2"],
)
def test_what_names_no_mesh(text):
    with pytest.raises(ConfigError, match="expected data=D,fsdp=F,model=M"):
        parse_mesh(text)


def test_fully_sharded_weights_are_split_over_both_axes():
    mesh = make_mesh(data=2, model=2, devices=need(4))
    where = lambda path, shape: weight_sharding(path, shape, mesh, CONFIG.split(path), "fully-sharded").spec
    assert where("layers/attention/q/kernel", (2, 32, 64)) == PartitionSpec(None, "data", "model")
    assert where("layers/mlp/down/kernel", (2, 48, 32)) == PartitionSpec(None, "model", "data")
    assert where("embed/weight", (64, 32)) == PartitionSpec("model", "data")
    assert where("layers/attention/q/lora_a", (2, 32, 4)) == where("norm/scale", (32,)) == PartitionSpec()
    mesh = make_mesh(data=2, fsdp=2, model=2, devices=need(8))
    assert where("layers/mlp/down/kernel", (2, 48, 32)) == PartitionSpec(None, "model", ("data", "fsdp"))
    with pytest.raises(ConfigError, match=r"mlp/down/kernel.*axis 2.*data x fsdp=4 devices; data x fsdp=2 would"):
        where("layers/mlp/down/kernel", (2, 48, 34))
    mesh = make_mesh(data=2, model=2, devices=need(4))
    with pytest.raises(ConfigError, match=r"mlp/up/kernel.*axis 1.*data=2.*data=1 would"):
        where("layers/mlp/up/kernel", (2, 33, 48))
    with pytest.raises(ConfigError, match="expected tensor or fully-sharded"):
        weight_sharding("norm/scale", (32,), mesh, Split(), "zero")


def test_training_keeps_its_layout_and_its_program():
    mesh = make_mesh(data=2, model=2, devices=need(4))
    model = init_lm(CONFIG, seed=1, lora=LoraConfig(rank=2), mesh=mesh)
    config = TrainConfig(steps=4, batch_size=6, max_buckets=1)
    before = train_step._cache_size()
    tuned = fit(model.nll_fn, model.lora, dataset(3).on(mesh), config, seed=0, progress=False)
    assert train_step._cache_size() == before + 1
    for leaf in jax.tree.leaves(tuned.params):
        assert leaf.sharding.spec == PartitionSpec() and len(leaf.sharding.device_set) == 4
