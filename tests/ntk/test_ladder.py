"""One sweep of gradients against kernel matrices computed one by one, and against the law of a Gaussian sketch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntkjax.errors import ConfigError
from ntkjax.ntk import KernelFunctions, NonFiniteError, build, kernel_matrix
from ntkjax.ntk.kernel import gradients
from ntkjax.ntk.ladder import OutputGrams, common_form, gaussian_sketch, hidden_gram, output_grams, square_root
from ntkjax.store import RowStore

ROWS = 6


def relative(a, b):
    return np.abs(a - b).max() / np.abs(b).max()


def case(toy, subset, dtype):
    """(functions, theta): the head is no parameter, one of its own, or the embedding."""
    base = toy.init(5, dtype)
    names = {"lora": ("lora_a", "lora_b"), "all": tuple(base), "tied": tuple(n for n in base if n != "head")}[subset]
    leaf = "embed" if subset == "tied" else "head"
    hidden = jax.tree_util.Partial(lambda base, p, b: toy.hidden_fn({**base, **p}, b), base)
    head = jax.tree_util.Partial(lambda base, p: {**base, **p}[leaf], base)
    return KernelFunctions(hidden, head), {name: base[name] for name in names}


def examples(toy):
    """The same six examples as one batch, and as batches of other sizes and lengths with fillers."""
    rows = toy.sequences(ROWS, 1)
    order = np.argsort([len(tokens) for tokens, _ in rows])
    parts = [toy.collate([rows[i] for i in order[:4]], order[:4], length=9, fill=1)]
    parts.append(toy.collate([rows[i] for i in order[4:]], order[4:], length=12))
    return toy.collate(rows, range(ROWS)), parts


def sweep(name, functions, params, batches, **options):
    kernel = build(name, functions, params, seed=3)
    base, selectors = common_form(kernel, functions, params)
    grams = output_grams(base, params, batches, rows=ROWS, selectors=selectors, **options)
    hidden = None if kernel.hidden_fn is None else hidden_gram(functions.hidden_fn, params, batches, rows=ROWS)
    return OutputGrams(grams, kernel.head_coefficient, hidden)


@pytest.mark.parametrize("subset", ["lora", "all", "tied"])
def test_prefixes_of_a_sweep_are_the_kernels_with_fewer_outputs(toy, x64, subset):
    functions, params = case(toy, subset, jnp.float64)
    whole, parts = examples(toy)
    one_by_one = lambda name: kernel_matrix(build(name, functions, params, seed=3), params, whole)
    raw = sweep("trace", functions, params, parts)
    assert relative(raw.matrix(4), one_by_one("spectral:4")) < 1e-10
    # the identity at the top of ladder.py
    assert relative(raw.matrix() - one_by_one("sum_logits") / toy.vocab, one_by_one("centred_trace")) < 1e-10
    assert relative(sweep("sum_logits", functions, params, parts).matrix(), one_by_one("sum_logits")) < 1e-10
    some = sweep("centred_spectral:4", functions, params, parts)
    assert relative(some.matrix(2), one_by_one("centred_spectral:2")) < 1e-10
    if subset == "all":  # nothing of these depends on whether the head is trained
        assert relative(raw.matrix(), one_by_one("trace")) < 1e-10
        probes = sweep("hutchinson:5", functions, params, parts)
        assert relative(probes.matrix(2, rescale=True), one_by_one("hutchinson:2")) < 1e-10
        with pytest.raises(ConfigError, match="of 1 to 5"):
            probes.matrix(6)


def test_kernels_of_one_model_run_one_program(toy):
    functions, params = case(toy, "tied", jnp.float32)
    parts = examples(toy)[1]
    compiled = gradients._cache_size()
    for name in ("trace", "sum_logits", "hutchinson:3", "centred_spectral:2"):
        sweep(name, functions, params, parts)
    assert gradients._cache_size() == compiled + len(parts)
    loss = build("loss", KernelFunctions(functions.hidden_fn, functions.head, functions.hidden_fn), params, seed=0)
    assert common_form(loss, functions, params) == (loss, None)


@pytest.mark.parametrize("budget", [1, 10**6])
def test_the_sweep_does_not_depend_on_the_budget(toy, budget):
    functions, params = case(toy, "all", jnp.float32)
    whole, parts = examples(toy)
    expected = kernel_matrix(build("trace", functions, params, seed=0), params, whole)
    assert relative(sweep("trace", functions, params, parts, memory_budget=budget).matrix(), expected) < 1e-5


def test_a_stopped_sweep_goes_on_with_the_outputs_that_are_missing(toy, tmp_path, monkeypatch):
    import ntkjax.ntk.ladder as ladder

    functions, params = case(toy, "lora", jnp.float32)
    parts = examples(toy)[1]
    kernel = build("trace", functions, params, seed=0)
    full = output_grams(kernel, params, parts, rows=ROWS)
    open_store = lambda: RowStore.open(tmp_path / "s", rows=6, width=ROWS**2, dtype="float64", manifest={})
    with open_store() as store:
        store.write(np.array([1, 4]), full[[1, 4]].reshape(2, -1))
    swept, real = [], ladder._block
    base, selectors = common_form(kernel, functions, params)
    which = lambda block: [int(np.flatnonzero((selectors == row).all(axis=1))[0]) for row in block if row.any()]
    monkeypatch.setattr(ladder, "_block", lambda *a, **k: swept.append(which(a[3])) or real(*a, **k))
    budget = 2 * ROWS * sum(4 * leaf.size for leaf in params.values())  # two outputs at a time
    with open_store() as store:
        found = output_grams(base, params, parts, rows=ROWS, selectors=selectors, store=store, memory_budget=budget)
    np.testing.assert_allclose(found, full, rtol=1e-5, atol=1e-7)
    assert swept == [[0, 2], [3, 5]]
    with open_store() as store:
        output_grams(base, params, parts, rows=ROWS, selectors=selectors, store=store)
    assert len(swept) == 2


def test_an_example_that_overflows_is_named_and_missing_rows_are_refused(toy):
    functions, params = case(toy, "lora", jnp.float32)
    whole, _ = examples(toy)
    kernel = build("sum_logits", functions, params, seed=0)
    with pytest.raises(ValueError, match="rows 0 to 6"):
        output_grams(kernel, params, [whole], rows=7)
    poisoned = jax.tree_util.Partial(
        lambda f, p, b: jnp.where((b.index == 2)[:, None], jnp.inf, 1.0) * f(p, b), functions.hidden_fn
    )
    kernel = build("sum_logits", KernelFunctions(poisoned, functions.head), params, seed=0)
    with pytest.raises(NonFiniteError) as caught:
        output_grams(kernel, params, [whole], rows=ROWS)
    assert caught.value.rows == [2]


@pytest.mark.parametrize("size", [2, 16])
def test_a_gaussian_sketch_has_the_mean_and_variance_of_its_law(size):
    """Below and above the rank of 3, where it is drawn in two ways."""
    rng = np.random.default_rng(0)
    g = rng.normal(size=(4, 3))
    k = g @ g.T
    root = square_root(k)
    np.testing.assert_allclose(root @ root.T, k, atol=1e-12)
    draws = np.array([gaussian_sketch(root, size, rng) for _ in range(8000)])
    variance = (np.outer(np.diag(k), np.diag(k)) + k * k) / size
    assert (np.abs(draws.mean(axis=0) - k) < 5 * np.sqrt(variance / 8000)).all()
    np.testing.assert_allclose(draws.var(axis=0), variance, rtol=0.15)
    with pytest.raises(ValueError, match="eigenvalues"):
        square_root(-k)
