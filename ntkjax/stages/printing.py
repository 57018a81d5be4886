"""What each command prints at the end: a few lines, and where the rest is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ntkjax.evaluation.summary import describe_choices
from ntkjax.report.tables import to_markdown
from ntkjax.stages.adapt_report import choices_line, difference_rows, flat_diagnostics, method_rows
from ntkjax.stages.deduplicating import read_summary, summary
from ntkjax.stages.reading import reading
from ntkjax.stages.selected import FILES


def selection(config: Any, result: Any) -> str:
    """Diagnostics and files of a selection, or the forecast of a dry run."""
    if config.dry_run:
        return to_markdown(result.rows()) + "\n" + result.text()
    rows = [{"diagnostic": name, "value": value} for name, value in flat_diagnostics(result.diagnostics).items()]
    chosen = f"selected {len(result.selected)} examples: {Path(config.out) / FILES[config.selected_format]}"
    return f"{to_markdown(rows)}\n{read_summary(config.out)}\n{_read(config, 'data.json')}\n{chosen}"


def _read(config: Any, name: str, role: str | None = None) -> str:
    """What was read, skipped, cut and not used of each data set (of the only one, ``role``), from a file of the run."""
    file = Path(config.out) / name
    if not file.exists():  # of several processes the first writes it
        return ""
    content = json.loads(file.read_text(encoding="utf-8"))
    data = content.get("data", content)
    return reading(data if role is None else {role: data})


def finetuning(config: Any, result: Any) -> str:
    """Steps, speed and where the weights are."""
    kept = "adapter" if config.model.parameters == "lora" else "merged"
    early = " (stopped early)" if result.stopped_early else ""
    speed = f"{result.tokens_per_second:.0f} tokens/s, {result.clipped_steps} steps clipped"
    said = f"{result.steps} steps{early}, weights of step {result.best_step}, {speed}"
    return f"{_read(config, 'finetune.json')}\n{said}\nweights: {Path(config.out) / kept}"


def evaluation(config: Any, result: Any) -> str:
    """The summary's headline numbers."""
    summary, rows = result.summary, []
    if summary["choices"] is not None:
        for kind in ("raw", "norm"):
            low, high = summary["choices"][f"accuracy_{kind}_interval"]
            value = summary["choices"][f"accuracy_{kind}"]
            rows.append(
                {
                    "measure": f"accuracy, {kind} likelihood",
                    "value": f"{100 * value:.1f}% [{100 * low:.1f}, {100 * high:.1f}]",
                }
            )
        rows.append({"measure": "commonest answer", "value": f"{100 * summary['choices']['majority_accuracy']:.1f}%"})
    if summary["likelihood"] is not None:
        rows.append(
            {"measure": "response NLL, nats per token", "value": f"{summary['likelihood']['nll_per_example']:.4f}"}
        )
    if summary["generation"] is not None and summary["generation"]["accuracy"] is not None:
        rows.append(
            {"measure": "accuracy, generated answers", "value": f"{100 * summary['generation']['accuracy']:.1f}%"}
        )
    unjudged = (summary["generation"] or {"without_gold": 0})["without_gold"]
    judged = f"generated answers: {unjudged} of {summary['n']} examples have no answer to judge them by" * bool(
        unjudged
    )
    asked = describe_choices((summary["choices"] or {"n": 0})["n"], summary["n"])
    found = f"{summary['n']} examples; all outcomes: {Path(config.out) / 'outcomes.jsonl'}"
    read = _read(config, "evaluation.json", "test")
    return "\n".join([to_markdown(rows), *filter(None, [asked, judged]), read, found])


def adaptation(config: Any, result: Any) -> str:
    """The table of methods, differences and the report's path."""
    results = result.results
    differences = [row for row in difference_rows(results) if row["metric"] != "accuracy norm"]
    parts = [to_markdown(method_rows(results)), to_markdown(differences), *filter(None, [choices_line(results)])]
    parts += [summary(results["duplicates"]), reading(results["data"])]
    return "\n".join(parts) + f"\nreport: {Path(config.out) / 'report.html'}"


def demonstration(config: Any, result: Any) -> str:
    """The table of methods and how much of the useful data each found."""
    from ntkjax.stages.demonstrating import precision_table

    n = len(next(iter(result.adaptation.selected.values())))
    found = precision_table(result.precision, result.useful_share, n)
    return (
        f"{to_markdown(method_rows(result.adaptation.results))}\n{found['text']}\n\n{to_markdown(found['rows'])}\n"
        f"{reading(result.adaptation.results['data'])}\n"
        f"report: {Path(config.out) / 'adapt' / 'report.html'}"
    )


def stability(config: Any, result: Any) -> str:
    """The kernels, the linearised model and the accuracies after the last epoch, and the report's path."""
    from ntkjax.stages.stability_report import accuracy_rows, kernel_rows, linear_rows

    tables = [rows(result.results) for rows in (kernel_rows, linear_rows, accuracy_rows)]
    parts = [*map(to_markdown, filter(None, tables)), reading(result.results["data"])]
    return "\n".join(parts) + f"\nreport: {Path(config.out) / 'report.html'}"


def study(config: Any, result: Any) -> str:
    """What is done, failed and left; after a run the main table, the failures and the report's path."""
    from ntkjax.stages.study_tables import choices_lines, failure_table, main_table

    if config.list:
        return to_markdown(result.rows())
    counts, parts = result.results["counts"], [to_markdown(main_table(result.results))]
    if counts["failed"]:
        parts.append("Failed (--retry-failed tries again):\n" + to_markdown(failure_table(result.results)))
    parts += choices_lines(result.results)
    done = f"{counts['done']} runs done, {counts['failed']} failed, {counts['left']} left"
    parts.append(_read(config, "data.json"))
    return "\n".join(parts) + f"\n{done}\nreport: {Path(config.out) / 'report.html'}"


def verification(config: Any, result: Any) -> str:
    """The ladder against the top of each column, the cross terms, and the report's path."""
    from ntkjax.stages.verify_report import cross_table, table

    shown = ("rung", "passes", "CKA", "Spearman, scores", "expected flips")
    parts = []
    for column in result.results["columns"]:
        rows = [row for row in table(result.results, "top", column) if "sketched" not in row["rung"]]
        title = "All parameters" if column == "all" else "LoRA"
        parts.append(f"{title}, against the exact trace\n\n{to_markdown(rows, shown)}")
    parts += [to_markdown(cross_table(result.results)), reading(result.results["data"])]
    return "\n".join(parts) + f"\nreport: {Path(config.out) / 'report.html'}"


def replayed(config: Any, result: Any) -> str:
    """Where the repetition went."""
    return f"replayed {config.run} into {config.out or str(Path(config.run)) + '-replay'}"
