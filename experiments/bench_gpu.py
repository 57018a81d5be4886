"""How fast is scoring on one accelerator? `make bench-gpu`, or `python3 experiments/bench_gpu.py` on a bare machine.

Question   what attention costs by each implementation; tokens per second of a forward pass, of the score (forward mode,
           one tangent), of the mean gradient, of a training step and of per-example LoRA gradients with their sketch,
           the default one and the paper's, for models of 0.6 and 8 billion parameters in bfloat16; how much of the
           matrix unit that is; whether bfloat16 keeps the order of the scores; what 1.8 million examples would take;
           with --profile, in which kernels each pass spends its time; with --adapt, how much of the time the device
           works in a whole comparison.
Command    make bench-gpu; without installing anything: python3 experiments/bench_gpu.py (needs jax, flax, optax, numpy,
           scipy, jaxtyping, safetensors, tqdm; nothing else; --adapt needs the package). --tiny: a shape for a CPU.
           --minutes 6: what does not fit is left out and named. The most telling lines come first, and before all
           the comparison: --adapt, the last option, takes the words of `ntkjax adapt`.
Result     a Markdown table, and build/bench_gpu.json, written anew after every line.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import functools
import gzip
import itertools
import json
import math
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np

from ntkjax.devices import peak_tflops
from ntkjax.models.attention import attend, resolve
from ntkjax.models.config import ModelConfig, RopeConfig
from ntkjax.models.functions import param_shapes
from ntkjax.models.layers import ModelSpec
from ntkjax.models.lm import LanguageModel, paths, unflatten
from ntkjax.models.lora import LoraConfig
from ntkjax.ntk.features import gradient_features
from ntkjax.ntk.kernel import as_kernel
from ntkjax.ntk.metrics import spearman
from ntkjax.ntk.outputs import sum_logits
from ntkjax.ntk.rows import Pass
from ntkjax.ntk.scores import Direction, add_direction, mean_direction, score_batch, zero_direction
from ntkjax.ntk.sketch import SKETCH_SIZE
from ntkjax.ntk.sketches import DEFAULT_SKETCH, PAPER_SKETCH, SKETCHES
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

PAPER_GPU_HOURS = 31  # A100-hours that arXiv 2511.07380 reports for its selection
CANDIDATES = 36_000  # 4 N, N = 9,000: what stage 1 leaves
PASSES = {"forward": 1, "score": 2, "direction": 2, "train": 2, "features": 2, "paper-features": 2}
"""Forward passes that a pass counts as: the score has a primal and a tangent pass; LoRA gradients a forward pass and a
backward pass for the activations (frozen weights have no gradient). The sketch and what is computed again in a backward
pass are work, but none that is counted."""
SKETCH_OF = {"features": DEFAULT_SKETCH, "paper-features": PAPER_SKETCH}
"""The sketch of the passes that take gradients of each example."""

LAYOUTS = ("full", "packed")
"""A row is one example of T tokens, or examples of 100 to 600 tokens that fill it."""

# Most telling first, since time may run out: (model, T, layout, attention, passes); "auto" is what commands take.
LINES = (
    ("Qwen3-0.6B", 2048, "packed", "auto", ("score", "forward", "direction", "train")),
    ("Qwen3-0.6B", 2048, "full", "auto", ("score",)),
    ("Llama-8B", 2048, "packed", "auto", ("score", "forward")),
    ("Qwen3-0.6B", 2048, "packed", "xla", ("score",)),
    ("Qwen3-0.6B", 512, "full", "auto", ("score", "features", "paper-features")),
    ("Llama-8B", 2048, "full", "auto", ("score",)),
    ("Qwen3-0.6B", 2048, "full", "xla", ("score",)),
    ("Qwen3-0.6B", 512, "full", "xla", ("score",)),
    ("Llama-8B", 512, "full", "auto", ("score",)),
)
SHAPES = ((8, 2048, 16, 8, 128), (32, 512, 16, 8, 128), (8, 2048, 9, 3, 64))
"""Of the attention lines: rows, tokens, heads, key/value heads, head size."""


def flops_per_token(config: ModelConfig, length: float) -> float:
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


def make_batch(config: ModelConfig, rows: int, length: int, seed: int = 0, layout: str = "full") -> Batch:
    """Rows of random tokens without padding; the second half of each example is its response."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, config.vocab_size, (rows, length), dtype=np.int32)
    if layout == "full":
        mask = np.broadcast_to(np.arange(length) >= length // 2, (rows, length))
        return Batch(tokens, mask, np.full(rows, length, np.int32), np.arange(rows, dtype=np.int32))
    slots = max(16, length // 32)
    sizes, index = np.zeros((rows, slots), np.int32), np.full((rows, slots), -1, np.int32)
    owner, positions, mask = (np.zeros((rows, length), kind) for kind in (np.int32, np.int32, bool))
    for row in range(rows):
        at = slot = 0
        while at < length:
            size = min(int(rng.integers(min(100, length // 4), min(600, length) + 1)), length - at)
            step = np.arange(size)
            owner[row, at : at + size], positions[row, at : at + size] = slot, step
            mask[row, at : at + size] = step >= max(1, size // 2)
            sizes[row, slot], index[row, slot] = size, row * slots + slot
            at, slot = at + size, slot + 1
    return Batch(tokens, mask, sizes.reshape(-1), index.reshape(-1), None, positions, owner)


forward = jax.jit(lambda fn, params, batch: fn(params, batch))


def step_of(
    what: str, model: LanguageModel, batch: Batch, sketch_size: int
) -> tuple[Callable[[], Any], Callable[[], Any] | None]:
    """A function that runs the pass ``what`` on ``batch``, the functions that `select` and training call; and one that
    lowers its program, None where it is several."""
    params, output = model.lora, sum_logits(model.hidden_fn, model.head_fn({}))
    kernel, rows, batch = as_kernel(output), len(batch.index), jax.device_put(batch)
    if what == "forward":
        return tuple(functools.partial(f, model.embed_fn, params, batch) for f in (forward, forward.lower))
    if what == "score":
        stacked = Direction(jax.tree.map(lambda p: p[None, None], params))
        return tuple(functools.partial(f, kernel, params, stacked, batch) for f in (score_batch, score_batch.lower))
    if what == "direction":
        zero = zero_direction(kernel, params, batch)
        return tuple(functools.partial(f, kernel, params, batch, zero) for f in (add_direction, add_direction.lower))
    if what in SKETCH_OF:
        sketch = SKETCHES[SKETCH_OF[what]](sketch_size, 0)
        return lambda: gradient_features(output, params, [batch], sketch, rows=Pass(rows)), None
    # A bare machine may lack what training needs beside (orbax): then this pass alone fails.
    from ntkjax.training.config import TrainConfig
    from ntkjax.training.optimiser import AdamW
    from ntkjax.training.step import init_state, leaf_dtypes, train_step

    optimiser = AdamW.of(TrainConfig())
    state = [init_state(params, optimiser)]
    options = {"optimiser": optimiser, "accumulation": 1, "dtypes": leaf_dtypes(params)}

    def train() -> Any:
        state[0], metrics = train_step(model.nll_fn, state[0], batch, 1e-5, **options)
        return metrics.loss

    return train, lambda: train_step.lower(model.nll_fn, state[0], batch, 1e-5, **options)


def compile_all(model: LanguageModel, lines: list[tuple[int, str, str]], options: argparse.Namespace) -> dict:
    """Seconds to compile the program of each line (T, layout, pass), all at once: they are kept in JAX's compilation
    cache, where `measure` finds them."""

    def compiled(line: tuple[int, str, str]) -> float | None:
        length, layout, what = line
        try:
            batch = make_batch(model.config, max(1, options.tokens // length), length, layout=layout)
            lower = step_of(what, model, batch, options.sketch)[1]
            began = time.perf_counter()
            if lower is not None:
                lower().compile()
            return None if lower is None else time.perf_counter() - began
        except Exception:  # `measure` meets it again, and says what it is
            return None

    with ThreadPoolExecutor(8) as pool:
        return dict(zip(lines, pool.map(compiled, lines), strict=True))


def time_step(run: Callable[[], Any], rounds: int) -> dict:
    """Seconds of the first run, which compiles, and of ``rounds`` more: median, least and most."""
    times = []
    for _ in range(rounds + 1):
        began = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - began)
    rest = times[1:]
    return {"first_call": times[0], "seconds": statistics.median(rest), "least": min(rest), "most": max(rest)}


def measure(model: LanguageModel, name: str, length: int, layout: str, what: str, options: argparse.Namespace) -> dict:
    """One line of the result; where memory runs out, with half the rows."""
    config, rows = model.config, max(1, options.tokens // length)
    while True:
        try:
            batch = make_batch(config, rows, length, layout=layout)
            run = step_of(what, model, batch, options.sketch)[0]
            times = time_step(run, options.rounds)
            row = times | speed(config, what, batch, times["seconds"])
            row |= {"kernels": top_kernels(run)} if options.profile else {}
            break
        except Exception as error:  # the runtime's own classes: out of memory, or no derivative of a kernel
            if "RESOURCE_EXHAUSTED" in str(error) and rows > 1:
                rows //= 2
                continue
            row = {"error": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}
            break
    row |= {"model": name, "attention": model.spec.attention, "length": length, "layout": layout, "pass": what}
    row |= {"rows": rows, "weight_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))}
    return row | {"peak_bytes": peak_memory()}


def top_kernels(run: Callable[[], Any], most: int = 10) -> list[dict]:
    """The kernels that one run spends most time in: name, seconds, launches, share of the time of all kernels. On a CPU
    they are the operations of the compiled program."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(run())
        read = lambda path: json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
        events = [event for path in Path(folder).rglob("*.trace.json.gz") for event in read(path)]
    seconds, launches = collections.Counter(), collections.Counter()
    for name, spent in kernel_seconds(events):
        seconds[name] += spent
        launches[name] += 1
    every = sum(seconds.values())
    row = lambda name, spent: {"name": name, "seconds": spent, "launches": launches[name], "share": spent / every}
    return [row(*one) for one in seconds.most_common(most)]


def kernel_seconds(events: list[dict]) -> Iterator[tuple[str, float]]:
    """(name, seconds) of every kernel in the events of a trace; of operations of a CPU without what they call. A stream
    runs one kernel after the other, where the next may begin before the last one's end is written down."""
    named = lambda what: {(e["pid"], e.get("tid")): e["args"]["name"] for e in events if e.get("name") == what}
    processes, threads = named("process_name"), named("thread_name")
    devices = {pid for (pid, _), name in processes.items() if "/device:" in name}
    # Of a GPU the streams alone: other lines of the trace tell the same time again, by program and by operation.
    streams = {at for at, name in threads.items() if at[0] in devices and "Stream" in name}
    lines = streams or {at for at, name in threads.items() if at[0] in devices and name == "XLA Ops"}
    counts = lambda e: (e["pid"], e["tid"]) in lines if devices else "hlo_op" in e.get("args", {})
    runs = [event for event in events if event.get("ph") == "X" and counts(event)]
    if streams:
        yield from ((event["name"], 1e-6 * event["dur"]) for event in runs)
        return
    open_until: dict[tuple, list] = {}
    spent = [event["dur"] for event in runs]
    for number in sorted(range(len(runs)), key=lambda i: (runs[i]["ts"], -runs[i]["dur"])):
        event = runs[number]
        above = open_until.setdefault((event["pid"], event["tid"]), [])
        while above and above[-1][0] <= event["ts"]:
            above.pop()
        if above:
            spent[above[-1][1]] -= event["dur"]
        above.append((event["ts"] + event["dur"], number))
    for event, microseconds in zip(runs, spent, strict=True):
        yield event["name"], 1e-6 * microseconds


def speed(config: ModelConfig, what: str, batch: Batch, seconds: float) -> dict:
    """Tokens per second and the share of the matrix unit's peak."""
    rate = batch.tokens.size / seconds
    # A token of a packed row sees as many keys as stand before it in its example: half its length on average.
    length = batch.tokens.shape[1] if batch.positions is None else 2 * float(np.mean(batch.positions))
    flops = rate * flops_per_token(config, length) * PASSES[what]
    peak = peak_tflops(jax.devices()[0].device_kind)
    return {"tokens_per_second": rate, "tflops": flops / 1e12, "of_peak": peak and flops / 1e12 / peak}


def attention_lines(options: argparse.Namespace) -> Iterator[dict]:
    """Milliseconds of attention alone by each implementation: its value, and its value with one tangent."""
    jobs = []
    for shape in ((2, 32, 4, 2, 16),) if options.tiny else SHAPES:
        rows, length, heads, kv_heads, size = shape
        draw = lambda key, n, of=(rows, length), h=size: jax.random.normal(key, (*of, n, h)).astype(options.dtype)
        drawn = [draw(*one) for one in zip(jax.random.split(jax.random.key(0), 6), 2 * (heads, kv_heads, kv_heads))]
        positions = make_batch(TINY["tiny"], rows, length, layout="packed").positions
        starts = {"full": None, "packed": jnp.asarray(np.arange(length, dtype=np.int32)[None] - positions)}
        for layout, kind, what in itertools.product(LAYOUTS, options.attention, ("value", "tangent")):
            row = {"shape": shape, "layout": layout, "attention": kind, "what": what}
            jobs.append((row, (_attention, _attention_jvp)[what == "tangent"], (starts[layout], *drawn)))

    def compiled(job: tuple) -> Any:
        try:
            return job[1].lower(job[0]["attention"], *job[2]).compile()
        except Exception as error:  # cuDNN has no tangent
            return error

    with ThreadPoolExecutor(8) as pool:  # compiling takes a hundred times as long as what is measured
        for (row, _, arrays), program in zip(jobs, list(pool.map(compiled, jobs)), strict=True):
            if isinstance(program, Exception):
                yield row | {"error": f"{type(program).__name__}: {str(program).splitlines()[0][:100]}"}
            else:
                yield row | time_step(functools.partial(program, *arrays), 4 * options.rounds)


@functools.partial(jax.jit, static_argnums=0)
def _attention(kind: str, starts: jax.Array | None, q, k, v, *_: Any) -> jax.Array:
    return attend(q, k, v, None, kind, starts=starts, forward_mode=True)


@functools.partial(jax.jit, static_argnums=0)
def _attention_jvp(kind: str, starts: jax.Array | None, q, k, v, *tangents: Any) -> tuple[jax.Array, jax.Array]:
    run = lambda q, k, v: attend(q, k, v, None, kind, starts=starts, forward_mode=True)
    return jax.jvp(run, (q, k, v), tangents)


def peak_memory() -> int | None:
    """The most bytes in use on the device so far; None where it does not tell."""
    stats = jax.devices()[0].memory_stats()
    return None if stats is None else stats.get("peak_bytes_in_use")


SAMPLE = ("nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "-lms", "200")


def watch_adapt(words: list[str], minutes: float) -> dict:
    """How long `ntkjax adapt` with these words took, at most so many minutes, and how much of that the first device
    worked: ``busy``, the share of samples (five a second) in which any program ran; None without nvidia-smi."""
    seconds, began = None if math.isinf(minutes) else 60 * minutes, time.monotonic()
    with tempfile.TemporaryFile("w+") as said:
        sampler = subprocess.Popen(SAMPLE, stdout=said) if shutil.which(SAMPLE[0]) else None
        try:
            code = subprocess.run([sys.executable, "-m", "ntkjax", "adapt", *words], timeout=seconds).returncode
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if sampler is not None:
                sampler.terminate()
                sampler.wait()
        said.seek(0)
        used = [int(line) for line in said if line.strip().isdigit()]
    busy = sum(share > 0 for share in used) / len(used) if used else None
    return {"words": words, "exit_code": code, "seconds": time.monotonic() - began, "samples": len(used), "busy": busy}


def order_kept(config: ModelConfig, examples: int, length: int, attention: str) -> dict:
    """Spearman of the scores in bfloat16 and in float32, of one model whose weights bfloat16 holds exactly."""
    small = dataclasses.replace(config, num_layers=min(4, config.num_layers))
    half = random_model(small, "bfloat16", attention)
    whole = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), half.params)
    full = LanguageModel(dataclasses.replace(half.spec, dtype="float32", attention="xla"), whole)
    pool = [make_batch(small, 8, length, seed) for seed in range(1, 1 + examples // 8)]
    scores = []
    for model in (half, full):
        kernel = as_kernel(sum_logits(model.hidden_fn, model.head_fn({})))
        direction = mean_direction(kernel, model.lora, [make_batch(small, 8, length)])
        stacked = jax.tree.map(lambda leaf: leaf[None], direction)
        each = [np.asarray(score_batch(kernel, model.lora, stacked, batch)[:, 0]) for batch in pool]
        scores.append(np.concatenate(each))
    value = spearman(*scores)
    return {"spearman": value, "layers": small.num_layers, "examples": len(scores[0]), "length": length}


def plan(rows: list[dict], examples: int, tokens: int, devices: int) -> list[dict]:
    """Hours for the whole pool on one device and on ``devices``, from the measured rates of each model."""
    plans = []
    for name in dict.fromkeys(row["model"] for row in rows):
        for length in sorted({row["length"] for row in rows if row["model"] == name}):
            same = [r for r in rows if (r["model"], r["length"]) == (name, length) and "tokens_per_second" in r]
            rates = lambda what, same=same: [r["tokens_per_second"] for r in same if r["pass"] == what]
            best = {what: max(rates(what)) for what in PASSES if rates(what)}
            ways = {
                "score every example, exact": [("score", examples)],
                "stage 1, then score 4 N": [("forward", examples), ("score", CANDIDATES)],
                "stage 1, then sketched gradients of 4 N": [("forward", examples), ("features", CANDIDATES)],
                "the same, the paper's sketch": [("forward", examples), ("paper-features", CANDIDATES)],
            }
            for way, passes in ways.items():
                if any(what not in best for what, _ in passes):
                    continue
                hours = sum(count * tokens / best[what] for what, count in passes) / 3600
                row = {"model": name, "length": length, "way": way, "hours": hours}
                plans.append(row | {"pod_hours": hours / devices})
    return plans


def markdown(result: dict, devices: int) -> str:
    """The result as a page."""
    cell = lambda value, form: "-" if value is None else format(value, form)
    gib = lambda value: None if value is None else value / 2**30
    lines = [f"{result['device']} ({result['backend']}), jax {result['jax']}, weights {result['dtype']}", ""]
    if result["peak_tflops"] is None:
        lines += [f"The peak of {result['device']!r} is not in the table, so no share of it is given.", ""]
    if result["attention"]:
        lines += [
            "| rows, tokens, heads, key/value heads, size | layout | attention | value (ms) | with a tangent (ms) |"
        ]
        lines += ["|---|---|---|---:|---:|", *attention_table(result["attention"]), ""]
    head = ["model", "T", "layout", "pass", "attention", "rows", "tokens/s", "TFLOP/s", "of peak"]
    lines += [f"| {' | '.join([*head, 'compilation (s)', 'spread', 'GiB'])} |"]
    lines += ["|---|---:|---|---|---|---:|---:|---:|---:|---:|---:|---:|"]
    for r in result["rows"]:
        head = f"| {r['model']} | {r['length']} | {r['layout']} | {r['pass']} | {r['attention']} | {r['rows']} |"
        if "error" in r:
            lines.append(f"{head} {r['error'].replace('|', '/')} | | | | | |")
            continue
        share = None if r["of_peak"] is None else 100 * r["of_peak"]
        numbers = f"{r['tokens_per_second']:,.0f} | {r['tflops']:.3g} | {cell(share, '.1f')}{'%' if share else ''}"
        spread = f"{100 * (r['most'] - r['least']) / r['seconds']:.0f}%"
        lines.append(
            f"{head} {numbers} | {cell(r['compile_seconds'], '.1f')} | {spread} | {cell(gib(r['peak_bytes']), '.2f')} |"
        )
    profiled = [r for r in result["rows"] if "kernels" in r]
    if profiled:
        lines += ["", "| model | T | layout | pass | kernel | ms | launches | of the time of all kernels |"]
        lines += ["|---|---:|---|---|---|---:|---:|---:|"]
    for r in profiled:
        head = f"| {r['model']} | {r['length']} | {r['layout']} | {r['pass']} |"
        for k in r["kernels"]:
            lines.append(f"{head} {k['name']} | {1e3 * k['seconds']:.3g} | {k['launches']} | {100 * k['share']:.1f}% |")
    if (adapt := result["adapt"]) is not None:
        end = "stopped" if adapt["exit_code"] is None else f"exit code {adapt['exit_code']}"
        work = "no nvidia-smi" if adapt["busy"] is None else f"the device worked in {100 * adapt['busy']:.0f}%"
        told = f"{adapt['seconds']:.0f} s ({end}), {work} of {adapt['samples']} samples"
        lines += ["", f"`ntkjax adapt {' '.join(adapt['words'])}`: {told}."]
    order = result["float32_against_bfloat16"]
    if order is not None:
        sample = f"{order['layers']} layers, {order['examples']} examples of {order['length']} tokens"
        lines += ["", f"Scores in bfloat16 against float32: Spearman {order['spearman']:.5f} ({sample})."]
    if result["left_out"]:
        lines += ["", f"Left out, the time being up: {'; '.join(result['left_out'])}."]
    what = f"{result['examples']:,} examples of {result['tokens_per_example']} tokens"
    lines += ["", f"Plan for {what}, from these rates (the paper reports {PAPER_GPU_HOURS} A100-hours):", ""]
    lines += [f"| model | rates at T | way | hours on one | hours on {devices} |", "|---|---:|---|---:|---:|"]
    for p in result["plan"]:
        row = f"| {p['model']} | {p['length']} | {p['way']} | {p['hours']:.3g} | {p['pod_hours']:.3g} |"
        lines.append(row)
    return "\n".join(lines)


def attention_table(rows: list[dict]) -> Iterator[str]:
    """A line for each shape, layout and implementation."""
    cases = dict.fromkeys((tuple(r["shape"]), r["layout"], r["attention"]) for r in rows)
    for shape, layout, kind in cases:
        same = [r for r in rows if (tuple(r["shape"]), r["layout"], r["attention"]) == (shape, layout, kind)]
        times = {r["what"]: f"{1e3 * r['seconds']:.3g}" for r in same if "seconds" in r}
        cells = [", ".join(map(str, shape)), layout, kind, times.get("value", "-"), times.get("tangent", "-")]
        yield f"| {' | '.join(cells)} |"


def parse() -> argparse.Namespace:
    """The command line; argparse, since a bare machine has no tyro."""
    parser = argparse.ArgumentParser(description="Scoring and gradients on one accelerator.")
    parser.add_argument("--tiny", action="store_true", help="a shape for a CPU, to try the script")
    parser.add_argument("--minutes", type=float, default=math.inf, help="no line begins later than this")
    parser.add_argument("--models", nargs="*", default=None, help=f"of {', '.join(MODELS)} (default: all)")
    parser.add_argument("--lengths", nargs="*", type=int, default=None, help="T (default: 512 2048)")
    parser.add_argument("--attention", nargs="*", default=None, help="xla, cudnn, dual (default: all on a GPU)")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--tokens", type=int, default=None, help="tokens in a batch (default: 16384)")
    parser.add_argument("--sketch", type=int, default=SKETCH_SIZE, help="K")
    parser.add_argument("--passes", nargs="*", choices=PASSES, default=list(PASSES))
    parser.add_argument("--order", type=int, default=None, help="examples scored in both dtypes (default: 256)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--examples", type=int, default=1_800_000, help="of the pool that is planned for")
    parser.add_argument("--tokens-per-example", type=int, default=300, help="of that pool")
    parser.add_argument("--devices", type=int, default=64, help="of the pod that is planned for")
    parser.add_argument("--out", type=Path, default=Path("build/bench_gpu.json"))
    parser.add_argument("--profile", action="store_true", help="after each pass, the kernels that take most time")
    parser.add_argument("--no-attention", action="store_true", help="leave attention alone out")
    parser.add_argument("--adapt", nargs=argparse.REMAINDER, default=None, help="words of `ntkjax adapt`, to watch it")
    return parser.parse_args()


def chosen_lines(options: argparse.Namespace) -> list[tuple[str, int, str, str, str]]:
    """(model, T, layout, attention, pass), most telling first, of what the options ask for."""
    if options.tiny:
        lengths = options.lengths or [16, 32]
        every = [("tiny", length, layout, kind, what) for what in PASSES for length in lengths for layout in LAYOUTS
                 for kind in options.attention]  # fmt: skip
        alone = lambda line: line[2] == "packed" and line[4] in SKETCH_OF  # an example a row
        return [line for line in every if line[4] in options.passes and not alone(line)]
    auto = resolve("auto", None)
    every = [
        (name, length, layout, auto if kind == "auto" else kind, what)
        for name, length, layout, kind, passes in LINES
        for what in passes
    ]
    every = list(dict.fromkeys(every))
    kept = lambda name, length, layout, kind, what: (
        name in (options.models or MODELS) and length in (options.lengths or (512, 2048))
        and kind in options.attention and what in options.passes
    )  # fmt: skip
    return [line for line in every if kept(*line)]


def main(options: argparse.Namespace) -> dict:
    """Measure, print, write."""
    began, models = time.monotonic(), TINY if options.tiny else MODELS
    # First, while the device's memory is nobody's: this process takes most of it.
    adapt = None if options.adapt is None else watch_adapt(options.adapt, options.minutes)
    device = jax.devices()[0]
    options.tokens = options.tokens or (128 if options.tiny else 16384)
    options.attention = options.attention or (["dual", "xla", "cudnn"] if device.platform == "gpu" else ["xla"])
    late = lambda: time.monotonic() - began > 60 * options.minutes
    print(f"{device.device_kind} ({device.platform}), jax {jax.__version__}", flush=True)
    programs = tempfile.mkdtemp(prefix="bench-gpu-")
    jax.config.update("jax_compilation_cache_dir", programs)
    result = {
        "device": device.device_kind,
        "backend": device.platform,
        "jax": jax.__version__,
        "dtype": options.dtype,
        "peak_tflops": peak_tflops(device.device_kind),
        "adapt": adapt,
        "attention": [],
        "rows": [],
        "float32_against_bfloat16": None,
        "left_out": [],
        "examples": options.examples,
        "tokens_per_example": options.tokens_per_example,
        "plan": [],
    }

    def keep() -> None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=2) + "\n")

    for row in () if options.no_attention else attention_lines(options):
        result["attention"].append(row)
        keep()
        shown = f"{1e3 * row['seconds']:.3g} ms" if "seconds" in row else row["error"]
        print(f"  attention {row['shape']} {row['layout']} {row['attention']} {row['what']}: {shown}", flush=True)
        if late():
            break
    model, held, lines, compiling = None, None, chosen_lines(options), {}
    for name, length, layout, kind, what in lines:
        if late():
            result["left_out"].append(f"{name} T={length} {layout} {kind} {what}")
            continue
        if held != (name, kind):
            model = None  # the next one needs its place
            model, held = random_model(models[name], options.dtype, kind), (name, kind)
            compiling = compile_all(model, [(T, of, w) for n, T, of, k, w in lines if (n, k) == held], options)
        row = measure(model, name, length, layout, what, options)
        row["compile_seconds"] = compiling[length, layout, what]
        result["rows"].append(row)
        result["plan"] = plan(result["rows"], options.examples, options.tokens_per_example, options.devices)
        keep()
        shown = f"{row['tokens_per_second']:,.0f}/s" if "tokens_per_second" in row else row["error"]
        print(f"  {name} {kind} T={length} {layout} {what}: {shown}", flush=True)
    examples = options.order if options.order is not None else 16 if options.tiny else 256
    if examples and not late():
        model = None
        config = next(iter(models.values()))
        result["float32_against_bfloat16"] = order_kept(
            config, examples, 16 if options.tiny else 512, options.attention[0]
        )
    keep()
    shutil.rmtree(programs, ignore_errors=True)
    print("\n" + markdown(result, options.devices))
    print(f"\nwritten: {options.out}")
    return result


if __name__ == "__main__":
    main(parse())
