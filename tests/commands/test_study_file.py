"""Study files: abbreviations, several files, and every mistake named with its file and key (exit code 2)."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from ntkjax.assets import study_path
from ntkjax.cli import main
from ntkjax.commands.study.arms import arms_of, focus_of
from ntkjax.commands.study.spec import normalised, read_study, spec_of
from ntkjax.errors import ConfigError, UserError
from ntkjax.pipeline.study.grid import choice_options
from ntkjax.selection import METHODS
from ntkjax.selection.algorithms import ALGORITHMS

DOMAIN = {"train": "a.jsonl", "dev": "b.jsonl", "test": ["c.jsonl", "d.jsonl"]}
GOOD = {"model": "m", "pool": "p.jsonl", "domains": {"x": DOMAIN}, "budgets": 3}


def write(path: Path, content) -> Path:
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False))
    return path


def labels(**more) -> list[str]:
    return [arm.label for arm in arms_of(spec_of(GOOD | more))]


# -- what may be left out or abbreviated --


def test_abbreviations_are_written_out_and_may_be_read_again(tmp_path):
    content = GOOD | {
        "seeds": 2, "domain_sizes": 50, "kernels": "loss", "learning_rates": "1e-3",
        "methods": ["dsir", {"label": "whole", "method": "ntk", "stage1": False, "train": {"weight_decay": 0.1}}],
    }  # fmt: skip
    text = "dedup: {mode: off}\n"  # which YAML reads as false
    spec, merged = read_study([write(tmp_path / "a.yaml", content), write(tmp_path / "b.yaml", text)])
    assert spec.seeds == (0, 1) and spec.budgets == (3,) and spec.domain_sizes == (50,) and spec.kernels == ("loss",)
    assert spec.learning_rates == (1e-3,) and spec.dedup.mode == "off"
    assert [source.path for source in spec.domains["x"].test] == ["c.jsonl", "d.jsonl"]
    assert spec.methods[1].options == {"stage1": "off"} and spec.methods[1].train == {"weight_decay": 0.1}
    again, second = read_study([write(tmp_path / "c.yaml", merged)])
    assert again == spec and second == merged


def test_later_files_win_key_by_key_and_lists_are_replaced(tmp_path):
    first = write(tmp_path / "a.yaml", GOOD | {"train": {"epochs": 2, "batch_size": 4}, "methods": ["dsir"]})
    second = write(tmp_path / "b.yaml", {"train": {"epochs": 5}, "methods": ["tsds"], "model": {"lora_rank": 4}})
    spec, _ = read_study([first, second])
    assert (spec.train.epochs, spec.train.batch_size) == (5, 4)
    assert [entry.label for entry in spec.methods] == ["tsds"]
    assert spec.model is not None and (spec.model.model, spec.model.lora_rank) == ("m", 4)


def test_the_embedded_study_has_every_selector(tmp_path):
    spec, _ = read_study([study_path()])
    arms = arms_of(spec)
    assert {arm.select.method for arm in arms if arm.select is not None} == set(METHODS)
    assert spec.embedded is not None and spec.model is not None and spec.model.model == "embedded"
    assert focus_of(spec, arms) == tuple(a.label for a in arms if a.select is not None and a.select.method == "ntk")


def test_a_mapping_of_a_source_and_its_where_is_read():
    train = {"path": "o/n", "split": "test", "rows": [0, 9], "mapping": {"prompt": "{q}", "response": "{a}",
             "where": {"kind": 3}}}  # fmt: skip
    spec = spec_of(GOOD | {"domains": {"x": DOMAIN | {"train": train}}})
    (source,) = spec.domains["x"].train
    assert source.mapping is not None and source.mapping.where == {"kind": ("3",)} and source.rows == (0, 9)


# -- arms --


def test_arms_that_are_always_there_and_kernels_crossed():
    assert labels() == ["base", "domain-only", "domain-only-equal-steps", "random"]
    assert labels(methods=["dsir", "random"], select_only=True) == ["dsir", "random"]
    crossed = labels(methods=["ntk", "dsir", {"label": "mine", "method": "ntk", "kernel": "loss"}],
                     kernels=["sum_logits", "spectral:2"])  # fmt: skip
    assert crossed[3:] == ["random", "ntk (sum_logits)", "ntk (spectral:2)", "dsir", "mine"]
    assert labels(methods=["ntk"], kernels="loss")[-1] == "ntk"


def test_parts_are_crossed_from_one_line():
    line = {
        "method": "parts",
        "representations": ["gradients", "ngrams"],
        "algorithms": ["mean", "uot"],
        "uot_pool": 0.1,
    }
    content = GOOD | {"methods": [line], "kernels": ["loss", "spectral:2"]}
    spec = spec_of(content)
    assert spec_of(normalised(content, "s")) == spec and len(spec.methods) == 1
    found = {arm.label: arm for arm in arms_of(spec)}
    assert list(found)[4:] == [  # kernels are for those that take gradients
        "parts (gradients, mean) (loss)", "parts (gradients, mean) (spectral:2)", "parts (gradients, uot) (loss)",
        "parts (gradients, uot) (spectral:2)", "parts (ngrams, mean)", "parts (ngrams, uot)",
    ]  # fmt: skip
    options = found["parts (ngrams, uot)"].select
    assert (options.representation, options.algorithm, options.uot_pool) == ("ngrams", "uot", 0.1)
    assert found["parts (ngrams, uot)"].warmup is None and found["parts (gradients, mean) (loss)"].warmup is not None
    every = labels(methods=[{"method": "parts", "label": "x", "representation": "ngrams", "algorithms": "all"}])
    once = [name for name in ALGORITHMS if name != "doubly-greedy"]  # the same as max
    assert every[4:] == [f"x ({name})" for name in once]


def test_an_arms_own_options_training_and_rates():
    methods = [
        {"label": "a", "method": "ntk", "direction": "contrast", "warmup": None},
        {"label": "b", "method": "dsir", "train": {"learning_rate": 0.5}},
        "loss-reweighting",
        {"label": "c", "method": "lift", "train": {"lift_rank": 2}, "learning_rates": [1e-4]},
    ]
    content = GOOD | {"methods": methods, "learning_rates": [1, 2], "select": {"prefilter_factor": 7}}
    arms = {arm.label: arm for arm in arms_of(spec_of(content))}
    a, b, c, reweighted = arms["a"], arms["b"], arms["c"], arms["loss-reweighting"]
    assert a.select is not None and (a.select.direction, a.select.prefilter_factor) == ("contrast", 7)
    assert a.warmup is None and a.rates == (1, 2) and b.rates == (0.5,) and b.train.learning_rate == 0.5
    assert reweighted.select is not None and reweighted.select.method == "random"
    assert reweighted.train.loss_reweighting == "linupper" and reweighted.warmup is None
    assert (c.train.lift_rank, c.parameters, c.rates) == (2, "all", (1e-4,))


def test_a_pass_for_diversity_is_part_of_what_was_chosen_and_looks_at_the_model():
    diverse = {"label": "diverse", "method": "dsir", "diversity": "d-optimal"}
    wide = diverse | {"label": "wide", "sketch_size": 64}
    *_, plain, first, second = arms_of(spec_of(GOOD | {"methods": ["dsir", diverse, wide]}))
    assert plain.warmup is None and first.warmup is not None
    keys = [choice_options(arm.select) for arm in (plain, first, second) if arm.select is not None]
    assert len({str(key) for key in keys}) == 3


def test_steps_are_equal_but_for_the_domain_alone():
    arms = {arm.label: arm for arm in arms_of(spec_of(GOOD | {"train": {"epochs": 3, "batch_size": 8}}))}
    assert arms["random"].steps(20, 10) == arms["domain-only-equal-steps"].steps(20, 10) == 12  # 3 ceil(30 / 8)
    assert arms["domain-only"].steps(20, 10) == 9
    assert arms_of(spec_of(GOOD | {"train": {"steps": 5}}))[1].steps(20, 10) == 5


# -- mistakes --


CASES = {
    "unknown key": ({"bugdets": [3]}, ["s.yaml", "unknown key bugdets", "budgets"]),
    "wrong type": ({"budgets": ["many"]}, ["s.yaml", "budgets[0]", "int"]),
    "budget of zero": ({"budgets": [0]}, ["s.yaml", "budgets", "at least 1"]),
    "a value twice": ({"budgets": [3, 3]}, ["s.yaml", "budgets", "twice"]),
    "no seeds": ({"seeds": 0}, ["s.yaml", "seeds"]),
    "a list for domains": ({"domains": ["x"]}, ["s.yaml", "domains"]),
    "unknown key of a domain": ({"domains": {"x": DOMAIN | {"trian": "t"}}}, ["s.yaml", "domains.x.trian", "train"]),
    "no dev": ({"domains": {"x": {"train": "a", "test": "b"}}}, ["s.yaml", "domains.x.dev"]),
    "no pool": ({"pool": None}, ["s.yaml", "pool"]),
    "unknown key of a source": (
        {"pool": [{"path": "p", "rwos": [0, 1]}]},
        ["s.yaml", "pool[0].rwos", "rows"],
    ),
    "a template that cannot be": (
        {"pool": {"path": "p", "mapping": {"prompt": "{q", "response": "r"}}},
        ["s.yaml", "pool[0].mapping", "braces"],
    ),
    "choices that YAML reads as booleans": (
        "model: m\npool: {path: p, mapping: {prompt: q, response: r, choices: [yes, no]}}\n",
        ["s.yaml", "pool[0].mapping.choices[0]", "True"],
    ),
    "unknown method": ({"methods": ["oracle"]}, ["s.yaml", "methods[0]", "oracle", "dsir", "lift"]),
    "unknown option of a method": (
        {"methods": ["dsir", {"method": "ntk", "kernle": "loss"}]},
        ["s.yaml: methods[1] (ntk): unknown key kernle", "kernel"],
    ),
    "wrong type of an option": (
        {"methods": [{"method": "ntk", "prefilter_factor": "many"}]},
        ["s.yaml", "methods[0]", "prefilter_factor", "int"],
    ),
    "no method": ({"methods": [{"kernel": "loss"}]}, ["s.yaml", "methods[0]", "method"]),
    "one label twice": ({"methods": ["ntk", {"method": "ntk", "kernel": "loss"}]}, ["s.yaml", "ntk", "label"]),
    "a label that is taken": ({"methods": [{"method": "ntk", "label": "base"}]}, ["s.yaml", "base"]),
    "no parts": (
        {"methods": [{"method": "ntk", "algorithms": ["max"]}]},
        ["methods[0]", "algorithms", "method: parts"],
    ),
    "parts twice": (
        {"methods": [{"method": "parts", "algorithms": ["max"], "algorithm": "uot"}]},
        ["methods[0]", "algorithms beside algorithm"],
    ),
    "no algorithms": ({"methods": [{"method": "parts", "algorithms": []}]}, ["methods[0]", "at least one of mean"]),
    "unknown algorithm": ({"methods": [{"method": "parts", "algorithms": ["best"]}]}, ["methods[0]", "best", "mean"]),
    "after an entry that stands for several arms": (
        {
            "methods": [
                {"method": "parts", "algorithms": ["max", "mean"]},
                {"label": "mine", "method": "ntk", "kernel": "x"},
            ]
        },
        ["s.yaml: methods[1] (mine)", "kernel"],
    ),
    "a wrong type after an entry that stands for several arms": (
        {"methods": [{"method": "parts", "algorithms": ["max", "mean"]}, {"method": "ntk", "learning_rates": ["x"]}]},
        ["s.yaml: methods[1].learning_rates[0]"],
    ),
    "one of several arms": (
        {"methods": ["dsir", {"method": "parts", "label": "p", "algorithms": ["max", "best"]}]},
        ["s.yaml: methods[1] (p (best))", "algorithm"],
    ),
    "unknown kernel": ({"kernels": ["gaussian"]}, ["s.yaml", "kernels", "gaussian", "sum_logits"]),
    "unknown kernel of a method": ({"methods": [{"method": "ntk", "kernel": "gaussian"}]}, ["s.yaml", "methods[0]"]),
    "steps of one arm": (
        {"methods": [{"label": "a", "method": "dsir", "train": {"epochs": 9}}]},
        ["s.yaml", "methods[0]", "train.epochs", "same steps"],
    ),
    "unknown training option of one arm": (
        {"methods": [{"label": "a", "method": "dsir", "train": {"wight_decay": 9}}]},
        ["s.yaml", "methods[0] (a): train", "wight_decay"],
    ),
    "unknown training option": ({"train": {"epcohs": 3}}, ["s.yaml", "train.epcohs", "epochs"]),
    "a training option out of range": ({"train": {"batch_size": 0}}, ["s.yaml", "train", "batch_size"]),
    "early stopping": ({"train": {"patience": 2}}, ["s.yaml", "patience"]),
    "negative learning rate": ({"learning_rates": [-1]}, ["s.yaml", "learning_rates"]),
    "focus on nobody": ({"focus": ["mine"]}, ["s.yaml", "focus", "mine", "random"]),
    "embedded and a pool": ({"embedded": True}, ["s.yaml", "embedded", "pool"]),
    "unknown size of the embedded task": (
        {"embedded": {"pool": 3}, "pool": [], "domains": {}},
        ["s.yaml", "embedded.pool", "pool_size"],
    ),
    "not a mapping": ("- a\n", ["s.yaml", "mapping"]),
    "not YAML": ("a: [\n", ["s.yaml:2", "not valid YAML"]),
    "a key twice": ("budgets: 3\nseeds: 2\nbudgets: 4\n", ["s.yaml:3", "budgets", "twice"]),
    "warm-up that is no mapping": ({"warmup": 3}, ["s.yaml", "warmup"]),
}


@pytest.mark.parametrize("name", CASES)
def test_a_mistake_is_named_with_file_and_key(name, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    wrong, expected = CASES[name]
    write(Path("s.yaml"), wrong if isinstance(wrong, str) else GOOD | wrong)
    assert main(["study", "s.yaml", "--out", "run"]) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said and not Path("run").exists()
    for word in expected:
        assert word in said, said


def test_with_several_files_the_wrong_one_is_named(tmp_path):
    good = write(tmp_path / "good.yaml", GOOD)
    bad = write(tmp_path / "bad.yaml", {"train": {"epochs": "many"}})
    with pytest.raises(ConfigError) as error:
        read_study([good, bad])
    assert str(error.value).startswith(f"{bad}: train.epochs") and "good.yaml" not in str(error.value)
    with pytest.raises(UserError, match=r"nowhere.yaml: not found"):
        read_study([good, tmp_path / "nowhere.yaml"])


def test_a_domain_without_dev_may_serve_a_study_that_trains_nothing():
    content = GOOD | {"domains": {"x": {"train": "a"}}, "select_only": True}
    assert spec_of(content).domains["x"].dev == ()
    assert normalised(GOOD, "s")["pool"] == [{"path": "p.jsonl"}]
