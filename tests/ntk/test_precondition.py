"""Preconditioned directions against explicit matrices (H + lambda I)^-1 from jax.jacobian."""

import itertools
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from ntkjax.errors import ConfigError, UserError
from ntkjax.ntk import ForwardScorer, kernel_scores
from ntkjax.ntk.metrics import spearman
from ntkjax.ntk.precondition import (
    PASSES,
    PreconditionerName,
    adam,
    build_preconditioner,
    cg,
    ekfac,
    explicit_scores,
    kfac,
)
from ntkjax.ntk.rows import NonFiniteError
from ntkjax.types import Batch

ROWS = 24


def relative(a, b):
    return np.abs(np.asarray(a) - b).max() / np.abs(b).max()


def flat_rows(tree):
    """[rows, P], leaves side by side."""
    return np.concatenate(
        [np.asarray(leaf, np.float64).reshape(len(leaf), -1) for leaf in jax.tree.leaves(tree)], axis=1
    )


def as_tree(params, vector):
    """A vector [P] as one direction of the shape of ``params``: leaves [1, ...]."""
    leaves, structure = jax.tree.flatten(params)
    parts = np.split(vector, np.cumsum([leaf.size for leaf in leaves])[:-1])
    return structure.unflatten([jnp.asarray(x.reshape(1, *p.shape), p.dtype) for x, p in zip(parts, leaves)])


def blocks_of(params):
    """The positions of each leaf in a flat vector."""
    sizes = np.cumsum([0] + [leaf.size for leaf in jax.tree.leaves(params)])
    return [np.arange(a, b) for a, b in itertools.pairwise(sizes)]


def nll_of(hidden_fn, params, batch):
    """-log p of the last token [B]: a loss whose gradient is not that of the scored output."""
    states = hidden_fn(params, batch) @ params["head"].T
    last = jnp.take_along_axis(jnp.asarray(batch.tokens), jnp.asarray(batch.lengths)[:, None] - 1, axis=1)
    return -jnp.take_along_axis(jax.nn.log_softmax(states), last, axis=1)[:, 0]


@pytest.fixture
def case(toy):
    """(loss, theta, domain, per-example gradients [M, P] from jax.jacobian)."""
    loss, params, rows = Partial(nll_of, Partial(toy.hidden_fn)), toy.init(3), toy.sequences(ROWS, 1)
    return loss, params, rows, flat_rows(toy.jacobian(loss, params, toy.collate(rows, range(ROWS))))


def layer(params, batch):
    """F(x) = c(x) a(x)^T W b(x): the gradient of a linear layer at one position, a b^T, times a sign."""
    code = jnp.asarray(batch.tokens)
    a, b = params["inputs"][code[:, 0]], params["outputs"][code[:, 1]]
    return jnp.einsum("bi,io,bo->b", a, params["w"], b) + jnp.einsum("bi,i->b", a, params["v"])


def grid(size=(4, 3)):
    """Every pair (a, b) once: inputs and output gradients are independent, so W's Fisher is a Kronecker product."""
    tokens = np.stack(np.meshgrid(*map(np.arange, size)), axis=-1).reshape(-1, 2).astype(np.int32)
    count = len(tokens)
    return Batch(tokens, np.ones_like(tokens, bool), np.full(count, 2, np.int32), np.arange(count, dtype=np.int32))


def test_kfac_is_exact_where_the_fisher_is_a_kronecker_product(x64):
    rng = np.random.default_rng(0)
    fixed = {"inputs": jnp.asarray(rng.normal(size=(4, 5))), "outputs": jnp.asarray(rng.normal(size=(3, 4)))}
    params = {"v": jnp.asarray(rng.normal(size=5)), "w": jnp.asarray(rng.normal(size=(5, 4)))}
    loss, batch = lambda p, b: layer({**fixed, **p}, b), grid()
    g = flat_rows(jax.jacobian(lambda p: loss(p, batch))(params))
    fisher = g.T @ g / len(g)
    for block, other in (blocks_of(params), blocks_of(params)[::-1]):
        fisher[np.ix_(block, other)] = 0
    damping = 0.03 * np.trace(fisher) / len(fisher)
    u = rng.normal(size=g.shape[1])
    found = kfac(loss, params, [batch], damping=0.03)(as_tree(params, u))
    np.testing.assert_allclose(flat_rows(found)[0], np.linalg.solve(fisher + damping * np.eye(len(u)), u), rtol=1e-9)


