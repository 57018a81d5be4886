"""Two runs compared: pairing refused where it must be, numbers equal to the parts."""

import numpy as np
import pytest

from ntkjax.errors import UserError
from ntkjax.evaluation import Outcome, compare, compare_seeds, mcnemar, paired_bootstrap, paired_values


def run(correct, prefix="x", key="correct_raw"):
    value = lambda c: bool(c) if c is not None and key == "correct_raw" else c
    return [Outcome(f"{prefix}{i}", "s", **{key: value(c)}) for i, c in enumerate(correct)]


def test_compare_is_its_parts():
    rng = np.random.default_rng(0)
    a, b = rng.random(80) < 0.5, rng.random(80) < 0.7
    got = compare(run(a.tolist()), run(b.tolist()), "correct_raw", resamples=1000, seed=3)
    assert (got["n"], got["first"], got["second"]) == (80, a.mean(), b.mean())
    assert got["difference"] == paired_bootstrap(a, b, resamples=1000, seed=3).as_dict()
    assert got["difference"]["method"] == "bca" and got["percentile"]["method"] == "percentile"
    assert got["mcnemar"] == mcnemar(a, b).as_dict()


def test_likelihoods_have_no_mcnemar():
    got = compare(run([0.5, 1.5, 2.0], key="nll"), run([0.4, 1.6, 1.0], key="nll"), "nll", resamples=200)
    assert got["mcnemar"] is None
    assert got["difference"]["estimate"] == pytest.approx(-1 / 3)


def test_outcomes_as_dicts():
    a = [{"id": "p", "correct_raw": True}, {"id": "q", "correct_raw": False}]
    assert paired_values(a, a, "correct_raw")[0].tolist() == [1.0, 0.0]


def test_the_first_id_that_differs_is_named():
    with pytest.raises(UserError, match=r"example 1 is 'x1' in the first and 'y1' in the second"):
        compare(run([1, 0]), [run([1])[0], *run([1, 0], "y")[1:]], "correct_raw")
    with pytest.raises(UserError, match=r"3 examples against 2; 'x2' at position 2 is missing from the second"):
        compare(run([1, 0, 1]), run([1, 0]), "correct_raw")
    with pytest.raises(UserError, match=r"'x2' at position 2 is missing from the first"):
        compare(run([1, 0]), run([1, 0, 1]), "correct_raw")


def test_missing_values():
    a, b = paired_values(run([True, None, False]), run([True, None, True]), "correct_raw")
    assert (a.tolist(), b.tolist()) == ([1, 0], [1, 1])
    with pytest.raises(UserError, match=r"'x1': only the first run has a value of 'correct_raw'"):
        paired_values(run([True, True]), run([True, None]), "correct_raw")
    with pytest.raises(UserError, match="no example has a value"):
        paired_values(run([None]), run([None]), "correct_raw")


def test_several_seeds_against_one_baseline():
    rng = np.random.default_rng(1)
    base = rng.random(60) < 0.4
    runs = [(rng.random(60) < 0.8) for _ in range(3)]
    got = compare_seeds([run(base.tolist())], [run(r.tolist()) for r in runs], "correct_raw", resamples=500)
    assert got["seeds"] == 3 and got["n"] == 60
    assert got["first"] == [base.mean()] * 3
    assert got["per_seed"] == pytest.approx([r.mean() - base.mean() for r in runs])
    assert got["difference"]["estimate"] == pytest.approx(np.mean(got["per_seed"]))
    assert got["examples_only"]["low"] <= got["difference"]["estimate"] <= got["examples_only"]["high"]


def test_seeds_that_cannot_be_paired():
    with pytest.raises(UserError, match="2 against 3"):
        compare_seeds([run([1])] * 2, [run([1])] * 3)
    with pytest.raises(UserError, match="0 against 0"):
        compare_seeds([], [])
    with pytest.raises(UserError, match=r"'x0' in the first and 'y0'"):
        compare_seeds([run([1]), run([1], "y")], [run([1]), run([1], "y")], "correct_raw")
