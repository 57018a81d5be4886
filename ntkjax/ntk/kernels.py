"""The kernels that can be asked for by name: the exact trace kernels and what approximates them.

Rotating the V outputs by an orthogonal Q changes no trace. Take Q = [q_1 ... q_D, Q_perp] with W^T W = U diag(s^2) U^T
and q_i = W u_i / s_i, held fixed. The outputs in Q_perp have value q^T W h with q^T W = 0: they change with the head
alone. So, for all V outputs and D directions,

    trace_ntk = sum_{i <= D} <grad q_i^T W h, grad q_i^T W h'> + (V - D) <h, h'>     (last term: head trained)

and with the head held fixed q_i^T W h = s_i u_i . h: exact in D passes through the folded head, whatever V. Keeping
the m largest s_i is the rank-m approximation ``spectral``. The centred kernel has W_c = (I - 11^T / V) W in the place
of W, and V - 1 outputs. Tied embeddings need nothing more: grad differentiates every use of the weight.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ntkjax.errors import ConfigError
from ntkjax.ntk.kernel import Kernel
from ntkjax.ntk.outputs import FoldedOutput, TrainedHeadOutput, fold_head, sum_logits
from ntkjax.parallel import to_host
from ntkjax.rng import numpy_rng
from ntkjax.types import Params, as_pytree_fn, at_least_float32


@dataclasses.dataclass(frozen=True)
class KernelFunctions:
    """What a kernel of a language model is made of.

    Attributes:
      hidden_fn: ``(params, batch) -> h [B, D]``, the pooled final hidden state.
      head: W [V, D], held fixed; or ``(params) -> W`` where the head may be among the trained parameters.
      nll_fn: ``(params, batch) -> [B]``, mean NLL of the response; only ``loss`` needs it.
      sum_logits_fn: ``(params, batch) -> [B]``, the sum of the outputs where these are not W h (a soft cap on logits).
        Kernels that rely on W h then raise ConfigError. None: the outputs are W h.
    """

    hidden_fn: Callable
    head: Any
    nll_fn: Callable | None = None
    sum_logits_fn: Callable | None = None


@dataclasses.dataclass(frozen=True)
class KernelKind:
    """An entry of `KERNELS`: everything that the commands, the selection methods and the help texts ask of a kernel.

    Attributes:
      build: ``(functions, params, m, seed) -> Kernel``; m is 0 where the kernel takes no size.
      outputs: ``(m, width) -> int``: outputs F_c, each of which costs a reverse pass; width is D.
      approximates: the kernel that it stands for, a name of `KERNELS`; None: it stands for no other.
      summary: what it is, in one line.
      sized: whether it takes a number of outputs, ``NAME:m``.
      nested: how the kernels of fewer outputs follow from one with M. ``sum``: the products of the gradients of the
        first m outputs add up to the kernel of size m; ``mean``: they do after multiplication by M / m; ``none``: they
        do not, so each size is computed by itself.
      complete: the kernel without a size whose first m outputs are the outputs of this one; None: there is none.
      random: whether ``seed`` changes it.
      linear: whether it relies on outputs that are W h.
    """

    build: Callable[[KernelFunctions, Params, int, int], Kernel]
    outputs: Callable[[int, int], int]
    approximates: str | None
    summary: str
    sized: bool = False
    nested: Literal["none", "sum", "mean"] = "none"
    complete: str | None = None
    random: bool = False
    linear: bool = True

    @property
    def single(self) -> bool:
        """Whether it has one output, whatever the model's width, and takes no size."""
        return not self.sized and self.outputs(0, 2) == 1


@dataclasses.dataclass(frozen=True)
class KernelSpec:
    """A kernel by name, and its number of outputs m where it has one (else 0)."""

    name: str
    m: int = 0

    def __str__(self) -> str:
        return f"{self.name}:{self.m}" if self.m else self.name

    @property
    def kind(self) -> KernelKind:
        """Its entry in `KERNELS`."""
        return KERNELS[self.name]

    def outputs(self, width: int) -> int:
        """Reverse passes that an example takes, one for each output, in a model of hidden size ``width``."""
        return self.kind.outputs(self.m, width)


