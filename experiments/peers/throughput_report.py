"""What 08_throughput.py makes of its measurements: ratios, agreement, a table, a plot, entries of bench.json."""

from __future__ import annotations

import dataclasses
import datetime
import json
import platform
import shlex
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ntkjax.report.tables import to_csv, to_markdown

Rates = Mapping[str, Sequence[float]]  # variant -> examples a second, one for each round
GRADIENTS, SCORES, DENSE_OURS = "ntkjax gradients", "ntkjax scores", "ntkjax features-rademacher"
OTHER_FORMS = "bergson per_module"  # not the dense mathematics: compared apart


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished measurement.

    Attributes:
      command: as typed. task: what the workers were told. rounds: finished ones.
      rates: see `Rates`. busy: the same by CPU seconds of all threads.
      facts: variant -> note, versions, rows, peak (bytes). agreement: variant -> `compare_kernels`.
      failed: variant -> why it gives no result. ratios: see `ratios`. dense: the peers at the paper's dense sketch.
    """

    command: Sequence[str]
    task: Mapping[str, Any]
    rounds: int
    rates: Rates
    busy: Rates
    facts: Mapping[str, Mapping[str, Any]]
    agreement: Mapping[str, Mapping[str, float]]
    failed: Mapping[str, str]
    ratios: Mapping[str, Mapping[str, Any]]
    dense: Sequence[str]


def fastest(rates: Rates, names: Sequence[str]) -> str | None:
    """The one of ``names`` with the highest median rate; None if none was measured."""
    present = [name for name in names if name in rates]
    return max(present, key=lambda name: statistics.median(rates[name])) if present else None


def ratio(rates: Rates, mine: str, against: str) -> dict[str, Any]:
    """Rate of ``mine`` over that of ``against`` within each round: median, lowest, highest over the rounds."""
    rounds = min(len(rates[mine]), len(rates[against]))
    quotients = [a / b for a, b in zip(rates[mine][:rounds], rates[against][:rounds], strict=True)]
    return {"median": statistics.median(quotients), "low": min(quotients), "high": max(quotients), "against": against}


def ratios(rates: Rates, *, dense: Sequence[str], gradients: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The named ratios, each against the fastest of its kind; what was not measured is left out.

    ``features_NAME_over_best_peer`` for every sketch of ours but the dense one; the entries that end in
    ``over_per_module`` are against bergson's own default, a two-sided sketch of about as many numbers.
    """
    best, alone, named = fastest(rates, dense), fastest(rates, gradients), {}
    wanted = [
        ("scores_over_best_peer", SCORES, best),
        ("scores_over_peer_gradients", SCORES, alone),
        ("scores_over_per_module", SCORES, OTHER_FORMS),
        ("features_over_best_peer", DENSE_OURS, best),
        ("gradients_over_peer_gradients", GRADIENTS, alone),
    ]
    for name in rates:
        if name.startswith("ntkjax features-") and name != DENSE_OURS:
            sketch = name.removeprefix("ntkjax features-")
            wanted.append((f"features_{sketch}_over_best_peer", name, best))
            wanted.append((f"features_{sketch}_over_per_module", name, OTHER_FORMS))
    for name, mine, against in wanted:
        if against is not None and mine in rates and against in rates:
            named[name] = ratio(rates, mine, against)
    return named


def compare_kernels(evidence: Mapping[str, np.ndarray], ours: Mapping[str, np.ndarray]) -> dict[str, float]:
    """How far a variant's kernel of the same few examples is from ours, exact and sketched.

    ``kernel``: relative Frobenius distance of the exact kernels, of the loss where ``evidence["kind"]`` says so.
    ``sketched``: the same of the variant's sketched kernel to its exact one (ours where it has none); ``expected``: the
    root mean square of that for K independent signs or normals, sqrt(sum_ij (K_ii K_jj + K_ij^2) / K) / |K|.
    ``scores``: of scores to row means.
    """
    wanted = np.asarray(ours["loss" if str(evidence["kind"]) == "loss" else "exact"], np.float64)
    exact = np.asarray(evidence["exact"], np.float64) if "exact" in evidence else wanted
    distance = lambda a, b: float(np.linalg.norm(a - b) / np.linalg.norm(b))
    distances = {"kernel": distance(exact, wanted)} if "exact" in evidence else {}
    if "sketched" in evidence:
        norms = np.diag(exact)
        variance = (norms[:, None] * norms[None] + exact**2).sum() / float(evidence["size"])
        distances["sketched"] = distance(np.asarray(evidence["sketched"], np.float64), exact)
        distances["expected"] = float(np.sqrt(variance) / np.linalg.norm(exact))
    if "scores" in evidence:
        distances["scores"] = distance(np.asarray(evidence["scores"], np.float64), exact.mean(axis=1))
    return distances


def merge_bench(path: Path, entries: Mapping[str, Mapping[str, Any]]) -> None:
    """Put ``entries`` into the file, keeping the entries of others."""
    path.parent.mkdir(parents=True, exist_ok=True)
    before = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(before | {name: dict(entry) for name, entry in entries.items()}, indent=2) + "\n")


