"""The sections that several reports have, each from what it shows: what was asked, what was
chosen, training, versions, caveats."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from ntkjax.report import plots
from ntkjax.report.page import Bullets, Code, Details, Examples, Figure, Heading, Section, Table, Text
from ntkjax.report.tables import Rows

READINGS = {
    "rank_correlation_with_length": "Spearman with response length; near ±1 the score is a measure of length",
    "rank_correlation_with_pool_mean": "Spearman with the score against the pool's own mean gradient; near 1 "
    "the score is not about this domain",
    "mean_response_tokens_offered": "of the whole pool",
    "mean_response_tokens_chosen": "far from the pool's: the score favours short or long responses",
    "cg_residual": "|(H + lambda I) x - u| / |u| of the worst direction u: how exactly conjugate gradients solved",
    "negative_share": "share of the pool that would push the domain's outputs the other way",
}
"""How to read the numbers of a selection's diagnostics; others are shown without a reading."""


def flat_diagnostics(diagnostics: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of a selection's diagnostics, without its lists and tables."""
    return {name: value for name, value in diagnostics.items() if isinstance(value, int | float | str | bool)}


def asked(command: str, settings: str, *, points: Sequence[str] = ()) -> list[Section]:
    """What was asked: in sentences, as the command line that repeats it, and with all settings.

    Args:
      settings: the file of the settings, as text.
      points: what was compared, in sentences.
    """
    sentences = [Bullets(points)] if points else []
    return [Heading("What was asked"), *sentences, Code(command), Details("All settings", (Code(settings),))]


def failed(rows: Rows, again: str) -> list[Section]:
    """The runs that failed, and how they are tried again; nothing where none did."""
    if not rows:
        return []
    text = f"These runs ended with an error and are in no mean on this page. {again}"
    return [Heading("What failed"), Text(text, kind="note"), Table(rows)]


def named_table(heading: str, rows: Rows, *, text: str = "", level: int = 2) -> list[Section]:
    """A table below its heading; nothing where it has no rows."""
    if not rows:
        return []
    return [Heading(heading, level), *([Text(text)] if text else []), Table(rows)]


def methods_figure(
    entries: Mapping[str, Mapping[str, Any]],
    label: str,
    *,
    percent: bool,
    highlight: Sequence[str],
    chance: float | None,
) -> Figure:
    """Means of one metric by method.

    Args:
      entries: method -> its ``mean``, ``low``, ``high`` and ``per_seed``.
      label, percent, highlight, chance: as for `ntkjax.report.plots.accuracy_by_method`.
    """
    rows = [
        {"method": name, **{key: entry[key] for key in ("mean", "low", "high")},
         "seeds": entry["per_seed"] if len(entry["per_seed"]) > 1 else []}
        for name, entry in entries.items()
    ]  # fmt: skip
    png = plots.accuracy_by_method(rows, label=label, percent=percent, highlight=highlight, chance=chance)
    return Figure(png, f"{label} by method", "Bar: mean. Band: 95 % interval. Dots: one per seed.")


@dataclasses.dataclass(frozen=True)
class Choice:
    """A selection as a report shows it: the content of its selection.json.

    Attributes:
      diagnostics: numbers by name (see ``flat_diagnostics``).
      examples: ``chosen``, ``just_missed`` and ``lowest``: the best chosen, those below the cut, the lowest scores.
    """

    diagnostics: Mapping[str, Any]
    examples: Mapping[str, Sequence[Mapping[str, Any]]]

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> Choice:
        """From the content of selection.json."""
        return cls(flat_diagnostics(content["diagnostics"]), content.get("examples", {}))

    def rows(self) -> list[dict[str, Any]]:
        """The diagnostics, one a row."""
        return [{"diagnostic": name, "value": value} for name, value in self.diagnostics.items()]

    def sections(self, figures: Sequence[Figure] = ()) -> list[Section]:
        """Diagnostics with their readings, the figures, and examples chosen and rejected."""
        rows = [row | {"diagnostic": name.replace("_", " "), "reading": READINGS.get(name)}
                for name, row in zip(self.diagnostics, self.rows())]  # fmt: skip
        made: list[Section] = [*([Table(rows)] if rows else []), *figures]
        rejected = [*self.examples.get("just_missed", ()), *self.examples.get("lowest", ())]
        for heading, shown in (("Chosen", self.examples.get("chosen", ())), ("Rejected", rejected)):
            if shown:
                made += [Heading(heading, 3), Examples(shown)]
        return made


@dataclasses.dataclass(frozen=True)
class Scored:
    """What a selection scored, and what of it was chosen, by pool row and by source.

    Attributes:
      scores, lengths: of the rows that were scored; lengths in response tokens. selected: bool, of the same rows.
      offered, chosen: source -> examples of the pool, and of the selection.
    """

    scores: Any
    lengths: Any
    selected: Any
    offered: Mapping[str, int]
    chosen: Mapping[str, int]

    def figures(self) -> dict[str, Figure]:
        """The figures, by the names of their files."""
        return {
            "scores": Figure(
                plots.score_distribution(self.scores, self.selected),
                "Histogram of the scores",
                "Scores of the whole pool, and of what was chosen.",
            ),
            "score-against-length": Figure(
                plots.score_against_length(self.scores, self.lengths, self.selected),
                "Scores against response length",
                "A score that follows the length of the response measures length, not relevance.",
            ),
            "sources": Figure(
                plots.sources(self.offered, self.chosen),
                "Sources chosen against offered",
                "Where the selection differs from the pool.",
            ),
        }


def made_with(
    versions: Mapping[str, Any], *, seeds: Sequence[int] = (), seconds: Mapping[str, float] | None = None
) -> list[Section]:
    """Seeds, seconds by stage, and versions and hardware; ``versions``: the content of versions.json."""
    rows = [{"what": k, "version": str(v)} for k, v in versions.items() if v is not None and k != "seeds"]
    return [
        Heading("Made with"),
        *([Text(f"Seeds: {', '.join(map(str, seeds))}.")] if seeds else []),
        *([Table([{"stage": stage, "time (s)": value} for stage, value in seconds.items()])] if seconds else []),
        Details("Versions and hardware", (Table(rows),)),
    ]


def caveats(texts: Sequence[str]) -> list[Section]:
    """What the numbers cannot tell."""
    return [Heading("Caveats"), Bullets(texts)] if texts else []
