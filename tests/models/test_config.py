"""Reading config.json of transformers v4 and v5, and refusing what would change the mathematics."""

import dataclasses
import math

import pytest

from ntkjax.errors import CheckpointError
from ntkjax.models.config import ModelConfig, RopeConfig

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
}
GPT2 = {
    "architectures": ["GPT2LMHeadModel"],
    "model_type": "gpt2",
    "vocab_size": 128,
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 256,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 1024,
}

KINDS = ["full_attention", "sliding_attention"]
USED = {"use_sliding_window": True, "sliding_window": 64}
ROUTED = {"num_experts": 4, "num_experts_per_tok": 2}


def as_architecture(name: str, **keys) -> dict:
    return LLAMA | {"architectures": [name]} | keys


def test_v4_and_v5_rope_styles_read_the_same():
    v4 = ModelConfig.from_hf(LLAMA | {"rope_theta": 5e5, "rope_scaling": LLAMA3, "torch_dtype": "bfloat16"})
    v5 = ModelConfig.from_hf(LLAMA | {"rope_parameters": LLAMA3 | {"rope_theta": 5e5}, "dtype": "bfloat16"})
    assert v4 == v5
    assert v4.rope == RopeConfig(5e5, "llama3", 8.0, 1.0, 4.0, 1024)


def test_old_linear_scaling_names_its_kind_type():
    config = ModelConfig.from_hf(LLAMA | {"rope_scaling": {"type": "linear", "factor": 2.0}})
    assert config.rope == RopeConfig(10_000.0, "linear", 2.0)


def test_absent_keys_mean_what_transformers_means():
    without = {k: v for k, v in LLAMA.items() if k not in ("num_key_value_heads", "rms_norm_eps", "hidden_act")}
    config = ModelConfig.from_hf(without | {"rope_scaling": None, "head_dim": None})
    assert (config.num_kv_heads, config.head_dim, config.norm_eps, config.activation) == (4, 16, 1e-6, "silu")
    assert config.rope == RopeConfig() and not config.tied
    gpt2 = ModelConfig.from_hf(GPT2)
    assert (gpt2.tied, gpt2.intermediate_size, gpt2.activation, gpt2.norm_eps) == (
        True,
        256,
        "gelu_new",
        1e-5,
    )
    assert ModelConfig.from_hf(as_architecture("Qwen3ForCausalLM")).head_dim == 128


def test_biases_and_qk_norm_follow_the_architecture():
    llama = ModelConfig.from_hf(LLAMA | {"attention_bias": True, "mlp_bias": True})
    assert (llama.qkv_bias, llama.o_bias, llama.mlp_bias, llama.qk_norm) == (True, True, True, False)
    qwen2 = ModelConfig.from_hf(as_architecture("Qwen2ForCausalLM"))
    assert (qwen2.family, qwen2.qkv_bias, qwen2.o_bias) == ("qwen2", True, False)
    qwen3 = ModelConfig.from_hf(as_architecture("Qwen3ForCausalLM", head_dim=32))
    assert (qwen3.family, qwen3.qkv_bias, qwen3.qk_norm, qwen3.head_dim) == ("qwen3", False, True, 32)
    mistral = ModelConfig.from_hf(as_architecture("MistralForCausalLM", sliding_window=None))
    assert (mistral.family, mistral.architecture) == ("llama", "MistralForCausalLM")


@pytest.mark.parametrize(
    "keys",
    [
        {"architectures": ["MistralForCausalLM"], "sliding_window": 4096},
        {"architectures": ["Qwen2ForCausalLM"], "sliding_window": 64, "use_sliding_window": False},
        {
            "architectures": ["Qwen2ForCausalLM"],
            "sliding_window": 64,
            "use_sliding_window": True,
            "max_window_layers": 2,
        },
        {
            "architectures": ["Qwen3ForCausalLM"],
            "layer_types": ["full_attention"] * 2,
            "sliding_window": None,
        },
    ],
)
def test_a_window_that_is_never_used_is_fine(keys):
    config = ModelConfig.from_hf(LLAMA | keys)
    assert (config.num_layers, config.window, config.layer_types) == (2, None, ())


