"""Question: do the scores predict what training on the examples does (LDS), and do they find flipped answers?

Command:  python experiments/12_validate.py                               # the embedded model and its planted task
          python experiments/12_validate.py --data ../shared/data --model ../shared/models/cot-lm-7m --pool-size 120
            --test-size 60 --methods ntk embedding rds betr dsir random length --kernels sum_logits loss --subsets 16
            --leave-in 0 --flip 0 --epochs 2 --max-length 128 --packing off
Hardware: 2 CPU cores, no accelerator.
Runtime:  experiments/README.md; every finished training is kept, and more subsets, seeds or methods add to them.
Expect:   experiments/README.md, "Do scores predict training?". A score that is right about single examples has an LDS
          near the ceiling, which two seeds of the same subsets give; `random` shows what chance looks like.

All methods and kernels on one set of trainings: `ntkjax validate` with the sizes below. --methods perplexity ifd
loss-drop for-value trak parts judges some alone, by the trainings that --out holds.
"""

from __future__ import annotations

import dataclasses
import itertools
import shutil
from pathlib import Path

import script

from ntkjax.assets import DEMO, tiny_lm_path, write_planted_task
from ntkjax.commands.validate.command import describe, validate
from ntkjax.commands.validate.config import ValidateConfig
from ntkjax.data.rows import Packing
from ntkjax.pipeline.options import DataOptions, DedupOptions, ModelOptions
from ntkjax.training import TrainConfig

RESULTS = Path(__file__).parent / "results" / "12_validate"
KEPT = ("results.md", "tables", "plots")


@dataclasses.dataclass(frozen=True)
class Experiment:
    """One validation; without --data on the planted task."""

    data: Path | None = None
    """Folder with pool/ and the domain; without it the embedded task."""
    model: str = str(tiny_lm_path())
    domain: str = "finance"
    """Of the real data."""
    pool_file: str = "cot-01.jsonl"
    """Of the real data, in its folder pool/."""
    pool_size: int = 400
    domain_size: int = 32
    test_size: int = 300
    methods: tuple[str, ...] = ()
    kernels: tuple[str, ...] = ("sum_logits", "loss", "spectral:16", "centred_spectral:16", "hutchinson:16")
    """trace and centred_trace, 64 outputs in the embedded model, take minutes to compile and are left out."""
    subsets: int = 128
    alpha: float = 0.5
    reseeds: int = 1
    leave_in: int = 1
    flip: float = 0.2
    epochs: float = 4
    learning_rate: float = 2e-3
    max_length: int = DEMO.max_length
    packing: Packing = "auto"
    """on: one compiled program a pass, which is what most of the time of a small pool on a CPU goes into."""
    task_seed: int = 7
    out: Path = Path("runs/12_validate")
    keep: str = ""
    """Name of the folder below results/12_validate that tables and plots are copied to; none by default."""


def heads(e: Experiment, folder: Path) -> dict[str, str]:
    """The first records of the real files, as files of their own."""
    assert e.data is not None
    of = {"pool": (f"pool/{e.pool_file}", e.pool_size), "train": (f"{e.domain}/train.jsonl", e.domain_size),
          "test": (f"{e.domain}/test.jsonl", e.test_size)}  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    made = {}
    for name, (file, size) in of.items():
        with (e.data / file).open(encoding="utf-8") as lines:
            (folder / f"{name}.jsonl").write_text("".join(itertools.islice(lines, size)), encoding="utf-8")
        made[name] = str(folder / f"{name}.jsonl")
    return made


def main(e: Experiment) -> None:
    """Run it, print its tables, keep them."""
    if e.data is None:
        sizes = {"pool_size": e.pool_size, "domain_size": e.domain_size, "dev_size": 3, "test_size": e.test_size}
        files = {name: str(path) for name, path in write_planted_task(e.out / "task", e.task_seed, **sizes).items()}
    else:
        files = heads(e, e.out / "task")
    train = TrainConfig(
        epochs=e.epochs, learning_rate=e.learning_rate, batch_size=16, max_buckets=1 if e.data is None else 4,
        save_every=1000,
    )  # fmt: skip
    config = ValidateConfig(
        model=ModelOptions(e.model),
        domain=(files["train"],),
        pool=(files["pool"],),
        test=(files["test"],),
        truth=files.get("truth"),
        out=str(e.out / "run"),
        methods=e.methods,
        kernels=e.kernels,
        subsets=e.subsets,
        alpha=e.alpha,
        reseeds=e.reseeds,
        leave_in=e.leave_in,
        flip=e.flip,
        data=DataOptions(max_length=e.max_length, packing=e.packing),
        dedup=DedupOptions(mode="report"),  # the planted pool is drawn without repeats, and its templates are alike
        warmup=train,
        train=train,
    )
    print(describe(config, validate(config)))
    if e.keep:
        (RESULTS / e.keep).mkdir(parents=True, exist_ok=True)
        for name in KEPT:
            source, target = e.out / "run" / name, RESULTS / e.keep / name
            if source.is_dir():
                shutil.copytree(source, target, dirs_exist_ok=True)
            else:
                shutil.copy(source, target)


if __name__ == "__main__":
    script.start(main, Experiment)
