"""A selection from options: the selector, its problem, and the choice of N pool examples."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ntkjax.ahead import Program
from ntkjax.errors import ConfigError
from ntkjax.job import barrier, is_primary
from ntkjax.models import LanguageModel
from ntkjax.parallel import describe_mesh
from ntkjax.pipeline.inputs import adapter_digests, model_digests
from ntkjax.pipeline.load import Loaded
from ntkjax.pipeline.options import DataOptions, SelectorOptions, check_method, part_of
from ntkjax.pipeline.passes import Passes
from ntkjax.pipeline.sample import Sampler
from ntkjax.pipeline.selection_io import SelectedFormat, read_selection, write_selection
from ntkjax.pipeline.versions import package_version
from ntkjax.pipeline.warmup import WarmUp, needs_checkpoints, warm_up
from ntkjax.selection import METHODS, Selection, SelectionProblem, Selector, described
from ntkjax.selection.base import check_size
from ntkjax.selection.diversity import diversify
from ntkjax.training import TrainConfig, step_program
from ntkjax.types import Params


@dataclasses.dataclass(frozen=True)
class ChoiceSettings:
    """How a choice is made, besides its method.

    Attributes:
      n: N, pool examples to choose.
      data: the token budget of a batch.
      out: the folder of the selection.
      shared: a folder in which many selections keep what does not depend on the method (embeddings, gradient features);
        None: each in its own ``out``. Selections that run at the same time need folders of their own.
      selected_format: how the selected records are written (see `ntkjax.pipeline.selection_io.write_selected`).
      tracker: where the numbers of long passes go besides passes.jsonl, a name of `ntkjax.training.trackers.TRACKERS`.
    """

    n: int
    seed: int
    data: DataOptions
    out: Path
    shared: Path | None = None
    selected_format: SelectedFormat = "original"
    progress: bool = True
    tracker: str = "none"


def choose(
    model: LanguageModel,
    params: Params,
    domain: Loaded,
    pool: Loaded,
    options: SelectorOptions,
    settings: ChoiceSettings,
    *,
    warmup: TrainConfig | WarmUp | None,
) -> Selection:
    """Warm up, select, and write scores.parquet, selected.jsonl, selection.json and the warmed-up adapter into
    ``settings.out``.

    A selection that is there already is read back instead; one that was stopped goes on from its finished rows.
    That it is of the same inputs is for the caller to know: from inputs.json of its run directory, or because the
    folder is named from them.

    Args:
      params: theta before warm-up.
      warmup: settings of the warm-up on the domain (paper: LoRA on D before scoring); or a warm-up made before (see
        `ntkjax.pipeline.warmup.warm_up`, with ``checkpoints`` where the method `needs_checkpoints`) from ``params``;
        None for none.

    Raises:
      ConfigError: a method that looks at the warm-up, and none to look at.
    """
    out, seed, progress = settings.out, settings.seed, settings.progress
    # selection.json is written last: where it is, the selection is whole.
    chosen_before = (out / "selection.json").exists()
    barrier("selection to be made")  # all have looked before the first writes it
    if chosen_before:
        return read_selection(out)
    selector = make_selector(options)
    check_size(settings.n, len(pool))  # before the warm-up, which takes time
    check_warmup(options, given=warmup is not None)
    selector.check_installed()
    out.mkdir(parents=True, exist_ok=True)
    if isinstance(warmup, TrainConfig):
        keep = needs_checkpoints(options)
        warmup = warm_up(model, params, domain, warmup, seed=seed, out=out, progress=progress, checkpoints=keep)
    warmed = WarmUp(params) if warmup is None else warmup
    problem = problem_of(
        model, warmed.params, domain, pool,
        n=settings.n, data=settings.data, seed=seed, work_dir=out / "rows", progress=progress,
    )  # fmt: skip
    start = None if warmup is None else params
    with contextlib.ExitStack() as stack:
        told = None
        if is_primary():
            shown = {"method": options.method, "n": settings.n, "seed": seed, **method_options(options)}
            told = stack.enter_context(Passes(out, settings.tracker, shown)).told
        problem = dataclasses.replace(
            problem, shared_dir=settings.shared, checkpoints=warmed.checkpoints, start_params=start, told=told
        )
        chosen = diversify(
            selector(problem),
            problem,
            diversity=options.diversity,
            factor=options.diversity_factor,
            kernel=options.diversity_kernel,
            sketch=options.sketch,
            size=options.sketch_size,
        )
    result = described(chosen, pool.tokens)
    write_selection(out, result, pool, settings.selected_format)
    return result


def choice_programs(
    model: LanguageModel,
    params: Params,
    domain: Loaded,
    pool: Loaded,
    options: SelectorOptions,
    settings: ChoiceSettings,
    *,
    warmup: TrainConfig | None,
) -> Iterator[Program]:
    """The programs of `choose` with these arguments, as far as its method tells them (`ntkjax.ahead`)."""
    if warmup is not None:
        yield step_program(model.nll_fn, params, domain.tokens, warmup)
    shown = {"n": settings.n, "data": settings.data, "seed": settings.seed, "progress": False}
    yield from make_selector(options).programs(problem_of(model, params, domain, pool, work_dir=None, **shown))


def check_warmup(options: SelectorOptions, *, given: bool) -> None:
    """Raise ConfigError where the method looks at the warm-up's epochs, or its start, and there is no warm-up."""
    epochs, start = needs_checkpoints(options), make_selector(options).uses_start
    if (epochs or start) and not given:
        what = "the epochs of the warm-up" if epochs else "the model before and after the warm-up"
        raise ConfigError(
            f"--method {options.method} looks at {what}, and --skip-warmup leaves none; leave out --skip-warmup, or "
            "choose another method"
        )


