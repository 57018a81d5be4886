"""Rendering: where the response starts, that it is the same for any response, and that it ends."""

from __future__ import annotations

import copy

import pytest
from transformers import AutoTokenizer

from ntkjax.assets import tiny_lm_path
from ntkjax.data import Example, render, render_prompt
from ntkjax.data.prompts import end_token, render_beginning, render_text, stop_tokens
from ntkjax.data.turns import MARK
from ntkjax.errors import ConfigError, DataError

PLAIN = Example("a", "s", "Why is 1 é?", None, "So the answer is yes.", "yes", ("yes", "no"))
CHAT = Example("b", "s", "x", ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}), "Yes.")
TEMPLATE_CHATML = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] | trim }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def with_template(tokenizer, template):
    other = copy.deepcopy(tokenizer)
    other.chat_template = template
    return other


def test_without_a_template(toy_tokenizer):
    rendered = render(toy_tokenizer, PLAIN)
    start = rendered.response_start
    assert toy_tokenizer.decode(rendered.tokens[:start]) == PLAIN.prompt + "\n"
    assert toy_tokenizer.decode(rendered.tokens[start:-1]) == PLAIN.response
    assert rendered.tokens[-1] == toy_tokenizer.eos_token_id


def test_with_a_template(toy_chat_tokenizer):
    rendered = render(toy_chat_tokenizer, PLAIN)
    start = rendered.response_start
    assert toy_chat_tokenizer.decode(rendered.tokens[:start]) == f"<|user|>\n{PLAIN.prompt}<|assistant|>\n"
    assert toy_chat_tokenizer.decode(rendered.tokens[start:]) == f"{PLAIN.response}<|end|>"
    assert rendered.tokens.count(toy_chat_tokenizer.eos_token_id) == 1


def test_several_messages(toy_chat_tokenizer):
    rendered = render(toy_chat_tokenizer, CHAT)
    text = toy_chat_tokenizer.decode(rendered.tokens)
    assert text == "<|system|>\nBe brief.<|user|>\nHi<|assistant|>\nYes.<|end|>"


@pytest.mark.parametrize("chat", [False, True])
def test_the_prompt_is_the_same_for_every_response(toy_tokenizer, toy_chat_tokenizer, chat):
    tokenizer = toy_chat_tokenizer if chat else toy_tokenizer
    prompt = render_prompt(tokenizer, PLAIN)
    for response in ("yes", " yes", "", "\nno <|end|>", "So"):
        rendered = render(tokenizer, PLAIN, response)
        assert rendered.tokens[: rendered.response_start] == prompt
        assert rendered.tokens[-1] == tokenizer.eos_token_id
        assert len(rendered.tokens) > rendered.response_start


def test_what_follows_the_end_token_is_left_out(toy_tokenizer):
    tokenizer = with_template(toy_tokenizer, TEMPLATE_CHATML)
    rendered = render(tokenizer, PLAIN)
    assert tokenizer.decode(rendered.tokens[rendered.response_start :]) == "So the answer is yes.<|end|>"


def test_a_template_without_end_token_gets_one(toy_tokenizer):
    template = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
    tokenizer = with_template(toy_tokenizer, template + "{% if add_generation_prompt %}[assistant] {% endif %}")
    rendered = render(tokenizer, PLAIN)
    assert tokenizer.decode(rendered.tokens[rendered.response_start :]) == "So the answer is yes.<|end|>"


def test_a_prompt_that_changes_with_the_response_is_kept_apart(toy_tokenizer):
    template = "{{ messages | length }}: {{ messages[0]['content'] }}{% if add_generation_prompt %}>{% endif %}"
    tokenizer = with_template(toy_tokenizer, template)
    assert render_text(tokenizer, PLAIN).apart
    rendered = render(tokenizer, PLAIN)
    assert tokenizer.decode(rendered.tokens) == f"1: {PLAIN.prompt}>{PLAIN.response}<|end|>"


def test_bos_is_put_in_front_where_the_tokenizer_adds_one(toy_tokenizer):
    from tokenizers.processors import TemplateProcessing

    tokenizer = copy.deepcopy(toy_tokenizer)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|user|> $A <|end|>", special_tokens=[("<|user|>", 2), ("<|end|>", 1)]
    )
    rendered = render(tokenizer, PLAIN)
    plain = render(toy_tokenizer, PLAIN)
    assert rendered.tokens == [2, *plain.tokens]
    assert rendered.response_start == plain.response_start + 1
    assert render_prompt(tokenizer, PLAIN) == rendered.tokens[: rendered.response_start]


def test_the_real_tokenizer_learns_to_stop(shared_dir):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared_dir / "models" / "cot-lm-7m")
    rendered = render(tokenizer, PLAIN)
    whole = tokenizer.apply_chat_template(
        [{"role": "user", "content": PLAIN.prompt}, {"role": "assistant", "content": PLAIN.response}],
        tokenize=False,
    )
    assert tokenizer.decode(rendered.tokens) == whole
    assert rendered.tokens[-1] == tokenizer.eos_token_id


