"""Rendering over chat templates as families ship them: every family of ``chat_templates.py`` x every conversation.

What is right is read from transformers (the text and the tokens of the whole conversation, the mask where a template
marks what is generated) and from distinct words in every message, never from the code under test.
``python tests/data/test_chat_templates.py`` prints the table family x conversation in Markdown.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ntkjax.data.prompts import Rendered, render, render_prompt, stop_tokens
from ntkjax.data.records import Example
from ntkjax.data.turns import TEMPLATE_DATE
from ntkjax.errors import DataError

_spec = importlib.util.spec_from_file_location("chat_templates", Path(__file__).with_name("chat_templates.py"))
assert _spec is not None and _spec.loader is not None
zoo = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = zoo  # dataclasses look themselves up there
_spec.loader.exec_module(zoo)

families = pytest.mark.parametrize("family", zoo.FAMILIES.values(), ids=list(zoo.FAMILIES))


@dataclasses.dataclass(frozen=True)
class Outcome:
    """One conversation under one template: ``full`` and ``ids`` as transformers renders it, or why there is none.

    ``refused``: the template's own words. ``error``: ours, for a last message that the template writes in part.
    """

    situation: Any
    refused: str | None = None
    error: str | None = None
    full: str = ""
    ids: tuple[int, ...] = ()
    rendered: Rendered | None = None
    last: Rendered | None = None
    prompt: tuple[int, ...] = ()


def reference(family: Any, example: Example, messages: list[Any] | None = None, **options: Any) -> Any:
    tokenizer = zoo.tokenizer_of(family.name)
    tools = {} if example.tools is None else {"tools": list(example.tools)}
    messages = example.conversation() if messages is None else messages
    options = {"tokenize": False, "date_string": TEMPLATE_DATE} | options
    return tokenizer.apply_chat_template(messages, **tools, **options)


@functools.cache
def outcome(family: Any, name: str) -> Outcome:
    situation, tokenizer = zoo.SITUATIONS[name], zoo.tokenizer_of(family.name)
    try:
        full = reference(family, situation.example)
    except Exception as error:
        return Outcome(situation, refused=str(error))
    try:
        rendered = render(tokenizer, situation.example)
    except DataError as error:
        return Outcome(situation, full=full, error=str(error))
    return Outcome(
        situation,
        full=full,
        ids=tuple(tokenizer(full, add_special_tokens=False)["input_ids"]),
        rendered=rendered,
        last=render(tokenizer, situation.example, loss_turns="last") if len(situation.said) > 1 else None,
        prompt=tuple(render_prompt(tokenizer, situation.example)),
    )


def rendered_ones(family: Any) -> Iterator[tuple[str, Outcome, Rendered]]:
    for name in zoo.SITUATIONS:
        found = outcome(family, name)
        if found.rendered is not None:
            yield name, found, found.rendered


def texts(family: Any, tokens: Any, spans: Any) -> list[str]:
    return [zoo.tokenizer_of(family.name).decode(tokens[a:b]) for a, b in spans]


def token_id(family: Any, text: str | None) -> int:
    """The id of a token; -1, which is no token, for None."""
    return -1 if text is None else zoo.tokenizer_of(family.name).convert_tokens_to_ids(text)


def last_turn(family: Any, text: str) -> str:
    """What stands behind the header of the last assistant turn, without the token that ends it."""
    for opens in family.opens:  # some templates write the header of a turn to come unasked
        text = text.removesuffix(opens)
    text = text[max(text.rfind(opens) + len(opens) for opens in family.opens if opens in text) :]
    for end in (family.last, family.end, family.eos):
        if end is not None and end in text:
            return text[: text.rfind(end)]
    return text


def plain(text: str) -> str:
    """``text`` without outer blanks, and without those about the marks of reasoning, which templates move."""
    return re.sub(r"\s*(</?think>|<\|message\|>)\s*", r"\1", text).strip()


def squeeze(text: str) -> str:
    return "".join(text.split())


def survives(family: Any, found: Outcome) -> bool:
    """Whether the template writes the last response whole, and drops nothing else because of it."""
    example = found.situation.example
    prompt = reference(family, example, example.conversation()[:-1], add_generation_prompt=True)
    kept = all(word in found.full for word in found.situation.others if word in prompt)
    return kept and squeeze(example.response) in squeeze(last_turn(family, found.full))


# What a template may write in front of the response within its turn: reasoning, or the mark of a channel.
LEADS = {"", "<think></think>", f"<think>{zoo.THOUGHT}</think>", "<|channel|>final<|message|>", "<think>"}


@families
def test_a_refused_conversation_is_an_error_that_names_the_record(family):
    for name in zoo.SITUATIONS:
        found = outcome(family, name)
        if found.refused is not None:
            with pytest.raises(DataError, match=f"record {name!r}.*{re.escape(found.refused)}"):
                render(zoo.tokenizer_of(family.name), found.situation.example)


@families
def test_what_is_not_refused_by_the_template_is_rendered(family):
    """But for words beside a call where the template drops the words: put behind the prompt, the call would be lost."""
    for name in zoo.SITUATIONS:
        found = outcome(family, name)
        if name == "words and a call" and found.refused is None:
            whole = squeeze(found.situation.example.response) in squeeze(found.full)
            assert (found.error is None) == whole, (found.error, found.full)
            assert whole or (found.error or "").startswith(f"record {name!r}: the chat template")
        else:
            assert found.error is None, name


def test_the_templates_differ_in_what_they_refuse():
    """The table itself: most conversations are rendered, and every kind of outcome is met."""
    cells = [cell(family, name) for family in zoo.FAMILIES.values() for name in zoo.SITUATIONS]
    assert len(zoo.FAMILIES) >= 35 and len(zoo.SITUATIONS) >= 20
    assert sum(value == "ok" for value in cells) > 0.75 * len(cells)
    assert {"ok", "apart", "refused"} <= {re.split("[;:]", value)[0] for value in cells}


@families
def test_tokens_are_those_of_the_whole_rendering(family):
    wrong, eos = [], token_id(family, family.eos)
    for name, found, rendered in rendered_ones(family):
        ids, tokens = list(found.ids), rendered.tokens
        if rendered.apart:
            continue
        if family.last is not None:
            end = len(ids) - ids[::-1].index(token_id(family, family.last))
            right = tokens == ids[:end]
        else:  # the template ends no turn: what it writes behind the text may be left out
            body, tail = len(tokens) - 1, zoo.tokenizer_of(family.name).decode(ids[len(tokens) - 1 :])
            right = tokens[:body] == ids[:body] and tokens[body] == eos and not tail.strip()
        if not right:
            wrong.append((name, zoo.tokenizer_of(family.name).decode(tokens), found.full))
    assert not wrong, "\n".join(map(str, wrong))


@families
def test_the_response_stands_apart_only_where_the_template_drops_it(family):
    wrong = [(name, found.full) for name, found, r in rendered_ones(family) if r.apart == survives(family, found)]
    assert not wrong, "\n".join(map(str, wrong))


@families
def test_apart_the_response_follows_the_generation_prompt(family):
    tokenizer, wrong = zoo.tokenizer_of(family.name), []
    for name, found, rendered in rendered_ones(family):
        if rendered.apart:
            example = found.situation.example
            prompt = reference(family, example, example.conversation()[:-1], add_generation_prompt=True)
            if not squeeze(tokenizer.decode(rendered.tokens)).startswith(squeeze(prompt)):
                wrong.append((name, prompt, tokenizer.decode(rendered.tokens)))
    assert not wrong, "\n".join(map(str, wrong))


@families
def test_no_span_holds_a_header(family):
    wrong = []
    for name, _, rendered in rendered_ones(family):
        # Where a template ends turns with the next header alone, generation stops at that token, and it is learned.
        spans = [(a, b - (rendered.tokens[b - 1] in stops(family))) for a, b in rendered.trained]
        for text in texts(family, rendered.tokens, spans):
            wrong += [(name, header, text) for header in family.headers if header.strip() in text]
    assert not wrong, "\n".join(map(str, wrong))


@families
def test_the_response_survives_whole_and_once(family):
    tokenizer, wrong = zoo.tokenizer_of(family.name), []
    for name, found, rendered in rendered_ones(family):
        turn = plain(last_turn(family, tokenizer.decode(rendered.tokens)))
        response = plain(found.situation.example.response)
        if name == "words and a call":
            learnt = texts(family, rendered.tokens, rendered.trained)[-1]
            if response not in learnt or ("Lagoon" in found.full and "Lagoon" not in learnt):
                wrong.append((name, learnt, found.full))
            continue
        lead = turn.removesuffix(response)
        if not turn.endswith(response) or lead not in LEADS:
            wrong.append((name, turn, response))
        # Of what the model learns to write nothing is missing but what the generation prompt has written already.
        learnt = plain(last_turn_of_span(family, rendered))
        written = (lead + response).removesuffix(learnt)
        if not (lead + response).endswith(learnt) or written not in ("", "<think>", lead):
            wrong.append((name, learnt, lead + response))
    assert not wrong, "\n".join(map(str, wrong))


def last_turn_of_span(family: Any, rendered: Rendered) -> str:
    text = texts(family, rendered.tokens, rendered.trained[-1:])[0]
    for opens in family.opens:
        text = text[text.rfind(opens) + len(opens) if opens in text else 0 :]
    for end in (family.last, family.end, family.eos):
        if end is not None:
            text = text.removesuffix(end)
    return text


@families
def test_every_assistant_turn_is_a_span_and_nobody_elses_words_are(family):
    wrong = []
    for name, found, rendered in rendered_ones(family):
        said = list(found.situation.said)
        trained = texts(family, rendered.tokens, rendered.trained)
        lost = [word for word in said if word not in squeeze(found.full)]
        # A turn that the template does not write (a call of tools, say) cannot be learned, and is counted.
        if rendered.turns_lost != len([word for word in lost if word != said[-1]]):
            wrong.append((name, "turns_lost", rendered.turns_lost, lost, trained))
        kept = [word for word in said if word not in lost or word == said[-1]]
        if len(trained) != len(kept) or not all(word in squeeze(text) for word, text in zip(kept, trained)):
            wrong.append((name, "spans", kept, trained))
        wrong += [(name, word, text) for word in found.situation.others for text in trained if word in text]
        # A span begins where the header ends, or where the template has opened the reasoning behind it.
        for start, _ in rendered.trained:
            before = squeeze(zoo.tokenizer_of(family.name).decode(rendered.tokens[:start])).removesuffix("<think>")
            if not before.endswith(tuple(squeeze(opens) for opens in family.opens)):
                wrong.append((name, "begins", before[-60:]))
        edges = [edge for span in rendered.trained for edge in span]
        if edges != sorted(edges) or edges[-1] != len(rendered.tokens) or edges[-2] != rendered.response_start:
            wrong.append((name, "edges", rendered.trained, rendered.response_start, len(rendered.tokens)))
    assert not wrong, "\n".join(map(str, wrong))


@families
def test_what_the_template_leaves_out_is_counted(family):
    wrong = []
    for name, found, rendered in rendered_ones(family):
        written = zoo.tokenizer_of(family.name).decode(rendered.tokens)
        missing = sum(word not in written for word in found.situation.others if word != zoo.OFFERED)
        if rendered.messages_lost != missing:
            wrong.append((name, rendered.messages_lost, missing, written))
    assert not wrong, "\n".join(map(str, wrong))


@families
def test_a_conversation_can_be_cut_behind_every_turn(family):
    for name, found, rendered in rendered_ones(family):
        ends = [stop for _, stop in rendered.trained[:-1]]
        assert set(ends) <= set(rendered.turn_ends) and rendered.turn_ends == sorted(rendered.turn_ends), name
        assert len(rendered.turn_ends) <= len(found.situation.said) - 1, name


@families
def test_every_span_ends_with_the_token_that_ends_the_turn(family):
    wrong = []
    for name, _, rendered in rendered_ones(family):
        for k, (_, stop) in enumerate(rendered.trained, start=1):
            end = rendered.tokens[stop - 1]
            if k == len(rendered.trained):
                right = end == token_id(family, family.last or family.eos) or (rendered.apart and end in stops(family))
            else:
                right = family.end is None or end in (token_id(family, family.end), token_id(family, "<|call|>"))
            if not right:
                wrong.append((name, texts(family, rendered.tokens, rendered.trained)))
    assert not wrong, "\n".join(map(str, wrong))


def stops(family: Any, generation_config: bool = True) -> frozenset[int]:
    others = [token_id(family, text) for text in family.generation_eos] if generation_config else []
    return stop_tokens(zoo.tokenizer_of(family.name), others)


@families
@pytest.mark.parametrize("generation_config", [True, False])
def test_generation_stops_where_spans_end(family, generation_config):
    stop, wrong = stops(family, generation_config), []
    assert token_id(family, family.eos) in stop and (token_id(family, family.last) in stop or family.last is None)
    for name, _, rendered in rendered_ones(family):
        spans = rendered.trained if family.end is not None else rendered.trained[-1:]
        if family.name == "gpt_oss":  # <|end|> ends a message of several in one turn: generation goes on behind it
            spans = rendered.trained[-1:]
        if not all(rendered.tokens[b - 1] in stop for _, b in spans):
            wrong.append((name, texts(family, rendered.tokens, spans), stop))
    assert not wrong, "\n".join(map(str, wrong))


@families
def test_the_last_turn_alone(family):
    for name, found, rendered in rendered_ones(family):
        if found.last is not None:
            assert (found.last.tokens, found.last.trained) == (rendered.tokens, rendered.trained[-1:]), name


@families
def test_a_message_of_no_weight_is_not_trained(family):
    found, tokenizer = outcome(family, "three turns"), zoo.tokenizer_of(family.name)
    assert found.rendered is not None
    weights = ({"weight": 0}, {"train": False}, {"weight": 0.0})
    for gone, field in enumerate(weights):
        fields = [field if turn == gone else {"weight": 1, "train": True} for turn in range(3)]
        turns = iter(fields)
        messages = tuple(
            message | next(turns) if message["role"] == "assistant" else message
            for message in found.situation.example.messages
        )
        changed = dataclasses.replace(found.situation.example, messages=messages, response_fields=fields[-1])
        rendered, expected = render(tokenizer, changed), list(found.rendered.trained)
        del expected[gone]
        assert (rendered.tokens, rendered.trained) == (found.rendered.tokens, expected)


@pytest.mark.parametrize("family", [f for f in zoo.FAMILIES.values() if f.marks], ids=lambda f: f.name)
def test_marked_templates_train_what_transformers_masks(family):
    tokenizer, compared = zoo.tokenizer_of(family.name), 0
    for name, found, rendered in rendered_ones(family):
        if rendered.apart or rendered.turns_lost:
            continue
        masked = reference(
            *(family, found.situation.example),
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        theirs = {i for i, inside in enumerate(masked["assistant_masks"]) if inside}
        ours = {i for a, b in rendered.trained for i in range(a, b)}
        assert masked["input_ids"][: len(rendered.tokens)] == rendered.tokens
        end = token_id(family, family.end)
        assert all(rendered.tokens[i] == end for i in ours - theirs), name
        # The header and the line break behind the end are marked by some, and learned by nobody here.
        spare = [masked["input_ids"][i] for i in sorted(theirs - ours)]
        left = re.sub(r"<\|im_start\|>assistant|<think>\s*</think>|\s", "", tokenizer.decode(spare))
        assert left == "", (name, tokenizer.decode(spare))
        compared += 1
    assert compared > 10


LAST_ALONE = ("message.role == 'assistant'", "message.role == 'assistant' and loop.last")
BEHIND_A_LEAD = ("        {%- generation %}", "        {{- 'Answer: ' }}{%- generation %}")


@pytest.mark.parametrize("old, new", [LAST_ALONE, BEHIND_A_LEAD], ids=["the last alone", "behind a lead"])
def test_what_a_template_leaves_unmarked_is_not_trained(old, new):
    tokenizer = copy.deepcopy(zoo.tokenizer_of("chatml_marked"))
    assert old in tokenizer.chat_template
    tokenizer.chat_template = tokenizer.chat_template.replace(old, new)
    example = zoo.SITUATIONS["three turns"].example
    masked = tokenizer.apply_chat_template(
        example.conversation(), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    rendered = render(tokenizer, example)
    ours = {i for a, b in rendered.trained for i in range(a, b)}
    assert ours == {i for i, inside in enumerate(masked["assistant_masks"]) if inside}
    assert len(rendered.trained) == (1 if old == LAST_ALONE[0] else 3)


# Conversations in which a token lies across the border between prompt and response: the response (or the reasoning that
# the template writes) begins with the blanks that the prompt ends with.
BORDERS = {"leading blanks", "line breaks", "line breaks in all turns"}


@families
def test_the_prompt_for_generation_is_the_prompt_of_training(family):
    wrong = []
    for name, found, rendered in rendered_ones(family):
        same = list(found.prompt) == rendered.tokens[: rendered.response_start]
        if same == bool(rendered.crossing) and not (rendered.crossing and len(found.situation.said) > 1):
            wrong.append((name, rendered.crossing, rendered.tokens[: rendered.response_start], found.prompt))
        if rendered.crossing and name not in BORDERS and family.name != "qwen3_thinking":
            wrong.append((name, rendered.crossing))
    assert not wrong, "\n".join(map(str, wrong))


@families
def test_where_it_can_the_prompt_is_what_transformers_gives_for_generation(family):
    tokenizer, wrong, compared = zoo.tokenizer_of(family.name), [], 0
    opens_thought = family.name in ("r1_new", "olmo3_think")  # for generation alone: not in front of every answer
    for name, found, rendered in rendered_ones(family):
        example = found.situation.example
        prompt = reference(family, example, example.conversation()[:-1], add_generation_prompt=True)
        if (rendered.apart or found.full.startswith(prompt)) and not opens_thought:
            compared += 1
            if list(found.prompt) != tokenizer(prompt, add_special_tokens=False)["input_ids"]:
                wrong.append((name, tokenizer.decode(found.prompt), prompt))
    assert not wrong, "\n".join(map(str, wrong))
    assert compared or opens_thought


@families
def test_the_prompt_is_the_same_for_every_response(family):
    """Likelihoods of several answers are compared: they must be given the same prompt."""
    tokenizer = zoo.tokenizer_of(family.name)
    for name in ("one turn", "system, three turns"):
        found = outcome(family, name)
        if found.refused is None:
            answers = ("A", "B)", "It is the first", "<think>\nhm\n</think>\n\nA", "assistant")
            several = [render(tokenizer, found.situation.example, text) for text in answers]
            prompts = {tuple(item.tokens[: item.response_start]) for item in several if not item.crossing}
            assert len(prompts) == 1 or (not prompts and family.name == "qwen3_thinking"), name
            assert len({tuple(item.tokens[item.response_start :]) for item in several}) == len(answers), name


@families
def test_an_end_token_within_the_response_does_not_end_it(family):
    tokenizer, example = zoo.tokenizer_of(family.name), zoo.SITUATIONS["one turn"].example
    end = family.last or family.eos
    rendered = render(tokenizer, dataclasses.replace(example, response=f"four{end} five"))
    learnt = tokenizer.decode(rendered.tokens[rendered.response_start :])
    assert squeeze(learnt).endswith(squeeze(f"four{end} five{end}"))


LEFT_OUT = {"zebra": "system", "drizzle": "result of a tool", zoo.OFFERED: "tools"}


def cell(family: Any, name: str) -> str:
    """One cell of the table: ok, apart or refused; and what is lost or counted."""
    found = outcome(family, name)
    if found.rendered is None:
        return "refused" if found.refused is not None else "refused: words dropped"
    notes, written = [], zoo.tokenizer_of(family.name).decode(found.rendered.tokens)
    if found.rendered.turns_lost:
        notes.append("call")
    notes += [LEFT_OUT[word] for word in found.situation.others if word not in written]
    words = ["apart" if found.rendered.apart else "ok"]
    words += ["without " + ", ".join(notes)] if notes else []
    words += [f"{found.rendered.crossing} across"] if found.rendered.crossing else []
    return "; ".join(words)


def table() -> str:
    """Family x conversation as Markdown.

    apart: the template does not write the response whole behind its prompt, so it is put there as text. refused: an
    error names the record. without: what the template does not write. across: tokens half prompt, half response.
    """
    lines = ["| template | " + " | ".join(zoo.SITUATIONS) + " |", "|---" * (len(zoo.SITUATIONS) + 1) + "|"]
    for family in zoo.FAMILIES.values():
        lines.append(f"| {family.name} | " + " | ".join(cell(family, name) for name in zoo.SITUATIONS) + " |")
    return "\n".join(lines)


def test_the_page_of_the_documentation_shows_this_table():
    page = Path(__file__).resolve().parents[2] / "docs" / "chat-templates.md"
    assert table() in page.read_text(), "put what `python tests/data/test_chat_templates.py` prints in its place"


if __name__ == "__main__":
    print(table())
