"""Adapter to neural-tangents (Novak et al. 2020, 2022), whose kernels ours are checked against.

Its last release, 0.6.5, asks for TensorFlow and for names that JAX has since moved or removed, so it cannot be imported
as it stands. Only its module for empirical kernels is needed here, and that one is sound: its sources are executed
under a name of our own, each with an ``import`` that hands it JAX with the old names in their place. Nothing of JAX is
changed, nothing else sees those names, and TensorFlow is never asked for.

Of its four implementations JACOBIAN_CONTRACTION and NTK_VECTOR_PRODUCTS run on today's JAX. STRUCTURED_DERIVATIVES, and
AUTO which tries it, walk JAX's own program representation as it was in 2023 and fail.
"""

from __future__ import annotations

import builtins
import functools
import importlib.machinery
import importlib.metadata
import importlib.util
import sys
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.core
import jax.extend.core
import jax.interpreters.ad
from jaxtyping import Array

from ntkjax.errors import ConfigError, UserError
from ntkjax.types import Params

VERSION = "0.6.5"
IMPLEMENTATIONS = ("jacobian_contraction", "ntk_vector_products")
INSTALL = f"pip install 'ntkjax[nt]' && pip install --no-deps neural-tangents=={VERSION}"
_NAME = "_ntkjax_neural_tangents"
# In the order in which they import each other, so that every relative import finds its module already there.
_FILES = ("utils.dataclasses", "utils.utils", "utils.kernel", "utils.typing", "utils.rules", "empirical")


def empirical_ntk_fn(
    apply_fn: Callable, *, traced: bool, implementation: str = "jacobian_contraction"
) -> Callable[..., Array]:
    """neural-tangents' own ``fn(params, x1, x2=None)`` for outputs [B, O] that do not depend on the rest of the batch.

    Args:
      apply_fn: ``apply_fn(params, x) -> [B, O]``.
      traced: [n1, n2], the mean over outputs of the trace (its trace_axes=(-1,)); else [n1, n2, O, O].
      implementation: one of `IMPLEMENTATIONS`.

    Returns:
      A function that can be jitted. Everything happens at once: memory is not bounded, see ``ntkjax.ntk.exact``.

    Raises:
      UserError: neural-tangents is not installed, or not in the version that is known to work.
      ConfigError: another implementation.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ConfigError(
            f"neural-tangents implementation {implementation!r}: expected one of {', '.join(IMPLEMENTATIONS)} "
            "(STRUCTURED_DERIVATIVES and AUTO do not run on this JAX)"
        )
    empirical = load()

    def kernel(params: Params, x1: Any, x2: Any = None) -> Array:
        leaves1, structure = jax.tree.flatten(x1)  # rows travel as bare leaves: it adds and removes axes of each
        leaves2 = None if x2 is None else jax.tree.leaves(x2)
        ntk = empirical.empirical_ntk_fn(
            lambda p, leaves: apply_fn(p, structure.unflatten(leaves)),
            trace_axes=(-1,) if traced else (),
            vmap_axes=0,
            implementation=empirical.NtkImplementation[implementation.upper()],
        )
        with jax.default_matmul_precision("highest"), warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # it asks jnp.size of shapes
            return ntk(leaves1, leaves2, params)

    return kernel


def is_installed() -> bool:
    """Whether neural-tangents and what it needs are there; nothing is imported."""
    return all(importlib.util.find_spec(name) is not None for name in ("neural_tangents", "frozendict"))


@functools.cache
def load() -> types.ModuleType:
    """neural-tangents' module of empirical kernels, executed once.

    Raises:
      UserError: it is not installed, or in another version; says how to install it.
    """
    if not is_installed():
        raise UserError(f"neural-tangents is not installed; to compare with it: {INSTALL}")
    version = importlib.metadata.version("neural-tangents")
    if version != VERSION:
        raise UserError(f"neural-tangents {version} is installed, {VERSION} is known to work here: {INSTALL}")
    spec = importlib.util.find_spec("neural_tangents")
    assert spec is not None and spec.origin is not None
    source = Path(spec.origin).parent / "_src"
    imports = _imports_of_old_jax()
    for package, folder in ((_NAME, source), (f"{_NAME}.utils", source / "utils")):
        module = types.ModuleType(package)
        module.__path__ = [str(folder)]
        sys.modules[package] = module
    try:
        for name in _FILES:
            _execute(f"{_NAME}.{name}", source / f"{name.replace('.', '/')}.py", imports)
    except BaseException:
        # Half a package would be taken for a whole one by the next call.
        for name in [name for name in sys.modules if name.partition(".")[0] == _NAME]:
            del sys.modules[name]
        raise
    return sys.modules[f"{_NAME}.empirical"]


def _execute(name: str, file: Path, imports: Callable) -> None:
    """Run a source file as the module ``name``, with ``imports`` in the place of its import statement."""
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # A module's import statements call the ``__import__`` of its own builtins: no other module's imports change.
    module.__dict__["__builtins__"] = {**vars(builtins), "__import__": imports}
    sys.modules[name] = module
    spec.loader.exec_module(module)
    parent, _, child = name.rpartition(".")
    setattr(sys.modules[parent], child, module)


def _imports_of_old_jax() -> Callable:
    """An ``__import__`` for which ``jax`` is today's JAX plus the names that 0.6.5 takes from it."""
    moved = {name: getattr(jax.extend.core, name) for name in ("Jaxpr", "JaxprEqn", "Literal", "Primitive", "Var")}
    core = _with_names(jax.core, moved)
    # A key in a table of the implementation that does not run: any object will do.
    ad = _with_names(jax.interpreters.ad, {"zeros_like_p": object()})
    interpreters = _with_names(jax.interpreters, {"ad": ad})
    util = _with_names(types.ModuleType("jax.util"), {"safe_map": _safe_map, "safe_zip": _safe_zip})
    old = _with_names(jax, {"core": core, "interpreters": interpreters, "util": util})
    modules = {module.__name__: module for module in (old, core, interpreters, ad, util)}

    def imports(name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level: int = 0) -> Any:
        wanted = name if fromlist else name.partition(".")[0]  # `import a.b` binds a, `from a.b import c` reads a.b
        if level == 0 and wanted in modules:
            return modules[wanted]
        return builtins.__import__(name, globals, locals, fromlist, level)

    return imports


def _with_names(module: types.ModuleType, names: dict[str, Any]) -> types.ModuleType:
    """A module that has ``names`` and, behind them, everything that ``module`` has."""
    copy = types.ModuleType(module.__name__)
    copy.__dict__.update(names, __getattr__=lambda name: getattr(module, name))
    return copy


def _safe_map(function: Callable, *sequences: Any) -> list:
    """jax.util.safe_map: a list, and all sequences of one length."""
    return [function(*items) for items in zip(*sequences, strict=True)]


def _safe_zip(*sequences: Any) -> list:
    return list(zip(*sequences, strict=True))