def test_explicit_scores_are_those_of_the_inverted_fisher(case, x64):
    """K_jD (K_DD + M lambda I)^-1 1 against (G_D^T G_D / M + lambda I)^-1 g_bar for every other row."""
    _, _, _, g = case
    domain = np.array([3, 0, 7, 11, 12])
    fisher, rest = g[domain].T @ g[domain] / len(domain), np.delete(g, domain, axis=0)
    for damping in (0.1, 30.0):
        lam = damping * np.trace(fisher) / len(fisher)
        along = np.linalg.solve(fisher + lam * np.eye(len(fisher)), g[domain].mean(axis=0))
        found, used = explicit_scores(g @ g.T, domain, damping=damping, parameters=g.shape[1])
        assert used == pytest.approx(lam)
        np.testing.assert_allclose(found, rest @ along, rtol=1e-8, atol=1e-10 * np.abs(rest @ along).max())
    with pytest.raises(ConfigError, match="damping"):
        explicit_scores(g @ g.T, domain, damping=0.0, parameters=3)
    with pytest.raises(ConfigError, match="no curvature"):
        explicit_scores(np.zeros((4, 4)), np.arange(2), damping=0.1, parameters=3)


def block_fisher(g, params):
    """The empirical Fisher of gradients g [M, P] without what is between two leaves."""
    whole, fisher = g.T @ g / len(g), np.zeros((g.shape[1],) * 2)
    for block in blocks_of(params):
        fisher[np.ix_(block, block)] = whole[np.ix_(block, block)]
    return fisher


def held(precondition, params):
    """H of a preconditioner as a matrix [P, P], from the columns of its inverse, all at once."""
    leaves, structure = jax.tree.flatten(params)
    one = np.eye(sum(leaf.size for leaf in leaves))
    columns = [one[:, block].reshape(-1, *leaf.shape) for block, leaf in zip(blocks_of(params), leaves)]
    inverse = flat_rows(precondition(structure.unflatten([jnp.asarray(leaf) for leaf in columns])))
    return np.linalg.inv(inverse) - float(precondition.damping) * one


def test_ekfac_is_exact_where_the_fisher_is_diagonal_in_the_eigenbasis(x64):
    """Gradients c_ab p_a q_b^T, p and q orthonormal: the Fisher is diag(c^2) / M in their basis, whatever c is. K-FAC,
    which has the means of c^2 over rows and columns alone, is not exact there."""
    rng = np.random.default_rng(0)
    p, q = (np.linalg.qr(rng.normal(size=(n, n)))[0] for n in (4, 3))
    c = rng.uniform(0.5, 2, size=(4, 3))
    params, batch, u = {"w": jnp.asarray(rng.normal(size=(4, 3)))}, grid(), rng.normal(size=12)

    def loss(params, batch):
        a, b = jnp.asarray(batch.tokens).T
        return jnp.asarray(c)[a, b] * jnp.einsum("ib,io,ob->b", jnp.asarray(p)[:, a], params["w"], jnp.asarray(q)[:, b])

    damping = 0.03 * (c**2).mean() / 12
    basis = np.kron(p, q)
    exact = basis @ ((basis.T @ u) / ((c**2).ravel() / 12 + damping))
    solved = {fit: flat_rows(fit(loss, params, [batch], damping=0.03)(as_tree(params, u)))[0] for fit in (kfac, ekfac)}
    np.testing.assert_allclose(solved[ekfac], exact, rtol=1e-10)
    assert relative(solved[kfac], exact) > 0.01


def test_ekfac_is_nearer_to_the_blocks_of_the_fisher_than_kfac(x64, toy):
    """And its eigenvalues are the diagonal of the Fisher's blocks in its basis, so its trace is theirs."""
    loss, params = Partial(nll_of, Partial(toy.hidden_fn)), toy.init(3, jnp.float64)
    domain = toy.sequences(ROWS, 1)
    exact = block_fisher(flat_rows(toy.jacobian(loss, params, toy.collate(domain, range(ROWS)))), params)
    found = {fit: held(fit(loss, params, toy.batches(domain, 7)), params) for fit in (kfac, ekfac)}
    off = {fit: np.linalg.norm(h - exact) for fit, h in found.items()}
    assert off[ekfac] < off[kfac]
    np.testing.assert_allclose([np.trace(h) for h in found.values()], np.trace(exact), rtol=1e-9)
    # what is left over is orthogonal to H itself: <F - H, H> = 0 for the nearest of a linear space that holds H
    assert abs(np.vdot(exact - found[ekfac], found[ekfac])) < 1e-9 * np.vdot(exact, exact)