def make_selector(options: SelectorOptions) -> Selector:
    """The method of ``options`` with the options that it has.

    Raises:
      ConfigError: no such method; options out of range, or that cannot be had together.
    """
    return part_of(options, METHODS[check_method(options.method)])


def method_options(options: SelectorOptions) -> dict[str, Any]:
    """The options that the method ``options.method`` has, by name."""
    return dataclasses.asdict(part_of(options, METHODS[options.method]))


def problem_of(
    model: LanguageModel,
    params: Params,
    domain: Loaded,
    pool: Loaded,
    *,
    n: int,
    data: DataOptions,
    seed: int,
    work_dir: Path | None,
    progress: bool,
) -> SelectionProblem:
    """The selection problem as the methods see it: functions, parameters and tokens."""
    head_is_trained = "head" in params or "embed" in params
    return SelectionProblem(
        hidden_fn=model.hidden_fn,
        head=model.head_fn if head_is_trained else model.head_fn({}),
        nll_fn=model.nll_fn,
        embed_fn=model.embed_fn,
        params=params,
        domain=domain.tokens,
        pool=pool.tokens,
        n=n,
        token_budget=data.token_budget,
        seed=seed,
        work_dir=work_dir,
        manifest={}
        if work_dir is None
        else {
            **fingerprints(model, params),
            "domain": domain.tokens.fingerprint,
            "pool": pool.tokens.fingerprint,
            "token_budget": data.token_budget,
            "mesh": describe_mesh(model.mesh),
        },
        progress=progress and is_primary(),
        domain_texts=domain.records.texts,
        pool_texts=pool.records.texts,
        weighted_embed_fn=model.output("weighted_embed"),
        entropy_fn=model.entropy_fn,
        margin_fn=model.margin_fn,
        error_fn=model.error_fn,
        sample_fn=Sampler(model, params, pool.tokens),
        sum_logits_fn=model.sum_logits_fn,
        states_fn=model.states_fn,
    )


def fingerprints(model: LanguageModel, params: Params) -> dict[str, str | None]:
    """What scores depend on besides data and options: the package, the frozen weights, the adapter (None: all the
    weights are trained, and are the model)."""
    own = model.with_params(params)
    weights = model_digests(own)
    return {
        "ntkjax": package_version(),
        "model": f"{weights['weights']}/{weights['configuration']}",  # the tokenizer is in the digests of the data
        "adapter": "/".join(adapter_digests(own, own.lora).values()) or None,
    }
