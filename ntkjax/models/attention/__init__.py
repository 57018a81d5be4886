"""softmax(scale q k^T) v: one interface, a file for each implementation.

- ``xla`` (blocks.py): matrix products, in blocks of queries; any device, dtype and derivative.
- ``dual`` (dual.py): one Pallas kernel for the value and its tangents, for CUDA; where a derivative is transposed, the
  derivatives of ``xla``. ``interpreted``: the same kernel as JAX operations, to test it where there is no GPU.
- ``cudnn``: the flash attention of jax.nn.dot_product_attention; causal rows of one example, 16 bits, reverse mode.
- ``auto``: ``dual`` on one CUDA device, in reverse mode too: its value, and the derivatives of ``xla``. Rows are packed
  there, and jax.nn gives cuDNN their starts as a bias [B, 1, T, T] alone. Elsewhere, on TPUs and meshes of several
  devices, ``xla``: the kernel is written for Triton, which TPUs do not have.

What an implementation does not compute (a mask, float64, heads of more than 256) is computed by ``xla``.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ntkjax.errors import ConfigError
from ntkjax.models.attention.blocks import attend_blocks
from ntkjax.models.attention.dual import dual_attention, supports

IMPLEMENTATIONS = ("auto", "xla", "dual", "cudnn", "interpreted")


def resolve(implementation: str, mesh: jax.sharding.Mesh | None) -> str:
    """The implementation itself, or what "auto" means for the default device and ``mesh``.

    The kernel is opaque to the compiler, which would gather all rows on every device of a mesh: there it is ``xla``.

    Raises:
      ConfigError: a name that is not one of IMPLEMENTATIONS.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ConfigError(f"attention {implementation!r} is not one of {', '.join(IMPLEMENTATIONS)}")
    if implementation != "auto":
        return implementation
    device = jax.devices()[0] if mesh is None else mesh.devices.flat[0]
    cuda = device.platform == "gpu" and "rocm" not in device.client.platform_version.lower()
    return "dual" if cuda and (mesh is None or mesh.size == 1) else "xla"


def shares_tangents(implementation: str) -> bool:
    """Whether several tangents of one primal pass share the work of attention under ``jax.vmap``."""
    return implementation in ("dual", "interpreted")


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: Bool[Array, "b T S"] | None,
    implementation: str,
    *,
    scale: float | None = None,
    soft_cap: float | None = None,
    window: Int[Array, ""] | None = None,
    starts: Int[Array, "B T"] | None = None,
    forward_mode: bool = False,
) -> Float[Array, "B T N H"]:
    """softmax(scale q k^T) v with N / K query heads per key/value head; ``mask`` None means causal.

    ``scale`` None is 1 / sqrt(H). With a ``soft_cap`` c the scores s become c tanh(s / c) before the mask. ``window``
    w, for causal attention alone: query t sees the keys t - w < s <= t. ``starts``, likewise: query t sees the keys
    starts[t] <= s <= t. ``forward_mode``: differentiated by ``jax.jvp`` alone.
    """
    assert mask is None or (window is None and starts is None), "a window or starts beside a mask: it must hold them"
    plain = mask is None and window is None and soft_cap is None and starts is None
    if implementation == "cudnn" and plain and q.dtype.itemsize == 2:
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn", scale=scale)
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    if window is not None:
        row = jnp.arange(q.shape[1], dtype=jnp.int32)
        # Written without a sum that could overflow: a layer without a window among others has the largest int32.
        near = jnp.maximum(row - (window - 1), 0)[None]
        starts = jnp.broadcast_to(near, q.shape[:2]) if starts is None else jnp.maximum(near, starts)
    if shares_tangents(implementation) and mask is None and supports(q.shape[-1], q.dtype):
        interpret = implementation == "interpreted"
        return dual_attention(q, k, v, starts, scale, soft_cap, forward_mode=forward_mode, interpret=interpret)
    return attend_blocks(q, k, v, mask, starts, scale, soft_cap, forward_mode)
