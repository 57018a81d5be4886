"""Reading checkpoints: what arrives where, and every way a directory can be wrong."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ntkjax.errors import CheckpointError, ConfigError, UserError
from ntkjax.models import LoraConfig, ModelConfig, init_lm, load_lm, safetensors_file
from ntkjax.models.lm import paths
from ntkjax.models.load import check_ids, ids_beyond, read_config
from ntkjax.models.names import sources
from ntkjax.parallel import make_mesh

QWEN3 = ModelConfig(
    family="qwen3", vocab_size=31, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=4,
    num_kv_heads=2, head_dim=6, qk_norm=True, initializer_range=0.3,
)  # fmt: skip
CONFIGS = {
    "qwen3": QWEN3,
    "llama-tied": dataclasses.replace(QWEN3, family="llama", architecture="", qk_norm=False, tied=True),
    "qwen2": dataclasses.replace(QWEN3, family="qwen2", architecture="", qk_norm=False, qkv_bias=True),
    "gpt2": dataclasses.replace(
        QWEN3, family="gpt2", architecture="", qk_norm=False, num_kv_heads=4, head_dim=4, tied=True, qkv_bias=True,
        o_bias=True, mlp_bias=True, activation="gelu_new", max_positions=32, norm_eps=1e-5,
    ),
}  # fmt: skip


def hf_tensors(model) -> dict[str, np.ndarray]:
    """The model's weights under their checkpoint names; fused tensors joined again."""
    flat, parts = paths(model.params), {}
    for path, source in sources(model.spec).items():
        layers = range(model.config.num_layers) if path.startswith("layers/") else [None]
        for i in layers:
            value = np.asarray(flat[path] if i is None else flat[path][i])
            start = 0 if source.share is None else source.share.start
            parts.setdefault(source.name.format(i), {})[start] = value.T if source.transpose else value
    return {n: np.ascontiguousarray(np.concatenate([p[i] for i in sorted(p)], -1)) for n, p in parts.items()}


def write(directory, config=QWEN3, change=lambda tensors: tensors, keys=None):
    model = init_lm(config, seed=4)
    save_file(change(hf_tensors(model)), directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(config.to_hf() | (keys or {})))
    return model


@pytest.mark.parametrize("name", list(CONFIGS))
def test_every_tensor_arrives_in_its_place(name, tmp_path):
    model = write(tmp_path, CONFIGS[name])
    loaded = load_lm(tmp_path, lora=LoraConfig(rank=2))
    assert loaded.config == model.config and loaded.tokenizer is None
    for path, value in paths(model.params).items():
        np.testing.assert_array_equal(paths(loaded.params)[path], value, err_msg=path)
    added = paths(loaded.params).keys() - paths(model.params).keys()
    assert added and added == paths(loaded.lora).keys()
    assert loaded.report.parameters == sum(x.size for x in paths(model.params).values())
    assert loaded.report.dtypes == {"F32": len(hf_tensors(model))}


