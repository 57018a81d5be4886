"""Question: is the kernel score about the domain, or about what all gradients share?

Command:  python experiments/10_domain_specificity.py                     # the embedded model, three one-skill domains
          python experiments/10_domain_specificity.py --data ../shared/data --model ../shared/models/cot-lm-7m
Hardware: 4 CPU cores, no accelerator.
Runtime:  about 5 minutes embedded; the real model with these settings takes hours on 4 cores (experiments/README.md has
          smaller ones: 8 minutes a seed on two cores); finished scores are kept and not computed again.
Expect:   experiments/README.md, "Is the score about the domain?". A score that is about its domain ranks the pool
          differently for different domains (low rank correlation between domains), does not follow response length
          or the pool's own mean gradient, and, on the embedded task, whose truth is known, finds the domain's skill.

Every score is s_j = <u, g(x_j)> at the same pool rows, for kernel x direction x (fresh or warmed-up LoRA) x
domain x seed.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import script

from ntkjax import load_lm
from ntkjax.assets import tiny_lm_path
from ntkjax.assets.planted import planted_task
from ntkjax.data import TokenisedDataset, read_records, tokenise
from ntkjax.models import LanguageModel
from ntkjax.ntk import KernelFunctions, Pass, build, kernel_scores, squared_norms
from ntkjax.ntk.metrics import spearman, top_n_overlap
from ntkjax.report.tables import format_spread, to_csv, to_markdown
from ntkjax.rng import numpy_rng
from ntkjax.training import TrainConfig, fit

RESULTS = Path(__file__).parent / "results" / "10_domain_specificity"
WITH_NORMS = ("sum_logits", "loss")  # cosine costs m per-example gradients: one output only
STATES = ("fresh", "warmed up")


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Scores of one pool for several domains; without --data the embedded model and its planted task."""

    data: Path | None = None
    """Folder with pool/, finance/, legal/ and medical/."""
    model: str = str(tiny_lm_path())
    out: Path = Path("runs/10_domain_specificity")
    kernels: tuple[str, ...] = ("sum_logits", "loss", "spectral:4", "centred_spectral:4")
    cosine: bool = True
    """Also the cosine direction of the kernels of one output: it needs every pool row's own gradient."""
    seeds: int = 3
    pool_size: int = 500
    pool_sample: int = 200
    """Pool rows whose mean gradient is the reference."""
    domain_size: int = 100
    warmup_epochs: float = 4
    max_length: int = 256
    token_budget: int = 4096


@dataclasses.dataclass(frozen=True)
class Case:
    """Tokenised domains and pool; ``useful[domain]`` marks the pool rows that truly help, where that is known."""

    name: str
    domains: dict[str, TokenisedDataset]
    pool: TokenisedDataset
    useful: dict[str, np.ndarray]
    top: int


