"""The skills of the planted task family: what is asked, how it is worded, and the function that answers it.

A skill is a small operation on a number or a list. Every skill has noun phrases (put into the pool's frames), a
wording for its one-step reasoning, one story of general wording, and for some a wording in the language of a shop.
Three of them, ``SHOP_TASKS``, have shop wordings that make the domain; no frame or story here repeats those.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np

NAMES = ("Ann", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gwen", "Hugo", "Ida", "Jon")
GOODS = ("shoes", "gloves", "jars", "lamps", "cups", "books", "plates", "socks")
LETTERS = tuple("bcdfghjklmnpqrstvwxz")
CRATE = 60
"""What a full crate holds: ``complement`` is the gap from n to it."""
WEEK = 7


@dataclasses.dataclass(frozen=True)
class Skill:
    """One operation with its wordings.

    Attributes:
      name: unique name.
      solve: answer from the arguments (a mapping with ``n``, or ``items`` and perhaps ``x``).
      phrases: noun phrases that name what is asked; placeholders ``{n}``, ``{x}``, ``{items}``.
      operator: the word for it in symbolic notation.
      reason: four words of reasoning, so that the length of a response says nothing about its skill.
      story: general wordings, for pre-training.
      numbers: the arguments n that a number skill covers; empty for a list skill.
      shop: wordings in the shop's language, for pre-training.
    """

    name: str
    solve: Callable[[Mapping], str]
    phrases: tuple[str, ...]
    operator: str
    reason: str
    story: tuple[str, ...]
    numbers: tuple[int, ...] = ()
    shop: tuple[str, ...] = ()


def _number_skill(name, function, numbers, phrases, operator, reason, story, shop=()) -> Skill:
    solve = lambda args: str(function(args["n"]))
    return Skill(name, solve, phrases, operator, reason, story, tuple(numbers), shop)


def _twice(args: Mapping) -> str:
    return next(item for item in args["items"] if args["items"].count(item) == 2)


_TWO_DIGIT = [n for n in range(10, 100) if n % 10 and n // 10 != n % 10]
_NUMBER_SKILLS = (
    _number_skill(
        "successor",
        lambda n: n + 1,
        range(60),
        ("the number after {n}", "one more than {n}"),
        "next",
        "the one after {n}",
        ("{name} sits on seat {n} and moves up one seat. Which seat is it now?",),
        ("{name} has the ticket {n} in the shop. Which ticket is called next?",),
    ),
    _number_skill(
        "predecessor",
        lambda n: n - 1,
        range(1, 61),
        ("the number before {n}", "one less than {n}"),
        "prev",
        "the one before {n}",
        ("{name} sits on seat {n} and moves down one seat. Which seat is it now?",),
        ("There are {n} {goods} in the shop and {name} takes a single one. How many are still there?",),
    ),
    _number_skill(
        "double",
        lambda n: 2 * n,
        range(50),
        ("two times {n}", "the double of {n}"),
        "twice",
        "{n} taken two times",
        ("{name} has {n} coins and wins as many again. How many coins is that?",),
        (
            "{name} packs {n} pairs of {goods}. How many {goods} are packed?",
            "There are {n} boxes with two {goods} in each. How many {goods} is that?",
            "Each buyer takes two {goods} and there are {n} buyers. How many {goods} does {name} sell?",
        ),
    ),
    _number_skill(
        "half",
        lambda n: n // 2,
        range(0, 100, 2),
        ("one half of {n}", "the middle of 0 and {n}"),
        "half",
        "one half of {n}",
        ("{name} shares {n} coins with one friend. How many does each get?",),
        ("{name} sells {n} {goods} at half price. How much is paid?",),
    ),
    _number_skill(
        "complement",
        lambda n: CRATE - n,
        range(61),
        ("the gap from {n} to 60", "what {n} lacks to 60"),
        "lack",
        "60 take away {n}",
        ("A walk has 60 steps and {name} made {n}. How many steps are left?",),
        (
            "There is room for 60 {goods} and {n} are there. How many more can come?",
            "{name} wants 60 {goods} and has {n}. How many are missing?",
            "Of 60 {goods} that are due {n} are packed. How many must {name} still pack?",
        ),
    ),
    _number_skill(
        "shift",
        lambda n: n + WEEK,
        range(60),
        ("seven more than {n}", "{n} moved up by seven"),
        "plus7",
        "{n} and seven more",
        ("{name} is {n} years old. How old is {name} in seven years?",),
        (
            "It is day {n} and the order of {name} takes seven days. On which day does it come?",
            "The {goods} were due on day {n} but were seven days late. Which day was it?",
            "{name} pays the bill seven days after day {n}. Which day is that?",
        ),
    ),
    _number_skill(
        "mirror",
        lambda n: int(str(n)[::-1]),
        _TWO_DIGIT,
        ("{n} read backwards", "the mirror image of {n}"),
        "mirror",
        "the mirror of {n}",
        ("{name} sees the sign {n} from the wrong side. What does it seem to say?",),
        ("The bill says {n} but {name} has turned the digits around. How much was paid?",),
    ),
    _number_skill(
        "tens",
        lambda n: n // 10,
        range(10, 70),
        ("the tens digit of {n}", "how many tens {n} has"),
        "tens",
        "the tens of {n}",
        ("{name} has {n} coins in rows of ten. How many full rows are there?",),
        ("{name} packed {n} {goods} in boxes of ten. How many boxes are full?",),
    ),
    _number_skill(
        "units",
        lambda n: n % 10,
        range(10, 70),
        ("the last digit of {n}", "the units digit of {n}"),
        "units",
        "the units of {n}",
        ("{name} has {n} coins in rows of ten. How many are in no full row?",),
    ),
    _number_skill(
        "digit_sum",
        lambda n: n // 10 + n % 10,
        range(10, 70),
        ("the digit sum of {n}", "the digits of {n} added up"),
        "dsum",
        "the digits of {n}",
        ("{name} adds up the digits of the house {n}. What comes out?",),
    ),
    _number_skill(
        "remainder",
        lambda n: n % 5,
        range(60),
        ("the remainder of {n} by five", "{n} modulo five"),
        "mod5",
        "the rest of {n}",
        ("{name} takes fives from {n} coins as often as possible. What remains?",),
    ),
    _number_skill(
        "parity",
        lambda n: "odd" if n % 2 else "even",
        range(60),
        ("the parity of {n}", "the kind of {n} , odd or even"),
        "parity",
        "the parity of {n}",
        ("{name} puts {n} coins into two equal heaps, if possible. Is the number even or odd?",),
    ),
    _number_skill(
        "rounding",
        lambda n: (n + 5) // 10 * 10,
        range(90),
        ("the ten nearest to {n}", "{n} in whole tens"),
        "round",
        "ten nearest to {n}",
        ("{name} says {n} steps in whole tens. Which ten is it?",),
        ("The bill of {name} is {n} and the shop takes tens only. How much is paid?",),
    ),
)


_LARGEST, _SMALLEST = (lambda a: max(a["items"], key=int)), (lambda a: min(a["items"], key=int))
_LIST_SKILLS = (
    Skill(
        "maximum",
        _LARGEST,
        ("the largest of {items}", "the highest number in {items}"),
        "max",
        "the very highest one",
        ("{name} has the cards {items}. Which card is the highest?",),
        (),
        ("The {goods} cost {items}. Which price is the highest?",),
    ),
    Skill(
        "minimum",
        _SMALLEST,
        ("the smallest of {items}", "the lowest number in {items}"),
        "min",
        "the very lowest one",
        ("{name} has the cards {items}. Which card is the lowest?",),
        (),
        ("The {goods} cost {items}. Which price is the lowest?",),
    ),
    Skill(
        "first",
        lambda a: a["items"][0],
        ("the first item of {items}", "what {items} starts with"),
        "head",
        "the very first one",
        ("In a line stand {items}. Who is in front?",),
    ),
    Skill(
        "last",
        lambda a: a["items"][-1],
        ("the last item of {items}", "what {items} ends with"),
        "end",
        "the very last one",
        ("In a line stand {items}. Who is at the back?",),
    ),
    Skill(
        "count",
        lambda a: str(a["items"].count(a["x"])),
        ("how often {x} is in {items}", "the count of {x} in {items}"),
        "count",
        "the times of {x}",
        ("{name} draws {items} from a bag. How often is it {x}?",),
    ),
    Skill(
        "duplicate",
        _twice,
        ("the item that is twice in {items}", "the repeated item of {items}"),
        "dup",
        "the one seen twice",
        ("{name} draws {items} from a bag. Which one came twice?",),
    ),
)


SKILLS: Mapping[str, Skill] = {skill.name: skill for skill in _NUMBER_SKILLS + _LIST_SKILLS}

SHOP_TASKS: Mapping[str, tuple[str, ...]] = {
    "double": (
        "{name} sells {n} pairs of {goods} in the shop. How many single {goods} does {name} need?",
        "For {n} buyers {name} takes two {goods} each. How many {goods} are sold?",
    ),
    "complement": (
        "A full box holds 60 {goods} and {name} has packed {n}. How many still fit?",
        "The order is for 60 {goods} and {n} are there. How many must still come?",
    ),
    "shift": (
        "The bill of {name} is due on day {n} and is paid seven days late. On which day?",
        "{name} buys {goods} on day {n} and must wait seven days. Which day do they come?",
    ),
}
"""Skill -> wordings of the domain, which neither the pool nor the pre-training text ever shows."""


def draw_arguments(skill: Skill, rng: np.random.Generator, *, length: int) -> dict:
    """Arguments for one question: ``{"n": int}``, or ``{"items": tuple of str, "x": str}`` with ``length`` items."""
    if skill.numbers:
        return {"n": pick(rng, skill.numbers)}
    if skill.name in ("maximum", "minimum"):
        return {"items": tuple(str(v) for v in rng.choice(100, size=length, replace=False))}
    items = [str(v) for v in rng.choice(LETTERS, size=length, replace=False)]
    x = items[int(rng.integers(length))]
    if skill.name == "count":
        items = [x if rng.random() < 0.5 else item for item in items]
    elif skill.name == "duplicate":
        i, j = rng.choice(length, size=2, replace=False)
        items[int(i)] = items[int(j)]
    return {"items": tuple(items), "x": x} if skill.name == "count" else {"items": tuple(items)}


def pick(rng: np.random.Generator, options: Sequence):
    """One of the options; what ``rng.choice`` does, without its conversion to an array, which took most of the time."""
    return options[int(rng.integers(len(options)))]


def fill(template: str, arguments: Mapping, rng: np.random.Generator) -> str:
    """The template with its arguments, a name and goods drawn from ``rng`` put in."""
    values = {key: " ".join(value) if isinstance(value, tuple) else str(value) for key, value in arguments.items()}
    return template.format(name=pick(rng, NAMES), goods=pick(rng, GOODS), **values)


def choices_for(skill: Skill, arguments: Mapping, answer: str, rng: np.random.Generator) -> list[str]:
    """Two to four different answers in random order, the right one among them, the others near it."""
    if skill.name == "parity":
        options = ["even", "odd"]
    elif answer.isdigit() and skill.name not in ("maximum", "minimum"):
        value = int(answer)
        near = {value + d for d in (-10, -2, -1, 1, 2, 10)} | {int(arguments.get("n", value))}
        near = sorted(v for v in near - {value} if 0 <= v <= 99)
        options = [answer] + [str(v) for v in rng.choice(near, size=3, replace=False)]
    else:
        others = sorted(set(arguments["items"]) - {answer})
        options = [answer] + [str(v) for v in rng.permutation(others)[:3]]
    return [str(v) for v in rng.permutation(options)]


def is_familiar(skill: Skill, arguments: Mapping, share: float) -> bool:
    """Whether the pre-training text may show this question: a fixed ``share`` of each number skill's arguments.

    Depends on the skill and the number only (SHA-256), never on a task's seed, since there is one pre-trained model.
    """
    if not skill.numbers:
        return True
    digest = hashlib.sha256(f"{skill.name}/{arguments['n']}".encode()).digest()
    return int.from_bytes(digest[:4], "big") < share * 2**32
