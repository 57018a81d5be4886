"""What a score costs, against a forward pass that embeds the same batches: part of `make bench`.

Question: how many forward passes is a forward-mode score: alone, with more directions, and from a file to a store?
Command:  python experiments/bench_score.py --model ../shared/models/cot-lm-7m --pool ../shared/data/pool/cot-01.jsonl
          (without them the embedded model and the pool of the demo; make bench runs that with the other comparisons)
Hardware: any; the ratios depend on it: small matrices keep a CPU busy with what is not a matrix product.
Models:   the checkpoint, and a Qwen3 shape of 25 M random parameters (D = 512, 9 layers) on the same tokens; LoRA of
          r = 16, all its numbers drawn, so that it is not at its start.
Expect:   the aim is 2.0 for one direction (score_over_forward), 1 + m for m, 2.2 from file to store, padding below 10%
          (on a whole pool: a sample of it has too few examples for as many lengths); README, "What was measured".

The batches are those of the first ``rows`` examples, as `select` makes them. Every round passes over all of them with
each variant in turn; a ratio is taken within a round. Both passes are jitted and compiled before.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import ratios
import tyro

import ntkjax
from ntkjax.assets import DEMO, tiny_lm_path, write_planted_task
from ntkjax.data import TokenisedDataset, read_records, tokenise
from ntkjax.models import LanguageModel, LoraConfig, ModelConfig, init_lm
from ntkjax.ntk.kernel import as_kernel
from ntkjax.ntk.outputs import sum_logits
from ntkjax.ntk.rows import Pass
from ntkjax.ntk.scores import MANY, Direction, score_batch, scores_along
from ntkjax.rng import numpy_rng
from ntkjax.selection.vote import embed_batch
from ntkjax.store import RowStore


@dataclasses.dataclass(frozen=True)
class ScoreBench:
    """Time scores against embeddings of the same batches."""

    model: str = str(tiny_lm_path())
    pool: Path | None = None
    rows: int = 256
    token_budget: int = 4096
    max_length: int = 512
    directions: tuple[int, ...] = (1, 2, 4, 8)
    rounds: int = 7
    big: bool = True
    """Also the random shape of 25 M parameters."""
    out: Path = Path("build/bench.json")


def random_shape(vocab: int) -> LanguageModel:
    """A Qwen3 shape of 25 M random parameters."""
    config = ModelConfig(
        family="qwen3", vocab_size=vocab, hidden_size=512, intermediate_size=1024, qk_norm=True, num_layers=9,
        num_heads=8, num_kv_heads=4, head_dim=64,
    )  # fmt: skip
    return init_lm(config, seed=0, lora=LoraConfig(rank=16))


def drawn(params: dict, *names: str | int) -> dict:
    """Numbers of size 0.02 in the place of ``params``, a named stream for each leaf."""
    leaves, tree = jax.tree.flatten(params)
    fresh = [
        0.02 * numpy_rng(0, "bench score", *names, i).normal(size=p.shape).astype(p.dtype) for i, p in enumerate(leaves)
    ]
    return tree.unflatten([jax.numpy.asarray(leaf) for leaf in fresh])


def passes(model: LanguageModel, batches: Sequence[Any], counts: Sequence[int]) -> dict[str, Callable[[], Any]]:
    """name -> one pass over all batches: ``forward`` embeds, ``score_m`` scores along m directions as `select` does,
    ``tangents_m`` by forward mode whatever their number."""
    params = drawn(model.lora, "params")
    kernel = as_kernel(sum_logits(model.hidden_fn, model.head_fn({})))
    along = [Direction(jax.tree.map(lambda u: u[None], drawn(params, "direction", c))) for c in range(max(counts))]
    stacked = {m: jax.tree.map(lambda *u: jax.numpy.stack(u), *along[:m]) for m in counts}
    rows = 1 + max(int(np.asarray(batch.index).max()) for batch in batches)
    runs: dict[str, Callable[[], Any]] = {
        "forward": lambda: [embed_batch(model.embed_fn, params, batch) for batch in batches]
    }
    for m in counts:
        tangents = lambda m=m: [score_batch(kernel, params, stacked[m], batch) for batch in batches]
        if m < MANY:
            runs[f"score_{m}"] = tangents
        else:  # the other way
            runs[f"score_{m}"] = lambda m=m: scores_along(kernel, params, along[:m], batches, rows=rows)
            runs[f"tangents_{m}"] = tangents
    return runs


def file_to_scores(bench: ScoreBench, model: LanguageModel, pool: Path) -> Callable[[], Any]:
    """One pass from the pool's file to scores in a store, nothing cached: read, tokenise, batch, score, write."""
    params = drawn(model.lora, "params")
    kernel = as_kernel(sum_logits(model.hidden_fn, model.head_fn({})))
    direction = Direction(jax.tree.map(lambda u: u[None], drawn(params, "direction", 0)), None)

    def run() -> np.ndarray:
        with tempfile.TemporaryDirectory() as folder:
            tokens = read(bench, model, pool, folder)
            store = RowStore.open(
                Path(folder) / "scores", rows=len(tokens), width=1, dtype=np.float32, manifest={"bench": "score"}
            )
            plan = tokens.batches(token_budget=bench.token_budget)
            return scores_along(kernel, params, [direction], plan, rows=Pass(len(tokens), store))

    return run


def read(bench: ScoreBench, model: LanguageModel, pool: Path, cache: str) -> TokenisedDataset:
    """The first rows of the pool, read and tokenised into ``cache``."""
    records = read_records([str(pool)], limit=bench.rows, cache_dir=cache)
    return tokenise(records, model.tokenizer, max_length=bench.max_length, cache_dir=cache)


def main(bench: ScoreBench) -> None:
    """Measure, print, and add to build/bench.json."""
    model = ntkjax.load_lm(bench.model, lora=LoraConfig(rank=16))
    pool = bench.pool
    if pool is None:
        bench = dataclasses.replace(bench, max_length=DEMO.max_length)
        pool = write_planted_task(Path("build/bench-score"), 7)["pool"]
    with tempfile.TemporaryDirectory() as folder:
        tokens = read(bench, model, pool, folder)
        plan = tokens.batches(token_budget=bench.token_budget)
        batches = list(plan)
        waste = plan.padding_waste
    runs = passes(model, batches, bench.directions) | {"file_to_scores": file_to_scores(bench, model, pool)}
    entries = {
        "score_over_forward" if name == "score_1" else f"{name}_over_forward": ratio
        for name, ratio in ratios.over("forward", runs, bench.rounds).items()
    }
    if bench.big:
        big = random_shape(model.config.vocab_size)
        runs = passes(big, batches, (1,))
        entries["score_over_forward_25m"] = ratios.over("forward", runs, max(3, bench.rounds // 2))["score_1"]
    entries["padding_waste"] = ratios.spread([waste])
    ratios.record(entries, bench.out)


if __name__ == "__main__":
    main(tyro.cli(ScoreBench))
