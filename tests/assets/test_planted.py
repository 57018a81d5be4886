"""The planted task: the same for the same seed, every answer right, and the domain's form nowhere in the pool."""

import collections
import json
import re

import numpy as np
import pytest

from ntkjax.assets import planted_task, write_planted_task
from ntkjax.assets.planted import FORMS, pretraining_rows
from ntkjax.assets.skills import SHOP_TASKS, SKILLS, draw_arguments
from ntkjax.errors import ConfigError
from ntkjax.rng import numpy_rng

# Written apart from the package's own functions: by digits, by counting, by search.
NUMBER_ORACLES = {
    "successor": lambda n: len([*range(n), n]),
    "predecessor": lambda n: len(range(1, n)),
    "double": lambda n: n + n,
    "half": lambda n: max(k for k in range(51) if k + k <= n),
    "complement": lambda n: next(k for k in range(61) if n + k == 60),
    "shift": lambda n: len(range(n)) + len("seven--"),
    "mirror": lambda n: int("".join(reversed(str(n)))),
    "tens": lambda n: int(str(n)[0]),
    "units": lambda n: int(str(n)[-1]),
    "digit_sum": lambda n: sum(map(int, str(n))),
    "remainder": lambda n: next(r for r in range(5) if (n - r) in range(0, 100, 5)),
    "parity": lambda n: {"0": "even", "1": "odd"}[f"{n:b}"[-1]],
    # Ties (a last digit of 5) go up.
    "rounding": lambda n: min(range(0, 100, 10), key=lambda t: (abs(t - n), -t)),
}
LIST_ORACLES = {
    "maximum": lambda items, x: sorted(items, key=int)[-1],
    "minimum": lambda items, x: sorted(items, key=int)[0],
    "first": lambda items, x: items[0],
    "last": lambda items, x: next(reversed(items)),
    "count": lambda items, x: str(sum(item == x for item in items)),
    "duplicate": lambda items, x: collections.Counter(items).most_common(1)[0][0],
}


@pytest.fixture(scope="module")
def task():
    return planted_task(0)


def template_pattern(template: str) -> re.Pattern:
    parts = re.split(r"(\{\w+\})", template)
    seen: set[str] = set()

    def piece(part: str) -> str:
        if not part.startswith("{"):
            return re.escape(part)
        name = part[1:-1]
        if name in seen:
            return f"(?P={name})"
        seen.add(name)
        return {"n": r"(?P<n>\d+)", "x": r"(?P<x>\w)", "items": r"(?P<items>\w+(?: \w+)+)"}.get(
            name, rf"(?P<{name}>\w+)"
        )

    return re.compile("".join(map(piece, parts)))


def solve_from_text(row: dict) -> str:
    """The answer worked out from the prompt's own words by an independent function."""
    skill = SKILLS[row["skill"]]
    templates = [*skill.phrases, *skill.story, *skill.shop, *SHOP_TASKS.get(skill.name, ())]
    if row["form"] == "notation":
        arguments = row["prompt"].removeprefix(f"{skill.operator} : ").removesuffix(" -> ?").split(" , ")
        found = {"n": arguments[0]} if skill.numbers else {"items": arguments[0], "x": arguments[-1]}
    else:
        found = next(m.groupdict() for t in templates if (m := template_pattern(t).search(row["prompt"])))
    if skill.numbers:
        return str(NUMBER_ORACLES[skill.name](int(found["n"])))
    return LIST_ORACLES[skill.name](found["items"].split(), found.get("x"))


def test_same_seed_same_task_other_seed_another():
    small = {"pool_size": 60, "domain_size": 12, "dev_size": 6, "test_size": 12}
    assert planted_task(3, **small) == planted_task(3, **small)
    other = planted_task(4, **small)
    assert {row["prompt"] for row in other.pool} != {row["prompt"] for row in planted_task(3, **small).pool}


def test_task_does_not_change_between_machines():
    """Pins the generator: the numbers in the documentation hold for these very rows."""
    row = planted_task(0, pool_size=30, domain_size=3, dev_size=3, test_size=3).pool[0]
    assert (row["prompt"], row["response"]) == (
        "Find the highest number in 69 23 89 70.",
        "Look for the very highest one. So the answer is 89.",
    )


def test_every_answer_is_right_and_among_its_choices(task):
    assert set(NUMBER_ORACLES) | set(LIST_ORACLES) == set(SKILLS)
    for row in task.pool + task.train + task.dev + task.test:
        assert solve_from_text(row) == row["answer"], row
        assert row["response"].endswith(f"So the answer is {row['answer']}.")
        assert row["choices"].count(row["answer"]) == 1
        assert 2 <= len(set(row["choices"])) == len(row["choices"]) <= 4


