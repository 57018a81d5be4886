"""lm-evaluation-harness on our models: a backend that lm-eval knows as ``ntkjax``, and its tasks, every sample kept.

lm-eval (https://github.com/EleutherAI/lm-evaluation-harness) asks a model three things: the log-likelihood of a
continuation after a context, that of a whole text in windows, and a continuation up to a stop string. `score`,
`rolling_windows` and `continuations` answer them for a `LanguageModel`, adapters included, as lm-eval's own backend for
transformers does: the same tokens, cuts and windows, so that the numbers are comparable.

lm-eval is an extra of this package, imported when it is first asked for; it needs no torch.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from hashlib import blake2b
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np
import yaml
from tqdm import tqdm

from ntkjax.data.batches import most_buckets, plan_batches
from ntkjax.data.buckets import round_up
from ntkjax.data.prompts import end_token
from ntkjax.errors import ConfigError, UserError
from ntkjax.evaluation.choices import token_scores
from ntkjax.evaluation.metrics import right_or_wrong
from ntkjax.evaluation.options import Batching, TaskOptions
from ntkjax.evaluation.significance import bootstrap_mean, paired_bootstrap, wilson_interval
from ntkjax.files import plain, read_json, read_json_lines, write_json, write_jsonl
from ntkjax.models.generate import generate
from ntkjax.types import Batch, Params, as_pytree_fn

BACKEND = "ntkjax"
"""The name under which lm-eval finds the backend."""
NEW_TOKENS = 256
"""Tokens that are generated where a task says no number, as in lm-eval's other backends."""


