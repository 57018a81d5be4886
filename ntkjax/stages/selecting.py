"""``ntkjax select``: warm up, score the pool, write who was chosen and why."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tyro.conf import arg

from ntkjax.errors import ConfigError
from ntkjax.models import LanguageModel
from ntkjax.parallel import describe_mesh, is_primary
from ntkjax.selection import METHODS, NtkSelector, Selection, SelectionProblem, Selector
from ntkjax.selection.base import check_size
from ntkjax.selection.cost import passes_of, scored_rows
from ntkjax.selection.diagnostics import examples
from ntkjax.selection.diversity import diversify
from ntkjax.stages.deduplicating import deduplicate, read_held_out
from ntkjax.stages.forecasting import SAMPLE_ROWS, Forecast, Timing, count_examples, disk_bytes, tree_bytes
from ntkjax.stages.inputs import adapter_digests, inputs_of, model_digests
from ntkjax.stages.loading import Loaded, load_data, load_model, trained_parameters
from ntkjax.stages.options import DataOptions, DedupOptions, ModelOptions, SelectorOptions
from ntkjax.stages.rundir import RunDir, package_version
from ntkjax.stages.sampling import Sampler
from ntkjax.stages.selected import SelectedFormat, write_selected
from ntkjax.stages.warming import WarmUp, needs_checkpoints, warm_up
from ntkjax.store import atomic_write
from ntkjax.training import TrainConfig
from ntkjax.types import Params

ROW_GROUP = 1 << 13
SCORES = pa.schema(
    [
        ("id", pa.string()),
        ("score", pa.float64()),
        ("votes", pa.int64()),
        ("rank", pa.int64()),
        ("selected", pa.bool_()),
        ("source", pa.string()),
        ("response_tokens", pa.int32()),
        ("file", pa.string()),
        ("line", pa.int64()),
    ]
)


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
    data: Annotated[DataOptions, arg(name="")] = DataOptions()
    select: Annotated[SelectorOptions, arg(name="")] = SelectorOptions()
    dedup: DedupOptions = DedupOptions()
    warmup: TrainConfig = TrainConfig(epochs=1)

    def __post_init__(self):
        if self.n < 1:
            raise ConfigError(f"n must be at least 1, got {self.n}")


def select(config: SelectConfig, *, progress: bool = True) -> Selection | Forecast:
    """Select as ``config`` says; with ``dry_run`` forecast it instead.

    Raises:
      UserError: unusable model, data or options; scores that are not finite; a full disk.
    """
    if config.dry_run:
        return forecast(config)
    RunDir.check(config.out, "select", config)
    model = load_model(config.model, seed=config.seed)
    domain = load_data(config.domain, model, config.data)
    pool = load_data(config.pool, model, config.data)
    make_selector(config.select)
    check_warmup(config.select.method, given=not config.skip_warmup)
    check_size(config.n, len(pool))
    held_out = read_held_out(config.data, test=config.test)
    inputs = inputs_of(model, config.model, domain=domain, pool=pool, **held_out)
    RunDir.check(config.out, "select", config, inputs=inputs)  # before the search for duplicates, which takes time
    found = deduplicate(pool, domain.records, held_out, config.dedup, progress=progress)
    found.check_size(config.n)
    pool, run = found.pool, RunDir.create(config.out, "select", config, inputs=inputs)
    run.tell("selection.json", progress)
    found.write(run)
    result = choose(
        model,
        trained_parameters(model, config.model),
        domain,
        pool,
        config.select,
        n=config.n,
        warmup=None if config.skip_warmup else config.warmup,
        data=config.data,
        seed=config.seed,
        out=run.path,
        progress=progress,
        selected_format=config.selected_format,
    )
    asides = {name: {"records": records.report} for name, records in held_out.items()}
    run.write_json("data.json", {"domain": domain.report(), "pool": pool.report(), **asides})
    return result


def forecast(config: SelectConfig) -> Forecast:
    """What ``config`` would take, from the first records of each data set; makes no run directory.

    Raises:
      ConfigError: a method that does not say what it costs.
    """
    options, selector = config.select, make_selector(config.select)
    model = load_model(config.model, seed=config.seed)
    params = trained_parameters(model, config.model)
    domain = load_data(config.domain, model, config.data, limit=SAMPLE_ROWS)
    sample = load_data(config.pool, model, config.data, limit=SAMPLE_ROWS)
    (pool_rows, exact), (domain_rows, _) = count_examples(config.pool, sample), count_examples(config.domain, domain)
    epochs = 0.0 if config.skip_warmup else _epochs(config.warmup, domain_rows)
    timing = Timing(model, params, domain, sample, domain_rows, pool_rows, epochs, config.data.token_budget)
    stage1 = getattr(selector, "stage1", "off") == "on"
    scored = scored_rows(selector, config.n, pool_rows)
    one_pass = isinstance(selector, NtkSelector) and selector.one_pass
    if one_pass and options.diversity == "none":
        phases = timing.forward_scores(options.kernel, candidates=scored if stage1 else None)
    else:
        sizes = timing.sizes(scored, width=model.config.hidden_size)
        diverse = 0 if options.diversity == "none" else options.diversity_factor * config.n
        passes = passes_of(selector, sizes, diversity_rows=diverse)
        if passes is None:
            raise ConfigError(f"--dry-run: --method {options.method} does not say what it costs; give it `passes`")
        phases = timing.counted(f"{options.method}, counted", passes)
    embeds = stage1 or (getattr(selector, "uses_model", True) and not hasattr(selector, "stage1"))
    disk = disk_bytes(
        sample, domain_rows, pool_rows, n=config.n, embedding=model.config.hidden_size if embeds else 0,
        features=0 if one_pass else getattr(selector, "sketch_size", 0), scored=scored,
    )  # fmt: skip
    return Forecast(phases, pool_rows, exact, tree_bytes(model.params), tree_bytes(params), disk)


def _epochs(config: TrainConfig, rows: int) -> float:
    return float(config.epochs) if config.steps is None else config.steps * config.batch_size / rows


def choose(
    model: LanguageModel,
    params: Params,
    domain: Loaded,
    pool: Loaded,
    options: SelectorOptions,
    *,
    n: int,
    warmup: TrainConfig | None,
    data: DataOptions,
    seed: int,
    out: Path,
    progress: bool = True,
    shared: Path | None = None,
    warmed: WarmUp | None = None,
    selected_format: SelectedFormat = "original",
) -> Selection:
    """Warm up, select, and write scores.parquet, selected.jsonl, selection.json and the warmed-up adapter into ``out``.

    A selection that ``out`` already holds is read back instead; one that was stopped goes on from its finished rows.
    That it is of the same inputs is for the caller to know: from inputs.json of its run directory, or because ``out``
    is named from them.

    Args:
      params: theta before warm-up.
      warmup: settings of the warm-up on the domain (paper: LoRA on D before scoring); None for none.
      shared: a folder in which many selections keep what does not depend on the method (embeddings, gradient features);
        None: each in its own ``out``. Selections that run at the same time need folders of their own.
      warmed: a warm-up made before (see `ntkjax.stages.warming.warm_up`, with ``checkpoints`` where the method
        `needs_checkpoints`); then ``params`` and ``warmup`` are not used.
      selected_format: how the selected records are written (see `ntkjax.stages.selected.write_selected`).

    Raises:
      ConfigError: a method that looks at the warm-up's epochs, and none to look at.
    """
    if (out / "selection.json").exists():
        return read_selection(out)
    selector = make_selector(options)
    check_size(n, len(pool))  # before the warm-up, which takes time
    check_warmup(options.method, given=warmup is not None or warmed is not None)
    out.mkdir(parents=True, exist_ok=True)
    if warmed is None and warmup is not None:
        keep = needs_checkpoints(options.method)
        warmed = warm_up(model, params, domain, warmup, seed=seed, out=out, progress=progress, checkpoints=keep)
    warmed = WarmUp(params) if warmed is None else warmed
    settings = {"n": n, "data": data, "seed": seed, "work_dir": out / "rows", "progress": progress}
    problem = problem_of(model, warmed.params, domain, pool, **settings)
    problem = dataclasses.replace(problem, shared_dir=shared, checkpoints=warmed.checkpoints)
    result = diversify(
        selector(problem),
        problem,
        diversity=options.diversity,
        factor=options.diversity_factor,
        kernel=options.diversity_kernel,
        sketch=options.sketch,
        size=options.sketch_size,
    )
    if is_primary():
        write_selection(out, result, pool, selected_format)
    return result


def check_warmup(method: str, *, given: bool) -> None:
    """Raise ConfigError where the method looks at the warm-up's epochs and there is no warm-up."""
    if needs_checkpoints(method) and not given:
        raise ConfigError(
            f"--method {method} looks at the epochs of the warm-up, and --skip-warmup leaves none; leave out "
            "--skip-warmup, or choose another method"
        )


