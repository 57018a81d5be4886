"""``ntkjax select``: warm up on the domain, score the pool, write the chosen examples, all scores and diagnostics."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import arg

from ntkjax.ahead import compiled_ahead, worthwhile
from ntkjax.commands.base import Command
from ntkjax.commands.select.forecast import SAMPLE_ROWS, Forecast, Timing, count_examples, disk_bytes, tree_bytes
from ntkjax.errors import ConfigError
from ntkjax.pipeline.cost import forward_tokens, uses_model
from ntkjax.pipeline.deduplicate import deduplicate, read_held_out, read_summary
from ntkjax.pipeline.inputs import inputs_of
from ntkjax.pipeline.load import load_data, load_model, shared_cache, trained_parameters, weights_read
from ntkjax.pipeline.options import DataOptions, DedupOptions, ModelOptions, SelectorOptions, check_used
from ntkjax.pipeline.reading import reading_of_run
from ntkjax.pipeline.run_dir import RunDir
from ntkjax.pipeline.select import ChoiceSettings, check_warmup, choice_programs, choose, make_selector
from ntkjax.pipeline.selection_io import FILES, SelectedFormat
from ntkjax.report.sections import flat_diagnostics
from ntkjax.report.tables import to_markdown
from ntkjax.selection import Selection
from ntkjax.selection.base import check_size
from ntkjax.training import STEP, TrainConfig
from ntkjax.training.trackers import TrackerName, check_tracker


@dataclasses.dataclass(frozen=True)
class SelectConfig:
    """Choose the n pool examples that the tangent kernel aligns best with the domain."""

    model: Annotated[ModelOptions, arg(name="")]
    domain: tuple[str, ...]
    """Files of the domain (JSONL, JSON, Parquet, a directory of those, or a hub id)."""
    pool: tuple[str, ...]
    """Files of the general pool."""
    n: int
    """N: examples to select (paper: 9,000)."""
    out: str
    """Run directory: scores.parquet, selected.jsonl, selection.json, duplicates.json. A stopped run goes on there."""
    selected_format: SelectedFormat = "original"
    """original: selected.jsonl holds the records as they were, with all fields, beside id, score, rank, file and line;
    ntkjax: as ntkjax reads them; parquet: selected.parquet, as they were; hf: OUT/selected for load_from_disk."""
    test: tuple[str, ...] = ()
    """Files of the test set: nothing is measured on them, but pool examples that repeat one are leakage."""
    seed: int = 0
    dry_run: bool = False
    """Time a few batches, print what the selection would take, and do nothing else."""
    skip_warmup: bool = False
    """Score with the parameters as they are, without warming up on the domain."""
    tracker: TrackerName = "none"
    data: Annotated[DataOptions, arg(name="")] = DataOptions()
    select: Annotated[SelectorOptions, arg(name="")] = SelectorOptions()
    dedup: DedupOptions = DedupOptions()
    warmup: TrainConfig = TrainConfig(epochs=1)

    def __post_init__(self):
        if self.n < 1:
            raise ConfigError(f"n must be at least 1, got {self.n}")

    @property
    def warms_up(self) -> bool:
        """Whether there is a warm-up: unless it is skipped, where something looks at the model."""
        return not self.skip_warmup and uses_model(self.select)


def select(config: SelectConfig, *, progress: bool = True) -> Selection:
    """Select as ``config`` says. (The command with ``dry_run`` is `forecast`.)

    Raises:
      UserError: unusable model, data or options; scores that are not finite; a full disk.
    """
    check_used(config.select)
    check_tracker(config.tracker, config.warmup.tracker)
    RunDir.check(config.out, "select", config)
    model = load_model(config.model, seed=config.seed)
    domain = load_data(config.domain, model, config.data)
    shared = shared_cache(config.out)
    pool = load_data(config.pool, model, config.data, shared=shared)
    make_selector(config.select).check_installed()
    check_warmup(config.select, given=not config.skip_warmup)
    check_size(config.n, len(pool))
    held_out = read_held_out(config.data, test=config.test)
    inputs = inputs_of(model, config.model, domain=domain, pool=pool, **held_out)
    RunDir.check(config.out, "select", config, inputs=inputs)  # before the search for duplicates, which takes time
    deduplicated = deduplicate(pool, domain.records, held_out, config.dedup, shared=shared, progress=progress)
    deduplicated.check_size(config.n)
    pool, run = deduplicated.pool, RunDir.create(config.out, "select", config, inputs=inputs)
    run.tell("selection.json", progress)
    deduplicated.write(run)
    settings = ChoiceSettings(
        config.n, config.seed, config.data, run.path, selected_format=config.selected_format, progress=progress,
        tracker=config.tracker,
    )  # fmt: skip
    theta = trained_parameters(model, config.model)
    warmup = config.warmup if config.warms_up else None
    asked = model, theta, domain, pool, config.select, settings
    with compiled_ahead(lambda: choice_programs(*asked, warmup=warmup), worthwhile(model.mesh)) as ahead:
        ahead.wait(STEP)
        result = choose(*asked, warmup=warmup)
    asides = {name: {"records": records.report} for name, records in held_out.items()}
    reports = {"domain": domain.report(), "pool": pool.report(), **asides}
    run.write_json("data.json", reports | weights_read(model))
    return result


def forecast(config: SelectConfig, *, progress: bool = True) -> Forecast:
    """What ``config`` would take, from the first records of each data set; makes no run directory.

    Raises:
      ConfigError: a method that does not say what it costs.
    """
    check_used(config.select)
    options, selector = config.select, make_selector(config.select)
    model = load_model(config.model, seed=config.seed)
    params = trained_parameters(model, config.model)
    domain = load_data(config.domain, model, config.data, limit=SAMPLE_ROWS)
    sample = load_data(config.pool, model, config.data, limit=SAMPLE_ROWS)
    (pool_rows, exact), (domain_rows, _) = count_examples(config.pool, sample), count_examples(config.domain, domain)
    epochs = config.warmup.epochs_over(domain_rows) if config.warms_up else 0.0
    timing = Timing(model, params, domain, sample, domain_rows, pool_rows, epochs, config.data.token_budget)
    scored, kernel = selector.scored_rows(config.n, pool_rows), selector.forward_kernel
    if kernel is not None and options.diversity == "none":
        phases = timing.forward_scores(kernel, candidates=scored if selector.stage1 == "on" else None)
    else:
        sizes = timing.sizes(scored, width=model.config.hidden_size)
        tokens = forward_tokens(selector, options, sizes, config.n)
        if tokens is None:
            raise ConfigError(
                f"--dry-run: --method {options.method} does not say what it costs; give its class `forward_tokens`"
            )
        phases = timing.counted(f"{options.method}, counted", tokens)
    disk = disk_bytes(
        sample,
        domain_rows,
        pool_rows,
        n=config.n,
        embedding=model.config.hidden_size if selector.embeds_pool else 0,
        features=selector.feature_size,
        scored=scored,
    )
    return Forecast(phases, pool_rows, exact, tree_bytes(model.params), tree_bytes(params), disk)


def describe(config: Any, result: Any) -> str:
    """Diagnostics and files of a selection, or the forecast of a dry run."""
    if config.dry_run:
        return to_markdown(result.rows()) + "\n" + result.text()
    rows = [{"diagnostic": name, "value": value} for name, value in flat_diagnostics(result.diagnostics).items()]
    chosen = f"selected {len(result.selected)} examples: {Path(config.out) / FILES[config.selected_format]}"
    return f"{to_markdown(rows)}\n{read_summary(config.out)}\n{reading_of_run(config, 'data.json')}\n{chosen}"


COMMAND = Command(SelectConfig, select, describe, divides=True, spans=True, dry_run=forecast)
