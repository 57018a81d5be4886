"""The page of a study, from one plain dict. Parts that a study does not have are left out.

::

    title, lead        texts
    command, settings  the command line; the study file as text
    asked              [text, ...]: what was compared, how many runs there are
    fairness           [text, ...]
    places             [{heading, text, rows, png, metric, best}, ...]: a table and a plot for each cell
    plots              [{heading, text, png, alt, caption}, ...]
    tables             [{heading, text, rows}, ...]
    selections         [{domain, methods: [{method, diagnostics, chosen_examples, rejected_examples}]}]
    failures           [row, ...]
    versions, caveats
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

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


def study_page(study: Mapping[str, Any]) -> Page:
    """The page; see the top of this file for what ``study`` may hold."""
    parts = (_asked, _failures, _places, _plots, _selections, _tables, _made_with)
    sections = [section for part in parts for section in part(study)]
    return Page(study.get("title", "Study"), study.get("lead", ""), sections, study.get("footer", ""))


def _asked(study: Mapping[str, Any]) -> Iterator[Section]:
    yield Heading("What was asked")
    if study.get("asked"):
        yield Bullets(study["asked"])
    if study.get("command"):
        yield Code(study["command"])
    if study.get("settings"):
        yield Details("The whole study file", (Code(study["settings"]),))
    if study.get("fairness"):
        yield Heading("How the arms are kept comparable", 3)
        yield Bullets(study["fairness"])


def _failures(study: Mapping[str, Any]) -> Iterator[Section]:
    if study.get("failures"):
        yield Heading("What failed")
        text = "These runs ended with an error and are in no mean on this page. `--retry-failed` tries them again."
        yield Text(text, kind="note")
        yield Table(study["failures"])


def _places(study: Mapping[str, Any]) -> Iterator[Section]:
    for number, place in enumerate(study.get("places", ())):
        if number == 0:
            yield Heading("Results")
        yield Heading(place["heading"], 3)
        if place.get("text"):
            yield Text(place["text"])
        yield Table(place["rows"], caption=place.get("caption", ""), best=place.get("best", ()))
        if place.get("png"):
            yield Figure(place["png"], f"{place['metric']} by method", "Bar: mean. Band: 95 % interval. Dots: seeds.")


def _plots(study: Mapping[str, Any]) -> Iterator[Section]:
    heading = None
    for plot in study.get("plots", ()):
        if plot["heading"] != heading:
            heading = plot["heading"]
            yield Heading(heading)
            if plot.get("text"):
                yield Text(plot["text"])
        yield Figure(plot["png"], plot["alt"], plot.get("caption", ""))


def _selections(study: Mapping[str, Any]) -> Iterator[Section]:
    for number, entry in enumerate(study.get("selections", ())):
        if number == 0:
            yield Heading("What each method chose")
            yield Text("Of the first seed: the best chosen, what was just missed, and the lowest scores.")
        yield Heading(entry["domain"], 3)
        for method in entry["methods"]:
            yield Details(method["method"], tuple(_one_selection(method)))


def _one_selection(method: Mapping[str, Any]) -> Iterator[Section]:
    if method.get("diagnostics"):
        yield Table([{"diagnostic": k.replace("_", " "), "value": v} for k, v in method["diagnostics"].items()])
    for key, heading in (("chosen_examples", "Chosen"), ("rejected_examples", "Rejected")):
        if method.get(key):
            yield Heading(heading, 3)
            yield Examples(method[key])


def _tables(study: Mapping[str, Any]) -> Iterator[Section]:
    for table in study.get("tables", ()):
        if not table["rows"]:
            continue
        yield Heading(table["heading"])
        if table.get("text"):
            yield Text(table["text"])
        yield Table(table["rows"])


def _made_with(study: Mapping[str, Any]) -> Iterator[Section]:
    if study.get("versions"):
        yield Heading("Made with")
        rows = [{"what": k, "version": str(v)} for k, v in study["versions"].items() if v is not None and k != "seeds"]
        yield Details("Versions and hardware", (Table(rows),))
    if study.get("caveats"):
        yield Heading("Caveats")
        yield Bullets(study["caveats"])
