"""Duplicates and leakage before a selection: searched, counted, removed from the pool or only reported."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ntkjax.data import Records, read_records
from ntkjax.data.cache import Shared
from ntkjax.data.dedup import POOL, find_duplicates, report
from ntkjax.errors import ConfigError
from ntkjax.files import read_json
from ntkjax.job import is_primary
from ntkjax.pipeline.load import Loaded
from ntkjax.pipeline.options import DataOptions, DedupOptions
from ntkjax.pipeline.run_dir import RunDir

FILE = "duplicates.json"


@dataclasses.dataclass(frozen=True)
class Deduplicated:
    """A pool, and the result of the search for duplicates in it.

    Attributes:
      pool: without the repeated examples in mode ``remove``; as it was otherwise. What is scored, written to
        scores.parquet and counted in rows is this pool: removed examples are in no table but duplicates.json, and
        the fingerprint that resumable rows depend on is that of what is left.
      report: the content of duplicates.json (see ``ntkjax.data.dedup.report``) with ``mode`` and ``removed``; None
        where the mode is ``off``.
    """

    pool: Loaded
    report: dict[str, Any] | None

    def check_size(self, n: int) -> None:
        """Raise ConfigError where fewer than ``n`` examples are left."""
        if self.report is not None and self.report["removed"] and n > len(self.pool):
            raise ConfigError(
                f"n = {n} is more than the pool holds ({len(self.pool)} examples after {self.report['removed']} "
                "duplicates were removed); ask for fewer, add pool files, or keep them with --dedup.mode report"
            )

    def write(self, run: RunDir) -> None:
        """OUT/duplicates.json, unless the mode is ``off``."""
        if self.report is not None:
            run.write_json(FILE, self.report)


def deduplicate(
    pool: Loaded,
    domain: Records,
    held_out: Mapping[str, Records],
    options: DedupOptions,
    *,
    shared: Shared | None = None,
    progress: bool = True,
) -> Deduplicated:
    """Search pool, domain and held-out sets for repeated examples, and take them out of the pool as the mode says.

    Args:
      held_out: sets that nothing may be trained on, by name (``test``, ``dev``): a pool example with one of their
        prompts is leakage too. What the domain shares with them is listed and left alone: the domain is the user's.
      shared: as in `ntkjax.pipeline.load.load_data`.
    """
    if options.mode == "off":
        return Deduplicated(pool, None)
    others = {**held_out, "domain": domain}
    duplicates = find_duplicates(
        pool.records,
        others,
        held_out=tuple(held_out),
        settings=options.settings,
        cache_dir=shared,
        progress=progress and is_primary(),
    )
    ids = {name: records.ids for name, records in {**others, POOL: pool.records}.items()}
    kept = duplicates.kept if options.mode == "remove" else range(len(pool))
    content = {"mode": options.mode, "removed": len(pool) - len(kept), **report(duplicates, ids, options.settings)}
    return Deduplicated(pool if len(kept) == len(pool) else pool.subset(duplicates.kept), content)


def read_held_out(data: DataOptions, **paths: Sequence[str]) -> dict[str, Records]:
    """The records of ``test=...`` and ``dev=...`` where files are given; responses may be missing there."""
    read = lambda files: read_records(list(files), on_bad_record=data.on_bad_record, allow_missing_response=True)
    return {name: read(files) for name, files in paths.items() if files}


def totals(content: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """duplicates.json without its list of pairs."""
    return None if content is None else {name: value for name, value in content.items() if name != "pairs"}


def summary(content: Mapping[str, Any] | None) -> str:
    """What duplicates.json says, in a line or two."""
    if content is None:
        return "duplicates: not looked for (--dedup.mode off)"
    done = "removed from the pool" if content["mode"] == "remove" else "found in the pool and kept"
    in_pool = {where: kinds for where, kinds in content["counts"].items() if where.startswith(f"{POOL} in ")}
    shown = lambda counts: "; ".join(
        f"{where}: {', '.join(f'{count} {kind}' for kind, count in kinds.items())}" for where, kinds in counts.items()
    )
    lines = [f"duplicates: {content['repeated']} of {content['examples'][POOL]} {done}"]
    if in_pool:
        lines[0] += f" ({shown(in_pool)})"
    alike = {where: kinds for where, kinds in content.get("apart", {}).items() if where.startswith(f"{POOL} in ")}
    if alike:
        lines.append(f"alike and no duplicates, kept: {shown(alike)}")
    leaks = {where: kinds for where, kinds in content["counts"].items() if where in ("domain in test", "domain in dev")}
    if leaks:
        lines.append(f"leakage that is not removed, since these files are yours: {shown(leaks)}")
    return "\n".join(lines)


def read_summary(out: str | Path) -> str:
    """``summary`` of OUT/duplicates.json."""
    file = Path(out) / FILE
    return summary(read_json(file) if file.exists() else None)
