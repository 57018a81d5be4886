"""Question: which of NTK-Selector's choices matter? One at a time, everything else as in the paper.

Commands: python experiments/06_ablations.py                  # the embedded model and its planted task
          python experiments/06_ablations.py --data ../shared/data --model ../shared/models/cot-lm-7m --domains finance
          python experiments/06_ablations.py --groups kernel aggregation --select-only
Hardware: 4 CPU cores, no accelerator.
Runtime:  experiments/README.md; runs are kept by content, so groups share what they have in common.
Expect:   experiments/README.md, "What matters". The paper finds its choices (M_pre = 4N, K = 8192) sufficient;
          experiment 10 measured that the raw score ranks by what all gradients share, so direction and kernel should
          matter most.

Groups: prefilter (M_pre / N), sketch (K), domain-size (|D|), ratio (N / |D|), warm-up, stages (stage 1 alone, chance
after stage 1), normalisation (of gradients; and, from the same scores, of the response's length), aggregation, kernel,
diversity; nearest: what the label-aware kernel of the nearest domain example (studies.NEAREST) owes to each of its
parts.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import script
import studies

from ntkjax.report.tables import to_csv, to_markdown

NTK = {"label": "ntk", "method": "ntk"}


def arms(*changes: tuple[str, dict[str, Any]]) -> list[Any]:
    """The paper's method, and it with one thing changed for each (label, options)."""
    return [NTK, *[{**NTK, **options, "label": label} for label, options in changes]]


@dataclasses.dataclass(frozen=True)
class Experiment(studies.Setting):
    """A study for each group of ablations, all in one run directory."""

    domains: tuple[str, ...] = ("finance",)
    """Of the real data."""
    groups: tuple[str, ...] = (
        *("prefilter", "sketch", "domain-size", "ratio", "warm-up", "stages", "normalisation", "aggregation", "kernel"),
        *("diversity", "nearest"),
    )
    seeds: int = 3
    factors: tuple[int, ...] = (1, 2, 8, 16)
    """M_pre / N, beside the paper's 4."""
    sketch_sizes: tuple[int, ...] = (512, 2048, 8192)
    domain_sizes: tuple[int, ...] = (50, 100, 200, 500, 1000)
    """Those larger than the domain's training data are left out."""
    ratios: tuple[float, ...] = (0.25, 0.5, 1, 2, 4)
    kernels: tuple[str, ...] = ("loss", "spectral:4", "centred_spectral:4", "hutchinson:4")
    select_only: bool = False
    """Compare selections and train nothing."""
    out: Path = Path("runs/06_ablations")
    keep: bool = True


def base(e: Experiment) -> tuple[dict[str, Any], int, int]:
    """(the study without methods, usual |D|, largest |D|)."""
    usual = e.train_size or (96 if e.data is None else 200)
    size = max(usual, *e.domain_sizes) if "domain-size" in e.groups else usual
    if e.data is not None:  # as many as every domain has
        lines = [sum(1 for _ in (e.data / name / "train.jsonl").open(encoding="utf-8")) for name in e.domains]
        usual, size = min(usual, *lines), min(size, *lines)
    return e.content(size) | {"seeds": e.seeds, "select_only": e.select_only, "focus": ["ntk"]}, usual, size


