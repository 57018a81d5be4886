"""The page of a comparison of methods (``ntkjax adapt``, ``demo``), from one plain dict.

Every part is optional: what a run does not have, its page leaves out. The dict (as in results.json)::

    title, lead        texts
    command            the command line; settings: its config as a nested dict
    metric             name of the headline number and its unit, default "accuracy (%)"
    percent            whether it is given as fractions and shown times 100, default yes
    lower_is_better    default no
    chance             value of guessing
    highlight          methods drawn in the accent colour
    methods            [{method, mean, low, high, seeds: [value, ...], and any further columns}, ...]
    columns            {key: header} of further columns of the headline table
    differences        [{comparison, mean, low, high, p, ...}, ...] paired differences between methods
    extra              [{heading, text, rows, columns}, ...] further tables
    selections         [{method, text, diagnostics: {name: value},
                         scores: [N], lengths: [N], selected: [N] bool,
                         offered: {source: n}, chosen: {source: n}, label (of the score axis),
                         chosen_examples: [{prompt, response, score, ...}], rejected_examples: [...]}, ...]
    training           {arm: [(step, loss), ...]};  dev {arm: [(step, loss), ...]}
    versions           {name: version};  seeds {name: seed} or [seed, ...];  runtime {stage: seconds}
    caveats            [text, ...]
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ntkjax.report import plots
from ntkjax.report.page import (
    Bullets,
    Code,
    Details,
    Examples,
    Figure,
    Heading,
    Page,
    Section,
    Table,
    Text,
)
from ntkjax.report.tables import format_estimate

# How to read the numbers of a selection's diagnostics; others are shown without a reading.
READINGS = {
    "rank_correlation_with_length": "Spearman with response length; near ±1 the score is a measure of length",
    "rank_correlation_with_pool_mean": "Spearman with the score against the pool's own mean gradient; near 1 "
    "the score is not about this domain",
    "mean_response_tokens_offered": "of the whole pool",
    "mean_response_tokens_chosen": "far from the pool's: the score favours short or long responses",
    "negative_share": "share of the pool that would push the domain's outputs the other way",
}


def comparison_page(run: Mapping[str, Any]) -> Page:
    """The page of a comparison; see the top of this file for what ``run`` may hold."""
    parts = (_asked, _results, _selections, _curves, _made_with, _caveats)
    sections = [section for part in parts for section in part(run)]
    return Page(run.get("title", "Comparison"), run.get("lead", ""), sections, run.get("footer", ""))


def headline_rows(run: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of the headline table, ready for ``tables``: method, mean [low, high], each seed, the rest."""
    metric = run.get("metric", "accuracy (%)")
    percent = run.get("percent", True)
    rows = []
    for entry in run.get("methods", ()):
        row = {"method": entry["method"]}
        row[metric] = format_estimate(entry["mean"], entry.get("low"), entry.get("high"), percent=percent)
        seeds = entry.get("seeds") or ()
        if seeds:
            row["each seed"] = ", ".join(format_estimate(value, percent=percent) for value in seeds)
        row |= {header: entry.get(key) for key, header in (run.get("columns") or {}).items()}
        rows.append(row)
    return rows


def _results(run: Mapping[str, Any]) -> Iterator[Section]:
    methods = list(run.get("methods", ()))
    if not methods:
        return
    metric = run.get("metric", "accuracy (%)")
    lower, percent = run.get("lower_is_better", False), run.get("percent", True)
    best = (min if lower else max)(range(len(methods)), key=lambda i: methods[i]["mean"])
    yield Heading("Results")
    caption = run.get("caption", "Mean over seeds with its 95 % interval; the best mean in bold.")
    yield Table(headline_rows(run), caption=caption, best=(best,))
    png = plots.accuracy_by_method(
        methods,
        label=metric,
        percent=percent,
        highlight=run.get("highlight", ()),
        chance=run.get("chance"),
    )
    yield Figure(png, f"{metric} by method", "Bar: mean. Band: 95 % interval. Dots: one per seed.")
    if run.get("differences"):
        yield Heading("Differences", 3)
        yield Table([_difference(entry, percent) for entry in run["differences"]])
    for extra in run.get("extra", ()):
        yield Heading(extra["heading"], 3)
        if extra.get("text"):
            yield Text(extra["text"])
        yield Table(extra["rows"], extra.get("columns"))


