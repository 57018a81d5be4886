"""DSIR against counting by hand, the authors' package, and a planted domain."""

import hashlib
import json
import math
from pathlib import Path

import numpy as np
import pytest

from ntkjax.errors import ConfigError
from ntkjax.selection import METHODS
from ntkjax.selection.methods.dsir import log_weights
from ntkjax.selection.ngrams import bucket_list, bucket_of

DOMAIN = ["The court found the contract void.", "The contract: void? The court's view."]
POOL = ["The cat sat.", "The court, the contract!", "Void contract; void court.", "a b c d"]


def by_hand(domain, pool, buckets):
    """Every sum of the definition written out, words split by hand."""
    split = lambda text: "".join(f" {c} " if not (c.isalnum() or c == "_" or c.isspace()) else c for c in text.lower())
    place = lambda gram: int(hashlib.sha256(gram.encode("utf-8")).hexdigest(), 16) % buckets

    def grams(text):
        words = split(text).split()
        return [place(w) for w in words] + [place(" ".join(words[i : i + 2])) for i in range(len(words) - 1)]

    count = lambda texts: [sum(grams(t).count(b) for t in texts) for b in range(buckets)]
    p, q = count(domain), count(pool)
    weight = lambda b: math.log(p[b] / sum(p) + 1e-8) - math.log(q[b] / sum(q) + 1e-8)
    return [sum(weight(b) for b in grams(text)) for text in pool]


@pytest.mark.parametrize("buckets", [1, 7, 97])
def test_log_weights_are_those_of_the_definition(buckets):
    found = log_weights(DOMAIN, POOL, buckets)
    np.testing.assert_allclose(found, by_hand(DOMAIN, POOL, buckets), rtol=1e-12, atol=1e-12)
    assert buckets > 1 or np.abs(found).max() == 0  # one bucket tells nothing apart


def test_words_are_runs_of_letters_or_of_punctuation():
    place = lambda gram: bucket_of(gram, 10_000)
    assert bucket_list("Don't STOP...", 10_000).tolist() == [
        place(g) for g in ("don", "'", "t", "stop", "...", "don '", "' t", "t stop", "stop ...")
    ]
    assert bucket_list(" \n", 10_000).tolist() == []


def test_buckets_are_the_same_everywhere():
    # SHA-256 of "abc" is in its standard: ba7816bf ... f20015ad; the last decimal digits are its bucket.
    standard = 0xBA7816BF8F01CFEA414140DE5DAE2223B00361A396177A9CB410FF61F20015AD
    assert bucket_of("abc", 10_000) == standard % 10_000


def test_the_authors_package_gives_the_same_log_weights(tmp_path):
    """`pip install data-selection` (1.0.3). The package drops texts below 100 words unless told otherwise and fits q on
    its first 10^9 n-grams, more than there are here: every log weight must agree to rounding."""
    package = pytest.importorskip("data_selection")
    rng = np.random.default_rng(0)
    words = ["court", "contract", "cat's", "sat;", "void", "(see", "3.5%)", "Naïve", "the", "a_b", "--", "end."]
    draw = lambda count: [" ".join(rng.choice(words, rng.integers(1, 30))) for _ in range(count)]
    domain, pool = draw(20), draw(50)
    for name, texts in (("domain", domain), ("pool", pool)):
        (tmp_path / name).write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    theirs = package.HashedNgramDSIR(
        [str(tmp_path / "pool")], [str(tmp_path / "domain")], cache_dir=str(tmp_path / "cache"), num_proc=1,
        min_example_length=0,
    )  # fmt: skip
    theirs.fit_importance_estimator(num_tokens_to_fit="all")
    theirs.compute_importance_weights()
    expected = np.concatenate([np.load(f) for f in sorted(Path(theirs.log_importance_weights_dir).glob("*.npy"))])
    np.testing.assert_allclose(log_weights(domain, pool, 10_000), expected, rtol=1e-10, atol=1e-10)


def planted_texts():
    """40 pool texts, every fourth in the domain's words."""
    rng = np.random.default_rng(1)
    legal, other = ("court", "contract", "void", "party", "clause"), ("cat", "rain", "bread", "tune", "hill")
    draw = lambda words: " ".join(rng.choice([*words, "the", "of", "and"], 12))
    return [draw(legal) for _ in range(8)], [draw(legal if i % 4 == 0 else other) for i in range(40)]


def test_it_finds_the_texts_in_the_domains_words(planted):
    domain, pool = planted_texts()
    problem = planted(np.ones((8, 2)), np.ones((40, 2)), 10, domain_texts=domain, pool_texts=pool)
    chosen = METHODS["dsir"]()(problem)
    assert set(chosen.selected.tolist()) == set(range(0, 40, 4))
    assert (METHODS["random"]()(problem).selected % 4 != 0).any()
    assert chosen.diagnostics["buckets"] == 10_000


def test_the_noise_is_gumbel_and_its_absence_ranks_by_the_weight(planted):
    domain, pool = planted_texts()
    problem = lambda seed: planted(
        np.ones((8, 2)), np.ones((40, 2)), 10, domain_texts=domain, pool_texts=pool, seed=seed
    )
    weights = log_weights(domain, pool, 10_000)
    np.testing.assert_array_equal(METHODS["dsir"](gumbel=False)(problem(0)).scores, weights)
    noise = np.concatenate([METHODS["dsir"]()(problem(seed)).scores - weights for seed in range(25)])
    # mean 0.5772, standard deviation pi / sqrt 6: within 4 standard errors of 1,000 draws
    assert abs(noise.mean() - 0.5772) < 4 * 1.2825 / math.sqrt(1000)
    assert abs(noise.std() - 1.2825) < 0.15


def test_a_problem_it_cannot_solve_is_refused(planted):
    with pytest.raises(ConfigError, match="no texts"):
        METHODS["dsir"]()(planted(np.ones((2, 2)), np.ones((4, 2)), 1))
    with pytest.raises(ConfigError, match="not one word in the texts of the domain"):
        METHODS["dsir"]()(planted(np.ones((1, 2)), np.ones((1, 2)), 1, domain_texts=[" "], pool_texts=["a"]))
    with pytest.raises(ConfigError, match="buckets"):
        METHODS["dsir"](buckets=0)
