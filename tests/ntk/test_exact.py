"""Exact kernels: every backend against jax.jacobian, what they must not depend on, and what they refuse."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntkjax.errors import ConfigError
from ntkjax.models import LoraConfig, ModelConfig, init_lm
from ntkjax.models.lm import paths
from ntkjax.ntk import blocks, exact, kernels, neural_tangents
from ntkjax.ntk.exact import BACKENDS, centred_trace_ntk, empirical_ntk, logits, mean_trace_ntk, trace_ntk
from ntkjax.ntk.kernel import gradients
from ntkjax.ntk.rows import NonFiniteError
from ntkjax.types import Batch

FAMILIES = ("mlp", "gpt2", "llama", "qwen3")
SUBSETS = ("lora", "all, head untied", "all, head tied", "by name")
VOCAB, WIDTH, ROWS = 9, 4, 3
TOLERANCE = {"float64": 1e-10, "float32": 1e-5}
KERNELS = {
    "empirical": empirical_ntk,
    "trace": trace_ntk,
    "mean trace": mean_trace_ntk,
    "centred trace": centred_trace_ntk,
}
Partial = jax.tree_util.Partial


class Problem(NamedTuple):
    """f = W h as `logits`, all its parameters, parts of them to train, and examples."""

    fn: Any
    params: dict
    subsets: dict[str, dict]
    x: Any


def mlp_hidden(base, params, x):
    p = {**base, **params}
    inner = p["inner"] + jnp.matmul(p["lora_a"], p["lora_b"])
    return jnp.tanh(jnp.tanh(x @ p["embed"]) @ inner)


def mlp_head(base, params):
    p = {**base, **params}
    return p.get("head", p["embed"])


def mlp(tied: bool, dtype: str) -> Problem:
    """Bag of words -> embedding -> adapted layer -> logits."""
    rng = np.random.default_rng(0)
    shapes = {"embed": (VOCAB, WIDTH), "inner": (WIDTH, WIDTH), "lora_a": (WIDTH, 2), "lora_b": (2, WIDTH)}
    shapes |= {} if tied else {"head": (VOCAB, WIDTH)}
    params = {name: jnp.asarray(rng.normal(size=s).astype(np.float32), dtype) for name, s in shapes.items()}
    subsets = {"lora": {n: params[n] for n in ("lora_a", "lora_b")}, "by name": {"inner": params["inner"]}}
    x = rng.normal(size=(ROWS, VOCAB)).astype(np.float32).astype(dtype)
    return Problem(logits(Partial(mlp_hidden, params), Partial(mlp_head, params)), params, subsets, x)


def sentences() -> Batch:
    """Three rows of different lengths and responses."""
    lengths, starts = np.array([6, 4, 5], np.int32), (2, 3, 1)
    tokens, mask = np.random.default_rng(0).integers(0, VOCAB, (ROWS, 6), np.int32), np.zeros((ROWS, 6), bool)
    for i, (start, length) in enumerate(zip(starts, lengths)):
        tokens[i, length:], mask[i, start:length] = 0, True
    return Batch(tokens, mask, lengths, np.arange(ROWS, dtype=np.int32))


def language_model(family: str, tied: bool, dtype: str) -> Problem:
    """Two layers of width 4; every weight and both adapter factors drawn, so that no gradient is zero."""
    gpt2 = {"qkv_bias": True, "o_bias": True, "mlp_bias": True, "activation": "gelu_new"} if family == "gpt2" else {}
    config = ModelConfig(
        family=family, vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=6, num_layers=2, num_heads=2,
        num_kv_heads=2 if family == "gpt2" else 1, head_dim=2, max_positions=8, tied=tied, qk_norm=family == "qwen3",
        **gpt2,
    )  # fmt: skip
    model, rng = init_lm(config, seed=0, lora=LoraConfig(rank=2), dtype=dtype), np.random.default_rng(1)
    drawn = lambda leaf: jnp.asarray((leaf + 0.6 * rng.normal(size=leaf.shape)).astype(np.float32), dtype)
    model = model.with_params(jax.tree.map(drawn, model.params))
    subsets = {"lora": model.lora, "by name": model.select_params("layers/attention/(q|v)/kernel")}
    return Problem(logits(model.hidden_fn, model.head_fn), model.params, subsets, sentences())


@functools.cache
def problem(family: str, tied: bool, dtype: str) -> Problem:
    with jax.enable_x64(dtype == "float64"):
        return mlp(tied, dtype) if family == "mlp" else language_model(family, tied, dtype)


def case(family: str, subset: str, dtype: str) -> tuple[Problem, dict]:
    """The problem and what of its parameters is trained."""
    found = problem(family, subset != "all, head untied", dtype)
    return found, found.params if subset.startswith("all") else found.subsets[subset]


@jax.jit
def jacobian(fn, params, x):
    return jax.jacobian(lambda p: fn(p, x))(params)


@functools.cache
def full_jacobian(family: str, tied: bool, dtype: str) -> dict[str, np.ndarray]:
    """J of all parameters: path -> [B, O, size of the leaf], float64 numbers. The oracle."""
    with jax.enable_x64(dtype == "float64"):
        found = problem(family, tied, dtype)
        tree = jacobian(found.fn, found.params, found.x)
    return {path: np.asarray(leaf, np.float64).reshape(*leaf.shape[:2], -1) for path, leaf in paths(tree).items()}


def expected(family: str, subset: str, dtype: str = "float64") -> dict[str, np.ndarray]:
    """The kernels by contraction of explicit Jacobians, in double precision."""
    _, params = case(family, subset, dtype)
    leaves = full_jacobian(family, subset != "all, head untied", dtype)
    j = np.concatenate([leaves[path] for path in paths(params)], axis=2)
    full, centred = np.einsum("ikp,jlp->ijkl", j, j), j - j.mean(axis=1, keepdims=True)
    trace = np.einsum("ijkk->ij", full)
    return {
        "empirical": full,
        "trace": trace,
        "mean trace": trace / VOCAB,
        "centred trace": np.einsum("ikp,jkp->ij", centred, centred),
    }


def deviation(found, wanted) -> float:
    assert found.shape == wanted.shape
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


def agreement(
    record_property, family: str, subset: str, dtype: str, kinds: dict[str, tuple[str, ...]], tolerance: float = 0
) -> None:
    """Compare backends with the oracle; the table at the end of the log is made of what is recorded here."""
    wanted, worst = expected(family, subset, dtype), {}
    with jax.enable_x64(dtype == "float64"):
        found, params = case(family, subset, dtype)
        for backend, names in kinds.items():
            if backend.startswith("neural-tangents") and not neural_tangents.is_installed():
                continue
            kernels = {name: KERNELS[name](found.fn, params, found.x, backend=backend) for name in names}
            worst[backend] = max(deviation(kernel, wanted[name]) for name, kernel in kernels.items())
    for backend, value in worst.items():
        record_property("agreement", [f"{family}, {subset}, {dtype}", backend, value])
    assert max(worst.values()) < (tolerance or TOLERANCE[dtype]), worst


EVERY = {b: tuple(k for k in KERNELS if not (b == "spectral" and k == "empirical")) for b in BACKENDS}
# Every kernel of every backend is another program to compile, so the large ones are shared out: one language model
# meets each backend, the others the two that are unlike; the whole product is in `make test-slow`.
ALL_BACKENDS = {b: ("trace", "empirical") if b == "jacobian" else ("trace",) for b in BACKENDS}
OURS = {"jacobian": ("trace", "empirical"), "spectral": ("trace",)}
FULL = {"gpt2": (), "llama": (), "qwen3": ("by name",), "mlp": SUBSETS}


def share(family: str, subset: str) -> dict[str, tuple[str, ...]]:
    return (EVERY if family == "mlp" else ALL_BACKENDS) if subset in FULL[family] else OURS


@pytest.mark.parametrize("subset", SUBSETS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_backend_agrees_with_jax_jacobian_in_double_precision(family, subset, record_property):
    agreement(record_property, family, subset, "float64", share(family, subset))


@pytest.mark.parametrize(
    ("family", "subset"),
    [*(("mlp", s) for s in SUBSETS), pytest.param("qwen3", "lora", marks=pytest.mark.slow)],
)
def test_every_backend_agrees_with_jax_jacobian_in_single_precision(family, subset, record_property):
    agreement(record_property, family, subset, "float32", ALL_BACKENDS)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("subset", SUBSETS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_kernel_of_every_backend_agrees(family, subset, dtype, record_property):
    """In single precision up to rounding, which norms over four numbers magnify: the oracle's own Jacobian is up to
    5e-5 away from the one in double precision, and forward-over-reverse products up to 2e-4."""
    agreement(record_property, family, subset, dtype, EVERY, tolerance=5e-4 if dtype == "float32" else 0)


# Everything below is shown on the cheap family: the code that cuts and joins blocks does not know what f is.
@pytest.fixture
def small(x64):
    """The network with all parameters trained, head of its own: (fn, params, x)."""
    found = problem("mlp", False, "float64")
    return found.fn, found.params, found.x


def gradient_bytes(params) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gradients_in_budget", [0, 20])
def test_blocks_of_any_size_give_the_same_numbers(small, backend, gradients_in_budget):
    """From one gradient at a time to all at once, with rows and outputs that no block size divides."""
    if backend.startswith("neural-tangents") and not neural_tangents.is_installed():
        pytest.skip("neural-tangents not installed")
    fn, params, x = small
    wanted, budget = expected("mlp", "all, head untied"), gradients_in_budget * gradient_bytes(params)
    other = np.concatenate([x, x[::-1]])[:5]
    for name, kernel in KERNELS.items():
        if name not in EVERY[backend] or name in ("mean trace", "centred trace"):
            continue
        both = kernel(fn, params, x, other, backend=backend, memory_budget=budget)
        rows = [0, 1, 2, 2, 1]
        assert deviation(both, wanted[name][:, rows]) < 1e-12
        one = kernel(fn, params, x, backend=backend, memory_budget=budget)
        assert deviation(one, wanted[name]) < 1e-12
        mirrored = one.T if one.ndim == 2 else one.transpose(1, 0, 3, 2)
        np.testing.assert_array_equal(one, mirrored)


@pytest.mark.parametrize("backend", ["jacobian", "vector_products", "spectral"])
def test_a_kernel_is_positive_semidefinite_and_follows_its_rows(small, backend):
    fn, params, x = small
    kernel = trace_ntk(fn, params, x, backend=backend)
    order = np.array([2, 0, 1])
    np.testing.assert_allclose(trace_ntk(fn, params, x[order], backend=backend), kernel[order][:, order], rtol=1e-12)
    many = trace_ntk(fn, params, np.concatenate([x, x]), backend=backend)  # rank at most 3 x 9, here singular
    np.testing.assert_allclose(many, np.tile(kernel, (2, 2)), rtol=1e-12)
    assert np.linalg.eigvalsh(many).min() > -1e-10 * np.abs(many).max()


def test_the_parts_of_theta_add_up(small):
    """<g, g'> is a sum over leaves: kernels of disjoint subsets add up to the kernel of their union."""
    fn, params, x = small
    parts = [trace_ntk(fn, {name: leaf}, x, backend="spectral") for name, leaf in params.items()]
    np.testing.assert_allclose(sum(parts), trace_ntk(fn, params, x), rtol=1e-12)


