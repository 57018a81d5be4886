"""How fast is scoring on one accelerator? `make bench-gpu`, or `python3 experiments/bench_gpu.py` on a bare machine.

Question   tokens per second of a forward pass, of the score (forward mode, one tangent) and of per-example LoRA
           gradients with their sketch, for models of 0.6 and 8 billion parameters in bfloat16; how much of the matrix
           unit that is; whether bfloat16 keeps the order of the scores; what 1.8 million examples would take.
Command    make bench-gpu; without installing anything: python3 experiments/bench_gpu.py (needs jax, flax, optax, numpy,
           scipy, jaxtyping, safetensors, tqdm; nothing else). --tiny: a shape for a CPU, in seconds.
Result     a Markdown table, and build/bench_gpu.json.
NOT RUN    on a GPU or TPU so far: no figure of this script exists. It was run with --tiny on a CPU, as its test does.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np

from ntkjax.models.config import ModelConfig, RopeConfig
from ntkjax.models.functions import param_shapes
from ntkjax.models.layers import ModelSpec
from ntkjax.models.lm import LanguageModel, paths, unflatten
from ntkjax.models.lora import LoraConfig
from ntkjax.ntk.features import gradient_features
from ntkjax.ntk.metrics import spearman
from ntkjax.ntk.outputs import sum_logits
from ntkjax.ntk.scores import directional_derivatives, mean_gradient, stack_tangents
from ntkjax.ntk.sketch import RademacherSketch
from ntkjax.types import Batch

MODELS = {
    "Qwen3-0.6B": ModelConfig(
        family="qwen3", vocab_size=151936, hidden_size=1024, intermediate_size=3072, num_layers=28, num_heads=16,
        num_kv_heads=8, head_dim=128, qk_norm=True, tied=True, rope=RopeConfig(theta=1e6),
    ),
    "Llama-8B": ModelConfig(
        family="llama", vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_layers=32, num_heads=32,
        num_kv_heads=8, head_dim=128, norm_eps=1e-5, rope=RopeConfig(theta=5e5, kind="llama3", factor=8.0),
    ),
}  # fmt: skip
TINY = {
    "tiny": ModelConfig(
        family="qwen3", vocab_size=128, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4,
        num_kv_heads=2, head_dim=8, qk_norm=True, tied=True,
    ),
}  # fmt: skip

# Dense bfloat16 TFLOP/s of one device, by the vendors' data sheets; the first name that the device's kind contains.
PEAKS = {
    "B200": 2250, "H200": 989, "H100 PCIe": 756, "H100": 989, "A100": 312, "L40S": 362, "L4": 121, "A10G": 70,
    "TPU v6": 918, "TPU v5p": 459, "TPU v5 lite": 197, "TPU v5e": 197, "TPU v4": 275,
}  # fmt: skip

PAPER_GPU_HOURS = 31  # A100-hours that arXiv 2511.07380 reports for its selection
CANDIDATES = 36_000  # 4 N, N = 9,000: what stage 1 leaves
PASSES = {"forward": 1, "score": 2, "features": 2}
"""Forward passes that a pass counts as: the score has a primal and a tangent pass; LoRA gradients a forward pass and a
backward pass for the activations (frozen weights have no gradient). The sketch is work, but none that is counted."""


def peak_tflops(kind: str) -> float | None:
    """Dense bfloat16 TFLOP/s of a device kind, or None where it is not in the table."""
    return next((float(value) for name, value in PEAKS.items() if name in kind), None)


def flops_per_token(config: ModelConfig, length: int) -> float:
    """Multiplications and additions of one token's forward pass: linear layers, and causal attention over length / 2
    tokens; without the head, which is folded away."""
    c = config
    width, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    linear = c.hidden_size * (2 * width + 2 * kv) + 3 * c.hidden_size * c.intermediate_size
    return c.num_layers * (2.0 * linear + 2 * 2 * width * length / 2)


def random_model(config: ModelConfig, dtype: str, attention: str) -> LanguageModel:
    """Random weights, drawn on the device; LoRA r = 16 on all linear layers, B not zero."""
    spec = ModelSpec(config, LoraConfig(rank=16), dtype, attention=attention)
    leaves = {}
    for number, (path, shape) in enumerate(paths(param_shapes(spec)).items()):
        key = jax.random.fold_in(jax.random.key(0, impl="rbg"), number)
        ones = path.endswith("scale")
        leaves[path] = jnp.ones(shape.shape, shape.dtype) if ones else draw(key, shape.shape, str(shape.dtype))
    return LanguageModel(spec, unflatten(leaves))


@functools.partial(jax.jit, static_argnames=("shape", "dtype"))
def draw(key: jax.Array, shape: tuple[int, ...], dtype: str) -> jax.Array:
    """Uniform noise of standard deviation 0.02, a layer at a time: beside 8 B weights nothing else is that large."""
    most = 0.02 * 3**0.5
    one = lambda k: jax.random.uniform(k, shape[1:], dtype, -most, most)
    if len(shape) == 2:  # embedding and head
        return jax.random.uniform(key, shape, dtype, -most, most)
    return jax.lax.map(one, jax.random.split(key, shape[0]))


def make_batch(config: ModelConfig, rows: int, length: int, seed: int = 0) -> Batch:
    """Full rows of random tokens; the second half of each is its response."""
    rng = np.random.default_rng(seed)
    return Batch(
        tokens=rng.integers(0, config.vocab_size, (rows, length), dtype=np.int32),
        response_mask=np.broadcast_to(np.arange(length) >= length // 2, (rows, length)),
        lengths=np.full(rows, length, np.int32),
        index=np.arange(rows, dtype=np.int32),
    )


forward = jax.jit(lambda fn, params, batch: fn(params, batch))


def steps(model: LanguageModel, batch: Batch, sketch_size: int) -> dict[str, Callable[[], Any]]:
    """Name of a pass -> a function that runs it on ``batch``."""
    params, output = model.lora, sum_logits(model.hidden_fn, model.head_fn({}))
    tangents, rows = stack_tangents(params, [params]), len(batch.index)
    sketch = RademacherSketch(sketch_size, 0)
    return {
        "forward": lambda: forward(model.embed_fn, params, batch),
        "score": lambda: directional_derivatives(output, params, tangents, batch),
        "features": lambda: gradient_features(output, params, [batch], sketch, rows=rows, microbatch=min(rows, 4)),
    }


def time_step(run: Callable[[], Any], rounds: int) -> float:
    """Median seconds of ``rounds`` runs after one that compiles."""
    times = []
    for _ in range(rounds + 1):
        began = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


def measure(name: str, model: LanguageModel, length: int, options: argparse.Namespace) -> list[dict]:
    """A row of the result for each pass; where memory runs out, with half the rows."""
    config, attention, found = model.config, model.spec.attention, []
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))
    for what in options.passes:
        rows = max(1, options.tokens // length)
        while True:
            try:
                run = steps(model, make_batch(config, rows, length), options.sketch)[what]
                seconds = time_step(run, options.rounds)
                row = speed(config, what, rows, length, seconds)
                break
            except Exception as error:  # the runtime's own classes: out of memory, or no derivative of a kernel
                if "RESOURCE_EXHAUSTED" in str(error) and rows > 1:
                    rows //= 2
                    continue
                row = {"error": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}
                break
        row |= {"model": name, "attention": attention, "length": length, "pass": what, "rows": rows}
        found.append(row | {"weight_bytes": weights, "peak_bytes": peak_memory()})
        print(f"  {name} {attention} T={length} {what}: {row.get('tokens_per_second', row.get('error'))}", flush=True)
    return found


def speed(config: ModelConfig, what: str, rows: int, length: int, seconds: float) -> dict:
    """Tokens per second and the share of the matrix unit's peak."""
    rate = rows * length / seconds
    flops = rate * flops_per_token(config, length) * PASSES[what]
    peak = peak_tflops(jax.devices()[0].device_kind)
    return {"tokens_per_second": rate, "tflops": flops / 1e12, "of_peak": peak and flops / 1e12 / peak}


