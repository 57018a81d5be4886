"""``ntkjax verify``: how good is each approximation of the tangent kernel, and what does it do to the selection?

One sample of examples, part of it the domain, and every kernel of the ladder on it: the exact trace with all parameters
and with LoRA, centred, its leading spectral directions, random probes, ``sum_logits``, ``loss``, and each of them
sketched. Every kernel is compared with the top of its own column, with the rung it departs from, which isolates the
error of that one step, and with the centred trace, the part that can change the loss.
"""

from __future__ import annotations

import dataclasses
import io
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from tyro.conf import arg

from ntkjax.data import TokenisedDataset, concat
from ntkjax.errors import ConfigError, UserError
from ntkjax.models import LanguageModel
from ntkjax.rng import numpy_rng
from ntkjax.stages.inputs import inputs_of
from ntkjax.stages.loading import Loaded, load_data, load_model
from ntkjax.stages.options import DataOptions, ModelOptions
from ntkjax.stages.rundir import RunDir
from ntkjax.store import atomic_write
from ntkjax.training import TrainConfig


@dataclasses.dataclass(frozen=True)
class VerifyConfig:
    """Measure every approximation of the tangent kernel against the exact one, on a sample of examples."""

    model: Annotated[ModelOptions, arg(name="")]
    data: tuple[str, ...]
    """Files whose examples are scored, as the pool of a selection is."""
    out: str
    """Run directory: ladder.csv, .md, .tex, kernels.npz, plots/, report.html. A stopped run goes on there."""
    domain: tuple[str, ...] = ()
    """Files of the domain that the scores are about. None: a part of the sample from --data stands for it."""
    n: int = 64
    """Examples in every kernel matrix, the domain's included, drawn at random."""
    n_domain: int | None = None
    """How many of them are the domain. None: a quarter."""
    n_full: int = 32
    """How many of the n examples the kernels of all parameters are computed on, the dearest; 0: leave them out."""
    top: int | None = None
    """N: examples that would be selected of those scored. None: a quarter."""
    m: tuple[int, ...] = (4, 16)
    """Outputs of the approximations spectral:m, centred_spectral:m and hutchinson:m."""
    sketch_size: int = 8192
    """K of the sketched kernels."""
    max_signs: float = 5e8
    """Sketches of more random signs than this (outputs x parameters x K) are drawn from the law of a Gaussian sketch,
    which the kernel matrix determines, instead of being applied to the gradients; the tables say which."""
    seeds: int = 3
    """Draws of what is random (LoRA factors, warm-up, probes, signs), with seeds seed, seed + 1, ..."""
    full_seeds: int = 1
    """Of these, how many have the kernels of all parameters computed at their own warmed-up weights."""
    seed: int = 0
    skip_warmup: bool = False
    """Kernels at the parameters as they are (fresh LoRA: B = 0), without warming up on the domain."""
    cross_examples: int = 16
    """Examples on which the gradients of different outputs are compared; 0: leave that out."""
    cross_outputs: int = 2048
    """Most outputs compared with each other, a uniform sample of the vocabulary; fewer where their gradients do not fit
    into memory_gib and the head is trained."""
    bootstrap: int = 200
    """Resamples of the examples behind each interval."""
    memory_gib: float = 1.0
    """Gradients held at a time; twice that is in use at the peak."""
    reading: Annotated[DataOptions, arg(name="")] = DataOptions()
    warmup: TrainConfig = TrainConfig(epochs=1)
    """Warm-up on the domain (on --data without one) before the kernels are taken, as in select."""

    def __post_init__(self):
        for name, least in (("n", 6), ("seeds", 1), ("full_seeds", 1), ("sketch_size", 1), ("bootstrap", 10)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} must be at least {least}, got {getattr(self, name)}")
        for name in ("n_full", "cross_examples"):
            value = getattr(self, name)
            if value < 0 or (0 < value < (6 if name == "n_full" else 2)):
                raise ConfigError(f"{name} must be 0 or at least {6 if name == 'n_full' else 2}, got {value}")
        if not self.m or min(self.m) < 1:
            raise ConfigError(f"m must be one or more numbers of outputs from 1, got {list(self.m)}")
        if self.memory_gib <= 0:
            raise ConfigError(f"memory_gib must be above 0, got {self.memory_gib}")
        if not 1 <= self.domain_count <= self.n - 4:
            raise ConfigError(
                f"n_domain must leave at least 4 of the n = {self.n} examples to score, and be at least 1; "
                f"got {self.domain_count}"
            )
        scored = self.n - self.domain_count
        if self.top is not None and not 1 <= self.top < scored:
            raise ConfigError(f"top must be from 1 to {scored - 1}, fewer than the {scored} scored; got {self.top}")

    @property
    def domain_count(self) -> int:
        """M: the domain examples in the sample."""
        return max(1, self.n // 4) if self.n_domain is None else self.n_domain

    @property
    def memory_budget(self) -> int:
        """Bytes of gradients held at a time."""
        return int(self.memory_gib * (1 << 30))


@dataclasses.dataclass(frozen=True)
class Verification:
    """What `verify` found; ``results`` is the content of results.json.

    Attributes:
      results: ``ladder`` (one row for each rung and reference), ``cross_terms``, ``curves``, ``noise``, sizes, times.
      kernels: ``COLUMN/KERNEL`` -> matrices [draws, n, n], as in kernels.npz.
    """

    results: dict[str, Any]
    kernels: Mapping[str, np.ndarray]

    def row(self, column: str, rung: str, against: str) -> dict[str, Any]:
        """The row of the ladder for ``rung`` of ``column``, against ``top``, ``step``, ``centred``, ... KeyError if it
        is not there."""
        for row in self.results["ladder"]:
            if (row["column"], row["rung"], row["against"]) == (column, rung, against):
                return row
        raise KeyError((column, rung, against))


@dataclasses.dataclass(frozen=True)
class Sample:
    """The examples of the kernel matrices: ``tokens``, the first ``domain`` of which are the domain, and the data that
    they and the warm-up come from."""

    tokens: TokenisedDataset
    domain: int
    sources: Mapping[str, Loaded]

    def part(self, count: int) -> np.ndarray:
        """``count`` rows of the sample with about the same share of domain examples, those first."""
        if count >= len(self.tokens):
            return np.arange(len(self.tokens))
        domain = min(max(1, round(count * self.domain / len(self.tokens))), count - 4)
        return np.concatenate([np.arange(domain), np.arange(self.domain, self.domain + count - domain)])


def verify(config: VerifyConfig, *, progress: bool = True) -> Verification:
    """Climb the ladder as ``config`` says; writes tables, plots, kernels and report.html into OUT.

    Kernel matrices that OUT already holds, and single outputs of unfinished ones, are not computed again.

    Raises:
      UserError: unusable model, data or options; gradients that are not finite; a full disk.
    """
    from ntkjax.stages.verify_kernels import Lab
    from ntkjax.stages.verify_report import write_report
    from ntkjax.stages.verify_rows import compare

    began = time.monotonic()
    RunDir.check(config.out, "verify", config)
    model = load_model(config.model, seed=config.seed)
    sample = draw_sample(config, model)
    check_sizes(config, model)
    run = RunDir.create(config.out, "verify", config, inputs=inputs_of(model, config.model, **sample.sources))
    run.tell("results.json", progress)
    lab = Lab(config, run, model, sample, progress)
    columns = [lab.measure(column) for column in lab.columns()]
    results = compare(config, lab, columns, progress=progress)
    results["data"] = {name: loaded.report() for name, loaded in sample.sources.items()}
    results["wall_seconds"] = time.monotonic() - began
    kernels = {f"{c.name}/{name}": k for c in columns for name, k in c.kernels.items()}
    write_arrays(run.path / "kernels.npz", {"ids": np.array([str(i) for i in sample.tokens.ids]), **kernels})
    run.write_json("results.json", results)
    write_report(run, results, kernels)
    return Verification(results, kernels)


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """A .npz of ``arrays``, whole or not at all; keys with a slash are folders in it."""
    content = io.BytesIO()
    np.savez_compressed(content, **arrays)  # pyright: ignore[reportArgumentType]
    try:
        atomic_write(path, content.getvalue())
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror or error}). Free some space and run again."
        ) from error