def embedded_case(e: Experiment, model: LanguageModel) -> Case:
    """The planted task, each of its three skills a domain of its own."""
    task = planted_task(7, pool_size=e.pool_size, domain_size=3 * e.domain_size, dev_size=3, test_size=3)
    folder = e.out / "embedded" / "data"
    folder.mkdir(parents=True, exist_ok=True)

    def tokens(name: str, rows: list[dict]) -> TokenisedDataset:
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return tokenise(read_records([str(path)]), model.tokenizer, max_length=64)

    domains = {s: tokens(s, [r for r in task.train if r["skill"] == s]) for s in task.useful_skills}
    useful = {s: np.array([row["skill"] == s for row in task.pool]) for s in task.useful_skills}
    return Case("embedded", domains, tokens("pool", task.pool), useful, top=e.pool_size // 10)


def real_case(e: Experiment, model: LanguageModel) -> Case:
    """Finance, legal and medical against the first rows of pool/cot-01, which the model has not seen."""
    assert e.data is not None

    def tokens(path: Path, limit: int) -> TokenisedDataset:
        return tokenise(read_records([str(path)], limit=limit), model.tokenizer, max_length=e.max_length)

    names = ("finance", "legal", "medical")
    domains = {name: tokens(e.data / name / "train.jsonl", e.domain_size) for name in names}
    pool = tokens(e.data / "pool" / "cot-01.jsonl", e.pool_size)
    return Case(Path(e.model).name, domains, pool, {}, top=e.pool_size // 10)


def all_scores(e: Experiment, case: Case, model: LanguageModel) -> Iterator[dict]:
    """One record for each seed, state, domain, kernel and direction: its scores [N] and those of the pool's mean."""
    warmup = TrainConfig(epochs=e.warmup_epochs, learning_rate=2e-3, max_buckets=1)
    for seed, state, (name, domain) in itertools.product(range(e.seeds), STATES, case.domains.items()):
        folder = e.out / case.name / f"seed-{seed}"
        params = model.fresh_lora(seed)
        finished = {k: folder / f"{state}-{name}-{k}.npz".replace(" ", "-").replace(":", "-") for k in e.kernels}
        if state == "warmed up" and not all(path.exists() for path in finished.values()):
            params = fit(model.nll_fn, params, domain, warmup, seed=seed, out_dir=folder / "warmup" / name).params
        for kernel, path in finished.items():
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                np.savez(path, **score(e, case, model, params, domain, kernel, seed))
            for direction, (scores, mean) in directions(dict(np.load(path))).items():
                key = {"seed": seed, "state": state, "domain": name, "kernel": kernel, "direction": direction}
                yield key | {"scores": scores, "pool_mean": mean}


def score(e, case, model, params, domain, name: str, seed: int) -> dict[str, np.ndarray]:
    """scores [N, 2] (domain, pool mean), their Gram matrix, and |g_j|^2 [N] where the kernel has one output."""
    functions = KernelFunctions(model.hidden_fn, model.head_fn({}), model.nll_fn)
    kernel, budget, rows = build(name, functions, params, seed=seed), e.token_budget, len(case.pool)
    drawn = numpy_rng(seed, "experiment 10", "pool sample").choice(rows, size=min(e.pool_sample, rows), replace=False)
    # Few padded lengths: with so few examples the compiler takes longer than the padding.
    batches = lambda data, indices=None: data.batches(token_budget=budget, indices=indices, max_buckets=2)
    result = kernel_scores(
        kernel,
        params,
        batches(domain),
        batches(case.pool),
        rows=Pass(rows, progress=f"{case.name} {name}"),
        references=[batches(case.pool, np.sort(drawn))],
    )
    kept = {"scores": result.scores, "gram": result.gram}
    if e.cosine and name in WITH_NORMS:
        kept["squares"] = squared_norms(kernel, params, batches(case.pool), rows=Pass(rows, progress=True))
    return kept


def directions(kept: dict[str, np.ndarray]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """direction -> (scores, score of the pool's mean gradient), as `select --direction` defines them."""
    raw, mean = kept["scores"].T
    share = kept["gram"][0, 1] / kept["gram"][1, 1]
    scores = {"raw": (raw, mean), "contrast": (raw - share * mean, mean)}
    if "squares" in kept:
        scores["cosine"] = (raw / np.sqrt(kept["squares"]), mean)
    return scores


def summarise(case: Case, records: list[dict]) -> list[dict]:
    """One row for each state, kernel and direction: mean and sd over seeds of the mean over domains."""
    lengths = np.asarray(case.pool.response_lengths)
    groups: dict[tuple, dict[int, list[dict]]] = {}
    for r in records:
        groups.setdefault((r["state"], r["kernel"], r["direction"]), {}).setdefault(r["seed"], []).append(r)
    rows = []
    for (state, kernel, direction), seeds in groups.items():
        row = {"LoRA": state, "kernel": kernel, "direction": direction}
        for pair in itertools.combinations(case.domains, 2):
            both = [[r["scores"] for r in of if r["domain"] in pair] for of in seeds.values()]
            row[" ~ ".join(pair)] = spread([spearman(*scores) for scores in both])
        row["with length"] = over(seeds, lambda r: spearman(r["scores"], lengths))
        row["with pool mean"] = over(seeds, lambda r: spearman(r["scores"], r["pool_mean"]))
        row["negative (%)"] = over(seeds, lambda r: 100 * float(np.mean(r["scores"] < 0)))
        if case.useful:
            row["precision at N (%)"] = over(seeds, lambda r: 100 * precision(case, r))
        rows.append(row)
    return rows


def over(seeds: dict[int, list[dict]], measure: Callable[[dict], float]) -> str:
    """Mean and standard deviation over seeds of the measure's mean over domains."""
    return spread([float(np.mean([measure(r) for r in of])) for of in seeds.values()])


def precision(case: Case, record: dict) -> float:
    """Share of the top N whose skill is the domain's."""
    return float(np.mean(case.useful[record["domain"]][np.argsort(-record["scores"], kind="stable")[: case.top]]))


def spread(values: list[float]) -> str:
    """Mean and standard deviation over seeds."""
    return format_spread(float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None, digits=2)


def between_kernels(case: Case, records: list[dict]) -> list[dict]:
    """Spearman and top-N overlap of the raw scores of two kernels, same seed, state and domain."""
    raw = {(r["seed"], r["state"], r["domain"], r["kernel"]): r["scores"] for r in records if r["direction"] == "raw"}
    places, names = dict.fromkeys(key[:3] for key in raw), list(dict.fromkeys(key[3] for key in raw))
    rows = []
    for (a, b), state in itertools.product(itertools.combinations(names, 2), STATES):
        pairs = [(raw[*setting, a], raw[*setting, b]) for setting in places if setting[1] == state]
        overlap = [top_n_overlap(x, y, case.top) for x, y in pairs]
        rows.append(
            {
                "LoRA": state,
                "kernels": f"{a} ~ {b}",
                "Spearman": spread([spearman(*p) for p in pairs]),
                f"top-{case.top} overlap": spread(overlap),
            }
        )
    return rows


def plot(case: Case, rows: list[dict], path: Path) -> None:
    """Mean rank correlation between domains beside that with length and with the pool's mean, raw and contrast."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = [row for row in rows if row["direction"] != "cosine"]
    number = lambda text: float(str(text).split(" ")[0])
    pairs = [key for key in shown[0] if " ~ " in key]
    columns = {"between domains": pairs, "with length": ["with length"], "with pool mean": ["with pool mean"]}
    figure, axes = plt.subplots(1, 3, figsize=(10, 3.6), sharey=True, layout="constrained")
    labels = [f"{row['kernel']}, {row['direction']}, {row['LoRA']}" for row in shown]
    for axis, (title, keys) in zip(axes, columns.items()):
        values = [np.mean([number(row[key]) for key in keys]) for row in shown]
        colours = ["tab:blue" if row["direction"] == "raw" else "tab:orange" for row in shown]
        axis.barh(range(len(shown)), values, color=colours)
        axis.set(title=title, xlim=(-1, 1), xlabel="Spearman")
        axis.axvline(0, color="black", linewidth=0.6)
    axes[0].set_yticks(range(len(shown)), labels, fontsize=7)
    axes[0].invert_yaxis()
    figure.suptitle(f"{case.name}: what the score's ranking follows", fontsize=10)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def main(e: Experiment) -> None:
    """Score, summarise, and write tables and a plot."""
    model = load_lm(e.model)
    case = embedded_case(e, model) if e.data is None else real_case(e, model)
    records = list(all_scores(e, case, model))
    rows, pairs = summarise(case, records), between_kernels(case, records)
    folder = RESULTS / case.name
    folder.mkdir(parents=True, exist_ok=True)
    chance = [100 * float(np.mean(v)) for v in case.useful.values()]
    note = f"\nPrecision by chance: {np.mean(chance):.1f}%.\n" if chance else ""
    text = to_markdown(rows) + note + "\n" + to_markdown(pairs)
    (folder / "scores.md").write_text(text, encoding="utf-8")
    (folder / "scores.csv").write_text(to_csv(rows), encoding="utf-8")
    (folder / "kernels.csv").write_text(to_csv(pairs), encoding="utf-8")
    plot(case, rows, folder / "scores.png")
    print(text)


if __name__ == "__main__":
    script.start(main, Experiment)
