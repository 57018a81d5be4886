"""One run of ``ntkjax stability``: fine-tune, compute kernels at some epochs, compare them. All is kept on disk."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ntkjax.commands.stability.config import Arm
from ntkjax.commands.stability.inputs import Study, as_questions, folder
from ntkjax.commands.stability.outputs import ChoiceOutputs, Questions, choice_outputs
from ntkjax.data.buckets import bucket_lengths
from ntkjax.errors import ConfigError
from ntkjax.files import plain, read_json, write_json, write_npz
from ntkjax.models import LanguageModel
from ntkjax.ntk import KernelFunctions, NonFiniteError, build, kernel_matrix, kernel_scores
from ntkjax.ntk.exact import CentredOutput
from ntkjax.ntk.linearise import evaluate, linearisation_error, linearise, parameter_distance
from ntkjax.ntk.regression import (
    accuracy,
    as_matrix,
    centred_targets,
    choose_ridge,
    fit_kernel_regression,
    output_kernels,
    ridge_grid,
    right_answers,
)
from ntkjax.ntk.stability import kernel_stability
from ntkjax.pipeline.load import Loaded
from ntkjax.training import TrainConfig, fit, saved_params
from ntkjax.types import Batch, Params

F0_WEIGHTS = (1.0, 0.1, 0.01, 0.0)
"""Candidates for how much f_0 weighs against the targets (1 / "f_0 scaling" of Malladi et al. 2023)."""


@dataclasses.dataclass(frozen=True)
class _Run:
    """A run that is measured along its training."""

    study: Study
    model: LanguageModel
    arm: Arm
    seed: int
    train: Loaded
    start: Params
    path: Path

    @property
    def title(self) -> str:
        """For progress bars."""
        return f"{self.arm.label}, seed {self.seed}"

    @property
    def config(self) -> TrainConfig:
        """Of this run's training: a checkpoint at the end of every epoch, all kept; padded lengths that seeds share."""
        train = self.study.config.train
        lengths = tuple(bucket_lengths(np.asarray(self.study.data.tokens.lengths), train.max_buckets))
        own = {"learning_rate": self.arm.learning_rate, "save_every": None, "keep_checkpoints": None}
        return dataclasses.replace(train, buckets=train.buckets or lengths, **own)

    @property
    def choices(self) -> ChoiceOutputs:
        """The outputs of a question."""
        return ChoiceOutputs(self.model.states_fn, self.model.head_fn, self.study.config.outputs)

    @functools.cached_property
    def f0_of_test(self) -> np.ndarray:
        """f_0 of the test questions [n, C]."""
        assert self.study.test is not None
        return _choices_of(self, self.study.test)(self.choices, self.start)


def follow(study: Study, model: LanguageModel, arm: Arm, seed: int) -> dict[str, Any]:
    """Fine-tune ``arm`` with ``seed`` and measure it: the content of run.json, which a finished run is read back from.

    Returns:
      arm, seed, steps, losses, ``kernels`` {name: rows of `kernel_stability`}, ``linear`` (one row an epoch),
      ``right`` {what: bool for each test question}.
    """
    run = _begin(study, model, arm, seed)
    done = run.path / "run.json"
    if done.exists():
        return read_json(done)
    history = _train(run)
    losses = [entry["loss"] for entry in history if entry["kind"] == "train"]
    steps_per_epoch = len(losses) // study.config.epochs
    epochs = tqdm(study.config.epochs_looked_at, desc=f"kernels, {run.title}", unit="epoch", disable=not study.progress)
    measurements = [_measure(run, epoch, epoch * steps_per_epoch) for epoch in epochs]
    content = {
        "arm": arm.name,
        "label": arm.label,
        "seed": seed,
        "steps": len(losses),
        "steps_per_epoch": steps_per_epoch,
        "losses": losses,
        "kernels": {name: _stability(study, name, measurements) for name in study.config.kernels},
        "linear": [dict(one["linear"]) for one in measurements],
        "right": {name: measurements[-1][f"right/{name}"].tolist() for name in _judged(study)},
    }
    if study.test is not None:
        content["right"]["base"] = measurements[0]["right/fine-tuned"].tolist()
    write_json(done, plain(content), indent=1)
    study.run.log(arm=arm.name, seed=seed, **{k: v for k, v in content["linear"][-1].items() if k != "epoch"})
    if not study.config.keep_checkpoints:
        shutil.rmtree(run.path / "training" / "checkpoints", ignore_errors=True)
    return read_json(done)


def _judged(study: Study) -> list[str]:
    return [] if study.test is None else ["fine-tuned", "linearised"]


