"""The recipe of ``tiny-lm/``, the model of `ntkjax demo`: a Qwen3-shaped decoder pre-trained on generated text.

    python -m ntkjax.assets.make_tiny_lm --out DIR

It learns the language and the format of the planted task family at a lower competence: questions about all skills, but
only a fixed third of each number skill's arguments, shorter lists, and never the wordings of the domain (skills.py).
So it can read a pool example and half knows every skill, and what it lacks is what the pool can teach.

Runtime: 7 minutes on 4 busy cores (1,800 steps of 96 rows). Last training loss: 0.15 nats, nearly all of it from the
quarter of rows that also count their prompt, whose names and numbers nobody can foresee; 0.008 nats per response token
on newly drawn text of the same kind, 0.25 on the pool. Accuracy on the domain, four choices each: 35% to 42% over eight
tasks (chance 25%). The same seed gives the same model on one machine; on another, float32 sums round differently.
Size: 0.45 MB (198 thousand parameters in float16, and the tokenizer).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from ntkjax.assets.planted import pretraining_rows
from ntkjax.models import LanguageModel, ModelConfig, init_lm
from ntkjax.models.export import save_merged
from ntkjax.rng import numpy_rng
from ntkjax.types import Batch

HELD_OUT_NLL = 0.03
"""Bound on the mean NLL of newly drawn pre-training text, nats per response token (0.008 measured)."""
BASE_DOMAIN_ACCURACY = 0.40
"""Share of the domain's test questions (four choices each) that it answers without fine-tuning."""
PAD, USER, ASSISTANT, END = "<|pad|>", "<|user|>", "<|assistant|>", "<|end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|assistant|>' if message['role'] == 'assistant' else '<|user|>' }}{{ message['content'] }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Settings of the pre-training run."""

    seed: int = 0
    rows: int = 30_000
    """Generated examples; drawn from with replacement."""
    steps: int = 1_800
    batch_size: int = 96
    length: int = 32
    """Tokens of every row; the generator stays below it (checked)."""
    learning_rate: float = 4e-3
    whole_text_share: float = 0.25
    """Share of rows trained on all their tokens; the others on their response only."""
    vocab_size: int = 1024
    hidden_size: int = 64
    num_layers: int = 3
    warmup_steps: int = 100


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE (any text goes in and comes back unchanged) with the chat template of this model."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, USER, ASSISTANT, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )


def encode(tokenizer: Any, rows: Sequence[dict], length: int) -> Batch:
    """All rows as one batch of numpy arrays [N, length]; raises ValueError where a row is longer."""
    tokens = np.full((len(rows), length), tokenizer.pad_token_id, np.int32)
    response = np.zeros((len(rows), length), bool)
    lengths = np.zeros(len(rows), np.int32)
    prompts = tokenizer([f"{USER}{row['prompt']}{END}{ASSISTANT}" for row in rows])["input_ids"]
    responses = tokenizer([f"{row['response']}{END}" for row in rows])["input_ids"]
    for i, (prompt, answer) in enumerate(zip(prompts, responses)):
        lengths[i] = len(prompt) + len(answer)
        if lengths[i] > length:
            raise ValueError(f"row {rows[i]['prompt']!r} has {lengths[i]} tokens, more than {length}")
        tokens[i, : lengths[i]] = prompt + answer
        response[i, len(prompt) : lengths[i]] = True
    return Batch(tokens, response, lengths, np.arange(len(rows), dtype=np.int32))


def draw_batch(data: Batch, recipe: Recipe, rng: np.random.Generator) -> Batch:
    """Rows with replacement; a share of them counts all tokens as response."""
    rows = rng.integers(0, len(data.lengths), recipe.batch_size)
    whole = rng.random(recipe.batch_size) < recipe.whole_text_share
    real = np.arange(recipe.length)[None, :] < data.lengths[rows][:, None]
    mask = np.where(whole[:, None], real, data.response_mask[rows])
    return Batch(data.tokens[rows], mask, data.lengths[rows], data.index[rows])


def pretrain(model: LanguageModel, data: Batch, recipe: Recipe) -> LanguageModel:
    """AdamW on the mean NLL of ``draw_batch``, cosine schedule with warm-up; prints the loss every 100 steps."""
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, recipe.learning_rate, recipe.warmup_steps, recipe.steps, 0.05 * recipe.learning_rate
    )
    optimiser = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98, weight_decay=0.05))

    @jax.jit
    def step(nll_fn, params, state, batch):
        loss, grads = jax.value_and_grad(lambda p: jnp.mean(nll_fn(p, batch)))(params)
        with jax.numpy_dtype_promotion("standard"):  # optax raises floats to integer powers
            updates, state = optimiser.update(grads, state, params)
            return optax.apply_updates(params, updates), state, loss

    nll_fn, params = model.nll_fn, model.params
    state, rng, start = optimiser.init(params), numpy_rng(recipe.seed, "tiny-lm", "order"), time.perf_counter()
    for i in range(recipe.steps):
        params, state, loss = step(nll_fn, params, state, draw_batch(data, recipe, rng))
        if i % 100 == 0 or i == recipe.steps - 1:
            print(f"step {i} loss {float(loss):.4f} {time.perf_counter() - start:.0f} s", flush=True)
    return model.with_params(params)


def cast_for_storage(model: LanguageModel) -> LanguageModel:
    """The same model with its weights rounded to float16: half the bytes, 11 bits of precision."""
    spec = dataclasses.replace(model.spec, dtype="float16")
    return dataclasses.replace(model, spec=spec, params=jax.tree.map(lambda x: x.astype(jnp.float16), model.params))


def _write_tokenizer_config(directory: Path) -> None:
    """Name the tokenizer class and keep the chat template in a way that transformers 4 and 5 both read."""
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": PAD,
        "eos_token": END,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 512,
    }
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
    (directory / "chat_template.jinja").unlink(missing_ok=True)


def make(out: str | Path, recipe: Recipe = Recipe()) -> None:
    """Run the recipe and write the model directory ``out`` with recipe.json beside the weights."""
    rows = pretraining_rows(recipe.seed, recipe.rows)
    tokenizer = train_tokenizer([f"{row['prompt']}\n{row['response']}" for row in rows], recipe.vocab_size)
    config = ModelConfig(
        family="qwen3",
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.hidden_size * 8 // 3 // 16 * 16,
        num_layers=recipe.num_layers,
        num_heads=4,
        num_kv_heads=4,
        head_dim=recipe.hidden_size // 4,
        max_positions=512,
        tied=True,
        qk_norm=True,
        initializer_range=0.06,
        eos_token_ids=(tokenizer.get_vocab()[END],),
        pad_token_id=tokenizer.get_vocab()[PAD],
    )
    model = init_lm(config, seed=recipe.seed, tokenizer=tokenizer)
    data = encode(tokenizer, rows, recipe.length)
    model = cast_for_storage(pretrain(model, data, recipe))
    save_merged(out, model, {})
    _write_tokenizer_config(Path(out))
    (Path(out) / "recipe.json").write_text(json.dumps(dataclasses.asdict(recipe), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--out", default=str(Path(__file__).parent / "tiny-lm"))
    parser.add_argument("--steps", type=int, default=Recipe.steps)
    arguments = parser.parse_args()
    make(arguments.out, Recipe(steps=arguments.steps))
