"""Question: do the gradients of different outputs cancel, as the Jacobian-free kernel needs?

Command:  python experiments/02_cross_output_terms.py
          python experiments/02_cross_output_terms.py --model ../shared/models/cot-lm-7m --data ../shared/data
          python experiments/02_cross_output_terms.py --model real --data ../shared/data --examples 4 --seeds 1 \\
              --memory-gib 24                                                       # a GPU; `make real-model` first
Hardware: 4 CPU cores, no accelerator; one GPU for the model named real, whose gradients of D = 576 hidden units take 11
          GB an example at rank 16, and two are held (--lora-rank 2 for less).
Runtime:  the synthetic heads and the embedded model 8 minutes on two busy cores; the real one (V = 4,096, D = 256, 7 M
          parameters) 6 minutes on 4 cores with --examples 2, longer with more.
Expect:   experiments/README.md, "Cross-output terms".

The Jacobian-free kernel sum_logits is the trace plus sum over k != l of <grad f_k, grad f_l'>. The paper (Fig. 2b)
argues that these terms vanish; with V (V - 1) of them against V, that takes a mean cosine, with its sign, within about
1 / V of 0: a small mean of |cos| is not enough.

1. Synthetic heads, V and D swept. The hidden state is linear in its parameters, so that grad f_k = w_k times one vector
   and cosines are those of the rows w_k. Isotropic rows: E[cos] = 0, E|cos| = Gamma(D/2) / (sqrt(pi) Gamma((D+1)/2)),
   cross terms over trace 0 on average with a standard deviation near sqrt(2 / D) whatever V. Rows that share a
   direction with a share rho of their squared length: E[cos] near rho, cross terms over trace (V - 1) rho.
2. The same heads on a random MLP: what becomes of the ranking.
3. Language models: all pairs of outputs, LoRA fresh and warmed up, all parameters; the tokens that occur in the data
   apart from those that do not.
"""

from __future__ import annotations

import csv
import dataclasses
import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special
import script

import ntkjax
from ntkjax.assets import DEMO, tiny_lm_path, write_planted_task
from ntkjax.data import TokenisedDataset, concat
from ntkjax.models import LanguageModel
from ntkjax.ntk import KernelFunctions, build, kernel_matrix
from ntkjax.ntk.agreement import agreement
from ntkjax.ntk.cross_terms import CrossTerms, Products, cross_output_cosines, cross_terms, hidden_products
from ntkjax.report.kernels import against_size, cosine_histogram
from ntkjax.report.tables import to_markdown
from ntkjax.rng import numpy_rng
from ntkjax.training import TrainConfig, fit

RESULTS = Path(__file__).parent / "results" / "02_cross_output_terms"
NOT_LORA = r"^(?!.*lora_[ab]$)"


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Measure cross-output cosines and keep tables and plots under experiments/results."""

    model: str | None = None
    """A checkpoint; the embedded model and the synthetic heads by default."""
    data: Path | None = None
    """Folder with finance/ and pool/, for a checkpoint."""
    examples: int = 16
    seeds: int = 3
    outputs: int = 4096
    """Most outputs of a group that are compared, all pairs of them: a uniform sample where the group has more."""
    lora_rank: int = 16
    max_length: int = 256
    """Of a checkpoint's data, in tokens."""
    domain_size: int | None = None
    """Most domain examples, for a checkpoint: the warm-up and the choice of examples see the first ones alone."""
    learning_rate: float = 2e-3
    """Of a checkpoint's warm-up."""
    all_parameters: bool = True
    """Compare outputs by the gradients of all parameters too."""
    memory_gib: float = 1.0
    """Gradients of all parameters held: they bound how many outputs are compared."""


# -- 1 and 2: synthetic heads --


def head(vocab: int, width: int, rho: float, rng: np.random.Generator) -> np.ndarray:
    """Rows sqrt(rho) u + sqrt(1 - rho) e, u one unit vector, e ~ N(0, I / D): mean squared length 1."""
    shared = rng.normal(size=width)
    rows = rng.normal(size=(vocab, width)) / math.sqrt(width)
    return (math.sqrt(rho) * shared / np.linalg.norm(shared) + math.sqrt(1 - rho) * rows).astype(np.float32)


