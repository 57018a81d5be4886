"""A generated task whose truth is known: a pool of many skills, and a domain that needs a few of them in other wording.

``planted_task(seed)`` draws a pool of questions about all skills of ``skills.py``, in five surface forms with a line of
reasoning, and a small domain that asks three of them in the language of a shop, a form the pool never shows. What helps
on the domain is therefore known for each pool example: whether its skill is one of the three. The same module draws
the text on which the tiny model was pre-trained, so that the two cannot drift apart.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ntkjax.assets.skills import (
    SHOP_TASKS,
    SKILLS,
    Skill,
    choices_for,
    draw_arguments,
    fill,
    is_familiar,
    pick,
)
from ntkjax.errors import ConfigError
from ntkjax.files import write_json, write_jsonl
from ntkjax.rng import numpy_rng

FORMS = {
    "question": ("What is {phrase}?", "We need"),
    "command": ("Find {phrase}.", "Look for"),
    "polite": ("Please tell me {phrase}.", "This asks for"),
    "title": ("Task: {phrase}", "Here we want"),
    "notation": ("{operator} : {arguments} -> ?", "It means"),
}
"""The surface forms of the pool: the frame of the question, and how the reasoning begins."""

MOST_REPEATS = 1000
"""Questions already taken that are drawn in a row before a request counts as too large."""
FAMILIAR_SHARE = 0.35
"""Share of each number skill's arguments that the pre-training text shows."""


@dataclasses.dataclass(frozen=True)
class PlantedTask:
    """Rows (dicts with id, source, prompt, response, answer, choices, skill, form) and what is useful among them.

    ``useful_skills``: the skills the domain needs. ``useful_ids``: the pool rows of those skills.
    """

    pool: list[dict]
    train: list[dict]
    dev: list[dict]
    test: list[dict]
    useful_skills: tuple[str, ...]
    useful_ids: tuple[str, ...]


def final_sentence(answer: str) -> str:
    """``So the answer is X.``"""
    return f"So the answer is {answer}."


def _row(skill: Skill, form: str, prompt: str, arguments: dict, rng: np.random.Generator, reason: str) -> dict:
    answer = skill.solve(arguments)
    choices = choices_for(skill, arguments, answer, rng)
    return {
        "prompt": prompt,
        "response": reason + final_sentence(answer),
        "answer": answer,
        "choices": choices,
        "skill": skill.name,
        "form": form,
    }


def framed_row(skill: Skill, rng: np.random.Generator, arguments: dict) -> dict:
    """A question in one of ``FORMS``, answered with one sentence of reasoning first."""
    form = pick(rng, tuple(FORMS))
    frame, lead = FORMS[form]
    phrase = fill(pick(rng, skill.phrases), arguments, rng)
    plain = " , ".join(" ".join(v) if isinstance(v, tuple) else str(v) for v in arguments.values())
    prompt = frame.format(phrase=phrase, operator=skill.operator, arguments=plain)
    return _row(skill, form, prompt, arguments, rng, f"{lead} {fill(skill.reason, arguments, rng)}. ")


def told_row(skill: Skill, form: str, templates: Sequence[str], rng: np.random.Generator, arguments: dict) -> dict:
    """A question told as a little story from ``templates``, answered without reasoning."""
    return _row(skill, form, fill(pick(rng, templates), arguments, rng), arguments, rng, "")


def _distinct(draw, count: int, taken: set[str], what: str) -> list[dict]:
    """``count`` rows from ``draw(i)`` whose prompts are not in ``taken`` (which grows)."""
    rows: list[dict] = []
    repeats = 0
    while len(rows) < count:
        row = draw(len(rows))
        if row["prompt"] in taken:
            repeats += 1
            if repeats == MOST_REPEATS:
                raise ConfigError(f"{what}={count}: there are not that many different questions; ask for fewer")
            continue
        repeats = 0
        taken.add(row["prompt"])
        rows.append(row)
    return rows


