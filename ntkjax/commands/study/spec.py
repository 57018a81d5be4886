"""The study file: one or more YAML files, read strictly. Unknown keys and wrong types name the file and the key.

Every key, with its default where it has one::

    title: ...                      # of the report
    model: {model: DIR}             # the options of --model and its group; or a directory alone
    pool: pool.jsonl                # a file, a list, or mappings with path, split, mapping, rows (data/mapping.py)
    domains:
      finance: {train: ..., dev: ..., test: ..., sizes: [100, 1000], truth: truth.json}
    methods: [random, {label: whole pool, method: ntk, stage1: off}]     # `all`: every selector there is
      # - {method: parts, representations: [embeddings, gradients], algorithms: all}     # crossed: an arm for each pair
    kernels: []                     # crossed with the methods that have a kernel and were given none
    budgets: [300]                  # N, examples chosen
    domain_sizes: [all]             # examples of the domain's training file, drawn anew for every seed
    seeds: 3                        # 0, 1, 2; or a list
    select: {}                      # options of all methods; a method's own come first
    warmup: {epochs: 1}             # null: none
    train: {}                       # steps are counted once, for every arm alike
    learning_rates: []              # tuned for every arm on dev with the first seed
    data: {}                        # max_length, token_budget, on_bad_record
    dedup: {}                       # mode (remove, report, off), threshold, shingle: the pool of every domain
    evaluation: {}                  # answer_template, generation, max_new_tokens, shots, shots_from
    focus: []                       # arms that are proposed, not baselines; default: those of method ntk
    select_only: false              # choose and compare what was chosen; train nothing
    keep_weights: false             # keep the adapter of every run
    embedded: true                  # in the place of model, pool and domains: the task that ships, whose truth is known

Of several files the later ones win, key by key; lists are replaced.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from ntkjax.errors import ConfigError
from ntkjax.pipeline.config_io import config_from_dict, read_yaml
from ntkjax.pipeline.options import DedupOptions, SelectorOptions
from ntkjax.pipeline.study.spec import ALL, EMBEDDED, StudySpec
from ntkjax.selection.algorithms import ALGORITHMS
from ntkjax.selection.representations import REPRESENTATIONS


def read_study(files: Sequence[str | Path]) -> tuple[StudySpec, dict[str, Any]]:
    """(the study, its content as one YAML mapping) of one or more files, the later ones over the earlier.

    Raises:
      UserError: a file that is missing or no YAML. ConfigError: an unknown or missing key, or a value of the wrong
        kind; the message names the file and the key.
    """
    merged: dict[str, Any] = {}
    for file in files:
        content = read_yaml(Path(file), missing="Name a study's YAML file, or `embedded` for the one that ships.")
        if not isinstance(content, dict):
            raise ConfigError(f"{file}: expected a mapping with keys such as domains and methods, got {content!r}")
        content = normalised(content, str(file))
        # Each file is checked alone, so that a message names it; what only another one gives is filled in.
        alone = {**content, "model": {"model": "?", **content["model"]}} if content.get("model") else content
        config_from_dict(StudySpec, alone, where=str(file))
        merged = _merge(merged, content)
    where = " + ".join(map(str, files))
    spec = config_from_dict(StudySpec, merged, where=where)
    _check_complete(spec, where)
    return spec, merged


def spec_of(content: Mapping[str, Any], where: str = "study") -> StudySpec:
    """The study that a mapping (as of a YAML file) describes; errors as for ``read_study``."""
    spec = config_from_dict(StudySpec, normalised(dict(content), where), where=where)
    _check_complete(spec, where)
    return spec


def normalised(content: dict[str, Any], where: str) -> dict[str, Any]:
    """The mapping with every abbreviation written out: plain values and lists only, as ``StudySpec`` takes them."""
    made = dict(content)
    for name in ("kernels", "budgets", "domain_sizes", "learning_rates", "focus"):
        if name in made and not isinstance(made[name], list | tuple):
            made[name] = [made[name]]
    if isinstance(made.get("model"), str):
        made["model"] = {"model": made["model"]}
    if type(made.get("seeds")) is int:
        if made["seeds"] < 1:
            raise ConfigError(f"{where}: seeds: expected at least 1, or a list of seeds; got {made['seeds']}")
        made["seeds"] = list(range(made["seeds"]))
    if isinstance(made.get("embedded"), bool):
        made["embedded"] = {} if made["embedded"] else None
    if made.get("embedded") is not None and not isinstance(made.get("model"), str):
        made["model"] = {"model": EMBEDDED, **(made.get("model") or {})}
    if "pool" in made:
        made["pool"] = _sources(made["pool"])
    if isinstance(made.get("domains"), dict):
        made["domains"] = {name: _domain(entry) for name, entry in made["domains"].items()}
    for name, options in (("select", SelectorOptions), ("dedup", DedupOptions)):
        if isinstance(made.get(name), dict):
            made[name] = _switches(options, made[name])
    if "methods" in made:
        entries = made["methods"] if isinstance(made["methods"], list | tuple) else [made["methods"]]
        made["methods"] = [_method(entry, where, i) for i, entry in enumerate(entries)]
    return made


def _domain(entry: Any) -> Any:
    if not isinstance(entry, dict):
        return entry
    made = {key: _sources(value) if key in ("train", "dev", "test") else value for key, value in entry.items()}
    if "sizes" in made and not isinstance(made["sizes"], list | tuple):
        made["sizes"] = [made["sizes"]]
    return made


def _sources(value: Any) -> Any:
    """A path, a mapping, or a list of either, as a list of mappings."""
    entries = value if isinstance(value, list | tuple) else [value]
    return [_source(entry) for entry in entries]


def _source(entry: Any) -> Any:
    if not isinstance(entry, dict):
        return {"path": entry}
    mapping = entry.get("mapping")
    if not isinstance(mapping, dict) or not isinstance(mapping.get("where"), dict):
        return entry
    listed = {key: value if isinstance(value, list | tuple) else [value] for key, value in mapping["where"].items()}
    texts = {key: [str(value) for value in values] for key, values in listed.items()}
    return {**entry, "mapping": {**mapping, "where": texts}}


PARTS = "parts"
_CROSSED = {"representations": REPRESENTATIONS, "algorithms": ALGORITHMS}
"""Keys of an entry that stand for an arm for each of their values (``all``: each of the table, once where two names
stand for the same)."""
_OWN = ("label", "method", "train", "warmup", "parameters", "learning_rates", *_CROSSED)


def entry_name(where: str, index: int, label: Any) -> str:
    """How an entry of ``methods`` is called in messages: its place in the file, and its label where it has one."""
    return f"{where}: methods[{index}]" + (f" ({label})" if isinstance(label, str) else "")


def _crossings(entry: Mapping[str, Any], where: str) -> dict[str, list[Any]]:
    """The values of the keys that stand for several arms, as lists."""
    lists = {}
    for key in (key for key in _CROSSED if key in entry):
        name, given = key.removesuffix("s"), entry[key]
        if entry.get("method") != PARTS:
            raise ConfigError(f"{where}: {key}: only with method: {PARTS}; got method {entry.get('method')!r}")
        if name in entry:
            raise ConfigError(f"{where}: {key} beside {name}; give one of the two")
        lists[key] = _distinct(_CROSSED[key]) if given == ALL else given if isinstance(given, list | tuple) else [given]
        if not lists[key]:
            raise ConfigError(f"{where}: {key}: expected at least one of {', '.join(_CROSSED[key])}")
    return lists


def _distinct(table: dict[str, type[Any]]) -> list[str]:
    return [name for i, name in enumerate(table) if table[name] not in list(table.values())[:i]]


def _method(entry: Any, where: str, index: int) -> dict[str, Any]:
    """An entry of ``methods`` with the options of its selector apart from the rest."""
    if isinstance(entry, str):
        return {"method": entry, "label": entry, "options": {}}
    where = entry_name(where, index, entry.get("label", entry.get("method")) if isinstance(entry, dict) else None)
    if not isinstance(entry, dict) or not (isinstance(entry.get("method"), str) or isinstance(entry.get("label"), str)):
        raise ConfigError(f"{where}: expected a method, or a mapping with method, label and options; got {entry!r}")
    if set(entry) == {"method", "label", "options"} | (set(entry) & set(_OWN)):  # written out already
        return entry
    known = [field.name for field in dataclasses.fields(SelectorOptions) if field.name != "method"]
    options = {name: value for name, value in entry.items() if name not in _OWN}
    unknown = [str(name) for name in options if name not in known]
    if unknown:
        valid = ", ".join([*_OWN, *known])
        raise ConfigError(f"{where}: unknown key {', '.join(unknown)}. Valid keys: {valid}")
    made = {name: entry[name] for name in _OWN if name in entry} | _crossings(entry, where)
    made.setdefault("method", made.get("label"))
    made.setdefault("label", made["method"])
    if made.get("warmup", "none") is None:  # null, as at the top
        made["warmup"] = "none"
    if "learning_rates" in made and not isinstance(made["learning_rates"], list | tuple):
        made["learning_rates"] = [made["learning_rates"]]
    return made | {"options": _switches(SelectorOptions, options)}


def _switches(cls: type, options: dict[str, Any]) -> dict[str, Any]:
    """``on`` and ``off``, which YAML reads as true and false, as the words that an option expects."""
    hints = get_type_hints(cls)
    made = dict(options)
    for name, value in options.items():
        hint = hints.get(name)
        words = set(get_args(hint)) if get_origin(hint) is Literal else set()
        if isinstance(value, bool) and ("on" if value else "off") in words:
            made[name] = "on" if value else "off"
    return made


def _merge(first: Any, second: Any) -> Any:
    if not (isinstance(first, dict) and isinstance(second, dict)):
        return second
    return {**first, **{key: _merge(first[key], value) if key in first else value for key, value in second.items()}}


def _check_complete(spec: StudySpec, where: str) -> None:
    fail = lambda text: ConfigError(f"{where}: {text}")
    if not spec.budgets:
        raise fail("missing key budgets: how many pool examples to choose, e.g. [300]")
    if not spec.seeds:
        raise fail("seeds: expected at least one")
    if spec.train.patience is not None:
        raise fail("train.patience: every arm takes equally many steps, so none may stop early; leave it out")
    if spec.embedded is not None:
        given = [name for name in ("pool", "domains") if getattr(spec, name)]
        if given:
            raise fail(f"embedded brings its own {' and '.join(given)}; leave one of the two out")
        return
    for name in ("model", "pool", "domains"):
        if not getattr(spec, name):
            raise fail(f"missing key {name} (or embedded: true)")
    for name, domain in spec.domains.items():
        files = ("train",) if spec.select_only else ("train", "dev", "test")
        absent = [key for key in files if not getattr(domain, key)]
        if absent:
            raise fail(f"missing key {', '.join(f'domains.{name}.{key}' for key in absent)}")