@pytest.mark.parametrize(
    ("keys", "windows"),
    [
        ({"architectures": ["MistralForCausalLM"], "sliding_window": 512}, [512, 512]),
        ({"architectures": ["MistralForCausalLM"], "max_position_embeddings": 9000}, [4096, 4096]),
        ({"architectures": ["Qwen2ForCausalLM"], **USED, "max_window_layers": 1}, [None, 64]),
        ({"architectures": ["Qwen2ForCausalLM"], **USED, "max_window_layers": 0}, [64, 64]),
        ({"architectures": ["Qwen3ForCausalLM"], **USED, "layer_types": KINDS[::-1]}, [64, None]),
        ({"sliding_window": 64}, [None, None]),  # transformers reads none for a Llama
    ],
)
def test_windows_belong_to_the_layers_that_transformers_gives_them(keys, windows):
    config = ModelConfig.from_hf(LLAMA | keys)
    assert [layer.window for layer in config.layers] == windows
    assert ModelConfig.from_hf(config.to_hf()) == config


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (
            {"architectures": ["GemmaForCausalLM"]},
            ["GemmaForCausalLM", "LlamaForCausalLM", "GPT2LMHeadModel"],
        ),
        (
            {"rope_scaling": {"rope_type": "ntk", "factor": 2.0}},
            ["ntk", "rope_scaling", "default, linear, llama3, dynamic, yarn, longrope"],
        ),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4}}, ["factor", "rope_parameters", "missing"]),
        ({"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0]}}, ["long_factor", "rope_scaling", "list"]),
        (
            {"rope_scaling": {"rope_type": "longrope", "factor": 2.0, "short_factor": [1.0], "long_factor": [1.0]}},
            ["short_factor has 1 numbers", "expected 8"],
        ),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, ["rope_parameters", "flat"]),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, ["rope_scaling", "low_freq_factor"]),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor", "0.5"]),
        ({"hidden_act": "swish_squared"}, ["hidden_act", "swish_squared", "silu"]),
        ({"hidden_size": None}, ["hidden_size", "missing"]),
        ({"num_hidden_layers": "two"}, ["num_hidden_layers", "two", "integer"]),
        ({"num_hidden_layers": 0}, ["num_hidden_layers", "positive"]),
        ({"num_key_value_heads": 3}, ["num_key_value_heads", "3", "multiple"]),
        ({"hidden_size": 66}, ["hidden_size", "66", "head_dim"]),
        ({"tie_word_embeddings": "yes"}, ["tie_word_embeddings", "yes"]),
        ({"quantization_config": {"bits": 4}}, ["quantization_config"]),
        ({"architectures": ["MistralForCausalLM"], "layer_types": KINDS}, ["layer_types", "Mistral", "remove"]),
        ({"architectures": ["Qwen2ForCausalLM"], "layer_types": KINDS}, ["use_sliding_window", "set it to true"]),
        ({"architectures": ["Qwen3ForCausalLM"], "layer_types": KINDS[:1]}, ["layer_types has 1 entries", "= 2"]),
        (
            {"architectures": ["Qwen2ForCausalLM"], "layer_types": KINDS, **USED, "sliding_window": None},
            ["no sliding_window", "set it"],
        ),
        ({"layer_types": ["full_attention", "linear_attention"]}, ["layer_types", "linear_attention"]),
    ],
)
def test_refusals_name_the_file_the_key_and_what_is_supported(keys, words):
    with pytest.raises(CheckpointError) as error:
        ModelConfig.from_hf(LLAMA | keys, "some/config.json")
    checked = "num_key_value_heads" in keys or "short_factor has" in words[0]  # by ModelConfig, which knows no file
    for word in ["" if checked else "some/config.json", *words]:
        assert word in str(error.value)