def peak_memory() -> int | None:
    """The most bytes in use on the device so far; None where it does not tell."""
    stats = jax.devices()[0].memory_stats()
    return None if stats is None else stats.get("peak_bytes_in_use")


def order_kept(config: ModelConfig, examples: int, length: int) -> dict:
    """Spearman of the scores in bfloat16 and in float32, of one model whose weights bfloat16 holds exactly."""
    small = dataclasses.replace(config, num_layers=min(4, config.num_layers))
    half = random_model(small, "bfloat16", "xla")
    whole = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), half.params)
    full = LanguageModel(dataclasses.replace(half.spec, dtype="float32"), whole)
    pool = [make_batch(small, 8, length, seed) for seed in range(1, 1 + examples // 8)]
    scores = []
    for model in (half, full):
        with jax.default_matmul_precision("highest" if model is full else "default"):
            output = sum_logits(model.hidden_fn, model.head_fn({}))
            tangents = stack_tangents(model.lora, [mean_gradient(output, model.lora, [make_batch(small, 8, length)])])
            found = [np.asarray(directional_derivatives(output, model.lora, tangents, batch)[:, 0]) for batch in pool]
            scores.append(np.concatenate(found))
    value = spearman(*scores)
    return {"spearman": value, "layers": small.num_layers, "examples": len(scores[0]), "length": length}


def plan(rows: list[dict], examples: int, tokens: int, devices: int) -> list[dict]:
    """Hours for the whole pool on one device and on ``devices``, from the measured rates of each model."""
    found = []
    for name in dict.fromkeys(row["model"] for row in rows):
        for length in sorted({row["length"] for row in rows if row["model"] == name}):
            same = [r for r in rows if (r["model"], r["length"]) == (name, length) and "tokens_per_second" in r]
            rates = lambda what, same=same: [r["tokens_per_second"] for r in same if r["pass"] == what]
            best = {what: max(rates(what)) for what in PASSES if rates(what)}
            ways = {
                "score every example, exact": [("score", examples)],
                "stage 1, then score 4 N": [("forward", examples), ("score", CANDIDATES)],
                "stage 1, then sketched gradients of 4 N [paper]": [("forward", examples), ("features", CANDIDATES)],
            }
            for way, passes in ways.items():
                if any(what not in best for what, _ in passes):
                    continue
                hours = sum(count * tokens / best[what] for what, count in passes) / 3600
                row = {"model": name, "length": length, "way": way, "hours": hours}
                found.append(row | {"pod_hours": hours / devices})
    return found


def markdown(result: dict, devices: int) -> str:
    """The result as a page."""
    cell = lambda value, form: "-" if value is None else format(value, form)
    gib = lambda value: None if value is None else value / 2**30
    lines = [f"{result['device']} ({result['backend']}), jax {result['jax']}, weights {result['dtype']}", ""]
    if result["peak_tflops"] is None:
        lines += [f"The peak of {result['device']!r} is not in the table, so no share of it is given.", ""]
    lines += ["| model | T | pass | attention | rows | tokens/s | TFLOP/s | of peak | peak memory (GiB) |"]
    lines += ["|---|---:|---|---|---:|---:|---:|---:|---:|"]
    for r in result["rows"]:
        head = f"| {r['model']} | {r['length']} | {r['pass']} | {r['attention']} | {r['rows']} |"
        if "error" in r:
            lines.append(f"{head} {r['error'].replace('|', '/')} | | | |")
            continue
        share = None if r["of_peak"] is None else 100 * r["of_peak"]
        numbers = f"{r['tokens_per_second']:,.0f} | {r['tflops']:.3g} | {cell(share, '.1f')}{'%' if share else ''}"
        lines.append(f"{head} {numbers} | {cell(gib(r['peak_bytes']), '.2f')} |")
    order = result["float32_against_bfloat16"]
    lines += ["", f"Attention on the path that is differentiated: {result['differentiated_attention']}."]
    if order is not None:
        lines += [f"Scores in bfloat16 against float32: Spearman {order['spearman']:.4f} ({order['layers']} layers, "
                  f"{order['examples']} examples of {order['length']} tokens)."]  # fmt: skip
    what = f"{result['examples']:,} examples of {result['tokens_per_example']} tokens"
    lines += ["", f"Plan for {what}, from these rates (the paper reports {PAPER_GPU_HOURS} A100-hours):", ""]
    lines += [f"| model | rates at T | way | hours on one | hours on {devices} |", "|---|---:|---|---:|---:|"]
    for p in result["plan"]:
        row = f"| {p['model']} | {p['length']} | {p['way']} | {p['hours']:.3g} | {p['pod_hours']:.3g} |"
        lines.append(row)
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    """The command line; argparse, since a bare machine has no tyro."""
    parser = argparse.ArgumentParser(description="Scoring and gradients on one accelerator.")
    parser.add_argument("--tiny", action="store_true", help="a shape for a CPU, to try the script")
    parser.add_argument("--models", nargs="*", default=None, help=f"of {', '.join(MODELS)} (default: all)")
    parser.add_argument("--lengths", nargs="*", type=int, default=None, help="T (default: 512 2048)")
    parser.add_argument("--attention", nargs="*", default=None, help="xla, cudnn (default: both on a GPU, else xla)")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--tokens", type=int, default=None, help="tokens in a batch (default: 16384)")
    parser.add_argument("--sketch", type=int, default=8192, help="K")
    parser.add_argument("--passes", nargs="*", choices=PASSES, default=list(PASSES))
    parser.add_argument("--order", type=int, default=None, help="examples scored in both dtypes (default: 256)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--examples", type=int, default=1_800_000, help="of the pool that is planned for")
    parser.add_argument("--tokens-per-example", type=int, default=512, help="of that pool, padding included")
    parser.add_argument("--devices", type=int, default=64, help="of the pod that is planned for")
    parser.add_argument("--out", type=Path, default=Path("build/bench_gpu.json"))
    return parser.parse_args()


def main(options: argparse.Namespace) -> dict:
    """Measure, print, write."""
    device, models = jax.devices()[0], TINY if options.tiny else MODELS
    options.tokens = options.tokens or (128 if options.tiny else 16384)
    lengths = options.lengths or ([16, 32] if options.tiny else [512, 2048])
    attention = options.attention or (["xla", "cudnn"] if device.platform == "gpu" else ["xla"])
    chosen = {name: models[name] for name in options.models or models}
    print(f"{device.device_kind} ({device.platform}), jax {jax.__version__}", flush=True)
    rows = []
    for name, config in chosen.items():
        for kind in attention:
            model = random_model(config, options.dtype, kind)
            for length in lengths:
                rows += measure(name, model, length, options)
            del model  # the next one needs its place
    differentiated = sorted({r["attention"] for r in rows if r["pass"] == "score" and "error" not in r})
    examples = options.order if options.order is not None else 16 if options.tiny else 256
    order = order_kept(next(iter(chosen.values())), examples, lengths[0]) if examples else None
    result = {
        "device": device.device_kind,
        "backend": device.platform,
        "jax": jax.__version__,
        "dtype": options.dtype,
        "peak_tflops": peak_tflops(device.device_kind),
        "differentiated_attention": ", ".join(differentiated) or "none",
        "rows": rows,
        "float32_against_bfloat16": order,
        "examples": options.examples,
        "tokens_per_example": options.tokens_per_example,
        "plan": plan(rows, options.examples, options.tokens_per_example, options.devices),
    }
    print("\n" + markdown(result, options.devices))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=2) + "\n")
    print(f"\nwritten: {options.out}")
    return result


if __name__ == "__main__":
    main(parse())