def test_padding_and_company_do_not_matter(toy):
    rows = toy.sequences(3, seed=4)
    params = toy.init(1)
    fn = logits(toy.hidden_fn, lambda p: p["head"])
    short, long = toy.collate(rows, range(3)), toy.collate(rows, range(3), length=14)
    kernel = trace_ntk(fn, params, short)
    np.testing.assert_allclose(trace_ntk(fn, params, long), kernel, rtol=2e-5)
    filled = trace_ntk(fn, params, toy.collate(rows, range(3), fill=1))
    np.testing.assert_allclose(filled[:3, :3], kernel, rtol=2e-5)
    assert not filled[3].any() and not filled[:, 3].any()  # an empty response has no output and no gradient


def test_what_cannot_be_computed_is_refused(small):
    fn, params, x = small
    plain = lambda p, x: fn(p, x)
    for kernel in KERNELS.values():
        with pytest.raises(ConfigError, match="unknown backend 'jacobi'; expected one of jacobian, vector_products"):
            kernel(fn, params, x, backend="jacobi")
        with pytest.raises(ConfigError, match="no leaves"):
            kernel(fn, {}, x)
    with pytest.raises(ConfigError, match='use backend="jacobian" for the O x O kernel'):
        empirical_ntk(fn, params, x, backend="spectral")
    for kernel in (trace_ntk, mean_trace_ntk, centred_trace_ntk):
        with pytest.raises(ConfigError, match=r"ntkjax\.ntk\.logits"):
            kernel(plain, params, x, backend="spectral")
    with pytest.raises(ConfigError, match="one row per example"):
        empirical_ntk(lambda p, pair: fn(p, pair[0]), params, (x, x[:2]))