NEXT = {  # what each family refuses, or reads in another way than transformers 4 and 5 agree on
    "SmolLM3ForCausalLM": [
        ({"no_rope_layers": [1]}, ["no_rope_layers", "expected 2 numbers"]),
        ({"no_rope_layers": [1, 2]}, ["no_rope_layers", "rotary positions"]),
        ({"layer_types": KINDS}, ["use_sliding_window", "set it to true"]),
        ({"layer_types": KINDS, "use_sliding_window": True}, ["no sliding_window", "set it"]),
    ],
    "Olmo3ForCausalLM": [
        ({"rope_theta": 1e4}, ["rope_theta = 10000.0", "rope_parameters"]),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, ["rope_parameters", "sliding_attention"]),
        ({"rope_parameters": {"full_attention": 3}}, ["rope_parameters.full_attention = 3", "object"]),
    ],
    "Gemma2ForCausalLM": [({"use_bidirectional_attention": True}, ["use_bidirectional_attention", "only False"])],
    "Gemma3ForCausalLM": [
        ({"use_bidirectional_attention": True}, ["use_bidirectional_attention", "only False"]),
        ({"rope_scaling": {"rope_type": "proportional", "factor": 2.0}}, ["rope_type = 'proportional'", "supported"]),
    ],
    "Gemma3ForConditionalGeneration": [({}, ["vision tower", "Gemma3ForCausalLM"])],
    "Phi3ForCausalLM": [
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, ["yarn", "say 'longrope'"]),
        ({"layer_types": KINDS, "sliding_window": 64}, ["layer_types", "remove"]),
        ({"partial_rotary_factor": 1.5}, ["partial_rotary_factor = 1.5", "up to 1.0"]),
    ],
    "GPTNeoXForCausalLM": [({"hidden_size": 66}, ["hidden_size = 66", "num_attention_heads = 4"])],
    "GraniteForCausalLM": [({"logits_scaling": 0}, ["logits_scaling", "positive"])],
    "MixtralForCausalLM": [
        ({"num_experts_per_tok": 2}, ["'num_experts'", "'num_local_experts'", "missing"]),
        ({"num_local_experts": 4}, ["num_experts_per_tok", "missing"]),
        ({"num_local_experts": 4, "num_experts_per_tok": 5}, ["num_experts_per_tok = 5", "num_local_experts = 4"]),
        ({"num_local_experts": 4, "num_experts_per_tok": 0}, ["num_experts_per_tok = 0", "positive"]),
        ({"num_local_experts": 4, "num_experts": 8}, ["num_experts = 8, num_local_experts = 4", "make them equal"]),
        ({**ROUTED, "layer_types": KINDS, "sliding_window": 64}, ["layer_types", "MixtralForCausalLM", "remove"]),
    ],
    "Qwen3MoeForCausalLM": [
        (ROUTED, ["moe_intermediate_size", "missing"]),
        ({**ROUTED, "mlp_only_layers": [1]}, ["mlp_only_layers = [1]", "layers without experts", "only []"]),
        ({**ROUTED, "decoder_sparse_step": 2}, ["decoder_sparse_step = 2", "layers without experts", "only 1"]),
        ({**ROUTED, "layer_types": KINDS, **USED}, ["layer_types", "Qwen3MoeForCausalLM", "remove"]),
        ({**ROUTED, "layer_types": KINDS}, ["use_sliding_window", "set it to true"]),
        ({**ROUTED, "moe_intermediate_size": 8, "norm_topk_prob": 1}, ["norm_topk_prob = 1", "true or false"]),
    ],
}


@pytest.mark.parametrize(("name", "keys", "words"), [(n, *case) for n, cases in NEXT.items() for case in cases])
def test_what_a_family_refuses_names_the_key_and_the_remedy(name, keys, words):
    with pytest.raises(CheckpointError) as error:
        ModelConfig.from_hf(as_architecture(name, **keys), "some/config.json")
    for word in ("some/config.json", *words):
        assert word in str(error.value)


