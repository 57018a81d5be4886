"""Experiments 01 to 03 on a checkpoint and files laid out as real data are, under the name `real`."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2] / "experiments"


@pytest.fixture
def script(load_file, tmp_path, monkeypatch):
    """``script(name)``: an experiment whose results go to a folder of the test's."""

    def load(name):
        module = load_file(ROOT / f"{name}.py")
        monkeypatch.setattr(module, "RESULTS", tmp_path / "results")
        return module

    return load


@pytest.fixture
def real(tmp_path, monkeypatch) -> Path:
    """The planted task as finance/ and pool/; the embedded model where the one named `real` is looked for."""
    from ntkjax.assets import tiny_lm_path, write_planted_task
    from ntkjax.models.real import DIRECTORY

    made = write_planted_task(tmp_path / "task", 7, pool_size=40, domain_size=12, dev_size=6, test_size=12)
    for name, target in {"pool": "pool/cot-01", "train": "finance/train"}.items():
        file = tmp_path / "data" / f"{target}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(Path(made[name]).read_bytes())
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / DIRECTORY).symlink_to(tiny_lm_path())
    monkeypatch.setenv("NTKJAX_MODELS", str(tmp_path / "models"))
    return tmp_path / "data"


@pytest.mark.slow
def test_stability_of_the_model_named_real(script, real, tmp_path):
    stability = script("01_kernel_stability")
    e = stability.Experiment(data=real, model="real", arms="lora", n=8, probe=4, epochs=2, at=(1,), seeds=1,
                             max_length=64, out=tmp_path / "runs")  # fmt: skip
    stability.main(e)
    kept = tmp_path / "results" / "real-finance-lora"
    assert "LoRA r=16, lr 0.0005" in (kept / "stability.csv").read_text() + (kept / "results.md").read_text()
    with pytest.raises(SystemExit, match="--data needs --model"):
        stability.files(dataclasses.replace(e, model=None))


@pytest.mark.slow
def test_cross_terms_of_a_sample_of_outputs(script, real):
    cross = script("02_cross_output_terms")
    task = cross.load(cross.Experiment(data=real, model="real", examples=4, lora_rank=2, max_length=64, domain_size=8))
    assert task.name == "real" and len(task.domain) == 8
    params = task.model.fresh_lora(0)
    every = cross.lora_terms(task, params, 4096)
    some = cross.lora_terms(task, params, 100)
    for name, whole in every.items():
        part = some[name]
        assert part.outputs == 100 and whole.outputs == whole.vocab == part.vocab
        for field in ("own", "cross", "own_between", "cross_between"):
            scale = np.abs(getattr(whole, field)).max()
            np.testing.assert_allclose(getattr(part, field), getattr(whole, field), atol=1e-9 * scale)
    # all outputs are compared: the sums are also those of the pairs
    products = list(cross.hidden_products(task.model.hidden_fn, params, cross.batches(task.examples), width=64))
    pairs = cross.cross_terms(products, np.asarray(task.model.head_fn({})))
    np.testing.assert_allclose(every["all outputs"].cross, pairs.cross, rtol=1e-6)
    np.testing.assert_allclose(every["all outputs"].cross_between, pairs.cross_between, rtol=1e-6)


@pytest.mark.slow
def test_the_ladder_of_the_model_named_real(script, real, tmp_path):
    ladder = script("03_approximation_ladder")
    ladder.main(ladder.Experiment(data=real, model="real", n=8, n_full=0, seeds=1, max_length=64, cross_outputs=32,
                                  out=tmp_path / "runs"))  # fmt: skip
    kept = tmp_path / "results" / "real"
    assert "centred_spectral:4" in (kept / "ladder.md").read_text() and (kept / "scores-against-centred.png").exists()


@pytest.mark.parametrize(
    ("name", "words", "told"),
    [
        ("01_kernel_stability", ["--model", "real"], "--model needs --data"),
        ("01_kernel_stability", ["--data", "."], "--data needs --model"),
        ("02_cross_output_terms", ["--model", "real"], "--model needs --data"),
        ("03_approximation_ladder", ["--model", "real"], "--model needs --data"),
        ("03_approximation_ladder", ["--data", ".", "--model", "nowhere"], "nowhere"),
        ("04_kernel_regression", ["--data", "."], "--data needs --model"),
        ("05_main_table", ["--model", "real"], "--model needs --data"),
        ("08_throughput", ["--model", "real"], "--model needs --data"),
    ],
)
def test_what_the_user_can_mend_is_told_in_a_line(name, words, told, load_file, tmp_path, monkeypatch, capsys):
    loaded = load_file(ROOT / f"{name}.py")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [name, *words])
    with pytest.raises(SystemExit) as ended:
        loaded.script.start(loaded.main, getattr(loaded, "Experiment", None) or loaded.Throughput)
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.startswith(f"{name}: error: ") and told in said, said
