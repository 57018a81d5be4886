"""Question: what does the coarse stage throw away? Two stages against scoring the whole pool.

Commands: python experiments/07_whole_pool.py                 # the embedded model and its planted task
          python experiments/07_whole_pool.py --data ../shared/data --model ../shared/models/cot-lm-7m
Hardware: 4 CPU cores, no accelerator.
Runtime:  experiments/README.md; every run is kept, and the same command goes on where it was stopped.
Expect:   experiments/README.md, "What stage 1 throws away". The vote knows nothing of gradients; the paper keeps
          M_pre = 4N of the pool to save their cost. Forward-mode scores of the whole pool cost little more than the
          vote, so what it loses can be measured.

For each kernel: the selection after stage 1 at several M_pre / N and over the whole pool; which share of the whole
pool's top N stage 1 let through, where those it dropped stood, and from which sources they were; and, unless
`--select-only`, the accuracy after fine-tuning on each.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import script
import studies

from ntkjax.report.tables import format_spread, to_csv, to_markdown


@dataclasses.dataclass(frozen=True)
class Experiment(studies.Setting):
    """One study, and what its scores say of stage 1."""

    kernels: tuple[str, ...] = ("sum_logits", "loss")
    factors: tuple[int, ...] = (2, 4, 8)
    seeds: int = 3
    select_only: bool = False
    out: Path = Path("runs/07_whole_pool")
    keep: bool = True


def content(e: Experiment) -> dict[str, Any]:
    """The study."""
    methods = [
        {"label": f"{kernel}, {label}", "method": "ntk", "kernel": kernel, **options}
        for kernel in e.kernels
        for label, options in [
            *((f"M_pre = {factor} N", {"prefilter_factor": factor}) for factor in e.factors),
            ("whole pool", {"stage1": "off"}),
        ]
    ]
    methods.append({"label": "stage 1 alone", "method": "embedding"})
    return e.content() | {
        "title": "Two stages against the whole pool",
        "methods": methods,
        "budgets": e.budget,
        "seeds": e.seeds,
        "select_only": e.select_only,
    }


def scores_of(out: Path, arm: str, study: Any) -> dict[tuple[str, int], dict[str, np.ndarray]]:
    """(domain, seed) -> columns of scores.parquet of an arm's selections."""
    columns_of = {}
    for run in study.runs:
        if run.task.arm.label != arm or run.status != "done":
            continue
        folder = json.loads((run.folder / "selection.json").read_text(encoding="utf-8"))["folder"]
        table = pq.read_table(out / folder / "scores.parquet").to_pydict()
        scores = np.asarray([np.nan if s is None else s for s in table["score"]], np.float64)
        columns = {"score": scores, "rank": np.asarray([r or 0 for r in table["rank"]])}
        columns |= {"selected": np.asarray(table["selected"]), "source": np.asarray(table["source"])}
        columns_of[run.task.condition.domain, run.task.seed] = columns
    return columns_of


def thrown_away(e: Experiment, out: Path, study: Any) -> tuple[list[dict], list[dict]]:
    """(recall of stage 1 for each domain, kernel and factor; sources of what it dropped and of what was wanted)."""
    rows, sources = [], []
    for kernel in e.kernels:
        whole = scores_of(out, f"{kernel}, whole pool", study)
        for factor in e.factors:
            staged = scores_of(out, f"{kernel}, M_pre = {factor} N", study)
            for domain in dict.fromkeys(name for name, _ in whole):
                pairs = [(whole[key], staged[key]) for key in whole if key[0] == domain and key in staged]
                rows.append({"domain": domain, "kernel": kernel, "M_pre / N": factor, **_recall(pairs)})
                dropped = Counter(s for w, t in pairs for s in w["source"][w["selected"] & ~np.isfinite(t["score"])])
                wanted = Counter(s for w, _ in pairs for s in w["source"][w["selected"]])
                sources += [
                    {"domain": domain, "kernel": kernel, "M_pre / N": factor, "source": name,
                     "wanted": count / len(pairs), "dropped (%)": 100 * dropped[name] / count}
                    for name, count in wanted.most_common(12)
                ]  # fmt: skip
    return rows, sources


def _recall(pairs: list[tuple[dict[str, np.ndarray], dict[str, np.ndarray]]]) -> dict[str, Any]:
    """Over the seeds: of the whole pool's top N, the share that stage 1 let through, the share that the two-stage
    selection holds, and the mean rank (1: best) of what it dropped."""
    kept, chosen, ranks = [], [], []
    for whole, staged in pairs:
        wanted = whole["selected"]
        through = np.isfinite(staged["score"])
        kept.append(float(through[wanted].mean()))
        chosen.append(float(staged["selected"][wanted].mean()))
        ranks.append(float(whole["rank"][wanted & ~through].mean()) if (wanted & ~through).any() else np.nan)
    spread = lambda values: format_spread(
        float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None, percent=True
    )
    return {
        "let through (%)": spread(kept),
        "in both selections (%)": spread(chosen),
        "by chance (%)": 100 * float(np.mean([np.isfinite(s["score"]).mean() for _, s in pairs])),
        "mean rank of the dropped": float(np.nanmean(ranks)) if np.isfinite(ranks).any() else None,
    }


def main(e: Experiment) -> None:
    """Run the study, then look at its scores."""
    out, results = e.out / e.name, studies.RESULTS / "07_whole_pool" / e.name
    study = studies.run(content(e), out, results if e.keep else None)
    rows, sources = thrown_away(e, out, study)
    text = to_markdown(rows) + "\n" + to_markdown(sources)
    for folder in [out, *([results] if e.keep else [])]:
        (folder / "stage1.md").write_text(text, encoding="utf-8")
        (folder / "stage1.csv").write_text(to_csv(rows), encoding="utf-8")
    print(text)


if __name__ == "__main__":
    script.start(main, Experiment)