def test_shards_read_as_one_file(tmp_path):
    model = write(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for shard, held in shards.items():
        save_file({n: tensors[n] for n in held}, tmp_path / shard)
    index = {"weight_map": {n: shard for shard, held in shards.items() for n in held}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    for path, value in paths(load_lm(tmp_path, lora=None).params).items():
        np.testing.assert_array_equal(value, paths(model.params)[path], err_msg=path)
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"b\.safetensors.*missing"):
        load_lm(tmp_path)
    save_file({names[1]: tensors[names[1]]}, tmp_path / "b.safetensors")
    with pytest.raises(CheckpointError, match=f"b.safetensors.*{names[3]}"):
        load_lm(tmp_path)


def test_mixed_dtypes_are_cast_and_reported(tmp_path):
    def mix(tensors):
        kinds = [np.float32, ml_dtypes.bfloat16, np.float16, np.float64]
        return {n: t.astype(kinds[i % 4]) for i, (n, t) in enumerate(sorted(tensors.items()))}

    model = write(tmp_path, change=mix)
    loaded = load_lm(tmp_path, lora=None)
    assert set(loaded.report.dtypes) == {"F32", "BF16", "F16", "F64"}
    for path, value in paths(loaded.params).items():
        assert value.dtype == jnp.float32
        np.testing.assert_allclose(value, paths(model.params)[path], rtol=1e-2, atol=1e-2, err_msg=path)


def test_dtype_auto_is_the_config_s_then_the_file_s(tmp_path):
    write(tmp_path, keys={"dtype": "bfloat16"})
    assert load_lm(tmp_path, dtype="auto").params["embed"]["weight"].dtype == jnp.bfloat16
    write(
        tmp_path,
        change=lambda t: {n: x.astype(np.float16) for n, x in t.items()},
        keys={"dtype": None, "torch_dtype": None},
    )
    loaded = load_lm(tmp_path, dtype="auto")
    assert loaded.params["embed"]["weight"].dtype == jnp.float16
    assert loaded.params["norm"]["scale"].dtype == jnp.float32
    with pytest.raises(ConfigError, match="int4"):
        load_lm(tmp_path, dtype="int4")


@pytest.mark.parametrize("name", list(CONFIGS))
def test_what_is_spread_over_a_mesh_is_read_once_and_arrives_in_its_place(name, tmp_path):
    model = write(tmp_path, dataclasses.replace(CONFIGS[name], vocab_size=32))
    loaded = load_lm(tmp_path, lora=None, mesh=make_mesh(data=2, fsdp=2, model=2, devices=jax.devices()[:8]))
    kernel = loaded.params["layers"]["attention"]["q"]["kernel"]
    assert kernel.addressable_shards[0].data.size == kernel.size // 4
    for path, value in paths(model.params).items():
        np.testing.assert_array_equal(paths(loaded.params)[path], value, err_msg=path)
    assert loaded.report.bytes_read == loaded.report.weight_bytes == sum(v.nbytes for v in hf_tensors(model).values())


@pytest.mark.parametrize("shape", [(7,), (6, 5), (3, 4, 5)])
def test_of_a_part_of_a_tensor_no_other_byte_is_read(shape, tmp_path, monkeypatch):
    rng, counted, read_into = np.random.default_rng(0), [], safetensors_file.read_into
    whole = rng.normal(size=shape).astype(ml_dtypes.bfloat16)
    save_file({"before": np.ones(3, np.float32), "it": whole}, tmp_path / "model.safetensors")
    info = safetensors_file.read_header(tmp_path / "model.safetensors")["it"]

    def counting(stream, first, view):
        counted.append(len(view))
        read_into(stream, first, view)

    monkeypatch.setattr(safetensors_file, "read_into", counting)
    np.testing.assert_array_equal(info.read(), whole)
    assert counted == [whole.nbytes]  # in one piece
    for _ in range(50):
        part = [np.sort(rng.choice(size, rng.integers(0, size + 1), replace=False)) for size in shape]
        counted.clear()
        np.testing.assert_array_equal(info.read(part), whole[np.ix_(*part)])
        assert sum(counted) == whole[np.ix_(*part)].nbytes


def test_a_file_that_ends_early_is_told(tmp_path):
    save_file({"it": np.ones((4, 4), np.float32)}, tmp_path / "model.safetensors")
    info = safetensors_file.read_header(tmp_path / "model.safetensors")["it"]
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.truncate(info.stop - 4)
    with pytest.raises(CheckpointError, match="ends before the tensors that it names"):
        info.read()


def test_buffers_are_ignored_and_a_repeated_tied_head_is_accepted(tmp_path):
    def add(tensors):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(3, np.float32)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
        return tensors

    write(tmp_path, CONFIGS["llama-tied"], add)
    assert "head" not in load_lm(tmp_path).params

    def differ(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
        return tensors

    write(tmp_path, CONFIGS["llama-tied"], differ)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight.*tie_word_embeddings"):
        load_lm(tmp_path)


def test_gpt2_without_the_transformer_prefix_and_with_masks(tmp_path):
    def old(tensors):
        bare = {n.removeprefix("transformer."): t for n, t in tensors.items()}
        return bare | {
            "h.0.attn.bias": np.ones((1, 1, 4, 4), np.float32),
            "h.0.attn.masked_bias": np.zeros(1, np.float32),
        }

    model = write(tmp_path, CONFIGS["gpt2"], old)
    np.testing.assert_array_equal(load_lm(tmp_path).params["wpe"]["weight"], model.params["wpe"]["weight"])


def without(name):
    return lambda tensors: {n: t for n, t in tensors.items() if n != name}


def with_tensor(name, value):
    return lambda tensors: tensors | {name: value}


Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without(Q), [Q, "missing"]),
        (without("lm_head.weight"), ["lm_head.weight", "missing", "tie_word_embeddings"]),
        (
            with_tensor("model.layers.0.self_attn.q_proj.bias", np.ones(24, np.float32)),
            ["q_proj.bias", "not used"],
        ),
        (
            with_tensor("model.layers.2.mlp.up_proj.weight", np.ones((24, 16), np.float32)),
            ["layers.2", "not used"],
        ),
        (with_tensor(Q, np.ones((24, 15), np.float32)), [Q, "[24, 15]", "[24, 16]"]),
        (with_tensor("model.norm.weight", np.ones(17, np.float32)), ["model.norm.weight", "[17]", "[16]"]),
        (with_tensor(Q, np.ones((24, 16), np.int8)), [Q, "I8", "BF16"]),
    ],
)
def test_a_wrong_tensor_is_named(change, words, tmp_path):
    write(tmp_path, change=change)
    with pytest.raises(CheckpointError) as error:
        load_lm(tmp_path)
    assert all(word in str(error.value) for word in [str(tmp_path), *words])


