"""Duplicates in `select` and `adapt`: removed before anything is scored, or only listed, as the user asks."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

import ntkjax
from ntkjax.cli import main
from ntkjax.pipeline.selection_io import read_selection

QUICK = ["--lora-rank", "2", "--token-budget", "1024"]
LONG = " ".join(f"w{i}" for i in range(60))


def lines(path: str) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


@pytest.fixture(scope="module")
def pool(files) -> str:
    """The pool of ``files`` and five examples more: a copy of a pool, a domain and a test example, a test prompt with
    another response, and a near copy of a long one that comes first."""
    of = {name: lines(getattr(files, name)) for name in ("pool", "domain", "test")}
    keep = lambda row: {"prompt": row["prompt"], "response": row["response"]}
    more = [
        {"id": "long", "prompt": "So the answer is red.", "response": LONG},
        {"id": "again", **keep(of["pool"][3])},
        {"id": "known", **keep(of["domain"][2])},
        {"id": "leaked", **keep(of["test"][4])},
        {"id": "asked", "prompt": of["test"][5]["prompt"], "response": "Think of it. So the answer is red."},
        {"id": "nearly", "prompt": "So the answer is red.", "response": LONG.replace("w50", "x")},
    ]
    path = files.root / "pool-with-duplicates.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*of["pool"], *more]))
    return str(path)


def select(files, pool, out, *flags, test: bool = True) -> int:
    given = [*files.flags("model", "domain"), "--pool", pool, *(files.flags("test") if test else [])]
    method = ["--method", "length", "--skip-warmup"]
    return main(["select", *given, "--n", "5", "--out", str(out), *QUICK, *method, *flags])


def ids(out: Path) -> list[str]:
    return pq.read_table(out / "scores.parquet")["id"].to_pylist()


def test_duplicates_are_removed_before_anything_is_scored(files, pool, tmp_path, capsys):
    out = tmp_path / "run"
    assert select(files, pool, out) == 0
    printed = capsys.readouterr().out
    assert "5 of 46 removed from the pool" in printed and "pool in test: 1 exact, 1 prompt" in printed
    assert ids(out) == [f"cube-{i}" for i in range(40)] + ["long"]
    found = json.loads((out / "duplicates.json").read_text())
    assert (found["mode"], found["removed"], found["repeated"], found["examples"]["pool"]) == ("remove", 5, 5, 46)
    listed = {p["id"]: (p["of"], p["of_id"], p["kind"]) for p in found["pairs"] if p["set"] == "pool"}
    assert listed == {
        "again": ("pool", "cube-3", "exact"),
        "known": ("domain", "ball-2", "exact"),
        "leaked": ("test", "disc-4", "exact"),
        "asked": ("test", "disc-5", "prompt"),
        "nearly": ("pool", "long", "near"),
    }
    near = next(p for p in found["pairs"] if p["id"] == "nearly")
    assert near["similarity"] == pytest.approx((65 - 9) / (65 + 1), abs=1e-4)  # 60 words and "so the answer is red"
    chosen = {row["id"] for row in lines(str(out / "selected.jsonl"))}
    assert "long" in chosen and "nearly" not in chosen


def test_questions_on_one_document_stay_and_are_counted(files, tmp_path, capsys):
    document = " ".join(f"w{i}" for i in range(200))
    questions = ["Who wrote the letter", "Where do ships arrive", "What burned down", "When does the fair begin"]
    rows = [{"prompt": f"{document}\n{q}?", "response": "So the answer is red."} for q in questions]
    path = tmp_path / "pool.jsonl"
    path.write_text(
        "".join(json.dumps(row) + "\n" for row in [*rows, {**rows[0], "prompt": rows[0]["prompt"].upper()}])
    )
    assert select(files, str(path), tmp_path / "run", "--n", "4") == 0
    printed = capsys.readouterr().out
    assert "1 of 5 removed from the pool (pool in pool: 1 re-spaced)" in printed
    assert "alike and no duplicates, kept: pool in pool: 3 other question" in printed
    found = json.loads((tmp_path / "run" / "duplicates.json").read_text())
    assert found["counts"] == {"pool in pool": {"re-spaced": 1}}
    assert found["apart"] == {"pool in pool": {"other question": 3}}


def test_without_test_files_only_the_pool_and_the_domain_are_compared(files, pool, tmp_path):
    assert select(files, pool, tmp_path / "run", test=False) == 0
    assert ids(tmp_path / "run")[40:] == ["long", "leaked", "asked"]


def test_report_and_off_leave_the_pool_as_it_is(files, pool, tmp_path, capsys):
    assert select(files, pool, tmp_path / "report", "--dedup.mode", "report") == 0
    assert "5 of 46 found in the pool and kept" in capsys.readouterr().out
    found = json.loads((tmp_path / "report" / "duplicates.json").read_text())
    assert (found["mode"], found["removed"], found["repeated"]) == ("report", 0, 5)
    assert select(files, pool, tmp_path / "off", "--dedup.mode", "off") == 0
    assert "not looked for" in capsys.readouterr().out
    assert not (tmp_path / "off" / "duplicates.json").exists()
    assert len(ids(tmp_path / "report")) == len(ids(tmp_path / "off")) == 46
    assert {"nearly", "long"} < {row["id"] for row in lines(str(tmp_path / "off" / "selected.jsonl"))}


def test_options_reach_the_search(files, pool, tmp_path):
    assert select(files, pool, tmp_path / "run", "--dedup.threshold", "0.9") == 0
    assert "nearly" in ids(tmp_path / "run") and "again" not in ids(tmp_path / "run")


def test_what_is_left_must_be_enough_and_no_run_is_left_behind(files, pool, tmp_path, capsys):
    assert select(files, pool, tmp_path / "run", "--n", "42") == 2
    said = capsys.readouterr().err
    assert "n = 42" in said and "41 examples after 5 duplicates" in said and "--dedup.mode report" in said
    assert not (tmp_path / "run").exists()
    assert select(files, pool, tmp_path / "run", "--dedup.threshold", "0") == 2
    assert "threshold" in capsys.readouterr().err


def test_rows_on_disk_belong_to_what_was_left(files, pool, tmp_path, capsys):
    """A store made with the duplicates in is refused by the fingerprint of the pool, not read row by row."""
    out, method = tmp_path / "run", ["--method", "embedding"]
    assert select(files, pool, out, "--dedup.mode", "report", *method) == 0
    for name in ("config.yaml", "inputs.json", "selection.json"):  # so that only the stores can object
        (out / name).unlink()
    code = select(files, pool, out, *method)
    if code == 2:
        assert "manifest.pool: was" in capsys.readouterr().err
    else:  # the store's folder is named from the pool's fingerprint
        assert len(read_selection(out).scores) == 41
        assert len(list((out / "rows").glob("embeddings-*"))) == 2


def test_adapt_searches_test_and_dev_too(files, pool, tmp_path, capsys):
    dev = lines(files.dev)[0]
    leaked = {"id": "dev-copy", "prompt": dev["prompt"], "response": dev["response"]}
    path = tmp_path / "pool.jsonl"
    path.write_text(Path(pool).read_text() + json.dumps(leaked) + "\n")
    out = tmp_path / "run"
    given = [*files.flags("model", "domain", "test", "dev"), "--pool", str(path), "--n", "41", "--seeds", "1"]
    quick = [*QUICK, "--method", "random", "--arms", "base"]
    assert main(["adapt", *given, "--out", str(out), *quick]) == 0
    assert "6 of 47 removed from the pool" in capsys.readouterr().out
    results = json.loads((out / "results.json").read_text())
    assert results["duplicates"]["removed"] == 6 and "pairs" not in results["duplicates"]
    assert results["duplicates"]["counts"]["pool in dev"] == {"exact": 1}
    assert "dev-copy" in {p["id"] for p in json.loads((out / "duplicates.json").read_text())["pairs"]}
    assert main(["adapt", *given, "--out", str(tmp_path / "more"), *quick, "--n", "42"]) == 2
    assert "41 examples after 6 duplicates" in capsys.readouterr().err
    assert "removed from the pool" in (out / "report.html").read_text()


def test_leakage_in_the_domain_is_told_and_left_alone(files, tmp_path, capsys):
    domain = tmp_path / "domain.jsonl"
    domain.write_text(Path(files.domain).read_text() + json.dumps(lines(files.test)[0]) + "\n")
    given = ["--model", files.model, "--domain", str(domain), *files.flags("pool", "test")]
    out = tmp_path / "run"
    assert main(["select", *given, "--n", "3", "--out", str(out), *QUICK, "--method", "length", "--skip-warmup"]) == 0
    assert "these files are yours: domain in test: 1 exact" in capsys.readouterr().out
    assert json.loads((out / "data.json").read_text())["domain"]["tokens"]["examples"] == 13


def test_as_a_function(files, pool, tmp_path):
    found = ntkjax.select(
        model=files.model, domain=files.domain, pool=pool, test=files.test, n=3, out=tmp_path / "run", method="length",
        lora_rank=2, skip_warmup=True, dedup={"mode": "off"}, progress=False,
    )  # fmt: skip
    assert len(found.scores) == 46
