"""Makes the golden files of this directory from torch transformers and peft (float32, CPU).

    python tests/golden/make_golden.py            # rewrites everything beside this file
    python tests/golden/make_golden.py CASE ...   # those cases alone

Needs torch, transformers and peft, which ntkjax itself never needs; versions.json records what was used.
Each case is a tiny random checkpoint in Hugging Face format. Weights are drawn at a scale where mistakes
show: norm scales around 1 but not 1, biases not 0, logits of order 1 to 10.

Written: CASE/ (config.json, safetensors), logits.safetensors (float32, [rows, kept positions, vocabulary])
and golden.json: per case its tokens, which positions were kept, prompts and their greedy continuations with
the smallest gap between the two largest logits, and torch's own rounding (the largest difference between its
float32 and its float64 logits).
"""

from __future__ import annotations

import json
import math
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

import peft
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

HERE = Path(__file__).resolve().parent
VOCAB = 96
FULL, SLIDING = "full_attention", "sliding_attention"
NEW_TOKENS = 12
MARGIN = 0.01
TINY = {
    "vocab_size": VOCAB,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
}
GQA = {
    "vocab_size": VOCAB,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
}
GPT2 = {"vocab_size": VOCAB, "n_positions": 48, "n_embd": 24, "n_layer": 2, "n_head": 3}
NEOX = {
    "vocab_size": VOCAB,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "max_position_embeddings": 64,
}
# Two frequencies kept, one interpolated, the others slowed: every branch of the rule is taken.
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 8.0,
    "original_max_position_embeddings": 32,
}


@dataclass(frozen=True)
class Case:
    """One checkpoint: its configuration, how it is stored and which tokens are asked of it."""

    config: object
    note: str
    rows: int = 3
    length: int = 16
    stride: int = 1
    edit: str = ""
    shard_size: str = "1GB"
    lora: dict = field(default_factory=dict)


def rope(theta: float) -> dict:
    return {"rope_type": "default", "rope_theta": theta}


def llama_cases() -> dict[str, Case]:
    tiny, gqa = {**TINY, "max_position_embeddings": 64}, {**GQA, "max_position_embeddings": 64}
    return {
        "llama2": Case(
            LlamaConfig(**tiny, rope_parameters=rope(1e4), rms_norm_eps=1e-5),
            "multi-head attention; rotary_emb.inv_freq stored as in old files",
            edit="inv_freq",
        ),
        "llama3": Case(LlamaConfig(**gqa, rope_parameters=rope(5e5), rms_norm_eps=1e-5), "grouped queries"),
        **scaled_rope_cases(),  # here: a case's place decides its seed
        "llama-biases": Case(
            LlamaConfig(**tiny, rope_parameters=rope(1e4), attention_bias=True, mlp_bias=True),
            "biases on every linear layer",
        ),
        "llama-head-dim": Case(
            LlamaConfig(**{**gqa, "head_dim": 6}, rope_parameters=rope(2e4)),
            "heads x head_dim is not the hidden size",
        ),
        "mistral": Case(MistralConfig(**gqa, rope_parameters=rope(1e6), sliding_window=None), "no window"),
        "smollm2": Case(
            LlamaConfig(**{**TINY, "num_key_value_heads": 1}, rope_parameters=rope(1e5), tie_word_embeddings=True),
            "tied head, grouped queries",
        ),
        "mixed-dtype": Case(
            LlamaConfig(**tiny, rope_parameters=rope(1e4)), "bf16, f16 and f32 in one file", edit="mixed"
        ),
        "llama-lora": Case(
            LlamaConfig(**gqa, rope_parameters=rope(5e5)),
            "PEFT adapter, all linear layers",
            lora={"r": 4, "lora_alpha": 12, "target_modules": "all-linear"},
        ),
    }


