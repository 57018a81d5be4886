"""The kernel matrices of ``ntkjax verify``: computed once, kept in the run directory output by output."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ntkjax.commands.verify.config import VerifyConfig
from ntkjax.commands.verify.preconditioners import LOSS, Draw, preconditioned_scores
from ntkjax.commands.verify.sample import Sample
from ntkjax.data import TokenisedDataset
from ntkjax.files import read_json
from ntkjax.fingerprint import weights_fingerprint
from ntkjax.job import barrier
from ntkjax.models import LanguageModel
from ntkjax.ntk.cross_terms import CrossTerms, cross_output_cosines
from ntkjax.ntk.features import gradient_features
from ntkjax.ntk.kernels import KERNELS, KernelFunctions, build, parse
from ntkjax.ntk.ladder import OutputGrams, common_form, gaussian_sketch, hidden_gram, output_grams, square_root
from ntkjax.ntk.rows import Pass
from ntkjax.ntk.sketch import RademacherSketch
from ntkjax.parallel import spans_processes
from ntkjax.pipeline.load import fresh_parameters
from ntkjax.pipeline.run_dir import RunDir
from ntkjax.rng import numpy_rng
from ntkjax.store import RowStore
from ntkjax.training import fit
from ntkjax.types import Params

TRACE, CENTRED_TRACE = "trace", "centred_trace"
"""The exact kernels that the others are compared with: of all outputs, and of those that can change the loss."""
NOT_LORA = r"^(?!.*lora_[ab]$)"


@dataclasses.dataclass(frozen=True)
class ParameterSet:
    """One set of trained parameters, and all its kernels.

    Attributes:
      name: ``all`` or ``lora``.
      rows: its examples, as rows of the sample; the first ``domain`` are the domain.
      seeds: one draw of every kernel for each.
      kernels: name -> matrices [draws, n, n]; one draw where nothing is random.
      sketched: name -> two independent sketches for every draw [2, draws, n, n], and how they were made.
      curves: kernel with a size -> {m: matrices [draws, n, n]}.
      cross: cross-output cosines, one for each seed.
      preconditioned: scores along preconditioned directions, one for each seed; of the trained parameters alone.
      parameters, vocab, width: sizes.
    """

    name: str
    rows: np.ndarray
    domain: int
    seeds: tuple[int, ...]
    kernels: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    sketched: dict[str, tuple[np.ndarray, str]] = dataclasses.field(default_factory=dict)
    curves: dict[str, dict[int, np.ndarray]] = dataclasses.field(default_factory=dict)
    cross: list[CrossTerms] = dataclasses.field(default_factory=list)
    preconditioned: list[Draw] = dataclasses.field(default_factory=list)
    parameters: int = 0
    vocab: int = 0
    width: int = 0


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """The weights that a kernel is computed at.

    Attributes:
      params: theta, what is differentiated.
      functions: the functions of the model at those weights.
      key: a name, the folder of its rows; equal weights share it.
      weights: the fingerprint of all weights.
    """

    params: Params
    functions: KernelFunctions
    key: str
    weights: str


class KernelSuite:
    """Computes the kernels of a verification for each set of trained parameters.

    What the run directory already holds is read from there.
    """

    def __init__(self, config: VerifyConfig, run: RunDir, model: LanguageModel, sample: Sample, progress: bool):
        self.config, self.run, self.model, self.sample, self.progress = config, run, model, sample, progress
        self._warmed: dict[int, tuple[Params, str]] = {}

    # -- what is measured --

    def subsets(self) -> list[ParameterSet]:
        """The sets of parameters of this run, without kernels yet: all parameters first where they are asked for."""
        config, seeds = self.config, tuple(range(self.config.seed, self.config.seed + self.config.seeds))
        lora, subsets = config.model.parameters == "lora", []
        if config.n_full or not lora:
            rows = self.sample.part(config.n_full if lora else config.n)
            # Without warm-up every seed has the same weights to take these kernels at, and probes of its own.
            measured = seeds[: config.full_seeds] if lora and not config.skip_warmup else seeds
            subsets.append(ParameterSet("all", rows, int((rows < self.sample.domain).sum()), measured))
        if lora:
            subsets.append(ParameterSet("lora", np.arange(config.n), self.sample.domain, seeds))
        return subsets

    def measure(self, subset: ParameterSet) -> ParameterSet:
        """``subset`` with all its kernels."""
        draws = [self._draw(subset, seed) for seed in subset.seeds]
        kernels = {name: _stack([draw["kernels"][name] for draw in draws]) for name in draws[0]["kernels"]}
        sketched = {
            name: (np.stack([draw["sketched"][name][0] for draw in draws], axis=1), draws[0]["sketched"][name][1])
            for name in draws[0]["sketched"]
        }
        curves = {
            name: {m: _stack([draw["curves"][name][m] for draw in draws]) for m in sizes}
            for name, sizes in draws[0]["curves"].items()
        }
        cross = [draw["cross"] for draw in draws if draw["cross"] is not None]
        results = {"kernels": kernels, "sketched": sketched, "curves": curves, "cross": cross}
        results["preconditioned"] = [draw["preconditioned"] for draw in draws if draw["preconditioned"] is not None]
        return dataclasses.replace(subset, **results, **{n: draws[0][n] for n in ("parameters", "vocab", "width")})

    # -- the weights --

    def warmed(self, seed: int) -> tuple[Params, str]:
        """(theta after warm-up with this seed, a name that equal ones share)."""
        if seed not in self._warmed:
            self._warmed[seed] = self._warm_up(seed)
        return self._warmed[seed]

    def _warm_up(self, seed: int) -> tuple[Params, str]:
        config = self.config
        params = fresh_parameters(self.model, config.model, seed)
        if config.skip_warmup:
            fixed = config.model.parameters == "all" or config.model.adapter is not None
            # Weights that no seed touches share their rows between seeds: kernels without probes are computed once.
            return params, "as-loaded" if fixed else f"seed-{seed}"
        trained = self.sample.sources.get("domain", self.sample.sources["data"])
        result = fit(
            self.model.nll_fn,
            params,
            trained.tokens,
            config.warmup,
            seed=seed,
            out_dir=self.run.path / "warmup" / f"seed-{seed}",
            progress=self.progress,
        )
        return result.params, f"seed-{seed}"

    def checkpoint(self, subset: ParameterSet, seed: int) -> Checkpoint:
        """Theta, functions and head of ``subset`` at a seed."""
        params, key = self.warmed(seed)
        if subset.name == "lora":
            return Checkpoint(params, _functions(self.model, self.model.head_fn({})), key, self._fingerprint(params))
        model = self.model.with_params(params)
        if self.config.model.parameters == "lora":
            # All weights at the same function as the LoRA kernels; B = 0 leaves the loaded one whatever A is.
            params = model.select_params(NOT_LORA)
            key = "as-loaded" if self.config.skip_warmup else key
        return Checkpoint(params, _functions(model, model.head_fn), key, self._fingerprint(params))

    def _fingerprint(self, params: Params) -> str:
        return weights_fingerprint(self.model.params, params)

    # -- one draw of one set of parameters --

    def _draw(self, subset: ParameterSet, seed: int) -> dict[str, Any]:
        checkpoint = self.checkpoint(subset, seed)
        tokens = self.sample.tokens.subset(subset.rows)
        vocab, width = np.shape(_weight(checkpoint))
        kernels, curves = self._ladder(functools.partial(self._sweep, subset, checkpoint, tokens), seed, vocab)
        parameters = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(checkpoint.params))
        sketched = {
            name: self._sketches(subset, checkpoint, tokens, name, matrix, seed, parameters)
            for name, matrix in kernels.items()
        }
        return {
            "kernels": kernels,
            "curves": curves,
            "sketched": sketched,
            "cross": self._cross(subset, checkpoint, tokens, seed),
            "preconditioned": self._preconditioned(subset, checkpoint, tokens, kernels[LOSS], parameters),
            "parameters": parameters,
            "vocab": int(vocab),
            "width": int(width),
        }

    def _ladder(
        self, sweep: Callable[..., OutputGrams], seed: int, vocab: int
    ) -> tuple[dict[str, np.ndarray], dict[str, dict[int, np.ndarray]]]:
        """(kernel -> matrix, kind -> {m: matrix}): every kernel of `KERNELS`, and those with a size for many m.

        Args:
          sweep: ``(name, seed or None) -> OutputGrams`` of one kernel.
        """
        sizes = sorted(set(self.config.m), reverse=True)
        done: dict[str, OutputGrams] = {}

        def swept(name: str) -> OutputGrams:
            if name not in done:
                done[name] = sweep(name, seed if parse(name).kind.random else None)
            return done[name]

        kernels: dict[str, np.ndarray] = {}
        curves: dict[str, dict[int, np.ndarray]] = {}
        for name, kind in KERNELS.items():
            if name == CENTRED_TRACE:
                # trace - sum_logits / V (`ntkjax.ntk.ladder` derives it), so it takes no passes of its own.
                kernels[name] = kernels[TRACE] - swept("sum_logits").matrix() / vocab
            elif not kind.sized:
                kernels[name] = swept(name).matrix()
            elif kind.nested == "none":
                kernels |= {f"{name}:{m}": swept(f"{name}:{m}").matrix() for m in sizes}
            else:
                # Outputs are nested: one sweep of the most of them holds the kernel of every smaller m. Where the full
                # set was swept already (the trace in the eigenbasis of the head), no pass is left to do.
                whole = done[kind.complete] if kind.complete in done else swept(f"{name}:{sizes[0]}")
                part = functools.partial(whole.matrix, rescale=kind.nested == "mean")
                kernels |= {f"{name}:{m}": part(m) for m in sizes}
                curves[name] = {m: part(m) for m in powers_of_two(len(whole.grams))}
        return kernels, curves

    def _batches(self, tokens: TokenisedDataset, lengths: int = 3) -> Any:
        """The examples in batches of few lengths: each length saves padding in every pass, and costs a compilation."""
        longest, budget = int(tokens.lengths.max()), self.config.reading.token_budget
        budget = min(budget, max(longest, len(tokens) * longest // lengths))
        return tokens.batches(token_budget=budget, max_buckets=lengths, packing=False)

    def _manifest(
        self, subset: ParameterSet, checkpoint: Checkpoint, tokens: TokenisedDataset, **more: Any
    ) -> dict[str, Any]:
        return {"weights": checkpoint.weights, "examples": tokens.fingerprint, "column": subset.name, **more}

    def _store(self, path: Path, **options: Any) -> RowStore:
        return RowStore.open(path, together=spans_processes(self.model.mesh), **options)

    def _kept(self, file: Path, manifest: dict[str, Any]) -> dict[str, Any] | None:
        """What `_keep` wrote into ``file`` under this manifest; None where it did not."""
        content = read_json(file) if file.exists() else None
        barrier(f"kept {file.name}")  # all have looked before the first writes
        return None if content is None or content["manifest"] != manifest else content

    def _keep(self, file: Path, manifest: dict[str, Any], content: dict[str, Any]) -> None:
        self.run.write_json(str(file.relative_to(self.run.path)), {**content, "manifest": manifest})
        barrier(f"keep {file.name}")  # seeds may share a file, and all processes are to find it or none

    def _sweep(
        self, subset: ParameterSet, checkpoint: Checkpoint, tokens: TokenisedDataset, name: str, seed: int | None = None
    ) -> OutputGrams:
        """The Gram matrices of every output of a kernel; ``seed`` where it has probes."""
        began, n = time.monotonic(), len(tokens)
        kernel = build(name, checkpoint.functions, checkpoint.params, seed=seed or 0)
        # All kernels of the logits become one base with other selectors: one program, compiled once.
        base, selectors = common_form(kernel, checkpoint.functions, checkpoint.params)
        batches, count = self._batches(tokens), 1 if selectors is None else len(selectors)
        folder = self.run.path / "rows" / subset.name / checkpoint.key
        label = name.replace(":", "-") + ("" if seed is None else f"-probes-{seed}")
        manifest = self._manifest(subset, checkpoint, tokens, kernel=name, seed=seed)
        with self._store(folder / label, rows=count, width=n * n, dtype="float64", manifest=manifest) as store:
            missing = int((~store.done()).sum())
            grams = output_grams(
                base,
                checkpoint.params,
                batches,
                rows=n,
                selectors=selectors,
                store=store,
                memory_budget=self.config.memory_budget,
                progress=self.progress and f"{subset.name}, {checkpoint.key}: {name}",
            )
        hidden = None
        if kernel.hidden_fn is not None:
            hidden = hidden_gram(kernel.hidden_fn, checkpoint.params, batches, rows=n)
        if missing:
            self.run.log(column=subset.name, point=checkpoint.key, kernel=name, outputs=missing, examples=n,
                         seconds=time.monotonic() - began)  # fmt: skip
        return OutputGrams(grams, kernel.head_coefficient, hidden)

    # -- sketches --

    def _sketches(
        self,
        subset: ParameterSet,
        checkpoint: Checkpoint,
        tokens: TokenisedDataset,
        name: str,
        matrix: np.ndarray,
        seed: int,
        parameters: int,
    ) -> tuple[np.ndarray, str]:
        """Two independent sketches [2, n, n] of a kernel, and how they were made."""
        size = self.config.sketch_size
        if passes(name, self.model.config.hidden_size) * parameters * size > self.config.max_signs:
            # More signs than config.max_signs. A Gaussian sketch depends on the gradients through their kernel matrix
            # alone, which is here already, so one is drawn from its law.
            rng = numpy_rng(seed, "verify", "sketch", subset.name, name)
            root = square_root(matrix)
            return np.stack([gaussian_sketch(root, size, rng) for _ in range(2)]), "law"
        draws = [self._rademacher(subset, checkpoint, tokens, name, seed, draw) for draw in range(2)]
        return np.stack(draws), "signs"

    def _rademacher(
        self, subset: ParameterSet, checkpoint: Checkpoint, tokens: TokenisedDataset, name: str, seed: int, draw: int
    ) -> np.ndarray:
        """Phi Phi^T of a Rademacher sketch of the gradients themselves."""
        began, size = time.monotonic(), self.config.sketch_size
        signs = int(numpy_rng(seed, "verify", "signs", draw).integers(1 << 30))
        kernel = build(name, checkpoint.functions, checkpoint.params, seed=seed)
        folder = self.run.path / "rows" / subset.name / checkpoint.key
        label = f"{name.replace(':', '-')}-sketch-{seed}-{draw}"
        manifest = self._manifest(subset, checkpoint, tokens, kernel=name, size=size, seed=seed, signs=signs)
        with self._store(folder / label, rows=len(tokens), width=size, dtype="float32", manifest=manifest) as store:
            missing = int((~store.done()).sum())
            phi = gradient_features(
                kernel,
                checkpoint.params,
                self._batches(tokens),
                RademacherSketch(size, signs),
                rows=Pass(
                    len(tokens),
                    store,
                    memory_budget=self.config.memory_budget,
                    progress=self.progress and f"{subset.name}, {checkpoint.key}: {name} sketched",
                ),
            ).astype(np.float64)
        if missing:
            self.run.log(column=subset.name, point=checkpoint.key, kernel=f"{name} sketched", sketch_size=size,
                         examples=missing, seconds=time.monotonic() - began)  # fmt: skip
        return phi @ phi.T

    # -- cross terms --

    def _cross(
        self, subset: ParameterSet, checkpoint: Checkpoint, tokens: TokenisedDataset, seed: int
    ) -> CrossTerms | None:
        """Cosines between outputs on some of the examples, spread evenly; kept as JSON."""
        config = self.config
        if not config.cross_examples:
            return None
        count = min(config.cross_examples, len(tokens))
        # Evenly over the sample, so that domain and pool are both there.
        chosen = tokens.subset(np.linspace(0, len(tokens) - 1, count).astype(int))
        manifest = self._manifest(subset, checkpoint, chosen, outputs=config.cross_outputs, seed=seed,
                                  memory=config.memory_budget, fields=len(dataclasses.fields(CrossTerms)))  # fmt: skip
        file = self.run.path / "rows" / subset.name / checkpoint.key / f"cross-{seed}.json"
        if (content := self._kept(file, manifest)) is not None:
            return CrossTerms(**{k: _array(v) for k, v in content.items() if k != "manifest"})
        terms = cross_output_cosines(
            checkpoint.functions,
            checkpoint.params,
            self._batches(chosen, 2),
            outputs=config.cross_outputs,
            seed=seed,
            memory_budget=config.memory_budget,
            progress=self.progress and f"{subset.name}, {checkpoint.key}: cross-output cosines",
        )
        self._keep(file, manifest, dataclasses.asdict(terms))
        return terms

    # -- preconditioned directions --

    def _preconditioned(
        self,
        subset: ParameterSet,
        checkpoint: Checkpoint,
        tokens: TokenisedDataset,
        matrix: np.ndarray,
        parameters: int,
    ) -> Draw | None:
        """The scores by each preconditioner where these are the parameters that are trained; kept as JSON."""
        config, domain = self.config, subset.domain
        if not config.precondition or subset.name != config.model.parameters:
            return None
        manifest = self._manifest(subset, checkpoint, tokens, domain=domain, damping=list(config.damping),
                                  precondition=list(config.precondition))  # fmt: skip
        file = self.run.path / "rows" / subset.name / checkpoint.key / "preconditioned.json"
        if (content := self._kept(file, manifest)) is not None:
            return content["draw"]
        began, rows = time.monotonic(), np.arange(len(tokens))
        draw = preconditioned_scores(
            config,
            checkpoint.functions,
            checkpoint.params,
            matrix,
            self._batches(tokens.subset(rows[:domain])),
            self._batches(tokens.subset(rows[domain:])),
            sizes=(domain, len(tokens) - domain),
            parameters=parameters,
            progress=self.progress,
        )
        self._keep(file, manifest, {"draw": draw})
        self.run.log(column=subset.name, point=checkpoint.key, kernel="loss, preconditioned", examples=len(tokens),
                     seconds=time.monotonic() - began)  # fmt: skip
        return draw


def passes(name: str, width: int) -> int:
    """Reverse passes an example takes in this kernel: its number of outputs."""
    return parse(name).outputs(width)


def powers_of_two(most: int) -> list[int]:
    """1, 2, 4, ... and ``most`` itself."""
    return sorted({1 << k for k in range(most.bit_length()) if 1 << k <= most} | {most})


def _functions(model: LanguageModel, head: Any) -> KernelFunctions:
    return KernelFunctions(model.hidden_fn, head, model.nll_fn, model.sum_logits_fn)


def _weight(checkpoint: Checkpoint) -> Any:
    head: Any = checkpoint.functions.head
    return head(checkpoint.params) if callable(head) else head


def _stack(draws: list[np.ndarray]) -> np.ndarray:
    """[draws, n, n]; one draw where all are the same, because nothing in them is random."""
    same = all(np.array_equal(draws[0], other) for other in draws[1:])
    return np.stack(draws[:1] if same else draws)


def _array(value: Any) -> Any:
    return np.asarray([float(x) for x in value]) if isinstance(value, list) else value
