"""ladder.csv, .md and .tex, plots and report.html of a verification, from results.json and the kernel matrices."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from ntkjax.commands.verify.comparisons import AGAINST
from ntkjax.commands.verify.kernels import TRACE
from ntkjax.files import read_json
from ntkjax.ntk.kernels import KERNELS
from ntkjax.ntk.metrics import matrix_scores
from ntkjax.pipeline.run_dir import RunDir
from ntkjax.report import kernels as pictures
from ntkjax.report.page import Bullets, Code, Details, Figure, Heading, Page, Section, Table, Text, write_page
from ntkjax.report.tables import to_csv, to_latex, to_markdown

NAMES = {
    "top": "Against the exact trace of the same parameters",
    "step": "The error that each step adds",
    "centred": "Against the centred trace",
    "full": "LoRA kernels against the trace of all parameters",
    "reseed": "Two sketches of the same kernel: the noise ceiling",
}
READING = (
    "**cos_F** is near 1 whenever all gradients share a common component; **CKA** is the same after centring and tells "
    "more. **Spearman of the scores**, **top-N overlap** and **expected flips** are about what would be selected. "
    "Expected flips: how many of the N selected change when this kernel takes the reference's place. By another "
    "domain: how many change in the reference itself when the domain examples are drawn again; an error below that "
    "does not matter. `x ± s` is mean and standard deviation over draws of what is random; `[low, high]` is the 95% "
    "bootstrap interval over examples."
)
NOTES = (
    "`sum_logits` is V times the part of the trace along the all-ones direction of the outputs: trace minus centred "
    "trace is sum_logits / V, exactly. The `centred_trace` here is computed so.",
    "Sketched kernels marked `law` are drawn from the Wishart law that a Gaussian sketch of the kernel matrix has, "
    "those marked `signs` from Rademacher signs applied to the gradients.",
    "Preconditioned scores: those of the loss kernel along P^-1 g_bar, g_bar and P from the sample's domain alone. "
    "With so few examples the Fisher has as few directions with curvature, and a block or a diagonal holds many more.",
    "Intervals resample the examples of one sample and say nothing about other data or models; with few draws their "
    "standard deviation is itself uncertain.",
)


def write_report(run: RunDir, results: Mapping[str, Any], kernels: Mapping[str, np.ndarray]) -> None:
    """Write ladder.csv, .md and .tex, the plots, the tables behind them, and report.html into the run directory."""
    for name in ("ladder", "curves", "noise"):
        run.write_text(f"{name}.csv", to_csv(results[name]))
    plain = [{k: v for k, v in row.items() if "histogram" not in k} for row in results["cross_terms"]]
    run.write_text("cross_terms.csv", to_csv(plain))
    if results["preconditioners"]:
        run.write_text("preconditioners.csv", to_csv(results["preconditioners"]))
    run.write_text("ladder.md", markdown(results))
    run.write_text("ladder.tex", latex(results))
    plots = draw(results, kernels)
    for name, (png, _, _) in plots.items():
        run.write_bytes(f"plots/{name}", png)
    write_page(run.path / "report.html", page(run, results, plots))


# -- tables --


def spread(row: Mapping[str, Any], name: str, *, interval: bool = True, digits: int = 3) -> str:
    """``0.962 ± 0.004 [0.931, 0.978]``; without draws or interval the parts that there are."""
    number = lambda x: f"{x:.{digits}f}"
    value, sd = float(row[name]), float(row.get(f"{name}_sd", math.nan))
    text = number(value) + (f" ± {number(sd)}" if math.isfinite(sd) else "")
    low, high = float(row.get(f"{name}_low", math.nan)), float(row.get(f"{name}_high", math.nan))
    return f"{text} [{number(low)}, {number(high)}]" if interval and math.isfinite(low) else text


def table(results: Mapping[str, Any], against: str, column: str) -> list[dict[str, Any]]:
    """One row for each approximation of ``column`` against ``against``, formatted."""
    rows = []
    for row in results["ladder"]:
        if (row["column"], row["against"]) != (column, against):
            continue
        name = row["approximation"] + (f" ({row['method']})" if row["approximation"].endswith("sketched") else "")
        rows.append(
            {
                "approximation": name,
                **({"against": row["reference"]} if against == "step" else {}),
                "passes": row["passes"],
                "cos_F": spread(row, "cos_f", interval=False),
                "CKA": spread(row, "cka"),
                "Spearman, entries": spread(row, "spearman", interval=False),
                "Spearman, scores": spread(row, "score_spearman"),
                "top-N overlap": spread(row, "top_n_overlap", interval=False),
                "expected flips": f"{row['expected_flips']:.1f} of {row['n']}",
                "by another domain": f"{row['domain_flips']:.1f}",
            }
        )
    return rows


def cross_table(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Cross-output cosines and the cross terms over the trace, one row a column."""
    rows = []
    for row in results["cross_terms"]:
        entry = {"parameters": row["column"]}
        if "signed" in row:
            entry |= {
                "E[cos], same example": spread(row, "signed"),
                "E|cos|, same example": spread(row, "absolute"),
                "E[cos], two examples": spread(row, "signed_between"),
                "E|cos|, two examples": spread(row, "absolute_between"),
                "outputs": f"{row['outputs']:,} of {row['vocab']:,}",
            }
        entry |= {
            "cross terms / trace": spread(row, "ratio", digits=1),
            "two examples": spread(row, "ratio_between", digits=1),
            "share of the trace in the direction softmax does not see": spread(row, "shift_share"),
        }
        rows.append(entry)
    return rows