def kernel_names() -> list[str]:
    """The names that `parse` reads, ``NAME:m`` where a size is expected, in the order of `KERNELS`."""
    return [f"{name}:m" if kind.sized else name for name, kind in KERNELS.items()]


def describe_kernels() -> str:
    """Every name of `kernel_names` with its summary, on one line: for help texts."""
    return "; ".join(f"{name}: {kind.summary}" for name, kind in zip(kernel_names(), KERNELS.values()))


def parse(text: str) -> KernelSpec:
    """The kernel called ``text``, a name of `kernel_names` with a number in the place of m.

    Raises:
      ConfigError: another name, a missing m, or an m that is no whole number above 0.
    """
    name, _, size = text.partition(":")
    if name not in KERNELS:
        raise ConfigError(f"unknown kernel {text!r}; expected one of {', '.join(kernel_names())}")
    if not KERNELS[name].sized:
        if size:
            raise ConfigError(f"kernel {text!r}: {name} takes no size; write {name}")
        return KernelSpec(name)
    if not size.isdecimal() or int(size) < 1:
        raise ConfigError(f"kernel {text!r}: expected {name}:m with m a whole number from 1, such as {name}:16")
    return KernelSpec(name, int(size))


def build(spec: KernelSpec | str, functions: KernelFunctions, params: Params, *, seed: int) -> Kernel:
    """The kernel of that name at ``params``; ``seed`` draws what is random in it (the probes of ``hutchinson``).

    Raises:
      ConfigError: the kernel relies on outputs that are W h and these are not (a soft cap on logits).
    """
    spec = parse(spec) if isinstance(spec, str) else spec
    if spec.kind.linear and functions.sum_logits_fn is not None:
        others = ", ".join(name for name, kind in KERNELS.items() if not kind.linear)
        raise ConfigError(
            f"kernel {str(spec)!r} takes the outputs to be W h, linear in the head, and this model's are "
            f"c tanh(W h / c) (final_logit_softcapping); use one of {others}"
        )
    return spec.kind.build(functions, params, spec.m, seed)


def summed(hidden_fn: Callable, head: Any, sum_logits_fn: Callable | None = None) -> Kernel:
    """<grad sum_k f_k(x), grad sum_k f_k(x')>: the paper's "Jacobian-free" kernel [arXiv 2511.07380]. It is the trace
    kernel plus all its cross-output terms. Of ``sum_logits_fn(params, batch) -> [B]`` where the outputs are not W h."""
    output = sum_logits(hidden_fn, head) if sum_logits_fn is None else as_pytree_fn(sum_logits_fn)
    return Kernel(output, name="sum_logits")


def loss(nll_fn: Callable | None) -> Kernel:
    """<grad nll(x), grad nll(x')>: label-aware, what LESS and G2IS use up to the optimiser.

    Raises:
      ConfigError: there is no ``nll_fn``.
    """
    if nll_fn is None:
        raise ConfigError("the loss kernel needs nll_fn(params, batch) -> [B]")
    return Kernel(as_pytree_fn(nll_fn), name="loss")


def hutchinson(hidden_fn: Callable, head: Any, params: Params, m: int, *, seed: int) -> Kernel:
    """1/m sum_v <grad v.f(x), grad v.f(x')> over m Rademacher probes v in {-1, 1}^V: unbiased for the trace kernel.

    The probes are shared by all examples and drawn from ``seed``; probe c is the same for every m.
    """
    rng = numpy_rng(seed, "ntk", "hutchinson")
    # Row by row: the first rows are the same for every m, so that kernels of several m share their probes.
    signs = rng.integers(0, 2, (m, len(_weight(head, params))), dtype=np.int8) * 2 - 1
    return Kernel(_rotated(hidden_fn, head, params, signs.T / np.sqrt(m)), name=f"hutchinson:{m}")


