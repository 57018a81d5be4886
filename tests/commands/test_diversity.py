"""`select --diversity`: the pass after a method, from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from ntkjax.cli import main
from ntkjax.pipeline.selection_io import read_selection

QUICK = ["--lora-rank", "2", "--token-budget", "1024", "--skip-warmup", "--sketch-size", "256"]


def select(files, out, *flags) -> int:
    return main(["select", *files.flags("model", "domain", "pool"), "--n", "5", "--out", str(out), *QUICK, *flags])


@pytest.mark.parametrize("method", ["embedding", "length"])
def test_it_chooses_among_the_best_and_says_what_it_changed(method, files, tmp_path, capsys):
    plain, diverse = tmp_path / "plain", tmp_path / "diverse"
    assert select(files, plain, "--method", method) == 0
    assert select(files, diverse, "--method", method, "--diversity", "d-optimal", "--diversity-factor", "3") == 0
    assert "diversity_replaced" in capsys.readouterr().out
    one, two = read_selection(plain), read_selection(diverse)
    assert two.method == method and len(set(two.selected.tolist())) == 5
    np.testing.assert_array_equal(one.scores, two.scores)
    order = np.argsort(np.where(one.ranks > 0, one.ranks, 10**6), kind="stable")
    assert set(two.selected.tolist()) <= set(order[:15].tolist())
    assert two.diagnostics["diversity_candidates"] == 15
    assert two.diagnostics["diversity_of_the_choice"] >= two.diagnostics["diversity_without_the_pass"]
    table = pq.read_table(diverse / "scores.parquet").to_pydict()
    lines = [json.loads(line)["id"] for line in (diverse / "selected.jsonl").read_text().splitlines()]
    assert (
        lines
        == [table["id"][row] for row in two.selected]
        == sorted(
            (name for name, chosen in zip(table["id"], table["selected"]) if chosen),
            key=lambda name: table["rank"][table["id"].index(name)],
        )
    )


def test_facility_location_goes_on_from_finished_features(files, tmp_path, monkeypatch):
    import ntkjax.pipeline.select as selecting

    flags = ["--method", "embedding", "--diversity", "facility-location"]
    assert select(files, tmp_path / "whole", *flags) == 0
    with monkeypatch.context() as patch:
        patch.setattr(selecting, "write_selection", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
        assert select(files, tmp_path / "run", *flags) == 130
    assert list((tmp_path / "run" / "rows").glob("gradients-*"))
    assert select(files, tmp_path / "run", *flags) == 0
    same = lambda name: (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert same("selection.json") and same("selected.jsonl")


@pytest.mark.parametrize(
    "flags, word",
    [
        (["--diversity", "d-optimal", "--diversity-factor", "1"], "diversity_factor"),
        (["--diversity-kernel", "gaussian"], "gaussian"),
    ],
)
def test_what_cannot_be_done_is_said(flags, word, files, tmp_path, capsys):
    assert select(files, tmp_path / "run", *flags) == 2
    assert word in capsys.readouterr().err
    assert not Path(tmp_path / "run").exists()