def test_errors_name_the_record_and_the_remedy(toy_tokenizer):
    refusing = with_template(toy_tokenizer, "{{ raise_exception('only user and assistant') }}")
    with pytest.raises(DataError, match=r"record 'b': the chat template.*only user and assistant.*system, user"):
        render(refusing, CHAT)
    endless = copy.deepcopy(toy_tokenizer)
    endless.eos_token = None
    with pytest.raises(ConfigError, match=r"no eos_token.*add eos_token"):
        render(endless, PLAIN)


def test_a_date_in_the_template_stays_the_same(toy_tokenizer):
    from ntkjax.data.prompts import writes_the_date

    fixed = "{% if date_string is not defined %}{% set date_string = strftime_now('%c') %}{% endif %}"
    fixed += "{{ date_string }}>"
    tokenizer = with_template(toy_tokenizer, fixed)
    assert toy_tokenizer.decode(render_prompt(tokenizer, PLAIN)) == "26 Jul 2024>"
    assert not writes_the_date(tokenizer)
    assert writes_the_date(with_template(toy_tokenizer, "{{ strftime_now('%c') }}"))


TURNS = (
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "First."},
    {"role": "user", "content": "Two?"},
)


def learned(tokenizer, rendered):
    return [tokenizer.decode(rendered.tokens[a:b]) for a, b in rendered.trained]


def test_every_assistant_turn_is_learned_with_its_end_token(toy_chat_tokenizer):
    example = Example("c", "s", "x", TURNS, "Second.")
    assert learned(toy_chat_tokenizer, render(toy_chat_tokenizer, example)) == ["First.<|end|>", "Second.<|end|>"]
    assert learned(toy_chat_tokenizer, render(toy_chat_tokenizer, example, loss_turns="last")) == ["Second.<|end|>"]


@pytest.mark.parametrize("field", [{"weight": 0}, {"weight": 0.0}, {"train": False}])
def test_a_turn_without_weight_is_not_learned(toy_chat_tokenizer, field):
    turns = [dict(turn, **field) if turn["role"] == "assistant" else turn for turn in TURNS]
    example = Example("c", "s", "x", tuple(turns), "Second.")
    assert learned(toy_chat_tokenizer, render(toy_chat_tokenizer, example)) == ["Second.<|end|>"]
    last = Example("c", "s", "x", TURNS, "Second.", response_fields=field)
    assert learned(toy_chat_tokenizer, render(toy_chat_tokenizer, last)) == ["First.<|end|>"]


def test_the_turns_of_plain_text(toy_tokenizer):
    prompt = "system: Be kind.\nuser: One?\nassistant: First.\nuser: Two?"
    rendered = render(toy_tokenizer, Example("c", "s", prompt, TURNS, "Second."))
    assert toy_tokenizer.decode(rendered.tokens) == f"{prompt}\nSecond.<|end|>"
    assert learned(toy_tokenizer, rendered) == ["First.", "Second.<|end|>"]


def test_generation_stops_where_training_ends(toy_tokenizer):
    written = with_template(
        toy_tokenizer,
        "{% for m in messages %}<|user|>{{ m['content'] }}<|assistant|>{% endfor %}"
        "{% if add_generation_prompt %}<|user|>{% endif %}",
    )
    assert stop_tokens(written) == {written.convert_tokens_to_ids("<|assistant|>"), written.eos_token_id}
    assert render(written, PLAIN).tokens[-1] == end_token(written) != written.eos_token_id
    assert stop_tokens(toy_tokenizer, (7,)) == {toy_tokenizer.eos_token_id, 7}


def test_a_response_goes_on_where_it_was_left(toy_chat_tokenizer):
    begun = render_beginning(toy_chat_tokenizer, PLAIN, "So the")
    assert begun == render(toy_chat_tokenizer, PLAIN).tokens[: len(begun)]
    assert toy_chat_tokenizer.decode(begun).endswith("<|assistant|>\nSo the")


