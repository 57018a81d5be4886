"""Merged directories: the same logits after a round trip, shards, and failures that leave nothing behind."""

from __future__ import annotations

import json
import resource
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from ntkjax.errors import CheckpointError, ConfigError
from ntkjax.models import LanguageModel, LoraConfig, load_lm
from ntkjax.models.export import save_merged

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
TOKENS = np.arange(24, dtype=np.int32).reshape(2, 12)


def adapted(name: str, **options) -> LanguageModel:
    """A golden checkpoint whose adapter has both factors non-zero."""
    model = load_lm(GOLDEN / name, lora=LoraConfig(3, 6.0), **options)
    random = np.random.default_rng(0)
    noise = jax.tree.map(lambda x: 0.2 * random.normal(size=x.shape).astype(x.dtype), model.lora)
    return model.with_params(jax.tree.map(jax.numpy.asarray, noise))


@pytest.mark.parametrize("name", ["llama32-tied", "gpt2-hub"])
def test_round_trip_gives_the_same_logits(name: str, tmp_path: Path) -> None:
    """W + s A B is rounded to float32 in the file, not in the model: 1e-5 of the largest logit, as between two float32
    sums, whose rounding depends on the processor."""
    model = adapted(name)
    save_merged(tmp_path / "m", model, {})
    again = load_lm(tmp_path / "m", lora=None)
    assert again.config == model.config
    before, after = (np.asarray(m.logits(TOKENS)) for m in (model, again))
    assert np.abs(before - after).max() < 1e-5 * np.abs(before).max()
    assert not np.array_equal(*(m.params["layers"]["mlp"]["up"]["kernel"] for m in (model, again)))


@pytest.mark.parametrize("name", ["llama-biases", "qwen3"])
def test_round_trip_is_exact_in_double_precision(name: str, tmp_path: Path, x64) -> None:
    model = adapted(name, dtype="float64")
    save_merged(tmp_path / "m", model, {})
    again = load_lm(tmp_path / "m", lora=None, dtype="float64")
    before, after = (np.asarray(m.logits(TOKENS)) for m in (model, again))
    assert np.abs(before - after).max() < 1e-11


@pytest.mark.parametrize("name", ["llama3", "qwen2-tied", "gpt2"])
def test_without_an_adapter_every_tensor_is_the_source_s(name: str, tmp_path: Path) -> None:
    save_merged(tmp_path / "m", load_lm(GOLDEN / name, lora=None), {})
    source, written = (load_file(folder / "model.safetensors") for folder in (GOLDEN / name, tmp_path / "m"))
    assert written.keys() == source.keys()
    assert all(np.array_equal(written[key], source[key]) for key in source)


def test_params_are_what_is_written_and_merging_is_exact(tmp_path: Path) -> None:
    """W + (alpha / r) A B, and a weight that is not an adapter's."""
    model = adapted("llama3")
    scale = model.params["norm"]["scale"] + 1
    save_merged(tmp_path / "m", model, {"norm": {"scale": scale}})
    written, source = (load_file(d / "model.safetensors") for d in (tmp_path / "m", GOLDEN / "llama3"))
    assert np.array_equal(written["model.norm.weight"], scale)
    key = "model.layers.1.mlp.down_proj.weight"
    node = model.params["layers"]["mlp"]["down"]
    a, b = np.asarray(node["lora_a"][1], np.float64), np.asarray(node["lora_b"][1], np.float64)
    np.testing.assert_allclose(written[key], source[key] + 6.0 / 3 * (a @ b).T, atol=1e-6)


def test_bfloat16_merges_in_float32_and_is_written_in_bfloat16(tmp_path: Path) -> None:
    model = adapted("llama3", dtype="bfloat16")
    save_merged(tmp_path / "m", model, {})
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"
    again = load_lm(tmp_path / "m", lora=None, dtype="auto")
    assert again.report.dtypes == {"BF16": 21}
    node = model.params["layers"]["attention"]["q"]
    wide = [np.asarray(node[name], np.float32) for name in ("kernel", "lora_a", "lora_b")]
    expected = (wide[0] + np.float32(2) * (wide[1] @ wide[2])).astype(node["kernel"].dtype)
    got = np.asarray(again.params["layers"]["attention"]["q"]["kernel"])
    assert np.mean(got != expected) < 0.01  # a sum in another order may fall on the other side of a rounding


def test_shards_have_an_index_and_a_later_save_leaves_none_behind(tmp_path: Path) -> None:
    model = adapted("qwen3")
    save_merged(tmp_path / "m", model, {}, max_shard_size=12_000)
    index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert len(shards) > 2 and shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    sizes = {s: sum(x.nbytes for x in load_file(tmp_path / "m" / s).values()) for s in shards}
    assert max(sizes.values()) <= 12_000 and sum(sizes.values()) == index["metadata"]["total_size"]
    before = np.asarray(load_lm(tmp_path / "m", lora=None).logits(TOKENS))
    (tmp_path / "m" / "notes.txt").write_text("mine")
    save_merged(tmp_path / "m", model, {})
    assert sorted(f.name for f in (tmp_path / "m").iterdir()) == [
        "config.json",
        "model.safetensors",
        "notes.txt",
    ]
    assert np.array_equal(before, np.asarray(load_lm(tmp_path / "m", lora=None).logits(TOKENS)))
    with pytest.raises(ConfigError, match="max_shard_size = 0"):
        save_merged(tmp_path / "m", model, {}, max_shard_size=0)


def test_tokenizer_and_generation_settings_go_along(tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(GOLDEN / "gpt2", source)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(96)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1", pad_token="w2").save_pretrained(source)
    (source / "generation_config.json").write_text('{"temperature": 0.5}')
    save_merged(tmp_path / "m", load_lm(source, lora=None), {})
    assert json.loads((tmp_path / "m" / "generation_config.json").read_text()) == {"temperature": 0.5}
    again = load_lm(tmp_path / "m", lora=None)
    assert again.tokenizer.eos_token_id == 1


@pytest.mark.parametrize("existing", [False, True])
def test_a_full_disk_leaves_nothing_half_written(existing: bool, tmp_path: Path) -> None:
    """The operating system refuses to let a file grow past 20 kB, as a full disk would."""
    model = adapted("llama3")
    target = tmp_path / "m"
    if existing:
        save_merged(target, model, {})
    before = {file.name: file.read_bytes() for file in target.glob("*")}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(CheckpointError, match=r"m/model\.safetensors: cannot be written"):
            save_merged(target, model, jax.tree.map(lambda x: x + 1, model.lora))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {file.name: file.read_bytes() for file in target.glob("*")} == before
    assert target.exists() is existing
    assert [p.name for p in tmp_path.iterdir() if p.name != "m"] == []


def test_a_path_below_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"file.*cannot be written"):
        save_merged(tmp_path / "file" / "m", adapted("llama3"), {})
    with pytest.raises(CheckpointError, match=r"file.*cannot be written"):
        save_merged(tmp_path / "file", adapted("llama3"), {})
    assert (tmp_path / "file").read_text() == ""