def check_method(name: str) -> str:
    """``name`` if it is a selection method.

    Raises:
      ConfigError: it is not; the message lists those there are.
    """
    if name not in METHODS:
        raise ConfigError(f"unknown selection method {name!r}; expected one of {', '.join(METHODS)}")
    return name


def make_selector(options: SelectorOptions) -> Selector:
    """The method of ``options`` with the options that it has.

    Raises:
      ConfigError: no such method; options out of range, or that cannot be had together.
    """
    return METHODS[check_method(options.method)](**method_options(options))


def method_options(options: SelectorOptions) -> dict[str, Any]:
    """The options that the method ``options.method`` has, by name."""
    names = {field.name for field in dataclasses.fields(METHODS[options.method])}
    return {name: value for name, value in dataclasses.asdict(options).items() if name in names}


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
        manifest={
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
        sample_fn=Sampler(model, params, pool.tokens),
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


def write_selection(out: Path, result: Selection, pool: Loaded, selected_format: SelectedFormat = "original") -> None:
    """scores.parquet (every pool row), the selected records (best first), and last selection.json: the mark of the
    end."""
    _write_scores(out, result, pool)
    write_selected(out, pool.records, result, selected_format)
    content = {
        "method": result.method,
        "selected": result.selected.tolist(),
        "diagnostics": result.diagnostics,
        "examples": {name: _shown(result, pool, rows) for name, rows in examples(result).items()},
    }
    atomic_write(out / "selection.json", (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def _write_scores(out: Path, result: Selection, pool: Loaded) -> None:
    """OUT/scores.parquet, ``ROW_GROUP`` rows at a time: the texts of a whole pool are never held at once."""
    chosen = np.zeros(len(pool), bool)
    chosen[result.selected] = True
    scored = result.scored
    partial = out / ".scores.parquet"
    with pq.ParquetWriter(partial, SCORES) as file:
        for start in range(0, len(pool), ROW_GROUP):
            rows = slice(start, min(start + ROW_GROUP, len(pool)))
            records = pool.records.subset(np.arange(rows.start, rows.stop))
            files, lines = pool.records.locations(np.arange(rows.start, rows.stop))
            columns = {
                "id": pa.array([str(name) for name in records.ids]),
                "score": pa.array(result.scores[rows], mask=~scored[rows]),
                "votes": pa.nulls(len(records)) if result.votes is None else pa.array(result.votes[rows]),
                "rank": pa.array(result.ranks[rows], mask=~scored[rows]),
                "selected": pa.array(chosen[rows]),
                "source": pa.array([str(name) for name in records.sources]),
                "response_tokens": pa.array(np.asarray(pool.tokens.response_lengths[rows])),
                "file": pa.array(files),
                "line": pa.array(lines),
            }
            file.write_table(pa.table(columns).cast(SCORES))
    partial.replace(out / "scores.parquet")


def _shown(result: Selection, pool: Loaded, rows: Sequence[int] | np.ndarray) -> list[dict]:
    found = [pool.records[int(row)] for row in rows]
    return [
        {
            "id": example.id,
            "source": example.source,
            "score": float(result.scores[row]),
            "rank": int(result.ranks[row]),
            "prompt": example.prompt,
            "response": example.response,
        }
        for row, example in zip(rows, found)
    ]


def read_selection(out: Path) -> Selection:
    """What ``write_selection`` wrote into ``out``."""
    content = json.loads((out / "selection.json").read_text(encoding="utf-8"))
    table = pq.read_table(out / "scores.parquet", columns=["score", "votes", "rank"])
    column = lambda name, fill: table[name].fill_null(fill).to_numpy()
    votes = None if table["votes"].null_count == len(table) else column("votes", 0)
    return Selection(
        method=content["method"],
        scores=column("score", float("nan")),
        ranks=column("rank", 0),
        selected=np.asarray(content["selected"], np.int64),
        votes=votes,
        diagnostics=content["diagnostics"],
    )