def expected(vocab: int, width: int, rho: float) -> dict[str, float]:
    """Closed forms. With w = c u + rest, c = cos(w, u): E[cos] = E[c]^2, since the rest is isotropic around u, and
    E[cos^2] = E[c^2]^2 + E[1 - c^2]^2 / (D - 1); E|cos| is that of a folded normal (exact for rho = 0)."""
    nodes, mass = np.polynomial.hermite_e.hermegauss(64)
    along = math.sqrt(rho) + math.sqrt(1 - rho) * nodes / math.sqrt(width)
    grid = (np.arange(400) + 0.5) / 400
    across = (1 - rho) * scipy.special.gammaincinv((width - 1) / 2, grid) * 2 / width  # chi^2 of D - 1 degrees
    cosine = along[:, None] / np.sqrt(along[:, None] ** 2 + across[None])
    mean = lambda x: float(np.average(x.mean(axis=1), weights=mass))
    signed = mean(cosine) ** 2
    second = mean(cosine**2) ** 2 + mean(1 - cosine**2) ** 2 / (width - 1)
    sd = math.sqrt(max(second - signed**2, 0))
    folded = sd * math.sqrt(2 / math.pi) * math.exp(-(signed**2) / (2 * sd**2)) + signed * math.erf(
        signed / (sd * math.sqrt(2))
    )
    isotropic = math.exp(math.lgamma(width / 2) - math.lgamma((width + 1) / 2)) / math.sqrt(math.pi)
    if rho == 0:
        return {"signed": 0.0, "absolute": isotropic, "ratio": 0.0}
    return {"signed": signed, "absolute": folded, "ratio": (vocab - 1) * rho}


def linear_hidden(params: dict, batch: Any) -> jax.Array:
    """h(x) = Theta x: the gradient of a row's output is that row of the head times x."""
    return batch.tokens @ params["theta"].T


def points(count: int, features: int, rng: np.random.Generator) -> Any:
    """A batch whose "tokens" are real vectors."""
    lengths = np.full(count, features, np.int32)
    values = rng.normal(size=(count, features)).astype(np.float32)
    return ntkjax.types.Batch(values, np.ones((count, features), bool), lengths, np.arange(count, dtype=np.int32))


def synthetic_cosines(seeds: int) -> Iterator[dict[str, Any]]:
    """Closed form beside what `cross_output_cosines` measures, over heads of several seeds."""
    for rho, vocab, width in itertools.product((0.0, 0.1, 0.4), (64, 256, 1024, 4096), (16, 64, 256)):
        measured: list[CrossTerms] = []
        for seed in range(seeds):
            rng = numpy_rng(seed, "experiment 2", vocab, width, str(rho))
            functions = KernelFunctions(jax.tree_util.Partial(linear_hidden), head(vocab, width, rho, rng))
            params = {"theta": jnp.asarray(rng.normal(size=(width, 4)), jnp.float32)}
            measured.append(cross_output_cosines(functions, params, [points(2, 4, rng)]))
        row: dict[str, Any] = {"rho": rho, "V": vocab, "D": width, "heads": seeds}
        for name, value in expected(vocab, width, rho).items():
            each = [f.cross.sum() / f.own.sum() if name == "ratio" else getattr(f, name).mean() for f in measured]
            row |= {f"{name}_expected": value, name: np.mean(each), f"{name}_sd": np.std(each, ddof=1)}
        yield row


def mlp_hidden(second: jax.Array, params: dict, batch: Any) -> jax.Array:
    """D hidden units made of a few tanh units whose weights are trained: gradients of hidden units are no multiples of
    each other, and what a pair of examples has in common depends on the direction that is asked for."""
    return jnp.tanh(batch.tokens @ params["first"]) @ second


def synthetic_ranks(seeds: int) -> Iterator[dict[str, Any]]:
    """How well each kernel of a random MLP ranks, by head."""
    vocab, width, units = 1024, 64, 8
    for rho in (0.0, 0.02, 0.1, 0.4):
        draws: dict[str, list[np.ndarray]] = {}
        for seed in range(seeds):
            rng = numpy_rng(seed, "experiment 2 ranks", str(rho))
            shape = lambda a, b, rng=rng: jnp.asarray(rng.normal(size=(a, b)) / math.sqrt(a), jnp.float32)
            hidden = jax.tree_util.Partial(mlp_hidden, shape(units, width))
            functions = KernelFunctions(hidden, head(vocab, width, rho, rng))
            params, batch = {"first": 3 * shape(12, units)}, points(64, 12, rng)
            for name in ("trace", "centred_trace", "sum_logits", "hutchinson:1", "spectral:1"):
                kernel = build(name, functions, params, seed=seed)
                draws.setdefault(name, []).append(kernel_matrix(kernel, params, batch))
        matrices = {name: np.stack(each) for name, each in draws.items()}
        for name, against in itertools.product(
            ("sum_logits", "hutchinson:1", "spectral:1"), ("trace", "centred_trace")
        ):
            metrics = agreement(matrices[name], matrices[against], domain_rows=np.arange(16), n=12)
            kept = ("cka", "spearman", "score_spearman", "top_n_overlap", "expected_flips")
            row = {k: v for k, v in metrics.items() if any(k.startswith(start) for start in kept)}
            yield {"rho": rho, "V": vocab, "D": width, "kernel": name, "against": against, "heads": seeds, **row}


