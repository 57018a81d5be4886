"""`explain`: parts add up to the scores of the run, neighbours are the nearest, and what has changed is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

import ntkjax
import ntkjax.commands.explain.reopen as reopen
from ntkjax.cli import main
from ntkjax.commands.explain.neighbours import Index, link, top
from ntkjax.commands.explain.parts import choose_shown
from ntkjax.commands.explain.tokens import token_texts
from ntkjax.errors import ConfigError
from ntkjax.models import load_lm
from ntkjax.selection import Selection

QUICK = ["--lora-rank", "2", "--token-budget", "1024", "--warmup.batch-size", "4", "--warmup.max-buckets", "1"]
SHOWN = ["--k", "3", "--chosen", "5", "--nearly", "4", "--rejected", "6"]


def select(files, out, *flags) -> Path:
    argv = ["select", *files.flags("model", "domain", "pool"), "--n", "5", "--out", str(out), *QUICK, *flags]
    assert main(argv) == 0
    return Path(out)


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def run(files, tmp_path_factory) -> Path:
    """A selection by the loss after a warm-up that moves the parameters."""
    flags = ["--kernel", "loss", "--stage1", "off", "--warmup.learning-rate", "1e-2", "--sketch-size", "256"]
    return select(files, tmp_path_factory.mktemp("explain") / "run", *flags)


@pytest.fixture(scope="module")
def explained(run) -> Path:
    assert main(["explain", str(run), *SHOWN]) == 0
    return run / "explain"


def check_sums(run: Path, records: list[dict], tolerance: float = 1e-5) -> None:
    """Tokens, layers and modules of every record add up to its score in scores.parquet."""
    scores = pq.read_table(run / "scores.parquet")["score"].to_pylist()
    for record in records:
        parts = np.array(record["parts"])
        size = np.abs(parts).sum()
        assert len(parts) == len(record["tokens"]) == len(record["learned"])
        assert not parts[~np.array(record["learned"])].any() and parts.any()
        for values in (parts, *([part["part"] for part in record[by]] for by in ("by_layer", "by_module"))):
            assert abs(np.sum(values) - scores[record["row"]]) < tolerance * size


def test_parts_add_up_to_the_scores_of_the_run(run, explained, files):
    records = lines(explained / "explained.jsonl")
    check_sums(run, records)
    assert [record["group"] for record in records] == ["chosen"] * 5 + ["nearly"] * 4 + ["rejected"] * 6
    ranks = [record["rank"] for record in records]
    assert ranks[:9] == list(range(1, 10)) and ranks[9:] == sorted(ranks[9:]) and ranks[9] > 9
    assert {part["name"] for part in records[0]["by_module"]} == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    }
    assert [part["name"] for part in records[0]["by_layer"]] == ["0", "1"]
    pool = lines(Path(files.pool))
    for record in records:
        text = "".join(record["tokens"])
        assert pool[record["row"]]["prompt"] in text and pool[record["row"]]["response"] in text
        learned = "".join(token for token, mark in zip(record["tokens"], record["learned"]) if mark)
        assert learned.startswith(pool[record["row"]]["response"])


def test_table_and_lines_hold_the_same(explained):
    assert pq.read_table(explained / "explained.parquet").to_pylist() == lines(explained / "explained.jsonl")


def test_the_page_and_the_domain(explained, files, capsys):
    text = (explained / "explain.html").read_text()
    assert 'id="overview"' in text and 'id="block-0"' in text
    domain = lines(explained / "domain.jsonl")
    shown = {record["id"]: record for record in lines(explained / "explained.jsonl")}
    assert [item["id"] for item in domain] == [f"ball-{i}" for i in range(12)]
    for item in domain:
        cosines = [near["cosine"] for near in item["pulled"]]
        assert len(cosines) == 3 and cosines == sorted(cosines, reverse=True)
        for near in item["pulled"]:  # the other way round it is the same number, where it is among the nearest
            back = {entry["id"]: entry["cosine"] for entry in shown[near["id"]]["near"]}
            assert near["shown"] and near["chosen"] == (shown[near["id"]]["group"] == "chosen")
            assert abs(back.get(item["id"], near["cosine"]) - near["cosine"]) < 1e-5


def test_a_second_time_the_parts_are_read_back(run, explained, monkeypatch, capsys):
    before = (explained / "explained.jsonl").read_bytes()
    from ntkjax.commands.explain import parts

    monkeypatch.setattr(parts, "scores_by_position", lambda *a, **k: pytest.fail("computed again"))
    assert main(["explain", str(run), *SHOWN]) == 0
    said = capsys.readouterr()
    assert "chosen: 5 of 5 shown" in said.out and "rejected: 6 of 31 shown" in said.out
    assert "parts of tokens add up to the scores within" in said.out and "what is finished is read back" in said.err
    assert (explained / "explained.jsonl").read_bytes() == before
    assert main(["explain", str(run), "--k", "2"]) == 2
    assert "k: was 3, is now 2" in capsys.readouterr().err


def test_other_inputs_are_refused(run, files, tmp_path, capsys):
    moved = tmp_path / "moved"
    shutil.copytree(run, moved, ignore=shutil.ignore_patterns("explain"))
    path, text = Path(files.pool), Path(files.pool).read_text()
    try:
        path.write_text(text.replace("Colour", "Colors", 1))
        assert main(["explain", str(moved), *SHOWN]) == 2
    finally:
        path.write_text(text)
    said = capsys.readouterr().err
    assert f"pool: {path} was " in said and "Put them back" in said
    assert not (moved / "explain").exists()


def test_a_damaged_table_is_named_and_made_again(files, tmp_path, capsys):
    flags = ["--method", "length", "--skip-warmup"]
    out = select(files, tmp_path / "run", *flags)
    whole = pq.read_table(out / "scores.parquet")
    (out / "scores.parquet").write_bytes(b"x")
    assert main(["explain", str(out)]) == 2
    said = capsys.readouterr().err
    assert f"{out}/scores.parquet: not readable as Parquet" in said and f"remove {out}/selection.json" in said
    (out / "selection.json").unlink()
    select(files, out, *flags)
    assert pq.read_table(out / "scores.parquet").equals(whole)
    assert main(["explain", str(out / "selected.jsonl")]) == 2
    assert "is a file; expected a run directory" in capsys.readouterr().err


@pytest.mark.slow
def test_another_adapter_is_found_by_the_scores(run, tmp_path, capsys):
    from safetensors.numpy import load_file, save_file

    moved = tmp_path / "moved"
    shutil.copytree(run, moved, ignore=shutil.ignore_patterns("explain"))
    file = moved / "adapter" / "adapter_model.safetensors"
    save_file({name: 1.5 * tensor for name, tensor in load_file(file).items()}, file)
    assert main(["explain", str(moved), *SHOWN]) == 2
    assert "when it is computed again" in capsys.readouterr().err


CASES = {
    "clusters": ["--aggregation", "clusters", "--domain-clusters", "2", "--direction", "contrast", "--kernel", "loss"],
    "cosine": ["--direction", "cosine"],
    "spectral": ["--kernel", "spectral:2"],
    "adam": ["--method", "influence", "--curvature", "adam"],
    "kfac": ["--kernel", "loss", "--precondition", "kfac", "--direction", "contrast"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_every_direction_is_found_again(name, files, tmp_path):
    run = select(files, tmp_path / "run", "--stage1", "off", "--skip-warmup", "--sketch-size", "64", *CASES[name])
    assert main(["explain", str(run), "--k", "0", *SHOWN[2:]]) == 0
    check_sums(run, lines(run / "explain" / "explained.jsonl"), 1e-4)


# -- from the store --


@pytest.fixture(scope="module")
def indexed(files, tmp_path_factory) -> Path:
    flags = ["--kernel", "loss", "--scores", "sketch", "--aggregation", "max", "--stage1", "off", "--skip-warmup"]
    return select(files, tmp_path_factory.mktemp("indexed") / "run", *flags, "--sketch-size", "256")


@pytest.mark.parametrize("features", ["gradients", "embeddings"])
def test_a_question_from_the_pool_finds_itself(features, indexed, files, tmp_path, monkeypatch, capsys):
    if features == "embeddings":
        indexed = select(files, tmp_path / "run", "--method", "embedding", "--skip-warmup")
    pool = lines(Path(files.pool))
    queries = tmp_path / "queries.jsonl"
    queries.write_text("".join(json.dumps({**pool[row], "id": f"asked-{row}"}) + "\n" for row in (31, 4)))
    monkeypatch.setattr(reopen, "read_pool", lambda *a: pytest.fail("the pool was looked at"))
    argv = ["explain", "--index", str(indexed), "--queries", str(queries), "--k", "4", "--out", str(tmp_path / "out")]
    assert main(argv) == 0
    said = {"gradients": "gradients of the kernel loss, sketched to 256", "embeddings": "mean final hidden states)"}
    assert f"{said[features]}, 40 pool examples" in capsys.readouterr().out
    answers = lines(tmp_path / "out" / "answers.jsonl")
    assert [item["id"] for item in answers] == ["asked-31", "asked-4"]
    table = pq.read_table(indexed / "scores.parquet").to_pylist()
    for item, row in zip(answers, (31, 4)):
        first = item["nearest"][0]
        assert first["id"] == f"cube-{row}" and abs(first["cosine"] - 1) < 1e-5 and len(item["nearest"]) == 4
        assert first["response"] == pool[row]["response"] and first["score"] == table[row]["score"]
        assert item["nearest"][1]["cosine"] < 1 - 1e-6


def test_scores_of_single_examples_have_no_parts_and_the_store_links_the_whole_pool(indexed, capsys):
    assert main(["explain", str(indexed), *SHOWN]) == 0
    said = capsys.readouterr().out
    assert "no parts by token: aggregation max compares examples one by one" in said
    assert "pool examples among all 40 pool examples with kept features" in said
    records = lines(indexed / "explain" / "explained.jsonl")
    assert all(record["parts"] is None and record["by_layer"] is None and record["near"] for record in records)


def test_what_cannot_be_explained_is_said(run, files, tmp_path, capsys):
    assert main(["explain", "--index", str(run), "--queries", files.domain]) == 2
    said = capsys.readouterr().err
    assert "holds no features of the pool" in said and "--method gradient-cosine" in said
    unfinished, other = tmp_path / "unfinished", tmp_path / "other"
    for folder, words in ((unfinished, "select"), (other, "evaluate")):
        folder.mkdir()
        (folder / "config.yaml").write_text(f"command: {words}\nconfig: {{}}\n")
    with pytest.raises(ConfigError, match="is not finished"):
        ntkjax.explain(run=str(unfinished))
    with pytest.raises(ConfigError, match="is a run of evaluate; expected one of select, adapt or study"):
        ntkjax.explain(run=str(other))
    for wrong in ({}, {"run": "a", "index": "b"}, {"index": "a"}, {"run": "a", "queries": "b"}, {"run": "a", "k": -1}):
        with pytest.raises(ConfigError, match=r"expected one of the two|go together|at least 0"):
            ntkjax.explain(**wrong)


# -- the pieces --


def test_the_nearest_are_those_of_a_sorted_table():
    rng = np.random.default_rng(0)
    pool, questions = rng.standard_normal((30, 5)).astype(np.float32), rng.standard_normal((4, 5)).astype(np.float32)
    questions[2] = 0
    unit = lambda x: x / np.linalg.norm(x, axis=1, keepdims=True).clip(1e-9)
    cosine = unit(questions) @ unit(pool).T
    rows, found = top(questions, lambda at: pool[at], 30, 3)
    for k in (0, 1, 3):
        np.testing.assert_array_equal(rows[k], np.argsort(-cosine[k])[:3])
        np.testing.assert_allclose(found[k], np.sort(cosine[k])[::-1][:3], rtol=1e-5)
    assert (rows[2] == -1).all() and np.isnan(found[2]).all()
    kept = np.arange(10, 30)  # features of these rows alone
    index = Index("features", kept, lambda at: pool[kept[at]], lambda of: questions)
    links = link(index, questions, np.array([5, 12, 29]), 2)
    assert (links.near[0] == -1).all() and links.among == 20
    alive = np.array([0, 1, 3])
    np.testing.assert_array_equal(links.near[1], alive[np.argsort(-cosine[alive, 12])[:2]])
    np.testing.assert_array_equal(links.pulled[0], kept[np.argsort(-cosine[0, 10:])[:2]])


def test_who_is_shown_is_drawn_and_counted():
    scores = np.where(np.arange(100) < 90, np.arange(100.0), np.nan)
    order = np.arange(89, -1, -1)
    ranks = np.zeros(100, np.int64)
    ranks[order] = np.arange(1, 91)
    shown = choose_shown(Selection("ntk", scores, ranks, order[:20]), (10, 7, 12), seed=0)
    assert shown.counts() == {"chosen": (10, 20), "nearly": (7, 7), "rejected": (12, 63)}
    chosen, nearly, rejected = (shown.rows[shown.groups == k] for k in range(3))
    assert set(chosen) <= set(order[:20]) and nearly.tolist() == order[20:27].tolist()
    assert set(rejected) <= set(order[27:]) and (np.diff(ranks[rejected]) > 0).all()
    again = choose_shown(Selection("ntk", scores, ranks, order[:20]), (10, 7, 12), seed=0)
    np.testing.assert_array_equal(shown.rows, again.rows)


class Spaced:
    """Drops the space that a text begins with, as tokenizers of the sentencepiece kind do."""

    pieces = (" a", " cat", "s", " é", "\n")

    def decode(self, ids, **options):
        return "".join(self.pieces[i] for i in ids).removeprefix(" ")


def test_texts_of_tokens_join_to_the_text():
    ids = np.array([0, 1, 2, 3, 4, 0, 0, 1, 2, 2, 2, 3])
    texts = token_texts(Spaced(), ids, {})
    assert texts == ["a", *[Spaced.pieces[i] for i in ids[1:]]]
    tokenizer = load_lm(Path(ntkjax.__file__).parent / "assets" / "tiny-lm").tokenizer
    for text in ("How many? 7 × 3 = 21 😀.", "plain words\n\n  indented", "日本語 ok"):
        ids = np.array(tokenizer(text, add_special_tokens=False)["input_ids"])
        assert "".join(token_texts(tokenizer, ids, {})) == tokenizer.decode(ids)