@pytest.mark.parametrize("name", sorted(SKILLS))
def test_each_skill_agrees_with_its_oracle_over_its_range(name):
    skill, rng = SKILLS[name], numpy_rng(0, name)
    if skill.numbers:
        assert [skill.solve({"n": n}) for n in skill.numbers] == [str(NUMBER_ORACLES[name](n)) for n in skill.numbers]
        return
    for length in (3, 4, 5):
        for _ in range(50):
            args = draw_arguments(skill, rng, length=length)
            assert skill.solve(args) == LIST_ORACLES[name](list(args["items"]), args.get("x"))


def test_position_of_the_right_choice_says_nothing(task):
    places = [row["choices"].index(row["answer"]) for row in task.pool + task.test if len(row["choices"]) == 4]
    share = np.bincount(places, minlength=4) / len(places)
    assert np.all(np.abs(share - 0.25) < 4 * np.sqrt(0.25 * 0.75 / len(places)))


def test_pool_has_many_skills_in_several_forms(task):
    forms = collections.defaultdict(set)
    for row in task.pool:
        forms[row["skill"]].add(row["form"])
    assert len(forms) >= 12
    assert all(seen == set(FORMS) for seen in forms.values())


def test_domain_form_is_neither_in_the_pool_nor_in_the_pretraining_text(task):
    patterns = [template_pattern(t) for templates in SHOP_TASKS.values() for t in templates]
    shows = lambda rows: sum(any(p.search(row["prompt"]) for p in patterns) for row in rows)
    assert shows(task.train) == len(task.train)
    assert shows(task.pool) == 0
    assert shows(pretraining_rows(0, 3000)) == 0


def test_pretraining_text_keeps_some_arguments_of_every_number_skill_back():
    seen = collections.defaultdict(set)
    for row in pretraining_rows(1, 4000):
        if SKILLS[row["skill"]].numbers:
            seen[row["skill"]].add(solve_arguments(row))
    for name, numbers in seen.items():
        assert 0.1 < len(numbers) / len(SKILLS[name].numbers) < 0.7, name


def solve_arguments(row: dict) -> int:
    """The argument n of a number question: the number in the text that is no constant of its wording."""
    skill = SKILLS[row["skill"]]
    if row["form"] == "notation":
        return int(row["prompt"].split(" : ")[1].split()[0])
    templates = [*skill.phrases, *skill.story, *skill.shop]
    return int(next(m["n"] for t in templates if (m := template_pattern(t).search(row["prompt"]))))


def test_splits_share_no_prompt(task):
    prompts = [row["prompt"] for split in (task.train, task.dev, task.test, task.pool) for row in split]
    assert len(set(prompts)) == len(prompts)
    ids = [row["id"] for split in (task.train, task.dev, task.test, task.pool) for row in split]
    assert len(set(ids)) == len(ids)


def test_truth_is_the_skills_of_the_domain(task):
    assert set(task.useful_skills) == {row["skill"] for row in task.test}
    assert set(task.useful_ids) == {row["id"] for row in task.pool if row["skill"] in task.useful_skills}
    assert 0.1 < len(task.useful_ids) / len(task.pool) < 0.25


def test_response_lengths_do_not_give_the_skill_away(task):
    """Scores correlate with response length (fewer tokens, larger pooled gradients): no skill may be short or long."""
    words = collections.defaultdict(list)
    for row in task.pool:
        words[row["skill"]].append(len(re.findall(r"\w+|[^\w\s]", row["response"])))
    overall = np.mean([n for lengths in words.values() for n in lengths])
    for name, lengths in words.items():
        assert abs(np.mean(lengths) / overall - 1) < 0.12, name
    useful = np.concatenate([words[name] for name in task.useful_skills])
    assert abs(np.mean(useful) / overall - 1) < 0.06


def test_how_the_reasoning_begins_depends_on_the_form_alone(task):
    for row in task.pool:
        assert row["response"].startswith(FORMS[row["form"]][1] + " "), row


def test_files(tmp_path):
    paths = write_planted_task(tmp_path, 1, pool_size=44, domain_size=9, dev_size=6, test_size=9)
    rows = {
        name: [json.loads(line) for line in paths[name].read_text().splitlines()] for name in paths if name != "truth"
    }
    assert {name: len(value) for name, value in rows.items()} == {"pool": 44, "train": 9, "dev": 6, "test": 9}
    assert {"id", "source", "prompt", "response", "answer", "choices", "skill", "form"} == set(rows["pool"][0])
    truth = json.loads(paths["truth"].read_text())
    assert truth["useful_skills"] == list(SHOP_TASKS)
    assert truth["skill_of"] == {row["id"]: row["skill"] for row in rows["pool"]}
    assert truth["useful_share"] == pytest.approx(len(truth["useful_ids"]) / 44)


def test_too_many_rows_are_refused(monkeypatch):
    monkeypatch.setattr("ntkjax.assets.planted.MOST_REPEATS", 3)
    with pytest.raises(ConfigError, match=r"train_size=20000: there are not that many different questions"):
        planted_task(0, pool_size=44, domain_size=20_000)
