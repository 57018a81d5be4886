"""experiments/08_throughput.py without its peers: the workers' protocol, the ratios' arithmetic, our own worker."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
PEERS = ROOT / "experiments" / "peers"

FAKE = """
import sys
sys.path.insert(0, {peers!r})
import numpy as np
from worker_protocol import Job, serve

def make(task, variant):
    print("libraries print this")
    if variant == "broken":
        raise RuntimeError("no such variant here")
    def run():
        if variant == "fails":
            raise ValueError("out of luck")
        if variant == "dies":
            sys.exit(3)
        if variant == "sleeps":
            import time; time.sleep(60)
        print("and this")
    kernel = np.eye(2) * (1.1 if variant == "differs" else 1.0)
    check = lambda path: np.savez(path, kind="sum_logits", exact=kernel, loss=np.eye(2))
    return Job(run, task["rows"], check, "a note")

serve(make, ["numpy"])
"""


@pytest.fixture(scope="module")
def script(load_file) -> ModuleType:
    return load_file(ROOT / "experiments" / "08_throughput.py")


@pytest.fixture(scope="module")
def report(script) -> ModuleType:
    return script.report


@pytest.fixture
def start(script, tmp_path):
    """A fake worker of a variant; all are ended."""
    (tmp_path / "task.json").write_text(json.dumps({"rows": 7}))
    (tmp_path / "fake.py").write_text(FAKE.format(peers=str(PEERS)))
    begun = []

    def begin(variant: str):
        command = [sys.executable, str(tmp_path / "fake.py"), str(tmp_path / "task.json"), variant]
        begun.append(script.Worker(command, log=tmp_path / "logs" / f"{variant}.log"))
        return begun[-1]

    yield begin
    for worker in begun:
        worker.close()


def test_a_worker_answers_and_what_libraries_print_is_no_answer(start, tmp_path):
    worker = start("works")
    ready = worker.ready(60)
    assert ready["note"] == "a note" and ready["versions"]["numpy"] == np.__version__
    for _ in range(2):
        answer = worker.ask("run")
        assert answer["rows"] == 7 and 0 <= answer["seconds"] < 60 and 0 <= answer["cpu"] < 60
    worker.ask("check", out=str(tmp_path / "evidence.npz"))
    with np.load(tmp_path / "evidence.npz") as evidence:
        np.testing.assert_array_equal(evidence["exact"], np.eye(2))
    assert 1e6 < worker.ask("memory")["peak"] < 1e12  # bytes
    worker.close()
    assert worker._process.returncode == 0
    assert "libraries print this\nand this" in (tmp_path / "logs" / "works.log").read_text()


@pytest.mark.parametrize(
    ("variant", "ask", "words"),
    [
        ("broken", None, "no such variant here"),
        ("fails", "run", "out of luck"),
        ("dies", "run", "exit code 3"),
        ("works", "dance", "unknown request"),
    ],
)
def test_a_failure_is_told_in_its_own_words(start, script, variant, ask, words):
    worker = start(variant)
    with pytest.raises(script.WorkerError, match=words):
        worker.ready(60)
        worker.ask(ask)


def test_a_worker_that_does_not_answer_is_ended(start, script):
    worker = start("sleeps")
    worker.ready(60)
    with pytest.raises(script.WorkerError, match="no answer within 0 s"):
        worker.ask("run", timeout=0.2)
    assert worker._process.poll() is not None


def test_a_field_goes_on_without_what_fails(script, start, tmp_path):
    field = script.Field()
    python, fake, task = sys.executable, str(tmp_path / "fake.py"), str(tmp_path / "task.json")
    start("works").close()  # writes the script
    chosen = {name: [python, fake, task, name] for name in ("works", "broken", "fails")}
    chosen["absent"] = [str(tmp_path / "no-such-python"), fake]
    try:
        field.start(chosen, {}, tmp_path / "logs")
        assert set(field.workers) == {"works", "fails"} and set(field.failed) == {"broken", "absent"}
        assert "make peers" in field.failed["absent"]
        assert script.rounds(field, script.Throughput(rounds=3), 0.0) in (1, 3)
        assert set(field.workers) == {"works"} and "out of luck" in field.failed["fails"]
        assert len(field.seconds["works"]) >= 1 and "fails" not in field.seconds
    finally:
        field.close()


def test_the_whole_script_with_fake_workers(script, start, tmp_path, monkeypatch, capsys):
    """From the task to results, where one peer computes something else and one cannot start."""
    start("works").close()
    task = {"threads": 1, "devices": 1, "model": "some/model", "parameters": 1, "length": 8, "padding": 0.0, "size": 2,
            "rows": 7}  # fmt: skip
    variants = {
        "ntkjax scores": "works",
        "torch scores": "works",
        "trak features": "differs",
        "bergson dense": "broken",
    }
    fake = [sys.executable, str(tmp_path / "fake.py"), str(tmp_path / "task.json")]
    monkeypatch.setattr(script, "prepare", lambda config, folder: folder.mkdir(parents=True) or task)
    monkeypatch.setattr(script, "commands", lambda *_: {name: [*fake, kind] for name, kind in variants.items()})
    script.main(script.Throughput(rounds=2, run=tmp_path / "run", results=tmp_path / "results"))
    found = json.loads((tmp_path / "results" / "embedded" / "bench.json").read_text())
    assert set(found) == {"scores_over_best_peer"} and found["scores_over_best_peer"]["against"] == "torch scores"
    page = (tmp_path / "results" / "embedded" / "results.md").read_text()
    assert "differ from ours by 1.00e-01" in page and "no such variant here" in page
    assert "2 interleaved rounds" in page and capsys.readouterr().out.count("examples/s") == 4


RATES = {
    "ntkjax scores": [100.0, 300.0, 120.0],
    "ntkjax features-rademacher": [4.0, 4.0, 4.0],
    "ntkjax features-sparse": [16.0, 8.0, 12.0],
    "torch scores": [1.0, 2.0, 0.5],
    "trak features": [9.0, 0.1, 0.2],  # fastest once, not in the median
    "torch gradients": [10.0, 10.0, 10.0],
}


def test_ratios_are_taken_within_a_round_against_the_fastest_by_median(report):
    found = report.ratios(RATES, dense=("torch scores", "trak features"), gradients=("torch gradients", "absent"))
    expect = {"median": 150.0, "low": 100.0, "high": 240.0, "against": "torch scores"}
    assert found["scores_over_best_peer"] == expect
    assert found["scores_over_peer_gradients"] == {
        "median": 12.0,
        "low": 10.0,
        "high": 30.0,
        "against": "torch gradients",
    }
    assert found["features_over_best_peer"]["median"] == 4.0
    assert found["features_sparse_over_best_peer"] == {
        "median": 16.0,
        "low": 4.0,
        "high": 24.0,
        "against": "torch scores",
    }
    assert not any("per_module" in name or name.startswith("gradients") for name in found)


def test_without_peers_there_is_no_ratio(report):
    ours = {name: rates for name, rates in RATES.items() if name.startswith("ntkjax")}
    assert report.ratios(ours, dense=("torch scores",), gradients=("torch gradients",)) == {}


def test_bench_entries_of_others_stay(report, tmp_path):
    path = tmp_path / "build" / "bench.json"
    report.merge_bench(path, {"a": {"median": 1.0}})
    report.merge_bench(path, {"b": {"median": 2.0}, "a": {"median": 3.0}})
    assert json.loads(path.read_text()) == {"a": {"median": 3.0}, "b": {"median": 2.0}}


def test_kernels_are_compared_to_the_output_they_are_of(report):
    rng = np.random.default_rng(0)
    g, h = rng.normal(size=(2, 4, 50))
    ours = {"kind": np.asarray("sum_logits"), "exact": g @ g.T, "loss": h @ h.T}
    same = lambda **evidence: report.compare_kernels(evidence, ours)
    assert same(kind=np.asarray("loss"), exact=h @ h.T)["kernel"] == 0
    assert same(kind=np.asarray("sum_logits"), exact=h @ h.T)["kernel"] > 0.1
    np.testing.assert_allclose(same(kind=np.asarray("sum_logits"), exact=1.01 * g @ g.T)["kernel"], 0.01, rtol=1e-9)
    scores = same(kind=np.asarray("sum_logits"), exact=g @ g.T, scores=(g @ g.T).mean(axis=1))["scores"]
    assert scores < 1e-15


def test_the_expected_error_of_a_sketch_is_that_of_gaussian_maps(report):
    """Many maps of independent normals: the root mean square of the error is what ``expected`` says."""
    rng, size = np.random.default_rng(1), 64
    g = rng.normal(size=(3, 40)) + 1.0
    exact = g @ g.T
    ours, errors = {"exact": exact, "loss": exact}, []
    for _ in range(400):
        phi = g @ rng.normal(size=(40, size)) / np.sqrt(size)
        evidence = {"kind": np.asarray("sum_logits"), "sketched": phi @ phi.T, "size": np.asarray(size)}
        row = report.compare_kernels(evidence, ours)
        errors.append(row["sketched"])
    np.testing.assert_allclose(np.sqrt(np.mean(np.square(errors))), row["expected"], rtol=0.1)


def test_the_page_shows_what_was_measured_and_what_was_not(report, tmp_path):
    dense = ("torch scores", "trak features")
    facts = {name: {"note": "a note", "rows": 8, "versions": {"python": "3.11"}, "peak": 3 << 30} for name in RATES}
    task = {"threads": 2, "model": "some/model", "parameters": 12, "length": 8, "padding": 0.25, "size": 64}
    agreed = {"torch scores": {"kernel": 1e-7, "sketched": 0.1, "expected": 0.2}}
    ratios = report.ratios(RATES, dense=dense, gradients=("torch gradients",))
    run = report.Run(
        ["python", "x y"], task, 3, RATES, RATES, facts, agreed, {"bergson dense": "no torchvision"}, ratios, dense
    )
    report.write(tmp_path, run)
    page = (tmp_path / "results.md").read_text()
    assert "'x y'" in page and "150" in page and "no torchvision" in page and "0.100 (0.200)" in page
    rows = (tmp_path / "results.csv").read_text().splitlines()
    assert len(rows) == len(RATES) + 1 and rows[1].startswith("ntkjax scores")
    assert (tmp_path / "throughput.png").stat().st_size > 1000


@pytest.mark.slow
def test_our_worker_agrees_with_explicit_kernels(load_file, script, report, tmp_path, monkeypatch):
    """Task, worker and comparison on the embedded model, in this process."""
    monkeypatch.syspath_prepend(str(PEERS))
    ours = load_file(PEERS / "run_ntkjax.py")
    config = script.Throughput(
        size=32, length=16, score_rows=3, feature_rows=3, gradient_rows=2, peer_rows=2, checked=2, token_budget=32,
        microbatch=2, run=tmp_path,
    )  # fmt: skip
    task = script.prepare(config, tmp_path)
    assert json.loads((tmp_path / "task.json").read_text())["our_rows"]["scores"] == 3
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    held = {}
    for variant in ("scores", "gradients", "features-rademacher"):
        job = ours.make(task, variant)
        job.check(str(tmp_path / f"{variant}.npz"))
        with np.load(tmp_path / f"{variant}.npz") as file:
            held[variant] = dict(file)
        if variant == "scores":
            result = job.run()
            assert np.isfinite(result).all() and len(result) == job.rows == 3
    rows = {name: report.compare_kernels(evidence, held["scores"]) for name, evidence in held.items()}
    assert rows["scores"]["scores"] < 1e-5 and rows["gradients"]["kernel"] < 1e-5
    assert 0 < rows["features-rademacher"]["sketched"] < 5 * rows["features-rademacher"]["expected"]
    assert held["scores"]["exact"][0, 0] > 0


@pytest.mark.parametrize("name", ["torch", "trak", "dattri", "bergson"])
def test_requirements_of_peers_are_names_and_versions(name):
    import re

    lines = (PEERS / f"{name}.txt").read_text().splitlines()
    assert lines and all(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*==[A-Za-z0-9.!]+", line) for line in lines)
    assert (PEERS / f"run_{name}.py").exists()
