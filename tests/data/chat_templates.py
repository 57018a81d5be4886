"""Chat templates as families of models ship them, re-created from the text that they produce, each with a small
tokenizer of the family's kind, and the conversations that templates are tried on.

The templates lie in ``templates/NAME.jinja``; ``FAMILIES`` names the tokens that each writes.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any, Literal

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from ntkjax.data.records import Example

FOLDER = Path(__file__).resolve().parent / "templates"
BLANK = "▁"  # how SentencePiece writes a blank
Kind = Literal["bytes", "legacy", "first", "bare"]

# What the tokenizers learn their merges from: common words, runs of blanks and of line breaks.
TEXTS = (
    "the answer is four and the question was about an assistant",
    "assistant user system tool model think It is the first answer It is the second answer",
    "The user asked the assistant The assistant answered the user Answer Question",
    "walnut granary walnut granary 12 12 2026 2026 four five six",
) * 4
BREAKS = ("a\n\nb", "a\n\n\nb", "a.\n\nb", "a  b", "a   b", "a \n b", "a:\n\nb", "a\n  b") * 4


@dataclasses.dataclass(frozen=True)
class Family:
    """A chat template with its tokenizer.

    Attributes:
      kind: ``bytes`` (byte-level BPE), ``legacy`` (SentencePiece that puts a blank in front of every text between
        special tokens), ``first`` (that puts one in front of the whole text alone), ``bare`` (that puts none).
      eos: the tokenizer's ``eos_token``.
      end: the token that the template writes behind an answer that others follow; None where it writes none.
      last: the token that it writes behind the last answer; None where it writes none.
      special, added: the tokens that the template writes besides bos, eos, end and last: those marked as special, and
        those that are one token but marked as text.
      headers: texts that open somebody's turn, and so stand in no trained span.
      opens: texts that an assistant's turn stands behind: the last that is found is the header of the last turn.
      generation_eos: further tokens that ``generation_config.json`` lists as ends.
      strips: special tokens that take the blanks behind them (``rstrip``).
      marks: the template marks what is generated.
    """

    name: str
    kind: Kind
    bos: str | None
    eos: str
    end: str | None
    last: str | None
    headers: tuple[str, ...]
    opens: tuple[str, ...]
    special: tuple[str, ...] = ()
    added: tuple[str, ...] = ()
    generation_eos: tuple[str, ...] = ()
    strips: tuple[str, ...] = ()
    marks: bool = False

    @property
    def template(self) -> str:
        """The text of the chat template."""
        return (FOLDER / f"{self.name.partition('@')[0]}.jinja").read_text(encoding="utf-8")


def _family(
    name: str, kind: Kind, bos: str | None, eos: str, end: str | None, opens: str, *headers: str, **more: Any
) -> Family:
    behind, headers = (opens, *more.pop("also_opens", ())), more.pop("headers", (*headers, opens))
    return Family(name, kind, bos, eos, end, more.pop("last", end), headers, behind, **more)


IM = ("<|im_start|>", "<|im_end|>")
THINK, CALLS = ("<think>", "</think>"), ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
CHATML = "<|im_start|>assistant\n"
LLAMA3 = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>", "<|python_tag|>", "<|end_of_text|>")
LLAMA3_HEAD = "<|start_header_id|>assistant<|end_header_id|>\n\n"
INST = ("[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]", "[TOOL_RESULTS]")
INST += ("[/TOOL_RESULTS]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]")
PIPES = ("<|system|>", "<|user|>", "<|assistant|>")
R1 = ("<｜User｜>", "<｜Assistant｜>", "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", "<｜tool▁call▁begin｜>")
R1 += ("<｜tool▁call▁end｜>", "<｜tool▁sep｜>", "<｜tool▁outputs▁begin｜>", "<｜tool▁outputs▁end｜>")
R1 += ("<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>")
COHERE = ("<|START_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>", "<|SYSTEM_TOKEN|>")

_LIST = (
    _family("chatml", "bytes", None, "<|im_end|>", "<|im_end|>", CHATML, "<|im_start|>", special=IM),
    _family("chatml_marked", "bytes", None, "<|im_end|>", "<|im_end|>", CHATML, "<|im_start|>", special=IM, marks=True),
    _family("llama2", "legacy", "<s>", "</s>", "</s>", "[/INST]", "[INST]", "<<SYS>>"),
    _family(
        *("llama3", "bytes", "<|begin_of_text|>", "<|eot_id|>", "<|eot_id|>", LLAMA3_HEAD, "<|start_header_id|>"),
        special=LLAMA3,
        generation_eos=("<|end_of_text|>", "<|eot_id|>"),
    ),
    # The base model of the family has another eos_token than its template writes.
    _family(
        *("llama3@base", "bytes", "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", LLAMA3_HEAD),
        *("<|start_header_id|>",),
        special=LLAMA3,
    ),
    _family(
        *("llama31", "bytes", "<|begin_of_text|>", "<|eot_id|>", "<|eot_id|>", LLAMA3_HEAD, "<|start_header_id|>"),
        special=LLAMA3,
        generation_eos=("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"),
    ),
    _family(
        *("llama32", "bytes", "<|begin_of_text|>", "<|eot_id|>", "<|eot_id|>", LLAMA3_HEAD, "<|start_header_id|>"),
        special=LLAMA3,
        generation_eos=("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"),
    ),
    _family("mistral_v1", "legacy", "<s>", "</s>", "</s>", "[/INST]", "[INST]"),
    _family(
        *("mistral_v3", "first", "<s>", "</s>", "</s>", "[/INST]", "[INST]"),
        special=INST[:7],
        also_opens=("[/TOOL_RESULTS]",),
    ),
    _family("mistral_v3_last_user", "first", "<s>", "</s>", "</s>", "[/INST]", "[INST]", special=INST[:7]),
    _family(
        *("mistral_v7", "bytes", "<s>", "</s>", "</s>", "[/INST]", "[INST]"),
        special=INST,
        also_opens=("[/TOOL_RESULTS]",),
    ),
    _family(
        *("qwen25", "bytes", None, "<|im_end|>", "<|im_end|>", CHATML, "<|im_start|>"),
        special=(*IM, "<|endoftext|>"),
        added=CALLS[:2],
        generation_eos=("<|im_end|>", "<|endoftext|>"),
    ),
    _family(
        *("qwen25@base", "bytes", None, "<|endoftext|>", "<|im_end|>", CHATML, "<|im_start|>"),
        special=IM,
        added=CALLS[:2],
    ),
    _family(
        *("qwen3", "bytes", None, "<|im_end|>", "<|im_end|>", CHATML, "<|im_start|>"),
        special=(*IM, "<|endoftext|>"),
        added=(*CALLS, *THINK),
        generation_eos=("<|im_end|>", "<|endoftext|>"),
    ),
    _family(
        *("qwen3_thinking", "bytes", None, "<|im_end|>", "<|im_end|>", CHATML, "<|im_start|>"),
        special=(*IM, "<|endoftext|>"),
        added=(*CALLS, *THINK),
        generation_eos=("<|im_end|>", "<|endoftext|>"),
    ),
    _family(
        *("gemma2", "bare", "<bos>", "<eos>", "<end_of_turn>", "<start_of_turn>model\n", "<start_of_turn>"),
        special=("<start_of_turn>",),
        generation_eos=("<eos>", "<end_of_turn>"),
    ),
    _family(
        *("gemma3", "bare", "<bos>", "<eos>", "<end_of_turn>", "<start_of_turn>model\n", "<start_of_turn>"),
        special=("<start_of_turn>",),
        generation_eos=("<eos>", "<end_of_turn>"),
    ),
    _family(
        *("phi3", "legacy", "<s>", "<|endoftext|>", "<|end|>", "<|assistant|>", "<|user|>", "<|system|>"),
        special=PIPES,
        strips=(*PIPES, "<|end|>"),
        generation_eos=("<|endoftext|>", "<|assistant|>", "<|end|>"),
    ),
    _family(
        *("phi4", "bytes", None, "<|im_end|>", "<|im_end|>", "assistant<|im_sep|>", "<|im_start|>", "<|im_sep|>"),
        special=("<|im_start|>", "<|im_sep|>", "<|endoftext|>"),
        generation_eos=("<|endoftext|>", "<|im_end|>"),
    ),
    _family(
        *("phi4_mini", "bytes", None, "<|endoftext|>", "<|end|>", "<|assistant|>", "<|user|>", "<|system|>"),
        special=(*PIPES, "<|tool|>", "<|/tool|>"),
        generation_eos=("<|end|>", "<|endoftext|>"),
    ),
    _family("smollm2", "bytes", "<|im_start|>", "<|im_end|>", "<|im_end|>", CHATML, "<|im_start|>"),
    _family(
        *("smollm3", "bytes", None, "<|im_end|>", "<|im_end|>", CHATML, "<|im_start|>"),
        special=("<|im_start|>",),
        added=(*CALLS, *THINK),
        marks=True,
    ),
    _family(
        *("olmo2", "bytes", "<|endoftext|>", "<|endoftext|>", "<|endoftext|>", "<|assistant|>\n", "<|user|>"),
    ),
    _family("tulu", "legacy", "<s>", "</s>", None, "<|assistant|>\n", "<|user|>", "<|system|>", last="</s>"),
    _family(
        *("olmo3", "bytes", None, "<|endoftext|>", "<|im_end|>", CHATML, "<|im_start|>"),
        special=IM,
        last="<|endoftext|>",
        generation_eos=("<|im_end|>", "<|endoftext|>"),
    ),
    _family(
        *("olmo3_think", "bytes", None, "<|endoftext|>", "<|im_end|>", CHATML, "<|im_start|>"),
        special=IM,
        last="<|endoftext|>",
        generation_eos=("<|im_end|>", "<|endoftext|>"),
    ),
    _family("zephyr", "legacy", "<s>", "</s>", "</s>", "<|assistant|>\n", "<|user|>", "<|system|>"),
    _family("vicuna", "legacy", "<s>", "</s>", "</s>", "ASSISTANT:", "USER:"),
    _family("alpaca", "legacy", "<s>", "</s>", None, "### Response:\n", "### Instruction:"),
    _family(
        *("r1_old", "bytes", "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
        *("<｜Assistant｜>", "<｜User｜>", "<｜tool▁output"),
        also_opens=("<｜tool▁outputs▁end｜>",),
        added=(*R1, *THINK),
    ),
    _family(
        *("r1_new", "bytes", "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
        *("<｜Assistant｜>", "<｜User｜>", "<｜tool▁output"),
        also_opens=("<｜tool▁outputs▁end｜>",),
        added=(*R1, *THINK),
    ),
    _family(
        *("granite", "bytes", "<|end_of_text|>", "<|end_of_text|>", "<|end_of_text|>"),
        *("<|start_of_role|>assistant<|end_of_role|>", "<|start_of_role|>"),
        special=("<|start_of_role|>", "<|end_of_role|>", "<|tool_call|>"),
    ),
    _family(
        *("command_r", "bytes", "<BOS_TOKEN>", "<|END_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|CHATBOT_TOKEN|>"),
        *COHERE[:1],
        special=COHERE,
    ),
    _family(
        *("glm4", "bytes", None, "<|endoftext|>", None, "<|assistant|>", "<|user|>", "<|system|>", "<|observation|>"),
        special=("[gMASK]", "<sop>", *PIPES, "<|observation|>"),
        generation_eos=("<|endoftext|>", "<|user|>", "<|observation|>"),
    ),
    _family("falcon3", "bytes", None, "<|endoftext|>", "<|endoftext|>", "<|assistant|>\n", "<|user|>", special=PIPES),
    _family(
        *("openchat", "legacy", "<s>", "<|end_of_turn|>", "<|end_of_turn|>", "GPT4 Correct Assistant:"),
        *("GPT4 Correct User:",),
        special=("</s>",),
    ),
    _family(
        *("gpt_oss", "bytes", "<|startoftext|>", "<|return|>", "<|end|>", "<|start|>assistant"),
        # A turn may hold several messages of the assistant, so its own header is no border.
        headers=("<|start|>user", "<|start|>system", "<|start|>functions"),
        special=("<|start|>", "<|message|>", "<|channel|>", "<|call|>", "<|endoftext|>"),
        last="<|return|>",
        generation_eos=("<|return|>", "<|endoftext|>", "<|call|>"),
    ),
)
FAMILIES = {family.name: family for family in _LIST}


@functools.cache
def tokenizer_of(name: str) -> PreTrainedTokenizerFast:
    """The tokenizer of family ``name`` with its chat template; the same object at every call."""
    family = FAMILIES[name]
    backend = Tokenizer.from_str(_backend(family.kind))
    special = dict.fromkeys((family.bos, family.eos, family.end, family.last, *family.special))
    token = functools.partial(AddedToken, normalized=False)
    backend.add_special_tokens([token(text, rstrip=text in family.strips) for text in special if text])
    backend.add_tokens([token(text) for text in family.added])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=family.bos,
        eos_token=family.eos,
        pad_token=family.eos,
        clean_up_tokenization_spaces=False,
        chat_template=family.template,
    )


@functools.cache
def _backend(kind: Kind) -> str:
    """A tokenizer without added tokens, as JSON."""
    return (_byte_level() if kind == "bytes" else _sentence_piece(kind)).to_str()


def _byte_level() -> Tokenizer:
    words = Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(words, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=[]
    )
    backend.train_from_iterator([*TEXTS, *BREAKS], trainer)
    return backend


def _sentence_piece(kind: Kind) -> Tokenizer:
    """Merges over ``BLANK``, bytes for all else: letters that the texts lack, and line breaks, as Llama 2 has it."""
    teacher = Tokenizer(models.BPE())
    teacher.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    teacher.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=200, show_progress=False, special_tokens=[]))
    learnt = [*sorted(teacher.get_vocab().items(), key=lambda item: item[1])]
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *(text for text, _ in learnt), BLANK * 2]
    vocab = {text: i for i, text in enumerate(dict.fromkeys(pieces))}
    merges = [*_merges(teacher), (BLANK, BLANK)]
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    replaced = decoders.Replace(BLANK, " ")
    tail = [replaced, decoders.ByteFallback(), decoders.Fuse()]
    if kind == "legacy":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend(BLANK), normalizers.Replace(" ", BLANK)])
    elif kind == "first":
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        backend.normalizer = normalizers.Replace(" ", BLANK)
    backend.decoder = decoders.Sequence(tail if kind == "bare" else [*tail, decoders.Strip(" ", 1, 0)])
    return backend


def _merges(tokenizer: Tokenizer) -> list[tuple[str, str]]:
    return [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]


# Conversations. Every text holds a word that no other text holds, so that a look at the words says whose it is.

TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CALL = {"id": "call00001", "type": "function", "function": {"name": "weather", "arguments": {"city": "Lagoon"}}}
OFFERED = "required"  # a word of the tool's description
THOUGHT = "I recall the pendulum."


@dataclasses.dataclass(frozen=True)
class Situation:
    """A conversation and the words that tell its texts apart.

    Attributes:
      said: for every assistant's turn, a word in it.
      others: words of everybody else.
    """

    name: str
    example: Example
    said: tuple[str, ...]
    others: tuple[str, ...]


def _chat(*turns: tuple[str, str]) -> tuple[dict[str, Any], ...]:
    return tuple({"role": role, "content": content} for role, content in turns)


def _situation(name: str, messages: Any, response: str, said: str, others: str, **more: Any) -> Situation:
    messages = _chat(*messages) if messages and isinstance(messages[0], tuple) else tuple(messages)
    prompt = next(message["content"] for message in reversed(messages) if message["role"] == "user")
    return Situation(
        name, Example(name, "s", prompt, messages, response, **more), tuple(said.split()), tuple(others.split())
    )


ASK = ("user", "Which quokka is it?")
TURNS = (("user", "First the quokka."), ("assistant", "It is the granary."), ("user", "Then the otter?"))
TURNS += (("assistant", "Take two lanterns."), ("user", "And the heron at last?"))
TOOL_TURNS = (
    {"role": "user", "content": "How is the quokka?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "name": "weather", "tool_call_id": "call00001", "content": "drizzle"},
)
EARLIER = {"role": "assistant", "content": "The granary.", "reasoning_content": "hidden"}
LATER = {"role": "user", "content": "otter?"}

_SITUATIONS = (
    _situation("one turn", (ASK,), "It is the walnut.", "walnut", "quokka"),
    _situation("system", (("system", "Obey the zebra."), ASK), "It is the walnut.", "walnut", "zebra quokka"),
    _situation("three turns", TURNS, "It is the walnut.", "granary lanterns walnut", "quokka otter heron"),
    _situation(
        *("system, three turns", (("system", "Obey the zebra."), *TURNS), "It is the walnut."),
        *("granary lanterns walnut", "zebra quokka otter heron"),
    ),
    _situation("tools", TOOL_TURNS, "It is the walnut.", "Lagoon walnut", "quokka drizzle required", tools=(TOOL,)),
    _situation("tools offered", (ASK,), "It is the walnut.", "walnut", "quokka required", tools=(TOOL,)),
    _situation("thought", (ASK,), f"<think>\n{THOUGHT}\n</think>\n\nIt is the walnut.", "walnut", "quokka"),
    _situation("thought, close", (ASK,), f"<think>{THOUGHT}</think>It is the walnut.", "walnut", "quokka"),
    _situation(
        *(
            "thought in every turn",
            (ASK, ("assistant", "<think>\nhidden\n</think>\n\nThe granary."), ("user", "otter?")),
        ),
        *(f"<think>\n{THOUGHT}\n</think>\n\nIt is the walnut.", "granary walnut", "quokka otter"),
    ),
    _situation(
        *("reasoning field in every turn", ({"role": "user", "content": "quokka?"}, EARLIER, LATER)),
        *("It is the walnut.", "granary walnut", "quokka otter"),
        response_fields={"reasoning_content": THOUGHT},
    ),
    # A last turn of words and a call: where the template writes the call, it is learned too.
    _situation(
        *("words and a call", (ASK,), "Let me see the walnut.", "walnut", "quokka required"),
        response_fields={"tool_calls": [CALL]},
        tools=(TOOL,),
    ),
    _situation(
        *("reasoning field", (ASK,), "It is the walnut.", "walnut", "quokka"),
        response_fields={"reasoning_content": THOUGHT},
    ),
    _situation("leading blanks", (ASK,), "   It is the walnut.", "walnut", "quokka"),
    _situation("trailing blanks", (ASK,), "It is the walnut.  ", "walnut", "quokka"),
    _situation("line breaks", (ASK,), "\n\nIt is the walnut.\n\n", "walnut", "quokka"),
    _situation(
        *("line breaks in all turns", (ASK, ("assistant", "\n The granary. \n"), ("user", "\n otter?\n"))),
        *("\n  It is the walnut.\n", "granary walnut", "quokka otter"),
    ),
    _situation("repeats the prompt", (ASK,), "Which quokka is it? Which quokka is it?", "quokka", ""),
    _situation(
        *("repeats its last turn", (ASK, ("assistant", "It is the walnut."), ("user", "otter?")), "It is the walnut."),
        *("walnut walnut", "quokka otter"),
    ),
    _situation("role words", (ASK,), "assistant: the user and the model are the system walnut", "walnut", "quokka"),
    _situation("one letter", (ASK,), "A", "A", "quokka"),
    _situation("one letter that is anywhere", (("user", "s s s?"),), "s", "s", ""),
    _situation("a line break within", (ASK,), "It is\n\n\nthe walnut\n", "walnut", "quokka"),
)
SITUATIONS = {situation.name: situation for situation in _SITUATIONS}
