"""Names that stand in stored files: options of every method (manifests, hashes of studies) and flags of ``select``."""

from __future__ import annotations

import dataclasses
import re

import pytest

from ntkjax.cli import main
from ntkjax.pipeline.options import SelectorOptions
from ntkjax.selection import METHODS

DEFAULTS = {
    "ntk": {
        "kernel": "sum_logits",
        "direction": "raw",
        "scores": "forward",
        "sketch": "sparse",
        "sketch_size": 8192,
        "precondition": "none",
        "damping": 0.1,
        "stage1": "on",
        "prefilter_factor": 4,
        "pool_sample": 512,
        "aggregation": "mean",
        "domain_clusters": 8,
    },
    "gradient-cosine": {"sketch": "sparse", "sketch_size": 8192, "stage1": "on", "prefilter_factor": 4},
    "influence": {
        "curvature": "kfac",
        "damping": 0.1,
        "direction": "raw",
        "stage1": "on",
        "prefilter_factor": 4,
        "pool_sample": 512,
    },
    "less": {"sketch": "sparse", "sketch_size": 8192, "stage1": "on", "prefilter_factor": 4, "adam": "on"},
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
    "random": {},
    "random-from-stage-1": {"prefilter_factor": 4},
    "length": {"order": "longest"},
    "dsir": {"buckets": 10000, "gumbel": True},
    "rds": {},
    "betr": {"classifier_sample": 20000, "classifier_share": 0.1},
    "tsds": {"transport_alpha": 0.5, "transport_scale": 5.0, "transport_sigma": 0.75, "neighbours": 5000},
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
adam adapter aggregation arms-per-round
buckets classifier-sample classifier-share core-share curvature damping dedup.mode dedup.shingle dedup.threshold
direction diversity diversity-factor diversity-kernel domain domain-clusters dry-run dtype entropy-high entropy-keep
entropy-low exploration graph-edges graph-features graph-nodes graph-steps gumbel kernel lora-alpha lora-rank
lora-targets loss-turns max-length mesh method model n neighbours on-bad-record order out parameters pool
pool-clusters pool-sample precondition prefilter-factor probe-factor probes remat scores seed selected-format
semantic-samples semantic-similarity semantic-tokens sketch sketch-size skip-warmup stage1 test token-budget
transport-alpha transport-scale transport-sigma walk-core warmup.accumulation warmup.b1 warmup.b2 warmup.batch-size
warmup.buckets warmup.clip-norm warmup.domain-share warmup.epochs warmup.eps warmup.eval-every warmup.keep-checkpoints
warmup.learning-rate warmup.lift-interval warmup.lift-rank warmup.loss-reweighting warmup.max-buckets
warmup.micro-batch-tokens warmup.patience warmup.restore-best warmup.reweighting-temperature warmup.save-every
warmup.schedule warmup.steps warmup.warmup-ratio warmup.weight-decay weights
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