def group_content(group: str, e: Experiment, n: int, domain: int, largest: int) -> dict[str, Any]:
    """What a group adds to the study."""
    usual: dict[str, Any] = {"budgets": n, "domain_sizes": domain}
    sketched = {"scores": "sketch"}
    if group == "prefilter":
        changes = [(f"M_pre = {f} N", {"prefilter_factor": f}) for f in e.factors]
        return usual | {"methods": arms(*changes, ("whole pool", {"stage1": "off"}))}
    if group == "sketch":
        changes = [(f"K = {k}", {"scores": "sketch", "sketch_size": k}) for k in e.sketch_sizes]
        dense = ("K = 8192, Rademacher", {"scores": "sketch", "sketch": "rademacher", "sketch_size": 8192})
        return usual | {"methods": arms(*changes, dense)}
    if group == "domain-size":
        return usual | {"domain_sizes": [s for s in e.domain_sizes if s <= largest], "methods": [NTK]}
    if group == "ratio":
        return usual | {"budgets": sorted({max(1, round(r * domain)) for r in e.ratios}), "methods": [NTK]}
    if group == "warm-up":
        return usual | {"methods": arms(("no warm-up", {"warmup": "none"}), ("loss", {"kernel": "loss"}),
                        ("loss, no warm-up", {"kernel": "loss", "warmup": "none"}))}  # fmt: skip
    if group == "stages":
        only = {"label": "stage 1 alone", "method": "embedding"}
        chance = {"label": "chance after stage 1", "method": "random-from-stage-1"}
        return usual | {"methods": [*arms(("stage 2 alone", {"stage1": "off"})), only, chance]}
    if group == "normalisation":
        return usual | {"methods": arms(*((d, {"direction": d}) for d in ("contrast", "cosine")))}
    if group == "aggregation":
        changes = [(a, {"aggregation": a, **(sketched if a in ("max", "round-robin") else {})})
                   for a in ("clusters", "max", "round-robin")]  # fmt: skip
        return usual | {"methods": arms(*changes)}
    if group == "kernel":
        return usual | {"methods": arms(*((k, {"kernel": k}) for k in e.kernels))}
    if group == "diversity":
        return usual | {"methods": arms(*((d, {"diversity": d}) for d in ("facility-location", "d-optimal")))}
    if group == "nearest":
        full = studies.NEAREST | {"label": "nearest", "warmup": "none"}
        without = {
            "mean instead of maximum": {"aggregation": "mean"},
            "products instead of cosines": {"direction": "raw"},
            "sum_logits instead of loss": {"kernel": "sum_logits"},
            "after a warm-up": {"warmup": "shared"},
            "after stage 1": {"stage1": "on"},
        }
        parts = [{**full, **change, "label": f"nearest, {name}"} for name, change in without.items()]
        return usual | {"methods": [NTK, full, *parts], "focus": ["ntk", *(part["label"] for part in [full, *parts])]}
    raise SystemExit(f"unknown group {group}; expected some of {', '.join(Experiment().groups)}")


def length_normalisation(out: Path, n: int) -> list[dict[str, Any]]:
    """What the top N would share with the chosen rows if the pooled output were a sum over the response and no mean,
    from the same scores: |S_j| s_j instead of s_j (the domain's direction kept)."""
    rows = []
    for path in sorted((out / "selections").glob("*/scores.parquet")):
        asked = json.loads((path.parent / "study.json").read_text(encoding="utf-8"))["key"]
        if asked["method"] != "ntk" or asked["n"] != n or asked["options"]["direction"] == "cosine":
            continue
        table = pq.read_table(path).to_pydict()
        scores = np.asarray([np.nan if s is None else s for s in table["score"]], np.float64)
        lengths = np.asarray(table["response_tokens"])
        summed = np.argsort(-np.where(np.isfinite(scores), scores * lengths, -np.inf), kind="stable")[:n]
        options = asked["options"]
        keys = ("kernel", "direction", "stage1", "prefilter_factor", "scores", "aggregation")
        rows.append(
            {
                **{key: options[key] for key in keys},
                "seed": asked["seed"],
                "shared with the mean over the response (%)": 100
                * float(np.mean(np.asarray(table["selected"])[summed])),
                "tokens chosen, mean": float(lengths[np.asarray(table["selected"])].mean()),
                "tokens chosen, sum": float(lengths[summed].mean()),
            }
        )
    return rows


def main(e: Experiment) -> None:
    """Run the groups one after the other."""
    common, domain, largest = base(e)
    n, name = e.budget, e.name if e.data is None else "-".join([e.name, *e.domains])
    for group in e.groups:
        print(f"== {group}")
        content = common | group_content(group, e, n, domain, largest) | {"title": f"Ablation: {group}"}
        results = studies.RESULTS / "06_ablations" / name / group if e.keep else None
        studies.run(content, e.out / name, results)
        print((e.out / name / "tables" / "selections.md").read_text(encoding="utf-8"))
        if group == "normalisation":
            rows = length_normalisation(e.out / name, n)
            print(to_markdown(rows))
            for folder in filter(None, (e.out / name / "tables", results and results / "tables")):
                (folder / "length-normalisation.md").write_text(to_markdown(rows), encoding="utf-8")
                (folder / "length-normalisation.csv").write_text(to_csv(rows), encoding="utf-8")


if __name__ == "__main__":
    script.start(main, Experiment)
