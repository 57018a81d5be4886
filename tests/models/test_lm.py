"""Model functions: overlay, pooling, invariances, derivatives, and that nothing is traced twice."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntkjax.errors import ConfigError, UserError
from ntkjax.models import LoraConfig, ModelConfig, functions, init_lm, overlay
from ntkjax.models.lm import paths
from ntkjax.ntk import sum_logits
from ntkjax.types import Batch, forward_mode

CONFIG = ModelConfig(
    family="qwen2", vocab_size=37, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=4,
    num_kv_heads=2, head_dim=4, qkv_bias=True, initializer_range=0.3,
)  # fmt: skip
LENGTHS, STARTS = (7, 5, 8), (3, 2, 6)


def model_with_b(dtype: str = "float32", **keys):
    """A model whose adapter is not the identity: B is drawn too, so that every gradient is non-zero."""
    model = init_lm(CONFIG, seed=0, lora=LoraConfig(rank=2, targets=("q", "down")), dtype=dtype, **keys)
    rng = np.random.default_rng(5)
    fresh = jax.tree.map(lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape), x.dtype), model.lora)
    return model.with_params(fresh)


def make_batch(order=(0, 1, 2), width=8) -> Batch:
    rng = np.random.default_rng(1)
    rows = [rng.integers(1, 37, n).astype(np.int32) for n in LENGTHS]
    tokens, mask = np.zeros((len(order), width), np.int32), np.zeros((len(order), width), bool)
    for i, row in enumerate(order):
        tokens[i, : LENGTHS[row]] = rows[row]
        mask[i, STARTS[row] : LENGTHS[row]] = True
    lengths = np.array([LENGTHS[r] for r in order], np.int32)
    return Batch(tokens, mask, lengths, np.array(order, np.int32))


@jax.jit
def run(fn, params, batch):
    return fn(params, batch)


def log_probabilities(model, batch):
    logits = np.asarray(model.logits(np.asarray(batch.tokens)), np.float64)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def test_outputs_are_the_formulas():
    model, batch = model_with_b(), make_batch()
    logits, logp = np.asarray(model.logits(batch.tokens)), log_probabilities(model, batch)
    kinds = ("apply", "hidden", "nll", "entropy", "margin", "error", "embed", "weighted_embed", "states")
    fns = {kind: model.output(kind) for kind in kinds}
    fns |= {"all": model.output("nll", "all"), "last": model.output("hidden", "last")}
    got = jax.jit(lambda fns, batch: {kind: fn({}, batch) for kind, fn in fns.items()})(fns, batch)
    states, head = np.asarray(got["states"]), np.asarray(model.head_fn({}))
    np.testing.assert_allclose(states @ head.T, logits, atol=1e-5)
    for i, (n, start) in enumerate(zip(LENGTHS, STARTS)):
        at = np.arange(start - 1, n - 1)
        np.testing.assert_allclose(got["hidden"][i], states[i, at].mean(0), atol=1e-5)
        np.testing.assert_allclose(got["apply"][i], logits[i, at].mean(0), atol=1e-5)
        np.testing.assert_allclose(got["embed"][i], states[i, :n].mean(0), atol=1e-5)
        weights = np.arange(1, n + 1) / (n * (n + 1) / 2)
        np.testing.assert_allclose(got["weighted_embed"][i], weights @ states[i, :n], atol=1e-5)
        np.testing.assert_allclose(got["nll"][i], -logp[i, at, batch.tokens[i, at + 1]].mean(), atol=1e-5)
        entropy = -(np.exp(logp[i, at]) * logp[i, at]).sum(-1)
        np.testing.assert_allclose(got["entropy"][i], entropy.mean(), atol=1e-5)
        p = np.exp(logp[i, at, batch.tokens[i, at + 1]])
        np.testing.assert_allclose(got["margin"][i], np.log(p / (1 - p)).mean(), atol=1e-5)
        np.testing.assert_allclose(got["error"][i], (1 - p).mean(), atol=1e-6)
        every = np.arange(n - 1)
        np.testing.assert_allclose(got["all"][i], -logp[i, every, batch.tokens[i, every + 1]].mean(), atol=1e-5)
        np.testing.assert_allclose(got["last"][i], states[i, n - 2], atol=1e-5)


def test_large_logits_in_slices_change_neither_value_nor_derivatives(monkeypatch):
    model, batch = model_with_b(), make_batch()

    def derivatives(fn, p):
        loss = lambda p: fn(p, batch)
        return jax.jvp(loss, (p,), (p,)), jax.grad(lambda p: loss(p).sum())(p)

    whole = jax.jit(derivatives)(model.nll_fn, model.lora)
    monkeypatch.setattr(functions, "MAX_LOGITS", 3 * 37 * 3)  # slices of 3 tokens: 8 is not a multiple
    sliced = jax.jit(lambda fn, p: derivatives(fn, p))(model.nll_fn, model.lora)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(sliced)):
        np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("cap", [None, 5.0])
@pytest.mark.parametrize("kind", ["nll", "entropy", "margin"])
@pytest.mark.parametrize("most", [functions.MAX_LOGITS, 3 * 37 * 3])
def test_derivatives_by_states_and_head_in_bfloat16_are_those_in_float32_but_for_rounding(monkeypatch, kind, cap, most):
    """In reverse and in forward mode; at once, and in slices of 3 tokens."""
    monkeypatch.setattr(functions, "MAX_LOGITS", most)
    model = init_lm(dataclasses.replace(CONFIG, logit_cap=cap), seed=0, dtype="bfloat16")
    rng = np.random.default_rng(2)
    states, moved = (jnp.asarray(rng.normal(size=(3, 8, 16)), jnp.bfloat16).astype(jnp.float32) for _ in range(2))
    head = model.params["head"]["kernel"].astype(jnp.float32)
    tokens = jnp.asarray(rng.integers(0, 37, (3, 8)), jnp.int32)
    of = {"nll": functions.token_nll, "entropy": functions.token_entropy, "margin": functions.token_margin}[kind]

    def run(dtype: str) -> tuple:
        spec = dataclasses.replace(model.spec, dtype=dtype)
        more = () if kind == "entropy" else (tokens,)
        fn = lambda states, head: of(spec, {"head": {"kernel": head.astype(dtype)}}, states, *more)[:, :-1]
        alone = jax.grad(lambda states: fn(states, head).sum())(states)
        value, along = jax.jvp(lambda states: fn(states, head), (states,), (moved,))
        return (value, alone, along, *jax.grad(lambda *x: fn(*x).sum(), argnums=(0, 1))(states, head))

    for half, whole in zip(jax.jit(run, static_argnums=0)("bfloat16"), jax.jit(run, static_argnums=0)("float32")):
        error = np.linalg.norm(np.asarray(half) - np.asarray(whole)) / np.linalg.norm(whole)
        assert half.dtype == jnp.float32 and error < 2**-7


def test_entropy_of_a_prediction_that_knows_nothing_and_of_one_that_knows_all(monkeypatch):
    """log V where all logits are equal; 0 where one is far above the others; the same a slice of T at a time."""
    model, batch = model_with_b(), make_batch()
    flat = model.with_params({"head": {"kernel": jnp.zeros_like(model.params["head"]["kernel"])}})
    np.testing.assert_allclose(run(flat.entropy_fn, {}, batch), np.log(37), rtol=1e-6)
    steep = model.with_params({"head": {"kernel": 1e3 * model.params["head"]["kernel"]}})
    found = np.asarray(run(steep.entropy_fn, {}, batch))
    assert np.isfinite(found).all() and (found >= 0).all() and found.max() < 0.5
    whole = np.asarray(run(model.entropy_fn, {}, batch))
    monkeypatch.setattr(functions, "MAX_LOGITS", 3 * 37 * 3)
    sliced = jax.jit(lambda fn, batch: fn({}, batch))(model.entropy_fn, batch)
    np.testing.assert_allclose(sliced, whole, atol=1e-6)


def test_margins_stay_finite_where_a_prediction_is_certain(monkeypatch):
    """log(p / (1 - p)) grows with the logits where p rounds to 1; the same a slice of T at a time."""
    model, batch = model_with_b(), make_batch()
    scaled = lambda by: model.with_params({"head": {"kernel": by * model.params["head"]["kernel"]}})
    steep = [np.asarray(run(scaled(by).margin_fn, {}, batch), np.float64) for by in (500.0, 1000.0)]
    assert np.abs(steep[1]).max() > 100
    np.testing.assert_allclose(steep[1], 2 * steep[0], rtol=0.02, atol=1)
    whole = np.asarray(run(model.margin_fn, {}, batch))
    monkeypatch.setattr(functions, "MAX_LOGITS", 3 * 37 * 3)
    sliced = jax.jit(lambda fn, batch: fn({}, batch))(model.margin_fn, batch)
    np.testing.assert_allclose(sliced, whole, atol=1e-5)


@pytest.mark.parametrize("kind", ["apply", "hidden", "nll", "entropy", "margin", "error", "embed", "weighted_embed"])
def test_padding_order_and_company_do_not_matter(kind):
    fn = model_with_b().output(kind)
    together = np.asarray(run(fn, {}, make_batch()))
    # 1e-6 of the size of the outputs, which are of order one.
    same = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6 * max(1, np.abs(together).max()), rtol=0)
    same(run(fn, {}, make_batch(width=13)), together)
    same(run(fn, {}, make_batch((2, 0, 1))), together[[2, 0, 1]])
    same(run(fn, {}, make_batch((1,), width=5))[0], together[1])


def test_an_empty_row_is_exactly_zero_in_value_and_gradient():
    model, batch = model_with_b(), make_batch()
    lengths, mask = np.array(batch.lengths), np.array(batch.response_mask)
    lengths[1], mask[1] = 1, False
    batch = dataclasses.replace(batch, lengths=lengths, response_mask=mask, index=np.array([0, -1, 2], np.int32))
    fns = [model.output(kind, at) for kind in ("apply", "hidden", "nll") for at in ("response", "all", "last")]
    values = jax.jit(lambda fns: [fn({}, batch) for fn in fns])(fns)
    assert all(np.all(np.asarray(value[1]) == 0) and np.any(np.asarray(value[0]) != 0) for value in values)
    gradient = jax.jit(jax.grad(lambda p, fn: fn(p, batch)[1]))(model.lora, model.nll_fn)
    assert all(np.all(np.asarray(g) == 0) for g in jax.tree.leaves(gradient))


def test_fresh_adapters_leave_the_model_as_it_is():
    base = init_lm(CONFIG, seed=0)
    fresh = init_lm(CONFIG, seed=0, lora=LoraConfig(rank=4))
    np.testing.assert_array_equal(base.logits(make_batch().tokens), fresh.logits(make_batch().tokens))
    assert not np.allclose(base.logits(make_batch().tokens), model_with_b().logits(make_batch().tokens), atol=1e-2)
    assert base.lora == {}


def test_overlay_takes_any_subset_and_copies_nothing():
    model, batch = model_with_b(), make_batch()
    changed = {"layers": {"mlp": {"up": {"kernel": 2 * model.params["layers"]["mlp"]["up"]["kernel"]}}}}
    by_argument = run(model.nll_fn, changed, batch)
    by_model = run(model.with_params(changed).nll_fn, {}, batch)
    np.testing.assert_array_equal(by_argument, by_model)
    unchanged = run(model.nll_fn, {}, batch)
    assert not np.allclose(by_argument, unchanged, atol=1e-3)
    np.testing.assert_array_equal(run(model.nll_fn, model.params, batch), unchanged)
    laid = overlay(model.params, changed)
    assert laid["embed"]["weight"] is model.params["embed"]["weight"]
    head = model.head_fn({"head": {"kernel": jnp.ones((37, 16))}})
    np.testing.assert_array_equal(head, np.ones((37, 16)))


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"layers": {"attention": {"z": {"kernel": 0}}}}, ["layers/attention/z", "q, k, v"]),
        ({"layers": {"attention": 0}}, ["layers/attention"]),
        ({"embed": {"weight": np.zeros((3, 4), np.float32)}}, ["embed/weight", "(3, 4)", "(37, 16)"]),
    ],
)
def test_overlay_names_what_does_not_fit(params, words):
    with pytest.raises(UserError) as error:
        model_with_b().hidden_fn(params, make_batch())
    assert all(word in str(error.value).replace("k, o, q, v", "q, k, v") for word in words)


def test_select_params():
    model = model_with_b()
    assert set(paths(model.select_params("lora"))) == {p for p in paths(model.params) if "lora_" in p}
    assert paths(model.select_params("all")).keys() == paths(model.params).keys()
    assert set(paths(model.select_params(r"norm"))) == {
        "layers/norm_1/scale", "layers/norm_2/scale", "norm/scale",
    }  # fmt: skip
    for bad, kind in (("nothing_like_it", UserError), ("(", ConfigError)):
        with pytest.raises(kind):
            model.select_params(bad)
    with pytest.raises(UserError):
        init_lm(CONFIG, seed=0).select_params("lora")


def test_unknown_outputs_positions_dtypes_and_tokens_are_refused():
    model = init_lm(CONFIG, seed=0)
    with pytest.raises(ConfigError, match=r"hiden.*hidden"):
        model.output("hiden")
    with pytest.raises(ConfigError, match=r"first.*response"):
        model.output("nll", "first")
    with pytest.raises(ConfigError, match=r"int4.*bfloat16"):
        init_lm(CONFIG, seed=0, dtype="int4")
    with pytest.raises(ConfigError, match="JAX_ENABLE_X64"):
        init_lm(CONFIG, seed=0, dtype="float64")
    for tokens in ([[1, 37]], [[-1, 2]]):
        with pytest.raises(UserError, match="vocabulary"):
            model.logits(np.array(tokens))
    with pytest.raises(UserError, match="expected integers"):
        model.logits([[0.5, 1.0]])


def test_functions_are_arguments_and_are_traced_once():
    model, batch, traces = model_with_b(), make_batch(), []

    @jax.jit
    def apply(fn, params, batch):
        traces.append(fn.kind)
        return fn(params, batch)

    first = apply(model.nll_fn, model.lora, batch)
    apply(model.nll_fn, model.lora, batch)
    other = model.with_params({"norm": {"scale": 2 * model.params["norm"]["scale"]}})
    second = apply(other.nll_fn, other.lora, batch)
    assert traces == ["nll"]
    assert not np.allclose(first, second, atol=1e-3)
    apply(model.hidden_fn, model.lora, batch)
    assert traces == ["nll", "hidden"]
    jaxpr = jax.make_jaxpr(lambda fn, p: fn(p, batch))(model.nll_fn, model.lora)
    weights = {leaf.shape for leaf in jax.tree.leaves(model.params)}
    # What remains captured is the batch and the rope frequencies, no weight.
    assert all(const.shape not in weights or const.dtype == bool for const in jaxpr.consts if hasattr(const, "shape"))


@pytest.mark.parametrize("kind", ["nll", "hidden"])
def test_forward_and_reverse_mode_agree_with_finite_differences(kind, x64):
    model, batch = model_with_b("float64"), make_batch()
    rng = np.random.default_rng(7)
    probe = jnp.asarray(rng.normal(size=16))
    fn = lambda p: model.nll_fn(p, batch).sum() if kind == "nll" else (model.hidden_fn(p, batch) @ probe).sum()
    fn = jax.jit(fn)
    tangent = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape)), model.lora)
    moved = lambda eps: fn(jax.tree.map(lambda p, t: p + eps * t, model.lora, tangent))
    value, slope = jax.jvp(fn, (model.lora,), (tangent,))
    assert value.dtype == jnp.float64
    gradient = jax.grad(fn)(model.lora)
    dot = sum(jnp.vdot(g, t) for g, t in zip(jax.tree.leaves(gradient), jax.tree.leaves(tangent)))
    np.testing.assert_allclose(slope, dot, rtol=1e-10)
    # Central differences: error of order eps^2 times the third derivative.
    np.testing.assert_allclose(slope, (moved(1e-6) - moved(-1e-6)) / 2e-6, rtol=1e-5)


def test_per_example_gradients_by_vmap_equal_one_at_a_time():
    model, batch = model_with_b(), make_batch()
    rows = tuple(jnp.asarray(x) for x in (batch.tokens, batch.response_mask, batch.lengths, batch.index))

    def loss(params, *row):
        return model.nll_fn(params, Batch(*(x[None] for x in row)))[0]

    each = jax.jit(jax.vmap(jax.grad(loss), (None, 0, 0, 0, 0)))(model.lora, *rows)
    single = jax.jit(jax.grad(loss))
    for i in range(3):
        expected = single(model.lora, *(x[i] for x in rows))
        for a, b in zip(jax.tree.leaves(each), jax.tree.leaves(expected)):
            np.testing.assert_allclose(a[i], b, atol=1e-6, rtol=1e-4)


def test_random_weights_depend_on_the_seed_alone():
    a, b = init_lm(CONFIG, seed=1), init_lm(CONFIG, seed=1, lora=LoraConfig(rank=2), remat=True)
    np.testing.assert_array_equal(a.params["embed"]["weight"], b.params["embed"]["weight"])
    other = init_lm(CONFIG, seed=2).params["embed"]["weight"]
    assert not np.array_equal(a.params["embed"]["weight"], other)
    assert abs(float(jnp.std(other)) / CONFIG.initializer_range - 1) < 0.1


def test_in_their_form_for_forward_mode_functions_have_the_same_values_and_tangents(x64):
    model, batch = model_with_b("float64"), make_batch()
    tangent = jax.tree.map(lambda x: 1.0 + 0.1 * x, model.lora)
    folded = sum_logits(model.hidden_fn, model.head_fn({}))
    assert forward_mode(folded).hidden_fn.spec.forward_mode and not model.spec.forward_mode
    for fn in (model.hidden_fn, model.nll_fn, folded):
        move = jax.jit(lambda fn: jax.jvp(lambda p: fn(p, batch), (model.lora,), (tangent,)))
        close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)
        jax.tree.map(close, move(forward_mode(fn)), move(fn))