def test_a_bias_of_a_layer_too_many_is_no_buffer(tmp_path):
    write(tmp_path, CONFIGS["gpt2"], with_tensor("transformer.h.2.attn.c_attn.bias", np.ones(48, np.float32)))
    with pytest.raises(CheckpointError, match=r"h\.2\.attn\.c_attn\.bias.*not used"):
        load_lm(tmp_path)


def test_a_head_in_the_file_of_a_tied_model_s_config(tmp_path):
    write(tmp_path, keys={"tie_word_embeddings": True})
    with pytest.raises(CheckpointError, match=r"lm_head\.weight"):
        load_lm(tmp_path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "0 bytes"),
        (b"\x05", "1 bytes"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "LFS"),
        ((1 << 40).to_bytes(8, "little") + b"{}", "claims"),
        ((4).to_bytes(8, "little") + b"nope", "not JSON"),
        ((2).to_bytes(8, "little") + b"[]", "not a JSON object"),
        ((12).to_bytes(8, "little") + b'{"a": [1,2]}', "'a' is malformed"),
        ((9000).to_bytes(8, "little") + b"[" * 9000, "not JSON"),
        *(
            (len(header).to_bytes(8, "little") + header, "'a' is malformed")
            for header in (
                b'{"a":{"dtype":"F32","shape":[-1,-1],"data_offsets":[0,4]}}',
                b'{"a":{"dtype":"F32","shape":[1e999],"data_offsets":[0,4]}}',
                b'{"a":{"dtype":"X","shape":[1],"data_offsets":[0.5,4]}}',
            )
        ),
    ],
)
def test_a_corrupt_file_says_so(content, words, tmp_path):
    write(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=words) as error:
        load_lm(tmp_path)
    assert "model.safetensors" in str(error.value)


def test_a_truncated_file_says_so(tmp_path):
    write(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="truncated"):
        load_lm(tmp_path)


