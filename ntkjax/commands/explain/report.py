"""What ``explain`` writes: explained.jsonl, explained.parquet, domain.jsonl, explain.html; the meaning of a score."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ntkjax.commands.explain.neighbours import Links
from ntkjax.commands.explain.parts import GROUPS, Parts, Shown
from ntkjax.commands.explain.reopen import Run
from ntkjax.commands.explain.tokens import token_texts
from ntkjax.files import write_jsonl, written_file
from ntkjax.pipeline.load import Loaded
from ntkjax.report.explanation import DomainExample, Explanation, ShownExample, write_explanation

LABELS = {"chosen": "chosen", "nearly": "nearly chosen", "rejected": "rejected"}
FILES = ("explain.html", "explained.jsonl", "explained.parquet", "domain.jsonl")
PARTS = ("representation", "similarity", "algorithm")
"""What a selection from parts says of itself."""
ROWS = 512
"""Records of a group of rows in the Parquet file."""


@dataclasses.dataclass(frozen=True)
class ExplainedRun:
    """Everything that is written of a run.

    Attributes:
      parts: None where the method's scores have none; no_parts: why. links: None where nothing is compared.
    """

    run: Run
    pool: Loaded
    shown: Shown
    parts: Parts | None
    no_parts: str
    links: Links | None

    def examples(self) -> Iterator[ShownExample]:
        """The shown examples in turn, with their tokens as text."""
        files, lines = self.pool.records.locations(self.shown.rows)
        selection, known = self.run.selection, {}
        ids, sources = self.pool.records.ids[self.shown.rows], self.pool.records.sources[self.shown.rows]
        for k, row in enumerate(self.shown.rows.tolist()):
            yield ShownExample(
                id=str(ids[k]),
                source=str(sources[k]),
                place=f"{files[k]}:{lines[k]}",
                group=int(self.shown.groups[k]),
                score=float(selection.scores[row]) if selection.scored[row] else None,
                rank=int(selection.ranks[row]),
                texts=token_texts(self.run.model.tokenizer, self.pool.tokens.tokens(row)[0], known),
                learned=np.array(self.pool.tokens.trained(row)),
                parts=None if self.parts is None else self.parts.tokens[k],
                table=None if self.parts is None else self.parts.by_leaf[k],
                near=[] if self.links is None else _pairs(self.links.near[k], self.links.near_cosine[k]),
            )

    def domain(self) -> Iterator[DomainExample]:
        """The domain examples in turn, with what they are nearest to."""
        at = {row: k for k, row in enumerate(self.shown.rows.tolist())}
        chosen = set(self.run.selection.selected.tolist())
        for i, example in enumerate(self.run.domain.records):
            pairs = [] if self.links is None else _pairs(self.links.pulled[i], self.links.pulled_cosine[i])
            ids = self.pool.records.ids[np.array([row for row, _ in pairs], np.int64)] if pairs else []
            pulled = [(str(name), at.get(row, -1), cosine, row in chosen) for name, (row, cosine) in zip(ids, pairs)]
            yield DomainExample(example.id, example.prompt, example.response, pulled)


def _pairs(rows: np.ndarray, cosines: np.ndarray) -> list[tuple[int, float]]:
    return [(int(row), float(cosine)) for row, cosine in zip(rows, cosines) if row >= 0]


def write_explained(out: Path, explained: ExplainedRun) -> None:
    """All files of `FILES`; explain.html last."""
    examples, domain = list(explained.examples()), list(explained.domain())
    write_jsonl(out / "explained.jsonl", (record(explained, k, example) for k, example in enumerate(examples)))
    _write_parquet(out / "explained.parquet", explained, examples)
    names = ("id", "shown", "cosine", "chosen")
    write_jsonl(
        out / "domain.jsonl",
        (
            {"id": item.id, "prompt": item.prompt, "response": item.response}
            | {"pulled": [dict(zip(names, (p[0], p[1] >= 0, p[2], p[3]))) for p in item.pulled]}
            for item in domain
        ),
    )
    write_explanation(out / "explain.html", _page(explained, examples, domain))


def record(explained: ExplainedRun, k: int, example: ShownExample) -> dict[str, Any]:
    """One shown example as plain JSON values; numbers in full."""
    domain_ids, parts = explained.run.domain.records.ids, explained.parts
    table = example.table
    return {
        "id": example.id,
        "source": example.source,
        "place": example.place,
        "row": int(explained.shown.rows[k]),
        "group": GROUPS[example.group],
        "score": example.score,
        "rank": example.rank,
        "tokens": list(example.texts),
        "learned": example.learned.tolist(),
        "parts": None if example.parts is None else example.parts.tolist(),
        "by_layer": None if table is None or parts is None else _named(parts.layers, table.sum(axis=1)),
        "by_module": None if table is None or parts is None else _named(parts.modules, table.sum(axis=0)),
        "near": [{"id": str(domain_ids[row]), "cosine": cosine} for row, cosine in example.near],
    }


def _named(names: list[str], values: np.ndarray) -> list[dict[str, Any]]:
    return [{"name": name, "part": float(value)} for name, value in zip(names, values)]


_PART = pa.list_(pa.struct([("name", pa.string()), ("part", pa.float64())]))
SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("source", pa.string()),
        ("place", pa.string()),
        ("row", pa.int64()),
        ("group", pa.string()),
        ("score", pa.float64()),
        ("rank", pa.int64()),
        ("tokens", pa.list_(pa.string())),
        ("learned", pa.list_(pa.bool_())),
        ("parts", pa.list_(pa.float64())),
        ("by_layer", _PART),
        ("by_module", _PART),
        ("near", pa.list_(pa.struct([("id", pa.string()), ("cosine", pa.float64())]))),
    ]
)


def _write_parquet(path: Path, explained: ExplainedRun, examples: list[ShownExample]) -> None:
    with written_file(path) as work, pq.ParquetWriter(work, SCHEMA) as file:
        for start in range(0, len(examples), ROWS):
            block = [record(explained, start + k, example) for k, example in enumerate(examples[start : start + ROWS])]
            file.write_table(pa.Table.from_pylist(block, schema=SCHEMA))


# -- the page --


def _page(explained: ExplainedRun, examples: list[ShownExample], domain: list[DomainExample]) -> Explanation:
    run, parts, links = explained.run, explained.parts, explained.links
    counts = explained.shown.counts()
    scored, pool = int(run.selection.scored.sum()), len(run.selection.scores)
    lead = (
        f"{Path(run.model_name).name}: {len(run.selection.selected):,} of {pool:,} pool examples chosen by "
        f"{run.selection.method} for {len(run.domain):,} examples of "
        f"{', '.join(dict.fromkeys(Path(name).name for name in run.domain_files))}."
    )
    if scored < pool:
        lead += f" {pool - scored:,} were left out before they were scored, and are not shown."
    return Explanation(
        title="Why were these examples chosen?",
        lead=lead,
        facts=_facts(explained),
        groups=[(LABELS[name], *counts[name]) for name in GROUPS],
        scale=scale(run, parts),
        examples=examples,
        domain=domain,
        layers=[] if parts is None else [f"layer {n}" if n.isdigit() else n for n in parts.layers],
        modules=[] if parts is None else parts.modules,
        own=_own(parts),
        links="" if links is None else about_links(links),
        no_parts=explained.no_parts,
    )


def _own(parts: Parts | None) -> float | None:
    """The one number in whose terms scores can be given; None where there are several directions, or cosines."""
    one = parts is not None and parts.own is not None and len(parts.own) == 1
    return parts.own[0] if one and parts is not None and parts.own is not None else None


def about_links(links: Links) -> str:
    """What the cosines of a page are of."""
    among = f"all {links.among:,} pool examples with kept features" if links.whole else f"the {links.among:,} shown"
    return f"Cosine of {links.name}; pool examples among {among}."


def _facts(explained: ExplainedRun) -> list[tuple[str, str]]:
    run, parts = explained.run, explained.parts
    facts = [
        ("run", run.name),
        ("model", run.model_name),
        ("method", run.selection.method),
        ("domain", ", ".join(run.domain_files)),
        ("pool", ", ".join(run.pool_files)),
        ("seed", str(run.seed)),
    ]
    for name in (*PARTS, "kernel", "direction", "scores", "precondition", "aggregation"):
        if name in explained.run.selection.diagnostics:
            facts.append((name, str(explained.run.selection.diagnostics[name])))
    if parts is not None:
        facts.append(("scores computed again", f"off by at most {parts.worst[0]:.1e} of the sum of their parts' sizes"))
        facts.append(("layers against tokens", f"off by at most {parts.worst[1]:.1e} of the same"))
    return facts


def scale(run: Run, parts: Parts | None) -> list[str]:
    """What a score of this run means, in paragraphs."""
    known = run.selection.diagnostics
    made_of = [known.get(name) for name in PARTS]
    first = _what(known.get("kernel"), known.get("direction"), known.get("precondition"))
    said = [first if "kernel" in known or None in made_of else _of_parts(*made_of)]
    own = _own(parts)
    if own:
        best = float(run.selection.scores[run.selection.selected[0]])
        said.append(
            f"The size. A score has the unit of its gradients squared, so a number such as {best:.3g} says nothing by "
            "itself: it grows with the model, the adapter's rank and alpha, and for kernels of logits with the "
            "vocabulary. What it can be measured by is the domain itself: the mean score of the domain's own examples "
            f"is {own:.3g}, and the best chosen example has {best / own:.2g} times that. An example at 1 pulls the "
            "parameters as far in the domain's direction as a domain example does on average."
        )
    said.append(
        "What can be compared: examples of one run, by order, sign and ratio. Not scores of other kernels, models, "
        "domains, warm-ups or adapters, and not other runs, unless each is divided by its domain's own mean score. "
        "Cosines lie between -1 and 1 and may be compared more widely."
    )
    if known.get("direction") != "cosine":
        length, mean = (known.get(f"rank_correlation_with_{name}") for name in ("length", "pool_mean"))
        said.append(
            "Length. Outputs are means over the learned tokens, so a long response does not score high by being long. "
            "Short responses often do: a mean over fewer tokens has the longer gradient. Rank correlation of scores "
            f"with length in this run: {_number(length)}; with the score by the pool's own mean gradient: "
            f"{_number(mean)} (near 1: the score is about what all texts share, and little about the domain)."
        )
    if parts is not None:
        said.append(
            "Colours. The part of a token is how fast the output at the position that predicts it changes when the "
            "parameters move along the domain's direction. Parts add up to the score, exactly but for rounding, over "
            "tokens, and likewise over layers and kinds of module. A part is not what the score would lose without the "
            "token: the tokens before it shape the prediction too."
        )
    return said


def _number(value: Any) -> str:
    return "not known" if value is None else f"{value:.2f}"


def _of_parts(representation: Any, similarity: Any, algorithm: Any) -> str:
    """The first paragraph of a selection from parts."""
    return (
        f"What it is. The score of an example is what the algorithm {algorithm} makes of its {similarity} with every "
        f"domain example, by representation {representation} (formulas: docs, Which method, Parts). Higher is chosen "
        "first, but for algorithms that put rows in order themselves, by taking turns or by a draw. Which domain "
        "examples an example is near to, by the same similarity, stands beside it."
    )


def _what(kernel: Any, direction: Any, precondition: Any) -> str:
    """The first paragraph: what the number is, and its sign."""
    if kernel is None:
        return (
            "What it is. This method's score is a number of its own (its formula is in the docs, Selection methods); "
            "higher is chosen first."
        )
    along = "the domain's mean gradient"
    if direction == "contrast":
        along += " without what it shares with the pool's"
    if precondition not in (None, "none"):
        along += f", each direction weighed by {precondition}"
    product = "cosine" if direction == "cosine" else "inner product"
    if kernel == "loss":
        return (
            f"What it is. The score of an example is the {product} of its loss gradient with {along}. Its sign: above "
            "0, a small step of gradient descent on the example also lowers the domain's mean loss; below 0, it raises "
            "it. The inner product is the rate: the fall of that loss for each unit of learning rate, to first order."
        )
    return (
        f"What it is. The score of an example is the {product} of the gradient of its outputs (kernel {kernel}) with "
        f"{along}. Its sign: above 0, a small step that raises the example's outputs raises the domain's too. This "
        "kernel looks at the outputs and not at the right answers, so the sign says nothing about the loss by itself."
    )
