"""Names that stand in stored files: options of every method (manifests, hashes of studies) and flags of ``select``."""

from __future__ import annotations

import dataclasses
import re
import typing

import pytest

from ntkjax.cli import main
from ntkjax.errors import ConfigError
from ntkjax.pipeline.options import SelectorOptions, check_used
from ntkjax.selection import METHODS
from ntkjax.selection.methods import all_option_classes, option_classes

NTK = {
    "kernel": "sum_logits",
    "direction": "raw",
    "scores": "forward",
    "sketch": "sparse",
    "sketch_size": 8192,
    "precondition": "none",
    "damping": 0.1,
    "cg_iterations": 100,
    "cg_tolerance": 0.001,
    "stage1": "on",
    "prefilter_factor": 4,
    "pool_sample": 512,
    "aggregation": "mean",
    "domain_clusters": 8,
}
DEFAULTS = {
    "ntk": NTK,
    "gradient-cosine": {"sketch": "sparse", "sketch_size": 8192, "stage1": "on", "prefilter_factor": 4},
    "influence": {
        "curvature": "kfac",
        "damping": 0.1,
        "cg_iterations": 100,
        "cg_tolerance": 0.001,
        "direction": "raw",
        "stage1": "on",
        "prefilter_factor": 4,
        "pool_sample": 512,
    },
    "less": {"sketch": "sparse", "sketch_size": 8192, "stage1": "on", "prefilter_factor": 4, "adam": "on"},
    "trak": {"sketch": "sparse", "sketch_size": 8192, "stage1": "on", "prefilter_factor": 4, "damping": 0.1},
    "g2is": {
        "sketch": "sparse",
        "sketch_size": 8192,
        "stage1": "on",
        "prefilter_factor": 4,
        "core_share": 0.5,
        "walk_core": 0.8,
        "adam": "on",
    },
    "embedding": {},
    "perplexity": {"perplexity": "middle"},
    "ifd": {},
    "loss-drop": {},
    "for-value": {},
    "random": {},
    "random-from-stage-1": {"prefilter_factor": 4},
    "length": {"order": "longest"},
    "length-matched": NTK,
    "dsir": {"buckets": 10000, "gumbel": True},
    "rds": {},
    "betr": {"classifier_sample": 20000, "classifier_share": 0.1},
    "tsds": {
        "transport_alpha": 0.5,
        "transport_scale": 5.0,
        "transport_sigma": 0.75,
        "transport_rows": "draw",
        "neighbours": 5000,
    },
    "euds": {
        "entropy_keep": "intersection",
        "entropy_low": 0.25,
        "entropy_high": 0.75,
        "semantic_samples": 0,
        "semantic_tokens": 64,
        "semantic_similarity": 0.5,
    },
    "quad": {
        "pool_clusters": 64,
        "probes": 8,
        "arms_per_round": 8,
        "probe_factor": 4,
        "exploration": 1.0,
        "damping": 0.1,
    },
    "gais": {
        "graph_features": "embeddings",
        "graph_edges": 0.05,
        "graph_nodes": 512,
        "graph_steps": 200,
        "sketch": "sparse",
        "sketch_size": 8192,
        "stage1": "on",
        "prefilter_factor": 4,
    },
    "parts": {
        "representation": "gradients",
        "algorithm": "round-robin",
        "similarity": "cosine",
        "kernel": "sum_logits",
        "trajectory": "end",
        "precondition": "none",
        "damping": 0.1,
        "sketch": "sparse",
        "sketch_size": 8192,
        "stage1": "on",
        "prefilter_factor": 4,
        "buckets": 10000,
        "sentence_model": "sentence-transformers/all-MiniLM-L6-v2",
        "domain_clusters": 8,
        "domain_groups": "k-means",
        "nearest": 0,
        "transport_alpha": 0.5,
        "transport_scale": 5.0,
        "transport_sigma": 0.75,
        "transport_rows": "draw",
        "neighbours": 5000,
        "uot_epsilon": 0.01,
        "uot_domain": None,
        "uot_pool": 0.0001,
        "uot_iterations": 1000,
    },
}
OF_EVERY_METHOD = {
    "method": "ntk",
    "diversity": "none",
    "diversity_factor": 2,
    "diversity_kernel": "loss",
    "sketch": "sparse",
    "sketch_size": 8192,
}