def trace(hidden_fn: Callable, head: Any, params: Params) -> Kernel:
    """sum_k <grad f_k(x), grad f_k(x')> over all V outputs, exactly, as D rotated ones."""
    return spectral(hidden_fn, head, params, None)


def centred_trace(hidden_fn: Callable, head: Any, params: Params) -> Kernel:
    """The trace kernel of the centred logits f - mean(f), the only ones that can change the loss."""
    return spectral(hidden_fn, head, params, None, centred=True)


def spectral(hidden_fn: Callable, head: Any, params: Params, m: int | None, *, centred: bool = False) -> Kernel:
    """sum_{i <= m} s_i^2 <grad u_i.h(x), grad u_i.h(x')>, W^T W = U diag(s^2) U^T: the m leading directions.

    Args:
      hidden_fn: ``(params, batch) -> h [B, D]``.
      head: W [V, D], held fixed; or ``(params) -> W`` where it may be trained: the head's own term is then included,
        in full whatever m.
      params: theta: where W is taken, and what decides whether the head is trained.
      m: directions kept; None: all that are not null, which is exact.
      centred: W_c = W - mean row in the place of W.

    Raises:
      ConfigError: m above D; a head that depends on ``params`` in another way than being one of its leaves.
    """
    weight = _weight(head, params)
    vocab, width = weight.shape
    if m is not None and not 1 <= m <= width:
        raise ConfigError(f"spectral: m must be between 1 and the width {width}, got {m}")
    values, vectors = head_spectrum(weight, centred=centred)
    kept = min(m or width, len(values))
    names = ("centred_spectral", "centred_trace") if centred else ("spectral", "trace")
    name = f"{names[0]}:{m}" if m else names[1]
    if not head_is_trained(head, params):
        directions = jnp.asarray(vectors[:, :kept] * np.sqrt(values[:kept]), weight.dtype)
        return Kernel(FoldedOutput(as_pytree_fn(hidden_fn), directions), name=name)
    rows = to_host(weight).astype(np.float64)
    rows = rows - rows.mean(axis=0) if centred else rows
    q = rows @ (vectors[:, :kept] / np.sqrt(values[:kept]))
    # With the head trained its own gradient along q_c is q_c h^T, q = W U / s [V, kept] with orthonormal columns: over
    # all V directions that is V <h, h'>, of which ``kept`` are in the outputs, and one more, the all-ones direction, is
    # what centring removes. What is left is the coefficient of <h, h'>.
    head_coefficient = float(vocab - centred - kept)
    return Kernel(_rotated(hidden_fn, head, params, q), as_pytree_fn(hidden_fn), head_coefficient, name)


def head_spectrum(weight: Float[Array, "V D"], *, centred: bool) -> tuple[np.ndarray, np.ndarray]:
    """(s^2 [r], U [D, r]) of W^T W, largest first, float64; directions that are null to rounding are left out.

    W^T W is summed over blocks of rows in float64, so nothing of the size of W is made.
    """
    matrix = to_host(weight)
    mean = matrix.mean(axis=0, dtype=np.float64) if centred else np.zeros(matrix.shape[1])
    gram = np.zeros((matrix.shape[1],) * 2)
    for start in range(0, len(matrix), 4096):
        rows = matrix[start : start + 4096].astype(np.float64) - mean
        gram += rows.T @ rows
    values, vectors = np.linalg.eigh(gram)
    values, vectors = values[::-1], vectors[:, ::-1]
    # As np.linalg.matrix_rank judges: below that an eigenvalue is rounding, and q = W u / s would divide by it.
    rank = int(np.sum(values > values[0] * len(values) * np.finfo(np.float64).eps))
    return values[:rank], vectors[:, :rank]


