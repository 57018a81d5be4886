"""Scores of the real model with LoRA, in float32, against per-example gradients of torch and peft in float64,
tokenised by transformers' chat template; skipped where torch, the model (`make real-model`) or ../shared/data is
missing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from ntkjax.data import TokenisedDataset, read_records, tokenise  # noqa: E402
from ntkjax.errors import CheckpointError  # noqa: E402
from ntkjax.models import LoraConfig, load_lm, save_adapter  # noqa: E402
from ntkjax.models.real import real_directory  # noqa: E402
from ntkjax.ntk import KernelFunctions, build, kernel_scores  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
KERNELS = ("sum_logits", "loss")
DOMAIN, POOL, LONGEST = 16, 10, 200

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """torch's threads wait for each other by spinning: on two cores with other work an example took minutes with two of
    them, and 2.3 seconds of one core with one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def directory() -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        try:
            return real_directory().resolve()
        except CheckpointError as error:
            pytest.skip(f"make real-model: {error}")


def first(paths: list[Path], tokenizer, count: int) -> TokenisedDataset:
    """The first ``count`` records of at most LONGEST tokens."""
    data = tokenise(read_records([str(path) for path in paths], limit=10 * count), tokenizer, max_length=2048)
    rows = [row for row in range(len(data)) if len(data.tokens(row)[0]) <= LONGEST][:count]
    assert len(rows) == count
    return data.subset(np.array(rows))


def torch_gradients(model, tokenizer, data: TokenisedDataset) -> Iterator[dict[str, torch.Tensor]]:
    """For each example the gradient of both outputs, in float64, by name of the kernel."""
    trained = [p for p in model.parameters() if p.requires_grad]
    for row in range(len(data)):
        example = data.records[row]
        chat = [{"role": "user", "content": example.prompt}, {"role": "assistant", "content": example.response}]
        ids = tokenizer.apply_chat_template(chat, return_dict=True)["input_ids"]
        start = len(tokenizer.apply_chat_template(chat[:1], add_generation_prompt=True, return_dict=True)["input_ids"])
        stop = len(ids) - ids[::-1].index(tokenizer.eos_token_id)  # the end token is learned, the line break is not
        assert data.tokens(row)[0].tolist() == ids[:stop]
        logits = model(torch.tensor([ids[:stop]])).logits[0, start - 1 : stop - 1]
        outputs = {
            "sum_logits": logits.sum(-1).mean(),
            "loss": torch.nn.functional.cross_entropy(logits, torch.tensor(ids[start:stop])),
        }
        yield {
            name: torch.cat([g.reshape(-1).double() for g in torch.autograd.grad(output, trained, retain_graph=True)])
            for name, output in outputs.items()
        }


def test_scores_equal_torch_s_per_example_gradients(directory: Path, shared_dir: Path, tmp_path: Path) -> None:
    """s_j = <mean gradient of the domain, gradient of j>, 16 and 10 examples, every factor of the adapter non-zero."""
    model = load_lm(directory, lora=LoraConfig(rank=16, alpha=32.0))
    random = np.random.default_rng(0)
    noise = jax.tree.map(lambda x: jax.numpy.asarray(0.02 * random.normal(size=x.shape), x.dtype), model.lora)
    model = model.with_params(noise)
    domain = first([shared_dir / "data/finance/train.jsonl"], model.tokenizer, DOMAIN)
    pool = first([shared_dir / "data/pool/cot-00.jsonl"], model.tokenizer, POOL)
    functions = KernelFunctions(model.hidden_fn, model.head_fn({}), model.nll_fn)
    ours = {}
    for name in KERNELS:
        batches = [data.batches(token_budget=2048) for data in (domain, pool)]
        found = kernel_scores(build(name, functions, model.lora, seed=0), model.lora, *batches, rows=POOL)
        ours[name] = np.asarray(found.scores[:, 0], np.float64)

    save_adapter(tmp_path / "adapter", model, model.lora)
    # In float64: torch's own float32 is 3e-5 of the largest score away from it where the output is the loss.
    base = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True).eval().double()
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    mean: dict[str, torch.Tensor] = {}
    for gradient in torch_gradients(theirs, tokenizer, domain):
        mean = {name: value / DOMAIN + mean.get(name, 0) for name, value in gradient.items()}
    scores = [
        {name: float(mean[name] @ value) for name, value in gradient.items()}
        for gradient in torch_gradients(theirs, tokenizer, pool)
    ]
    for name in KERNELS:
        expected = np.array([score[name] for score in scores])
        error = np.abs(ours[name] - expected)
        print(f"{name}: largest relative difference {(error / np.abs(expected)).max():.2g}, "
              f"relative to the largest score {error.max() / np.abs(expected).max():.2g}; "
              f"scores {np.abs(expected).min():.3g} to {np.abs(expected).max():.3g}")  # fmt: skip
        assert error.max() < 1e-5 * np.abs(expected).max()
        assert (error / np.abs(expected)).max() < 1e-5