FLAGS = """
adam adapter aggregation algorithm arms-per-round buckets cg-iterations cg-tolerance classifier-sample
classifier-share core-share curvature
damping dedup.mode dedup.shingle dedup.threshold direction diversity diversity-factor diversity-kernel domain
domain-clusters domain-groups dry-run dtype entropy-high entropy-keep entropy-low exploration graph-edges
graph-features graph-nodes graph-steps gumbel kernel lora-alpha lora-rank lora-targets loss-turns max-length mesh
method model n nearest neighbours on-bad-record order out packing parameters perplexity pool pool-clusters
pool-sample precondition prefilter-factor probe-factor probes remat representation scores seed selected-format
semantic-samples semantic-similarity semantic-tokens sentence-model similarity sketch sketch-size skip-warmup stage1
test token-budget tracker trajectory transport-alpha transport-rows transport-scale transport-sigma uot-domain
uot-epsilon uot-iterations uot-pool walk-core warmup.accumulation warmup.b1 warmup.b2 warmup.batch-size warmup.buckets
warmup.clip-norm
warmup.domain-share warmup.epochs warmup.eps warmup.eval-every warmup.keep-checkpoints warmup.learning-rate
warmup.lift-interval warmup.lift-rank warmup.loss-reweighting warmup.max-buckets warmup.micro-batch-tokens
warmup.patience warmup.restore-best warmup.reweighting-temperature warmup.save-every warmup.schedule warmup.steps
warmup.tracker warmup.warmup-ratio warmup.weight-decay weights
""".split()  # noqa: SIM905


def shown(capsys, *args: str) -> str:
    """What ``ntkjax ARGS`` prints before it ends."""
    with pytest.raises(SystemExit) as end:
        main(list(args))
    assert end.value.code == 0
    return capsys.readouterr().out


def flags_in(text: str) -> list[str]:
    """The flags that a help text lists, without dashes, in its order."""
    return re.findall(r"^\W{1,3}--([a-z][a-z0-9.-]*)", text, re.MULTILINE)


@pytest.mark.parametrize("method", DEFAULTS)
def test_the_default_options_of_a_method_are_these(method):
    assert dataclasses.asdict(METHODS[method]()) == DEFAULTS[method]


def test_the_table_of_methods_is_this():
    assert list(METHODS) == list(DEFAULTS)


def test_the_options_of_the_command_line_are_those_of_all_methods():
    every = {name: value for options in DEFAULTS.values() for name, value in options.items()}
    assert dataclasses.asdict(SelectorOptions()) == every | OF_EVERY_METHOD


def test_the_flags_of_select_are_these(capsys):
    listed = flags_in(shown(capsys, "select", "--help"))
    assert sorted(listed) == FLAGS


# -- what holds for the options of every method --


def checked(cls, **values):
    """``cls`` with these values, refused by its own checks alone (the tests' type checks refuse some before)."""
    made = object.__new__(cls)
    for field in dataclasses.fields(cls):
        object.__setattr__(made, field.name, values.get(field.name, field.default))
    made.__post_init__()
    return made


@pytest.mark.parametrize("method", DEFAULTS)
def test_a_value_that_is_none_of_the_choices_is_refused(method):
    choices = {
        n: typing.get_args(t)
        for n, t in typing.get_type_hints(METHODS[method]).items()
        if n in DEFAULTS[method] and typing.get_origin(t) is typing.Literal
    }
    for name, expected in choices.items():
        if expected:
            with pytest.raises(ConfigError, match=f"{name} is 'big'; expected one of {', '.join(expected)}"):
                checked(METHODS[method], **{name: "big"})


def test_every_option_is_declared_once():
    owners: dict[str, set[type]] = {}
    for cls in SelectorOptions.__mro__:
        for name in vars(cls).get("__annotations__", {}):
            owners.setdefault(name, set()).add(cls)
    assert {name for name, classes in owners.items() if len(classes) > 1} == set()
    assert owners.keys() == dataclasses.asdict(SelectorOptions()).keys()


@pytest.mark.parametrize("method", DEFAULTS)
def test_the_options_of_a_method_are_its_dataclasses_and_no_selector(method):
    classes = option_classes(METHODS[method])
    names = {field.name for cls in classes for field in dataclasses.fields(cls)}
    assert names == DEFAULTS[method].keys()
    assert all(any(issubclass(leaf, cls) for leaf in all_option_classes()) for cls in classes)


def test_options_of_the_chosen_method_are_checked_when_they_are_made():
    with pytest.raises(ConfigError, match="probes must be at least 1"):
        SelectorOptions(method="quad", probes=0)
    with pytest.raises(ConfigError, match="direction cosine"):
        SelectorOptions(method="influence", direction="cosine")
    assert SelectorOptions(method="ntk", direction="cosine").direction == "cosine"
    with pytest.raises(ConfigError, match="diversity_factor"):
        SelectorOptions(method="random", diversity_factor=1)


def test_an_option_that_the_method_does_not_have_is_told():
    with pytest.raises(
        ConfigError, match=r"--walk-core is 0\.5, and --method less has no such option.*--method g2is\."
    ):
        check_used(SelectorOptions(method="less", walk_core=0.5))
    with pytest.raises(ConfigError, match=r"expected it with --method ntk, influence, length-matched\."):
        check_used(SelectorOptions(method="random", direction="contrast"))
    check_used(SelectorOptions(method="less", adam="off", diversity="d-optimal", sketch_size=64))
    check_used(SelectorOptions(method="random", sketch_size=64))  # of the pass for diversity