# -- 3: language models --


@dataclasses.dataclass(frozen=True)
class Task:
    """A model, examples to look at, text to warm up on, and which tokens occur in the data."""

    name: str
    model: LanguageModel
    examples: TokenisedDataset
    domain: TokenisedDataset
    seen: np.ndarray
    warmup: TrainConfig


def load(experiment: Experiment) -> Task:
    """The embedded model on its task, or a checkpoint on finance and the pool; half of the examples from each."""
    script.both_or_neither(experiment.data, experiment.model)
    if experiment.data is None or experiment.model is None:
        paths = write_planted_task(Path("runs/02_cross_output_terms/data"), 7)
        name, path, files, longest = "embedded", str(tiny_lm_path()), (paths["train"], paths["pool"]), DEMO.max_length
        warmup = TrainConfig(epochs=DEMO.warmup_epochs, learning_rate=DEMO.learning_rate, max_buckets=1)
    else:
        name, path, longest = Path(experiment.model).name, experiment.model, experiment.max_length
        files = (experiment.data / "finance" / "train.jsonl", experiment.data / "pool" / "cot-01.jsonl")
        warmup = TrainConfig(epochs=1, learning_rate=experiment.learning_rate, max_buckets=3)
    # alpha / rank is 2 at every rank, as the paper's 32 / 16
    lora = ntkjax.LoraConfig(rank=experiment.lora_rank, alpha=2.0 * experiment.lora_rank)
    model = ntkjax.load_lm(path, lora=lora)
    domain, pool = (
        ntkjax.tokenise(ntkjax.read_records([str(file)]), model.tokenizer, max_length=longest) for file in files
    )
    if experiment.model is not None and experiment.domain_size is not None:
        domain = domain.subset(np.arange(min(experiment.domain_size, len(domain))))
    rng, half = numpy_rng(0, "experiment 2 examples"), experiment.examples // 2
    pick = lambda tokens: tokens.subset(rng.choice(len(tokens), half, replace=False))
    counts = np.zeros(model.config.vocab_size, np.int64)
    for tokens in (domain, pool):
        for i in range(len(tokens)):
            np.add.at(counts, tokens.tokens(i)[0], 1)
    return Task(name, model, concat(pick(domain), pick(pool)), domain, counts > 0, warmup)