def test_every_name_says_how_many_passes_it_takes(toy, case):
    loss, params, domain, _ = case
    assert set(PASSES) == set(get_args(PreconditionerName))

    class Counted(list):
        passes = 0

        def __iter__(self):
            self.passes += 1
            return super().__iter__()

    for name, passes in PASSES.items():
        plan = Counted(toy.batches(domain, 8))
        build_preconditioner(name, loss, params, plan)
        assert plan.passes == passes


def test_conjugate_gradients_are_the_solution_with_the_whole_fisher(x64, toy):
    """Batches of several shapes, or with fillers; two directions at once; against numpy.linalg.solve."""
    loss, params = Partial(nll_of, Partial(toy.hidden_fn)), toy.init(3, jnp.float64)
    domain, rng = toy.sequences(ROWS, 1), np.random.default_rng(0)
    g = flat_rows(toy.jacobian(loss, params, toy.collate(domain, range(ROWS))))
    fisher = g.T @ g / ROWS
    damped = fisher + 0.1 * np.trace(fisher) / len(fisher) * np.eye(len(fisher))
    u = np.stack([g.mean(axis=0), rng.normal(size=g.shape[1])])
    two = jax.tree.map(lambda *parts: jnp.concatenate(parts), *(as_tree(params, row) for row in u))
    apply = jax.jit(lambda solver, direction: solver(direction))
    shapes = [toy.collate(domain[a:b], range(a, b)) for a, b in ((0, 5), (5, 10), (10, ROWS))]
    for plan in (toy.batches(domain, 7), shapes):
        found = cg(loss, params, plan, iterations=200, tolerance=1e-12)
        x = apply(found, two)
        assert relative(flat_rows(x), np.linalg.solve(damped, u.T).T) < 1e-8
        assert np.all(found.residual(two, x) < 1e-11)
    assert len(found.structures) == len({batch.tokens.shape for batch in shapes}) > 1
    # stopped early: the residual is that of what was reached
    short = cg(loss, params, toy.batches(domain, 7), iterations=2, tolerance=1e-12)
    x = apply(short, two)
    off = np.linalg.norm(flat_rows(x) @ damped - u, axis=1) / np.linalg.norm(u, axis=1)
    np.testing.assert_allclose(short.residual(two, x), off, rtol=1e-8)
    assert np.all(off > 1e-3)
    assert short.residual(jax.tree.map(jnp.zeros_like, two), jax.tree.map(jnp.zeros_like, x)).tolist() == [0, 0]


