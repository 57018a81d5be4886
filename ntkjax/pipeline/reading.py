"""Counts of what reading the data skipped, cut and did not use, in a line or two for each role."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ntkjax.data.schema import CUT_MESSAGES
from ntkjax.files import read_json

SHOWN_COLUMNS = 12
# Counts of tokens.report that say something was lost or changed on the way to tokens; others are plain sizes.
_LOSS = ("truncated", "lost", "apart", "border", "inside", "empty", "dated", "dropped", "refused", "skipped")


def reading(reports: Mapping[str, Any]) -> str:
    """Lines such as ``pool: read 200, skipped 0, cut 3, columns not used: lang, topic``.

    Args:
      reports: role -> ``Loaded.report()`` (or only its ``records``); other values are left out.
    """
    read = [(role, report) for role, report in reports.items() if isinstance(report, Mapping) and "records" in report]
    return "\n".join(line for role, report in read for line in _lines(role, report))


def _lines(role: str, report: Mapping[str, Any]) -> list[str]:
    records, tokens = report["records"], report.get("tokens") or {}
    mapped = report.get("mapped") or []
    skipped = records["skipped"] + tokens.get("skipped", 0) + sum(made["skipped"] for made in mapped)
    cut = tokens.get("cut", 0) + records["ignored_fields"].get(CUT_MESSAGES, 0)
    columns = unused_columns(records["ignored_fields"], tokens.get("template_fields", {}))
    more = [f"and {len(columns) - SHOWN_COLUMNS} more"] if len(columns) > SHOWN_COLUMNS else []
    named = ", ".join([*columns[:SHOWN_COLUMNS], *more]) or "none"
    counts = {
        "ids of two files renamed": records.get("renamed_ids", 0),
        "left out by where": sum(made["left_out"] for made in mapped),
    }
    parts = [f"read {records['records']}", f"skipped {skipped}", f"cut {cut}"]
    parts += [f"{name} {count}" for name, count in counts.items() if count]
    lines = [f"{role}: {', '.join(parts)}, columns not used: {named}"]
    reasons = [*(line for made in mapped for line in made["skipped_lines"]), *records["skipped_lines"]]
    reasons += tokens.get("skipped_lines", [])
    if reasons:
        lines.append(f"  first skipped: {reasons[0]}")
    lost = {name: count for name, count in tokens.items() if _says_loss(name, count)}
    if lost:
        lines.append(f"  tokens: {', '.join(f'{name} {count}' for name, count in lost.items())}")
    return lines


def _says_loss(name: str, count: Any) -> bool:
    return isinstance(count, int) and count != 0 and any(word in name for word in _LOSS)


def unused_columns(ignored: Mapping[str, int], template_fields: Mapping[str, int]) -> list[str]:
    """Names of fields that nothing used: those that reading left, without those that the chat template reads.

    Args:
      ignored: ``ignored_fields`` of the records: column, or ``messages[].field`` -> in how many records.
      template_fields: fields that the template names, ``reasoning_content`` or ``tools`` -> in how many records.
    """
    return [name for name in ignored if name != CUT_MESSAGES and not template_fields.get(name.rpartition("[].")[2], 0)]


def reading_of_run(config: Any, name: str, role: str | None = None) -> str:
    """What was read, skipped, cut and not used of each data set (of the only one, ``role``), from a file of the run."""
    file = Path(config.out) / name
    if not file.exists():  # of several processes the first writes it
        return ""
    content = read_json(file)
    data = content.get("data", content)
    return reading(data if role is None else {role: data})