PRECONDITIONED = "Preconditioned scores against the whole Fisher inverted exactly"


def preconditioner_table(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row for each preconditioner and damping, formatted."""
    return [
        {
            "precondition": row["precondition"],
            "damping": f"{row['damping']:g}",
            "Spearman, scores": spread(row, "score_spearman"),
            "top-N overlap": spread(row, "top_n_overlap", digits=2),
            "relative error": spread(row, "relative_error"),
            "at the best scale": spread(row, "relative_error_scaled"),
            "CG residual": "" if row["residual"] is None else f"{row['residual']:.1e}",
        }
        for row in results["preconditioners"]
    ]


def _tables(results: Mapping[str, Any]) -> Iterator[tuple[str, str, list[dict[str, Any]]]]:
    """(column, against, rows) of every table that has rows, the largest set of parameters first."""
    for column in results["columns"]:
        for against in NAMES:
            rows = table(results, against, column)
            if rows:
                yield column, against, rows


def _sizes(results: Mapping[str, Any]) -> str:
    parts = []
    for name, c in results["columns"].items():
        parts.append(
            f"`{name}`: {c['parameters']:,} parameters, {c['examples']} examples ({c['domain']} domain, "
            f"{c['examples'] - c['domain']} scored, N = {c['top']}), seeds {', '.join(map(str, c['seeds']))}"
        )
    first = next(iter(results["columns"].values()))
    warmed = "after warm-up" if results["warmed_up"] else "without warm-up"
    return f"V = {first['vocab']:,}, D = {first['width']}, {warmed}. " + "; ".join(parts) + "."


def markdown(results: Mapping[str, Any]) -> str:
    """ladder.md: every table as text."""
    parts = ["# How good is each kernel?", _sizes(results), READING]
    for column, against, rows in _tables(results):
        parts += [f"## {_heading(column, against)}", f"Reference: {AGAINST[against]}.", to_markdown(rows)]
    parts += ["## Cross terms", to_markdown(cross_table(results))]
    if results["preconditioners"]:
        parts += [f"## {PRECONDITIONED}", to_markdown(preconditioner_table(results))]
    parts += ["## Notes", *(f"- {note}" for note in NOTES)]
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


def _heading(column: str, against: str) -> str:
    return f"{NAMES[against]} ({'all parameters' if column == 'all' else 'LoRA'})"


def latex(results: Mapping[str, Any]) -> str:
    """ladder.tex: the tables against the top and step by step, and the cross terms, as booktabs floats."""
    parts = [
        to_latex(rows, caption=f"{_heading(column, against)}. {_sizes(results)}", label=f"tab:{column}-{against}")
        for column, against, rows in _tables(results)
        if against in ("top", "step", "centred")
    ]
    parts.append(to_latex(cross_table(results), caption="Cross terms between outputs.", label="tab:cross"))
    if results["preconditioners"]:
        parts.append(to_latex(preconditioner_table(results), caption=f"{PRECONDITIONED}.", label="tab:preconditioners"))
    return "\n".join(parts)


# -- plots --


def draw(results: Mapping[str, Any], kernels: Mapping[str, np.ndarray]) -> dict[str, tuple[bytes, str, str]]:
    """file name -> (PNG, alternative text, caption)."""
    made = {
        "scores-against-trace.png": (
            _rungs(results, "top", "score_spearman", "Spearman of the scores with the exact trace's (1)"),
            "Rank correlation of every approximation's scores with the exact trace's",
            "What each approximation does to the ranking of the examples. Band: 95% interval over examples.",
        ),
        "scores-against-centred.png": (
            _rungs(results, "centred", "score_spearman", "Spearman of the scores with the centred trace's (1)"),
            "Rank correlation of every approximation's scores with the centred trace's",
            "The same against the centred trace, the outputs that can change the loss.",
        ),
        "cka-against-trace.png": (
            _rungs(results, "top", "cka", "CKA with the exact trace (1)"),
            "CKA of every approximation with the exact trace",
            "Agreement of the matrices after centring.",
        ),
        "outputs.png": (
            _by_outputs(results),
            "Agreement against the number of outputs",
            "How many directions are needed: leading spectral directions against random probes, LoRA where there is "
            "LoRA.",
        ),
        "sketch-noise.png": (
            _noise(results),
            "Rank agreement of two sketches against their size",
            "The noise ceiling: two sketches of the same kernel with other signs, by the law of a Gaussian sketch.",
        ),
    }
    made |= _of_matrices(results, kernels)
    crossed = {row["column"]: row for row in results["cross_terms"] if "histogram" in row}
    if crossed:
        labels = {name: "all parameters" if name == "all" else "LoRA" for name in crossed}
        made["cross-output-cosines.png"] = (
            pictures.cosine_histogram(
                {labels[n]: np.asarray(r["histogram"]) for n, r in crossed.items()},
                means={labels[n]: r["signed"] for n, r in crossed.items()},
            ),
            "Distribution of the cosines between the gradients of different outputs",
            "Same example, all pairs of compared outputs; dashed: the mean. The Jacobian-free kernel needs it at 0.",
        )
    return made


def _of_matrices(results: Mapping[str, Any], kernels: Mapping[str, np.ndarray]) -> dict[str, tuple[bytes, str, str]]:
    """Plots of the first draw's matrices of the last column."""
    column = list(results["columns"])[-1]
    domain = results["columns"][column]["domain"]
    shown = [n for n, kind in KERNELS.items() if not kind.sized and f"{column}/{n}" in kernels]
    first = {name: kernels[f"{column}/{name}"][0] for name in shown}
    images = (
        pictures.kernel_images(first, domain=domain),
        "Kernel matrices as images",
        "K_ij / sqrt(K_ii K_jj) of the first draw; the domain's examples come first.",
    )
    scores = {name: matrix_scores(matrix, np.arange(domain)) for name, matrix in first.items()}
    reference = scores.pop("trace")
    pairs = (
        pictures.score_pairs(reference, scores, label="exact trace"),
        "Scores by each kernel against the exact trace's",
        "Scores of the same examples in standard deviations, first draw.",
    )
    return {"kernels.png": images, "scores.png": pairs}


def _rungs(results: Mapping[str, Any], against: str, metric: str, label: str) -> bytes:
    rows = [
        {
            "approximation": row["approximation"],
            "group": "all parameters" if row["column"] == "all" else "LoRA",
            "value": row[metric],
            "low": row[f"{metric}_low"],
            "high": row[f"{metric}_high"],
            "sd": row[f"{metric}_sd"],
        }
        for row in results["ladder"]
        if row["against"] == against and not row["approximation"].endswith("sketched")
    ]
    return pictures.approximations(rows, label=label)


def _by_outputs(results: Mapping[str, Any]) -> bytes:
    column = list(results["columns"])[-1]
    references = {row["family"]: KERNELS[row["family"]].approximates or TRACE for row in results["curves"]}
    chosen = sorted(references.items(), key=lambda pair: list(KERNELS).index(pair[1]))
    curves = {
        f"{family} against {against}": [
            (row["m"], row["score_spearman"], row["score_spearman_sd"])
            for row in results["curves"]
            if (row["column"], row["family"], row["against"]) == (column, family, against)
        ]
        for family, against in chosen
    }
    return pictures.against_size(curves, xlabel="outputs m (passes)", ylabel="Spearman of the scores (1)")


def _noise(results: Mapping[str, Any]) -> bytes:
    column = list(results["columns"])[-1]
    curves: dict[str, list] = {}
    for row in results["noise"]:
        if row["column"] == column:
            curves.setdefault(row["approximation"], []).append(
                (row["sketch_size"], row["ceiling_score_spearman"], None)
            )
    return pictures.against_size(
        curves, xlabel="sketch size K (numbers)", ylabel="Spearman of two sketches' scores (1)"
    )


# -- page --


def page(run: RunDir, results: Mapping[str, Any], plots: Mapping[str, tuple[bytes, str, str]]) -> Page:
    """report.html."""
    figure = lambda name: Figure(*plots[name])
    sections: list[Section] = [
        Heading("What was compared"),
        Text(_sizes(results)),
        Code(f"ntkjax replay {run.path.name}"),
        Details("All settings", (Code((run.path / "config.yaml").read_text(encoding="utf-8")),)),
        Heading("What it does to the selection"),
        Text(READING),
        figure("scores-against-trace.png"),
        figure("scores-against-centred.png"),
        figure("scores.png"),
        Heading("The ladder"),
    ]
    for column, against, rows in _tables(results):
        sections += [Heading(_heading(column, against), 3), Table(rows, caption=f"Reference: {AGAINST[against]}.")]
    sections += [figure("cka-against-trace.png"), figure("kernels.png")]
    sections += [Heading("How many outputs, how large a sketch"), figure("outputs.png"), figure("sketch-noise.png")]
    sections += [Heading("Cross terms"), Table(cross_table(results))]
    if "cross-output-cosines.png" in plots:
        sections.append(figure("cross-output-cosines.png"))
    if results["preconditioners"]:
        sections += [Heading(PRECONDITIONED), Table(preconditioner_table(results))]
    versions = read_json(run.path / "versions.json")
    known = [{"what": k, "version": str(v)} for k, v in versions.items() if v is not None and k != "seeds"]
    sections += [Heading("Made with"), Details("Versions and hardware", (Table(known),)), Heading("Notes")]
    sections.append(Bullets(list(NOTES)))
    lead = "Every approximation of the tangent kernel against the exact one, and what it does to the selection."
    return Page("How good is each kernel?", lead, sections)