def table(run: Run) -> list[dict[str, Any]]:
    """A row for each variant, fastest first: rates relative to the fastest dense peer, and what was seen of memory."""
    best, rows = fastest(run.rates, run.dense), []
    for name in sorted(run.rates, key=lambda name: -statistics.median(run.rates[name])):
        fact, agreed = run.facts[name], run.agreement.get(name, {})
        row: dict[str, Any] = {"variant": name, "note": fact["note"], "rows": fact["rows"]}
        if best is not None:
            over = ratio(run.rates, name, best)
            row |= {"relative": over["median"], "relative_low": over["low"], "relative_high": over["high"]}
            row["relative_cpu"] = ratio(run.busy, name, best)["median"]
        took = run.rates[name]
        row |= {"rate": statistics.median(took), "rate_low": min(took), "rate_high": max(took)}
        row["peak_gib"] = fact["peak"] / 2**30 if "peak" in fact else None
        rows.append(row | {key: agreed.get(key) for key in ("kernel", "sketched", "expected")})
    return rows


def markdown(run: Run) -> str:
    """The whole page."""
    spread = lambda row, key: f"{row[key]:.3g} [{row[key + '_low']:.3g}, {row[key + '_high']:.3g}]"
    rows = table(run)
    shown = [
        {
            "variant": row["variant"], "how": row["note"], "examples a pass": row["rows"],
            "times the fastest dense peer": spread(row, "relative") if "relative" in row else None,
            "by CPU seconds": row.get("relative_cpu"), "examples/s": spread(row, "rate"),
            "peak memory (GiB)": row["peak_gib"],
            "kernel against ours": None if row["kernel"] is None else f"{row['kernel']:.0e}",
            "sketch error (expected)": None
            if row["sketched"] is None
            else f"{row['sketched']:.3f} ({row['expected']:.3f})",
        }
        for row in rows
    ]  # fmt: skip
    named = [
        {"ratio": name, "median": f"{r['median']:.3g}", "lowest": f"{r['low']:.3g}", "highest": f"{r['high']:.3g}",
         "against": r["against"]}
        for name, r in run.ratios.items()
    ]  # fmt: skip
    task = run.task
    parts = [
        f"# Throughput\n\n`{shlex.join(run.command)}`\n\n{datetime.date.today()}, {platform.machine()}, "
        f"{task['threads']} threads, {run.rounds} interleaved rounds, medians with the lowest and highest. "
        f"{Path(task['model']).name}: LoRA r = 16 on all linear layers, {task['parameters']:,} trained parameters; "
        f"{task['length']} tokens an example, {100 * task['padding']:.0f}% of them padding; K = {task['size']:,}.",
        "## Ratios of examples per second\n\n" + to_markdown(named),
        "## Variants\n\n"
        + to_markdown(shown)
        + "\nBy CPU seconds: the same ratio with the processor time of all threads "
        "in the place of wall time; the two differ where a tool leaves cores idle, or others use them.",
    ]
    if run.failed:
        listed = "\n\n".join(f"### {name}\n\n```\n{why}\n```" for name, why in run.failed.items())
        parts.append(f"## Without result\n\n{listed}")
    seen = {f"{k} {v}" for fact in run.facts.values() for k, v in fact["versions"].items()}
    parts.append("## Versions\n\n" + ", ".join(sorted(seen)))
    return "\n\n".join(parts) + "\n"


def plot(run: Run, path: Path) -> None:
    """Examples a second over the fastest dense peer's, on a logarithmic axis; ours in colour."""
    from matplotlib.figure import Figure

    rows = [row for row in table(run) if "relative" in row][::-1]
    figure = Figure(figsize=(7.0, 1.2 + 0.3 * len(rows)), dpi=130, layout="constrained")
    axes = figure.add_subplot()
    for height, row in enumerate(rows):
        colour = "#1F6FB4" if row["variant"].startswith("ntkjax") else "#9AA3AD"
        axes.plot([row["relative_low"], row["relative_high"]], [height, height], color=colour, linewidth=2)
        axes.plot(row["relative"], height, "o", color=colour)
        axes.annotate(f"{row['relative']:.3g}", (row["relative_high"], height), (6, 0), textcoords="offset points",
                      va="center", fontsize=8)  # fmt: skip
    axes.set_xscale("log")
    axes.margins(x=0.15)
    axes.axvline(1, color="#B8BEC6", linewidth=0.8, zorder=0)
    axes.set_yticks(range(len(rows)), [row["variant"] for row in rows], fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel(f"examples per second, times those of {fastest(run.rates, run.dense)}", fontsize=9)
    figure.savefig(path)


def write(folder: Path, run: Run) -> None:
    """results.md, results.csv and, where there is a dense peer to compare with, throughput.png."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.md").write_text(markdown(run))
    (folder / "results.csv").write_text(to_csv(table(run)))
    if fastest(run.rates, run.dense) is not None:
        plot(run, folder / "throughput.png")