@pytest.mark.parametrize("backend", ["jacobian", "vector_products", "spectral"])
def test_rows_that_are_not_finite_are_named(small, backend):
    fn, params, x = small
    bad = x.copy()
    bad[1] = np.nan
    with pytest.raises(NonFiniteError, match=r"rows of x1 not finite for 1 row\(s\): 1\."):
        trace_ntk(fn, params, bad, backend=backend)
    with pytest.raises(NonFiniteError, match=r"rows of x2 not finite for 1 row\(s\): 1\."):
        trace_ntk(fn, params, x, bad, backend=backend)
    with pytest.raises(NonFiniteError, match=r"rows of x1 not finite for 1 row\(s\): 1\."):
        empirical_ntk(fn, params, bad)


def compiled_bytes(kernel, params, x) -> tuple[int, int]:
    """(temporary, argument) bytes of the program that makes the gradients of all its outputs."""
    outputs = jax.eval_shape(kernel.outputs, params, x).shape[1]
    program = gradients.lower(kernel, params, x, np.eye(outputs, dtype=np.float32), microbatch=None).compile()
    found = program.memory_analysis()
    return found.temp_size_in_bytes, found.argument_size_in_bytes


def test_memory_of_the_spectral_passes_does_not_grow_with_the_vocabulary(toy):
    """Adapter only: the head is not even an argument of the program. That of the logits themselves does grow."""
    output, adapter = toy.output("lora")
    batch, spectral, direct = toy.collate(toy.sequences(3, seed=4), range(3)), [], []
    for vocab in (16, 1024):
        fn = logits(
            output.hidden_fn, jnp.asarray(np.random.default_rng(0).normal(size=(vocab, toy.width)), jnp.float32)
        )
        spectral.append(compiled_bytes(kernels.trace(fn.hidden_fn, fn.head, adapter), adapter, batch))
        direct.append(compiled_bytes(blocks.as_kernel(fn), adapter, batch))
    assert spectral[0] == spectral[1]
    assert direct[1][0] > 16 * direct[0][0]  # so the comparison can fail