def test_directories_without_usable_weights_or_config(tmp_path):
    write(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no model\.safetensors"):
        load_lm(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin.*save_pretrained"):
        load_lm(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"index\.json.*weight_map"):
        load_lm(tmp_path)
    for text, words in (("{", "not valid JSON"), ("[1]", "expected a JSON object")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(CheckpointError, match=rf"config\.json.*{words}"):
            load_lm(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json: missing"):
        load_lm(tmp_path)


def test_paths_and_hub_ids_that_lead_nowhere(tmp_path, monkeypatch):
    with pytest.raises(CheckpointError, match="does not exist"):
        load_lm(tmp_path / "absent")
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="is a file"):
        load_lm(tmp_path / "file")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=r"no-such/model.*directory"):
        load_lm("no-such/model")


def test_an_unknown_lora_target_is_named_before_anything_is_read(tmp_path):
    write(tmp_path)
    with pytest.raises(ConfigError, match="w_pack"):
        load_lm(tmp_path, lora=LoraConfig(targets=("w_pack",)))


def test_tokenizer_files_that_cannot_be_read(tmp_path):
    write(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="tokenizer"):
        load_lm(tmp_path)


@pytest.mark.parametrize("base", [None, "owner/base-model"])
@pytest.mark.parametrize("config", [False, True])
def test_an_adapter_given_as_model(base, config, tmp_path):
    """Some adapter directories hold the model's config.json too, but none its weights."""
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": base}))
    if config:
        (tmp_path / "config.json").write_text(json.dumps(QWEN3.to_hf()))
    with pytest.raises(CheckpointError, match=r"holds a PEFT adapter.*--model.*--adapter") as caught:
        load_lm(tmp_path)
    assert (base or "'") in str(caught.value) or base is None
    write(tmp_path)  # a whole model with an adapter beside it is a model
    assert load_lm(tmp_path).config.family == "qwen3"


def test_a_sentencepiece_model_alone_says_how_to_convert_it(tmp_path):
    write(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"no such model")
    with pytest.raises(
        CheckpointError, match=r"tokenizer\.model: .*without tokenizer\.json.*save_pretrained"
    ) as caught:
        load_lm(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.fixture
def with_tokenizer(tmp_path):
    """``with_tokenizer(rows, added, template, **settings)``: a model with ``rows`` rows and a tokenizer of ten words
    and further ``added`` tokens with ids from 10 on."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    def build(rows, added, template=None, **settings):
        backend = Tokenizer(
            WordLevel(
                {word: i for i, word in enumerate(["<unk>", "</s>", "a", "b", "c", "d", "e", "f", "g", "h"])}, "<unk>"
            )
        )
        backend.pre_tokenizer = Whitespace()
        backend.add_special_tokens(added)
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")
        tokenizer.chat_template = template
        for name, token in settings.items():
            setattr(tokenizer, name, token)
        tokenizer.save_pretrained(tmp_path)
        write(tmp_path, dataclasses.replace(QWEN3, vocab_size=rows))
        return tmp_path

    return build


def test_templates_of_which_none_is_the_default_are_refused(with_tokenizer):
    named = {"rag": "{{ messages }}", "tool_use": "{{ tools }}"}
    with pytest.raises(CheckpointError, match=r"chat_template holds the templates rag, tool_use and none named 'def"):
        load_lm(with_tokenizer(12, [], named))
    assert load_lm(with_tokenizer(12, [], named | {"default": "{{ messages }}"})).tokenizer is not None


@pytest.mark.parametrize(
    ("template", "settings", "words"),
    [
        (None, {"eos_token": "<|end|>"}, r"tokenizer_config\.json: the eos token '<\|end\|>' has id 11 .* 11 rows"),
        (None, {"pad_token": "<|end|>"}, r"tokenizer_config\.json: the pad token '<\|end\|>' has id 11"),
        (None, {"bos_token": "<|end|>"}, r"tokenizer_config\.json: the bos token '<\|end\|>' has id 11"),
        ("{% for m in messages %}{{ '<|end|>' }}{% endfor %}", {},
         r"tokenizer\.json: the chat template's token '<\|end\|>' has id 11"),
    ],
)  # fmt: skip
def test_tokens_beyond_the_embedding_that_every_text_may_get(template, settings, words, with_tokenizer):
    directory = with_tokenizer(11, ["<|start|>", "<|end|>"], template, **settings)
    with pytest.raises(CheckpointError, match=words) as caught:
        load_lm(directory)
    assert "resize_token_embeddings" in str(caught.value)


def test_unused_tokens_beyond_the_embedding_are_left_to_the_text(with_tokenizer):
    directory = with_tokenizer(11, ["<|start|>", "<|end|>"], "{{ '<|start|>' }}")
    tokenizer = load_lm(directory).tokenizer
    assert ids_beyond(tokenizer, 11) == {11: "<|end|>"} and ids_beyond(tokenizer, 12) == {}
    check_ids(10, 11, tokenizer)
    with pytest.raises(
        CheckpointError, match=r"^pool\.jsonl:7: its text holds a token without a row: '<\|end\|>' has id 11 .* 11 rows"
    ):
        check_ids(11, 11, tokenizer, "pool.jsonl:7")


def test_data_with_a_token_beyond_the_embedding_is_refused_by_file_and_line(with_tokenizer, tmp_path, capsys):
    from ntkjax.pipeline.load import load_data, load_model
    from ntkjax.pipeline.options import DataOptions, ModelOptions

    directory = with_tokenizer(11, ["<|start|>", "<|end|>"])
    model = load_model(ModelOptions(model=str(directory)), seed=0)
    assert "warning" in (said := capsys.readouterr().err) and "'<|end|>' (11)" in said and "1 of the" in said
    rows = [{"prompt": "a b", "response": "c"}, {"prompt": "a <|end|> b", "response": "c"}]
    good, bad = tmp_path / "good.jsonl", tmp_path / "bad.jsonl"
    good.write_text(json.dumps(rows[0]) + "\n")
    bad.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert len(load_data(str(good), model, DataOptions())) == 1
    with pytest.raises(
        CheckpointError, match=r"bad\.jsonl:2: its text holds a token without a row: '<\|end\|>'.*id 11"
    ):
        load_data(str(bad), model, DataOptions())


def test_the_real_checkpoint_knows_its_own_kind_of_text(shared_dir):
    """Trained on text of this format: 2.95 nats per token on its held-out documents; a uniform guess has 8.3."""
    directory = shared_dir / "models" / "cot-lm-7m"
    if not directory.is_dir():
        pytest.skip("no checkpoint beside this checkout")
    from ntkjax.types import Batch

    model = load_lm(directory, lora=None)
    with (shared_dir / "data/pool/cot-01.jsonl").open(encoding="utf-8") as lines:
        records = [json.loads(next(lines)) for _ in range(8)]
    width = 256
    tokens, mask = np.zeros((8, width), np.int32), np.zeros((8, width), bool)
    for i, record in enumerate(records):
        turns = [{"role": "user", "content": record["prompt"]}]
        template = model.tokenizer.apply_chat_template
        prompt = template(turns, add_generation_prompt=True, tokenize=False)
        answer = {"role": "assistant", "content": record["response"]}
        text = template([*turns, answer], tokenize=False)
        assert text.startswith(prompt)
        start, ids = len(model.tokenizer.encode(prompt)), model.tokenizer.encode(text)[:width]
        tokens[i, : len(ids)], mask[i, start : len(ids)] = ids, True
    lengths = np.full(8, width, np.int32)
    nll = np.asarray(model.nll_fn({}, Batch(tokens, mask, lengths, np.arange(8, dtype=np.int32))))
    held = mask.any(1)
    assert held.sum() >= 4
    assert 1.0 < nll[held].mean() < 3.5


@pytest.mark.parametrize(
    ("given", "ends"),
    [
        ({}, (3,)),
        ({"eos_token_id": None}, (3,)),
        ({"eos_token_id": 5}, (3, 5)),
        ({"eos_token_id": [5, 3, -1]}, (3, 5)),
        *(({"eos_token_id": bad}, None) for bad in ("3", [[3]], ["3"], 1.5, float("nan"), 10**12, True, {"a": 1})),
    ],
)
def test_the_ends_that_generation_config_names(given, ends, tmp_path):
    write(tmp_path, dataclasses.replace(QWEN3, eos_token_ids=(3,)))
    (tmp_path / "generation_config.json").write_text(json.dumps(given))
    if ends is not None:
        assert read_config(tmp_path).eos_token_ids == ends
        return
    with pytest.raises(CheckpointError, match=r"generation_config\.json: eos_token_id is .*expected a token id"):
        load_lm(tmp_path)


@pytest.mark.parametrize(
    ("key", "size", "error"),
    [
        ("num_hidden_layers", 4000, " asks for"),
        # Not even the descriptions of so many layers are made: they would take all memory.
        ("num_hidden_layers", 2**30, ": num_hidden_layers = 1073741824: expected 1 to 4096"),
        ("vocab_size", 2**30, " asks for"),
        ("hidden_size", 2**30, " asks for"),
    ],
)
def test_sizes_beyond_the_file_are_refused_before_anything_of_them_is_made(key, size, error, tmp_path):
    write(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(QWEN3.to_hf() | {key: size}))
    with pytest.raises(CheckpointError, match=rf"config\.json{error}"):
        load_lm(tmp_path)
