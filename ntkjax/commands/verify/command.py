"""``ntkjax verify``: the error of each approximation of the tangent kernel, and its effect on the selection.

One sample of examples, part of it the domain, and on it every kernel of `ntkjax.ntk.kernels.KERNELS`, with all
parameters and with LoRA, and each of them sketched. Every kernel is compared with the exact trace of the same
parameters, with the kernel that it approximates, which isolates the error of that one step, and with the centred trace,
the part that can change the loss. Preconditioners are compared with the whole Fisher inverted exactly.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ntkjax.commands.base import Command
from ntkjax.commands.verify.comparisons import compare
from ntkjax.commands.verify.config import VerifyConfig
from ntkjax.commands.verify.kernels import KernelSuite
from ntkjax.commands.verify.report import PRECONDITIONED, cross_table, preconditioner_table, table, write_report
from ntkjax.commands.verify.sample import check_sizes, draw_sample
from ntkjax.files import write_npz
from ntkjax.job import is_primary
from ntkjax.pipeline.inputs import inputs_of
from ntkjax.pipeline.load import load_model
from ntkjax.pipeline.reading import reading
from ntkjax.pipeline.run_dir import RunDir
from ntkjax.report.tables import to_markdown
from ntkjax.training.trackers import check_tracker


@dataclasses.dataclass(frozen=True)
class Verification:
    """What `verify` found; ``results`` is the content of results.json.

    Attributes:
      results: ``ladder`` (one row for each kernel and reference), ``cross_terms``, ``preconditioners``, ``curves``,
        ``noise``, sizes, times.
      kernels: ``COLUMN/KERNEL`` -> matrices [draws, n, n], as in kernels.npz.
    """

    results: dict[str, Any]
    kernels: Mapping[str, np.ndarray]

    def row(self, column: str, approximation: str, against: str) -> dict[str, Any]:
        """The row of the ladder for ``approximation`` of ``column``, against ``top``, ``step``, ``centred``, ...

        Raises:
          KeyError: there is no such row.
        """
        for row in self.results["ladder"]:
            if (row["column"], row["approximation"], row["against"]) == (column, approximation, against):
                return row
        raise KeyError((column, approximation, against))


def verify(config: VerifyConfig, *, progress: bool = True) -> Verification:
    """Compute and compare the kernels as ``config`` says; writes tables, plots, kernels and report.html into OUT.

    Kernel matrices that OUT already holds, and single outputs of unfinished ones, are not computed again. On a mesh
    over the devices of several processes all of them compute every kernel together, and the first writes.

    Raises:
      UserError: unusable model, data or options; gradients that are not finite; a full disk.
    """

    began, progress = time.monotonic(), progress and is_primary()
    check_tracker(config.warmup.tracker)
    RunDir.check(config.out, "verify", config)
    model = load_model(config.model, seed=config.seed)
    sample = draw_sample(config, model)
    check_sizes(config, model)
    run = RunDir.create(config.out, "verify", config, inputs=inputs_of(model, config.model, **sample.sources))
    run.tell("results.json", progress)
    suite = KernelSuite(config, run, model, sample, progress)
    subsets = [suite.measure(subset) for subset in suite.subsets()]
    results = compare(config, subsets, progress=progress)
    results["data"] = {name: loaded.report() for name, loaded in sample.sources.items()}
    results["wall_seconds"] = time.monotonic() - began
    kernels = {f"{c.name}/{name}": k for c in subsets for name, k in c.kernels.items()}
    if is_primary():
        ids = np.array([str(i) for i in sample.tokens.ids])
        write_npz(run.path / "kernels.npz", {"ids": ids, **kernels}, compressed=True)
        run.write_json("results.json", results)
        write_report(run, results, kernels)
    return Verification(results, kernels)


def describe(config: Any, result: Any) -> str:
    """The ladder against the top of each column, the cross terms, and the report's path."""
    shown = ("approximation", "passes", "CKA", "Spearman, scores", "expected flips")
    parts = []
    for column in result.results["columns"]:
        rows = [row for row in table(result.results, "top", column) if "sketched" not in row["approximation"]]
        title = "All parameters" if column == "all" else "LoRA"
        parts.append(f"{title}, against the exact trace\n\n{to_markdown(rows, shown)}")
    parts.append(to_markdown(cross_table(result.results)))
    if result.results["preconditioners"]:
        parts.append(f"{PRECONDITIONED}\n\n{to_markdown(preconditioner_table(result.results))}")
    parts += [reading(result.results["data"])]
    return "\n".join(parts) + f"\nreport: {Path(config.out) / 'report.html'}"


COMMAND = Command(VerifyConfig, verify, describe, spans=True)
