"""Gram matrices, diagonals and scores of every named kernel against jax.jacobian and explicit definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ntkjax.ntk.scores as scores
from ntkjax.errors import ConfigError
from ntkjax.ntk import (
    IdentitySketch,
    KernelFunctions,
    Pass,
    RademacherSketch,
    build,
    gradient_features,
    kernel_diagonal,
    kernel_matrix,
    kernel_scores,
    parse,
    squared_norms,
)
from ntkjax.ntk.gram import count_rows

SUBSETS = ("lora", "all", "tied", "head alone")
NAMES = ("trace", "centred_trace", "sum_logits", "loss", "hutchinson:3", "spectral:2", "centred_spectral:2")


def relative(a, b):
    return np.abs(np.asarray(a) - np.asarray(b)).max() / np.abs(np.asarray(b)).max()


def case(toy, subset, dtype=jnp.float32):
    """(functions, logits F [B, V], theta): theta reaches the head as its own leaf, as the embedding, or not at all."""
    base = toy.init(5, dtype)
    if subset == "tied":
        base = {name: leaf for name, leaf in base.items() if name != "head"}
    trained = {
        "lora": ("lora_a", "lora_b"),
        "all": tuple(base),
        "tied": ("embed", "q", "lora_a"),
        "head alone": ("head",),
    }[subset]
    head_leaf = "embed" if subset == "tied" else "head"
    hidden = jax.tree_util.Partial(lambda base, p, b: toy.hidden_fn({**base, **p}, b), base)
    head = jax.tree_util.Partial(lambda base, p: {**base, **p}[head_leaf], base)
    logits = jax.tree_util.Partial(
        lambda base, p, b: toy.hidden_fn({**base, **p}, b) @ {**base, **p}[head_leaf].T, base
    )
    loss = jax.tree_util.Partial(lambda base, p, b: jnp.sum(toy.hidden_fn({**base, **p}, b) ** 2, axis=1), base)
    return KernelFunctions(hidden, head, loss), logits, {name: base[name] for name in trained}


def jacobian(fn, params, x):
    """[n, O, P] from jax.jacobian."""
    tree = toy_jacobian(fn, params, x)
    values = jax.eval_shape(fn, params, x)
    outputs = 1 if values.ndim == 1 else values.shape[1]
    flat = [np.asarray(leaf, np.float64).reshape(values.shape[0], outputs, -1) for leaf in jax.tree.leaves(tree)]
    return np.concatenate(flat, axis=2)


@jax.jit
def toy_jacobian(fn, params, x):
    return jax.jacobian(lambda p: fn(p, x))(params)


def expected(name, functions, logits, params, x1, x2):
    """The definition, from the Jacobian of every logit."""
    if name == "loss":
        a, b = (jacobian(functions.nll_fn, params, x)[:, 0] for x in (x1, x2))
        return a @ b.T
    a, b = jacobian(logits, params, x1), jacobian(logits, params, x2)
    if name == "sum_logits":
        return a.sum(axis=1) @ b.sum(axis=1).T
    if name.startswith("centred"):
        a, b = a - a.mean(axis=1, keepdims=True), b - b.mean(axis=1, keepdims=True)
    return np.einsum("ikp,jkp->ij", a, b)


@pytest.mark.parametrize("subset", SUBSETS)
@pytest.mark.parametrize("name", ["trace", "centred_trace", "sum_logits", "loss"])
def test_exact_kernels_equal_the_jacobians(toy, x64, subset, name):
    functions, logits, params = case(toy, subset, jnp.float64)
    x1, x2 = toy.collate(toy.sequences(5, 1), range(5)), toy.collate(toy.sequences(3, 2), range(3))
    kernel = build(name, functions, params, seed=0)
    assert kernel.name == name
    wanted = expected(name, functions, logits, params, x1, x2)
    if np.any(wanted):  # the loss of this case does not reach a head of its own
        assert relative(kernel_matrix(kernel, params, x1, x2), wanted) < 1e-10
    else:
        assert not np.any(kernel_matrix(kernel, params, x1, x2))


@pytest.mark.parametrize("subset", SUBSETS)
def test_all_spectral_directions_are_the_trace_and_fewer_come_from_below(toy, x64, subset):
    functions, logits, params = case(toy, subset, jnp.float64)
    x = toy.collate(toy.sequences(4, 3), range(4))
    trace = expected("trace", functions, logits, params, x, x)
    built = lambda m: kernel_matrix(build(f"spectral:{m}", functions, params, seed=0), params, x)
    assert relative(built(toy.width), trace) < 1e-10
    errors = [np.trace(trace - built(m)) for m in (1, 3, 5)]
    assert (np.diff(errors) < 1e-12).all() and (np.asarray(errors) > -1e-12).all()
    if subset != "head alone":  # there, the head's own term is the whole kernel and exact for every m
        assert errors[0] > 1e-6


@pytest.mark.parametrize("subset", ["lora", "all", "tied"])
def test_hutchinson_is_unbiased(toy, subset):
    functions, logits, params = case(toy, subset)
    x = toy.collate(toy.sequences(3, 4), range(3))
    trace = expected("trace", functions, logits, params, x, x)
    draws = [kernel_matrix(build("hutchinson:64", functions, params, seed=s), params, x) for s in range(12)]
    spread = np.std(draws, axis=0, ddof=1) / np.sqrt(len(draws))
    assert (np.abs(np.mean(draws, axis=0) - trace) < 5 * spread + 1e-6).all()
    assert spread.max() > 0


def test_hutchinson_probes_are_prefixes_of_one_sequence(toy):
    functions, _, params = case(toy, "lora")
    weights = [np.asarray(build(f"hutchinson:{m}", functions, params, seed=1).output_fn.weight) for m in (2, 5)]
    np.testing.assert_allclose(weights[0] * np.sqrt(2), weights[1][:, :2] * np.sqrt(5), rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("subset", ["lora", "tied"])
def test_scores_and_norms_are_those_of_the_matrix(toy, x64, name, subset):
    functions, _, params = case(toy, subset, jnp.float64)
    kernel = build(name, functions, params, seed=2)
    domain, pool = toy.sequences(5, 6), toy.sequences(7, 7)
    matrix = kernel_matrix(kernel, params, toy.collate(domain, range(5)), toy.collate(pool, range(7)))
    split = (toy.batches(domain, 2), toy.batches(pool, 3))
    found = kernel_scores(kernel, params, *split, rows=7, references=[toy.batches(pool, 3)])
    assert relative(found.scores[:, 0], matrix.mean(axis=0)) < 1e-10
    squares = squared_norms(kernel, params, split[1], rows=Pass(7, memory_budget=1))
    own = kernel_matrix(kernel, params, toy.collate(pool, range(7)))
    assert relative(squares, np.diag(own)) < 1e-10
    assert relative(kernel_diagonal(kernel, params, toy.collate(pool, range(7))), np.diag(own)) < 1e-10
    assert relative(found.scores[:, 1], own.mean(axis=0)) < 1e-10
    contrast = found.contrast()
    shared = matrix.mean() / own.mean()  # <g_bar, p> / <p, p>
    assert relative(contrast, matrix.mean(axis=0) - shared * own.mean(axis=0)) < 1e-9


@pytest.mark.parametrize("name", ["loss", "sum_logits", "spectral:2", "trace"])
@pytest.mark.parametrize("subset", ["lora", "tied"])
def test_many_directions_share_a_gradient_for_each_example(toy, x64, name, subset, monkeypatch):
    """As many directions as there are domain examples: the rows of the explicit matrix, one by one."""
    functions, _, params = case(toy, subset, jnp.float64)
    kernel = build(name, functions, params, seed=2)
    domain, pool = toy.sequences(5, 6), toy.sequences(7, 7)
    matrix = kernel_matrix(kernel, params, toy.collate(domain, range(5)), toy.collate(pool, range(7)))
    first, *others = [toy.batches(domain[i : i + 1], 1) for i in range(5)]
    with monkeypatch.context() as patch:
        patch.setattr(scores, "score_batch", lambda *a: pytest.fail("one tangent for each direction"))
        found = kernel_scores(
            kernel, params, first, toy.batches(pool, 3), rows=Pass(7, memory_budget=5_000), references=others
        )
    assert relative(found.scores.T, matrix) < 1e-10
    assert relative(found.gram, kernel_matrix(kernel, params, *(toy.collate(domain, range(5)),) * 2)) < 1e-10
    few = kernel_scores(kernel, params, first, toy.batches(pool, 3), rows=7, references=others[:1])
    assert relative(few.scores, found.scores[:, :2]) < 1e-10


def test_many_tangents_are_taken_in_turns(toy, monkeypatch):
    functions, _, params = case(toy, "all")
    domain, pool = toy.batches(toy.sequences(4, 6), 2), toy.batches(toy.sequences(5, 7), 3)
    kernel = build("trace", functions, params, seed=0)
    whole = kernel_scores(kernel, params, domain, pool, rows=5).scores
    monkeypatch.setattr(scores, "MAX_TANGENTS", 4)
    jax.clear_caches()
    assert relative(kernel_scores(kernel, params, domain, pool, rows=5).scores, whole) < 1e-6


@pytest.mark.parametrize("name", NAMES)
def test_sketched_kernels_are_unbiased(toy, name):
    functions, _, params = case(toy, "tied")
    kernel = build(name, functions, params, seed=2)
    x = toy.collate(toy.sequences(4, 8), range(4))
    exact = kernel_matrix(kernel, params, x)
    full = gradient_features(kernel, params, [x], IdentitySketch(), rows=4)
    assert relative(full @ full.T, exact) < 1e-5
    draws = []
    for seed in range(16):
        phi = gradient_features(kernel, params, [x], RademacherSketch(128, seed, block=64), rows=4)
        draws.append(phi @ phi.T)
    spread = np.std(draws, axis=0, ddof=1) / 4
    assert (np.abs(np.mean(draws, axis=0) - exact) < 5 * spread).all()


@pytest.mark.parametrize("rows, outputs", [(1, 1), (2, 1), (3, 1), (8, 2), (8, 5)])
def test_the_matrix_does_not_depend_on_blocks(toy, rows, outputs):
    functions, _, params = case(toy, "all")
    kernel = build("trace", functions, params, seed=0)
    x1, x2 = toy.collate(toy.sequences(5, 1), range(5)), toy.collate(toy.sequences(8, 2), range(8))
    one = sum(leaf.size * 4 for leaf in jax.tree.leaves(params))
    budget = 2 * one * rows * outputs
    for other in (x2, None):
        whole = kernel_matrix(kernel, params, x1, other)
        assert relative(kernel_matrix(kernel, params, x1, other, memory_budget=budget), whole) < 1e-6
        if other is None:
            np.testing.assert_array_equal(whole, whole.T)
            assert np.linalg.eigvalsh(whole).min() > -1e-5 * np.trace(whole)


def test_names_are_parsed_and_errors_say_what_is_expected(toy):
    assert [str(parse(name)) for name in NAMES] == list(NAMES)
    for text, message in [
        ("ntk", "expected one of trace, centred_trace, spectral:m"),
        ("spectral", "spectral:16"),
        ("hutchinson:0", "whole number from 1"),
        ("trace:4", "takes no size"),
    ]:
        with pytest.raises(ConfigError, match=message):
            parse(text)
    functions, _, params = case(toy, "lora")
    with pytest.raises(ConfigError, match="between 1 and the width"):
        build("spectral:99", functions, params, seed=0)
    with pytest.raises(ConfigError, match="nll_fn"):
        build("loss", KernelFunctions(functions.hidden_fn, functions.head), params, seed=0)


def test_a_head_that_is_no_leaf_is_refused(toy):
    functions, _, params = case(toy, "all")
    doubled = KernelFunctions(functions.hidden_fn, lambda p: 2.0 * p["head"])
    with pytest.raises(ConfigError, match="jacobian"):
        build("trace", doubled, params, seed=0)
    with pytest.raises(ConfigError, match="leading axes"):
        count_rows({"a": np.zeros(3), "b": np.zeros(4)})


def test_a_rank_deficient_head_is_exact(toy, x64):
    functions, logits, params = case(toy, "all", jnp.float64)
    params = {**params, "head": params["head"].at[:, -2:].set(0.0)}
    x = toy.collate(toy.sequences(4, 3), range(4))
    for name in ("trace", "centred_trace"):
        found = kernel_matrix(build(name, functions, params, seed=0), params, x)
        assert relative(found, expected(name, functions, logits, params, x, x)) < 1e-10
