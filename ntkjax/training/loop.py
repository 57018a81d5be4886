"""``fit``: fine-tune trained parameters on a tokenised dataset, resumable at any step."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ntkjax.ahead import Program
from ntkjax.errors import CheckpointError, ConfigError, DataError, UserError
from ntkjax.training.checkpoint import Checkpoints
from ntkjax.training.config import TrainConfig
from ntkjax.training.manifest import TrainingData, check_manifest, make_manifest
from ntkjax.training.mixture import EpochPlan
from ntkjax.training.optimiser import AdamW, adam_moments
from ntkjax.training.result import FitResult
from ntkjax.training.run import CHECKPOINTS, METRICS, Run, padding_of, reweighting_of
from ntkjax.training.step import cast_like, init_state, leaf_dtypes, on_mesh, train_step, used_micro_batches
from ntkjax.training.trackers import TRACKERS, check_tracker
from ntkjax.types import Params, as_pytree_fn

MANIFEST = "train.json"
STEP = "training step"
"""What `step_program` calls its program."""


def fit(
    nll_fn: Callable,
    params: Params,
    train: TrainingData,
    config: TrainConfig,
    *,
    seed: int,
    dev: TrainingData | None = None,
    domain: np.ndarray | None = None,
    out_dir: str | Path | None = None,
    resume: bool = True,
    progress: bool = True,
    extra_metrics: Callable[[Params], dict[str, float]] | None = None,
) -> FitResult:
    """Minimise the mean NLL per response token by AdamW: theta <- AdamW(theta, grad sum_i w_i nll_i(theta)).

    Args:
      nll_fn: ``nll_fn(params, batch) -> [B]``, mean NLL over S(x) in nats, 0 for an empty S; a callable
        pytree.
      params: what is trained, any subset of the model's tree. Kept in at least float32 while training; the
        given buffers stay usable.
      train: the examples. A set that is on a mesh (``train.on(mesh)``) has every batch's rows spread over its devices,
        and the model must live there too; a packed one (``train.packed(True)``) puts several examples in a row of a
        fixed length: one compiled step whatever the data.
      dev: examples for evaluation, early stopping and the choice of the best step.
      domain: rows of ``train`` that are domain examples; needed only for ``config.domain_share``.
      seed: decides the order of the examples, and nothing else.
      out_dir: where train.json, metrics.jsonl, checkpoints/ and what ``config.tracker`` writes go; None keeps
        everything in memory, and nothing is tracked. A run that was killed resumes there from its newest
        checkpoint and ends bit for bit as if it had not been (on a backend whose operations are deterministic).
        ``resume=False`` deletes all of these and starts over.
      extra_metrics: ``params -> {name: number}``, logged with every evaluation.

    Raises:
      ConfigError: options that do not fit each other or the data.
      CheckpointError: ``out_dir`` holds a run with other settings, data or weights, or a damaged one.
      UserError: the loss or the gradient is not finite (step and example ids named), or the disk is full; the
        last checkpoint is kept. Or the tracker's package is not installed.
    """
    check_tracker(config.tracker)
    _check_inputs(params, train, dev, config)
    rows = np.zeros(0, np.int64) if domain is None else np.asarray(domain, np.int64)
    nll_fn = as_pytree_fn(nll_fn)
    folder = None if out_dir is None else Path(out_dir)
    if folder is not None:
        manifest = make_manifest(nll_fn, params, train, config, seed=seed, dev=dev, domain=rows)
        _prepare_folder(folder, manifest, resume)
    plan = EpochPlan(np.asarray(train.lengths), config.batch_size, seed, rows, config.domain_share)
    run = Run(nll_fn, params, train, config, plan, dev=dev, folder=folder, extra_metrics=extra_metrics)
    try:
        run.restore_or_start()
        run.train(progress)
        return run.result()
    finally:
        run.close()


def step_program(nll_fn: Callable, params: Params, train: TrainingData, config: TrainConfig) -> Program:
    """The program of the steps that `fit` takes with these arguments, of its first batch where batches differ in shape;
    for ``train`` without a mesh. Of packed data the program depends on nothing but whether the longest example needs a
    longer row, so that the steps on other data are the same."""

    def lower() -> jax.stages.Lowered:
        optimiser, lengths = AdamW.of(config), np.asarray(train.lengths)
        first = next(iter(EpochPlan(lengths, config.batch_size, 0, np.zeros(0, np.int64)).batches(0, 1)))
        batch, accumulation = padding_of(train, lengths, config).collate(train, first)
        state = jax.eval_shape(lambda theta: init_state(theta, optimiser), params)
        options = {"optimiser": optimiser, "accumulation": accumulation, "dtypes": leaf_dtypes(params)}
        options |= {"shardings": None, "reweighting": reweighting_of(config)}
        rate, used = config.learning_rate, used_micro_batches(batch, accumulation)
        return train_step.lower(as_pytree_fn(nll_fn), state, batch, rate, used=used, **options)

    return Program(STEP, lower)


def saved_params(out_dir: str | Path, step: int, params: Params, config: TrainConfig, *, dev: bool = False) -> Params:
    """The parameters that a run of `fit` in ``out_dir`` had after ``step`` steps; see `saved_state`."""
    return saved_state(out_dir, step, params, config, dev=dev)[0]


def saved_state(
    out_dir: str | Path, step: int, params: Params, config: TrainConfig, *, dev: bool = False
) -> tuple[Params, Params, Params]:
    """(theta, m, v) of a run of `fit` in ``out_dir`` after ``step`` steps: the parameters, structure and dtypes as
    given, and Adam's moments, without bias correction, in at least float32.

    Every step that is a multiple of ``save_every`` is there with ``keep_checkpoints=None``.

    Args:
      params, config: those that `fit` was given; the values of ``params`` do not matter.
      dev: whether it was given a dev set.

    Raises:
      CheckpointError: no checkpoint of that step (the steps there are named), or a damaged one.
    """
    state = init_state(params, AdamW.of(config))
    mesh = next((x.sharding.mesh for x in jax.tree.leaves(state.params) if not x.is_fully_addressable), None)
    state, _ = on_mesh(state, mesh)
    like = {"params": state.params, "opt_state": state.opt_state} | ({"best": state.params} if dev else {})
    checkpoints = Checkpoints(Path(out_dir) / CHECKPOINTS, None, together=mesh is not None)
    try:
        if step not in checkpoints.steps():
            kept = ", ".join(map(str, checkpoints.steps())) or "none"
            raise CheckpointError(
                f"{out_dir}: no checkpoint of step {step}; there are: {kept}. Train with save_every dividing it and "
                "keep_checkpoints none to keep them all"
            )
        arrays, _ = checkpoints.restore(step, like)
    finally:
        checkpoints.close()
    first, second, _ = adam_moments(arrays["opt_state"])
    return cast_like(arrays["params"], leaf_dtypes(params)), first, second


def _check_inputs(params: Params, train: TrainingData, dev: TrainingData | None, config: TrainConfig) -> None:
    if not jax.tree.leaves(params):
        raise ConfigError("nothing to train: params has no leaves; give the model LoRA factors or select parameters")
    if config.patience is not None and dev is None:
        raise ConfigError(f"training option patience = {config.patience}: needs a dev set to watch; give one or none")
    for name, data in (("training", train), ("dev", dev)):
        if data is None:
            continue
        if len(data.lengths) == 0:
            raise DataError(f"the {name} data hold no examples")
        empty = np.flatnonzero(np.asarray(data.response_lengths) < 1)
        if empty.size:
            names = ", ".join(str(data.ids[int(row)]) for row in empty[:8])
            raise DataError(f"{empty.size} {name} examples have no response token to learn from: {names}. Drop them")


def _prepare_folder(folder: Path, manifest: dict[str, Any], resume: bool) -> None:
    """Make the folder, empty it of an earlier run where asked, and check that it holds this run."""
    if jax.process_index() != 0:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not resume:
            for name in (CHECKPOINTS, *TRACKERS):
                shutil.rmtree(folder / name, ignore_errors=True)
            for name in (MANIFEST, METRICS):
                (folder / name).unlink(missing_ok=True)
        check_manifest(folder / MANIFEST, manifest)
    except OSError as error:
        raise UserError(f"{folder}: cannot write ({error.strerror or error}); choose another output folder") from error