def head_is_trained(head: Any, params: Params) -> bool:
    """Whether ``head`` is a leaf of ``params``; False for a fixed W, or one that ``params`` does not reach.

    Found by pulling a random cotangent back through ``head``: it must arrive unchanged at one leaf, or nowhere.

    Raises:
      ConfigError: the head depends on ``params`` in some other way.
    """
    if not callable(head):
        return False
    weight, pull = jax.vjp(lambda p: _weight(head, p), params)
    # Random, so that a head that is a transpose or a sum of leaves cannot look like one that is a leaf.
    cotangent = jnp.asarray(np.random.default_rng(0).normal(size=weight.shape), weight.dtype)
    reached = [to_host(leaf) for leaf in jax.tree.leaves(pull(cotangent)[0])]
    reached = [leaf for leaf in reached if np.any(leaf)]
    if not reached:
        return False
    same = reached[0].shape == weight.shape and np.allclose(reached[0], np.asarray(cotangent), rtol=1e-2)
    if len(reached) > 1 or not same:
        raise ConfigError(
            "the head depends on the trained parameters in another way than being one of them, so its own term has no "
            'closed form; use backend="jacobian" of the exact kernels, or hold the head fixed'
        )
    return True


def _weight(head: Any, params: Params) -> Float[Array, "V D"]:
    weight: Any = head(params) if callable(head) else head
    return at_least_float32(weight)


def _rotated(hidden_fn: Callable, head: Any, params: Params, probes: np.ndarray) -> Callable:
    """F(x) = probes^T W h(x) [B, m], with the head's own gradient where it is trained and folded where it is not."""
    weight = _weight(head, params)
    rotation = jnp.asarray(probes, weight.dtype)
    if head_is_trained(head, params):
        return TrainedHeadOutput(as_pytree_fn(hidden_fn), as_pytree_fn(head), rotation)
    return FoldedOutput(as_pytree_fn(hidden_fn), fold_head(weight, rotation))


KERNELS: dict[str, KernelKind] = {
    "trace": KernelKind(
        build=lambda f, params, m, seed: trace(f.hidden_fn, f.head, params),
        outputs=lambda m, width: width,
        approximates=None,
        summary="exact, summed over all V logits",
    ),
    "centred_trace": KernelKind(
        build=lambda f, params, m, seed: centred_trace(f.hidden_fn, f.head, params),
        outputs=lambda m, width: width,
        approximates="trace",
        summary="exact, of the logits minus their mean, the only ones that can change the loss",
    ),
    "spectral": KernelKind(
        build=lambda f, params, m, seed: spectral(f.hidden_fn, f.head, params, m),
        outputs=lambda m, width: m,
        approximates="trace",
        summary="the m leading directions of the head, the trace from below",
        sized=True,
        nested="sum",
        complete="trace",
    ),
    "centred_spectral": KernelKind(
        build=lambda f, params, m, seed: spectral(f.hidden_fn, f.head, params, m, centred=True),
        outputs=lambda m, width: m,
        approximates="centred_trace",
        summary="the m leading directions of the centred head, the centred trace from below",
        sized=True,
        nested="sum",
        complete="centred_trace",
    ),
    "hutchinson": KernelKind(
        build=lambda f, params, m, seed: hutchinson(f.hidden_fn, f.head, params, m, seed=seed),
        outputs=lambda m, width: m,
        approximates="trace",
        summary="m random probes, unbiased for the trace",
        sized=True,
        nested="mean",
        random=True,
    ),
    "sum_logits": KernelKind(
        build=lambda f, params, m, seed: summed(f.hidden_fn, f.head, f.sum_logits_fn),
        outputs=lambda m, width: 1,
        approximates="trace",
        summary="the paper's Jacobian-free kernel, of the sum of the logits",
        linear=False,
    ),
    "loss": KernelKind(
        build=lambda f, params, m, seed: loss(f.nll_fn),
        outputs=lambda m, width: 1,
        approximates="centred_trace",
        summary="label-aware, of the response's loss",
        linear=False,
    ),
}
"""Every kernel that can be asked for by name: an entry here is all that a new one needs. Tables and reports of
``ntkjax verify`` list kernels in this order."""