@pytest.mark.parametrize("options", [{"damping": 0.0}, {"iterations": 0}, {"tolerance": 0.0}])
def test_conjugate_gradients_refuse_what_cannot_be(case, toy, options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        cg(case[0], case[1], toy.batches(case[2], 8), **options)


def kronecker_fisher(g, params):
    """H of ``kfac``, explicitly: a block for each leaf, L x R / t (all leaves of the toy model are matrices)."""
    fisher = np.zeros((g.shape[1],) * 2)
    for block, leaf in zip(blocks_of(params), jax.tree.leaves(params)):
        matrices = g[:, block].reshape(len(g), *leaf.shape)
        left = np.einsum("bik,bjk->ij", matrices, matrices) / len(g)
        right = np.einsum("bki,bkj->ij", matrices, matrices) / len(g)
        fisher[np.ix_(block, block)] = np.kron(left, right) / np.trace(left)
    return fisher


def eigenvalue_corrected_fisher(g, params):
    """H of ``ekfac``, explicitly: U diag(U^T F U) U^T for each leaf's block F of the Fisher, U = U_L x U_R."""
    fisher = block_fisher(g, params)
    for block, leaf in zip(blocks_of(params), jax.tree.leaves(params)):
        matrices = g[:, block].reshape(len(g), *leaf.shape)
        left, right = np.einsum("bik,bjk->ij", matrices, matrices), np.einsum("bki,bkj->ij", matrices, matrices)
        basis, at = np.kron(np.linalg.eigh(left)[1], np.linalg.eigh(right)[1]), np.ix_(block, block)
        fisher[at] = basis @ np.diag(np.diag(basis.T @ fisher[at] @ basis)) @ basis.T
    return fisher


@pytest.mark.parametrize("name", ["adam", "kfac", "ekfac"])
def test_scores_are_the_products_with_the_explicit_preconditioned_direction(toy, x64, name):
    loss, domain = Partial(nll_of, Partial(toy.hidden_fn)), toy.sequences(ROWS, 1)
    output_fn, params = toy.output("all", jnp.float64)
    g = flat_rows(toy.jacobian(loss, params, toy.collate(domain, range(ROWS))))
    pool = toy.sequences(11, 2)
    plan = toy.batches(domain, 5)
    found = kernel_scores(
        output_fn, params, plan, toy.batches(pool, 4), rows=11, references=[toy.batches(pool[:3], 4)],
        scorer=ForwardScorer(build_preconditioner(name, loss, params, plan)),
    )  # fmt: skip
    means = [
        flat_rows(toy.jacobian(output_fn, params, toy.collate(r, range(len(r))))).mean(axis=0)
        for r in (domain, pool[:3])
    ]
    if name == "adam":
        second = g.mean(axis=0) ** 2 + g.var(axis=0) / 16
        inverse = np.diag(1 / (np.sqrt(second) + 1e-8))
    else:
        fisher = {"kfac": kronecker_fisher, "ekfac": eigenvalue_corrected_fisher}[name](g, params)
        inverse = np.linalg.inv(fisher + 0.1 * np.trace(fisher) / len(fisher) * np.eye(len(fisher)))
    features = flat_rows(toy.jacobian(output_fn, params, toy.collate(pool, range(11))))
    for column, mean in enumerate(means):
        assert relative(found.scores[:, column], features @ inverse @ mean) < 1e-8
        assert abs(found.gram[0, column] - means[0] @ inverse @ mean) < 1e-8 * abs(means[0] @ inverse @ means[0])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adam", "kfac", "ekfac"])
def test_single_precision_scores_are_those_of_double_precision(toy, case, name):
    """An inverse with damping 0.1 amplifies single precision's rounding: 1e-4, where plain scores hold 1e-5."""
    output_fn, domain = toy.output("all")[0], toy.sequences(ROWS, 1)
    pool, found = toy.batches(toy.sequences(11, 2), 4), {}
    for wide in (False, True):
        with jax.enable_x64(wide):
            params, plan = toy.init(3, jnp.float64 if wide else jnp.float32), toy.batches(domain, 5)
            scorer = ForwardScorer(build_preconditioner(name, case[0], params, plan))
            found[wide] = kernel_scores(output_fn, params, plan, pool, rows=11, scorer=scorer).scores
    assert found[False].dtype == np.float32
    assert relative(found[False], found[True]) < 1e-4


@pytest.mark.parametrize("damping, least", [(0.1, 0.8), (1.0, 0.9)])
def test_influence_scores_follow_those_of_the_explicit_fisher(toy, case, damping, least):
    """All parameters, 400 examples of each: scores by H rank nearly like those by the Fisher's diagonal blocks (a leaf
    each), and closer to those by the whole Fisher than scores without a preconditioner."""
    loss, params, _, _ = case
    domain, pool = (toy.collate(toy.sequences(400, seed), range(400)) for seed in (1, 2))
    g, features = (flat_rows(toy.jacobian(loss, params, batch)) for batch in (domain, pool))
    mean, whole = g.mean(axis=0), g.T @ g / len(g)
    parts, ridge = np.zeros_like(whole), damping * np.trace(whole) / len(whole) * np.eye(len(whole))
    for block in blocks_of(params):
        parts[np.ix_(block, block)] = whole[np.ix_(block, block)]
    found = features @ flat_rows(kfac(loss, params, [domain], damping=damping)(as_tree(params, mean)))[0]
    exact, blockwise = (features @ np.linalg.solve(fisher + ridge, mean) for fisher in (whole, parts))
    assert spearman(found, blockwise) > 0.95 > spearman(features @ mean, blockwise)
    assert spearman(found, exact) > max(least, spearman(features @ mean, exact) + 0.02)


@pytest.mark.parametrize("fit", [adam, kfac, ekfac])
def test_batches_fillers_and_memory_do_not_matter(toy, case, fit):
    loss, params, domain, g = case
    whole = fit(loss, params, [toy.collate(domain, range(ROWS))])
    split = fit(loss, params, toy.batches(domain, 7), memory_budget=3 * 4 * g.shape[1])
    u = as_tree(params, np.random.default_rng(0).normal(size=g.shape[1]))
    assert relative(flat_rows(split(u)), flat_rows(whole(u))) < 2e-4


def test_a_batch_of_one_is_the_diagonal_of_the_fisher(toy, case):
    loss, params, domain, g = case
    found = adam(loss, params, toy.batches(domain, 8), batch_size=1)
    np.testing.assert_allclose(
        flat_rows(jax.tree.map(lambda v: v[None], found.second))[0], (g**2).mean(axis=0), rtol=1e-3, atol=1e-9
    )


def test_a_second_moment_is_that_of_random_batches(toy, case):
    loss, params, domain, g = case
    found = adam(loss, params, toy.batches(domain, 8), batch_size=4)
    drawn = np.random.default_rng(0).integers(0, ROWS, (4000, 4))
    squares = (g[drawn].mean(axis=1)) ** 2
    error = squares.std(axis=0) / np.sqrt(4000)
    second = flat_rows(jax.tree.map(lambda v: v[None], found.second))[0]
    assert np.max(np.abs(second - squares.mean(axis=0)) / (error + 1e-9)) < 5


def test_a_long_side_has_a_diagonal_factor(x64):
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.normal(size=(6, 3)))}
    x = rng.normal(size=(10, 6, 3))
    batch = Batch(x, x[:, 0], np.zeros(10, np.int32), np.arange(10, dtype=np.int32))
    loss = lambda p, b: jnp.einsum("bio,io->b", jnp.asarray(b.tokens), p["w"])
    left, right = np.diag((x**2).sum(axis=(0, 2)) / 10), np.einsum("bki,bkj->ij", x, x) / 10
    fisher = np.kron(left, right) / np.trace(left)
    u = rng.normal(size=18)
    expected = np.linalg.solve(fisher + 0.1 * np.trace(fisher) / 18 * np.eye(18), u)
    found = kfac(loss, params, [batch], max_side=5)(as_tree(params, u))
    np.testing.assert_allclose(flat_rows(found)[0], expected, rtol=1e-9)
    # ekfac: the basis I x U_R
    g, basis = x.reshape(10, 18), np.kron(np.eye(6), np.linalg.eigh(right)[1])
    fisher = basis @ np.diag(((g @ basis) ** 2).mean(axis=0)) @ basis.T
    expected = np.linalg.solve(fisher + 0.1 * np.trace(fisher) / 18 * np.eye(18), u)
    found = ekfac(loss, params, [batch], max_side=5)(as_tree(params, u))
    np.testing.assert_allclose(flat_rows(found)[0], expected, rtol=1e-9)