def batches(tokens: TokenisedDataset) -> Any:
    """Two lengths, so that the short examples of the domain are not padded to those of the pool."""
    longest = int(tokens.lengths.max())
    return tokens.batches(token_budget=max(longest, len(tokens) * longest // 2), max_buckets=2)


def lora_terms(task: Task, params: Any, outputs: int) -> dict[str, CrossTerms]:
    """Pairs of outputs, and of those among parts of the vocabulary, from the same D passes: cosines of all pairs of a
    group of at most ``outputs``, else of those of a uniform sample of it; cross terms and trace of the whole group."""
    weight = np.asarray(task.model.head_fn({}))
    products = list(
        hidden_products(task.model.hidden_fn, params, batches(task.examples), width=weight.shape[1], progress="LoRA")
    )
    groups = {
        "all outputs": weight,
        "tokens in the data": weight[task.seen],
        "tokens not in the data": weight[~task.seen],
        "all outputs, centred": weight - weight.mean(axis=0),
    }
    rng = numpy_rng(0, "experiment 2 outputs")
    sample = lambda rows: rows if len(rows) <= outputs else rows[rng.choice(len(rows), outputs, replace=False)]
    return {name: whole_sums(cross_terms(products, sample(w), vocab=len(w)), products, w) for name, w in groups.items()
            if len(w) > 1}  # fmt: skip


def whole_sums(terms: CrossTerms, products: list[Products], weight: np.ndarray) -> CrossTerms:
    """``terms`` with the sums over all outputs W, which need no sample: sum_kl (W A W^T)_kl = (W^T 1)^T A (W^T 1), and
    the trace <W^T W, A>."""
    rows = weight.astype(np.float64)
    total, gram = rows.sum(axis=0), rows.T @ rows
    own = lambda a: float(np.sum(gram * a))
    cross = lambda a: float(total @ a @ total) - own(a)
    within, between = [a for a, _ in products], [b for _, b in products if b is not None]
    sums = {"own": own, "cross": cross}
    values = {f"{name}{suffix}": np.asarray([of(a) for a in part]) for name, of in sums.items()
              for suffix, part in (("", within), ("_between", between))}  # fmt: skip
    return dataclasses.replace(terms, **values)


def model_rows(task: Task, experiment: Experiment) -> Iterator[tuple[str, str, list[CrossTerms]]]:
    """(parameters, group of outputs, one `CrossTerms` for each seed)."""
    model, seeds = task.model, experiment.seeds
    terms = lambda params: lora_terms(task, params, experiment.outputs)
    fresh = [terms(model.fresh_lora(seed)) for seed in range(seeds)]
    for group in fresh[0]:
        yield "LoRA, fresh", group, [f[group] for f in fresh]
    warm = []
    for seed in range(seeds):
        trained = fit(model.nll_fn, model.fresh_lora(seed), task.domain, task.warmup, seed=seed).params
        warm.append(terms(trained))
    for group in warm[0]:
        yield "LoRA, warmed up", group, [w[group] for w in warm]
    if not experiment.all_parameters:
        return
    functions = KernelFunctions(model.hidden_fn, model.head_fn)
    full = [
        cross_output_cosines(functions, model.select_params(NOT_LORA), batches(task.examples), seed=seed,
                             outputs=experiment.outputs, memory_budget=int(experiment.memory_gib * (1 << 30)),
                             progress="all parameters")
        for seed in range(seeds)
    ]  # fmt: skip
    yield "all parameters", "all outputs" if full[0].outputs == full[0].vocab else "a sample of outputs", full


def combined(seeds: list[CrossTerms]) -> dict[str, Any]:
    """Means over seeds and examples with intervals over examples, and standard deviations over seeds."""
    fields = [f.name for f in dataclasses.fields(CrossTerms) if f.name not in ("outputs", "vocab", "undefined")]
    mean = {name: np.mean([getattr(s, name) for s in seeds], axis=0) for name in fields if "histogram" not in name}
    counts = {name: np.sum([getattr(s, name) for s in seeds], axis=0) for name in fields if "histogram" in name}
    row: dict[str, Any] = dataclasses.replace(seeds[0], **mean, **counts).summary()
    for name in ("signed", "absolute", "signed_between", "absolute_between", "ratio", "ratio_between"):
        row[f"{name}_sd"] = float(np.std([s.summary()[name] for s in seeds], ddof=1)) if len(seeds) > 1 else math.nan
    return row | {"examples": len(seeds[0].signed), "seeds": len(seeds), "histogram": counts["histogram"]}


# -- what is kept --


def write(folder: Path, name: str, rows: list[dict[str, Any]]) -> None:
    """rows as CSV."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{name}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


def synthetic(seeds: int) -> None:
    """Parts 1 and 2."""
    rows = list(synthetic_cosines(seeds))
    write(RESULTS / "synthetic", "cosines", rows)
    curves = {
        f"{label} {which}": [(r["D"], r[f"{label}{end}"], r.get(f"{label}_sd") if not end else None) for r in rows
                             if r["rho"] == 0 and r["V"] == 1024]
        for label in ("signed", "absolute") for which, end in (("measured", ""), ("expected", "_expected"))
    }  # fmt: skip
    (RESULTS / "synthetic" / "isotropic.png").write_bytes(
        against_size(curves, xlabel="width D (hidden units)", ylabel="mean cosine of two outputs (1)")
    )
    ranks = list(synthetic_ranks(5))
    write(RESULTS / "synthetic", "ranks", ranks)
    print(
        to_markdown(rows),
        to_markdown(ranks, ["rho", "kernel", "against", "cka", "score_spearman", "score_spearman_sd"]),
    )


def language_model(experiment: Experiment) -> None:
    """Part 3."""
    task = load(experiment)
    rows, histograms, means = [], {}, {}
    for parameters, group, seeds in model_rows(task, experiment):
        row = {"parameters": parameters, "outputs_compared": group, **combined(seeds)}
        rows.append(row)
        if group != "all outputs, centred" and parameters != "LoRA, fresh":
            label = f"{parameters}: {group}"
            histograms[label], means[label] = row["histogram"], row["signed"]
    folder = RESULTS / task.name
    write(folder, "cosines", [{k: v for k, v in row.items() if k != "histogram"} for row in rows])
    (folder / "cosines.png").write_bytes(cosine_histogram(histograms, means=means))
    shown = ["parameters", "outputs_compared", "signed", "signed_sd", "absolute", "signed_between", "ratio", "outputs"]
    print(f"tokens in the data: {int(task.seen.sum())} of {len(task.seen)}\n{to_markdown(rows, shown)}")


def main(experiment: Experiment) -> None:
    """The synthetic heads with the embedded model, or a checkpoint."""
    if experiment.model is None:
        synthetic(experiment.seeds)
    language_model(experiment)


if __name__ == "__main__":
    script.start(main, Experiment)
