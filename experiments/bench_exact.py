"""How much faster the exact trace kernel of a language model is from D passes than from V: part of `make bench`.

Question: the same kernel of the same examples by ``spectral`` and by neural-tangents, which differentiates every logit.
Command:  .venv/bin/python experiments/bench_exact.py        (make bench runs it with the other comparisons)
          OPENBLAS_NUM_THREADS=1, as there: with busy cores OpenBLAS needs 3 s for the eigenvalues of a 256 x 256
          matrix that one thread finds in 20 ms.
Model:    Qwen3 shape with random weights, V = 4096, D = 256, 6 layers, LoRA of rank 2 on every linear layer (49,152
          trained parameters), 2 examples of 16 tokens: so small that neural-tangents, which holds all V gradients of an
          example, stays within 12 GiB (3.8 GiB for JACOBIAN_CONTRACTION, 6.1 GiB for NTK_VECTOR_PRODUCTS).
Expect:   a ratio near V / D = 16, and temporary memory of the spectral passes that is the same at V = 32768.

Both compute the 2 x 2 kernel, in one process, one after the other in every round, after all programs are compiled. Of
neural-tangents' two implementations, called as its documentation says (jitted over the whole batch), the faster counts;
the other runs once. Cutting its work into blocks that fit the caches does not make it faster.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import ratios
import tyro

from ntkjax.models import LoraConfig, ModelConfig, init_lm
from ntkjax.ntk import kernels, neural_tangents
from ntkjax.ntk.exact import LogitsOutput, logits, mean_trace_ntk
from ntkjax.ntk.kernel import MAX_OUTPUTS, gradients
from ntkjax.types import Batch

NAME, MEMORY = "exact_trace_over_neural_tangents", "spectral_memory_at_8_times_the_vocabulary"


@dataclasses.dataclass(frozen=True)
class ExactBench:
    """Time exact trace kernels of a random model by spectral passes and by neural-tangents."""

    vocab: int = 4096
    width: int = 256
    layers: int = 6
    rank: int = 2
    rows: int = 2
    length: int = 16
    rounds: int = 3
    out: Path = Path("build/bench.json")


def problem(bench: ExactBench, vocab: int) -> tuple[LogitsOutput, dict, Batch]:
    """(f, trained parameters, examples): the adapter's B factors are drawn, so that it is not at its start."""
    config = ModelConfig(
        family="qwen3", vocab_size=vocab, hidden_size=bench.width, intermediate_size=2 * bench.width, qk_norm=True,
        num_layers=bench.layers, num_heads=bench.width // 64, num_kv_heads=bench.width // 128, head_dim=64,
    )  # fmt: skip
    model, rng = init_lm(config, seed=0, lora=LoraConfig(rank=bench.rank)), np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: jnp.asarray(0.05 * rng.normal(size=leaf.shape), leaf.dtype), model.lora)
    shape, steps = (bench.rows, bench.length), np.arange(bench.length)
    batch = Batch(
        tokens=rng.integers(4, vocab, shape, dtype=np.int32),
        response_mask=np.array(np.broadcast_to(steps >= bench.length // 2, shape)),
        lengths=np.full(bench.rows, bench.length, np.int32),
        index=np.arange(bench.rows, dtype=np.int32),
    )
    return logits(model.hidden_fn, model.head_fn), params, batch


def compiled(implementation: str, arguments: tuple) -> Callable[[], np.ndarray]:
    """neural-tangents as it is used on its own: the mean trace of the whole batch in one jitted call."""

    @jax.jit
    def kernel(fn: Callable, params: Any, x: Any) -> jax.Array:
        return neural_tangents.empirical_ntk_fn(fn, traced=True, implementation=implementation)(params, x)

    program: Any = kernel.lower(*arguments).compile()
    planned = program.memory_analysis().temp_size_in_bytes / 2**30
    print(f"  neural-tangents, {implementation}: {planned:.1f} GiB of temporary memory", flush=True)
    return lambda: np.asarray(program(*arguments))


def measure(bench: ExactBench) -> dict[str, float]:
    """Median, lowest and highest ratio over the rounds."""
    arguments = problem(bench, bench.vocab)
    spectral = lambda: mean_trace_ntk(*arguments, backend="spectral")
    theirs = {name: compiled(name, arguments) for name in neural_tangents.IMPLEMENTATIONS}
    for run in theirs.values():
        np.testing.assert_allclose(run(), spectral(), rtol=1e-3)
    first = {name: ratios.seconds(run) for name, run in theirs.items()}
    best = min(first, key=first.__getitem__)
    for name, took in first.items():
        print(f"  neural-tangents, {name}: {took / first[best]:.2f} x the faster one", flush=True)
    return ratios.spread([ratios.seconds(theirs[best]) / ratios.seconds(spectral) for _ in range(bench.rounds)])


def spectral_memory(bench: ExactBench, vocab: int) -> int:
    """Temporary bytes of the program that makes a block of gradients, as the compiler plans them."""
    fn, params, batch = problem(bench, vocab)
    kernel = kernels.trace(fn.hidden_fn, fn.head, params)
    selectors = np.eye(MAX_OUTPUTS, bench.width, dtype=np.float32)
    program = gradients.lower(kernel, params, batch, selectors, microbatch=None).compile()
    planned: Any = program.memory_analysis()
    return planned.temp_size_in_bytes


def comparisons(bench: ExactBench) -> dict[str, dict[str, float]]:
    """Name -> {median, low, high}, for build/bench.json; without neural-tangents the memory alone."""
    memory = spectral_memory(bench, 8 * bench.vocab) / spectral_memory(bench, bench.vocab)
    entries = {MEMORY: ratios.spread([memory])}
    if neural_tangents.is_installed():
        return {NAME: measure(bench)} | entries
    print(f"{NAME} not measured: neural-tangents is not installed ({neural_tangents.INSTALL})")
    return entries


def main(bench: ExactBench) -> None:
    """Measure, print and add to what is written."""
    ratios.record(comparisons(bench), bench.out)


if __name__ == "__main__":
    main(tyro.cli(ExactBench))
