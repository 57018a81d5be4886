"""The door to neural-tangents: it opens without TensorFlow, changes nothing of JAX, and says how to get the key."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntkjax.errors import ConfigError, UserError
from ntkjax.ntk import neural_tangents
from ntkjax.ntk.exact import trace_ntk

needs_neural_tangents = pytest.mark.skipif(not neural_tangents.is_installed(), reason="neural-tangents not installed")


def network(params, x):
    return jnp.tanh(x @ params["a"]) @ params["b"]


@pytest.fixture
def case():
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    return {"a": draw(3, 4), "b": draw(4, 5)}, draw(3, 3), draw(2, 3)


def explicit(params, x):
    tree = jax.jacobian(lambda p: network(p, x))(params)
    return np.concatenate([np.asarray(leaf).reshape(*leaf.shape[:2], -1) for leaf in jax.tree.leaves(tree)], axis=2)


@needs_neural_tangents
@pytest.mark.parametrize("implementation", neural_tangents.IMPLEMENTATIONS)
def test_both_implementations_agree_with_explicit_jacobians(case, implementation):
    params, x1, x2 = case
    for second in (x2, None):
        wanted = np.einsum("ikp,jlp->ijkl", explicit(params, x1), explicit(params, x1 if second is None else second))
        full = neural_tangents.empirical_ntk_fn(network, traced=False, implementation=implementation)
        np.testing.assert_allclose(jax.jit(full)(params, x1, second), wanted, rtol=1e-4, atol=1e-5)
        mean = neural_tangents.empirical_ntk_fn(network, traced=True, implementation=implementation)
        wanted = np.einsum("ijkk->ij", wanted) / 5  # its trace is a mean over the five outputs
        np.testing.assert_allclose(jax.jit(mean)(params, x1, second), wanted, rtol=1e-4, atol=1e-5)


@needs_neural_tangents
def test_loading_it_leaves_no_trace():
    """In a process of its own: no name restored in JAX, no module but ours, no warning, no TensorFlow."""
    program = textwrap.dedent(
        """
        import sys, warnings
        import jax
        import jax.interpreters.ad
        from ntkjax.ntk import neural_tangents
        warnings.simplefilter("error")
        assert neural_tangents.load().NtkImplementation.JACOBIAN_CONTRACTION == 1
        assert neural_tangents.load() is neural_tangents.load()
        kernel = neural_tangents.empirical_ntk_fn(lambda p, x: x * p, traced=False)
        assert kernel(jax.numpy.ones(2), jax.numpy.ones((3, 2))).shape == (3, 3, 2, 2)
        names = ["Jaxpr", "JaxprEqn", "Literal", "Primitive", "Var"]
        assert not [name for name in names if name in vars(jax.core)]
        assert "zeros_like_p" not in vars(jax.interpreters.ad)
        assert "jax.util" not in sys.modules and not hasattr(jax, "util")
        loaded = {name.partition(".")[0] for name in sys.modules}
        assert not loaded & {"tensorflow", "tf2jax", "neural_tangents"}, loaded
        """
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def not_loaded_yet():
    neural_tangents.load.cache_clear()
    yield
    neural_tangents.load.cache_clear()


@pytest.mark.parametrize("missing", ["neural_tangents", "frozendict"])
def test_without_it_the_error_says_how_to_install_it(case, missing, monkeypatch, not_loaded_yet):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == missing else find(name, *rest))
    assert not neural_tangents.is_installed()
    params, x, _ = case
    for backend in ("neural-tangents", "neural-tangents-vector-products"):
        with pytest.raises(UserError, match=r"pip install --no-deps neural-tangents==0\.6\.5"):
            trace_ntk(network, params, x, backend=backend)


@needs_neural_tangents
def test_another_version_is_refused(monkeypatch, not_loaded_yet):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.7.0")
    with pytest.raises(UserError, match=r"neural-tangents 0\.7\.0 is installed, 0\.6\.5 is known to work"):
        neural_tangents.load()


@needs_neural_tangents
def test_a_failed_start_leaves_nothing_half_loaded(monkeypatch, not_loaded_yet):
    def fail(*_):
        raise ImportError("broken file")

    kept = {name: module for name, module in sys.modules.items() if name.startswith(neural_tangents._NAME)}
    monkeypatch.setattr(neural_tangents, "_execute", fail)
    with pytest.raises(ImportError, match="broken file"):
        neural_tangents.load()
    assert not [name for name in sys.modules if name.startswith(neural_tangents._NAME)]
    sys.modules.update(kept)
    monkeypatch.undo()
    assert neural_tangents.load().empirical_ntk_fn


def test_implementations_that_do_not_run_are_refused():
    for name in ("structured_derivatives", "auto", "jacobian"):
        with pytest.raises(ConfigError, match="jacobian_contraction, ntk_vector_products"):
            neural_tangents.empirical_ntk_fn(network, traced=True, implementation=name)
