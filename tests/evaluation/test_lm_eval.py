"""lm-eval's questions: log-likelihoods token by token, windows by hand, its tasks end to end, and its torch backend.

What needs lm-eval itself is skipped where it is not installed (requirements/lm-eval.txt); `make test-torch` has it.
"""

from __future__ import annotations

import importlib.util
import json
import sys

import jax
import numpy as np
import pytest

import ntkjax
from ntkjax.assets import tiny_lm_path
from ntkjax.commands.evaluate import COMMAND, EvaluateConfig
from ntkjax.errors import ConfigError, UserError
from ntkjax.evaluation import lm_eval
from ntkjax.evaluation.lm_eval import (
    Continuation,
    ModelArguments,
    TaskResult,
    compare_tasks,
    rolling_windows,
    score,
    task_digests,
)
from ntkjax.evaluation.options import Batching, TaskOptions
from ntkjax.models import LoraConfig, generate, load_lm, save_adapter
from ntkjax.pipeline.options import ModelOptions

TINY = str(tiny_lm_path())
has = lambda name: importlib.util.find_spec(name) is not None
needs_harness = pytest.mark.skipif(not has("lm_eval"), reason="lm-eval is not installed")

LOCAL = """
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
"""
CHOICES = (
    LOCAL
    + """task: local_choices
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: answer
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}},
              {{metric: acc_norm, aggregation: mean, higher_is_better: true}}]
"""
)
TEXTS = (
    LOCAL
    + """task: local_texts
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{question}}}} {{{{question}}}} {{{{question}}}}"
metric_list: [{{metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}}]
"""
)
ANSWERS = (
    LOCAL
    + """task: local_answers
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[answer]}}}}"
generation_kwargs: {{until: ["\\n", "."], max_gen_toks: 8, do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""
)


@pytest.fixture(scope="module")
def model():
    return load_lm(TINY)


@pytest.fixture
def tasks(tmp_path):
    """Three YAML files of tasks on one local file of five questions."""
    rows = [
        {"question": f"What is {a} plus {b}?", "choices": [f" {a + b}", " 1", " more than that"], "answer": k % 2}
        for k, (a, b) in enumerate([(1, 2), (3, 4), (2, 2), (5, 9), (12, 3)])
    ]
    data = tmp_path / "questions.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in (("choices", CHOICES), ("texts", TEXTS), ("answers", ANSWERS)):
        (tmp_path / f"{name}.yaml").write_text(text.format(data=data))
    return {name: str(tmp_path / f"{name}.yaml") for name in ("choices", "texts", "answers")}


def by_hand(model, context, continuation, longest):
    """(log-likelihood, greedy) from the logits of one row alone."""
    read = [*context, *continuation][-(longest + 1) :]
    logits = np.asarray(model.logits([read[:-1]]), np.float64)[0, -len(continuation) :]
    found = logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
    found -= logits.max(-1, keepdims=True)
    picked = found[np.arange(len(continuation)), continuation]
    return picked.sum(), bool((logits.argmax(-1) == continuation).all())


def test_log_likelihoods_are_those_of_each_row_alone_and_cut_from_the_left(model):
    rng = np.random.default_rng(0)
    draw = lambda n: rng.integers(5, 800, n).tolist()
    greedy = generate(model, {}, [[7, 9, 11]], max_new_tokens=3, stop_tokens=[])[0]
    pairs = [(draw(3), draw(2)), ([7, 9, 11], greedy), ([7, 9, 11], [*greedy[:2], greedy[2] ^ 1]), (draw(14), draw(4))]
    found = score(model, {}, pairs, batching=Batching(12, 48), max_buckets=1)
    expected = [by_hand(model, *pair, 12) for pair in pairs]
    np.testing.assert_allclose([a for a, _ in found], [a for a, _ in expected], rtol=1e-5)
    assert [b for _, b in found] == [b for _, b in expected] == [False, True, False, False]
    # The order and the batches change nothing.
    again = score(model, {}, pairs[::-1], batching=Batching(12, 48), max_buckets=1)[::-1]
    np.testing.assert_allclose([a for a, _ in again], [a for a, _ in found], rtol=1e-5)
    for bad in (([], [1]), ([1], []), ([1], [1] * 13)):
        with pytest.raises(UserError, match="expected at least one of both"):
            score(model, {}, [bad], batching=Batching(12, 48))


def test_windows_predict_every_token_once_after_as_many_as_fit():
    # The example of lm-eval's own documentation, with the contexts that do not overlap.
    assert rolling_windows(range(10), -1, 4) == [
        ([-1], [0, 1, 2, 3]),
        ([3], [4, 5, 6, 7]),
        ([5, 6, 7], [8, 9]),
    ]
    assert rolling_windows([5], -1, 4) == [([-1], [5])]
    assert rolling_windows([], -1, 4) == []


@needs_harness
@pytest.mark.parametrize("length", [1, 2, 3, 7])
@pytest.mark.parametrize("size", [0, 1, 2, 3, 7, 8, 15])
def test_windows_are_those_of_lm_eval(length, size):
    from lm_eval import utils

    theirs = utils.get_rolling_token_windows(list(range(size)), -1, length, 1)
    assert rolling_windows(range(size), -1, length) == [utils.make_disjoint_window(pair) for pair in theirs]


def test_generation_arguments_are_read_or_refused():
    read = lm_eval.read_arguments
    assert read({"until": "\n", "max_gen_toks": 5}, "<end>") == Continuation(("\n", "<end>"), 5)
    assert read({"do_sample": False, "temperature": 0.7}, "") == Continuation()
    assert read({"do_sample": True}, "").temperature == 1.0
    assert read({"temperature": 0.5, "top_p": 0.9}, "") == Continuation((), 256, 0.5, 0.9)
    with pytest.raises(UserError, match="generation with num_beams=4; expected some of until"):
        read({"num_beams": 4}, "")
    assert lm_eval.until_first("a, b. c", [".", ",", ""]) == "a"
    assert lm_eval.until_first("a", ["."]) == "a"


def test_continuations_are_those_of_generate_in_the_order_of_the_prompts(model):
    encode = lambda text: model.tokenizer.encode(text)
    prompts = [encode("What is 3 plus 4?"), encode("What is 1?"), encode("What is 3 plus 4?")]
    wanted = Continuation(("zzz",), new_tokens=4)
    found = lm_eval.continuations(model, {}, prompts, wanted, batching=Batching(64, 64))
    new = generate(model, {}, prompts, max_new_tokens=4)
    assert found == [model.tokenizer.decode(tokens, skip_special_tokens=True) for tokens in new]
    assert found[0] == found[2]
    with pytest.raises(UserError, match="generates 64 tokens, and --max-length is 64"):
        lm_eval.continuations(model, {}, prompts, Continuation(new_tokens=64), batching=Batching(64, 64))


def result(values, task="t"):
    samples = [
        {"id": str(i), "document": f"d{i}", "filter": "none", "target": "x", "prediction": ["y"], "metrics": {"acc": v}}
        for i, v in enumerate(values)
    ]
    return TaskResult(task, len(values), {"acc,none": float(np.mean(values)), "perplexity,none": 3.5}, samples)


def test_intervals_are_paired_by_sample(tmp_path):
    first, second = result([0.0, 1.0, 0.0, 1.0]), result([1.0, 1.0, 0.0, 1.0])
    (row,) = compare_tasks([first], [second])
    assert (row["task"], row["metric"], row["n"], row["first"], row["second"]) == ("t", "acc,none", 4, 0.5, 0.75)
    assert row["difference"]["estimate"] == 0.25 and row["difference"]["low"] >= 0
    summary = first.summary()["metrics"]
    assert summary["acc,none"]["interval"] == pytest.approx([0.15, 0.85], abs=0.01)  # Wilson's, 2 of 4
    assert summary["perplexity,none"] == {"value": 3.5, "interval": None}
    with pytest.raises(UserError, match="task t: the runs cannot be paired"):
        compare_tasks([first], [result([1.0, 1.0])])
    assert compare_tasks([first], [result([1.0], task="other")]) == []
    lm_eval.write_results(tmp_path / "tasks", [first, second], {"cut": 2})
    assert lm_eval.read_results(tmp_path / "tasks") == ([first, second], {"cut": 2})
    (tmp_path / "tasks" / "001-t.jsonl").unlink()
    with pytest.raises(UserError, match="not found; expected the samples of t; run the tasks again"):
        lm_eval.read_results(tmp_path / "tasks")


def test_options(monkeypatch):
    assert TaskOptions(("a,b", "c.yaml", "a")).names == ("a", "b", "c.yaml")
    with pytest.raises(ConfigError, match="--task-limit is 0; expected 1 or more"):
        TaskOptions(("a",), task_limit=0)
    with pytest.raises(ConfigError, match="neither --test nor --tasks"):
        EvaluateConfig(ModelOptions(TINY), "out")
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match=r"pip install 'ntkjax\[lm-eval\]'"):
        ntkjax.evaluate(model=TINY, tasks="arc_easy", out="out")


@needs_harness
def test_a_task_that_cannot_be_loaded_leaves_no_directory(tmp_path):
    out = tmp_path / "run"
    with pytest.raises(UserError, match=r"nowhere\.yaml: no such file"):
        ntkjax.evaluate(model=TINY, tasks=str(tmp_path / "nowhere.yaml"), out=out, progress=False)
    (tmp_path / "bad.yaml").write_text("task: bad\ndataset_path: json\ndataset_kwargs: {data_files: no.jsonl}\n")
    with pytest.raises(UserError, match=r"bad\.yaml: lm-eval cannot load it"):
        ntkjax.evaluate(model=TINY, tasks=str(tmp_path / "bad.yaml"), out=out, progress=False)
    assert not out.exists()


@needs_harness
def test_tasks_run_are_stored_and_compared(tasks, tmp_path, monkeypatch):
    options = {"model": TINY, "tasks": (tasks["choices"],), "task_limit": 4, "max_length": 64, "progress": False}
    first = ntkjax.evaluate(out=tmp_path / "one", **options)
    (task,) = first.tasks
    lines = (tmp_path / "one" / "tasks" / "000-local_choices.jsonl").read_text().splitlines()
    assert task.task == "local_choices" and task.n == len(lines) == 4
    assert task.values["acc,none"] == np.mean([json.loads(line)["metrics"]["acc"] for line in lines])
    stored = json.loads((tmp_path / "one" / "evaluation.json").read_text())
    assert stored["tasks"]["cut"] == 0
    assert stored["tasks"]["results"]["local_choices"]["metrics"]["acc,none"]["value"] == task.values["acc,none"]
    # The same command reads back, the same model has no difference, and another number of samples is no pair.
    monkeypatch.setattr(lm_eval, "score", None)
    assert ntkjax.evaluate(out=tmp_path / "one", **options).tasks == first.tasks
    monkeypatch.undo()
    config = EvaluateConfig(
        ModelOptions(TINY), str(tmp_path / "two"), against=str(tmp_path / "one"),
        harness=TaskOptions((tasks["choices"],), task_limit=4),
    )  # fmt: skip
    second = COMMAND.run(config, progress=False)
    assert {row["metric"]: row["difference"]["estimate"] for row in second.tasks_against} == {
        "acc,none": 0,
        "acc_norm,none": 0,
    }
    said = COMMAND.describe(config, second)
    assert "local_choices, acc_norm" in said and f"minus {tmp_path / 'one'}" in said and "4 samples" in said


@needs_harness
@pytest.mark.skipif(not (has("torch") and has("accelerate")), reason="torch and accelerate are not installed")
@pytest.mark.parametrize("chat", [False, True])
def test_every_number_is_that_of_lm_evals_torch_backend(model, tasks, chat, tmp_path):
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    longest = 48 if chat else 24  # so that three shots are cut, and the texts have windows
    options = TaskOptions(tuple(tasks.values()), task_shots=None if chat else 3, task_chat_template=chat)
    params, adapter = {}, {}
    if chat:
        pytest.importorskip("peft")
        model = load_lm(TINY, lora=LoraConfig(rank=4, alpha=8.0))
        rng = np.random.default_rng(0)
        params = jax.tree.map(lambda leaf: (0.1 * rng.standard_normal(leaf.shape)).astype(leaf.dtype), model.lora)
        save_adapter(tmp_path / "adapter", model, params)
        adapter = {"peft": str(tmp_path / "adapter")}
    results, counts = lm_eval.run_tasks(
        model, params, lm_eval.load_tasks(options), options, batching=Batching(longest, 512), progress=False
    )
    assert (counts["cut"] > 0) is not chat
    loaded = lm_eval.load_tasks(options)
    torch_model = HFLM(pretrained=TINY, dtype="float32", device="cpu", batch_size=2, max_length=longest, **adapter)
    theirs = simple_evaluate(
        model=torch_model, tasks=loaded.tasks, task_manager=loaded.manager, num_fewshot=options.task_shots,
        apply_chat_template=chat, fewshot_as_multiturn=chat, bootstrap_iters=0,
    )  # fmt: skip
    for ours in results:
        for metric, value in ours.values.items():
            np.testing.assert_allclose(value, theirs["results"][ours.task][metric], rtol=1e-4)
        for mine, sample in zip(ours.samples, theirs["samples"][ours.task], strict=True):
            mine, other = mine["prediction"], lm_eval._plain(sample["filtered_resps"])
            if ours.task == "local_answers":
                assert mine == other
            else:
                np.testing.assert_allclose(
                    np.ravel(mine).astype(float), np.ravel(other).astype(float), atol=1e-4, rtol=1e-6
                )
    assert {ours.task for ours in results} == {"local_choices", "local_texts", "local_answers"}


@needs_harness
def test_lm_eval_finds_the_backend_by_its_name():
    from lm_eval.api.registry import get_model

    assert lm_eval.backend() is get_model("ntkjax")
    lm = get_model("ntkjax").create_from_arg_string(f"pretrained={TINY},max_length=32", {"batch_size": 1})
    assert lm.max_length == 32 and lm.eot_token_id == lm.tokenizer.eos_token_id
    assert lm.apply_chat_template([{"role": "user", "content": "Hi"}]).count("Hi") == 1
    with pytest.raises(ConfigError, match="either a model or pretrained"):
        lm_eval.backend()()
    assert isinstance(jax.tree.leaves(lm.model.params)[0], jax.Array)


def test_model_arguments_are_refused_by_name():
    given = {"pretrained": TINY, "max_length": 32, "batch_size": 1, "device": None}
    assert ModelArguments.of(given) == ModelArguments(pretrained=TINY, max_length=32)
    with pytest.raises(ConfigError, match=r"unknown model argument 'lenght'; expected some of pretrained, adapter, "):
        ModelArguments.of(given | {"lenght": 3})


@needs_harness
def test_a_task_is_its_file_what_it_includes_and_its_data(tmp_path):
    (tmp_path / "data-1.jsonl").write_text("1")
    (tmp_path / "common.yaml").write_text(f"dataset_kwargs: {{data_files: {{test: {tmp_path}/data-*.jsonl}}}}")
    task = tmp_path / "task.yaml"
    task.write_text("task: t\ninclude: common.yaml\ndoc_to_text: !function utils.text\n")
    first = task_digests((str(task),))
    assert len(first) == 4 and task_digests((str(task),)) == first
    for name, text in (("data-1.jsonl", "2"), ("common.yaml", "{}"), ("task.yaml", "task: u")):
        before = task_digests((str(task),))
        (tmp_path / name).write_text(text)
        assert task_digests((str(task),)) != before
    task.write_text("a: [")
    with pytest.raises(UserError, match=r"task\.yaml: no YAML of a task"):
        task_digests((str(task),))