@pytest.mark.parametrize("fit", [kfac, ekfac])
def test_parameters_that_no_gradient_reaches_stay_finite(toy, case, fit):
    loss, params, domain, _ = case
    params = params | {"unused": jnp.ones((3, 2))}
    found = fit(loss, params, toy.batches(domain, 8))
    u = jax.tree.map(lambda p: jnp.ones((1, *p.shape)), params)
    np.testing.assert_allclose(found(u)["unused"], 1 / found.damping, rtol=1e-5)


def test_errors_say_what_to_do(toy, case):
    loss, params, domain, _ = case
    plan = toy.batches(domain, 8)
    with pytest.raises(ConfigError, match="one of none, adam, kfac, ekfac, cg"):
        build_preconditioner("newton", loss, params, plan)
    with pytest.raises(ConfigError, match="damping must be above 0"):
        kfac(loss, params, plan, damping=0.0)
    with pytest.raises(ConfigError, match="at least 1"):
        adam(loss, params, plan, batch_size=0)
    with pytest.raises(ConfigError, match="no curvature"):
        kfac(lambda p, b: 0 * loss(p, b), params, plan)
    with pytest.raises(UserError, match="no examples"):
        adam(loss, params, [])
    bad = lambda p, b: loss(p, b) + jnp.where(jnp.asarray(b.index) == 9, jnp.nan, 0.0) * p["embed"].sum()
    with pytest.raises(NonFiniteError) as error:
        kfac(bad, params, plan)
    assert error.value.rows == list(range(8, 16))
