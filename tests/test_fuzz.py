"""Whatever the files hold: a result whose counts add up, or an error of the family that says what to mend.

Records, chat templates, config.json and adapter_config.json are drawn at random, near to what is right, and go through
the real readers. ``many`` (slow) draws 10,000 of each kind.
"""

from __future__ import annotations

import copy
import json
import math
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from transformers import AutoTokenizer

from ntkjax import assets
from ntkjax.commands.show import ShowConfig, describe, show
from ntkjax.data import Example, read_records, render, render_prompt, tokenise
from ntkjax.data.messages import SPEAKERS
from ntkjax.data.prompts import render_text
from ntkjax.data.schema import KNOWN_FIELDS
from ntkjax.data.turns import squeeze
from ntkjax.errors import CheckpointError, DataError, UserError
from ntkjax.models import ModelConfig, adapter_lora_config, load_lm
from ntkjax.pipeline.options import DataOptions
from ntkjax.pipeline.reading import reading

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import strategies as st  # noqa: E402

TINY = Path(assets.__file__).parent / "tiny-lm"
MANY = pytest.param(10_000, marks=pytest.mark.slow, id="many")


def drawn(examples, *strategies):
    """Run a function on ``examples`` draws of the strategies."""
    settings = hypothesis.settings(
        deadline=None,
        max_examples=examples,
        derandomize=True,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    return lambda check: settings(hypothesis.given(*strategies)(check))()


# -- what records may hold --

texts = st.one_of(
    st.sampled_from(
        ["a", "", " ", "Why?", "A. four", "<think>x</think>y", "<|end|>", "\ue000mark\ue001", "\ud800", "\u202e\u05d0"]
    ),
    st.text(st.characters(), max_size=12),
)
leaves = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 3), st.sampled_from([10**30, 10**400]), st.floats(width=32), texts
)
values = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3), max_leaves=6
)
odd = st.one_of(values, st.integers(90, 1200).map(lambda levels: json.loads("[" * levels + "]" * levels)))


def mostly(usual, rare=values):
    """``usual``, and now and then ``rare``."""
    return st.integers(0, 11).flatmap(lambda n: rare if n == 0 else usual)