def _begin(study: Study, model: LanguageModel, arm: Arm, seed: int) -> _Run:
    start = model.params if arm.rank is None else model.fresh_lora(seed)
    train = study.data.subset(study.training_rows(seed))
    path = folder(study, arm, seed)
    path.mkdir(parents=True, exist_ok=True)
    return _Run(study, model, arm, seed, train, start, path)


def _train(run: _Run) -> list[dict]:
    result = fit(
        run.model.nll_fn,
        run.start,
        run.train.tokens,
        run.config,
        seed=run.seed,
        out_dir=run.path / "training",
        progress=run.study.progress,
    )
    return result.history


def _measure(run: _Run, epoch: int, step: int) -> dict[str, Any]:
    """Kernels, scores and linearised outputs after ``epoch``, from disk where they are there."""
    file = run.path / f"epoch-{epoch:03d}.npz"
    if not file.exists():
        params = run.start
        if step > 0:
            params = saved_params(run.path / "training", step, run.start, run.config)
        measured = _kernels(run, params, epoch) | _linear(run, params, epoch, step)
        write_npz(file, measured)
    with np.load(file) as saved:
        arrays = {name: saved[name] for name in saved.files}
    return arrays | {"linear": json.loads(str(arrays["linear"])), "step": step}


def _kernels(run: _Run, params: Params, epoch: int) -> dict[str, np.ndarray]:
    """The kernel of the probe examples, and the scores of the pool where there is one, for every name."""
    study, model, tables = run.study, run.model, {}
    probe = _probe(run)
    functions = KernelFunctions(model.hidden_fn, model.head_fn, model.nll_fn, model.sum_logits_fn)
    for name in study.config.kernels:
        kernel = build(name, functions, params, seed=study.config.seed)
        matrix = kernel_matrix(kernel, params, probe, memory_budget=study.memory_budget)
        bad = np.flatnonzero(~np.isfinite(matrix).all(axis=0))
        if bad.size:
            raise NonFiniteError(f"{name} kernel after epoch {epoch} of {run.title}", bad.tolist())
        tables[f"kernel/{name}"] = matrix
        if study.pool is not None:
            tables[f"scores/{name}"] = np.asarray(
                kernel_scores(
                    kernel,
                    params,
                    _train_batches(run),
                    _pool_batches(study),
                    rows=len(study.pool),
                ).scores[:, 0],
                np.float64,
            )
    return tables


def _probe(run: _Run) -> Batch:
    study = run.study
    return run.train.tokens.collate(np.arange(study.config.probe), length=study.probe_length())


