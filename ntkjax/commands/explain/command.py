"""``ntkjax explain``: why a selection chose what it chose: scores by token, layer, module; what is near to what."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from tyro.conf import Positional

from ntkjax.commands.base import Command
from ntkjax.commands.explain.neighbours import (
    Index,
    Links,
    computed_index,
    kept_index,
    link,
    need_index,
    similarity_index,
    top,
)
from ntkjax.commands.explain.parts import Parts, choose_shown, take_apart
from ntkjax.commands.explain.reopen import Run, Which, reopen
from ntkjax.commands.explain.report import FILES, LABELS, ExplainedRun, about_links, write_explained
from ntkjax.errors import ConfigError
from ntkjax.files import write_jsonl
from ntkjax.pipeline.inputs import Inputs
from ntkjax.pipeline.load import Loaded, load_data
from ntkjax.pipeline.run_dir import RunDir
from ntkjax.pipeline.selection_io import read_scores
from ntkjax.report.tables import to_markdown
from ntkjax.selection import SelectionProblem
from ntkjax.selection.methods.parts import PartsSelector

ANSWERS = "answers.jsonl"
WHICH = ("arm", "of_domain", "of_size", "of_budget", "of_seed")
"""The options that name a selection of a run that has several."""
NAMES = ("run", *WHICH)
"""Those that name a selection: a path may be spelt in several ways, and a run may have been moved."""


@dataclasses.dataclass(frozen=True)
class ExplainConfig:
    """Why were these chosen? RUN of `ntkjax select`, or one selection of a RUN of `adapt` or `study`: scores by token,
    layer and module, and the nearest domain examples, on one page; or, with --index and --queries, the nearest pool
    examples of any question."""

    run: Positional[str | None] = None
    """Run directory of a finished selection, or of a comparison of several."""
    index: str | None = None
    """In the place of RUN, the run directory of a selection that kept features of its pool: they answer --queries, and
    the pool is not looked at again."""
    queries: tuple[str, ...] = ()
    """Files of questions with responses, as for --domain of select."""
    arm: str | None = None
    """Of a run of adapt or study: the arm, by its name in the tables. None: the first that the run proposes."""
    of_domain: str | None = None
    """Of a run of study: the domain. None: the first; likewise the others."""
    of_size: str | None = None
    """Of a run of study: domain training examples, a number or `all`."""
    of_budget: int | None = None
    """Of a run of study: N."""
    of_seed: int | None = None
    """Of a run of adapt or study: the seed."""
    k: int = 10
    """Nearest examples for each; 0: none."""
    out: str | None = None
    """Where the page and its files go; by default RUN/explain, of a run of adapt or study RUN/selections/HASH/explain.
    With --index: answers.jsonl there, and none without."""
    chosen: int = 1000
    """Chosen examples to show; of more, so many are drawn."""
    nearly: int = 1000
    """Examples that follow them by rank, at most as many as were chosen and half of those left."""
    rejected: int = 1000
    """Examples drawn from the others that have a score."""
    seed: int = 0
    """Of what is drawn."""

    def __post_init__(self):
        if (self.run is None) == (self.index is None):
            raise ConfigError("give a run directory, or --index RUN with --queries FILE; expected one of the two")
        if (self.index is None) != (not self.queries):
            raise ConfigError("--index and --queries go together: --index RUN --queries FILE")
        if min(self.k, self.chosen, self.nearly, self.rejected) < 0 or (self.index is not None and self.k < 1):
            raise ConfigError("k, chosen, nearly and rejected must be at least 0, and k at least 1 with --index")

    @property
    def which(self) -> Which:
        """Which selection of a run that has several."""
        return Which(*(getattr(self, name) for name in WHICH))


@dataclasses.dataclass(frozen=True)
class Answer:
    """A question and the pool examples nearest to it: each a dict of id, cosine, score, selected, source, file,
    line, prompt and response."""

    id: str
    prompt: str
    nearest: list[dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Explained:
    """What `explain` found.

    Attributes:
      counts: group -> (shown, of how many); {} with --index.
      parts: scores taken apart; None where they have no parts: ``no_parts`` says why.
      links: what is near to what; None without.
      answers: to the queries. features: what they were compared by.
      out: where the files are; None where none were asked for.
      of: which selection it is.
    """

    counts: dict[str, tuple[int, int]]
    parts: Parts | None
    no_parts: str
    links: Links | None
    answers: list[Answer]
    features: str
    out: Path | None
    of: str = ""


def explain(config: ExplainConfig, *, progress: bool = True) -> Explained:
    """Explain a selection, or answer questions from its features, as ``config`` says.

    Raises:
      UserError: no finished selection, inputs that have changed, no features to answer from; a full disk.
    """
    if config.index is not None:
        return answer(config, progress=progress)
    assert config.run is not None
    given = None if config.out is None else Path(config.out)
    # Before anything is loaded. Different words may name one selection; which one it is its scores.parquet says.
    RunDir.check(given or Path(config.run) / "explain", "explain", config, ignore=NAMES)
    run = reopen(config.run, progress=progress, which=config.which)
    out = given or run.path / "explain"
    inputs: Inputs = {"run": _stamp(run)}
    RunDir.check(out, "explain", config, inputs=inputs, ignore=NAMES)
    pool = run.pool()
    directory = RunDir.create(out, "explain", config, inputs=inputs, ignore=NAMES, rewrite=True)
    directory.tell(FILES[0], progress)
    most = (config.chosen, config.nearly, config.rejected)
    shown = choose_shown(run.selection, most, seed=config.seed)
    problem = run.problem(run.domain, pool, progress=progress, work_dir=run.rows)
    parts, why = None, run.selector.no_parts or ""
    if not why:
        directional = run.selector.directional(problem, np.sort(shown.rows))
        parts = take_apart(directional, problem, run.selection, shown.rows, run.model.spec, out)
    links = _links(config, run, problem, shown.rows, out)
    explained = ExplainedRun(run, pool, shown, parts, why, links)
    write_explained(out, explained)
    return Explained(shown.counts(), parts, why, links, [], "", out, run.name)


def _stamp(run: Run) -> dict[str, str]:
    """What the files of an explanation depend on."""
    digest = hashlib.blake2b((run.path / "scores.parquet").read_bytes(), digest_size=8)
    return {"scores.parquet": digest.hexdigest()}


def _links(config: ExplainConfig, run: Run, problem: SelectionProblem, shown: np.ndarray, out: Path) -> Links | None:
    """By what ``parts`` compares; else by the run's kept gradients; else, where its scores are of gradients, by those
    of the shown examples, computed now; else by its embeddings; None where there is nothing."""
    if config.k == 0 or len(shown) == 0:
        return None
    if isinstance(run.selector, PartsSelector):
        index = similarity_index(run.selector, dataclasses.replace(problem, shared_dir=run.shared))
        return link(index, index.encode(problem), shown, config.k)
    index: Index | None = kept_index(run.rows, problem, shared=run.shared, kernel=_kernel(run))
    if (index is None or not index.name.startswith("gradients")) and run.selector.no_parts is None:
        options, here = run.select, {"work_dir": out / "rows", "shared_dir": None}
        kernel = run.selection.diagnostics["kernel"]
        problem = dataclasses.replace(problem, **here)
        index = computed_index(problem, shown, kernel, options.sketch, options.sketch_size)
    if index is None or len(index.rows) == 0:
        return None
    return link(index, index.encode(problem), shown, config.k)


def _kernel(run: Run) -> str | None:
    return run.selection.diagnostics.get("kernel")


def answer(config: ExplainConfig, *, progress: bool = True) -> Explained:
    """The nearest pool examples of every question, from the features that the run has kept."""
    assert config.index is not None
    run = reopen(config.index, progress=progress, which=config.which)
    queries = load_data(config.queries, run.model, run.data)
    problem = run.problem(queries, queries, progress=progress, work_dir=None)
    pool = None if run.shared is None else run.pool().tokens.fingerprint
    index = need_index(run.rows, problem, shared=run.shared, kernel=_kernel(run), pool=pool)
    places, cosines = top(index.encode(problem), index.read, len(index.rows), config.k)
    rows = np.where(places >= 0, index.rows[places], -1)
    answers = _answers(run, queries, rows, cosines)
    out = None if config.out is None else Path(config.out)
    if out is not None:
        write_jsonl(out / ANSWERS, (dataclasses.asdict(item) for item in answers))
    return Explained({}, None, "", None, answers, f"cosine of {index.name}, {len(index.rows):,} pool examples", out)


def _answers(run: Run, queries: Loaded, rows: np.ndarray, cosines: np.ndarray) -> list[Answer]:
    """With what scores.parquet and the pool's files say of each row."""
    wanted = np.unique(rows[rows >= 0])
    table = read_scores(run.path, ["id", "score", "selected", "source", "file", "line"])
    facts = dict(zip(wanted.tolist(), table.take(wanted).to_pylist()))
    records = run.records()
    places = _places(records, {(fact["file"], fact["line"], fact["id"]) for fact in facts.values()})
    answers = []
    for k, question in enumerate(queries.records):
        nearest = []
        for row, cosine in zip(rows[k].tolist(), cosines[k].tolist()):
            if row < 0:
                continue
            fact = facts[row]
            position = places.get((fact["file"], fact["line"], fact["id"]))
            if position is None:
                raise ConfigError(
                    f"{fact['file']}:{fact['line']}: the record {fact['id']} is not there any more; expected the pool "
                    f"of {run.path}; put its files back, or run the selection again"
                )
            example = records[position]
            nearest.append(fact | {"cosine": cosine, "prompt": example.prompt, "response": example.response})
        answers.append(Answer(question.id, question.prompt, nearest))
    return answers


