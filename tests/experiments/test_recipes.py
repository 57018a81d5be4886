"""The recipes: every combination is a study, and every mapping is right on small local data with the same fields."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ntkjax.commands.study.arms import arms_of
from ntkjax.commands.study.command import run_study
from ntkjax.commands.study.spec import read_study
from ntkjax.data import read_records
from ntkjax.data.mapping import Source, prepare
from ntkjax.pipeline.study import grid

RECIPES = Path(__file__).resolve().parents[2] / "experiments" / "recipes"
MODELS = sorted(path.stem for path in (RECIPES / "models").glob("*.yaml"))
DOMAINS = sorted(path.stem for path in (RECIPES / "domains").glob("*.yaml"))


def recipe(model: str, domain: str, *more: Path):
    return read_study([RECIPES / "paper.yaml", RECIPES / "models" / f"{model}.yaml",
                       RECIPES / "domains" / f"{domain}.yaml", *more])  # fmt: skip


@pytest.mark.parametrize(("model", "domain"), itertools.product(MODELS, DOMAINS))
def test_every_combination_is_a_study(model, domain):
    spec, _ = recipe(model, domain)
    assert spec.budgets == (9000,) and len(spec.seeds) == 5 and list(spec.domains) == [domain]
    assert len(arms_of(spec)) > 15 and len(spec.learning_rates) == 3
    assert spec.model is not None and "/" in spec.model.model
    assert all(source.mapping is not None for source in (*spec.pool, *spec.domains[domain].test))


def test_there_is_a_recipe_for_every_model_and_domain():
    assert MODELS == ["llama3-8b-instruct", "qwen3-0.6b", "qwen3-8b"]
    assert DOMAINS == ["finance", "legal", "medical", "psychology"]


# -- data with the fields that the hub's have --


def medmcqa(i: int, split: str) -> dict:
    return {"id": f"{split}-{i}", "question": f"Question {split} {i}?", "opa": "one", "opb": "two", "opc": "three",
            "opd": "four", "cop": i % 4, "choice_type": "single", "exp": None, "subject_name": "Anatomy",
            "topic_name": None}  # fmt: skip


def pubmedqa(i: int, split: str) -> dict:
    context = {"contexts": [f"Background {i}.", f"Results {i}."], "labels": ["B", "R"], "meshes": ["M"]}
    return {"pubid": 1000 + i, "question": f"Does it {i}?", "context": context, "long_answer": "It does.",
            "final_decision": ["yes", "no", "maybe"][i % 3]}  # fmt: skip


def counsel(i: int, split: str) -> dict:
    return {"questionID": i // 3, "questionTitle": f"Title {i // 3}", "questionText": f"I feel {i // 3}.",
            "questionLink": "l", "topic": "anxiety", "therapistInfo": "T", "answerText": f"Try this {i}.", "upvotes": 1,
            "views": 2}  # fmt: skip


HUB = {
    "FinanceMTEB/financial_phrasebank": lambda i, split: {
        "text": f"Sales {split} {i} .",
        "label": i % 3,
        "label_text": "x",
    },
    "openlifescienceai/medmcqa": medmcqa,
    "cais/mmlu": lambda i, split: {
        "question": f"Q{i}?",
        "subject": "s",
        "choices": ["w", "x", "y", "z"],
        "answer": i % 4,
    },
    "qiaojin/PubMedQA": pubmedqa,
    "nbertagnolli/counsel-chat": counsel,
}
SCALE = 20
"""Recipes ask for so many times more rows than there are here."""
ROWS = {"FinanceMTEB/financial_phrasebank": 70, "openlifescienceai/medmcqa": 80, "qiaojin/PubMedQA": 50,
        "nbertagnolli/counsel-chat": 105}  # fmt: skip


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The hub's clients, answering with local data; the (data set, configuration, split) that were asked for."""
    import datasets
    import huggingface_hub

    asked = set()

    def load(name, config, *, split):
        asked.add((name, config, split))
        rows = [HUB[name](i, split) for i in range(ROWS.get(name, 8))]
        return datasets.Dataset.from_list([row | ({"subject": config} if name == "cais/mmlu" else {}) for row in rows])

    def download(repo, filename, *, repo_type, revision):
        asked.add((repo, filename, revision))
        local = tmp_path / filename.replace("/", "-")
        if repo == "kaist-ai/CoT-Collection":
            texts = {"source": "Why {}?", "target": "t{}", "rationale": "Because {}.", "task": "task"}
            rows = {str(i): {key: text.format(i) for key, text in texts.items()} for i in range(40)}
            local.write_text(json.dumps(rows))
        else:
            split = filename.split("/")[1]
            rows = [{"premise": f"Clause {split} {i}.", "hypothesis": "It ends.", "label": i % 3} for i in range(80)]
            pq.write_table(pa.Table.from_pylist(rows), local)
        return str(local)

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return asked


