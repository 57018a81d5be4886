"""What the experiments over `ntkjax study` share: their data as study files, and the results that are kept."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import script

from ntkjax.commands.study.command import Study, run_study
from ntkjax.commands.study.spec import normalised, spec_of

RESULTS = Path(__file__).parent / "results"
NEAREST = {"method": "ntk", "kernel": "loss", "stage1": "off", "scores": "sketch", "direction": "cosine",
           "aggregation": "max"}  # fmt: skip
WHOLE_POOL: list[dict[str, Any]] = [
    {"label": "ntk (loss, whole pool)", "method": "ntk", "kernel": "loss", "stage1": "off"},
    {"label": "ntk (loss, nearest example)", **NEAREST},
    {"label": "ntk (loss, nearest example, no warm-up)", **NEAREST, "warmup": "none"},
]
"""Arms beside the paper's: the label-aware kernel without stage 1; and the highest cosine with any domain example in
place of the product with their mean, what experiments 06 and 09 found to find most."""
KEPT = ("results.md", "study.yaml", "tables", "plots")


@dataclasses.dataclass(frozen=True)
class Setting:
    """What a study is about: the embedded model and its planted task, or a real one cut to what a CPU does."""

    data: Path | None = None
    """Folder with pool/ and the domains; without it the embedded task."""
    model: str | None = None
    """Hugging Face directory, hub id or `real` (`make real-model`); needed with --data."""
    domains: tuple[str, ...] = ("finance", "medical", "legal")
    """Of the real data."""
    n: int | None = None
    """N; 120 of the planted pool, 150 of the real one."""
    pool_size: int | None = None
    """2,400 planted examples, the first 4,000 real ones."""
    train_size: int | None = None
    """|D|; 96 of the planted domain, the first 200 of a real one."""
    dev_size: int = 60
    test_size: int = 300
    max_length: int = 192
    epochs: float = 1
    """Of the real task; 8 of the planted one."""

    @property
    def name(self) -> str:
        """Of the study."""
        return "embedded" if self.data is None else Path(str(self.model)).name

    @property
    def budget(self) -> int:
        """N."""
        return self.n or (120 if self.data is None else 150)

    def content(self, train: int | None = None) -> dict[str, Any]:
        """The study's model and data, with ``train`` domain examples where |D| is given."""
        train = train or self.train_size or (96 if self.data is None else 200)
        script.both_or_neither(self.data, self.model)
        if self.data is None or self.model is None:
            return planted(self.pool_size or 2400, train, test=self.test_size)
        sizes = {"pool": self.pool_size or 4000, "train": train, "dev": self.dev_size, "test": self.test_size}
        return real(self.data, self.model, self.domains, **sizes, max_length=self.max_length, epochs=self.epochs)


def planted(pool: int, domain: int, *, dev: int = 90, test: int = 300, task_seed: int = 7) -> dict[str, Any]:
    """The embedded model and its generated task, whose truth is known."""
    sizes = {"pool_size": pool, "domain_size": domain, "dev_size": dev, "test_size": test, "task_seed": task_seed}
    train = {"batch_size": 16, "max_buckets": 1, "learning_rate": 2e-3}
    return {
        "embedded": sizes,
        "data": {"max_length": 64},
        "warmup": {"epochs": 8, **train},
        "train": {"epochs": 8, **train},
    }


def real(
    data: Path,
    model: str,
    domains: Sequence[str],
    *,
    pool: int | None,
    train: int | None,
    dev: int | None,
    test: int | None,
    max_length: int,
    epochs: float,
) -> dict[str, Any]:
    """The first so many examples (None: all) of ``data``/DOMAIN/{train,dev,test}.jsonl and of pool/cot-01.jsonl, which
    the model under ../shared has not seen."""
    head = lambda path, count: {"path": str(path), **({} if count is None else {"rows": [0, count]})}
    settings = {"epochs": epochs, "learning_rate": 2e-3, "max_buckets": 3}
    return {
        "model": model,
        "pool": head(data / "pool" / "cot-01.jsonl", pool),
        "domains": {
            name: {
                "train": head(data / name / "train.jsonl", train),
                "dev": head(data / name / "dev.jsonl", dev),
                "test": head(data / name / "test.jsonl", test),
            }
            for name in domains
        },
        "data": {"max_length": max_length},
        "warmup": settings | {"epochs": 1},
        "train": settings,
    }


def run(content: Mapping[str, Any], out: Path, results: Path | None) -> Study:
    """Run the study in ``out`` and keep its tables and plots under ``results``; a failed run ends with its message.

    Several studies may share ``out``: what one has computed the others find there.
    """
    made = normalised(dict(content), "study")
    study = run_study(spec_of(made), made, out)
    if results is not None:
        keep(out, results)
    for row in study.results["failures"]:
        print(f"failed: {row['domain']}, {row['arm']}, seed {row['seed']}: {row['message']}")
    return study


def keep(out: Path, results: Path) -> None:
    """Copy what is committed of a study's run directory; what was there before goes."""
    shutil.rmtree(results, ignore_errors=True)
    results.mkdir(parents=True)
    for name in KEPT:
        if (out / name).is_dir():
            shutil.copytree(out / name, results / name)
        elif (out / name).exists():
            shutil.copy(out / name, results / name)