def test_arguments_of_tools_are_objects(toy_tokenizer):
    template = "{% for m in messages %}{{ m.content }}{% for call in m.tool_calls %}{{ call.function.arguments.city }}"
    tokenizer = with_template(toy_tokenizer, template + "{% endfor %}<|end|>{% endfor %}")
    calls = [{"type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}]
    rendered = render(tokenizer, Example("t", "s", "How warm?", None, "Look: ", response_fields={"tool_calls": calls}))
    assert learned(tokenizer, rendered) == ["Look: Rome<|end|>"]


def call(name):
    return {"type": "function", "function": {"name": name, "arguments": {"x": 1}}}


USER, CALLING = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Look.", "tool_calls": [call("f")]}
WRITES_CALLS = TEMPLATE_CHATML.replace(
    "<|end|>", "{% for c in m['tool_calls'] %}[{{ c['function']['arguments'] | tojson }}]{% endfor %}<|end|>"
)
WRITES_ONE = WRITES_CALLS.replace("in m['tool_calls'] %}", "in (m['tool_calls'] or [])[:1] %}")
LEGACY = {"function_call": {"name": "f", "arguments": "{}"}}


@pytest.mark.parametrize(
    ("template", "lost"),
    [
        (TEMPLATE_CHATML, (1, 2, 3, 1, 1)),
        (WRITES_CALLS, (0, 0, 0, 1, 0)),
        (WRITES_ONE, (0, 1, 1, 1, 0)),
        (None, (1, 2, 3, 1, 1)),
    ],
)
def test_calls_that_no_text_holds_are_counted(toy_tokenizer, template, lost):
    """Of the last turn (one call, two calls), of earlier ones, of the old form, of a turn of weight 0."""
    tokenizer = with_template(toy_tokenizer, template)
    two = {**CALLING, "tool_calls": [call("f"), call("g")]}
    tool, plain = {"role": "tool", "content": "4"}, {"role": "assistant", "content": "Done."}
    chats = [
        [USER, CALLING],
        [USER, two],
        [USER, CALLING, tool, two, tool, plain],
        [USER, {**plain, **LEGACY}],
        [USER, {**CALLING, "weight": 0}, tool, plain],
    ]
    found = []
    for *context, last in chats:
        fields = {name: value for name, value in last.items() if name not in ("role", "content")}
        example = Example("a", "s", "Hi", tuple(context), last["content"], response_fields=fields or None)
        found.append(render(tokenizer, example).calls_lost)
    assert tuple(found) == lost


@pytest.mark.parametrize("template", [None, TEMPLATE_CHATML])
@pytest.mark.parametrize("fields", [{"tool_calls": [call("f")]}, LEGACY])
def test_a_call_alone_that_is_not_written_is_refused(toy_tokenizer, template, fields):
    example = Example("a", "s", "Hi", (USER,), "", response_fields=fields)
    with pytest.raises(DataError, match=r"'a': .* the tool calls of the last message"):
        render(with_template(toy_tokenizer, template), example)


def test_a_border_within_the_first_token_is_counted():
    """A header of one blank, and a tokenizer that has a token for the blank and the letter behind it."""
    tokenizer = with_template(AutoTokenizer.from_pretrained(tiny_lm_path()), "{{ ' ' ~ messages[-1].content }}<|end|>")
    rendered = render(tokenizer, Example("r", "s", "Why?", None, "Hi"))
    assert tokenizer.convert_ids_to_tokens(rendered.tokens) == ["\u0120H", "i", "<|end|>"]
    assert rendered.trained == [(0, 3)] and rendered.response_start == 0 and rendered.crossing == 1


def test_a_closing_tag_of_the_user_opens_no_reasoning(toy_tokenizer):
    """The template renders nothing of this response: it is put behind the prompt, and not found in the user's words."""
    said = "{{ m.content.split('</think>')[-1] if m.role == 'assistant' else m.content }}"
    template = "{% for m in messages %}" + said + "\n{% endfor %}"
    example = Example("r", "s", "</think>", None, "</think>")
    text = render_text(with_template(toy_tokenizer, template), example)
    assert text.apart and [text.text[start:end] for start, end in text.trained] == ["</think>"]


def test_words_that_are_the_mark_of_turns(toy_tokenizer):
    words = [MARK, "\ue0000\ue001"]
    tokenizer = with_template(toy_tokenizer, TEMPLATE_CHATML)
    context = tuple({"role": role, "content": words[0]} for role in ("user", "assistant", "user"))
    example = Example("a", "s", "Hi", context, "".join(words))
    text = render_text(tokenizer, example)
    assert [text.text[a:b] for a, b in text.trained] == [f"{words[0]}<|end|>", f"{''.join(words)}<|end|>"]
    assert not text.apart and text.turns_lost == 0


@pytest.mark.parametrize("last", ["", "{{ eos_token }}"])
@pytest.mark.parametrize("said", ["</think>", "<think>", "assistant", "Hi"])
def test_words_that_stand_in_the_generation_prompt_too(toy_tokenizer, said, last):
    """A turn that ends as the next generation prompt does is no reason to take the one for the other."""
    template = (
        "{% for m in messages %}{{ '<|' ~ m['role'] ~ '|>' ~ m['content'] ~ '<|end|>' }}{% endfor %}" + last
    ) + "{% if add_generation_prompt %}{{ '<|assistant|><think></think>' }}{% endif %}"
    tokenizer = with_template(toy_tokenizer, template)
    context = ({"role": "assistant", "content": said}, {"role": "assistant", "content": "Well"})
    text = render_text(tokenizer, Example("r", "s", "", context, "Hi"))
    assert [text.text[start:end] for start, end in text.trained] == [f"{said}<|end|>", "Well<|end|>", "Hi<|end|>"]