def _places(records: Any, wanted: set[tuple[str, int, str]]) -> dict[tuple[str, int, str], int]:
    """Which of ``records`` the wanted (file, line, id) are."""
    files, lines = records.locations(np.arange(len(records)))
    there = zip(files, lines.tolist(), map(str, records.ids))
    return {item: row for row, item in enumerate(there) if item in wanted}


def describe(config: ExplainConfig, result: Explained) -> str:
    """How many are shown, how exactly the parts add up, where the page is; or the answers."""
    if config.index is not None:
        lines = [f"{result.features}"]
        for item in result.answers:
            lines.append(f"\n{item.id}: {' '.join(item.prompt.split())[:160]}")
            names = ("cosine", "id", "source", "score", "selected")
            rows = [{name: near[name] for name in names} | {"prompt": _start(near["prompt"])} for near in item.nearest]
            lines.append(to_markdown(rows))
        return "\n".join(lines if result.out is None else [*lines, f"answers: {result.out / ANSWERS}"])
    counts = [f"{LABELS[name]}: {shown} of {of} shown" for name, (shown, of) in result.counts.items()]
    lines = [result.of, *counts]
    if result.parts is None:
        lines.append(f"no parts by token: {result.no_parts}")
    else:
        first, second = result.parts.worst
        lines.append(
            f"parts of tokens add up to the scores within {first:.1e}, those of layers and modules within {second:.1e} "
            "(of the sum of the parts' sizes)"
        )
    lines.append("nothing is compared: no features" if result.links is None else about_links(result.links))
    return "\n".join([*lines, f"page: {result.out and result.out / FILES[0]}"])


def _start(text: str) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= 60 else flat[:57] + "..."


COMMAND = Command(ExplainConfig, explain, describe)