functions = st.fixed_dictionaries({"name": mostly(texts), "arguments": st.one_of(texts, values)})
calls = st.lists(
    mostly(st.fixed_dictionaries({"type": st.just("function"), "function": mostly(functions)})), max_size=2
)
extras = {
    "weight": mostly(st.sampled_from([0, 1])),
    "train": mostly(st.booleans()),
    "tool_calls": mostly(calls),
    "function_call": mostly(functions),
    "reasoning_content": mostly(texts),
    "name": mostly(texts, odd),
}
content = mostly(
    st.one_of(texts, st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": texts}), max_size=2))
)
role = mostly(st.sampled_from(["user", "assistant", "assistant", "system", "tool", *SPEAKERS]))
message = mostly(
    st.one_of(
        st.fixed_dictionaries({"role": role, "content": content}, optional=extras),
        st.fixed_dictionaries({"role": role, "content": content}),
        st.fixed_dictionaries({"from": role, "value": content}, optional=extras),
    )
)
answered = st.builds(
    lambda turns, end: [*turns, end],
    st.lists(message, min_size=1, max_size=4),
    st.fixed_dictionaries({"role": st.just("assistant"), "content": content}, optional=extras),
)
chats = mostly(st.one_of(answered, st.lists(message, max_size=4)))
around = {
    "id": mostly(st.one_of(st.integers(0, 3), texts)),
    "source": mostly(texts),
    "answer": mostly(st.one_of(st.sampled_from(["a", "b"]), leaves)),
    "choices": mostly(st.just(["a", "b"])),
    "system": mostly(texts),
    "history": mostly(st.lists(st.lists(texts, min_size=2, max_size=2), max_size=2)),
    "tools": mostly(st.one_of(calls, calls.map(json.dumps))),
}


def shaped(**fields):
    return st.fixed_dictionaries(fields, optional=around)


records = st.one_of(
    shaped(prompt=mostly(texts), response=mostly(texts)),
    shaped(messages=chats),
    shaped(conversations=chats),
    shaped(prompt=chats, completion=chats),
    shaped(instruction=mostly(texts), input=mostly(texts), output=mostly(texts)),
    st.dictionaries(st.sampled_from(sorted(KNOWN_FIELDS)) | texts, odd, max_size=5),
    odd,
)
no_breaks = st.text(st.characters(exclude_characters="\n", exclude_categories=["Cs"]), max_size=12)
lines = st.lists(mostly(records.map(json.dumps), no_breaks), min_size=1, max_size=5)


@pytest.fixture(scope="module")
def plain_tokenizer():
    tokenizer = AutoTokenizer.from_pretrained(str(TINY))
    tokenizer.chat_template = None
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(str(TINY))


def strict(report):
    """The report survives as JSON without NaN, in UTF-8."""
    text = json.dumps(report, allow_nan=False, ensure_ascii=False)
    assert json.loads(text.encode().decode()) == report


def same(first, second):
    """Two examples are equal but for their ids, sources and NaN."""
    keep = lambda example: {k: v for k, v in example.to_json().items() if k not in ("id", "source")}
    return json.dumps(keep(first), sort_keys=True) == json.dumps(keep(second), sort_keys=True)


@pytest.mark.parametrize("examples", [pytest.param(100, id="quick"), MANY])
def test_records(examples, tokenizer, plain_tokenizer):
    def check(rows, max_length, chat):
        with tempfile.TemporaryDirectory() as folder:
            path, cache = Path(folder) / "f.jsonl", Path(folder) / "cache"
            path.write_text("\n".join(rows), encoding="utf-8", newline="\n")
            count = sum(1 for row in rows if row.strip(" \t\r\x0b\x0c"))
            try:
                found = read_records(path, on_bad_record="skip", cache_dir=cache)
            except DataError as error:
                assert str(error).startswith(str(path)), error
                found = None
            try:
                whole = read_records(path, cache_dir=cache)
            except DataError as error:
                assert str(error).startswith(str(path)), error
                assert found is None or found.report["skipped"]
            else:
                assert found is not None and found.report["skipped"] == 0 and found.fingerprint == whole.fingerprint
            if found is None:
                return
            strict(found.report)
            assert len(found) + found.report["skipped"] == count
            written = Path(folder) / "again.jsonl"
            found.write_jsonl(written)
            again = read_records(written, cache_dir=cache)
            assert all(same(a, b) for a, b in zip(found, again, strict=True))
            check_tokens(found, tokenizer if chat else plain_tokenizer, max_length, cache)

    drawn(examples, lines, st.integers(2, 40), st.booleans())(check)


def check_tokens(found, tokenizer, max_length, cache):
    try:
        data = tokenise(found, tokenizer, max_length=max_length, on_bad_record="skip", cache_dir=cache)
    except DataError:
        return
    strict(data.report)
    assert data.report["examples"] + data.report["skipped"] == len(found)
    assert reading({"data": {"records": found.report, "tokens": data.report}})
    for row in range(len(data)):
        (tokens, start), trained = data.tokens(row), np.asarray(data.trained(row))
        assert 0 < len(tokens) <= max_length and 0 <= start < len(tokens)
        assert len(trained) == len(tokens) and trained.any()


@pytest.mark.parametrize("examples", [pytest.param(25, id="quick"), MANY])
def test_show(examples):
    def check(rows, bad):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "f.jsonl"
            path.write_text("\n".join(rows), encoding="utf-8", newline="\n")
            config = ShowConfig(model=str(TINY), data=(str(path),), reading=DataOptions(on_bad_record=bad))
            try:
                text = describe(config, show(config))
            except DataError as error:
                assert str(path) in str(error) or "no record is left" in str(error)
            else:
                assert "data: read" in text and text.encode()

    with tempfile.TemporaryDirectory() as cache, pytest.MonkeyPatch.context() as patch:
        patch.setenv("NTKJAX_CACHE", cache)
        drawn(examples, lines, st.sampled_from(["raise", "skip"]))(check)


# -- chat templates --

CONTENTS = ("m['content']", "m['content'] | trim", "' ' ~ m['content']", "m['content'] ~ '\\n'", "m.content | upper")
SPLIT = "(m['content'].split('</think>')[-1] if m.role == 'assistant' else m['content'])"
CALL = "<call>{{ c['function']['name'] }}{{ c['function'].arguments | tojson }}"
CALLS = "{% for c in m['tool_calls'] or [] %}" + CALL + "{% endfor %}"
HEADERS = ("<|{r}|>", "<|{r}|>\\n", "[{r}] ", "\\n### {r}:\\n", "")
ENDS = ("<|end|>", "<|end|>\\n", "\\n", "", "<|pad|>", " <|end|>")
STARTS = (
    "",
    "{{ bos_token }}",
    "{% if not tools is defined %}plain\n{% endif %}",
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}",
    "{% if messages[0].role != 'user' %}{{ raise_exception('a user first') }}{% endif %}",
    "{% if messages | length % 2 == 1 and not add_generation_prompt %}{{ raise_exception('odd') }}{% endif %}",
)
OPENED = ("", "", "<think>\\n", "<think></think>")
PARTS = ("all", "all", "no system", "last alone")