def wide_output(params, x):
    return jnp.tanh(x @ params["w"]).reshape(len(x), 8, -1).sum(axis=2)


@pytest.mark.parametrize("backend", ["jacobian", "vector_products", "neural-tangents"])
def test_memory_stays_within_the_budget(backend, monkeypatch):
    """The blocks of a layer with many more parameters than activations, as compiled, against the budget given."""
    if backend == "neural-tangents" and not neural_tangents.is_installed():
        pytest.skip("neural-tangents not installed")
    params, x = {"w": jnp.ones((64, 512))}, np.random.default_rng(0).normal(size=(6, 64)).astype(np.float32)
    budget, used = 24 * gradient_bytes(params), []

    def measured(fn):
        def call(*args, **keys):
            found = fn.lower(*args, **keys).compile().memory_analysis()
            used.append(found.temp_size_in_bytes + found.output_size_in_bytes)
            return fn(*args, **keys)

        return call

    for name in ("gradients", "ntk_vector_product", "_neural_tangents_block"):
        monkeypatch.setattr(blocks, name, measured(getattr(blocks, name)))
    kernel = empirical_ntk(wide_output, params, x, backend=backend, memory_budget=budget)
    assert used and max(used) <= budget
    # The 48 gradients of all rows do not fit. Vector products hold those of one row; the others use what is given.
    few, least = (8, 1) if backend == "vector_products" else (24, 4)
    assert least * gradient_bytes(params) < max(used) <= few * gradient_bytes(params)
    monkeypatch.undo()
    whole = empirical_ntk(wide_output, params, x, memory_budget=1 << 30)
    np.testing.assert_allclose(kernel, whole, rtol=1e-4, atol=1e-4 * np.abs(whole).max())