def _pool_rows(seed: int, size: int) -> list[dict]:
    rng = numpy_rng(seed, "planted", "pool")
    names = [list(SKILLS)[i % len(SKILLS)] for i in range(size)]
    names = [str(v) for v in rng.permutation(names)]

    def draw(i: int) -> dict:
        skill = SKILLS[names[i]]
        arguments = draw_arguments(skill, rng, length=int(rng.integers(4, 6)))
        return framed_row(skill, rng, arguments)

    rows = _distinct(draw, size, set(), "pool_size")
    return [{"id": f"pool-{i}", "source": row["skill"], **row} for i, row in enumerate(rows)]


def _domain_rows(seed: int, sizes: dict[str, int]) -> dict[str, list[dict]]:
    taken: set[str] = set()
    names = list(SHOP_TASKS)
    splits = {}
    for split, size in sizes.items():
        rng = numpy_rng(seed, "planted", split)

        def draw(i: int, rng=rng) -> dict:
            skill = SKILLS[names[i % len(names)]]
            return told_row(skill, "shop", SHOP_TASKS[skill.name], rng, draw_arguments(skill, rng, length=0))

        rows = _distinct(draw, size, taken, f"{split}_size")
        splits[split] = [{"id": f"{split}-{i}", "source": "shop", **row} for i, row in enumerate(rows)]
    return splits


def planted_task(
    seed: int, *, pool_size: int = 2400, domain_size: int = 96, dev_size: int = 90, test_size: int = 300
) -> PlantedTask:
    """The task of this seed: same seed and sizes, same rows.

    All prompts of the pool are different, and so are all prompts of the domain over its three splits.

    Raises:
      ConfigError: more rows asked for than there are different questions.
    """
    pool = _pool_rows(seed, pool_size)
    domain = _domain_rows(seed, {"train": domain_size, "dev": dev_size, "test": test_size})
    useful = tuple(SHOP_TASKS)
    ids = tuple(row["id"] for row in pool if row["skill"] in useful)
    return PlantedTask(pool, domain["train"], domain["dev"], domain["test"], useful, ids)


def write_planted_task(directory: str | Path, seed: int, **sizes: int) -> dict[str, Path]:
    """Write ``pool.jsonl``, ``domain/{train,dev,test}.jsonl`` and ``truth.json``; return their paths by name.

    ``truth.json``: seed, useful_skills, useful_ids, useful_share (of the pool) and skill_of (pool id -> skill).
    ``sizes`` are those of ``planted_task``.
    """
    task = planted_task(seed, **sizes)
    root = Path(directory)
    (root / "domain").mkdir(parents=True, exist_ok=True)
    paths = {"pool": root / "pool.jsonl"} | {s: root / "domain" / f"{s}.jsonl" for s in ("train", "dev", "test")}
    for name, path in paths.items():
        write_jsonl(path, getattr(task, name))
    truth = {
        "seed": seed,
        "useful_skills": task.useful_skills,
        "useful_share": len(task.useful_ids) / len(task.pool),
        "useful_ids": task.useful_ids,
        "skill_of": {row["id"]: row["skill"] for row in task.pool},
    }
    paths["truth"] = root / "truth.json"
    write_json(paths["truth"], truth, indent=1)
    return paths


def pretraining_rows(seed: int, count: int) -> list[dict]:
    """Questions of all skills at a lower competence: familiar arguments only, shorter lists, no wording of the domain.

    Rows have prompt and response. About half are framed as in the pool, with reasoning; half are told, without.
    """
    rng = numpy_rng(seed, "planted", "pretraining")
    skills = list(SKILLS.values())
    rows = []
    while len(rows) < count:
        skill = skills[int(rng.integers(len(skills)))]
        arguments = draw_arguments(skill, rng, length=int(rng.integers(3, 5)))
        if not is_familiar(skill, arguments, FAMILIAR_SHARE):
            continue
        if rng.random() < 0.5:
            rows.append(framed_row(skill, rng, arguments))
        else:
            rows.append(told_row(skill, "story", skill.story + skill.shop, rng, arguments))
    return rows