def test_absent_keys_mean_what_each_family_of_transformers_means():
    gemma2, gemma3 = (ModelConfig.from_hf(as_architecture(f"Gemma{n}ForCausalLM", num_hidden_layers=6)) for n in "23")
    assert (gemma2.soft_cap, gemma2.logit_cap, gemma2.tied, gemma2.activation) == (50, 30, True, "gelu_pytorch_tanh")
    assert (gemma2.head_dim, gemma2.query_scale, gemma2.embed_scale) == (256, None, 8.0)
    assert (gemma3.soft_cap, gemma3.logit_cap, gemma3.rope.theta) == (None, None, 1e6)
    assert gemma3.local_rope is not None and gemma3.local_rope.theta == 1e4  # kept where the window hides nothing
    assert [layer.window for layer in gemma3.layers] == [4096] * 5 + [None]
    smollm3 = ModelConfig.from_hf(as_architecture("SmolLM3ForCausalLM", num_hidden_layers=8))
    assert (smollm3.unrotated, smollm3.rope.theta, smollm3.tied, smollm3.window) == ((3, 7), 2e6, True, None)
    neox = ModelConfig.from_hf(as_architecture("GPTNeoXForCausalLM"))
    assert (neox.rope.partial, neox.parallel, neox.qkv_bias, neox.norm_eps) == (0.25, True, True, 1e-5)
    olmo3 = ModelConfig.from_hf(as_architecture("Olmo3ForCausalLM", num_hidden_layers=4, sliding_window=64))
    assert [layer.window for layer in olmo3.layers] == [64, 64, 64, None] and olmo3.rope.theta == 5e5
    mixtral = ModelConfig.from_hf(as_architecture("MixtralForCausalLM", **ROUTED))
    assert (mixtral.rope.theta, mixtral.norm_topk, mixtral.window, mixtral.head_dim) == (1e6, True, None, 16)
    moe = as_architecture("Qwen3MoeForCausalLM", **ROUTED, moe_intermediate_size=8)
    qwen3_moe = ModelConfig.from_hf(moe)
    assert (qwen3_moe.rope.theta, qwen3_moe.norm_topk, qwen3_moe.intermediate_size) == (1e4, False, 8)
    assert (qwen3_moe.head_dim, qwen3_moe.window) == (16, None)  # not 128, as in a Qwen3
    assert ModelConfig.from_hf(moe | USED | {"max_window_layers": 2}).block.window == 64  # every layer has it


def test_yarn_s_factor_on_cos_and_sin_follows_from_the_stretch_where_none_is_given():
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
    read = lambda **keys: ModelConfig.from_hf(LLAMA | {"rope_scaling": yarn | keys}).rope
    assert read().attention_factor == pytest.approx(0.1 * math.log(4) + 1)
    assert read(attention_factor=1.5).attention_factor == 1.5
    both = read(mscale=2.0, mscale_all_dim=0.5).attention_factor
    assert both == pytest.approx((0.2 * math.log(4) + 1) / (0.05 * math.log(4) + 1))
    longrope = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    phi = ModelConfig.from_hf(as_architecture("Phi3ForCausalLM", rope_scaling=longrope, max_position_embeddings=2**17))
    assert phi.rope.attention_factor == pytest.approx(math.sqrt(1 + math.log(32) / math.log(4096)))
    assert phi.position_limit is None and phi.turns_by_length
    assert [phi.same_turns_until(n) for n in (1, 4096, 4097)] == [4096, 4096, None]
    dynamic = ModelConfig.from_hf(LLAMA | {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}})
    most = dynamic.max_positions
    assert [dynamic.same_turns_until(n) for n in (1, most, most + 1)] == [most, most, most + 1]
    assert not ModelConfig.from_hf(LLAMA).turns_by_length and ModelConfig.from_hf(LLAMA).same_turns_until(9) is None


@pytest.mark.parametrize("keys", [{"scale_attn_by_inverse_layer_idx": True}, {"scale_attn_weights": False}])
def test_gpt2_variants_with_other_attention_are_refused(keys):
    with pytest.raises(CheckpointError, match=next(iter(keys))):
        ModelConfig.from_hf(GPT2 | keys)