def scaled_rope_cases() -> dict[str, Case]:
    """Positions past the original context."""
    long = {"rows": 2, "length": 90, "stride": 6}
    tiny = {**TINY, "max_position_embeddings": 64}
    wide = {**GQA, "max_position_embeddings": 128, "head_dim": 12, "num_attention_heads": 4}
    linear = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
    return {
        "llama31": Case(LlamaConfig(**wide, rope_parameters=LLAMA3_ROPE), "llama3 rope scaling, untied", **long),
        "llama32-tied": Case(
            LlamaConfig(**wide, rope_parameters={**LLAMA3_ROPE, "factor": 32.0}, tie_word_embeddings=True),
            "llama3 rope scaling, tied",
            **long,
        ),
        "llama31-v4": Case(
            LlamaConfig(**wide, rope_parameters=LLAMA3_ROPE),
            "configuration as v4 wrote it",
            edit="v4",
            **long,
        ),
        "llama-linear": Case(LlamaConfig(**tiny, rope_parameters=linear), "linear rope scaling"),
        "llama-linear-v4": Case(
            LlamaConfig(**tiny, rope_parameters=linear),
            "configuration as early v4 wrote it: rope_scaling has `type`",
            edit="v4-type",
        ),
    }


def other_cases() -> dict[str, Case]:
    tiny, gqa = {**TINY, "max_position_embeddings": 64}, {**GQA, "max_position_embeddings": 64}
    tiny = {**tiny, "num_key_value_heads": 1}
    head = {"head_dim": 8, "num_attention_heads": 4}
    return {
        "qwen2": Case(Qwen2Config(**gqa, rope_parameters=rope(1e6)), "q, k and v biases"),
        "qwen2-tied": Case(
            Qwen2Config(**tiny, rope_parameters=rope(1e6), tie_word_embeddings=True),
            "v4 configuration with an unused sliding window",
            edit="v4",
        ),
        "qwen3": Case(Qwen3Config(**{**gqa, **head}, rope_parameters=rope(1e6)), "qk-norm"),
        "qwen3-tied": Case(
            Qwen3Config(**{**tiny, "head_dim": 8}, rope_parameters=rope(1e6), tie_word_embeddings=True),
            "qk-norm, tied",
        ),
        "qwen3-sharded": Case(
            Qwen3Config(**{**tiny, "head_dim": 16}, rope_parameters=rope(1e4)),
            "several files and an index",
            shard_size="15KB",
        ),
        "gpt2": Case(GPT2Config(**GPT2), "gelu_new, tied"),
        "gpt2-relu": Case(
            GPT2Config(**GPT2, activation_function="relu", layer_norm_epsilon=1e-2, n_inner=40),
            "relu, large epsilon, n_inner",
        ),
        "gpt2-hub": Case(
            GPT2Config(**GPT2, activation_function="gelu"),
            "names without `transformer.` and the mask buffers of the original files; exact gelu",
            edit="gpt2-hub",
        ),
        "gpt2-lora": Case(
            GPT2Config(**GPT2),
            "PEFT adapter, fan_in_fan_out",
            lora={
                "r": 3,
                "lora_alpha": 6,
                "target_modules": ["c_attn", "c_proj", "c_fc"],
                "fan_in_fan_out": True,
            },
        ),
    }


# Beyond every window, and with a continuation that begins inside one.
FAR = {"rows": 2, "length": 24, "stride": 3}