def harness() -> Any:
    """The package ``lm_eval``.

    Raises:
      UserError: it is not installed.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        import lm_eval  # pyright: ignore[reportMissingImports]
        import lm_eval.api.model  # pyright: ignore[reportMissingImports]
        import lm_eval.api.registry  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError(
            f"--tasks: lm-eval cannot be imported ({error}); expected the extra lm-eval; install it: "
            "pip install 'ntkjax[lm-eval]'"
        ) from error
    return lm_eval


# -- log-likelihoods --


def score(
    model: Any,
    params: Params,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    batching: Batching,
    max_buckets: int | None = None,
    progress: bool = False,
) -> list[tuple[float, bool]]:
    """log p(continuation | context) in nats, and whether greedy decoding gives the continuation, of token ids.

    The model reads the last ``batching.max_length`` tokens of context + continuation without its last token, as
    lm-eval's backend for transformers does. Batches are grouped by length; each length compiles once (``max_buckets``
    of them; None: 6 on a CPU, fewer where compilation takes long).

    Raises:
      UserError: an empty context or continuation, or a continuation longer than that.
    """
    max_length = batching.max_length
    for context, continuation in pairs:
        if not context or not 0 < len(continuation) <= max_length:
            raise UserError(
                f"lm-eval: a context of {len(context)} and a continuation of {len(continuation)} tokens; expected at "
                f"least one of both, and no more than --max-length {max_length} of the continuation; raise it"
            )
    rows = [([*context, *continuation][-(max_length + 1) :][:-1], continuation) for context, continuation in pairs]
    lengths = np.asarray([len(tokens) for tokens, _ in rows], np.int32)
    buckets = most_buckets(6) if max_buckets is None else max_buckets
    plan = plan_batches(lengths, np.arange(len(rows)), batching.token_budget, buckets) if rows else []
    scored: dict[int, int] = {}
    for planned in plan:
        most = max(len(rows[i][1]) for i in planned.indices)
        scored[planned.length] = max(scored.get(planned.length, 0), round_up(most, 8))
    states_fn, head_fn = as_pytree_fn(model.states_fn), as_pytree_fn(model.head_fn)
    answers: list[tuple[float, bool]] = [(0.0, False)] * len(rows)
    with tqdm(total=len(rows), desc="log-likelihoods", unit="text", disable=not progress) as bar:
        for planned in plan:
            batch, predictor, target = _collate(
                [rows[i] for i in planned.indices], planned.rows, planned.length, scored[planned.length]
            )
            logprobs, best = (np.asarray(x) for x in token_scores(states_fn, head_fn, params, batch, predictor, target))
            for r, i in enumerate(planned.indices):
                own = slice(0, len(rows[i][1]))
                answers[i] = (float(logprobs[r, own].astype(np.float64).sum()), bool(best[r, own].all()))
            bar.update(len(planned.indices))
    return answers


def _collate(
    rows: Sequence[tuple[Sequence[int], Sequence[int]]], size: int, length: int, scored: int
) -> tuple[Batch, np.ndarray, np.ndarray]:
    """A padded batch of ``size`` rows, and where its scored tokens are predicted and what they are, int32 [B, M]."""
    tokens, lengths = np.zeros((size, length), np.int32), np.ones(size, np.int32)
    predictor, target = np.zeros((size, scored), np.int32), np.zeros((size, scored), np.int32)
    index = np.full(size, -1, np.int32)
    index[: len(rows)] = np.arange(len(rows))
    for row, (read, continuation) in enumerate(rows):
        tokens[row, : len(read)], lengths[row] = read, len(read)
        count = len(continuation)
        predictor[row, :count], target[row, :count] = np.arange(len(read) - count, len(read)), continuation
    return Batch(tokens, np.zeros((size, length), bool), lengths, index), predictor, target


def rolling_windows(tokens: Sequence[int], prefix: int, max_length: int) -> list[tuple[list[int], list[int]]]:
    """(context, continuation) pairs in which every token of a text is predicted once, after as many as fit.

    The first window predicts up to ``max_length`` tokens after ``prefix``; each further one the next ones, after those
    that fill the window from the left; the last one is as full as the others. They are those of lm-eval's
    ``get_rolling_token_windows`` with one token of context, made disjoint by its ``make_disjoint_window``.
    """
    tokens = list(tokens)
    if not tokens:
        return []
    windows, done = [([prefix], tokens[:max_length])], min(len(tokens), max_length)
    while done < len(tokens):
        new = min(len(tokens) - done, max_length)
        stop = done + new
        # max_length tokens are read, of which the last is no longer: the context begins that far back.
        windows.append((tokens[stop - max_length - 1 : done], tokens[done:stop]))
        done = stop
    return windows


# -- generation --


@dataclasses.dataclass(frozen=True)
class Continuation:
    """How a task wants text continued: its generation arguments in our terms.

    Attributes:
      until: strings at the first of which the text is cut.
      new_tokens: longest continuation. temperature: 0 is greedy. top_p: see `ntkjax.models.generate.generate`.
    """

    until: tuple[str, ...] = ()
    new_tokens: int = NEW_TOKENS
    temperature: float = 0.0
    top_p: float = 1.0


_NEW_TOKENS_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


def read_arguments(arguments: Mapping[str, Any], end: str) -> Continuation:
    """A task's ``generation_kwargs``. ``end``: text of the end token, which always stops.

    Raises:
      UserError: an argument that is not supported, such as beams.
    """
    left = {key: value for key, value in arguments.items() if value is not None}
    until = left.pop("until", ())
    until = (until,) if isinstance(until, str) else tuple(until)
    numbers = [int(left.pop(name)) for name in _NEW_TOKENS_NAMES if name in left]
    temperature, top_p = float(left.pop("temperature", 0.0)), float(left.pop("top_p", 1.0))
    sampled = bool(left.pop("do_sample", temperature > 0))
    if left.get("num_beams") == 1:
        del left["num_beams"]
    if left:
        known = ("until", *_NEW_TOKENS_NAMES, "do_sample", "temperature", "top_p")
        raise UserError(
            f"lm-eval: the task asks for generation with {', '.join(f'{k}={v!r}' for k, v in left.items())}; expected "
            f"some of {', '.join(known)}; leave the others out of the task's file"
        )
    if sampled and temperature == 0:
        temperature = 1.0
    until = (*until, *((end,) if end and end not in until else ()))
    return Continuation(until, numbers[0] if numbers else NEW_TOKENS, temperature if sampled else 0.0, top_p)


def continuations(
    model: Any,
    params: Params,
    prompts: Sequence[Sequence[int]],
    wanted: Continuation,
    *,
    batching: Batching,
    seed: int = 0,
    progress: bool = False,
) -> list[str]:
    """The text after each prompt (token ids), cut at the first of ``wanted.until``, in the order given.

    Prompts lose tokens on the left so that they and what is generated fit ``batching.max_length``. Generation ends at
    the tokenizer's eos and the end tokens of config.json and generation_config.json, or after ``wanted.new_tokens``.

    Raises:
      UserError: no room for a prompt.
    """
    room, tokenizer = batching.max_length - wanted.new_tokens, model.tokenizer
    if room < 1:
        raise UserError(
            f"lm-eval: the task generates {wanted.new_tokens} tokens, and --max-length is {batching.max_length}; "
            "expected room for a prompt beside them; raise --max-length, or lower max_gen_toks of the task"
        )
    cut = [list(prompt)[-room:] for prompt in prompts]
    ends = {*model.config.eos_token_ids, *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])}
    order = sorted(range(len(cut)), key=lambda i: -len(cut[i]))
    rows = max(1, batching.token_budget // (wanted.new_tokens + max(map(len, cut), default=1)))
    texts = [""] * len(cut)
    with tqdm(total=len(cut), desc="generation", unit="text", disable=not progress) as bar:
        for start in range(0, len(order), rows):
            part = order[start : start + rows]
            key = jax.random.fold_in(jax.random.key(seed), start)
            new = generate(
                model, params, [cut[i] for i in part], max_new_tokens=wanted.new_tokens, key=key,
                temperature=wanted.temperature, top_p=wanted.top_p, stop_tokens=sorted(ends), batch_size=rows,
            )  # fmt: skip
            for i, tokens in zip(part, new, strict=True):
                texts[i] = until_first(tokenizer.decode(tokens, skip_special_tokens=True), wanted.until)
            bar.update(len(part))
    return texts


def until_first(text: str, stops: Sequence[str]) -> str:
    """``text`` up to the first of the stop strings; an empty one stops nothing."""
    places = [text.find(stop) for stop in stops if stop and stop in text]
    return text[: min(places)] if places else text


# -- the backend --


@dataclasses.dataclass(frozen=True)
class ModelArguments:
    """What lm-eval calls ``model_args`` of this backend.

    Attributes:
      pretrained: directory of a model to load, where none is given; adapter: PEFT directory on it; dtype: of its
        weights.
      max_length: longest sequence. token_budget: tokens in a batch.
      seed: of what is sampled. progress: whether there are progress bars.
    """

    pretrained: str | None = None
    adapter: str | None = None
    dtype: str = "float32"
    max_length: int = 2048
    token_budget: int = 8192
    seed: int = 0
    progress: bool = True

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> ModelArguments:
        """``given`` without what lm-eval adds, which has no use here: batches hold ``token_budget`` tokens, and JAX
        says where they run. ConfigError for a name that there is not."""
        known = [field.name for field in dataclasses.fields(cls)]
        if unknown := sorted(given.keys() - {*known, *_NOT_USED}):
            raise ConfigError(f"lm-eval: unknown model argument {unknown[0]!r}; expected some of {', '.join(known)}")
        return cls(**{name: value for name, value in given.items() if name in known})


_NOT_USED = ("batch_size", "max_batch_size", "device")


class Answers:
    """A `LanguageModel` behind lm-eval's interface: `backend` joins it with lm-eval's ``TemplateLM``.

    Attributes:
      model, params, tokenizer: what answers. batching: longest sequence, and tokens in a batch.
      cut: contexts and prompts that lost tokens on the left until now.
    """

    backend = "causal"
    cache_hook: Any

    def __init__(self, model: Any = None, params: Any = None, **arguments: Any) -> None:
        """Of a loaded ``model`` with ``params`` over its weights, or of the one that `ModelArguments` name.

        Raises:
          ConfigError: both a model and a directory, or neither; an argument that there is not.
        """
        super().__init__()
        asked = ModelArguments.of(arguments)
        if (model is None) == (asked.pretrained is None):
            raise ConfigError("expected either a model or pretrained, a directory; give one of them")
        self.model = _loaded(str(asked.pretrained), asked.adapter, asked.dtype) if model is None else model
        self.params, self.tokenizer = params or {}, self.model.tokenizer
        limit = self.model.config.position_limit
        longest = asked.max_length if limit is None else min(asked.max_length, limit)
        self.batching, self.seed, self.progress = Batching(longest, asked.token_budget), asked.seed, asked.progress
        self.cut = 0  # contexts and prompts that lost tokens on the left

    @property
    def max_length(self) -> int:
        """Longest sequence, which lm-eval writes into its results."""
        return self.batching.max_length

    @property
    def eot_token_id(self) -> int:
        """The tokenizer's eos, or the token that ends a response where it has none."""
        eos = self.tokenizer.eos_token_id
        return end_token(self.tokenizer) if eos is None else eos

    @property
    def prefix_token_id(self) -> int:
        """What stands before an empty context: bos, or eos where there is none."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        """The tokenizer's name, by which lm-eval keeps requests apart."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids; with the tokenizer's own special tokens unless the text begins with one, or as told."""
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self.tokenizer.decode(self.prefix_token_id))
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation as the tokenizer's chat template writes it."""
        return self.tokenizer.apply_chat_template(
            chat_history, tokenize=False, add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )  # fmt: skip

    def loglikelihood(self, requests: list, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """log p(continuation | context) of each request, and whether it is the greedy continuation."""
        theirs = super().loglikelihood  # pyright: ignore[reportAttributeAccessIssue]
        return theirs(requests, disable_tqdm=disable_tqdm or not self.progress)

    def _score(self, pairs: list[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        self.cut += sum(len(a) + len(b) > self.batching.max_length + 1 for a, b in pairs)
        return score(self.model, self.params, pairs, batching=self.batching, progress=self.progress)

    def _loglikelihood_tokens(self, requests: list, **kwargs: Any) -> list[tuple[float, bool]]:
        answers = self._score([(context, continuation) for _, context, continuation in requests])
        for (texts, _, _), answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of each whole text, from that of its windows."""
        texts = [request.args[0] for request in requests]
        longest = self.batching.max_length
        windows = [rolling_windows(self.tok_encode(t), self.prefix_token_id, longest) for t in texts]
        scores = iter(self._score([window for own in windows for window in own]))
        totals = [sum(next(scores)[0] for _ in own) for own in windows]
        for text, total in zip(texts, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
        return totals

    def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
        """What follows each context, up to the task's stop strings."""
        end = self.tokenizer.decode(self.eot_token_id, skip_special_tokens=False)
        wanted = [read_arguments(request.args[1], end) for request in requests]
        prompts = [self.tok_encode(request.args[0]) for request in requests]
        texts = [""] * len(requests)
        for kind in dict.fromkeys(wanted):
            own = [i for i, other in enumerate(wanted) if other == kind]
            self.cut += sum(len(prompts[i]) > self.batching.max_length - kind.new_tokens for i in own)
            generated = continuations(
                self.model, self.params, [prompts[i] for i in own], kind, batching=self.batching, seed=self.seed,
                progress=self.progress,
            )  # fmt: skip
            for i, text in zip(own, generated, strict=True):
                texts[i] = text
                self.cache_hook.add_partial("generate_until", requests[i].args, text)
        return texts


@functools.cache
def backend() -> type:
    """The class that lm-eval knows as ``ntkjax``: `Answers` under its ``TemplateLM``, registered by the first call.

    ``backend()(model, params={}, max_length=2048, token_budget=8192)`` wraps a loaded `LanguageModel`;
    ``simple_evaluate(model="ntkjax", model_args={"pretrained": DIR, "adapter": ...})`` loads one.

    Raises:
      UserError: lm-eval is not installed.
    """
    package = harness()
    cls = type("NtkjaxLM", (Answers, package.api.model.TemplateLM), {"__doc__": Answers.__doc__})
    return package.api.registry.register_model(BACKEND)(cls)


def _loaded(directory: str, adapter: str | None, dtype: str) -> Any:
    from ntkjax.models import adapter_lora_config, load_adapter, load_lm

    model = load_lm(directory, lora=None if adapter is None else adapter_lora_config(adapter), dtype=dtype)
    return model if adapter is None else model.with_params(load_adapter(adapter, model))


# -- tasks --


@dataclasses.dataclass(frozen=True)
class TaskResult:
    """What lm-eval found for one task.

    Attributes:
      task: its name, or that of a group of tasks. n: its samples; 0 for a group.
      values: ``METRIC,FILTER`` -> lm-eval's own number.
      samples: one dict a sample and filter: ``id``, ``filter``, ``target``, ``prediction``, ``document`` (its hash) and
        ``metrics``: metric -> its value, where that is a number.
    """

    task: str
    n: int
    values: dict[str, float]
    samples: list[dict[str, Any]]

    def table(self, metric: str) -> np.ndarray | None:
        """The samples' values of ``METRIC,FILTER``, float64 [n]; None where not every sample has a number."""
        sampled = [sample["metrics"].get(metric.split(",")[0]) for sample in self._of(metric)]
        return None if not sampled or None in sampled else np.asarray(sampled, np.float64)

    def ids(self, metric: str) -> list[str]:
        """Document and hash of the samples of ``METRIC,FILTER``."""
        return [f"{sample['id']} {sample['document']}" for sample in self._of(metric)]

    def _of(self, metric: str) -> list[dict[str, Any]]:
        name = metric.partition(",")[2]
        return [sample for sample in self.samples if sample["filter"] == name]

    def summary(self, *, level: float = 0.95, seed: int = 0) -> dict[str, Any]:
        """``n`` and, by ``METRIC,FILTER``, lm-eval's ``value`` with the ``interval`` of its mean over samples: Wilson's
        where they are right or wrong, else BCa; None where lm-eval's number is no mean of samples, a perplexity say."""
        metrics: dict[str, Any] = {}
        for name, value in self.values.items():
            table, interval = self.table(name), None
            if table is not None and np.isclose(table.mean(), value, rtol=1e-6, atol=1e-9):
                whole = right_or_wrong(table)
                bounds = wilson_interval(int(table.sum()), table.size, level=level) if whole else bootstrap_mean(
                    table, level=level, seed=seed
                )  # fmt: skip
                interval = [bounds.low, bounds.high]
            metrics[name] = {"value": value, "interval": interval}
        return {"n": self.n, "level": level, "metrics": metrics}


@dataclasses.dataclass(frozen=True)
class Tasks:
    """lm-eval's tasks and groups as it has loaded them, and its manager of them."""

    manager: Any
    tasks: list


def run_tasks(
    model: Any,
    params: Params,
    tasks: Tasks,
    options: TaskOptions,
    *,
    batching: Batching,
    seed: int = 0,
    progress: bool = True,
) -> tuple[list[TaskResult], dict[str, int]]:
    """Run ``tasks`` (see `load_tasks`) on ``model``; the results of tasks and groups, and counts: ``cut`` contexts.

    Raises:
      UserError: lm-eval is not installed; a task wants what the backend does not offer.
    """
    cls = backend()
    from lm_eval.evaluator import simple_evaluate  # pyright: ignore[reportMissingImports]

    lengths = {"max_length": batching.max_length, "token_budget": batching.token_budget}
    lm = cls(model, params, **lengths, seed=seed, progress=progress)
    output = simple_evaluate(
        model=lm, tasks=tasks.tasks, task_manager=tasks.manager, num_fewshot=options.task_shots,
        limit=options.task_limit, apply_chat_template=options.task_chat_template,
        fewshot_as_multiturn=options.task_chat_template, bootstrap_iters=0, log_samples=True,
    )  # fmt: skip
    assert output is not None
    results = [
        TaskResult(
            task=name,
            n=int(output["n-samples"].get(name, {}).get("effective", 0)),
            values=_values(result),
            samples=[_sample(sample) for sample in output["samples"].get(name, ())],
        )
        for name, result in output["results"].items()
    ]
    return [result for result in results if result.values], {"cut": lm.cut}


def task_digests(names: Sequence[str]) -> dict[str, str]:
    """What decides the results of tasks besides the model: lm-eval's version, and digests of tasks that are files, of
    the files that these include, and of the data files on this machine that they name.

    Raises:
      UserError: lm-eval is not installed, or a file is not there.
    """
    harness()
    digests = {"lm-eval": metadata.version("lm_eval")}
    for name in names:
        if name.endswith((".yaml", ".yml")):
            for path in _files_of(Path(name)):
                digests[str(path)] = blake2b(path.read_bytes(), digest_size=8).hexdigest()
    return digests


def _files_of(task: Path) -> Iterator[Path]:
    """The YAML file of a task, the one it includes, and the data files that it names and that are on this machine."""
    if not task.is_file():
        raise UserError(f"--tasks: {task}: no such file; expected a YAML file of a task; correct the path")
    yield task
    try:
        content = yaml.load(task.read_text(encoding="utf-8"), _TaskYaml)  # of safe_load's tags, and `!function` as None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--tasks: {task}: no YAML of a task ({str(error).splitlines()[0]}); mend it") from error
    content = content if isinstance(content, dict) else {}
    if isinstance(content.get("include"), str):
        yield from _files_of(task.parent / content["include"])
    named = (content.get("dataset_kwargs") or {}).get("data_files")
    for name in jax.tree.leaves(named):
        if isinstance(name, str):
            where = Path(Path(name).anchor)  # a pattern, from the root or the working directory
            yield from sorted(path for path in where.glob(str(Path(name).relative_to(where))) if path.is_file())


class _TaskYaml(yaml.SafeLoader):
    """YAML with lm-eval's own tags, whose values are left out."""


_TaskYaml.add_multi_constructor("!", lambda loader, suffix, node: None)


def load_tasks(options: TaskOptions) -> Tasks:
    """The tasks of ``options``, loaded one by one with their data.

    Raises:
      UserError: lm-eval is not installed; a task that it does not know, whose data cannot be had, or that is not of
        text alone: the message names it.
    """
    harness()
    from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

    names = options.names
    # lm-eval's own list of thousands of files is read only where a name asks for it.
    manager = TaskManager(include_defaults=not all(name.endswith((".yaml", ".yml")) for name in names))
    loaded: list = []
    for name in names:
        try:
            content = manager.load(name)
        except Exception as error:  # whatever its data set's loader raises: nothing was computed yet
            raise UserError(
                f"--tasks: {name}: lm-eval cannot load it ({type(error).__name__}: {error}); expected the name of a "
                "task or a YAML file of one, with data that can be read here; see `lm_eval ls tasks`"
            ) from error
        for task_name, task in content["tasks"].items():
            if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
                raise UserError(
                    f"--tasks: {task_name} runs code that the model writes, or reads images; expected a task of text "
                    "alone; leave it out, or run it with lm_eval"
                )
        groups = [*content.get("groups", {}).values()]
        loaded += groups[:1] or [*content["tasks"].values()]  # the first group holds the others
    return Tasks(manager, loaded)


def _values(result: Mapping[str, Any]) -> dict[str, float]:
    number = lambda value: isinstance(value, int | float) and not isinstance(value, bool)
    return {
        key: float(value) for key, value in result.items() if "," in key and "_stderr," not in key and number(value)
    }


def _sample(sample: Mapping[str, Any]) -> dict[str, Any]:
    value = lambda x: float(x) if isinstance(x, int | float | np.number | np.bool_) else None
    metrics = {name: value(sample[name]) for name in sample.get("metrics", []) if name in sample}
    return {
        "id": str(sample["doc_id"]),
        "document": str(sample["doc_hash"])[:16],
        "filter": sample.get("filter", "none"),
        "target": str(sample["target"]),
        "prediction": _plain(sample["filtered_resps"]),
        "metrics": {name: number for name, number in metrics.items() if number is not None},
    }


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return value if isinstance(value, str | int | float | bool) or value is None else str(value)


def write_results(folder: Path, results: Sequence[TaskResult], counts: Mapping[str, int]) -> None:
    """FOLDER/TASK.jsonl, one line a sample, and then FOLDER/results.json, whose presence says that all are there."""
    content, folder = [], Path(folder)
    for number, result in enumerate(results):
        name = f"{number:03d}-{re.sub(r'[^A-Za-z0-9._-]+', '_', result.task)}.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        write_jsonl(folder / name, map(plain, result.samples))
        content.append({"task": result.task, "n": result.n, "values": result.values, "samples": name})
    write_json(folder / "results.json", plain({"counts": dict(counts), "tasks": content}))


def read_results(folder: Path) -> tuple[list[TaskResult], dict[str, int]]:
    """What `write_results` wrote.

    Raises:
      UserError: no such folder, or a damaged file.
    """
    again = "run the tasks again with evaluate --tasks"
    content = read_json(Path(folder) / "results.json", remedy=again)
    results = []
    for entry in content["tasks"]:
        path = Path(folder) / entry["samples"]
        if not path.is_file():
            raise UserError(f"{path}: not found; expected the samples of {entry['task']}; {again}")
        samples = read_json_lines(path)
        values = {name: float(value) for name, value in entry["values"].items()}
        results.append(TaskResult(entry["task"], entry["n"], values, samples))
    return results, content["counts"]


def compare_tasks(
    first: Sequence[TaskResult], second: Sequence[TaskResult], *, level: float = 0.95, seed: int = 0
) -> list[dict[str, Any]]:
    """Two runs of the same tasks, paired by sample: ``task``, ``metric``, ``n``, both means, and the BCa interval of
    second - first, for every metric that is a number of each sample.

    Raises:
      UserError: a task with other samples in the two runs.
    """
    before, rows = {result.task: result for result in first}, []
    for result in second:
        other = before.get(result.task)
        for metric in result.values if other is not None else ():
            assert other is not None
            a, b = other.table(metric), result.table(metric)
            if a is None or b is None:
                continue
            if other.ids(metric) != result.ids(metric):
                raise UserError(
                    f"task {result.task}: the runs cannot be paired, their samples differ ({a.size} against {b.size}, "
                    "or other documents); expected the same data and --task-limit; run both anew"
                )
            difference = paired_bootstrap(a, b, level=level, seed=seed)
            rows.append(
                {"task": result.task, "metric": metric, "n": int(a.size), "first": float(a.mean()),
                 "second": float(b.mean()), "difference": difference.as_dict()}
            )  # fmt: skip
    return rows