@pytest.mark.parametrize(
    "raw",
    [
        LLAMA,
        LLAMA | {"rope_parameters": LLAMA3 | {"rope_theta": 5e5}, "eos_token_id": [3, 4]},
        LLAMA | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "bos_token_id": 1},
        as_architecture("MistralForCausalLM", sliding_window=None, eos_token_id=2),
        as_architecture("Qwen2ForCausalLM"),
        as_architecture("Qwen3ForCausalLM", head_dim=32, attention_bias=True),
        GPT2,
        as_architecture("Olmo3ForCausalLM", sliding_window=64, num_hidden_layers=4),
        as_architecture("Gemma3ForCausalLM", sliding_window=64, rope_scaling={"rope_type": "linear", "factor": 8.0}),
        as_architecture("Gemma2ForCausalLM", final_logit_softcapping=None, query_pre_attn_scalar=144),
        as_architecture("SmolLM3ForCausalLM", no_rope_layers=[0, 1], **USED),
        as_architecture("GPTNeoXForCausalLM", rotary_pct=0.5, use_parallel_residual=False),
        as_architecture(
            "Phi3ForCausalLM",
            partial_rotary_factor=0.75,
            rope_scaling={"type": "longrope", "short_factor": [1.0] * 6, "long_factor": [2.0] * 6},
            original_max_position_embeddings=1024,
        ),
        as_architecture("GraniteForCausalLM", embedding_multiplier=12.0, logits_scaling=8.0, attention_multiplier=0.1),
        as_architecture("MixtralForCausalLM", num_local_experts=4, num_experts_per_tok=2, sliding_window=64),
        as_architecture("Qwen3MoeForCausalLM", **ROUTED, moe_intermediate_size=8, norm_topk_prob=True),
    ],
)
def test_writing_and_reading_back_gives_the_same_config(raw):
    config = ModelConfig.from_hf(raw)
    assert ModelConfig.from_hf(config.to_hf()) == config
    v4_only = {k: v for k, v in config.to_hf().items() if k not in ("rope_parameters", "dtype")}
    assert ModelConfig.from_hf(v4_only) == config


def test_a_config_is_hashable_and_compares_by_value():
    config = ModelConfig.from_hf(LLAMA)
    assert hash(config) == hash(ModelConfig.from_hf(dict(LLAMA)))
    assert dataclasses.replace(config, num_layers=3) != config


def test_norms_on_queries_and_keys_belong_to_qwen3_alone():
    shape = {"vocab_size": 8, "hidden_size": 8, "num_layers": 1, "num_heads": 2, "num_kv_heads": 2, "head_dim": 4}
    for family, qk_norm in (("qwen3", False), ("llama", True)):
        with pytest.raises(CheckpointError, match="no checkpoint could hold"):
            ModelConfig(family=family, intermediate_size=8, qk_norm=qk_norm, **shape)


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("vocab_size", [float("nan"), float("inf"), 1e300, 10**400, 2**40]),
        ("rms_norm_eps", [float("nan"), float("inf"), 10**400]),
        ("rope_theta", [float("nan"), "1e4"]),
        ("architectures", ["LlamaForCausalLM", 3, True, {"a": 1}, [["LlamaForCausalLM"]], [None]]),
        ("eos_token_id", ["2", [[2]], 1.5, float("nan"), {"a": 2}, True]),
        ("bos_token_id", ["1", [1], 1.5]),
        ("pad_token_id", ["<pad>", [0]]),
        ("layer_types", ["full_attention", 3, [[1]], {"a": 1}]),
        ("max_position_embeddings", ["4096", [1], float("nan")]),
    ],
)
def test_values_of_the_wrong_kind_name_their_key(key, values):
    for value in values:
        with pytest.raises(CheckpointError, match=rf"config\.json: {key} "):
            ModelConfig.from_hf(LLAMA | {key: value, "sliding_window": 32})


def test_a_negative_token_id_stands_for_none():
    config = ModelConfig.from_hf(LLAMA | {"pad_token_id": -1, "eos_token_id": [2, -1]})
    assert config.pad_token_id is None and config.eos_token_ids == (2,)