def family_cases() -> dict[str, Case]:
    """At least two settings of each family; a new one goes last: a case's place decides its seed."""
    t, gqa = transformers, {**GQA, "max_position_embeddings": 64, "num_hidden_layers": 3}
    by_kind = lambda full, local: {"rope_parameters": {FULL: full, SLIDING: local}}
    linear = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
    tied, biased = {"tie_word_embeddings": True}, {"attention_bias": True}
    plain, used = {**gqa, "rope_parameters": rope(1e4)}, {"use_sliding_window": True, "sliding_window": 6}
    return {
        "mistral-window": Case(MistralConfig(**plain, sliding_window=5), "a window in every layer", **FAR),
        "qwen2-window": Case(Qwen2Config(**plain, **used, max_window_layers=1), "windows from layer 1 on", **FAR),
        "qwen3-window": Case(
            Qwen3Config(**plain, **used, head_dim=8, layer_types=[SLIDING, FULL, SLIDING]),
            "windows by layer_types",
            **FAR,
        ),
        "smollm3": Case(
            t.SmolLM3Config(**plain, **tied, no_rope_layer_interval=2), "tied; layer 1 without rotary positions"
        ),
        "smollm3-window": Case(
            t.SmolLM3Config(
                **plain, **used, **biased, mlp_bias=True, no_rope_layers=[0, 1, 0], tie_word_embeddings=False
            ),
            "no_rope_layers, windows in those, biases",
            **FAR,
        ),
        "olmo2": Case(t.Olmo2Config(**plain), "norms after, qk-norm over all heads"),
        "olmo2-bias": Case(t.Olmo2Config(**plain, **biased, **tied, rms_norm_eps=1e-3), "biases, tied"),
        "olmo3": Case(
            t.Olmo3Config(**{**gqa, "num_hidden_layers": 4}, **by_kind(yarn, rope(1e3)), sliding_window=6),
            "default layer types, yarn in full",
            **FAR,
        ),
        "olmo3-kinds": Case(
            t.Olmo3Config(**gqa, layer_types=[FULL, SLIDING, FULL], sliding_window=5, **biased),
            "layer_types, one theta, biases",
            **FAR,
        ),
        "gemma2": Case(
            t.Gemma2Config(
                **plain,
                head_dim=8,
                query_pre_attn_scalar=12,
                sliding_window=6,
                attn_logit_softcapping=1.5,
                final_logit_softcapping=3.0,
            ),
            "soft caps that bend, windows, tied",
            **FAR,
        ),
        "gemma2-uncapped": Case(
            t.Gemma2Config(
                **plain,
                **biased,
                head_dim=4,
                query_pre_attn_scalar=4,
                sliding_window=64,
                tie_word_embeddings=False,
                attn_logit_softcapping=None,
                final_logit_softcapping=None,
            ),
            "no soft caps, biases, untied",
        ),
        "gemma3": Case(
            t.Gemma3TextConfig(
                **gqa,
                **by_kind(linear, rope(100.0)),
                head_dim=8,
                query_pre_attn_scalar=12,
                layer_types=[SLIDING, SLIDING, FULL],
                sliding_window=6,
            ),
            "two rotary bases, linear scaling in full layers, tied",
            **FAR,
        ),
        "gemma3-v4": Case(
            t.Gemma3TextConfig(
                **gqa,
                **by_kind(linear, rope(1e3)),
                **biased,
                head_dim=4,
                query_pre_attn_scalar=4,
                final_logit_softcapping=3.0,
                sliding_window=5,
                tie_word_embeddings=False,
            ),
            "configuration as v4 wrote it (sliding_window_pattern), a cap on the logits, biases, untied",
            edit="v4-gemma3",
            **FAR,
        ),
        "phi3": Case(t.Phi3Config(**plain), "fused q, k, v and gate, up"),
        "phi4-mini": Case(
            t.Phi3Config(
                **{**gqa, "hidden_size": 32, "num_attention_heads": 4},
                sliding_window=None,
                **tied,
                original_max_position_embeddings=32,
                rope_parameters={
                    "rope_type": "longrope",
                    "rope_theta": 1e4,
                    "partial_rotary_factor": 0.75,
                    "short_factor": [1.0, 1.3, 1.9],
                    "long_factor": [1.0, 2.0, 4.0],
                },
            ),
            "longrope below its switch, part of a head rotated, tied",
            **FAR,
        ),
        "phi3-window": Case(t.Phi3Config(**plain, sliding_window=5), "a window in every layer", **FAR),
        "gpt-neox": Case(
            t.GPTNeoXConfig(**NEOX, rope_parameters={**rope(1e4), "partial_rotary_factor": 0.5}), "parallel residual"
        ),
        "pythia-v4": Case(
            t.GPTNeoXConfig(
                **NEOX,
                attention_bias=False,
                use_parallel_residual=False,
                hidden_act="gelu_new",
                rope_parameters={**rope(1e3), "partial_rotary_factor": 0.25},
            ),
            "as v4 stores it (embed_out, rotary_pct), one part after the other, no biases in attention",
            edit="v4-neox",
        ),
        "granite": Case(
            t.GraniteConfig(
                **plain, embedding_multiplier=3.0, attention_multiplier=0.7, residual_multiplier=0.6, logits_scaling=0.8
            ),
            "all four multipliers",
        ),
        "granite-bias": Case(
            t.GraniteConfig(**plain, **biased, **tied, mlp_bias=True, embedding_multiplier=2.0, logits_scaling=2.0),
            "biases, tied",
        ),
        "llama-yarn": Case(LlamaConfig(**gqa, rope_parameters=yarn), "yarn beyond the original context", **FAR),
        "qwen2-yarn-v4": Case(
            Qwen2Config(**gqa, rope_parameters={**yarn, "beta_fast": 4.0, "attention_factor": 1.3}),
            "configuration as v4 wrote it, an attention factor",
            edit="v4",
            **FAR,
        ),
        "llama-dynamic": Case(
            LlamaConfig(**gqa, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
            "dynamic scaling, which is none up to max_position_embeddings",
            **FAR,
        ),
        **expert_cases(plain, used, biased),
        "phi3-longrope": Case(
            t.Phi3Config(
                **gqa,
                sliding_window=None,
                original_max_position_embeddings=21,
                rope_parameters={
                    "rope_type": "longrope",
                    "rope_theta": 1e4,
                    "short_factor": [1.0, 1.4],
                    "long_factor": [1.5, 6.0],
                },
            ),
            "longrope beyond its switch",
            **FAR,
        ),
    }


def expert_cases(plain: dict, used: dict, biased: dict) -> dict[str, Case]:
    """Families with routed experts; the arguments are settings of `family_cases`."""
    t = transformers
    return {
        "mixtral": Case(
            t.MixtralConfig(**{**plain, "num_hidden_layers": 2, "intermediate_size": 20}, num_local_experts=4),
            "two of four experts",
        ),
        "mixtral-window": Case(
            t.MixtralConfig(
                **{**plain, "intermediate_size": 16},
                head_dim=8,
                num_local_experts=5,
                num_experts_per_tok=3,
                sliding_window=5,
                tie_word_embeddings=True,
            ),
            "three of five experts, a window in every layer, tied",
            **FAR,
        ),
        "qwen3-moe": Case(
            t.Qwen3MoeConfig(
                **{**plain, "num_hidden_layers": 2},
                head_dim=8,
                num_experts=6,
                num_experts_per_tok=2,
                moe_intermediate_size=12,
                norm_topk_prob=True,
            ),
            "two of six experts, their weights divided by their sum",
        ),
        "qwen3-moe-v4": Case(
            t.Qwen3MoeConfig(
                **plain,
                **used,
                **biased,
                num_experts=4,
                num_experts_per_tok=3,
                moe_intermediate_size=16,
                norm_topk_prob=False,
            ),
            "configuration as v4 wrote it (num_experts), three of four experts, weights as they are, biases, windows",
            edit="v4",
            **FAR,
        ),
    }


def randomise(model: torch.nn.Module, seed: int) -> None:
    """Draw every parameter: norms 1 + 0.3 n, biases 0.3 n, embeddings 0.3 n, matrices n / sqrt(inputs)."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in sorted(model.named_parameters()):
        n = torch.randn(p.shape, generator=generator)
        if name.endswith("bias"):
            n = 0.3 * n
        elif "norm" in name or "ln_" in name:
            n = ("gemma" not in model.config.model_type) + 0.3 * n  # Gemma's multiply by 1 + w
        elif "embed" in name or "wte" in name or "wpe" in name:
            n = 0.3 * n
        else:
            inputs = p.shape[0] if "c_" in name else p.shape[-1]  # GPT-2's Conv1D stores [in, out]
            n = n / math.sqrt(inputs)
        p.data.copy_(n)


def edit_checkpoint(folder: Path, how: str) -> None:
    """Rewrite what transformers saved as other versions and the hub store it."""
    config, weights = folder / "config.json", folder / "model.safetensors"
    if how.startswith("v4"):
        config.write_text(json.dumps(v4_config(json.loads(config.read_text()), how), indent=2) + "\n")
    tensors = load_file(weights) if weights.exists() else {}
    if how == "inv_freq":
        tensors |= {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": 1e4 ** (-torch.arange(4) / 4) for i in range(2)}
    elif how == "mixed":
        kinds = {"self_attn": torch.bfloat16, "mlp.up": torch.float16, "norm": torch.bfloat16}
        for name, t in tensors.items():
            tensors[name] = t.to(next((d for part, d in kinds.items() if part in name), t.dtype))
    elif how == "v4-neox":
        tensors = {name.replace("lm_head.", "embed_out."): t for name, t in tensors.items()}
    elif how == "gpt2-hub":
        tensors = {name.removeprefix("transformer."): t for name, t in tensors.items()}
        tensors |= {f"h.{i}.attn.bias": torch.tril(torch.ones(1, 1, 48, 48, dtype=torch.uint8)) for i in range(2)}
    else:
        return
    save_file({n: t.contiguous() for n, t in tensors.items()}, weights, metadata={"format": "pt"})


def v4_config(config: dict, how: str) -> dict:
    """transformers v4: rope_theta and rope_scaling at the top, torch_dtype; Qwen2 with an unused window."""
    parameters = config.pop("rope_parameters")
    if how == "v4-gemma3":
        config.pop("layer_types")
        config |= {"rope_local_base_freq": parameters[SLIDING]["rope_theta"], "sliding_window_pattern": 2}
        parameters = parameters[FULL]
    if how == "v4-neox":
        config |= {"rotary_pct": parameters.pop("partial_rotary_factor"), "rotary_emb_base": parameters["rope_theta"]}
    config["rope_theta"] = parameters.pop("rope_theta")
    kind = parameters.pop("rope_type")
    if how == "v4-type":
        config["rope_scaling"] = {"type": kind, **parameters}
    else:
        config["rope_scaling"] = None if kind == "default" else {"rope_type": kind, **parameters}
    config["torch_dtype"] = config.pop("dtype", "float32")
    config["transformers_version"] = "4.44.0"
    if config["model_type"] == "qwen2" and kind == "default":
        config.pop("layer_types", None)
        config |= {"sliding_window": 16, "use_sliding_window": False, "max_window_layers": 1}
    if config["model_type"] == "qwen3_moe":
        config["num_experts"] = config.pop("num_local_experts")
    return config


def load(folder: Path, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager", experts_implementation="eager"
    )
    if (folder / "adapter").exists():
        model = peft.PeftModel.from_pretrained(model, folder / "adapter").to(dtype)
    return model.eval()


def greedy(model: torch.nn.Module, prompt: list[int]) -> tuple[list[int], float]:
    """Continue by the largest logit without a cache; the smallest gap to the runner-up met on the way."""
    tokens, gap = list(prompt), math.inf
    for _ in range(NEW_TOKENS):
        top = model(torch.tensor([tokens])).logits[0, -1].topk(2)
        gap = min(gap, float(top.values[0] - top.values[1]))
        tokens.append(int(top.indices[0]))
    return tokens[len(prompt) :], gap


def find_prompt(model: torch.nn.Module, length: int, generator: torch.Generator) -> dict:
    """A random prompt whose continuation no rounding can change (gap above MARGIN at every step)."""
    for _ in range(200):
        prompt = torch.randint(0, VOCAB, (length,), generator=generator).tolist()
        continuation, gap = greedy(model, prompt)
        if gap > MARGIN and len(set(continuation)) > 3:
            cached = model.generate(
                input_ids=torch.tensor([prompt]),
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
                attention_mask=torch.ones(1, length),
            )
            assert cached[0, length:].tolist() == continuation
            return {"prompt": prompt, "continuation": continuation, "margin": round(gap, 4)}
    raise RuntimeError("no prompt with a clear continuation; change the seed")


def add_adapter(folder: Path, options: dict, seed: int) -> None:
    """Write folder/adapter with peft, both factors random; sorted, so that the recipe repeats exactly."""
    adapted = peft.get_peft_model(load(folder), peft.LoraConfig(task_type="CAUSAL_LM", **options))
    torch.manual_seed(seed)
    for name, p in adapted.named_parameters():
        if "lora_" in name:
            p.data.copy_(0.15 * torch.randn(p.shape))
    adapted.save_pretrained(folder / "adapter")
    (folder / "adapter" / "README.md").unlink(missing_ok=True)
    file = folder / "adapter" / "adapter_config.json"
    config = json.loads(file.read_text()) | {"base_model_name_or_path": folder.name}
    config["target_modules"] = sorted(config["target_modules"])
    file.write_text(json.dumps(config, indent=2) + "\n")


def make_case(name: str, case: Case, seed: int) -> tuple[dict, torch.Tensor]:
    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    case.config.dtype = "float32"
    case.config.bos_token_id = case.config.eos_token_id = case.config.pad_token_id = None
    model = transformers.AutoModelForCausalLM.from_config(case.config)
    randomise(model, seed)
    model.save_pretrained(folder, max_shard_size=case.shard_size)
    (folder / "generation_config.json").unlink(missing_ok=True)
    edit_checkpoint(folder, case.edit)
    if case.lora:
        add_adapter(folder, case.lora, seed)
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, VOCAB, (case.rows, case.length), generator=generator)
    kept = sorted({*range(0, case.length, case.stride), case.length - 1})
    model = load(folder)
    with torch.no_grad():
        logits = model(tokens).logits
        rounding = (logits.double() - load(folder, torch.float64)(tokens).logits).abs().max()
        prompts = [find_prompt(model, length, generator) for length in (3, 11)]
    entry = {
        "note": case.note,
        "tokens": tokens.tolist(),
        "positions": kept,
        "prompts": prompts,
        "largest_logit": round(float(logits.abs().max()), 2),
        "torch_rounding": float(f"{rounding:.2g}"),
    }
    return entry, logits[:, kept].contiguous()


def main(only: list[str]) -> None:
    torch.set_num_threads(1)
    if not only:
        write({}, {})
    for seed, (name, case) in enumerate({**llama_cases(), **other_cases(), **family_cases()}.items()):
        if only and name not in only:
            continue
        entry, logits = make_case(name, case, seed)
        entries, tensors = json.loads((HERE / "golden.json").read_text()), load_file(HERE / "logits.safetensors")
        write(entries | {name: entry}, tensors | {name: logits})
        margins = [p["margin"] for p in entry["prompts"]]
        print(name, {k: entry[k] for k in ("largest_logit", "torch_rounding")}, "margins", margins, flush=True)
    versions = {m.__name__: m.__version__ for m in (torch, transformers, peft)}
    (HERE / "versions.json").write_text(json.dumps(versions, indent=2) + "\n")


def write(entries: dict, logits: dict) -> None:
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(entry)}" for name, entry in entries.items())
    (HERE / "golden.json").write_text("{\n" + lines + "\n}\n")
    save_file(logits, HERE / "logits.safetensors")


if __name__ == "__main__":
    main(sys.argv[1:])