def draw_sample(config: VerifyConfig, model: LanguageModel) -> Sample:
    """n examples: the domain's first, then those to score, drawn from ``config.seed``.

    Raises:
      DataError: bad records. UserError: fewer examples than asked for.
    """
    pool = load_data(config.data, model, config.reading)
    domain = load_data(config.domain, model, config.reading) if config.domain else None
    wanted = config.domain_count
    scored = config.n - wanted
    rng = numpy_rng(config.seed, "verify", "sample")
    if domain is None:
        _enough(pool, config.n, config.data, "n")
        rows = rng.choice(len(pool), config.n, replace=False)
        return Sample(pool.tokens.subset(rows), wanted, {"data": pool})
    _enough(domain, wanted, config.domain, "n_domain")
    _enough(pool, scored, config.data, "n minus n_domain")
    first = domain.tokens.subset(rng.choice(len(domain), wanted, replace=False))
    second = pool.tokens.subset(rng.choice(len(pool), scored, replace=False))
    return Sample(concat(first, second), wanted, {"data": pool, "domain": domain})


def _enough(loaded: Loaded, wanted: int, paths: tuple[str, ...], name: str) -> None:
    if len(loaded) < wanted:
        raise UserError(
            f"{', '.join(paths)}: {len(loaded)} examples, fewer than the {wanted} asked for ({name}); "
            "lower n or n_domain, or give more data"
        )


def check_sizes(config: VerifyConfig, model: LanguageModel) -> None:
    """Refuse what the model is too small for, before anything is computed."""
    width = model.config.hidden_size
    if max(config.m) > width:
        raise ConfigError(f"m: {max(config.m)} is more than the model's width {width}; give at most {width}")