@st.composite
def templates(draw):
    pick = lambda options: draw(st.sampled_from(options))
    header, end, body = pick(HEADERS), pick(ENDS), pick((*CONTENTS, SPLIT))
    assistant = header.replace("{r}", "assistant")
    said = "{{ " + body + " }}" + pick(("", CALLS, CALLS))
    if draw(st.booleans()):
        said += end and "{{ '" + end + "' }}"
        end = ""
    if pick((False, False, True)):
        said = (
            "{% if m.role == 'assistant' %}{% generation %}"
            + said
            + "{% endgeneration %}{% else %}"
            + said
            + "{% endif %}"
        )
    turn = "{{ '" + header.replace("{r}", "' ~ m['role'] ~ '") + "' }}" + said + "{{ '" + end + "' }}"
    turn = {
        "all": turn,
        "no system": "{% if m.role != 'system' %}" + turn + "{% endif %}",
        "last alone": "{% if loop.last or m.role != 'assistant' %}" + turn + "{% endif %}",
    }[pick(PARTS)]
    prompt = "{% if add_generation_prompt %}{{ '" + assistant + pick(OPENED) + "' }}{% endif %}"
    last = pick(("", "", "{{ eos_token }}", "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}"))
    return pick(STARTS) + "{% for m in messages %}" + turn + "{% endfor %}" + last + prompt


words = st.sampled_from(
    ["Hi", "It is four.", " x ", "<think>so</think>Yes", "a\n\nb", "</think>", "assistant", "<|end|>", ""]
)
turns = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "system", "tool"]), "content": words},
        optional={
            "weight": st.sampled_from([0, 1]),
            "tool_calls": st.just([{"function": {"name": "f", "arguments": {}}}]),
        },
    ),
    min_size=1,
    max_size=4,
)


@pytest.mark.parametrize("examples", [pytest.param(150, id="quick"), MANY])
def test_templates(examples, tokenizer):
    tokenizer = copy.deepcopy(tokenizer)

    def check(template, context, response, fields, loss_turns):
        tokenizer.chat_template = template
        example = Example("r", "s", "Hi", tuple(context), response, response_fields=fields)
        try:
            text = render_text(tokenizer, example, loss_turns=loss_turns)
            rendered = render(tokenizer, example, loss_turns=loss_turns)
        except DataError as error:
            assert "'r'" in str(error)
            return
        edges = [edge for span in text.trained for edge in span]
        assert edges == sorted(edges) and all(0 <= edge <= len(text.text) for edge in edges)
        assert squeeze(response) in squeeze(text.text[text.response_start :]) or "| upper" in template
        # An empty span is a turn of which the template writes nothing.
        assert all(0 <= a <= b <= len(rendered.tokens) for a, b in rendered.trained)
        assert 0 <= rendered.response_start <= len(rendered.tokens)
        assert rendered.turns_lost <= sum(m["role"] == "assistant" for m in context)
        assert rendered.messages_lost <= sum(m["role"] != "assistant" for m in context)
        speakers = [m for m in context if m["role"] == "assistant"]
        asked = sum(len(m.get("tool_calls", [])) for m in (*speakers, fields or {}))
        assert rendered.calls_lost <= asked and (CALLS in template or rendered.calls_lost == asked)
        if not rendered.apart:
            prompt = render_prompt(tokenizer, example)
            assert rendered.tokens[: len(prompt)] == prompt or rendered.crossing or response != response.lstrip()

    fields = st.sampled_from([None, None, {"tool_calls": [{"function": {"name": "g", "arguments": {"x": 1}}}]}])
    drawn(examples, templates(), turns, words, fields, st.sampled_from(["all", "last"]))(check)


# -- configurations --