def _difference(entry: Mapping[str, Any], percent: bool) -> dict[str, Any]:
    estimate = format_estimate(entry["mean"], entry.get("low"), entry.get("high"), percent=percent)
    rest = {key: value for key, value in entry.items() if key not in ("comparison", "mean", "low", "high")}
    unit = "points" if percent else "difference"
    return {"comparison": entry["comparison"], f"{unit} [95 % interval]": estimate} | rest


def _selections(run: Mapping[str, Any]) -> Iterator[Section]:
    for entry in run.get("selections", ()):
        yield Heading(f"What {entry['method']} chose, and is it about the domain?")
        if entry.get("text"):
            yield Text(entry["text"])
        if entry.get("diagnostics"):
            yield Table([_diagnostic(name, value) for name, value in entry["diagnostics"].items()])
        yield from _selection_plots(entry)
        for key, heading in (("chosen_examples", "Chosen"), ("rejected_examples", "Rejected")):
            if entry.get(key):
                yield Heading(heading, 3)
                yield Examples(entry[key])


def _diagnostic(name: str, value: Any) -> dict[str, Any]:
    return {"diagnostic": name.replace("_", " "), "value": value, "reading": READINGS.get(name)}


def _selection_plots(entry: Mapping[str, Any]) -> Iterator[Section]:
    label = entry.get("label", "score (dimensionless)")
    scores, selected = entry.get("scores"), entry.get("selected")
    if scores is not None and selected is not None:
        png = plots.score_distribution(scores, selected, label=label)
        yield Figure(png, "Histogram of the scores", "Scores of the whole pool, and of what was chosen.")
        if entry.get("lengths") is not None:
            png = plots.score_against_length(scores, entry["lengths"], selected, label=label)
            caption = "A score that follows the length of the response measures length, not relevance."
            yield Figure(png, "Scores against response length", caption)
    if entry.get("offered") and entry.get("chosen"):
        png = plots.sources(entry["offered"], entry["chosen"])
        yield Figure(png, "Sources chosen against offered", "Where the selection differs from the pool.")


def _curves(run: Mapping[str, Any]) -> Iterator[Section]:
    if not run.get("training") and not run.get("dev"):
        return
    yield Heading("Training")
    if run.get("training"):
        yield Figure(plots.training_curves(run["training"]), "Training loss of each arm", "Training loss.")
    if run.get("dev"):
        label = "loss on the dev set (nats per token)"
        png = plots.training_curves(run["dev"], ylabel=label)
        yield Figure(png, "Dev loss of each arm", "Loss on the dev set, which decides when to stop.")


def _asked(run: Mapping[str, Any]) -> Iterator[Section]:
    if not run.get("command") and not run.get("settings"):
        return
    yield Heading("What was asked")
    if run.get("command"):
        yield Code(run["command"])
    if run.get("settings"):
        yield Details("All settings", (Code(_indented(run["settings"])),))


def _indented(tree: Any, depth: int = 0) -> str:
    """A nested dict as indented ``key: value`` lines."""
    lines = []
    for key, value in tree.items():
        start = f"{'  ' * depth}{key}:"
        nested = isinstance(value, Mapping) and value
        lines.append(f"{start}\n{_indented(value, depth + 1)}" if nested else f"{start} {_setting(value)}")
    return "\n".join(lines)


def _setting(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)


def _made_with(run: Mapping[str, Any]) -> Iterator[Section]:
    if not any(run.get(key) for key in ("versions", "seeds", "runtime")):
        return
    yield Heading("Made with")
    if run.get("seeds"):
        yield Text(f"Seeds: {_seeds(run['seeds'])}.")
    if run.get("runtime"):
        rows = [{"stage": stage, "time (s)": seconds} for stage, seconds in run["runtime"].items()]
        yield Table(rows)
    if run.get("versions"):
        known = [(name, value) for name, value in run["versions"].items() if name != "seeds"]
        rows = [{"what": name, "version": str(value)} for name, value in known if value is not None]
        yield Details("Versions and hardware", (Table(rows),))


def _seeds(seeds: Any) -> str:
    if isinstance(seeds, Mapping):
        return "; ".join(f"{name} {_setting(value)}" for name, value in seeds.items())
    return ", ".join(map(str, seeds))


def _caveats(run: Mapping[str, Any]) -> Iterator[Section]:
    if run.get("caveats"):
        yield Heading("Caveats")
        yield Bullets(run["caveats"])
