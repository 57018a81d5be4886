"""One fine-tuning run: its steps, its evaluations, and what it writes."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from ntkjax.errors import UserError
from ntkjax.parallel import data_parallel, shard_batch, spans_processes, to_host
from ntkjax.preemption import Preempted, deferred
from ntkjax.training.checkpoint import Checkpoints
from ntkjax.training.config import TrainConfig
from ntkjax.training.loss_reweighting import LossReweighting
from ntkjax.training.manifest import TrainingData
from ntkjax.training.metrics_log import MetricsLog
from ntkjax.training.mixture import EpochPlan
from ntkjax.training.optimiser import AdamW, learning_rates
from ntkjax.training.padding import Padding
from ntkjax.training.result import FitResult, Progress
from ntkjax.training.rows import RowPadding
from ntkjax.training.step import (
    StepMetrics,
    TrainState,
    cast_like,
    eval_step,
    init_state,
    leaf_dtypes,
    on_mesh,
    train_step,
    used_micro_batches,
)
from ntkjax.training.trackers import Tracker, open_tracker
from ntkjax.training.trackers.base import numbers
from ntkjax.types import Batch, Params

METRICS, CHECKPOINTS = "metrics.jsonl", "checkpoints"


def reweighting_of(config: TrainConfig) -> LossReweighting | None:
    """How the examples of a step are weighed where it is not by their tokens."""
    if config.loss_reweighting == "none":
        return None
    return LossReweighting(config.loss_reweighting, config.reweighting_temperature)


def padding_of(train: TrainingData, lengths: np.ndarray, config: TrainConfig, row_multiple: int = 1) -> Any:
    """How examples of these lengths become batches: in rows of several where the training data are packed."""
    of: Callable[..., Any] = RowPadding.of if getattr(train, "packing", False) else Padding.of
    return of(lengths, config, row_multiple)


@dataclasses.dataclass(frozen=True)
class RunningStep:
    """A step that the device works on: its number from 1, learning rate, examples, and ``metrics`` to come."""

    step: int
    rate: float
    rows: np.ndarray
    batch: Batch
    accumulation: int
    metrics: StepMetrics
    began: float


class Run:
    """One call of :func:`fit`: the state that changes from step to step, and where it is written."""

    def __init__(
        self,
        nll_fn: Callable,
        params: Params,
        train: TrainingData,
        config: TrainConfig,
        plan: EpochPlan,
        *,
        dev: TrainingData | None,
        folder: Path | None,
        extra_metrics: Callable | None,
    ):
        self.nll_fn, self.train_data, self.dev, self.config, self.plan = nll_fn, train, dev, config, plan
        self.folder, self.extra_metrics = folder, extra_metrics
        self.mesh = mesh = getattr(train, "mesh", None)
        row_multiple = data_parallel(mesh)
        self.dtypes = leaf_dtypes(params)
        self.optimiser = AdamW.of(config)
        self.reweighting = reweighting_of(config)
        self.state, self.shardings = on_mesh(init_state(params, self.optimiser), mesh)
        # A copy: every step donates the buffers of the state.
        self.best = None if dev is None else jax.tree.map(jnp.copy, self.state.params)
        of = functools.partial(padding_of, train, config=config, row_multiple=row_multiple)
        self.padding = of(plan.lengths)
        self.dev_padding = None if dev is None else of(np.asarray(dev.lengths))
        self.steps_per_epoch = plan.steps_per_epoch
        self.steps = config.steps or max(1, round(config.epochs * self.steps_per_epoch))
        self.rates = learning_rates(config, self.steps)
        self.eval_every = config.eval_every or self.steps_per_epoch
        self.save_every = config.save_every or self.steps_per_epoch
        self.progress = Progress()
        self.log = MetricsLog(None)
        self.tracker: Tracker | None = None
        self.checkpoints: Checkpoints | None = None
        self.seen_shapes: set[tuple[int, ...]] = set()
        self.ended = 0.0  # when the last step was done

    # -- where a run begins --

    def restore_or_start(self) -> None:
        """Take up the newest checkpoint, or start at step 0 with an evaluation of the given parameters."""
        if self.folder is not None:
            with self._writing():
                together = spans_processes(self.mesh)
                self.checkpoints = Checkpoints(self.folder / CHECKPOINTS, self.config.keep_checkpoints, together)
            newest = self.checkpoints.latest()
            if newest is not None:
                arrays, saved = self.checkpoints.restore(newest, self._arrays())
                self.state = TrainState(arrays["params"], arrays["opt_state"])
                self.best = arrays.get("best")
                self.progress = Progress(**saved)
            # All processes of a job read the log, as the history is part of the result; one of them writes.
            primary = jax.process_index() == 0
            with self._writing():
                self.log = MetricsLog(self.folder / METRICS, self.progress.metrics_bytes, writes=primary)
                if primary and not self.finished:
                    settings = dataclasses.asdict(self.config)
                    name, step = self.config.tracker, self.progress.step
                    self.tracker = open_tracker(name, self.folder, settings, step=step)
        # After a resume at a later step this evaluation is in the log already.
        if self.progress.step == 0:
            self.evaluate()

    @property
    def finished(self) -> bool:
        """Whether no step is left to take."""
        return self.progress.stopped_early or self.progress.step >= self.steps

    # -- the loop --

    def train(self, show: bool) -> None:
        """Take the steps that are left, evaluating and saving when due and at the end."""
        if self.finished:
            return
        first = self.progress.step
        stream = ((rows, *self.padding.collate(self.train_data, rows)) for rows in self.plan.batches(first, self.steps))
        running: RunningStep | None = None
        upcoming: Any = next(stream)
        together = spans_processes(self.mesh)
        with (
            tqdm(total=self.steps, initial=first, disable=not show, unit="step", desc="fine-tuning") as bar,
            deferred(together) as must_end,
        ):
            # One step runs ahead of what is read. Step k is sent to the device, batch k + 1 is built, and only then the
            # numbers of step k - 1 are read, which waits for them: the device always has a step to do. Where an
            # evaluation or a checkpoint is due after step k it is read too, before either, since `self.progress`, which
            # a checkpoint holds, counts the steps that were read.
            while upcoming is not None:
                behind, step = running, self.progress.step + (running is not None)
                running = self.begin_step(step, *upcoming)
                upcoming = next(stream, None)
                step, last = step + 1, step + 1 == self.steps
                ending = must_end(step)
                due = step % self.eval_every == 0, step % self.save_every == 0 or ending
                for done in (behind, running if last or any(due) else None):
                    if done is not None:
                        bar.set_postfix(loss=f"{self.end_step(done):.4f}", refresh=False)
                        bar.update()
                if not (last or any(due)):
                    continue
                running = None
                # Evaluation first, so that the checkpoint of the same step counts it: a run that goes on from there
                # neither evaluates twice nor forgets which step was best.
                if due[0] or last:
                    self.evaluate()
                if due[1] or last or self.progress.stopped_early:
                    self.save()
                if last or ending or self.progress.stopped_early:
                    self.wait_for_save()
                if self.progress.stopped_early:
                    return
                # Only now: what the next start of the command needs is on the disk.
                if ending and not last:
                    raise Preempted(f"training stopped after step {step}")

    def begin_step(self, step: int, rows: np.ndarray, batch: Batch, accumulation: int) -> RunningStep:
        """Send optimiser step ``step`` + 1 to the device, without waiting for it."""
        rate = float(self.rates[step])
        options = {"optimiser": self.optimiser, "accumulation": accumulation, "dtypes": self.dtypes}
        options |= {"shardings": self.shardings, "reweighting": self.reweighting}
        options |= {"used": used_micro_batches(batch, accumulation)}
        began = time.perf_counter()
        # From here on `self.state` is that of a step that may still be running; reading any of it waits for the step.
        self.state, metrics = train_step(self.nll_fn, self.state, shard_batch(batch, self.mesh), rate, **options)
        return RunningStep(step + 1, rate, rows, batch, accumulation, metrics, began)

    def end_step(self, running: RunningStep) -> float:
        """Wait for a step and log it; its loss. UserError where it is not finite."""
        rows, batch, metrics, step = running.rows, running.batch, running.metrics, running.step
        loss, norm = float(metrics.loss), float(metrics.grad_norm)
        now = time.perf_counter()
        # It began when it was sent, or when the step before it was done.
        seconds, self.ended = now - max(running.began, self.ended), now
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise self._not_finite(step, loss, norm, rows, batch, metrics)
        clipped = self.config.clip_norm is not None and norm > self.config.clip_norm
        tokens = int(np.sum(self.plan.lengths[rows]))
        self._count(step, tokens, seconds, clipped, (*batch.tokens.shape, running.accumulation))
        entry = {"kind": "train", "step": step, "epoch": step / self.steps_per_epoch, "loss": loss}
        entry |= {"lr": running.rate, "grad_norm": norm, "clipped": clipped, "tokens": tokens}
        entry |= {"response_tokens": int(np.sum(to_host(metrics.counts))), "tokens_per_second": tokens / seconds}
        if self.reweighting is not None:  # 1 / sum v^2: as many examples of equal weight would weigh as much
            entry["effective_examples"] = 1 / float(np.sum(np.square(to_host(metrics.weights).astype(np.float64))))
        self._append(entry)
        return loss

    def _count(self, step: int, tokens: int, seconds: float, clipped: bool, shape: tuple[int, ...]) -> None:
        self.progress.step = step
        self.progress.clipped_steps += clipped
        # The first step of each shape may compile: its time says nothing about speed.
        if shape in self.seen_shapes:
            self.progress.timed_tokens += tokens
            self.progress.timed_seconds += seconds
        self.seen_shapes.add(shape)

    def _not_finite(
        self, step: int, loss: float, norm: float, rows: np.ndarray, batch: Batch, metrics: StepMetrics
    ) -> UserError:
        nll, index = to_host(metrics.nll), np.asarray(batch.index)
        bad = index[~np.isfinite(nll) & (index >= 0)]
        who = f"examples with a non-finite loss: {self._names(bad)}; " if bad.size else ""
        return UserError(
            f"training stopped at step {step}: loss {loss}, gradient norm {norm}. {who}examples of the batch:"
            f" {self._names(rows)}. {self._kept()} Lower learning_rate (now {self.config.learning_rate}) or"
            " look at these examples"
        )

    def _names(self, rows: np.ndarray, most: int = 16) -> str:
        names = [str(self.train_data.ids[int(row)]) for row in rows[:most]]
        return ", ".join(names) + (f" and {len(rows) - most} more" if len(rows) > most else "")

    # -- evaluation --

    def evaluate(self) -> None:
        """Log dev loss and extra metrics; after step 0, keep the best and count towards patience."""
        if self.dev is None and self.extra_metrics is None:
            return
        progress, entry = self.progress, {"kind": "dev", "step": self.progress.step}
        if self.dev is not None:
            loss = self._dev_loss(self.dev)
            entry["dev_loss"] = loss
            if progress.step > 0:
                if progress.best_loss is None or loss < progress.best_loss:
                    progress.best_loss, progress.best_step, progress.stale = loss, progress.step, 0
                    self.best = jax.tree.map(jnp.copy, self.state.params)
                else:
                    progress.stale += 1
                progress.stopped_early = (
                    self.config.patience is not None
                    and progress.stale >= self.config.patience
                    and progress.step < self.steps
                )
        if self.extra_metrics is not None:
            entry |= self.extra_metrics(cast_like(self.state.params, self.dtypes))
        self._append(entry)

    def _dev_loss(self, dev: TrainingData) -> float:
        """sum_i |S_i| nll_i / sum_i |S_i| over dev, summed in float64 on the host."""
        assert self.dev_padding is not None
        total, tokens = 0.0, 0
        for rows, batch in self.dev_padding.evaluation_batches(dev):
            nll, counts = eval_step(self.nll_fn, self.state.params, shard_batch(batch, self.mesh), dtypes=self.dtypes)
            real = np.asarray(batch.index) >= 0
            nll, counts = to_host(nll).astype(np.float64)[real], to_host(counts)[real]
            if not np.all(np.isfinite(nll)):
                bad = ", ".join(str(dev.ids[int(row)]) for row in rows[~np.isfinite(nll)][:16])
                raise UserError(
                    f"evaluation after step {self.progress.step}: the loss of these dev examples is not"
                    f" finite: {bad}. {self._kept()} Lower learning_rate or look at them"
                )
            total += float(np.sum(nll * counts))
            tokens += int(np.sum(counts))
        return total / tokens

    # -- writing --

    def _append(self, entry: dict[str, Any]) -> None:
        with self._writing():
            self.log.append(entry)
            if self.tracker is not None:
                self.tracker.log(*numbers(entry))

    def _arrays(self) -> dict[str, Any]:
        arrays = {"params": self.state.params, "opt_state": self.state.opt_state}
        return arrays if self.dev is None else arrays | {"best": self.best}

    def save(self) -> None:
        """Write a checkpoint, after the metrics it counts on are safely on the disk; the steps go on meanwhile."""
        if self.checkpoints is None:
            return
        with self._writing():
            # The checkpoint says how many bytes of metrics.jsonl belong to it. Were it written first, a kill in between
            # would leave a checkpoint that counts lines which the disk does not have; this way round there are only
            # lines too many, which a resume cuts off.
            self.progress.metrics_bytes = self.log.sync()
            self.checkpoints.save(self.progress.step, self._arrays(), dataclasses.asdict(self.progress))

    def wait_for_save(self) -> None:
        """Wait until the checkpoint is on the disk."""
        if self.checkpoints is not None:
            with self._writing():
                self.checkpoints.wait()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Turn a failure to write into an error that says what is safe."""
        try:
            yield
        except OSError as error:
            raise UserError(
                f"{self.folder}: cannot write ({error.strerror or error}) after step {self.progress.step}."
                f" {self._kept()} Free space, then run the same command again to go on from there"
            ) from error

    def _kept(self) -> str:
        newest = None if self.checkpoints is None else self.checkpoints.latest()
        return (
            "No checkpoint was kept." if newest is None else f"Kept: the checkpoint of step {newest} in {self.folder}."
        )

    # -- the end --

    def result(self) -> FitResult:
        """What :func:`ntkjax.training.fit` returns."""
        progress = self.progress
        use_best = self.dev is not None and self.config.restore_best
        params = self.best if use_best else self.state.params
        return FitResult(
            params=cast_like(params, self.dtypes),
            steps=progress.step,
            best_step=progress.best_step if use_best else progress.step,
            stopped_early=progress.stopped_early,
            history=self.log.history,
            tokens_per_second=self._speed(),
            clipped_steps=progress.clipped_steps,
            mean_lr=float(np.mean(self.rates[: progress.step])),
            opt_state=self.state.opt_state,
        )

    def _speed(self) -> float:
        if self.progress.timed_seconds > 0:
            return self.progress.timed_tokens / self.progress.timed_seconds
        # Every step was the first of its shape: the time of compilation is all there is.
        lines = [line for line in self.log.history if line["kind"] == "train"]
        seconds = sum(line["tokens"] / line["tokens_per_second"] for line in lines)
        return sum(line["tokens"] for line in lines) / seconds if seconds else 0.0

    def close(self) -> None:
        """Close what is written to."""
        self.log.close()
        if self.tracker is not None:
            self.tracker.close()
        if self.checkpoints is not None:
            self.checkpoints.close()