SIZES = {"vocab_size": 32, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
MORE = {"num_key_value_heads": 2, "max_position_embeddings": 64, "hidden_act": "silu", "rope_theta": 1e4}
MORE |= {"sliding_window": 32, "layer_types": ["full_attention"] * 2, "max_window_layers": 2, "eos_token_id": [3, 4]}
MORE |= {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1, "high_freq_factor": 4}}
MORE |= {"rope_parameters": {"rope_type": "linear", "factor": 2.0}, "head_dim": 4, "use_sliding_window": False}
MORE |= {"bos_token_id": 1, "pad_token_id": -1, "rms_norm_eps": 1e-6, "tie_word_embeddings": True, "dtype": "float32"}
GPT2 = {"vocab_size": 32, "n_embd": 8, "n_head": 2, "n_layer": 2, "n_inner": None, "n_positions": 64}
bases = st.sampled_from(
    [
        {"architectures": ["LlamaForCausalLM"], **SIZES, **MORE},
        {"architectures": ["MistralForCausalLM"], **SIZES, **MORE, "sliding_window": None},
        {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", **SIZES, **MORE},
        {"model_type": "qwen3", **SIZES, **MORE},
        {"architectures": ["GPT2LMHeadModel"], **GPT2, "eos_token_id": 3, "activation_function": "gelu_new"},
    ]
)
MISSING = object()


def retyped(base, changes):
    """``base`` with keys dropped or given other values; the n-th change is of the n-th key, counted round."""
    keys, changed = sorted(base), dict(base)
    for n, value in changes:
        key = keys[n % len(keys)]
        changed.pop(key, None) if value is MISSING else changed.update({key: value})
    return changed


changes = st.lists(st.tuples(st.integers(0, 60), st.one_of(st.just(MISSING), st.integers(1, 9), values)), max_size=3)


@pytest.mark.parametrize("examples", [pytest.param(300, id="quick"), MANY])
def test_configurations(examples):
    def check(base, changes):
        try:
            config = ModelConfig.from_hf(retyped(base, changes), "config.json")
        except CheckpointError as error:
            assert str(error)
            return
        json.dumps(config.to_hf(), allow_nan=False)
        assert ModelConfig.from_hf(config.to_hf()) == config

    drawn(examples, bases, changes)(check)


@pytest.mark.parametrize(
    "examples", [pytest.param(5, id="quick"), pytest.param(300, marks=pytest.mark.slow, id="many")]
)
def test_models(examples):
    base = json.loads((TINY / "config.json").read_text())
    files = ("config.json", "tokenizer_config.json", "generation_config.json")
    settings = json.loads((TINY / "tokenizer_config.json").read_text())

    def check(file, changes, raw):
        with tempfile.TemporaryDirectory() as folder:
            directory = Path(folder) / "m"
            shutil.copytree(TINY, directory)
            content = {"config.json": base, "tokenizer_config.json": settings}.get(file, {"eos_token_id": 3})
            (directory / file).write_text(json.dumps(retyped(content, changes)) if raw is None else raw, "utf-8")
            try:
                model = load_lm(directory, lora=None)
            except UserError as error:
                assert str(error)
            else:
                assert all(
                    np.isfinite(np.asarray(leaf, np.float32)).all() for leaf in (model.params["embed"]["weight"],)
                )
                assert model.tokenizer is None or all(isinstance(stop, int) for stop in model.stop_tokens)

    raw = st.one_of(st.none(), st.none(), st.sampled_from(["", "[]", "{", "null", "[" * 100_000, "\ufeff{}"]))
    drawn(examples, st.sampled_from(files), changes, raw)(check)


ADAPTER = {
    "peft_type": "LORA",
    "r": 2,
    "lora_alpha": 4,
    "target_modules": ["q_proj"],
    "rank_pattern": {"q_proj": 2},
    "alpha_pattern": {r".*\.q_proj": 3.0},
    "layers_to_transform": [0, 1],
    "layers_pattern": "layers",
    "exclude_modules": None,
    "bias": "none",
    "use_rslora": False,
    "init_lora_weights": True,
    "modules_to_save": None,
}
patterns = st.sampled_from(["(", "q_proj", "(layers)", ".*", "(?P<layer>x)", "all-linear", "a" * 3])
adapter_values = st.one_of(
    st.just(MISSING), values, patterns, st.lists(patterns, max_size=2), st.dictionaries(patterns, leaves, max_size=2)
)


@pytest.mark.parametrize("examples", [pytest.param(150, id="quick"), MANY])
def test_adapters(examples):
    def check(changes, shape, module):
        with tempfile.TemporaryDirectory() as folder:
            directory = Path(folder)
            content = retyped(ADAPTER, changes)
            (directory / "adapter_config.json").write_text(json.dumps(content), "utf-8")
            name = f"base_model.model.model.layers.0.{module}"
            tensors = {f"{name}.lora_A.weight": np.ones((2, 8), np.float32), f"{name}.lora_B.weight": np.ones(shape)}
            save_file(tensors, directory / "adapter_model.safetensors")
            try:
                lora = adapter_lora_config(directory)
            except UserError as error:
                assert str(directory) in str(error)
            else:
                assert lora.rank >= 1 and math.isfinite(lora.scale)

    shapes = st.sampled_from([(8, 2), (8, 2), (8, 3), (8,), (0, 2), (8, 0), (2, 2, 2)])
    modules = st.sampled_from(["self_attn.q_proj", "self_attn.q_proj", "attn.c_attn", "mlp.x"])
    adapter_changes = st.lists(st.tuples(st.integers(0, 60), adapter_values), max_size=3)
    drawn(examples, adapter_changes, shapes, modules)(check)
