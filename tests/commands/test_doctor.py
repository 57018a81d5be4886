"""``ntkjax doctor``: float32 agrees, 16 bits within their bar, and a model that mixes the rows of a batch is found."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ntkjax
from ntkjax.assets import tiny_lm_path
from ntkjax.cli import main
from ntkjax.commands import doctor
from ntkjax.errors import ConfigError, UserError
from ntkjax.models import functions, load_lm

TINY = str(tiny_lm_path())


@pytest.fixture
def few_texts(monkeypatch):
    """Two examples of one length: each length compiles programs of its own."""
    monkeypatch.setattr(doctor, "TEXTS", doctor.TEXTS[:2])


@pytest.fixture
def mixed_rows(monkeypatch):
    """A model whose pooled states hold a hundredth of the mean over the batch."""
    pool = functions.pool

    def mixing(values, mask):
        pooled = pool(values, mask)
        return pooled + jnp.asarray(0.01, pooled.dtype) * pooled.mean(axis=0, keepdims=True)

    jax.clear_caches()
    with monkeypatch.context() as patch:
        patch.setattr(functions, "pool", mixing)
        yield
    jax.clear_caches()


def test_one_layout_has_its_own_reference():
    assert list(doctor.settings(("default", "highest"), ("batched",))) == [
        ("default", "batched"),
        ("highest", "batched"),
    ]
    assert list(doctor.settings(("default", "highest"), doctor.LAYOUTS))[-1] == ("highest", "batched")
    assert list(doctor.settings(("default", "highest"), ("alone", "padded")))[-1] == ("highest", "alone")
    with pytest.raises(ConfigError, match="--layouts: found none; expected some of alone"):
        doctor.DoctorConfig(model="m", layouts=())


def row(precision: str = "default", layout: str = "batched", dtype: str = "float32", worst: float = 1e-6) -> dict:
    differences = dict.fromkeys(doctor.QUANTITIES, 1e-7) | {"logits": worst}
    bar = doctor.BARS[dtype]
    return {"dtype": dtype, "precision": precision, "layout": layout, "bar": bar, "agrees": worst <= bar,
            "differences": differences, "spearman": 1.0}  # fmt: skip


@pytest.mark.slow
def test_the_tiny_model_is_well(tmp_path, capsys):
    assert main(["doctor", "--model", TINY, "--out", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().out
    found = json.loads((tmp_path / "run" / "results.json").read_text())
    rows = {(r["dtype"], r["layout"]): r for r in found["rows"]}
    settings = {(dtype, layout) for dtype in ("float32", "bfloat16") for layout in doctor.LAYOUTS}
    assert set(rows) == settings - {("float32", "alone")}  # which is the reference
    for r in found["rows"]:
        assert r["agrees"] and set(r["differences"]) == set(doctor.QUANTITIES)
        # The weights are rounded to 8 bits: had they not been, the check would be of nothing.
        assert (max(r["differences"].values()) > 1e-4) == (r["dtype"] == "bfloat16")
    assert "7 of 7 rows agree" in said and "| bfloat16" in said
    assert (tmp_path / "run" / "results.md").read_text() in said


def test_the_texts_have_two_lengths_and_make_two_shapes():
    data, _ = doctor.examples(doctor.DoctorConfig(model=TINY), load_lm(TINY))
    first, second, third, fourth = data.lengths.tolist()
    assert first == second < third == fourth
    shapes = {layout: {b.tokens.shape for b in doctor.batches_of(data, layout, 512)} for layout in doctor.LAYOUTS}
    assert shapes == {key: {(4, third)} for key in doctor.LAYOUTS} | {"alone": {(4, first), (4, third)}}
    assert [b.index.tolist() for b in doctor.batches_of(data, "padded", 512)][1] == [1, -1, -1, -1]
    alike = data.subset(np.array([2, 3]))
    assert [b.tokens.shape for b in doctor.batches_of(alike, "padded", 512)] == [(2, 2 * third)] * 2
    forward, backward = (doctor.batches_of(data, layout, 512)[0] for layout in ("batched", "reordered"))
    np.testing.assert_array_equal(forward.tokens, backward.tokens[::-1])


@pytest.mark.slow
def test_a_model_that_mixes_rows_is_found(few_texts, mixed_rows):
    with pytest.raises(UserError, match=r"float32, precision default, batched .*--token-budget 1") as caught:
        ntkjax.doctor(model=TINY, dtypes="float32", progress=False)
    # Alone and padded every row is a batch by itself; the table comes with the message.
    assert "alone (" not in str(caught.value) and "padded (" not in str(caught.value)
    assert "| float32" in str(caught.value)


def test_differences_are_relative_to_the_largest_value():
    reference = {name: np.array([1.0, -4.0, 2.0]) for name in doctor.QUANTITIES}
    found = reference | {"logits": np.array([1.0, -4.0, 2.2]), "scores": np.array([1.0, -4.0, 0.9])}
    result = doctor.compared(found, reference, "bfloat16")
    assert result["differences"]["logits"] == pytest.approx(0.05)
    assert result["differences"]["scores"] == pytest.approx(0.275)
    assert result["differences"]["gradient"] == 0
    assert result["spearman"] == pytest.approx(0.5)
    assert not result["agrees"]


def test_the_remedy_follows_from_the_other_rows():
    rounded, full = row(worst=1e-3), row("highest")
    assert "JAX_DEFAULT_MATMUL_PRECISION=highest" in doctor.remedy(rounded, [rounded, full])
    wrong = row("highest", worst=1e-3)
    assert "--token-budget 1" in doctor.remedy(rounded, [rounded, wrong])
    assert "--token-budget 1" in doctor.remedy(wrong, [rounded, wrong])
    half = row(dtype="bfloat16", worst=0.5)
    assert doctor.remedy(half, [half, full]).endswith("use --dtype float32.")
    assert doctor.asked_in_full(rounded) and doctor.asked_in_full(full)
    assert not doctor.asked_in_full(half) and not doctor.asked_in_full(row("tensorfloat32"))


def test_the_table_has_a_row_for_each_setting_and_the_digits():
    result = doctor.Diagnosis("a device", [row(), row("highest", worst=0.0)], [])
    first, second = doctor.table(result)
    assert (first["logits"], first["scores"], first["largest difference"]) == ("6.0", "7.0", "1.0e-06")
    assert second["logits"] == "all"
    said = doctor.describe(doctor.DoctorConfig(model="m"), result)
    assert said.count("| float32") == 2 and "2 of 2 rows agree" in said


def test_options_that_cannot_be_are_refused():
    with pytest.raises(ConfigError, match="--dtypes: found none; expected some of float32, bfloat16, float16"):
        ntkjax.doctor(model=TINY, dtypes=())
    with pytest.raises(ConfigError, match="no_such"):
        ntkjax.doctor(model=TINY, kernel="no_such")
    with pytest.raises(ConfigError, match="--n is 1: expected at least 2"):
        ntkjax.doctor(model=TINY, n=1)
