"""GGUF files written as llama.cpp writes them, imported: numbers, order of rows, configuration, errors."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import gguf
import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

import ntkjax
from ntkjax.commands import load_command
from ntkjax.errors import CheckpointError, ConfigError, UserError
from ntkjax.models import ModelConfig, RopeConfig, init_lm, load_lm
from ntkjax.models.export import save_merged
from ntkjax.models.families import FAMILIES
from ntkjax.models.gguf import import_gguf
from ntkjax.models.gguf_file import TENSOR_TYPES, read_gguf
from ntkjax.models.load import read_config

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
CASES = json.loads((GOLDEN / "golden.json").read_text())
# Every family, and what differs among those of Llama's shape.
IMPORTED = ("llama2", "llama3", "llama-biases", "llama-head-dim", "llama-linear", "mistral", "smollm2",
            "qwen2", "qwen2-tied", "qwen3", "qwen3-tied", "gpt2")  # fmt: skip
BITS = {"Q8_0": 8, "Q5_0": 5, "Q5_1": 5, "Q4_0": 4, "Q4_1": 4}


@pytest.fixture(scope="module")
def writing(load_file):
    return load_file(Path(__file__).with_name("gguf_writing.py"))


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> Path:
    """A checkpoint whose rows are whole blocks of every type (256)."""
    shape = {"vocab_size": 64, "hidden_size": 256, "intermediate_size": 256, "num_layers": 1, "num_heads": 4}
    folder = tmp_path_factory.mktemp("wide") / "hf"
    save_merged(folder, init_lm(ModelConfig("llama", num_kv_heads=2, head_dim=64, **shape), seed=3, lora=None), {})
    return folder


def weights(folder: Path) -> dict[str, np.ndarray]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("name", IMPORTED)
def test_an_imported_checkpoint_is_the_source(name: str, writing, tmp_path: Path) -> None:
    """Every tensor, the configuration, and the logits that torch computed from the source."""
    file = writing.write(tmp_path / "m.gguf", *writing.content(GOLDEN / name))
    done = import_gguf(file, tmp_path / "hf")
    source = {key: value for key, value in weights(GOLDEN / name).items() if "inv_freq" not in key}
    written = weights(tmp_path / "hf")
    assert written.keys() == source.keys() and done.parameters == sum(value.size for value in source.values())
    assert all(np.array_equal(written[key], source[key]) and written[key].dtype == np.float32 for key in source)
    before, after = (read_config(folder) for folder in (GOLDEN / name, tmp_path / "hf"))
    ours = {"architecture", "bos_token_id", "eos_token_ids", "pad_token_id", "initializer_range"}
    assert {f for f, value in vars(before).items() if getattr(after, f) != value} <= ours
    if name in ("llama3", "qwen2", "qwen3", "gpt2"):
        expected, model = load_file(GOLDEN / "logits.safetensors")[name], load_lm(tmp_path / "hf", lora=None)
        logits = np.asarray(model.logits(np.asarray(CASES[name]["tokens"], np.int32)))[:, CASES[name]["positions"]]
        assert np.abs(logits - expected).max() < 1e-5


def test_rows_of_queries_and_keys_give_the_scores_of_rotated_neighbours(writing, tmp_path: Path) -> None:
    """llama.cpp turns rows 2i and 2i + 1 of a head by position * theta^(-2i/H); a checkpoint rows i and i + H/2.
    Attention scores of the file's rows, so turned, are those of the imported rows, turned as checkpoints are."""
    keys, tensors = writing.content(GOLDEN / "llama3")
    import_gguf(writing.write(tmp_path / "m.gguf", keys, tensors), tmp_path / "hf")
    heads, kv, theta = keys["llama.attention.head_count"], keys["llama.attention.head_count_kv"], 5e5
    imported = weights(tmp_path / "hf")
    size = imported["model.layers.0.self_attn.q_proj.weight"].shape[0] // heads
    x = np.random.default_rng(0).normal(size=(7, keys["llama.embedding_length"]))
    angles = np.arange(7)[:, None, None] * theta ** (-np.arange(0, size, 2) / size)
    turn = lambda a, b: (a * np.cos(angles) - b * np.sin(angles), b * np.cos(angles) + a * np.sin(angles))

    def scores(q: np.ndarray, k: np.ndarray, neighbours: bool) -> np.ndarray:
        turned = []
        for weight, count in ((q, heads), (k, kv)):
            y = (x @ weight.T.astype(np.float64)).reshape(7, count, size)
            a, b = (y[..., ::2], y[..., 1::2]) if neighbours else (y[..., : size // 2], y[..., size // 2 :])
            turned.append(np.concatenate(turn(a, b), axis=-1))
        return np.einsum("tghi,sgi->ghts", turned[0].reshape(7, kv, heads // kv, size), turned[1])

    file = scores(tensors["blk.0.attn_q.weight"], tensors["blk.0.attn_k.weight"], True)
    name = "model.layers.0.self_attn.{}_proj.weight"
    checkpoint = scores(imported[name.format("q")], imported[name.format("k")], False)
    np.testing.assert_allclose(checkpoint, file, rtol=1e-10, atol=1e-10)
    assert np.abs(file - scores(*(imported[name.format(part)] for part in "qk"), True)).max() > 0.1


def k_blocks(name: str, value: np.ndarray, kind: str) -> np.ndarray:
    """Random blocks with scales of a sane size (float16 d, and dmin where the type has one)."""
    block, size = gguf.constants.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    random = np.random.default_rng(len(name))
    rows = random.integers(0, 256, (value.shape[0], value.shape[1] // block, size), np.uint8)
    scale = lambda: random.uniform(1e-4, 1e-3, (*rows.shape[:2], 1)).astype(np.float16).view(np.uint8)
    if kind == "Q6_K":
        rows[..., -2:] = scale()
    else:
        rows[..., 0:2], rows[..., 2:4] = scale(), scale()
    return rows.reshape(value.shape[0], -1)


def q6_k(block: np.ndarray) -> np.ndarray:
    """ggml's formula: 256 values d * scale[i / 16] * (q - 32), q of 4 low and 2 high bits."""
    low, high, scales = block[:128], block[128:192], block[192:208].view(np.int8)
    d = block[208:210].view(np.float16)[0].astype(np.float32)
    out = np.empty(256, np.float32)
    for half in range(2):
        for i in range(32):
            for part in range(4):
                nibble = low[64 * half + i + 32 * (part % 2)]
                nibble = nibble & 15 if part < 2 else nibble >> 4
                q = int(nibble | (((high[32 * half + i] >> 2 * part) & 3) << 4)) - 32
                at = 128 * half + 32 * part + i
                out[at] = d * np.float32(scales[at // 16]) * np.float32(q)
    return out


@pytest.mark.parametrize("kind", TENSOR_TYPES)
def test_each_type_is_dequantised_exactly_and_close_to_the_source(kind: str, writing, wide, tmp_path: Path) -> None:
    keys, tensors = writing.content(wide)
    raw = k_blocks if kind.endswith("_K") else None
    file = writing.write(tmp_path / "m.gguf", keys, tensors, kind, raw)
    done = import_gguf(file, tmp_path / "hf")
    assert done.types[kind] >= 9
    # What the package's own reader and dequantiser give, through the row order that the test above pins.
    values = {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(file).tensors}
    written, source = weights(tmp_path / "hf"), weights(wide)
    assert np.array_equal(written["model.layers.0.mlp.down_proj.weight"], values["blk.0.ffn_down.weight"])
    assert np.array_equal(written["model.embed_tokens.weight"], values["token_embd.weight"])
    q = written["model.layers.0.self_attn.q_proj.weight"]
    assert np.array_equal(writing.paired(q, 4), values["blk.0.attn_q.weight"])
    if raw is None:
        for name, value in source.items():
            blocks = value.reshape(-1, 32) if value.ndim == 2 else value[:, None]
            span = np.ptp(blocks, axis=1, keepdims=True) + np.abs(blocks).max(axis=1, keepdims=True)
            step = {"F32": 0 * span, "F16": span / 2**11, "BF16": span / 2**8}.get(kind)
            step = span / (2 ** BITS[kind] - 2) if step is None else step
            error = np.abs(written[name] - value).reshape(blocks.shape)
            assert (error <= (step if value.ndim == 2 else 0)).all(), name
    if kind == "Q8_0":
        tokens = np.arange(24, dtype=np.int32).reshape(2, 12)
        before, after = (np.asarray(load_lm(f, lora=None).logits(tokens)) for f in (wide, tmp_path / "hf"))
        assert 0 < np.abs(before - after).max() <= 2e-2 * np.abs(before).max()
    elif kind == "Q6_K":
        row = np.frombuffer(
            k_blocks("blk.0.ffn_up.weight", tensors["blk.0.ffn_up.weight"], kind)[5].tobytes(), np.uint8
        )
        assert np.array_equal(written["model.layers.0.mlp.up_proj.weight"][5], q6_k(row))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_narrower_dtype_rounds_the_dequantised_values(dtype: str, writing, wide, tmp_path: Path) -> None:
    file = writing.write(tmp_path / "m.gguf", *writing.content(wide), "Q8_0")
    import_gguf(file, tmp_path / "wide")
    import_gguf(file, tmp_path / "narrow", dtype=dtype, max_shard_size=200_000)
    config = json.loads((tmp_path / "narrow/config.json").read_text())
    assert config["dtype"] == dtype and not (tmp_path / "narrow/model.safetensors").exists()
    model = load_lm(tmp_path / "narrow", lora=None, dtype="auto")  # several files and their index
    kept = np.asarray(model.params["embed"]["weight"])
    exact = weights(tmp_path / "wide")["model.embed_tokens.weight"]
    assert np.array_equal(kept, exact.astype(np.dtype(dtype)))


def scaled(tmp_path: Path, **rope) -> tuple[Path, ModelConfig]:
    shape = {"vocab_size": 32, "hidden_size": 48, "intermediate_size": 32, "num_layers": 1, "num_heads": 1}
    rope = RopeConfig(**{"theta": 5e5, "kind": "llama3", "factor": 32.0} | rope)
    config = ModelConfig("llama", num_kv_heads=1, head_dim=48, rope=rope, eos_token_ids=(0,), **shape)
    save_merged(tmp_path / "source", init_lm(config, seed=0, lora=None), {})
    return tmp_path / "source", config


def factors(theta: float, size: int, factor: float, low: float, high: float, context: int) -> np.ndarray:
    """What llama.cpp's converter writes for Llama 3.1's rope_parameters."""
    found = []
    for i in range(0, size, 2):
        wavelength = 2 * np.pi * theta ** (i / size)
        smooth = (context / wavelength - low) / (high - low)
        found.append(1 if wavelength < context / high else factor if wavelength > context / low else
                     1 / ((1 - smooth) / factor + smooth))  # fmt: skip
    assert len({1, factor} & set(found)) == 2 and len(set(found)) > 2
    return np.array(found, np.float32)


def test_llama_3_1_s_scaling_of_positions_is_read_from_its_factors(writing, tmp_path: Path) -> None:
    folder, config = scaled(tmp_path)
    keys, tensors = writing.content(folder)
    tensors["rope_freqs.weight"] = factors(5e5, 48, 32.0, 1.0, 4.0, 8192)
    import_gguf(writing.write(tmp_path / "m.gguf", keys, tensors), tmp_path / "hf")
    assert read_config(tmp_path / "hf") == config
    tensors["rope_freqs.weight"] = factors(5e5, 48, 32.0, 1.0, 8.0, 8192)
    with pytest.raises(CheckpointError, match=r"m\.gguf: tensor 'rope_freqs.weight' is not Llama 3\.1's scaling"):
        import_gguf(writing.write(tmp_path / "m.gguf", keys, tensors), tmp_path / "other")


def gemma(layers: int = 7, **changes) -> ModelConfig:
    """A Gemma 3 as llama.cpp has it; norms w of multiples of 1/1024, so that 1 + w is exact."""
    kinds = tuple("full_attention" if (i + 1) % 6 == 0 else "sliding_attention" for i in range(layers))
    fields = {
        "vocab_size": 32, "hidden_size": 24, "intermediate_size": 16, "num_heads": 4, "num_kv_heads": 2, "head_dim": 4,
        "num_layers": layers, "max_positions": 64, "activation": "gelu_pytorch_tanh", "tied": True, "qk_norm": True,
        "window": 5, "layer_types": kinds, "rope": RopeConfig(1e6, "linear", 8.0), "local_rope": RopeConfig(1e4),
        "eos_token_ids": (0,),
    }  # fmt: skip
    return ModelConfig("gemma3", **fields | changes)


def saved(config: ModelConfig, folder: Path) -> Path:
    model, random = init_lm(config, seed=0, lora=None), np.random.default_rng(0)
    norm = lambda x: np.asarray(random.integers(-512, 512, x.shape) / 1024, np.float32)
    drawn = lambda path, x: norm(x) if path[-1].key == "scale" else x
    save_merged(folder, model.with_params(jax.tree_util.tree_map_with_path(drawn, model.params)), {})
    return folder


def test_gemma_3_has_norms_windows_and_positions_of_its_own(writing, tmp_path: Path) -> None:
    """llama.cpp keeps 1 + w, and neither the pattern of layers nor the base of sliding ones: they are its code's."""
    config = gemma()
    keys, tensors = writing.content(saved(config, tmp_path / "source"))
    import_gguf(writing.write(tmp_path / "m.gguf", keys, tensors), tmp_path / "hf")
    assert read_config(tmp_path / "hf") == config
    source, written = weights(tmp_path / "source"), weights(tmp_path / "hf")
    assert source.keys() == written.keys() and all(np.array_equal(source[name], written[name]) for name in source)
    assert np.array_equal(tensors["blk.0.attn_q_norm.weight"], source["model.layers.0.self_attn.q_norm.weight"] + 1)
    newer = {"attention.sliding_window_pattern": 2, "rope.freq_base_swa": 500.0, "final_logit_softcapping": 20.0}
    keys |= {f"gemma3.{key}": value for key, value in newer.items()}
    import_gguf(writing.write(tmp_path / "m.gguf", keys, tensors), tmp_path / "newer")
    read = read_config(tmp_path / "newer")
    assert read.layer_types == ("sliding_attention", "full_attention") * 3 + ("sliding_attention",)
    assert (read.local_rope, read.logit_cap) == (RopeConfig(500.0), 20.0)


def test_queries_of_the_largest_gemma_3_are_scaled_by_the_width_of_a_head(writing, tmp_path: Path) -> None:
    """The 27B model, which llama.cpp knows by its 62 layers: 1 / sqrt(hidden_size / heads)."""
    config = gemma(62, query_scale=6**-0.5)
    file = writing.write(tmp_path / "m.gguf", *writing.content(saved(config, tmp_path / "source")))
    import_gguf(file, tmp_path / "hf")
    assert read_config(tmp_path / "hf") == config


def test_every_family_that_declares_a_name_has_one_of_its_own() -> None:
    names = [family.gguf.architecture for family in FAMILIES.values() if family.gguf is not None]
    assert {"llama", "qwen2", "qwen3", "gpt2", "gemma3"} <= set(names) and len(set(names)) == len(names)


# -- what cannot be used is named, and nothing is written --


def changed(keys: dict, tensors: dict, name: str) -> None:
    """One fault, by its name."""
    q = tensors["blk.0.attn_q.weight"]
    edits = {
        "architecture": lambda: keys.update({"general.architecture": "mamba"}),
        "key": lambda: keys.update({"llama.expert_count": 8}),
        "key missing": lambda: keys.pop("llama.block_count"),
        "key text": lambda: keys.update({"llama.block_count": "two"}),
        "scaling": lambda: keys.update({"llama.rope.scaling.type": "yarn"}),
        "window": lambda: keys.update({"llama.attention.sliding_window": 16}),
        "values": lambda: keys.update({"llama.attention.value_length": 2}),
        "layers": lambda: keys.update({"llama.feed_forward_length": [32, 48]}),
        "part": lambda: keys.update({"split.count": 3}),
        "missing": lambda: tensors.pop("blk.1.ffn_up.weight"),
        "embedding": lambda: tensors.pop("token_embd.weight"),
        "unknown": lambda: tensors.update({"blk.1.ffn_gate_inp.weight": q}),
        "shape": lambda: tensors.update({"blk.0.attn_q.weight": q[:-1]}),
        "nan": lambda: tensors.update({"output_norm.weight": np.full(24, np.nan, np.float32)}),
        "tokens": lambda: keys.update({"tokenizer.ggml.tokens": [str(i) for i in range(200)],
                                       "tokenizer.ggml.token_type": [1] * 200, "tokenizer.ggml.merges": ["1 2"]}),
    }  # fmt: skip
    edits[name]()


FAULTS = {
    "architecture": r"general\.architecture = 'mamba' is not supported; expected one of .*llama.*qwen3",
    "key": r"key 'llama\.expert_count' = 8 is not known, and may change what the model computes; take the model in",
    "key missing": r"key 'llama\.block_count' is missing: expected a number",
    "key text": r"llama\.block_count = 'two': expected an integer",
    "scaling": r"llama\.rope\.scaling\.type = 'yarn' is not supported; supported: none, linear",
    "window": r"llama\.attention\.sliding_window = 16 is not supported with 'llama'",
    "values": r"llama\.attention\.value_length = 2: expected 4",
    "layers": r"llama\.feed_forward_length = \[32, 48\], another for each layer, is not supported",
    "part": r"is one of 3 parts \(split\.count\); expected one file",
    "missing": r"tensor 'blk\.1\.ffn_up\.weight' is missing; convert the model again",
    "embedding": r"tensor 'token_embd\.weight' is missing",
    "unknown": r"tensor 'blk\.1\.ffn_gate_inp\.weight' is not known",
    "shape": r"tensor 'blk\.0\.attn_q\.weight' has shape \[23, 24\]: its keys ask for \[24, 24\]",
    "nan": r"model\.norm\.weight: its tensor has values that are not finite",
    "tokens": r"tensor 'token_embd\.weight' has 96 rows for 200 tokens",
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_named_and_nothing_is_written(name: str, writing, tmp_path: Path) -> None:
    keys, tensors = writing.content(GOLDEN / "llama3")
    changed(keys, tensors, name)
    writing.write(tmp_path / "m.gguf", keys, tensors)
    with pytest.raises(CheckpointError, match=rf"m\.gguf: {FAULTS[name]}"):
        import_gguf(tmp_path / "m.gguf", tmp_path / "hf")
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


def test_a_type_that_is_not_read_is_named(writing, wide, tmp_path: Path) -> None:
    kind = lambda name: "TQ1_0" if name == "blk.0.ffn_up.weight" else "F32"
    writing.write(tmp_path / "m.gguf", *writing.content(wide), kind)
    with pytest.raises(
        CheckpointError, match=r"tensor 'blk\.0\.ffn_up\.weight' is of type TQ1_0, .*Q6_K: take another"
    ):
        import_gguf(tmp_path / "m.gguf", tmp_path / "hf")


def test_a_value_too_large_for_float16_is_named(writing, tmp_path: Path) -> None:
    keys, tensors = writing.content(GOLDEN / "llama3")
    tensors["blk.0.ffn_up.weight"] = tensors["blk.0.ffn_up.weight"] * np.float32(1e6)
    file = writing.write(tmp_path / "m.gguf", keys, tensors)
    with pytest.raises(
        CheckpointError, match=r"layers\.0\.mlp\.up_proj\.weight: a value of size .* float16; use float32"
    ):
        import_gguf(file, tmp_path / "hf", dtype="float16")
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize(
    ("start", "message"),
    [
        (b"", "it has 0 bytes and ends inside its first bytes"),
        (b"PK\x03\x04", r"it begins with b'PK\\x03\\x04', not with b'GGUF'"),
        (b"version https://git-lfs", "it is a Git LFS pointer"),
        (b"GGUF\x01\0\0\0", "it is of version 1; expected version 2 or 3"),
        (b"GGUF\0\0\0\x03", "it is big-endian"),
    ],
)
def test_what_is_no_gguf_file_is_said(start: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(start)
    with pytest.raises(CheckpointError, match=rf"m\.gguf: not a usable GGUF file: {message}"):
        read_gguf(tmp_path / "m.gguf")


def test_a_missing_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"m\.gguf: cannot be read .*; expected a GGUF file"):
        read_gguf(tmp_path / "m.gguf")


def test_a_file_cut_anywhere_or_with_any_byte_changed_is_no_traceback(writing, tmp_path: Path) -> None:
    """Every cut is told as one; a changed byte of the header is told, or the file is read."""
    whole = writing.write(tmp_path / "m.gguf", *writing.content(GOLDEN / "smollm2")).read_bytes()
    header = whole.index(b"output_norm.weight") + 60
    file = tmp_path / "cut.gguf"
    for stop in [*range(4, header, 41), len(whole) - 1]:
        file.write_bytes(whole[:stop])
        with pytest.raises(CheckpointError, match="truncated"):
            read_gguf(file)
    random = np.random.default_rng(0)
    for at in random.integers(8, header, 60):
        file.write_bytes(whole[:at] + bytes([random.integers(256)]) + whole[at + 1 :])
        try:
            read_gguf(file)
        except UserError as error:
            assert str(error).startswith(str(file))


def test_an_existing_directory_is_left_alone(writing, tmp_path: Path) -> None:
    file = writing.write(tmp_path / "m.gguf", *writing.content(GOLDEN / "smollm2"))
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match="is there already; give another directory"):
        import_gguf(file, tmp_path / "hf")
    with pytest.raises(ConfigError, match="dtype 'int8'"):
        import_gguf(file, tmp_path / "new", dtype="int8")
    assert [path.name for path in (tmp_path / "hf").iterdir()] == ["mine.txt"]


def test_a_full_disk_leaves_nothing(writing, tmp_path: Path, full_disk) -> None:
    file = writing.write(tmp_path / "m.gguf", *writing.content(GOLDEN / "smollm2"))
    with full_disk(), pytest.raises(CheckpointError, match="hf: cannot be written"):
        import_gguf(file, tmp_path / "hf")
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


def test_the_command(writing, tmp_path: Path) -> None:
    file = writing.write(tmp_path / "m.gguf", *writing.content(GOLDEN / "smollm2"))
    command = load_command("import-gguf")
    out, code = command.from_command_line(command.config(str(file), out=str(tmp_path / "hf"), dtype="bfloat16"))
    assert code == 0 and ntkjax.import_gguf is command.function and ntkjax.ImportGgufConfig is command.config
    assert f"{tmp_path / 'hf'}: LlamaForCausalLM, " in out and "parameters in bfloat16 from 20 tensors (20 F32)" in out
    assert weights(tmp_path / "hf")["model.norm.weight"].dtype == ml_dtypes.bfloat16


def test_the_written_configuration_names_the_tokens_that_end_an_answer(writing, tmp_path: Path) -> None:
    keys, tensors = writing.content(GOLDEN / "smollm2")
    keys |= {"tokenizer.ggml.eot_token_id": 3, "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.padding_token_id": 2}
    import_gguf(writing.write(tmp_path / "m.gguf", keys, tensors), tmp_path / "hf")
    model = load_lm(tmp_path / "hf", lora=None)
    assert model.config.eos_token_ids == (0, 3) and model.stop_tokens >= {0, 3}
    assert dataclasses.asdict(model.config)["bos_token_id"] == 1 and model.config.pad_token_id == 2
