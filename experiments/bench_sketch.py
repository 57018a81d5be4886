"""What a sketch adds to the gradients that it sketches, and what it does to the kernel: part of `make bench`.

Question: at K = 8192, how much time does each sketch add to per-example gradients, and how well does the sketched
          kernel rank pairs of examples like the exact one? The gate: at most 20% more time, at the Spearman
          correlation of the dense Rademacher sketch to within 0.01. Only a sketch that passes may be a default.
Command:  .venv/bin/python experiments/bench_sketch.py          (make bench runs it: the embedded model)
          .venv/bin/python experiments/bench_sketch.py --model ../shared/models/cot-lm-7m --data ../shared/data
Runtime:  about 3 minutes embedded; 10 to 15 minutes for the real model, on two CPU cores shared with much other work.
Expect:   experiments/README.md, "Sketches".

Every round times, one after the other on the same batch of real text: the gradients alone (reduced to one number a
leaf and example), and the same program with each sketch; a ratio is taken within a round. The dense sketch is timed as
`gradient_features` uses it, once for the gradients of all examples: its time a row is added to that of the gradients.
`sketch_apart_over_gradients_*` is a fast sketch of gradients that lie in memory, over the time to make them: on a busy
machine, where two runs of one program differ by more than a fast sketch takes, it says more than the ratio.
`rademacher_signs_share` is the part of the dense sketch that makes signs: the time for one row over that for all.
Correlations: off-diagonal entries of the exact `sum_logits` kernel against those of each sketch, over seeds; the
adapter's B factors are drawn, so that it is not at its start, where the gradients of all A factors are 0.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from ratios import record, seconds, spread

from ntkjax import load_lm
from ntkjax.assets import tiny_lm_path
from ntkjax.assets.planted import planted_task
from ntkjax.data import TokenisedDataset, read_records, tokenise
from ntkjax.models import LanguageModel
from ntkjax.ntk import KroneckerSketch, RademacherSketch, SparseSketch
from ntkjax.ntk.features import per_example_gradients
from ntkjax.ntk.metrics import spearman
from ntkjax.ntk.outputs import sum_logits

FAST = {"sparse": SparseSketch, "kronecker": KroneckerSketch}
MOST_TIME, LEAST_AGREEMENT = 1.2, 0.01


@dataclasses.dataclass(frozen=True)
class SketchBench:
    """Time every sketch, and compare its kernel with the exact one."""

    model: str = str(tiny_lm_path())
    data: Path | None = None
    """For a real model: folder with pool/cot-01.jsonl, or a file of records; the generated task otherwise."""
    size: int = 8192
    examples: int = 96
    """Rows of the kernels, and of the group that meets one generation of dense signs."""
    rows: int = 16
    """Rows of the timed batch."""
    length: int = 128
    """Longest example in tokens."""
    rounds: int = 15
    seeds: int = 3
    out: Path = Path("build/bench.json")


def dataset(bench: SketchBench, model: LanguageModel) -> TokenisedDataset:
    """The first examples of pool/cot-01, which the checkpoint has not seen; or of the planted pool."""
    if bench.data is not None:
        source = bench.data if bench.data.is_file() else bench.data / "pool" / "cot-01.jsonl"
    else:
        source = bench.out.parent / "bench_sketch.jsonl"
        source.parent.mkdir(parents=True, exist_ok=True)
        task = planted_task(7, pool_size=bench.examples, domain_size=3, dev_size=3, test_size=3)
        source.write_text("".join(json.dumps(row) + "\n" for row in task.pool), encoding="utf-8")
    records = read_records([str(source)], limit=bench.examples)
    return tokenise(records, model.tokenizer, max_length=bench.length)


def away_from_start(params: Any) -> Any:
    """LoRA factors with B drawn, as large as A."""
    rng = np.random.default_rng(0)
    drawn = lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * 0.02, leaf.dtype)
    return jax.tree.map(lambda leaf: leaf if np.any(np.asarray(leaf)) else drawn(leaf), params)


@jax.jit
def alone(fn: Any, params: Any, batch: Any) -> list[jax.Array]:
    """The gradients, reduced to a number for each leaf and example so that nothing is left out."""
    leaves = jax.tree.leaves(per_example_gradients(fn, params, batch))
    return [jnp.sum(leaf * leaf, axis=tuple(range(1, leaf.ndim))) for leaf in leaves]


@jax.jit
def together(sketch: Any, fn: Any, params: Any, batch: Any) -> jax.Array:
    """The same gradients, sketched in the program that makes them."""
    return sketch(per_example_gradients(fn, params, batch))


@jax.jit
def apply(sketch: Any, gradients: Any) -> jax.Array:
    """Sketch given gradients."""
    return sketch(gradients)


def times(bench: SketchBench, fn: Any, params: Any, batch: Any, gradients: Any) -> tuple[dict, list[jax.Array]]:
    """sketch_over_gradients_<name>: (gradients + sketch) / gradients, the share of the dense sketch's signs, and the
    dense features of each seed: to make them is what takes the time here, so it is done once."""
    fast = {name: make(bench.size) for name, make in FAST.items()}
    passes: dict[str, Callable] = {"alone": lambda: alone(fn, params, batch)}
    passes |= {name: lambda s=s: together(s, fn, params, batch) for name, s in fast.items()}
    part = jax.tree.map(lambda leaf: leaf[: len(batch.index)], gradients)
    passes |= {f"only {name}": lambda s=s: apply(s, part) for name, s in fast.items()}
    single, rows = jax.tree.map(lambda leaf: leaf[:1], gradients), len(jax.tree.leaves(gradients)[0])
    dense, features = [RademacherSketch(bench.size, jnp.asarray(seed)) for seed in range(bench.seeds)], []
    group, signs = (apply.lower(dense[0], rows_).compile() for rows_ in (gradients, single))
    took: dict[str, list[float]] = {name: [] for name in (*passes, "group", "signs")}
    for run in passes.values():
        seconds(run)  # compiles
    for number in range(max(bench.rounds, bench.seeds)):
        for name, run in passes.items():
            took[name].append(seconds(run))
        if number < bench.seeds:
            took["group"].append(seconds(lambda n=number: features.append(group(dense[n], gradients)) or features[-1]))
            took["signs"].append(seconds(lambda n=number: signs(dense[n], single)))
        print(f"  round {number + 1}", flush=True)
    ratios = {name: spread([t / a for t, a in zip(took[name], took["alone"])]) for name in fast}
    each = [1 + (g / rows) / (a / len(batch.index)) for g, a in zip(took["group"], took["alone"])]
    ratios["rademacher"] = spread(each)
    apart = {name: spread([t / a for t, a in zip(took[f"only {name}"], took["alone"])]) for name in fast}
    shares = spread([s / g for s, g in zip(took["signs"], took["group"])])
    named = {f"sketch_over_gradients_{n}": r for n, r in ratios.items()}
    named |= {f"sketch_apart_over_gradients_{n}": r for n, r in apart.items()}
    return named | {"rademacher_signs_share": shares}, features


def agreement(bench: SketchBench, gradients: Any, dense: list[jax.Array]) -> dict[str, dict[str, float]]:
    """sketch_spearman_<name>: rank correlation of off-diagonal entries with the exact kernel, over seeds."""
    flat = np.concatenate([np.asarray(g).reshape(len(g), -1) for g in jax.tree.leaves(gradients)], axis=1)
    pairs = np.triu_indices(len(flat), 1)
    exact = (flat.astype(np.float64) @ flat.astype(np.float64).T)[pairs]
    features = {
        n: [apply(make(bench.size, seed), gradients) for seed in range(bench.seeds)] for n, make in FAST.items()
    }
    entries = {}
    for name, sketched in (features | {"rademacher": dense}).items():
        kernels = [(phi @ phi.T)[pairs] for phi in (np.asarray(f, np.float64) for f in sketched)]
        entries[f"sketch_spearman_{name}"] = spread([spearman(kernel, exact) for kernel in kernels])
    return entries


def all_gradients(fn: Any, params: Any, data: TokenisedDataset, bench: SketchBench) -> Any:
    """Per-example gradients of every example, rows in the order of the data."""
    kept: Any = None
    for batch in data.batches(token_budget=bench.rows * bench.length, max_buckets=2):
        of_batch, index = jax.device_get(per_example_gradients(fn, params, batch)), np.asarray(batch.index)
        if kept is None:
            kept = jax.tree.map(lambda leaf: np.zeros((len(data), *leaf.shape[1:]), leaf.dtype), of_batch)
        jax.tree.map(lambda all_, leaf, i=index: all_.__setitem__(i[i >= 0], leaf[i >= 0]), kept, of_batch)
    return jax.tree.map(jnp.asarray, kept)


def passed(entries: dict[str, dict[str, float]]) -> list[str]:
    """The sketches that may be a default."""
    least = entries["sketch_spearman_rademacher"]["median"] - LEAST_AGREEMENT
    ratio = lambda name: entries[f"sketch_over_gradients_{name}"]["median"]
    return [n for n in FAST if ratio(n) <= MOST_TIME and entries[f"sketch_spearman_{n}"]["median"] >= least]


def main(bench: SketchBench) -> None:
    """Measure, print and add to what is written."""
    model = load_lm(bench.model)
    fn, params, data = (
        sum_logits(model.hidden_fn, model.head_fn({})),
        away_from_start(model.lora),
        dataset(bench, model),
    )
    longest = np.argsort(np.asarray(data.lengths))[-bench.rows :]
    batch = next(iter(data.batches(token_budget=1 << 30, indices=np.sort(longest), max_buckets=1)))
    gradients = all_gradients(fn, params, data, bench)
    count = sum(leaf[0].size for leaf in jax.tree.leaves(gradients))
    print(
        f"{len(data)} examples, {count:,} parameters; timed: {batch.tokens.shape[0]} x {batch.tokens.shape[1]} tokens"
    )
    entries, dense = times(bench, fn, params, batch, gradients)
    entries |= agreement(bench, gradients, dense)
    fastest = min(FAST, key=lambda name: entries[f"sketch_apart_over_gradients_{name}"]["median"])
    entries["sketch_over_gradients"] = entries[f"sketch_over_gradients_{fastest}"]
    print(f"fastest: {fastest}; pass the gate: {', '.join(passed(entries)) or 'none'}")
    record(entries, bench.out)


if __name__ == "__main__":
    main(tyro.cli(SketchBench))
