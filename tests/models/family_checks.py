"""What holds for every family: one function a check, used by the tests and by the parity table (`parity_table.py`).

A case is a checkpoint in tests/golden, a setting of one family; a case that is added there is checked without more.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

from ntkjax.models import LanguageModel, LoraConfig, ModelConfig, generate, load_lm
from ntkjax.models.export import save_merged
from ntkjax.models.functions import forward, position_mask, project
from ntkjax.models.load import read_config
from ntkjax.models.peft import adapter_lora_config, load_adapter, save_adapter
from ntkjax.ntk import KernelFunctions, build, kernel_scores
from ntkjax.types import Batch

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
CASES: dict[str, dict] = json.loads((GOLDEN / "golden.json").read_text())
VOCAB = 96


@functools.cache
def family_of_case(name: str) -> str:
    """The family of a checkpoint."""
    return read_config(GOLDEN / name).family


def cases_by_family() -> dict[str, list[str]]:
    """Family -> its checkpoints, in the order in which they were added."""
    found: dict[str, list[str]] = {}
    for name in CASES:
        found.setdefault(family_of_case(name), []).append(name)
    return found


@functools.cache
def load_case(name: str) -> LanguageModel:
    """The checkpoint in float32; with its PEFT adapter where it has one."""
    adapter = GOLDEN / name / "adapter"
    if not adapter.exists():
        return load_lm(GOLDEN / name, lora=None)
    model = load_lm(GOLDEN / name, lora=adapter_lora_config(adapter))
    return model.with_params(load_adapter(adapter, model))


def logit_difference(name: str) -> tuple[float, float]:
    """Largest difference from torch's logits, and the largest logit."""
    case, expected = CASES[name], load_file(GOLDEN / "logits.safetensors")[name]
    logits = np.asarray(load_case(name).logits(np.asarray(case["tokens"], np.int32)))
    assert logits.dtype == np.float32
    return float(np.abs(logits[:, case["positions"]] - expected).max()), float(np.abs(expected).max())


def greedy_tokens(name: str) -> tuple[list[list[int]], list[list[int]]]:
    """Ours, in one batch with a cache, and torch's continuations of prompts of different lengths."""
    prompts = CASES[name]["prompts"]
    new = len(prompts[0]["continuation"])
    got = generate(load_case(name), {}, [p["prompt"] for p in prompts], max_new_tokens=new)
    return got, [p["continuation"] for p in prompts]


def adapted(folder: Path, seed: int = 5) -> LanguageModel:
    """The checkpoint with an adapter on every linear layer, all its factors random."""
    model, random = load_lm(folder, lora=LoraConfig(rank=2, alpha=3.0)), np.random.default_rng(seed)
    return model.with_params(
        jax.tree.map(lambda x: jnp.asarray(0.1 * random.normal(size=x.shape), x.dtype), model.lora)
    )


def tokens(seed: int = 0, rows: int = 2, length: int = 14) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCAB, (rows, length)).astype(np.int32)


def written_difference(name: str, folder: Path) -> tuple[float, float]:
    """Largest difference of the logits after the adapter was written and read, and after it was merged and read."""
    model = adapted(GOLDEN / name)
    ours = np.asarray(model.logits(tokens()))
    save_adapter(folder / "adapter", model, model.lora)
    again = load_lm(GOLDEN / name, lora=adapter_lora_config(folder / "adapter"))
    again = again.with_params(load_adapter(folder / "adapter", again))
    save_merged(folder / "merged", model, {})
    merged = load_lm(folder / "merged", lora=None)
    assert merged.config == model.config
    return tuple(float(np.abs(np.asarray(m.logits(tokens())) - ours).max()) for m in (again, merged))  # type: ignore


def config_round_trip(name: str) -> tuple[ModelConfig, ModelConfig]:
    """The configuration, and the same written and read."""
    config = load_case(name).config
    return config, ModelConfig.from_hf(json.loads(json.dumps(config.to_hf())))


def batch(seed: int, rows: int, length: int = 12) -> Batch:
    """Prompts of 4 tokens, answers of different lengths, padding on the right."""
    lengths = np.asarray([length - i for i in range(rows)], np.int32)
    place = np.arange(length)[None]
    mask = (place >= 4) & (place < lengths[:, None])
    return Batch(tokens(seed, rows, length), mask, lengths, np.arange(rows, dtype=np.int32))