def test_half_precision_parameters_are_contracted_in_single():
    """The gradients of bfloat16 weights are bfloat16 numbers; their products and sums are not."""
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.normal(size=(50, 4)), jnp.bfloat16)}
    x = jnp.asarray(rng.normal(size=(3, 50)), jnp.bfloat16)
    fn = lambda p, x: x @ p["w"]
    inputs = np.asarray(x, np.float64)
    wanted = 4 * inputs @ inputs.T
    for backend in BACKENDS[:3:2]:
        if backend == "neural-tangents" and not neural_tangents.is_installed():
            continue
        np.testing.assert_allclose(trace_ntk(fn, params, x, backend=backend), wanted, rtol=1e-5, atol=1e-4)


def test_a_second_call_compiles_nothing(small):
    fn, params, x = small
    for backend in ("jacobian", "vector_products", "spectral"):
        trace_ntk(fn, params, x, backend=backend)
    before = gradients._cache_size(), blocks.ntk_vector_product._cache_size()
    for backend in ("jacobian", "vector_products", "spectral"):
        trace_ntk(fn, jax.tree.map(lambda p: p + 1, params), x + 1, backend=backend)
    assert (gradients._cache_size(), blocks.ntk_vector_product._cache_size()) == before
    assert exact.BACKENDS == BACKENDS


@pytest.mark.parametrize("backend", BACKENDS[1:4])
def test_activations_of_many_rows_are_never_in_work_together(small, backend, monkeypatch):
    """However large the budget: rows times outputs (times rows, where pairs are computed at once) stay bounded."""
    if backend.startswith("neural-tangents") and not neural_tangents.is_installed():
        pytest.skip("neural-tangents not installed")
    fn, params, x = small
    monkeypatch.setattr(blocks, "MAX_PASSES", 2 * VOCAB)
    seen, combine = [], blocks.backend_of(backend).combine

    def watched(fn, params, a, b, traced):
        pairs = len(b.data) if backend.endswith("vector-products") else 1
        seen.append(len(a.data) * pairs * len(b.selectors))
        return combine(fn, params, a, b, traced)

    how = blocks.dataclasses.replace(blocks.backend_of(backend), combine=watched)
    found = blocks.blockwise(how, fn, params, x, None, traced=True, memory_budget=1 << 30)
    assert deviation(found, expected("mlp", "all, head untied")["trace"]) < 1e-12
    assert len(seen) > 1 and max(seen) <= 2 * VOCAB