def _train_batches(run: _Run) -> list[Batch]:
    """The training examples in batches whose shapes are the same for every seed, so that seeds share programs."""
    tokens, buckets = run.train.tokens, run.config.buckets
    assert buckets is not None
    rows = min(len(tokens), max(1, run.study.config.reading.token_budget // buckets[-1]), 16)
    batches, which = [], np.searchsorted(buckets, tokens.lengths)
    for bucket, length in enumerate(buckets):
        members = np.flatnonzero(which == bucket)
        parts = [members[start : start + rows] for start in range(0, len(members), rows)]
        batches += [tokens.collate(part, rows=rows, length=length) for part in parts]
    return batches


def _linear(run: _Run, params: Params, epoch: int, step: int) -> dict[str, np.ndarray]:
    """How the linearised model compares with the fine-tuned one after ``epoch``."""
    probe, start = _probe(run), run.start
    logits = CentredOutput(run.model.apply_fn)
    row: dict[str, Any] = {"epoch": epoch, "step": step}
    row["distance"], row["relative_distance"] = parameter_distance(params, start)
    linear = evaluate(linearise(logits, start), params, probe)
    _add_error(row, "logits", evaluate(logits, start, probe), linear, evaluate(logits, params, probe))
    tables: dict[str, np.ndarray] = {}
    test = run.study.test
    if test is not None:
        of = _choices_of(run, test)
        f0, f = run.f0_of_test, of(run.choices, params)
        linear = of(linearise(run.choices, start), params)
        _add_error(row, "choices", f0, linear, f)
        targets = centred_targets(test.gold, test.valid)
        for name, outputs in (("fine-tuned", f), ("linearised", linear)):
            tables[f"right/{name}"] = right_answers(outputs, targets, test.valid)
            row[f"accuracy {name}"] = float(tables[f"right/{name}"].mean())
        row["same answer"] = accuracy(linear, np.where(test.valid, f, -np.inf), test.valid)
    return tables | {"linear": np.array(json.dumps(plain(row)))}


def _add_error(row: dict[str, Any], what: str, f0: Any, linear: Any, f: Any) -> None:
    for name, value in dataclasses.asdict(linearisation_error(f0, linear, f)).items():
        row[f"{what} {name}"] = value


def _choices_of(run: _Run, asked: Questions) -> Callable[[Any, Params], np.ndarray]:
    budget = run.study.config.reading.token_budget
    return lambda fn, params: choice_outputs(fn, params, asked.rows, token_budget=budget)


def _pool_batches(study: Study) -> Any:
    """The pool in batches of at most as many shapes as training has."""
    assert study.pool is not None
    budget = study.config.reading.token_budget
    return study.pool.tokens.batches(token_budget=budget, max_buckets=study.config.train.max_buckets)


def _stability(study: Study, name: str, measurements: list[dict[str, Any]]) -> list[dict[str, Any]]:
    scores = [one[f"scores/{name}"] for one in measurements] if study.pool is not None else None
    rows = kernel_stability(
        [one[f"kernel/{name}"] for one in measurements],
        [one["step"] for one in measurements],
        scores=scores,
        top=study.config.top,
    )
    return [{"epoch": epoch, **row} for epoch, row in zip(study.config.epochs_looked_at, rows)]


def regress(study: Study, model: LanguageModel, arm: Arm, seed: int) -> dict[str, Any]:
    """Kernel regression over the choices with the kernel before training, for each formula; kept in regression.json.

    The ridge and the weight of f_0 come from cross-validation on the training questions alone, by accuracy and then
    squared error.

    Returns:
      parameters, seed, questions, and ``formulas``: what each chose, how accurate it was, and ``right``, a bool for
      each test question.
    """
    path = study.run.path / "regression" / arm.parameters / f"seed-{seed}.json"
    if path.exists():
        return read_json(path)
    run, test = _begin(study, model, arm, seed), study.test
    assert test is not None
    train = as_questions(study.config, model, run.train.records)
    if train is None:
        raise ConfigError("kernel regression: no training example has choices and an answer; leave --formulas empty")
    train = train.padded(max(train.valid.shape[1], test.valid.shape[1]))
    test = test.padded(train.valid.shape[1])
    kernels = {
        where: output_kernels(
            run.choices,
            run.start,
            x1,
            x2,
            formulas=study.config.formulas,
            memory_budget=study.memory_budget,
            progress=study.progress and f"{arm.parameters}, seed {seed}: {where} kernels",
        )
        for where, x1, x2 in (("training", train.rows, None), ("test", test.rows, train.rows))
    }
    f0, f0_test = (_choices_of(run, asked)(run.choices, run.start) for asked in (train, test))
    regressions = {}
    for formula in study.config.formulas:
        kernel, cross = (as_matrix(kernels[where][formula]) for where in ("training", "test"))
        regressions[formula] = _regression(train, test, kernel, cross, f0, f0_test, seed)
    content = {"parameters": arm.parameters, "seed": seed, "questions": len(train), "formulas": regressions}
    write_json(path, plain(content), indent=1)
    return read_json(path)


def _regression(
    train: Questions,
    test: Questions,
    kernel: np.ndarray,
    cross: np.ndarray,
    f0: np.ndarray,
    f0_test: np.ndarray,
    seed: int,
) -> dict[str, Any]:
    """One formula: choose, fit on all training questions, predict the test questions."""
    n, targets = len(train), centred_targets(train.gold, train.valid)
    column = lambda values: values.reshape(-1, 1)
    chosen = choose_ridge(
        kernel, column(targets), column(f0), ridges=ridge_grid(kernel, n), f0_weights=F0_WEIGHTS, examples=n,
        valid=train.valid, seed=seed, criterion="accuracy",
    )  # fmt: skip
    model = fit_kernel_regression(
        kernel, column(targets), column(f0), ridge=chosen.ridge, f0_weight=chosen.f0_weight, examples=n
    )
    fitted = model.predict(kernel, column(f0)).reshape(f0.shape)
    predicted = model.predict(cross, column(f0_test)).reshape(f0_test.shape)
    best = next(r for r in chosen.table if (r["ridge"], r["f0_weight"]) == (chosen.ridge, chosen.f0_weight))
    return {
        "ridge": chosen.ridge,
        "relative_ridge": chosen.ridge * n / float(np.mean(np.diag(kernel))),
        "f0_weight": chosen.f0_weight,
        "at_edge": chosen.at_edge,
        "cross_validated": best["accuracy"],
        "train_accuracy": accuracy(fitted, targets, train.valid),
        "right": right_answers(predicted, centred_targets(test.gold, test.valid), test.valid).tolist(),
    }