def pooled(model: LanguageModel, params, of: Batch) -> jax.Array:
    """The outputs of the kernels ``sum_logits`` and ``loss`` by their definition from all logits, [2, B]."""
    weights = model.with_params(params).params
    states, _ = forward(model.spec, weights, jnp.asarray(of.tokens))
    logits, mask = project(model.spec, weights, states), position_mask(of, "response")
    targets = jnp.pad(jnp.asarray(of.tokens)[:, 1:], ((0, 0), (0, 1)))
    loss = -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]
    values = jnp.where(mask[None], jnp.stack([logits.sum(-1), loss]), jnp.float32(0))
    return values.sum(2) / mask.sum(1).astype(jnp.float32)[None]


def score_difference(name: str) -> float:
    """Largest difference between forward-mode scores and products of explicit gradients, relative to the largest."""
    model, domain, pool = adapted(GOLDEN / name), batch(1, 3), batch(2, 3)
    functions = KernelFunctions(model.hidden_fn, model.head_fn({}), model.nll_fn, model.sum_logits_fn)
    jacobian = jax.jit(lambda p, of: jax.jacrev(lambda q: pooled(model, q, of))(p))
    rows = lambda of: np.concatenate(
        [np.asarray(x, np.float64).reshape(2, len(of.tokens), -1) for x in jax.tree.leaves(jacobian(model.lora, of))], 2
    )
    of_pool, of_domain, worst = rows(pool), rows(domain), 0.0
    for i, kernel in enumerate(("sum_logits", "loss")):
        expected = of_pool[i] @ of_domain[i].mean(0)
        built = build(kernel, functions, model.lora, seed=0)
        got = np.asarray(kernel_scores(built, model.lora, [domain], [pool], rows=3).scores[:, 0])
        worst = max(worst, float(np.abs(got - expected).max() / np.abs(expected).max()))
    return worst


def cached_and_whole(name: str) -> tuple[list[int], list[int]]:
    """A continuation with the cache, and the largest logits of the whole sequence at each of its places."""
    model, prompt = load_case(name), CASES[name]["prompts"][1]["prompt"]
    got = generate(model, {}, [prompt], max_new_tokens=8)[0]
    logits = np.asarray(model.logits(np.asarray([prompt + got], np.int32)))[0]
    return got, logits[len(prompt) - 1 : -1].argmax(-1).tolist()


def packed_difference(name: str) -> float:
    """Largest difference between the logits of choices packed behind one prompt and those of rows of their own."""
    model, prompt = load_case(name), [3, 4, 5, 6, 7, 8]
    choices = [[6, 7, 1, 2], [8, 9, 3]]
    packed = jnp.asarray([prompt + choices[0] + choices[1]], jnp.int32)
    places = jnp.asarray([[*range(10), 6, 7, 8]], jnp.int32)
    segments = jnp.asarray([[0] * 6 + [1] * 4 + [2] * 3], jnp.int32)
    extents = jnp.full_like(packed, 10)  # where frequencies depend on it, both choices are on one side
    run = jax.jit(functools.partial(forward, model.spec))
    states, _ = run(model.params, packed, places, segments=segments, extents=extents)
    logits, worst = project(model.spec, model.params, states), 0.0
    for choice, at in zip(choices, (6, 10)):
        row = np.zeros((1, 10), np.int32)  # padded on the right to one length
        row[0, : 6 + len(choice)] = prompt + choice
        alone = np.asarray(model.logits(row))[0, 6 : 6 + len(choice)]
        worst = max(worst, float(np.abs(np.asarray(logits)[0, at : at + len(choice)] - alone).max()))
    return worst


def torch_differences(name: str, folder: Path) -> dict[str, float]:
    """Largest differences from torch's logits: under PEFT with the adapter that we wrote, of the merged model that we
    wrote, and in a batch that is padded on the right (at the real places).
    """
    import peft
    import torch
    import transformers

    def load(path: Path, adapter: Path | None = None):
        model = transformers.AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, attn_implementation="eager"
        )
        return (peft.PeftModel.from_pretrained(model, adapter) if adapter else model).eval()

    def logits(model, ids: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
        given = {} if mask is None else {"attention_mask": torch.tensor(mask).long()}
        with torch.no_grad():
            return model(torch.tensor(ids).long(), **given).logits.numpy()

    model, ids = adapted(GOLDEN / name), tokens(rows=2, length=20)
    ours, real = np.asarray(model.logits(ids)), np.arange(20)[None] < np.asarray([[20], [9]])
    save_adapter(folder / "adapter", model, model.lora)
    save_merged(folder / "merged", model, {})
    merged = load(folder / "merged")
    apart = lambda theirs: np.abs(ours - theirs)
    return {
        "peft": float(apart(logits(load(GOLDEN / name, folder / "adapter"), ids)).max()),
        "export": float(apart(logits(merged, ids)).max()),
        "padded": float(apart(logits(merged, ids, real))[real].max()),
    }