def small(source: Source) -> Source:
    rows = source.rows and (source.rows[0] // SCALE, source.rows[1] // SCALE)
    return dataclasses.replace(source, rows=rows)


def examples(sources, tmp_path):
    paths, _ = prepare([small(source) for source in sources], tmp_path / "out", on_bad_record="skip")
    return list(read_records(paths, cache_dir=tmp_path / "cache"))


def splits(domain: str, tmp_path):
    spec, _ = recipe("qwen3-0.6b", domain)
    entry = spec.domains[domain]
    return {name: examples(getattr(entry, name), tmp_path) for name in ("train", "dev", "test")}


def test_the_pool(hub, tmp_path):
    spec, _ = recipe("qwen3-0.6b", "finance")
    found = examples(spec.pool, tmp_path)
    assert len(found) == 40 and found[7].prompt == "Why 7?" and found[7].source == "task"
    assert found[7].response == "Because 7.\nSo the answer is t7." and found[7].choices is None
    assert hub == {("kaist-ai/CoT-Collection", "data/CoT_collection_en.json", None)}


def test_finance(hub, tmp_path):
    found = splits("finance", tmp_path)
    assert [len(part) for part in found.values()] == [50, 13, 70]
    assert not {e.prompt for e in found["train"]} & {e.prompt for e in found["dev"]}
    by_place = {e.prompt.split("\n")[1]: e for e in found["test"]}
    for i, answer in enumerate(["negative", "neutral", "positive"]):
        example = by_place[f"Sales test {i} ."]
        assert example.answer == answer and example.response == f"So the answer is {answer}."
        assert example.prompt.endswith("Options:\n- negative\n- neutral\n- positive")


def test_medical(hub, tmp_path):
    found = splits("medical", tmp_path)
    assert [len(part) for part in found.values()] == [50, 15, 80 + 6 * 8 + 25]
    first = next(e for e in found["test"] if e.id == "validation-6")
    assert first.prompt == "Question validation 6?\nOptions:\n- one\n- two\n- three\n- four" and first.answer == "three"
    assert not {e.id for e in found["train"]} & {e.id for e in found["dev"]}
    sources = {e.source for e in found["test"]}
    assert {"medmcqa", "pubmedqa", "mmlu anatomy", "mmlu professional_medicine"} < sources and len(sources) == 8
    mmlu = [e for e in found["test"] if e.source == "mmlu anatomy"]
    assert [e.answer for e in mmlu[:4]] == ["w", "x", "y", "z"] and mmlu[0].choices == ("w", "x", "y", "z")
    paper = next(e for e in found["test"] if e.source == "pubmedqa")
    i = int(paper.id.removeprefix("pubmedqa-")) - 1000
    assert paper.prompt.startswith(f"Background {i}.\nResults {i}.\nDoes it {i}?\nOptions:\n- yes")
    assert paper.answer == ["yes", "no", "maybe"][i % 3]
    assert ("cais/mmlu", "college_medicine", "test") in hub and ("openlifescienceai/medmcqa", None, "validation") in hub


def test_legal(hub, tmp_path):
    found = splits("legal", tmp_path)
    assert [len(part) for part in found.values()] == [50, 15, 80]
    answers = {e.prompt.split("\n")[1]: e.answer for e in found["test"]}
    assert [answers[f"Clause test {i}."] for i in range(3)] == ["contradiction", "entailment", "neutral"]
    assert ("kiddothe2b/contract-nli", "contractnli_a/train/0000.parquet", "refs/convert/parquet") in hub


def test_psychology_keeps_the_answers_to_a_question_in_one_split(hub, tmp_path):
    found = splits("psychology", tmp_path)
    assert [len(part) for part in found.values()] == [75, 15, 15]
    questions = [{e.prompt for e in part} for part in found.values()]
    assert not questions[0] & questions[1] and not questions[0] & questions[2] and not questions[1] & questions[2]
    example = found["train"][0]
    assert example.prompt.startswith("Title ") and example.choices is None and example.response.startswith("Try this ")


def test_a_recipe_runs_end_to_end_on_local_data(hub, tmp_path, monkeypatch):
    """All but the model and the training: mapped data, duplicates, sizes, selections."""
    monkeypatch.setattr(grid, "prepare", lambda sources, *a, **k: prepare([*map(small, sources)], *a, **k))
    own = tmp_path / "own.yaml"
    own.write_text("model: {model: embedded}\nbudgets: 20\ndomain_sizes: 30\nseeds: 1\nmethods: [dsir, length]\n"
                   "select_only: true\ndata: {max_length: 64}\n")  # fmt: skip
    spec, content = recipe("qwen3-0.6b", "finance", own)
    found = run_study(spec, content, tmp_path / "run", progress=False)
    assert {run.task.arm.label: run.status for run in found.runs} == dict.fromkeys(("random", "dsir", "length"), "done")
    report = json.loads((tmp_path / "run" / "data.json").read_text())
    assert report["pool"]["mapped"][0]["records"] == 40 and report["finance train"]["mapped"][0]["records"] == 50
